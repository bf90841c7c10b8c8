"""Whatever lies on the disk, and however full it is: prepared or refused in one line, nothing lost.

Rows 7 and 11 of docs/robustness.md, and what the command does with closed outputs.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from butterfly_llm import data
from butterfly_llm.archives import ARCHIVE_SUFFIXES
from butterfly_llm.corpus import Corpus, sample_windows, val_windows
from butterfly_llm.data import prepare, read_context
from butterfly_llm.evaluate import load_documents
from butterfly_llm.terminal import one_line

SOURCE = Path(__file__).parents[1] / "src"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
NOBODY = 65534


def text(path: Path, content: str | bytes = "some text\n" * 50) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def script(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Python lines in a process of their own."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, **options)


# the disk is full


@pytest.mark.parametrize("existing", [False, True])
def test_a_disk_that_fills_up_while_preparing_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    """Fails at the first write, the second, ... until one goes through."""
    out = tmp_path / "out"
    inputs = [text(tmp_path / f"{name}.txt", f"{name}\n" * 9) for name in ("a", "b", "c")]
    if existing:
        prepare(inputs[:2], out)
    before = tree(tmp_path)
    real, countdown = os.write, 0

    def full(*arguments: Any) -> Any:
        nonlocal countdown
        countdown -= 1
        if countdown == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    class Full(data._SplitWriter):
        def write(self, data: bytes) -> None:
            full(os.open(os.devnull, os.O_WRONLY), b"x")
            super().write(data)

    monkeypatch.setattr(data, "_SplitWriter", Full)
    monkeypatch.setattr(os, "fsync", lambda *_: full(os.open(os.devnull, os.O_WRONLY), b"x"))
    failures = 0
    for place in range(1, 100):
        countdown = place
        try:
            prepare(inputs, out, overwrite=True)
            break
        except OSError as failure:
            failures += 1
            assert failure.errno == errno.ENOSPC and failure.filename == str(out)
            assert tree(tmp_path) == before and out.exists() == existing
    assert failures == 5  # three texts, two files to the disk
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "train.bin", "val.bin"]


def test_a_file_that_cannot_grow_is_reported_and_the_corpus_stays(tmp_path: Path) -> None:
    """The limit of the operating system on the size of a file; as on a full disk, writing fails."""
    out = tmp_path / "out"
    prepare([text(tmp_path / "small.txt")], out)
    before = tree(out)
    text(tmp_path / "large.txt", "".join(f"line {i}\n" for i in range(20_000)))
    done = script(f"""
        import resource, sys
        from butterfly_llm.cli import main
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        main(["prepare", {str(tmp_path / "large.txt")!r}, "--out", {str(out)!r}, "--overwrite"])
    """)
    assert (done.returncode, done.stderr) == (2, f"butterfly: error: {out}: File too large\n")
    assert tree(out) == before


def test_a_killed_preparation_is_swept_by_the_next(tmp_path: Path) -> None:
    out = tmp_path / "out"
    text(out / ".prepare-abc123" / "train.bin", b"half")
    prepare([text(tmp_path / "a.txt")], out)
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "train.bin", "val.bin"]


def test_old_and_new_files_are_never_taken_for_one_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between two of the renames: train.bin is new, val.bin is not."""
    out = tmp_path / "out"
    prepare([text(tmp_path / "a.txt", "aaa\n")], out)
    replace = os.replace

    def killed(source: Any, target: Any) -> None:
        if str(target).endswith("val.bin"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare([text(tmp_path / "b.txt", "bbb\n")], out, overwrite=True)
    with pytest.raises(ValueError, match=r"manifest\.json: missing"):
        Corpus(out)


# any bytes as input


KINDS = st.one_of(
    st.binary(max_size=300),
    st.text(max_size=100).map(lambda value: value.encode("utf-16", "surrogatepass")),
    st.text(max_size=100).map(lambda value: value.encode("utf-8", "surrogatepass")),
    st.sampled_from([b"\xff\xfe", b"\xfe\xff\x00", b"\xef\xbb\xbf", b"\x00" * 9, b"\r" * 50, b"x" * 20_000]),
)
NAMES = st.sampled_from(["a.txt", "LICENSE", "package.json", "Cargo.toml", "PKG-INFO", "copyright"]) | (
    st.sampled_from(ARCHIVE_SUFFIXES).map(lambda suffix: "a" + suffix)
)


@settings(max_examples=80, deadline=None)
@given(name=NAMES, content=KINDS)
def test_any_bytes_are_prepared_or_refused_in_one_line(name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, out = text(Path(folder) / "in" / name, content), Path(folder) / "out"
        for given_path in (path, path.parent):
            try:
                report = prepare([given_path], out, overwrite=True)
            except ValueError as failure:
                assert "\n" not in str(failure)
            else:
                assert report.characters["train"] == (out / "train.bin").stat().st_size > 0
                Corpus(out)
        try:
            read_context([path], errors="replace")
        except ValueError as failure:
            assert "\n" not in str(failure)


def test_a_line_of_a_gigabyte_is_skipped_unread(tmp_path: Path) -> None:
    """A sparse file; read, it would take far more than the process may have."""
    root = tmp_path / "p"
    text(root / "good.py", "good\n")
    with (root / "line.txt").open("wb") as file:
        file.truncate(1 << 30)
    done = script(f"""
        import resource
        from butterfly_llm.data import prepare, read_context
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 28),) * 2)
        print(prepare([{str(root)!r}], {str(tmp_path / "out")!r}).skips.summary())
        print(read_context([{str(root)!r}]).skips.summary())
    """)
    assert done.stdout.count("1 above 16777216 bytes") == 2, done.stderr


def test_a_text_to_evaluate_that_memory_cannot_hold_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = text(tmp_path / "a.txt", "x" * 1000)
    monkeypatch.setattr("butterfly_llm.memory.available_bytes", lambda device="cpu": 7999)
    with pytest.raises(ValueError, match=r"a\.txt needs 8\.0 KB on cpu, .* give a smaller text"):
        load_documents([path])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: not a regular file"):
        load_documents([tmp_path / "pipe"])


def test_loops_of_links_and_files_without_permission(tmp_path: Path) -> None:
    """As an ordinary user, since nothing is closed to root."""
    home = Path(tempfile.mkdtemp(dir="/tmp"))  # every directory above can be entered by everybody
    try:
        home.chmod(0o755)
        root = home / "p"
        text(root / "good.py", "good\n")
        (root / "self").symlink_to(root / "self")
        (root / "a").symlink_to(root / "b")
        (root / "b").symlink_to(root / "a")
        (root / "up").symlink_to(home)
        text(root / "locked.py").chmod(0)
        text(root / "closed" / "a.py").parent.chmod(0)
        (home / "loop").symlink_to(home / "loop")
        (home / "out").mkdir(mode=0o777)
        (home / "out").chmod(0o777)
        done = script(f"""
            import encodings.utf_8_sig, os, sys
            from butterfly_llm import cli
            from butterfly_llm.commands import common, eval, generate, prepare
            from butterfly_llm import data, evaluate
            if os.getuid() == 0:
                os.setgid({NOBODY})
                os.setuid({NOBODY})
            home = {str(home)!r}
            for arguments in (
                ["prepare", home + "/p", "--out", home + "/out"],
                ["prepare", home + "/loop", "--out", home + "/out2"],
                ["prepare", home + "/p/locked.py", "--out", home + "/out2"],
                ["prepare", home + "/p/closed", "--out", home + "/out2"],
                ["prepare", home + "/p", "--out", home + "/p/closed/out"],
                ["prepare", home + "/p", "--out", home + "/loop"],
                ["eval", home + "/loop"],
                ["eval", home + "/p/locked.py"],
                ["generate", "--context", home + "/p/closed/a.py"],
            ):
                print("#", *arguments, file=sys.stderr, flush=True)
                try:
                    cli.main(arguments)
                except SystemExit as stop:
                    print("exit", stop.code, file=sys.stderr, flush=True)
        """)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        first, *refused = [part.splitlines()[1:] for part in done.stderr.split("#")[1:]]
        assert any("2 unreadable" in line and "4 symbolic link" in line for line in first), first
        assert (home / "out" / "train.bin").read_bytes() == b"==> good.py <==\ngood\n"
        for lines in refused:
            assert lines[0].startswith("butterfly: error: ") and lines[1:] == ["exit 2"], lines
    finally:
        (home / "p" / "closed").chmod(0o700)
        shutil.rmtree(home)


def test_a_corpus_that_is_cut_short_in_use_is_refused(tmp_path: Path) -> None:
    path = text(tmp_path / "c.bin", bytes(range(200)) * 100)
    corpus = Corpus(path)
    first = sample_windows(corpus, length=64, count=8, seed=0, step=0)
    os.truncate(path, 100)  # to look at the mapped pages would now end the process with SIGBUS
    with pytest.raises(ValueError, match=r"c\.bin: was cut short while in use"):
        sample_windows(corpus, length=64, count=8, seed=0, step=0)
    with pytest.raises(ValueError, match="was cut short"):
        list(val_windows(corpus, length=64))
    text(path, bytes(range(200)) * 100)
    assert np.array_equal(first, sample_windows(corpus, length=64, count=8, seed=0, step=0))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update(encoding="ebcdic"), "unknown encoding 'ebcdic'"),
        (lambda m: m["splits"]["train"].update(characters="many"), "'many' characters"),
        (lambda m: m["documents"][0].update(offset=-1), "offset of a document is -1"),
        (lambda m: m["documents"][0].update(name=7), "name of a document is 7"),
        (lambda m: m["documents"][0].update(characters=10**9), "'a.txt' does not lie in a split"),
        (lambda m: m["documents"][0].update(split="test"), "does not lie in a split"),
    ],
)
def test_a_manifest_that_lies_is_refused(tmp_path: Path, change: Any, said: str) -> None:
    prepare([text(tmp_path / "a.txt")], tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"manifest.json: missing or damaged .*{said}") as caught:
        Corpus(tmp_path / "out")
    assert "\n" not in str(caught.value)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"manifest\.json: missing or damaged"):
        Corpus(tmp_path / "out")


