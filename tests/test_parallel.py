"""Several processes train what one would: the same batch, one update, one voice; none is left waiting."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from butterfly_llm.checkpoint import checkpoints, load_training
from butterfly_llm.config import ButterflyConfig, TrainConfig
from butterfly_llm.data import prepare
from butterfly_llm.train import train

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")  # as in the processes that are compared
NANO = ButterflyConfig(
    hidden_size=32, num_heads=1, num_kv_heads=1, head_dim=32, intermediate_size=64, carry_size=8,
    num_local_layers=1, num_passes=1, num_levels=2, num_refine_layers=1, chunk_size=16,
)  # fmt: skip
# One process of a run; what a test adds runs before it, with `rank` and `config` at hand.
PROGRAM = """
import os, sys, weakref
import torch
import torch.distributed as dist
from butterfly_llm import train as training
from butterfly_llm.config import ButterflyConfig, TrainConfig

torch.set_num_threads(1)
rank = int(os.environ["RANK"])
config = TrainConfig(**{config!r})
{extra}
training.load_run = lambda *_: (config, ButterflyConfig(**{model!r}))
original = training.train

def train(*arguments):
    result = original(*arguments)
    weights = {{name: p.detach().cpu() for name, p in result.model.named_parameters()}}
    torch.save([result.losses, result.val_bits, weights], f"{{config.out}}.{{rank}}")

training.train = train
destroy = dist.destroy_process_group

def destroy_process_group():  # what it leaves may abort when Python ends
    group = weakref.ref(dist.group.WORLD)
    destroy()
    if group() is not None:
        print("gloo's threads are left", file=sys.stderr)

dist.destroy_process_group = destroy_process_group
raise SystemExit(training.main(["run.toml"]))
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("text")
    for name in ("one", "two"):
        (root / f"{name}.txt").write_text("".join(f"line {i} of {name}\n" for i in range(900)))
    prepare([root / "one.txt", root / "two.txt"], root / "corpus", holdout=["two.txt"])
    return root / "corpus"


def settings_in(folder: Path, corpus: Path) -> TrainConfig:
    """Facts are planted, so that windows have weights of their own; two lengths, two passes a step each."""
    return TrainConfig(
        corpus=str(corpus), out=str(folder / "run"), device="cpu", steps=8, batch_chars=4096,
        micro_chars=1024, lengths=((0.5, 512), (1.0, 1024)), recall_share=0.5, recall_weight=300.0,
        learning_rate=4e-3, warmup_steps=4, log_every=1, val_every=4, val_chars=2048, checkpoint_every=4,
        checkpoint_minutes=0,
    )  # fmt: skip


@pytest.fixture
def settings(corpus: Path, tmp_path: Path) -> TrainConfig:
    return settings_in(tmp_path, corpus)


def change(settings: TrainConfig, **changes: Any) -> TrainConfig:
    return dataclasses.replace(settings, **changes)


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"} | more


def program(config: TrainConfig, extra: str = "") -> str:
    return PROGRAM.format(config=config.to_dict(), model=NANO.to_dict(), extra=extra)


def run_two(config: TrainConfig, extra: str = "", status: tuple[int, int] = (0, 0)) -> list[str]:
    """Train with two processes that end with `status`; what each has said on stderr."""
    # As under torchrun the store is not theirs: nobody can take its port before they come.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    shared = environment(WORLD_SIZE="2", TORCHELASTIC_USE_AGENT_STORE="True", **address)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program(config, extra)],
            env=shared | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        said = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert (processes[0].returncode, processes[1].returncode) == status, said
    assert "threads are left" not in "".join(said)
    return said


def result_of(config: TrainConfig, rank: int) -> tuple[list[float], float, dict[str, Tensor]]:
    losses, val_bits, weights = torch.load(f"{config.out}.{rank}")
    return losses, val_bits, weights


def when(place: str, deed: str) -> str:
    """Code of the second process that does `deed` when it draws windows at `place`, (step, first)."""
    return f"""
before = training.sample_windows
def sample(*arguments, **keys):
    if rank and (keys["step"], keys["first"]) == {place}:
        {deed}
    return before(*arguments, **keys)
training.sample_windows = sample
"""


def figures(config: TrainConfig) -> list[tuple[Any, ...]]:
    lines = map(json.loads, (Path(config.out) / "metrics.jsonl").read_text().splitlines())
    return [(line["kind"], line["step"], line.get("chars"), line.get("length")) for line in lines]


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """The settings of a run of two processes, in which the second one may not write."""
    config = settings_in(tmp_path_factory.mktemp("whole"), corpus)
    extra = "training.parallel._BUCKET = 5000\n"  # several of them
    extra += "if rank: training.save_training = training.save_model = training.Reporter = None\n"
    said = run_two(config, extra)
    assert "the first of 2 processes" in said[0] and said[1] == ""
    return config


