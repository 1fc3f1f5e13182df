"""The consumer's database: SQLite in WAL mode, group commit, each (source, sequence) at most once.

Only this room knows SQL, and `database`, which opens the file. One connection does all writes and
checkpoints (SQLite before 3.51.3 can corrupt a WAL reset when two connections write or checkpoint at once),
and an advisory lock on `PATH-lock` keeps a second server off the file; readers, the `sqlite3` shell say, come and go.

Any thread may call any of it; `groupcommit` says who writes. The connection and the cache of sources belong to the
leader, without a lock.

Record ids are dense, so a row of `batch` names its records: `first_id .. first_id + count - 1`.
The batches of one source are disjoint intervals of its sequence; of an arriving run only what they
do not cover yet is stored. `expire` deletes records from the lowest id on and leaves their batches for a time, so that
what is sent again is still known; the newest record stays, as ids go on from it.
"""

import logging
import os
import sqlite3
import time
import uuid
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import chain
from time import monotonic
from typing import NamedTuple

from ringolib.storage.group_commit import CommitResult, GroupCommit, PendingBlock
from ringolib.storage.interface import Sizes, StoreError
from ringolib.storage.sqlite_file import (
    APPLICATION_ID,
    BUSY_TIMEOUT_MS,
    SCHEMA_VERSION,
    check_file,
    connect,
    explain,
    explained,
    lock_file,
)
from ringolib.wire import Block, Run

log = logging.getLogger("ringoexp.store")

# Fixed texts, so that sqlite3's statement cache holds them; one statement carries many rows.
_INSERT_RECORDS = {size: "INSERT INTO record(value) VALUES " + ",".join(["(?)"] * size) for size in (1024, 128, 16, 1)}
_INSERT_BATCHES = {
    size: "INSERT INTO batch VALUES " + ",".join(["(?,?,?,?,?)"] * size) for size in (200, 32, 8, 1)
}
# Ids are dense: no need to count. Each with its own SELECT, or SQLite would look at every row.
_HELD = "SELECT coalesce((SELECT max(id) FROM record) - (SELECT min(id) FROM record) + 1, 0)"
_MAX_SOURCES_CACHED = 10_000
WAL_LARGE = 64 * 1024 * 1024
"""Bytes of WAL, or of free pages in an emptied file, that are given back to the system."""
TRUST_SECONDS = 1.0
"""For how long a commit of records that succeeded shows that the next one would: no check is needed then."""
DOUBT_SECONDS = 15.0
"""For how long one that failed is not made good by a check, which needs less room: by then it was tried again."""
READER_WAIT_MS = 100
"""How long a commit waits for readers that keep a large WAL from starting over: once every WAL_LARGE bytes."""
SLICE = 4096
"""Records that `expire` deletes between two looks at the clock."""
BATCH_SLICE = 256
"""Batches that it forgets in between: each costs as much as some records, as they lie in an index too."""


class Oldest(NamedTuple):
    """The oldest records of a store: whole batches, a run each, and when the first one arrived."""

    block: Block
    last_id: int
    received_at_ms: int  # Unix time


class Expired(NamedTuple):
    """What a call of `expire` did, and what there is now."""

    records: int  # deleted
    batches: int  # forgotten
    more: bool  # it ran out of time before it was done
    oldest_ms: int | None  # when the oldest record that is left came, Unix time; None without records
    newest_ms: int | None  # the newest one
    seconds: float  # for which no commit of records could run


class _Source:
    """What is known of a source: its row's id, and where its last stored interval ends."""

    __slots__ = ("id", "end")

    def __init__(self, id: int, end: int) -> None:
        self.id = id
        self.end = end


