"""What the server counts, and the text form of Prometheus."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

Samples = Mapping[str, float] | float
"""One value, or one for each label set such as `{code="200"}`."""


@dataclass
class Histogram:
    """How many values lie at or below each bound; seconds."""

    bounds: tuple[float, ...] = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
    counts: list[int] = field(default_factory=list)  # per bound alone, and one beyond the last
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def samples(self) -> dict[str, float]:
        """By the ends of their names: buckets, each with all below it, sum and count."""
        found: dict[str, float] = {}
        below = 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            below += count
            found[f'_bucket{{le="{bound}"}}'] = below
        return {**found, "_sum": self.total, "_count": below}


@dataclass
class Counters:
    """Sums since the start; only the engine's thread writes them."""

    read: int = 0
    written: int = 0
    reading_seconds: float = 0.0
    writing_seconds: float = 0.0
    steps: Histogram = field(default_factory=Histogram)
    finished: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("stop", "length", "context", "cancelled", "failed"), 0)
    )


def exposition(families: Iterable[tuple[str, str, str, Samples]]) -> str:
    """Families of (name, kind, what it is, samples) as Prometheus reads them, under butterfly_name."""
    lines: list[str] = []
    for name, kind, text, samples in families:
        lines += (f"# HELP butterfly_{name} {text}", f"# TYPE butterfly_{name} {kind}")
        values = samples if isinstance(samples, Mapping) else {"": samples}
        lines += (f"butterfly_{name}{end} {value:.10g}" for end, value in values.items())
    return "\n".join(lines) + "\n"
