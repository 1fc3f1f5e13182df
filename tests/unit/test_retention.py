"""Retention: only what is too old goes, whatever the clock does; ids go on, duplicates stay known, ingest goes on."""

import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from support.harness import DEADLINE, ROOT, ServerProcess, eventually, rows, server

import store
from ringolib.client.producer import Producer
from ringolib.storage import retention
from ringolib.storage.interface import StoreError
from ringolib.storage.retention import DAY, Clock, Retention
from ringolib.wire import Run
from store import Expired, Store

A, B = b"a" * 16, b"b" * 16
FAR = 2**62  # ms: everything came before
WEEK = 7 * DAY


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "numbers.db"


@pytest.fixture
def opened(path: Path) -> Iterator[Store]:
    opened = Store(str(path))
    yield opened
    opened.close()


def append(to: Store, source: bytes, first: int, end: int) -> None:
    """Records `first` to `end` of a source; a value tells its sequence."""
    to.append([Run(source, first, end - first)], array("q", range(first, end)))


def date(path: Path, days: float, where: str = "1") -> None:
    """Has batches come so many days ago; negative: in the future."""
    with closing(sqlite3.connect(path)) as writer, writer:
        at = int((time.time() - days * DAY) * 1000)
        writer.execute(f"UPDATE batch SET received_at_ms = {at} WHERE {where}")


def query(path: Path, sql: str) -> list[tuple[int, ...]]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as reader:
        return reader.execute(sql).fetchall()


def sound(path: Path) -> None:
    """Fails unless the file is whole, ids have no gap, and every record is in the view, once, as it was sent."""
    assert query(path, "PRAGMA integrity_check") == [("ok",)]
    ((count, low, high),) = query(path, "SELECT count(*), min(id), max(id) FROM record")
    assert count == high - low + 1, "ids are dense"
    assert query(path, "SELECT max(first_id + count - 1) FROM batch") == [(high,)]
    viewed = query(path, "SELECT count(*), count(DISTINCT id), sum(value != sequence), min(id) FROM records")
    assert viewed == [(count, count, 0, low)]
    assert query(path, "SELECT count(*) FROM batch LEFT JOIN source ON source.id = source_id WHERE uuid IS NULL") == [
        (0,)
    ]


def all_of_it(to: Store, before_ms: int, forget_ms: int = 0) -> tuple[int, int]:
    """`expire` until there is no more; records deleted, and batches forgotten."""
    records = batches = 0
    while True:
        done = to.expire(before_ms, forget_ms, 0.001)
        records, batches = records + done.records, batches + done.batches
        if not done.more:
            return records, batches


@contextmanager
def at_work(of: Store, days: float) -> Iterator[Retention]:
    working = Retention(of, days)
    try:
        yield working
    finally:
        assert working.stop(DEADLINE)


# What the store deletes.


def test_records_go_in_the_order_of_ids_and_the_newest_stays_so_that_ids_go_on(opened: Store, path: Path) -> None:
    append(opened, A, 0, 10)
    append(opened, B, 0, 10)
    assert all_of_it(opened, FAR) == (19, 0)
    assert opened.stats().held == 1
    append(opened, A, 10, 12)
    assert query(path, "SELECT id, sequence FROM records ORDER BY id") == [(20, 9), (21, 10), (22, 11)]
    sound(path)
    assert all_of_it(opened, FAR, FAR) == (2, 2)
    append(opened, A, 12, 13)
    assert query(path, "SELECT id FROM records ORDER BY id") == [(22,), (23,)]


def test_a_record_that_came_at_the_limit_or_later_stays_and_so_does_what_came_behind_it(
    opened: Store, path: Path
) -> None:
    """A batch did not come before an earlier one, whatever the clock said when it did."""
    for n, at in enumerate([100, 200, 300, 50, 400]):
        append(opened, A, n, n + 1)
        with closing(sqlite3.connect(path)) as writer, writer:
            writer.execute("UPDATE batch SET received_at_ms = ? WHERE sequence = ?", (at, n))
    assert all_of_it(opened, 100) == (0, 0)
    assert all_of_it(opened, 300) == (2, 0)
    assert all_of_it(opened, 301, 301) == (2, 4)
    done = opened.expire(0, 0, 0)
    assert (done.records, done.oldest_ms, done.newest_ms, done.more) == (0, 400, 400, False)


