"""Who relays: models of six layers trained from nothing to carry one letter over chunks, on the CPU.

    butterfly bench relay                       # seven networks, about eight minutes of one core
    butterfly bench relay shift "masked xor"
    butterfly bench relay shift "shift, n-grams" --ask 256 4096 65536 1048576

Random letters with one `#x`; at the end of the window stands `#`, and the answer is x (`tasks.induction`).
The window is nine chunks of 16, so that the question stands in chunk 8, binary 1000: a masked XOR reaches
nothing but chunk 0 from there, and six layers that read the chunk before reach six chunks at most. In
training `#x` stands again at up to eleven more places in the first half, at no or one in the second: near
questions first, then far ones. Accuracy is on fresh windows with one question, with --ask also on longer ones
than any network was trained on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from butterfly_llm.bench import run
from butterfly_llm.config import ButterflyConfig, TrainConfig
from butterfly_llm.model import Butterfly
from butterfly_llm.optim import Optimizers
from butterfly_llm.tasks import induction

CHUNK, CHUNKS = 16, 9
LENGTH = CHUNK * CHUNKS
NETWORKS: dict[str, dict[str, Any]] = {
    "shift": {},
    "shift, gated carry": {"carry_heads": 0},
    "shift, no carry": {"carry_size": 0},
    "shift, n-grams": {"ngram_orders": (1, 2, 3)},
    "masked xor": {"routing": "xor_causal"},
    "masked xor, no carry": {"routing": "xor_causal", "carry_size": 0},
    "previous chunk only": {"num_local_layers": 6, "num_passes": 0, "num_refine_layers": 0, "carry_size": 0},
}
BATCH, RATE = 32, 8e-3


def network(name: str, seed: int = 0) -> Butterfly:
    """An untrained model of six layers, 32 wide."""
    config = ButterflyConfig.preset(
        "micro", hidden_size=32, num_heads=1, num_kv_heads=1, head_dim=32, intermediate_size=64,
        carry_size=16, num_local_layers=1, num_passes=1, num_levels=4, num_refine_layers=1, chunk_size=CHUNK,
    )  # fmt: skip
    torch.manual_seed(seed)
    return Butterfly(ButterflyConfig.from_dict({**config.to_dict(), **NETWORKS[name]}))


def draw(generator: np.random.Generator, count: int, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Windows (count, length + 1), and by how many chunks each question stands behind its fact (count,)."""
    windows, distances = [], []
    for _ in range(count):
        window, (answer,) = induction(generator, np.zeros(length + 1, dtype=np.uint8))
        windows.append(window)
        distances.append(answer.chunk_distance(CHUNK))
    return torch.from_numpy(np.stack(windows)).long(), torch.tensor(distances)


def ask_more_often(window: Tensor, generator: np.random.Generator, most: int) -> Tensor:
    """Write `#x` at up to `most` more places; weights (LENGTH,) of all answers, not of the first `#x`."""
    sign, x = ord("#"), int(window[-1])
    first = int((window == sign).nonzero()[0])
    if first + 4 < LENGTH - 3:
        for place in generator.integers(first + 2, LENGTH - 3, int(generator.integers(0, most + 1))).tolist():
            window[place], window[place + 1] = sign, x
    window[(window[:-1] == sign).nonzero()[:, 0] + 1] = x
    asked = (window[:-1] == sign).nonzero()[:, 0]
    weights = torch.zeros(LENGTH)
    weights[asked[1:]] = 1
    return weights


def train(model: Butterfly, steps: int, seed: int = 0) -> Butterfly:
    """The same model, trained for `steps` batches of 32 windows."""
    generator = np.random.Generator(np.random.Philox(key=[seed, 0]))
    optimizers = Optimizers(model, TrainConfig(learning_rate=RATE))
    for step in range(steps):
        windows, _ = draw(generator, BATCH)
        most = 11 if step < 0.5 * steps else 1
        weights = torch.stack([ask_more_often(window, generator, most) for window in windows])
        model.loss(windows[:, :-1], windows[:, 1:], weights).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = RATE * min(1, (step + 1) / 20) * (1 - 0.9 * step / steps)
        optimizers.step(rate, torch.zeros((), dtype=torch.bool))
    return model


def accuracy(model: Butterfly, windows: int = 600, seed: int = 1) -> list[float]:
    """Share of right answers in fresh windows, by distance in chunks."""
    texts, distances = draw(np.random.Generator(np.random.Philox(key=[seed, 1])), windows)
    with torch.no_grad():
        right = model.head(model.hidden(texts[:, :-1])[:, -1]).argmax(-1) == texts[:, -1]
    return [float(right[distances == distance].float().mean()) for distance in range(CHUNKS)]


def at_length(model: Butterfly, length: int, windows: int, seed: int = 1) -> float:
    """Share of right answers in fresh windows of any length, read one by one."""
    generator = np.random.Generator(np.random.Philox(key=[seed, length]))
    right = 0
    with torch.no_grad():
        for _ in range(windows):
            text, _ = draw(generator, 1, length)
            right += int(model.head(model.hidden(text[:, :-1])[:, -1]).argmax(-1) == text[:, -1])
    return right / windows


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of: {'; '.join(NETWORKS)}")
    parser.add_argument("--steps", type=int, default=500, help="training batches of 32 windows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ask", type=int, nargs="*", default=(), help="longer windows: their characters")
    parser.add_argument("--windows", type=int, default=32, help="windows of each length in --ask")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    if options.steps < 1 or options.windows < 1 or options.seed < 0:
        raise ValueError("bench relay: --steps and --windows must be at least 1 and --seed at least 0")
    if min(options.ask, default=8) < 8:
        raise ValueError(f"bench relay: --ask must be at least 8 characters, not {min(options.ask)}")
    for name in options.networks:
        if name not in NETWORKS:
            raise ValueError(f"bench relay: unknown network {name!r}: there are {'; '.join(NETWORKS)}")
    print(f"{'right, by distance in chunks':<30}" + "".join(f"{d:>6}" for d in range(CHUNKS)), flush=True)
    rows = []
    for name in options.networks or NETWORKS:
        begun = time.process_time()
        model = train(network(name, options.seed), options.steps, options.seed)
        shares = accuracy(model)
        print(f"{name:<30}" + "".join(f"{share:>6.2f}" for share in shares), flush=True)
        longer = {}
        for length in options.ask:
            longer[str(length)] = at_length(model, length, options.windows)
            print(f"  {length:,} characters: {longer[str(length)]:.2f} of {options.windows}", flush=True)
        rows.append({
            "network": name, "parameters": model.num_parameters(), "right": [round(s, 3) for s in shares],
            "cpu_seconds": round(time.process_time() - begun, 1),
            **({"asked": longer, "windows": options.windows} if longer else {}),
        })  # fmt: skip
    return {
        "torch": torch.__version__,
        "steps": options.steps,
        "seed": options.seed,
        "chance": 1 / 16,
        "networks": rows,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    run("relay", __doc__, add_options, measure, arguments)


if __name__ == "__main__":
    main()
