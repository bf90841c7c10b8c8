"""What one chunk knows arrives at every later one, learnt from nothing; what has no path stays at chance."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from butterfly_llm.bench.relay import CHUNK, CHUNKS, accuracy, ask_more_often, draw, main, network, train

CHANCE = 1 / 16


@pytest.mark.slow
def test_the_default_architecture_relays_over_every_distance() -> None:
    shares = accuracy(train(network("shift"), 700))
    assert min(shares[d] for d in (3, 5, 6, 7)) > 0.8, shares  # two and three hops
    assert min(shares) > 0.8, shares


@pytest.mark.parametrize(
    ("name", "out_of_reach"), [("masked xor", range(1, 8)), ("previous chunk only", range(7, 9))]
)
def test_what_has_no_path_stays_at_chance(name: str, out_of_reach: range) -> None:
    model = train(network(name), 30)
    windows, _ = draw(np.random.Generator(np.random.Philox(key=[2, 0])), 4)
    embedded = model._embed(windows[:, :-1]).detach().requires_grad_()
    model._embed = lambda *_: embedded  # type: ignore[method-assign]
    model.head(model.hidden(windows[:, :-1])[:, -1]).sum().backward()
    assert embedded.grad is not None
    heard = embedded.grad.abs().sum((0, 2)).unflatten(0, (CHUNKS, CHUNK)).sum(1)  # (chunks,)
    assert heard[8] > 0 and all(heard[8 - distance] == 0 for distance in out_of_reach)
    del model._embed
    shares = accuracy(model)
    assert all(shares[distance] < 4 * CHANCE for distance in out_of_reach), shares


def test_every_question_of_a_training_window_has_one_answer() -> None:
    generator = np.random.Generator(np.random.Philox(key=[3, 0]))
    windows, distances = draw(generator, 20)
    assert distances.min() >= 0 and distances.max() < CHUNKS
    for window in windows:
        weights = ask_more_often(window, generator, 11)
        asked = (window[:-1] == ord("#")).nonzero()[:, 0]
        assert len(set(window[asked + 1].tolist())) == 1
        assert torch.equal(weights.nonzero()[:, 0], asked[1:]) and asked[-1] == len(window) - 2


def test_the_benchmark_prints_a_row_a_network(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--steps", "1", "shift", "masked xor"])
    *table, last = capsys.readouterr().out.splitlines()
    assert [row["network"] for row in json.loads(last)["networks"]] == ["shift", "masked xor"]
    assert len(table) == 3
    with pytest.raises(SystemExit) as stop:
        main(["xor"])
    assert stop.value.code == 2 and "unknown network 'xor': there are shift" in capsys.readouterr().err
