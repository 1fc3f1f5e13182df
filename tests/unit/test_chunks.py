"""Bodies in chunks: valid ones are decoded, and all others are refused, at any cut of the bytes."""

import re

import pytest

from ringolib.web import chunks as chunks_module
from ringolib.web.chunks import MAX_LINE, MAX_TRAILER, ChunkedBody
from ringolib.web.headers import Refusal


def decode(data: bytes, size: int) -> tuple[bytes, bytes | None]:
    """Feed the data in parts of `size` bytes. Return the body, and the bytes behind it, or None if it has not ended."""
    body, chunks = b"", ChunkedBody(b"")
    for at in range(0, len(data), size):
        if chunks.ended:
            return body, chunks.rest + data[at:]
        chunks.receive(data[at : at + size])
        while piece := chunks.next_piece():
            body += piece
        assert (piece == b"") is chunks.ended
    return body, chunks.rest if chunks.ended else None


@pytest.mark.parametrize(
    ("data", "body"),
    [
        (b"0\r\n\r\n", b""),
        (b"3\r\nabc\r\n0\r\n\r\n", b"abc"),
        (b"3\r\nabc\r\n00A\r\n0123456789\r\n000\r\n\r\n", b"abc0123456789"),
        (b"a\r\n\r\n0\r\n\r\n012\r\n0\r\n\r\n", b"\r\n0\r\n\r\n012"),
        (b'1;a\r\nx\r\n1 ; b = "c;\\" d" ;e=f\r\ny\r\n0;g\r\n\r\n', b"xy"),
        (b"1\r\nx\r\n0\r\nContent-Length: 5\r\nX:\r\n\r\n", b"x"),
        (b"0000000000000001\r\nx\r\n0\r\n\r\n", b"x"),
        (b"1\r\nx\r\n" * 5000 + b"0\r\n\r\n", b"x" * 5000),
    ],
)
def test_chunks_are_joined_at_any_cut(data: bytes, body: bytes) -> None:
    for size in (1, 2, 3, 7, len(data) + 9):
        assert decode(data + b"GET /next", size) == (body, b"GET /next")
        assert decode(data[:-1], size)[1] is None


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\r\n", id="no size"),
        pytest.param(b"x\r\n", id="not hexadecimal"),
        pytest.param(b"0x4\r\nabcd\r\n", id="prefix"),
        pytest.param(b"-4\r\nabcd\r\n", id="negative"),
        pytest.param(b"+4\r\nabcd\r\n", id="signed"),
        pytest.param(b" 4\r\nabcd\r\n", id="blank before the size"),
        pytest.param(b"4 \r\nabcd\r\n", id="blank behind the size"),
        pytest.param(b"4_0\r\n", id="underscore"),
        pytest.param(b"\xb24\r\n", id="digit that is not ASCII"),
        pytest.param(b"00000000000000001\r\n", id="17 digits"),
        pytest.param(b"4\nabcd\r\n", id="LF behind the size"),
        pytest.param(b"4\rabcd\r\n", id="CR behind the size"),
        pytest.param(b"4\r\nabcd\n0\r\n\r\n", id="LF behind the data"),
        pytest.param(b"4\r\nabcd0\r\n\r\n", id="nothing behind the data"),
        pytest.param(b"4\r\nabcdXX0\r\n\r\n", id="other bytes behind the data"),
        pytest.param(b"4\r\nabcde\r\n0\r\n\r\n", id="more data than the size says"),
        pytest.param(b"4\r\nabc\r\n0\r\n\r\n", id="less data than the size says"),
        pytest.param(b"4;\r\n", id="extension without a name"),
        pytest.param(b"4;a=\r\n", id="extension without a value"),
        pytest.param(b'4;a="b\r\n', id="open quote"),
        pytest.param(b"4;a\nb\r\n", id="LF in an extension"),
        pytest.param(b"4;a\rb\r\n", id="CR in an extension"),
        pytest.param(b'4;a="\n"\r\n', id="LF in a quoted extension"),
        pytest.param(b"4;a=\0\r\n", id="NUL in an extension"),
        pytest.param(b"0\r\n\n", id="LF at the end"),
        pytest.param(b"0\r\nA: b\n\r\n", id="LF in the trailer"),
        pytest.param(b"0\r\nA : b\r\n\r\n", id="blank before the colon"),
        pytest.param(b"0\r\n A: b\r\n\r\n", id="folded trailer"),
        pytest.param(b"0\r\nno header\r\n\r\n", id="trailer without a colon"),
        pytest.param(b"0\r\nA: \0\r\n\r\n", id="NUL in the trailer"),
        pytest.param(b"4;" + b"a" * MAX_LINE, id="extension without an end"),
        pytest.param(b"4;" + b"a" * MAX_LINE + b"\r\n", id="long extension"),
        pytest.param(b"0\r\nA: " + b"b" * MAX_TRAILER, id="trailer without an end"),
        pytest.param(b"0\r\n" + b"A: b\r\n" * (MAX_TRAILER // 6 + 1), id="long trailer"),
        pytest.param((b"1;" + b"a" * 1000 + b"\r\nx\r\n") * 20, id="many extensions"),
    ],
)
def test_malformed_chunks_are_refused_at_any_cut(data: bytes) -> None:
    for size in (1, 2, 3, 7, len(data)):
        with pytest.raises(Refusal) as refused:
            decode(data, size)
        assert refused.value.status == 400


@pytest.mark.parametrize("line", [b"7f8" + b";a" * 2000 + b"\r\n", b"0\r\na:" + b"x" * 4000 + b"\r\n"])
def test_line_that_comes_byte_by_byte_is_matched_once(line: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """To match the extensions took 0.2 ms for each byte: a client could keep a processor busy with 5 KB/s."""
    matched = []

    class Counted:
        def __init__(self, pattern: "re.Pattern[bytes]") -> None:
            self._pattern = pattern

        def match(self, data: bytes, at: int) -> "re.Match[bytes] | None":
            matched.append(at)
            return self._pattern.match(data, at)

    for name in ("_SIZE_LINE", "_TRAILER_LINE"):
        monkeypatch.setattr(chunks_module, name, Counted(getattr(chunks_module, name)))
    assert decode(line, 1) == (b"", None)
    assert len(matched) == line.count(b"\n")
