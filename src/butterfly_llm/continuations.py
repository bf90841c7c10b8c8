"""How much a continuation of a Python file is Python, and how much it is of its project. Strings to numbers.

    measure(file, context, text)        # {"lines": 0.95, "whole": 0.0, "brackets": 0.97, "names": 0.81}

`file` is the file up to a line start, `context` what the writer has read, `text` what was written after both.
What a statement is comes from the text before: a continuation may begin in a docstring or between brackets.
"""

from __future__ import annotations

import ast
import builtins
import keyword
import re
import warnings
from collections.abc import Iterator

MEASURES = ("lines", "whole", "brackets", "names")
FILE_HEADER = re.compile(r"^==> (.+) <==$", re.MULTILINE)
"""The line above a file in the corpus format."""

# Also of text that is not Python: strings end with their line at the latest, or with the text.
_TOKEN = re.compile(
    r"""  \#[^\n]*
        | (?P<quotes>\"{3}|'{3}) (?:\\.|(?!(?P=quotes)).)* (?:(?P=quotes)|\Z)
        | (?P<quote>["']) (?:\\.|(?!(?P=quote))[^\\\n])* (?:(?P=quote)|(?=\n)|\Z)
        | (?P<name>[^\W\d]\w*)
        | \d[\w.]*
        | (?P<bracket>[()\[\]{}])
        | \\\n
        | (?P<newline>\n)
    """,
    re.VERBOSE | re.DOTALL,
)
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_COMMON = frozenset((*keyword.kwlist, *keyword.softkwlist, *dir(builtins)))
_MIN_NAME = 3
_ALLOW_INCOMPLETE = 0x4000  # of compile(), as in codeop: "incomplete input" where the text ends too early
# What makes a whole of the header of a block, or of a decorator: before it, by its first word, and after it.
_BEFORE = {
    "elif": "if 0:\n  pass\n",
    "else": "if 0:\n  pass\n",
    "except": "try:\n  pass\n",
    "finally": "try:\n  pass\n",
    "case": "match 0:\n ",
}
_AFTER = (
    "",
    "  pass",
    "finally:\n  pass",
    "  pass\nfinally:\n  pass",
    "  case _:\n    pass",
    "def f():\n  pass",
)


def measure(file: str, context: str, text: str) -> dict[str, float]:
    """Shares from 0 to 1 for those of `MEASURES` of which the whole lines of `text` have something.

    lines:    of the lines in `statements`, those in statements that parse. Blank and comment lines are none.
    whole:    1 where Python finds no error in `file` and `text` together but that they end early, else 0.
    brackets: of the brackets in `statements`, those that have their partner, which may stand in `file`.
    names:    of the different identifiers of three characters or more that are neither keywords nor builtins,
              those that are words of `context`. Brackets and names in strings and comments do not count.
    """
    text = whole_lines(text)
    before = unfinished(file)
    found = names(before, text)
    parts = list(statements(before, text))
    lines = [(sum(map(_counts, part.split("\n"))), parse) for part, parse in parts]
    shares = {
        "lines": (sum(count for count, parse in lines if parse), sum(count for count, _ in lines)),
        "whole": (parses(file + text) is not False, 1 if text.strip() else 0),
        "brackets": paired_brackets(before, "".join(part for part, _ in parts)),
        "names": (len(found & set(re.findall(r"\w+", context))), len(found)),
    }
    return {name: part / of for name, (part, of) in shares.items() if of}


def whole_lines(text: str) -> str:
    """`text` up to its last whole line, or up to where its file ends: at a file header or a NUL."""
    ends = [match.start() for match in (FILE_HEADER.search(text), re.search("\0", text)) if match]
    return text[: min(ends, default=text.rfind("\n") + 1)]


def unfinished(file: str) -> str:
    """The statement in whose middle a file ends, from its first line on; '' where none is open."""
    depth = start = 0
    for token in _TOKEN.finditer(file):
        if token["bracket"]:
            depth += 1 if token["bracket"] in _CLOSING else -1
        elif token["newline"] and depth <= 0:
            start, depth = token.end(), 0
    return file[start:]


def statements(before: str, text: str) -> Iterator[tuple[str, bool]]:
    """The finished statements in `text`, what of each lies in it, and whether they parse by themselves.

    before: of the statement that `text` begins in the middle of. A statement ends where the parser takes it
    for whole or refuses it, and the next one begins with the next line; one that the end of `text` cuts off
    is left out. Indentation is not judged, and a header of a block is a statement without its block.
    """
    lines = [line + "\n" for line in (before + text).removesuffix("\n").split("\n")]
    first = before.count("\n")
    start = 0
    while start < len(lines):
        if not _counts(lines[start]):
            start += 1
            continue
        for stop in range(max(first, start) + 1, len(lines) + 1):
            parse = _is_statement("".join(lines[start:stop]).lstrip())
            if parse is not None:
                yield "".join(lines[max(first, start) : stop]), parse
                start = stop
                break
        else:
            return


def _counts(line: str) -> bool:
    return line.strip()[:1] not in ("", "#")


def _is_statement(text: str) -> bool | None:
    """Whether lines are a statement, or a header without its block; None where they end before it does."""
    other = _BEFORE.get(re.split(r"\W", text, maxsplit=1)[0])
    starts = [text] if other is None else [text, other + text]
    if any(parses(start + after) for start in starts for after in _AFTER):
        return True
    return None if any(parses(start) is None for start in starts) else False


def parses(text: str) -> bool | None:
    """Whether Python's parser takes `text`; None where it would need more of it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(text, "", "exec", ast.PyCF_ONLY_AST | _ALLOW_INCOMPLETE)
    except SyntaxError as error:
        return None if "incomplete input" in str(error) else False
    except (ValueError, MemoryError, RecursionError):  # NUL; nested too deeply
        return False
    return True


def paired_brackets(before: str, text: str) -> tuple[int, int]:
    """Brackets of `text` that have their partner in it or in `before`, and how many there are."""
    paired = total = 0
    opened: list[tuple[str, bool]] = []  # what would close it; whether it is of `text`
    for token in _TOKEN.finditer(before + text):
        bracket, new = token["bracket"], token.start() >= len(before)
        if not bracket:
            continue
        total += new
        if bracket in _CLOSING:
            opened.append((_CLOSING[bracket], new))
            continue
        place = next((i for i in reversed(range(len(opened))) if opened[i][0] == bracket), None)
        if place is not None:
            paired += new + opened[place][1]
            del opened[place:]
    return paired, total


def names(before: str, text: str) -> set[str]:
    """The identifiers of `text`: outside strings and comments, not common ones, not very short ones."""
    tokens = _TOKEN.finditer(before + text)
    found = {token["name"] for token in tokens if token["name"] and token.start() >= len(before)}
    return {name for name in found if len(name) >= _MIN_NAME} - _COMMON
