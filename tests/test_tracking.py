"""Trackers: they get the numbers of metrics.jsonl, and go on in the same run after a restart."""

import json
import sys
from types import ModuleType

import pytest

from butterfly_llm.config import ButterflyConfig, TrainConfig
from butterfly_llm.data import prepare
from butterfly_llm.train import train

SETTINGS = {"batch_chars": 64, "lengths": ((1.0, 64),), "val_chars": 64, "log_every": 1, "device": "cpu"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Train to a step; returns the train and val lines of metrics.jsonl."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"{name} = 1\n" * 40)
    prepare(["a", "b"], "corpus", holdout=("b",))

    def call(steps, **changes):
        config = TrainConfig(corpus="corpus", out="out", steps=steps, **(SETTINGS | changes))
        train(config, ButterflyConfig.preset("micro"))
        lines = map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
        return [line for line in lines if line["kind"] in ("train", "val")]

    return call


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_services_get_the_numbers_and_resume_the_run(run, name, monkeypatch, capsys):
    opened, logged, closed = [], [], []
    service = ModuleType(name)
    service.init = lambda **options: print("welcome") or opened.append(options)
    service.log = lambda values, step: logged.append((step, values))
    service.finish = lambda: closed.append(True)
    monkeypatch.setitem(sys.modules, name, service)
    run(1, track=name)
    first = len(logged)
    lines = run(2, track=name)
    assert len(opened) == len(closed) == 2 and first > 0
    assert opened[0]["name"] == opened[1]["name"] and opened[0]["name"].startswith("out-")
    assert opened[1].get("id") == (opened[1]["name"] if name == "wandb" else None)
    assert opened[0]["resume"] == "allow" and opened[0]["config"]["batch_chars"] == 64
    steps = {(line["step"], line["bits_per_char"]) for line in lines if line["kind"] == "train"}
    assert {(step, v["train/bits_per_char"]) for step, v in logged if "train/bits_per_char" in v} == steps
    assert any("val/bits_per_char" in values for _, values in logged)
    assert all(isinstance(value, int | float) for _, values in logged for value in values.values())
    assert capsys.readouterr().out == ""


def test_tensorboard_reads_what_was_logged(run, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    lines = run(2, track="tensorboard")
    events = reader.EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    expected = [(line["step"], line["bits_per_char"]) for line in lines if line["kind"] == "train"]
    got = [(event.step, event.value) for event in events.Scalars("train/bits_per_char")]
    assert got == [(step, pytest.approx(bits)) for step, bits in expected]


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_missing_tracker_is_a_hint_before_anything_is_made(run, name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'butterfly-llm\[{name}\]'") as caught:
        run(1, track=name)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_an_unknown_tracker_is_refused():
    with pytest.raises(ValueError, match="track must be none, tensorboard, trackio or wandb, not 'mlflow'"):
        TrainConfig(track="mlflow")
