"""Bits per character of a model on texts, by position in the context, next to xz and zstd on the same bytes.

A text is read in windows of `context` characters that do not overlap, each a stream of its own: the model
predicts every character exactly once, the first one from the document separator, and knows at most `context`
characters before it. The compressors get each text whole, and so does what `match` proposes beside the model.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import lzma
import math
import shutil
import subprocess
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from butterfly_llm import memory
from butterfly_llm.archives import archive_suffix
from butterfly_llm.config import ButterflyConfig
from butterfly_llm.corpus import MANIFEST, SEPARATOR, Corpus
from butterfly_llm.data import read_context
from butterfly_llm.match import MatchedText
from butterfly_llm.text import Encoding, Errors, encode_counted, read_text

if TYPE_CHECKING:
    from butterfly_llm.model import Butterfly

MAX_CONTEXT = 65_536
BUCKETS = (128, 1024, 4096, 16_384, 65_536, 262_144, 1_048_576)  # right edges, characters
_LOGITS_SLICE = 8192  # positions whose log-probabilities are made at once


@dataclass(frozen=True)
class Document:
    """A text to evaluate: Latin-1 (or UTF-8) bytes, one character each, and what was lost in reading it."""

    name: str
    data: bytes
    losses: str = ""


@dataclass(frozen=True)
class BucketResult:
    """The characters at positions start <= p < stop of their window."""

    start: int
    stop: int
    chars: int
    bits_per_char: float


@dataclass(frozen=True)
class DocumentResult:
    """One text; all rates in bits per character, None for a compressor that is not installed."""

    name: str
    chars: int
    bits_per_char: float
    xz: float | None
    zstd: float | None
    matched: float | None = None
    """Model and match together, where asked for."""


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`; all rates in bits per character."""

    context: int
    chars: int
    bits_per_char: float
    xz: float | None
    zstd: float | None
    buckets: tuple[BucketResult, ...]
    documents: tuple[DocumentResult, ...]
    matched: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(self.to_dict())


def load_documents(
    paths: Sequence[str | Path],
    *,
    encoding: Encoding = "latin-1",
    errors: Errors = "strict",
    max_chars: int | None = None,
) -> list[Document]:
    """The texts to evaluate, each cut to its first `max_chars`.

    A file is one text as it stands; a directory or archive is one text in the corpus format; a directory
    made by `butterfly prepare` is the documents of its validation split. ValueError or OSError in one line.
    """
    documents = []
    for path in map(Path, paths):
        if (path / MANIFEST).is_file():
            corpus = Corpus(path, "val")
            for d in corpus.documents:
                data = corpus.read(d.offset, d.offset + d.characters).tobytes()
                documents.append(Document(d.name, data))
        elif path.is_dir() or archive_suffix(path):
            context = read_context([path], encoding=encoding, errors=errors)
            losses = [_replaced(context.replaced)] if context.replaced else []
            losses += [f"skipped {context.skips.summary()}"] if context.skips.counts else []
            documents.append(Document(str(path), context.data, ", ".join(losses)))
        else:
            size = path.stat().st_size
            if not path.is_file():
                raise ValueError(f"{path}: not a regular file; give a file, a directory or an archive")
            memory.require(8 * size, "cpu", f"reading {path}", "give a smaller text")
            encoded = encode_counted(read_text(path), source=str(path), encoding=encoding, errors=errors)
            losses = [_replaced(encoded.replaced)] if encoded.replaced else []
            documents.append(Document(str(path), encoded.data, ", ".join(losses)))
    return [dataclasses.replace(d, data=d.data[:max_chars]) for d in documents]


def _replaced(count: int) -> str:
    return f"{count:,} characters replaced by '?'"


