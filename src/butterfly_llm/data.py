"""Files to corpora: which of them become text, and how they are laid out.

`prepare` writes `train.bin`, `val.bin` (raw ids, one byte each) and `manifest.json`; `corpus` reads them. One
project is one document: its files in sorted order, each under a `file_header` line; NUL (id 0) stands between
documents and nowhere else.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from .archives import READ_ERRORS, Member, archive_suffix, members
from .corpus import FORMAT_VERSION, MANIFEST, SEPARATOR, SPLITS, Document, Split
from .licenses import claim_rank, license_claim, may_state_license
from .near_duplicates import NearDuplicates
from .text import BinaryFileError, Encoded, Encoding, Errors, decode_source, encode_counted

_STAGE = ".prepare-"

EXCLUDED_DIRS = frozenset(
    {".git", ".hg", ".svn", ".tox", ".venv", "__pycache__", "node_modules"}
    | {"_vendor", "third_party", "vendor", "vendored"}
)
EXCLUDED_FILES = ("*.min.js", "*.min.css", "*.map", "*.lock", "package-lock.json")


@dataclass(frozen=True, slots=True)
class FileRules:
    """Which files become text, and how.

    Patterns are shell globs on the path inside the project or its last part; an empty `include` takes all.
    Files outside `min_bytes..max_bytes`, with a line above `max_line` characters, or where `errors="replace"`
    would touch more than the share `max_replaced`, are skipped. `refuse(path, text)` may return a reason to
    skip a file, or ''.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = EXCLUDED_FILES
    exclude_dirs: Collection[str] = EXCLUDED_DIRS
    min_bytes: int = 1
    max_bytes: int = 16 << 20
    max_line: int = 10_000
    max_replaced: float = 0.005
    encoding: Encoding = "latin-1"
    errors: Errors = "replace"
    refuse: Callable[[str, str], str] | None = None

    def reason_by_name(self, member: Member) -> str:
        """Why `member` is skipped before reading it, or ''."""
        if member.skip:
            return member.skip
        if _matches(member.path, self.exclude) or (self.include and not _matches(member.path, self.include)):
            return "excluded by name"
        if member.size < self.min_bytes:
            return "empty" if member.size == 0 else f"below {self.min_bytes} bytes"
        return f"above {self.max_bytes} bytes" if member.size > self.max_bytes else ""

    def encode(self, path: str, text: str, source: str) -> Encoded | str:
        """The file's ids, or the reason why it is skipped. Raises ValueError as `encode_counted` does."""
        if max(map(len, text.split("\n"))) > self.max_line:
            return f"line above {self.max_line} characters"
        if reason := self.refuse(path, text) if self.refuse else "":
            return reason
        encoded = encode_counted(text, source=source, encoding=self.encoding, errors=self.errors)
        if encoded.replaced > self.max_replaced * len(text):
            return f"more than {self.max_replaced:.1%} outside Latin-1"
        return encoded


@dataclass(frozen=True, slots=True)
class Project:
    """One input of `prepare` and what is special about it.

    `name` '' is taken from the path, `license` '' is looked up in the files, `rules` None means the call's.
    """

    path: Path
    name: str = ""
    license: str = ""
    rules: FileRules | None = None


