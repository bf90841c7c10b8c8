"""Figures beside other architectures: speed and memory by length, and what each learns in the same time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from butterfly_llm.memory import format_bytes
from butterfly_llm.plot.canvas import BLUE, GREEN, GREY, ORANGE, PALE, PINK, engineering, new_figure
from butterfly_llm.plot.results import last_object, length_axis, smooth

NAMES = {
    "butterfly": "butterfly",
    "window": "window of two chunks",
    "full": "full attention",
    "gated-deltanet": "Gated DeltaNet",
    "mamba2": "Mamba-2",
    "window+n-grams": "window, n-grams",
    "full+n-grams": "full attention, n-grams",
}
_COLOURS = {"butterfly": BLUE, "window": GREY, "full": ORANGE, "gated-deltanet": GREEN, "mamba2": PINK}
_COLOURS |= {"window+n-grams": GREY, "full+n-grams": ORANGE}


def plot_peers(benchmarks: Sequence[str | Path], path: str | Path) -> None:
    """Draw characters a second and memory against length, both axes logarithmic, for each task.

    benchmarks: outputs of `butterfly bench peers`; of rows about the same the last counts. A hollow point is
    what a step that was left out would reach at least, a cross where memory ran out. Raises as `plot_loss`
    does.
    """
    rows: dict[tuple[str, str, int], dict[str, Any]] = {}
    for file in map(Path, benchmarks):
        rows |= {(row["task"], row["twin"], row["length"]): row for row in _read_peers(file)}
    tasks = [task for task in ("reading", "training", "writing") if any(key[0] == task for key in rows)]
    twins = [name for name in NAMES if any(key[1] == name for key in rows)]
    memory = any(row.get("bytes") for row in rows.values())
    kinds: list[tuple[str, str, Callable[[float], str]]] = [
        ("chars_per_second", "characters a second", engineering)
    ]
    if memory:
        kinds.append(("bytes", "peak memory", format_bytes))
    with new_figure(path, width=3.9 * len(tasks), height=0.5 + 3.0 * len(kinds)) as figure:
        figure.set_layout_engine("constrained")
        grid = figure.subplots(len(kinds), len(tasks), squeeze=False)
        for line, (key, label, show) in zip(grid, kinds, strict=True):
            for axes, task in zip(line, tasks, strict=True):
                for name in twins:
                    each = [rows[at] for at in sorted(rows) if at[:2] == (task, name)]
                    _draw(axes, each, key, _COLOURS[name], NAMES[name])
                length_axis(axes, [length for _, _, length in rows])
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter(lambda value, at, show=show: show(value))
                axes.yaxis.set_minor_formatter(lambda value, at: "")
                axes.set_title(f"{task}: {label}")
                _tidy(axes)
        handles, names = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)


def plot_twins(benchmarks: Sequence[str | Path], path: str | Path) -> None:
    """Draw bits per character in training against seconds and against characters, and on held-out text.

    benchmarks: outputs of `butterfly bench twins`; peak learning rates are named where they differ, and
    parameters where they do by a fifth. Raises as `plot_loss` does.
    """
    rows = [row for benchmark in benchmarks for row in _read_twins(Path(benchmark))]
    lines = {colour: iter(("-", "--", ":", "-.") * len(rows)) for colour in _COLOURS.values()}
    styles = [next(lines[_COLOURS[row["twin"]]]) for row in rows]
    if len({row["rate"] for row in rows}) > 1:
        for row in rows:
            row["name"] += f", rate {row['rate']}"
    sizes = [row.get("parameters", 0) for row in rows]
    if max(sizes) > 1.2 * min(sizes) > 0:
        for row in rows:
            row["name"] += f", {row['parameters'] / 1e6:.0f}M"
    with new_figure(path, width=7.8, height=3.9 + 0.1 * len(rows)) as figure:
        figure.set_layout_engine("constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, column, label in zip(panels, (1, 0), ("seconds", "characters"), strict=True):
            for row, style in zip(rows, styles, strict=True):
                colour, curve = _COLOURS[row["twin"]], row["curve"]
                at, bits = [point[column] for point in curve], [point[2] for point in curve]
                name = f"{row['name']}: {row['bits_per_char']:.3f}"
                axes.plot(at, smooth(bits, 12), style, color=colour, linewidth=1.6, label=name)
                axes.plot(at[-1], row["bits_per_char"], "o", color=colour, markersize=5)
            axes.set_xlabel(f"{label} trained")
            axes.xaxis.set_major_formatter(lambda value, at: engineering(value))
            axes.set_xlim(left=0)
            _tidy(axes)
        low, high = (end(row["bits_per_char"] for row in rows) for end in (min, max))
        panels[0].set_ylim(0.9 * low, max(2.2 * low, 1.15 * high))  # the fall of the first steps is no news
        panels[0].set_ylabel("bits per character")
        figure.legend(
            *panels[1].get_legend_handles_labels(), title="held out (dots)", frameon=False, ncols=2,
            loc="outside lower center",
        )  # fmt: skip


def _draw(axes: Any, rows: Sequence[dict[str, Any]], key: str, colour: str, name: str) -> None:
    """One curve, with what is missing at its end."""
    measured = [(row["length"], row[key]) for row in rows if row.get(key)]
    axes.plot(
        *zip(*measured, strict=True) if measured else ((), ()), "o-", color=colour, markersize=4, label=name
    )
    expected = [
        (row["length"], row["chars"] / row["expected_seconds"])
        for row in rows
        if key == "chars_per_second" and row.get("expected_seconds")
    ]
    if expected:
        axes.plot(*zip(*measured[-1:], *expected, strict=True), ":", color=colour, linewidth=1)
        axes.plot(*zip(*expected, strict=True), "o", color=colour, markersize=4, markerfacecolor="white")
    full = [row["length"] for row in rows if row.get("failed", "").startswith("out of memory")]
    axes.plot(full, [0.04] * len(full), "x", color=colour, transform=axes.get_xaxis_transform())


def _tidy(axes: Any) -> None:
    axes.grid(color=PALE)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _read_peers(path: Path) -> list[dict[str, Any]]:
    try:
        rows = list(last_object(path)["rows"])
        for row in rows:
            if not (row["twin"] in NAMES and row["task"] and row["length"] > 0):
                raise ValueError("a row without twin, task or length")
        if not any(row.get("chars_per_second") for row in rows):
            raise ValueError("no rates")
        return rows
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path}: not the output of butterfly bench peers ({error!r})") from None


def _read_twins(path: Path) -> list[dict[str, Any]]:
    """The rows that are no failures, each with a `name`; ValueError where there is none."""
    try:
        result = last_object(path)
        rows = [row for row in result["rows"] if "failed" not in row]
        for row in rows:
            row["name"] = NAMES.get(row["twin"])
            row["rate"] = result.get("train", {}).get("learning_rate")
            if row["twin"] == "butterfly" and (local := result.get("local_chunks")):
                row["name"] += f", {local} local chunks"
            if row["twin"] == "butterfly" and result.get("ngram_words"):
                row["name"] += ", words"
            if row["twin"] not in NAMES or not row["curve"] or not row["bits_per_char"] > 0:
                raise ValueError("a row without twin, curve or bits")
        if not rows:
            raise ValueError("nothing was trained")
        return rows
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path}: not the output of butterfly bench twins ({error!r})") from None
