"""The SQLite file: its schema, and how to open it, lock it and make sure that it is a sound database of this program.

Functions only; the store owns the connection and the lock file that they return. No thread runs here.
"""

import fcntl
import os
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from ringolib.storage.interface import StoreError

APPLICATION_ID = 0x52494E47  # "RING", https://www.sqlite.org/pragma.html#pragma_application_id
SPOOL_APPLICATION_ID = 0x52494E53  # "RINS": its own id, because records are deleted from a spool
_KINDS = {APPLICATION_ID: "a consumer's database", SPOOL_APPLICATION_ID: "a publisher's spool"}
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
         batch.sequence + (record.id - batch.first_id) AS sequence,
         record.value AS value,
         batch.received_at_ms AS received_at_ms
    FROM batch
    JOIN source ON source.id = batch.source_id
    JOIN record ON record.id BETWEEN batch.first_id AND batch.first_id + batch.count - 1;
"""
IDENTITY_SCHEMA = "CREATE TABLE IF NOT EXISTS identity(uuid BLOB NOT NULL)"
"""Added to older files when they are opened. It needs no new schema version: older programs ignore the table."""
BUSY_TIMEOUT_MS = 5000
"""How long a commit waits for another program's write lock before it fails."""
CACHE_KIB = 8 * 1024
"""The limit of SQLite's page cache. A commit changes a page of the index of `batch` for each of its sources.

With 2000 sources, SQLite reads half as many pages as with the default of 2 MB:
https://www.sqlite.org/pragma.html#pragma_cache_size
"""
CHECKPOINT_PAGES = 2000
"""When the WAL has this many pages (8 MB), SQLite copies them into the database file.

A page that several commits have changed is copied once. With 2000 sources and the default of 1000 pages, each commit
would copy all its pages. More is no better for one source: the first commits make the file grow, which costs more.
https://www.sqlite.org/pragma.html#pragma_wal_autocheckpoint
"""
_MAGIC = b"SQLite format 3\0"  # https://www.sqlite.org/fileformat.html#the_database_header
_WAL_MAGICS = (b"\x37\x7f\x06\x82", b"\x37\x7f\x06\x83")  # https://www.sqlite.org/fileformat.html#the_wal_file
_JOURNAL_MAGIC = b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7"  # https://www.sqlite.org/fileformat.html#the_rollback_journal
_MIN_SQLITE = (3, 32, 0)
"""The first version that allows 1024 parameters by default: https://www.sqlite.org/limits.html#max_variable_number"""


