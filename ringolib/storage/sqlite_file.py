"""The database file: opening it, making sure that it is ours, whole and nobody else's, and its schema.

Functions only; what they return belongs to `store`. No thread runs here.
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
SPOOL_APPLICATION_ID = 0x52494E53  # "RINS": records are deleted from it, so it must never be taken for the other
_KINDS = {APPLICATION_ID: "a consumer's database", SPOOL_APPLICATION_ID: "a publisher's spool"}
SCHEMA_VERSION = 1
# Files of before have it from their next start on, without a new version: older programs do not mind it.
IDENTITY = "CREATE TABLE IF NOT EXISTS identity(uuid BLOB NOT NULL)"
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
_MAGIC = b"SQLite format 3\0"  # https://www.sqlite.org/fileformat.html#the_database_header
_OLDEST_SQLITE = (3, 32, 0)  # the first to take 1024 parameters by default (up to 32,766)
BUSY_TIMEOUT_MS = 5000
"""How long a commit waits for another program's write lock before it fails."""


def connect(path: str, application_id: int, wal_limit: int) -> sqlite3.Connection:
    """Opens the file for writing, checks that it is ours before anything is changed, and makes the schema.

    A WAL that starts over is cut to `wal_limit` bytes. Raises StoreError.
    """
    if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
        raise StoreError(f"SQLite {sqlite3.sqlite_version} is too old: use a Python built with 3.32 or newer")
    db = None
    try:
        db = sqlite3.connect(os.path.abspath(path), isolation_level=None, check_same_thread=False)
        db.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        (application,) = db.execute("PRAGMA application_id").fetchone()
        (version,) = db.execute("PRAGMA user_version").fetchone()
        (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if application != application_id and (application or version or tables):
            kind = _KINDS.get(application, "another application's database")
            raise StoreError(f"{path} is {kind}, not {_KINDS[application_id]}: name another file")
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"{path} has schema version {version}, this program knows {SCHEMA_VERSION}: use a newer one"
            )
        (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise StoreError(f"{path} cannot use WAL mode (it has {mode}): put it on a local file system")
        db.execute("PRAGMA synchronous = FULL")
        db.execute(f"PRAGMA journal_size_limit = {wal_limit}")
        if not application:
            db.executescript(
                f"""BEGIN IMMEDIATE;
                {SCHEMA}
                PRAGMA application_id = {application_id};
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
        db.execute(IDENTITY)
        if not db.execute("SELECT count(*) FROM identity WHERE length(uuid) = 16").fetchone()[0]:
            db.execute("INSERT INTO identity VALUES (?)", (uuid.uuid4().bytes,))
        db.execute("COMMIT")
        return db
    except BaseException as cause:
        if db is not None:
            db.close()
        if isinstance(cause, sqlite3.Error | UnicodeDecodeError):
            raise StoreError(explain(path, cause)) from cause
        raise


def check_file(path: str, real: str) -> None:
    """Raises StoreError when what is there cannot be a database. `real` is `path` without symbolic links."""
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
    if begin and begin != _MAGIC and not _may_be_torn(real):
        raise StoreError(f"{path} is not a SQLite file: name another one")


def _may_be_torn(real: str) -> bool:
    """True when a power cut may have torn the file's first page: its WAL has it whole, or its journal will undo it.

    By what these files begin with (https://www.sqlite.org/fileformat.html#the_wal_file and #the_rollback_journal): of
    others' files SQLite would delete what it takes for them.
    """
    heads = []
    for name in (f"{real}-wal", f"{real}-journal"):
        try:
            with open(name, "rb") as file:
                heads.append(file.read(12))
        except OSError:
            heads.append(b"")
    wal, journal = heads
    if wal[:4] in (b"\x37\x7f\x06\x82", b"\x37\x7f\x06\x83"):
        size, page_size = os.path.getsize(real), int.from_bytes(wal[8:12], "big")
        return page_size > 0 and (size < page_size or size % page_size == 0)
    return journal.startswith(b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7")


def lock_file(path: str) -> IO[bytes]:
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


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Makes StoreErrors of SQLite's errors."""
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise StoreError(explain(path, error)) from error


def explain(path: str, cause: BaseException) -> str:
    """One line for a person: what SQLite said, and what may help."""
    if isinstance(cause, StoreError):
        return str(cause)
    said = str(cause)
    if isinstance(cause, UnicodeDecodeError) or not said or said.startswith("malformed database schema"):
        said = (
            "database disk image is malformed"  # SQLite names what is wrong, which may be no text: Python 3.10 says ""
        )
    hint = {
        "file is not a database": "its head is damaged: restore it from a backup",
        "database disk image is malformed": "it is corrupt: restore it from a backup",
        "database or disk is full": "make room; what is waiting is stored then",
        "unable to open database file": "check that its directory exists and may be written",
        "attempt to write a readonly database": "check the permissions of the file and its directory",
        "database is locked": "another program holds a write lock on it",
    }.get(said)
    return f"{path}: {said}" + (f" ({hint})" if hint else "")
