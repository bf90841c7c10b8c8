"""Architectures with as many parameters, each trained from nothing on the same text, then held-out bits.

    butterfly bench twins CORPUS --seconds 100 --length 16384 --save twins.json     # equal wall-clock
    butterfly bench twins CORPUS --chars 50_000_000 --twins butterfly window full   # equal characters

CORPUS is a folder made by `butterfly prepare`. All see the same windows in the same order, with the same
optimiser and learning rates; batches are of `--batch` characters. With --grow windows are short at first and
whole from half of the run, which those that read far need. The clock runs for training alone: to compile and
tune kernels comes before, in a process for each architecture, and counts for none of them.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from butterfly_llm.bench import peers, run
from butterfly_llm.bench.isolate import Worker
from butterfly_llm.bench.models import add_preset_options, config_of
from butterfly_llm.captured import Accumulate, CapturedLoss, accumulate
from butterfly_llm.checkpoint import save_model
from butterfly_llm.config import TrainConfig
from butterfly_llm.corpus import Corpus, check_length, sample_windows, val_windows
from butterfly_llm.curriculum import growing
from butterfly_llm.evaluate import BUCKETS
from butterfly_llm.memory import pick_device
from butterfly_llm.model import Butterfly
from butterfly_llm.optim import learning_rate, length_at, progress_at
from butterfly_llm.twins import PLAIN, TWINS, Twin

MODULE = "butterfly_llm.bench.twins"
_LOGITS_SLICE = 16_384  # rows whose log-probabilities are made at once
_CURVE = 100  # points of the training curve that are kept, each the mean of the steps since the one before

prepare = peers.prepare


def train_twin(
    corpus: str,
    settings: dict[str, Any],
    keep: bool,
    val_chars: int,
    warmup: float,
    folder: str | None = None,
) -> dict[str, Any]:
    """Train what `prepare` made, by a TrainConfig, and say what came out.

    warmup: share of the run until the peak rate, so that slow and fast ones warm up alike. keep: hold every
    activation for the backward pass, if they fit. folder: for the model in 8 bits, of an architecture that
    `load_pretrained` knows.
    """
    subject = peers.subject
    assert subject is not None
    config = TrainConfig.from_dict(settings)
    model, longest = subject.model, config.lengths[-1][1]
    train, val = Corpus(corpus, "train"), Corpus(corpus, "val")

    def batch(step: int, part: int, length: int) -> tuple[Tensor, Tensor]:
        """ids and targets (windows, length) on the device."""
        windows = config.micro_windows(length)
        text = sample_windows(
            train, length=length, count=windows, seed=config.seed, step=step, first=part * windows
        )
        return _on(subject.device, torch.from_numpy(text))

    gradients, row = _first_pass(subject, batch(0, 0, longest), keep)
    for _, length in config.lengths[-2::-1]:  # the shortest last, with which the run begins
        if isinstance(gradients, CapturedLoss):
            gradients.release()
        gradients, _ = _first_pass(subject, batch(0, 0, length), keep and row["recompute"] == "none")
    bad = torch.zeros((), dtype=torch.bool, device=subject.device)
    curve: list[tuple[float, float]] = []  # seconds, bits per character of each step
    step, skipped, begun = 0, 0, subject.clock()
    while (progress := progress_at(step, subject.clock() - begun, config)) < 1:
        loss = torch.zeros((), device=subject.device)
        length = length_at(progress, config)
        parts = config.windows(length) // config.micro_windows(length)
        for part in range(parts):
            loss += gradients(*batch(step, part, length), None, 1 / parts)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm, foreach=True)
        bad = ~(loss.isfinite() & norm.isfinite())
        warm = min(1.0, 0.01 + progress / warmup) if warmup else 1.0
        subject.optimizers.step(warm * learning_rate(step, progress, config), bad)
        step += 1
        skipped += int(bad)
        curve.append((subject.clock() - begun, float(loss) / math.log(2)))
    seconds = curve[-1][0]
    if isinstance(gradients, CapturedLoss):
        gradients.release()
    subject.forget()
    if folder is not None and not isinstance(model, Twin):
        save_model(model, folder, dtype="int8", extra={"step": step, "chars": step * config.batch_chars})
    bits = [loss for _, loss in curve]
    every = max(1, step // _CURVE)
    return row | {
        "steps": step,
        "chars": step * config.batch_chars,
        "seconds": round(seconds, 2),
        "chars_per_second": round(step * config.batch_chars / seconds),
        "skipped": skipped,
        "train_bits_per_char": round(mean(bits[-max(1, step // 20) :]), 4),
        "curve": [
            [(i + 1) * config.batch_chars, round(at, 2), round(mean(bits[i + 1 - every : i + 1]), 4)]
            for i, (at, _) in enumerate(curve)
            if (i + 1) % every == 0
        ],
        **held_out(model, val, longest, val_chars, config.micro_windows(longest)),
    }


def _first_pass(
    subject: peers.Subject, batch: tuple[Tensor, Tensor], keep: bool
) -> tuple[Accumulate, dict[str, Any]]:
    """A pass that changes nothing, so that none has to be compiled later; recomputes layers where it must."""
    for kept in (True, False) if keep else (False,):
        subject.model.gradient_checkpointing = not kept
        gradients: Accumulate = functools.partial(accumulate, subject.model)
        if subject.graph:
            gradients = CapturedLoss(subject.model)
        subject.optimizers.drop_gradients = not subject.graph
        try:
            gradients(*batch, None, 1.0)
        except torch.OutOfMemoryError:
            if not kept:
                raise
        else:
            subject.model.zero_grad(set_to_none=not subject.graph)
            return gradients, {
                "recompute": "none" if kept else "layer",
                "bytes": torch.cuda.max_memory_allocated() if subject.device.startswith("cuda") else None,
            }
        subject.forget()
    raise AssertionError


def held_out(model: Butterfly, val: Corpus, length: int, chars: int, windows: int) -> dict[str, Any]:
    """Bits per character of the first `chars` held-out characters, all and by position in their window."""
    device = str(model.embed.weight.device)
    every = [torch.from_numpy(window) for window in val_windows(val, length=length, max_chars=chars)]
    nats = torch.zeros(length, dtype=torch.float64)
    for first in range(0, len(every), windows):
        ids, targets = _on(device, torch.stack(every[first : first + windows]))
        hidden = model.hidden(ids).detach()  # with gradients: compiled layers are compiled for that
        for row, wanted in zip(hidden, targets, strict=True):
            with torch.no_grad():
                pieces = [
                    F.cross_entropy(model.head(part).float(), target, reduction="none")
                    for part, target in zip(
                        row.split(_LOGITS_SLICE), wanted.split(_LOGITS_SLICE), strict=True
                    )
                ]
            nats += torch.cat(pieces).cpu().double()
    bits = nats / math.log(2) / len(every)  # (length,)
    edges = [0, *(edge for edge in BUCKETS if edge < length), length]
    return {
        "val_chars": len(every) * length,
        "bits_per_char": round(float(bits.mean()), 4),
        "buckets": [
            {"start": start, "stop": stop, "bits_per_char": round(float(bits[start:stop].mean()), 4)}
            for start, stop in itertools.pairwise(edges)
        ],
    }


def _on(device: str, text: Tensor) -> tuple[Tensor, Tensor]:
    """Windows (b, N + 1) uint8 -> ids and targets (b, N) int64 on the device."""
    window = text.to(device).long()
    return window[:, :-1].contiguous(), window[:, 1:].contiguous()


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("corpus", help="folder made by butterfly prepare")
    add_preset_options(parser, "small")  # whose parameters all have
    parser.add_argument("--twins", nargs="+", choices=TWINS, default=PLAIN, help="architectures")
    parser.add_argument("--seconds", type=float, help="training time of each")
    parser.add_argument("--chars", type=int, help="characters that each is trained on")
    parser.add_argument("--length", type=int, default=16_384, help="characters in a window")
    parser.add_argument(
        "--grow", type=int, metavar="CHARS", help="windows this long at first, whole from half of the run"
    )
    parser.add_argument("--batch", type=int, default=131_072, help="characters in a step")
    parser.add_argument("--micro", type=int, default=65_536, help="characters in a pass, at most")
    parser.add_argument("--rate", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=float, default=0.1, help="share of the run until the peak rate")
    parser.add_argument("--val-chars", type=int, default=1_048_576, help="held-out characters")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--within", type=float, default=3600, help="give up after so many seconds in all")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--eager", action="store_true", help="do not compile the layers")
    parser.add_argument(
        "--save", type=Path, help="keep the JSON object here, renewed after every architecture"
    )
    parser.add_argument(
        "--models", type=Path, help="keep butterfly and window in folders here, as load_pretrained reads them"
    )


def settings_of(options: argparse.Namespace) -> TrainConfig:
    """Linear decay over the last 60%; ValueError where the numbers do not fit."""
    if (options.seconds is None) == (options.chars is None):
        raise ValueError("bench twins: give either --seconds or --chars")
    if min(options.length, options.batch, options.micro, options.val_chars) < 1:
        raise ValueError("bench twins: --length, --batch, --micro and --val-chars must be at least 1")
    if not 0 <= options.warmup <= 1:
        raise ValueError(f"bench twins: --warmup {options.warmup} must be a share from 0 to 1")
    first = options.length if options.grow is None else options.grow
    if first < 1 or options.length % first or (options.length // first).bit_count() != 1:
        raise ValueError(
            f"bench twins: --grow {first} must be --length {options.length}, or that halved some times"
        )
    windows = max(1, options.micro // options.length)
    while options.batch % (windows * options.length):
        if windows == 1:
            raise ValueError(
                f"bench twins: --length {options.length} does not divide --batch {options.batch}"
            )
        windows -= 1
    return TrainConfig(
        steps=1_000_000 if options.chars is None else max(1, options.chars // options.batch),
        max_seconds=options.seconds,
        finish_seconds=0,
        batch_chars=options.batch,
        micro_chars=windows * options.length,
        lengths=growing(first, options.length),
        learning_rate=options.rate,
        warmup_steps=0,
        decay="linear",
        decay_from=0.4,
        seed=options.seed,
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    settings = settings_of(options)
    device = str(pick_device(options.device))
    config = config_of(options)
    for split in ("train", "val"):
        check_length(Corpus(options.corpus, split), options.length)
    deadline: float = time.monotonic() + options.within

    def left() -> float:
        return max(0.0, deadline - time.monotonic())

    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "torch": torch.__version__,
        "preset": options.preset,
        "ngram_orders": list(config.ngram_orders),
        "ngram_words": config.ngram_words,
        "ngram_ranks": config.ngram_ranks,
        "sizes": options.sizes,
        "local_chunks": config.local_chunks,
        "local_every": config.local_every,
        "length": options.length,
        "grow": options.grow,
        "warmup": options.warmup,
        "train": settings.to_dict(),
        "rows": [],
    }
    workers, facts = peers.start(
        MODULE, options.twins, config, device, left, chars=settings.micro_chars, compiled=not options.eager
    )
    print(f"{'architecture':<16}{'parameters':>12}{'chars':>14}{'seconds':>9}{'chars/s':>10}{'training':>10}"
          f"{'held out':>10}  bits/char, and held out by position")  # fmt: skip
    try:
        for name, worker in workers.items():
            row = {"twin": name} | facts[name]
            if "failed" not in row:
                folder = None if options.models is None else str(options.models / name)
                row |= _outcome(worker, options, settings, left(), folder)
            worker.stop()
            result["rows"].append(row)
            _say(row)
            if options.save:
                options.save.write_text(json.dumps({"bench": "twins", **result}) + "\n")
    finally:
        for worker in workers.values():
            worker.stop()
    return result


def _outcome(
    worker: Worker, options: argparse.Namespace, settings: TrainConfig, left: float, folder: str | None
) -> dict[str, Any]:
    if left < (options.seconds or 1):
        return {"failed": f"no time left of {options.within:.0f} s"}
    keep = settings.micro_chars <= options.micro
    asked = options.corpus, settings.to_dict(), keep, options.val_chars, options.warmup, folder
    found = worker.ask(left, "train_twin", *asked)
    return {"failed": found} if isinstance(found, str) else dict(found)


def _say(row: dict[str, Any]) -> None:
    if "failed" in row:
        print(f"{row['twin']:<16} {row['failed']}", flush=True)
        return
    places = ", ".join(f"to {b['stop']:,}: {b['bits_per_char']:.3f}" for b in row["buckets"])
    print(
        f"{row['twin']:<16}{row['parameters']:>12,}{row['chars']:>14,}{row['seconds']:>9.1f}"
        f"{row['chars_per_second']:>10,}{row['train_bits_per_char']:>10.4f}{row['bits_per_char']:>10.4f}"
        f"  {places}",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    run("twins", __doc__, add_options, measure, arguments)


if __name__ == "__main__":
    main()
