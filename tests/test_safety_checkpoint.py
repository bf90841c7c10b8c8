"""Checkpoints from strangers, damaged ones, and disks that fill up: refused in one line, nothing lost.

Rows 5, 6 and 7 of docs/robustness.md.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from butterfly_llm.checkpoint import (
    checkpoint_path,
    checkpoints,
    load_pretrained,
    load_training,
    newest_training,
    save_model,
    save_training,
)
from butterfly_llm.config import ButterflyConfig
from butterfly_llm.folder import MANIFEST, MAX_JSON
from butterfly_llm.state import load_state, save_state
from conftest import random_model

CONFIG = ButterflyConfig.preset("micro", hidden_size=32, intermediate_size=64, num_passes=1, carry_size=8)
SHARD = "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"


def save_run(run: Path, *steps: int) -> Path:
    """Checkpoints of a run as training writes them; -> the newest."""
    model = random_model(CONFIG)
    for step in steps:
        tensors = [("random", torch.arange(99, dtype=torch.uint8)), ("optimizer.x", torch.randn(30, 5))]
        save_training(model, checkpoint_path(run, step), tensors=tensors, values={"step": step})
    return checkpoints(run)[0]


def forge(folder: Path, name: str, data: bytes) -> None:
    """Put a file in and give the manifest its size and sha256, as somebody with bad intentions would."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (folder / name).write_bytes(data)


def edit(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((folder / name).read_text())
    change(values)
    forge(folder, name, json.dumps(values).encode())


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, "config.json", lambda c: c["model"].update(changes))


