"""Figures: the routing of the chunks, and the loss of a training run. Needs matplotlib."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from butterfly_llm.routing import Topology, partner_of, reach, reach_share

# Okabe and Ito, distinct for every kind of colour vision.
_BLUE, _ORANGE, _GREEN = "#0072B2", "#D55E00", "#009E73"
_DPI = 240
_INK, _SOFT, _GREY, _PALE = "#222222", "#555555", "#9A9A9A", "#E9E9E9"


def plot_routing(path: str | Path) -> None:
    """Draw how chunks hear each other (design, section 2): one pass as wires, and what three routings reach.

    path: .png or .svg. ValueError for another ending; ModuleNotFoundError in one line without matplotlib.
    """
    # 240 dots per inch: a side of 512 chunks is 512 dots, so every chunk pair is a sharp one.
    width, height, side = 12.2, 3.1, 512 / _DPI  # inches
    one_pass = [1 << level for level in range(9)]
    with _figure(path, width, height) as figure:

        def axes_at(x: float, wide: float) -> Any:
            return figure.add_axes((x / width, 0.45 / height, wide / width, side / height))

        _draw_pass(axes_at(0.6, 4.0), num_chunks=16, num_levels=4)
        reads, masked, previous = axes_at(5.05, side), axes_at(7.475, side), axes_at(9.9, side)
        _draw_reach(
            reads, "butterfly: c reads c \u2212 2\u1d47", "one pass, 9 layers", one_pass, "shift", _BLUE
        )
        _draw_reach(
            masked, "c XOR 2\u1d47, masked", "9 layers or any number", one_pass, "xor_causal", _ORANGE
        )
        _draw_reach(previous, "c reads c \u2212 1", "53 layers", [1] * 53, "shift", _GREEN)
        reads.set_ylabel("chunk that reads", labelpad=-14)
        reads.set_yticks([0, 511])


def plot_loss(metrics: str | Path, path: str | Path) -> None:
    """Draw bits per character against characters trained on, from the metrics.jsonl of a run.

    path: .png or .svg. ValueError for another ending and for a file without such lines; OSError when it
    cannot be read; ModuleNotFoundError in one line without matplotlib.
    """
    train, validation = _read_metrics(Path(metrics))
    with _figure(path, width=7.2, height=4.2) as figure:
        figure.set_layout_engine("constrained")
        axes = figure.subplots()
        if train:
            chars, bits = zip(*train, strict=True)
            axes.plot(chars, bits, color=_BLUE, alpha=0.3, linewidth=0.8)
            axes.plot(chars, _smooth(bits), color=_BLUE, linewidth=1.6, label="training")
        if validation:
            chars, bits = zip(*validation, strict=True)
            axes.plot(chars, bits, "o", color=_ORANGE, markersize=4.5, label="validation")
            axes.annotate(
                f"{bits[-1]:.3f}",
                (chars[-1], bits[-1]),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                color=_ORANGE,
            )
        axes.set_xlabel("characters trained on")
        axes.set_ylabel("bits per character")
        axes.xaxis.set_major_formatter(_engineering)
        every = [bits for _, bits in (*train, *validation)]
        axes.set_xlim(left=0)
        axes.set_ylim(top=min(max(every), 2.5 * min(every)) * 1.03)  # the fall of the first steps is no news
        axes.grid(color=_PALE)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)


def _draw_pass(axes: Any, num_chunks: int, num_levels: int) -> None:
    """One pass as a wiring diagram; the cone of what the last chunk hears is highlighted."""
    cone = {(num_levels, num_chunks - 1)}  # (row, chunk): row r is the state after r levels
    for level in reversed(range(num_levels)):
        for row, chunk in sorted(cone):
            if row == level + 1:
                cone |= {(level, chunk), (level, partner_of(chunk, 1 << level, "shift"))}
    cone = {(row, chunk) for row, chunk in cone if chunk >= 0}
    for level in range(num_levels):
        for chunk in range(num_chunks):
            sources = (chunk, partner_of(chunk, 1 << level, "shift"))
            for source in (c for c in sources if c >= 0):
                lit = (level + 1, chunk) in cone
                axes.plot(
                    (source, chunk), (level, level + 1), color=_BLUE if lit else _GREY,
                    linewidth=1.3 if lit else 0.6, alpha=1 if lit else 0.5, zorder=2 if lit else 1,
                )  # fmt: skip
    for row in range(num_levels + 1):
        for chunk in range(num_chunks):
            lit = (row, chunk) in cone
            axes.plot(
                chunk, row, "o", markersize=5.5, zorder=3, markeredgewidth=1.1,
                markerfacecolor=_BLUE if lit else "white", markeredgecolor=_BLUE if lit else _GREY,
            )  # fmt: skip
    axes.set_xlim(-0.6, num_chunks - 0.4)
    axes.set_ylim(-0.35, num_levels + 0.35)
    axes.set_xticks(range(num_chunks))
    axes.set_yticks([level + 0.5 for level in range(num_levels)])
    axes.set_yticklabels([f"level {level}\nc \u2212 {1 << level}" for level in range(num_levels)])
    axes.set_xlabel("chunk of 128 characters", labelpad=1)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("One pass of the butterfly: every chunk reaches the last", pad=19)


def _draw_reach(
    axes: Any,
    title: str,
    subtitle: str,
    strides: Sequence[int],
    topology: Topology,
    colour: str,
    num_chunks: int = 512,
) -> None:
    """Which chunk (row) can have heard which (column), and the share of the causal pairs that is."""
    from matplotlib.colors import ListedColormap

    cells = [
        [0 if d > c else 2 if mask >> d & 1 else 1 for d in range(num_chunks)]
        for c, mask in enumerate(reach(num_chunks, strides, topology))
    ]
    axes.imshow(cells, cmap=ListedColormap(["white", _PALE, colour]), interpolation="nearest")
    axes.set_title(title, pad=19)
    axes.text(0.5, 1.02, subtitle, transform=axes.transAxes, ha="center", va="bottom", color=_SOFT)
    share = reach_share(num_chunks, strides, topology)
    axes.text(
        0.96, 0.95, f"{share:.0%}" if share == 1 else f"{share:.1%}", transform=axes.transAxes,
        ha="right", va="top", fontsize=18, fontweight="bold", color=colour,
    )  # fmt: skip
    for label, side in zip(
        axes.set_xticks([0, num_chunks - 1], labels=["0", str(num_chunks - 1)]),
        ("left", "right"),
        strict=True,
    ):
        label.label1.set_horizontalalignment(side)
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.set_xlabel("chunk that is heard", labelpad=-8)
    axes.spines[:].set_color(_GREY)


@contextmanager
def _figure(path: str | Path, width: float, height: float) -> Iterator[Any]:
    """A figure of width x height inches that is written to `path` at the end, whole or not at all."""
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise ValueError(f"{path}: a figure must end in .png or .svg")
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from PIL import Image
    except ModuleNotFoundError:
        raise ModuleNotFoundError("figures need matplotlib: pip install 'butterfly-llm[plot]'") from None
    style: dict[Any, Any] = {
        "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "text.color": _INK,
        "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK, "svg.hashsalt": "butterfly",
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), facecolor="white")
        FigureCanvasAgg(figure)
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=path.suffix)
        os.close(handle)
        try:
            if kind == "svg":
                figure.savefig(name, format="svg", metadata={"Date": None})
            else:
                figure.savefig(name, format="png", dpi=_DPI)
                with Image.open(name) as image:
                    image.convert("RGB").quantize(128).save(name, format="png", optimize=True)
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise


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


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean over a centred window of about a fiftieth of the run."""
    half = len(values) // 100
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _engineering(value: float, _: object) -> str:
    """12000000 as 12M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
