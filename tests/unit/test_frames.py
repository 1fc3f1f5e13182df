"""Frames in blocks: the fast decoder takes whole messages of any sizes, and must agree with wsproto."""

import random
import struct
from array import array
from collections.abc import Iterator

import pytest
from support.harness import frame, seeded

from ringolib.net.frames import MAX_MIXED, MessageGroup, Messages, MixedMessages, frame_head, take_frames
from ringolib.net.protocol import Protocol
from ringolib.web.session import Session
from ringolib.wire import Run, encode_batch

SIZES_OF_CLIENTS = ([4, 8], [8, 16, 24], [4, 8, 16, 24], [4, 4, 8, 120, 124], [8 * n for n in range(1, 20)])
BEHIND = [
    b"",
    frame(2, bytes(8))[:1],
    frame(2, bytes(8))[:7],
    frame(2, bytes(8))[:-1],
    frame(9, b"ping"),
    frame(1, b"text"),
    frame(0, bytes(8)),
    frame(2, b""),
    frame(2, bytes(8), fin=False),
    frame(2, bytes(8), mask=None),
    frame(2, bytes(8), rsv=1),
    frame(2, bytes(126)),
    b"\x82\xfe\x00\x08" + bytes(12),  # a length not in its shortest form
]


def split(group: MessageGroup) -> list[bytes]:
    """Return the messages of a group one by one."""
    payloads = bytes(group.payloads)
    if isinstance(group, Messages):
        return [payloads[i : i + group.size] for i in range(0, len(payloads), group.size)]
    ends = [sum(group.sizes[: i + 1]) for i in range(len(group.sizes))]
    assert ends[-1] == len(payloads)
    return [payloads[end - size : end] for size, end in zip(group.sizes, ends, strict=True)]


def take(data: bytes, start: int) -> tuple[MessageGroup, int]:
    """Take the frames at `start`, the first of which is simple and whole."""
    head = frame_head(data, start)
    assert head and head.simple
    return take_frames(data, start, head)


def random_mask(rng: random.Random) -> bytes:
    return rng.choice([rng.randbytes(4), rng.randbytes(4), bytes(4)])