class Payload:
    """Unpickled, it would leave a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("code-has-run",)


def header(**tensors: Any) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


def many_tensors(size: int) -> bytes:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    return header(**{f"t{i}": entry for i in range(size // len(json.dumps({"t12345": entry})))})


def sparse(folder: Path, listed: bool) -> None:
    """A shard of a terabyte that takes no room on the disk; the manifest says so, or does not."""
    with (folder / SHARD).open("r+b") as file:
        file.truncate(1 << 40)
    if listed:
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["files"][SHARD]["bytes"] = 1 << 40
        (folder / MANIFEST).write_text(json.dumps(manifest))


def point_to(name: str) -> Callable[[Path], None]:
    def change(index: dict[str, Any]) -> None:
        index["weight_map"][min(index["weight_map"])] = name

    return lambda folder: edit(folder, INDEX, change)


DEEP = b"[" * 1_000_000
WIDE = b'{"a": [' + b",".join([b"{}"] * ((MAX_JSON - 10) // 3)) + b"]}"
HOSTILE: dict[str, Callable[[Path], object]] = {
    "pickle as shard": lambda f: forge(f, SHARD, pickle.dumps(Payload())),
    "pickle of an old protocol": lambda f: forge(f, SHARD, pickle.dumps(Payload(), protocol=0)),
    "pickle as config": lambda f: forge(f, "config.json", pickle.dumps(Payload())),
    "path out of the folder in the index": point_to("../../secret.safetensors"),
    "absolute path in the index": point_to("/etc/passwd"),
    "path out of the folder in the manifest": lambda f: (f / MANIFEST).write_text(
        (f / MANIFEST).read_text().replace(SHARD, "../" + SHARD)
    ),
    "a trillion elements in a shard": lambda f: forge(
        f, SHARD, header(x={"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]})
    ),
    "a trillion elements of no bytes": lambda f: forge(
        f, SHARD, header(x={"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 0]}) + b"\0" * 99
    ),
    "elements beyond 64 bits": lambda f: forge(
        f, SHARD, header(x={"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}) + b"\0" * 4
    ),
    "a header of 2**63 bytes": lambda f: forge(f, SHARD, struct.pack("<Q", 2**63) + b"{}"),
    "a shard of tensors without elements": lambda f: forge(f, SHARD, many_tensors(4_000_000)),
    "a width of a trillion": config(hidden_size=10**12),
    "a billion passes": config(num_passes=10**9),
    "the largest sizes": config(hidden_size=2**20, intermediate_size=2**20, num_passes=40, num_levels=12),
    "large sizes": config(hidden_size=2**14, intermediate_size=2**14),
    "a number of 5,000 digits": lambda f: forge(
        f, "config.json", (f / "config.json").read_bytes().replace(b": 32", b": 3" + b"2" * 5000)
    ),
    "a terabyte in the manifest": lambda f: sparse(f, True),
    "a terabyte on the disk": lambda f: sparse(f, False),
    "a config of a gigabyte": lambda f: os.truncate(f / "config.json", 1 << 30),
    "a manifest of a gigabyte": lambda f: os.truncate(f / MANIFEST, 1 << 30),
    "deep JSON as config": lambda f: forge(f, "config.json", DEEP),
    "deep JSON as index": lambda f: forge(f, INDEX, DEEP),
    "deep JSON as manifest": lambda f: (f / MANIFEST).write_bytes(DEEP),
    "wide JSON as config": lambda f: forge(f, "config.json", WIDE),
    "wide JSON as manifest": lambda f: (f / MANIFEST).write_bytes(WIDE),
    "deep JSON as training state": lambda f: forge(f, "state.json", DEEP),
}


def attempt(folder: Path) -> tuple[str, int]:
    """Load in a process of its own: (what was said, bytes by which its memory grew)."""
    reader, writer = os.pipe()
    process = os.fork()
    if process:
        os.close(writer)
        with os.fdopen(reader) as pipe:
            said, grown = json.loads(pipe.read())
        os.waitpid(process, 0)
        return said, grown
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    said = "loaded"
    try:
        load_training(folder)
    except Exception as failure:
        said = f"{type(failure).__name__}: {failure}"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    os.write(writer, json.dumps([said, grown]).encode())
    os._exit(0)


def hostile_table(folder: Path) -> dict[str, tuple[str, int]]:
    """Every hostile checkpoint above, tried: for the test below, in a process with little else in it."""
    whole = save_run(folder / "run", 7)
    load_training(whole)  # what is imported late does not count
    table = {}
    for name, change in HOSTILE.items():
        copy = folder / "copy"
        shutil.copytree(whole, copy)
        change(copy)
        table[name] = attempt(copy)
        shutil.rmtree(copy)
    return table


def test_hostile_checkpoints_run_no_code_and_take_no_memory(tmp_path: Path) -> None:
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here.parent / 'src'}:{here}", "OMP_NUM_THREADS": "1"}
    program = (
        "import json, pathlib, test_safety_checkpoint as t; "
        "print(json.dumps(t.hostile_table(pathlib.Path('.'))))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = json.loads(done.stdout)
    assert table.keys() == HOSTILE.keys()
    for name, (said, grown) in table.items():
        print(f"{name:42} {grown / 1e6:6.1f} MB  {said}")
    for name, (said, grown) in table.items():
        assert said.startswith("ValueError: ") and "\n" not in said, (name, said)
        assert grown < 100e6, (name, grown)
    assert not (tmp_path / "code-has-run").exists()


def truncate(data: bytes, moments: random.Random) -> bytes:
    return data[: moments.randrange(len(data) - 1)]  # the last byte of a manifest is a newline, and idle


def flip(data: bytes, moments: random.Random) -> bytes:
    place = moments.randrange(8 * len(data))
    changed = bytearray(data)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


@pytest.mark.parametrize("damage", [truncate, flip])
def test_fifty_damages_are_refused_by_file_and_cause_and_the_one_before_is_taken(
    tmp_path: Path, damage: Callable[[bytes, random.Random], bytes]
) -> None:
    newest = save_run(tmp_path, 8, 9)
    names = sorted(path.name for path in newest.iterdir())
    moments = random.Random(0)
    causes = (
        "is cut off", "is damaged", "is not JSON", "is missing", "lists no files", "must give bytes",
        "is not in", "plain file name", "format version", "is not of a", "without training state", "has ",
    )  # fmt: skip
    refused = 0
    for number in range(50):
        path = newest / names[number % len(names)]
        data = path.read_bytes()
        path.write_bytes(damage(data, moments))
        with pytest.raises(ValueError) as caught:
            load_training(newest)
        said = str(caught.value)
        assert "\n" not in said and any(cause in said for cause in causes), said
        assert path.name in said or MANIFEST in said, (path.name, said)
        with pytest.warns(UserWarning, match="checkpoint skipped: .*step-000000009"):
            state = newest_training(tmp_path)
        assert state is not None and state.values == {"step": 8}
        path.write_bytes(data)
        refused += 1
    assert refused == 50
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_training(newest).values == {"step": 9}  # the last repair was complete


@pytest.mark.parametrize("existing", [False, True])
def test_a_disk_that_fills_up_while_saving_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    """Fails when the first file goes to the disk, the second, ... until all have."""
    target = tmp_path / "model"
    if existing:
        save_model(random_model(CONFIG), target, shard_bytes=100_000)
    old = load_pretrained(target).head.weight if existing else None
    countdown, real = 0, os.fsync

    def full(descriptor: int) -> None:
        nonlocal countdown
        countdown -= 1
        if countdown == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    failures = 0
    for place in range(1, 100):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            countdown = place
            try:
                save_model(random_model(CONFIG, seed=1), target, shard_bytes=100_000)
                break
            except OSError as failure:
                failures += 1
                assert failure.errno == errno.ENOSPC
                assert [p.name for p in tmp_path.iterdir()] == (["model"] if target.exists() else [])
        if old is not None:
            assert target.exists()
            if not torch.equal(load_pretrained(target).head.weight, old):
                break  # all files were on the disk, and only the folder's name was still to follow
    assert failures >= 7  # four shards, two JSON files, the manifest
    assert torch.equal(load_pretrained(target).head.weight, random_model(CONFIG, seed=1).head.weight)


def test_a_file_that_cannot_grow_is_reported_with_its_folder(tmp_path: Path) -> None:
    """The limit of the operating system on the size of a file; as on a full disk, writing fails."""
    save_model(random_model(CONFIG), tmp_path / "model")
    before = load_pretrained(tmp_path / "model").head.weight
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"File too large: '{tmp_path}'"):
            save_model(random_model(CONFIG, seed=1), tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(before, load_pretrained(tmp_path / "model").head.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_killed_between_two_renames_the_old_model_is_found_and_strays_are_swept(tmp_path: Path) -> None:
    target = tmp_path / "model"
    save_model(random_model(CONFIG), target)
    old = load_pretrained(target).head.weight
    target.rename(tmp_path / ".model-123-replaced.partial")
    (tmp_path / ".model-123.partial").mkdir()
    (tmp_path / ".model-2-99.partial").mkdir()  # of a folder named model-2
    for path in (target, tmp_path):
        assert torch.equal(load_pretrained(path).head.weight, old)

    cache = random_model(CONFIG).new_cache()
    save_state(cache, tmp_path / "state", model=random_model(CONFIG))
    (tmp_path / "state").rename(tmp_path / ".state-123-replaced.partial")
    assert load_state(tmp_path / "state", random_model(CONFIG)).position == 0

    with pytest.raises(ValueError, match="dtype"):
        save_model(random_model(CONFIG), target, dtype="int4")  # type: ignore[arg-type]
    save_model(random_model(CONFIG, seed=1), target)
    assert not torch.equal(load_pretrained(target).head.weight, old)
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == [".model-2-99.partial", ".state-123-replaced.partial", "model"]


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bytes of JSON, of which at most"):
        save_model(random_model(CONFIG), tmp_path / "model", extra={"log": "x" * MAX_JSON})
    assert list(tmp_path.iterdir()) == []
