"""Which wiring, carry and curriculum learn to relay in real text: equal characters, one row each.

    python benchmarks/recall_ablation.py CORPUS --steps 1800 "gated:carry_heads=0" "softmax:carry_heads=4"
    python benchmarks/recall_ablation.py CORPUS --grow 512 "xor:routing='xor_causal'" \
        "random:strides='random'" "heads:attends='heads'" "taps:taps=true" "full attention:twin='full'"

CORPUS is a folder with train.bin and val.bin. A variant is a name and changed settings: fields of the model,
of the run as train.FIELD, or one of five that no model has: `twin`, another architecture with as many
parameters (`butterfly_llm.twins`), `strides`, the partners of the butterfly layers (`STRIDES`), `attends`,
what else such a layer reads (`ATTENDS`), `taps`, whether layers mix in the characters before, and `looks`,
the numbers of the layers that read what they held where the last n characters stood before (`Lookup`). Each
is trained from nothing on windows of --length characters, into all of which facts are planted
(`curriculum.py`), then asked at every number of hops for a fact alone, for one among 15 others, and for such
a one in other characters than it stands in, in windows of each of the --ask lengths. A row of JSON for each
goes to standard output and, with --save, to a file.

    python benchmarks/recall_ablation.py CORPUS --length 65536 --grow 512 --ask 4096 16384 65536 \
        --steps 4000 "heads:carry_heads=8,carry_size=128,train.recall_weight=20,train.export='runs/heads'"

In equal time a variant takes as many steps as its speed allows, `chars_per_second` of short runs alone:

    python benchmarks/recall_ablation.py CORPUS --steps 120 --windows 1 "shift:train.log_every=20" \
        "no carry:carry_size=0,train.log_every=20"
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from butterfly_llm import ngrams, twins
from butterfly_llm.bench import peers
from butterfly_llm.bench.twins import held_out
from butterfly_llm.config import ButterflyConfig, TrainConfig
from butterfly_llm.corpus import Corpus
from butterfly_llm.curriculum import growing
from butterfly_llm.layers import Layer
from butterfly_llm.model import Butterfly
from butterfly_llm.modules import Linear, RMSNorm
from butterfly_llm.ops import Backend
from butterfly_llm.ops.rope import Angles, position_table, rotate
from butterfly_llm.recall import Needles, evaluate_recall
from butterfly_llm.train import train

# For P passes over L levels and a seed: the stride of each of the P * L butterfly layers, in chunks.
STRIDES: dict[str, Callable[[int, int, int], list[int]]] = {
    "powers": lambda passes, levels, seed: [1 << level for level in range(levels)] * passes,
    "previous": lambda passes, levels, seed: [1] * (passes * levels),
    "random": lambda passes, levels, seed: (
        np.random.default_rng(seed).integers(1, 1 << levels, passes * levels).tolist()
    ),
}


class StrideForEachHead(Layer):
    """Head h reads at the stride that lies h quarters of the levels (of four heads) beyond the layer's."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, stride: int, backend: Backend | None) -> Tensor:
        levels, heads = self.config.num_levels, self.config.num_heads
        level = stride.bit_length() - 1
        each = []
        for h in range(heads):
            one_q, one_k, one_v = (x[:, :, h : h + 1].contiguous() for x in (q, k, v))
            own = 1 << (level + h * levels // heads) % levels
            each.append(super().attend(one_q, one_k, one_v, own, backend))
        return torch.cat(each, 2)


class SeveralChunks(Layer):
    """Reads the chunks so many before that `DISTANCES[self.reads]` gives for its stride. For the positions
    they stand one, two, three .. chunks back, the nearest first. Plain PyTorch: all keys are copied."""

    reads = "partner and before"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, stride: int, backend: Backend | None) -> Tensor:
        """q, k and v (B, N, H, D) -> (B, N, H, D)."""
        batch, chars, heads, size = q.shape
        chunk, theta = self.config.chunk_size, self.config.rope_theta
        chunks = -(-chars // chunk)
        # (B, H, C, L, D)
        q, k, v = (
            F.pad(x, (0, 0, 0, 0, 0, chunks * chunk - chars)).view(batch, chunks, chunk, heads, size)
            .permute(0, 3, 1, 2, 4)
            for x in (q, k, v)
        )  # fmt: skip

        def back(x: Tensor, by: int) -> Tensor:
            """Chunk c - by in the place of c, zeros where there is none."""
            return F.pad(x, (0, 0, 0, 0, by, 0))[:, :, :chunks]

        numbers = torch.arange(chunks, device=q.device)[:, None, None]
        seen = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device)
        keys, values, masks = [k], [v], [seen.tril().expand(chunks, -1, -1)]
        for rank, distance in enumerate(sorted(set(DISTANCES[self.reads](stride))), 1):
            at = -rank * chunk
            keys.append(
                rotate(back(k, distance), *position_table(at, at + 1, size, theta, k.dtype, k.device))
            )
            values.append(back(v, distance))
            masks.append(seen & (numbers >= distance))
        mask = torch.cat(masks, 2)  # (C, L, M), M keys in all
        q, k, v = (
            x.transpose(1, 2).flatten(0, 1) for x in (q, torch.cat(keys, 3), torch.cat(values, 3))
        )  # (B * C, H, L or M, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat(batch, 1, 1)[:, None])
        return y.view(batch, chunks, heads, chunk, size).transpose(2, 3).flatten(1, 2)[:, :chars]


