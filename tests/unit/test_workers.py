"""Workers, their health and the links, against sinks and peers that fail in every way."""

import logging
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.broken import BrokenSocket, raise_instead_of_exit
from support.fake_consumer import Link, fake_consumer
from support.harness import DEADLINE, ROOT, Blocked, eventually, free_port, raw_link, rows
from support.short_times import short_times  # noqa: F401  (a fixture for every test here)

from ringbuffer import Closed, Ring
from ringolib import timing
from ringolib.forward import health as health_module
from ringolib.forward import link as link_module
from ringolib.forward import workers as workers_module
from ringolib.forward.destination import Destination
from ringolib.forward.health import Health
from ringolib.forward.link import LinkSink, dialer
from ringolib.forward.sink import InDoubt, NotStored, StoreSink, ignore_late
from ringolib.forward.workers import Forwarder
from ringolib.wire import Block, Run, decode_batch, encode_ack
from store import Store

SOURCE = b"s" * 16


class FakeSink:
    """A sink that stores in a list, once `gate` is open, and fails while `error` is set."""

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

    def store(self, block: Block, on_late: Callable[[], None] = ignore_late) -> None:
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
        self.error = NotStored("aborted")
        self.gate.set()

    def connect(self) -> None: ...
    def idle(self) -> None: ...
    def close(self) -> None: ...


@contextmanager
def forwarding(ring: Ring, sink: FakeSink, max_workers: int = 8) -> Iterator[Forwarder]:
    running = Forwarder(ring, [Destination(lambda connected: sink)], max_workers)
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


def test_values_are_stored_and_committed() -> None:
    ring, sink = Ring(10), FakeSink()
    with forwarding(ring, sink):
        assert ring.wait_committed(0, put(ring, 1, 2, 3), 20)
        assert sink.stored == [1, 2, 3]
        ring.close()
        assert ring.join(20)
        eventually(lambda: not threads(), "the workers end when the ring is drained")


