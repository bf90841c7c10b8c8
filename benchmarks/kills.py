"""Kill a training run with SIGKILL at random moments while it saves; afterwards it must go on as promised.

    python benchmarks/kills.py --kills 30

A run that saves with every step is started, killed and started again. After each kill the newest checkpoint
must load whole and be no older than the last one that was finished. A table on stdout, as its last line one
JSON object; exit code 1 if a kill was not survived.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from butterfly_llm import train as training
from butterfly_llm.checkpoint import newest_training, save_training
from butterfly_llm.config import ButterflyConfig, TrainConfig
from butterfly_llm.data import prepare
from butterfly_llm.model import Butterfly
from butterfly_llm.optim import Optimizers

MODEL = ButterflyConfig(
    hidden_size=32, num_heads=1, num_kv_heads=1, head_dim=32, intermediate_size=64, carry_size=8,
    num_local_layers=1, num_passes=1, num_levels=2, num_refine_layers=1, chunk_size=16,
)  # fmt: skip


def start(config: TrainConfig) -> tuple[int, int]:
    """Run `config` in a child. -> its process, and a pipe with a line for every checkpoint finished."""
    reader, writer = os.pipe()
    process = os.fork()
    if process:
        os.close(writer)
        return process, reader
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())

    def save_and_tell(model: Any, directory: Path, **rest: Any) -> None:
        save_training(model, directory, **rest)
        os.write(writer, f"{rest['values']['step']}\n".encode())

    with mock.patch.object(training, "save_training", save_and_tell):
        training.train(config, MODEL)
    os._exit(0)


def strays(run: Path) -> list[str]:
    return [path.name for path in run.rglob(".*.partial")]


def main() -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--kills", type=int, default=30)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--within-ms", type=float, default=60.0, help="latest moment after the first save")
    arguments = options.parse_args()
    warnings.simplefilter("error")  # a damaged checkpoint that gives way to the one before would be one
    torch.set_num_threads(1)
    moments = random.Random(arguments.seed)
    survived = while_saving = finished = 0
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("a", "b"):
            (Path(folder) / f"{name}.txt").write_text(f"text {name} " * 100)
        corpus, run = Path(folder) / "corpus", Path(folder) / "run"
        prepare([Path(folder) / "a.txt", Path(folder) / "b.txt"], corpus)
        config = TrainConfig(
            corpus=str(corpus), out=str(run), export=str(run / "exported"), device="cpu", steps=10**6,
            batch_chars=32, lengths=((1.0, 32),), checkpoint_every=1,
        )  # fmt: skip
        Optimizers(Butterfly(MODEL), config)  # imports a part of torch that every child would
        for number in range(arguments.kills):
            process, pipe = start(config)
            told = os.read(pipe, 100)
            time.sleep(moments.uniform(0, arguments.within_ms / 1000))
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            while more := os.read(pipe, 10_000):
                told += more
            os.close(pipe)
            finished = int(told.split()[-1])
            left = strays(run)
            while_saving += bool(left)
            try:
                state = newest_training(run)
                found = None if state is None else int(state.values["step"])
            except (ValueError, OSError, Warning) as failure:
                print(f"kill {number + 1}: {failure}")
                continue
            whole = found is not None and found >= finished
            survived += whole
            print(f"kill {number + 1:3}: finished {finished}, found {found}, {len(left)} stray folders")
        process, pipe = start(TrainConfig(**{**config.to_dict(), "steps": finished + 3}))
        _, status = os.waitpid(process, 0)
        swept = status == 0 and not strays(run)
    result = {
        "kills": arguments.kills, "survived": survived, "while_saving": while_saving, "swept": swept,
        "seconds": round(time.monotonic() - started, 1), "torch": torch.__version__,
    }  # fmt: skip
    print(json.dumps(result))
    return 0 if survived == arguments.kills and swept else 1


if __name__ == "__main__":
    raise SystemExit(main())
