"""Figures: written whole, of the kind asked for, refused in one line."""

import contextlib
import dataclasses
import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")

from butterfly_llm.config import ButterflyConfig
from butterfly_llm.ops.reference import butterfly_attention_reference
from butterfly_llm.plot.attention import attention_map, plot_attention
from butterfly_llm.plot.kernels import plot_kernels
from butterfly_llm.plot.peers import plot_peers, plot_twins
from butterfly_llm.plot.recall import plot_recall
from butterfly_llm.plot.results import (
    _read_metrics,
    plot_context,
    plot_loss,
    plot_scaling,
    smooth,
)
from butterfly_llm.plot.routing import plot_reach, plot_routing
from conftest import random_model


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
    assert smooth(line)[4:-4] == pytest.approx(line[4:-4])
    assert smooth([3.0]) == [3.0]


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


@pytest.fixture
def labels(monkeypatch):
    """The texts of every figure that is written."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    seen = []
    save = Figure.savefig

    def note(figure, *arguments, **options):
        seen.extend(text.get_text() for text in figure.findobj(Text))
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", note)
    return seen


def test_reach_figure_says_what_each_routing_connects(tmp_path, labels):
    plot_reach(tmp_path / "reach.svg")
    assert {"100%", "20%", "15%", "pass 5"} <= set(labels)


def evaluation(rate, **others):
    buckets = [{"start": 0, "stop": 128, "bits_per_char": 2 * rate}]
    buckets.append({"start": 128, "stop": 1024, "bits_per_char": rate})
    return {"bits_per_char": 1.125 * rate, "buckets": buckets, **others}


def test_context_figure_shows_the_rates_of_every_bucket(tmp_path, labels):
    file = tmp_path / "one.json"
    file.write_text(json.dumps(evaluation(1.5, xz=1.75, zstd=None)))
    plot_context([file], tmp_path / "context.png")
    assert {"3.00", "1.50", "xz \u22129e  1.75", "128", "1k"} <= set(labels)
    assert not any("zstd" in label for label in labels)


def test_context_figure_names_its_curves(tmp_path, labels):
    one, several = tmp_path / "one.json", tmp_path / "held_out.txt"
    one.write_text(json.dumps(evaluation(1.0)))
    several.write_text("a table\n" + json.dumps({"bits": {"context 2048": evaluation(2.0)}}))
    plot_context([one, several], tmp_path / "context.png")
    assert {"one: 1.125", "context 2048: 2.250"} <= set(labels)


def refuses(figure, folder, text, what):
    """A figure of a file with this text is refused in one line, and leaves nothing behind."""
    path = folder / "rows.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"rows\.json: not {what}") as caught:
        figure([path], folder / "x.png")
    assert "\n" not in str(caught.value) and [p.name for p in folder.iterdir()] == ["rows.json"]


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"bits": {"x": {}}}', '{"bits_per_char": 1, "buckets": []}']
)
def test_evaluations_that_are_none_are_refused(tmp_path, text):
    refuses(plot_context, tmp_path, text, "the output of butterfly eval --json")


def test_recall_figure_takes_every_form_of_rows(tmp_path, labels):
    one, rows = tmp_path / "one.json", tmp_path / "rows.jsonl"
    one.write_text(json.dumps({"length": 512, "by_hops": {"0": [1.0, 8], "1": [0.5, 8]}}))
    many = [{"length": n, "distractors": 15, "by_hops": {"0": 1, "2": 0.25}} for n in (4096, 65536)]
    many[1]["reworded"] = True
    lines = [{"variant": "small", "by_hops": {"0": 0.75}}, {"variant": "long", "recall": many}]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_recall([one, rows], tmp_path / "recall.png")
    wanted = {"one", "small", "long, 4,096 with 15 others", "share right"}
    wanted |= {"long, 65,536 with 15 others, reworded"}
    assert wanted <= set(labels) and (tmp_path / "recall.png").stat().st_size > 1000


@pytest.mark.parametrize("text", ["", "x", '{"by_hops": {}}', '{"by_hops": {"one": 1}}', '{"recall": [{}]}'])
def test_recall_of_nothing_is_refused(tmp_path, text):
    refuses(plot_recall, tmp_path, text, "rows of recall by hops")


def test_scaling_figure_shows_speed_and_memory(tmp_path, labels):
    rows = [
        {"what": "writing", "length": length, "chars_per_second": rate, "bytes": 5_000_000}
        for length, rate in ((1024, 60.0), (65536, 50.0))
    ]
    file = tmp_path / "bench.txt"
    file.write_text("a table\n" + json.dumps({"rows": rows}) + "\n")
    plot_scaling([file], tmp_path / "scaling.png")
    assert {"writing, 50", "writing, 5.0 MB", "1k", "64k"} <= set(labels)
    file.write_text(json.dumps({"rows": [dict(row, bytes=None) for row in rows]}))
    labels.clear()
    plot_scaling([file], tmp_path / "scaling.png")
    assert "characters a second" in labels and "memory" not in labels


def test_kernel_figure_shows_times_and_shares(tmp_path, labels):
    def both(forward, backward):
        return {"forward_ms": forward, "forward_backward_ms": backward}

    sections = {
        "1048576 characters": {"floor": both(2, 6), "shipped": both(2.5, 10), "gather + SDPA": "Skipped"},
        "65536 characters": {
            "floor": both(0.1, 0.3), "shipped": both(0.2, 0.4), "full causal": {"forward_ms": 1234.5},
        },
        "step": {"1 streams": {"error": 0.1}},
    }  # fmt: skip
    file = tmp_path / "ops.json"
    file.write_text(json.dumps(sections, indent=1))
    plot_kernels(file, tmp_path / "kernels.png")
    wanted = {"0.2 ms, 50% of the floor", "0.4 ms, 75% of the floor", "2.5 ms, 80% of the floor", "1,234 ms"}
    assert wanted | {"65,536 characters", "1,048,576 characters", "this project"} <= set(labels)
    assert "this pattern, gathered for SDPA" not in labels
    del sections["65536 characters"]["shipped"]
    file.write_text(json.dumps(sections))
    with pytest.raises(ValueError, match=r"ops\.json: not the output of butterfly bench ops"):
        plot_kernels(file, tmp_path / "x.png")


def test_scaling_figure_has_a_curve_for_each_number_of_streams(tmp_path, labels):
    rows = [
        {"what": "writing", "length": length, "streams": streams, "chars_per_second": 10.0 * streams}
        for length in (1024, 65536)
        for streams in (1, 64)
    ]
    file = tmp_path / "decode.txt"
    file.write_text(json.dumps({"rows": rows}))
    plot_scaling([file], tmp_path / "scaling.png")
    assert {"writing, 10", "writing, 64 streams, 640"} <= set(labels)


def peer_rows(twin, task, **last):
    row = {"twin": twin, "task": task, "chars_per_second": 1000, "bytes": 10**9}
    return [{**row, "length": 8192}, {**row, "length": 65536}, {"twin": twin, "task": task, **last}]


def test_peers_figure_shows_every_architecture_and_what_was_left_out(tmp_path, labels, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    plot = Axes.plot

    def note(axes, x, y, form, **options):
        drawn.append((form, list(x), list(y), options.get("markerfacecolor")))
        return plot(axes, x, y, form, **options)

    monkeypatch.setattr(Axes, "plot", note)
    slow = peer_rows(
        "full", "training", length=262144, failed="a step would take 64 s", expected_seconds=64, chars=262144
    )
    large = peer_rows("mamba2", "training", length=262144, failed="out of memory: Tried to allocate 9 GiB")
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    one.write_text(
        json.dumps({"rows": slow + peer_rows("butterfly", "reading", length=262144, failed="no time")})
    )
    two.write_text("a table\n" + json.dumps({"rows": large}))
    plot_peers([one, two], tmp_path / "peers.png")
    titles = {
        f"{task}: {what}"
        for task in ("reading", "training")
        for what in ("characters a second", "peak memory")
    }
    assert titles | {"butterfly", "full attention", "Mamba-2", "8k", "64k"} <= set(labels)
    assert "window of two chunks" not in labels
    assert ("o", [262144], [4096.0], "white") in drawn
    assert [x for form, x, _, _ in drawn if form == "x" and x] == [[262144]] * 2
    assert ("o-", [8192, 65536], [1000, 1000], None) in drawn


def test_twins_figure_shows_held_out_bits_by_time_and_by_characters(tmp_path, labels):
    curve = [[1000 * i, 0.5 * i, 5 / i] for i in range(1, 6)]
    rows = [
        {"twin": "butterfly", "curve": curve, "bits_per_char": 1.25},
        {"twin": "full", "curve": curve, "bits_per_char": 1.5},
        {"twin": "mamba2", "failed": "out of memory"},
        {"twin": "full+n-grams", "curve": curve, "bits_per_char": 1.4},
    ]
    file, near = tmp_path / "twins.json", tmp_path / "near.json"
    file.write_text(json.dumps({"rows": rows}))
    rows[0] |= {"bits_per_char": 1.75}
    near.write_text(json.dumps({"rows": rows[:1], "local_chunks": 7}))
    plot_twins([file, near], tmp_path / "twins.svg")
    wanted = {"butterfly: 1.250", "butterfly, 7 local chunks: 1.750", "full attention: 1.500"}
    wanted |= {"full attention, n-grams: 1.400"}
    assert wanted | {"seconds trained", "characters trained"} <= set(labels)
    assert not any("Mamba" in label or "rate" in label for label in labels)


def test_twins_figure_tells_learning_rates_apart(tmp_path, labels):
    rows = [{"twin": "full", "curve": [[1000, 1, 5]], "bits_per_char": 1.5}]
    files = [tmp_path / f"{rate}.json" for rate in (0.002, 0.004)]
    for file in files:
        file.write_text(json.dumps({"rows": rows, "train": {"learning_rate": float(file.stem)}}))
    plot_twins(files, tmp_path / "twins.svg")
    assert {"full attention, rate 0.002: 1.500", "full attention, rate 0.004: 1.500"} <= set(labels)


def test_twins_figure_tells_sizes_and_words_apart(tmp_path, labels):
    files = [tmp_path / f"{millions}.json" for millions in (17, 45, 46)]
    for file in files:
        row = {
            "twin": "butterfly",
            "curve": [[1000, 1, 5]],
            "bits_per_char": 1.5,
            "parameters": int(file.stem) * 10**6,
        }
        file.write_text(json.dumps({"rows": [row], "ngram_words": 3 * (file.stem == "17")}))
    plot_twins(files, tmp_path / "twins.svg")
    assert {"butterfly, words, 17M: 1.500", "butterfly, 45M: 1.500"} <= set(labels)
    labels.clear()
    plot_twins(files[1:], tmp_path / "twins.svg")
    assert labels.count("butterfly: 1.500") >= 2
    assert not any("45M" in label for label in labels)


def test_twins_figure_shows_the_worst_as_well(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    rows = [
        {"twin": name, "curve": [[1, 1, 5]], "bits_per_char": bits}
        for name, bits in (("full", 4), ("window", 1))
    ]
    (tmp_path / "twins.json").write_text(json.dumps({"rows": rows}))
    seen = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: seen.append(figure.axes[0].get_ylim()))
    with contextlib.suppress(OSError):  # nothing is written
        plot_twins([tmp_path / "twins.json"], tmp_path / "twins.svg")
    assert seen[0][0] < 1 and 4 < seen[0][1] < 5


@pytest.mark.parametrize("text", ["", "{}", '{"rows": []}', '{"rows": [{"twin": "x"}]}', '{"rows": [1]}'])
def test_comparisons_that_are_none_are_refused(tmp_path, text):
    refuses(plot_peers, tmp_path, text, "the output of butterfly bench peers")
    refuses(plot_twins, tmp_path, text, "the output of butterfly bench twins")


@pytest.mark.parametrize(
    "text", ["", "a table", "{}", '{"rows": []}', '{"rows": [{"what": "x", "length": 0}]}', '{"rows": [1]}']
)
def test_benchmarks_that_are_none_are_refused(tmp_path, text):
    refuses(plot_scaling, tmp_path, text, "the output of a benchmark")


@pytest.mark.parametrize("topology", ["shift", "xor_causal"])
@pytest.mark.parametrize("layer", [0, 5])
@pytest.mark.parametrize("chars", [3, 70, 128])
def test_attention_map_is_what_the_layer_computes(topology, layer, chars):
    config = ButterflyConfig.preset("micro", routing=topology)
    model = random_model(config)
    ids = torch.randint(256, (chars,), dtype=torch.uint8)
    captured = []
    module = model.layers[layer]
    project = module.project
    module.project = lambda *arguments: captured.append(project(*arguments)) or captured[-1]
    with torch.no_grad():
        weights = attention_map(model, ids, layer)  # (H, Q, C + Q)
    q, k, v = (x[None] for x in captured[0])
    expected = butterfly_attention_reference(
        q, k, v, stride=model.routes[layer].stride, topology=topology, chunk_size=config.chunk_size,
        rope_theta=config.rope_theta, rotated=True,
    )[0]  # fmt: skip
    size, stride = config.chunk_size, model.routes[layer].stride
    start = (chars - 1) // size * size
    partner = start - stride * size if topology == "shift" else (start // size ^ stride) * size
    v = v[0].repeat_interleave(config.num_heads // config.num_kv_heads, dim=1)  # (N, H, D)
    there = v[partner : partner + size] if 0 <= partner < start else v.new_zeros(size, *v.shape[1:])
    y = torch.einsum("hqk,khd->qhd", weights, torch.cat([there, v[start:]]))
    assert torch.allclose(y, expected[start:], atol=1e-5)
    assert torch.allclose(weights.sum(-1), torch.ones(()))


def test_the_attention_map_of_a_text_that_is_read_in_slices():
    model = random_model(ButterflyConfig.preset("micro"))
    ids = torch.randint(0, 256, (100,))
    whole = attention_map(model, ids, 3)
    model.recompute = dataclasses.replace(model.recompute, slice_rows=32)
    assert torch.equal(attention_map(model, ids, 3), whole)
    assert model.recompute.slice_rows == 32


def test_attention_figure_spells_the_text_out(tmp_path, labels):
    model = random_model(ButterflyConfig.preset("micro"))
    for text, seen in ((Path(__file__).read_bytes()[:100], True), (b"a\n\x00", False)):
        labels.clear()
        plot_attention(model, text, tmp_path / "attention.png", layer=0, head=1)
        assert ("what the last character sees in the chunk it hears" in labels) is seen
    assert {"a", "\u21b5", "\u00b7"} <= set(labels)


def test_attention_of_nothing_is_refused(tmp_path):
    model = random_model(ButterflyConfig.preset("micro"))
    with pytest.raises(ValueError, match="the text is empty"):
        plot_attention(model, b"", tmp_path / "x.png", layer=0)
    model = random_model(ButterflyConfig.preset("micro", local_chunks=1, local_every=2))
    with pytest.raises(ValueError, match="draws two chunks, layer 1 reads 3"):
        plot_attention(model, b"x", tmp_path / "x.png", layer=1)
    assert attention_map(model, torch.zeros(1, dtype=torch.uint8), 0).shape[1:] == (1, 17)
    assert not list(tmp_path.iterdir())
