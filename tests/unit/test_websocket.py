"""WebSocket connections: the fast decoder must agree with wsproto; deadlines of clients; queued acks and pongs."""

import random
import socket
import struct
import threading
import tracemalloc
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

import pytest
from ringolib.net.websocket_server import ServerConnection
from support.harness import DEADLINE, HANDSHAKE, Blocked, eventually, frame, raw_link, seeded

from ringbuffer import Ring
from ringolib.counters import Totals
from ringolib.net import sockets, websocket_server
from ringolib.net.addresses import Endpoint
from ringolib.net.frames import Messages, frame_head, take_frames
from ringolib.net.websocket import MAX_UNSENT
from ringolib.net.websocket_client import ClientConnection
from ringolib.web import session as session_module
from ringolib.web.intake import STORED, RingIntake, Ticket
from ringolib.web.session import Session
from ringolib.wire import SUBPROTOCOL, Block, Run, encode_ack, encode_batch, encode_plain


class WsprotoConnection(ServerConnection):
    """A connection on which wsproto parses every byte."""

    def parse(self, data: bytes) -> list[Messages]:
        messages: list[Messages] = []
        if not self.ending:
            self._parse_slowly(data, messages)
        return messages


class Memory:
    """An intake that keeps the records in memory. They count as stored at once."""

    closed = False

    def __init__(self) -> None:
        self.runs: list[tuple[int, int]] = []
        self.values = array("q")

    def put(self, block: Block, timeout: float) -> tuple[int, Ticket]:
        # Without the source, which is random for plain messages.
        self.runs += [(run.first, run.count) for run in block.runs]
        self.values += block.values
        return len(block.values), STORED

    def stored(self, ticket: Ticket) -> bool:
        return True

    def wait(self, ticket: Ticket, timeout: float) -> bool:
        return True


@contextmanager
def connected(kind: type[ServerConnection], subprotocol: str = "") -> Iterator[tuple[ServerConnection, socket.socket]]:
    """Connect a server's end of this class to a client's socket, and perform the handshake."""
    server_sock, client = socket.socketpair()
    stop, stopper = socket.socketpair()
    client.settimeout(DEADLINE)
    headers = {**HANDSHAKE, **({"Sec-WebSocket-Protocol": subprotocol} if subprotocol else {})}
    with server_sock, client, stop, stopper:
        connection = kind(server_sock, headers, {}, (SUBPROTOCOL,), stop)
        while not client.recv(65536).endswith(b"\r\n\r\n"):
            pass
        yield connection, client


def outcome(
    kind: type[ServerConnection], subprotocol: str, pieces: list[bytes]
) -> tuple[list[int], int, tuple[int, str], list[tuple[int, bytes]]]:
    """Run a session on `pieces`, one for each read.

    Return the stored values, the number of records in the runs, the ending, and all sent frames except acks.
    """
    reads = iter(pieces)

    class Pieces(kind):  # type: ignore[misc,valid-type]
        def read(self, wait: bool = True) -> bytes | None:
            return next(reads, b"")

    with connected(Pieces, subprotocol) as (connection, client):
        intake = Memory()
        session = Session(connection, intake, Totals(), threading.Event())
        run = Blocked(lambda: session.run(b""))
        sent = b""
        client.shutdown(socket.SHUT_WR)
        while data := client.recv(65536):
            sent += data
        ending = run.result()
    frames = []
    while sent:
        size = sent[1]
        frames.append((sent[0] & 15, sent[2 : 2 + size]))
        sent = sent[2 + size :]
    acks = [struct.unpack(">Q", payload)[0] for opcode, payload in frames if opcode == 2]
    assert acks == sorted(set(acks))
    if ending[0] != 1006:  # after a lost connection the acks may have been lost, too
        assert (acks or [0])[-1] == session.acked == len(intake.values)
    others = [(opcode, payload) for opcode, payload in frames if opcode != 2]
    return list(intake.values), sum(count for _, count in intake.runs), ending, others


def random_mask(rng: random.Random) -> bytes:
    return rng.choice([rng.randbytes(4), rng.randbytes(4), bytes(4)])


def plain_stream(rng: random.Random) -> Iterator[bytes]:
    """Yield frames of a client with plain messages, most of them valid."""
    for _ in range(rng.randrange(1, 12)):
        kind = rng.randrange(40)
        if kind < 24:  # several of one size
            size = rng.choice([4, 4, 4, 8, 8, 16, 64, 72, 120, 128, 800, 65_536])
            for _ in range(rng.choice([1, 2, 5, 20, 300]) if size < 1000 else 1):
                yield frame(2, rng.randbytes(size), mask=random_mask(rng))
        elif kind < 28:  # of two sizes
            for _ in range(rng.randrange(50)):
                yield frame(2, rng.randbytes(rng.choice([4, 8])), mask=random_mask(rng))
        else:
            yield from rare_frames(rng, rng.randbytes(8 * rng.randrange(1, 30)))


