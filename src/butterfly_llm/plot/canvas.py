"""A figure of the house style, written whole or not at all. Needs matplotlib."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Okabe and Ito, distinct for every kind of colour vision.
BLUE, ORANGE, GREEN, PINK = COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
INK, SOFT, GREY, PALE = "#222222", "#555555", "#9A9A9A", "#E9E9E9"
DPI = 240


@contextmanager
def new_figure(path: str | Path, width: float, height: float) -> Iterator[Any]:
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
        "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "text.color": INK,
        "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "svg.hashsalt": "butterfly",
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
                figure.savefig(name, format="png", dpi=DPI)
                with Image.open(name) as image:
                    image.convert("RGB").quantize(128).save(name, format="png", optimize=True)
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise


def engineering(value: float) -> str:
    """12000000 as 12M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
