"""The spool: records are on disk while the consumer is down, and reach the consumer once when it is up again."""

import logging
import random
import signal
import threading
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.broken import break_connections
from support.fake_consumer import Link, fake_consumer
from support.harness import Blocked, ServerProcess, eventually, free_port, in_order, rows, seeded, server
from support.short_times import short_times  # noqa: F401  (a fixture for every test here)

from ringbuffer import Ring
from ringolib import timing
from ringolib.client.producer import Producer
from ringolib.forward import link as link_module
from ringolib.forward import spool
from ringolib.forward.destination import Destination
from ringolib.forward.health import Health
from ringolib.forward.link import LinkSink
from ringolib.forward.sink import InDoubt, NotStored
from ringolib.forward.spool import Spool, SpoolSink
from ringolib.forward.workers import Forwarder
from ringolib.storage.interface import Sizes, StoreError
from ringolib.storage.remedies import NoRoom
from ringolib.wire import Block, Run, decode_batch, encode_ack
from store import Store

SOURCE = b"s" * 16


class FakeLink:
    """A link to a consumer that is up while `error` is None. It keeps the first value of each record."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.ready = False
        self.stored: dict[tuple[bytes, int], int] = {}
        self.calls = 0
        self.closed = 0

    def store(self, block: Block) -> None:
        self.calls += 1
        self.ready = False
        if self.error:
            raise self.error
        self.ready = True
        keep(self.stored, block)

    def idle(self) -> None: ...

    def abort(self) -> None:
        self.error = NotStored("aborted")

    def close(self) -> None:
        self.ready = False
        self.closed += 1


def keep(stored: dict[tuple[bytes, int], int], block: Block) -> None:
    values = iter(block.values)
    for run in block.runs:
        for sequence in range(run.first, run.first + run.count):
            stored.setdefault((run.source, sequence), next(values))


@contextmanager
def spooling(path: Path, link: FakeLink, max_records: int = 1000) -> Iterator[Spool]:
    running = Spool(str(path), max_records, link, Health("there:1"))  # type: ignore[arg-type]
    try:
        yield running
    finally:
        assert running.stop(20)
        assert not [thread for thread in threading.enumerate() if thread.name == "replay"]


def a_block(first: int, end: int) -> Block:
    return Block([Run(SOURCE, first, end - first)], array("q", range(first * 10, end * 10, 10)))


def expected(end: int) -> dict[tuple[bytes, int], int]:
    return {(SOURCE, n): n * 10 for n in range(end)}


def test_blocks_are_spooled_then_forwarded_in_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    link, replay = FakeLink(), FakeLink()
    link.error = replay.error = InDoubt("away")
    with spooling(tmp_path / "s", replay) as running:
        sink = SpoolSink(link, running)  # type: ignore[arg-type]
        for n in range(0, 50, 10):
            sink.store(a_block(n, n + 10))
        assert link.calls == 1, "later blocks go to the spool at once"
        eventually(lambda: replay.calls > 3)
        stats = running.stats()
        assert (stats.depth, stats.forwarded) == (50, 0) and stats.oldest >= 0
        assert running.health.stats()[:2] == ("down", "away") and running.health.stats().away > 0
        assert len(rows(tmp_path / "s")) == 50
        link.error = replay.error = None
        eventually(lambda: running.depth == 0)
        eventually(lambda: running.stats() == (0, 0.0, 50))
        assert running.health.stats()[:3] == ("up", None, 0)
        assert replay.stored == expected(50) and list(replay.stored) == list(expected(50))
        eventually(lambda: replay.closed == 1, "it keeps no link while the spool is empty")
        sink.store(a_block(50, 60))
        assert link.calls == 2 and running.depth == 0, "blocks go over the link again"
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["link_down", "link_up", "spool_empty"], "once per change"


def test_workers_with_links_use_them_while_others_spool(tmp_path: Path) -> None:
    good, bad, replay = FakeLink(), FakeLink(), FakeLink()
    bad.error = replay.error = NotStored("refused with HTTP status 503")
    with spooling(tmp_path / "s", replay) as running:
        sink = SpoolSink(good, running)  # type: ignore[arg-type]
        sink.store(a_block(0, 1))
        SpoolSink(bad, running).store(a_block(1, 2))  # type: ignore[arg-type]
        sink.store(a_block(2, 3))
        assert running.away and good.calls == 2 and good.ready
        sink.idle()
        assert not good.ready, "an idle link makes room for the link of the spool"
        replay.error = None
        eventually(lambda: running.depth == 0)


def test_full_spool_refuses_until_there_is_room(tmp_path: Path) -> None:
    link, replay = FakeLink(), FakeLink()
    link.error = replay.error = NotStored("away")
    with spooling(tmp_path / "s", replay, max_records=100) as running:
        sink = SpoolSink(link, running)  # type: ignore[arg-type]
        sink.store(a_block(0, 60))
        with pytest.raises(NotStored, match="spool is full, it has at most 100 records"):
            sink.store(a_block(60, 101))
        sink.store(a_block(60, 100))
        calls = link.calls
        with pytest.raises(NotStored, match="full"):
            sink.store(a_block(100, 101))
        assert link.calls > calls, "if the spool is full, the link is tried"
        link.error = None
        sink.store(a_block(100, 101))
        assert not running.away, "and its ack marks the consumer up"
        replay.error = None
        eventually(lambda: running.depth == 0)
    assert {**replay.stored, **link.stored} == expected(101)


def test_spool_without_room_for_a_batch_counts_as_full(tmp_path: Path) -> None:
    """Workers store whole batches, so a few free places do not help."""
    replay = FakeLink()
    replay.error = NotStored("away")
    with spooling(tmp_path / "s", replay, max_records=100) as running:
        running.append(a_block(0, 60))
        assert running.refuses() is None
        with pytest.raises(NotStored, match="full"):
            running.append(a_block(60, 101))
        assert running.full and "start the consumer, or raise this limit" in (running.refuses() or "")
        running.append(a_block(60, 99))
        assert not running.full and running.refuses() is None
        with pytest.raises(NotStored, match="full"):
            running.append(a_block(99, 101))
        replay.error = None
        eventually(lambda: running.depth == 0)
        assert running.refuses() is None


def test_blocks_being_stored_count_towards_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replay, gate = FakeLink(), threading.Event()
    replay.error = NotStored("away")
    with spooling(tmp_path / "s", replay, max_records=10) as running:
        append = running.store.append
        monkeypatch.setattr(running.store, "append", lambda *block: (gate.wait(30), append(*block)))
        first = Blocked(lambda: running.append(a_block(0, 6)))
        eventually(lambda: running._incoming == 6)
        with pytest.raises(NotStored, match="full"):
            running.append(a_block(6, 12))
        gate.set()
        first.result()
        assert running.depth == 6


def test_failing_spool_reports_error_and_link_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link, replay = FakeLink(), FakeLink()
    link.error = replay.error = NotStored("away")
    with spooling(tmp_path / "s", replay) as running:
        sink = SpoolSink(link, running)  # type: ignore[arg-type]

        def broken(*block: object) -> None:
            raise StoreError("s: database or disk is full")

        monkeypatch.setattr(running.store, "append", broken)
        for _ in range(2):
            with pytest.raises(NotStored, match="disk is full"):
                sink.store(a_block(0, 5))
        link.error = None
        sink.store(a_block(0, 5))
        assert link.stored == expected(5) and not running.away


def test_spooled_records_are_forwarded_after_a_restart(tmp_path: Path) -> None:
    replay = FakeLink()
    replay.error = NotStored("away")
    with spooling(tmp_path / "s", replay) as running:
        for n in range(10):
            running.append(a_block(n, n + 1))
    again = FakeLink()
    with spooling(tmp_path / "s", again) as running:
        eventually(lambda: running.depth == 0)
        eventually(lambda: running.stats().forwarded == 10)
    assert again.stored == expected(10)


@pytest.mark.parametrize("error", [MemoryError(), ZeroDivisionError("a bug"), KeyboardInterrupt()], ids=repr)
def test_spool_deletes_nothing_that_an_error_broke_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Otherwise the next block would complete the message that was broken off, and its ack would be for another one."""
    stored: dict[tuple[bytes, int], int] = {}

    def answer(connection: Link) -> None:
        count = 0
        for message in connection:
            block = decode_batch(message)
            keep(stored, block)
            count += len(block.values)
            connection.send(encode_ack(count))

    monkeypatch.setattr(spool, "BATCH_RECORDS", 1000)
    break_connections(monkeypatch, link_module, error, error)
    with fake_consumer(answer, store="here") as port:
        link = LinkSink("localhost", port)
        running = Spool(str(tmp_path / "s"), 10_000, link, Health("there:1"))
        try:
            for n in range(0, 5000, 1000):
                running.append(a_block(n, n + 1000))
            eventually(lambda: running.depth == 0)
            eventually(lambda: running.stats().forwarded == 5000)
        finally:
            assert running.stop(20)
    assert stored == expected(5000)


