"""Readers of foreign input under fuzzing, a short run each; records/fuzz has the long one.

Row 16 of docs/robustness.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from butterfly_llm.config import SamplingConfig

ROOT = Path(__file__).parents[1]


def test_readers_refuse_in_one_line_or_read() -> None:
    """Other inputs each time; the seed is in the output of a failure."""
    seed = int.from_bytes(os.urandom(4))
    command = [sys.executable, str(ROOT / "benchmarks" / "fuzz.py"), "--inputs", "6000", "--seed", str(seed)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["crashes"] == 0 and result["inputs"] >= 5_990
    for name, reader in result["readers"].items():
        if name not in ("request body", "headers"):
            assert 0 < reader["refused"] < reader["inputs"], name  # it sees bad input, and good input too


@pytest.mark.parametrize("field", ["temperature", "top_p", "repetition_penalty", "top_k", "seed"])
@pytest.mark.parametrize("value", ["1", [1], None, True])
def test_sampling_takes_numbers_alone(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"sampling: {field} must be a"):
        SamplingConfig(**{field: value})  # type: ignore[arg-type]
