"""The message formats of `/v1.0/ingest`: bytes to integers and back.

Pure functions, no I/O, no threads, no locks. All numbers are big-endian. A *run* is a number of consecutive records of
one source. A *block* is the content of one or more messages: its runs, in order, and all their values in one
`array('q')`.
"""

import sys
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import accumulate
from struct import Struct
from typing import NamedTuple

Buffer = bytes | bytearray
MessageGroup = tuple[Buffer, int | Sequence[int]]
"""Messages, end to end, and either the size of each of them or all their sizes.

A plain tuple, as this module imports nothing of the program. `ringolib.net.frames.Messages` and `MixedMessages` have
the same shape. An empty message is alone in its group, and its size is 0.
"""

INGEST_PATH = "/v1.0/ingest"
READY_PATH = "/v1.0/ready"
RECORDS_PATH = "/v1.0/records"
SUBPROTOCOL = "ringoexp.batch.v1"
PLAIN_SUBPROTOCOL = "ringoexp.plain.v1"
"""The format without a subprotocol, by name: for clients that carry their token in a second subprotocol."""
MAX_RUNS = 65_536
"""Runs in one batch message, at most: a run costs the store more than a record."""
MAX_SEQUENCE = 2**63 - 1
"""The end of a run, at most: a store keeps sequences, and the ends of runs, as signed 64-bit integers."""

_RUNS = Struct(">I")
_RUN = Struct(">16sQI")
_ACK = Struct(">Q")
_SWAP = sys.byteorder == "little"
_SIGNS = bytes(0x00 if byte < 0x80 else 0xFF for byte in range(256))
_UPPER_HALVES = [4 * _SIGNS[byte : byte + 1] for byte in range(256)]
"""For the first byte of a 32-bit integer: the four bytes in front of it that make it a 64-bit integer."""


class Run(NamedTuple):
    """`count` records of `source` (16 bytes of UUID), numbered `first`, `first + 1`, ..."""

    source: bytes
    first: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which is not needed


class Block(NamedTuple):
    """Runs, in order, and their values: `sum(run.count for run in runs) == len(values)`."""

    runs: list[Run]
    values: "array[int]"


class Rest:
    """The records of a block that are still to be taken, if not all are taken at once. The block does not change."""

    __slots__ = ("runs", "values")

    def __init__(self, block: Block) -> None:
        self.runs = deque(block.runs)
        self.values = memoryview(block.values)

    def skip(self, count: int) -> None:
        """Remove the first `count` records. The cost depends on the number of their runs, not on the other runs."""
        self.values = self.values[count:]
        runs = self.runs
        while count:
            run = runs[0]
            if run.count > count:
                runs[0] = Run(run.source, run.first + count, run.count - count)
                return
            runs.popleft()
            count -= run.count


class WireError(ValueError):
    """A message does not have the agreed format. The text is for its sender.

    `close_code` is the answer on a WebSocket (RFC 6455 section 7.4.1), `status` the answer over HTTP.
    """

    def __init__(self, reason: str, close_code: int = 1007, status: int = 400) -> None:
        super().__init__(reason)
        self.close_code = close_code
        self.status = status


def decode_plain(payload: Buffer) -> "array[int]":
    """Return the integers of one plain message: 4 bytes are one int32, a multiple of 8 bytes are int64s.

    Raises WireError for any other length, and for 0.
    """
    size = len(payload)
    if size == 4:
        return _int32s(payload)
    if size == 0 or size % 8:
        raise _plain_error(size)
    values = array("q")
    values.frombytes(payload)
    return _swapped(values)


def decode_plain_messages(groups: Sequence[MessageGroup]) -> tuple["array[int]", WireError | None]:
    """Return the integers of plain messages, in order, up to the first malformed message, and that message's error.

    A group is decoded as one block. Messages of one size need no step for each message.
    """
    values = array("q")
    for payloads, size in groups:
        if not isinstance(size, int):
            decoded, failure = _decode_mixed(payloads, size)
            if failure:
                return values + decoded, failure
        elif len(payloads) == size:
            try:
                decoded = decode_plain(payloads)
            except WireError as error:
                return values, error.with_traceback(None)  # a traceback would keep the payloads in memory
        elif size == 4:
            decoded = _int32s(payloads)
        elif size % 8 == 0:
            decoded = decode_plain(payloads)
        else:
            return values, _plain_error(size)
        if len(groups) == 1:
            return decoded, None
        values += decoded
    return values, None


def encode_plain(values: Sequence[int]) -> bytes:
    """Return the plain message of `values`, as 64-bit integers. Raises OverflowError beyond 64 bits."""
    return _swapped(array("q", values)).tobytes()