def test_an_empty_store_has_nothing_to_delete(opened: Store) -> None:
    done = opened.expire(FAR, FAR, 1)
    assert (done.records, done.batches, done.more, done.oldest_ms, done.newest_ms) == (0, 0, False, None, None)


def test_a_large_batch_goes_in_parts_and_the_view_has_the_rest(opened: Store, path: Path) -> None:
    append(opened, A, 0, 3 * store.SLICE)
    append(opened, A, 3 * store.SLICE, 3 * store.SLICE + 1)
    done = opened.expire(FAR, FAR, 0)
    assert (done.records, done.more) == (0, False), "it only looks"
    seen = set()
    while (done := opened.expire(FAR, FAR, 1e-9)).more:
        sound(path)
        seen.add(opened.stats().held)
        assert opened.stats().held == query(path, "SELECT count(*) FROM record")[0][0]
    assert seen >= {2 * store.SLICE + 1, store.SLICE + 1, 1}
    assert rows(path) == [("61616161-6161-6161-6161-616161616161", 3 * store.SLICE, 3 * store.SLICE)]


def test_what_is_deleted_is_known_until_its_batch_is_forgotten(opened: Store, path: Path) -> None:
    append(opened, A, 0, 10)
    append(opened, B, 0, 1)
    all_of_it(opened, FAR)
    append(opened, A, 0, 12)
    assert opened.stats().duplicates == 10
    assert [sequence for _, sequence, _ in rows(path)] == [0, 10, 11]
    assert all_of_it(opened, FAR, FAR) == (2, 2)
    append(opened, A, 0, 12)
    assert opened.stats().duplicates == 12, "the newest batch is not forgotten: its record is there"
    assert [sequence for _, sequence, _ in rows(path)] == [11, *range(10)]
    sound(path)


def test_a_source_without_batches_is_forgotten_and_its_rows_id_given_to_another(opened: Store, path: Path) -> None:
    """The cache of sources must not name the old one by it."""
    append(opened, A, 0, 1)
    append(opened, B, 0, 1)
    append(opened, A, 1, 2)
    assert all_of_it(opened, FAR, FAR) == (2, 2)
    assert query(path, "SELECT id FROM source") == [(1,)]
    append(opened, b"c" * 16, 0, 1)
    append(opened, B, 0, 1)
    append(opened, A, 0, 1)
    assert [(source[:2], sequence) for source, sequence, _ in rows(path)] == [
        ("61", 1),
        ("63", 0),
        ("62", 0),
        ("61", 0),
    ]
    sound(path)


def test_a_file_whose_old_records_are_gone_opens_again(opened: Store, path: Path) -> None:
    append(opened, A, 0, 5000)
    append(opened, A, 5000, 5001)
    all_of_it(opened, FAR)
    opened.close()
    with closing(Store(str(path))) as again:
        assert again.stats().held == 1
        append(again, A, 0, 5002)
        assert again.stats().stored == 1
    sound(path)


