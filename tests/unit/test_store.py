"""Tests of the SQLite store: commits, duplicates, deletion, WAL size, and refusal of unsuitable files."""

import gc
import logging
import os
import random
import sqlite3
import stat
import threading
import weakref
from array import array
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from support.databases import A_TEXT, A, B, block, query, stored_values
from support.harness import Blocked, eventually, seeded

import store
from ringolib.storage.group_commit import CommitResult, PendingBlock, Turn
from ringolib.storage.interface import StoreError
from ringolib.storage.sqlite_file import APPLICATION_ID, SPOOL_APPLICATION_ID
from ringolib.wire import Run
from store import Store


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "numbers.db"


@pytest.fixture
def opened(path: Path) -> Iterator[Store]:
    opened = Store(str(path))
    yield opened
    opened.close()


def test_new_database_has_application_id_and_syncs_fully(opened: Store, path: Path) -> None:
    assert query(path, "PRAGMA application_id") == [(APPLICATION_ID,)]
    assert query(path, "PRAGMA user_version") == [(1,)]
    assert query(path, "PRAGMA journal_mode") == [("wal",)]
    assert opened._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


def test_ids_have_no_gaps_and_view_joins_all_tables(opened: Store, path: Path) -> None:
    opened.append([Run(A, 0, 2), Run(B, 7, 1)], array("q", [2**63 - 1, -(2**63), 5]))
    opened.append([Run(A, 2, 1)], array("q", [6]))
    assert query(path, "SELECT id, source, sequence, value FROM records WHERE source LIKE '61%'") == [
        (1, A_TEXT, 0, 2**63 - 1),
        (2, A_TEXT, 1, -(2**63)),
        (4, A_TEXT, 2, 6),
    ]
    assert query(path, "SELECT first_id, count, sequence FROM batch") == [(1, 2, 0), (3, 1, 7), (4, 1, 2)]
    assert query(path, "SELECT min(received_at_ms) > 1600000000000 FROM records") == [(1,)]


@pytest.mark.parametrize("size", [1, 15, 16, 17, 127, 128, 1023, 1024, 1025, 2048 + 128 + 16 + 1, 100_000])
def test_blocks_of_every_size_are_stored_whole(opened: Store, path: Path, size: int) -> None:
    opened.append(*block(A, 0, size))
    assert query(path, "SELECT count(*), sum(value = sequence * 10), max(id) FROM records") == [(size, size, size)]


@pytest.mark.parametrize(
    ("runs", "new"),
    [
        ([(10, 20)], 0),
        ([(12, 18)], 0),
        ([(5, 10)], 5),
        ([(5, 12)], 5),
        ([(18, 30)], 10),
        ([(20, 30)], 10),
        ([(5, 30)], 15),
        ([(0, 60)], 40),
        ([(0, 5), (3, 8), (0, 8)], 8),
        ([(38, 42), (19, 41)], 12),
        ([(50, 51), (49, 50), (48, 52)], 4),
    ],
)
@pytest.mark.parametrize("reopened", [False, True])
def test_only_missing_parts_of_runs_are_stored(
    path: Path, runs: list[tuple[int, int]], new: int, reopened: bool
) -> None:
    """The records 10..19 and 30..39 are stored already."""
    opened = Store(str(path))
    opened.append(*block(A, 30, 40))
    opened.append(*block(A, 10, 20))
    if reopened:
        opened.close()
        opened = Store(str(path))
    before = opened.stats().stored
    blocks = [block(A, *run) for run in runs]
    opened.append([run for runs, _ in blocks for run in runs], sum((values for _, values in blocks), array("q")))
    assert opened.stats().stored - before == new
    assert opened.stats().duplicates == sum(end - first for first, end in runs) - new
    opened.close()
    expected = set(range(10, 20)) | set(range(30, 40)) | {n for run in runs for n in range(*run)}
    assert stored_values(path) == {(A_TEXT, n): n * 10 for n in expected}