# For a layer's stride: how many chunks back the chunks lie that it reads. `local_chunks` needs none of these.
DISTANCES: dict[str, Callable[[int], list[int]]] = {
    "partner and before": lambda stride: [1, stride, stride + 1],
    "two partners": lambda stride: [1, stride, 2 * stride],
}


class Taps(Layer):
    """Mixes the three characters before into each, by learned gains that begin at zero, ahead of a layer's
    projections: a causal depthwise convolution, as recurrent models have them. For another kind of layer."""

    def __init__(self, config: ButterflyConfig, reads_carry: bool, local: int | None = None) -> None:
        super().__init__(config, reads_carry, local)
        self.taps = nn.Parameter(torch.zeros(3 * config.hidden_size))

    def forward(
        self, x: Tensor, memory: Tensor | None, angles: Angles | None, stride: int, backend: Backend | None
    ) -> Tensor:
        mixed = x
        for back, gain in enumerate(self.taps.to(x.dtype).chunk(3), 1):
            mixed = mixed + gain * F.pad(x, (0, 0, back, 0))[:, : x.shape[1]]
        lanes = None if memory is None else memory.flatten(0, 1)
        rows = self.project(self, mixed.flatten(0, 1), lanes, angles)
        q, k, v = (z.view(*x.shape[:2], *z.shape[1:]) for z in rows)
        y = self.attend(q, k, v, stride, backend)
        return self.finish(self, x.flatten(0, 1), y.flatten(0, 1), backend).view(x.shape)


LOOKUP_ORDERS = (4, 12)
_AHEAD = (0, 4)  # characters beyond the one that followed there


def hashes(ids: Tensor, order: int) -> Tensor:
    """ids (B, N) -> (B, N) int64, of the `order` characters that end with each, zeros before the text."""
    return ngrams.hashes(F.pad(ids, (order, 0)), order)[:, order:]


def latest(keys: Tensor, least: int) -> Tensor:
    """keys (B, N) -> (B, N) int64: behind the latest earlier place of the same key, or -1; from place
    `least` on."""
    values, at = keys.sort(dim=1, stable=True)
    same = F.pad(values[:, 1:] == values[:, :-1], (1, 0))
    found = torch.where(same, F.pad(at[:, :-1], (1, 0)) + 1, -1)
    found = torch.empty_like(at).scatter_(1, at, found)
    return torch.where(found >= least, found, -1)  # not what stands before the text


class Lookup(Layer):
    """Adds linear maps of its normalised input behind where the last n characters stood before, each n of
    `LOOKUP_ORDERS`, and a little further on. For another kind of layer; `found` is set ahead of each pass."""

    found: list[Tensor]  # for each n (B, N), as `latest` gives it

    def __init__(self, config: ButterflyConfig, reads_carry: bool, local: int | None = None) -> None:
        super().__init__(config, reads_carry, local)
        self.look_norm = RMSNorm(config.hidden_size, config.norm_eps)
        size, parts = config.hidden_size, len(LOOKUP_ORDERS) * len(_AHEAD)
        self.looks = nn.ModuleList(Linear(size, size, bias=False) for _ in range(parts))
        for look in self.looks:
            nn.init.zeros_(cast(Linear, look).weight)

    def forward(
        self, x: Tensor, memory: Tensor | None, angles: Angles | None, stride: int, backend: Backend | None
    ) -> Tensor:
        normed, looks = self.look_norm(x), iter(self.looks)
        here = torch.arange(x.shape[1], device=x.device)
        for found in self.found:
            for ahead in _AHEAD:
                at = torch.minimum(found.clamp(min=0) + ahead, here)
                rows = normed.gather(1, at[..., None].expand_as(normed)) * (found >= 0)[..., None]
                x = x + next(looks)(rows)
        return super().forward(x, memory, angles, stride, backend)


