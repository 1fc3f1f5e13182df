"""The consumer's database: SQLite in WAL mode, group commit, each (source, sequence) at most once.

Only this room knows SQL. One connection does all writes and checkpoints (SQLite before 3.51.3 can
corrupt a WAL reset when two connections write or checkpoint at once), and an advisory lock on
`PATH-lock` keeps a second server off the file; readers, the `sqlite3` shell say, come and go.

Any thread may `append`. There is no writer thread: the first to come leads, writes what has
gathered until then in one transaction and wakes the others; who came meanwhile waits and is
written by the next leader. `_lock` guards the queue, the leadership and the totals; `_turn` shares
it and is notified when a commit ends. The connection and the cache of sources belong to the leader,
without a lock.

Record ids are dense, so a row of `batch` names its records: `first_id .. first_id + count - 1`.
The batches of one source are disjoint intervals of its sequence; of an arriving run only what they
do not cover yet is stored.
"""

import fcntl
import os
import sqlite3
import threading
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, NamedTuple

from wire import Run

APPLICATION_ID = 0x52494E47  # "RING", https://www.sqlite.org/pragma.html#pragma_application_id
SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE source(
  id INTEGER PRIMARY KEY,
  uuid BLOB UNIQUE NOT NULL
);
CREATE TABLE record(
  id INTEGER PRIMARY KEY,
  value INTEGER NOT NULL
);
CREATE TABLE batch(
  first_id INTEGER PRIMARY KEY,
  count INTEGER NOT NULL,
  source_id INTEGER NOT NULL REFERENCES source(id),
  sequence INTEGER NOT NULL,
  received_at_ms INTEGER NOT NULL,
  UNIQUE(source_id, sequence)
);
CREATE VIEW records AS
  SELECT record.id AS id,
         lower(substr(hex(uuid), 1, 8) || '-' || substr(hex(uuid), 9, 4) || '-' || substr(hex(uuid), 13, 4)
               || '-' || substr(hex(uuid), 17, 4) || '-' || substr(hex(uuid), 21)) AS source,
         batch.sequence + record.id - batch.first_id AS sequence,
         record.value AS value,
         batch.received_at_ms AS received_at_ms
    FROM batch
    JOIN source ON source.id = batch.source_id
    JOIN record ON record.id BETWEEN batch.first_id AND batch.first_id + batch.count - 1;
"""
# Fixed texts, so that sqlite3's statement cache holds them; one statement carries many rows.
_INSERT_RECORDS = {size: "INSERT INTO record(value) VALUES " + ",".join(["(?)"] * size) for size in (1024, 128, 16, 1)}
_MAGIC = b"SQLite format 3\0"  # https://www.sqlite.org/fileformat.html#the_database_header
_OLDEST_SQLITE = (3, 32, 0)  # the first to take 1024 parameters by default (up to 32,766)
_MOST_SOURCES_CACHED = 10_000
MOST_GROUPED = 262_144
"""Records after which a commit takes no more blocks along, so that its memory is bounded."""


class StoreError(Exception):
    """The database cannot be opened, or a commit failed. The text says what happened and what to do."""


class StoreStats(NamedTuple):
    """Totals since the store was opened. Counts are of records, but for `commits`."""

    stored: int
    duplicates: int
    commits: int


class _Source:
    """What is known of a source: its row's id, and where its last stored interval ends."""

    __slots__ = ("id", "end")

    def __init__(self, id: int, end: int) -> None:
        self.id = id
        self.end = end


class _Waiting:
    """One caller's block on its way into a commit; `done` and `error` are guarded by the store's lock."""

    __slots__ = ("runs", "values", "done", "error")

    def __init__(self, runs: Sequence[Run], values: "array[int]") -> None:
        self.runs = runs
        self.values = values
        self.done = False
        self.error: StoreError | None = None


