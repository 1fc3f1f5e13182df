"""The fast decoder and wsproto must be one: the same bytes give the same records, answers and close codes."""

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
from support.harness import DEADLINE, HANDSHAKE, Blocked, eventually, frame, raw_link, seeded

from ringbuffer import Ring
from ringolib.counters import Totals
from ringolib.net import sockets
from ringolib.net import websocket as websock
from ringolib.net.frames import Messages, frame_head, take_frames
from ringolib.net.websocket import ClientConnection, ServerConnection
from ringolib.web import session as ingest
from ringolib.web.intake import STORED, RingIntake, Ticket
from ringolib.web.session import Session
from ringolib.wire import SUBPROTOCOL, Block, Run, encode_ack, encode_batch, encode_plain


class Judged(ServerConnection):
    """A connection on which wsproto parses every byte, as it comes."""

    def parse(self, data: bytes) -> list[Messages]:
        messages: list[Messages] = []
        if not self.ending:
            self._judge(data, messages)
        return messages


class Memory:
    """An intake that keeps what is put, and has it stored at once."""

    closed = False

    def __init__(self) -> None:
        self.runs: list[tuple[int, int]] = []
        self.values = array("q")

    def put(self, block: Block, timeout: float) -> tuple[int, Ticket]:
        # The source of plain messages is random, but their numbers are not.
        self.runs += [(run.first, run.count) for run in block.runs]
        self.values += block.values
        return len(block.values), STORED

    def stored(self, ticket: Ticket) -> bool:
        return True

    def wait(self, ticket: Ticket, timeout: float) -> bool:
        return True


@contextmanager
def connected(kind: type[ServerConnection], subprotocol: str = "") -> Iterator[tuple[ServerConnection, socket.socket]]:
    """A server's end of that kind, and the client's socket behind the handshake."""
    ours, theirs = socket.socketpair()
    stop, stopper = socket.socketpair()
    theirs.settimeout(DEADLINE)
    headers = {**HANDSHAKE, **({"Sec-WebSocket-Protocol": subprotocol} if subprotocol else {})}
    with ours, theirs, stop, stopper:
        connection = kind(ours, headers, {}, (SUBPROTOCOL,), stop)
        while not theirs.recv(65536).endswith(b"\r\n\r\n"):
            pass
        yield connection, theirs


def outcome(
    kind: type[ServerConnection], subprotocol: str, pieces: list[bytes]
) -> tuple[list[int], int, tuple[int, str], list[tuple[int, bytes]]]:
    """What a session makes of `pieces`, each of them one read: the values, how many records the runs have, the
    ending, and the frames it sent but for acks.
    """
    waiting = iter(pieces)

    class Cut(kind):  # type: ignore[misc,valid-type]
        def read(self, wait: bool = True) -> bytes | None:
            return next(waiting, b"")

    with connected(Cut, subprotocol) as (connection, theirs):
        intake = Memory()
        session = Session(connection, intake, Totals(), threading.Event())
        run = Blocked(lambda: session.run(b""))
        sent = b""
        theirs.shutdown(socket.SHUT_WR)
        while data := theirs.recv(65536):
            sent += data
        ending = run.result()
    frames = []
    while sent:
        size = sent[1]
        frames.append((sent[0] & 15, sent[2 : 2 + size]))
        sent = sent[2 + size :]
    acks = [struct.unpack(">Q", payload)[0] for opcode, payload in frames if opcode == 2]
    assert acks == sorted(set(acks))
    if ending[0] != 1006:  # of a lost connection nobody knows what has arrived
        assert (acks or [0])[-1] == session.acked == len(intake.values)
    others = [each for each in frames if each[0] != 2]
    return list(intake.values), sum(count for _, count in intake.runs), ending, others


def random_mask(rng: random.Random) -> bytes:
    return rng.choice([rng.randbytes(4), rng.randbytes(4), bytes(4)])


def plain_stream(rng: random.Random) -> Iterator[bytes]:
    """Frames a client of plain messages may send, mostly right ones."""
    for _ in range(rng.randrange(1, 12)):
        kind = rng.randrange(40)
        if kind < 24:  # some of one size
            size = rng.choice([4, 4, 4, 8, 8, 16, 64, 72, 120, 128, 800, 65_536])
            for _ in range(rng.choice([1, 2, 5, 20, 300]) if size < 1000 else 1):
                yield frame(2, rng.randbytes(size), mask=random_mask(rng))
        elif kind < 28:  # of two sizes, mixed
            for _ in range(rng.randrange(50)):
                yield frame(2, rng.randbytes(rng.choice([4, 8])), mask=random_mask(rng))
        else:
            yield from oddity(rng, rng.randbytes(8 * rng.randrange(1, 30)))


