"""Text for training and measuring, from a file, a folder, a `datasets` id or Python itself.

A corpus is split by document into a training and a held-out part, always the same way, and a
paragraph that stands in both is taken out of the training part, so that nothing held out was seen.

    corpus = dijiang.data.load_text("notes/")                       # or None: Python's own help
    blocks = dijiang.data.pack(corpus.train, tokenizer, 512)        # (n, 512) token ids
"""

from __future__ import annotations

import gzip
import hashlib
import html.parser
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

DEFAULT_SOURCE = "pydoc"
SUFFIXES = (".txt", ".md", ".rst", ".html", ".htm")


class DataError(ValueError):
    """Text that is missing, empty or too short; the message names the source and the count."""


@dataclass(frozen=True)
class Corpus:
    """Documents of one source, split for good into `train` and `held_out`."""

    name: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]

    @property
    def characters(self) -> tuple[int, int]:
        """Characters of (train, held_out)."""
        return sum(map(len, self.train)), sum(map(len, self.held_out))


def load_text(source: str | Path | None = None, *, held_out: float = 0.1) -> Corpus:
    """Reads `source` and splits it: `held_out` is the share of characters kept for measuring.

    source: a text file, a folder of them (.txt .md .rst .html, each also .gz), a `datasets` id
    (`owner/name` or `owner/name:config`, its `text` column), or None for `pydoc_data.topics`.
    Raises DataError when there is nothing to read or too little to split.
    """
    if not 0.0 < held_out < 1.0:
        raise DataError(f"held_out must be between 0 and 1, got {held_out}")
    name, documents = _read(source)
    documents = [text for text in (d.strip() for d in documents) if text]
    if not documents:
        raise DataError(f"{name}: no text in it (0 characters)")
    train, held = _split(documents, held_out)
    train = _without_shared_paragraphs(train, held)
    if not train or not held:
        total = sum(map(len, documents))
        raise DataError(
            f"{name}: too little text to split into training and held-out parts "
            f"({len(documents)} documents, {total} characters)"
        )
    return Corpus(name, tuple(train), tuple(held))


def tokenize(documents: Iterable[str], tokenizer) -> torch.Tensor:
    """One stream of token ids, int64 (n,): the documents in order, an empty line between them."""
    # One call a document: its length warning speaks of model inputs, which these are not.
    ids: list[int] = []
    for text in documents:
        ids.extend(tokenizer(text + "\n\n", add_special_tokens=False, verbose=False)["input_ids"])
    return torch.tensor(ids, dtype=torch.int64)


def pack(
    documents: Iterable[str],
    tokenizer,
    length: int,
    *,
    blocks: int | None = None,
    name: str = "the text",
) -> torch.Tensor:
    """Token ids of `documents` cut into blocks without overlap: int64 (n, length).

    At most `blocks` of them when given; what is left over at the end is dropped. Raises DataError
    when not even one block comes out, with `name` in the message.
    """
    return cut(tokenize(documents, tokenizer), length, blocks=blocks, name=name)


def cut(
    tokens: torch.Tensor, length: int, *, blocks: int | None = None, name: str = "the text"
) -> torch.Tensor:
    """Cuts a stream of token ids (n,) into (n // length, length), at most `blocks` rows."""
    if length < 2:
        raise DataError(f"a block needs a length of at least 2 tokens, got {length}")
    count = tokens.numel() // length
    if count == 0:
        raise DataError(
            f"{name}: too short, {tokens.numel()} tokens where one block takes {length}; "
            "give more text or a smaller length"
        )
    if blocks is not None:
        count = min(count, blocks)
    return tokens[: count * length].view(count, length)


