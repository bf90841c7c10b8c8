"""The Latin-1 codec: round trips, exact error positions, counts, and what counts as text on disk."""

import pytest

from butterfly_llm.text import (
    BinaryFileError,
    StreamDecoder,
    decode,
    decode_source,
    encode,
    encode_counted,
    read_text,
)

ALL_LATIN_1 = "".join(map(chr, range(256)))
WORLD = "na\u00efve \u20ac \u4e2d\u6587 \U0001f98b\n"


def test_latin_1_is_one_byte_a_character() -> None:
    assert encode(ALL_LATIN_1) == bytes(range(256))
    assert decode(range(256)) == ALL_LATIN_1


def test_utf_8_round_trip_is_lossless() -> None:
    ids = encode(WORLD, encoding="utf-8")
    assert len(ids) > len(WORLD)
    assert decode(ids, encoding="utf-8") == WORLD


def test_error_names_file_line_column_character_and_both_ways_on() -> None:
    with pytest.raises(ValueError) as caught:
        encode("one\ntwo \u20ac three \u4e2d", source="notes.txt")
    message = str(caught.value)
    assert message.startswith("notes.txt: line 2, column 5: '\\u20ac' (U+20AC)")
    assert "--errors replace" in message and "--encoding utf-8" in message
    assert "\n" not in message


def test_error_column_counts_from_one_on_the_first_line() -> None:
    with pytest.raises(ValueError, match="line 1, column 1:"):
        encode("\u20ac")


@pytest.mark.parametrize("encoding, replaced, written", [("latin-1", 4, b"\xef ????"), ("utf-8", 0, None)])
def test_replace_counts(encoding: str, replaced: int, written: bytes | None) -> None:
    text = "\u00ef \u20ac\u4e2d\u6587\U0001f98b"
    result = encode_counted(text, encoding=encoding, errors="replace")  # type: ignore[arg-type]
    assert result.replaced == replaced
    assert result.data == (written or text.encode())


def test_lone_surrogate_does_not_fit_utf_8_either() -> None:
    with pytest.raises(ValueError, match=r"U\+D800.*outside UTF-8; use --errors replace$"):
        encode("a\ud800", encoding="utf-8")
    assert encode_counted("a\ud800", encoding="utf-8", errors="replace").data == b"a?"


def test_stream_decoder_waits_for_whole_characters() -> None:
    decoder = StreamDecoder("utf-8")
    pieces = [decoder.push(byte) for byte in WORLD.encode()]
    assert "".join(pieces) == WORLD and decoder.finish() == ""
    assert pieces[2:4] == ["", "\u00ef"]
    assert decoder.push(0xE2) == "" and decoder.finish() == "\ufffd"


def test_stream_decoder_latin_1() -> None:
    decoder = StreamDecoder()
    assert "".join(map(decoder.push, range(256))) + decoder.finish() == ALL_LATIN_1


@pytest.mark.parametrize("bad", [-1, 256])
def test_decode_refuses_ids_out_of_range(bad: int) -> None:
    with pytest.raises(ValueError):
        decode([65, bad])


@pytest.mark.parametrize(
    "raw",
    [
        WORLD.encode(),
        b"\xef\xbb\xbf" + WORLD.encode(),
        WORLD.encode("utf-16"),
        b"\xfe\xff" + WORLD.encode("utf-16-be"),
    ],
)
def test_unicode_sources(raw: bytes) -> None:
    assert decode_source(raw) == WORLD


def test_invalid_utf_8_is_latin_1() -> None:
    assert decode_source(b"caf\xe9 \xa9") == "caf\u00e9 \u00a9"


def test_only_crlf_is_normalised() -> None:
    assert decode_source(b"a\r\nb\rc\td \n\x0c") == "a\nb\rc\td \n\x0c"


@pytest.mark.parametrize("raw", [b"a\0b", bytes(range(1, 256)), "no mark".encode("utf-16-le")])
def test_binary_is_refused(raw: bytes) -> None:
    with pytest.raises(BinaryFileError, match=r"data\.bin: binary file"):
        decode_source(raw, source="data.bin")


def test_read_text(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\u00e9\r\n".encode())
    assert read_text(path) == "\u00e9\n"
    with pytest.raises(OSError):
        read_text(tmp_path / "missing.txt")
