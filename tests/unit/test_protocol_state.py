"""The WebSocket protocol without I/O: both ends agree with wsproto; pongs, closing, limits, memory.

`test_frames.py` has the random streams of clients; here are the streams of servers.
"""

import random
import struct
import tracemalloc
from collections.abc import Iterator

import pytest
from support.harness import frame, seeded
from wsproto import ConnectionType
from wsproto.connection import Connection
from wsproto.events import BytesMessage, CloseConnection, Message, Ping, Pong, TextMessage

from ringolib.net import protocol as module
from ringolib.net.frames import MAX_MESSAGE, Messages
from ringolib.net.protocol import Protocol
from ringolib.wire import encode_plain

CLOSE = struct.pack(">H", 1000) + b"bye"


def server_frame(opcode: int, payload: bytes, fin: bool = True, rsv: int = 0) -> bytes:
    return frame(opcode, payload, fin, mask=None, rsv=rsv)


def receive_all(protocol: Protocol, pieces: list[bytes]) -> list[bytes]:
    """Return the messages of `pieces`, one by one."""
    messages: list[bytes] = []
    for piece in pieces:
        groups = protocol.receive(piece)
        while protocol.has_input:
            groups += protocol.receive(b"")
        for group in groups:
            sizes = (
                [group.size] * (len(group.payloads) // (group.size or 1) or 1)
                if isinstance(group, Messages)
                else group.sizes
            )
            at = 0
            for size in sizes:
                messages.append(bytes(group.payloads[at : at + size]))
                at += size
    return messages


def at_other_end(data: bytes, role: ConnectionType) -> list[object]:
    """Return what wsproto reads from `data` at this end: pairs of opcode and payload, without the masks."""
    peer = Connection(role)
    peer.receive_data(data)
    frames: list[object] = []
    for event in peer.events():
        if isinstance(event, Pong | Ping):
            frames.append((10 if isinstance(event, Pong) else 9, bytes(event.payload)))
        elif isinstance(event, CloseConnection):
            frames.append((8, int(event.code), event.reason or ""))
        elif isinstance(event, Message):
            frames.append((2, bytes(event.data)))
    return frames


def judged(stream: bytes) -> tuple[list[bytes], tuple[int, str] | None, list[object]]:
    """Return what wsproto alone makes of a server's stream: messages, ending, pongs."""
    judge = Connection(ConnectionType.CLIENT)
    judge.receive_data(stream)
    messages, message, pongs = [], b"", b""
    for event in judge.events():
        if isinstance(event, BytesMessage):
            message += event.data
            if event.message_finished:
                messages.append(message)
                message = b""
        elif isinstance(event, Ping):
            pongs += judge.send(event.response())
        elif isinstance(event, TextMessage):
            return (
                messages,
                (1003, "text is not accepted: send binary messages"),
                at_other_end(pongs, ConnectionType.SERVER),
            )
        elif isinstance(event, CloseConnection):
            return messages, (event.code, event.reason or ""), at_other_end(pongs, ConnectionType.SERVER)
    return messages, None, at_other_end(pongs, ConnectionType.SERVER)


def server_stream(rng: random.Random) -> Iterator[bytes]:
    """Yield frames of a server, most of them valid."""
    for _ in range(rng.randrange(1, 30)):
        kind = rng.randrange(60)
        message = rng.randbytes(rng.choice([0, 1, 8, 8, 8, 125, 126, 200, 70_000]))
        cut = rng.randrange(len(message) + 1)
        if kind < 30:
            yield server_frame(2, struct.pack(">Q", rng.randrange(2**64)))
        elif kind < 40:
            yield server_frame(2, message)
        elif kind < 46:
            yield server_frame(rng.choice([9, 10]), rng.randbytes(rng.randrange(126)))
        elif kind < 53:
            yield (
                server_frame(2, message[:cut], fin=False) + server_frame(9, b"between") + server_frame(0, message[cut:])
            )
        elif kind == 53:
            yield server_frame(8, CLOSE)
        elif kind == 54:
            yield server_frame(1, "text é".encode())
        elif kind == 55:
            yield frame(2, message)  # masked
        elif kind == 56:
            yield server_frame(rng.choice([2, 3, 11]), message, rsv=rng.randrange(8))
        elif kind == 57:
            yield bytes([0x82, 0x7E]) + struct.pack(">H", 8) + bytes(8)  # a length not in its shortest form
        elif kind == 58:
            yield server_frame(2, message[:4], fin=False) + server_frame(2, message)
        else:
            yield rng.randbytes(rng.randrange(1, 60))


def test_client_and_wsproto_agree_on_random_streams_of_servers() -> None:
    seed = seeded()
    rng = random.Random(seed)
    endings: set[int] = set()
    rounds = 0
    while rounds < 300 or not {0, 1000, 1002, 1003} <= endings:
        rounds += 1
        assert rounds < 5000, f"the streams ended only with {endings}"
        # A pong at the end: the protocol waits for the whole head of a frame, wsproto only for its first byte.
        stream = b"".join(server_stream(rng)) + server_frame(10, bytes(14))
        at = sorted({0, len(stream), *(rng.randrange(len(stream)) for _ in range(rng.choice([0, 1, 5, 50, 1000])))})
        protocol = Protocol(is_server=False)
        messages = receive_all(protocol, [stream[a:b] for a, b in zip(at, at[1:], strict=False)])
        assert (messages, protocol.ending, at_other_end(protocol.replies, ConnectionType.SERVER)) == judged(stream)
        endings.add(protocol.ending[0] if protocol.ending else 0)


@pytest.mark.parametrize("is_server", [True, False])
def test_message_frame_is_read_by_wsproto_at_the_other_end(is_server: bool) -> None:
    protocol = Protocol(is_server)
    peer = ConnectionType.CLIENT if is_server else ConnectionType.SERVER
    data = protocol.message_frame(b"12345678") + protocol.ping_frame() + protocol.close_frame(1001, "leaving")
    assert at_other_end(data, peer) == [(2, b"12345678"), (9, b""), (8, 1001, "leaving")]
    assert protocol.close_frame(1000, "again") == b"", "once"
    if is_server:
        assert protocol.ping_frame is not None and at_other_end(module.PING, peer) == [(9, b"")]


@pytest.mark.parametrize("is_server", [True, False])
def test_pings_are_answered_in_order_with_their_payloads(is_server: bool) -> None:
    protocol = Protocol(is_server)
    mask = bytes(4) if is_server else None
    protocol.receive(b"".join(frame(9, payload, mask=mask) for payload in (b"a", b"", b"c" * 125)))
    peer = ConnectionType.CLIENT if is_server else ConnectionType.SERVER
    assert at_other_end(protocol.replies, peer) == [(10, b"a"), (10, b""), (10, b"c" * 125)]


def test_one_call_answers_few_pings() -> None:
    """So that the owner can serve others in between: 512 of them took 6 ms."""
    protocol = Protocol(is_server=True)
    protocol.receive(frame(9, b"") * 1000)
    answered = [len(protocol.replies) // 2]
    while protocol.has_input:
        assert protocol.receive(b"") == []
        answered.append(len(protocol.replies) // 2 - sum(answered))
    assert max(answered) <= 100 and sum(answered) == 1000


@pytest.mark.parametrize("is_server", [True, False])
def test_close_frame_answers_the_peers_with_its_code(is_server: bool) -> None:
    protocol = Protocol(is_server)
    protocol.receive(frame(8, CLOSE, mask=bytes(4) if is_server else None))
    assert protocol.ending == (1000, "bye") and not protocol.at_fault
    peer = ConnectionType.CLIENT if is_server else ConnectionType.SERVER
    assert at_other_end(protocol.close_frame(1000, "bye"), peer) == [(8, 1000, "bye")]
    assert protocol.receive(frame(2, bytes(4))) == [], "what follows is ignored"


@pytest.mark.parametrize("is_server", [True, False])
def test_reason_of_close_frame_is_made_valid_and_cut(is_server: bool) -> None:
    """The name of a file may have bytes that are not UTF-8, which Python keeps as surrogates."""
    peer = ConnectionType.CLIENT if is_server else ConnectionType.SERVER
    reason = b"not stored: /tmp/\xff.db: disk full".decode("utf-8", "surrogateescape")
    assert at_other_end(Protocol(is_server).close_frame(1011, reason), peer) == [
        (8, 1011, "not stored: /tmp/?.db: disk full")
    ]
    data = Protocol(is_server).close_frame(1011, "\udcff" + 200 * "\u20ac")
    assert at_other_end(data, peer) == [(8, 1011, "?" + 40 * "\u20ac")], "123 bytes at most, and whole characters"


@pytest.mark.parametrize("fragmented", [True, False])
def test_message_over_the_limit_ends_with_1009(fragmented: bool) -> None:
    protocol = Protocol(is_server=True)
    largest = bytes(MAX_MESSAGE)
    assert receive_all(protocol, [frame(2, largest)]) == [largest]
    if fragmented:
        assert receive_all(protocol, [frame(2, largest, fin=False), frame(0, bytes(1))]) == []
    else:
        assert receive_all(protocol, [frame(2, bytes(MAX_MESSAGE + 1))]) == []
    assert protocol.ending and protocol.ending[0] == 1009 and protocol.at_fault and protocol.held == 0


def test_large_message_in_small_reads_is_joined_once() -> None:
    """The start of a message is not parsed again for each read, and is not kept in pieces."""
    message = encode_plain(range(200_000))
    stream = frame(2, message)
    protocol = Protocol(is_server=True)
    for start in range(0, len(stream) - 1, 4096):
        assert protocol.receive(stream[start : min(start + 4096, len(stream) - 1)]) == []
        assert protocol._needed == len(stream) and not protocol.has_input
    assert protocol.held == len(stream) - 1
    assert protocol.receive(stream[-1:]) == [Messages(message, len(message))]


def test_message_in_tiny_fragments_needs_only_its_size_in_memory() -> None:
    protocol = Protocol(is_server=True)
    protocol.receive(frame(2, b"", fin=False))
    tracemalloc.start()
    try:
        assert receive_all(protocol, [frame(0, b"ab", fin=False) * 20_000]) == []
        assert receive_all(protocol, [frame(0, b"", fin=False) * 20_000]) == []
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 400_000
    assert receive_all(protocol, [frame(0, b"cd")]) == [b"ab" * 20_000 + b"cd"]


def test_large_message_leaves_no_memory_behind() -> None:
    protocol = Protocol(is_server=True)
    message = frame(2, bytes(4_000_000))
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for start in range(0, len(message), 65_536):
            protocol.receive(message[start : start + 65_536])
        assert tracemalloc.get_traced_memory()[0] - before < 100_000
    finally:
        tracemalloc.stop()


def test_ping_in_two_pieces_is_unfinished_only_in_between() -> None:
    protocol = Protocol(is_server=True)
    ping = frame(9, b"two pieces")
    protocol.receive(ping[:5])
    assert protocol.unfinished
    protocol.receive(ping[5:])
    assert not protocol.unfinished and protocol.replies.endswith(b"two pieces")


def test_unfinished_message_is_discarded_on_request() -> None:
    protocol = Protocol(is_server=True)
    protocol.receive(frame(2, bytes(1_000_000))[:-1])
    protocol.end(1006, "connection lost")
    assert protocol.held == 0 and not protocol.has_input and protocol.ending == (1006, "connection lost")
    protocol.end(1000, "later")
    assert protocol.ending == (1006, "connection lost"), "the first ending stays"