def connect(path: str, application_id: int, wal_limit: int) -> sqlite3.Connection:
    """Open the file for writing, and create the schema if the file is empty.

    The kind of the file is checked before anything in it is changed. When SQLite restarts the WAL, it truncates the
    WAL file to `wal_limit` bytes. Raises StoreError.
    """
    if sqlite3.sqlite_version_info < _MIN_SQLITE:
        raise StoreError(f"SQLite {sqlite3.sqlite_version} is too old: use a Python built with SQLite 3.32 or newer")
    db = None
    try:
        db = sqlite3.connect(os.path.abspath(path), isolation_level=None, check_same_thread=False)
        db.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        is_new = _check_kind(db, path, application_id)
        (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise StoreError(f"{path} cannot use WAL mode (it uses {mode} mode): move it to a local file system")
        db.execute("PRAGMA synchronous = FULL")
        db.execute(f"PRAGMA journal_size_limit = {wal_limit}")
        db.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        db.execute(f"PRAGMA cache_size = {-CACHE_KIB}")
        if is_new:
            db.executescript(
                f"""BEGIN IMMEDIATE;
                {SCHEMA}
                PRAGMA application_id = {application_id};
                PRAGMA user_version = {SCHEMA_VERSION};
                COMMIT"""
            )
        _check_batches(db, path)
        _ensure_identity(db)
        return db
    except BaseException as cause:
        if db is not None:
            db.close()
        if isinstance(cause, sqlite3.Error | UnicodeDecodeError):
            raise StoreError(explain(path, cause)) from cause
        raise


def _check_kind(db: sqlite3.Connection, path: str, application_id: int) -> bool:
    """Raise StoreError if the file is of another kind, or newer than this program. True if it is still empty."""
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (version,) = db.execute("PRAGMA user_version").fetchone()
    (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application != application_id and (application or version or tables):
        kind = _KINDS.get(application, "another application's database")
        raise StoreError(f"{path} is {kind}, not {_KINDS[application_id]}: use another file")
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"{path} has schema version {version}, but this program supports only {SCHEMA_VERSION}: use a newer program"
        )
    return not application


def _check_batches(db: sqlite3.Connection, path: str) -> None:
    """Raise StoreError unless the last batch ends at the last record: new ids and batches continue from there."""
    (last_id,) = db.execute("SELECT coalesce(max(id), 0) FROM record").fetchone()
    row = db.execute("SELECT first_id + count - 1 FROM batch ORDER BY first_id DESC LIMIT 1").fetchone()
    if last_id != (row[0] if row else 0):
        raise StoreError(f"{path} is corrupt, or another program has changed it: restore it from a backup")


def _ensure_identity(db: sqlite3.Connection) -> None:
    """Add a random identity to a file without one.

    The transaction also proves that the file is writable: otherwise a read-only file would fail only at the first
    record.
    """
    db.execute("BEGIN IMMEDIATE")
    db.execute(IDENTITY_SCHEMA)
    if not db.execute("SELECT count(*) FROM identity WHERE length(uuid) = 16").fetchone()[0]:
        db.execute("INSERT INTO identity VALUES (?)", (uuid.uuid4().bytes,))
    db.execute("COMMIT")


def read_identity(db: sqlite3.Connection) -> str:
    """Return the identity of the database as a UUID in text form."""
    (identity,) = db.execute("SELECT uuid FROM identity WHERE length(uuid) = 16").fetchone()
    return str(uuid.UUID(bytes=identity))


def count_records(db: sqlite3.Connection) -> int:
    """Return the number of records. It follows from the first and the last id, because ids have no gaps."""
    # With two subqueries, SQLite finds each id in the index; one query for both would read every row:
    # https://www.sqlite.org/optoverview.html#the_min_max_optimization
    sql = "SELECT coalesce((SELECT max(id) FROM record) - (SELECT min(id) FROM record) + 1, 0)"
    return int(db.execute(sql).fetchone()[0])


def check_file(path: str, real_path: str) -> None:
    """Raise StoreError if the file exists and is no SQLite file. `real_path` is `path` without symbolic links."""
    if os.path.isdir(path):
        raise StoreError(f"{path} is a directory: name a file in it")
    if os.path.exists(path) and not os.path.isfile(path):
        raise StoreError(f"{path} is not a regular file: use another one")
    try:
        with open(path, "rb") as file:
            start = file.read(len(_MAGIC))
    except FileNotFoundError:
        return
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error
    if start and start != _MAGIC and not _may_be_torn(real_path):
        raise StoreError(f"{path} is not a SQLite file: use another one")


def _may_be_torn(real_path: str) -> bool:
    """True if a power cut may have torn the first page, and SQLite will repair it from the WAL or the journal.

    The magic numbers of both files are checked: SQLite deletes any other file that has one of these names.
    """
    starts = []
    for name in (f"{real_path}-wal", f"{real_path}-journal"):
        try:
            with open(name, "rb") as file:
                starts.append(file.read(12))
        except OSError:
            starts.append(b"")
    wal, journal = starts
    if wal.startswith(_WAL_MAGICS):
        size, page_size = os.path.getsize(real_path), int.from_bytes(wal[8:12], "big")
        return page_size > 0 and (size < page_size or size % page_size == 0)
    return journal.startswith(_JOURNAL_MAGIC)


def lock_file(path: str) -> IO[bytes]:
    """Open and lock `path`-lock. The lock is held until the file is closed. Raises StoreError if it is not free."""
    try:
        file = open(f"{path}-lock", "ab")
    except OSError as error:
        raise StoreError(
            f"cannot write to {path}: {error.strerror} (check that its directory exists and is writable)"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if isinstance(error, BlockingIOError):
            raise StoreError(f"{path} is in use by another ringoexp: stop that one, or use another file") from error
        raise StoreError(f"{path} cannot be locked: {error.strerror} (move it to a local file system)") from error
    return file


@contextmanager
def store_errors(path: str) -> Iterator[None]:
    """Convert SQLite's errors to StoreError."""
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise StoreError(explain(path, error)) from error


def explain(path: str, cause: BaseException) -> str:
    """Return one line for people: SQLite's message and, where one is known, the remedy."""
    if isinstance(cause, StoreError):
        return str(cause)
    message = str(cause)
    # SQLite quotes the damaged part of a schema, which may be no text; in Python 3.10 the message is empty then.
    if isinstance(cause, UnicodeDecodeError) or not message or message.startswith("malformed database schema"):
        message = "database disk image is malformed"
    remedy = {
        "file is not a database": "its header is damaged: restore it from a backup",
        "database disk image is malformed": "it is corrupt: restore it from a backup",
        "database or disk is full": "make room; the waiting records are stored then",
        "unable to open database file": "check that its directory exists and is writable",
        "attempt to write a readonly database": "check the permissions of the file and its directory",
        "database is locked": "another program holds a write lock: end its transaction",
    }.get(message)
    return f"{path}: {message}" + (f" ({remedy})" if remedy else "")
