"""Does what a model writes after a real project look like that project? Places in Python files, continued.

    python benchmarks/continuations.py MODEL [MODEL ...] CORPUS --json OUT.json
    python benchmarks/continuations.py MODEL DIR --also DIR [DIR ...]

MODEL is a folder that `load_pretrained` reads, CORPUS one made by `butterfly prepare`, whose validation split
is read, DIR the files of one project. Each place is a line start in the middle of a Python file, with the
Python of the same project before it as context. Shares of `butterfly_llm.continuations`, mean over the places
and its standard error, for each model, for the real text that stood there, and for real text of another
project pasted there. Prints a table and, as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import re
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from butterfly_llm.bench import Parser
from butterfly_llm.checkpoint import load_pretrained
from butterfly_llm.config import SamplingConfig
from butterfly_llm.continuations import FILE_HEADER, MEASURES, measure, parses, whole_lines
from butterfly_llm.evaluate import Document, load_documents
from butterfly_llm.generate import mix_seed, pick, probabilities
from butterfly_llm.memory import pick_device
from butterfly_llm.model import Butterfly
from butterfly_llm.slots import Stepper, stepper_for
from butterfly_llm.terminal import progress_bar, say

FIRST_LINES = 20  # of a file, before which it is not cut


@dataclass(frozen=True)
class Place:
    """Where a file is cut. Latin-1 characters, one an id."""

    project: str
    file: str
    line: int  # of the file, from 1, with which the continuation begins
    before: str  # the file up to there
    context: str  # the project up to there
    real: str  # what stood there


def places_of(document: Document, context: int, chars: int, seed: int) -> Iterator[Place]:
    """The places of a project in random order, each with whole `context` and `chars`, in files that parse."""
    data = document.data.decode("latin-1")
    headers = list(FILE_HEADER.finditer(data))
    ends = [*(header.start() for header in headers[1:]), len(data)]
    text, files = "", []
    for header, end in zip(headers, ends, strict=True):
        if header[1].endswith(".py"):
            text += header[0] + "\n"
            file = data[header.end() + 1 : end]
            files.append((header[1], len(text), file))
            text += file
    cuts = [
        (number, line, match.end())
        for number, (_, begin, file) in enumerate(files)
        for line, match in enumerate(re.finditer("\n", file), 2)
        if line > FIRST_LINES and begin + match.end() >= context and match.end() + chars <= len(file)
    ]
    random.Random(f"{seed} {document.name}").shuffle(cuts)
    parse: dict[int, bool] = {}
    for number, line, cut in cuts:
        name, begin, file = files[number]
        if number not in parse:
            parse[number] = parses(file) is True
        if parse[number]:
            at = begin + cut
            yield Place(
                document.name, name, line, file[:cut], text[at - context : at], file[cut : cut + chars]
            )


def pick_places(
    documents: Sequence[Document], count: int, context: int, chars: int, seed: int
) -> list[Place]:
    """Up to `count` places, as many of each project as there are. ValueError where there is none."""
    projects = deque(places_of(document, context, chars, seed) for document in documents)
    places: list[Place] = []
    while projects and len(places) < count:
        place = next(projects[0], None)
        if place is None:
            projects.popleft()
        else:
            places.append(place)
            projects.rotate(-1)
    if not places:
        raise ValueError(
            f"no Python file to continue after {context:,} characters of its project: use a longer text or a "
            "shorter --context"
        )
    return places


def other_text(places: Sequence[Place], number: int) -> str | None:
    """The real text of the next place that is in another project; None where all are in one."""
    later = (*places[number:], *places[:number])
    return next((place.real for place in later if place.project != places[number].project), None)


def write(
    stepper: Stepper,
    contexts: Sequence[str],
    samplings: Sequence[SamplingConfig],
    chars: int,
    advance: Callable[[int], None],
) -> list[str]:
    """Continue each context by `chars` characters, all as one batch; each as `generate` would by itself.

    `advance` is called with the number of characters that were just read or written.
    """
    caches = [stepper.fresh(None, keep=False, reserved=0) for _ in contexts]
    try:
        read = []
        for context, cache in zip(contexts, caches, strict=True):
            read.append(stepper.read(context.encode("latin-1"), cache))
            advance(len(context))
        logits = torch.cat(read)  # (B, V)
        texts = [bytearray() for _ in contexts]
        generator = torch.Generator()
        for _ in range(chars):
            drawn: list[int] = []
            for row, cache, sampling in zip(logits.cpu(), caches, samplings, strict=True):
                generator.manual_seed(mix_seed(sampling.seed, cache.position))
                point = torch.rand((), generator=generator, dtype=torch.float64)
                drawn.append(pick(probabilities(row, b"", sampling), point))
            for text, character in zip(texts, drawn, strict=True):
                text.append(character)
            logits = stepper.step(drawn, caches)
            advance(len(contexts))
    finally:
        for cache in caches:
            stepper.release(cache)
    return [text.decode("latin-1") for text in texts]


def continue_all(
    label: str, model: Butterfly, places: Sequence[Place], options: argparse.Namespace
) -> list[str]:
    """What a model writes at each place."""
    stepper = stepper_for(model, min(options.batch, len(places)))
    samplings = [
        SamplingConfig(temperature=options.temperature, seed=mix_seed(options.seed, number))
        for number in range(len(places))
    ]
    each = options.context + options.chars
    texts: list[str] = []
    begun, done = time.perf_counter(), 0
    with progress_bar(label, len(places) * each) as update:

        def advance(count: int) -> None:
            nonlocal done
            update(done := done + count)

        while len(texts) < len(places):
            batch = slice(len(texts), len(texts) + options.batch)
            contexts = [place.context for place in places[batch]]
            texts += write(stepper, contexts, samplings[batch], options.chars, advance)
            seconds = time.perf_counter() - begun
            left = seconds * (len(places) - len(texts)) / len(texts) / 60
            rate = f"{done / seconds:,.0f} characters/s read and written"
            say(f"{label}: {len(texts)} of {len(places)} places, {rate}, {left:.1f} min left")
    return texts


def summary(places: Sequence[Place], texts: Sequence[str]) -> dict[str, Any]:
    """Mean, standard error and number of places for each measure; and the value at each place."""
    measured = [measure(place.before, place.context, text) for place, text in zip(places, texts, strict=True)]
    row: dict[str, Any] = {}
    for name in MEASURES:
        values = [shares[name] for shares in measured if name in shares]
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        row[name] = {
            "mean": round(statistics.fmean(values), 4) if values else None,
            "se": None if error is None else round(error, 4),
            "n": len(values),
            "values": [round(shares[name], 3) if name in shares else None for shares in measured],
        }
    row["chars"] = sum(len(whole_lines(text)) for text in texts)
    return row


def table_line(label: str, row: dict[str, Any]) -> str:
    """Mean, standard error and number of places for each measure."""
    cells = []
    for name in MEASURES:
        mean, error, n = (row[name][key] for key in ("mean", "se", "n"))
        spread = "" if error is None else f"± {error:.3f} "
        cells.append("-" if mean is None else f"{mean:.3f} {spread}({n})")
    return f"{label[-28:]:<28}" + "".join(f"{cell:>22}" for cell in cells)


def load(path: str, device: torch.device) -> Butterfly:
    model = load_pretrained(path, device=device).eval()
    model.compute_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return model


def compare(options: argparse.Namespace) -> None:
    for name in ("places", "context", "chars", "batch"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(options, name)}")
    SamplingConfig(temperature=options.temperature, seed=options.seed)  # refuses what it cannot take
    documents = load_documents([options.text, *options.also], errors="replace")
    places = pick_places(documents, options.places, options.context, options.chars, options.seed)
    device = pick_device("auto")
    models = {path: load(path, device) for path in options.models}  # all of them before the first is asked
    counts = Counter(place.project for place in places)
    print(f"{len(places)} places: " + ", ".join(f"{count} in {name}" for name, count in counts.items()))
    print(f"{'':<28}" + "".join(f"{name:>22}" for name in MEASURES), flush=True)
    out: dict[str, Any] = {
        "python": platform.python_version(), "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "context": options.context, "chars": options.chars, "temperature": options.temperature,
        "seed": options.seed, "places": [[place.project, place.file, place.line] for place in places],
        "rows": {},
    }  # fmt: skip
    written: dict[str, list[str]] = {}

    def keep(label: str, texts: list[str], seconds: float | None = None) -> None:
        row = summary(places, texts)
        out["rows"][label] = row if seconds is None else row | {"seconds": round(seconds, 1)}
        written[label] = texts
        print(table_line(label, row), flush=True)
        for path, value in ((options.json, out), (options.texts, written)):
            if path:
                path.write_text(json.dumps(value) + "\n")

    keep("real text", [place.real for place in places])
    others = [text for number in range(len(places)) if (text := other_text(places, number)) is not None]
    if others:
        keep("another project", others)
    for label, model in models.items():
        begun = time.perf_counter()
        texts = continue_all(label, model, places, options)
        keep(label, texts, time.perf_counter() - begun)
    print(json.dumps(out))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("text", metavar="CORPUS_OR_DIR")
    parser.add_argument("--also", nargs="+", default=[], metavar="DIR", help="more projects")
    parser.add_argument("--places", type=int, default=64)
    parser.add_argument("--context", type=int, default=16_384, help="characters read before a place")
    parser.add_argument("--chars", type=int, default=600, help="characters written at a place")
    parser.add_argument("--temperature", type=float, default=SamplingConfig().temperature)
    parser.add_argument("--seed", type=int, default=0, help="of the places and of what is drawn")
    parser.add_argument("--batch", type=int, default=8, help="places continued together")
    parser.add_argument("--json", type=Path, help="keep the JSON object here as it grows")
    parser.add_argument("--texts", type=Path, help="keep what each row consists of here, place by place")
    options = parser.parse_args(arguments)
    try:
        compare(options)
    except (ValueError, OSError) as failure:
        parser.error(" ".join(str(failure).split()))


if __name__ == "__main__":
    main()
