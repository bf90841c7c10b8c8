"""What pip installs: a wheel that generates offline, from any directory, with the base packages alone."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling")

ROOT = Path(__file__).parents[1]
# Runs when Python starts: no connection leaves this machine, only the base dependencies are there, and not
# torch's compiler either, whose import takes as long as that of torch.
ALONE = """
import socket, sys

def refuse(*_):
    raise OSError("there is no network here")

socket.socket.connect = socket.getaddrinfo = refuse
for name in ("triton", "transformers", "matplotlib", "fastapi", "zstandard", "torch._dynamo"):
    sys.modules[name] = None
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Folder of programs of a new environment: the wheel is installed, its dependencies are lent."""
    home = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    programs = home / ("Scripts" if os.name == "nt" else "bin")
    python = programs / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}))
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (site / "sitecustomize.py").write_text(ALONE)
    return programs


def run(*command, where):
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "HOME": str(where)}
    return subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True)


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].removesuffix(".dist-info").split("-")[0] for name in names} == {
        "butterfly_llm"
    }
    for needed in ("py.typed", "static/index.html", "weights/small/MANIFEST.json", "commands/generate.py"):
        assert f"butterfly_llm/{needed}" in names


def test_the_wheel_generates_offline_in_a_clean_environment(installed, tmp_path):
    command = ("generate", "--context", "--prompt", "def main(", "--max-chars", "8", "--temperature", "0")
    result = run(installed / "butterfly", *command, where=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout) == 8 and "wrote 8 at" in result.stderr


def test_it_is_the_wheel_that_answers(installed, tmp_path):
    program = "import butterfly_llm as b; print(b.__file__, b.__version__, sep='\\n')"
    file, version = run(installed / "python", "-c", program, where=tmp_path).stdout.splitlines()
    assert Path(file).is_relative_to(installed.parent)
    for program in ([installed / "butterfly"], [installed / "python", "-m", "butterfly_llm"]):
        assert run(*program, "--version", where=tmp_path).stdout == f"butterfly {version}\n"


def test_a_missing_extra_is_a_hint_and_exit_code_2(installed, tmp_path):
    for command, extra in (
        (("plot", "routing", "--out", "x.png"), "plot"),
        (("serve",), "serve"),
    ):
        result = run(installed / "butterfly", *command, where=tmp_path)
        assert (result.returncode, result.stdout) == (2, "")
        assert f"pip install 'butterfly-llm[{extra}]'" in result.stderr and result.stderr.count("\n") == 1
    result = run(installed / "python", "-c", "import butterfly_llm.hf", where=tmp_path)
    assert "pip install 'butterfly-llm[hf]'" in result.stderr.splitlines()[-1]


def test_importing_the_package_imports_nothing_heavy(installed, tmp_path):
    heavy = "{'torch', 'numpy', 'tyro', 'rich', 'transformers'}"
    program = f"import sys, butterfly_llm; print(*{heavy} & {{n for n, m in sys.modules.items() if m}})"
    assert run(installed / "python", "-c", program, where=tmp_path).stdout == "\n"
