"""Bytes <-> integers: the formats of `/v1.0/ingest`. Pure functions, no I/O, no threads, no locks.

All numbers are big-endian. A *run* says which source a stretch of values belongs to; a *block* is
what one or more messages decode to: its runs, in order, and all their values in one `array('q')`.
"""

import sys
from array import array
from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

Buffer = bytes | bytearray

SUBPROTOCOL = "ringoexp.batch.v1"
PLAIN_SUBPROTOCOL = "ringoexp.plain.v1"
"""Plain messages, as without a subprotocol: for clients that have to offer one, to offer their token beside it."""
MAX_MESSAGE = 8 * 1024 * 1024
"""Most bytes in one message or HTTP body."""
MAX_RUNS = 65_536
"""Most runs in one batch message: each costs the store more than a record does."""
MAX_SEQUENCE = 2**63 - 1
"""A run ends at or before it: a sequence, and the end of a run, are SQLite's signed 64-bit integers."""

_RUNS = Struct(">I")
_RUN = Struct(">16sQI")
_ACK = Struct(">Q")
_ALL_BYTES = bytes(range(256))
_SWAP = sys.byteorder == "little"
_SIGNS = bytes(0x00 if byte < 0x80 else 0xFF for byte in _ALL_BYTES)


class Run(NamedTuple):
    """`count` records of `source` (16 bytes of UUID), numbered `first`, `first + 1`, ..."""

    source: bytes
    first: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody wants here


class Block(NamedTuple):
    """Runs, in order, and their values: `sum(run.count for run in runs) == len(values)`."""

    runs: list[Run]
    values: "array[int]"

    def after(self, count: int) -> "Block":
        """What is left of the block without its first `count` records."""
        runs, skip = [], count
        for run in self.runs:
            cut = min(skip, run.count)
            skip -= cut
            if cut < run.count:
                runs.append(Run(run.source, run.first + cut, run.count - cut))
        return Block(runs, self.values[count:])


class WireError(ValueError):
    """A message is not in the agreed format. The text tells the sender what to change.

    `close_code` answers it on a WebSocket (RFC 6455 section 7.4.1), `status` over HTTP.
    """

    def __init__(self, reason: str, close_code: int = 1007, status: int = 400) -> None:
        super().__init__(reason)
        self.close_code = close_code
        self.status = status


class Messages(NamedTuple):
    """One or more messages of `size` bytes each, end to end in `payloads`."""

    payloads: Buffer
    size: int

    def each(self) -> list[Buffer]:
        """The messages one by one. An empty message stands alone."""
        return [self.payloads[i : i + self.size] for i in range(0, len(self.payloads) or 1, self.size or 1)]


def decode_plain(payload: Buffer) -> "array[int]":
    """The integers of one plain message: 4 bytes are one int32, any other multiple of 8 are int64s.

    Raises WireError for every other length, 0 included.
    """
    size = len(payload)
    if size == 4:
        return _int32s(payload)
    if size == 0 or size % 8:
        raise _plain_error(size)
    values = array("q")
    values.frombytes(payload)
    return _swapped(values)


def decode_plain_messages(groups: Sequence[Messages]) -> tuple["array[int]", WireError | None]:
    """The integers of plain messages in order, up to the first bad one, and what is wrong with that.

    A group is decoded as one block, without a step per message.
    """
    values = array("q")
    for group in groups:
        size = group.size
        if len(group.payloads) == size:
            try:
                decoded = decode_plain(group.payloads)
            except WireError as error:
                return values, error.with_traceback(None)  # which holds the frames, and they the payloads
        elif size == 4:
            decoded = _int32s(group.payloads)
        elif size % 8 == 0:
            decoded = decode_plain(group.payloads)
        else:
            return values, _plain_error(size)
        if len(groups) == 1:
            return decoded, None
        values += decoded
    return values, None


def encode_plain(values: Sequence[int]) -> bytes:
    """The plain message of `values` as 64-bit integers. Raises OverflowError beyond 64 bits."""
    return _swapped(array("q", values)).tobytes()