def with_repeats(rows: torch.Tensor, passage: int = 64, *, seed: int = 0) -> torch.Tensor:
    """Rows whose second half repeats passages of the first, for training what recalls from afar.

    Little in a row of prose needs a token from thousands before it. Here every other passage of the
    second half is a copy of one of the first half, at a place drawn at random, so that a model that
    kept the tokens knows how it goes on.

    Args:
        rows: token ids, int64 (rows, seqlen).
        passage: tokens that are copied in one piece, at most a quarter of seqlen.
        seed: of the places; torch's own generator is left as it was.

    Returns:
        int64 (rows, seqlen), a copy.

    Raises:
        DataError: rows is not a matrix, or no passage of that size fits.

    >>> dijiang.data.with_repeats(torch.arange(16)[None], 4)
    tensor([[ 0,  1,  2,  3,  4,  5,  6,  7,  8,  9, 10, 11,  4,  5,  6,  7]])
    """
    if rows.ndim != 2:
        raise DataError(f"with_repeats: rows must be (rows, seqlen), got {tuple(rows.shape)}")
    length = rows.shape[1]
    if not 1 <= passage <= length // 4:
        raise DataError(
            f"with_repeats: passage must be 1 to a quarter of a row's {length} tokens, "
            f"got {passage}"
        )
    generator = torch.Generator().manual_seed(seed)
    repeated, half = rows.clone(), length // 2
    for row, source in zip(repeated, rows, strict=True):
        for begin in range(half + passage, length - passage + 1, 2 * passage):
            place = int(torch.randint(half - passage + 1, (), generator=generator))
            row[begin : begin + passage] = source[place : place + passage]
    return repeated


@torch.no_grad()
def written_by(
    model, rows: int, length: int, *, batch_size: int = 8, temperature: float = 1.0, seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Token ids that a model writes itself, for converting it where there is no text at hand.

    Each row is sampled from the model's whole distribution, p(t) = softmax(logits / temperature),
    from its first token on, without an end.

    Args:
        model: a transformers causal language model, as it is before convert.
        rows, length: how many, and of how many tokens each.
        batch_size: rows written at a time.
        seed: of the sampling; torch's own generator is left as it was.
        progress: called with (tokens written, tokens in all).

    Returns:
        int64 (rows, length) on the CPU, as convert's calibration and distill take them.

    Raises:
        DataError: the model has no first token, or a count is too small.

    >>> ids = data.written_by(model, 2, 2048)                                  # doctest: +SKIP
    >>> dijiang.convert(model, calibration=ids)                                # doctest: +SKIP
    """
    if rows < 1 or length < 2 or batch_size < 1:
        raise DataError(
            "written_by: needs at least one row of two tokens and a batch of one, got "
            f"rows={rows}, length={length}, batch_size={batch_size}"
        )
    if not temperature > 0:
        raise DataError(f"written_by: temperature must be above 0, got {temperature}")
    settings = model.generation_config
    first = settings.bos_token_id
    if first is None:
        raise DataError(
            "written_by: the model has no first token. Set model.generation_config.bos_token_id"
        )
    done = []

    def count(ids, scores, **kwargs):
        if progress is not None:
            progress(len(done) * batch_size * length + ids.numel(), rows * length)
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

    training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        model.eval()
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            for begin in range(0, rows, batch_size):
                start = torch.full((min(batch_size, rows - begin), 1), first, device=model.device)
                out = model.generate(
                    start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0,
                    top_p=1.0, temperature=temperature, repetition_penalty=1.0,
                    min_new_tokens=length - 1, max_new_tokens=length - 1,
                    pad_token_id=settings.pad_token_id or 0, stopping_criteria=[count],
                )  # fmt: skip
                done.append(out.cpu())
    finally:
        model.train(training)
    return torch.cat(done)


def _read(source: str | Path | None) -> tuple[str, list[str]]:
    if source is None or source == DEFAULT_SOURCE:
        return "pydoc_data.topics", _python_topics()
    path = Path(source).expanduser()
    if path.is_dir():
        return str(source), _read_folder(path)
    if path.is_file():
        return str(source), [_read_file(path)]
    if _looks_like_path(str(source)):
        raise DataError(f"{source}: no such file or folder")
    return str(source), _read_dataset(str(source))


def _python_topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:  # some distributions ship Python without it
        raise DataError("this Python lacks pydoc_data; give a text file or folder") from error
    return [topics[name] for name in sorted(topics)]


def _read_folder(folder: Path) -> list[str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and _kind(path)]
    if not files:
        raise DataError(f"{folder}: no text files in it (0 files ending in {' '.join(SUFFIXES)})")
    return [_read_file(path) for path in files]


def _kind(path: Path) -> str:
    """The suffix that says how to read a file, .gz looked through; empty when it is no text."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else ""


def _read_file(path: Path) -> str:
    try:
        data = path.read_bytes()
        if path.suffix.lower() == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if b"\0" in data[:4096]:
        raise DataError(f"{path}: binary data where text was expected")
    text = data.decode("utf-8", errors="replace")
    return _html_to_text(text) if _kind(path) in (".html", ".htm") else text


def _looks_like_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or bool(_kind(Path(source)))


def _read_dataset(identifier: str) -> list[str]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{identifier}: no such file or folder; to read it as a dataset of that name, "
            "pip install datasets"
        ) from error
    name, _, config = identifier.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split="train")
    except Exception as error:  # datasets raises many kinds; all of them mean "not readable"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{identifier}: the dataset cannot be loaded: {reason}") from error
    if "text" not in rows.column_names:
        raise DataError(f"{identifier}: no column 'text', only {', '.join(rows.column_names)}")
    return [text for text in rows["text"] if text]


