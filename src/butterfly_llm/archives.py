"""The files of a directory, an archive or a single file, in sorted order; nothing is unpacked by name."""

import bz2
import gzip
import io
import lzma
import os
import posixpath
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, BinaryIO, cast

# Longest first: a name is cut at the first suffix that fits.
ARCHIVE_SUFFIXES = (
    ".tar.gz", ".tar.xz", ".tar.bz2", ".tar.zst", ".tgz", ".crate", ".tar", ".zip", ".whl", ".jar", ".deb",
    ".gz", ".xz", ".bz2", ".zst",
)  # fmt: skip
ZIP_SUFFIXES = (".zip", ".whl", ".jar")
MAX_UNPACKED = 1 << 34  # bytes of one archive, against decompression bombs

READ_ERRORS = (
    OSError, EOFError, zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error,
    NotImplementedError, RuntimeError,
)  # fmt: skip
"""What opening an archive or reading a damaged member may raise."""


@dataclass(frozen=True, slots=True)
class Member:
    """One file: `path` relative to the project with `/`, `size` in bytes, `read()` its bytes.

    `skip` says why there is nothing to read (a link, a device, an encrypted entry), else ''. Read a member
    before taking the next one: its archive is closed with the iterator.
    """

    path: str
    size: int
    read: Callable[[], bytes]
    skip: str = ""


def archive_suffix(path: Path) -> str:
    """The archive suffix of a file name, or ''."""
    name = path.name.lower()
    return next((suffix for suffix in ARCHIVE_SUFFIXES if name.endswith(suffix)), "")


def members(
    path: Path, *, exclude_dirs: Collection[str] = (), avoid: Collection[Path] = ()
) -> Iterator[Member]:
    """Files under `path`, sorted by relative path, none below a directory in `exclude_dirs`.

    `avoid` are resolved directories left out (the output, when it lies inside the input). Links below `path`
    are never followed. In archives the directories that all files share are cut. Raises ValueError for
    a missing path or a damaged archive.
    """
    if path.is_dir():
        found = _directory(path, exclude_dirs, avoid)
    elif not path.exists():
        raise ValueError(f"{path}: no such file or directory; check the path")
    elif not path.is_file():
        raise ValueError(f"{path}: not a regular file; give a file, a directory or an archive")
    elif suffix := archive_suffix(path):
        found = _archive(path, suffix, exclude_dirs)
    else:
        found = iter([Member(path.name, path.stat().st_size, path.read_bytes)])
    return found


def _directory(root: Path, exclude_dirs: Collection[str], avoid: Collection[Path]) -> Iterator[Member]:
    failed: list[OSError] = []
    files: list[str] = []
    for folder, subfolders, names in os.walk(root, onerror=failed.append):
        here = Path(folder)
        subfolders[:] = [
            name for name in subfolders
            if name not in exclude_dirs and here.resolve() / name not in avoid
        ]  # fmt: skip
        links = [name for name in subfolders if (here / name).is_symlink()]
        files += [(here / name).relative_to(root).as_posix() for name in [*names, *links]]
    for failure in failed:
        yield Member(Path(failure.filename).relative_to(root).as_posix(), 0, bytes, "unreadable")
    for name in sorted(files):
        file = root / name
        try:
            status = file.lstat()
        except OSError:
            yield Member(name, 0, bytes, "unreadable")
            continue
        if stat.S_ISLNK(status.st_mode):
            yield Member(name, 0, bytes, "symbolic link")
        elif not stat.S_ISREG(status.st_mode):
            yield Member(name, 0, bytes, "not a regular file")
        else:
            yield Member(name, status.st_size, file.read_bytes)


def _archive(path: Path, suffix: str, exclude_dirs: Collection[str]) -> Iterator[Member]:
    try:
        if suffix in ZIP_SUFFIXES:
            with zipfile.ZipFile(path) as archive:
                yield from _listed([_zip_member(archive, info) for info in archive.infolist()], exclude_dirs)
        elif suffix == ".deb":
            with path.open("rb") as file:
                name, packed = _deb_data(file)
                with _unpacked(packed, posixpath.splitext(name)[1]) as spool:
                    yield from _tar(spool, exclude_dirs)
        elif ".tar" in suffix or suffix in (".tgz", ".crate"):
            with path.open("rb") as file, _unpacked(file, _compression(suffix)) as spool:
                yield from _tar(spool, exclude_dirs)
        else:
            with path.open("rb") as file, _unpacked(file, suffix) as spool:
                yield Member(path.name[: -len(suffix)], spool.seek(0, io.SEEK_END), partial(_read_all, spool))
    except READ_ERRORS as failure:
        said = " ".join(str(failure).split())
        raise ValueError(f"{path}: cannot read as an archive ({said}); repair or leave it out") from None


