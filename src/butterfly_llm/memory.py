"""Which device to use, how much memory it has left, and refusing in one line what cannot fit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_FILES = {  # of a control group, by whether it is of version 1: limit, what is used, what of that is cached
    False: ("memory.max", "memory.current", "inactive_file"),
    True: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def format_bytes(nbytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    raise AssertionError


def pick_device(name: str) -> torch.device:
    """auto (a GPU where there is one), cpu, cuda or cuda:N; ValueError for others and where it is missing."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r}: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"device {name!r}: {count or 'no'} CUDA devices here; use cpu or auto")
    if device == torch.device("cuda"):  # not all functions of torch.cuda do without a number
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def available_bytes(device: str = "cpu") -> int | None:
    """Free bytes of the machine or of one CUDA device; None where the system does not tell."""
    if device.startswith("cuda"):
        import torch

        where = pick_device(device)
        free, total = torch.cuda.mem_get_info(where)
        # What this process has reserved but does not use is free to it; it may also have a limit of its own.
        held = torch.cuda.memory_allocated(where)
        free += torch.cuda.memory_reserved(where) - held
        return min(free, int(torch.cuda.get_per_process_memory_fraction(where) * total) - held)
    known = [free for free in (_machine_bytes(), _container_bytes()) if free is not None]
    return min(known, default=None)


def _machine_bytes() -> int | None:
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _container_bytes(
    groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """What the limits of Linux control groups (a container, a batch job) leave; None where there is none.

    A group has at most what each group above it has. Files read once and not in use count as free.
    """
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return None
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        old = bool(controllers)  # version 1
        top = root / "memory" if old else root
        limit, used, cached = _FILES[old]
        place = top / path.lstrip("/")
        for group in (place, *place.parents):
            if not group.is_relative_to(top):
                break
            try:
                stat = dict(each.split() for each in (group / "memory.stat").read_text().splitlines())
                most, now = ((group / name).read_text().strip() for name in (limit, used))
                left.append(max(0, int(most) - int(now) + int(stat.get(cached, 0))))
            except (OSError, ValueError):  # the path is that outside the container; or "max", no limit
                continue
    return min(left, default=None)


def require(nbytes: int, device: str, what: str, advice: str) -> None:
    """Raise ValueError (what, how much is needed, how much is free, what to lower) if `nbytes` cannot fit."""
    free = available_bytes(device)
    if free is not None and nbytes > free:
        raise ValueError(
            f"{what} needs {format_bytes(nbytes)} on {device}, {format_bytes(free)} are free: {advice}"
        )
