"""A folder of safetensors shards and JSON under a sha256 manifest, written whole or not at all; never pickle.

Models, training states and stream states are such folders. One appears under its name only when all of it is
on the disk. Each file is read once, checked against the manifest, and only then parsed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

FORMAT_VERSION = 1
MODEL, STATE = "butterfly-llm", "butterfly-llm-state"
MANIFEST = "MANIFEST.json"
SHARD_BYTES = 15 * 2**20
MAX_JSON = 3 * 2**20  # bytes; parsed, the worst of this size takes about 90 MB

_NOUNS = {MODEL: "checkpoint", STATE: "saved state"}
_REPLACED = "-replaced.partial"
_SLACK = 2**21  # bytes by which files may miss the size that their header makes them
_RENEW = "; fetch or copy the folder again"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Pickles of protocol 2 and above, and the zip archives that torch.save writes around one.
_PICKLE_MAGIC = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")


def json_bytes(value: Any) -> bytes:
    """A JSON file; ValueError where it would be too large to be read back."""
    data = (json.dumps(value, indent=1) + "\n").encode()
    if len(data) > MAX_JSON:
        raise ValueError(f"{len(data):,} bytes of JSON, of which at most {MAX_JSON:,} are read back")
    return data


def shards(kind: str, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> Iterator[tuple[str, bytes]]:
    """Named tensors as files of at most `shard_bytes` of tensors each, then their index."""
    items = list(tensors)
    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in items:
        if groups[-1] and size + tensor.nbytes > shard_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = f"{kind}-{number:05d}-of-{len(groups):05d}.safetensors"
        weight_map.update(dict.fromkeys(group, file))
        yield file, safetensors.torch.save({name: t.detach().cpu().contiguous() for name, t in group.items()})
    total = sum(tensor.nbytes for _, tensor in items)
    yield (
        f"{kind}.safetensors.index.json",
        json_bytes({"metadata": {"total_size": total}, "weight_map": weight_map}),
    )


def check_target(target: Path, format: str) -> None:
    """ValueError where `write_folder` would replace something else than a folder of the same format."""
    if target.exists() and _format_of(target) != format and (target.is_file() or any(target.iterdir())):
        noun = {MODEL: "model"}.get(format, _NOUNS[format])
        raise ValueError(f"{target}: holds something else than a {noun}; choose another folder")


def write_folder(target: Path, files: Iterable[tuple[str, bytes]], format: str = MODEL) -> None:
    """Write files and their manifest beside `target`, then rename the finished folder into its place."""
    check_target(target, format)
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    partial = target.parent / f".{target.name}-{os.getpid()}.partial"
    replaced = target.parent / f".{target.name}-{os.getpid()}{_REPLACED}"
    partial.mkdir()
    try:
        listed = {}
        for name, data in files:
            _write_file(partial / name, data)
            listed[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest = {"format": format, "version": FORMAT_VERSION, "files": listed}
        _write_file(partial / MANIFEST, json_bytes(manifest))
        _sync(partial)
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
    except BaseException:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    try:
        _sync(target.parent)
    finally:
        shutil.rmtree(replaced, ignore_errors=True)


def standing(target: Path) -> Path:
    """`target`, or the whole folder that stood there before a writer was killed between its two renames."""
    if target.exists():
        return target
    moved = (path for path in _leftovers(target) if path.name.endswith(_REPLACED))
    return next((path for path in moved if (path / MANIFEST).is_file()), target)


def _sweep(target: Path) -> None:
    """Delete what killed writers of `target` left beside it; what they had moved away comes back."""
    if (moved := standing(target)).exists() and moved != target:
        moved.rename(target)
    for path in _leftovers(target):
        shutil.rmtree(path)


def _leftovers(target: Path) -> list[Path]:
    """Folders beside `target` that a writer of it has made and not removed."""
    ours = re.compile(rf"\.{re.escape(target.name)}-\d+(-replaced)?\.partial")
    return [path for path in target.parent.glob(".*.partial") if ours.fullmatch(path.name)]


def _format_of(folder: Path) -> object:
    """What the manifest in a folder says it is; None where there is none that can be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return manifest.get("format") if isinstance(manifest, dict) else None


def _write_file(path: Path, data: bytes) -> None:
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as failure:  # of a full disk: Python does not say where
        raise OSError(failure.errno, failure.strerror, str(path.parent.parent)) from None


