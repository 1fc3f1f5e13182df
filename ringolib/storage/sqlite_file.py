"""The SQLite file: its schema, and how to open it and make sure that it is a sound database of this program.

Functions only; the store owns the connection that they return. The thread `check` limits the check of a file that was
not closed in order.
"""

import logging
import os
import sqlite3
import threading
import uuid
from time import monotonic

from ringolib import timing
from ringolib.storage.database_file import DatabaseFile
from ringolib.storage.interface import StoreError
from ringolib.storage.remedies import explain, system_error

log = logging.getLogger("ringoexp.store")

APPLICATION_ID = 0x52494E47  # "RING", https://www.sqlite.org/pragma.html#pragma_application_id
SPOOL_APPLICATION_ID = 0x52494E53  # "RINS": its own id, because records are deleted from a spool
_KINDS = {APPLICATION_ID: "a consumer's database", SPOOL_APPLICATION_ID: "a publisher's spool"}
SCHEMA_VERSION = 1
SOURCE_TEXT = """lower(substr(hex(uuid), 1, 8) || '-' || substr(hex(uuid), 9, 4) || '-' || substr(hex(uuid), 13, 4)
               || '-' || substr(hex(uuid), 17, 4) || '-' || substr(hex(uuid), 21))"""
"""The SQL of a source's UUID as text. SQLite uses the index on it only for this very expression."""
SCHEMA = f"""
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
         {SOURCE_TEXT} AS source,
         batch.sequence + (record.id - batch.first_id) AS sequence,
         record.value AS value,
         batch.received_at_ms AS received_at_ms
    FROM batch
    JOIN source ON source.id = batch.source_id
    JOIN record ON record.id BETWEEN batch.first_id AND batch.first_id + batch.count - 1;
"""
ADDITIONS = (
    # With it, a query of `records` for one source, or grouped by source, begins at the source and not at all batches.
    f"CREATE INDEX IF NOT EXISTS source_text ON source({SOURCE_TEXT})",
    # Records that retention has deleted do not count, although their batches stay for a while. NOT INDEXED: SQLite
    # would read the batches in the order of their sources, which takes three times as long if they are many.
    f"""CREATE VIEW IF NOT EXISTS sources AS
  SELECT {SOURCE_TEXT} AS source, records, first_sequence, last_sequence, first_received_at_ms, last_received_at_ms
    FROM (SELECT source_id,
                 sum(first_id + count - max(first_id, oldest)) AS records,
                 min(sequence + max(oldest - first_id, 0)) AS first_sequence,
                 max(sequence + count - 1) AS last_sequence,
                 min(received_at_ms) AS first_received_at_ms,
                 max(received_at_ms) AS last_received_at_ms
            FROM (SELECT min(id) AS oldest FROM record) CROSS JOIN batch NOT INDEXED
           WHERE first_id + count > oldest
           GROUP BY source_id)
    JOIN source ON source.id = source_id""",
)
"""What files of older programs lack, for readers. It is added when they are opened, if there is room.

It needs no new schema version: older programs ignore the tables and views, and SQLite keeps the index up to date.
"""
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
CHECK_SECONDS = 5.0
"""The limit of the check of a file that was not closed in order. SQLite checks some 300 MB a second."""
_MAGIC = b"SQLite format 3\0"  # https://www.sqlite.org/fileformat.html#the_database_header
_WAL_MAGICS = (b"\x37\x7f\x06\x82", b"\x37\x7f\x06\x83")  # https://www.sqlite.org/fileformat.html#the_wal_file
_JOURNAL_MAGIC = b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7"  # https://www.sqlite.org/fileformat.html#the_rollback_journal
_MIN_SQLITE = (3, 32, 0)
"""The first version that allows 1024 parameters by default: https://www.sqlite.org/limits.html#max_variable_number"""


