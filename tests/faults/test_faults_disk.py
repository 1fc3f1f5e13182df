"""Tests with full, failing and slow disks under a running server, and with readers that keep the WAL from restarting.

Each fault ends after a while. Then the server recovers by itself: no acked record is lost, no record is stored twice,
and the log has one line about the fault.
"""

import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import product
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from support import strace
from support.harness import Blocked, RawClient, ServerProcess, eventually, frame, not_ready, request, seeded, server

from ringolib import timing
from ringolib.client import outbox
from ringolib.client.producer import Producer
from ringolib.wire import encode_plain
from store import Store

BASE = 2**62
"""The first value. Values this large take 8 bytes on disk."""
MEBIBYTE = 1024 * 1024
ENDS = "SELECT (SELECT max(id) FROM record), (SELECT first_id + count - 1 FROM batch ORDER BY first_id DESC LIMIT 1)"
COUNTS = "SELECT (SELECT count(*) FROM record), (SELECT sum(count) FROM batch)"
QUICK = (
    "timing.BACKOFF_MAX_SECONDS = 0.2; web.session.PATIENCE_SECONDS = 0.1; "
    "wsserver.INGEST_TIMEOUT_SECONDS = 0.3; forward.health.QUIET_SECONDS = 0"
)
ROLES = ["consumer behind a publisher", "single process"]