class Store(GroupCommit):
    """A database file, made if it is missing. Raises StoreError when it cannot be opened or is not ours.

    `application_id` is the kind of file it is to be: a file of another kind is refused.
    """

    MAX_GROUPED = 262_144
    RUN_COST = 64
    SLOW = 1.0

    def __init__(self, path: str, application_id: int = APPLICATION_ID) -> None:
        super().__init__(path)

        # The leader's.
        self._sources: dict[bytes, _Source] = {}
        self._wal_due = WAL_LARGE  # the size at which the WAL is to start over
        self._wal_kept = False  # by a reader
        real = os.path.realpath(path)  # one lock whatever links lead to it
        self._real = real
        self._wal = f"{real}-wal"
        new_guard = not os.path.exists(f"{real}-lock")
        with ExitStack() as undo:
            self._guard = undo.enter_context(lock_file(real))
            if new_guard:
                undo.callback(os.unlink, self._guard.name)
            check_file(path, real)
            self._db = undo.enter_context(closing(connect(path, application_id, WAL_LARGE)))
            opened = os.stat(real)
            self._file = opened.st_dev, opened.st_ino
            with explained(path):
                self.identity = str(
                    uuid.UUID(bytes=self._db.execute("SELECT uuid FROM identity WHERE length(uuid) = 16").fetchone()[0])
                )
                (self._held,) = self._db.execute(_HELD).fetchone()
            undo.pop_all()

    def oldest(self, most: int) -> Oldest | None:
        """The oldest batches that together have at most `most` records, or the oldest one; None when there is none.

        Raises StoreError when they cannot be read.
        """
        with self._exclusive(), explained(self.path):
            rows: list[tuple[int, int, bytes, int, int]] = []
            count = 0
            for row in self._db.execute(
                """SELECT first_id, count, uuid, sequence, received_at_ms
                     FROM batch JOIN source ON source.id = source_id ORDER BY first_id"""
            ):
                if rows and count + row[1] > most:
                    break
                rows.append(row)
                count += row[1]
            (held,) = self._db.execute(_HELD).fetchone()
            with self._lock:
                self._held = held
            if not rows:
                return None
            first_id, last_id = rows[0][0], rows[-1][0] + rows[-1][1] - 1
            records = self._db.execute(
                "SELECT value FROM record WHERE id BETWEEN ? AND ? ORDER BY id", (first_id, last_id)
            )
            values = array("q", chain.from_iterable(records))
        runs = [Run(uuid, sequence, size) for _, size, uuid, sequence, _ in rows]
        return Oldest(Block(runs, values), last_id, rows[0][4])

    def delete(self, oldest: Oldest) -> None:
        """Deletes what `oldest` returned, and sources left without any; nothing, if that is not the oldest now.

        That is so when they were deleted before, by a transaction that happened but reported an error: then their ids
        may be those of others by now. Raises StoreError when nothing, or perhaps all, was deleted.
        """
        with self._exclusive(), explained(self.path):
            self._tend_wal()
            through = {"last": oldest.last_id}
            with self._transaction():
                batches = self._db.execute(
                    """SELECT uuid, sequence, count FROM batch JOIN source ON source.id = source_id
                        WHERE first_id <= :last ORDER BY first_id""",
                    through,
                )
                if [Run(*batch) for batch in batches] != oldest.block.runs:
                    return
                self._db.execute(
                    """DELETE FROM source WHERE id IN (SELECT source_id FROM batch WHERE first_id <= :last)
                          AND NOT EXISTS (SELECT 1 FROM batch WHERE source_id = source.id AND first_id > :last)""",
                    through,
                )
                self._db.execute("DELETE FROM batch WHERE first_id <= :last", through)
                self._db.execute("DELETE FROM record WHERE id <= :last", through)
                (held,) = self._db.execute(_HELD).fetchone()
                self._sources.clear()
            with self._lock:
                self._held = held
            if not held:
                self._give_back()

    def expire(self, before_ms: int, forget_ms: int, seconds: float) -> Expired:
        """Deletes the oldest records, as far as all of them came before `before_ms`, but never the newest record.

        And forgets the oldest batches, as far as all of them came before `forget_ms` and have no record left, and
        sources without batches: what belonged to them would be stored again. All in one commit, begun soon after
        `seconds` at the latest; 0 only looks. Raises StoreError when nothing, or perhaps all of it, was done.
        """
        records = batches = 0
        more = seconds > 0
        with self._exclusive(), explained(self.path):
            started = monotonic()
            self._tend_wal()
            with self._transaction():
                while more:
                    deleted, forgotten = self._delete_records(before_ms), self._forget_batches(forget_ms)
                    records, batches = records + deleted, batches + forgotten
                    more = bool(deleted or forgotten)
                    if monotonic() - started >= seconds:  # after the first slice: it always gets on
                        break
                (held,) = self._db.execute(_HELD).fetchone()
                oldest_ms, newest_ms = self._db.execute(
                    """SELECT (SELECT received_at_ms FROM batch WHERE first_id <= (SELECT min(id) FROM record)
                                ORDER BY first_id DESC LIMIT 1),
                              (SELECT received_at_ms FROM batch ORDER BY first_id DESC LIMIT 1)"""
                ).fetchone()
            with self._lock:
                self._held = held
            return Expired(records, batches, more, oldest_ms, newest_ms, monotonic() - started)

    def wal_bytes(self) -> int:
        """The size of the WAL: what is stored and not yet copied into the database file, and room for the next."""
        try:
            return os.stat(self._wal).st_size
        except OSError:
            return 0

    def sizes(self) -> Sizes:
        """What it takes of its disk now, and what there is left."""
        try:
            disk = os.statvfs(os.path.dirname(self._real))
            return Sizes(os.stat(self._real).st_size, self.wal_bytes(), disk.f_bavail * disk.f_frsize)
        except OSError:
            return Sizes(0, self.wal_bytes(), None)

    def check(self) -> None:
        """Returns when a commit that changes nothing is on disk. Raises StoreError when that fails.

        The way to find out whether a record would be stored, when no commit of records has just shown it. It is not
        counted as a commit, but its error is the last commit's error.
        """
        if self._committed_within(TRUST_SECONDS):
            return
        error = None
        with self._exclusive():
            try:
                self._tend_wal()
                with self._transaction():
                    self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            except BaseException as cause:
                error = StoreError(explain(self.path, cause))
            with self._lock:
                doubt = monotonic() - self._failed_at < DOUBT_SECONDS
                if error or not doubt:
                    self._error = str(error) if error else None
            if error or not doubt:
                self._note(error)
        if error:
            raise error

    def close(self) -> None:
        """Waits for the commit that runs, then closes the file. Does nothing the second time."""
        if self._close():
            self._db.close()
            self._guard.close()

    def _tend_wal(self) -> None:
        """Has a large WAL start over, empty, unless a reader still needs it; then grows on, for as long as it does.

        SQLite by itself does so only when a commit finds no reader at all, which may be never
        (https://www.sqlite.org/wal.html#avoiding_excessively_large_wal_files).
        """
        size = self.wal_bytes()
        if self._wal_kept and size <= WAL_LARGE:
            self._wal_due, self._wal_kept = WAL_LARGE, False
            log.info("wal_cut", {"bytes": size})
        if size < self._wal_due:
            return
        busy = self._start_wal_over()
        self._wal_due = self.wal_bytes() + WAL_LARGE
        if busy and not self._wal_kept and size > WAL_LARGE:
            self._wal_kept = True
            reason = "a reader holds a transaction: it grows until that ends"
            log.warning("wal_large", {"bytes": size, "reason": reason})

    def _start_wal_over(self) -> bool:
        """Copies the WAL into the file and empties it. True when a reader still needs it after READER_WAIT_MS."""
        self._db.execute(f"PRAGMA busy_timeout = {READER_WAIT_MS}")
        try:
            (busy, _, _) = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            return bool(busy)
        except sqlite3.Error as error:  # the records are safe in the WAL; the commit will say what is wrong
            log.debug("wal_not_cut", {"reason": str(error)})
            return False
        finally:
            self._db.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")

    def _give_back(self) -> None:
        """Makes an empty file small again, if it is large. Raises nothing: what was to be done before it is done."""
        try:
            (free,) = self._db.execute("PRAGMA freelist_count").fetchone()
            (page_size,) = self._db.execute("PRAGMA page_size").fetchone()
            if free * page_size > WAL_LARGE:
                self._db.execute("VACUUM")
                self._start_wal_over()
        except sqlite3.Error as error:  # it will be tried again when it is emptied the next time
            log.warning("spool_not_shrunk", {"reason": str(error)})

    def _write(self, group: list[PendingBlock]) -> CommitResult:
        """Stores what is new of `group`, in one transaction.

        What there is is counted anew each time: a commit that reported an error may have happened all the same.
        """
        self._tend_wal()
        new = array("q")
        arrived = 0
        rows: list[int] = []  # of `batch`, end to end, that are not inserted yet
        now = time.time_ns() // 1_000_000
        with self._transaction():
            (last_id,) = self._db.execute("SELECT coalesce(max(id), 0) FROM record").fetchone()
            next_id = last_id + 1
            for waiting in group:
                offset = 0
                whole = True  # all of the block so far is new, and not in `new` yet
                for run in waiting.runs:
                    source = self._sources.get(run.source) or self._source(run.source)
                    if run.first >= source.end:
                        rows += (next_id, run.count, source.id, run.first, now)
                        next_id += run.count
                        source.end = run.first + run.count
                        if not whole:
                            new += waiting.values[offset : offset + run.count]
                    else:
                        if whole:
                            new += waiting.values[:offset]
                            whole = False
                        self._insert_batches(rows)  # the runs before may overlap this one
                        for first, end in self._missing(source, run):
                            start = offset + first - run.first
                            rows += (next_id, end - first, source.id, first, now)
                            next_id += end - first
                            new += waiting.values[start : start + end - first]
                            source.end = max(source.end, end)
                    offset += run.count
                if whole:
                    new += waiting.values
                arrived += offset
            self._insert_batches(rows)
            self._insert(new)
            (held,) = self._db.execute(_HELD).fetchone()
        return CommitResult(len(new), arrived - len(new), held)

    def _failed(self, cause: BaseException) -> StoreError:
        """The error in a line. A commit that reported one may have happened all the same: the cache is stale."""
        self._sources.clear()
        self._wal_due = 0  # a disk that is full may be full of WAL
        return StoreError(explain(self.path, cause))

    def _slow(self) -> dict[str, object]:
        """The WAL may be why."""
        return {"wal_bytes": self.wal_bytes()}

    def _insert(self, values: "array[int]") -> None:
        """Appends records with the next ids, in order."""
        start = 0
        for size, statement in _INSERT_RECORDS.items():
            while len(values) - start >= size:
                self._db.execute(statement, values[start : start + size])
                start += size

    def _insert_batches(self, rows: list[int]) -> None:
        """Insert rows of `batch`, given end to end, and empty the list."""
        start, left = 0, len(rows) // 5
        for size, statement in _INSERT_BATCHES.items():
            while left >= size:
                self._db.execute(statement, rows[start : start + 5 * size])
                start += 5 * size
                left -= size
        rows.clear()

    def _delete_records(self, before_ms: int) -> int:
        """Deletes up to SLICE of the oldest records; how many. A batch may lose a part of its records."""
        (first,) = self._db.execute("SELECT min(id) FROM record").fetchone()
        if first is None:
            return 0
        (newest,) = self._db.execute("SELECT max(id) FROM record").fetchone()
        last, most = first - 1, min(first + SLICE, newest) - 1
        # In the order of ids, up to the first that is not old enough: a batch did not come before an earlier one,
        # whatever the clock said then.
        for end, received_at_ms in self._db.execute(
            """SELECT first_id + count - 1, received_at_ms FROM batch
                WHERE first_id >= (SELECT max(first_id) FROM batch WHERE first_id <= ?) ORDER BY first_id""",
            (first,),
        ):
            if received_at_ms >= before_ms or last >= most:
                break
            last = min(end, most)
        self._db.execute("DELETE FROM record WHERE id <= ?", (last,))
        return int(last - first + 1)

    def _forget_batches(self, before_ms: int) -> int:
        """Forgets up to BATCH_SLICE of the oldest batches without records, and sources without others; how many."""
        (first,) = self._db.execute("SELECT coalesce(min(id), 0) FROM record").fetchone()
        last, gone, count = 0, set(), 0
        for first_id, end, source_id, received_at_ms in self._db.execute(
            """SELECT first_id, first_id + count, source_id, received_at_ms FROM batch
                ORDER BY first_id LIMIT ?""",
            (BATCH_SLICE,),
        ):
            if end > first or received_at_ms >= before_ms:
                break
            last, count = first_id, count + 1
            gone.add(source_id)
        if count:
            self._db.execute("DELETE FROM batch WHERE first_id <= ?", (last,))
            self._db.executemany(
                "DELETE FROM source WHERE id = :id AND NOT EXISTS (SELECT 1 FROM batch WHERE source_id = :id)",
                [{"id": source_id} for source_id in gone],
            )
            # Their rows' ids may be given to others.
            self._sources = {uuid: source for uuid, source in self._sources.items() if source.id not in gone}
        return count

    def _source(self, uuid: bytes) -> _Source:
        """The source of that UUID, made if it is new."""
        source = self._sources.get(uuid)
        if source is None:
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

    def _missing(self, source: _Source, run: Run) -> list[tuple[int, int]]:
        """The parts `[first, end)` of `run` that are not stored yet, in order."""
        first, end = run.first, run.first + run.count
        if first >= source.end:
            return [(first, end)]
        # Disjoint intervals: of those that begin before the run only the last can reach into it.
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

    def _check_place(self) -> None:
        """Raises StoreError when the file is not where it was opened any more: what goes into it then nobody finds."""
        try:
            found = os.stat(self._real)
            os.stat(self._wal)
        except FileNotFoundError:
            found = None
        if found is None or (found.st_dev, found.st_ino) != self._file:
            raise StoreError(
                f"{self.path}: it, or its -wal file, was removed or replaced while it was open: stop this server first"
            )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """The only way to write: all of it, on disk, or nothing."""
        if self._db.in_transaction:  # the last one could not even be rolled back
            self._db.execute("ROLLBACK")
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
            self._check_place()
        except BaseException:
            # After some errors (disk full) SQLite has already rolled back.
            if self._db.in_transaction:
                try:
                    self._db.execute("ROLLBACK")
                except sqlite3.Error:
                    pass  # the first error is the one to report
            raise