@dataclass(frozen=True, slots=True)
class Skips:
    """Files left out: how many for each reason, and the first of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, path: str) -> None:
        """Count one file."""
        self.counts[reason] += 1
        self.examples.setdefault(reason, path)

    def summary(self) -> str:
        """`3 binary (first: a/b.png), 1 empty (first: c.py)`, or `none`."""
        parts = [f"{n:,} {why} (first: {self.examples[why]})" for why, n in self.counts.most_common()]
        return ", ".join(parts) or "none"


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """What `prepare` wrote. `empty` names the projects without any text."""

    out_dir: Path
    documents: tuple[Document, ...]
    characters: dict[Split, int]
    skips: Skips
    empty: tuple[str, ...]

    def lines(self) -> list[str]:
        """The report for people, one fact a line."""
        documents = [
            f"{d.split:5} {d.characters:>13,} characters {d.files:>6,} files  {d.name}  ({d.license or '?'})"
            for d in self.documents
        ]
        counts = Counter(document.split for document in self.documents)
        totals = [f"{s}: {self.characters[s]:,} characters, {counts[s]} documents" for s in SPLITS]
        replaced = sum(document.replaced for document in self.documents)
        duplicates = sum(document.duplicates for document in self.documents)
        rest = [
            f"replaced by '?': {replaced:,} characters",
            f"duplicate files dropped: {duplicates:,}",
            f"skipped: {self.skips.summary()}",
        ]
        empty = [f"without text: {', '.join(self.empty)}"] if self.empty else []
        return [*documents, *totals, *rest, *empty]


def file_header(path: str) -> bytes:
    r"""The line above each file of a document, `==> path <==\n`, as `head` and `tail` print it.

    Characters of the path outside Latin-1, and control characters, become `?`.
    """
    return f"==> {_printable(path)} <==\n".encode("latin-1", errors="replace")


def _printable(path: str) -> str:
    """Names of files may hold line breaks and what commands a terminal."""
    return "".join(char if char.isprintable() else "?" for char in path)


def project_name(path: Path) -> str:
    """The name of the project at `path`: its last part, without an archive suffix."""
    name = path.resolve().name
    suffix = archive_suffix(path) if not path.is_dir() else ""
    return name[: len(name) - len(suffix)] or name


@dataclass(slots=True)
class _Piece:
    """One accepted file: its bytes in the corpus format, and the sha256 of its characters."""

    data: bytes
    digest: bytes
    replaced: int
    source: str


def _pieces(
    path: Path, rules: FileRules, skips: Skips, claims: list[tuple[str, str]], avoid: Collection[Path]
) -> Iterator[_Piece]:
    """Accepted files under `path` in corpus order; `claims` collects (path, licence) as they are seen."""
    for member in members(path, exclude_dirs=rules.exclude_dirs, avoid=avoid):
        inside = path.is_dir() or archive_suffix(path)
        source = _printable(str(path / member.path if inside else path))
        reason = rules.reason_by_name(member)
        states_license = may_state_license(member.path) and not member.skip and member.size <= rules.max_bytes
        if reason and not states_license:
            skips.add(reason, source)
            continue
        try:
            text = decode_source(member.read(), source=source)
        except BinaryFileError:
            skips.add("binary", source)
            continue
        except READ_ERRORS:
            skips.add("unreadable", source)
            continue
        if states_license and (claim := license_claim(member.path, text)):
            claims.append((member.path, claim))
        encoded = reason or rules.encode(member.path, text, source)
        if isinstance(encoded, str):
            skips.add(encoded, source)
            continue
        ending = b"" if encoded.data.endswith(b"\n") else b"\n"
        digest = hashlib.sha256(encoded.data).digest()
        yield _Piece(file_header(member.path) + encoded.data + ending, digest, encoded.replaced, source)


class _SplitWriter:
    """Appends documents to one .bin and keeps its length and sha256."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._sha256 = hashlib.sha256()
        self.size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())  # a full disk may show only here

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self.size += len(data)

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()


