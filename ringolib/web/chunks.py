"""A body in chunks (`Transfer-Encoding: chunked`, RFC 9112 section 7.1), without I/O: bytes in, the body out.

The decoder is strict, because a proxy in front of the server must see the same end of the body. h11 is more lenient: it
accepts a line feed as the end of a trailer line, white space behind a size and, before version 0.16, any two bytes
behind a chunk.

A `ChunkedBody` belongs to the thread of its connection.
"""

import re

from ringolib.web.headers import Refusal

MAX_LINE = 4096
"""Bytes of a line with a size and its extensions."""
MAX_TRAILER = 8192
"""Bytes of the trailer."""
FREE_FRAMING = 16
"""Bytes of framing that each chunk may have, beside two bytes for each byte of data."""
MAX_FRAMING = 16 * 1024
"""Bytes of framing beyond that, in the whole body. Without a limit, extensions would be a body without a limit."""

_NAME = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_QUOTED = rb'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'
_EXTENSION = rb"[ \t]*;[ \t]*%b(?:[ \t]*=[ \t]*(?:%b|%b))?" % (_NAME, _NAME, _QUOTED)
_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:%b)*\r\n" % _EXTENSION)
_TRAILER_LINE = re.compile(rb"%b:[\t -~\x80-\xff]*\r\n" % _NAME)
_DIGITS = b"0123456789ABCDEFabcdef"
_END_OF_LINE = b"\r\n"


class ChunkedBody:
    """Takes the bytes of a connection with `receive`, and returns the body with `next_piece`."""

    def __init__(self, data: bytes) -> None:
        self._data = data  # received, and not decoded yet
        self._left = 0  # bytes of the current chunk that have not come
        self._in_chunk = False  # up to the CRLF behind it
        self._in_trailer = False
        self._trailer = 0  # bytes of the trailer
        self._framing = 0  # bytes of framing beyond the free ones
        self.begun = bool(data)
        self.ended = False
        self.is_cut_off = False
        """True if the client has ended its side before the body was complete."""

    @property
    def rest(self) -> bytes:
        """The bytes behind the body, after it has ended."""
        return self._data

    def receive(self, data: bytes) -> None:
        """Take bytes of the connection; b"" is the end of the stream."""
        self.is_cut_off = not data
        self.begun = True
        self._data += data

    def next_piece(self) -> bytes | None:
        """Return the received part of the body, b"" at its end, or None if more bytes are needed.

        Raises Refusal if the chunks are malformed.
        """
        data, at = self._data, 0
        parts = []
        while not self.ended:
            if self._in_trailer:
                step = self._take_trailer_line(data, at)
            elif not self._in_chunk:
                step = self._take_size(data, at)
            elif self._left:
                step = min(self._left, len(data) - at)
                parts.append(data[at : at + step])
                self._left -= step
            else:
                step = self._take_end_of_chunk(data, at)
            if not step:
                break
            at += step
        self._data = data[at:]
        return b"".join(parts) or (b"" if self.ended else None)

    # Each of these returns how many bytes it has taken; 0 if more are needed.

    def _take_size(self, data: bytes, at: int) -> int:
        has_line = data.find(b"\n", at) >= 0  # the pattern takes long: a client may send a line byte by byte
        match = _SIZE_LINE.match(data, at) if has_line else None
        if not match:
            if has_line or data[at : at + 1] not in _DIGITS or len(data) - at > MAX_LINE:
                raise Refusal(400, "malformed chunk: expected its size in hexadecimal, and CR LF")
            return 0
        line = match.end() - at
        self._left = int(match[1], 16)
        self._framing = max(0, self._framing + line + 2 - FREE_FRAMING - 2 * self._left)
        if line > MAX_LINE or self._framing > MAX_FRAMING:
            raise Refusal(400, "the chunks have too many extensions: omit them")
        self._in_chunk, self._in_trailer = self._left > 0, self._left == 0
        return line

    def _take_end_of_chunk(self, data: bytes, at: int) -> int:
        end = data[at : at + 2]
        if not _END_OF_LINE.startswith(end):
            raise Refusal(400, "malformed chunk: expected CR LF after as many bytes as its size says")
        if len(end) < 2:
            return 0
        self._in_chunk = False
        return 2

    def _take_trailer_line(self, data: bytes, at: int) -> int:
        if data.startswith(_END_OF_LINE, at):
            self.ended = True
            return 2
        has_line = data.find(b"\n", at) >= 0
        match = _TRAILER_LINE.match(data, at) if has_line else None
        self._trailer += match.end() - at if match else 0
        if self._trailer + (0 if match else len(data) - at) > MAX_TRAILER:
            raise Refusal(400, f"the trailer has more than {MAX_TRAILER} bytes: omit it")
        if not match:
            if has_line:
                raise Refusal(400, "malformed trailer: expected NAME: VALUE and CR LF, then an empty line")
            return 0
        return match.end() - at
