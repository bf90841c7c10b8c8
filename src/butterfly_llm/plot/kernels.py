"""Figure of what one attention layer takes, beside the floor of memory and what PyTorch offers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from butterfly_llm.plot.canvas import BLUE, GREY, ORANGE, PALE, SOFT, new_figure
from butterfly_llm.plot.results import last_object

# Parts of `butterfly bench ops`, from the bottom of the figure.
NAMES = {
    "full causal": "all earlier characters (SDPA)",
    "gather + SDPA": "this pattern, gathered for SDPA",
    "flex_attention": "this pattern, FlexAttention",
    "shipped": "this project",
}
PASSES = {"forward_ms": ("forward", BLUE), "forward_backward_ms": ("forward and backward", ORANGE)}


def plot_kernels(measured: str | Path, path: str | Path) -> None:
    """Draw milliseconds against the floor, by length, from the output of `butterfly bench ops`.

    path: .png or .svg. ValueError for another ending and for a file that is no such output; OSError when it
    cannot be read; ModuleNotFoundError in one line without matplotlib.
    """
    panels = _read(Path(measured))
    names = [name for name in NAMES if any(name in parts for _, parts in panels)]
    with new_figure(path, width=4.6 * len(panels), height=3.2) as figure:
        figure.set_layout_engine("constrained")
        grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axes, (length, parts) in zip(grid, panels, strict=True):
            for row, name in enumerate(names):
                for key, offset in (("forward_ms", 0.19), ("forward_backward_ms", -0.19)):
                    took = parts.get(name, {}).get(key)
                    if took is None:
                        continue
                    axes.barh(row + offset, took, height=0.36, color=PASSES[key][1])
                    share = f", {parts['floor'][key] / took:.0%} of the floor" if name == "shipped" else ""
                    axes.annotate(
                        f"{_shown(took)} ms{share}", (took, row + offset), xytext=(3, 0), va="center",
                        textcoords="offset points", fontsize=8, color=SOFT,
                        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
                    )  # fmt: skip
            for key, (_, colour) in PASSES.items():
                axes.axvline(parts["floor"][key], color=colour, linewidth=1, linestyle=(0, (4, 3)))
            axes.set_xscale("log")
            low = parts["floor"]["forward_ms"]
            high = max(part[key] for part in parts.values() for key in PASSES if key in part)
            axes.set_xlim(low / 2, high * (high / low) ** 0.5)
            axes.xaxis.set_major_formatter(lambda value, at: f"{value:,g}")
            axes.set_yticks(range(len(names)), labels=[NAMES[name] for name in names])
            axes.set_title(f"{length:,} characters")
            axes.set_xlabel("milliseconds")
            axes.grid(color=PALE, axis="x")
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(axis="y", length=0)
        handles = [grid[0].barh(0, 0, color=colour, label=label) for label, colour in PASSES.values()]
        handles += grid[0].plot([], [], color=GREY, linestyle=(0, (4, 3)), label="floor: memory alone")
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _read(path: Path) -> list[tuple[int, dict[str, dict[str, float]]]]:
    """(length, milliseconds of each part by pass) of the lengths with a floor and our own kernels."""
    try:
        found: dict[str, Any] = last_object(path)
        panels = []
        for section, parts in found.items():
            if section.endswith(" characters"):
                timed = {name: part for name, part in parts.items() if isinstance(part, dict)}
                panels.append((int(section.split()[0]), timed))
                assert all(part["forward_ms"] > 0 for part in timed.values())
                assert {*timed["floor"]} == {*timed["shipped"]} == {*PASSES}
        assert panels
        return sorted(panels, key=lambda panel: panel[0])
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, AssertionError) as error:
        raise ValueError(f"{path}: not the output of butterfly bench ops ({error!r})") from None
