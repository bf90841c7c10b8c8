"""What README tells a newcomer to type works: its Python runs, its commands run, on shortened contexts."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands() -> list[list[str]]:
    """Every `butterfly` command in the shell blocks, without the installation before it and the comments."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    found = [line.split(".venv/bin/butterfly", 1)[1] for line in lines if ".venv/bin/butterfly" in line]
    return [shlex.split(rest, comments=True) for rest in found]


def test_the_python_of_readme_runs() -> None:
    (snippet,) = blocks("python")
    names: dict[str, object] = {}
    exec(snippet, names)
    assert tuple(names["logits"].shape) == (1, 256)  # type: ignore[attr-defined]


def test_readme_installs_before_it_generates_and_tests() -> None:
    install, *_ = blocks("bash")
    assert install.startswith("python3 -m venv .venv && .venv/bin/pip install -q . && ")
    assert ["generate"] in commands()


def test_the_file_map_names_every_module_and_folder() -> None:
    (tree,) = re.findall(r"```\n(src/butterfly_llm/\n.*?)```", README, re.S)
    package = ROOT / "src" / "butterfly_llm"
    modules = {path.stem for path in package.iterdir() if path.suffix == ".py" and path.stem[0] != "_"}
    folders = {path.parent.name for root in (ROOT, package) for path in root.glob("[a-z]*/*.*")}
    named = set(re.findall(r"\w+", tree))
    assert not (modules | folders - {"build", "dist", "site", "runs", "corpus"}) - named


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_the_commands_of_readme_run(arguments: list[str], tmp_path: Path) -> None:
    for name in ("src", "notes.txt"):  # what the example calls your own text
        target = tmp_path / name
        if name == "src":
            target.mkdir()
            target = target / "a.py"
        target.write_text("def f(x):\n    return x + 1\n")
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    shorter = {"generate": ["--context-chars", "600", "--max-chars", "8"], "eval": ["--max-chars", "300"]}
    result = subprocess.run(
        [sys.executable, "-m", "butterfly_llm", *arguments, *shorter.get(arguments[0], [])],
        capture_output=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout.strip()
