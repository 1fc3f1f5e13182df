"""Tests of retention: only old records are deleted, whatever the clock does, and duplicates stay known."""

import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from support.databases import A, append, check_file, query
from support.harness import DEADLINE, ROOT, ServerProcess, eventually, rows, server

from ringolib.client.producer import Producer
from ringolib.storage import retention
from ringolib.storage.oldest import ExpireResult
from ringolib.storage.retention import DAY_SECONDS, Clock, Retention
from store import Store

WEEK = 7 * DAY_SECONDS


def date(path: Path, days: float, where: str = "1") -> None:
    """Change the arrival of batches to so many days ago; a negative number is in the future."""
    with closing(sqlite3.connect(path)) as writer, writer:
        at = int((time.time() - days * DAY_SECONDS) * 1000)
        writer.execute(f"UPDATE batch SET received_at_ms = {at} WHERE {where}")


@contextmanager
def retaining(store: Store, days: float) -> Iterator[Retention]:
    retention = Retention(store, days)
    try:
        yield retention
    finally:
        assert retention.stop(DEADLINE)


# The clock.


class FakeTime:
    """A wall clock that the test sets, and a monotonic clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall, self.passed = 1e9, 0.0
        monkeypatch.setattr(retention.time, "time", lambda: self.wall)
        monkeypatch.setattr(retention, "monotonic", lambda: self.passed)

    def passes(self, seconds: float) -> None:
        self.wall, self.passed = self.wall + seconds, self.passed + seconds


def test_steady_clock_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTime(monkeypatch)
    clock = Clock(fake.wall - 5)
    for _ in range(10):
        fake.passes(3600)
        fake.wall += 10  # the clock is a little fast
        assert clock.now() == fake.wall


def test_leap_ahead_is_trusted_after_a_day_unless_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTime(monkeypatch)
    clock = Clock(None)
    fake.wall += 365 * DAY_SECONDS
    assert clock.now() == fake.wall - 365 * DAY_SECONDS
    fake.passes(DAY_SECONDS / 2)
    assert clock.now() == fake.wall - 365 * DAY_SECONDS
    fake.wall -= 365 * DAY_SECONDS
    assert clock.now() == fake.wall
    fake.wall += DAY_SECONDS
    assert clock.now() == fake.wall - DAY_SECONDS
    fake.passes(DAY_SECONDS - 1)
    assert clock.now() == fake.wall - DAY_SECONDS
    fake.passes(1)
    assert clock.now() == fake.wall
    fake.passes(60)
    assert clock.now() == fake.wall


def test_clock_that_goes_back_is_trusted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTime(monkeypatch)
    clock = Clock(None)
    fake.wall = 0.0
    assert clock.now() == 0


def test_first_reading_is_limited_by_newest_record(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTime(monkeypatch)
    clock = Clock(fake.wall - WEEK)
    assert clock.now() == fake.wall - WEEK
    fake.passes(DAY_SECONDS)
    assert clock.now() == fake.wall
    assert Clock(fake.wall + WEEK).now() == fake.wall, "a record in the future does not move the clock"


@pytest.mark.parametrize("years", [1, 40])
def test_leap_ahead_pauses_retention_and_is_logged_once(
    years: int,
    opened: Store,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    append(opened, A, 0, 10)
    first = time.time()
    eventually(lambda: time.time() > first + 0.002, "the newest record is to get a later time")
    append(opened, A, 10, 11)
    with retaining(opened, 1) as running:
        eventually(lambda: running._clock, "the first step")
    real = time.time
    monkeypatch.setattr(retention.time, "time", lambda: real() + years * 365 * DAY_SECONDS)
    for _ in range(3):
        assert running.step() == retention.MAX_WAIT_SECONDS
    assert opened.stats().held == 11
    assert [record.msg for record in caplog.records].count("retention_paused") == 1
    monkeypatch.setattr(retention.time, "time", real)
    assert 0 < running.step() <= retention.MAX_WAIT_SECONDS
    monkeypatch.setattr(retention, "LEAP_TRUSTED_SECONDS", 0)
    monkeypatch.setattr(retention.time, "time", lambda: real() + years * 365 * DAY_SECONDS)
    running.step()
    assert opened.stats().held == 1, "a leap that stays is trusted"


def test_backdated_records_stay_a_day_after_clock_correction(
    opened: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example on a machine that boots in 1970 and gets the time later. Behind records with good dates they stay
    longer.
    """
    append(opened, A, 0, 10)
    date(path, 50 * 365)
    append(opened, A, 10, 11)
    date(path, 50 * 365, "sequence = 10")
    fake = FakeTime(monkeypatch)
    fake.wall = time.time_ns() / 1e9
    running = Retention(opened, 30)
    eventually(lambda: running._clock, "the first step")
    assert running.stop(DEADLINE)
    fake.passes(DAY_SECONDS / 2)
    running.step()
    assert opened.stats().held == 11
    fake.passes(DAY_SECONDS / 2)
    running.step()
    assert opened.stats().held == 1, "as docs/operations.md promises"


