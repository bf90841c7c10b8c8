"""What the documentation takes from outside docs/: the records, as pages under Results."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

RECORDS = Path(__file__).parent / "records"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Every file in records/ is part of the site."""
    for path in sorted(RECORDS.rglob("*")):
        if path.is_file():
            name = path.relative_to(RECORDS.parent).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """The word RECORDS on a line of its own becomes the list of them, by their titles."""
    pages = sorted(RECORDS.glob("*/README.md"))
    titles = [page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ") for page in pages]
    links = (
        f"- [{title}](records/{page.parent.name}/README.md)"
        for title, page in zip(titles, pages, strict=True)
    )
    return markdown.replace("\nRECORDS\n", "\n" + "\n".join(links) + "\n")
