"""How much memory is left: what the limits of a container leave, not what the machine has."""

from __future__ import annotations

from pathlib import Path

import pytest

from butterfly_llm import memory


def group(folder: Path, limit: str, used: int, cached: int, *, old: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if old else ("memory.max", "memory.current")
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    key = "total_inactive_file" if old else "inactive_file"
    (folder / "memory.stat").write_text(f"anon 1\n{key} {cached}\nslab 3\n")


def left(tmp_path: Path, lines: str) -> int | None:
    groups = tmp_path / "cgroup"
    groups.write_text(lines)
    return memory._container_bytes(groups, tmp_path / "fs")


def test_a_group_has_at_most_what_those_above_it_have(tmp_path: Path) -> None:
    group(tmp_path / "fs" / "job" / "step", "9000", 1000, 200)
    group(tmp_path / "fs" / "job", "5000", 2000, 500)
    group(tmp_path / "fs", "max", 10**6, 0)
    group(tmp_path, "1", 0, 0)  # outside
    assert left(tmp_path, "0::/job/step\n") == 5000 - 2000 + 500
    (tmp_path / "fs" / "job" / "memory.max").write_text("max\n")
    assert left(tmp_path, "0::/job/step\n") == 9000 - 1000 + 200
    (tmp_path / "fs" / "job" / "step" / "memory.max").write_text("max\n")
    assert left(tmp_path, "0::/job/step\n") is None


def test_a_path_that_only_the_host_knows_stands_for_the_root(tmp_path: Path) -> None:
    group(tmp_path / "fs", "7000", 8000, 0)
    assert left(tmp_path, "0::/host/container\n") == 0


def test_version_1(tmp_path: Path) -> None:
    group(tmp_path / "fs" / "memory" / "box", "6000", 1000, 100, old=True)
    group(tmp_path / "fs" / "memory", str(2**63 - 4096), 5000, 0, old=True)
    assert left(tmp_path, "5:cpuset:/\n4:hugetlb,memory:/box\n0::/\n") == 5100


def test_without_groups_the_machine_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory._container_bytes(tmp_path / "none", tmp_path) is None
    monkeypatch.setattr(memory, "_machine_bytes", lambda: 300)
    monkeypatch.setattr(memory, "_container_bytes", lambda: None)
    assert memory.available_bytes() == 300
    monkeypatch.setattr(memory, "_container_bytes", lambda: 200)
    assert memory.available_bytes() == 200
    monkeypatch.setattr(memory, "_machine_bytes", lambda: None)
    assert memory.available_bytes() == 200