def test_batch_is_requeued_until_failing_sink_recovers(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ring, sink = Ring(10), FakeSink()
    sink.error = NotStored("the consumer is down")
    with forwarding(ring, sink):
        end = put(ring, *range(10))
        eventually(lambda: sink.calls > 5)
        assert ring.committed == 0
        sink.error = None
        assert ring.wait_committed(0, end, 20)
        assert sorted(sink.stored) == list(range(10))
    events = [record.getMessage() for record in caplog.records]
    assert events == ["sink_down", "sink_up"], "once per change, not once per try"


def test_failing_link_does_not_mark_consumer_down_if_others_store(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(health_module, "QUIET_SECONDS", 600)
    ring, sink, state = Ring(10), FakeSink(), Health("there:1")
    state.on_ack()
    sink.error = NotStored("503")
    running = Forwarder(ring, [Destination(lambda connected: sink, state)], 8)
    try:
        end = put(ring, 1)
        eventually(lambda: sink.calls > 3)
        assert not state.down
        monkeypatch.setattr(health_module, "QUIET_SECONDS", 0)
        eventually(lambda: state.down)
        sink.error = None
        assert ring.wait_committed(0, end, 20)
        eventually(lambda: not state.down)
        assert running.linked(running.destinations[0]) == sink.ready
    finally:
        ring.abort()
        assert running.stop(20)
    assert [record.getMessage() for record in caplog.records] == ["link_up", "link_down", "link_up"]


def test_worker_survives_unexpected_error(caplog: pytest.LogCaptureFixture) -> None:
    ring, sink = Ring(10), FakeSink()
    sink.error = ZeroDivisionError("a bug")
    with forwarding(ring, sink):
        end = put(ring, 1)
        eventually(lambda: sink.calls > 1)
        sink.error = None
        assert ring.wait_committed(0, end, 20)
        assert threads() == ["forward-1"]
    assert ("worker_error", {"error": "ZeroDivisionError('a bug')"}) in [(r.msg, r.args) for r in caplog.records]


class Keeper:
    """A consumer that keeps whole blocks, and acks them."""

    def __init__(self) -> None:
        self.links: list[list[int]] = []

    def __call__(self, link: Link) -> None:
        values: list[int] = []
        self.links.append(values)
        for message in link:
            values += decode_batch(message).values
            link.send(encode_ack(len(values)))


ERRORS = [MemoryError(), ZeroDivisionError("a bug"), KeyboardInterrupt(), SystemExit(1)]


@pytest.mark.parametrize("on_read", [False, True])
@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_any_error_within_a_batch_drops_the_link(error: BaseException, on_read: bool) -> None:
    """Otherwise the next batch would complete the message that was broken off."""
    consumer = Keeper()
    with fake_consumer(consumer, store="here") as port:
        sink = LinkSink("localhost", port)
        sink.store(a_block(*range(10)))
        assert sink._link
        sink._link.sock = BrokenSocket(sink._link.sock, error, on_read)
        with pytest.raises(InDoubt) as doubt:
            sink.store(a_block(*range(1000, 2000)))
        assert doubt.value.store == "here" and type(error).__name__ in str(doubt.value)
        assert not sink.ready
        sink.store(a_block(*range(5000, 6000)))
        sink.close()
    first, second = consumer.links
    assert first == [*range(10), *(range(1000, 2000) if on_read else ())]
    assert second == list(range(5000, 6000))


@pytest.mark.parametrize("method", ["idle", "store"])
def test_unexpected_error_of_an_idle_link_drops_it(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    consumer = Keeper()
    monkeypatch.setattr(link_module, "CHECK_AFTER_SECONDS", 0)
    with fake_consumer(consumer) as port:
        sink = LinkSink("localhost", port)
        sink.connect()
        assert sink._link
        sink._link.sock = BrokenSocket(sink._link.sock, MemoryError(), on_read=True)
        with pytest.raises(MemoryError):
            sink.idle() if method == "idle" else sink.store(a_block(1))
        assert not sink.ready
        sink.store(a_block(2))
        sink.close()
    assert consumer.links == [[], [2]]


def test_message_broken_off_by_an_error_loses_no_record(caplog: pytest.LogCaptureFixture) -> None:
    """The worker sends the batch again over a new link."""
    consumer = Keeper()
    with fake_consumer(consumer, store="here") as port:
        ring, sinks = Ring(10_000), []

        def make(connected: Callable[[], None]) -> LinkSink:
            sinks.append(LinkSink("localhost", port, connected))
            return sinks[-1]

        running = Forwarder(ring, [Destination(make)], 1)
        try:
            assert ring.wait_committed(0, put(ring, 1), 20)
            (sink,) = sinks
            assert sink._link
            sink._link.sock = BrokenSocket(sink._link.sock, MemoryError())
            for start in (1000, 2000, 3000):
                put(ring, *range(start, start + 1000))
            assert ring.join(20)
        finally:
            ring.abort()
            assert running.stop(20)
    assert sorted({value for link in consumer.links for value in link}) == [1, *range(1000, 4000)]
    assert [record.args for record in caplog.records if record.msg == "worker_error"] == [{"error": "MemoryError()"}]


def test_unexpected_error_of_a_link_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It may come up at each retry. It is logged again after another one, or after an ack."""
    errors: list[Exception] = [ZeroDivisionError("a bug")] * 3 + [KeyError(1)] + [ZeroDivisionError("a bug")] * 2

    def broken(*unused: object) -> int:
        raise errors.pop(0)

    with fake_consumer(Keeper()) as port:
        sink = LinkSink("localhost", port)

        def fail(times: int) -> None:
            with monkeypatch.context() as patch:
                patch.setattr(link_module, "decode_ack", broken)
                for _ in range(times):
                    with pytest.raises(InDoubt):
                        sink.store(a_block(1))

        fail(5)
        sink.store(a_block(1))
        fail(1)
    logged = [record.args["error"] for record in caplog.records if record.levelno >= logging.ERROR]  # type: ignore
    assert logged == ["ZeroDivisionError('a bug')", "KeyError(1)", *["ZeroDivisionError('a bug')"] * 2]


@pytest.mark.parametrize("part", ["reserve", "idle", "sleep"])
def test_failing_turns_pause_and_are_logged_once(
    part: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(timing, "BACKOFF_FIRST_SECONDS", 0.1)
    monkeypatch.setattr(timing, "BACKOFF_MAX_SECONDS", 0.1)
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    monkeypatch.setattr(workers_module, "IDLE_SECONDS", 0.01)
    ring, sink, calls = Ring(10), FakeSink(), []

    def broken(*unused: object) -> None:
        calls.append(1)
        if len(calls) > 3:
            sink.error = None
        raise ZeroDivisionError("a bug")

    with monkeypatch.context() as patch:
        if part == "sleep":  # the sink fails
            sink.error = ZeroDivisionError("a bug")
        else:
            patch.setattr(*((ring, part) if part == "reserve" else (sink, part)), broken)
        with forwarding(ring, sink):
            end = put(ring, 1)
            threading.Event().wait(0.45)
            tries = sink.calls if part == "sleep" else len(calls)
            assert 2 <= tries <= 6, "at most one turn in 0.1 s"
            patch.undo()
            sink.error = None
            assert ring.wait_committed(0, end, 20)
    assert len([record for record in caplog.records if record.levelno >= logging.ERROR]) == 1


@pytest.mark.parametrize("method", ["commit", "requeue", "set_aside"])
def test_error_in_the_ring_ends_the_process(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch would stay in flight, and its records would never be acked."""
    statuses = raise_instead_of_exit(monkeypatch)
    ring, sink = Ring(10), FakeSink()
    if method != "commit":
        sink.error = NotStored("away") if method == "requeue" else InDoubt("no ack")

    def broken(*unused: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ring, method, broken)
    monkeypatch.setattr(threading, "excepthook", lambda *unused: None)
    running = Forwarder(ring, [Destination(lambda connected: sink, only=False)], 8)
    put(ring, 1)
    eventually(lambda: statuses and not threads())
    assert set(statuses) == {timing.EXIT_FATAL}
    ring.abort()
    assert running.stop(20)


WITHOUT_MEMORY = """
import logging, os, threading
from array import array
import _testcapi
from ringbuffer import Ring
from ringolib import timing
from ringolib.forward.destination import Destination
from ringolib.forward.pool import Worker
from ringolib.forward.sink import InDoubt, NotStored
from ringolib.forward.workers import Forwarder

class NoThreads(timing.Runtime):
    def start_thread(self, target, *args, name):
        return threading.Thread()

class Sink:
    ready, identity = True, "store"
    def connect(self): pass
    def store(self, block, on_late):
        if error:
            raise error

class Ended(BaseException): pass

def end(status):
    raise Ended

os._exit = end
logging.disable()
lost = []
for error in (None, NotStored("away"), InDoubt("no ack")):
    for step in range(200):
        ring, destination = Ring(8), Destination(lambda connected: Sink(), only=False)
        forwarder = Forwarder(ring, [destination], 1, runtime=NoThreads())
        ring.put(array("q", [1, 2]), bytes(16), 0)
        worker = Worker(destination, Sink())
        _testcapi.set_nomemory(step, step + 1)
        try:
            forwarder.turn(worker)
        except MemoryError:
            _testcapi.remove_mem_hooks()
            if ring.stats().in_flight:
                lost.append((error, step))
        except Ended:
            pass
        finally:
            _testcapi.remove_mem_hooks()
print(lost)
"""


def test_no_batch_stays_in_flight_without_worker_if_memory_runs_out() -> None:
    """Each single allocation of a turn fails once. Then the batch goes on, or the process ends."""
    pytest.importorskip("_testcapi")
    command = [sys.executable, "-c", WITHOUT_MEMORY]
    environment = {name: text for name, text in os.environ.items() if not name.startswith("COV")}  # it needs memory
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=DEADLINE)
    if done.returncode == -signal.SIGSEGV:
        pytest.skip("this Python itself crashes without memory")
    assert done.stdout == "[]\n", (done.returncode, done.stderr)


def test_workers_start_up_to_the_maximum_and_retire_when_idle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers_module, "IDLE_SECONDS", 0.05)
    monkeypatch.setattr(workers_module, "BATCH_RECORDS", 1)
    ring, sink = Ring(20), FakeSink()
    sink.gate.clear()
    with forwarding(ring, sink, max_workers=3) as running:
        end = put(ring, *range(20))
        eventually(lambda: sink.busy == 3)
        assert len(threads()) == 3
        sink.gate.set()
        assert ring.wait_committed(0, end, 20)
        eventually(lambda: threads() != [] and len(threads()) == 1, "all but one retire")
        assert running.stats()[:2] == (1, 3)
        assert ring.wait_committed(0, put(ring, 5), 20)


def test_one_worker_probes_while_the_sink_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "BATCH_RECORDS", 1)
    ring, sink = Ring(20), FakeSink()
    sink.gate.clear()
    with forwarding(ring, sink, max_workers=4) as running:
        end = put(ring, *range(20))
        eventually(lambda: sink.busy == 4)
        sink.error = NotStored("away")
        sink.gate.set()
        eventually(lambda: sink.calls > 8 and sink.busy <= 1)
        sink.most_busy, calls = 0, sink.calls
        eventually(lambda: sink.calls > calls + 10)
        assert sink.most_busy == 1
        assert running.stats().workers == 1, "the other workers that failed have retired"
        sink.error = None
        assert ring.wait_committed(0, end, 20)


