"""Corpora: what goes in, what stays out, that failure loses nothing, and that windows are reproducible."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from butterfly_llm import archives
from butterfly_llm.corpus import Corpus, sample_windows, val_windows
from butterfly_llm.data import FileRules, Project, file_header, prepare, project_name, read_context
from butterfly_llm.licenses import license_claim

FILES = {"b.py": "print(2)\n", "sub/a.py": "print(1)\n", "a.txt": "no newline at the end"}
DOCUMENT = b"==> a.txt <==\nno newline at the end\n==> b.py <==\nprint(2)\n==> sub/a.py <==\nprint(1)\n"


def tree(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def tar_bytes(files: dict[str, str], mode: str = "w:") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content.encode()))
    return buffer.getvalue()


def zip_bytes(files: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def zstd(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor().compress(data)


def deb_bytes(name: str, data: bytes) -> bytes:
    def member(name: str, content: bytes) -> bytes:
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        return header + content + b"\n" * (len(content) % 2)

    return (
        b"!<arch>\n" + member("debian-binary", b"2.0\n") + member("control.tar", b"odd") + member(name, data)
    )


def split_bytes(out: Path, split: str = "train") -> bytes:
    return (out / f"{split}.bin").read_bytes()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_directory_becomes_one_document_in_sorted_order(tmp_path: Path, out: Path) -> None:
    report = prepare([tree(tmp_path / "p", FILES)], out)
    assert split_bytes(out) == DOCUMENT and split_bytes(out, "val") == b""
    (document,) = report.documents
    assert (document.name, document.split, document.characters, document.files) == (
        "p",
        "train",
        len(DOCUMENT),
        3,
    )


@pytest.mark.parametrize(
    "name, pack",
    [
        ("p.zip", zip_bytes),
        ("p.whl", zip_bytes),
        ("p.jar", zip_bytes),
        ("p.tar", tar_bytes),
        ("p.tar.gz", lambda files: tar_bytes(files, "w:gz")),
        ("p.tgz", lambda files: tar_bytes(files, "w:gz")),
        ("p.tar.xz", lambda files: tar_bytes(files, "w:xz")),
        ("p.tar.bz2", lambda files: tar_bytes(files, "w:bz2")),
        ("p.tar.zst", lambda files: zstd(tar_bytes(files))),
        ("p.deb", lambda files: deb_bytes("data.tar", tar_bytes(files))),
        ("p.deb", lambda files: deb_bytes("data.tar.gz", tar_bytes(files, "w:gz"))),
        ("p.deb", lambda files: deb_bytes("data.tar.xz", tar_bytes(files, "w:xz"))),
        ("p.deb", lambda files: deb_bytes("data.tar.zst", zstd(tar_bytes(files)))),
    ],
)
@pytest.mark.parametrize("top", ["", "p-1.0/", "./"])
def test_archives_equal_their_directory(tmp_path: Path, out: Path, name: str, pack, top: str) -> None:
    path = tmp_path / name
    path.write_bytes(pack({top + member: FILES[member] for member in reversed(FILES)}))
    prepare([path], out)
    assert split_bytes(out) == DOCUMENT
    assert project_name(path) == "p"


@pytest.mark.parametrize(
    "suffix, pack", [(".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress), (".zst", zstd)]
)
def test_compressed_single_file(tmp_path: Path, out: Path, suffix: str, pack) -> None:
    path = tmp_path / f"note.txt{suffix}"
    path.write_bytes(pack(b"hello\n"))
    prepare([path], out)
    assert split_bytes(out) == b"==> note.txt <==\nhello\n"


def test_paths_cannot_leave_the_archive(tmp_path: Path, out: Path) -> None:
    path = tmp_path / "p.zip"
    path.write_bytes(zip_bytes({"../../evil.py": "x\n", "/etc/evil": "y\n", "a/b": "z\n"}))
    before = set(tmp_path.parent.rglob("*"))
    prepare([path], out)
    assert {found.name for found in set(tmp_path.parent.rglob("*")) - before} == {
        "out", "train.bin", "val.bin", "manifest.json",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["p.zip", "p.tar.gz", "p.tar.zst", "p.tar", "p.deb", "p.xz"])
def test_damaged_archive_is_one_line(tmp_path: Path, out: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"this is no archive" * 100)
    with pytest.raises(ValueError, match=f"{name}: cannot read as an archive"):
        prepare([path], out)
    assert not out.exists()


def test_truncated_archive_is_one_line(tmp_path: Path, out: Path) -> None:
    path = tmp_path / "p.tar.gz"
    path.write_bytes(tar_bytes({"a.py": "".join(map(str, range(9999)))}, "w:gz")[:-200])
    with pytest.raises(ValueError, match="cannot read as an archive"):
        prepare([path], out)


def test_nul_stands_between_documents_and_nowhere_else(tmp_path: Path, out: Path) -> None:
    inputs = [tree(tmp_path / name, {"f.py": f"# {name}\n"}) for name in ("p", "q", "r")]
    tree(tmp_path / "q", {"nul.bin": b"a\0b", "wide.txt": "wide \u00e9".encode("utf-16")})
    report = prepare(inputs, out, val_fraction=0)
    documents = split_bytes(out).split(b"\0")
    assert [document.offset for document in report.documents] == [
        0,
        len(documents[0]) + 1,
        len(documents[0]) + len(documents[1]) + 2,
    ]
    assert documents == [
        b"==> f.py <==\n# p\n",
        b"==> f.py <==\n# q\n==> wide.txt <==\nwide \xe9\n",
        b"==> f.py <==\n# r\n",
    ]
    assert report.skips.counts == {"binary": 1}


def test_duplicates_are_dropped_across_projects_and_kept_in_validation(tmp_path: Path, out: Path) -> None:
    same = "shared = 1\n"
    inputs = [
        tree(tmp_path / "p", {"x.py": same, "y.py": "p\n", "z.py": "shared = 1\r\n"}),
        tree(tmp_path / "q", {"w.py": same}),
    ]
    report = prepare(inputs, out, holdout=["q"])
    assert split_bytes(out) == b"==> y.py <==\np\n"
    assert split_bytes(out, "val") == b"==> w.py <==\nshared = 1\n"
    assert {document.name: document.duplicates for document in report.documents} == {"q": 0, "p": 2}


def test_split_is_by_project_and_does_not_depend_on_order(tmp_path: Path) -> None:
    inputs = [tree(tmp_path / f"p{i}", {f"{j}.py": f"{i} {j}\n" for j in range(3)}) for i in range(20)]
    splits = []
    for number, order in enumerate((inputs, inputs[::-1])):
        report = prepare(order, tmp_path / f"out{number}", val_fraction=0.3)
        splits.append({document.name: document.split for document in report.documents})
        assert all(document.files == 3 for document in report.documents)
    assert splits[0] == splits[1] and len(splits[0]) == 20
    assert set(splits[0].values()) == {"train", "val"}


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_two_projects_give_one_to_validation(tmp_path: Path, out: Path, fraction: float) -> None:
    inputs = [tree(tmp_path / name, {"f.py": name}) for name in ("p", "q")]
    report = prepare(inputs, out, val_fraction=fraction)
    assert sorted(document.split for document in report.documents) == ["train", "val"]


def test_same_input_same_bytes(tmp_path: Path) -> None:
    inputs = [tree(tmp_path / name, {**FILES, "n": name}) for name in ("p", "q")]
    for number in range(2):
        prepare(inputs, tmp_path / f"out{number}")
    for name in ("train.bin", "val.bin", "manifest.json"):
        assert (tmp_path / "out0" / name).read_bytes() == (tmp_path / "out1" / name).read_bytes()


def test_children_are_projects_and_names_are_unique(tmp_path: Path, out: Path) -> None:
    for parent in ("one", "two"):
        tree(tmp_path / parent, {"p/f.py": f"{parent}\n", "q.py": f"q of {parent}\n"})
    report = prepare([tmp_path / "one", tmp_path / "two"], out, projects="children", val_fraction=0)
    assert [document.name for document in report.documents] == ["p", "q.py", "p-2", "q.py-2"]


def test_what_is_skipped_is_counted_with_its_reason(tmp_path: Path, out: Path, monkeypatch) -> None:
    root = tree(
        tmp_path / "p",
        {
            "good.py": "good\n", "empty.py": "", "long.py": "x" * 200, "big.py": "y\n" * 500,
            "image.png": b"\x89PNG\0",
            "chinese.txt": "\u4e2d\u6587" * 9, "lib.min.js": "1", ".git/config": "x", "locked.py": "secret\n",
        },
    )  # fmt: skip
    (root / "loop").symlink_to(root)
    (root / "link.py").symlink_to(root / "good.py")
    os.mkfifo(root / "pipe")
    read_bytes = Path.read_bytes

    def guarded(path: Path) -> bytes:
        if path.name == "locked.py":
            raise PermissionError(13, "Permission denied")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", guarded)
    report = prepare([root], out, rules=FileRules(max_line=100, max_bytes=900))
    assert split_bytes(out) == b"==> good.py <==\ngood\n"
    assert report.skips.counts == {
        "empty": 1, "line above 100 characters": 1, "above 900 bytes": 1, "binary": 1,
        "more than 0.5% outside Latin-1": 1, "excluded by name": 1, "symbolic link": 2,
        "not a regular file": 1,
        "unreadable": 1,
    }  # fmt: skip
    assert any("2 symbolic link (first: " in line for line in report.lines())


def test_an_unreadable_directory_is_named_once(tmp_path: Path, out: Path, monkeypatch) -> None:
    root = tree(tmp_path / "p", {"good.py": "good\n", "locked/a.py": "secret\n"})
    scandir = os.scandir

    def guarded(path: str):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    report = prepare([root], out)
    assert report.skips.examples == {"unreadable": f"{root}/locked"}
    monkeypatch.chdir(tmp_path)
    assert prepare(["p"], out, overwrite=True).skips.examples == {"unreadable": "p/locked"}


def test_replaced_characters_are_counted_and_strict_names_the_place(tmp_path: Path, out: Path) -> None:
    root = tree(tmp_path / "p", {"f.txt": "plain text " * 99 + "\n\u20ac\n"})
    assert prepare([root], out).documents[0].replaced == 1
    assert split_bytes(out).endswith(b"\n?\n")
    with pytest.raises(ValueError, match=r"f\.txt: line 2, column 1"):
        prepare([root], out, rules=FileRules(errors="strict"), overwrite=True)
    prepare([root], out, rules=FileRules(encoding="utf-8"), overwrite=True)
    assert split_bytes(out).endswith("\n\u20ac\n".encode())
    assert Corpus(out).encoding == "utf-8"


def test_include_and_refuse(tmp_path: Path, out: Path) -> None:
    rules = FileRules(include=("*.py",), refuse=lambda path, text: "too short" if len(text) < 5 else "")
    report = prepare([tree(tmp_path / "p", {**FILES, "c.py": "1\n"})], out, rules=rules)
    assert split_bytes(out) == b"==> b.py <==\nprint(2)\n==> sub/a.py <==\nprint(1)\n"
    assert report.skips.counts == {"excluded by name": 1, "too short": 1}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"holdout": ["nobody"]}, "'nobody' is not a project; choose from p"),
        ({"holdout": ["p"]}, "none is left to train on"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0"),
    ],
)
def test_bad_options_are_one_line(tmp_path: Path, out: Path, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare([tree(tmp_path / "p", FILES)], out, **options)
    assert not out.exists()


def test_empty_input_is_refused_and_leaves_nothing(tmp_path: Path, out: Path) -> None:
    with pytest.raises(ValueError, match="missing: no such file"):
        prepare([tmp_path / "missing"], out)
    with pytest.raises(ValueError, match="no input"):
        prepare([], out)
    with pytest.raises(ValueError, match=r"no text in 1 input, .*1 binary"):
        prepare([tree(tmp_path / "p", {"x": b"\0"})], out)
    assert not out.exists()


def test_text_outside_latin_1_alone_is_told_the_way_on(tmp_path: Path, out: Path) -> None:
    tree(tmp_path, {"a.txt": "\u4e2d\u6587\n"})
    with pytest.raises(ValueError, match=r"^no text in 1 input, .*; --encoding utf-8 keeps such text$"):
        prepare([tmp_path / "a.txt"], out)
    prepare([tmp_path / "a.txt"], out, rules=FileRules(encoding="utf-8"))


def test_existing_corpus_is_kept_unless_overwritten(tmp_path: Path, out: Path) -> None:
    root = tree(tmp_path / "p", FILES)
    prepare([root], out)
    other = tree(tmp_path / "q", {"other.py": "other\n"})
    with pytest.raises(ValueError, match="already holds a corpus"):
        prepare([other], out)
    assert split_bytes(out) == DOCUMENT
    prepare([other], out, overwrite=True)
    assert split_bytes(out) == b"==> other.py <==\nother\n"


@pytest.mark.parametrize("existing", [False, True])
def test_failure_midway_keeps_the_old_corpus_and_leaves_no_new_one(
    tmp_path: Path, out: Path, existing: bool
) -> None:
    root = tree(tmp_path / "p", FILES)
    if existing:
        prepare([root], out)
    before = {path.name: path.read_bytes() for path in out.iterdir()} if existing else None

    def interrupt(project: str, characters: int) -> None:
        if characters > 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([root], out, overwrite=True, progress=interrupt)
    after = {path.name: path.read_bytes() for path in out.iterdir()} if out.exists() else None
    assert after == before


def test_output_inside_the_input_is_not_read(tmp_path: Path) -> None:
    root = tree(tmp_path / "p", FILES)
    for _ in range(2):
        prepare([root], root / "out", overwrite=True)
    assert split_bytes(root / "out") == DOCUMENT
    other = tree(tmp_path / "q", FILES)
    assert not prepare([other], other).skips.counts
    assert split_bytes(other) == DOCUMENT


@pytest.mark.parametrize(
    "path, text, claim",
    [
        (
            "x.dist-info/METADATA",
            "Name: x\nLicense-Expression: MIT OR Apache-2.0\n\nbody",
            "MIT OR Apache-2.0",
        ),
        ("PKG-INFO", "License: UNKNOWN\nClassifier: License :: OSI Approved :: BSD License\n", "BSD License"),
        ("package.json", '{"license": "ISC"}', "ISC"),
        ("package.json", "[broken", ""),
        ("Cargo.toml", '[package]\nlicense = "MIT OR Apache-2.0"\n', "MIT OR Apache-2.0"),
        ("share/doc/x/copyright", "License: Expat\nLicense: BSD-3-clause\n", "Expat AND BSD-3-clause"),
        ("LICENSE", "Permission is hereby granted, free of\ncharge, to any person obtaining", "MIT"),
        ("COPYING.LESSER", "GNU LESSER GENERAL PUBLIC LICENSE ... GNU General Public License", "LGPL"),
        ("UNLICENSE", "This is free and unencumbered software released into the public domain.", "Unlicense"),
        ("LICENSE.txt", "Apache License Version 2.0", "Apache-2.0"),
        ("main.py", "Apache License", ""),
    ],
)
def test_license_claims(path: str, text: str, claim: str) -> None:
    assert license_claim(path, text) == claim


def test_license_of_a_project_prefers_metadata_near_the_root(tmp_path: Path, out: Path) -> None:
    root = tree(
        tmp_path / "p",
        {
            "LICENSE": "Apache License",
            "package.json": '{"license": "MIT"}',
            "deep/package.json": '{"license": "GPL"}',
        },
    )
    rules = FileRules(exclude=("package.json",))
    assert prepare([root], out, rules=rules).documents[0].license == "MIT"
    stated = Project(root, license="BSL-1.0")
    assert prepare([stated], out, overwrite=True).documents[0].license == "BSL-1.0"


def test_file_header_is_one_latin_1_line() -> None:
    assert file_header("a/\u4e2d\n\u00e9.py") == b"==> a/??\xe9.py <==\n"


def test_context_is_the_document_and_keeps_its_end(tmp_path: Path) -> None:
    root = tree(tmp_path / "p", {**FILES, "image.png": b"\0"})
    context = read_context([root])
    assert (context.data, context.files, context.dropped) == (DOCUMENT, 3, 0)
    assert context.skips.counts == {"binary": 1}
    for max_chars in (1, 20, 30, 60, 1000):
        context = read_context([root], max_chars=max_chars)
        assert context.data == DOCUMENT[-max_chars:]
        assert context.dropped == len(DOCUMENT) - len(context.data)
    assert (
        read_context([root / "b.py", root / "sub"]).data
        == b"==> b.py <==\nprint(2)\n==> a.py <==\nprint(1)\n"
    )


def test_context_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    root = tree(tmp_path / "p", {"euro.txt": "\u20ac", "image.png": b"\0"})
    with pytest.raises(ValueError, match=r"euro\.txt: line 1, column 1"):
        read_context([root])
    assert read_context([root], errors="replace").replaced == 1
    with pytest.raises(ValueError, match=r"no text in .*1 binary"):
        read_context([root / "image.png"])


def bare_corpus(tmp_path: Path, characters: int) -> Corpus:
    path = tmp_path / "bare.bin"
    path.write_bytes((np.arange(characters) % 251).astype(np.uint8).tobytes())
    return Corpus(path)


def test_corpus_opens_both_splits_and_locates_documents(tmp_path: Path, out: Path) -> None:
    inputs = [tree(tmp_path / name, {"f.py": f"# {name}\n"}) for name in ("p", "q", "r")]
    prepare(inputs, out, holdout=["q"])
    corpus = Corpus(out)
    assert isinstance(corpus.data, np.memmap) and corpus.data.dtype == np.uint8
    assert len(corpus) == len(split_bytes(out))
    for document in corpus.documents:
        data = corpus.data[document.offset : document.offset + document.characters]
        assert data.tobytes() == f"==> f.py <==\n# {document.name}\n".encode()
    assert [document.name for document in Corpus(out, "val").documents] == ["q"]


def test_damaged_corpus_is_one_line(tmp_path: Path, out: Path) -> None:
    with pytest.raises(ValueError, match="no such corpus"):
        Corpus(out)
    prepare([tree(tmp_path / "p", FILES)], out)
    with pytest.raises(ValueError, match="the val split is empty"):
        Corpus(out, "val")
    with (out / "train.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"train\.bin: 85 bytes, manifest says 84"):
        Corpus(out)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(ValueError, match="corpus format 99, not 1"):
        Corpus(out)
    for damaged in ("{", "[]", '{"format": 1}'):
        (out / "manifest.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"manifest\.json: missing or damaged"):
            Corpus(out)


def test_windows_do_not_depend_on_how_a_batch_is_cut(tmp_path: Path) -> None:
    corpus = bare_corpus(tmp_path, 5000)
    whole = sample_windows(corpus, length=16, count=12, seed=3, step=7)
    assert whole.shape == (12, 17) and whole.dtype == np.uint8
    parts = [
        sample_windows(corpus, length=16, count=n, seed=3, step=7, first=f)
        for f, n in ((0, 5), (5, 1), (6, 6))
    ]
    assert np.array_equal(np.concatenate(parts), whole)
    assert len(np.unique(whole[:, 0])) > 6
    for other in ({"seed": 4, "step": 7}, {"seed": 3, "step": 8}):
        assert not np.array_equal(sample_windows(corpus, length=16, count=12, **other), whole)


def test_windows_are_the_recorded_ones(tmp_path: Path) -> None:
    corpus = bare_corpus(tmp_path, 5000)
    starts = sample_windows(corpus, length=1, count=6, seed=0, step=0)[:, 0]
    assert starts.tolist() == [80, 5, 110, 32, 152, 19]


def test_windows_are_slices_that_reach_both_ends(tmp_path: Path) -> None:
    corpus = bare_corpus(tmp_path, 12)
    windows = sample_windows(corpus, length=8, count=200, seed=0, step=0)
    assert set(windows[:, 0].tolist()) == {0, 1, 2, 3}
    assert np.array_equal(windows, windows[:, :1] + np.arange(9, dtype=np.uint8))


def test_val_windows_predict_every_character_once(tmp_path: Path) -> None:
    corpus = bare_corpus(tmp_path, 101)
    windows = list(val_windows(corpus, length=10))
    assert [window.shape for window in windows] == [(11,)] * 10
    targets = np.concatenate([window[1:] for window in windows])
    assert targets.tobytes() == bytes(range(1, 101))
    assert len(list(val_windows(corpus, length=10, max_chars=35))) == 3
    assert len(list(val_windows(bare_corpus(tmp_path, 100), length=10))) == 9


@pytest.mark.parametrize(
    "draw",
    [lambda c: sample_windows(c, length=64, count=1, seed=0, step=0), lambda c: val_windows(c, length=64)],
)
def test_corpus_shorter_than_a_window_is_one_line(tmp_path: Path, draw) -> None:
    assert draw(bare_corpus(tmp_path, 65)) is not None
    with pytest.raises(ValueError, match=r"64 characters, but a window needs 65"):
        draw(bare_corpus(tmp_path, 64))


def test_a_corpus_is_read_where_files_have_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(range(256)))
    corpus = Corpus(tmp_path / "a.bin")
    monkeypatch.delattr(os, "pread")  # as on Windows
    assert corpus.read(250, 256).tolist() == list(range(250, 256))
    assert corpus.read(3, 5).tolist() == [3, 4]
    with pytest.raises(ValueError, match="cut short"):
        corpus.read(255, 257)


def test_decompression_bomb_is_refused(tmp_path: Path, out: Path, monkeypatch) -> None:
    monkeypatch.setattr(archives, "MAX_UNPACKED", 1 << 20)
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(b"x" * (3 << 20)))
    with pytest.raises(ValueError, match="unpacks to more than"):
        prepare([path], out)


def lines(count: int, kind: str = "line") -> list[str]:
    return [f"{kind} {number}: {number * number}\n" for number in range(count)]


def test_files_that_are_nearly_the_same_are_kept_once(tmp_path: Path) -> None:
    old = lines(100)
    new = [*old[:50], "another line in the middle\n", *old[52:]]  # 98 of 101 lines in common
    half = [*old[:50], *lines(50, "other")]
    source = tree(tmp_path / "in", {
        "old/a.py": "".join(old), "new/a.py": "".join(new), "half/a.py": "".join(half),
        "short/a.py": "".join([*old[:9], "}\n"]), "short/b.py": "".join([*old[:9], "}\n", "{\n"]),
    })  # fmt: skip
    report = prepare([source], tmp_path / "out", projects="children", holdout=["old"], near_duplicates=0.8)
    kept = {document.name: document.files for document in report.documents}
    assert kept == {"old": 1, "half": 1, "short": 2}  # validation is kept, training gives way
    assert report.skips.counts["near duplicate"] == 1
    assert report.skips.examples["near duplicate"].endswith("new/a.py")
    assert "1 near duplicate" in "\n".join(report.lines())
    again = prepare([source], tmp_path / "all", projects="children", holdout=["old"])
    assert {document.name for document in again.documents} == {"old", "new", "half", "short"}


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5])
def test_a_share_of_lines_that_makes_no_sense_is_refused(share: float, tmp_path: Path) -> None:
    source = tree(tmp_path / "in", FILES)
    with pytest.raises(ValueError, match="must be above 0 and at most 1"):
        prepare([source], tmp_path / "out", near_duplicates=share)
    assert not (tmp_path / "out").exists()
