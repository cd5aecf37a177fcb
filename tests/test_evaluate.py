"""Perplexity, pass keys, decoding speed and cache size, against what can be worked out by hand."""

import dataclasses
import json
import math

import pytest
import torch
from dijiang import data, evaluate
from tiny import tiny_model, tiny_tokenizer
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model(vocab_size=len(tokenizer))


@pytest.fixture(scope="module")
def prose(tokenizer):
    return data.tokenize(data.load_text().held_out, tokenizer)


class Counter(nn.Module):
    """Predicts token + 1 with probability `sure`, the other tokens alike."""

    def __init__(self, vocab: int, sure: float):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.vocab, self.sure = vocab, sure

    def forward(self, input_ids, use_cache=False):
        rest = (1 - self.sure) / (self.vocab - 1)
        probabilities = torch.full((*input_ids.shape, self.vocab), rest)
        probabilities.scatter_(-1, (input_ids + 1)[..., None] % self.vocab, self.sure)
        return CausalLMOutputWithPast(logits=probabilities.log())


def test_perplexity_by_hand():
    blocks = torch.arange(10).repeat(3, 1)
    result = evaluate.perplexity(Counter(16, 0.5), blocks)
    assert result.perplexity == pytest.approx(2.0, rel=1e-6)
    assert (result.length, result.tokens) == (10, 27)
    assert result.standard_error == pytest.approx(0.0, abs=1e-6)
    blocks[1] = 3  # every token after the first is one of the 15 others
    result = evaluate.perplexity(Counter(16, 0.5), blocks)
    losses = [math.log(2), math.log(30), math.log(2)]
    assert result.loss == pytest.approx(sum(losses) / 3, rel=1e-6)
    assert result.standard_error == pytest.approx((losses[1] - losses[0]) / 3, rel=1e-5)


def test_perplexity_is_the_models_own_loss(model, prose):
    blocks = data.cut(prose, 300, blocks=2)  # longer than one slice of the loss
    expected = torch.stack([model(row[None], labels=row[None]).loss for row in blocks]).mean()
    assert evaluate.perplexity(model, blocks).loss == pytest.approx(expected.item(), rel=1e-5)


def test_perplexity_refuses_a_flat_stream(model, prose):
    with pytest.raises(ValueError, match=r"must be \(windows, length >= 2\), got \(20,\)"):
        evaluate.perplexity(model, prose[:20])


def test_positions_by_hand():
    """Bins from 1, 2, 4 and 8 tokens before on; a wrong token costs log 30, a right one log 2."""
    blocks = torch.arange(10).repeat(2, 1)
    blocks[0, 9] = 0  # token 9 alone, the last bin's
    blocks[1, 2:4] = 12  # tokens 2, 3 and 4: behind 12 comes 12, then 4
    made = evaluate.perplexity_by_position(Counter(16, 0.5), blocks)
    assert (made.length, made.windows) == (10, 2)
    assert [(b.begin, b.end, b.tokens) for b in made.bins] == [
        (1, 2, 2), (2, 4, 4), (4, 8, 8), (8, 10, 4)
    ]  # fmt: skip
    two, thirty = math.log(2), math.log(30)
    windows = [
        (two, two),
        (two, thirty),
        (two, (thirty + 3 * two) / 4),
        ((two + thirty) / 2, two),
    ]
    for one, (first, second) in zip(made.bins, windows, strict=True):
        assert one.loss == pytest.approx((first + second) / 2, rel=1e-6)
        assert one.perplexity == pytest.approx(math.exp(one.loss))
        assert one.standard_error == pytest.approx(abs(first - second) / 2, abs=1e-6)


def test_positions_are_the_models_own_losses(model, prose):
    blocks = data.cut(prose, 600, blocks=2)  # bins and slices of logits do not end together
    made = evaluate.perplexity_by_position(model, blocks, edges=[3, 250, 600])
    with torch.no_grad():
        logits = model(blocks, use_cache=False).logits[:, :-1]
    losses = nn.functional.cross_entropy(logits.mT, blocks[:, 1:], reduction="none")
    assert [b.loss for b in made.bins] == pytest.approx(
        [losses[:, 2:249].mean().item(), losses[:, 249:].mean().item()], rel=1e-5
    )
    # All bins together are perplexity.
    bins = evaluate.perplexity_by_position(model, blocks).bins
    assert [b.begin for b in bins] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    whole = sum(b.loss * b.tokens for b in bins) / sum(b.tokens for b in bins)
    assert whole == pytest.approx(evaluate.perplexity(model, blocks).loss, rel=1e-6)