def test_worker_makes_no_link_while_another_probes() -> None:
    ring, sink = Ring(4), FakeSink()
    sink.ready = False
    with forwarding(ring, sink) as running:
        eventually(lambda: ring._idle_workers)
        prober = threading.Thread(target=running.destinations[0].health.on_failure, args=(None, False))
        prober.start()
        prober.join()
        put(ring, 1)
        eventually(lambda: ring._requeued, "the worker requeued its batch")
        assert sink.calls == 0
        running.destinations[0].health._prober = None
        assert ring.wait_committed(0, 1, 20)


def test_workers_with_links_go_on_while_another_is_refused() -> None:
    """A consumer with `-n` accepts some links and refuses the next one. That is not an outage."""
    ring, good, bad = Ring(4), FakeSink(), FakeSink()
    bad.error, bad.ready = NotStored("refused with HTTP status 503"), False
    good.gate.clear()
    sinks: list[FakeSink] = []

    def make(connected: object) -> FakeSink:
        sinks.append(bad if sinks else good)
        return sinks[-1]

    running = Forwarder(ring, [Destination(make)], 8)
    try:
        put(ring, 1, 2, 3, 4)
        eventually(lambda: bad.calls > 3, "a second worker starts, and fails repeatedly")
        assert len(sinks) == 2, "no third worker starts"
        good.gate.set()
        for turn in range(50):
            assert ring.wait_committed(0, put(ring, turn, turn, turn), 20)
    finally:
        ring.abort()
        assert running.stop(20)


