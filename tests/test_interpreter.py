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
    ("test_triton_attention",),
    ("test_persistent_step",),
    ("test_fused_step",),
    ("test_triton_step", "test_prefill", "test_feed_forward"),
    ("test_triton_carry", "test_ngrams"),
)


def run(names: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    files = [str(Path(__file__).with_name(f"{name}.py")) for name in names]
    command = [sys.executable, "-m", "pytest", *files, "-m", "not gpu", "-p", "no:cacheprovider"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {
        "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)
    }  # fmt: skip
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.skipif(INTERPRETED or CUDA, reason="runs natively, or is the run itself")
@pytest.mark.parametrize("names", FILES, ids="-".join)
def test_under_the_interpreter(names: tuple[str, ...]) -> None:
    found = run(names)
    summary = found.stdout[-4000:] + found.stderr[-2000:]
    assert found.returncode == 0, summary
    assert re.search(r"\d+ passed", found.stdout) and "skipped" not in found.stdout, summary
