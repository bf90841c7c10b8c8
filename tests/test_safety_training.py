"""Long runs lose nothing: killed, stopped twice, resumed with other settings, spikes, no memory left.

Rows 1, 3, 4, 8, 9 and 12 of docs/robustness.md.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from butterfly_llm import train as training
from butterfly_llm.checkpoint import TrainingState, checkpoints, load_training
from butterfly_llm.config import ButterflyConfig, TrainConfig
from butterfly_llm.data import prepare
from butterfly_llm.model import Butterfly
from butterfly_llm.train import TrainingDiverged, TrainResult, main, train

ROOT = Path(__file__).parents[1]
NANO = ButterflyConfig(
    hidden_size=32, num_heads=1, num_kv_heads=1, head_dim=32, intermediate_size=64, carry_size=8,
    num_local_layers=1, num_passes=1, num_levels=2, num_refine_layers=1, chunk_size=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("text")
    for name in ("one", "two"):
        (root / f"{name}.txt").write_text("".join(f"line {i} of {name}\n" for i in range(200)))
    prepare([root / "one.txt", root / "two.txt"], root / "corpus")
    return root / "corpus"


@pytest.fixture
def settings(corpus: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        corpus=str(corpus), out=str(tmp_path / "run"), device="cpu", steps=8, batch_chars=64,
        lengths=((1.0, 32),), warmup_steps=2, log_every=1, val_chars=64, checkpoint_minutes=0,
    )  # fmt: skip


def change(settings: TrainConfig, **changes: Any) -> TrainConfig:
    return dataclasses.replace(settings, **changes)


def metrics(settings: TrainConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(settings.out) / "metrics.jsonl").read_text().splitlines()]


def parameters(result: TrainResult) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in result.model.named_parameters()}


def test_thirty_kills_while_saving_lose_nothing() -> None:
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "kills.py"),
        "--kills",
        "30",
        "--seed",
        str(os.getpid()),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["survived"] == result["kills"] == 30 and result["swept"]
    assert result["while_saving"] > 0, "no kill came while a checkpoint was being written"


def other_value(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return value / 2 if value else 0.5
    if isinstance(value, int):
        return value * 2 if value else 1
    return {"auto": "float32", "cosine": "linear", "relu2": "swiglu", "shift": "xor_causal"}.get(value, "x")


def documented_changes() -> set[str]:
    """The settings that docs/training.md lists as free to change."""
    text = (ROOT / "docs" / "training.md").read_text()
    listed = re.search(r"may change these\s+settings:(.*?)\n\n", text, re.S)
    assert listed
    return set(re.findall(r"`(\w+)`", listed[1]))


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TrainConfig)])
def test_a_setting_may_change_if_it_is_listed_and_is_refused_by_name_otherwise(
    settings: TrainConfig, name: str
) -> None:
    old: Any = settings.to_dict()[name]
    others = {
        "lengths": ((1.0, 64),), "max_seconds": 1e9, "gradient_checkpointing": "nested",
        "track": "tensorboard",
    }  # fmt: skip
    new: Any = others.get(name) or other_value(old)
    state = TrainingState(Path("step-9"), NANO, {}, {}, {"train": json.loads(json.dumps(settings.to_dict()))})
    changed = change(settings, **{name: new})
    if name in documented_changes():
        training._refuse_changes(changed, NANO, state)
    else:
        with pytest.raises(ValueError, match=re.escape(f"{name} = {old!r}, now it is {new!r}")):
            training._refuse_changes(changed, NANO, state)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(ButterflyConfig)])
def test_no_field_of_the_model_may_change(settings: TrainConfig, name: str) -> None:
    old = NANO.to_dict()[name]
    new = {"num_extra_levels": 1, "ngram_orders": (3,)}.get(name) or other_value(old)
    also = {  # values that only go together; the first in order is named
        "num_kv_heads": {"num_heads": 2},
        "num_long_passes": {"num_long_levels": 9},
        "num_long_levels": {"num_long_passes": 1, "num_long_levels": 9},
        "local_every": {"local_chunks": 1},
        "ngram_ranks": {"ngram_words": 1},
    }
    changes = {name: new} | also.get(name, {})
    first = {
        "num_kv_heads": "num_heads", "num_long_levels": "num_long_passes", "local_every": "local_chunks",
        "ngram_ranks": "ngram_words",
    }  # fmt: skip
    named = first.get(name, name)
    state = TrainingState(Path("step-9"), NANO, {}, {}, {"train": settings.to_dict()})
    with pytest.raises(ValueError, match=re.escape(f"model.{named} = ")):
        training._refuse_changes(settings, dataclasses.replace(NANO, **changes), state)


@pytest.mark.parametrize("numbers", [(signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)])
def test_a_second_signal_ends_the_run_in_the_middle_of_a_step(
    settings: TrainConfig, numbers: tuple[signal.Signals, signal.Signals]
) -> None:
    """The step never ends by itself, so the first signal alone would wait for ever."""
    script = f"""
import os, signal, sys, time
from butterfly_llm import train as module
from butterfly_llm.config import ButterflyConfig, TrainConfig

def hang(*_, **__):
    os.kill(os.getpid(), {int(numbers[0])})
    print("noted", flush=True)
    while True:
        time.sleep(0.01)

module.sample_windows = hang
module.train(TrainConfig(**{settings.to_dict()!r}), ButterflyConfig(**{NANO.to_dict()!r}))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None and process.stdout.readline() == b"noted\n"
    assert process.poll() is None
    process.send_signal(numbers[1])
    assert process.wait(timeout=60) == 128 + numbers[1]
    process.stdout.close()
    assert checkpoints(settings.out) == []