def test_prober_backs_off_exponentially_with_full_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "BACKOFF_FIRST_SECONDS", 0.1)
    monkeypatch.setattr(timing, "BACKOFF_MAX_SECONDS", 5.0)
    pauses: list[tuple[float, float]] = []
    monkeypatch.setattr(random, "uniform", lambda low, high: pauses.append((low, high)) or 0)
    health = Health()
    assert health.pause() and not pauses
    for _ in range(1, 10):
        assert health.on_failure("away", sent=False)
        assert health.pause()
    assert pauses == [(0, limit) for limit in (0.2, 0.4, 0.8, 1.6, 3.2, 5, 5, 5, 5)]
    assert health.probed and health.down
    health.on_ack()
    assert not health.probed and not health.down
    assert health.pause() and len(pauses) == 9


def test_first_thread_to_fail_is_prober_until_success_or_resign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: 30)
    health = Health("there:1")
    assert health.on_failure("away", sent=False) and not health.yields(linked=False, several=True)

    def other() -> tuple[bool, ...]:
        yields = health.yields(linked=False, several=False), health.yields(linked=True, several=True)
        probes, goes_on = health.on_failure("away", sent=True), health.pause()
        health.on_ack()
        return *yields, probes, goes_on, health.probed

    assert Blocked(other).result() == (True, False, False, True, True), "the ack of another one does not end the probe"
    health.resign()
    assert Blocked(lambda: health.on_failure("away", sent=True)).result(), "another thread is the prober now"
    assert health.yields(linked=True, several=True), "an ack is missing, so even a worker with a link leaves the batch"
    assert not health.yields(linked=True, several=False)
    health._prober = threading.current_thread()
    health.on_link()
    assert health.probed, "a link alone is not enough"
    Blocked(health.stop).result()
    assert health.pause() is False, "stop ends the pause"


