"""Reads and deletes the oldest records: a spool forwards and deletes whole batches, `--retain` deletes by age.

Functions over the store's connection. `store.Store` calls them within its exclusive turn, and the functions that write
within its transaction. Nothing is cached here, and no thread runs here.

`batch` and `record` have ids in order of arrival, without gaps. Both lose rows only from the lowest id on. Retention
may delete a record before its batch: while the row in `batch` remains, the record is still known as a duplicate.
"""

import sqlite3
from array import array
from itertools import chain
from time import monotonic
from typing import NamedTuple

from ringolib.wire import Block, Run

RECORDS_PER_SLICE = 4096
"""Records that `expire` deletes between two readings of the clock."""
BATCHES_PER_SLICE = 256
"""Batches that it deletes in between. Each costs as much as several records, because batches have a second index."""


class OldestBatches(NamedTuple):
    """The oldest batches of a store, one run for each."""

    block: Block
    last_id: int
    received_at_ms: int  # arrival of the first batch, Unix time


class ExpireResult(NamedTuple):
    """The work of one call of `Store.expire`, and the age of the remaining records."""

    records: int  # deleted
    batches: int  # deleted
    more: bool  # the time was over before the work was done
    oldest_ms: int | None  # arrival of the oldest remaining record, Unix time; None without records
    newest_ms: int | None  # arrival of the newest record
    seconds: float  # duration of the exclusive turn, in which no commit of records could run


class Deleted(NamedTuple):
    """The rows that `delete_expired` has deleted."""

    records: int
    batches: int
    source_ids: set[int]  # of sources that may have been deleted: their ids may be given to other sources
    more: bool  # the deadline came first


def read_oldest(db: sqlite3.Connection, limit: int) -> OldestBatches | None:
    """Return the oldest batches that together have at most `limit` records, but at least one batch; None if empty."""
    rows: list[tuple[int, int, bytes, int, int]] = []
    count = 0
    for row in db.execute(
        """SELECT first_id, count, uuid, sequence, received_at_ms
             FROM batch JOIN source ON source.id = source_id ORDER BY first_id"""
    ):
        if rows and count + row[1] > limit:
            break
        rows.append(row)
        count += row[1]
    if not rows:
        return None
    first_id, last_id = rows[0][0], rows[-1][0] + rows[-1][1] - 1
    records = db.execute("SELECT value FROM record WHERE id BETWEEN ? AND ? ORDER BY id", (first_id, last_id))
    values = array("q", chain.from_iterable(records))
    runs = [Run(uuid, sequence, size) for _, size, uuid, sequence, _ in rows]
    return OldestBatches(Block(runs, values), last_id, rows[0][4])


def delete_oldest(db: sqlite3.Connection, oldest: OldestBatches) -> bool:
    """Delete the batches with their records, and sources without batches. False if they are not the oldest any more.

    A transaction may have deleted them although it reported an error. Then their ids may belong to other records now,
    so nothing is deleted.
    """
    through = {"last": oldest.last_id}
    batches = db.execute(
        """SELECT uuid, sequence, count FROM batch JOIN source ON source.id = source_id
            WHERE first_id <= :last ORDER BY first_id""",
        through,
    )
    if [Run(*batch) for batch in batches] != oldest.block.runs:
        return False
    db.execute(
        """DELETE FROM source WHERE id IN (SELECT source_id FROM batch WHERE first_id <= :last)
              AND NOT EXISTS (SELECT 1 FROM batch WHERE source_id = source.id AND first_id > :last)""",
        through,
    )
    db.execute("DELETE FROM batch WHERE first_id <= :last", through)
    db.execute("DELETE FROM record WHERE id <= :last", through)
    return True


def delete_expired(db: sqlite3.Connection, before_ms: int, forget_ms: int, deadline: float) -> Deleted:
    """Delete old records and batches in slices, until `deadline`, but at least one slice.

    Records go if they arrived before `before_ms`, except the newest. Batches go if they arrived before `forget_ms` and
    have no record left; sources without batches go with them.
    """
    records = batches = 0
    source_ids: set[int] = set()
    more = True
    while more:
        records_deleted = delete_records(db, before_ms)
        batches_deleted, batch_sources = delete_batches(db, forget_ms)
        records, batches = records + records_deleted, batches + batches_deleted
        source_ids |= batch_sources
        more = bool(records_deleted or batches_deleted)
        if monotonic() >= deadline:
            break
    return Deleted(records, batches, source_ids, more)


def delete_records(db: sqlite3.Connection, before_ms: int) -> int:
    """Delete up to RECORDS_PER_SLICE of the oldest records and return how many. A batch may lose some of its records.

    The newest record always stays, because its id determines the next one.
    """
    (first,) = db.execute("SELECT min(id) FROM record").fetchone()
    if first is None:
        return 0
    (newest,) = db.execute("SELECT max(id) FROM record").fetchone()
    last, limit = first - 1, min(first + RECORDS_PER_SLICE, newest) - 1
    # In order of ids, up to the first batch that is not old enough. A batch never arrived before an earlier one,
    # even if the clock said so.
    for end, received_at_ms in db.execute(
        """SELECT first_id + count - 1, received_at_ms FROM batch
            WHERE first_id >= (SELECT max(first_id) FROM batch WHERE first_id <= ?) ORDER BY first_id""",
        (first,),
    ):
        if received_at_ms >= before_ms or last >= limit:
            break
        last = min(end, limit)
    db.execute("DELETE FROM record WHERE id <= ?", (last,))
    return int(last - first + 1)


def delete_batches(db: sqlite3.Connection, before_ms: int) -> tuple[int, set[int]]:
    """Delete up to BATCHES_PER_SLICE of the oldest batches without records, and sources without other batches.

    Return the number of batches, and the ids of their sources.
    """
    (first_record,) = db.execute("SELECT coalesce(min(id), 0) FROM record").fetchone()
    last, count, source_ids = 0, 0, set()
    for first_id, end, source_id, received_at_ms in db.execute(
        """SELECT first_id, first_id + count, source_id, received_at_ms FROM batch
            ORDER BY first_id LIMIT ?""",
        (BATCHES_PER_SLICE,),
    ):
        if end > first_record or received_at_ms >= before_ms:
            break
        last, count = first_id, count + 1
        source_ids.add(source_id)
    if count:
        db.execute("DELETE FROM batch WHERE first_id <= ?", (last,))
        db.executemany(
            "DELETE FROM source WHERE id = :id AND NOT EXISTS (SELECT 1 FROM batch WHERE source_id = :id)",
            [{"id": source_id} for source_id in source_ids],
        )
    return count, source_ids


def arrival_times(db: sqlite3.Connection) -> tuple[int | None, int | None]:
    """Return when the oldest and the newest record arrived, in Unix milliseconds; None without records."""
    oldest_ms, newest_ms = db.execute(
        """SELECT (SELECT received_at_ms FROM batch WHERE first_id <= (SELECT min(id) FROM record)
                    ORDER BY first_id DESC LIMIT 1),
                  (SELECT received_at_ms FROM batch ORDER BY first_id DESC LIMIT 1)"""
    ).fetchone()
    return oldest_ms, newest_ms