class Store:
    """A database file, made if it is missing. Raises StoreError when it cannot be opened or is not ours."""

    def __init__(self, path: str) -> None:
        self.path = path

        self._lock = threading.Lock()
        self._turn = threading.Condition(self._lock)
        # Guarded by _lock.
        self._queue: list[_Waiting] = []
        self._leading = False
        self._closed = False
        self._stored = 0
        self._duplicates = 0
        self._commits = 0

        # The leader's.
        self._sources: dict[bytes, _Source] = {}
        real = os.path.realpath(path)  # one lock whatever links lead to it
        new_guard = not os.path.exists(f"{real}-lock")
        self._guard = _lock_file(real)
        try:
            _check_file(path)
            self._db = _connect(path)
        except BaseException:
            if new_guard:
                os.unlink(self._guard.name)
            self._guard.close()
            raise

    def append(self, runs: Sequence[Run], values: "array[int]") -> None:
        """Returns when every record of the block is on disk, now or from an earlier time.

        Raises StoreError when that cannot be said; the block may be tried again.
        """
        mine = _Waiting(runs, values)
        with self._lock:
            if self._closed:
                raise StoreError(f"{self.path} is closed")
            self._queue.append(mine)
        while True:
            with self._lock:
                while self._leading and not mine.done:
                    self._turn.wait()
                if mine.done:
                    break
                self._leading = True
                group = self._next_group()
            self._commit(group)
        if mine.error:
            # A new one for each caller: a traceback grows on whatever is raised.
            raise StoreError(str(mine.error)) from mine.error

    def stats(self) -> StoreStats:
        """The totals since the store was opened."""
        with self._lock:
            return StoreStats(self._stored, self._duplicates, self._commits)

    def close(self) -> None:
        """Waits for the commit that runs, then closes the file. Does nothing the second time."""
        with self._lock:
            already, self._closed = self._closed, True
            while self._leading or self._queue:
                self._turn.wait()
        if not already:
            self._db.close()
            self._guard.close()

    def _next_group(self) -> list[_Waiting]:
        """Takes the oldest of the queue, up to MOST_GROUPED records, or one."""
        assert self._lock.locked()
        count, records = 1, len(self._queue[0].values)
        while count < len(self._queue) and records < MOST_GROUPED:
            records += len(self._queue[count].values)
            count += 1
        group, self._queue = self._queue[:count], self._queue[count:]
        return group

    def _commit(self, group: list[_Waiting]) -> None:
        """Writes `group` in one transaction, says so to each of it and gives up the lead."""
        stored = duplicates = 0
        error: StoreError | None = None
        try:
            stored, duplicates = self._write(group)
        except BaseException as cause:
            # A commit that reported an error may have happened all the same: the cache is stale.
            self._sources.clear()
            error = StoreError(_explain(self.path, cause))
            error.__cause__ = cause
        finally:
            with self._lock:
                self._stored += stored
                self._duplicates += duplicates
                self._commits += error is None
                for waiting in group:
                    waiting.done, waiting.error = True, error
                self._leading = False
                self._turn.notify_all()

    def _write(self, group: list[_Waiting]) -> tuple[int, int]:
        """Stores what is new of `group` and returns how many records were stored and how many known."""
        new = array("q")
        arrived = 0
        now = time.time_ns() // 1_000_000
        with self._transaction():
            (last_id,) = self._db.execute("SELECT coalesce(max(id), 0) FROM record").fetchone()
            for waiting in group:
                offset = 0
                for run in waiting.runs:
                    source = self._source(run.source)
                    for first, end in self._missing(source, run):
                        start = offset + first - run.first
                        row = (last_id + 1 + len(new), end - first, source.id, first, now)
                        # At once: the next run of this group may overlap it.
                        self._db.execute("INSERT INTO batch VALUES (?,?,?,?,?)", row)
                        new += waiting.values[start : start + end - first]
                        source.end = max(source.end, end)
                    offset += run.count
                arrived += offset
            self._insert(new)
        return len(new), arrived - len(new)

    def _insert(self, values: "array[int]") -> None:
        """Appends records with the next ids, in order."""
        start = 0
        for size, statement in _INSERT_RECORDS.items():
            while len(values) - start >= size:
                self._db.execute(statement, values[start : start + size])
                start += size

    def _source(self, uuid: bytes) -> _Source:
        """The source of that UUID, made if it is new."""
        source = self._sources.get(uuid)
        if source is None:
            if len(self._sources) >= _MOST_SOURCES_CACHED:
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

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """The only way to write: all of it, on disk, or nothing."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            # After some errors (disk full) SQLite has already rolled back.
            if self._db.in_transaction:
                try:
                    self._db.execute("ROLLBACK")
                except sqlite3.Error:
                    pass  # the first error is the one to report
            raise


def _connect(path: str) -> sqlite3.Connection:
    """Opens the file for writing, checks that it is ours before anything is changed, and makes the schema."""
    if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
        raise StoreError(f"SQLite {sqlite3.sqlite_version} is too old: use a Python built with 3.32 or newer")
    db = None
    try:
        db = sqlite3.connect(os.path.abspath(path), isolation_level=None, check_same_thread=False, timeout=5)
        (application,) = db.execute("PRAGMA application_id").fetchone()
        (version,) = db.execute("PRAGMA user_version").fetchone()
        (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if application != APPLICATION_ID and (application or version or tables):
            raise StoreError(f"{path} is another application's database: name another file")
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"{path} has schema version {version}, this program knows {SCHEMA_VERSION}: use a newer one"
            )
        (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise StoreError(f"{path} cannot use WAL mode (it has {mode}): put it on a local file system")
        db.execute("PRAGMA synchronous = FULL")
        if not application:
            db.executescript(
                f"""BEGIN IMMEDIATE;
                {SCHEMA}
                PRAGMA application_id = {APPLICATION_ID};
                PRAGMA user_version = {SCHEMA_VERSION};
                COMMIT"""
            )
        # Ids are dense and each belongs to a batch: what breaks that is not to be built upon.
        (records,) = db.execute("SELECT coalesce(max(id), 0) FROM record").fetchone()
        last = db.execute("SELECT first_id + count - 1 FROM batch ORDER BY first_id DESC LIMIT 1").fetchone()
        if records != (last[0] if last else 0):
            raise StoreError(f"{path} is corrupt, or was changed by another program: restore it from a backup")
        # Proves, now, that it can be written: a read-only file would fail only at the first record.
        db.execute("BEGIN IMMEDIATE")
        db.execute("ROLLBACK")
        return db
    except BaseException as cause:
        if db is not None:
            db.close()
        if isinstance(cause, sqlite3.Error):
            raise StoreError(_explain(path, cause)) from cause
        raise


def _check_file(path: str) -> None:
    """Raises StoreError when what is there cannot be a database."""
    if os.path.isdir(path):
        raise StoreError(f"{path} is a directory: name a file in it")
    if os.path.exists(path) and not os.path.isfile(path):
        raise StoreError(f"{path} is not a file: name another one")
    try:
        with open(path, "rb") as file:
            begin = file.read(len(_MAGIC))
    except FileNotFoundError:
        return
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error
    if begin and begin != _MAGIC:
        raise StoreError(f"{path} is not a SQLite file: name another one")


def _lock_file(path: str) -> IO[bytes]:
    """Holds `path`-lock for this process as long as it stays open. Raises StoreError if another one holds it."""
    try:
        guard = open(f"{path}-lock", "ab")
    except OSError as error:
        raise StoreError(f"cannot write to {path}: {error.strerror}") from error
    try:
        fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        guard.close()
        if isinstance(error, BlockingIOError):
            raise StoreError(f"{path} is in use by another ringoexp: stop that one, or name another file") from error
        raise StoreError(f"{path} cannot be locked: {error.strerror} (put it on a local file system)") from error
    return guard


def _explain(path: str, cause: BaseException) -> str:
    """One line for a person: what SQLite said, and what may help."""
    said = str(cause)
    hint = {
        "file is not a database": "its head is damaged: restore it from a backup",
        "database disk image is malformed": "it is corrupt: restore it from a backup",
        "database or disk is full": "make room; what is waiting is stored then",
        "unable to open database file": "check that its directory exists and may be written",
        "attempt to write a readonly database": "check the permissions of the file and its directory",
        "database is locked": "another program holds a write lock on it",
    }.get(said)
    return f"{path}: {said}" + (f" ({hint})" if hint else "")
