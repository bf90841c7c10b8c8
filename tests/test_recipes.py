"""Recipes of training text: what extends what, names met once, permissive licences, a language held out."""

import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

RECIPES = Path(__file__).parent.parent / "recipes"
BUILD = runpy.run_path(str(RECIPES / "build.py"))
read_recipe, name_of, fetch = BUILD["read_recipe"], BUILD["name_of"], BUILD["fetch"]


def test_a_project_of_the_same_name_replaces_the_inherited_one(tmp_path):
    base = 'include = ["*.py"]\n[[project]]\npackage = "a"\nsplit = "val"\n[[project]]\npackage = "b"\n'
    (tmp_path / "base.toml").write_text(base)
    more = '[[project]]\npackage = "a"\n[[project]]\npackage = "c"\n'
    (tmp_path / "more.toml").write_text('extends = "base.toml"\nnear_duplicates = 0.8\n' + more)
    recipe = read_recipe(tmp_path / "more.toml")
    assert recipe["project"] == [{"package": "a"}, {"package": "b"}, {"package": "c"}]
    assert (recipe["include"], recipe["near_duplicates"]) == (["*.py"], 0.8)


@pytest.mark.parametrize("name", ["first_weights.toml", "corpus.toml"])
def test_names_are_met_once_and_licences_are_permissive(name):
    entries = tomllib.loads((RECIPES / name).read_text())["project"]
    names = [name_of(entry) for entry in entries]
    assert len(set(names)) == len(names)
    assert {entry["kind"] for entry in entries} <= {"wheel", "sdist", "npm", "deb"}
    licences = " ".join(entry.get("license", "") for entry in entries)
    assert not any(word in licences for word in ("GPL", "MPL", "EPL", "-SA"))


def test_erlang_is_held_out_altogether():
    recipe = read_recipe(RECIPES / "corpus.toml")
    patterns = {
        name_of(entry): entry.get("include", recipe["include"])
        for entry in recipe["project"]
        if entry.get("split") != "val"
    }
    assert not {name for name, globs in patterns.items() for glob in globs if glob.endswith(("erl", "hrl"))}
    assert not {name for name, globs in patterns.items() if "*" in globs}
    assert any(entry["package"] == "erlang-src" for entry in recipe["project"])


def test_a_download_already_there_is_taken(tmp_path):
    kept = tmp_path / "npm" / "scope-name-1.0.0.tgz"
    kept.parent.mkdir()
    kept.touch()
    assert fetch("npm", "@scope/name", "1.0.0", tmp_path) == kept


def test_a_version_that_is_gone_is_one_line(tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "one.toml"
    recipe.write_text(
        'include = ["*.py"]\n[[project]]\npackage = "some"\nkind = "deb"\nversion = "1.0"\nlicense = "MIT"\n'
    )
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 100))
    arguments = [str(recipe), "--downloads", str(tmp_path / "kept"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["build.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        BUILD["main"]()
    said = capsys.readouterr().err.splitlines()[-1]
    assert "some 1.0: apt-get download some=1.0 ended with 100" in said and "put one that there is" in said
    assert "`apt-get update` finds newer ones" in said
    assert not (tmp_path / "out").exists()
