"""Benchmarks beside other architectures: every row is a figure or a reason, and all see the same text."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from butterfly_llm.bench import peers, twins
from butterfly_llm.bench.peers import Subject, expected_seconds
from butterfly_llm.checkpoint import load_pretrained
from butterfly_llm.config import ButterflyConfig
from butterfly_llm.corpus import Corpus
from butterfly_llm.data import prepare
from butterfly_llm.evaluate import character_nats
from butterfly_llm.twins import twin_config
from conftest import random_model

MICRO = ButterflyConfig.preset("micro")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("twins")
    for name in ("a", "b"):
        (folder / name).mkdir()
        (folder / name / "text.py").write_text(f"def {name}(x):\n    return [x, 1]\n" * 120)
    prepare([folder / "a", folder / "b"], folder / "corpus", holdout=["b"])
    return folder / "corpus"


def last_object(text: str) -> dict[str, Any]:
    return dict(json.loads(text.splitlines()[-1]))


def test_peers_measures_each_in_its_process_and_says_what_it_leaves_out(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    saved = tmp_path / "peers.json"
    options = (
        "--preset micro --twins butterfly full --lengths 64 256 65536 --chars 128 --device cpu --limit 9"
    )
    peers.main([*options.split(), "--save", str(saved)])
    out = capsys.readouterr().out
    result = last_object(out)
    assert result["bench"] == "peers" and json.loads(saved.read_text())["rows"] == result["rows"]
    rows = {(row["twin"], row["task"], row["length"]): row for row in result["rows"]}
    assert len(rows) == 12
    for name in ("butterfly", "full"):
        for task in ("reading", "training"):
            assert [rows[name, task, n]["chars"] for n in (64, 256)] == [128, 256]
            for length in (64, 256):
                row = rows[name, task, length]
                assert row["chars_per_second"] == pytest.approx(row["chars"] / row["seconds"], rel=0.02)
        assert [rows[name, "training", n]["recompute"] for n in (64, 256)] == ["none", "layer"]
    for task in ("reading", "training"):
        row = rows["full", task, 65536]  # 65,536 times the pairs of the row before
        assert "a step would take about" in row["failed"] and row["expected_seconds"] > 9
        assert row["failed"] in out


def test_the_expected_time_grows_with_the_square_of_the_length_for_full_attention_alone() -> None:
    last = {"seconds": 0.5, "length": 100, "chars": 400}
    assert expected_seconds("butterfly", None, 800, 400) is None
    assert expected_seconds("butterfly", last, 200, 400) == 0.5
    assert expected_seconds("butterfly", last, 800, 800) == 1.0
    assert expected_seconds("full", last, 800, 800) == 8.0


@pytest.mark.parametrize("name", ["butterfly", "full"])
def test_writing_is_measured_after_any_length(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(peers, "subject", Subject(name, twin_config(name, MICRO), "cpu", False, False, 64))
    monkeypatch.setattr(Subject, "clock", iter([10.0, 10.0 + 64 * 0.25]).__next__)
    row = peers.measure_row("writing", 40, 256, None)
    assert row == {"seconds": 0.25, "chars_per_second": 4, "bytes": None}
    assert peers.row_chars("writing", 40, 256) == 1 and peers.row_chars("reading", 40, 256) == 240


def test_out_of_memory_is_a_row_and_recomputed_layers_are_tried_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peers, "subject", Subject("window", MICRO, "cpu", False, False, 64))
    tried = []

    def full(self: Subject, ids: torch.Tensor, keep: bool, *_: int) -> tuple[list[float], bool]:
        tried.append(keep)
        if keep or ids.shape[1] > 65:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has less.")
        return [0.25], False

    monkeypatch.setattr(Subject, "training", full)
    row = peers.measure_row("training", 64, 64, None)
    assert tried == [True, False]
    assert row == {
        "cuda_graph": False, "recompute": "layer", "seconds": 0.25, "chars_per_second": 256,
        "bytes": None,
    }  # fmt: skip
    row = peers.measure_row("training", 128, 64, None)
    assert tried[2:] == [False] and row == {"failed": "out of memory: Tried to allocate 9 GiB"}


def test_no_row_begins_after_the_seconds_are_over(monkeypatch: pytest.MonkeyPatch) -> None:
    class Idle:
        def ask(self, *_: Any) -> Any:
            raise AssertionError("asked without time")

        def stop(self) -> None:
            pass

    def start(*_: Any, **__: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        time.sleep(0.02)
        return {"full": Idle()}, {"full": {"parameters": 1}}

    monkeypatch.setattr(peers, "start", start)
    parser = argparse.ArgumentParser()
    peers.add_options(parser)
    options = parser.parse_args(["--twins", "full", "--seconds", "0.01", "--preset", "micro"])
    assert all(row["failed"] == "no time left of 0 s" for row in peers.measure(options)["rows"])


def test_twins_trains_each_on_the_same_text_and_reads_held_out_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, corpus: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "twins.json"
    options = (
        "--preset micro --twins window mamba2 --length 64 --batch 256 --micro 128 --chars 5120 --warmup 0.1"
    )
    for module in ("fla", "fla.layers"):
        monkeypatch.setitem(sys.modules, module, None)
    more = ["--val-chars", "512", "--device", "cpu", "--save", str(saved), "--models", str(tmp_path / "kept")]
    twins.main([str(corpus), *options.split(), *more])
    out = capsys.readouterr().out
    result = last_object(out)
    assert result["rows"] == json.loads(saved.read_text())["rows"]
    window, missing = result["rows"]
    assert "pip install 'butterfly-llm[peers]'" in missing["failed"]
    assert (window["steps"], window["chars"], window["val_chars"], window["skipped"]) == (20, 5120, 512, 0)
    assert window["bits_per_char"] < 6 < window["curve"][0][2]  # it began at 8
    assert [place["stop"] for place in window["buckets"]] == [64]
    kept = twins.held_out(load_pretrained(tmp_path / "kept" / "window"), Corpus(corpus, "val"), 64, 512, 2)
    assert kept["bits_per_char"] == pytest.approx(window["bits_per_char"], abs=0.01)  # in 8 bits
    assert os.listdir(tmp_path / "kept") == ["window"]


def train_window(corpus: Path, options: str, warmup: float) -> dict[str, Any]:
    """`train_twin` of what `peers.prepare` made, here and now."""
    parser = argparse.ArgumentParser()
    twins.add_options(parser)
    settings = twins.settings_of(parser.parse_args(f"x --length 64 --batch 256 {options}".split()))
    return twins.train_twin(str(corpus), settings.to_dict(), True, 64, warmup)


def test_twins_warm_up_over_a_share_of_the_run(monkeypatch: pytest.MonkeyPatch, corpus: Path) -> None:
    peers.prepare("window", MICRO.to_dict(), "cpu", False, False, 0)
    rates = []
    assert peers.subject is not None
    monkeypatch.setattr(peers.subject.optimizers, "step", lambda rate, bad: rates.append(rate))
    train_window(corpus, "--chars 5120", 0.5)
    assert rates[:9] == pytest.approx([4e-3 * (0.01 + i / 10) for i in range(9)])
    assert max(rates) == rates[10] < 4e-3 and rates[-1] < 6e-4  # it falls from 0.4 of the run on


def test_twins_curve_has_means_of_the_steps_between(monkeypatch: pytest.MonkeyPatch, corpus: Path) -> None:
    curves = []
    for points in (100, 4):
        peers.prepare("window", MICRO.to_dict(), "cpu", False, False, 0)
        monkeypatch.setattr(twins, "_CURVE", points)
        curves.append(train_window(corpus, "--chars 5120", 0.5)["curve"])
    every, few = curves
    assert [chars for chars, _, _ in few] == [1280, 2560, 3840, 5120]
    means = [sum(bits for _, _, bits in every[i : i + 5]) / 5 for i in range(0, 20, 5)]
    assert [bits for _, _, bits in few] == pytest.approx(means, abs=1e-4)


def test_twins_windows_grow_until_half_of_the_run(monkeypatch: pytest.MonkeyPatch, corpus: Path) -> None:
    peers.prepare("window", MICRO.to_dict(), "cpu", False, False, 0)
    seen: list[tuple[int, ...]] = []

    def accumulate(model: Any, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append((*ids.shape,))
        return original(model, ids, *rest)

    original = twins.accumulate
    monkeypatch.setattr(twins, "accumulate", accumulate)
    row = train_window(corpus, "--grow 16 --micro 128 --chars 2048", 0.1)
    ahead, run = seen[:3], seen[3:]
    assert ahead == [(2, 64), (4, 32), (8, 16)]  # what is compiled for a length is compiled before the clock
    assert run == [(8, 16)] * 4 + [(4, 32)] * 4 + [(2, 64)] * 8  # two passes a step
    assert [place["stop"] for place in row["buckets"]] == [64] and row["chars"] == 2048


def test_held_out_bits_are_those_of_the_model(corpus: Path) -> None:
    model, val = random_model(MICRO), Corpus(corpus, "val")
    found = twins.held_out(model, val, 300, 600, 2)
    text = torch.from_numpy(val.read(0, 601).copy()).long()
    windows = torch.stack([text[:301], text[300:]])
    bits = character_nats(model, windows[:, :-1], windows[:, 1:]) / math.log(2)
    assert found["val_chars"] == 600
    assert found["bits_per_char"] == pytest.approx(float(bits.mean()), abs=1e-4)
    assert [(b["start"], b["stop"]) for b in found["buckets"]] == [(0, 128), (128, 300)]
    assert found["buckets"][1]["bits_per_char"] == pytest.approx(float(bits[:, 128:].mean()), abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "give either --seconds or --chars"),
        ("--seconds 1 --chars 9", "give either --seconds or --chars"),
        ("--chars 999 --length 100 --batch 250", "--length 100 does not divide --batch 250"),
        ("--chars 999 --warmup 2", "--warmup 2.0 must be a share from 0 to 1"),
        ("--chars 999 --grow 3000", "--grow 3000 must be --length 16384, or that halved some times"),
        ("--chars 999 --grow 0", "--grow 0 must be --length 16384, or that halved some times"),
        ("--chars 999 --length 0", "--length, --batch, --micro and --val-chars must be at least 1"),
        ("--chars 999 --length 1000000 --batch 1000000", "a window needs 1,000,001"),
    ],
)
def test_bad_options_are_one_line(
    capsys: pytest.CaptureFixture[str], corpus: Path, options: str, message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        twins.main([str(corpus), *options.split()])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
