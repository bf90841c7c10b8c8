"""`butterfly prepare`: source trees, texts and archives to a corpus."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from butterfly_llm.terminal import progress_bar, say
from butterfly_llm.text import Encoding, Errors


@dataclass(frozen=True)
class Prepare:
    """Turn source trees, text files and archives into a corpus: train.bin, val.bin and manifest.json."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Directories, files and archives (.tar.gz, .zip ...); each is one project."""
    out: Path
    """Directory of the corpus."""
    projects: Literal["paths", "children"] = "paths"
    """Each path is a project, or each child of a path is."""
    holdout: tuple[str, ...] = ()
    """Names of the projects kept for validation; none to choose by hash."""
    val_fraction: float = 0.05
    """Share of the projects kept for validation when no --holdout is given."""
    include: tuple[str, ...] = ()
    """Take only files whose path or name fits one of these patterns, such as '*.py'."""
    encoding: Encoding = "latin-1"
    """latin-1: one character, one token. utf-8: one byte, one token."""
    errors: Errors = "replace"
    """A character outside Latin-1 becomes '?', or is refused."""
    near_duplicates: float | None = None
    """Leave out files of whose lines, taken together with those of one kept before, both have this share, as
    0.8. Default: only equal files are left out."""
    overwrite: bool = False
    """Replace a corpus that is already there."""

    def run(self) -> None:
        from butterfly_llm.data import FileRules, prepare

        if not self.paths:
            raise ValueError("prepare: no input; give directories, files or archives")
        rules = FileRules(include=self.include, encoding=self.encoding, errors=self.errors)
        with progress_bar("preparing", None) as update:
            report = prepare(
                self.paths,
                self.out,
                projects=self.projects,
                holdout=self.holdout,
                val_fraction=self.val_fraction,
                near_duplicates=self.near_duplicates,
                rules=rules,
                overwrite=self.overwrite,
                progress=lambda project, chars: update(chars),
            )
        for line in report.lines():
            say(line)
        print(self.out)