def connect(file: DatabaseFile, application_id: int, wal_limit: int) -> sqlite3.Connection:
    """Open the file for writing, and create the schema if the file is empty.

    The kind of the file is checked before anything in it is changed. When SQLite restarts the WAL, it truncates the
    WAL file to `wal_limit` bytes. Raises StoreError.
    """
    path = file.path
    if sqlite3.sqlite_version_info < _MIN_SQLITE:
        raise StoreError(f"SQLite {sqlite3.sqlite_version} is too old: use a Python built with SQLite 3.32 or newer")
    _check_magic(file)
    db = None
    try:
        db = sqlite3.connect(file.real_path, isolation_level=None, check_same_thread=False)
        db.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        is_new = _check_kind(db, path, application_id)
        (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise StoreError(f"{path} cannot use WAL mode (it uses {mode} mode): move it to a local file system")
        db.execute("PRAGMA synchronous = FULL")
        # On macOS, fsync(2) leaves data in the drive's cache. Other systems ignore both.
        db.execute("PRAGMA fullfsync = 1")
        db.execute("PRAGMA checkpoint_fullfsync = 1")
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
        if not file.stopped_in_order:
            _check_pages(db, path)
        _check_batches(db, path)
        _add_identity(db)
        _add_to_older_file(db, file)
        return db
    except BaseException as cause:
        error = explain(file, cause) if isinstance(cause, sqlite3.Error | UnicodeDecodeError) else None
        if db is not None:
            db.close()
        if error:
            raise error from cause
        raise


def _check_magic(file: DatabaseFile) -> None:
    """Raise StoreError if the file has content and is no SQLite file."""
    try:
        start = os.pread(file.fd, len(_MAGIC), 0)
    except OSError as error:
        raise system_error(f"cannot read {file.path}", error) from error
    if start and start != _MAGIC and not _may_be_torn(file.real_path):
        raise StoreError(f"{file.path} is not a SQLite file: use another one")


def _check_pages(db: sqlite3.Connection, path: str) -> None:
    """Raise StoreError if pages of the file are damaged, as far as CHECK_SECONDS allow to find out.

    SQLite finds damage only in pages that it reads, so records could be stored in a damaged file for long.
    """
    started = monotonic()
    interrupter = threading.Timer(CHECK_SECONDS, db.interrupt)  # a progress handler is called too rarely
    interrupter.name, interrupter.daemon = "check", True
    timing.start(interrupter)
    complete = True
    try:
        (finding,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if finding != "ok":
            log.debug("database_damaged", {"finding": finding})
            raise sqlite3.DatabaseError("database disk image is malformed")
    except sqlite3.OperationalError as error:
        if str(error) != "interrupted":
            raise
        complete = False
    finally:
        interrupter.cancel()
        interrupter.join()
    log.info("database_checked", {"file": path, "seconds": round(monotonic() - started, 1), "complete": complete})


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


def _add_identity(db: sqlite3.Connection) -> None:
    """Add a random identity if the file has none.

    The transaction also proves that the file is writable: otherwise a read-only file would fail only at the first
    record.
    """
    db.execute("BEGIN IMMEDIATE")
    db.execute("CREATE TABLE IF NOT EXISTS identity(uuid BLOB NOT NULL)")
    if not db.execute("SELECT count(*) FROM identity WHERE length(uuid) = 16").fetchone()[0]:
        db.execute("INSERT INTO identity VALUES (?)", (uuid.uuid4().bytes,))
    db.execute("COMMIT")


def _add_to_older_file(db: sqlite3.Connection, file: DatabaseFile) -> None:
    """Add the ADDITIONS that the file lacks. If the disk has no room for them, the store works without them."""
    try:
        db.execute("BEGIN IMMEDIATE")
        for statement in ADDITIONS:
            db.execute(statement)
        db.execute("COMMIT")
    except sqlite3.OperationalError as cause:
        if db.in_transaction:
            db.execute("ROLLBACK")
        lacks = "until the next start, the index source_text and the view sources are missing"
        log.warning("database_incomplete", {"file": file.path, "reason": f"{explain(file, cause)}; {lacks}"})


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
