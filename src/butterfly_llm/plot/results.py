"""Figures of what was measured: the loss of a run, bits by position, speed and memory by length."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from butterfly_llm.memory import format_bytes
from butterfly_llm.plot.canvas import BLUE, COLOURS, GREY, ORANGE, PALE, SOFT, engineering, new_figure


def plot_loss(metrics: str | Path, path: str | Path) -> None:
    """Draw bits per character against characters trained on, from the metrics.jsonl of a run.

    path: .png or .svg. ValueError for another ending and for a file without such lines; OSError when it
    cannot be read; ModuleNotFoundError in one line without matplotlib.
    """
    train, validation = _read_metrics(Path(metrics))
    with new_figure(path, width=7.2, height=4.2) as figure:
        figure.set_layout_engine("constrained")
        axes = figure.subplots()
        if train:
            chars, bits = zip(*train, strict=True)
            axes.plot(chars, bits, color=BLUE, alpha=0.3, linewidth=0.8)
            axes.plot(chars, smooth(bits), color=BLUE, linewidth=1.6, label="training")
        if validation:
            chars, bits = zip(*validation, strict=True)
            axes.plot(chars, bits, "o", color=ORANGE, markersize=4.5, label="validation")
            axes.annotate(
                f"{bits[-1]:.3f}",
                (chars[-1], bits[-1]),
                xytext=(0, -14),
                textcoords="offset points",
                ha="center",
                color=ORANGE,
            )
        axes.set_xlabel("characters trained on")
        axes.set_ylabel("bits per character")
        axes.xaxis.set_major_formatter(lambda value, at: engineering(value))
        every = [bits for _, bits in (*train, *validation)]
        axes.set_xlim(left=0)
        axes.set_ylim(top=min(max(every), 2.5 * min(every)) * 1.03)  # the fall of the first steps is no news
        axes.grid(color=PALE)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)


def plot_context(evaluations: Sequence[str | Path], path: str | Path) -> None:
    """Draw bits per character by position in the context, from outputs of `butterfly eval --json`.

    Outputs of benchmarks/held_out.py give a curve for each context. The compressors' rates of the first
    evaluation are lines across. Raises as `plot_loss` does.
    """
    results = [each for file in evaluations for each in _read_evaluations(Path(file))]
    with new_figure(path, width=7.2, height=4.0) as figure:
        figure.set_layout_engine("constrained")
        axes = figure.subplots()
        for (name, result), colour in zip(results, _cycle(), strict=False):
            buckets = result["buckets"]
            edges = [32, *(bucket["stop"] for bucket in buckets)]
            rates = [bucket["bits_per_char"] for bucket in buckets]
            label = f"{name}: {result['bits_per_char']:.3f}"
            axes.stairs(rates, edges, baseline=None, color=colour, linewidth=2.2, label=label)
            for rate, left, right in zip(rates, edges, edges[1:], strict=False):
                if len(results) > 1:
                    break  # curves that lie close would write over each other
                axes.annotate(
                    f"{rate:.2f}", ((left * right) ** 0.5, rate), xytext=(0, 4), textcoords="offset points",
                    ha="center", color=colour, fontsize=8,
                )  # fmt: skip
        packers = (("xz", "xz \u22129e"), ("zstd", "zstd \u221219"))
        known = sorted((results[0][1][name], label) for name, label in packers if results[0][1].get(name))
        for number, (rate, label) in enumerate(known):
            axes.axhline(rate, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            axes.annotate(
                f"{label}  {rate:.2f}", (1, rate), xycoords=("axes fraction", "data"), ha="right", color=SOFT,
                xytext=(-2, 3 if number else -3), textcoords="offset points", fontsize=8,
                va="bottom" if number else "top",
            )  # fmt: skip
        edges = sorted({bucket["stop"] for _, result in results for bucket in result["buckets"]})
        axes.set_xscale("log", base=2)
        axes.set_xticks([32, *edges], labels=["0", *map(_binary, edges)])
        axes.minorticks_off()
        axes.set_xlabel("position in the context, characters")
        axes.set_ylabel("bits per character")
        axes.margins(x=0, y=0.12)
        axes.grid(color=PALE)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if len(results) > 1:
            axes.legend(frameon=False)


def plot_scaling(benchmarks: Sequence[str | Path], path: str | Path) -> None:
    """Draw speed and memory against length, both axes logarithmic, from outputs of `butterfly bench`.

    Takes the `rows` of the object in the last line of each: `what` names the curve, `length` is in
    characters, `chars_per_second` and `bytes` are drawn where given; more `streams` than one have a curve of
    their own. Raises as `plot_loss` does.
    """
    curves: dict[str, list[dict[str, Any]]] = {}
    for file in map(Path, benchmarks):
        for row in _read_rows(file):
            streams = row.get("streams", 1)
            name = row["what"] if streams == 1 else f"{row['what']}, {streams} streams"
            curves.setdefault(name, []).append(row)
    panels = [
        (key, label, show)
        for key, label, show in (
            ("chars_per_second", "characters a second", engineering),
            ("bytes", "memory", format_bytes),
        )
        if any(row.get(key) for rows in curves.values() for row in rows)
    ]
    with new_figure(path, width=6 if len(panels) == 1 else 7.8, height=3.6) as figure:
        figure.set_layout_engine("constrained")
        grid = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (key, label, show) in zip(grid, panels, strict=True):
            for (name, rows), colour in zip(curves.items(), _cycle(), strict=False):
                points = sorted((row["length"], row[key]) for row in rows if row.get(key))
                if points:
                    axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4.5)
                    axes.annotate(
                        f"{name}, {show(float(f'{points[-1][1]:.3g}'))}", points[0], xytext=(-4, 7),
                        textcoords="offset points", ha="left", color=colour,
                    )  # fmt: skip
            length_axis(axes, [row["length"] for rows in curves.values() for row in rows])
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            spread = max(high / low, 30) ** 0.6  # a flat line should look flat
            axes.set_ylim((low * high) ** 0.5 / spread, (low * high) ** 0.5 * spread)
            axes.yaxis.set_major_formatter(lambda value, at, show=show: show(value))
            axes.yaxis.set_minor_formatter(lambda value, at: "")
            axes.set_title(label)
            axes.grid(color=PALE)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)


def length_axis(axes: Any, lengths: Sequence[int]) -> None:
    """A logarithmic axis with powers of two as 1k, 16k, 64k, 1M."""
    axes.set_xscale("log", base=2)
    axes.set_xlabel("length, characters")
    low, high = min(lengths) / 1.4, max(lengths) * 1.4
    axes.set_xlim(low, high)
    ticks = [1 << power for power in range(31) if low <= 1 << power <= high]
    ticks = ticks[:: 2 if len(ticks) > 8 else 1]
    axes.set_xticks(ticks, labels=map(_binary, ticks))
    axes.minorticks_off()


def _binary(value: int) -> str:
    """65536 as 64k."""
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return str(value)


def _cycle() -> Iterator[str]:
    return itertools.cycle(COLOURS)


def _read_evaluations(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(name, evaluation) of each one in a file; ValueError where there is none."""
    try:
        found = last_object(path)
        results = list(found["bits"].items()) if "bits" in found else [(path.stem, found)]
        for _, result in results:
            numbers = [result["bits_per_char"]]
            for bucket in result["buckets"]:
                numbers += [bucket["stop"], bucket["bits_per_char"]]
            if len(numbers) == 1 or not all(isinstance(number, int | float) for number in numbers):
                raise ValueError("no figures")
        return results
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: not the output of butterfly eval --json ({error!r})") from None


