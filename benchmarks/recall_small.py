"""Which carry relays in small: keys and values among random letters or real text, from nothing.

    python benchmarks/recall_small.py "gated:carry_heads=0" "heads:carry_heads=4" --seeds 0 1
    python benchmarks/recall_small.py "gated:carry_heads=0" "heads:carry_heads=4" --corpus CORPUS
    python benchmarks/recall_small.py "c128:carry_heads=4,chunk_size=128" --corpus CORPUS --device cuda \
        --length 4096 --chars 65536 --pairs 32 --key-chars 2 --value-chars 2

A window of sixteen chunks of 16 holds eight pairs of a key and a value, a character each, and later each key
again, asked for its value, unless the options say otherwise. Between them are random letters, for which the
loss does not count, or text of CORPUS (train.bin and val.bin), for which it counts 1 and an answer 10.
Windows grow from an eighth of the length, with as many pairs as fit, to the whole in the first half of the
run. A row of JSON for each variant and seed: the share of the values' characters that are right in fresh
whole windows (of val.bin), by the number of hops (chance 0.06), and the bits/char of the text between.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from butterfly_llm.config import ButterflyConfig, TrainConfig
from butterfly_llm.corpus import Corpus
from butterfly_llm.memory import pick_device
from butterfly_llm.model import Butterfly
from butterfly_llm.optim import Optimizers
from butterfly_llm.routing import hops

Bytes = npt.NDArray[np.uint8]

KINDS = 16  # letters of filler, of keys, and of values
FACT, ASKED, VALUE = 208, 224, 240  # the first letter of keys in facts, in questions, of values
ANSWER = 10.0  # what an answer counts in the loss, beside a character of text
GROWTH = ((0.15, 8), (0.3, 4), (0.5, 2), (1.0, 1))  # until which progress, part of the window


@dataclass(frozen=True)
class Windows:
    """Windows of text (B, N) with what is planted in them."""

    text: Tensor
    hops: Tensor  # (B, N), to the fact whose value a character repeats, or -1
    shared: Tensor  # (B, N), whether the value of another fact before it lies in the same lane as that fact's
    plain: Tensor  # (B, N), whether a character is left of the text

    def to(self, device: torch.device) -> Windows:
        return Windows(*(x.to(device) for x in (self.text, self.hops, self.shared, self.plain)))


@dataclass(frozen=True)
class Form:
    """Of keys and values, and the chunks by which hops are counted."""

    key_chars: int
    value_chars: int
    chunk_size: int


def windows(
    generator: np.random.Generator, count: int, length: int, pairs: int, source: Bytes | None, form: Form
) -> Windows:
    """Random windows of `source`, or of random letters, with pairs planted."""
    item = form.key_chars + form.value_chars
    slot = max(4, item + 1)
    slots = length // slot - 1
    if slots < 2 * pairs or KINDS**form.key_chars < pairs:
        raise ValueError(f"{pairs} pairs do not fit {length} characters, or have too few keys")
    if source is None:
        text = generator.integers(0, KINDS, (count, length))
    else:
        starts = generator.integers(0, len(source) - length, count)
        text = source[starts[:, None] + np.arange(length)].astype(np.int64)
        text[text >= FACT] = ord("?")
    places = slot * np.sort(generator.random((count, slots)).argsort(1)[:, : 2 * pairs], 1)
    mixed = generator.random((count, 2 * pairs)).argsort(1).reshape(count, pairs, 2)
    fact, asked = np.sort(np.take_along_axis(places[:, None], mixed, 2), 2).transpose(2, 0, 1)
    keys = generator.random((count, KINDS**form.key_chars)).argsort(1)[:, :pairs]
    rows = np.arange(count)[:, None]
    relays = np.full((count, length), -1)
    shared = np.zeros((count, length), dtype=bool)
    lanes = (fact[:, :, None] + np.arange(form.key_chars, item)) % form.chunk_size  # (B, pairs, value)
    plain = np.ones((count, length), dtype=bool)
    for i in range(item):
        plain[rows, fact + i] = plain[rows, asked + i] = False
        if i < form.key_chars:
            letters = keys // KINDS**i % KINDS
            text[rows, fact + i], text[rows, asked + i] = FACT + letters, ASKED + letters
        else:
            text[rows, fact + i] = text[rows, asked + i] = VALUE + generator.integers(
                0, KINDS, (count, pairs)
            )
            # From the fact to the character that predicts this one.
            distance = (asked + i - 1) // form.chunk_size - (fact + i) // form.chunk_size
            relays[rows, asked + i] = np.vectorize(hops)(distance)
            same = (lanes[:, None] == lanes[:, :, None, None, i - form.key_chars]).any(3)  # (B, pairs, pairs)
            before = fact[:, None] < asked[:, :, None]
            shared[rows, asked + i] = (same & before).sum(2) > 1
    return Windows(*map(torch.from_numpy, (text, relays, shared, plain)))


def train(model: Butterfly, options: argparse.Namespace, seed: int, source: Bytes | None) -> None:
    generator = np.random.Generator(np.random.Philox(key=[seed, 0]))
    optimizers = Optimizers(model, TrainConfig(learning_rate=options.rate))
    device, form = model.embed.weight.device, form_of(model, options)
    good = torch.tensor(False, device=device)
    for step in range(options.steps):
        done = step / options.steps
        part = 1 if options.whole else next(part for until, part in GROWTH if done < until)
        length, pairs = options.length // part, max(2, options.pairs // part)
        drawn = windows(generator, options.chars // length, length, pairs, source, form).to(device)
        weights = ANSWER * (drawn.hops >= 0).float()
        if source is not None:
            weights += drawn.plain.float()
        loss = model.loss(drawn.text[:, :-1], drawn.text[:, 1:], weights=weights[:, 1:])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        slower = max(0.05, 1 - max(0.0, done - 0.6) / 0.4)
        optimizers.step(options.rate * min(1.0, (step + 1) / 30) * slower, good)
        if step % 100 == 0:
            print(f"  step {step}  window {length}  loss {loss.detach():.3f} nats", flush=True)


def form_of(model: Butterfly, options: argparse.Namespace) -> Form:
    return Form(options.key_chars, options.value_chars, model.config.chunk_size)


Shares = dict[Any, tuple[float, int]]


def recall(
    model: Butterfly, options: argparse.Namespace, source: Bytes | None
) -> tuple[Shares, Shares, float]:
    """Share right and number asked, by hops, and over one hop or more by whether a fact is alone in its lane;
    bits/char of what is not planted."""
    generator = np.random.Generator(np.random.Philox(key=[12345, 1]))
    outcomes: dict[int, list[bool]] = {}
    lanes: dict[str, list[bool]] = {}
    nats = []
    device, form = model.embed.weight.device, form_of(model, options)
    with torch.no_grad():
        for _ in range(12):
            drawn = windows(generator, 16, options.length, options.pairs, source, form).to(device)
            logits, targets = model(drawn.text[:, :-1]), drawn.text[:, 1:]
            right, relays = logits.argmax(-1) == targets, drawn.hops[:, 1:]
            for count in sorted(set(relays.flatten().tolist()) - {-1}):
                outcomes.setdefault(count, []).extend(right[relays == count].tolist())
            for name, those in (("alone", ~drawn.shared[:, 1:]), ("shared", drawn.shared[:, 1:])):
                lanes.setdefault(name, []).extend(right[(relays > 0) & those].tolist())
            plain = drawn.plain[:, 1:]
            nats.append(F.cross_entropy(logits[plain], targets[plain]).item())
    return _shares(outcomes), _shares(lanes), sum(nats) / len(nats) / math.log(2)


def _shares(outcomes: dict[Any, list[bool]]) -> Shares:
    return {name: (sum(each) / len(each), len(each)) for name, each in sorted(outcomes.items()) if each}


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
    parser.add_argument("--key-chars", type=int, default=1)
    parser.add_argument("--value-chars", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--save", type=Path, help="append the rows to this file")
    options = parser.parse_args()
    device = pick_device(options.device)
    corpus: Path | None = options.corpus
    text, held_out = (
        None if corpus is None else Corpus(corpus / name).data for name in ("train.bin", "val.bin")
    )
    for variant in options.variants:
        name, _, rest = variant.partition(":")
        changes: dict[str, Any] = tomllib.loads(f"all = {{{rest}}}")["all"]
        config = ButterflyConfig.preset(
            "micro", chunk_size=16, carry_size=32, num_local_layers=1, num_passes=2, num_refine_layers=1
        )
        levels = (options.length // changes.get("chunk_size", config.chunk_size) - 1).bit_length()
        config = ButterflyConfig.from_dict(config.to_dict() | {"num_levels": levels} | changes)
        for seed in options.seeds:
            print(f"{name}, seed {seed}", flush=True)
            torch.manual_seed(seed)
            model = Butterfly(config).to(device)
            if device.type == "cuda":
                model.compute_dtype = torch.bfloat16
            begun = time.perf_counter()
            try:
                train(model, options, seed, text)
            except ValueError as failure:
                parser.error(str(failure))
            found, lanes, bits = recall(model, options, held_out)
            row = {
                "variant": name, "model": changes, "seed": seed, "parameters": model.num_parameters(),
                "whole": options.whole, "chars": options.steps * options.chars,
                "length": options.length, "pairs": options.pairs,
                "key_chars": options.key_chars, "value_chars": options.value_chars, "device": device.type,
                "by_hops": {count: round(share, 3) for count, (share, _) in found.items()},
                "asked": {count: asked for count, (_, asked) in found.items()},
                "by_lane": {name: (round(share, 3), asked) for name, (share, asked) in lanes.items()},
                "bits_per_char": None if corpus is None else round(bits, 4),
                "seconds": round(time.perf_counter() - begun, 1), "torch": torch.__version__,
            }  # fmt: skip
            print(json.dumps(row), flush=True)
            if options.save is not None:
                with options.save.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