def batch_stream(rng: random.Random) -> Iterator[bytes]:
    """Yield frames of a client with batch messages, most of them valid."""
    for _ in range(rng.randrange(1, 8)):
        runs = [Run(rng.randbytes(16), rng.randrange(2**40), rng.randrange(1, 40)) for _ in range(rng.randrange(1, 5))]
        message = encode_batch(runs, array("q", rng.randbytes(8 * sum(run.count for run in runs))))
        if rng.randrange(3):
            yield from [frame(2, message, mask=random_mask(rng))] * rng.choice([1, 1, 7])
        else:
            yield from rare_frames(rng, message)


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


@pytest.mark.parametrize("subprotocol", ["", SUBPROTOCOL])
def test_fast_decoder_and_wsproto_agree_on_random_streams(subprotocol: str) -> None:
    seed = seeded()
    rng = random.Random(seed)
    endings: set[int] = set()
    rounds = 0
    while rounds < 150 or not {1002, 1006, 1007} <= endings:
        rounds += 1
        assert rounds < 5000, f"the streams ended only with {endings}"
        frames = batch_stream(rng) if subprotocol else plain_stream(rng)
        # A pong at the end: the fast decoder waits for the whole head of a frame, wsproto only for its first byte.
        pieces = cuts(rng, b"".join(frames) + frame(10, bytes(14)))
        fast, slow = outcome(ServerConnection, subprotocol, pieces), outcome(WsprotoConnection, subprotocol, pieces)
        assert fast == slow
        endings.add(int(fast[2][0]))


@pytest.mark.parametrize("size", [4, 8, 16, 64, 68, 800, 65_536])
@pytest.mark.parametrize("count", [1, 2, 4, 5, 17, 18, 81, 500])
def test_take_frames_returns_all_frames_of_one_size(size: int, count: int) -> None:
    rng = random.Random(size * count)
    count = min(count, 20) if size > 800 else count
    payloads = [rng.randbytes(size) for _ in range(count)]
    stream = b"".join(frame(2, payload, mask=rng.randbytes(4)) for payload in payloads)
    for tail in (b"", stream[:1], stream[: len(stream) // count - 1], frame(9, b""), frame(2, bytes(size + 4))):
        data = b"xyz" + stream + tail
        head = frame_head(data, 3)
        assert head and head.simple
        group, end = take_frames(data, 3, head)
        assert (end, group.size, group.payloads) == (3 + len(stream), size, b"".join(payloads))
        assert group.split() == payloads


def test_client_that_closes_its_side_still_gets_its_acks() -> None:
    ring = Ring(10)
    for last in (b"", frame(8, struct.pack(">H", 1000))):
        with connected(ServerConnection) as (connection, client):
            run = Blocked(lambda: Session(connection, RingIntake(ring), Totals(), threading.Event()).run(b""))  # noqa: B023
            client.sendall(frame(2, bytes(4)) + last)
            client.shutdown(socket.SHUT_WR)
            batch = ring.reserve(1)
            assert run.still(0.05)
            ring.commit(batch)
            sent = b""
            while data := client.recv(100):
                sent += data
            assert sent.startswith(b"\x82\x08" + struct.pack(">Q", 1))
            assert run.result()[0] == (1000 if last else 1006)


def test_session_waits_for_client_that_sent_close_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "WAIT_SECONDS", 0.01)
    ring = Ring(10)
    with connected(ServerConnection) as (connection, client):
        run = Blocked(lambda: Session(connection, RingIntake(ring), Totals(), threading.Event()).run(b""))
        client.sendall(frame(2, bytes(4)) + frame(8, struct.pack(">H", 1000)))
        client.shutdown(socket.SHUT_WR)
        batch = ring.reserve(1)
        assert run.still(0.2)
        ring.commit(batch)
        assert client.recv(10) == b"\x82\x08" + struct.pack(">Q", 1)
        run.result()


def test_marks_of_a_long_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "MAX_MARKS", 5)
    pieces = iter([frame(2, bytes(4))] * 100)

    class Pieces(ServerConnection):
        def read(self, wait: bool = True) -> bytes | None:
            return next(pieces, None) or super().read(wait)

    ring = Ring(1000)
    with connected(Pieces) as (connection, client):
        session = Session(connection, RingIntake(ring), Totals(), threading.Event())
        run = Blocked(lambda: session.run(b""))
        eventually(lambda: ring.cursor == 100)
        assert len(session._marks) <= 5
        ring.commit(ring.reserve(1000))
        assert client.recv(10) == b"\x82\x08" + struct.pack(">Q", 100)
        client.close()
        run.result()


