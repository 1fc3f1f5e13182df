"""Workers, the breaker and the links, each against peers that fail in every way."""

import logging
import random
import socket
import struct
import threading
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.fake_consumer import Link, fake_consumer
from support.harness import Blocked, eventually, free_port, raw_link, rows

from ringbuffer import Closed, Ring
from ringolib import timing
from ringolib.forward import link as sinks
from ringolib.forward import workers as forwarder
from ringolib.forward.destination import Breaker, Destination
from ringolib.forward.link import LinkSink, LinkState
from ringolib.forward.sink import InDoubt, SinkError, StoreSink
from ringolib.forward.workers import Forwarder
from ringolib.net import sockets
from ringolib.wire import Block, Run, decode_batch, encode_ack
from store import Store

SOURCE = b"s" * 16


class FakeSink:
    """Stores in a list, once `gate` is open; fails as long as `error` is set."""

    ready = True
    identity: str | None = None

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.stored: list[int] = []
        self.calls = 0
        self.busy = 0
        self.most_busy = 0
        self.lock = threading.Lock()

    def store(self, block: Block) -> None:
        with self.lock:
            self.calls += 1
            self.busy += 1
            self.most_busy = max(self.most_busy, self.busy)
        try:
            assert self.gate.wait(30)
            if self.error:
                raise self.error
            with self.lock:
                self.stored += block.values
        finally:
            with self.lock:
                self.busy -= 1

    def abort(self) -> None:
        self.error = SinkError("aborted")
        self.gate.set()

    def connect(self) -> None: ...
    def idle(self) -> None: ...
    def close(self) -> None: ...


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "BACKOFF_FIRST_SECONDS", 0.001)
    monkeypatch.setattr(timing, "BACKOFF_MAX_SECONDS", 0.01)
    monkeypatch.setattr(sockets, "CLOSE_TIMEOUT", 0.2)


@contextmanager
def forwarding(ring: Ring, sink: FakeSink, most: int = 8) -> Iterator[Forwarder]:
    running = Forwarder(ring, [Destination(lambda connected: sink)], most)
    try:
        yield running
    finally:
        ring.abort()
        assert running.stop(20)
        assert running.stats().workers == 0 and not threads()


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("forward-")]


def put(ring: Ring, *values: int) -> int:
    return ring.put(array("q", values), SOURCE, ring.cursor, 20)


def test_what_is_put_is_stored_and_committed() -> None:
    ring, sink = Ring(10), FakeSink()
    with forwarding(ring, sink):
        assert ring.wait_committed(put(ring, 1, 2, 3), 20)
        assert sink.stored == [1, 2, 3]
        ring.close()
        assert ring.join(20)
        eventually(lambda: not threads(), "the workers end when the ring is drained")


