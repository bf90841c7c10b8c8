"""Measures of continuations by hand, and benchmarks/continuations.py: where it cuts, what it writes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from butterfly_llm import continuations
from butterfly_llm.checkpoint import save_model
from butterfly_llm.config import ButterflyConfig, SamplingConfig
from butterfly_llm.continuations import (
    measure,
    names,
    paired_brackets,
    parses,
    statements,
    unfinished,
    whole_lines,
)
from butterfly_llm.data import prepare
from butterfly_llm.generate import generate
from butterfly_llm.slots import Separate, Slots
from conftest import benchmark, random_model

OWN = Path(continuations.__file__).read_text(encoding="utf-8")
DOCSTRING = 'def f():\n    """Says\n'


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("", "x = 1\n\n# comment\nif x:\n    return x\n", (3, 3)),
        ("", "x = = 1\n# comment\ny = 2\n", (1, 2)),
        ("", "x = 'no end\ny = 2\n", (1, 2)),
        (DOCSTRING, 'what it does.\n    """\n    return 1\n', (3, 3)),
        (DOCSTRING, 'what it does.\n    """\n    return or\n', (2, 3)),
        (DOCSTRING + '    """\n', 'what it does.\n    """\n    return 1\n', (0, 1)),  # the rest is a string
        ("x = [\n", "    1,\n]\ny = 2\n", (3, 3)),
        ("x = [\n", "def f():\n    return 1\n", (1, 2)),
        ("", "x = f(a,\n    b\ny = 1\nz = 2\n", (1, 4)),  # where it shows that ( was not closed
        ("", "x = 1\ny = f(\n    a,\n", (1, 1)),  # cut off
        ("", "x = 1 + \\\n", (0, 0)),
        ("x = 1 + \\\n", "    2\n", (1, 1)),
        ("", "x = " + 50_000 * "not " + "x\ny = 1\n", (1, 2)),  # more than the parser can take
    ],
)
def test_lines_in_statements_that_parse(file: str, text: str, expected: tuple[int, int]) -> None:
    found = list(statements(unfinished(file), text))
    counts = [sum(line.strip()[:1] not in ("", "#") for line in part.splitlines()) for part, _ in found]
    good = sum(count for count, (_, parse) in zip(counts, found, strict=True) if parse)
    assert (good, sum(counts)) == expected
    shares = measure(file, "", text)
    assert shares.get("lines") == (expected[0] / expected[1] if expected[1] else None)


@pytest.mark.filterwarnings("error")
def test_what_python_warns_of_parses() -> None:
    assert parses("x = '\\d'\n") is True


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("", ""),
        ("f(a)\nx = [\n", "x = [\n"),
        ("f(')')\n", ""),
        ("f(a))\nx = [\n    1,\n", "x = [\n    1,\n"),
        (DOCSTRING + "# (\n", '    """Says\n# (\n'),
        ("x = 'it\\'s' + \\\n", "x = 'it\\'s' + \\\n"),
    ],
)
def test_the_statement_that_is_not_finished(file: str, expected: str) -> None:
    assert unfinished(file) == expected


@pytest.mark.parametrize(
    "header",
    [
        "class A(B):", "async def f(", "@property", "with a as b:  # why", "for x in y:", "while True: pass",
        "if x:", "elif x:", "else:", "else: pass", "try:", "try: f()", "except A as b:", "except:",
        "finally:", "match x:", "case A(b):", "case = 1", "match(x)", "return", "yield x", "await x", "break",
    ],
)  # fmt: skip
def test_headers_are_statements(header: str) -> None:
    lines = header + "\n" + ("    a,\n):\n" if header.endswith("(") else "")
    assert list(statements("", "    " + lines)) == [("    " + lines, True)]
    if header[-1] == ":":
        assert list(statements("", header[:-1] + " !\n")) == [(header[:-1] + " !\n", False)]


@pytest.mark.parametrize(
    ("file", "text", "whole"),
    [
        ("def f():\n", "    x = 1\n    y = (\n", 1.0),
        ("def f():\n", "x = 1\n", 0.0),  # parses by itself, not here
        ("def f():\n    x = 1\n", "      y = 2\n", 0.0),
        ("try:\n", "    x = 1\n", 1.0),
        ("", "x = = 1\n", 0.0),
        (DOCSTRING, "anything at all\n", 1.0),
    ],
)
def test_whole_judges_indentation(file: str, text: str, whole: float) -> None:
    assert measure(file, "", text)["whole"] == whole