_HIDDEN = frozenset(["script", "style", "head", "template"])
_INLINE = frozenset(
    ["a", "b", "i", "em", "strong", "code", "span", "tt", "sub", "sup", "small", "u"]
)


class _TextOf(html.parser.HTMLParser):
    """The words a reader of the page sees, one paragraph per block element."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._hidden = 0
        self.parts: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag in _HIDDEN:
            self._hidden += 1
        elif tag not in _INLINE:
            self.parts.append("\n\n" if tag != "br" else "\n")

    def handle_endtag(self, tag):
        if tag in _HIDDEN:
            self._hidden = max(0, self._hidden - 1)
        elif tag not in _INLINE:
            self.parts.append("\n\n")

    def handle_data(self, data):
        if not self._hidden:
            self.parts.append(re.sub(r"\s+", " ", data))


def _html_to_text(page: str) -> str:
    reader = _TextOf()
    reader.feed(page)
    reader.close()
    text = re.sub(r" *\n *", "\n", "".join(reader.parts))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _split(documents: Sequence[str], share: float) -> tuple[list[str], list[str]]:
    """Whole documents, drawn in the order of a hash of their text: no seed, no dependence on names.

    A single document is cut once between two paragraphs instead, its end held out.
    """
    if len(documents) == 1:
        text = documents[0]
        near = int(len(text) * (1.0 - share))
        breaks = [match.end() for match in re.finditer(r"\n\s*\n|\n|(?<=[.!?])\s", text)]
        breaks = [place for place in breaks if 0 < place < len(text)]
        if not breaks:
            return [], [text]
        at = min(breaks, key=lambda place: abs(place - near))
        return [text[:at]], [text[at:]]

    wanted = share * sum(map(len, documents))
    drawn = sorted(
        range(len(documents)), key=lambda i: hashlib.sha256(documents[i].encode()).digest()
    )
    held: set[int] = set()
    size = 0
    for index in drawn:
        if size + len(documents[index]) <= 1.25 * wanted:
            held.add(index)
            size += len(documents[index])
        if size >= wanted:
            break
    if not held:  # every document is larger than the share: the smallest one is held out
        held = {min(drawn, key=lambda i: len(documents[i]))}
    return (
        [text for i, text in enumerate(documents) if i not in held],
        [text for i, text in enumerate(documents) if i in held],
    )


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n\s*\n", text)


def _without_shared_paragraphs(train: Sequence[str], held: Sequence[str]) -> list[str]:
    """`train` without the paragraphs that also stand in `held`, whatever their white space."""
    # Short ones (a heading, "Note:") are the language's, not the document's.
    seen = {" ".join(p.split()) for text in held for p in _paragraphs(text)}
    seen = {p for p in seen if len(p) >= 40}
    kept = []
    for text in train:
        rest = [p for p in _paragraphs(text) if " ".join(p.split()) not in seen]
        if "".join(rest).strip():
            kept.append("\n\n".join(rest))
    return kept