def _sync(directory: Path) -> None:
    """Make names in a directory durable, where the system can."""
    if os.name == "posix":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Folder:
    """A folder that `write_folder` made; whatever is read from it has passed the manifest."""

    def __init__(self, path: Path, format: str = MODEL) -> None:
        self.path, self.format = path, format
        noun = _NOUNS[format]
        self.manifest: dict[str, dict[str, Any]] = {}
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such {noun}")
        if path.is_file():
            with path.open("rb") as file:
                self._refuse_pickle(path.name, file.read(4))
            raise ValueError(f"{path}: a file; give the folder with {MANIFEST}")
        if not (path / MANIFEST).is_file():
            raise ValueError(f"{path}: no {noun} ({MANIFEST} is missing)")
        self._check_json_size(MANIFEST, (path / MANIFEST).stat().st_size)
        manifest = self._parse(MANIFEST, (path / MANIFEST).read_bytes())
        self.check_format(MANIFEST, manifest)
        files = manifest.get("files")
        if not isinstance(files, dict):
            raise ValueError(f"{path}: {MANIFEST} lists no files")
        for name, entry in files.items():
            self._check_name(name, MANIFEST)
            types = {key: type(value) for key, value in entry.items()} if isinstance(entry, dict) else {}
            if types != {"bytes": int, "sha256": str} or entry["bytes"] < 0:
                raise ValueError(f"{path}: {MANIFEST} must give bytes and sha256 of {name}")
        self.manifest = files

    def read(self, name: str) -> bytes:
        """The bytes of a file, of the size and sha256 that the manifest says."""
        if name not in self.manifest:
            raise ValueError(f"{self.path}: {name} is not in {MANIFEST}")
        size, digest = self.manifest[name]["bytes"], self.manifest[name]["sha256"]
        try:
            with (self.path / name).open("rb") as file:
                found = os.fstat(file.fileno()).st_size
                self._refuse_pickle(name, file.read(4))
                file.seek(0)
                data = file.read() if found == size else b""
        except FileNotFoundError:
            raise ValueError(f"{self.path}: {name} is missing{_RENEW}") from None
        if found != size:
            cut = "is cut off at" if found < size else "has"
            raise ValueError(f"{self.path}: {name} {cut} {found:,} bytes, {MANIFEST} says {size:,}{_RENEW}")
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(
                f"{self.path}: {name} is damaged (its sha256 is not the one in {MANIFEST}){_RENEW}"
            )
        return data

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object."""
        if name in self.manifest:
            self._check_json_size(name, self.manifest[name]["bytes"])
        return self._parse(name, self.read(name))

    def check_sizes(self, kind: str, low: int, high: int) -> None:
        """ValueError where the tensors of the files `kind`-* cannot have between `low` and `high` bytes.

        To be asked before making room for them and reading: what is small on the disk then takes little
        memory, and what is large is not read for something small.
        """
        size = sum(entry["bytes"] for name, entry in self.manifest.items() if name.startswith(f"{kind}-"))
        if not low - _SLACK <= size <= high + high // 4 + _SLACK:
            raise ValueError(
                f"{self.path}: the {kind} files have {size:,} bytes, by the header it should be {low:,}"
                + (f" to {high:,}" if high > low else "")
            )

    def tensors(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """All tensors of the files `kind`-*, one file in memory at a time."""
        index_name = f"{kind}.safetensors.index.json"
        weight_map = self.json(index_name).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{self.path}: {index_name} has no weight_map")
        by_file: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            self._check_name(file, index_name)
            if not file.startswith(f"{kind}-"):
                raise ValueError(f"{self.path}: {index_name} names {file!r}, which is no {kind} file")
            by_file.setdefault(file, set()).add(name)
        for file, names in by_file.items():
            try:
                tensors = safetensors.torch.load(self.read(file))
            except SafetensorError as failure:
                said = " ".join(str(failure).split())
                raise ValueError(f"{self.path}: {file} is not safetensors ({said:.200})") from None
            if different := sorted(names ^ tensors.keys()):
                where = "index" if different[0] in names else "file"
                raise ValueError(f"{self.path}: {different[0]!r:.80} of {file} is in the {where} only")
            yield from tensors.items()

    def _parse(self, name: str, data: bytes) -> dict[str, Any]:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            raise ValueError(
                f"{self.path}: {name} is not JSON; it is damaged or no {_NOUNS[self.format]}"
            ) from None
        if not isinstance(value, dict):
            raise ValueError(f"{self.path}: {name} must be a JSON object")
        return value

    def check_format(self, name: str, values: Mapping[str, Any]) -> None:
        """ValueError unless a JSON header is of this format and version."""
        if values.get("format") != self.format:
            raise ValueError(f"{self.path}: {name} is not of a butterfly-llm {_NOUNS[self.format]}")
        if values.get("version") != FORMAT_VERSION:
            version = values.get("version")
            raise ValueError(
                f"{self.path}: {name} has format version {version!r:.40}, this program reads {FORMAT_VERSION}"
            )

    def _check_json_size(self, name: str, size: int) -> None:
        if size > MAX_JSON:
            raise ValueError(f"{self.path}: {name} has {size:,} bytes, at most {MAX_JSON:,} are read")

    def _check_name(self, name: object, where: str) -> None:
        """Only plain file names: nothing in a checkpoint may point out of its folder."""
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
            raise ValueError(f"{self.path}: {where} names {name!r:.200}, which is not a plain file name")

    def _refuse_pickle(self, name: str, head: bytes) -> None:
        if head.startswith(_PICKLE_MAGIC):
            raise ValueError(
                f"{self.path}: {name} is a pickle, which can run code when it is opened; only safetensors "
                "are read"
            )