def test_two_processes_train_what_one_does_and_one_goes_on_from_two(
    settings: TrainConfig, whole: TrainConfig
) -> None:
    alone = train(settings, NANO)
    first, second = (result_of(whole, rank) for rank in (0, 1))
    assert first[:2] == second[:2]
    for name, weight in first[2].items():
        assert torch.equal(weight, second[2][name]), name  # bit for bit, for as long as they train
    assert first[0] == pytest.approx(alone.losses, rel=1e-4) and len(first[0]) == 8
    assert first[1] == pytest.approx(alone.val_bits, rel=1e-3)
    for name, parameter in alone.model.named_parameters():
        # Muon orthogonalises in bfloat16, which makes the rounding of a sum visible.
        distance = (parameter.detach() - first[2][name]).norm() / first[2][name].norm()
        assert float(distance) < 0.1, name
    assert figures(settings) == figures(whole)

    middle = checkpoints(whole.out)[1]
    assert middle.name == "step-000000004"
    after = train(change(settings, out=settings.out + "2", resume=str(middle)), NANO)
    assert after.losses == pytest.approx(first[0][4:], rel=1e-4)


def test_a_signal_to_one_stops_all_at_the_same_step_and_they_go_on_as_if_it_had_not(
    settings: TrainConfig, whole: TrainConfig
) -> None:
    broken = change(settings, checkpoint_every=0)
    said = run_two(broken, when("(2, 4)", "os.kill(os.getpid(), 15)"), (143, 143))
    assert "stopped at step 3" in said[0] and said[1] == ""
    assert checkpoints(broken.out)[0].name == "step-000000003"
    run_two(broken)
    for rank in (0, 1):
        once, twice = result_of(whole, rank), result_of(broken, rank)
        assert once[0][3:] == twice[0] and once[1] == twice[1]
        assert all(torch.equal(weight, twice[2][name]) for name, weight in once[2].items())


def test_torchrun_passes_a_signal_on(settings: TrainConfig, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(program(change(settings, steps=10**6)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "step 2 " in line:
            break
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=60)
    assert len(re.findall("the same command goes on from there", rest)) == 1, rest
    assert load_training(checkpoints(settings.out)[0]).values["step"] >= 2


def test_the_time_of_a_run_is_that_of_its_first_process(settings: TrainConfig) -> None:
    """The second one's clock is far ahead; it neither leaves early nor trains on other lengths."""
    config = change(settings, steps=10**6, max_seconds=3.0, finish_seconds=2.0, val_every=0, log_every=1)
    run_two(config, "import time\nnow = time.monotonic\ntime.monotonic = lambda: now() * (1 + 9 * rank)\n")
    first, second = (result_of(config, rank) for rank in (0, 1))
    assert first[0] == second[0] and 1 < len(first[0]) < 10**6
    assert {length for kind, _, _, length in figures(config) if kind == "train"} == {512, 1024}


def test_what_processes_cannot_share_evenly_is_refused(settings: TrainConfig) -> None:
    for processes in (1, 2, 4):
        settings.require_shares(processes)
    assert [settings.micro_windows(512, processes) for processes in (1, 4, 8)] == [2, 2, 1]
    for config, processes, windows in (
        (settings, 3, 8),
        (settings, 8, 4),  # of length 1024
        (change(settings, batch_chars=6144, micro_chars=2048), 2, 12),  # 6 each, 4 at a time
    ):
        with pytest.raises(ValueError, match=rf"{windows} windows .* {processes} processes .* change batch_"):
            config.require_shares(processes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("batch_chars=1024", "1 windows of length 1024, which 2 processes cannot share"),
        ("corpus='gone' if rank else config.corpus", "gone: no such corpus"),
    ],
)
def test_settings_that_do_not_fit_all_processes_are_one_line(
    settings: TrainConfig, changes: str, message: str
) -> None:
    extra = f"config = training.dataclasses.replace(config, {changes})"
    said = "".join(run_two(settings, extra, (2, 2)))
    assert said.count("error: ") == 1 and message in said.splitlines()[-1] and "Traceback" not in said
    assert not checkpoints(settings.out)


def test_where_one_process_fails_on_the_way_all_end_and_it_says_why(settings: TrainConfig) -> None:
    extra = """
def scarce(*_):
    raise torch.OutOfMemoryError("none left")
before = training._Run.advance
def advance(run, progress):
    if rank and run.step == 5:
        run.accumulate = scarce
    before(run, progress)
training._Run.advance = advance
"""
    said = run_two(settings, extra, (2, 2))
    assert "out of memory at step 5" in said[1].splitlines()[-1]
    assert "error" not in said[0] and "Traceback" not in "".join(said)
    assert checkpoints(settings.out)[0].name == "step-000000004"


def test_where_one_process_is_killed_the_other_ends_in_one_line(settings: TrainConfig) -> None:
    said = run_two(settings, when("(5, 2)", "os.kill(os.getpid(), 9)"), (2, -9))
    assert said[0].splitlines()[-1].startswith("error: train: another process of this run is gone")
    assert "Traceback" not in said[0] and said[1] == ""


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("changes", [{}, {"compile": True}, {"cuda_graph": False}])
def test_on_two_gpus_it_is_the_run_of_one(settings: TrainConfig, changes: dict[str, Any]) -> None:
    config = change(settings, device="auto", precision="float32", **changes)
    alone = train(change(config, out=settings.out + "1"), NANO)
    run_two(config)
    first, second = (result_of(config, rank) for rank in (0, 1))
    assert first[:2] == second[:2]
    assert all(torch.equal(weight, second[2][name]) for name, weight in first[2].items())
    assert first[0] == pytest.approx(alone.losses, rel=1e-2)
