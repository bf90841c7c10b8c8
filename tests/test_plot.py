"""Figures: written whole, of the kind asked for, refused in one line."""

import json
import sys
import xml.etree.ElementTree as ElementTree

import pytest

pytest.importorskip("matplotlib")

from butterfly_llm.plot import _read_metrics, _smooth, plot_loss, plot_routing


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [{"kind": "train", "chars": 100 * i, "bits_per_char": 8.0 - i} for i in range(1, 5)]
    records.insert(2, {"kind": "val", "chars": 7, "trained_chars": 200, "bits_per_char": 6.5})
    records.append({"kind": "sample", "text": "x"})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_routing_figure_as_png_and_svg(tmp_path):
    plot_routing(tmp_path / "new" / "routing.png")
    assert (tmp_path / "new" / "routing.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "new" / "routing.png").stat().st_size < 100_000
    plot_routing(tmp_path / "routing.svg")
    assert ElementTree.parse(tmp_path / "routing.svg").getroot().tag.endswith("svg")
    assert sorted(p.name for p in tmp_path.rglob("*.*")) == ["routing.png", "routing.svg"]


def test_same_figure_twice_is_the_same_file(tmp_path, metrics):
    for name in ("a.svg", "b.svg"):
        plot_loss(metrics, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_loss_uses_characters_trained_on_for_both_curves(metrics):
    train, validation = _read_metrics(metrics)
    assert train == [(100, 7.0), (200, 6.0), (300, 5.0), (400, 4.0)]
    assert validation == [(200, 6.5)]


def test_loss_with_one_kind_of_line_only(tmp_path, metrics):
    lines = metrics.read_text().splitlines(keepends=True)
    for kind in ("train", "val"):
        metrics.write_text("".join(line for line in lines if f'"{kind}"' in line))
        plot_loss(metrics, tmp_path / f"{kind}.png")
        assert (tmp_path / f"{kind}.png").stat().st_size > 1000


def test_smoothing_keeps_length_and_lines():
    line = [float(i) for i in range(400)]
    assert _smooth(line)[4:-4] == pytest.approx(line[4:-4])
    assert _smooth([3.0]) == [3.0]


def test_a_figure_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    target = tmp_path / "routing.png"
    target.write_text("before")

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="No space"):
        plot_routing(target)
    assert [p.name for p in tmp_path.iterdir()] == ["routing.png"] and target.read_text() == "before"


@pytest.mark.parametrize("name", ["figure", "figure.pdf", "figure.jpg"])
def test_other_endings_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"must end in \.png or \.svg"):
        plot_routing(tmp_path / name)


@pytest.mark.parametrize("text", ["", '{"kind": "sample"}\n', "no json\n", "[1]\n", '{"kind": "train"}\n'])
def test_metrics_that_are_none_are_refused(tmp_path, text):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.jsonl: ") as caught:
        plot_loss(path, tmp_path / "x.png")
    assert "\n" not in str(caught.value)


def test_without_matplotlib_there_is_a_hint(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'butterfly-llm\[plot\]'"):
        plot_routing(tmp_path / "x.png")
