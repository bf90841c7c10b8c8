"""The layers of the code (design, section 6): who may import whom, and how long a file may be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "butterfly_llm"
MAX_LINES = 600
# A module imports strictly lower ranks only; a folder is one room, whose modules may import each other.
RANKS = {
    "config": 0, "text": 0, "memory": 0, "archives": 0, "licenses": 0, "signals": 0, "terminal": 0,
    "guard": 0, "protocol": 0, "metrics": 0, "folder": 0, "tracking": 0,
    "near_duplicates": 0, "match": 0, "parallel": 0, "continuations": 0,
    "routing": 1, "corpus": 1, "curriculum": 1, "ngrams": 1, "rings": 1, "modules": 1, "offload": 1,
    "data": 2, "ops": 2, "cache": 2, "recompute": 2, "carry": 2,
    "layers": 3,
    "model": 4, "twins": 5,
    "checkpoint": 5, "state": 5, "fused_step": 5, "persistent_step": 5, "extend": 5, "generate": 5,
    "evaluate": 5, "recall": 5, "optim": 5, "reporting": 5, "captured": 5,
    "train": 6, "decode": 6, "repeats": 6, "tasks": 6, "plot": 6, "hf": 6,
    "slots": 7, "engine": 8,
    "answers": 9, "shelf": 9, "bench": 9,
    "serve": 10,
    "commands": 11,
    "cli": 12,
    "__main__": 13,
}  # fmt: skip
OPTIONAL = (
    "matplotlib",
    "zstandard",
    "datasketch",
    "triton",
    "transformers",
    "fastapi",
    "uvicorn",
    "hypothesis",
    "pytest",
    "PIL",
    "fla",
)
# Written in terms of an optional package: imported by those who have it.
EXTRAS = (
    "ops/triton_kernels.py",
    "ops/triton_step_kernel.py",
    "ops/triton_rows_kernels.py",
    "ops/triton_carry_kernels.py",
    "ops/triton_feed_forward_kernels.py",
    "ops/triton_persistent_kernel.py",
    "ops/triton_ngrams_kernel.py",
    "ops/triton_words.py",
    "bench/traffic_kernel.py",
    "hf.py",
    "serve.py",
    "guard.py",
    "protocol.py",
)
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    """Module name below the package; everything in a folder is that folder's room."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(source: str, path: Path) -> Iterator[tuple[int, str]]:
    """(line, room) of every import of this package, lazy ones too; room '' is the package itself."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ["butterfly_llm", *path.relative_to(PACKAGE).parts]
            start = above[: len(above) - node.level] if node.level else []
            module = start + (node.module.split(".") if node.module else [])
            names = [[*module, alias.name] for alias in node.names]
        else:
            continue
        for parts in names:
            if parts[0] == "butterfly_llm":
                room = parts[1] if len(parts) > 1 else ""
                yield node.lineno, room if room in RANKS else ""


def violations(source: str, path: Path) -> list[str]:
    room, found = room_of(path), []
    for line, other in imported_rooms(source, path):
        if room == "__init__":
            continue  # the front door hands out names from all rooms
        if other == "":
            # `butterfly_llm` itself reaches every room: for those who sit above all of them.
            allowed = RANKS[room] >= RANKS["commands"]
        else:
            allowed = RANKS[other] < RANKS[room] or (room == other and path.parent != PACKAGE)
        if not allowed:
            found.append(f"{path.relative_to(PACKAGE)}:{line}: {room} imports {other or 'the package'}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_lower_ranks(path):
    room = room_of(path)
    assert room == "__init__" or room in RANKS, f"{room} has no rank: give it one"
    assert violations(path.read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize(
    ("source", "where"),
    [
        ("from butterfly_llm.train import train", "model.py"),
        ("import butterfly_llm.model", "model.py"),
        ("from butterfly_llm import cli", "train.py"),
        ("from butterfly_llm import load_pretrained", "train.py"),
        ("from . import model", "ops/portable.py"),
        ("from .. import model", "ops/portable.py"),
        ("from ..model import Butterfly", "ops/portable.py"),
        ("from .model import Butterfly", "cache.py"),
        ("from butterfly_llm import load_pretrained", "bench/stream.py"),
        ("def f():\n    from butterfly_llm.cache import Cache", "routing.py"),
    ],
)
def test_the_rule_sees_a_violation(source, where):
    # `from . import model` in ops/ means ops.model: allowed there, and nowhere else.
    expected = 0 if source == "from . import model" else 1
    assert len(violations(source, PACKAGE / where)) == expected


@pytest.mark.parametrize(
    ("source", "where"),
    [
        ("from butterfly_llm.ops.portable import x", "model.py"),
        ("from .portable import x", "ops/reference.py"),
        ("from butterfly_llm import memory", "cache.py"),
        ("from butterfly_llm import __version__", "cli.py"),
        ("import torch", "config.py"),
    ],
)
def test_the_rule_lets_the_rest_pass(source, where):
    assert violations(source, PACKAGE / where) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_is_too_long(path):
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_LINES, f"{path.name} has {lines} lines: split it"


def test_every_module_imports_without_optional_packages_and_on_windows():
    modules = [
        ".".join(("butterfly_llm", *path.relative_to(PACKAGE).with_suffix("").parts))
        for path in FILES
        if path.name not in ("__init__.py", "__main__.py") and str(path.relative_to(PACKAGE)) not in EXTRAS
    ]
    program = (
        "import importlib, os, signal, sys\n"
        f"for name in {OPTIONAL}: sys.modules[name] = None\n"
        "import torch, numpy, rich.progress, safetensors.torch, tyro\n"
        # what Windows lacks
        "for name in ('fcntl', 'pwd', 'resource', 'termios'): sys.modules[name] = None\n"
        "for name in ('fork', 'geteuid', 'pread', 'sysconf'): delattr(os, name)\n"
        "for name in ('SIGALRM', 'SIGHUP', 'alarm'): delattr(signal, name)\n"
        f"for name in {modules}: importlib.import_module(name)\n"
    )
    environment = {"PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1", "PATH": ""}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_light_modules_do_not_import_torch():
    commands = [path.stem for path in PACKAGE.glob("commands/*.py") if path.stem != "__init__"]
    program = (
        "import importlib, sys\n"
        "import butterfly_llm, butterfly_llm.config, butterfly_llm.text, butterfly_llm.routing\n"
        "import butterfly_llm.data, butterfly_llm.cli, butterfly_llm.plot, butterfly_llm.bench\n"
        f"for name in {commands}: importlib.import_module('butterfly_llm.commands.' + name)\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules\n"
    )
    environment = {"PYTHONPATH": str(PACKAGE.parent), "PATH": ""}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