def test_records_dated_in_future_stay_and_log_says_why(
    opened: Store, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    append(opened, A, 0, 10)
    date(path, -365)
    append(opened, A, 10, 20)
    date(path, 3, "sequence = 10")
    append(opened, A, 20, 21)
    with retaining(opened, 1):
        eventually(lambda: "retention_paused" in [record.msg for record in caplog.records], "the reason is logged")
    assert opened.stats().held == 21


# The thread.


def test_thread_deletes_only_old_records_and_stops(opened: Store, path: Path) -> None:
    append(opened, A, 0, 10_000)
    date(path, 2.1)
    append(opened, A, 10_000, 10_010)
    date(path, 1.9, "sequence >= 10000")
    append(opened, A, 10_010, 10_011)
    with retaining(opened, 2) as running:
        eventually(lambda: running.stats().expired == 10_000)
        assert 1.89 * DAY_SECONDS < eventually(lambda: running.stats().oldest) < 1.91 * DAY_SECONDS
    assert not [thread for thread in threading.enumerate() if thread.name == "retain"]
    assert [sequence for _, sequence, _ in rows(path)] == [*range(10_000, 10_011)]
    assert query(path, "SELECT count(*) FROM batch") == [(3,)], "batches stay for another week"
    date(path, 2.1 + 7, "sequence = 0")
    with retaining(opened, 2):
        eventually(lambda: query(path, "SELECT count(*) FROM batch") == [(2,)], "the batch is deleted")


@pytest.mark.parametrize("part", ["_delete", "_count", "_log_if_clock_pauses_retention"])
def test_unexpected_error_pauses_retention_and_is_logged_once(
    part: str, opened: Store, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(retention, "RETRY_SECONDS", 0.1)
    append(opened, A, 0, 11)
    calls: list[int] = []

    def broken(*unused: object) -> None:
        calls.append(1)
        raise ZeroDivisionError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(Retention, part, broken)
        running = Retention(opened, 1)
        threading.Event().wait(0.45)
        assert 2 <= len(calls) <= 6, "at most one turn in 0.1 s"
    eventually(lambda: not running._failing, "it goes on")
    assert running.stop(DEADLINE)
    assert [record.args for record in caplog.records if record.msg == "retain_error"] == [{"error": "a bug"}]


def test_failed_deletion_is_logged_once_and_retried(
    opened: Store, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(retention, "RETRY_SECONDS", 0.01)
    append(opened, A, 0, 10)
    date(path, 2)
    append(opened, A, 10, 11)
    attempts: list[int] = []

    def fails(db: sqlite3.Connection, before_ms: int) -> int:
        attempts.append(before_ms)
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("ringolib.storage.oldest.delete_records", fails)
        running = Retention(opened, 1)
        eventually(lambda: len(attempts) > 3)
        append(opened, A, 11, 12)
    eventually(lambda: running.stats().expired == 10, "the deletion succeeds later")
    assert running.stop(DEADLINE)
    errors = [record for record in caplog.records if record.msg == "retain_error"]
    assert len(errors) == 1 and "make room" in str(errors[0].args)
    assert [record.args for record in caplog.records if record.msg == "expired"] in (
        [],  # not captured at pytest's log level
        [{"records": 10, "batches_forgotten": 0}],
    )


@pytest.mark.slow
def test_retention_during_appends_deletes_only_old_records(
    opened: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three threads append each block twice and a reader holds a transaction, while 300,000 old records are deleted."""
    old, size, blocks = 300_000, 500, 60
    for first in range(0, old, 50_000):
        append(opened, A, first, first + 50_000)
    date(path, 3)
    append(opened, A, old, old + 1)
    sources = [bytes([n]) * 16 for n in range(3)]

    def append_twice(source: bytes) -> None:
        for n in range(blocks):
            append(opened, source, n * size, (n + 1) * size)
            append(opened, source, n * size // 2, (n + 1) * size)

    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM record").fetchone() == (old + 1,)
        threads = [threading.Thread(target=append_twice, args=(source,)) for source in sources]
        with retaining(opened, 1) as running:
            for thread in threads:
                thread.start()
            eventually(lambda: running.stats().expired == old, "all old records are deleted in spite of the reader")
            for thread in threads:
                thread.join(DEADLINE)
            append(opened, A, 0, old + 1)
        assert reader.execute("SELECT count(*) FROM record").fetchone() == (old + 1,), "the reader keeps its snapshot"
    assert opened.stats().stored == old + 1 + 3 * size * blocks
    assert opened.stats().held == 1 + 3 * size * blocks == running.stats().expired + opened.stats().held - old
    check_file(path)
    known = {(source, sequence) for source, sequence, _ in rows(path)}
    assert len(known) == 1 + 3 * size * blocks


# The program.


def prepare(directory: Path, old: int, new: int, days: float) -> Path:
    """Create a database with `old` records that arrived `days` ago, and `new` ones."""
    path = directory / "ringoexp.db"
    with closing(Store(str(path))) as store:
        for first in range(0, old, 50_000):
            append(store, A, first, min(first + 50_000, old))
        date(path, days)
        append(store, A, old, old + new)
    return path


@pytest.mark.parametrize("flags", [("-I", "false", "-p", "0"), ("-p", "0", "-T", "0")], ids=["consumer", "own"])
def test_server_deletes_records_older_than_retain(flags: tuple[str, ...], tmp_path: Path) -> None:
    path = prepare(tmp_path, 70_000, 10, 2)
    with server(tmp_path, *flags, "--retain", "1.5") as running:
        assert f" storing in {tmp_path}/ringoexp.db for 1.5 days, " in running.greeting
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
    check_file(path)


def test_server_without_retain_deletes_nothing(tmp_path: Path) -> None:
    path = prepare(tmp_path, 10, 1, 10_000)
    with server(tmp_path, "-p", "0", "-T", "0") as running:
        assert running.stats()["recordsExpired"] == running.stats()["oldestRecordMs"] == 0
        assert "expired" not in running.get("/metrics")[2].decode()
        assert running.stop() == 0
    assert len(rows(path)) == 11


def test_forwarding_publisher_refuses_retain(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, str(ROOT / "ringoexp.py"), "-p", "0", "--retain", "7", "-S", "spool"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr == (
        "ringoexp: error: argument --retain: 7 is not accepted: this publisher has no database, it forwards to "
        "localhost:6660 (give --retain to that consumer)\n"
    )
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_server_killed_during_deletion_leaves_sound_file(tmp_path: Path) -> None:
    old, sent = 200_000, 0
    path = prepare(tmp_path, old, 10, 2)
    left = [old + 10]
    flags = ("-p", "0", "-T", "0", "--retain", "1")
    for _ in range(4):
        patch = "storage.retention.STEP_SECONDS = 1e-9; storage.oldest.RECORDS_PER_SLICE = 200"
        running = ServerProcess(tmp_path, *flags, patch=patch)
        try:
            with Producer(running.url) as producer:
                producer.send(range(1000))
                producer.flush(DEADLINE)
            sent += 1000
            eventually(lambda running=running: running.stats()["recordsExpired"], "deletion has begun")
            running.send_signal(signal.SIGKILL)
        finally:
            running.kill()
        with closing(sqlite3.connect(path)) as recovering:
            recovering.execute("SELECT count(*) FROM record").fetchone()
        check_file(path)
        left.append(len(rows(path)))
        assert 10 + sent < left[-1] < left[-2] + 1000, "the server was killed during the deletion"
    with server(tmp_path, *flags) as running:
        eventually(lambda: running.stats()["recordsExpired"] == left[-1] - 10 - sent, "only old records are deleted")
        assert running.stop() == 0
    check_file(path)
    assert len(rows(path)) == 10 + sent


@pytest.mark.parametrize(
    ("waited", "next_step", "pause"),
    [(0.0, retention.STEP_SECONDS, 0.015), (0.012, retention.STEP_SECONDS, 0.003), (0.15, 0.05, 0), (60, 0.1, 0)],
)
def test_step_length_follows_wait_for_commits(
    monkeypatch: pytest.MonkeyPatch, waited: float, next_step: float, pause: float
) -> None:
    """Between long commits there are few steps, so each may be longer. Otherwise deletion would fall behind."""

    class BusyStore:
        step_seconds: list[float] = []

        def expire(self, before_ms: int, forget_ms: int, seconds: float) -> ExpireResult:
            clock[0] += (waited if seconds else 0) + 0.005
            self.step_seconds.append(seconds)
            return ExpireResult(1, 0, True, 1, 2, 0.005)

    clock = [1000.0]
    monkeypatch.setattr(retention, "monotonic", lambda: clock[0])
    running = Retention.__new__(Retention)
    monkeypatch.setattr(retention, "start_thread", lambda *unused, **more: threading.Thread())
    running.__init__(BusyStore(), 1)  # type: ignore[misc, arg-type]
    assert running.step() == pytest.approx(pause)
    running.step()
    assert BusyStore.step_seconds[-1] == pytest.approx(next_step)