@pytest.mark.parametrize("error", [MemoryError(), ZeroDivisionError("a bug")], ids=repr)
def test_broken_off_batch_goes_to_the_spool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    replay = FakeLink()
    replay.error = NotStored("away")
    break_connections(monkeypatch, link_module, error)
    with fake_consumer(lambda link: list(link)) as port, spooling(tmp_path / "s", replay, 2000) as running:
        sink = SpoolSink(LinkSink("localhost", port), running)
        sink.store(a_block(0, 1000))
        assert running.depth == 1000 and not sink._link.ready
        replay.error = None
        eventually(lambda: running.depth == 0)
    assert replay.stored == expected(1000)


@pytest.mark.parametrize("part", ["_forward_oldest", "_record_success"])
def test_persistent_unexpected_error_pauses_replay_and_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    monkeypatch.setattr(timing, "BACKOFF_FIRST_SECONDS", 0.1)
    monkeypatch.setattr(timing, "BACKOFF_MAX_SECONDS", 0.1)
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    replay, calls = FakeLink(), []

    def broken(*unused: object) -> int:
        calls.append(1)
        raise ZeroDivisionError("a bug")

    with spooling(tmp_path / "s", replay) as running:
        if part == "_record_success":  # the records are gone then
            monkeypatch.setattr(running, "_forward_oldest", lambda: 1)
        with monkeypatch.context() as patch:
            patch.setattr(running, part, broken)
            running.append(a_block(0, 5))
            threading.Event().wait(0.45)
            assert 2 <= len(calls) <= 6, "at most one turn in 0.1 s"
        monkeypatch.undo()
        eventually(lambda: running.depth == 0)
    assert [record.args for record in caplog.records if record.levelno >= logging.ERROR] == [{"error": "a bug"}]