# the command


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("info >&-", 0, ""),
        ("nope >&- 2>&-", 2, ""),
        ("--version >/dev/full", 2, "butterfly: error: [Errno 28] No space left on device\n"),
    ],
)
def test_closed_and_full_outputs_end_in_order(command: str, code: int, said: str) -> None:
    shell = f"{sys.executable} -m butterfly_llm {command}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (code, said)


def test_a_reader_that_leaves_in_the_middle_ends_the_command_in_order() -> None:
    command = [sys.executable, "-m", "butterfly_llm", "train", "--help"]
    for read in (0, 10):
        # A pipe shorter than the text: the command cannot be done before its reader leaves.
        with subprocess.Popen(
            command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, pipesize=4096
        ) as writer:
            assert writer.stdout is not None and writer.stderr is not None
            assert len(writer.stdout.read(read)) == read
            writer.stdout.close()
            assert (writer.stderr.read(), writer.wait(120)) == (b"", 141)


def test_out_of_memory_names_the_figures_and_the_flags() -> None:
    import torch

    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which "
        "1.44 GiB is free.\nIncluding non-PyTorch memory ..."
    )
    said = one_line(error)
    assert said is not None and "\n" not in said
    for part in ("2.50 GiB more were needed, 1.44 GiB were free", "--context-chars", "--device cpu"):
        assert part in said
    assert str(one_line(torch.OutOfMemoryError("other words"))).startswith("the GPU is out of memory: use a")


