"""Figures of the routing: who hears whom, and after how many layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from butterfly_llm.plot.canvas import BLUE, DPI, GREEN, GREY, ORANGE, PALE, SOFT, new_figure
from butterfly_llm.routing import Topology, partner_of, reach, reach_share, schedule


def plot_routing(path: str | Path) -> None:
    """Draw how chunks hear each other (design, section 2): one pass as wires, and what three routings reach.

    path: .png or .svg. ValueError for another ending; ModuleNotFoundError in one line without matplotlib.
    """
    # 240 dots per inch: a side of 512 chunks is 512 dots, so every chunk pair is a sharp one.
    width, height, side = 12.2, 3.1, 512 / DPI  # inches
    one_pass = [1 << level for level in range(9)]
    with new_figure(path, width, height) as figure:

        def axes_at(x: float, wide: float) -> Any:
            return figure.add_axes((x / width, 0.45 / height, wide / width, side / height))

        _draw_pass(axes_at(0.6, 4.0), num_chunks=16, num_levels=4)
        reads, masked, previous = axes_at(5.05, side), axes_at(7.475, side), axes_at(9.9, side)
        _draw_reach(
            reads, "butterfly: c reads c \u2212 2\u1d47", "one pass, 9 layers", one_pass, "shift", BLUE
        )
        _draw_reach(masked, "c XOR 2\u1d47, masked", "9 layers or any number", one_pass, "xor_causal", ORANGE)
        _draw_reach(previous, "c reads c \u2212 1", "53 layers", [1] * 53, "shift", GREEN)
        reads.set_ylabel("chunk that reads", labelpad=-14)
        reads.set_yticks([0, 511])


def plot_reach(path: str | Path) -> None:
    """Draw which share of the causal chunk pairs is connected after each of 53 layers, for three routings.

    path: as in `plot_routing`.
    """
    routes = schedule(num_local_layers=4, pass_levels=[9] * 5, num_extra_levels=0, num_refine_layers=4)
    strides = [route.stride for route in routes]
    # name, routing, strides, colour, and where the name is written
    curves: tuple[tuple[str, Topology, list[int], str, tuple[float, float]], ...] = (
        ("butterfly: c reads c \u2212 2\u1d47", "shift", strides, BLUE, (14, 92)),
        ("c XOR 2\u1d47, masked", "xor_causal", strides, ORANGE, (14, 19)),
        ("c reads c \u2212 1", "shift", [1] * len(strides), GREEN, (41, 22)),
    )
    layers = range(len(strides) + 1)
    with new_figure(path, width=7.2, height=3.6) as figure:
        figure.set_layout_engine("constrained")
        axes = figure.subplots()
        starts = [route.index for route in routes if route.starts_pass]
        for number, start in enumerate(starts):
            if number % 2 == 0:
                axes.axvspan(start, start + 9, color=PALE, alpha=0.45, linewidth=0)
            axes.text(start + 4.5, 108, f"pass {number + 1}", ha="center", va="center", color=SOFT)
        for middle, name in ((2, "local"), (len(strides) - 2, "refine")):
            axes.text(middle, 108, name, ha="center", va="center", color=SOFT)
        for name, topology, taken, colour, at in curves:
            shares = [100 * reach_share(512, taken[:n], topology) for n in layers]
            axes.plot(layers, shares, color=colour, linewidth=2)
            axes.annotate(
                f"{shares[-1]:.0f}%", (layers[-1], shares[-1]), xytext=(5, 0), textcoords="offset points",
                va="center", color=colour, fontweight="bold", annotation_clip=False,
            )  # fmt: skip
            axes.text(*at, name, color=colour, va="center")
        axes.set_xlim(0, len(strides))
        axes.set_ylim(0, 115)
        axes.set_yticks(range(0, 101, 25), labels=[f"{share}%" for share in range(0, 101, 25)])
        axes.set_xlabel("layers")
        axes.set_ylabel("pairs of 512 chunks connected")
        axes.spines[["top", "right"]].set_visible(False)


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
                    (source, chunk), (level, level + 1), color=BLUE if lit else GREY,
                    linewidth=1.3 if lit else 0.6, alpha=1 if lit else 0.5, zorder=2 if lit else 1,
                )  # fmt: skip
    for row in range(num_levels + 1):
        for chunk in range(num_chunks):
            lit = (row, chunk) in cone
            axes.plot(
                chunk, row, "o", markersize=5.5, zorder=3, markeredgewidth=1.1,
                markerfacecolor=BLUE if lit else "white", markeredgecolor=BLUE if lit else GREY,
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
    axes.imshow(cells, cmap=ListedColormap(["white", PALE, colour]), interpolation="nearest")
    axes.set_title(title, pad=19)
    axes.text(0.5, 1.02, subtitle, transform=axes.transAxes, ha="center", va="bottom", color=SOFT)
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
    axes.spines[:].set_color(GREY)
