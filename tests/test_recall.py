"""Recall tasks tell who remembers from who does not, by models whose memory is known."""

import re

import dijiang
import pytest
import torch
import torch.nn.functional as F
from dijiang import data, evaluate
from tiny import tiny_model, tiny_tokenizer
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def prose(tokenizer):
    return data.tokenize(data.load_text().held_out[:3], tokenizer)


class Reader(nn.Module):
    """A model by its rule: `likeliest` gives the token it is sure of after each prefix it knows."""

    def __init__(self, vocab: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.vocab = vocab
        self.read: list[torch.Tensor] = []

    def forward(self, input_ids, use_cache=False):
        self.read.append(input_ids[0].clone())
        logits = torch.zeros(1, input_ids.shape[1], self.vocab)
        for at, token in self.likeliest(input_ids[0].tolist()):
            logits[0, at, token] = 50.0
        return CausalLMOutputWithPast(logits=logits)


class Copier(Reader):
    """After a token it expects what came after the same token and the one before it, in reach."""

    def __init__(self, vocab: int, reach: int):
        super().__init__(vocab)
        self.reach = reach

    def likeliest(self, ids):
        for at in range(1, len(ids)):
            for past in range(at - 1, max(0, at - self.reach), -1):
                if ids[past - 1 : past + 1] == ids[at - 1 : at + 1]:
                    yield at, ids[past + 1]
                    break


class Addresses(Reader):
    """Knows the cities of the last text of `reach` tokens: whose they are, or (blind) only one."""

    def __init__(self, tokenizer, reach: int, blind: bool = False):
        super().__init__(len(tokenizer))
        self.tokenizer, self.reach, self.blind = tokenizer, reach, blind

    def likeliest(self, ids):
        said = re.findall(
            r"(\w+) lives in (\w+)\.", self.tokenizer.decode(ids[: len(ids)][-self.reach :])
        )
        question = self.tokenizer.decode(ids).rpartition("\n")[2]
        who = re.match(r"Where does (\w+) live\? \1 lives in", question)[1]
        city = said[0][1] if said and self.blind else dict(said).get(who)
        if city:
            answer = evaluate._models.token_ids(self.tokenizer, f" {city}").tolist()
            given = evaluate._models.token_ids(self.tokenizer, question).tolist()
            # Where the question's own tokens end and the true answer's begin.
            asked = evaluate._models.token_ids(self.tokenizer, question.rpartition(" ")[0])
            start = len(ids) - (len(given) - len(asked))
            yield from zip(range(start - 1, len(ids) - 1), answer, strict=False)


def test_copying_needs_the_first_copy(tokenizer, prose):
    far = Copier(len(tokenizer), 10_000)
    made = evaluate.copy_recall(far, tokenizer, prose, 100, trials=3, length=16)
    assert (made.accuracy, made.distance, made.trials) == (1.0, 100, 3)
    assert made.standard_error == 0.0 and made.loss < 1e-3
    near = Copier(len(tokenizer), 100)
    made = evaluate.copy_recall(near, tokenizer, prose, 100, trials=3, length=16)
    assert made.accuracy < 0.1 and made.loss > 3
    assert evaluate.copy_recall(near, tokenizer, prose, 50, trials=3, length=16).accuracy == 1.0


def test_a_passage_stands_twice_and_is_of_different_tokens(tokenizer, prose):
    model = Copier(len(tokenizer), 8)
    evaluate.copy_recall(model, tokenizer, prose, 30, trials=4, length=16)
    assert len(model.read) == 4
    for ids in model.read:
        assert len(ids) == 16 + 30 + 16
        assert torch.equal(ids[:16], ids[-16:]) and len(set(ids[:16].tolist())) == 16
    assert len({tuple(ids[:16].tolist()) for ids in model.read}) == 4


def test_association_is_more_than_remembering_cities(tokenizer, prose):
    ask = dict(trials=24, pairs=4, seed=3)
    knows = Addresses(tokenizer, 10_000)
    made = evaluate.associative_recall(knows, tokenizer, prose, 40, **ask)
    assert made.accuracy == 1.0 and made.loss < 1e-3
    blind = evaluate.associative_recall(
        Addresses(tokenizer, 10_000, blind=True), tokenizer, prose, 40, **ask
    )
    assert 0.02 < blind.accuracy < 0.7 and blind.standard_error > 0
    forgot = evaluate.associative_recall(Addresses(tokenizer, 40), tokenizer, prose, 40, **ask)
    assert forgot.accuracy < 0.1 and forgot.loss == pytest.approx(
        torch.tensor(float(len(tokenizer))).log().item(), rel=1e-4
    )


def test_associations_may_be_pass_keys(tokenizer, prose):
    model = Copier(len(tokenizer), 8)
    ask = dict(trials=4, pairs=3, answers="keys")
    evaluate.associative_recall(model, tokenizer, prose, 40, **ask)
    for ids in model.read:
        text = tokenizer.decode(ids.tolist())
        said = re.findall(r"The pass key of (\w+) is (\d{5})\.", text.partition("\n")[0])
        assert len({who for who, _ in said}) == len({key for _, key in said}) == 3
        who, asked, key = re.fullmatch(
            r"What is the pass key of (\w+)\? The pass key of (\w+) is (\d{5})",
            text.rpartition("\n")[2],
        ).groups()
        assert who == asked and (who, key) in said
    assert len({tuple(ids[:30].tolist()) for ids in model.read}) == 4


@pytest.mark.parametrize("task", list(evaluate.TASKS))
def test_every_model_gets_the_same_questions(task, tokenizer, prose):
    one, two = (Copier(len(tokenizer), reach) for reach in (8, 64))
    for model in (one, two):
        evaluate.TASKS[task](model, tokenizer, prose, 25, trials=3, seed=7)
    assert all(map(torch.equal, one.read, two.read)) and len(one.read) == 3
    assert not torch.equal(one.read[0][:20], one.read[1][:20])
    evaluate.TASKS[task](two, tokenizer, prose, 25, trials=3, seed=8)
    assert not torch.equal(two.read[0][:20], two.read[3][:20])


@pytest.mark.parametrize("task", list(evaluate.TASKS))
@torch.no_grad()
def test_figures_are_of_the_answers_tokens(task, tokenizer, prose):
    """Accuracy, loss and error once more, from whole logits and the question as it was read."""
    model = tiny_model(vocab_size=len(tokenizer))
    asked = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(kwargs["input_ids"][0].clone()), with_kwargs=True
    )
    made = evaluate.TASKS[task](model, tokenizer, prose, 20, trials=3)
    hook.remove()
    right, losses = [], []
    for ids in asked:
        if task == "copy":
            count = 28
        else:
            text = tokenizer.decode(ids)
            count = len(evaluate._models.token_ids(tokenizer, " " + text.rpartition(" ")[2]))
        logits = model(ids[None], use_cache=False).logits[0, -count - 1 : -1]
        right.append((logits.argmax(-1) == ids[-count:]).float().mean())
        losses.append(F.cross_entropy(logits, ids[-count:]))
    right, losses = torch.stack(right), torch.stack(losses)
    assert made.accuracy == pytest.approx(right.mean().item())
    assert made.loss == pytest.approx(losses.mean().item(), rel=1e-5)
    assert made.standard_error == pytest.approx(right.std().item() / 3**0.5)


