"""What continuous integration installs is locked by release and hash, all but torch and its companions.

And docs/robustness.md names tests that there are.
"""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
BY_MACHINE = {"torch", "triton"}  # the build that fits is chosen by pip
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def needed_by(names: list[str]) -> list[Requirement]:
    """What these requirements name, other extras of this project taken apart."""
    found = []
    for each in map(Requirement, names):
        own = each.name == PROJECT["name"]
        found += needed_by([n for extra in each.extras for n in EXTRAS[extra]]) if own else [each]
    return found


NEEDED = needed_by([*PROJECT["dependencies"], *EXTRAS["test"]])


def locked() -> dict[str, list[tuple[str, int]]]:
    """Releases by package name, each with how many hashes it has."""
    path = ROOT / ".ci" / "requirements.txt"
    if not path.exists():
        pytest.skip("not in a source tree")
    found: dict[str, list[tuple[str, int]]] = {}
    for block in re.split(r"\n(?=\w)", path.read_text())[1:]:
        name, release = re.match(r"([\w.-]+)==([\w.+-]+)", block).groups()
        found.setdefault(name, []).append((release, block.count("--hash=sha256:")))
    return found


@pytest.mark.parametrize(
    "needed", [each for each in NEEDED if each.name not in BY_MACHINE], ids=lambda r: r.name
)
def test_every_dependency_of_the_tests_is_locked_with_hashes(needed):
    releases = locked().get(needed.name)
    assert releases, f"{needed.name} is not locked: run .ci/lock"
    for release, hashes in releases:
        assert hashes > 0 and needed.specifier.contains(release), f"{needed.name} {release}: run .ci/lock"


def test_continuous_integration_installs_what_is_locked():
    script = ROOT / ".ci" / "run"
    if not script.exists():
        pytest.skip("not in a source tree")
    lines = script.read_text().splitlines()
    install = next(i for i, line in enumerate(lines) if "--require-hashes" in line)
    assert "-r .ci/requirements.txt" in lines[install]
    assert install < next(i for i, line in enumerate(lines) if line.startswith("command="))
    assert not BY_MACHINE & locked().keys()


def test_the_page_of_what_holds_names_tests_that_there_are():
    page = (ROOT / "docs" / "robustness.md").read_text()
    table = page.partition("## Measured")[0]
    assert re.findall(r"^\| (\d+) \|", table, re.M) == [str(row) for row in range(1, 17)]
    file, named = "", 0
    for mention in re.findall(r"(test_\w+\.py)?::(test_\w+)", page):
        file, test = mention[0] or file, mention[1]
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{file}::{test}"
        named += 1
    assert named > 40


def test_an_audit_without_its_database_fails_or_says_so():
    script = ROOT / ".ci" / "audit"
    if not script.exists():
        pytest.skip("not in a source tree")
    nowhere = {**os.environ, "BUTTERFLY_ADVISORIES": "http://127.0.0.1:9/pypi"}
    for flags, code in ([], 1), (["--where-reachable"], 0):
        done = subprocess.run([script, *flags], env=nowhere, capture_output=True, text=True, timeout=60)
        assert done.returncode == code and "NOT audited" in done.stderr