def batch_stream(rng: random.Random) -> Iterator[bytes]:
    """Frames a client of batch messages may send, mostly right ones."""
    for _ in range(rng.randrange(1, 8)):
        runs = [Run(rng.randbytes(16), rng.randrange(2**40), rng.randrange(1, 40)) for _ in range(rng.randrange(1, 5))]
        message = encode_batch(runs, array("q", rng.randbytes(8 * sum(run.count for run in runs))))
        if rng.randrange(3):
            yield from [frame(2, message, mask=random_mask(rng))] * rng.choice([1, 1, 7])
        else:
            yield from oddity(rng, message)


def oddity(rng: random.Random, message: bytes) -> Iterator[bytes]:
    """What the fast decoder leaves to wsproto: legal rarities, and now and then an error."""
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
    """`stream` as it may arrive: whole, in a few pieces, or in many."""
    many = rng.choice([0, 1, 5, 50, len(stream)])
    at = sorted({0, len(stream), *(rng.randrange(len(stream) + 1) for _ in range(min(many, 3000)))})
    return [stream[start:end] for start, end in zip(at, at[1:], strict=False)]


@pytest.mark.parametrize("subprotocol", ["", SUBPROTOCOL])
def test_the_fast_decoder_and_wsproto_agree_on_random_streams(subprotocol: str) -> None:
    seed = seeded()
    rng = random.Random(seed)
    endings: set[int] = set()
    turns = 0
    while turns < 150 or not {1002, 1006, 1007} <= endings:
        turns += 1
        assert turns < 5000, f"streams of many kinds were tried, and ended only with {endings}"
        frames = batch_stream(rng) if subprotocol else plain_stream(rng)
        # A pong at the end: the fast decoder waits for the whole head of a frame, wsproto judges its first byte.
        pieces = cuts(rng, b"".join(frames) + frame(10, bytes(14)))
        fast, judged = outcome(ServerConnection, subprotocol, pieces), outcome(Judged, subprotocol, pieces)
        assert fast == judged
        endings.add(int(fast[2][0]))


@pytest.mark.parametrize("size", [4, 8, 16, 64, 68, 800, 65_536])
@pytest.mark.parametrize("count", [1, 2, 4, 5, 17, 18, 81, 500])
def test_frames_of_one_size_are_taken_together(size: int, count: int) -> None:
    rng = random.Random(size * count)
    count = min(count, 20) if size > 800 else count
    payloads = [rng.randbytes(size) for _ in range(count)]
    stream = b"".join(frame(2, payload, mask=rng.randbytes(4)) for payload in payloads)
    for tail in (b"", stream[:1], stream[: len(stream) // count - 1], frame(9, b""), frame(2, bytes(size + 4))):
        data = b"xyz" + stream + tail
        head = frame_head(data, 3)
        assert head and head.simple
        taken, end = take_frames(data, 3, head)
        assert (end, taken.size, taken.payloads) == (3 + len(stream), size, b"".join(payloads))
        assert taken.each() == payloads


def test_a_client_that_ends_its_side_still_gets_its_acks() -> None:
    ring = Ring(10)
    for last in (b"", frame(8, struct.pack(">H", 1000))):
        with connected(ServerConnection) as (connection, theirs):
            run = Blocked(lambda: Session(connection, RingIntake(ring), Totals(), threading.Event()).run(b""))  # noqa: B023
            theirs.sendall(frame(2, bytes(4)) + last)
            theirs.shutdown(socket.SHUT_WR)
            batch = ring.reserve(1)
            assert run.still(0.05)
            ring.commit(batch)
            sent = b""
            while data := theirs.recv(100):
                sent += data
            assert sent.startswith(b"\x82\x08" + struct.pack(">Q", 1))
            assert run.result()[0] == (1000 if last else 1006)


def test_who_says_goodbye_and_ends_its_side_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "WAIT_SECONDS", 0.01)
    ring = Ring(10)
    with connected(ServerConnection) as (connection, theirs):
        run = Blocked(lambda: Session(connection, RingIntake(ring), Totals(), threading.Event()).run(b""))
        theirs.sendall(frame(2, bytes(4)) + frame(8, struct.pack(">H", 1000)))
        theirs.shutdown(socket.SHUT_WR)
        batch = ring.reserve(1)
        assert run.still(0.2)
        ring.commit(batch)
        assert theirs.recv(10) == b"\x82\x08" + struct.pack(">Q", 1)
        run.result()


def test_the_marks_of_a_long_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "MAX_MARKS", 5)
    pieces = iter([frame(2, bytes(4))] * 100)

    class Pieces(ServerConnection):
        def read(self, wait: bool = True) -> bytes | None:
            return next(pieces, None) or super().read(wait)

    ring = Ring(1000)
    with connected(Pieces) as (connection, theirs):
        session = Session(connection, RingIntake(ring), Totals(), threading.Event())
        run = Blocked(lambda: session.run(b""))
        eventually(lambda: ring.cursor == 100)
        assert len(session._marks) <= 5
        ring.commit(ring.reserve(1000))
        assert theirs.recv(10) == b"\x82\x08" + struct.pack(">Q", 100)
        theirs.close()
        run.result()


