"""Characters to ids and back: text is Latin-1, one character one id, vocabulary 256.

Text outside Latin-1 has two ways in: `errors="replace"` writes `?` and counts, `encoding="utf-8"` feeds the
UTF-8 bytes as characters and decodes them back without loss. Id 0 (NUL) separates documents.
"""

import codecs
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Encoding = Literal["latin-1", "utf-8"]
Errors = Literal["strict", "replace"]

# Lone surrogates are all that UTF-8 cannot carry.
_UNENCODABLE = {"latin-1": re.compile(r"[^\x00-\xff]"), "utf-8": re.compile(r"[\ud800-\udfff]")}
_CONTROLS = re.compile(r"[\x01-\x07\x0b\x0e-\x1a\x1c-\x1f\x7f-\x9f]")
_UTF16_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class BinaryFileError(ValueError):
    """The bytes are not text."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Character ids, one byte each, and how many characters became `?`."""

    data: bytes
    replaced: int


def encode_counted(
    text: str, *, source: str = "<string>", encoding: Encoding = "latin-1", errors: Errors = "strict"
) -> Encoded:
    """Encode `text` and count the characters that `errors="replace"` turned into `?`.

    Raises ValueError naming `source`, line, column (both from 1) and the character when `errors="strict"` and
    a character does not fit.
    """
    try:
        return Encoded(text.encode(encoding), 0)
    except UnicodeEncodeError as failure:
        if errors == "strict":
            raise ValueError(_cannot_encode(text, failure.start, source, encoding)) from None
    data, replaced = _UNENCODABLE[encoding].subn("?", text)
    return Encoded(data.encode(encoding), replaced)


def encode(
    text: str, *, source: str = "<string>", encoding: Encoding = "latin-1", errors: Errors = "strict"
) -> bytes:
    """`encode_counted` without the count."""
    return encode_counted(text, source=source, encoding=encoding, errors=errors).data


def _cannot_encode(text: str, index: int, source: str, encoding: Encoding) -> str:
    line = text.count("\n", 0, index) + 1
    column = index - text.rfind("\n", 0, index)
    character = text[index]
    remedy = "--errors replace" if encoding == "utf-8" else "--errors replace or --encoding utf-8"
    return (
        f"{source}: line {line}, column {column}: {character!a} (U+{ord(character):04X}) is outside "
        f"{encoding.upper() if encoding == 'utf-8' else 'Latin-1'}; use {remedy}"
    )


def decode(ids: Iterable[int], *, encoding: Encoding = "latin-1") -> str:
    """Text of character ids in 0..255 (bytes, or any iterable of integers).

    With `encoding="utf-8"` bytes that are not UTF-8 come out as U+FFFD. Raises ValueError for other ids.
    """
    return bytes(ids).decode(encoding, errors="replace")


class StreamDecoder:
    """Decode ids one at a time: `push` returns the text that the id completes, often '' in UTF-8."""

    def __init__(self, encoding: Encoding = "latin-1") -> None:
        self._decoder = codecs.getincrementaldecoder(encoding)(errors="replace")

    def push(self, char_id: int) -> str:
        """Text completed by `char_id` (0..255)."""
        return self._decoder.decode(bytes((char_id,)))

    def finish(self) -> str:
        """What an incomplete last character leaves behind: U+FFFD or ''."""
        return self._decoder.decode(b"", final=True)


def decode_source(raw: bytes, *, source: str = "<bytes>") -> str:
    r"""Text of a file's bytes: UTF-16 by its byte order mark, else UTF-8, else Latin-1.

    The byte order mark is dropped and `\r\n` becomes `\n`; nothing else is normalised. Raises BinaryFileError
    for a NUL character or more than 1 control character in 32.
    """
    if raw.startswith(_UTF16_BOMS):
        text = raw.decode("utf-16", errors="replace")
    else:
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = raw.decode("latin-1")
    if "\0" in text:
        raise BinaryFileError(f"{source}: binary file (NUL at offset {text.index(chr(0))}); give a text file")
    if 32 * len(_CONTROLS.findall(text)) > len(text):
        raise BinaryFileError(f"{source}: binary file (too many control characters); give a text file")
    return text.replace("\r\n", "\n")


def read_text(path: str | Path) -> str:
    """Text of a file on disk, by `decode_source`; raises OSError when it cannot be read."""
    return decode_source(Path(path).read_bytes(), source=str(path))