def decode_batch(payload: Buffer) -> Block:
    """The runs and values of one batch message (subprotocol `ringoexp.batch.v1`).

    Raises WireError when the runs do not add up to the payload, byte for byte.
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
        raise WireError(f"{count} runs need {start} bytes before the values, the message has {size}")
    runs = [Run(*fields) for fields in _RUN.iter_unpack(memoryview(payload)[_RUNS.size : start])]
    total = 0
    for number, run in enumerate(runs):
        if run.count == 0:
            raise WireError(f"run {number} has no records: leave it out")
        if run.first + run.count > MAX_SEQUENCE:
            raise WireError(f"run {number} ends at {run.first + run.count}: sequences end at 2**63 - 1")
        total += run.count
    if size - start != total * 8:
        raise WireError(f"the runs name {total} values of 8 bytes, {size - start} bytes follow them, not {total * 8}")
    values = array("q")
    values.frombytes(memoryview(payload)[start:])
    return Block(runs, _swapped(values))


def decode_batch_messages(groups: Sequence[Messages]) -> tuple[Block, WireError | None]:
    """The blocks of batch messages joined, up to the first bad one, and what is wrong with that."""
    joined = Block([], array("q"))
    for group in groups:
        for message in group.each():
            try:
                block = decode_batch(message)
            except WireError as error:
                return joined, error.with_traceback(None)
            if len(groups) == 1 and len(message) == len(group.payloads):
                return block, None
            joined.runs.extend(block.runs)
            joined.values.extend(block.values)
    return joined, None


def encode_batch(runs: Sequence[Run], values: "array[int]") -> bytes:
    """The batch message of a block. `values` is left as it was."""
    head = [_RUNS.pack(len(runs))]
    head += [_RUN.pack(*run) for run in runs]
    body = _swapped(values[:])
    return b"".join((*head, memoryview(body)))


def encode_ack(count: int) -> bytes:
    """The ack for `count` records stored since the connection began: 8 bytes, unsigned."""
    return _ACK.pack(count)


def decode_ack(payload: Buffer) -> int:
    """How many records of the connection are stored. Raises WireError unless it has 8 bytes."""
    if len(payload) != _ACK.size:
        raise WireError(f"{len(payload)} bytes: an ack has {_ACK.size}")
    (count,) = _ACK.unpack(payload)
    return int(count)


# Frames. What most clients send most of the time is one frame like the other: binary, masked, final,
# of one size. Those are taken out of the receive buffer together, without a step per frame.


class FrameHead(NamedTuple):
    """The head of a frame (RFC 6455 section 5.2), sizes in bytes.

    `simple` is a frame that is a whole message: binary, masked, neither empty nor too large.
    """

    head: int  # with the mask
    payload: int
    simple: bool


def frame_head(data: Buffer, start: int) -> FrameHead | None:
    """The head of the frame that begins at `start`; None when `data` ends within it."""
    left = len(data) - start
    if left < 2:
        return None
    size = data[start + 1] & 0x7F
    masked = data[start + 1] > 0x7F
    extended = 2 if size == 126 else 8 if size == 127 else 0
    head = 2 + extended + 4 * masked
    if left < head:
        return None
    least = 1
    if extended:
        least = 126 if extended == 2 else 65_536  # a length has its shortest form
        size = int.from_bytes(data[start + 2 : start + 2 + extended], "big")
    return FrameHead(head, size, masked and data[start] == 0x82 and least <= size <= MAX_MESSAGE)


def take_frames(data: Buffer, start: int, first: FrameHead) -> tuple[Messages, int]:
    """The messages of the frame at `start`, whole and simple, and of those like it behind it; and where they end.

    `first` is the frame's head.
    """
    head, size = first.head, first.payload
    step = head + size
    count = _alike(data, start, step, head - 4)
    end = start + count * step
    if size % 4 == 0 and size <= 64 and count > 4:
        return Messages(_unmask_columns(data, start + head - 4, step, end, size, count), size), end
    with memoryview(data) as view:
        payloads = [_unmask(data[at - 4 : at], view[at : at + size]) for at in range(start + head, end, step)]
    return Messages(payloads[0] if count == 1 else b"".join(payloads), size), end


def _alike(data: Buffer, start: int, step: int, length: int) -> int:
    """How many whole frames of `step` bytes from `start` on begin with the same `length` bytes."""
    most = (len(data) - start) // step
    count, window = 1, 16
    while count < most:
        planned = end = min(most, count + window)
        for i in range(start, start + length):
            column = data[i + count * step : start + end * step : step]
            end = count + len(column) - len(column.lstrip(data[i : i + 1]))
        count = end
        if end < planned:
            break
        window *= 4  # so that frames of many sizes cost no more than their number
    return count


def _unmask_columns(data: Buffer, mask: int, step: int, end: int, size: int, count: int) -> bytes:
    """The payloads of `count` frames, `step` bytes apart, the first one's mask at `mask`: a slice for each byte."""
    masks, masked = bytearray(size * count), bytearray(size * count)
    for i in range(4):
        column = data[mask + i : end : step]
        for j in range(i, size, 4):
            masks[j::size] = column
    for j in range(size):
        masked[j::size] = data[mask + 4 + j : end : step]
    return _xor(masks, masked)


def _unmask(mask: Buffer, payload: memoryview) -> Buffer:
    """`payload`, masked or unmasked with the four bytes of `mask` (RFC 6455 section 5.3)."""
    size = len(payload)
    if size < 1024:
        return _xor((mask * (size // 4 + 1))[:size], payload)
    done = bytearray(payload)
    for i in range(4):
        done[i::4] = done[i::4].translate(_xor(mask[i : i + 1] * 256, _ALL_BYTES))
    return done


def _xor(left: Buffer, right: Buffer | memoryview) -> bytes:
    return (int.from_bytes(left, "little") ^ int.from_bytes(right, "little")).to_bytes(len(left), "little")


def _int32s(payloads: Buffer) -> "array[int]":
    """The 32-bit integers of `payloads`, widened in blocks: `array("q", array("i"))` would make an object of each."""
    wide = bytearray(2 * len(payloads))
    signs = payloads[::4].translate(_SIGNS)
    for i in range(4):
        wide[i::8] = signs
        wide[4 + i :: 8] = payloads[i::4]
    values = array("q")
    values.frombytes(wide)
    return _swapped(values)


def _plain_error(size: int) -> WireError:
    return WireError(f"{size} bytes: a plain message has 4 bytes, or a multiple of 8")


def _swapped(values: "array[int]") -> "array[int]":
    """`values`, turned in place between this machine's byte order and the wire's."""
    if _SWAP:
        values.byteswap()
    return values