@pytest.mark.parametrize(
    ("before", "text", "expected"),
    [
        ("", "f(a[0], {1: 2})\n", (6, 6)),
        ("", "f(']', \"(\", '''\n{''')  # (\n", (2, 2)),
        ("", "f(a]\n", (0, 2)),
        ("", "f([a)\n", (2, 3)),
        ("", "f([a)]\n", (2, 4)),
        ("", "x = 'no (end\nf(a)\n", (2, 2)),
        ("f(\n", "a)\n", (1, 1)),
        ("'''(\n", "'''\n)\n", (0, 1)),
        ("", r"f('\')', '\\')" + "\n", (2, 2)),
    ],
)
def test_brackets_have_partners(before: str, text: str, expected: tuple[int, int]) -> None:
    assert paired_brackets(before, text) == expected


def test_names_are_identifiers_outside_strings() -> None:
    text = "for value in range(0x1fff): self.total += rb'spam' + ab  # eggs\n"
    assert names("", text) == {"value", "self", "total"}
    assert names("'''", "spam'''\nother\n") == {"other"}
    assert names("value = (\n", "    other)\n") == {"other"}
    shares = measure("", "self.totals  # a value", text)
    assert shares["names"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nb", "a\n"),
        ("a", ""),
        ("a\n==> b.py <==\nc\n", "a\n"),
        ("==> b.py <==\n", ""),
        ("a\nb\0\n==> c.py <==\n", "a\nb"),
    ],
)
def test_a_continuation_ends_with_its_file(text: str, expected: str) -> None:
    assert whole_lines(text) == expected


def test_nothing_to_measure_is_left_out() -> None:
    assert measure("", "", "no whole line") == {}
    assert measure(DOCSTRING, "", "prose (\n") == {"whole": 1.0}


def test_real_text_is_flawless_wherever_it_is_cut() -> None:
    lines = OWN.splitlines(keepends=True)
    for cut in range(len(lines)):
        shares = measure("".join(lines[:cut]), OWN, "".join(lines[cut : cut + 12]))
        assert {*shares.values()} == {1.0}, cut


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return benchmark("continuations")


def project(folder: Path, name: str, lines: int = 60) -> Path:
    """Files of numbered assignments: one of Python, before it one of settings and one of Python 2."""
    (folder / name).mkdir()
    text = "".join(f"{name}_{i} = {name}_sum({i}, [{i}])\n" for i in range(lines))
    (folder / name / "a.py").write_text(text)
    (folder / name / "a.cfg").write_text("[settings]\n" + text)
    (folder / name / "_old.py").write_text(text + "print 'x'\n")
    return folder / name


def test_places_lie_in_python_files_that_parse(script: ModuleType, tmp_path: Path) -> None:
    documents = script.load_documents([project(tmp_path, "one"), project(tmp_path, "two")])
    places = script.pick_places(documents, 10, 1500, 100, 3)
    assert [Path(place.project).name for place in places] == ["one", "two"] * 5
    old, text = ((tmp_path / "one" / file).read_text() for file in ("_old.py", "a.py"))
    for place in places[::2]:
        assert place.file == "a.py" and place.line > script.FIRST_LINES
        assert place.before == "".join(text.splitlines(keepends=True)[: place.line - 1])
        assert text.startswith(place.before + place.real) and len(place.real) == 100
        read = "==> _old.py <==\n" + old + "==> a.py <==\n" + place.before
        assert read.endswith(place.context) and len(place.context) == 1500
    assert len({place.line for place in places[::2]}) == 5
    assert script.pick_places(documents, 10, 1500, 100, 3) == places
    assert script.other_text(places, 9) == places[0].real
    assert script.other_text(places[:1], 0) is None
    with pytest.raises(ValueError, match="no Python file to continue after 9,000 characters"):
        script.pick_places(documents, 10, 9000, 100, 3)