def test_idle_connection_keeps_no_received_bytes() -> None:
    class Discarding(Memory):
        def put(self, block: Block, timeout: float) -> tuple[int, Ticket]:
            return len(block.values), STORED

    with connected(ServerConnection) as (connection, client):
        run = Blocked(lambda: Session(connection, Discarding(), Totals(), threading.Event()).run(b""))
        message = frame(2, bytes(4_000_000))
        tracemalloc.start()
        try:
            client.sendall(message)
            assert client.recv(100)[2:] == struct.pack(">Q", 500_000)
            eventually(lambda: tracemalloc.get_traced_memory()[0] < 100_000)
        finally:
            tracemalloc.stop()
        client.close()
        run.result()


def test_client_that_reads_no_acks_is_still_read() -> None:
    """Acks are cumulative: if an ack does not fit into the socket, a newer one replaces it."""
    messages = iter([frame(2, bytes(4))] * 20_000)

    class Streaming(ServerConnection):
        def read(self, wait: bool = True) -> bytes | None:
            return next(messages, b"\x88\x80" + bytes(4))

    with connected(Streaming) as (connection, client):
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        intake = Memory()
        run = Blocked(lambda: Session(connection, intake, Totals(), threading.Event()).run(b""))
        eventually(lambda: len(intake.values) == 20_000)
        sent = b""
        while data := client.recv(65536):
            sent += data
        assert run.result()[0] == 1005
    acks = [struct.unpack_from(">HQ", sent, at) for at in range(0, len(sent) - 10, 10)]
    assert {head for head, _ in acks} == {0x8208} and acks[-1][1] == 20_000


def run_session(connection: ServerConnection) -> Blocked:
    return Blocked(lambda: Session(connection, Memory(), Totals(), threading.Event()).run(b""))


@pytest.fixture(autouse=True)
def short_close_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "CLOSE_TIMEOUT", 0.2)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PING_AFTER", "PING_TIMEOUT", "STALL_TIMEOUT"):
        monkeypatch.setattr(websocket_server, name, 0.05)


def test_silent_client_without_pong_is_closed(impatient: None) -> None:
    with connected(ServerConnection) as (connection, client):
        run = run_session(connection)
        assert client.recv(65536) == b"\x89\x00", "a ping"
        assert run.result() == (1006, "connection lost: no answer to a ping within 0 s")


def test_silent_client_with_half_a_frame_is_closed(impatient: None) -> None:
    with connected(ServerConnection) as (connection, client):
        run = run_session(connection)
        client.sendall(frame(2, bytes(1000))[:500])
        assert run.result()[1].startswith("connection lost: no answer to a ping")


def test_client_that_answers_pings_stays_connected(impatient: None) -> None:
    with connected(ServerConnection) as (connection, client):
        run = run_session(connection)
        for _ in range(8):
            assert client.recv(2) == b"\x89\x00"
            client.sendall(frame(10, b""))
        client.sendall(frame(8, b""))
        assert run.result()[0] == 1005


def test_unfinished_message_ends_connection_after_timeout(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket_server, "MESSAGE_TIMEOUT", 0.5)
    with connected(ServerConnection) as (connection, client):
        run = run_session(connection)
        client.sendall(frame(2, bytes(8), fin=False))
        pings = 0
        while client.recv(2) == b"\x89\x00":
            pings += 1
            client.sendall(frame(10, b""))
        assert pings > 1
        assert run.result()[1] == "connection lost: a message was not finished within 0 s"