@pytest.mark.parametrize("edges", [[0, 4], [1], [1, 4, 4], [1, 17], [8, 2]])
def test_positions_refuse_edges(model, prose, edges):
    with pytest.raises(ValueError, match=r"edges must grow from at least 1 to at most .* 16, got"):
        evaluate.perplexity_by_position(model, data.cut(prose, 16, blocks=1), edges)


def test_a_window_forgets_what_positions_show(prose, tokenizer):
    """A text that repeats every 40 tokens: who sees 40 back falls, who sees 8 back does not."""

    class Repeats(Counter):
        def __init__(self, vocab, reach):
            super().__init__(vocab, 0.9)
            self.reach = reach

        def forward(self, input_ids, use_cache=False):
            period, n = 40, input_ids.shape[1]
            probabilities = torch.full((1, n, self.vocab), 1 / self.vocab)
            if self.reach >= period:
                for t in range(period - 1, n):
                    probabilities[0, t] = 0.1 / (self.vocab - 1)
                    probabilities[0, t, input_ids[0, t + 1 - period]] = 0.9
            return CausalLMOutputWithPast(logits=probabilities.log())

    block = prose[:40].repeat(5)[None]
    vocab = len(tokenizer)
    far = evaluate.perplexity_by_position(Repeats(vocab, 64), block, [1, 40, 200]).bins
    near = evaluate.perplexity_by_position(Repeats(vocab, 8), block, [1, 40, 200]).bins
    assert far[0].perplexity == pytest.approx(vocab, rel=1e-4)
    assert far[1].perplexity == pytest.approx(1 / 0.9, rel=1e-4)
    assert near[1].perplexity == pytest.approx(vocab, rel=1e-4)


def test_the_head_sees_a_slice_at_a_time(model, prose):
    """Logits of a whole window are never there, and the slices are the whole window's."""
    rows = []
    hook = model.lm_head.register_forward_hook(lambda m, args, out: rows.append(out.shape[-2]))
    ids = prose[:700]
    with torch.inference_mode():
        logits = evaluate._models.sliced_logits(model, ids)
        parts = [logits(begin, end) for begin, end in evaluate._models.slices(700)]
    hook.remove()
    assert sum(rows) == 702 and max(rows) <= evaluate._models.SLICE
    with torch.no_grad():
        expected = model(ids[None], use_cache=False).logits[0]
    assert torch.allclose(torch.cat(parts), expected, atol=1e-5)
    assert not model.lm_head._forward_pre_hooks


def test_what_a_model_does_to_its_logits_is_kept(prose):
    """Granite divides them: the head alone would give others."""
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    granite = GraniteForCausalLM(
        GraniteConfig(
            vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, logits_scaling=0.1,
        )
    ).eval()  # fmt: skip
    blocks = data.cut(prose, 80, blocks=2)
    expected = torch.stack([granite(row[None], labels=row[None]).loss for row in blocks]).mean()
    assert evaluate.perplexity(granite, blocks).loss == pytest.approx(expected.item(), rel=1e-5)


def test_gap_closed():
    def measured(value, tokens=27):
        return evaluate.Perplexity(10, tokens, math.log(value), value, 0.0)

    assert evaluate.gap_closed(10.0, 15.0, 12.0) == pytest.approx(0.6)
    assert evaluate.gap_closed(measured(10), measured(15), measured(16)) == pytest.approx(-0.2)
    assert evaluate.gap_closed(10.0, 15.0, 10.0) == 1.0
    with pytest.raises(ValueError, match="worse than the teacher for a gap to close, got"):
        evaluate.gap_closed(10.0, 10.0, 10.0)
    with pytest.raises(ValueError, match="on the same windows, got"):
        evaluate.gap_closed(measured(10), measured(15, tokens=9), measured(12))