def test_curve(tokenizer, prose):
    model = Copier(len(tokenizer), 100)
    seen = []
    rows = evaluate.recall_curve(
        model, tokenizer, prose, "copy", [20, 60, 200], trials=2, length=8,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert [row.distance for row in rows] == [20, 60, 200]
    assert [row.accuracy for row in rows[:2]] == [1.0, 1.0] and rows[2].accuracy < 0.5
    assert seen == [(i, 6) for i in range(1, 7)]


def test_curve_goes_to_sixteen_windows(tokenizer, prose):
    model = tiny_model(vocab_size=len(tokenizer))
    with pytest.raises(ValueError, match=r"has no window to measure by\. Give distances"):
        evaluate.recall_curve(model, tokenizer, prose, "copy", trials=1)
    dijiang.convert(model, dijiang.DiJiangConfig(window=8))
    rows = evaluate.recall_curve(model, tokenizer, prose, "pass-key", trials=1)
    assert [row.distance for row in rows] == [8, 16, 32, 64, 128]


def test_refused(tokenizer, prose):
    model = Copier(len(tokenizer), 8)
    with pytest.raises(ValueError, match="task must be one of pass-key, associative, copy, got"):
        evaluate.recall_curve(model, tokenizer, prose, "poetry", [10])
    with pytest.raises(ValueError, match="associative_recall: pairs must be 1 to 24, got 25"):
        evaluate.associative_recall(model, tokenizer, prose, 10, pairs=25)
    with pytest.raises(ValueError, match="answers must be one of cities, keys, got 'towns'"):
        evaluate.associative_recall(model, tokenizer, prose, 10, answers="towns")
    with pytest.raises(ValueError, match=r"length must be above 4 and at most the text's \d+"):
        evaluate.copy_recall(model, tokenizer, prose, 10, length=4)
    with pytest.raises(ValueError, match="copy_recall: 60 tokens of prose are wanted, the text"):
        evaluate.copy_recall(model, tokenizer, prose[:50], 60, length=8)
    with pytest.raises(ValueError, match=r"trials must be at least 1 .* got 0"):
        evaluate.copy_recall(model, tokenizer, prose, 10, trials=0)
    assert not model.read