def test_a_summary_is_over_places_that_have_something(script: ModuleType) -> None:
    place = script.Place("project", "a.py", 21, "", "total", "")
    row = script.summary([place] * 4, ["total = 1\n", "total = = other\n", "f(\n", "x = 1\n"])
    assert row["lines"] == {"mean": 0.6667, "se": 0.3333, "n": 3, "values": [1.0, 0.0, None, 1.0]}
    assert row["whole"]["mean"] == 0.75 and row["brackets"]["n"] == 0 and row["brackets"]["mean"] is None
    assert row["names"]["values"] == [1.0, 0.5, None, None] and row["chars"] == 35
    cells = "0.667 ± 0.333 (3)", "0.750 ± 0.250 (4)", "-", "0.750 ± 0.250 (2)"
    assert script.table_line("a" * 40, row) == "a" * 28 + "".join(cell.rjust(22) for cell in cells)
    one = script.table_line("one", script.summary([place], ["total = 1\n"]))
    assert one.split()[1:] == ["1.000", "(1)", "1.000", "(1)", "-", "1.000", "(1)"]


@pytest.mark.parametrize("kind", ["separate", "slots"])
def test_a_batch_writes_what_each_would_alone(script: ModuleType, kind: str) -> None:
    model = random_model(ButterflyConfig.preset("micro")).eval()
    samplings = [SamplingConfig(seed=seed, temperature=0.5) for seed in (5, 6, 7)]
    contexts = [OWN[start : start + 150] for start in (0, 200, 400)]
    stepper = Separate(model) if kind == "separate" else Slots(model, 4)
    counted: list[int] = []
    for _ in range(2):  # the rings are used again
        texts = script.write(stepper, contexts, samplings, 40, counted.append)
        for context, sampling, text in zip(contexts, samplings, texts, strict=True):
            alone = generate(model, context.encode(), sampling=sampling, max_chars=40)
            assert bytes(alone).decode("latin-1") == text
    assert sum(counted) == 2 * 3 * (150 + 40)


def test_a_run_ends_in_a_row_for_each(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    minutes = itertools.count()
    monkeypatch.setattr(script, "time", SimpleNamespace(perf_counter=lambda: 60.0 * next(minutes)))
    prepare([project(tmp_path, name) for name in "abc"], tmp_path / "corpus", holdout=["a", "b"])
    models = []
    for seed in (0, 1):
        save_model(random_model(ButterflyConfig.preset("micro"), seed), tmp_path / f"model{seed}")
        models.append(str(tmp_path / f"model{seed}"))
    files = [tmp_path / "out.json", tmp_path / "texts.json"]
    options = ["--places", "5", "--context", "300", "--chars", "60", "--batch", "2", "--json"]
    script.main([*models, str(tmp_path / "corpus"), *options, str(files[0]), "--texts", str(files[1])])
    printed = capsys.readouterr()
    result, texts = (json.loads(file.read_text()) for file in files)
    assert json.loads(printed.out.splitlines()[-1]) == result
    assert [place[:2] for place in result["places"]] == [[name, "a.py"] for name in "ababa"]
    assert list(result["rows"]) == list(texts) == ["real text", "another project", *models]
    for measured in continuations.MEASURES[:3]:
        assert result["rows"]["real text"][measured]["mean"] == 1.0
    assert result["rows"]["real text"]["whole"]["n"] == 5
    known = [result["rows"][label]["names"]["mean"] for label in ("real text", "another project")]
    assert known[0] > 0.2 and known[1] == 0.0
    assert [len(text) for text in texts[models[0]]] == [60] * 5 and texts[models[0]] != texts[models[1]]
    progress = [line for line in printed.err.splitlines() if line.startswith(models[0])]
    assert progress == [
        f"{models[0]}: {done} of 5 places, {rate} characters/s read and written, {left} min left"
        for done, rate, left in ((2, 12, 1.5), (4, 12, 0.5), (5, 10, 0.0))
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["MODEL"], "the following arguments are required: CORPUS_OR_DIR"),
        (["MODEL", "DIR", "--places", "0"], "--places must be at least 1, not 0"),
        (["MODEL", "DIR", "--temperature", "-1"], "temperature must be 0 or above"),
        (["MODEL", "nowhere"], "nowhere"),
        (["MODEL", "DIR", "--context", "100000"], "no Python file to continue"),
        (["DIR", "DIR", "--context", "100"], "DIR"),
    ],
)
def test_bad_input_is_one_line(
    script: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    project(tmp_path, "DIR")
    paths = [str(tmp_path / word) if word in ("DIR", "MODEL") else word for word in arguments]
    with pytest.raises(SystemExit) as stop:
        script.main(paths)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == ""
    assert said in printed.err and printed.err.count("\n") == 1
