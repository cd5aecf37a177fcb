"""Text sources, the split by document, packing, and what is said when there is too little."""

import gzip
import sys
import types

import pytest
import torch
from dijiang import data
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def sentences(seed: int, count: int = 40) -> str:
    return "\n\n".join(
        f"Paragraph {i} of document {seed} says {i * seed + 7}." for i in range(count)
    )


def test_default_is_pythons_own_text():
    corpus = data.load_text()
    train, held = corpus.characters
    assert corpus.name == "pydoc_data.topics"
    assert train > 200_000
    assert 0.05 * (train + held) < held < 0.15 * (train + held)
    assert data.load_text("pydoc") == corpus


def test_split_is_deterministic_and_by_whole_documents(tmp_path):
    texts = [sentences(seed) for seed in range(1, 21)]
    for index, text in enumerate(texts):
        (tmp_path / f"{index:02}.txt").write_text(text)
    corpus = data.load_text(tmp_path)
    assert corpus == data.load_text(tmp_path)
    assert sorted(corpus.train + corpus.held_out) == sorted(texts)
    assert len(corpus.held_out) == 2
    # Names do not matter: the same texts under others are split the same way.
    other = tmp_path / "other"
    other.mkdir()
    for index, text in enumerate(reversed(texts)):
        (other / f"x{index:02}.md").write_text(text)
    assert set(data.load_text(other).held_out) == set(corpus.held_out)


def test_no_held_out_paragraph_is_trained_on(tmp_path):
    shared = "This very paragraph stands in each of the documents, with one blank too many."
    for index in range(10):
        (tmp_path / f"{index}.txt").write_text(sentences(index + 1) + "\n\n" + shared)
    corpus = data.load_text(tmp_path)
    assert any(shared in text for text in corpus.held_out)
    assert not any(shared in text for text in corpus.train)
    spaced = data._without_shared_paragraphs([shared.replace(" ", "\n")], [shared])
    assert spaced == []


def test_python_topics_share_no_paragraph():
    corpus = data.load_text()
    held = {" ".join(p.split()) for text in corpus.held_out for p in data._paragraphs(text)}
    train = {" ".join(p.split()) for text in corpus.train for p in data._paragraphs(text)}
    assert not {p for p in held & train if len(p) >= 40}


def test_one_file_keeps_its_end_for_measuring(tmp_path):
    path = tmp_path / "book.txt"
    text = sentences(3, 100)
    path.write_text(text)
    corpus = data.load_text(path)
    assert len(corpus.train) == len(corpus.held_out) == 1
    assert text.startswith(corpus.train[0].strip()) and text.endswith(corpus.held_out[0].strip())
    assert 0.05 < len(corpus.held_out[0]) / len(text) < 0.15


def test_kinds_of_files(tmp_path):
    page = (
        "<html><head><title>T</title><style>p {}</style></head><body><p>One &amp; two\n  <b>three"
        "</b>.</p><script>var x;</script><p>Four<br>five</p></body></html>"
    )
    (tmp_path / "a.html").write_text(page)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"Packed text."))
    (tmp_path / "c.md").write_text("# Title")
    (tmp_path / "d.py").write_text("ignored = True")
    documents = data._read_folder(tmp_path)
    assert documents == ["One & two three.\n\nFour\nfive", "Packed text.", "# Title"]


@pytest.mark.parametrize(
    "content, message",
    [(b"", r"notes\.txt: no text in it \(0 characters\)"), (b"ab\0cd", "binary data")],
)
def test_unusable_files(tmp_path, content, message):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(data.DataError, match=message):
        data.load_text(path)


def test_missing_file_and_empty_folder(tmp_path):
    with pytest.raises(data.DataError, match=r"gone\.txt: no such file or folder"):
        data.load_text(tmp_path / "gone.txt")
    with pytest.raises(data.DataError, match=r"no text files in it \(0 files"):
        data.load_text(tmp_path)
    (tmp_path / "bad.txt.gz").write_bytes(b"not gzip")
    with pytest.raises(data.DataError, match="cannot be read"):
        data.load_text(tmp_path)
    with pytest.raises(data.DataError, match="between 0 and 1"):
        data.load_text(held_out=1.0)


def test_one_word_cannot_be_split(tmp_path):
    path = tmp_path / "word.txt"
    path.write_text("word")
    with pytest.raises(data.DataError, match=r"too little text.*1 documents, 4 characters"):
        data.load_text(path)


def test_dataset_id_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(data.DataError, match="pip install datasets"):
        data.load_text("someone/something")


