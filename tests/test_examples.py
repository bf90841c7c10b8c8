"""The scripts in examples/ run, on a model and texts that are small."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from butterfly_llm.checkpoint import save_model
from butterfly_llm.config import ButterflyConfig
from conftest import random_model

ROOT = Path(__file__).parents[1]


def run(name, *arguments):
    result = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py", *map(str, arguments)],
        env=os.environ
        | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("examples") / "model"
    save_model(random_model(ButterflyConfig.preset("micro")), path)
    return path


@pytest.fixture
def folder(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        lines = (f"def {name}_{i}(x):\n    return x + {i}\n" for i in range(60))
        (tmp_path / name / "code.py").write_text("\n".join(lines))
    return tmp_path


def test_complete_codebase(folder, model):
    result = run("complete_codebase", folder, model)
    assert all(f"--- {beginning}" in result.stdout for beginning in ("def main(", "import ", "class Test"))
    read = sum((folder / name / "code.py").stat().st_size for name in ("one", "two"))
    assert int(result.stderr.split()[1].replace(",", "")) >= read


def test_train_on_your_text(folder):
    result = run("train_on_your_text", folder, 3)
    assert "bits a character on text it has not seen" in result.stderr
    assert 1 < len(result.stdout) <= 201


def test_score_document(folder, model):
    text = folder / "one" / "code.py"
    first, *lines = run("score_document", text, model).stdout.splitlines()
    assert f"{text.stat().st_size:,} as they are" in first and len(lines) == 5
    known = text.read_text().splitlines()
    for line in lines:
        number, _, shown = line.partition("line ")[2].partition(": ")
        assert known[int(number) - 1] == shown
    rates = [float(line.split()[0]) for line in lines]
    assert rates == sorted(rates, reverse=True)