def test_random_runs_keep_first_value_of_each_sequence(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = seeded()
    rng = random.Random(seed)
    monkeypatch.setattr(store, "_MAX_SOURCES_CACHED", 2)  # so that sources are evicted from the cache
    model: dict[tuple[bytes, int], int] = {}
    opened = Store(str(path))
    sent = 0
    for turn in range(300):
        runs, values = [], array("q")
        for _ in range(rng.randrange(1, 5)):
            run = Run(rng.choice((A, B, b"c" * 16)), rng.randrange(300), rng.randrange(1, 30))
            runs.append(run)
            for sequence in range(run.first, run.first + run.count):
                values.append(rng.randrange(-(2**63), 2**63))
                model.setdefault((run.source, sequence), values[-1])
        opened.append(runs, values)
        sent += len(values)
        if turn % 100 == 50:
            opened.close()
            opened = Store(str(path))
    opened.close()
    expected = {(source.hex(), sequence): value for (source, sequence), value in model.items()}
    assert {
        (source.replace("-", ""), sequence): value for (source, sequence), value in stored_values(path).items()
    } == expected


def test_largest_sequence_is_stored_once(opened: Store, path: Path) -> None:
    opened.append(*block(B, 0, 5))  # so that the sequence plus an id of A exceeds 64 bits
    run = [Run(A, 2**63 - 3, 2)]
    for _ in range(2):
        opened.append(run, array("q", [1, 2]))
    last = {key: value for key, value in stored_values(path).items() if key[0] == A_TEXT}
    assert last == {(A_TEXT, 2**63 - 3): 1, (A_TEXT, 2**63 - 2): 2}
    assert all(isinstance(sequence, int) for _, sequence in last)


def test_open_transaction_is_rolled_back_before_next_commit(opened: Store, path: Path) -> None:
    opened._db.execute("BEGIN IMMEDIATE")
    opened._db.execute("INSERT INTO record(value) VALUES (99)")
    opened.append(*block(A, 0, 1))
    assert stored_values(path) == {(A_TEXT, 0): 0}


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
    gate, groups, write = threading.Event(), [], opened._write

    def slow(group: list[PendingBlock]) -> CommitResult:
        groups.append(len(group))
        assert gate.wait(30)
        return write(group)

    monkeypatch.setattr(opened, "_write", slow)
    calls = [Blocked(lambda: opened.append(*block(A, 0, 1)))]
    eventually(lambda: groups == [1])
    calls += [Blocked(lambda n=n: opened.append(*block(A, n, n + 2))) for n in range(5)]
    eventually(lambda: len(opened._queue) == 5)
    assert all(call.still(0.01) for call in calls)
    gate.set()
    for call in calls:
        call.result()
    assert groups == [1, 5]
    assert opened.stats()[:3] == (6, 5, 2)
    assert len(stored_values(path)) == 6


def test_commit_group_has_bounded_number_of_records(opened: Store, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, groups, write = threading.Event(), [], opened._write

    def slow(group: list[PendingBlock]) -> CommitResult:
        groups.append([len(block.values) for block in group])
        assert gate.wait(30)
        return write(group)

    monkeypatch.setattr(opened, "_write", slow)
    monkeypatch.setattr(Store, "MAX_GROUP_COST", 4)
    calls = [Blocked(lambda: opened.append(*block(A, 0, 1)))]
    eventually(lambda: groups == [[1]])
    for start, size in ((1, 3), (4, 2), (6, 9), (15, 1)):
        calls.append(Blocked(lambda start=start, size=size: opened.append(*block(A, start, start + size))))
        eventually(lambda: len(opened._queue) == len(calls) - 1)
    gate.set()
    for call in calls:
        call.result()
    assert groups == [[1], [3, 2], [9], [1]]
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


def test_blocks_fail_when_error_cannot_be_described(opened: Store, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The leader raises the unexpected error; the other callers get an error without details."""

    def failing(group: list[PendingBlock]) -> CommitResult:
        raise sqlite3.OperationalError("disk I/O error")

    def cannot_describe(cause: BaseException) -> StoreError:
        raise RuntimeError("no words")

    with monkeypatch.context() as short:
        short.setattr(opened, "_write", failing)
        short.setattr(opened, "_describe_failure", cannot_describe)
        group = [PendingBlock(*block(A, n, n + 1), 64) for n in range(2)]
        with opened._lock:
            opened._turn = Turn.COMMIT
        with pytest.raises(RuntimeError, match="no words"):
            opened._commit(group)
    assert all(pending.done and "was interrupted" in str(pending.error) for pending in group)
    assert opened.stats()[2:4] == (0, 1) and "was interrupted" in (opened.stats().error or "")
    opened.append(*block(A, 0, 1))
    assert stored_values(path) == {(A_TEXT, 0): 0}


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


def test_full_disk_fails_commit_until_there_is_room(opened: Store, path: Path) -> None:
    opened.append(*block(A, 0, 10))
    (pages,) = opened._db.execute("PRAGMA page_count").fetchone()
    opened._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreError, match="full.*make room"):
        opened.append(*block(A, 10, 10_000))
    assert len(stored_values(path)) == 10
    opened._db.execute("PRAGMA max_page_count = 1000000")
    opened.append(*block(A, 10, 10_000))
    assert len(stored_values(path)) == 10_000


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
        assert (opened.stats().failed_commits, opened.stats().error) == (3 * outage, f"{opened.path}: disk I/O error")
        monkeypatch.setattr(opened, "_write", write)
        for _ in range(3):
            opened.append(*block(A, 0, 5))
        assert (opened.stats().failed_commits, opened.stats().error) == (3 * outage, None)
    events = [record.getMessage().split()[0] for record in caplog.records]
    assert events == ["store_failing", "store_ok"] * 2


def test_check_commits_but_is_not_counted(opened: Store, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SUCCESS_VALID_SECONDS", 0)
    opened.append(*block(A, 0, 5))
    before, size = opened.stats(), opened.wal_bytes()
    opened.check()
    assert opened.wal_bytes() > size, "the check has written to the WAL"
    assert opened.stats() == before and len(stored_values(path)) == 5


def test_check_detects_failure_and_recovery(
    opened: Store, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(store, "BUSY_TIMEOUT_MS", 1)
    opened._db.execute("PRAGMA busy_timeout = 1")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        for _ in range(2):
            with pytest.raises(StoreError, match="locked"):
                opened.check()
        assert "locked" in (opened.stats().error or "") and opened.stats().failed_commits == 0
        other.execute("ROLLBACK")
    opened.check()
    assert opened.stats().error is None
    assert [record.getMessage() for record in caplog.records] == ["store_failing", "store_ok"]
    opened.append(*block(A, 0, 5))
    opened.close()
    with pytest.raises(StoreError, match="closed"):
        opened.check()


def test_successful_check_keeps_error_of_recent_failed_commit(
    opened: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A check needs less room than records, so it does not prove that a retry would succeed."""
    caplog.set_level(logging.INFO)

    def failing(group: list[PendingBlock]) -> CommitResult:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as short:
        short.setattr(opened, "_write", failing)
        with pytest.raises(StoreError):
            opened.append(*block(A, 0, 5))
        opened.check()
        assert "full" in (opened.stats().error or "")
    monkeypatch.setattr(store, "FAILURE_VALID_SECONDS", 0)
    opened.check()
    assert opened.stats().error is None, "no client has retried for a while"
    assert [record.getMessage() for record in caplog.records] == ["store_failing", "store_ok"]


def test_check_after_recent_commit_writes_nothing(opened: Store) -> None:
    opened.append(*block(A, 0, 5))
    size = opened.wal_bytes()
    opened.check()
    assert opened.wal_bytes() == size


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


def test_sizes_match_files_and_disk(opened: Store, path: Path) -> None:
    opened.append(*block(A, 0, 10_000))
    sizes = opened.sizes()
    assert (sizes.database, sizes.wal) == (path.stat().st_size, os.path.getsize(f"{path}-wal"))
    disk = os.statvfs(path.parent)
    assert sizes.disk_free and 0 < sizes.disk_free < disk.f_blocks * disk.f_frsize
    for name in path.parent.iterdir():
        name.unlink()
    path.parent.rmdir()
    assert opened.sizes() == (0, 0, None)
    path.parent.mkdir()


def test_wal_grows_under_reader_and_is_truncated_after_it(
    opened: Store, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    large = 1024 * 1024
    monkeypatch.setattr(store, "LARGE_WAL_BYTES", large)
    monkeypatch.setattr(store, "READER_WAIT_MS", 1)
    opened._wal_limit = large
    opened._db.execute(f"PRAGMA journal_size_limit = {large}")
    opened.append(*block(A, 0, 100))
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM record").fetchone() == (100,)
        at = 100
        while opened.wal_bytes() < 4 * large:
            opened.append(*block(A, at, at + 10_000))
            at += 10_000
        assert reader.execute("SELECT count(*) FROM record").fetchone() == (100,)
        reader.execute("COMMIT")
        for _ in range(200):
            opened.append(*block(A, at, at + 1000))
            at += 1000
    assert opened.wal_bytes() <= 2 * large
    events = [record.getMessage().split()[0] for record in caplog.records]
    assert events == ["wal_large", "wal_cut"]
    assert len(stored_values(path)) == at


def test_oldest_batches_are_read_whole_and_deleted(path: Path) -> None:
    spool = Store(str(path), SPOOL_APPLICATION_ID)
    assert spool.oldest(10) is None and spool.stats().held == 0
    spool.append([Run(A, 5, 2), Run(B, 0, 3)], array("q", [1, -(2**63), 3, 4, 2**63 - 1]))
    spool.append(*block(A, 7, 107))
    assert spool.stats().held == 105
    assert spool.oldest(4) == (([Run(A, 5, 2)], array("q", [1, -(2**63)])), 2, *received(path)[:1])
    assert spool.oldest(104) == (
        ([Run(A, 5, 2), Run(B, 0, 3)], array("q", [1, -(2**63), 3, 4, 2**63 - 1])),
        5,
        *received(path)[:1],
    )
    assert spool.oldest(105) == spool.oldest(10**9)
    spool.delete(spool.oldest(5))
    assert query(path, "SELECT hex(uuid) FROM source") == [(A.hex(),)]
    assert spool.stats().held == 100
    oldest = spool.oldest(1)  # more than the limit, but a whole batch
    assert oldest and oldest.block == block(A, 7, 107) and oldest.last_id == 105
    spool.close()
    spool = Store(str(path), SPOOL_APPLICATION_ID)
    assert spool.stats().held == 100 and spool.oldest(1) == oldest
    spool.delete(oldest)
    assert spool.stats().held == 0 and spool.oldest(1) is None
    assert [query(path, f"SELECT count(*) FROM {table}") for table in ("source", "batch", "record")] == [[(0,)]] * 3
    spool.append(*block(A, 7, 9))  # a deleted batch is not known any more
    assert spool.stats().held == 2
    spool.close()
    Store(str(path), SPOOL_APPLICATION_ID).close()
    with pytest.raises(StoreError, match="closed"):
        spool.oldest(1)


def test_delete_ignores_batches_whose_ids_were_reused(path: Path) -> None:
    """A transaction may have happened although it reported an error. Then ids start again, for other records."""
    spool = Store(str(path), SPOOL_APPLICATION_ID)
    spool.append(*block(A, 0, 100))
    oldest = spool.oldest(100)
    assert oldest
    spool.delete(oldest)
    for source in (B, A):
        spool.append(*block(source, 100, 200))
        spool.delete(oldest)
    assert spool.stats().held == 200
    spool.close()
    assert len(stored_values(path)) == 200


def test_deletion_that_reported_an_error_is_detected(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Store(str(path), SPOOL_APPLICATION_ID)
    spool.append(*block(A, 0, 100))
    oldest, transaction = spool.oldest(100), spool._transaction
    assert oldest

    @contextmanager
    def commit_then_fail() -> Iterator[None]:
        with transaction():
            yield
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(spool, "_transaction", commit_then_fail)
    with pytest.raises(StoreError):
        spool.delete(oldest)
    monkeypatch.setattr(spool, "_transaction", transaction)
    assert spool.oldest(100) is None and spool.stats().held == 0
    spool.close()


def test_delete_succeeds_when_file_cannot_be_shrunk(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store, "LARGE_WAL_BYTES", 100_000)
    monkeypatch.setattr(store, "BUSY_TIMEOUT_MS", 1)
    spool = Store(str(path), SPOOL_APPLICATION_ID)
    spool.append(*block(A, 0, 100_000))
    oldest = spool.oldest(100_000)
    assert oldest
    shrink, calls = spool._shrink_empty_file, []

    def locked() -> None:
        with closing(sqlite3.connect(path)) as other:
            other.execute("BEGIN IMMEDIATE")
            shrink()
        calls.append(1)

    monkeypatch.setattr(spool, "_shrink_empty_file", locked)
    spool.delete(oldest)
    assert calls and "spool_not_shrunk" in caplog.text
    assert spool.stats().held == 0
    spool.close()


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


def received(path: Path) -> list[object]:
    return [time for (time,) in query(path, "SELECT received_at_ms FROM batch ORDER BY first_id")]


def test_large_file_shrinks_once_it_is_empty(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LARGE_WAL_BYTES", 100_000)
    spool = Store(str(path), SPOOL_APPLICATION_ID)
    spool.append(*block(A, 0, 100_000))
    spool.append(*block(B, 0, 10))
    spool.delete(spool.oldest(100_000))
    assert path.stat().st_size > 500_000
    spool.delete(spool.oldest(10))
    assert path.stat().st_size + spool.wal_bytes() < 50_000
    spool.append(*block(B, 0, 10))
    spool.close()
    assert len(stored_values(path)) == 10


@pytest.mark.parametrize(
    ("kind", "other", "message"),
    [
        (APPLICATION_ID, SPOOL_APPLICATION_ID, "is a consumer's database, not a publisher's spool"),
        (SPOOL_APPLICATION_ID, APPLICATION_ID, "is a publisher's spool, not a consumer's database"),
    ],
)
def test_spool_and_database_refuse_files_of_each_other(path: Path, kind: int, other: int, message: str) -> None:
    Store(str(path), kind).close()
    with pytest.raises(StoreError, match=message):
        Store(str(path), other)


def test_retry_of_commit_that_reported_an_error_adds_no_duplicates(
    opened: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened.append(*block(A, 0, 5))
    write = opened._write

    def commit_then_fail(group: list[PendingBlock]) -> CommitResult:
        write(group)
        monkeypatch.setattr(opened, "_write", write)
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(opened, "_write", commit_then_fail)
    with pytest.raises(StoreError):
        opened.append(*block(A, 5, 10))
    opened.append(*block(A, 5, 10))
    assert opened.stats().held == 10
    opened.append(*block(A, 4, 11))
    assert stored_values(path) == {(A_TEXT, n): n * 10 for n in range(11)}


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
    gate, order, write = threading.Event(), [], opened._write

    def slow(group: list[PendingBlock]) -> CommitResult:
        order.append("commit")
        assert gate.wait(30)
        return write(group)

    monkeypatch.setattr(opened, "_write", slow)
    calls = [Blocked(lambda: opened.append(*block(A, 0, 1)))]
    eventually(lambda: order == ["commit"])
    calls += [Blocked(lambda: opened.append(*block(A, 1, 2)))]
    eventually(lambda: len(opened._queue) == 1)

    def exclusive() -> None:
        with opened._exclusive():
            order.append("exclusive")

    calls += [Blocked(exclusive)]
    eventually(lambda: opened._exclusive_waiting == 1)
    gate.set()
    for call in calls:
        call.result()
    assert order == ["commit", "exclusive", "commit"]
    assert opened._turn is Turn.FREE


def test_close_stores_queued_blocks_and_refuses_exclusive_callers(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, gate = Store(str(path)), threading.Event()
    write, started = opened._write, threading.Event()

    def slow(group: list[PendingBlock]) -> CommitResult:
        started.set()
        assert gate.wait(30)
        return write(group)

    monkeypatch.setattr(opened, "_write", slow)
    appends = [Blocked(lambda: opened.append(*block(A, 0, 1)))]
    assert started.wait(30)
    appends += [Blocked(lambda: opened.append(*block(A, 1, 2)))]
    eventually(lambda: len(opened._queue) == 1)
    expire = Blocked(lambda: opened.expire(0, 0, 0))
    eventually(lambda: opened._exclusive_waiting == 1)
    close = Blocked(opened.close)
    eventually(lambda: opened._closed)
    gate.set()
    for call in (*appends, close):
        call.result()
    with pytest.raises(StoreError, match="is closed"):
        expire.result()
    assert len(stored_values(path)) == 2


def test_close_waits_for_running_commit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, gate = Store(str(path)), threading.Event()
    write, started = opened._write, threading.Event()

    def slow(group: list[PendingBlock]) -> CommitResult:
        started.set()
        assert gate.wait(30)
        return write(group)

    monkeypatch.setattr(opened, "_write", slow)
    call = Blocked(lambda: opened.append(*block(A, 0, 3)))
    assert started.wait(30)
    closing_call = Blocked(opened.close)
    assert closing_call.still()
    gate.set()
    call.result()
    closing_call.result()
    opened.close()
    with pytest.raises(StoreError, match="closed"):
        opened.append(*block(A, 3, 4))
    assert not path.with_name("numbers.db-wal").exists()
    assert len(stored_values(path)) == 3


def test_second_server_is_refused_until_first_closes(path: Path) -> None:
    first = Store(str(path))
    link = path.with_name("link.db")
    link.symlink_to(path)
    for name in (path, link):
        with pytest.raises(StoreError, match="in use by another ringoexp"):
            Store(str(name))
    first.close()
    Store(str(path)).close()


def other_database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE theirs(x)")


def newer_database(path: Path) -> None:
    Store(str(path)).close()
    with closing(sqlite3.connect(path)) as ours:
        ours.execute("PRAGMA user_version = 2")


def corrupt_database(path: Path) -> None:
    Store(str(path)).close()
    content = bytearray(path.read_bytes())
    content[100:4096] = b"\xff" * 3996
    path.write_bytes(content)


def changed_database(path: Path) -> None:
    Store(str(path)).close()
    with closing(sqlite3.connect(path)) as ours:
        ours.execute("INSERT INTO record(value) VALUES (1)")
        ours.commit()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda path: path.mkdir(), "is a directory", id="directory"),
        pytest.param(lambda path: path.write_text("not a database\n" * 100), "not a SQLite file", id="text file"),
        pytest.param(other_database, "another application's", id="another application's"),
        pytest.param(newer_database, "schema version 2", id="newer"),
        pytest.param(corrupt_database, "corrupt", id="corrupt"),
        pytest.param(changed_database, "corrupt, or another program has changed it", id="records without a batch"),
    ],
)
def test_foreign_file_is_refused_and_unchanged(path: Path, make: object, message: str) -> None:
    make(path)  # type: ignore[operator]
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(StoreError, match=message) as refused:
        Store(str(path))
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)
    assert (path.read_bytes() if path.is_file() else b"") == before


@pytest.mark.parametrize("other", ["-wal", "-journal"])
def test_foreign_wal_and_journal_are_unchanged(path: Path, other: str) -> None:
    beside = Path(f"{path}{other}")
    for file in (path, beside):
        file.write_bytes(b"a user's notes\n" * 1000)
    with pytest.raises(StoreError, match="is not a SQLite file"):
        Store(str(path))
    assert path.read_bytes() == beside.read_bytes() == b"a user's notes\n" * 1000


def test_text_file_beside_valid_wal_is_not_taken_for_torn_database(path: Path) -> None:
    with closing(Store(str(path))) as opened:
        opened.append(*block(A, 0, 1000))
        wal = Path(f"{path}-wal").read_bytes()
    path.write_bytes(b"a user's notes\n" * 1000)
    Path(f"{path}-wal").write_bytes(wal)
    with pytest.raises(StoreError, match="is not a SQLite file"):
        Store(str(path))
    assert path.read_bytes() == b"a user's notes\n" * 1000


def test_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="No such file or directory"):
        Store(str(tmp_path / "nowhere" / "numbers.db"))


@pytest.mark.parametrize("read_only", ["directory", "file"])
def test_file_without_write_permission_is_refused(path: Path, read_only: str) -> None:
    """In a child process. If the tests run as root, the child drops its privileges."""
    Store(str(path)).close()
    path.with_name("numbers.db-lock").chmod(0o666)
    path.chmod(0o444)
    if read_only == "directory":
        path.unlink()
        path.with_name("numbers.db-lock").unlink()
        path.parent.chmod(0o555)
    for parent in path.parents[1:4]:  # pytest creates its directories without access for other users
        if parent.stat().st_uid == os.getuid() and "pytest" in parent.name:
            parent.chmod(parent.stat().st_mode | stat.S_IXOTH)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            try:
                Store(str(path))
                os.write(writing, b"opened")
            except StoreError as error:
                os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with open(reading, "rb") as pipe:
        message = pipe.read().decode()
    path.parent.chmod(0o755)
    assert str(path) in message and ("Permission denied" in message or "permissions" in message), message


@pytest.mark.parametrize("change", ["removed", "replaced", "WAL removed"])
def test_commits_fail_while_file_or_wal_is_moved_away(change: str, tmp_path: Path) -> None:
    path = tmp_path / "numbers.db"
    with closing(Store(str(path))) as opened:
        opened.append([Run(A, 0, 10)], array("q", range(10)))
        (tmp_path / "numbers.db-wal").rename(tmp_path / "moved-wal")
        if change != "WAL removed":
            path.rename(tmp_path / "moved")
            (tmp_path / "moved-wal").rename(tmp_path / "numbers.db-wal")
        if change == "replaced":
            path.touch()
        for attempt in (
            lambda: opened.append([Run(A, 10, 10)], array("q", range(10))),
            lambda: opened.append([Run(B, 0, 1)], array("q", [1])),
            opened.check,
        ):
            with pytest.raises(StoreError, match="removed or replaced while it was in use: put it back"):
                attempt()
        error = opened.stats().error
        assert error and error.startswith(f"{path}: the file or its -wal file")
        if change == "WAL removed":
            (tmp_path / "moved-wal").rename(tmp_path / "numbers.db-wal")
        else:
            (tmp_path / "moved").rename(path)
        opened.append([Run(A, 10, 10)], array("q", range(10)))  # the files are back in place
        assert opened.stats().error is None


def test_schema_with_invalid_text_is_refused_as_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "numbers.db"
    Store(str(path)).close()
    content = path.read_bytes()
    assert content.count(b"tablerecordrecord") == 1
    damaged = content.replace(b"tablerecordrecord", b"table\xfa\xffcordrecord")
    path.write_bytes(damaged.replace(b"CREATE TABLE record", b"CREATE TABLX record"))
    with pytest.raises(StoreError, match="restore it from a backup") as refused:
        Store(str(path))
    assert "\n" not in str(refused.value)