def test_what_a_failing_sink_refuses_is_requeued_until_it_is_stored(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ring, sink = Ring(10), FakeSink()
    sink.error = SinkError("the consumer is away")
    with forwarding(ring, sink):
        end = put(ring, *range(10))
        eventually(lambda: sink.calls > 5)
        assert ring.committed == 0
        sink.error = None
        assert ring.wait_committed(end, 20)
        assert sorted(sink.stored) == list(range(10))
    said = [record.getMessage() for record in caplog.records]
    assert said == ["sink_down", "sink_up"], "once per change, not once a try"


def test_a_link_that_fails_while_others_store_is_no_consumer_that_is_away(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(forwarder, "QUIET_SECONDS", 600)
    ring, sink, state = Ring(10), FakeSink(), LinkState("there:1")
    state.works()
    sink.error = SinkError("503")
    running = Forwarder(ring, [Destination(lambda connected: sink, state)], 8)
    try:
        end = put(ring, 1)
        eventually(lambda: sink.calls > 3)
        assert not state.down
        monkeypatch.setattr(forwarder, "QUIET_SECONDS", 0)
        eventually(lambda: state.down)
        sink.error = None
        assert ring.wait_committed(end, 20)
        eventually(lambda: not state.down)
        assert running.linked(running.destinations[0]) == sink.ready
    finally:
        ring.abort()
        assert running.stop(20)
    assert [record.getMessage() for record in caplog.records] == ["link_up", "link_down", "link_up"]


def test_a_worker_lives_on_after_an_error_nobody_expected(caplog: pytest.LogCaptureFixture) -> None:
    ring, sink = Ring(10), FakeSink()
    sink.error = ZeroDivisionError("a bug")
    with forwarding(ring, sink):
        end = put(ring, 1)
        eventually(lambda: sink.calls > 1)
        sink.error = None
        assert ring.wait_committed(end, 20)
        assert threads() == ["forward-1"]
    assert ("worker_error", {"error": "ZeroDivisionError('a bug')"}) in [(r.msg, r.args) for r in caplog.records]


def test_workers_start_while_others_are_busy_up_to_the_most_and_retire_when_idle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forwarder, "IDLE_SECONDS", 0.05)
    monkeypatch.setattr(forwarder, "BATCH_RECORDS", 1)
    ring, sink = Ring(20), FakeSink()
    sink.gate.clear()
    with forwarding(ring, sink, most=3) as running:
        end = put(ring, *range(20))
        eventually(lambda: sink.busy == 3)
        assert len(threads()) == 3
        sink.gate.set()
        assert ring.wait_committed(end, 20)
        eventually(lambda: threads() != [] and len(threads()) == 1, "all but one retire")
        assert running.stats()[:2] == (1, 3)
        assert ring.wait_committed(put(ring, 5), 20)


def test_one_worker_probes_while_the_sink_fails_and_no_more_are_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwarder, "BATCH_RECORDS", 1)
    ring, sink = Ring(20), FakeSink()
    sink.gate.clear()
    with forwarding(ring, sink, most=4) as running:
        end = put(ring, *range(20))
        eventually(lambda: sink.busy == 4)
        sink.error = SinkError("away")
        sink.gate.set()
        eventually(lambda: sink.calls > 8 and sink.busy <= 1)
        sink.most_busy, calls = 0, sink.calls
        eventually(lambda: sink.calls > calls + 10)
        assert sink.most_busy == 1
        assert running.stats().workers == 1, "who failed beside the prober has retired"
        sink.error = None
        assert ring.wait_committed(end, 20)


def test_a_worker_without_a_link_makes_none_while_another_probes() -> None:
    ring, sink = Ring(4), FakeSink()
    sink.ready = False
    with forwarding(ring, sink) as running:
        prober = threading.Thread(target=running.destinations[0].breaker.failed)
        prober.start()
        prober.join()
        put(ring, 1)
        eventually(lambda: ring.stats().backlog == 1 and not ring.wants_workers, "the worker put it back")
        assert sink.calls == 0
        running.destinations[0].breaker._prober = None
        assert ring.wait_committed(1, 20)


def test_workers_whose_links_work_go_on_while_another_is_refused() -> None:
    """A consumer with `-n` has room for some links and refuses the next: that is no outage."""
    ring, good, bad = Ring(4), FakeSink(), FakeSink()
    bad.error, bad.ready = SinkError("refused with HTTP status 503"), False
    good.gate.clear()
    made: list[FakeSink] = []

    def make(connected: object) -> FakeSink:
        made.append(bad if made else good)
        return made[-1]

    running = Forwarder(ring, [Destination(make)], 8)
    try:
        put(ring, 1, 2, 3, 4)
        eventually(lambda: bad.calls > 3, "a second worker starts, and fails again and again")
        assert len(made) == 2, "and no third one"
        good.gate.set()
        for turn in range(50):
            assert ring.wait_committed(put(ring, turn, turn, turn), 20)
    finally:
        ring.abort()
        assert running.stop(20)


def test_the_breaker_pauses_longer_and_longer_with_full_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "BACKOFF_FIRST_SECONDS", 0.1)
    monkeypatch.setattr(timing, "BACKOFF_MAX_SECONDS", 5.0)
    pauses: list[tuple[float, float]] = []
    monkeypatch.setattr(random, "uniform", lambda low, high: pauses.append((low, high)) or 0)
    breaker = Breaker()
    assert breaker.pause() and not pauses
    for failures in range(1, 10):
        assert breaker.failed() == failures
        assert breaker.pause()
    assert pauses == [(0, most) for most in (0.2, 0.4, 0.8, 1.6, 3.2, 5, 5, 5, 5)]
    assert breaker.away and breaker.succeeded() is True
    assert not breaker.away and breaker.succeeded() is False
    assert breaker.pause() and len(pauses) == 9


