"""Benchmarks: a table and one JSON object, by the command and by the module, options refused in one line."""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from butterfly_llm.bench import BENCHES
from butterfly_llm.bench.models import add_preset_options, chunks_read, config_of
from butterfly_llm.bench.train import step_operations
from butterfly_llm.checkpoint import load_pretrained, save_model
from butterfly_llm.cli import main
from butterfly_llm.config import ButterflyConfig
from conftest import random_model

MICRO = "--preset micro --chars 256 --lengths 64 256 --backends torch --steps 1 --eager"
SOURCE = str(Path(__file__).parents[1] / "src")


@pytest.fixture
def run(capsys):
    """Run `butterfly bench` in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        code = 0
        try:
            main(["bench", *map(str, arguments)])
        except SystemExit as stop:
            code = stop.code or 0
        return (code, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "model"
    save_model(random_model(ButterflyConfig.preset("micro")), path)
    return path


def test_train_prints_a_table_and_one_object(run):
    code, out, err = run("train", *MICRO.split())
    *table, last = out.splitlines()
    result = json.loads(last)
    assert (code, err, result["bench"]) == (0, "", "train")
    assert [row["length"] for row in result["rows"]] == [64, 256]
    assert all(row["chars_per_second"] > 0 for row in result["rows"])
    for row in result["rows"]:
        share = row["model_tflops"] / result["matmul_tflops"]
        assert row["share_of_matmul"] == pytest.approx(share, rel=0.01) and row["share_of_nominal"] is None
    assert f"{result['rows'][1]['chars_per_second']:,}" in table[-1]


def test_feed_forward_measures_what_is_there(run):
    code, out, err = run("feed_forward", "--preset", "micro", "--rows", 150)
    result = json.loads(out.splitlines()[-1])
    assert (code, err, result["bench"]) == (0, "", "feed_forward")
    half = result["rows"][-1] if not torch.cuda.is_available() else result["rows"][-2]
    assert half["what"] == "half a layer, compiled" and half["length"] == 150 and half["both_ms"] > 0
    assert len(half["errors"]) == 3 and 0 < max(half["errors"]) < 0.02
    assert "errors" in out.splitlines()[0] or torch.cuda.is_available()


def test_operations_of_a_training_step_are_those_the_model_needs() -> None:
    """6 a parameter outside the embedding; 8 + 16 visible keys in two products, three times."""
    model = random_model(ButterflyConfig.preset("micro"))
    matrices = 6 * (model.num_parameters() - 256 * 64)
    assert step_operations(model) == matrices + 3 * 2 * 2 * (8 + 16) * 64 * 8


def test_train_says_what_is_recomputed_and_how_much_memory_that_takes(run):
    code, out, _ = run("train", *MICRO.split(), "--levels", 2, "--recompute", "nested")
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert code == 0 and all("in 2 segments" in row["recompute"] for row in rows)
    _, out, _ = run("train", *MICRO.split(), "--recompute", "none")
    kept = json.loads(out.splitlines()[-1])["rows"]
    assert "every activation is kept" in kept[0]["recompute"]
    assert kept[0]["estimated_bytes"] > rows[0]["estimated_bytes"]
    _, out, _ = run("train", *MICRO.split(), "--recompute", "offload")
    (moved,) = json.loads(out.splitlines()[-1])["rows"][:1]
    assert moved["host_bytes"] > 0 == kept[0]["host_bytes"] and "the host's memory" in moved["recompute"]


def test_stream_with_json_leaves_stdout_to_the_object(run, checkpoint, monkeypatch):
    monkeypatch.setattr("butterfly_llm.bench.stream.matmul_rate", lambda *_: 1e9)
    monkeypatch.setattr("butterfly_llm.bench.stream.read_bandwidth", lambda *_: 1e9)
    code, out, err = run("stream", "--json", "--model", checkpoint, "--lengths", 64, 256, "--steps", 2)
    result = json.loads(out)
    assert code == 0 and out.count("\n") == 1 and "read, a second" in err
    assert [(row["what"], row["length"]) for row in result["rows"]] == [
        ("reading", 64), ("writing", 64), ("reading", 256), ("writing", 256)
    ]  # fmt: skip
    assert result["rows"][-1]["bytes"] == random_model(ButterflyConfig.preset("micro")).new_cache().nbytes


@pytest.mark.parametrize(("every", "chunks"), [(1, 8 * 2.5 + 2), (3, 8 * 0.5 + 2 * 2 + 6)])
def test_only_layers_with_local_chunks_read_them(every, chunks):
    """Strides 1, 1, 2, 4, 1, 2, 4, 1: where two local chunks are read, only 4 is one more."""
    model = random_model(ButterflyConfig.preset("micro", local_chunks=2, local_every=every))
    assert chunks_read(model) == chunks


def test_prefill_and_decode_measure_every_length(run, monkeypatch):
    monkeypatch.setattr("butterfly_llm.bench.prefill.matmul_rate", lambda *_: 1e9)
    monkeypatch.setattr("butterfly_llm.bench.decode.read_bandwidth", lambda *_: 1e9)
    micro = ("--preset", "micro", "--levels", 4, "--kv-heads", 1, "--local-chunks", 1, "--local-every", 2)
    code, out, _ = run("prefill", *micro, "--lengths", 100, 300, "--slice", 64, "--repeats", 1)
    *table, last = out.splitlines()
    result = json.loads(last)
    assert (code, result["num_levels"], result["num_kv_heads"]) == (0, 4, 1) and len(table) == 3
    assert (result["local_chunks"], result["local_every"]) == (1, 2)
    assert [(row["length"], row["slice"]) for row in result["rows"]] == [(100, 64), (300, 64)]
    assert all(row["chars_per_second"] > 0 and row["bytes"] is None for row in result["rows"])

    code, out, _ = run("decode", *micro, "--contexts", 40, 200, "--streams", 1, 3, "--steps", 2)
    result = json.loads(out.splitlines()[-1])
    rows = [(row["length"], row["streams"]) for row in result["rows"]]
    assert (code, rows) == (0, [(40, 1), (40, 3), (200, 1), (200, 3)])
    assert set(result["long_over_short"]) == {"1", "3"} and not result["captured"]
    assert result["rows"][1]["bytes"] == 3 * result["rows"][0]["bytes"]


def test_rings_agree_with_forward_and_shrink(run, checkpoint, tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(256)) * 2)
    (tmp_path / "b").write_bytes(b"Some text. " * 40)
    code, out, _ = run("rings", tmp_path / "a", tmp_path / "b", "--chars", 300, "--model", checkpoint)
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and result["texts"] == {"a": 300, "b": 300}
    model = load_pretrained(checkpoint)
    bits = []
    for name in ("a", "b"):
        ids = torch.tensor([list((tmp_path / name).read_bytes()[:300])])
        bits.append(model.loss(ids[:, :-1], ids[:, 1:]).item() / math.log(2))
    exact, half, eight = result["rows"]
    assert exact["texts"] == pytest.approx(bits, rel=1e-4)
    assert exact["bits_per_char"] == pytest.approx(sum(bits) / 2, rel=1e-4)
    assert 0 < abs(half["bits_per_char"] - exact["bits_per_char"]) < 0.05
    assert 0 < abs(eight["bits_per_char"] - exact["bits_per_char"]) < 0.05
    assert exact["bytes"] == 2 * half["bytes"] and exact["bytes"] > eight["bytes"]


def test_batch_compares_with_one_stream(run, checkpoint):
    code, out, _ = run("batch", "--model", checkpoint, "--chars", 20, "--steps", 2, "--streams", 3)
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert code == 0 and [row["streams"] for row in rows] == [1, 3] and rows[0]["against_one"] == 1
    ratio = 3 * rows[0]["step_ms"] / rows[1]["step_ms"]
    assert rows[1]["against_one"] == pytest.approx(ratio, rel=0.05)


def test_the_modules_run_where_only_torch_is_installed():
    program = (
        "import sys\nfor name in ('tyro', 'rich'): sys.modules[name] = None\n"
        f"import importlib\nfor name in {BENCHES}: importlib.import_module('butterfly_llm.bench.' + name)\n"
        "del sys.modules['butterfly_llm.bench.train']\n"
        "import runpy\nrunpy.run_module('butterfly_llm.bench.train', run_name='__main__')\n"
    )
    environment = {"PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1", "PATH": ""}
    result = subprocess.run(
        [sys.executable, "-c", program, *MICRO.split()], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["bench"] == "train"


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_ops_without_a_gpu_is_one_line(run):
    assert run("ops") == (2, "", "butterfly: error: bench ops needs a CUDA device\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "trian",
            "unknown benchmark 'trian' (did you mean 'train'?): there are batch, decode, feed_forward, ops, ",
        ),
        ("prefill --lengths 0", "--lengths, --slice and --repeats must be at least 1"),
        ("prefill --levels 13", "bench prefill: --levels goes with --preset"),
        ("decode --carry-heads 4", "bench decode: --carry-heads goes with --preset"),
        ("decode --local-every 2", "bench decode: --local-every goes with --preset"),
        ("prefill --ngram-orders 3", "bench prefill: --ngram-orders goes with --preset"),
        ("prefill --ngram-words 3", "bench prefill: --ngram-words goes with --preset"),
        ("decode --sizes hidden_size=32", "bench decode: --sizes goes with --preset"),
        ("decode --preset micro --ngram-orders 3 2", "ngram_orders must be rising whole numbers"),
        ("decode --preset micro --ngram-ranks 2", "ngram_ranks 2 must be at most 4, 1 without ngram_orders"),
        (
            "decode --preset micro --sizes hidden_size",
            "--sizes hidden_size: give a field of the model and a number",
        ),
        ("decode --preset micro --sizes hidden=3", "unknown field 'hidden' (did you mean 'hidden_size'?)"),
        ("train --carry-heads 5", "config: carry_heads 5 must divide carry_size 64"),
        ("prefill --limit-gb 24", "--limit-gb needs --device cuda"),
        ("decode --contexts 0", "--contexts, --streams and --steps must be at least 1"),
        ("decode --preset smal", "unknown preset 'smal' (did you mean 'small'?)"),
        ("rings", "the following arguments are required: files"),
        ("rings nosuch", "nosuch"),
        ("rings README --chars 1", "--chars must be at least 2"),
        ("stream --lenghts 3", "unrecognized arguments: --lenghts 3 (did you mean --lengths?)"),
        ("stream --lengths 0", "--lengths and --steps must be at least 1"),
        ("stream --model nosuch", "nosuch: no such checkpoint"),
        ("stream --device tpu", "device 'tpu': use auto, cpu, cuda or cuda:N"),
        ("train --preset smal", "unknown preset 'smal' (did you mean 'small'?)"),
        ("train --backends tritn", "invalid choice: 'tritn'"),
        ("train --chars 10 --lengths 11", "--lengths from 1 to --chars"),
        ("", "{" + ",".join(BENCHES) + "}"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(run, arguments, message):
    code, out, err = run(*arguments.split())
    assert (code, out) == (2, "")
    assert err.startswith("butterfly: error: ") and err.count("\n") == 1, err
    assert "".join(message.split()) in "".join(err.split())  # long lists of choices are wrapped


def test_options_of_a_preset_change_its_fields():
    parser = argparse.ArgumentParser()
    add_preset_options(parser, "small")
    told = "--ngram-orders 2 5 --ngram-words 2 --ngram-ranks 3 --local-chunks 1"
    options = parser.parse_args(f"{told} --sizes hidden_size=128 num_passes=2 --levels 7".split())
    plain = ButterflyConfig.preset(
        "small",
        ngram_orders=(2, 5),
        ngram_words=2,
        ngram_ranks=3,
        local_chunks=1,
        hidden_size=128,
        num_passes=2,
    )
    assert config_of(options) == plain.with_levels(7)
    assert config_of(parser.parse_args([])) == ButterflyConfig.preset("small")


def test_help_of_each_benchmark_shows_its_options(run):
    assert "ops" in run("--help")[1]
    for name in BENCHES:
        code, out, _ = run(name, "--help")
        assert code == 0 and f"butterfly bench {name}" in out and "--json" in out
