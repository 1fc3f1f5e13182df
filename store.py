"""The SQLite store: WAL mode, group commit, and each (source, sequence) at most once.

One connection does all writes and checkpoints: SQLite before 3.51.3 can corrupt a database if two connections reset
the WAL at the same time (https://www.sqlite.org/wal.html#walresetbug). `storage.database_file` keeps a second server
off the file. Readers, for example the `sqlite3` shell, need no lock. They delay a commit by at most
READER_WAIT_MS, once for every LARGE_WAL_BYTES of WAL.

Any thread may call any method. `storage.group_commit` gives turns: only the thread that holds the turn uses the
connection and the cache of sources, so they need no lock. `storage.oldest` reads and deletes the oldest records.

Record ids have no gaps, so a row of `batch` describes the records `first_id` to `first_id + count - 1`. The batches of
one source are disjoint intervals of its sequence. Of an arriving run, only the parts that no batch covers are stored.
Retention deletes records from the lowest id on and keeps their batches for a while, so that a record that is sent again
is still known as a duplicate. Retention never deletes the newest record, because ids continue from it.
"""

import logging
import os
import sqlite3
import time
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from time import monotonic
from typing import NamedTuple

from ringolib.storage import wal
from ringolib.storage.database_file import DatabaseFile
from ringolib.storage.group_commit import CommitResult, GroupCommit, PendingBlock
from ringolib.storage.interface import Page, Query, Sizes, StoreError
from ringolib.storage.oldest import (
    ExpireResult,
    OldestBatches,
    arrival_times,
    delete_expired,
    delete_oldest,
    read_oldest,
)
from ringolib.storage.reading import Reading
from ringolib.storage.remedies import NoRoom, explain, store_errors
from ringolib.storage.sqlite_file import (
    APPLICATION_ID,
    SCHEMA_VERSION,
    connect,
    count_records,
    read_identity,
)
from ringolib.storage.wal import Wal, WalCut
from ringolib.wire import Run

log = logging.getLogger("ringoexp.store")


# One statement inserts many rows. The texts are constant, so that sqlite3 keeps the prepared statements in its cache.
# LIMIT skips the rest of the rows, so that one statement is enough for any number: after each statement, Python's lock
# must be taken again, which takes long while another thread is busy.
# OR ROLLBACK, because a failed statement fails the whole transaction anyway. Without it, SQLite copies each page that a
# statement changes to a temporary file first: section 2.5 of https://www.sqlite.org/tempfiles.html
def _insert_statements(table: str, columns: int, sizes: tuple[int, ...]) -> dict[int, str]:
    """Return for each number of rows a statement that inserts up to as many; its last parameter is the real number."""
    row = f"({','.join('?' * columns)})"
    return {
        size: f"INSERT OR ROLLBACK INTO {table} SELECT * FROM (VALUES {','.join([row] * size)}) LIMIT ?"
        for size in sizes
    }


BATCH_COLUMNS = 5
_INSERT_RECORDS = _insert_statements("record(value)", 1, (1, 16, 128, 1024))
_INSERT_BATCHES = _insert_statements("batch", BATCH_COLUMNS, (1, 8, 40, 200))
_UNUSED = array("q", bytes(8 * 1024))  # for the rows that LIMIT skips
_MAX_SOURCES_CACHED = 10_000
_FIND_SOURCES = {size: f"SELECT 1 FROM source WHERE uuid IN ({','.join('?' * size)}) LIMIT 1" for size in (64, 16, 4)}
_INSERT_SOURCES = {
    size: "INSERT OR ROLLBACK INTO source(uuid) VALUES " + ",".join(["(?)"] * size) for size in _FIND_SOURCES
}
SUCCESS_VALID_SECONDS = 1.0
"""A commit of records that succeeded this recently proves that the next one would: no check is needed."""
FAILURE_VALID_SECONDS = 15.0
"""The error of a failed commit stays for this long, even if a check succeeds: a check needs less room than records.
Clients retry within this time.
"""


class Ids(NamedTuple):
    """The last id of a record, and how many records there are."""

    last: int
    total: int


class _Source:
    """A cached source: the id of its row, and the end of its last stored interval."""

    __slots__ = ("id", "end")

    def __init__(self, id: int, end: int) -> None:
        self.id = id
        self.end = end