def test_progress_reaches_the_end(model, tokenizer, prose):
    seen = []
    note = lambda done, total: seen.append((done, total))  # noqa: E731
    evaluate.perplexity(model, data.cut(prose, 16, blocks=3), progress=note)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    seen.clear()
    evaluate.decode_speed({"a": model}, prose, [32], steps=2, prefill=16, progress=note)
    assert seen[-1] == (34, 34)
    seen.clear()
    evaluate.pass_key_recall(model, tokenizer, prose, 16, trials=2, progress=note)
    assert seen == [(1, 2), (2, 2)]


class KeyReader(nn.Module):
    """Answers with the tokens that followed the last ` ` + digit before the prose, if in reach."""

    def __init__(self, tokenizer, reach: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.tokenizer, self.reach = tokenizer, reach

    def forward(self, input_ids, use_cache=False):
        text = self.tokenizer.decode(input_ids[0, -self.reach :])
        keys = [word.strip(".") for word in text.split() if word.strip(".").isdigit()]
        logits = torch.zeros(*input_ids.shape, len(self.tokenizer))
        # The answer itself is the last key in the text: only those before it may be read.
        if len(keys) > 1:
            answer = evaluate._models.token_ids(self.tokenizer, f" {keys[0]}")
            logits[0, -answer.numel() - 1 : -1].scatter_(-1, answer[:, None], 50.0)
        return CausalLMOutputWithPast(logits=logits)


def test_recall_tells_who_remembers(tokenizer):
    prose = data.tokenize(
        ["And so it went on and on, with nothing to count in it. " * 40], tokenizer
    )
    far = evaluate.pass_key_recall(KeyReader(tokenizer, 10_000), tokenizer, prose, 100, trials=4)
    near = evaluate.pass_key_recall(KeyReader(tokenizer, 64), tokenizer, prose, 100, trials=4)
    assert (far.accuracy, far.distance, far.trials) == (1.0, 100, 4)
    assert near.accuracy == 0.0
    assert far.loss < 1e-3 < near.loss


def test_recall_is_the_same_task_for_every_model(model, tokenizer, prose):
    one = evaluate.pass_key_recall(model, tokenizer, prose, 50, trials=3, seed=5)
    assert one == evaluate.pass_key_recall(model, tokenizer, prose, 50, trials=3, seed=5)
    assert one.loss != evaluate.pass_key_recall(model, tokenizer, prose, 50, trials=3, seed=6).loss
    with pytest.raises(ValueError, match="100000000 tokens of prose are wanted, the text has"):
        evaluate.pass_key_recall(model, tokenizer, prose, 100_000_000)


def test_decode_speed_counts_the_softmax_cache(model, prose):
    points = evaluate.decode_speed({"a": model, "b": model}, prose[:40], [64, 128], steps=3)
    config = model.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * 16 * 4
    for rows in points.values():
        assert [row.context for row in rows] == [64, 128]
        # The steps' own tokens stand in the cache when it is measured.
        assert [row.cache_bytes for row in rows] == [token * 67, token * 131]
        for row in rows:
            assert row.tokens_per_second == pytest.approx(1e3 / row.step_ms)
            assert row.step_ms_low <= row.step_ms <= row.step_ms_high
    json.dumps(dataclasses.asdict(points["a"][0]))


def test_cache_bytes_counts_each_storage_once():
    x = torch.zeros(10)
    assert evaluate.cache_bytes({"a": x, "b": [x, x[:3]], "c": (torch.zeros(2),), "d": 3}) == 48


def test_generate(model, tokenizer):
    made = evaluate.generate(model, tokenizer, "The assert statement", max_new_tokens=8)
    ids = tokenizer("The assert statement", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=1)[0]
    assert made.text == tokenizer.decode(expected[ids.shape[1] :], skip_special_tokens=True)
    assert made.tokens <= 8 and made.seconds > 0
    with pytest.raises(ValueError, match="prompt is empty"):
        evaluate.generate(model, tokenizer, "")
