"""What the documentation takes from outside docs/: the records, as pages under Results."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

RECORDS = Path(__file__).parent / "records"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Every file in records/ is part of the site."""
    for path in sorted(RECORDS.rglob("*")):
        if path.is_file():
            name = path.relative_to(RECORDS.parent).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Links between docs/ and records/ lead there, links to other files become plain text.

    The word RECORDS on a line of its own becomes the list of records, by their titles.
    """
    in_records = page.file.src_uri.startswith("records/")
    up, other = ("../../", "docs") if in_records else ("../", "records")
    markdown = re.sub(rf"\[([^\]]*)\]\({re.escape(up)}(?!{other}/)[^)]*\)", r"\1", markdown)
    markdown = markdown.replace(f"]({up}{other}/", "](../../" if in_records else "](records/")
    pages = sorted(RECORDS.glob("*/README.md"))
    titles = [each.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ") for each in pages]
    links = [f"- [{t}](records/{p.parent.name}/README.md)" for t, p in zip(titles, pages, strict=True)]
    return markdown.replace("\nRECORDS\n", "\n" + "\n".join(links) + "\n")