ATTENDS: dict[str, type[Layer]] = {"partner": Layer, "heads": StrideForEachHead} | {
    name: type("SeveralChunks", (SeveralChunks,), {"reads": name}) for name in DISTANCES
}


def settings(text: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """ "name:key=value,train.key=value" -> name, fields of the model, fields of the run."""
    name, _, rest = text.partition(":")
    model: dict[str, Any] = tomllib.loads(f"all = {{{rest}}}")["all"]
    run: dict[str, Any] = model.pop("train", {})
    return name, model, run


def builder(
    twin: str,
    strides: str,
    seed: int,
    attends: str = "partner",
    taps: bool = False,
    looks: Sequence[int] = (),
) -> Callable[[ButterflyConfig], Butterfly]:
    """What makes the model of a variant. ValueError for what it cannot be: a twin has no strides."""
    if looks and twin != "butterfly":
        raise ValueError(f"no looks for {twin}")
    if taps and twin in twins.RECURRENT:
        raise ValueError(f"no taps for {twin}, which has its own")
    for field, value, known in (("strides", strides, [*STRIDES]), ("attends", attends, [*ATTENDS])):
        if value not in known or (twin != "butterfly" and value != known[0]):
            raise ValueError(f"no {field} {value!r} for {twin}: a butterfly has one of {', '.join(known)}")

    def build(config: ButterflyConfig) -> Butterfly:
        model = twins.build(twin, config)
        layers = cast("list[Layer]", model.layers)
        if not set(looks) <= set(range(len(layers))):
            raise ValueError(f"no looks {list(looks)}: there are layers 0 to {len(layers) - 1}")
        for i, layer in enumerate(layers):
            kind = ATTENDS[attends] if model.routes[i].stage == "butterfly" else type(layer)
            if taps:
                kind = type(f"{kind.__name__}WithTaps", (Taps, kind), {})
            if i in looks:
                kind = type(f"{kind.__name__}WithLookup", (Lookup, kind), {})
            if kind is not type(layer):
                model.layers[i] = kind(config, layer.attention.read is not None, layer.local)
        if looks:
            embed = model._embed

            def remember(ids: Tensor, *rest: Any) -> Tensor:
                found = [latest(hashes(ids.long(), order), order) for order in LOOKUP_ORDERS]
                for i in looks:
                    cast(Lookup, model.layers[i]).found = found
                return embed(ids, *rest)

            model._embed = remember  # type: ignore[method-assign, assignment]
            model.prefill_slice = 1 << 20  # slices of a layer know nothing of lookups
        if strides != "powers":
            found = iter(STRIDES[strides](config.num_passes, config.num_levels, seed))
            model.routes = tuple(
                dataclasses.replace(route, stride=next(found)) if route.stage == "butterfly" else route
                for route in model.routes
            )
        return model

    return build


def speed_at(metrics: Path, length: int) -> int | None:
    """Characters a second in windows of `length`: the median of a run's log, None where that has none."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    speeds = [row["chars_per_second"] for row in rows if row["kind"] == "train" and row["length"] == length]
    return int(statistics.median(speeds)) if speeds else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", type=Path)
    parser.add_argument("variants", nargs="+")
    parser.add_argument("--length", type=int, default=4096, help="characters in a window")
    parser.add_argument(
        "--grow", type=int, metavar="CHARS", help="windows this long at first, whole from half of the run"
    )
    parser.add_argument("--ask", type=int, nargs="+", help="lengths asked at; default: --length")
    parser.add_argument("--levels", type=int, help="levels in a pass; default: as the length needs")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--chars", type=int, default=65_536, help="characters in a step")
    parser.add_argument("--windows", type=int, default=32, help="asked at each number of hops")
    parser.add_argument("--save", type=Path, help="append the rows to this file")
    options = parser.parse_args()
    try:
        compare(options)
    except (ValueError, OSError, ModuleNotFoundError) as failure:
        parser.error(str(failure))


def compare(options: argparse.Namespace) -> None:
    first = options.length if options.grow is None else options.grow
    if min(first, options.length, *(options.ask or ())) < 1:
        raise ValueError("--length, --grow and --ask must be at least 1")
    text = bytes(Corpus(options.corpus / "val.bin").data)
    for variant in options.variants:
        name, model_changes, run_changes = settings(variant)
        levels = options.levels or (options.length // 128 - 1).bit_length()
        model_config = ButterflyConfig.preset(
            "small", hidden_size=options.width, num_heads=options.width // 64,
            num_kv_heads=options.width // 64, intermediate_size=4 * options.width,
            carry_size=options.width // 4,
            num_local_layers=2, num_passes=2, num_levels=levels, num_refine_layers=2,
            ngram_orders=(), ngram_words=0, ngram_ranks=1,
        )  # fmt: skip
        special = ("twin", "strides", "attends", "taps", "looks")
        own = {key: model_changes[key] for key in model_changes if key not in special}
        model_config = ButterflyConfig.from_dict(model_config.to_dict() | own)
        twin, strides = model_changes.get("twin", "butterfly"), model_changes.get("strides", "powers")
        attends = model_changes.get("attends", "partner")
        seed, taps = run_changes.get("seed", 0), model_changes.get("taps", False)
        looks = model_changes.get("looks", ())
        build = builder(twin, strides, seed, attends, taps, looks)
        # Before its kernels are imported; they are tuned anew for every length otherwise, for minutes.
        if tuned := twin in twins.RECURRENT and torch.cuda.is_available():
            peers.tune_quickly()
        # A twin is told of n-grams where that is asked for.
        told = twin != "butterfly" and model_config.num_contexts
        model_config = twins.twin_config(f"{twin}+n-grams" if told else twin, model_config)
        lengths = growing(first, options.length)
        with tempfile.TemporaryDirectory() as out:
            config = TrainConfig.from_dict({
                "corpus": str(options.corpus), "out": out, "steps": options.steps,
                "batch_chars": options.chars, "lengths": lengths, "learning_rate": 2e-3,
                "warmup_steps": 50, "decay_from": 0.5,
                "final_rate": 0.05, "decay": "linear", "compile": torch.cuda.is_available(), "log_every": 100,
                "val_chars": 1 << 20, "val_length": options.length, "checkpoint_minutes": 0.0,
                "recall_share": 1.0,
            } | run_changes)  # fmt: skip
            if tuned:
                at_once = config.micro_chars or config.batch_chars
                sizes = model_config.to_dict()
                for complaint in peers.compile_kernels(twin, sizes, "cuda", at_once, 300.0):
                    print(complaint, file=sys.stderr)
            begun = time.perf_counter()
            result = train(
                config, model_config,
                corpus=Corpus(options.corpus / "train.bin"), val_corpus=Corpus(options.corpus / "val.bin"),
                build=build,
            )  # fmt: skip
            speed = speed_at(Path(out) / "metrics.jsonl", options.length)
        seconds = time.perf_counter() - begun
        # Without the compiled layers of the run, which would be compiled again for every length.
        model = build(model_config).to(result.model.embed.weight.device)
        model.load_state_dict(result.model.state_dict())
        model.compute_dtype = result.model.compute_dtype
        asked = [
            {"length": length, "distractors": needles.distractors, "reworded": needles.reworded}
            | dataclasses.asdict(
                evaluate_recall(
                    model,
                    text,
                    length=length,
                    windows=options.windows,
                    needles=needles,
                )
            )
            for length in options.ask or [options.length]
            for needles in (Needles(), Needles(distractors=15), Needles(distractors=15, reworded=True))
        ]
        val = Corpus(options.corpus / "val.bin")
        with torch.no_grad():
            places = held_out(model, val, options.length, 1 << 20, 1)["buckets"]
        row = {
            "variant": name, "model": model_changes, "run": run_changes, "length": options.length,
            "parameters": model.num_parameters(), "chars": result.chars, "seconds": round(seconds, 1),
            "chars_per_second": speed,
            "bits_per_char": round(result.val_bits, 4), "skipped": result.skipped, "by_position": places,
            "recall": [
                {key: each[key] for key in ("length", "distractors", "reworded")}
                | {
                    name: {edge: round(share, 3) for edge, (share, _) in each[name].items()}
                    for name in ("by_hops", "by_distance")
                }
                for each in asked
            ],
            "asked": options.windows, "config": config.to_dict() | {"corpus": options.corpus.name, "out": ""},
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "torch": torch.__version__,
        }  # fmt: skip
        print(json.dumps({key: value for key, value in row.items() if key != "config"}), flush=True)
        if options.save is not None:
            with options.save.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        del result


if __name__ == "__main__":
    main()