def _compression(suffix: str) -> str:
    return ".gz" if suffix in (".tgz", ".crate") else suffix.removeprefix(".tar")


def _tar(spool: BinaryIO, exclude_dirs: Collection[str]) -> Iterator[Member]:
    with tarfile.open(fileobj=spool, mode="r:") as tar:
        yield from _listed([_tar_member(tar, info) for info in tar if not info.isdir()], exclude_dirs)


def _listed(found: list[Member | None], exclude_dirs: Collection[str]) -> Iterator[Member]:
    """Sort members and cut the leading directories that all of them share."""
    kept = sorted((member for member in found if member), key=lambda member: member.path)
    folders = [posixpath.dirname(member.path).split("/") for member in kept]
    shared = posixpath.commonprefix(folders) if folders else []
    for member in kept:
        parts = member.path.split("/")
        if not any(part in exclude_dirs for part in parts[:-1]):
            yield Member("/".join(parts[len(shared) :]) or member.path, member.size, member.read, member.skip)


def _clean(name: str) -> str:
    return posixpath.normpath(name.replace("\\", "/")).lstrip("/")


def _zip_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member | None:
    if not info.filename or info.is_dir():
        return None
    mode = info.external_attr >> 16
    skip = "symbolic link" if stat.S_ISLNK(mode) else "encrypted" if info.flag_bits & 1 else ""
    return Member(_clean(info.filename), info.file_size, partial(archive.read, info), skip)


def _tar_member(tar: tarfile.TarFile, info: tarfile.TarInfo) -> Member:
    def read() -> bytes:
        return cast(IO[bytes], tar.extractfile(info)).read()

    linked = "symbolic link" if info.issym() or info.islnk() else "not a regular file"
    return Member(_clean(info.name), info.size, read, "" if info.isreg() else linked)


def _read_all(spool: BinaryIO) -> bytes:
    spool.seek(0)
    return spool.read()


def _deb_data(file: BinaryIO) -> tuple[str, BinaryIO]:
    """The data.tar.* of a Debian package: an `ar` archive, 60-byte headers, members padded to even size."""
    if file.read(8) != b"!<arch>\n":
        raise tarfile.ReadError("not a Debian package")
    while len(header := file.read(60)) == 60:
        name = header[:16].decode("latin-1").rstrip(" /")
        if not header[48:58].strip().isdigit():
            raise tarfile.ReadError("a member of the package has no size")
        size = int(header[48:58])
        if name.startswith("data.tar"):
            return name, io.BytesIO(file.read(size))
        file.seek(size + size % 2, io.SEEK_CUR)
    raise tarfile.ReadError("no data.tar in the package")


@contextmanager
def _unpacked(packed: BinaryIO, compression: str) -> Iterator[BinaryIO]:
    """The decompressed bytes as an anonymous temporary file, so that sorted access needs no memory."""
    if compression in ("", ".tar"):
        yield packed
        return
    with tempfile.TemporaryFile() as spool, _decompressed(packed, compression) as stream:
        while block := _read_block(stream):
            spool.write(block)
            if spool.tell() > MAX_UNPACKED:
                raise OSError(f"unpacks to more than {MAX_UNPACKED >> 30} GiB")
        spool.seek(0)
        yield cast(BinaryIO, spool)


def _decompressed(packed: BinaryIO, compression: str) -> IO[bytes]:
    match compression:
        case ".gz":
            return cast(IO[bytes], gzip.GzipFile(fileobj=packed))
        case ".xz":
            return lzma.open(packed)
        case ".bz2":
            return bz2.open(packed)
        case ".zst":
            try:
                import zstandard
            except ImportError:
                raise OSError("zstd needs one more package: pip install 'butterfly-llm[zstd]'") from None
            return cast(IO[bytes], zstandard.ZstdDecompressor().stream_reader(packed))
    raise OSError(f"unknown compression {compression!r}")


def _read_block(stream: IO[bytes]) -> bytes:
    try:
        return stream.read(1 << 20)
    except READ_ERRORS:
        raise
    except Exception as failure:  # zstandard's own error type, known only where it is installed
        raise OSError(str(failure)) from None
