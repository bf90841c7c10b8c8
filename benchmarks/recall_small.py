"""Which carry relays in small: keys and values among random letters or real text, on the CPU, from nothing.

    python benchmarks/recall_small.py "gated:" "heads:carry_heads=4" --seeds 0 1
    python benchmarks/recall_small.py "gated:" "heads:carry_heads=4" --corpus CORPUS

A window of sixteen chunks of 16 holds eight pairs of a key and a value, a character each, and later each key
again, asked for its value. Between them are random letters, for which the loss does not count, or text of
CORPUS (train.bin and val.bin), for which it counts 1 and an answer 10. Windows grow from an eighth of the
length, with as many pairs as fit, to the whole in the first half of the run. A row of JSON for each variant
and seed: the share of values that are right in fresh whole windows (of val.bin), by the number of hops
(chance 0.06), and the bits/char of the text between.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from butterfly_llm.config import ButterflyConfig, TrainConfig
from butterfly_llm.corpus import Corpus
from butterfly_llm.model import Butterfly
from butterfly_llm.optim import Optimizers
from butterfly_llm.routing import hops

Bytes = npt.NDArray[np.uint8]

CHUNK, KINDS = 16, 16  # letters of filler, keys, and values
FACT, ASKED, VALUE = 208, 224, 240  # the first key in a fact, in a question, the first value
ANSWER = 10.0  # what an answer counts in the loss, beside a character of text
GROWTH = ((0.15, 8), (0.3, 4), (0.5, 2), (1.0, 1))  # until which progress, part of the window


@dataclass(frozen=True)
class Windows:
    """Windows of text (B, N) with what is planted in them."""

    text: Tensor
    hops: Tensor  # (B, N), to the fact whose value a character repeats, or -1
    plain: Tensor  # (B, N), whether a character is left of the text


def windows(
    generator: np.random.Generator, count: int, length: int, pairs: int, source: Bytes | None
) -> Windows:
    """Random windows of `source`, or of random letters, with pairs planted."""
    slots = length // 4 - 1
    if source is None:
        text = generator.integers(0, KINDS, (count, length))
    else:
        starts = generator.integers(0, len(source) - length, count)
        text = source[starts[:, None] + np.arange(length)].astype(np.int64)
        text[text >= FACT] = ord("?")
    places = 4 * np.sort(generator.random((count, slots)).argsort(1)[:, : 2 * pairs], 1)
    mixed = generator.random((count, 2 * pairs)).argsort(1).reshape(count, pairs, 2)
    fact, asked = np.sort(np.take_along_axis(places[:, None], mixed, 2), 2).transpose(2, 0, 1)
    keys = generator.random((count, KINDS)).argsort(1)[:, :pairs]
    values = VALUE + generator.integers(0, KINDS, (count, pairs))
    rows = np.arange(count)[:, None]
    text[rows, fact], text[rows, fact + 1] = FACT + keys, values
    text[rows, asked], text[rows, asked + 1] = ASKED + keys, values
    distance = asked // CHUNK - (fact + 1) // CHUNK  # from the fact to the character that predicts the value
    relays = np.full((count, length), -1)
    relays[rows, asked + 1] = np.vectorize(hops)(distance)
    plain = np.ones((count, length), dtype=bool)
    for place in (fact, fact + 1, asked, asked + 1):
        plain[rows, place] = False
    return Windows(torch.from_numpy(text), torch.from_numpy(relays), torch.from_numpy(plain))


def train(model: Butterfly, options: argparse.Namespace, seed: int, source: Bytes | None) -> None:
    generator = np.random.Generator(np.random.Philox(key=[seed, 0]))
    optimizers = Optimizers(model, TrainConfig(learning_rate=options.rate))
    for step in range(options.steps):
        done = step / options.steps
        part = 1 if options.whole else next(part for until, part in GROWTH if done < until)
        length, pairs = options.length // part, max(2, options.pairs // part)
        drawn = windows(generator, options.chars // length, length, pairs, source)
        weights = ANSWER * (drawn.hops >= 0).float()
        if source is not None:
            weights += drawn.plain.float()
        loss = model.loss(drawn.text[:, :-1], drawn.text[:, 1:], weights=weights[:, 1:])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        slower = max(0.05, 1 - max(0.0, done - 0.6) / 0.4)
        optimizers.step(options.rate * min(1.0, (step + 1) / 30) * slower, torch.tensor(False))
        if step % 100 == 0:
            print(f"  step {step}  window {length}  loss {loss.detach():.3f} nats", flush=True)


def recall(
    model: Butterfly, options: argparse.Namespace, source: Bytes | None
) -> tuple[dict[int, tuple[float, int]], float]:
    """Share right and number asked, by hops; bits/char of what is not planted."""
    generator = np.random.Generator(np.random.Philox(key=[12345, 1]))
    outcomes: dict[int, list[bool]] = {}
    nats = []
    with torch.no_grad():
        for _ in range(12):
            drawn = windows(generator, 16, options.length, options.pairs, source)
            logits, targets = model(drawn.text[:, :-1]), drawn.text[:, 1:]
            right, relays = logits.argmax(-1) == targets, drawn.hops[:, 1:]
            for count in sorted(set(relays.flatten().tolist()) - {-1}):
                outcomes.setdefault(count, []).extend(right[relays == count].tolist())
            plain = drawn.plain[:, 1:]
            nats.append(F.cross_entropy(logits[plain], targets[plain]).item())
    shares = {count: (sum(each) / len(each), len(each)) for count, each in sorted(outcomes.items())}
    return shares, sum(nats) / len(nats) / math.log(2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variants", nargs="+", help='"name:field=value,field=value" of the model')
    parser.add_argument("--corpus", type=Path, help="a folder with train.bin and val.bin")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--chars", type=int, default=4096, help="characters in a step")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--whole", action="store_true", help="whole windows from the first step on")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--save", type=Path, help="append the rows to this file")
    options = parser.parse_args()
    corpus: Path | None = options.corpus
    text, held_out = (
        None if corpus is None else Corpus(corpus / name).data for name in ("train.bin", "val.bin")
    )
    for variant in options.variants:
        name, _, rest = variant.partition(":")
        pairs = (change.partition("=") for change in filter(None, rest.split(",")))
        changes = {key: tomllib.loads(f"value = {value}")["value"] for key, _, value in pairs}
        config = ButterflyConfig.preset(
            "micro", chunk_size=CHUNK, carry_size=32, num_local_layers=1, num_passes=2, num_refine_layers=1,
            num_levels=(options.length // CHUNK - 1).bit_length(),
        )  # fmt: skip
        config = ButterflyConfig.from_dict(config.to_dict() | changes)
        for seed in options.seeds:
            print(f"{name}, seed {seed}", flush=True)
            torch.manual_seed(seed)
            model = Butterfly(config)
            begun = time.perf_counter()
            train(model, options, seed, text)
            found, bits = recall(model, options, held_out)
            row = {
                "variant": name, "model": changes, "seed": seed, "parameters": model.num_parameters(),
                "whole": options.whole, "chars": options.steps * options.chars,
                "length": options.length, "pairs": options.pairs,
                "by_hops": {count: round(share, 3) for count, (share, _) in found.items()},
                "asked": {count: asked for count, (_, asked) in found.items()},
                "bits_per_char": None if corpus is None else round(bits, 4),
                "seconds": round(time.perf_counter() - begun, 1), "torch": torch.__version__,
            }  # fmt: skip
            print(json.dumps(row), flush=True)
            if options.save is not None:
                with options.save.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