def test_an_error_changes_nothing_and_the_next_step_goes_on(
    opened: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(opened, A, 0, 10)
    append(opened, B, 0, 1)

    def fails(before_ms: int) -> int:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(opened, "_forget_batches", fails)
        with pytest.raises(StoreError, match="make room"):
            opened.expire(FAR, FAR, 1)
    assert opened.stats().held == len(rows(path)) == 11
    append(opened, A, 10, 11)
    assert all_of_it(opened, FAR) == (11, 0)


# The clock.


class Time:
    """A clock to set, and the monotonic one beside it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall, self.passed = 1e9, 0.0
        monkeypatch.setattr(retention.time, "time", lambda: self.wall)
        monkeypatch.setattr(retention, "monotonic", lambda: self.passed)

    def passes(self, seconds: float) -> None:
        self.wall, self.passed = self.wall + seconds, self.passed + seconds


def test_the_clock_is_believed_while_it_goes_as_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    at = Time(monkeypatch)
    clock = Clock(at.wall - 5)
    for _ in range(10):
        at.passes(3600)
        at.wall += 10  # it is a little fast
        assert clock.now() == at.wall


def test_a_leap_ahead_is_believed_after_a_day_and_not_if_it_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    at = Time(monkeypatch)
    clock = Clock(None)
    at.wall += 365 * DAY
    assert clock.now() == at.wall - 365 * DAY
    at.passes(DAY / 2)
    assert clock.now() == at.wall - 365 * DAY
    at.wall -= 365 * DAY
    assert clock.now() == at.wall
    at.wall += DAY
    assert clock.now() == at.wall - DAY
    at.passes(DAY - 1)
    assert clock.now() == at.wall - DAY
    at.passes(1)
    assert clock.now() == at.wall
    at.passes(60)
    assert clock.now() == at.wall


def test_a_clock_that_goes_back_is_believed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    at = Time(monkeypatch)
    clock = Clock(None)
    at.wall = 0.0
    assert clock.now() == 0


def test_at_the_start_the_clock_is_not_believed_beyond_the_newest_record(monkeypatch: pytest.MonkeyPatch) -> None:
    at = Time(monkeypatch)
    clock = Clock(at.wall - WEEK)
    assert clock.now() == at.wall - WEEK
    at.passes(DAY)
    assert clock.now() == at.wall
    assert Clock(at.wall + WEEK).now() == at.wall, "nor ahead of it"


@pytest.mark.parametrize("years", [1, 40])
def test_a_clock_that_leaps_ahead_deletes_nothing_and_the_log_says_so_once(
    years: int,
    opened: Store,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    append(opened, A, 0, 10)
    first = time.time()
    eventually(lambda: time.time() > first + 0.002, "the newest is another millisecond's")
    append(opened, A, 10, 11)
    with at_work(opened, 1) as working:
        eventually(lambda: working._clock, "the first look")
    real = time.time
    monkeypatch.setattr(retention.time, "time", lambda: real() + years * 365 * DAY)
    for _ in range(3):
        assert working.step() == retention.MAX_WAIT
    assert opened.stats().held == 11
    assert [record.msg for record in caplog.records].count("retention_paused") == 1
    monkeypatch.setattr(retention.time, "time", real)
    assert 0 < working.step() <= retention.MAX_WAIT
    monkeypatch.setattr(retention, "TRUST_SECONDS", 0)
    monkeypatch.setattr(retention.time, "time", lambda: real() + years * 365 * DAY)
    working.step()
    assert opened.stats().held == 1, "believed in the end"


def test_records_that_a_clock_dated_back_stay_for_a_day_after_it_was_put_right(
    opened: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a machine that starts in 1970, and learns the time later; behind well dated ones they stay longer."""
    append(opened, A, 0, 10)
    date(path, 50 * 365)
    append(opened, A, 10, 11)
    date(path, 50 * 365, "sequence = 10")
    at = Time(monkeypatch)
    at.wall = time.time_ns() / 1e9
    working = Retention(opened, 30)
    eventually(lambda: working._clock, "the first look")
    assert working.stop(DEADLINE)
    at.passes(DAY / 2)
    working.step()
    assert opened.stats().held == 11
    at.passes(DAY / 2)
    working.step()
    assert opened.stats().held == 1, "docs/operations.md says so"


def test_records_dated_ahead_of_the_clock_stay_and_the_log_says_why(
    opened: Store, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    append(opened, A, 0, 10)
    date(path, -365)
    append(opened, A, 10, 20)
    date(path, 3, "sequence = 10")
    append(opened, A, 20, 21)
    with at_work(opened, 1):
        eventually(lambda: "retention_paused" in [record.msg for record in caplog.records], "the log says why")
    assert opened.stats().held == 21


# The thread.


def test_it_deletes_what_is_too_old_and_no_more_and_ends_when_told(opened: Store, path: Path) -> None:
    append(opened, A, 0, 10_000)
    date(path, 2.1)
    append(opened, A, 10_000, 10_010)
    date(path, 1.9, "sequence >= 10000")
    append(opened, A, 10_010, 10_011)
    with at_work(opened, 2) as working:
        eventually(lambda: working.stats().expired == 10_000)
        assert 1.89 * DAY < eventually(lambda: working.stats().oldest) < 1.91 * DAY
    assert not [thread for thread in threading.enumerate() if thread.name == "retain"]
    assert [sequence for _, sequence, _ in rows(path)] == [*range(10_000, 10_011)]
    assert query(path, "SELECT count(*) FROM batch") == [(3,)], "known for a week more"
    date(path, 2.1 + 7, "sequence = 0")
    with at_work(opened, 2):
        eventually(lambda: query(path, "SELECT count(*) FROM batch") == [(2,)], "forgotten")


def test_what_cannot_be_deleted_is_said_once_and_tried_again(
    opened: Store, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(retention, "RETRY_SECONDS", 0.01)
    append(opened, A, 0, 10)
    date(path, 2)
    append(opened, A, 10, 11)
    tried = []

    def fails(before_ms: int) -> int:
        tried.append(before_ms)
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(opened, "_delete_records", fails)
        working = Retention(opened, 1)
        eventually(lambda: len(tried) > 3)
        append(opened, A, 11, 12)
    eventually(lambda: working.stats().expired == 10, "it goes on")
    assert working.stop(DEADLINE)
    said = [record for record in caplog.records if record.msg == "retain_error"]
    assert len(said) == 1 and "make room" in str(said[0].args)
    assert [record.args for record in caplog.records if record.msg == "expired"] in (
        [],  # pytest's level leaves it out
        [{"records": 10, "batches_forgotten": 0}],
    )


def test_under_concurrent_appends_nothing_newer_goes_and_duplicates_stay_known(
    opened: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three threads append, each block twice, a reader holds a transaction, while 300,000 old records go."""
    old, size, each = 300_000, 500, 60
    for first in range(0, old, 50_000):
        append(opened, A, first, first + 50_000)
    date(path, 3)
    append(opened, A, old, old + 1)
    sources = [bytes([n]) * 16 for n in range(3)]

    def appends(source: bytes) -> None:
        for n in range(each):
            append(opened, source, n * size, (n + 1) * size)
            append(opened, source, n * size // 2, (n + 1) * size)

    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM record").fetchone() == (old + 1,)
        threads = [threading.Thread(target=appends, args=(source,)) for source in sources]
        with at_work(opened, 1) as working:
            for thread in threads:
                thread.start()
            eventually(lambda: working.stats().expired == old, "all that is old is gone, whoever reads")
            for thread in threads:
                thread.join(DEADLINE)
            append(opened, A, 0, old + 1)
        assert reader.execute("SELECT count(*) FROM record").fetchone() == (old + 1,), "its own state of the file"
    assert opened.stats().stored == old + 1 + 3 * size * each
    assert opened.stats().held == 1 + 3 * size * each == working.stats().expired + opened.stats().held - old
    sound(path)
    known = {(source, sequence) for source, sequence, _ in rows(path)}
    assert len(known) == 1 + 3 * size * each


# The program.


def prepared(directory: Path, old: int, new: int, days: float) -> Path:
    """A database with `old` records that came `days` ago, and `new` ones."""
    path = directory / "ringoexp.db"
    with closing(Store(str(path))) as made:
        for first in range(0, old, 50_000):
            append(made, A, first, min(first + 50_000, old))
        date(path, days)
        append(made, A, old, old + new)
    return path


@pytest.mark.parametrize("flags", [("-I", "false", "-p", "0"), ("-p", "0", "-T", "0")], ids=["consumer", "own"])
def test_a_server_deletes_what_is_older_than_retain(flags: tuple[str, ...], tmp_path: Path) -> None:
    path = prepared(tmp_path, 70_000, 10, 2)
    with server(tmp_path, *flags, "--retain", "1.5") as running:
        assert running.greeting.endswith(", storing in ringoexp.db for 1.5 days\n")
        eventually(lambda: running.stats()["recordsExpired"] == 70_000)
        eventually(lambda: 0 < running.stats()["oldestRecordMs"] < DEADLINE * 1000)
        metrics = running.get("/metrics")[2].decode()
        assert "\nringoexp_records_expired_total 70000\n" in metrics
        assert re.search(r"\nringoexp_oldest_record_seconds [0-9.]+\n", metrics)
        with Producer(running.url) as producer:
            producer.send(range(1000))
        assert running.stop() == 0
        assert "event=expired records=70000 batches_forgotten=0 " in running.errors.read_text()
    assert len(rows(path)) == 1010
    sound(path)


def test_without_retain_nothing_is_deleted(tmp_path: Path) -> None:
    path = prepared(tmp_path, 10, 1, 10_000)
    with server(tmp_path, "-p", "0", "-T", "0") as running:
        assert running.stats()["recordsExpired"] == running.stats()["oldestRecordMs"] == 0
        assert "expired" not in running.get("/metrics")[2].decode()
        assert running.stop() == 0
    assert len(rows(path)) == 11


def test_a_publisher_that_forwards_has_nothing_to_retain(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "ringoexp.py"), "-p", "0", "--retain", "7", "-S", "spool"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "ringoexp: error: --retain 7: this publisher has no database, it forwards to localhost:6660 "
        "(give --retain to that consumer)\n"
    )
    assert os.listdir(tmp_path) == []


def test_a_server_killed_while_it_deletes_leaves_a_sound_file_and_goes_on_after_the_next_start(tmp_path: Path) -> None:
    old, sent = 200_000, 0
    path = prepared(tmp_path, old, 10, 2)
    left = [old + 10]
    flags = ("-p", "0", "-T", "0", "--retain", "1")
    for _ in range(4):
        running = ServerProcess(tmp_path, *flags, patch="storage.retention.STEP_SECONDS = 1e-9; store.SLICE = 200")
        try:
            with Producer(running.url) as producer:
                producer.send(range(1000))
                producer.flush(DEADLINE)
            sent += 1000
            eventually(lambda running=running: running.stats()["recordsExpired"], "it deletes")
            running.send_signal(signal.SIGKILL)
        finally:
            running.kill()
        with closing(sqlite3.connect(path)) as recovering:
            recovering.execute("SELECT count(*) FROM record").fetchone()
        sound(path)
        left.append(len(rows(path)))
        assert 10 + sent < left[-1] < left[-2] + 1000, "it was in the middle of it"
    with server(tmp_path, *flags) as running:
        eventually(lambda: running.stats()["recordsExpired"] == left[-1] - 10 - sent, "nothing that is new")
        assert running.stop() == 0
    sound(path)
    assert len(rows(path)) == 10 + sent


@pytest.mark.parametrize(
    ("waited", "next_step", "pause"),
    [(0.0, retention.STEP_SECONDS, 0.015), (0.012, retention.STEP_SECONDS, 0.003), (0.15, 0.05, 0), (60, 0.1, 0)],
)
def test_a_step_is_as_long_as_its_quarter_of_the_time_takes(
    monkeypatch: pytest.MonkeyPatch, waited: float, next_step: float, pause: float
) -> None:
    """Between long commits there are few steps: they may be longer, or deleting would fall behind storing."""

    class Busy:
        asked: list[float] = []

        def expire(self, before_ms: int, forget_ms: int, seconds: float) -> Expired:
            at[0] += (waited if seconds else 0) + 0.005
            self.asked.append(seconds)
            return Expired(1, 0, True, 1, 2, 0.005)

    at = [1000.0]
    monkeypatch.setattr(retention, "monotonic", lambda: at[0])
    working = Retention.__new__(Retention)
    monkeypatch.setattr(threading.Thread, "start", lambda self: None)
    working.__init__(Busy(), 1)  # type: ignore[misc, arg-type]
    assert working.step() == pytest.approx(pause)
    working.step()
    assert Busy.asked[-1] == pytest.approx(next_step)
