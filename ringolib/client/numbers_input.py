"""The input of `ringoexp send`: integers from a file, from stdin or from the command line, in blocks.

`binary_integers` and `text_integers` decode pieces of bytes, and do no I/O. An `Input` reads the pieces and counts. The
main thread reads; the thread `progress` looks at the counts, which need no lock.
"""

import errno
import os
import select
import stat
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain
from time import monotonic
from typing import BinaryIO

from ringolib.decimals import BYTE_ORDER_MARK, UTF_16_MARKS, parse_integer
from ringolib.wire import decode_plain

READ_BYTES = 64 * 1024
MAX_LINE = 64 * 1024
"""Bytes of a line, at most. Without a limit, input that is no text would fill the memory."""
WAIT_MILLISECONDS = 500
"""How long a wait for input may delay a signal."""
STDIN = "-"


class BadInput(Exception):
    """The input is not a list of integers. The text says where, and shows the bad line."""


def binary_integers(pieces: Iterable[bytes]) -> Iterator["array[int]"]:
    """Yield integers of 8 bytes each in blocks. Raises BadInput at the end if bytes are left."""
    rest = b""
    for data in pieces:
        block = rest + data
        end = len(block) // 8 * 8
        rest = block[end:]
        if end:
            yield decode_plain(block[:end])
    if rest:
        raise BadInput(f"{len(rest)} bytes are left at the end: an integer has 8")


def text_integers(pieces: Iterable[bytes]) -> Iterator["array[int]"]:
    """Yield the integers of a text in blocks. Raises BadInput after all integers that precede the bad line."""
    lines_before = 0
    rest = b""
    for data in chain(pieces, [b""]):
        block = rest + data
        end = block.rfind(b"\n") + 1 if data else len(block)  # the last line may have no end
        lines, rest = block[:end].split(b"\n"), block[end:]
        if not lines_before:
            lines[0] = _without_mark(lines[0])
        try:
            if len(lines[0]) > MAX_LINE or block[:end].translate(None, b"0123456789-+ \t\r\n"):
                raise ValueError
            values = array("q", map(int, filter(bytes.strip, lines)))
        except (ValueError, OverflowError):
            yield from _integers_line_by_line(lines, lines_before)
        else:
            yield values
        lines_before += len(lines) - 1
        if len(rest) > MAX_LINE:
            raise _bad_line(rest, lines_before + 1)


def _without_mark(line: bytes) -> bytes:
    """Return the first line of a text without a byte order mark. Raises BadInput if the text is UTF-16."""
    if line.startswith(UTF_16_MARKS):
        raise BadInput("this is UTF-16 text: convert it to UTF-8, for example with iconv -f UTF-16 -t UTF-8")
    return line.removeprefix(BYTE_ORDER_MARK)


def _integers_line_by_line(lines: list[bytes], number: int) -> Iterator["array[int]"]:
    """Yield the integers of the lines, or those before a bad line; then raise BadInput. `number` lines precede them."""
    values = array("q")
    for line in lines:
        number += 1
        try:
            if len(line) > MAX_LINE:
                raise ValueError
            if text := line.strip(b" \t\r"):
                values.append(parse_integer(text))
        except (ValueError, OverflowError):
            yield values
            raise _bad_line(line, number) from None
    yield values


def _bad_line(line: bytes, number: int) -> BadInput:
    """Return the error for a line, with a hint if the line is probably no text, or text in another encoding."""
    fault, hint = "is not a whole number of 64 bits", ""
    if len(line) > MAX_LINE:
        fault = f"is longer than {MAX_LINE} bytes"
        hint = " (expected: one integer a line; --binary reads integers of 8 bytes each)"
    elif _looks_like_utf16(line):
        hint = " (it looks like UTF-16 text: convert it to UTF-8, for example with iconv)"
    elif b"\0" in line:
        hint = " (it has a NUL: --binary reads integers of 8 bytes each)"
    return BadInput(f"line {number} {fault}: {line[:60].decode('utf-8', 'backslashreplace')!r}{hint}")


def _looks_like_utf16(line: bytes) -> bool:
    """True if every second byte is NUL and the others are an integer: text in UTF-16 without a byte order mark."""
    halves = line[::2], line[1::2]
    return any(
        nul and not nul.strip(b"\0") and text.strip(b" \t\r").lstrip(b"+-").isdigit()
        for nul, text in (halves, halves[::-1])
    )