def last_object(path: Path) -> Any:
    """The JSON of a file, or of its last line where a table stands before it."""
    text = path.read_text(encoding="utf-8")
    return json.loads(text if text.lstrip().startswith("{") else text.splitlines()[-1])


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a benchmark's object, which is its last line; ValueError for anything else."""
    try:
        rows = last_object(path)["rows"]
        for row in rows:
            if not (isinstance(row["what"], str) and row["length"] > 0):
                raise ValueError("a row without what or length")
        if not any(row.get("chars_per_second") or row.get("bytes") for row in rows):
            raise ValueError("no rates or sizes")
        return list(rows)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path}: not the output of a benchmark with rows by length ({error!r})") from None


def _read_metrics(path: Path) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """(characters trained on, bits per character) of the training and of the validation lines."""
    train, validation = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            if record["kind"] == "train":
                train.append((int(record["chars"]), float(record["bits_per_char"])))
            elif record["kind"] == "val":
                validation.append((int(record["trained_chars"]), float(record["bits_per_char"])))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: line {number} is not a line of metrics ({error!r})") from None
    if not train and not validation:
        raise ValueError(f"{path}: no training or validation figures in it")
    return train, validation


def smooth(values: Sequence[float], parts: int = 50) -> list[float]:
    """Mean over a centred window of about one of so many parts of the run."""
    half = len(values) // (2 * parts)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