def test_an_idle_connection_holds_nothing_of_what_it_sent() -> None:
    class Nowhere(Memory):
        def put(self, block: Block, timeout: float) -> tuple[int, Ticket]:
            return len(block.values), STORED

    with connected(ServerConnection) as (connection, theirs):
        run = Blocked(lambda: Session(connection, Nowhere(), Totals(), threading.Event()).run(b""))
        message = frame(2, bytes(4_000_000))
        tracemalloc.start()
        try:
            theirs.sendall(message)
            assert theirs.recv(100)[2:] == struct.pack(">Q", 500_000)
            eventually(lambda: tracemalloc.get_traced_memory()[0] < 100_000)
        finally:
            tracemalloc.stop()
        theirs.close()
        run.result()


def test_a_client_that_reads_no_acks_is_read_all_the_same() -> None:
    """Acks are cumulative: what does not fit into the socket waits for the newest one."""
    messages = iter([frame(2, bytes(4))] * 20_000)

    class Streaming(ServerConnection):
        def read(self, wait: bool = True) -> bytes | None:
            return next(messages, b"\x88\x80" + bytes(4))

    with connected(Streaming) as (connection, theirs):
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        intake = Memory()
        run = Blocked(lambda: Session(connection, intake, Totals(), threading.Event()).run(b""))
        eventually(lambda: len(intake.values) == 20_000)
        sent = b""
        while data := theirs.recv(65536):
            sent += data
        assert run.result()[0] == 1005
    acks = [struct.unpack_from(">HQ", sent, at) for at in range(0, len(sent) - 10, 10)]
    assert {head for head, _ in acks} == {0x8208} and acks[-1][1] == 20_000


def run_session(connection: ServerConnection) -> Blocked:
    return Blocked(lambda: Session(connection, Memory(), Totals(), threading.Event()).run(b""))


@pytest.fixture(autouse=True)
def short_goodbyes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "CLOSE_TIMEOUT", 0.2)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PING_AFTER", "PING_TIMEOUT", "STALL_TIMEOUT"):
        monkeypatch.setattr(websock, name, 0.05)


def test_a_silent_client_that_answers_no_ping_is_given_up(impatient: None) -> None:
    with connected(ServerConnection) as (connection, theirs):
        run = run_session(connection)
        assert theirs.recv(65536) == b"\x89\x00", "a ping"
        assert run.result() == (1006, "connection lost: no answer to a ping within 0 s")


def test_half_a_frame_and_silence_is_given_up(impatient: None) -> None:
    with connected(ServerConnection) as (connection, theirs):
        run = run_session(connection)
        theirs.sendall(frame(2, bytes(1000))[:500])
        assert run.result()[1].startswith("connection lost: no answer to a ping")


def test_a_client_that_answers_pings_stays(impatient: None) -> None:
    with connected(ServerConnection) as (connection, theirs):
        run = run_session(connection)
        for _ in range(8):
            assert theirs.recv(2) == b"\x89\x00"
            theirs.sendall(frame(10, b""))
        theirs.sendall(frame(8, b""))
        assert run.result()[0] == 1005


def test_a_message_that_is_never_finished_ends_it(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websock, "MESSAGE_TIMEOUT", 0.5)
    with connected(ServerConnection) as (connection, theirs):
        run = run_session(connection)
        theirs.sendall(frame(2, bytes(8), fin=False))
        pings = 0
        while theirs.recv(2) == b"\x89\x00":
            pings += 1
            theirs.sendall(frame(10, b""))
        assert pings > 1
        assert run.result()[1] == "connection lost: a message was not finished within 0 s"