def test_evaluation_says_what_it_replaced_and_left_out(tmp_path: Path) -> None:
    path = text(tmp_path / "d" / "a.txt", "a \u20ac and \u4e2d\n")
    text(tmp_path / "d" / "b.png", b"\x89PNG\0")
    file, folder = load_documents([path, path.parent], errors="replace", max_chars=3)
    assert file.losses == "2 characters replaced by '?'" and file.data == b"a ?"
    assert folder.losses == (
        f"2 characters replaced by '?', skipped 1 binary (first: {tmp_path / 'd' / 'b.png'})"
    )
    assert load_documents([text(tmp_path / "c.txt")])[0].losses == ""


def test_names_of_files_cannot_command_a_terminal(tmp_path: Path) -> None:
    text(tmp_path / "d" / "a\n\x1b[2Jb.png", b"\x89PNG\0")
    with pytest.raises(ValueError, match=r"1 binary \(first: .*/a\?\?\[2Jb\.png\)$"):
        read_context([tmp_path / "d"])
    text(tmp_path / "e" / "a\n\x1b.txt", "\u20ac")
    with pytest.raises(ValueError, match=r"a\?\?\.txt: line 1, column 1"):
        read_context([tmp_path / "e"])


def test_what_an_archive_says_of_itself_cannot_break_the_line(tmp_path: Path) -> None:
    for name, size, said in (
        ("data.tar.\n\x1bz", "3", "unknown compression '.\\n\\x1bz'"),
        ("data.tar", "", "no size"),
    ):
        header = f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{size:10}`\n".encode()
        path = text(tmp_path / "a.deb", b"!<arch>\n" + header + b"abc")
        with pytest.raises(ValueError, match=r"a\.deb: cannot read as an archive") as caught:
            read_context([path])
        assert str(caught.value).isprintable() and said in str(caught.value)
