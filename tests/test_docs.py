"""The documentation: its site builds without a warning, its commands are commands, its Python runs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from butterfly_llm.cli import _parse

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def commands():
    """(page, arguments) of every butterfly command in a shell block."""
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                for part in re.split(r"&&|[|;>]", line):
                    words = shlex.split(part, comments=True)
                    if "butterfly" in words:
                        yield page.name, words[words.index("butterfly") + 1 :]


@pytest.mark.parametrize(
    ("page", "arguments"), [pytest.param(*each, id=" ".join(each[1])) for each in commands()]
)
def test_the_commands_of_the_docs_are_read(page, arguments, monkeypatch):
    monkeypatch.chdir(ROOT)  # where the run files lie
    _parse([word for word in arguments if word != "..."])


def test_the_python_of_the_quickstart_runs(capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "quickstart.md").read_text(), re.S)
    names = {}
    exec(snippet, names)
    assert tuple(names["logits"].shape) == (1, 16, 256) and capsys.readouterr().out


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    assert {page.name for page in PAGES} == set(re.findall(r": (\w+\.md)$", menu, re.M))


def _anchor(heading):
    """The name of a heading in a link."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", plain.lower()).strip().replace(" ", "-")


def test_every_link_inside_the_repository_leads_somewhere():
    texts = [ROOT / "README.md", *PAGES, *ROOT.glob("records/*/README.md")]
    dead = []
    for text in texts:
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", text.read_text(encoding="utf-8"), flags=re.S)
        for link in re.findall(r"\]\(([^)\s]+)\)", prose):
            if "://" in link:
                continue
            path, _, anchor = link.partition("#")
            target = (text.parent / path).resolve() if path else text
            there = target.read_text(encoding="utf-8") if anchor and target.exists() else ""
            headings = map(_anchor, re.findall(r"^#+ (.*)$", there, re.M))
            if not target.exists() or (anchor and anchor not in headings):
                dead.append(f"{text.relative_to(ROOT)}: {link}")
    assert not dead, dead


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "load_pretrained" in (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    records = {path.parent.name for path in ROOT.glob("records/*/README.md")}
    results = (tmp_path / "site" / "results" / "index.html").read_text(encoding="utf-8")
    assert all(f'href="../records/{name}/"' in results for name in records)