def test_only_the_first_to_fail_probes_until_it_succeeds_or_retires(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: 30)
    breaker = Breaker()
    assert breaker.failed() == 1 and not breaker.probed_by_another
    other = Blocked(lambda: (breaker.probed_by_another, breaker.failed(), breaker.pause(), breaker.succeeded()))
    assert other.result() == (True, 0, True, False)
    breaker.left()
    assert Blocked(breaker.failed).result() == 1, "now another one does"
    assert breaker.probed_by_another
    breaker._prober = threading.current_thread()
    Blocked(breaker.stop).result()
    assert breaker.pause() is False, "stop ends the pause"


def test_stop_ends_a_worker_that_waits_for_its_sink() -> None:
    ring, sink = Ring(4), FakeSink()
    sink.gate.clear()
    running = Forwarder(ring, [Destination(lambda connected: sink)], 1)
    put(ring, 1)
    eventually(lambda: sink.busy == 1)
    ring.abort()
    assert running.stop(20)
    assert not threads() and ring.committed == 0
    with pytest.raises(Closed):
        ring.reserve(1)


def test_the_store_sink_stores_and_says_why_it_cannot(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "s.db"))
    sink, block = StoreSink(store), a_block(1, 2)
    sink.store(block)
    assert [row[1:] for row in rows(tmp_path / "s.db")] == [(0, 1), (1, 2)]
    store.close()
    with pytest.raises(SinkError, match="s.db is closed"):
        sink.store(block)


# Links.


def a_block(*values: int) -> Block:
    return Block([Run(SOURCE, 0, len(values))], array("q", values))


def test_a_link_sends_batches_and_returns_with_their_cumulative_acks() -> None:
    got, links = [], []

    def answer(peer: Link) -> None:
        total = 0
        for message in peer:
            block = decode_batch(message)  # type: ignore[arg-type]
            got.append((block.runs, list(block.values)))
            peer.ping()  # a ping between message and acks is answered and does not disturb
            for _ in block.values:
                total += 1
                peer.send(encode_ack(total))

    with fake_consumer(answer) as port:
        sink = LinkSink("localhost", port, lambda: links.append(1))
        sink.store(a_block(1, 2, 3))
        sink.store(a_block(-1))
        sink.close()
    assert got == [([Run(SOURCE, 0, 3)], [1, 2, 3]), ([Run(SOURCE, 0, 1)], [-1])]
    assert links == [1]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        pytest.param(lambda peer: peer.recv(), "closed with 1000", id="closes without an ack"),
        pytest.param(lambda peer: peer.close(1011, "disk full"), "closed with 1011 disk full", id="cannot store"),
        pytest.param(lambda peer: peer.socket.shutdown(2), "localhost", id="drops the connection"),
        pytest.param(lambda peer: (peer.send(b"1234"), peer.recv(), peer.recv()), "an ack has 8", id="no ack"),
        pytest.param(lambda peer: (peer.send(encode_ack(9)), peer.recv(), peer.recv()), "acked 9", id="acks too much"),
        pytest.param(
            lambda peer: (peer.socket.sendall(b"\x82\x88" + bytes(4) + encode_ack(2)), peer.recv(), peer.recv()),
            "masked",
            id="masks",
        ),
        pytest.param(lambda peer: (peer.send("text"), peer.recv(), peer.recv()), "1003", id="text"),
        pytest.param(lambda peer: (peer.recv(), peer.recv()), "no ack within|timed out", id="says nothing"),
    ],
)
def test_a_link_that_is_not_acked_fails_and_the_next_store_makes_a_new_one(
    answer: Callable[[Link], None], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "ACK_TIMEOUT", 0.3)
    links: list[int] = []
    served: list[int] = []

    def first_bad_then_good(peer: Link) -> None:
        served.append(1)
        if len(served) == 1:
            answer(peer)
        else:
            peer.recv()
            peer.send(encode_ack(2))

    with fake_consumer(first_bad_then_good) as port:
        sink = LinkSink("localhost", port, lambda: links.append(1))
        with pytest.raises(SinkError, match=said):
            sink.store(a_block(1, 2))
        sink.store(a_block(1, 2))
        sink.close()
    assert links == [1, 1]