class Store(GroupCommit):
    """A database file; it is created if it does not exist. Raises StoreError if it cannot be opened.

    `application_id` is the expected kind of file; files of other kinds are refused.
    """

    MAX_GROUP_COST = 262_144
    RUN_COST = 64
    SLOW_COMMIT_SECONDS = 1.0

    def __init__(self, path: str, application_id: int = APPLICATION_ID) -> None:
        super().__init__(path)

        # Used only by the thread that holds the turn.
        self._sources: dict[bytes, _Source] = {}
        self._ids: Ids | None = None  # None: to be read again
        with ExitStack() as undo:
            self._file = DatabaseFile(path)
            undo.callback(self._file.discard)
            self._db = undo.enter_context(closing(connect(self._file, application_id, wal.LARGE_WAL_BYTES)))
            self._file.check_in_place()
            self._wal = undo.enter_context(closing(Wal(self._db, self._file)))
            with store_errors(self._file):
                self.identity = read_identity(self._db)
                self._held = count_records(self._db)
            undo.pop_all()
        self._reading = Reading(self._file)
        self._file.warn_of_file_system()

    def oldest(self, limit: int) -> OldestBatches | None:
        """Return the oldest batches that together have at most `limit` records, but at least one batch; None if empty.

        Raises StoreError if they cannot be read.
        """
        with self._exclusive(), store_errors(self._file):
            self._set_held(count_records(self._db))
            self._ids = None
            return read_oldest(self._db, limit)

    def delete(self, oldest: OldestBatches) -> None:
        """Delete batches that `oldest` returned; do nothing if they are not the oldest any more.

        Raises StoreError if the deletion may not have happened.
        """
        with self._exclusive(), store_errors(self._file):
            self._ids = None
            with self._transaction():
                if not delete_oldest(self._db, oldest):
                    return
                held = count_records(self._db)
                self._sources.clear()
            self._set_held(held)
            if not held:
                self._shrink_empty_file()

    def expire(self, before_ms: int, forget_ms: int, seconds: float) -> ExpireResult:
        """Delete records that arrived before `before_ms`, oldest first, except the newest record of the store.

        Also delete batches that arrived before `forget_ms` and have no records left; a record of theirs that is sent
        again is stored again. All is done in one transaction, which ends soon after `seconds`; with 0, nothing is
        deleted. Raises StoreError if the deletions may not have happened.
        """
        records, batches, more = 0, 0, False
        with self._exclusive(), store_errors(self._file):
            started = monotonic()
            self._ids = None
            with self._transaction():
                if seconds > 0:
                    records, batches, gone, more = delete_expired(self._db, before_ms, forget_ms, started + seconds)
                    if gone:  # other sources may get their ids
                        self._sources = {uuid: row for uuid, row in self._sources.items() if row.id not in gone}
                held = count_records(self._db)
                oldest_ms, newest_ms = arrival_times(self._db)
            self._set_held(held)
            return ExpireResult(records, batches, more, oldest_ms, newest_ms, monotonic() - started)

    def read(self, query: Query) -> Page:
        """Return a page of records, over a connection of its own: see `storage.reading`."""
        return self._reading.read(query)

    def sizes(self) -> Sizes:
        """Return the sizes of the files and the free space on their disk."""
        try:
            disk = os.statvfs(os.path.dirname(self._file.real_path))
            return Sizes(os.stat(self._file.real_path).st_size, self._wal.size(), disk.f_bavail * disk.f_frsize)
        except OSError:
            return Sizes(0, self._wal.size(), None)

    def check(self) -> None:
        """Return once a commit that changes nothing is on disk, or at once after a recent commit of records.

        A check is not counted as a commit, but its error becomes the error in the stats. Raises StoreError if it fails.
        """
        if self._committed_within(SUCCESS_VALID_SECONDS):
            return
        error = failing_since = None
        with self._exclusive():
            try:
                with self._transaction():
                    self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            except BaseException as cause:
                error = explain(self._file, cause)
            with self._lock:
                conclusive = bool(error) or monotonic() - self._failed_at >= FAILURE_VALID_SECONDS
                if conclusive:
                    self._error = str(error) if error else None
            if conclusive:
                failing_since = self._note_outcome(error)
        if failing_since is not None:
            self._log_outcome(error, failing_since)
        if error:
            raise error

    def close(self) -> bool:
        """Wait for the running commit, then close the file. A second call does nothing.

        Return False if the file or its WAL was removed, replaced or truncated meanwhile.
        """
        intact = True
        if self._close():
            self._reading.close()
            try:
                self._check_in_place()
            except StoreError as error:
                intact = isinstance(error, NoRoom)
                self._log_outcome(error, self._note_outcome(error))
                if isinstance(error, NoRoom | WalCut):
                    self._file.keep_wal()
            self._wal.close()
            self._db.close()
            self._file.close()
        return intact

    # Commits. The thread that holds the turn calls everything below.

    def _write(self, group: list[PendingBlock]) -> CommitResult:
        """Store the new records of `group` in one transaction.

        The last id and the number of records are kept in memory. They are read again after an error, because a commit
        may have happened although it reported one, and after records were deleted.
        """
        arrived = sum(len(block.values) for block in group)
        now_ms = time.time_ns() // 1_000_000
        with self._transaction():
            if self._ids is None:
                (last,) = self._db.execute("SELECT coalesce(max(id), 0) FROM record").fetchone()
                self._ids = Ids(last, count_records(self._db))
            ids, self._ids = self._ids, None  # None again until this commit has succeeded
            new, batches = array("q"), array("q")
            next_id = ids.last + 1
            self._insert_new_sources(group)
            for block in group:
                next_id = self._collect_new(block, next_id, now_ms, new, batches)
            self._insert_batches(batches)
            self._insert_records(new)
        self._ids = Ids(next_id - 1, ids.total + len(new))
        return CommitResult(len(new), arrived - len(new), self._ids.total)

    def _collect_new(
        self, block: PendingBlock, next_id: int, now_ms: int, new: "array[int]", batches: "array[int]"
    ) -> int:
        """Append the block's new values to `new` and the rows of their batches to `batches`; return the next id.

        A row that an earlier row of the same group may overlap is looked up in the database, so `batches` is inserted
        before.
        """
        whole = True  # all runs so far are new as a whole, and their values are not in `new` yet
        offset = 0
        for run in block.runs:
            source = self._sources.get(run.source)
            if source is None:
                self._insert_batches(batches)  # the look-up must see the rows of a source that has left the cache
                source = self._source(run.source)
            if run.first >= source.end:
                batches.extend((next_id, run.count, source.id, run.first, now_ms))
                next_id += run.count
                source.end = run.first + run.count
                if not whole:
                    new += block.values[offset : offset + run.count]
            else:
                if whole:
                    new += block.values[:offset]
                    whole = False
                self._insert_batches(batches)
                for first, end in self._missing_parts(source, run):
                    start = offset + first - run.first
                    batches.extend((next_id, end - first, source.id, first, now_ms))
                    next_id += end - first
                    new += block.values[start : start + end - first]
                    source.end = max(source.end, end)
            offset += run.count
        if whole:
            new += block.values
        return next_id

    def _describe_failure(self, cause: BaseException) -> StoreError:
        self._sources.clear()  # the caches may be wrong, whether the commit happened or not
        self._ids = None
        self._wal.limit = 0  # empty the WAL before the next commit: it may be the WAL that fills the disk
        return explain(self._file, cause)

    def _slow_commit_details(self) -> dict[str, object]:
        return {"wal_bytes": self._wal.size()}

    def _insert_batches(self, rows: "array[int]") -> None:
        """Insert rows of `batch`, given end to end, and empty the array."""
        self._insert(_INSERT_BATCHES, BATCH_COLUMNS, rows)
        del rows[:]

    def _insert_records(self, values: "array[int]") -> None:
        """Insert records. Their ids follow the last one."""
        self._insert(_INSERT_RECORDS, 1, values)

    def _insert(self, statements: dict[int, str], columns: int, numbers: "array[int]") -> None:
        """Insert rows of so many columns, given end to end."""
        largest = max(statements)
        for start in range(0, len(numbers), largest * columns):
            part = numbers[start : start + largest * columns]
            rows = len(part) // columns
            size = next(size for size in statements if size >= rows)
            part += _UNUSED[: (size - rows) * columns]
            part.append(rows)
            self._db.execute(statements[size], part)

    def _insert_new_sources(self, group: list[PendingBlock]) -> None:
        """Insert sources that are new, many with one statement, and cache them. `_source` does the rest.

        Each request of an HTTP client has a source of its own.
        """
        uuids = dict.fromkeys(run.source for block in group for run in block.runs)
        unknown = [uuid for uuid in uuids if uuid not in self._sources][:_MAX_SOURCES_CACHED]
        if len(self._sources) + len(unknown) > _MAX_SOURCES_CACHED:
            self._sources.clear()
        start = 0
        for size, insert in _INSERT_SOURCES.items():
            while len(unknown) - start >= size:
                part = unknown[start : start + size]
                start += size
                if self._db.execute(_FIND_SOURCES[size], part).fetchone():
                    continue
                last_id = self._db.execute(insert, part).lastrowid or 0
                # Their ids have no gaps: no other connection writes during the transaction.
                self._sources.update(
                    zip(part, (_Source(last_id - size + n, 0) for n in range(1, size + 1)), strict=True)
                )

    def _source(self, uuid: bytes) -> _Source:
        """Return the source with this UUID from the database, and cache it; insert it if it is new."""
        if len(self._sources) >= _MAX_SOURCES_CACHED:
            self._sources.clear()
        row = self._db.execute("SELECT id FROM source WHERE uuid = ?", (uuid,)).fetchone()
        if row is None:
            cursor = self._db.execute("INSERT INTO source(uuid) VALUES (?)", (uuid,))
            source = _Source(cursor.lastrowid or 0, 0)
        else:
            end = self._db.execute(
                "SELECT sequence + count FROM batch WHERE source_id = ? ORDER BY sequence DESC LIMIT 1",
                row,
            ).fetchone()
            source = _Source(row[0], end[0] if end else 0)
        self._sources[uuid] = source
        return source

    def _missing_parts(self, source: _Source, run: Run) -> list[tuple[int, int]]:
        """Return the parts `[first, end)` of `run` that are not stored yet, in order."""
        first, end = run.first, run.first + run.count
        if first >= source.end:
            return [(first, end)]
        # Stored intervals are disjoint, so of all that begin before the run, only the last can overlap it.
        stored = self._db.execute(
            """SELECT sequence, sequence + count FROM batch WHERE source_id = :source AND sequence < :end
                  AND sequence >= coalesce((SELECT max(sequence) FROM batch
                                             WHERE source_id = :source AND sequence <= :first), 0)
                ORDER BY sequence""",
            {"source": source.id, "first": first, "end": end},
        )
        missing = []
        for stored_first, stored_end in stored:
            if first < stored_first:
                missing.append((first, stored_first))
            first = max(first, stored_end)
        if first < end:
            missing.append((first, end))
        return missing

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Commit the statements of the block, synced to disk, or roll them back. All writes go through here."""
        if self._db.in_transaction:  # even the rollback of the last transaction failed
            self._db.execute("ROLLBACK")
        self._check_in_place()
        self._wal.empty_if_large()
        # Not a deferred BEGIN: its upgrade to a write lock would ignore the busy timeout.
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
            self._wal.on_commit()
        except BaseException:
            # SQLite rolls back by itself after some errors, for example a full disk:
            # https://www.sqlite.org/lang_transaction.html#response_to_errors_within_a_transaction
            if self._db.in_transaction:
                try:
                    self._db.execute("ROLLBACK")
                except sqlite3.Error:
                    pass  # the first error is the one to report
            raise

    def _check_in_place(self) -> None:
        """Raise StoreError if the file or its WAL is not as the last commit left it."""
        self._file.check_in_place()
        self._wal.check_in_place()
        self._file.check_room()

    def _shrink_empty_file(self) -> None:
        """Shrink the file if it has no records and much free space. Errors are logged: the deletion itself succeeded.

        https://www.sqlite.org/lang_vacuum.html
        """
        try:
            (free_pages,) = self._db.execute("PRAGMA freelist_count").fetchone()
            (page_size,) = self._db.execute("PRAGMA page_size").fetchone()
            if free_pages * page_size > wal.LARGE_WAL_BYTES:
                self._db.execute("VACUUM")
                self._wal.empty()
        except sqlite3.Error as error:  # the next deletion that empties the file tries again
            log.warning("spool_not_shrunk", {"reason": str(error)})