def test_messages_that_each_end_in_time_go_on_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every read ends within a frame, so that some message is unfinished all the time."""
    monkeypatch.setattr(websock, "MESSAGE_TIMEOUT", 0.3)
    with connected(ServerConnection) as (connection, theirs):
        run = run_session(connection)
        whole = frame(2, bytes(4))
        theirs.sendall(whole[:5])
        end = monotonic() + 1.0
        acked = 0
        while monotonic() < end:
            theirs.sendall(whole[5:] + whole[:5])
            acked += 1
            assert theirs.recv(65536).endswith(encode_ack(acked))
        theirs.sendall(whole[5:] + frame(8, b""))
        assert run.result()[0] == 1005


def test_a_ping_in_two_pieces_is_no_message_that_is_never_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websock, "MESSAGE_TIMEOUT", 0.3)
    monkeypatch.setattr(websock, "PING_AFTER", 0.1)
    with connected(ServerConnection) as (connection, theirs):
        run = run_session(connection)
        ping = frame(9, b"two pieces")
        theirs.sendall(ping[:5])
        eventually(lambda: connection._begun is not None)
        theirs.sendall(ping[5:])
        assert theirs.recv(100).endswith(b"two pieces")
        for _ in range(5):
            assert theirs.recv(2) == b"\x89\x00"
            theirs.sendall(frame(10, b""))
        theirs.sendall(frame(8, b""))
        assert run.result()[0] == 1005


def test_a_client_that_never_reads_its_acks_is_given_up_when_no_more_of_them_can_leave(impatient: None) -> None:
    class Streaming(ServerConnection):
        def read(self, wait: bool = True) -> bytes | None:
            return frame(2, bytes(4))

    with connected(Streaming) as (connection, _):
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        run = run_session(connection)
        assert run.result() == (1006, "connection lost: the peer has read nothing for 0 s")


def test_a_client_that_reads_no_pongs_is_given_up() -> None:
    with connected(ServerConnection) as (connection, _):
        for _ in range(100_000):
            connection.parse(frame(9, bytes(100)))
            if connection.ending:
                break
        assert connection.ending == (1006, "connection lost: the peer does not read")
        assert len(connection._unsent) < 70_000


def test_a_ping_behind_a_clients_own_message_is_answered_when_that_has_left() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connecting = Blocked(lambda: ClientConnection("127.0.0.1", listener.getsockname()[1], "/", SUBPROTOCOL))
        with raw_link(listener) as peer:
            connection = connecting.result()
            connection.sock.setblocking(False)
            connection.begin_bytes(bytes(8_000_000))
            connection.flush()
            assert connection.unsent > websock.MAX_UNSENT
            connection.parse(b"\x89\x00")
            assert connection.ending is None
            received = 0
            while not connection.flush() or received < 8_000_014 + 6:
                received += len(peer.recv(1 << 20))
            connection.sock.close()


def test_messages_before_a_ping_that_cannot_be_answered_count() -> None:
    with connected(ServerConnection) as (connection, theirs):
        theirs.close()
        assert connection.parse(frame(2, bytes(4)) + frame(9, b"")) == [Messages(bytes(4), 4)]
        assert connection.ending and connection.ending[0] == 1006


def test_the_first_of_two_records_is_acked_while_the_second_is_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "WAIT_SECONDS", 600.0)
    ring = Ring(10)
    pieces = iter([frame(2, bytes(4)), frame(2, bytes(4))])

    class Twice(ServerConnection):
        def read(self, wait: bool = True) -> bytes | None:
            return next(pieces, None) or super().read(wait)

    with connected(Twice) as (connection, theirs):
        run = Blocked(lambda: Session(connection, RingIntake(ring), Totals(), threading.Event()).run(b""))
        first = ring.reserve(1)
        eventually(lambda: ring.cursor == 2)
        ring.commit(first)
        assert theirs.recv(100)[2:] == struct.pack(">Q", 1)
        ring.commit(ring.reserve(1))
        assert theirs.recv(100)[2:] == struct.pack(">Q", 2)
        theirs.shutdown(socket.SHUT_WR)
        ring.abort()
        assert run.still(0) or True
        theirs.close()
        connection.abort()
        run.result()


def test_a_large_message_in_small_reads_is_joined_once() -> None:
    """What waits for its end is neither looked at again with each read, nor kept in pieces."""
    message = encode_plain(range(200_000))
    stream = frame(2, message)
    with connected(ServerConnection) as (connection, _):
        for start in range(0, len(stream) - 1, 4096):
            assert connection.parse(stream[start : min(start + 4096, len(stream) - 1)]) == []
            assert connection._needed == len(stream)
        assert len(connection._tail) == len(stream) - 1
        assert connection.parse(stream[-1:]) == [Messages(message, len(message))]


def test_a_message_in_tiny_fragments_takes_no_more_memory_than_it_has_bytes() -> None:
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


def test_pongs_that_a_client_reads_late_are_sent_without_another_message() -> None:
    with connected(ServerConnection) as (connection, theirs):
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        pings = 0
        while not connection._unsent:
            connection.parse(frame(9, bytes(100)))
            pings += 1
        run = Blocked(lambda: Session(connection, Memory(), Totals(), threading.Event()).run(b""))
        got = 0
        while got < pings * 102:
            got += len(theirs.recv(65536))
        theirs.close()
        assert run.result()[0] == 1006