def parse_numbers(items: Sequence[str]) -> "array[int] | None":
    """Return the integers that the arguments are, or None if `items` is empty, STDIN, or an existing file.

    Raises BadInput if there are several arguments and not all are integers, or if one of several names a file.
    """
    if not items or (len(items) == 1 and os.path.lexists(items[0])) or list(items) == [STDIN]:
        return None
    values = array("q")
    for item in items:
        if item == STDIN or os.path.lexists(item):
            raise BadInput(f"{item!r} is a file, and there are other arguments: give one file, or integers only")
        try:
            values.append(parse_integer(item.encode("utf-8", "surrogateescape")))
        except (ValueError, OverflowError):
            if len(items) == 1 and not item.lstrip("+-").isdigit():
                return None  # a file that is missing
            raise BadInput(f"{item!r} is neither a file nor a whole number of 64 bits") from None
    return values


class Input:
    """The integers that one run sends, and how far it has read them.

    `given` are the integers of the command line. Without them, `file` is opened (STDIN: stdin), and `stack` closes it.
    The first `skip` integers are left out. Raises OSError.
    """

    def __init__(self, file: str, given: "array[int] | None", stack: ExitStack, binary: bool, skip: int) -> None:
        self.name = "the command line" if given is not None else "stdin" if file == STDIN else file
        self._given = given
        self._source = _open(file, stack) if given is None else None
        self._binary = binary
        self._skip = skip
        self._size = _size(self._source) if self._source else None
        self._bytes_read = 0
        self.is_typed = self._source is not None and self._source.isatty()
        self.read = 0
        """Integers read so far, without those left out."""
        self.skipped = 0
        self.ended = False
        self.arrived_at = monotonic()
        """When bytes arrived last. On a terminal: when the user pressed Enter."""

    @property
    def share(self) -> float | None:
        """The part of the input that was read, from 0 to 1; None if its size is not known."""
        if self.ended:
            return 1.0
        return min(1.0, self._bytes_read / self._size) if self._size else None

    def blocks(self) -> Iterator["array[int]"]:
        """Yield the integers in blocks. Raises BadInput after all integers that precede the fault, and OSError."""
        for values in self._all_blocks():
            left_out = min(len(values), self._skip - self.skipped)
            self.skipped += left_out
            self.read += len(values) - left_out
            yield values[left_out:] if left_out else values
        if self.skipped < self._skip:
            raise BadInput(f"it has {self.skipped} integers, fewer than --skip {self._skip} leaves out")
        self.ended = True

    def _all_blocks(self) -> Iterator["array[int]"]:
        if self._given is not None:
            return iter([self._given])
        return binary_integers(self._pieces()) if self._binary else text_integers(self._pieces())

    def _pieces(self) -> Iterator[bytes]:
        assert self._source
        while data := read_piece(self._source):
            self._bytes_read += len(data)
            self.arrived_at = monotonic()
            yield data


def _open(file: str, stack: ExitStack) -> BinaryIO:
    """Return stdin for STDIN, or else the open file, which `stack` closes. Both are without a buffer."""
    if file != STDIN:
        return stack.enter_context(open(file, "rb", buffering=0))
    if sys.stdin is None:
        raise OSError(errno.EBADF, "it is closed")
    return open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)


def _size(source: BinaryIO) -> int | None:
    """Return how many bytes a regular file has from here on; None if that is not known. In /proc, sizes are 0."""
    try:
        status = os.fstat(source.fileno())
        return max(0, status.st_size - source.tell()) if stat.S_ISREG(status.st_mode) else None
    except OSError:
        return None


def read_piece(source: BinaryIO) -> bytes:
    """Return the bytes that have arrived, READ_BYTES at most; b"" at the end. Waits until there are any.

    A signal that arrives just before a system call does not interrupt it. So no call waits for long. If another program
    has made a shared stdin non-blocking, `read` may return None.
    """
    arrived = select.poll()
    arrived.register(source, select.POLLIN)
    while not arrived.poll(WAIT_MILLISECONDS) or (data := source.read(READ_BYTES)) is None:
        pass
    return data