def prepare(
    paths: Sequence[str | Path | Project],
    out_dir: str | Path,
    *,
    projects: Literal["paths", "children"] = "paths",
    holdout: Sequence[str] = (),
    val_fraction: float = 0.05,
    near_duplicates: float | None = None,
    rules: FileRules | None = None,
    overwrite: bool = False,
    progress: Callable[[str, int], None] | None = None,
) -> PrepareReport:
    """Turn directories, files and archives into a corpus in `out_dir`.

    Each path is one project, or, with `projects="children"`, each child of a directory is. Held out for
    validation are the projects named in `holdout`, else those whose name hashes below `val_fraction` (at
    least one of two or more). A file that occurs twice in the whole corpus is kept once, in validation first;
    with `near_duplicates` also a file that has this share of its lines, or more, in common with one that was
    kept (see `NearDuplicates`). After each file `progress(project, characters)` gets the characters written
    so far. The corpus appears under its names only when all is written.

    Raises ValueError for missing paths, no text at all, unknown `holdout` names, a corpus already there
    (unless `overwrite`), or a character outside Latin-1 under `errors="strict"`.
    """
    out = Path(out_dir)
    rules = rules or FileRules()
    near = None if near_duplicates is None else NearDuplicates(near_duplicates)
    inputs = _named(_expand(paths, projects))
    splits = _split(list(inputs), holdout, val_fraction)
    if not overwrite and any((out / name).exists() for name in (MANIFEST, "train.bin", "val.bin")):
        raise ValueError(f"{out}: already holds a corpus; choose another directory or pass --overwrite")
    existed = out.exists()
    out.mkdir(parents=True, exist_ok=True)
    for killed in out.glob(f"{_STAGE}*"):
        shutil.rmtree(killed)
    stage = Path(tempfile.mkdtemp(prefix=_STAGE, dir=out))
    try:
        report = _write(inputs, splits, stage, out, rules, near, progress)
        # Without a manifest the rest is no corpus: old and new files are never taken together.
        (out / MANIFEST).unlink(missing_ok=True)
        for name in ("train.bin", "val.bin", MANIFEST):
            os.replace(stage / name, out / name)
    except BaseException as failure:
        shutil.rmtree(stage)
        if not existed:
            out.rmdir()
        if isinstance(failure, OSError) and failure.filename is None:  # a full disk: say which
            raise OSError(failure.errno, failure.strerror, str(out)) from None
        raise
    stage.rmdir()
    return report


def _write(
    inputs: dict[str, Project],
    splits: dict[str, Split],
    stage: Path,
    out: Path,
    rules: FileRules,
    near: NearDuplicates | None,
    progress: Callable[[str, int], None] | None,
) -> PrepareReport:
    skips = Skips()
    seen: set[bytes] = set()
    documents: list[Document] = []
    empty: list[str] = []
    avoid = (out.resolve(), stage.resolve())
    with _SplitWriter(stage / "train.bin") as train, _SplitWriter(stage / "val.bin") as val:
        writers: dict[Split, _SplitWriter] = {"train": train, "val": val}
        # Validation first, so that what both sides have is taken out of training.
        for name, project in sorted(inputs.items(), key=lambda item: splits[item[0]] == "train"):
            writer = writers[splits[name]]
            claims: list[tuple[str, str]] = []
            files = duplicates = replaced = 0
            offset = writer.size + bool(writer.size)
            for piece in _pieces(project.path, project.rules or rules, skips, claims, avoid):
                if piece.digest in seen:
                    duplicates += 1
                    continue
                seen.add(piece.digest)
                if near is not None and near.seen(piece.data.partition(b"\n")[2]):
                    skips.add("near duplicate", piece.source)
                    continue
                writer.write((SEPARATOR if files == 0 and offset else b"") + piece.data)
                files += 1
                replaced += piece.replaced
                if progress:
                    progress(name, train.size + val.size)
            if not files:
                empty.append(name)
                continue
            claimed = min(claims, key=lambda claim: claim_rank(claim[0]))[1] if claims else ""
            documents.append(
                Document(
                    name=name,
                    split=splits[name],
                    offset=offset,
                    characters=writer.size - offset,
                    files=files,
                    duplicates=duplicates,
                    replaced=replaced,
                    license=project.license or claimed,
                    source=project.path.resolve().name,
                )
            )
    if not documents:
        outside = any(reason.endswith("outside Latin-1") for reason in skips.counts)
        raise ValueError(
            f"no text in {len(inputs)} input{'s' * (len(inputs) > 1)}, nothing written; "
            f"skipped: {skips.summary()}" + ("; --encoding utf-8 keeps such text" if outside else "")
        )
    manifest = {
        "format": FORMAT_VERSION,
        "encoding": rules.encoding,
        "splits": {
            split: {"characters": writer.size, "sha256": writer.hexdigest()}
            for split, writer in writers.items()
        },
        "skipped": dict(skips.counts),
        "documents": [asdict(document) for document in documents],
    }
    (stage / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    characters = {split: writer.size for split, writer in writers.items()}
    return PrepareReport(out, tuple(documents), characters, skips, tuple(empty))


def _expand(paths: Sequence[str | Path | Project], projects: Literal["paths", "children"]) -> list[Project]:
    found: list[Project] = []
    for given in paths:
        project = given if isinstance(given, Project) else Project(Path(given))
        if not project.path.exists():
            raise ValueError(f"{project.path}: no such file or directory; check the path")
        if projects == "children" and project.path.is_dir():
            children = [child for child in sorted(project.path.iterdir()) if not child.is_symlink()]
            found += [
                Project(child, rules=project.rules) for child in children if child.is_dir() or child.is_file()
            ]
        else:
            found.append(project)
    if not found:
        raise ValueError("no input; give directories, files or archives")
    return found


def _named(projects: list[Project]) -> dict[str, Project]:
    """Projects by name; a name met again gets the suffix -2, -3, ..."""
    named: dict[str, Project] = {}
    for project in projects:
        base = name = project.name or project_name(project.path)
        count = 1
        while name in named:
            count += 1
            name = f"{base}-{count}"
        named[name] = project
    return named


def _split(names: list[str], holdout: Sequence[str], val_fraction: float) -> dict[str, Split]:
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}; give a share from 0 up to, not including, 1")
    if unknown := sorted(set(holdout) - set(names)):
        raise ValueError(f"holdout {unknown[0]!r} is not a project; choose from {', '.join(sorted(names))}")
    if holdout:
        held = set(holdout)
    else:
        ranked = sorted(names, key=_hash_fraction)
        below = sum(_hash_fraction(name) < val_fraction for name in names)
        at_least_one = int(val_fraction > 0 and len(names) > 1)
        held = set(ranked[: max(at_least_one, min(below, len(names) - 1))])
    if len(held) == len(names):
        raise ValueError("every project is held out and none is left to train on; hold out fewer")
    return {name: "val" if name in held else "train" for name in names}