def test_late_ack_makes_its_worker_the_prober(caplog: pytest.LogCaptureFixture) -> None:
    """Unless other links have just had acks: then it is a slow batch, not a consumer that hangs."""
    health = Health("there:1")
    health.on_ack()
    health.on_late()
    assert not health.probed
    health._acked_at -= health_module.QUIET_SECONDS
    health.on_late()
    assert health.probed and not health.down
    assert Blocked(lambda: health.yields(linked=True, several=True)).result()
    health.on_ack()
    assert not health.probed
    assert [(record.msg, record.args) for record in caplog.records] == [("link_late", {"consumer": "there:1"})]


def test_stop_ends_worker_that_waits_for_its_sink() -> None:
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


def test_store_sink_stores_and_reports_failure(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "s.db"))
    sink, block = StoreSink(store), a_block(1, 2)
    sink.store(block)
    assert [row[1:] for row in rows(tmp_path / "s.db")] == [(0, 1), (1, 2)]
    store.close()
    with pytest.raises(NotStored, match="s.db is closed"):
        sink.store(block)


# Links.


def a_block(*values: int) -> Block:
    return Block([Run(SOURCE, 0, len(values))], array("q", values))


def test_link_sends_batches_and_waits_for_cumulative_acks() -> None:
    received, links = [], []

    def answer(peer: Link) -> None:
        total = 0
        for message in peer:
            block = decode_batch(message)  # type: ignore[arg-type]
            received.append((block.runs, list(block.values)))
            peer.ping()  # the link answers a ping between a message and its ack
            for _ in block.values:
                total += 1
                peer.send(encode_ack(total))

    with fake_consumer(answer) as port:
        sink = LinkSink("localhost", port, lambda: links.append(1))
        sink.store(a_block(1, 2, 3))
        sink.store(a_block(-1))
        sink.close()
    assert received == [([Run(SOURCE, 0, 3)], [1, 2, 3]), ([Run(SOURCE, 0, 1)], [-1])]
    assert links == [1]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        pytest.param(lambda peer: peer.recv(), "closed with 1000", id="close without an ack"),
        pytest.param(
            lambda peer: peer.close(1011, "disk full"),
            "closed with 1011 disk full",
            id="close because the disk is full",
        ),
        pytest.param(lambda peer: peer.socket.shutdown(2), "localhost", id="dropped connection"),
        pytest.param(lambda peer: (peer.send(b"1234"), peer.recv(), peer.recv()), "an ack has 8", id="malformed ack"),
        pytest.param(
            lambda peer: (peer.send(encode_ack(9)), peer.recv(), peer.recv()), "acked 9", id="ack of more than was sent"
        ),
        pytest.param(
            lambda peer: (peer.socket.sendall(b"\x82\x88" + bytes(4) + encode_ack(2)), peer.recv(), peer.recv()),
            "masked",
            id="masked frame",
        ),
        pytest.param(lambda peer: (peer.send("text"), peer.recv(), peer.recv()), "1003", id="text message"),
        pytest.param(lambda peer: (peer.recv(), peer.recv()), "no ack within 0.3 s: it hangs", id="no answer"),
    ],
)
def test_store_without_ack_fails_and_next_store_makes_new_link(
    answer: Callable[[Link], None], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "ACK_TIMEOUT_SECONDS", 0.3)
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
        with pytest.raises(InDoubt, match=reason):
            sink.store(a_block(1, 2))
        sink.store(a_block(1, 2))
        sink.close()
    assert links == [1, 1]