@pytest.mark.parametrize("size", [1, 4, 7, 8, 16, 64, 68, 124, 125, 800, 65_536])
@pytest.mark.parametrize("count", [1, 2, 4, 5, 17, 18, 81, 500])
def test_take_frames_returns_frames_of_one_size_as_one_group(size: int, count: int) -> None:
    rng = random.Random(size * count)
    count = min(count, MAX_MIXED if size < 800 else 20)
    payloads = [rng.randbytes(size) for _ in range(count)]
    stream = b"".join(frame(2, payload, mask=rng.randbytes(4)) for payload in payloads)
    for behind in (b"", stream[:1], stream[: len(stream) // count - 1], frame(9, b"")):
        group, end = take(b"xyz" + stream + behind, 3)
        assert (end, group) == (3 + len(stream), Messages(b"".join(payloads), size))


@pytest.mark.parametrize(
    "sizes", [[4], [8], [4, 8], [4, 4, 8], [8, 4, 124], [120, 4, 4, 4, 4, 16], [5, 1, 125, 4, 2], [7] * 20]
)
@pytest.mark.parametrize("behind", BEHIND)
def test_take_frames_ends_at_first_frame_not_small_and_whole(sizes: list[int], behind: bytes) -> None:
    for kind in (bytes, bytearray):
        payloads = [random.Random(size).randbytes(size) for size in sizes]
        stream = b"".join(frame(2, payload, mask=b"\x01\x80\xfe\x00") for payload in payloads)
        group, end = take(kind(b"xyz" + stream + behind), 3)
        assert end == 3 + len(stream)
        assert split(group) == payloads


def test_frames_of_two_sizes_are_one_group() -> None:
    data = (frame(2, b"four") + frame(2, b"of eight")) * 3
    assert take(data, 0) == (MixedMessages(b"fourof eight" * 3, [4, 8] * 3), len(data))


def test_group_of_mixed_messages_is_bounded() -> None:
    """Behind it, frames of one size can be taken without a step for each."""
    data = (frame(2, bytes(4)) + frame(2, bytes(8))) * MAX_MIXED + frame(2, bytes(4)) * 1000
    at, groups = 0, []
    while at < len(data):
        group, at = take(data, at)
        groups.append(group)
    assert [type(group) for group in groups] == [MixedMessages, MixedMessages, Messages]
    assert [len(split(group)) for group in groups] == [MAX_MIXED, MAX_MIXED, 1000]


def test_random_sizes_are_taken_in_order() -> None:
    seed = seeded()
    rng = random.Random(seed)
    for _ in range(100):
        payloads = [message for _ in range(rng.randrange(1, 4)) for message in mixed_messages(rng)]
        data = b"".join(frame(2, payload, mask=random_mask(rng)) for payload in payloads)
        at, taken = 0, []
        while at < len(data):
            group, at = take(data, at)
            taken += split(group)
        assert taken == payloads


class WsprotoProtocol(Protocol):
    """A protocol that gives every byte to wsproto."""

    __slots__ = ()

    @property
    def unfinished(self) -> bool:
        """True, so that the session takes no message of its own accord."""
        return True

    def receive(self, data: bytes | bytearray) -> list[MessageGroup]:
        messages: list[MessageGroup] = []
        if not self.ending:
            self._judge(data, messages)
        return messages


def outcome(protocol: Protocol, batches: bool, pieces: list[bytes]) -> dict[str, object]:
    """Return what a session with this protocol makes of `pieces`, one for each read, and of the end behind them."""
    session = Session(batches, now=0.0)
    session._protocol = protocol
    runs: list[tuple[bytes, int, int]] = []
    values, replies = array("q"), b""
    for piece in pieces:
        block = session.receive(piece, 0.0)
        while True:
            # The source of plain messages is random, and one run of theirs may be cut into several.
            runs += [(run.source, run.first, run.count) for run in block.runs if batches]
            values += block.values
            replies += session.data_to_send()
            if not session.has_input:
                break
            block = session.receive(b"", 0.0)
    assert session.received == len(values)
    session.end_of_stream(0.0)
    return {
        "values": list(values),
        "runs": runs,
        "ending": session.ending,
        "refused": session.refused,
        "by client": session.by_client,
        "replies": replies,
    }


def mixed_messages(rng: random.Random, sizes: list[int] | None = None) -> Iterator[bytes]:
    """Yield messages whose sizes alternate, repeat in a longer period, are random, or come in short runs."""
    sizes = sizes or rng.choice(SIZES_OF_CLIENTS)
    count = rng.choice([2, 7, 50, 50, 300])
    kind = rng.randrange(4)
    if kind == 0:
        order = [rng.choice(sizes), rng.choice(sizes)] * (count // 2)
    elif kind == 1:
        order = ([rng.choice(sizes) for _ in range(rng.randrange(3, 9))] * count)[:count]
    elif kind == 2:
        order = [rng.choice(sizes) for _ in range(count)]
    else:
        order = [size for _ in range(count // 8) for size in [rng.choice(sizes)] * rng.choice([1, 2, 15, 16, 40])]
    for size in order:
        yield rng.randbytes(size)


def plain_stream(rng: random.Random) -> Iterator[bytes]:
    """Yield frames of a client with plain messages, most of them valid."""
    for _ in range(rng.randrange(1, 12)):
        kind = rng.randrange(40)
        if kind < 16:  # several of one size
            size = rng.choice([4, 4, 4, 8, 8, 16, 64, 72, 120, 128, 800, 65_536])
            for _ in range(rng.choice([1, 2, 5, 20, 300]) if size < 1000 else 1):
                yield frame(2, rng.randbytes(size), mask=random_mask(rng))
        elif kind < 28:
            for message in mixed_messages(rng):
                yield frame(2, message, mask=random_mask(rng))
                if not rng.randrange(500):
                    yield from rare_frames(rng, message)
        elif kind < 30:  # of sizes among which one is invalid
            for message in mixed_messages(rng, [4, 8, 8, 16, rng.choice([5, 12, 20, 124, 125])]):
                yield frame(2, message, mask=random_mask(rng))
        else:
            yield from rare_frames(rng, rng.randbytes(8 * rng.randrange(1, 30)))


def batch_stream(rng: random.Random) -> Iterator[bytes]:
    """Yield frames of a client with batch messages, most of them valid."""
    for _ in range(rng.randrange(1, 8)):
        if rng.randrange(3):  # small ones of changing sizes, or the same one several times
            for _ in range(rng.choice([1, 5, 40])):
                message = random_batch(rng, rng.choice([1, 1, 2]), 8)
                yield from [frame(2, message, mask=random_mask(rng))] * rng.choice([1, 1, 7])
            if not rng.randrange(10):
                yield frame(2, rng.randbytes(rng.randrange(1, 126))) * 2
        else:
            yield from rare_frames(rng, random_batch(rng, rng.randrange(1, 5), 40))


def random_batch(rng: random.Random, runs: int, records: int) -> bytes:
    """Return a batch message with so many runs, of at most so many records each."""
    heads = [Run(rng.randbytes(16), rng.randrange(2**40), rng.randrange(1, records + 1)) for _ in range(runs)]
    return encode_batch(heads, array("q", rng.randbytes(8 * sum(run.count for run in heads))))


def rare_frames(rng: random.Random, message: bytes) -> Iterator[bytes]:
    """Yield frames that the fast decoder leaves to wsproto: rare but valid ones, and violations."""
    kind = rng.randrange(24)
    cut = rng.randrange(len(message))
    if kind < 6:
        yield frame(9, rng.randbytes(rng.randrange(125)))
    elif kind < 8:
        yield frame(10, b"")
    elif kind < 14:  # fragments, with a ping between them
        yield frame(2, message[:cut], fin=False, mask=random_mask(rng))
        yield frame(9, b"between")
        yield frame(0, message[cut:], mask=random_mask(rng))
    elif kind == 14:  # a message within a fragmented one
        yield frame(2, message[:4], fin=False) + frame(2, bytes(4))
    elif kind == 15:
        yield frame(1, "text é".encode())
    elif kind == 16:
        yield frame(8, struct.pack(">H", rng.choice([1000, 1001, 3000])) + b"bye")
    elif kind == 17:
        yield frame(2, rng.randbytes(rng.choice([0, 3, 5, 12, 20])))
    elif kind == 18:
        yield frame(2, message, mask=None)
    elif kind == 19:
        yield frame(rng.choice([2, 3, 11]), message, rsv=rng.randrange(8))
    elif kind == 20:  # a length not in its shortest form
        yield bytes([0x82, 0xFE]) + struct.pack(">H", 8) + bytes(12)
    elif kind == 21:
        yield bytes([0x82, 0xFF]) + struct.pack(">Q", rng.choice([8, 2**16 - 1, 2**63, 2**64 - 1])) + bytes(12)
    elif kind == 22:
        yield rng.randbytes(rng.randrange(1, 60))
    else:
        yield frame(0, b"") + frame(2, b"")


def cuts(rng: random.Random, stream: bytes) -> list[bytes]:
    """Cut `stream` into one, a few or many pieces."""
    many = rng.choice([0, 1, 5, 50, len(stream)])
    at = sorted({0, len(stream), *(rng.randrange(len(stream) + 1) for _ in range(min(many, 3000)))})
    return [stream[start:end] for start, end in zip(at, at[1:], strict=False)]


@pytest.mark.parametrize("batches", [False, True])
def test_fast_decoder_and_wsproto_agree_on_random_streams(batches: bool) -> None:
    seed = seeded()
    rng = random.Random(seed)
    endings: set[int] = set()
    rounds = 0
    while rounds < 150 or not {1002, 1006, 1007} <= endings:
        rounds += 1
        assert rounds < 5000, f"the streams ended only with {endings}"
        frames = batch_stream(rng) if batches else plain_stream(rng)
        # A pong at the end: the fast decoder waits for the whole head of a frame, wsproto only for its first byte.
        pieces = cuts(rng, b"".join(frames) + frame(10, bytes(14)))
        fast = outcome(Protocol(is_server=True), batches, pieces)
        assert fast == outcome(WsprotoProtocol(is_server=True), batches, pieces)
        ending = fast["ending"]
        assert isinstance(ending, tuple)
        endings.add(ending[0])