def test_messages_finished_in_time_keep_connection_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every read ends within a frame, so a message is unfinished at any time."""
    monkeypatch.setattr(websocket_server, "MESSAGE_TIMEOUT", 0.3)
    with connected(ServerConnection) as (connection, client):
        run = run_session(connection)
        whole = frame(2, bytes(4))
        client.sendall(whole[:5])
        end = monotonic() + 1.0
        acked = 0
        while monotonic() < end:
            client.sendall(whole[5:] + whole[:5])
            acked += 1
            assert client.recv(65536).endswith(encode_ack(acked))
        client.sendall(whole[5:] + frame(8, b""))
        assert run.result()[0] == 1005


def test_ping_in_two_pieces_is_not_an_unfinished_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket_server, "MESSAGE_TIMEOUT", 0.3)
    monkeypatch.setattr(websocket_server, "PING_AFTER", 0.1)
    with connected(ServerConnection) as (connection, client):
        run = run_session(connection)
        ping = frame(9, b"two pieces")
        client.sendall(ping[:5])
        eventually(lambda: connection._unfinished_since is not None)
        client.sendall(ping[5:])
        assert client.recv(100).endswith(b"two pieces")
        for _ in range(5):
            assert client.recv(2) == b"\x89\x00"
            client.sendall(frame(10, b""))
        client.sendall(frame(8, b""))
        assert run.result()[0] == 1005


def test_client_that_never_reads_is_closed_when_acks_are_stuck(impatient: None) -> None:
    class Streaming(ServerConnection):
        def read(self, wait: bool = True) -> bytes | None:
            return frame(2, bytes(4))

    with connected(Streaming) as (connection, _):
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        run = run_session(connection)
        assert run.result() == (1006, "connection lost: the peer has read nothing for 0 s")


def test_client_that_reads_no_pongs_is_closed() -> None:
    with connected(ServerConnection) as (connection, _):
        for _ in range(100_000):
            connection.parse(frame(9, bytes(100)))
            if connection.ending:
                break
        assert connection.ending == (1006, "connection lost: the peer does not read")
        assert len(connection._unsent) < 70_000


def test_pong_is_queued_behind_a_large_message() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = Endpoint("127.0.0.1", listener.getsockname()[1], "127.0.0.1")
        connecting = Blocked(lambda: ClientConnection(endpoint, "/", SUBPROTOCOL))
        with raw_link(listener) as peer:
            connection = connecting.result()
            connection.sock.setblocking(False)
            connection.begin_bytes(bytes(8_000_000))
            connection.flush()
            assert connection.unsent > MAX_UNSENT
            connection.parse(b"\x89\x00")
            assert connection.ending is None
            received = 0
            while not connection.flush() or received < 8_000_014 + 6:
                received += len(peer.recv(1 << 20))
            connection.sock.close()


def test_messages_before_an_unanswerable_ping_count() -> None:
    with connected(ServerConnection) as (connection, client):
        client.close()
        assert connection.parse(frame(2, bytes(4)) + frame(9, b"")) == [Messages(bytes(4), 4)]
        assert connection.ending and connection.ending[0] == 1006


def test_first_record_is_acked_while_second_is_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "WAIT_SECONDS", 600.0)
    ring = Ring(10)
    pieces = iter([frame(2, bytes(4)), frame(2, bytes(4))])

    class Twice(ServerConnection):
        def read(self, wait: bool = True) -> bytes | None:
            return next(pieces, None) or super().read(wait)

    with connected(Twice) as (connection, client):
        run = Blocked(lambda: Session(connection, RingIntake(ring), Totals(), threading.Event()).run(b""))
        first = ring.reserve(1)
        eventually(lambda: ring.cursor == 2)
        ring.commit(first)
        assert client.recv(100)[2:] == struct.pack(">Q", 1)
        ring.commit(ring.reserve(1))
        assert client.recv(100)[2:] == struct.pack(">Q", 2)
        client.shutdown(socket.SHUT_WR)
        ring.abort()
        client.close()
        connection.abort()
        run.result()


def test_large_message_in_small_reads_is_joined_once() -> None:
    """The start of a message is not parsed again for each read, and is not kept in pieces."""
    message = encode_plain(range(200_000))
    stream = frame(2, message)
    with connected(ServerConnection) as (connection, _):
        for start in range(0, len(stream) - 1, 4096):
            assert connection.parse(stream[start : min(start + 4096, len(stream) - 1)]) == []
            assert connection._needed == len(stream)
        assert len(connection._tail) == len(stream) - 1
        assert connection.parse(stream[-1:]) == [Messages(message, len(message))]


@pytest.mark.slow
def test_message_in_tiny_fragments_needs_only_its_size_in_memory() -> None:
    with connected(ServerConnection) as (connection, _):
        connection.parse(frame(2, b"", fin=False))
        tracemalloc.start()
        try:
            connection.parse(frame(0, b"ab", fin=False) * 20_000)
            connection.parse(frame(0, b"", fin=False) * 20_000)
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert held < 400_000
        assert connection.parse(frame(0, b"cd")) == [Messages(b"ab" * 20_000 + b"cd", 40_002)]


def test_pongs_for_late_reader_are_sent_without_new_message() -> None:
    with connected(ServerConnection) as (connection, client):
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        pings = 0
        while not connection._unsent:
            connection.parse(frame(9, bytes(100)))
            pings += 1
        run = Blocked(lambda: Session(connection, Memory(), Totals(), threading.Event()).run(b""))
        received = 0
        while received < pings * 102:
            received += len(client.recv(65536))
        client.close()
        assert run.result()[0] == 1006