@pytest.mark.parametrize("method", ["oldest", "delete"])
def test_replay_thread_survives_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    """The errors are of the store, and unexpected ones. Records forwarded and not deleted are forwarded again."""
    replay = FakeLink()
    with spooling(tmp_path / "s", replay) as running:
        works = getattr(running.store, method)
        errors = iter([StoreError("s: disk I/O error"), ZeroDivisionError("a bug"), StoreError("again")])

        def failing(given: object) -> object:
            for error in errors:
                raise error
            return works(given)

        monkeypatch.setattr(running.store, method, failing)
        running.append(a_block(0, 5))
        eventually(lambda: running.stats().forwarded == 5)
        assert running.depth == 0 and replay.calls == (4 if method == "delete" else 1)
    assert replay.stored == expected(5)
    messages = [str(record.args) for record in caplog.records if record.msg == "replay_error"]
    assert len(messages) == 2, "a repeated error is logged once"
    assert "disk I/O error" in messages[0] and "a bug" in messages[1]


def test_unreadable_spool_does_not_make_the_consumer_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then only the workers can find out that the consumer is up again."""
    link, replay = FakeLink(), FakeLink()
    link.error = NotStored("away")
    with spooling(tmp_path / "s", replay) as running:
        oldest = running.store.oldest
        monkeypatch.setattr(
            running.store, "oldest", lambda limit: (_ for _ in ()).throw(StoreError("s: disk I/O error"))
        )
        sink = SpoolSink(link, running)  # type: ignore[arg-type]
        sink.store(a_block(0, 5))
        eventually(lambda: running._broken)
        link.error = None
        sink.store(a_block(5, 10))
        assert link.stored == {(SOURCE, n): n * 10 for n in range(5, 10)} and running.depth == 5
        monkeypatch.setattr(running.store, "oldest", oldest)
        eventually(lambda: running.depth == 0)
    assert replay.stored == expected(5)


def test_slow_link_gets_smaller_blocks(tmp_path: Path) -> None:
    class Slow(FakeLink):
        def store(self, block: Block) -> None:
            self.error = NotStored("no ack within 30 s") if len(block.values) > 100 else None
            super().store(block)

    replay = Slow()
    with spooling(tmp_path / "s", replay, max_records=10_000) as running:
        for n in range(0, 5000, 50):
            running.append(a_block(n, n + 50))
        eventually(lambda: running.depth == 0)
    assert replay.stored == expected(5000)


def test_spool_leaves_disk_space_free_for_deletes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link, replay = FakeLink(), FakeLink()
    link.error = replay.error = NotStored("away")
    with spooling(tmp_path / "s", replay) as running:
        sink = SpoolSink(link, running)  # type: ignore[arg-type]
        monkeypatch.setattr(spool, "MIN_FREE_BYTES", 2**62)
        with pytest.raises(NotStored, match="of its disk are free: make room"):
            sink.store(a_block(0, 5))
        assert not sink.ready
        monkeypatch.setattr(spool, "MIN_FREE_BYTES", 0)
        sink.store(a_block(0, 5))
        assert sink.ready


def test_flaky_links_and_spool_deliver_every_record_once(tmp_path: Path) -> None:
    seed = seeded()
    rng = random.Random(seed)
    stored: dict[tuple[bytes, int], int] = {}
    lock = threading.Lock()

    class Flaky(FakeLink):
        def store(self, block: Block) -> None:
            with lock:
                lost, fails = rng.random() < 0.2, rng.random() < 0.5
                if not fails or not lost:
                    keep(stored, block)
            self.ready = not fails
            if fails:
                raise InDoubt("flaky")

    ring = Ring(64)
    with spooling(tmp_path / "s", Flaky(), max_records=200) as running:
        workers = Forwarder(ring, [Destination(lambda connected: SpoolSink(Flaky(), running))], 8, 200)  # type: ignore[arg-type]
        for n in range(0, 3000, 50):
            ring.put(array("q", range(n * 10, n * 10 + 500, 10)), SOURCE, n, 20)
        ring.close()
        assert ring.join(20) and workers.stop(20)
        eventually(lambda: running.depth == 0)
    assert stored == expected(3000)


# Whole processes.


@pytest.fixture
def port() -> int:
    """A free port: nothing listens there until a test starts a server on it."""
    return free_port()


@pytest.mark.slow
def test_publisher_acks_into_spool_and_survives_kill(tmp_path: Path, port: int) -> None:
    own = free_port()
    flags = ["-p", str(own), "-T", str(port), "-S", "s.spool"]
    values = array("q", random.randbytes(8 * 300_000))
    running = ServerProcess(tmp_path, *flags)
    try:
        assert f", spooling in {tmp_path}/s.spool, token off" in running.greeting
        with Producer(running.url) as sender:
            sender.send(values[:200_000])
            sender.flush(30)  # acked without a consumer
            assert running.stats()["spoolDepth"] == 200_000
            running.kill()
            assert in_order(tmp_path / "s.spool", sender.source) == list(values[:200_000])
            running = ServerProcess(tmp_path, *flags)
            sender.send(values[200_000:])
            sender.flush(30)
            stats = running.stats()
            assert stats["spoolDepth"] == 300_000 and stats["spoolOldestMs"] > 0 and stats["consumerAwayMs"] > 0
            with server(tmp_path, "-I", "false", "-p", str(port), "-D", "c.db") as consumer:
                eventually(lambda: running.stats()["spoolForwarded"] >= 50_000, "the spool is being forwarded")
                consumer.kill()
            eventually(lambda: running.stats()["consumerAwayMs"] > 0)
            with server(tmp_path, "-I", "false", "-p", str(port), "-D", "c.db") as consumer:
                eventually(lambda: running.stats()["spoolDepth"] == 0)
                sender.send([1, 2, 3])
                sender.flush(30)
                stats = running.stats()
                assert stats["consumerAwayMs"] == stats["spoolOldestMs"] == stats["spoolDepth"] == 0
                assert consumer.stats()["recordsStored"] + consumer.stats()["recordsDuplicate"] >= 3
            assert running.stop() == 0
            assert running.tally.endswith(" stored, 0 unstored, 0 in the spool")
    finally:
        running.kill()
    assert "Traceback" not in running.errors.read_text()
    assert in_order(tmp_path / "c.db", sender.source) == [*values, 1, 2, 3]


@pytest.mark.slow
def test_full_spool_causes_backpressure_and_loses_nothing(tmp_path: Path, port: int) -> None:
    values = array("q", range(100_000))
    with server(tmp_path, "-p", "0", "-T", str(port), "-S", "s", "--spool_max", "30000", "-r", "1024") as publisher:
        with Producer(publisher.url) as sender:
            sender.send(values)
            eventually(lambda: publisher.stats()["ringDepth"] == 1024 and publisher.stats()["spoolDepth"] > 29_000)
            with pytest.raises(TimeoutError):
                sender.flush(0.3)
            stats = publisher.stats()
            assert stats["spoolDepth"] <= 30_000 and sender.acked <= stats["spoolDepth"]
            with server(tmp_path, "-I", "false", "-p", str(port), "-D", "c.db"):
                sender.flush(30)
                eventually(lambda: publisher.stats()["spoolDepth"] == 0)
                assert publisher.stop() == 0
    assert in_order(tmp_path / "c.db", sender.source) == list(values)


@pytest.mark.slow
def test_unresponsive_consumer_is_down(tmp_path: Path) -> None:
    with server(tmp_path, "-I", "false", "-p", "0", "-D", "c.db") as consumer:
        flags = ["-p", "0", "-T", str(consumer.port), "-S", "s"]
        with server(
            tmp_path,
            *flags,
            patch="forward.spool.ACK_TIMEOUT_SECONDS = 0.5; net.websocket_client.CONNECT_TIMEOUT = 0.5",
        ) as publisher:
            with Producer(publisher.url) as sender:
                sender.send(range(1000))
                sender.flush(30)
                consumer.send_signal(signal.SIGSTOP)
                sender.send(range(1000, 50_000))
                sender.flush(30)
                assert publisher.stats()["spoolDepth"] > 0
                consumer.send_signal(signal.SIGCONT)
                eventually(lambda: publisher.stats()["spoolDepth"] == 0)
    assert in_order(tmp_path / "c.db", sender.source) == list(range(50_000))


def test_stop_while_consumer_is_down_leaves_records_in_spool(tmp_path: Path, port: int) -> None:
    with server(tmp_path, "-p", "0", "-T", str(port), "-S", "s", "-A", "ring") as publisher:
        with Producer(publisher.url) as sender:
            sender.send(range(50_000))
            sender.flush(30)
            assert publisher.stop() == 0
    assert publisher.tally == "ringoexp: stopped, 50000 stored, 0 unstored, 50000 in the spool"
    assert in_order(tmp_path / "s", sender.source) == list(range(50_000))


def test_publisher_never_forwards_its_spool_to_itself(tmp_path: Path, port: int) -> None:
    unknown = (
        "socket.tries = []; socket.getaddrinfo = (lambda real: lambda host, *args, **kw: real('nowhere.invalid' if"
        " host == 'me.lan' and (socket.tries.append(1) or len(socket.tries) < 2) else"
        " 'localhost' if host == 'me.lan' else host, *args, **kw))(socket.getaddrinfo)"
    )
    flags = ["-p", str(port), "-T", str(port), "-U", "me.lan", "-S", "s", "--allow_host", "me.lan"]
    with server(tmp_path, *flags, patch=unknown) as publisher:
        with Producer(publisher.url) as sender:
            sender.send(range(100))
            sender.flush(30)
        eventually(lambda: "this server itself" in publisher.errors.read_text())
        assert publisher.stats()["spoolDepth"] == 100
        assert publisher.stop() == 0
    assert in_order(tmp_path / "s", sender.source) == list(range(100))


def test_publisher_with_spool_starts_without_resolving_consumer(tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-U", "nowhere.invalid", "-T", "1", "-S", "s") as publisher:
        with Producer(publisher.url) as sender:
            sender.send(range(100))
            sender.flush(30)
    assert "event=consumer_unresolved" in publisher.errors.read_text()
    assert in_order(tmp_path / "s", sender.source) == list(range(100))


@pytest.mark.parametrize(
    ("prepare", "flags", "message"),
    [
        (lambda path: None, ["-T", "0"], "stores in its own database, it needs no spool"),
        (lambda path: Store(str(path)).close(), ["-T", "1"], "is a consumer's database, not a publisher's spool"),
        (lambda path: path.mkdir(), ["-T", "1"], "is a directory"),
    ],
)
def test_unusable_spool_is_a_one_line_error(tmp_path: Path, prepare: object, flags: list[str], message: str) -> None:
    prepare(tmp_path / "s")  # type: ignore[operator]
    with pytest.raises(AssertionError, match=message) as refused:
        ServerProcess(tmp_path, "-p", "0", *flags, "-S", "s")
    assert str(refused.value).count("ringoexp: error: ") == 1 and "Traceback" not in str(refused.value)


def test_spool_in_use_is_refused(tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "1", "-S", "s"):
        with pytest.raises(AssertionError, match="in use by another ringoexp"):
            ServerProcess(tmp_path, "-p", "0", "-T", "1", "-S", "s")


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The spool's file cannot be opened for want of room, until the event is set."""
    room = threading.Event()

    def open_store(path: str, kind: int) -> Store:
        if not room.is_set():
            raise NoRoom(f"{path}: the disk is full")
        return Store(path, kind)

    monkeypatch.setattr(spool, "Store", open_store)
    monkeypatch.setattr(timing, "BACKOFF_MAX_SECONDS", 0.05)
    return room


