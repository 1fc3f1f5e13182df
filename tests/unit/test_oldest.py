"""Tests of reading and deleting the oldest records: whole batches for a spool, records by age for retention."""

import sqlite3
from array import array
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from support.databases import FAR, A, B, append, block, check_file, query, stored_values
from support.harness import rows

from ringolib.storage import sqlite_file, wal
from ringolib.storage.interface import StoreError
from ringolib.storage.oldest import RECORDS_PER_SLICE
from ringolib.storage.sqlite_file import SPOOL_APPLICATION_ID
from ringolib.wire import Run
from store import Store

# Whole batches.


def received(path: Path) -> list[object]:
    return [time for (time,) in query(path, "SELECT received_at_ms FROM batch ORDER BY first_id")]


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
    monkeypatch.setattr(wal, "LARGE_WAL_BYTES", 100_000)
    monkeypatch.setattr(sqlite_file, "BUSY_TIMEOUT_MS", 1)
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


def test_large_file_shrinks_once_it_is_empty(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wal, "LARGE_WAL_BYTES", 100_000)
    spool = Store(str(path), SPOOL_APPLICATION_ID)
    spool.append(*block(A, 0, 100_000))
    spool.append(*block(B, 0, 10))
    spool.delete(spool.oldest(100_000))
    assert path.stat().st_size > 500_000
    spool.delete(spool.oldest(10))
    assert path.stat().st_size + spool.sizes().wal < 50_000
    spool.append(*block(B, 0, 10))
    spool.close()
    assert len(stored_values(path)) == 10


# Records by age.


def expire_all(store: Store, before_ms: int, forget_ms: int = 0) -> tuple[int, int]:
    """Call `expire` until no more is to delete. Return the numbers of deleted records and batches."""
    records = batches = 0
    while True:
        result = store.expire(before_ms, forget_ms, 0.001)
        records, batches = records + result.records, batches + result.batches
        if not result.more:
            return records, batches


def test_records_expire_in_order_of_ids_and_newest_stays(opened: Store, path: Path) -> None:
    append(opened, A, 0, 10)
    append(opened, B, 0, 10)
    assert expire_all(opened, FAR) == (19, 0)
    assert opened.stats().held == 1
    append(opened, A, 10, 12)
    assert query(path, "SELECT id, sequence FROM records ORDER BY id") == [(20, 9), (21, 10), (22, 11)]
    check_file(path)
    assert expire_all(opened, FAR, FAR) == (2, 2)
    append(opened, A, 12, 13)
    assert query(path, "SELECT id FROM records ORDER BY id") == [(22,), (23,)]


def test_records_at_or_behind_the_age_limit_stay(opened: Store, path: Path) -> None:
    """A batch never arrived before an earlier one, whatever the clock said."""
    for n, received_at_ms in enumerate([100, 200, 300, 50, 400]):
        append(opened, A, n, n + 1)
        with closing(sqlite3.connect(path)) as writer, writer:
            writer.execute("UPDATE batch SET received_at_ms = ? WHERE sequence = ?", (received_at_ms, n))
    assert expire_all(opened, 100) == (0, 0)
    assert expire_all(opened, 300) == (2, 0)
    assert expire_all(opened, 301, 301) == (2, 4)
    result = opened.expire(0, 0, 0)
    assert (result.records, result.oldest_ms, result.newest_ms, result.more) == (0, 400, 400, False)


def test_empty_store_expires_nothing(opened: Store) -> None:
    result = opened.expire(FAR, FAR, 1)
    assert (result.records, result.batches, result.more, result.oldest_ms, result.newest_ms) == (
        0,
        0,
        False,
        None,
        None,
    )


def test_large_batch_expires_in_slices(opened: Store, path: Path) -> None:
    append(opened, A, 0, 3 * RECORDS_PER_SLICE)
    append(opened, A, 3 * RECORDS_PER_SLICE, 3 * RECORDS_PER_SLICE + 1)
    result = opened.expire(FAR, FAR, 0)
    assert (result.records, result.more) == (0, False), "with 0 seconds, nothing is deleted"
    seen = set()
    while opened.expire(FAR, FAR, 1e-9).more:
        check_file(path)
        seen.add(opened.stats().held)
        assert opened.stats().held == query(path, "SELECT count(*) FROM record")[0][0]
    assert seen >= {2 * RECORDS_PER_SLICE + 1, RECORDS_PER_SLICE + 1, 1}
    assert rows(path) == [("61616161-6161-6161-6161-616161616161", 3 * RECORDS_PER_SLICE, 3 * RECORDS_PER_SLICE)]


def test_deleted_records_stay_known_until_their_batch_is_deleted(opened: Store, path: Path) -> None:
    append(opened, A, 0, 10)
    append(opened, B, 0, 1)
    expire_all(opened, FAR)
    append(opened, A, 0, 12)
    assert opened.stats().duplicates == 10
    assert [sequence for _, sequence, _ in rows(path)] == [0, 10, 11]
    assert expire_all(opened, FAR, FAR) == (2, 2)
    append(opened, A, 0, 12)
    assert opened.stats().duplicates == 12, "the newest batch stays, because its record is there"
    assert [sequence for _, sequence, _ in rows(path)] == [11, *range(10)]
    check_file(path)


def test_cache_forgets_source_whose_id_is_reused(opened: Store, path: Path) -> None:
    """The store deletes a source without batches, and SQLite gives its id to another source."""
    append(opened, A, 0, 1)
    append(opened, B, 0, 1)
    append(opened, A, 1, 2)
    assert expire_all(opened, FAR, FAR) == (2, 2)
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
    check_file(path)


def test_file_with_expired_records_reopens(opened: Store, path: Path) -> None:
    append(opened, A, 0, 5000)
    append(opened, A, 5000, 5001)
    expire_all(opened, FAR)
    opened.close()
    with closing(Store(str(path))) as again:
        assert again.stats().held == 1
        append(again, A, 0, 5002)
        assert again.stats().stored == 1
    check_file(path)


def test_failed_expire_changes_nothing_and_can_be_retried(
    opened: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(opened, A, 0, 10)
    append(opened, B, 0, 1)

    def fails(db: sqlite3.Connection, before_ms: int) -> int:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("ringolib.storage.oldest.delete_batches", fails)
        with pytest.raises(StoreError, match="make room"):
            opened.expire(FAR, FAR, 1)
    assert opened.stats().held == len(rows(path)) == 11
    append(opened, A, 10, 11)
    assert expire_all(opened, FAR) == (11, 0)