def test_unreachable_consumer_is_described_without_error_number() -> None:
    port = free_port()
    with pytest.raises(NotStored, match=f"^localhost:{port}: Connection refused$"):
        LinkSink("localhost", port).store(a_block(1))


def test_malformed_handshake_response_raises_not_stored() -> None:
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
        with pytest.raises(NotStored, match="is not a WebSocket server"):
            LinkSink("localhost", listener.getsockname()[1], lambda: None).store(a_block(1))
        serving.result()


def test_refused_link_reports_the_reason() -> None:
    with pytest.raises(NotStored, match="refused"):
        LinkSink("localhost", free_port(), lambda: None).store(a_block(1))
    with fake_consumer(lambda peer: None, subprotocol=None) as port:
        with pytest.raises(NotStored, match="does not speak"):
            LinkSink("localhost", port, lambda: None).store(a_block(1))
    for answer, reason in [
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
                with pytest.raises(NotStored, match=reason):
                    call.result()


@pytest.mark.parametrize("store", [None, "6f1c", "x" * 201])
def test_block_sent_and_not_acked_is_in_doubt_at_named_store(store: str | None) -> None:
    with fake_consumer(lambda peer: (peer.recv(), peer.socket.shutdown(2)), store) as port:
        sink = LinkSink("localhost", port)
        assert sink.identity is None
        sink.connect()
        known = store if store != "x" * 201 else None  # too long for an identity
        assert sink.ready and sink.identity == known
        with pytest.raises(InDoubt) as failed:
            sink.store(a_block(1))
        assert failed.value.store == known and not sink.ready and sink.identity is None


@pytest.mark.parametrize(
    ("answer", "store", "not_stored"),
    [
        (lambda peer: (peer.recv(), peer.close(1001, "the server is stopping")), "x", True),
        (lambda peer: (peer.recv(), peer.close(1001, "the server is stopping")), None, False),  # it may be a publisher
        (lambda peer: (peer.recv(), peer.close(1011, "not stored: disk full")), "x", False),
        (lambda peer: (peer.recv(), peer.send(encode_ack(1)), peer.close(1001)), "x", False),
    ],
)
def test_goodbye_of_store_means_not_stored_unless_part_is_acked(
    answer: Callable[[Link], None], store: str | None, not_stored: bool
) -> None:
    """If a part of a block is acked, the block is in doubt, because no store acks parts."""
    with fake_consumer(answer, store) as port:
        with pytest.raises(NotStored if not_stored else InDoubt):
            LinkSink("localhost", port).store(a_block(1, 2))


def test_failed_connect_raises_not_stored() -> None:
    with pytest.raises(NotStored):
        LinkSink("localhost", free_port()).connect()


def test_store_on_ended_link_sends_nothing_and_makes_no_link() -> None:
    """At the other end of a new link might be another store than the one that the block is for."""
    links: list[int] = []
    with socket.create_server(("localhost", 0)) as listener:
        sink = LinkSink("localhost", listener.getsockname()[1], lambda: links.append(1))
        call = Blocked(sink.connect)
        with raw_link(listener) as peer:
            call.result()
            peer.shutdown(socket.SHUT_WR)
            eventually(lambda: sink._link and sink._link.sock.recv(1, socket.MSG_PEEK) == b"")
            with pytest.raises(NotStored, match="closed the connection"):
                sink.store(a_block(1))
            assert peer.recv(9) == b""
    assert links == [1] and not sink.ready


def test_abort_ends_connect_that_waits_for_response() -> None:
    with socket.create_server(("localhost", 0)) as listener:
        sink = LinkSink("localhost", listener.getsockname()[1])
        call = Blocked(sink.connect)
        with listener.accept()[0] as peer:
            assert peer.recv(65536) and call.still()
            sink.abort()
            with pytest.raises(NotStored):
                call.result(2)


def test_link_to_address_of_a_name_sends_the_name_as_host() -> None:
    with socket.create_server(("localhost", 0)) as listener:
        sink = LinkSink("127.0.0.1", listener.getsockname()[1], dial=dialer(name="consumer.example"))
        call = Blocked(sink.connect)
        with listener.accept()[0] as peer:
            assert f"Host: consumer.example:{listener.getsockname()[1]}\r\n".encode() in peer.recv(65536)
        with pytest.raises(NotStored, match="127.0.0.1:"):
            call.result()


def test_server_makes_no_link_to_itself() -> None:
    """Otherwise a publisher would get the records of its spool as duplicates, and delete them from the spool."""
    with fake_consumer(lambda peer: None) as port:
        with pytest.raises(NotStored, match="this server itself"):
            LinkSink("localhost", port, dial=dialer(is_own=lambda address: address[1][1] == port)).store(a_block(1))


def test_abort_from_another_thread_ends_waiting_store() -> None:
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
        with pytest.raises(InDoubt):
            call.result()
        with pytest.raises(NotStored, match="stopping"):
            sink.store(a_block(1))


@pytest.mark.parametrize("hangs", ["while it sends", "before its ack", "with pings"])
def test_late_ack_is_reported_once_and_still_counts(hangs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "LATE_SECONDS", 0.1)
    late, reading = threading.Event(), threading.Event()
    values = range(1_000_000 if hangs == "while it sends" else 1)
    calls: list[int] = []

    def on_late() -> None:
        calls.append(1)
        late.set()

    def answer(peer: Link) -> None:
        if hangs == "while it sends":
            assert late.wait(20)
        message = peer.recv()
        while hangs == "with pings" and not late.is_set():
            peer.ping()
            reading.wait(0.01)
        assert late.wait(20) and list(decode_batch(message).values) == list(values)
        peer.send(encode_ack(len(values)))

    with fake_consumer(answer) as port:
        sink = LinkSink("localhost", port)
        sink.store(a_block(*values), on_late)
        sink.close()
    assert calls == [1]


def test_idle_link_answers_and_sends_pings() -> None:
    links: list[int] = []
    answered = threading.Event()

    def answer(peer: Link) -> None:
        peer.recv()
        pong = peer.ping()
        peer.send(encode_ack(1))
        assert pong.wait(20), "the link answers in store or in idle"
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
        pytest.param(lambda peer: peer.sendall(b"\x88\x02\x03\xe8"), id="close frame"),
        pytest.param(lambda peer: peer.shutdown(socket.SHUT_RDWR), id="closed connection"),
        pytest.param(lambda peer: None, id="unanswered ping"),
    ],
)
def test_dead_idle_link_is_dropped_before_a_block_needs_it(fault: Callable[[socket.socket], None]) -> None:
    with socket.create_server(("localhost", 0)) as listener:
        sink = LinkSink("localhost", listener.getsockname()[1])
        sink.idle()  # does nothing without a link
        for _ in range(2):
            call = Blocked(lambda: sink.store(a_block(1)))
            with raw_link(listener) as peer:
                peer.sendall(b"\x82\x08" + encode_ack(1))
                call.result()
                assert sink.ready
                fault(peer)
                eventually(lambda: sink.idle() or not sink.ready)


def test_failing_link_loses_nothing_and_reconnects_are_counted() -> None:
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
                return  # stored, and not acked
            total += len(block.values)
            peer.send(struct.pack(">Q", total))

    ring = Ring(16)
    with fake_consumer(answer) as port:
        running = Forwarder(ring, [Destination(lambda connected: LinkSink("localhost", port, connected))], 4)
        assert ring.wait_committed(0, put(ring, *range(400)), 30)
        ring.close()
        assert ring.join(20) and running.stop(20)
    assert stored == {(SOURCE, n): n for n in range(400)}
    assert running.stats().reconnects > 3
