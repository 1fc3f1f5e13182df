"""Tests of group commit: groups, turns, failures and the closing of a store."""

import gc
import logging
import sqlite3
import threading
import weakref
from array import array
from pathlib import Path

import pytest
from support.broken import ProcessEnded, raise_instead_of_exit
from support.databases import A_TEXT, A, block, stored_values
from support.harness import Blocked, eventually

from ringolib.storage.group_commit import CommitResult, PendingBlock, Turn
from ringolib.storage.interface import StoreError
from ringolib.timing import EXIT_FATAL
from ringolib.wire import Run
from store import Store


class GatedCommits:
    """Makes the commits of a store wait until `open`. `groups` has the group of each commit that has begun."""

    def __init__(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        self.groups: list[list[PendingBlock]] = []
        self._gate = threading.Event()
        self._write = store._write
        monkeypatch.setattr(store, "_write", self._wait_and_write)

    def _wait_and_write(self, group: list[PendingBlock]) -> CommitResult:
        self.groups.append(group)
        assert self._gate.wait(30)
        return self._write(group)

    def open(self) -> None:
        self._gate.set()

    def wait_for_first(self) -> None:
        """Wait until the first commit has begun."""
        eventually(lambda: len(self.groups) == 1, "the first commit has begun")


def test_runs_count_toward_group_limit(opened: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "MAX_GROUP_COST", 1000)
    many = [Run(bytes([n]) * 16, 0, 1) for n in range(20)]
    blocks = [PendingBlock(many, array("q", range(20)), 64) for _ in range(3)]
    with opened._lock:
        opened._queue = list(blocks)
        assert opened._next_group() == blocks[:1]
        opened._queue = []


def test_blocks_that_arrive_during_commit_share_next_commit(
    opened: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = GatedCommits(opened, monkeypatch)
    calls = [Blocked(lambda: opened.append(*block(A, 0, 1)))]
    commits.wait_for_first()
    calls += [Blocked(lambda n=n: opened.append(*block(A, n, n + 2))) for n in range(5)]
    eventually(lambda: len(opened._queue) == 5)
    assert all(call.still(0.01) for call in calls)
    commits.open()
    for call in calls:
        call.result()
    assert [len(group) for group in commits.groups] == [1, 5]
    assert opened.stats()[:3] == (6, 5, 2)
    assert len(stored_values(path)) == 6


def test_commit_group_has_bounded_number_of_records(opened: Store, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = GatedCommits(opened, monkeypatch)
    monkeypatch.setattr(Store, "MAX_GROUP_COST", 4)
    calls = [Blocked(lambda: opened.append(*block(A, 0, 1)))]
    commits.wait_for_first()
    for start, size in ((1, 3), (4, 2), (6, 9), (15, 1)):
        calls.append(Blocked(lambda start=start, size=size: opened.append(*block(A, start, start + size))))
        eventually(lambda: len(opened._queue) == len(calls) - 1)
    commits.open()
    for call in calls:
        call.result()
    sizes = [[len(pending.values) for pending in group] for group in commits.groups]
    assert sizes == [[1], [3, 2], [9], [1]]
    assert len(stored_values(path)) == 16


def test_failed_commit_fails_only_its_own_blocks(opened: Store, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, write, groups = threading.Event(), opened._write, []

    def failing(group: list[PendingBlock]) -> CommitResult:
        groups.append(len(group))
        if len(groups) == 1:
            assert gate.wait(30)
        if len(groups) == 2:
            with opened._transaction():
                opened._source(A)
                raise sqlite3.OperationalError("disk I/O error")
        return write(group)

    monkeypatch.setattr(opened, "_write", failing)
    good = Blocked(lambda: opened.append(*block(A, 0, 1)))
    eventually(lambda: groups == [1])
    bad = [Blocked(lambda n=n: opened.append(*block(A, n, n + 1))) for n in (1, 2)]
    eventually(lambda: len(opened._queue) == 2)
    gate.set()
    good.result()
    for call in bad:
        with pytest.raises(StoreError, match="numbers.db: disk I/O error"):
            call.result()
    opened.append(*block(A, 1, 2))
    assert stored_values(path) == {(A_TEXT, 0): 0, (A_TEXT, 1): 10}
    assert opened.stats()[:5] == (2, 0, 2, 1, None)


@pytest.mark.parametrize("part", ["_describe_failure", "_count_commit", "_end_turn"])
def test_error_in_the_bookkeeping_of_a_commit_is_fatal(
    opened: Store, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Other callers would wait for ever, or might get a wrong outcome."""

    def failing(group: list[PendingBlock]) -> CommitResult:
        raise sqlite3.OperationalError("disk I/O error")

    def broken(*unused: object) -> None:
        raise ZeroDivisionError("a bug")

    with monkeypatch.context() as short:
        statuses = raise_instead_of_exit(short)
        if part == "_describe_failure":
            short.setattr(opened, "_write", failing)
        short.setattr(opened, part, broken)
        with pytest.raises(ProcessEnded):
            opened.append(*block(A, 0, 1))
        assert statuses == [EXIT_FATAL]
    opened._turn = Turn.FREE  # for the fixture, which closes it


@pytest.mark.parametrize("kind", ["append", "exclusive"])
def test_caller_whose_wait_fails_leaves_no_trace(
    opened: Store, path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """For example without memory. Otherwise its block, or its turn, would be waited for by all others."""

    def no_memory() -> None:
        raise MemoryError

    with monkeypatch.context() as short:
        opened._turn = Turn.COMMIT
        short.setattr(opened._turn_ended, "wait", no_memory)
        with pytest.raises(MemoryError):
            if kind == "append":
                opened.append(*block(A, 0, 1))
            else:
                with opened._exclusive():
                    pass
        opened._turn = Turn.FREE
    assert (opened._queue, opened._queued_cost, opened._exclusive_waiting) == ([], 0, 0)
    Blocked(lambda: opened.append(*block(A, 1, 2))).result()
    assert stored_values(path) == {(A_TEXT, 1): 10}


def test_leader_that_cannot_take_group_frees_turn_and_queue(
    opened: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example without memory. Otherwise no caller could lead again, and `close` would never return."""

    def no_memory() -> list[PendingBlock]:
        raise MemoryError

    with monkeypatch.context() as short:
        short.setattr(opened, "_next_group", no_memory)
        with pytest.raises(MemoryError):
            opened.append(*block(A, 0, 1))
    assert (opened._turn, opened._queue, opened._queued_cost) == (Turn.FREE, [], 0)
    Blocked(lambda: opened.append(*block(A, 1, 2))).result()
    assert stored_values(path) == {(A_TEXT, 1): 10}


def test_commit_failures_are_logged_once_per_outage(
    opened: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    write = opened._write

    def failing(group: list[PendingBlock]) -> CommitResult:
        raise sqlite3.OperationalError("disk I/O error")

    for outage in (1, 2):
        monkeypatch.setattr(opened, "_write", failing)
        for _ in range(3):
            with pytest.raises(StoreError):
                opened.append(*block(A, 0, 5))
        error = opened.stats().error
        assert opened.stats().failed_commits == 3 * outage and error
        assert error.startswith(f"{opened.path}: disk I/O error (")
        monkeypatch.setattr(opened, "_write", write)
        for _ in range(3):
            opened.append(*block(A, 0, 5))
        assert (opened.stats().failed_commits, opened.stats().error) == (3 * outage, None)
    events = [record.getMessage().split()[0] for record in caplog.records]
    assert events == ["store_failing", "store_ok"] * 2


class RaisingHandler(logging.Handler):
    """A handler of the log that always fails. `events` has the names of the events that it lost."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.events.append(str(record.msg))
        raise MemoryError


def test_log_handler_that_raises_harms_no_commit(
    opened: Store, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The turn ends before the log is written, and each caller gets the outcome of its block."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(Store, "SLOW_COMMIT_SECONDS", 0)
    write, handler = opened._write, RaisingHandler()

    def failing(group: list[PendingBlock]) -> CommitResult:
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    monkeypatch.setattr(opened, "_write", failing)
    for _ in range(2):
        with pytest.raises(StoreError, match="disk I/O error"):
            Blocked(lambda: opened.append(*block(A, 0, 5))).result()
    monkeypatch.setattr(opened, "_write", write)
    Blocked(lambda: opened.append(*block(A, 0, 5))).result()
    monkeypatch.setattr(opened, "_succeeded_at", float("-inf"))
    Blocked(opened.check).result()
    assert {"commit_failed", "store_ok"} <= set(handler.events)
    assert len(stored_values(path)) == 5


def test_slow_commits_are_logged_and_all_are_timed(
    opened: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened.append(*block(A, 0, 5))
    assert not caplog.records
    monkeypatch.setattr(Store, "SLOW_COMMIT_SECONDS", 0)
    opened.append(*block(A, 5, 12))
    (line,) = caplog.records
    assert line.msg == "slow_commit" and isinstance(line.args, dict) and line.args["records"] == 7
    assert sum(opened.stats().commit_times.counts) == opened.stats().commits == 2
    assert opened.stats().commit_times.sum > 0


def test_failed_commit_keeps_no_reference_to_its_blocks(opened: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    class Values(array):  # type: ignore[type-arg]
        """An array that supports weak references."""

    def failing(values: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(opened, "_insert_records", failing)
    gc.disable()
    try:
        values = Values("q", range(10))
        alive = weakref.ref(values)
        try:
            opened.append([Run(A, 0, 10)], values)
        except StoreError:
            pass
        del values
        assert alive() is None
    finally:
        gc.enable()


def test_many_threads_store_everything_once(opened: Store, path: Path) -> None:
    calls = [
        Blocked(lambda n=n: [opened.append(*block(bytes([n]) * 16, k, k + 3)) for k in range(0, 200, 2)])
        for n in range(8)
    ]
    for call in calls:
        call.result()
    assert len(stored_values(path)) == 8 * 201
    assert opened.stats().stored == 8 * 201


@pytest.mark.parametrize("crowd", [1, 8])
@pytest.mark.parametrize("crowding", ["appends", "exclusive work"])
def test_commits_and_exclusive_work_do_not_starve_each_other(opened: Store, crowding: str, crowd: int) -> None:
    """Many threads do one kind of work without a pause. A call of the other kind waits only for the current turn."""
    over = threading.Event()
    turns = [0] * crowd

    def append(n: int) -> None:
        opened.append(*block(bytes([n]) * 16, turns[n - 1], turns[n - 1] + 1))

    def exclusive(n: int) -> None:
        opened.expire(0, 0, 0)

    often, seldom = (append, exclusive) if crowding == "appends" else (exclusive, append)

    def work(n: int) -> None:
        while not over.is_set():
            often(n)
            turns[n - 1] += 1

    threads = [threading.Thread(target=work, args=(n + 1,)) for n in range(crowd)]
    for thread in threads:
        thread.start()
    try:
        eventually(lambda: sum(turns) > 10, "the threads are at work")
        turns.append(0)
        waited = []
        for _ in range(20):
            before = sum(turns)
            seldom(crowd + 1)
            turns[crowd] += 1
            waited.append(sum(turns) - before)
        assert max(waited) < 1000, waited  # more than one, because the system may run the other threads first
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_exclusive_caller_gets_turn_before_queued_blocks(opened: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = GatedCommits(opened, monkeypatch)
    calls = [Blocked(lambda: opened.append(*block(A, 0, 1)))]
    commits.wait_for_first()
    calls += [Blocked(lambda: opened.append(*block(A, 1, 2)))]
    eventually(lambda: len(opened._queue) == 1)
    commits_before = []

    def exclusive() -> None:
        with opened._exclusive():
            commits_before.append(len(commits.groups))

    calls += [Blocked(exclusive)]
    eventually(lambda: opened._exclusive_waiting == 1)
    commits.open()
    for call in calls:
        call.result()
    assert (commits_before, len(commits.groups)) == ([1], 2)
    assert opened._turn is Turn.FREE


def test_close_stores_queued_blocks_and_refuses_exclusive_callers(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Store(str(path))
    commits = GatedCommits(opened, monkeypatch)
    appends = [Blocked(lambda: opened.append(*block(A, 0, 1)))]
    commits.wait_for_first()
    appends += [Blocked(lambda: opened.append(*block(A, 1, 2)))]
    eventually(lambda: len(opened._queue) == 1)
    expire = Blocked(lambda: opened.expire(0, 0, 0))
    eventually(lambda: opened._exclusive_waiting == 1)
    close = Blocked(opened.close)
    eventually(lambda: opened._closed)
    commits.open()
    for call in (*appends, close):
        call.result()
    with pytest.raises(StoreError, match="is closed"):
        expire.result()
    assert len(stored_values(path)) == 2


def test_close_waits_for_running_commit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Store(str(path))
    commits = GatedCommits(opened, monkeypatch)
    append = Blocked(lambda: opened.append(*block(A, 0, 3)))
    commits.wait_for_first()
    close = Blocked(opened.close)
    assert close.still()
    commits.open()
    append.result()
    close.result()
    opened.close()
    with pytest.raises(StoreError, match="closed"):
        opened.append(*block(A, 3, 4))
    assert not path.with_name("numbers.db-wal").exists()
    assert len(stored_values(path)) == 3