def test_dataset_id(monkeypatch):
    class Rows(dict):
        column_names = ("text",)

    def load_dataset(name, config, split):
        assert (name, config, split) == ("someone/something", "small", "train")
        return Rows(text=[sentences(seed) for seed in range(10)] + [""])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    corpus = data.load_text("someone/something:small")
    assert len(corpus.train) + len(corpus.held_out) == 10
    Rows.column_names = ("label",)
    with pytest.raises(data.DataError, match="no column 'text', only label"):
        data.load_text("someone/something:small")


def test_pack_keeps_the_stream(tokenizer):
    documents = [sentences(1), sentences(2)]
    stream = data.tokenize(documents, tokenizer)
    blocks = data.pack(documents, tokenizer, 64)
    assert blocks.dtype == torch.int64
    assert blocks.shape == (stream.numel() // 64, 64)
    assert torch.equal(blocks.flatten(), stream[: blocks.numel()])
    assert tokenizer.decode(blocks.flatten()[:40]) == tokenizer.decode(stream[:40])
    assert data.pack(documents, tokenizer, 64, blocks=2).shape == (2, 64)


def test_pack_too_short(tokenizer):
    count = data.tokenize(["short"], tokenizer).numel()
    with pytest.raises(data.DataError, match=f"mine: too short, {count} tokens where one block"):
        data.pack(["short"], tokenizer, 4096, name="mine")
    with pytest.raises(data.DataError, match="at least 2 tokens, got 1"):
        data.pack(["short"], tokenizer, 1)


def writer(seed=0):
    model = tiny_model(seed, initializer_range=0.3).train()
    model.generation_config.bos_token_id = 1
    return model


def test_written_by_is_the_models_own_distribution():
    """Surprises it no more than its own entropy says, and less than anybody else."""
    model, steps = writer(), []
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    ids = data.written_by(model, 5, 40, batch_size=2, progress=lambda *at: steps.append(at))
    assert torch.equal(torch.rand(1), expected) and model.training
    assert ids.shape == (5, 40) and ids.dtype == torch.int64 and set(ids[:, 0].tolist()) == {1}
    assert steps[-1] == (200, 200) and steps == sorted(steps)
    assert len({tuple(row) for row in ids.tolist()}) == 5

    @torch.no_grad()
    def losses(model):
        p = model.eval()(ids).logits[:, :-1].log_softmax(-1)
        surprise = -p.gather(-1, ids[:, 1:, None])[..., 0]
        return surprise.mean().item(), -(p.exp() * p).sum(-1).mean().item()

    surprise, entropy = losses(model)
    assert surprise == pytest.approx(entropy, abs=0.35)
    assert losses(writer(1))[0] > surprise + 1

    assert torch.equal(data.written_by(model, 5, 40, batch_size=2), ids)
    assert not torch.equal(data.written_by(model, 5, 40, batch_size=2, seed=1), ids)


def test_written_by_refuses():
    model = writer()
    with pytest.raises(data.DataError, match="rows=0"):
        data.written_by(model, 0, 8)
    with pytest.raises(data.DataError, match="temperature must be above 0, got 0"):
        data.written_by(model, 1, 8, temperature=0)
    model.generation_config.bos_token_id = None
    with pytest.raises(data.DataError, match="bos_token_id"):
        data.written_by(model, 1, 8)


def test_repeats_are_copies_of_the_first_half():
    rows = torch.arange(3 * 100).view(3, 100)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    repeated = data.with_repeats(rows, 8)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(rows, torch.arange(300).view(3, 100))  # those given are left as they were

    copied = (repeated != rows).any(0)
    begins = range(58, 93, 16)
    assert copied.nonzero().flatten().tolist() == [b + i for b in begins for i in range(8)]
    places = set()
    for row, source in zip(repeated, rows, strict=True):
        for begin in begins:
            place = int(row[begin] - source[0])
            places.add(place)
            assert 0 <= place <= 50 - 8
            assert torch.equal(row[begin : begin + 8], source[place : place + 8])
    assert len(places) > 5
    assert torch.equal(data.with_repeats(rows, 8), repeated)
    assert not torch.equal(data.with_repeats(rows, 8, seed=1), repeated)


def test_repeats_refuse():
    with pytest.raises(data.DataError, match=r"rows must be \(rows, seqlen\), got \(100,\)"):
        data.with_repeats(torch.arange(100))
    for passage in (0, 26):
        with pytest.raises(data.DataError, match=f"a row's 100 tokens, got {passage}"):
            data.with_repeats(torch.zeros(1, 100, dtype=torch.int64), passage)