def decode_batch(payload: Buffer) -> Block:
    """Return the runs and values of one batch message (subprotocol `ringoexp.batch.v1`).

    Raises WireError if the runs do not account for every byte of the payload.
    """
    size = len(payload)
    if size < _RUNS.size:
        raise WireError(f"{size} bytes: a batch message begins with a 4-byte count of runs")
    (count,) = _RUNS.unpack_from(payload)
    start = _RUNS.size + count * _RUN.size
    if count == 0:
        raise WireError("a batch of 0 runs: send at least one")
    if MAX_RUNS < count <= size:
        raise WireError(f"{count} runs: a batch message has at most {MAX_RUNS}")
    if start > size:
        raise WireError(f"{count} runs need {start} bytes before the values: the message has {size}")
    runs = [Run(*fields) for fields in _RUN.iter_unpack(memoryview(payload)[_RUNS.size : start])]
    total = 0
    for number, run in enumerate(runs):
        if run.count == 0:
            raise WireError(f"run {number} has no records: leave it out")
        if run.first + run.count > MAX_SEQUENCE:
            raise WireError(f"run {number} ends at {run.first + run.count}: sequences end at 2**63 - 1")
        total += run.count
    if size - start != total * 8:
        raise WireError(f"the runs need {total} values of 8 bytes: {size - start} bytes follow them, not {total * 8}")
    values = array("q")
    values.frombytes(memoryview(payload)[start:])
    return Block(runs, _swapped(values))


def decode_batch_messages(groups: Sequence[MessageGroup]) -> tuple[Block, WireError | None]:
    """Return the joined blocks of batch messages up to the first malformed message, and that message's error."""
    joined = Block([], array("q"))
    for payloads, size in groups:
        for message in _split(payloads, size):
            try:
                block = decode_batch(message)
            except WireError as error:
                return joined, error.with_traceback(None)
            if len(groups) == 1 and len(message) == len(payloads):
                return block, None
            joined.runs.extend(block.runs)
            joined.values.extend(block.values)
    return joined, None


def encode_batch(runs: Sequence[Run], values: "array[int]") -> bytes:
    """Return the batch message of a block. `values` is not changed."""
    head = [_RUNS.pack(len(runs))]
    head += [_RUN.pack(*run) for run in runs]
    body = _swapped(values[:])
    return b"".join((*head, memoryview(body)))


def encode_ack(count: int) -> bytes:
    """Return the ack for `count` records stored since the connection began: 8 bytes, unsigned."""
    return _ACK.pack(count)


def decode_ack(payload: Buffer) -> int:
    """Return how many records of the connection are stored. Raises WireError unless the ack has 8 bytes."""
    if len(payload) != _ACK.size:
        raise WireError(f"{len(payload)} bytes: an ack has {_ACK.size}")
    (count,) = _ACK.unpack(payload)
    return int(count)


def _int32s(payloads: Buffer) -> "array[int]":
    """Return the 32-bit integers of `payloads` as 64-bit ones.

    They are widened with slices: `array("q", array("i"))` would make an object for each.
    """
    wide = bytearray(2 * len(payloads))
    signs = payloads[::4].translate(_SIGNS)
    for i in range(4):
        wide[i::8] = signs
        wide[4 + i :: 8] = payloads[i::4]
    values = array("q")
    values.frombytes(wide)
    return _swapped(values)


def _decode_mixed(payloads: Buffer, sizes: Sequence[int]) -> tuple["array[int]", WireError | None]:
    """Return the integers of plain messages of these sizes up to the first malformed one, and that one's error."""
    error = None
    different = set(sizes)
    malformed = {size for size in different if size != 4 and size % 8}
    if malformed:
        valid = next(i for i, size in enumerate(sizes) if size in malformed)
        error = _plain_error(sizes[valid])
        sizes = sizes[:valid]
        payloads = payloads[: sum(sizes)]
    if 4 in different:
        payloads = _widen_int32s(payloads, sizes)
    values = array("q")
    values.frombytes(payloads)
    return _swapped(values), error


def _widen_int32s(payloads: Buffer, sizes: Sequence[int]) -> bytes:
    """Return `payloads`, plain messages of these sizes, with 8 bytes for each message of 4."""
    parts: list[Buffer] = []
    copied = at = 0
    for size in sizes:
        if size == 4:
            parts.append(payloads[copied:at])
            parts.append(_UPPER_HALVES[payloads[at]])
            copied = at
        at += size
    parts.append(payloads[copied:])
    return b"".join(parts)


def _split(payloads: Buffer, size: int | Sequence[int]) -> Iterator[Buffer]:
    """Yield the messages of a group one by one."""
    if isinstance(size, int):
        for start in range(0, len(payloads) or 1, size or 1):
            yield payloads[start : start + size]
    else:
        for length, end in zip(size, accumulate(size), strict=True):
            yield payloads[end - length : end]


def _plain_error(size: int) -> WireError:
    return WireError(f"{size} bytes: a plain message has 4 bytes, or a multiple of 8")


def _swapped(values: "array[int]") -> "array[int]":
    """Convert `values`, in place, between this machine's byte order and big-endian, and return them."""
    if _SWAP:
        values.byteswap()
    return values
