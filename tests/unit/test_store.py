"""Tests of the SQLite store: records, duplicates, failed commits, checks, and the size of the WAL."""

import logging
import os
import random
import sqlite3
from array import array
from contextlib import closing
from pathlib import Path

import pytest
from support.databases import A_TEXT, A, B, block, query, stored_values
from support.harness import seeded

import store
from ringolib.storage import sqlite_file, wal
from ringolib.storage.group_commit import CommitResult, PendingBlock
from ringolib.storage.interface import StoreError
from ringolib.storage.sqlite_file import APPLICATION_ID
from ringolib.wire import Run
from store import Store


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


def test_failed_constraint_rolls_back_whole_transaction(opened: Store, path: Path) -> None:
    """Another program has stored a batch under the id of the third record of the commit."""
    opened.append(*block(A, 0, 1))
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("INSERT INTO batch VALUES (4, 1, 99, 0, 0)")
        for _ in range(2):
            with pytest.raises(StoreError, match="UNIQUE constraint failed"):
                opened.append([Run(A, 2 * n, 1) for n in range(1, 21)], array("q", range(20)))
            assert query(path, "SELECT (SELECT count(*) FROM record), (SELECT count(*) FROM batch)") == [(1, 2)]
        other.execute("DELETE FROM batch WHERE first_id = 4")
    opened.append([Run(A, 2 * n, 1) for n in range(1, 21)], array("q", range(20)))
    assert len(stored_values(path)) == 21 and opened.stats().held == 21


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs Linux")
def test_commit_of_many_sources_opens_no_temporary_file(opened: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """It changes 40 pages; SQLite's statement journal becomes a file from 64 KiB on."""
    sources = [bytes([n]) * 16 for n in range(40)]
    opened.append([Run(source, 2 * n, 1) for source in sources for n in range(500)], array("q", range(20_000)))
    insert, during = opened._insert_records, []

    def count_files(values: "array[int]") -> None:
        insert(values)
        during.append(len(os.listdir("/proc/self/fd")))

    monkeypatch.setattr(opened, "_insert_records", count_files)
    before = len(os.listdir("/proc/self/fd"))
    opened.append([Run(source, 1000, 1) for source in sources], array("q", range(40)))
    assert during == [before]


def test_check_commits_but_is_not_counted(opened: Store, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SUCCESS_VALID_SECONDS", 0)
    opened.append(*block(A, 0, 5))
    before, size = opened.stats(), opened.sizes().wal
    opened.check()
    assert opened.sizes().wal > size, "the check has written to the WAL"
    assert opened.stats() == before and len(stored_values(path)) == 5


def test_check_detects_failure_and_recovery(
    opened: Store, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(sqlite_file, "BUSY_TIMEOUT_MS", 1)
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
    size = opened.sizes().wal
    opened.check()
    assert opened.sizes().wal == size


def test_sizes_match_files_and_disk(opened: Store, path: Path) -> None:
    opened.append(*block(A, 0, 10_000))
    sizes = opened.sizes()
    assert (sizes.database, sizes.wal) == (path.stat().st_size, os.path.getsize(f"{path}-wal"))
    disk = os.statvfs(path.parent)
    assert sizes.disk_free and 0 < sizes.disk_free < disk.f_blocks * disk.f_frsize
    for name in path.parent.iterdir():
        name.unlink()
    path.parent.rmdir()
    sizes = opened.sizes()  # the removed WAL has its size, and its room on the disk, until the store is closed
    assert (sizes.database, sizes.disk_free) == (0, None)
    path.parent.mkdir()


@pytest.mark.slow
def test_wal_grows_under_reader_and_is_truncated_after_it(
    opened: Store, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    large = 1024 * 1024
    monkeypatch.setattr(wal, "LARGE_WAL_BYTES", large)
    monkeypatch.setattr(wal, "READER_WAIT_MS", 1)
    opened._wal.limit = large
    opened._db.execute(f"PRAGMA journal_size_limit = {large}")
    opened.append(*block(A, 0, 100))
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM record").fetchone() == (100,)
        at = 100
        while opened.sizes().wal < 4 * large:
            opened.append(*block(A, at, at + 10_000))
            at += 10_000
        assert reader.execute("SELECT count(*) FROM record").fetchone() == (100,)
        reader.execute("COMMIT")
        for _ in range(200):
            opened.append(*block(A, at, at + 1000))
            at += 1000
    assert opened.sizes().wal <= 2 * large
    events = [record.getMessage().split()[0] for record in caplog.records]
    assert events == ["wal_large", "wal_cut"]
    assert len(stored_values(path)) == at


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
