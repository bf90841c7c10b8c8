"""Figure of recall: the share of planted facts that a model finds again, by the hops that lie between."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from butterfly_llm.plot.canvas import COLOURS, PALE, new_figure

_STYLES = ("o-", "s--", "^:", "D-.")  # the colours are four: a style for each round of them


def plot_recall(sources: Sequence[str | Path], path: str | Path) -> None:
    """Draw the share right by hops, from outputs of `butterfly eval recall --json` or rows of the benchmarks.

    path: .png or .svg. ValueError for another ending and for a file without such figures; OSError when it
    cannot be read; ModuleNotFoundError in one line without matplotlib.
    """
    curves = [curve for source in sources for curve in _read_curves(Path(source))]
    with new_figure(path, width=7.2, height=4.0) as figure:
        figure.set_layout_engine("constrained")
        axes = figure.subplots()
        looks = itertools.product(_STYLES, COLOURS)
        for (label, shares), (style, colour) in zip(curves, itertools.cycle(looks), strict=False):
            axes.plot(list(shares), list(shares.values()), style, color=colour, linewidth=1.8, label=label)
        axes.set_xticks(sorted({hops for _, shares in curves for hops in shares}))
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("hops between question and fact (set bits of the distance in chunks)")
        axes.set_ylabel("share right")
        axes.grid(color=PALE)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=2, frameon=False)


def _read_curves(path: Path) -> list[tuple[str, dict[int, float]]]:
    """(label, share right by hops) of each row of a file; ValueError where there is none."""
    try:
        curves = [
            c for line in path.read_text(encoding="utf-8").splitlines() if line for c in _curves(line, path)
        ]
        if not curves:
            raise ValueError("no rows")
        return curves
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: not rows of recall by hops ({error!r})") from None


def _curves(line: str, path: Path) -> Iterator[tuple[str, dict[int, float]]]:
    row = json.loads(line)
    name = row.get("variant", path.stem)
    if "recall" not in row:
        yield name, _shares(row["by_hops"])
        return
    for asked in row["recall"]:
        how = ", reworded" if asked.get("reworded") else ""
        label = f"{name}, {asked['length']:,} with {asked['distractors']} others{how}"
        yield label, _shares(asked["by_hops"])


def _shares(by_hops: Mapping[str, Any]) -> dict[int, float]:
    """{hops: share}, or {hops: (share, number asked)} -> {hops: share}, at least one."""
    shares = {int(k): float(v[0] if isinstance(v, list) else v) for k, v in by_hops.items()}
    if not shares:
        raise ValueError("nothing asked")
    return shares