def test_an_answer_that_is_garbage_is_a_sink_error_like_others() -> None:
    with socket.create_server(("localhost", 0)) as listener:

        def answer() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(4096)
                peer.sendall(
                    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n"
                    b"Sec-WebSocket-Accept: \xff\xfe\r\n\r\n"
                )
                peer.recv(1)

        serving = Blocked(answer)
        with pytest.raises(SinkError, match="is not a WebSocket server"):
            LinkSink("localhost", listener.getsockname()[1], lambda: None).store(a_block(1))
        serving.result()


def test_a_consumer_that_refuses_the_link_is_told_apart() -> None:
    with pytest.raises(SinkError, match="refused"):
        LinkSink("localhost", free_port(), lambda: None).store(a_block(1))
    with fake_consumer(lambda peer: None, subprotocol=None) as port:
        with pytest.raises(SinkError, match="does not speak"):
            LinkSink("localhost", port, lambda: None).store(a_block(1))
    for answer, said in [
        (b"HTTP/1.1 503 Full\r\nContent-Length: 0\r\n\r\n", "HTTP status 503"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "not a WebSocket server"),
        (b"", "closed the connection"),
    ]:
        with socket.create_server(("127.0.0.1", 0)) as fake:
            sink = LinkSink("127.0.0.1", fake.getsockname()[1], lambda: None)
            call = Blocked(lambda sink=sink: sink.store(a_block(1)))
            accepted, _ = fake.accept()
            with accepted:
                accepted.recv(65536)
                accepted.sendall(answer)
                accepted.shutdown(socket.SHUT_WR)
                with pytest.raises(SinkError, match=said):
                    call.result()


@pytest.mark.parametrize("store", [None, "6f1c", "x" * 201])
def test_a_block_that_was_sent_and_not_acked_is_in_doubt_and_the_store_is_named(store: str | None) -> None:
    with fake_consumer(lambda peer: (peer.recv(), peer.socket.shutdown(2)), store) as port:
        sink = LinkSink("localhost", port)
        assert sink.identity is None
        sink.connect()
        known = store if store != "x" * 201 else None  # that is no name
        assert sink.ready and sink.identity == known
        with pytest.raises(InDoubt) as failed:
            sink.store(a_block(1))
        assert failed.value.store == known and not sink.ready and sink.identity is None


@pytest.mark.parametrize(
    ("answer", "store", "sure"),
    [
        (lambda peer: (peer.recv(), peer.close(1001, "the server is stopping")), "x", True),
        (lambda peer: (peer.recv(), peer.close(1001, "the server is stopping")), None, False),  # a publisher, perhaps
        (lambda peer: (peer.recv(), peer.close(1011, "not stored: disk full")), "x", False),
        (lambda peer: (peer.recv(), peer.send(encode_ack(1)), peer.close(1001)), "x", False),
    ],
)
def test_a_store_that_says_goodbye_has_acked_what_it_has_stored(
    answer: Callable[[Link], None], store: str | None, sure: bool
) -> None:
    """What it acked of a block, though, it has: then the block is in doubt, as no store acks parts."""
    with fake_consumer(answer, store) as port:
        with pytest.raises(SinkError) as failed:
            LinkSink("localhost", port).store(a_block(1, 2))
        assert isinstance(failed.value, InDoubt) is not sure


def test_nothing_is_in_doubt_when_no_link_could_be_made() -> None:
    with pytest.raises(SinkError) as failed:
        LinkSink("localhost", free_port()).connect()
    assert not isinstance(failed.value, InDoubt)


def test_on_a_link_that_has_ended_nothing_is_sent_and_nothing_is_in_doubt() -> None:
    """Nor is another one made: at its end might be another store than the one that the block is for."""
    links: list[int] = []
    with socket.create_server(("localhost", 0)) as listener:
        sink = LinkSink("localhost", listener.getsockname()[1], lambda: links.append(1))
        call = Blocked(sink.connect)
        with raw_link(listener) as peer:
            call.result()
            peer.shutdown(socket.SHUT_WR)
            eventually(lambda: sink._link and sink._link.is_gone())
            with pytest.raises(SinkError, match="closed the connection") as failed:
                sink.store(a_block(1))
            assert not isinstance(failed.value, InDoubt) and peer.recv(9) == b""
    assert links == [1] and not sink.ready


def test_abort_ends_a_connect_that_waits_for_an_answer() -> None:
    with socket.create_server(("localhost", 0)) as listener:
        sink = LinkSink("localhost", listener.getsockname()[1])
        call = Blocked(sink.connect)
        with listener.accept()[0] as peer:
            assert peer.recv(65536) and call.still()
            sink.abort()
            with pytest.raises(SinkError):
                call.result(2)