class Steered(Butterfly):
    """Its training loss goes through `steer(call number, loss)`."""

    calls = 0
    steer: Callable[[int, Tensor], Tensor]

    def loss(self, ids: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        loss = super().loss(ids, targets, weights)
        if torch.is_grad_enabled():
            type(self).calls += 1
            return type(self).steer(self.calls - 1, loss)
        return loss


@pytest.fixture
def steered(monkeypatch: pytest.MonkeyPatch) -> type[Steered]:
    monkeypatch.setattr(training, "Butterfly", Steered)
    monkeypatch.setattr(Steered, "calls", 0)
    return Steered


def test_a_spike_of_the_loss_changes_nothing_is_counted_and_survives_a_restart(
    settings: TrainConfig, steered: type[Steered], monkeypatch: pytest.MonkeyPatch
) -> None:
    spike = 3.5 * math.log(2)
    monkeypatch.setattr(
        steered, "steer", staticmethod(lambda n, loss: loss + spike * (n == 5)), raising=False
    )
    config = change(settings, checkpoint_every=1, keep=9)
    result = train(config, NANO)
    assert result.skipped == 1 and result.losses[5] > result.losses[4] + 3
    before, after = (load_training(checkpoints(config.out)[8 - step]) for step in (5, 6))
    for tensors in ("weights", "tensors"):
        for name, tensor in getattr(before, tensors).items():
            assert torch.equal(tensor, getattr(after, tensors)[name]), name
    again = change(config, out=config.out + "2", resume=str(checkpoints(config.out)[3]))
    monkeypatch.setattr(steered, "calls", 5)  # the mean that a spike is measured against came back
    assert train(again, NANO).skipped == 1
    monkeypatch.setattr(steered, "calls", 0)
    assert train(change(config, out=config.out + "3", spike_bits=0.0), NANO).skipped == 0


def test_spikes_without_end_stop_the_run_and_the_last_good_checkpoint_stays(
    settings: TrainConfig, steered: type[Steered], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        steered, "steer", staticmethod(lambda n, loss: loss * (3 if n >= 4 else 1)), raising=False
    )
    config = change(settings, steps=30, checkpoint_every=4, max_bad_steps=3)
    with pytest.raises(TrainingDiverged, match=r"spike_bits.*3 steps in a row before step 7.*step-000000004"):
        train(config, NANO)
    assert load_training(checkpoints(config.out)[0]).values["skipped"] == 0


def test_the_same_seed_gives_the_same_run(settings: TrainConfig) -> None:
    first = train(settings, NANO)
    second = train(change(settings, out=settings.out + "2"), NANO)
    other = train(change(settings, out=settings.out + "3", seed=1), NANO)
    assert first.losses == second.losses != other.losses
    assert all(torch.equal(p, parameters(second)[name]) for name, p in parameters(first).items())


@pytest.mark.gpu
def test_on_a_gpu_a_resumed_run_is_bit_equal_with_the_deterministic_flag(settings: TrainConfig) -> None:
    config = change(settings, device="cuda", deterministic=True)
    try:
        whole = train(config, NANO)
        first = train(change(config, out=config.out + "2", checkpoint_every=4), NANO)
        again = train(
            change(config, out=config.out + "3", resume=str(checkpoints(config.out + "2")[1])), NANO
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert whole.losses == first.losses and whole.losses[4:] == again.losses
    assert all(torch.equal(p, parameters(again)[name]) for name, p in parameters(whole).items())


def test_no_memory_left_on_the_device_is_one_line_with_estimate_and_flags(
    settings: TrainConfig,
    steered: type[Steered],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def scarce(call: int, loss: Tensor) -> Tensor:
        if call == 5:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return loss

    monkeypatch.setattr(steered, "steer", staticmethod(scarce), raising=False)
    config = change(settings, checkpoint_every=2)
    said = r"cpu is out of memory at step 5 \([\d.]+ [KM]B were estimated\): lower micro_chars"
    with pytest.raises(MemoryError, match=said):
        train(config, NANO)
    assert checkpoints(config.out)[0].name == "step-000000004"

    monkeypatch.setattr(steered, "calls", 4)
    monkeypatch.setattr(training, "load_run", lambda *_: (config, NANO))
    assert main(["run.toml"]) == 2
    assert re.search(said, capsys.readouterr().err.splitlines()[-1])


def test_a_finished_run_started_again_writes_nothing_twice(settings: TrainConfig) -> None:
    config = change(settings, val_every=4)
    result = train(config, NANO)
    before = metrics(config)
    assert [(line["kind"], line["step"]) for line in before[-3:]] == [("train", 8), ("val", 8), ("end", 8)]
    written = checkpoints(config.out)[0].stat().st_mtime_ns
    again = train(config, NANO)
    assert again.val_bits == result.val_bits and checkpoints(config.out)[0].stat().st_mtime_ns == written
    kinds = [(line["kind"], line["step"]) for line in metrics(config)]
    assert kinds == [(line["kind"], line["step"]) for line in before]
    longer = train(change(config, steps=12), NANO)  # and the end of then is not the end of now
    assert longer.step == 12
    ends = [line["step"] for line in metrics(config) if line["kind"] == "end"]
    vals = [line["step"] for line in metrics(config) if line["kind"] == "val"]
    assert (ends, vals) == ([12], [4, 8, 12])
