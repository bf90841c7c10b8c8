"""What one chunk knows arrives at every later one: learnt from nothing, over every distance, in a minute.

Random letters with one `#x`; at the end of the window stands `#`, and the answer is x (`tasks.induction`).
The window is nine chunks, so that the question stands in chunk 8, binary 1000: a masked XOR reaches nothing
but chunk 0 from there, and six layers that read the chunk before reach six chunks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from butterfly_llm.config import ButterflyConfig, TrainConfig
from butterfly_llm.model import Butterfly
from butterfly_llm.optim import Optimizers
from butterfly_llm.tasks import induction

CHUNK, CHUNKS = 16, 9
LENGTH = CHUNK * CHUNKS
CHANCE = 1 / 16
RATE = 8e-3


def model(**changes: Any) -> Butterfly:
    config = ButterflyConfig.preset(
        "micro", hidden_size=32, num_heads=1, num_kv_heads=1, head_dim=32, intermediate_size=64,
        carry_size=16, num_local_layers=1, num_passes=1, num_levels=4, num_refine_layers=1, chunk_size=CHUNK,
    )  # fmt: skip
    torch.manual_seed(0)
    return Butterfly(ButterflyConfig.from_dict({**config.to_dict(), **changes}))


def draw(generator: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Windows (count, LENGTH + 1), and by how many chunks each question stands behind its fact (count,)."""
    windows, distances = [], []
    for _ in range(count):
        window, (answer,) = induction(generator, np.zeros(LENGTH + 1, dtype=np.uint8))
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
    asked = (window[:-1] == sign).nonzero()[:, 0]
    window[asked + 1] = x
    weights = torch.zeros(LENGTH)
    weights[asked[1:]] = 1
    return weights


def trained(net: Butterfly, steps: int) -> Butterfly:
    generator = np.random.Generator(np.random.Philox(key=[0, 0]))
    optimizers = Optimizers(net, TrainConfig(learning_rate=RATE))
    for step in range(steps):
        windows, _ = draw(generator, 32)
        most = 11 if step < 0.5 * steps else 1  # near questions first, then far ones
        weights = torch.stack([ask_more_often(window, generator, most) for window in windows])
        net.loss(windows[:, :-1], windows[:, 1:], weights).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        rate = RATE * min(1, (step + 1) / 20) * (1 - 0.9 * step / steps)
        optimizers.step(rate, torch.zeros((), dtype=torch.bool))
    return net


def accuracy(net: Butterfly) -> dict[int, float]:
    """Share of right answers in fresh windows by distance in chunks."""
    windows, distances = draw(np.random.Generator(np.random.Philox(key=[1, 0])), 600)
    with torch.no_grad():
        right = net.head(net.hidden(windows[:, :-1])[:, -1]).argmax(-1) == windows[:, -1]
    return {d: float(right[distances == d].float().mean()) for d in range(CHUNKS)}


@pytest.mark.slow
def test_the_default_architecture_relays_over_every_distance() -> None:
    shares = accuracy(trained(model(), 500))
    assert all(shares[d] > 0.8 for d in (3, 5, 6, 7)), shares  # two and three hops
    assert all(shares[d] > 0.8 for d in (0, 1, 2, 4, 8)), shares


@pytest.mark.parametrize(
    ("changes", "out_of_reach"),
    [
        ({"routing": "xor_causal"}, range(1, 8)),
        (
            {"num_local_layers": 6, "num_passes": 0, "num_refine_layers": 0, "carry_size": 0},
            range(7, 9),
        ),
    ],
    ids=["masked xor", "previous chunk only"],
)
def test_what_has_no_path_stays_at_chance(changes: dict[str, Any], out_of_reach: range) -> None:
    net = trained(model(**changes), 30)
    windows, _ = draw(np.random.Generator(np.random.Philox(key=[2, 0])), 4)
    embedded = net._embed(windows[:, :-1]).detach().requires_grad_()
    net._embed = lambda ids: embedded  # type: ignore[method-assign]
    net.head(net.hidden(windows[:, :-1])[:, -1]).sum().backward()
    assert embedded.grad is not None
    heard = embedded.grad.abs().sum((0, 2)).unflatten(0, (CHUNKS, CHUNK)).sum(1)  # (chunks,)
    assert heard[8] > 0 and all(heard[8 - distance] == 0 for distance in out_of_reach)
    del net._embed
    shares = accuracy(net)
    assert all(shares[distance] < 4 * CHANCE for distance in out_of_reach), shares