def test_a_link_to_one_address_of_a_name_asks_for_the_name() -> None:
    with socket.create_server(("localhost", 0)) as listener:
        sink = LinkSink("127.0.0.1", listener.getsockname()[1], name="consumer.example")
        call = Blocked(sink.connect)
        with listener.accept()[0] as peer:
            assert f"Host: consumer.example:{listener.getsockname()[1]}\r\n".encode() in peer.recv(65536)
        with pytest.raises(SinkError, match="127.0.0.1:"):
            call.result()


def test_a_server_makes_no_link_to_itself() -> None:
    """Or a publisher with a spool would take what it forwards, find it known, and delete it."""
    with fake_consumer(lambda peer: None) as port:
        with pytest.raises(SinkError, match="this server itself"):
            LinkSink("localhost", port, is_own=lambda address: address[1][1] == port).store(a_block(1))


def test_abort_from_another_thread_ends_a_store_that_waits() -> None:
    waiting = threading.Event()

    def answer(peer: Link) -> None:
        peer.recv()
        waiting.set()
        for _ in peer:
            pass

    with fake_consumer(answer) as port:
        sink = LinkSink("localhost", port, lambda: None)
        call = Blocked(lambda: sink.store(a_block(1)))
        assert waiting.wait(20) and call.still()
        sink.abort()
        with pytest.raises(SinkError):
            call.result()
        with pytest.raises(SinkError, match="stopping"):
            sink.store(a_block(1))


def test_an_idle_link_answers_pings_and_asks_itself() -> None:
    links: list[int] = []
    answered = threading.Event()

    def answer(peer: Link) -> None:
        peer.recv()
        pong = peer.ping()
        peer.send(encode_ack(1))
        assert pong.wait(20), "within the store, or in idle"
        assert peer.ping().wait(20)
        answered.set()
        peer.recv()
        peer.send(encode_ack(2))

    with fake_consumer(answer) as port:
        sink = LinkSink("localhost", port, lambda: links.append(1))
        sink.store(a_block(1))
        while not answered.wait(0.01):
            sink.idle()
        sink.store(a_block(2))
        sink.close()
    assert links == [1]


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(lambda peer: peer.sendall(b"\x88\x02\x03\xe8"), id="says goodbye"),
        pytest.param(lambda peer: peer.shutdown(socket.SHUT_RDWR), id="closed"),
        pytest.param(lambda peer: None, id="silent"),
    ],
)
def test_an_idle_link_that_is_dead_is_dropped_before_a_block_needs_it(fault: Callable[[socket.socket], None]) -> None:
    with socket.create_server(("localhost", 0)) as listener:
        sink = LinkSink("localhost", listener.getsockname()[1])
        sink.idle()  # without a link there is nothing to do
        for _ in range(2):
            call = Blocked(lambda: sink.store(a_block(1)))
            with raw_link(listener) as peer:
                peer.sendall(b"\x82\x08" + encode_ack(1))
                call.result()
                assert sink.ready
                fault(peer)
                eventually(lambda: sink.idle() or not sink.ready)


def test_reconnects_are_counted_and_nothing_is_lost_over_a_link_that_keeps_failing() -> None:
    rng = random.Random(1)
    stored: dict[tuple[bytes, int], int] = {}

    def answer(peer: Link) -> None:
        total = 0
        for message in peer:
            if rng.random() < 0.3:
                return
            block = decode_batch(message)  # type: ignore[arg-type]
            values = iter(block.values)
            for run in block.runs:
                for sequence in range(run.first, run.first + run.count):
                    stored[run.source, sequence] = next(values)
            if rng.random() < 0.3:
                return  # stored, but nobody knows
            total += len(block.values)
            peer.send(struct.pack(">Q", total))

    ring = Ring(16)
    with fake_consumer(answer) as port:
        running = Forwarder(ring, [Destination(lambda connected: LinkSink("localhost", port, connected))], 4)
        assert ring.wait_committed(put(ring, *range(400)), 30)
        ring.close()
        assert ring.join(20) and running.stop(20)
    assert stored == {(SOURCE, n): n for n in range(400)}
    assert running.stats().reconnects > 3
