"""WebSocket frames in blocks: decode many messages that follow each other in a few operations.

Pure functions on bytes, no I/O. This is the fast path of `protocol.Protocol`. It decodes *simple* frames only: a
simple frame is one whole binary message, masked by a client. wsproto judges all other frames.

Frames of one size are decoded with one slice for each byte of a frame, whatever their number. Small frames of mixed
sizes need a short step each: their payloads and masks are collected and unmasked together.
"""

from typing import NamedTuple

Buffer = bytes | bytearray

MAX_MESSAGE = 8 * 1024 * 1024
"""Bytes in one message or HTTP body, at most."""
MAX_MIXED = 256
"""Small frames that are taken with a step each, at most, before a look for frames of one size."""
_ALL_BYTES = bytes(range(256))
_SMALL_SIZES = bytes(byte - 0x80 if 0x80 < byte < 0x80 + 126 else 0 for byte in range(256))
"""For the second byte of a frame: the payload's size, if the frame is masked and its length is in this byte; else 0."""


class Messages(NamedTuple):
    """One or more messages of `size` bytes each, end to end in `payloads`. An empty message is alone.

    A block of small messages stays one object, so that decoding it needs no step per message.
    """

    payloads: Buffer
    size: int


class MixedMessages(NamedTuple):
    """Messages of different sizes, none of them empty, end to end in `payloads`."""

    payloads: Buffer
    sizes: list[int]


MessageGroup = Messages | MixedMessages


class FrameHead(NamedTuple):
    """The head of a frame (RFC 6455 section 5.2)."""

    size: int  # bytes, with the mask
    payload_size: int  # bytes
    simple: bool  # the frame is a whole message: binary, masked, neither empty nor too large


def frame_head(data: Buffer, start: int) -> FrameHead | None:
    """Return the head of the frame that begins at `start`; None if `data` ends within the head."""
    left = len(data) - start
    if left < 2:
        return None
    payload_size = data[start + 1] & 0x7F
    masked = data[start + 1] > 0x7F
    extended = 2 if payload_size == 126 else 8 if payload_size == 127 else 0
    size = 2 + extended + 4 * masked
    if left < size:
        return None
    shortest = 1
    if extended:
        shortest = 126 if extended == 2 else 65_536  # a length must have its shortest form
        payload_size = int.from_bytes(data[start + 2 : start + 2 + extended], "big")
    simple = masked and data[start] == 0x82 and shortest <= payload_size <= MAX_MESSAGE
    return FrameHead(size, payload_size, simple)


def take_frames(data: Buffer, start: int, head: FrameHead) -> tuple[MessageGroup, int]:
    """Return the message of the frame at `start` and of similar frames behind it, and where they end.

    `head` is the head of the first frame, which is simple and whole in `data`.
    """
    size = head.payload_size
    in_columns = size % 4 == 0 and size <= 64
    if size < 126 and not in_columns:
        return _take_small(data, start)
    step = head.size + size
    count = _count_alike(data, start, step, head.size - 4)
    end = start + count * step
    if in_columns:
        if count < 6 + size:  # as measured: slices cost more than a step for each of so few frames
            return _take_small(data, start)
        return Messages(_unmask_columns(data, start + head.size - 4, step, end, size, count), size), end
    with memoryview(data) as view:
        payloads = [_unmask(data[at - 4 : at], view[at : at + size]) for at in range(start + head.size, end, step)]
    return Messages(payloads[0] if count == 1 else b"".join(payloads), size), end


def _count_alike(data: Buffer, start: int, step: int, length: int) -> int:
    """Return how many whole frames of `step` bytes, from `start` on, begin with the same `length` bytes."""
    available = (len(data) - start) // step
    count, window = 1, 16
    while count < available:
        planned = end = min(available, count + window)
        for i in range(start, start + length):
            column = data[i + count * step : start + end * step : step]
            end = count + len(column) - len(column.lstrip(data[i : i + 1]))
        count = end
        if end < planned:
            break
        window *= 4  # a window that grows keeps the cost linear for frames of many sizes, too
    return count


def _take_small(data: Buffer, start: int) -> tuple[MessageGroup, int]:
    """Return the messages of the small frames from `start` on, at most MAX_MIXED, and where they end.

    A small frame is simple, and its payload is below 126 bytes. The first one is whole in `data`.
    """
    payloads, keys = [], []
    at = start
    last = len(data) - 1  # byte
    for _ in range(MAX_MIXED):
        if at >= last or data[at] != 0x82 or not (size := _SMALL_SIZES[data[at + 1]]):
            break
        body = at + 6
        end = body + size
        if end > last + 1:
            break
        payloads.append(data[body:end])
        key = data[body - 4 : body] * (size + 3 >> 2)
        keys.append(key[:size] if size & 3 else key)
        at = end
    unmasked = _xor(b"".join(keys), b"".join(payloads))
    sizes = list(map(len, payloads))
    if sizes.count(sizes[0]) == len(sizes):
        return Messages(unmasked, sizes[0]), at
    return MixedMessages(unmasked, sizes), at


def _unmask_columns(data: Buffer, mask: int, step: int, end: int, size: int, count: int) -> bytes:
    """Return the payloads of `count` frames that are `step` bytes apart, unmasked with one slice for each byte.

    `mask` is where the mask of the first frame begins.
    """
    masks, masked = bytearray(size * count), bytearray(size * count)
    for i in range(4):
        column = data[mask + i : end : step]
        for j in range(i, size, 4):
            masks[j::size] = column
    for j in range(size):
        masked[j::size] = data[mask + 4 + j : end : step]
    return _xor(masks, masked)


def _unmask(mask: Buffer, payload: memoryview) -> Buffer:
    """Return `payload`, masked or unmasked with the four bytes of `mask` (RFC 6455 section 5.3)."""
    size = len(payload)
    if size < 1024:
        return _xor((mask * (size // 4 + 1))[:size], payload)
    unmasked = bytearray(payload)
    for i in range(4):
        unmasked[i::4] = unmasked[i::4].translate(_xor(mask[i : i + 1] * 256, _ALL_BYTES))
    return unmasked


def _xor(left: Buffer, right: Buffer | memoryview) -> bytes:
    return (int.from_bytes(left, "little") ^ int.from_bytes(right, "little")).to_bytes(len(left), "little")
