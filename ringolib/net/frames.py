"""TODO: ringolib/net/frames.py."""

from typing import NamedTuple

Buffer = bytes | bytearray

MAX_MESSAGE = 8 * 1024 * 1024
"""Most bytes in one message or HTTP body."""
_ALL_BYTES = bytes(range(256))


class Messages(NamedTuple):
    """One or more messages of `size` bytes each, end to end in `payloads`."""

    payloads: Buffer
    size: int

    def each(self) -> list[Buffer]:
        """The messages one by one. An empty message stands alone."""
        return [self.payloads[i : i + self.size] for i in range(0, len(self.payloads) or 1, self.size or 1)]


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
