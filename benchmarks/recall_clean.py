"""Which carry relays in a clean task: keys and values among random letters, on the CPU, from nothing.

    python benchmarks/recall_clean.py "gated:" "heads:carry_heads=4" --seeds 0 1

A window of sixteen chunks of 16 holds eight pairs of a key and a value, and later each key again, asked for
its value; everything else is random. Windows grow from an eighth of that, with as many pairs as fit, to the
whole in the first half of the run. A row of JSON for each variant and seed: the share of values that are
right in fresh whole windows, by the number of hops (chance 0.06).
"""

from __future__ import annotations

import argparse
import json
import time
import tomllib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from butterfly_llm.config import ButterflyConfig, TrainConfig
from butterfly_llm.model import Butterfly
from butterfly_llm.optim import Optimizers
from butterfly_llm.routing import hops

CHUNK, KINDS = 16, 16  # letters of filler, keys, and values
FACT, ASKED, VALUE = 16, 32, 48  # the first key in a fact, in a question, the first value
GROWTH = ((0.15, 8), (0.3, 4), (0.5, 2), (1.0, 1))  # until which progress, part of the window


def windows(generator: np.random.Generator, count: int, length: int, pairs: int) -> tuple[Tensor, Tensor]:
    """Windows (count, length), and for each character the hops to the fact whose value it repeats, or -1."""
    slots = length // 4 - 1
    text = generator.integers(0, KINDS, (count, length))
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
    return torch.from_numpy(text), torch.from_numpy(relays)


def train(model: Butterfly, options: argparse.Namespace, seed: int) -> None:
    generator = np.random.Generator(np.random.Philox(key=[seed, 0]))
    optimizers = Optimizers(model, TrainConfig(learning_rate=options.rate))
    for step in range(options.steps):
        done = step / options.steps
        part = next(part for until, part in GROWTH if done < until)
        length, pairs = options.length // part, max(2, options.pairs // part)
        text, relays = windows(generator, options.chars // length, length, pairs)
        asked = (relays[:, 1:] >= 0).float()
        loss = model.loss(text[:, :-1], text[:, 1:], weights=asked)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        slower = max(0.05, 1 - max(0.0, done - 0.6) / 0.4)
        optimizers.step(options.rate * min(1.0, (step + 1) / 30) * slower, torch.tensor(False))
        if step % 100 == 0:
            print(f"  step {step}  window {length}  loss {loss.detach():.3f} nats", flush=True)


def recall(model: Butterfly, options: argparse.Namespace) -> dict[int, tuple[float, int]]:
    """Share right and number asked, by hops."""
    generator = np.random.Generator(np.random.Philox(key=[12345, 1]))
    outcomes: dict[int, list[bool]] = {}
    with torch.no_grad():
        for _ in range(12):
            text, relays = windows(generator, 16, options.length, options.pairs)
            right = model(text[:, :-1]).argmax(-1) == text[:, 1:]
            for count in sorted(set(relays.flatten().tolist())):
                if count >= 0:
                    outcomes.setdefault(count, []).extend(right[relays[:, 1:] == count].tolist())
    return {count: (sum(each) / len(each), len(each)) for count, each in sorted(outcomes.items())}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variants", nargs="+", help='"name:field=value,field=value" of the model')
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--chars", type=int, default=4096, help="characters in a step")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--save", type=Path, help="append the rows to this file")
    options = parser.parse_args()
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
            train(model, options, seed)
            found = recall(model, options)
            row = {
                "variant": name, "model": changes, "seed": seed, "parameters": model.num_parameters(),
                "chars": options.steps * options.chars, "length": options.length, "pairs": options.pairs,
                "by_hops": {count: round(share, 3) for count, (share, _) in found.items()},
                "asked": {count: asked for count, (_, asked) in found.items()},
                "seconds": round(time.perf_counter() - begun, 1), "torch": torch.__version__,
            }  # fmt: skip
            print(json.dumps(row), flush=True)
            if options.save is not None:
                with options.save.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