def test_spool_without_room_is_opened_when_there_is_room(
    tmp_path: Path, no_room: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    no_room.set()
    link, replay = FakeLink(), FakeLink()
    replay.error = NotStored("down")
    with spooling(tmp_path / "s", replay) as running:
        running.append(a_block(0, 5))
    no_room.clear()
    with spooling(tmp_path / "s", replay) as running:
        replay.error = None
        SpoolSink(link, running).store(a_block(5, 10))  # type: ignore[arg-type]
        assert len(link.stored) == 5 and running.depth == 0 and not running.away
        assert running.refuses() == running.store.stats().error == f"{tmp_path / 's'}: the disk is full"
        link.error = NotStored("the link is down")
        with pytest.raises(NotStored, match="the disk is full"):
            SpoolSink(link, running).store(a_block(10, 15))  # type: ignore[arg-type]
        assert running.full and not running.away
        no_room.set()
        eventually(lambda: len(replay.stored) == 5 and not running.depth, "the records of the file are forwarded")
        assert not running.full and running.refuses() is None
        running.append(a_block(10, 15))
    events = [record.getMessage() for record in caplog.records if record.name == "ringoexp.spool"]
    assert events.count("spool_unopened") == events.count("spool_opened") == 1 and "replay_error" not in events


def test_spool_that_cannot_be_opened_later_is_named(
    tmp_path: Path, no_room: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    """There is room again, but the file is no spool."""
    caplog.set_level(logging.INFO)
    (tmp_path / "s").write_bytes(b"a user's notes\n" * 100)
    with spooling(tmp_path / "s", FakeLink()) as running:
        no_room.set()
        eventually(lambda: "is not a SQLite file" in (running.refuses() or ""))
        assert "is not a SQLite file" in str(running.store.stats().error)
        eventually(lambda: running._failures > 5)
    events = [str(record.args) for record in caplog.records if record.getMessage() == "spool_unopened"]
    assert len(events) == 2 and "disk is full" in events[0] and "is not a SQLite file" in events[1]


def test_block_that_comes_while_the_spool_opens_gets_a_reason(tmp_path: Path, no_room: threading.Event) -> None:
    with spooling(tmp_path / "s", FakeLink()) as running:
        unopened = running.store
        sizes = unopened.sizes

        def opens_meanwhile() -> Sizes:
            no_room.set()
            eventually(lambda: running.store is not unopened)
            return sizes()

        unopened.sizes = opens_meanwhile  # type: ignore[method-assign]
        with pytest.raises(NotStored, match="the disk is full"):
            running.append(a_block(0, 5))
        running.append(a_block(0, 5))
        assert not running.full


def test_stop_ends_while_spool_has_no_room(tmp_path: Path, no_room: threading.Event) -> None:
    with spooling(tmp_path / "s", FakeLink()) as running:
        assert running.stats().depth == 0
    assert not (tmp_path / "s").exists()
