"""The tests of the kernels once more in a process of their own, under Triton's interpreter on the CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import CUDA, INTERPRETED

pytest.importorskip("triton")

FILES = (
    ("test_triton_attention", "test_triton_step", "test_prefill", "test_feed_forward"),
    ("test_triton_carry", "test_ngrams"),
    ("test_fused_step",),
    ("test_persistent_step",),
)


@pytest.mark.skipif(INTERPRETED or CUDA, reason="runs natively, or is the run itself")
@pytest.mark.parametrize("names", FILES, ids="-".join)
def test_under_the_interpreter(names: tuple[str, ...]) -> None:
    files = [str(Path(__file__).with_name(f"{name}.py")) for name in names]
    command = [sys.executable, "-m", "pytest", *files, "-m", "not gpu", "-p", "no:cacheprovider"]
    environment = {
        **os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)
    }  # fmt: skip
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    summary = run.stdout[-4000:] + run.stderr[-2000:]
    assert run.returncode == 0, summary
    assert re.search(r"\d+ passed", run.stdout) and "skipped" not in run.stdout, summary