def _hash_fraction(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:6]) / 2.0**48


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    last = path.rsplit("/", 1)[-1]
    return any(fnmatchcase(path, pattern) or fnmatchcase(last, pattern) for pattern in patterns)


@dataclass(frozen=True, slots=True)
class Context:
    """Files read into one document, and what was lost on the way.

    `dropped` characters at the front, `replaced` by `?`, whole files in `skips`.
    """

    data: bytes
    files: int
    dropped: int
    replaced: int
    skips: Skips


def read_context(
    paths: Sequence[str | Path],
    *,
    encoding: Encoding = "latin-1",
    errors: Errors = "strict",
    max_chars: int | None = None,
) -> Context:
    """Read files, directories and archives into one document in the corpus format; keep the last `max_chars`.

    Raises ValueError when there is no text, and as `encode_counted` does under `errors="strict"`.
    """
    if max_chars is not None and max_chars < 1:
        raise ValueError(f"max_chars is {max_chars}; give at least 1")
    rules = FileRules(encoding=encoding, errors=errors, max_replaced=1.0)
    skips = Skips()
    kept: deque[bytes] = deque()
    files = total = held = replaced = 0
    for path in paths:
        for piece in _pieces(Path(path), rules, skips, [], ()):
            kept.append(piece.data)
            files += 1
            replaced += piece.replaced
            total += len(piece.data)
            held += len(piece.data)
            while max_chars is not None and held - len(kept[0]) >= max_chars:
                held -= len(kept.popleft())
    if not files:
        raise ValueError(f"no text in {', '.join(map(str, paths))}; skipped: {skips.summary()}")
    data = b"".join(kept)
    data = data if max_chars is None else data[-max_chars:]
    return Context(data, files, total - len(data), replaced, skips)