def query(database: Path, sql: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as reader:
        return reader.execute(sql).fetchall()


def stored(database: Path, producer: Producer) -> tuple[int, int, int, int]:
    """Return of a producer's records: their number, distinct ones, the length without a gap, and wrong values."""
    mine = f"source_id = (SELECT id FROM source WHERE uuid = x'{producer.source.hex}')"
    (begin, gap) = query(
        database,
        f"""SELECT min(sequence), min(sequence + count) FILTER (WHERE NOT EXISTS (SELECT 1 FROM batch AS next
              WHERE next.source_id = batch.source_id AND next.sequence = batch.sequence + batch.count))
              FROM batch WHERE {mine}""",
    )[0]
    (count, different, wrong) = query(
        database,
        f"""SELECT count(*), count(DISTINCT sequence), sum(value != sequence + {BASE})
              FROM records WHERE source = '{producer.source}'""",
    )[0]
    return count, different, gap if begin == 0 else 0, wrong


def send(producer: Producer, count: int) -> None:
    """Send `count` more records in pieces, so that there are many commits."""
    first = producer.sent
    for start in range(first, first + count, 2000):
        producer.send(range(BASE + start, BASE + min(start + 2000, first + count)))


def events(running: ServerProcess, name: str) -> int:
    """Return how often an event is in the server's log."""
    return running.errors.read_text().count(f"event={name} ")


def wait_for_failures(running: ServerProcess, times: int) -> None:
    """Wait until so many more commits have failed."""
    count = running.stats()["failedCommits"]
    eventually(lambda: running.stats()["failedCommits"] >= count + times, "commits are retried and fail")
    assert running.stats()["storeError"]


def stuck(running: ServerProcess, database: Path, producer: Producer) -> bool:
    """True if commits fail and none succeeds in between.

    While a disk fills up, it may have room again after the WAL is truncated, or room for a smaller batch.
    """
    before = stored(database, producer)
    wait_for_failures(running, 4)
    return stored(database, producer) == before


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if not shutil.which("mount"):
        pytest.skip("needs mount")
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"may not mount here: {mount.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


class Fault:
    """A fault of the disk under `database`, which `victim` has open, from `begin` to `end`."""

    sudden = True  # every commit fails, from the first one on

    def __init__(self, victim: ServerProcess, database: Path) -> None:
        self.victim = victim
        self.database = database

    def begin(self) -> None: ...

    def end(self) -> None: ...

    def clean(self) -> None:
        """End the helper process, also after a failed test."""


class Full(Fault):
    """The disk has little room, and the next records fill it."""

    sudden = False

    def begin(self) -> None:
        room = shutil.disk_usage(self.database.parent).free - MEBIBYTE
        (self.database.parent / "ballast").write_bytes(bytes(room))

    def end(self) -> None:
        (self.database.parent / "ballast").unlink()


class TooLarge(Fault):
    """Files may not grow beyond a limit. The error is EFBIG, which SQLite does not call full."""

    sudden = False

    def begin(self) -> None:
        self._limits = resource.prlimit(self.victim.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self.victim.process.pid, resource.RLIMIT_FSIZE, (MEBIBYTE // 2, self._limits[1]))

    def end(self) -> None:
        resource.prlimit(self.victim.process.pid, resource.RLIMIT_FSIZE, self._limits)


class Broken(Fault):
    """Every call of one kind fails on the database and its WAL."""

    call = "fdatasync"

    def begin(self) -> None:
        paths = [f"-P{self.database}-wal", f"-P{self.database}"]
        self._log = self.database.parent / f"attached-{monotonic()}"
        self._strace = subprocess.Popen(
            ["strace", "-f", "-p", str(self.victim.process.pid), *paths, "-o", str(self._log)]
            + ["-e", f"inject={self.call}:error=EIO"],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._strace.stderr
        if "attached" not in (line := self._strace.stderr.readline()):
            self.clean()
            pytest.skip(f"strace may not attach here: {line.strip()}")

    def end(self) -> None:
        self.clean()
        assert "(INJECTED)" in self._log.read_text()

    def clean(self) -> None:
        if self._strace.returncode is None:
            self._strace.send_signal(signal.SIGINT)
            self._strace.communicate(timeout=30)


class NoSync(Broken):
    pass


class NoWrite(Broken):
    call = "pwrite64"


@pytest.fixture
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The directory of the database, suitable for the test's `fault`."""
    fault = request.getfixturevalue("fault")
    if fault is Full:
        return Path(request.getfixturevalue("tmpfs"))
    if issubclass(fault, Broken):
        strace.need_strace()
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("role", "fault", "outages"),
    [
        (ROLES[0], Full, 1),
        (ROLES[1], Full, 1),
        (ROLES[1], TooLarge, 1),
        (ROLES[0], NoSync, 1),
        (ROLES[1], NoWrite, 1),
        *(pytest.param(*case, 5, marks=pytest.mark.long) for case in product(ROLES, (Full, TooLarge, NoSync, NoWrite))),
    ],
)
def test_failing_disk_loses_nothing_and_recovers(
    tmp_path: Path, directory: Path, role: str, fault: type[Fault], outages: int
) -> None:
    """During the fault the ring is full, clients wait and servers are alive. The log has one line for each outage."""
    database = directory / "numbers.db"
    with ExitStack() as stack:
        if role == "single process":
            storing = front = stack.enter_context(
                server(tmp_path, "-p", "0", "-T", "0", "-D", str(database), patch=QUICK)
            )
        else:
            storing = stack.enter_context(server(tmp_path, "-I", "false", "-p", "0", "-D", str(database), patch=QUICK))
            front = stack.enter_context(server(tmp_path, "-p", "0", "-T", str(storing.port), patch=QUICK))
        producer = Producer(front.url)
        stack.callback(producer.close)
        send(producer, 10_000)
        producer.flush(30)
        for outage in range(1, outages + 1):
            trouble = fault(storing, database)
            trouble.begin()
            stack.callback(trouble.clean)
            send(producer, 150_000)
            flushing = Blocked(producer.flush)
            eventually(lambda: front.stats()["ringDepth"] == 4096, "the ring is full")
            eventually(lambda: stuck(storing, database, producer), "every commit fails")
            logged = events(storing, "store_failing")
            assert flushing.still(0.3)
            assert storing.get("/v1.0/alive")[0] == front.get("/v1.0/alive")[0] == 200
            assert front.stats()["ringDepth"] == 4096
            status, headers, body = request(storing.port, "POST", "/v1.0/ingest", encode_plain([1] * 100_000))
            assert status == 503 and "Retry-After" in headers, body
            acked = producer.acked
            count, different, gapless, wrong = stored(database, producer)
            assert producer.sent > count == different >= gapless >= acked and wrong == 0, "acked means stored, once"
            wait_for_failures(storing, 2)
            trouble.end()
            flushing.result()
            assert storing.stats()["storeError"] is None
            eventually(lambda: events(storing, "store_ok") == events(storing, "store_failing"))
            assert events(storing, "store_failing") == logged and logged == outage or not fault.sudden
            if front is not storing:
                assert events(front, "link_down") == outage or not fault.sudden
                # Twice: the ack of a commit before the fault may come after the error, and shows the link as up.
                assert outage <= events(front, "link_down") <= 2 * events(storing, "store_failing")
            assert request(front.port, "POST", "/v1.0/ingest", encode_plain([2]))[0] == 200
        assert stored(database, producer) == (producer.sent, producer.sent, producer.sent, 0)
        assert query(database, "SELECT count(*) FROM record WHERE value = 2") == [(outages,)]
        assert front.stop() == 0
        assert storing is front or storing.stop() == 0
    assert query(database, "PRAGMA integrity_check") == [("ok",)]


@pytest.mark.parametrize("fault", [Full, NoSync])
def test_ready_detects_disk_failure_and_recovery_without_records(
    tmp_path: Path, directory: Path, fault: type[Fault]
) -> None:
    """No client sends records: a load balancer sends none to a server that is not ready."""
    database = directory / "numbers.db"
    quick = "status.probe.CACHE_SECONDS = 0.05"
    with ExitStack() as stack:
        consumer = stack.enter_context(server(tmp_path, "-I", "false", "-p", "0", "-D", str(database), patch=quick))
        front = stack.enter_context(server(tmp_path, "-p", "0", "-T", str(consumer.port), patch=quick))
        assert [not_ready(consumer), not_ready(front)] == [[], []]
        trouble = fault(consumer, database)
        trouble.begin()
        stack.callback(trouble.clean)
        if fault is Full:
            (directory / "more").write_bytes(bytes(MEBIBYTE // 2))
        reason = "disk_full" if fault is Full else "store_failing"
        assert eventually(lambda: not_ready(consumer)) == [reason]
        assert eventually(lambda: not_ready(front)) == ["consumer_not_ready"]
        assert consumer.get("/v1.0/alive")[0] == front.get("/v1.0/alive")[0] == 200
        if fault is Full:
            (directory / "more").unlink()
        trouble.end()
        eventually(lambda: not not_ready(consumer) and not not_ready(front), "both are ready again")
        assert consumer.stats()["storeError"] is None
        assert events(consumer, "store_failing") == events(consumer, "store_ok") == (0 if fault is Full else 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "file", "records"),
    [
        ("fdatasync", "-wal", 80_000),
        ("pwrite64", "-wal", 80_000),
        ("fdatasync", "", 80_000),
        pytest.param("fdatasync", "-wal", 1_000_000, marks=pytest.mark.long),
        pytest.param("pwrite64", "-wal", 1_000_000, marks=pytest.mark.long),
        pytest.param("fdatasync", "", 400_000, marks=pytest.mark.long),
    ],
)
def test_intermittent_io_errors_fail_only_their_commits(
    tmp_path: Path, call: str, file: str, records: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every thread gets an I/O error every few calls. Clients reconnect, and every record is stored once.

    A failed checkpoint fails no commit, even if every checkpoint fails.
    """
    strace.need_strace()
    monkeypatch.setattr(timing, "BACKOFF_MAX_SECONDS", 0.05)
    monkeypatch.setattr(outbox, "CHUNK_RECORDS", 2000)
    seed = seeded()
    rng = random.Random(seed)
    # A commit has fewer than 100 calls, so the first commit of a new connection succeeds.
    first = rng.randrange(100, 150) if call == "pwrite64" else rng.randrange(3, 6) if file else 2
    # One thread makes all commits. After a failed one it syncs twice, so that with step 2 each commit would fail.
    step = rng.randrange(100, 200) if call == "pwrite64" else rng.randrange(3, 9) if file else 1
    print("seed", seed, f"when={first}+{step}")
    database, log = tmp_path / "numbers.db", tmp_path / "strace.log"
    Store(str(database)).close()  # so that the server writes nothing at its start, which could fail
    under = strace.command(log, f"-P{database}{file}", "-e", f"inject={call}:error=EIO:when={first}+{step}")
    flags = ["-I", "false", "-p", "0", "-D", str(database)]
    patch = (  # many small commits
        "web.loop.READ_SIZE = web.loop.SHARED_READ_SIZE = 4096; web.intake.MAX_QUEUED = 1000;"
        " storage.wal.LARGE_WAL_BYTES = 200_000"
    )
    with server(tmp_path, *flags, under=under, patch=patch) as running, ExitStack() as stack:
        producers = [stack.enter_context(closing(Producer(running.url))) for _ in range(4)]
        for producer in producers:
            send(producer, records // 4)
        for producer in producers:
            producer.flush(120)
        stats = running.stats()
        reconnects = sum(producer.reconnects for producer in producers)
        print(f"{stats['failedCommits']} commits failed, {reconnects} reconnects")
        assert stats["recordsStored"] == records and stats["storeError"] is None
        assert events(running, "store_failing") == events(running, "store_ok") <= stats["failedCommits"]
        if file:
            assert stats["failedCommits"] > 0 and reconnects > 0
        else:
            assert stats["failedCommits"] == reconnects == 0
        for producer in producers:
            assert stored(database, producer) == (records // 4, records // 4, records // 4, 0)
        running.kill()
        strace.wait_for_end(log, running.process.pid)
        assert log.read_text().count("(INJECTED)") >= max(1, stats["failedCommits"])
    assert query(database, "PRAGMA integrity_check") == [("ok",)]


@pytest.mark.slow
def test_acks_wait_for_slow_sync_and_share_it(tmp_path: Path) -> None:
    """Each sync takes 0.1 s. Meanwhile /alive and /stats answer at once."""
    strace.need_strace()
    database, log = tmp_path / "numbers.db", tmp_path / "strace.log"
    under = strace.command(log, f"-P{database}-wal", "-e", "inject=fdatasync:delay_enter=100000")
    times: list[float] = []

    def one_by_one() -> None:
        with RawClient(running.port) as client:
            for number in range(1, 6):
                begun = monotonic()
                client.send(frame(2, bytes(8)))
                client.acked(number)
                times.append(monotonic() - begun)

    with server(tmp_path, "-I", "false", "-p", "0", "-D", str(database), under=under) as running:
        clients = [Blocked(one_by_one) for _ in range(8)]
        longest = 0.0
        while any(client.still(0.01) for client in clients):
            begun = monotonic()
            assert running.get("/v1.0/alive")[0] == 200 and running.stats()["failedCommits"] == 0
            longest = max(longest, monotonic() - begun)
        for client in clients:
            client.result()
        running.kill()
        strace.wait_for_end(log, running.process.pid)
    syncs = log.read_text().count("(DELAYED)")
    print(f"{len(times)} acks after {min(times):.3f} to {max(times):.3f} s, {syncs} syncs; stats in {longest:.3f} s")
    assert len(times) == 40 and min(times) >= 0.1
    assert syncs < 30
    assert longest < 1


class Shell:
    """A transaction in the `sqlite3` shell."""

    def __init__(self, database: Path) -> None:
        self._process = subprocess.Popen(
            ["sqlite3", "-batch", "-readonly", str(database)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._ask("BEGIN;")

    def _ask(self, sql: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(f"{sql}\n")
        self._process.stdin.flush()

    def counts(self) -> tuple[int, ...]:
        self._ask(f"{COUNTS};")
        assert self._process.stdout
        return tuple(map(int, self._process.stdout.readline().split("|")))

    def close(self) -> None:
        self._process.communicate(timeout=30)


class Module:
    """A transaction of Python's sqlite3."""

    def __init__(self, database: Path) -> None:
        self._reader = sqlite3.connect(f"file:{database}?mode=ro", uri=True, isolation_level=None)
        self._reader.execute("BEGIN")

    def counts(self) -> tuple[int, ...]:
        return tuple(self._reader.execute(COUNTS).fetchone())

    def ends(self) -> tuple[int, ...]:
        """Return the same as `counts`, but from the ids, which have no gaps: this is fast."""
        return tuple(self._reader.execute(ENDS).fetchone())

    def close(self) -> None:
        self._reader.close()


@pytest.mark.slow
@pytest.mark.parametrize("records", [500_000, pytest.param(5_000_000, marks=pytest.mark.long)])
def test_long_reader_blocks_nothing_and_wal_shrinks_afterwards(tmp_path: Path, records: int) -> None:
    """The reader keeps its snapshot. The log has one line about the large WAL."""
    readers = [Module, Shell] if shutil.which("sqlite3") else [Module]
    database, large = tmp_path / "numbers.db", 4 * MEBIBYTE
    wal = tmp_path / "numbers.db-wal"
    with ExitStack() as stack:
        running = stack.enter_context(
            server(
                tmp_path, "-I", "false", "-p", "0", "-D", str(database), patch=f"storage.wal.LARGE_WAL_BYTES = {large}"
            )
        )
        producer = stack.enter_context(Producer(running.url))
        send(producer, 10_000)
        producer.flush(30)
        opened = [stack.enter_context(closing(reader(database))) for reader in readers]
        assert [reader.counts() for reader in opened] == [(10_000, 10_000)] * len(opened)
        before = database.stat().st_size + wal.stat().st_size
        begun = monotonic()
        while producer.sent < records:
            send(producer, 20_000)
            if producer.sent % 100_000 == 10_000:
                assert [reader.counts() for reader in opened] == [(10_000, 10_000)] * len(opened)
        producer.flush(30)
        seconds = monotonic() - begun
        assert [reader.counts() for reader in opened] == [(10_000, 10_000)] * len(opened)
        grown = database.stat().st_size + wal.stat().st_size - before
        print(f"{records} records in {seconds:.1f} s under a reader, {grown / records:.0f} bytes each")
        assert wal.stat().st_size > large and running.stats()["walBytes"] == wal.stat().st_size
        assert grown < 100 * records, "no more than the written records"
        assert events(running, "wal_large") == 1
        for reader in opened:
            reader.close()

        def cut() -> bool:
            send(producer, 1000)
            producer.flush(30)
            return wal.stat().st_size <= large

        eventually(cut, "the WAL is small again")
        assert running.stats()["walBytes"] <= large
        eventually(lambda: cut() and events(running, "wal_cut") == 1)
        assert events(running, "wal_large") == 1
        assert stored(database, producer) == (producer.sent, producer.sent, producer.sent, 0)


@pytest.mark.slow
@pytest.mark.parametrize("records", [300_000, pytest.param(5_000_000, marks=pytest.mark.long)])
def test_overlapping_readers_do_not_grow_wal_without_bound(tmp_path: Path, records: int) -> None:
    """At any moment a reader has a snapshot. Each reader sees a batch with all its records, or not at all."""
    database, large = tmp_path / "numbers.db", MEBIBYTE // 4
    flags = ["-I", "false", "-p", "0", "-D", str(database)]
    wal = tmp_path / "numbers.db-wal"
    done = threading.Event()
    reading = 0  # readers in a transaction, guarded by `lock`
    snapshots = 0
    lock = threading.Lock()

    def read() -> None:
        nonlocal reading, snapshots
        last = 0
        while not done.is_set():
            with closing(Module(database)) as reader:
                seen, in_batches = reader.ends()  # this begins the snapshot
                with lock:
                    reading += 1
                done.wait(0.03)
                while True:  # until another reader has a snapshot
                    with lock:
                        if reading > 1 or done.is_set():
                            reading -= 1
                            break
                    done.wait(0.001)
                assert reader.ends() == (seen, in_batches), "a snapshot does not change"
            assert seen == in_batches >= last
            last = seen
            snapshots += 1

    with (
        server(tmp_path, *flags, patch=f"storage.wal.LARGE_WAL_BYTES = {large}") as running,
        Producer(running.url) as producer,
    ):
        send(producer, 1000)
        producer.flush(30)
        readers = [Blocked(read) for _ in range(3)]
        eventually(lambda: reading > 1)
        largest = 0
        try:
            while producer.sent < records:
                send(producer, 20_000)
                producer.flush(30)
                largest = max(largest, wal.stat().st_size)
        finally:
            done.set()
        for reader in readers:
            reader.result()
        assert query(database, COUNTS) == [(producer.sent, producer.sent)]
    print(f"{snapshots} snapshots; WAL at most {largest / 1e6:.1f} MB")
    assert snapshots > 5
    assert largest < 12 * large < 15 * records, "a fraction of the written bytes"


def test_older_file_on_a_full_disk_is_opened_without_the_new_index(tmpfs: Path, tmp_path: Path) -> None:
    database, sources = tmpfs / "ringoexp.db", 40_000
    Store(str(database)).close()
    with closing(sqlite3.connect(database)) as writer, writer:
        writer.execute("DROP INDEX source_text")
        writer.execute("DROP VIEW sources")
        writer.executemany("INSERT INTO source(uuid) VALUES (?)", ((n.to_bytes(16, "big"),) for n in range(sources)))
    ballast = tmpfs / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(tmpfs).free - MEBIBYTE))
    schema = "SELECT name FROM sqlite_master WHERE name IN ('source_text', 'sources')"
    with server(tmp_path, "-p", "0", "-I", "false", "-D", str(database)) as running:
        assert request(running.port, "POST", "/v1.0/ingest", bytes(4))[0] == 200
        assert b'"value": 0' in request(running.port, "GET", "/v1.0/records")[2]
        assert query(database, schema) == []
        assert running.stop() == 0
        (line,) = [line for line in running.errors.read_text().splitlines() if "level=warning" in line]
        assert "event=database_incomplete" in line and "No space left on device (the disk is full" in line
        assert "the view sources are missing" in line
    ballast.unlink()
    with server(tmp_path, "-p", "0", "-I", "false", "-D", str(database)) as running:
        assert "database_incomplete" not in running.errors.read_text()
    assert sorted(query(database, schema)) == [("source_text",), ("sources",)]
    assert query(database, "SELECT records FROM sources") == [(1,)]
    assert query(database, "PRAGMA integrity_check") == [("ok",)]