def evaluate(
    model: Butterfly,
    documents: Sequence[Document],
    *,
    context: int | None = None,
    batch_chars: int = 16_384,
    compressors: bool = True,
    match: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Bits per character of `model` on `documents`.

    context:     characters in a window; None for the model's reach, at most 65,536.
    batch_chars: windows shorter than this are read together, up to this many characters at once.
    compressors: also run `xz -9e` and `zstd -19`.
    match:       also say what model and match give together (`match.py`); the match knows the whole text
                 before a character, further back than `context`.
    progress:    called with the number of characters evaluated so far.

    Memory is that of one forward pass over max(context, batch_chars) characters. ValueError for no or an
    empty document, a context below 1, a model that is not causal, and a pass that memory cannot hold.
    """
    if not model.config.causal:
        raise ValueError(
            f"evaluate: routing {model.config.routing!r} is not causal: it has no bits per character"
        )
    if context is None:
        context = min(model.config.reach_chars, MAX_CONTEXT)
    if context < 1:
        raise ValueError(f"evaluate: context must be at least 1, not {context}")
    if not documents:
        raise ValueError("evaluate: no text to evaluate")
    for document in documents:
        if not document.data:
            raise ValueError(f"evaluate: {document.name} is empty")

    device = next(model.parameters()).device
    lengths = [len(d.data) for d in documents]
    memory.require(
        estimate_bytes(model.config, max(min(context, max(lengths)), min(batch_chars, sum(lengths)))),
        str(device),
        f"evaluating with a context of {context:,}",
        "use a shorter context or a smaller model",
    )
    edges = _edges(context)
    bucket_nats = torch.zeros(len(edges), dtype=torch.float64)
    bucket_chars = torch.zeros(len(edges), dtype=torch.int64)
    document_nats = [0.0] * len(documents)
    matched = [MatchedText(d.data) for d in documents] if match else []
    done = 0
    for batch in _batches(lengths, context, batch_chars):
        inputs, targets = _load(batch, documents)
        kinds = [targets, _proposed(batch, matched, targets)] if match else [targets]
        asked = torch.stack(kinds, dim=-1)
        nats = character_nats(model, inputs.to(device), asked.to(device))  # (B, N, 1 or 2)
        for padded, (index, start, stop) in zip(nats, batch, strict=True):
            row, *of_proposed = padded[: stop - start].unbind(-1)
            if match:
                matched[index].take(start, row, *of_proposed)
            document_nats[index] += float(row.sum())
            for i, (low, high) in enumerate(zip((0, *edges[:-1]), edges, strict=True)):
                bucket_nats[i] += row[low:high].sum()
                bucket_chars[i] += row[low:high].numel()
            done += stop - start
        if progress is not None:
            progress(done)

    total = sum(lengths)
    sizes = [(_xz(d.data), _zstd(d.data)) if compressors else (None, None) for d in documents]
    together = [text.nats() / math.log(2) for text in matched]
    return Evaluation(
        context=context,
        chars=total,
        bits_per_char=sum(document_nats) / math.log(2) / total,
        xz=_rate([xz for xz, _ in sizes], total),
        zstd=_rate([zstd for _, zstd in sizes], total),
        buckets=tuple(
            BucketResult(low, high, int(chars), float(nats) / math.log(2) / int(chars))
            for low, high, chars, nats in zip((0, *edges[:-1]), edges, bucket_chars, bucket_nats, strict=True)
            if chars
        ),
        documents=tuple(
            DocumentResult(
                d.name,
                len(d.data),
                nats / math.log(2) / len(d.data),
                _rate([xz], len(d.data)),
                _rate([zstd], len(d.data)),
                together[i] / len(d.data) if match else None,
            )
            for i, (d, nats, (xz, zstd)) in enumerate(zip(documents, document_nats, sizes, strict=True))
        ),
        matched=sum(together) / total if match else None,
    )


def estimate_bytes(config: ButterflyConfig, chars: int) -> int:
    """About the peak bytes of a forward pass over `chars` characters, as measured in float32 on a CPU."""
    attention = (config.num_heads + config.num_kv_heads) * config.head_dim
    gated = config.feed_forward == "swiglu"
    values = 4 * config.hidden_size + 4 * attention + (4 if gated else 3) * config.intermediate_size
    return 4 * chars * (values + 6 * config.carry_size + 2 * config.vocab_size)


def character_nats(model: Butterfly, inputs: Tensor, targets: Tensor) -> Tensor:
    """-log p of each target character, in nats: inputs (B, N), targets (B, N) or, K for each, (B, N, K)
    -> float64 of the shape of targets, on the CPU."""
    wanted = targets.long().view(*targets.shape[:2], -1)
    with torch.inference_mode():
        logits = model(inputs)  # (B, N, V)
        pieces = [
            -torch.log_softmax(logits[:, start : start + _LOGITS_SLICE].float(), dim=-1).gather(
                -1, wanted[:, start : start + _LOGITS_SLICE]
            )
            for start in range(0, targets.shape[1], _LOGITS_SLICE)
        ]
    return torch.cat(pieces, dim=1).view(targets.shape).to("cpu", torch.float64)


def format_table(result: Evaluation) -> str:
    """The result as plain text: one table of texts, one of positions."""
    matched = result.matched is not None
    header = ("text", "chars", "model", *(["and match"] if matched else []), "xz -9e", "zstd -19")

    def cells(name: str, of: Evaluation | DocumentResult) -> tuple[str, ...]:
        together = [_cell(of.matched)] if matched else []
        return (name, f"{of.chars:,}", f"{of.bits_per_char:.3f}", *together, _cell(of.xz), _cell(of.zstd))

    rows = [cells(d.name, d) for d in result.documents]
    if len(rows) > 1:
        rows.append(cells("all", result))
    positions: list[tuple[str, ...]] = [
        (f"{b.start:,} to {b.stop:,}", f"{b.chars:,}", f"{b.bits_per_char:.3f}") for b in result.buckets
    ]
    return (
        f"bits per character, context {result.context:,} characters\n\n"
        + _align([header, *rows])
        + "\n\n"
        + _align([("position in the context", "chars", "model"), *positions])
    )


def _edges(context: int) -> tuple[int, ...]:
    """Right edges of the position buckets, the last one `context`."""
    return (*BUCKETS[: bisect_right(BUCKETS, context - 1)], context)


def _batches(lengths: Sequence[int], context: int, batch_chars: int) -> Iterator[list[tuple[int, int, int]]]:
    """Windows (document, start, stop), longest first, in batches of at most `batch_chars` or one window."""
    windows = [
        (index, start, min(start + context, length))
        for index, length in enumerate(lengths)
        for start in range(0, length, context)
    ]
    windows.sort(key=lambda window: window[1] - window[2])
    while windows:
        longest = windows[0][2] - windows[0][1]
        rows = max(1, batch_chars // longest)
        yield windows[:rows]
        windows = windows[rows:]


def _load(batch: Sequence[tuple[int, int, int]], documents: Sequence[Document]) -> tuple[Tensor, Tensor]:
    """Inputs and targets, uint8 (B, N); shorter windows are padded at the end, which no causal model sees."""
    width = max(stop - start for _, start, stop in batch)
    inputs = torch.zeros(len(batch), width, dtype=torch.uint8)
    targets = torch.zeros(len(batch), width, dtype=torch.uint8)
    for row, (index, start, stop) in enumerate(batch):
        data = documents[index].data
        before = data[start - 1 : start] or SEPARATOR
        stream = torch.frombuffer(bytearray(before + data[start:stop]), dtype=torch.uint8)
        inputs[row, : stop - start] = stream[:-1]
        targets[row, : stop - start] = stream[1:]
    return inputs, targets


def _proposed(
    batch: Sequence[tuple[int, int, int]], matched: Sequence[MatchedText], targets: Tensor
) -> Tensor:
    """What the matches propose in place of `targets` (B, N)."""
    proposed = torch.zeros_like(targets)
    for row, (index, start, stop) in enumerate(batch):
        proposed[row, : stop - start] = torch.from_numpy(matched[index].proposed(start, stop))
    return proposed


def _xz(data: bytes) -> int:
    """Bytes that `xz -9e` makes of `data`."""
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def _zstd(data: bytes) -> int | None:
    """Bytes that `zstd -19` makes of `data`; None when neither the package nor the program is installed."""
    if importlib.util.find_spec("zstandard") is not None:
        import zstandard

        return len(zstandard.ZstdCompressor(level=19).compress(data))
    program = shutil.which("zstd")
    if program is None:
        return None
    packed = subprocess.run([program, "-19", "-q", "-c"], input=data, stdout=subprocess.PIPE, check=True)
    return len(packed.stdout)


def _rate(sizes: Sequence[int | None], chars: int) -> float | None:
    """Bits per character of sizes in bytes; None when one is missing."""
    known = [size for size in sizes if size is not None]
    return 8 * sum(known) / chars if len(known) == len(sizes) else None


def _cell(rate: float | None) -> str:
    return "missing" if rate is None else f"{rate:.3f}"


def _align(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
