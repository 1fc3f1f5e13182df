"""Reads the stored records of a SQLite database in pages, for `GET /v1.0/records`.

One read-only connection serves all readers in turn; `_turn` guards it. SQLite makes the text of a page in one call, so
Python's lock is free meanwhile. Each page has a read transaction of its own: a reader never keeps the WAL from being
emptied for longer than a page.

If records were committed since the last page, the connection rests for up to REST_RATIO times the processor time of the
page, and for MAX_REST_SECONDS at most. It rests for less if the rest of the process uses less than FULL_REST_CORES, and
hardly at all if few records arrive. So readers slow the storing of records by a few percent; by more only if a page
takes longer than a thirtieth of a second. While nothing is stored, they do not rest.
"""

import os
import sqlite3
import threading
from time import monotonic, process_time, thread_time
from typing import Any
from urllib.parse import quote

from ringolib.storage import sqlite_file
from ringolib.storage.database_file import DatabaseFile
from ringolib.storage.interface import PAGE_RECORDS, Page, Query, StoreError
from ringolib.storage.sqlite_file import SOURCE_TEXT

REST_RATIO = 64.0
FULL_REST_CORES = 0.5
"""A busy server may get no more, if other programs use the processors, too."""
MAX_REST_SECONDS = 2.0
"""Shorter than TURN_SECONDS, so that a page that takes long does not make the next reader fail."""
TURN_SECONDS = 10.0
"""How long a reader waits for its turn before it fails."""
NEAR_BATCHES = 32 * 1024
"""Batches among which the records of one source are looked for before all batches of the source are read."""

_TIME = "strftime('%Y-%m-%dT%H:%M:%S', received_at_ms / 1000, 'unixepoch') || printf('.%03dZ', received_at_ms % 1000)"
_LINES = {
    "ndjson": (
        f"""'", "source": "' || {SOURCE_TEXT} || '", "sequence": '""",
        f"""', "received_at": "' || {_TIME} || '"}}'""",
        """'{"id": "' || record.id || part.source || (part.shift + record.id) || ', "value": ' || value || part.time""",
    ),
    "csv": (
        f"',' || {SOURCE_TEXT} || ','",
        f"',' || {_TIME}",
        "record.id || part.source || (part.shift + record.id) || ',' || value || part.time",
    ),
    "text": ("''", "''", "value"),
}
"""The SQL of a line: the parts with the source and with the time, made once for each batch, and the whole."""


_CHOICES = {"all": "", "near": "+batch.source_id = :source AND ", "far": "batch.source_id = :source AND +"}
"""The SQL that chooses the batches of a page.

The + keeps SQLite from using an index: it reads all batches between the first and the last one (`near`), or all batches
of the source (`far`).
"""


def _page_statement(form: str, order: str, choice: str) -> str:
    """Return the SQL of a page: the records of the batches from `:batch` on, with ids from `:first` to `:last`."""
    source, time, line = _LINES[form]
    return f"""
    SELECT CAST(group_concat(line, char(10)) || char(10) AS BLOB), count(*), min(id), max(id) FROM (
      SELECT record.id AS id, {line} AS line
        FROM (SELECT first_id, first_id + count - 1 AS last_id, sequence - first_id AS shift,
                     {source} AS source, {time} AS time
                FROM batch JOIN source ON source.id = batch.source_id
               WHERE {_CHOICES[choice]}batch.first_id BETWEEN :batch AND :last ORDER BY first_id LIMIT -1) AS part
        CROSS JOIN record ON record.id BETWEEN max(part.first_id, :first) AND min(part.last_id, :last)
       ORDER BY record.id {order} LIMIT -1)"""


_STATEMENTS = {
    (form, descending, choice): _page_statement(form, "DESC" if descending else "ASC", choice)
    for form in _LINES
    for descending in (False, True)
    for choice in _CHOICES
}


class Reading:
    """The connection for readers of the database file. It opens with the first page."""

    def __init__(self, file: DatabaseFile) -> None:
        self._file = file
        self._path = file.path
        self._closed = threading.Event()  # ends the rest, too
        self._turn = threading.Lock()
        # Guarded by _turn.
        self._db: sqlite3.Connection | None = None
        self._version = 0  # SQLite's number of the last commit that a page has seen
        self._rest_until = 0.0  # monotonic seconds
        self._ended_at, self._used = monotonic(), process_time()  # the end of the last page, in seconds of both clocks

    def read(self, query: Query) -> Page:
        """Return the next page of a query. Raises ValueError if `after` is no id of this database, or StoreError."""
        if not self._turn.acquire(timeout=TURN_SECONDS):
            raise StoreError(f"{self._path}: other readers are busy: retry later, or with a lower limit")
        try:
            if self._closed.wait(max(0.0, self._rest_until - monotonic())):
                raise StoreError(f"{self._path} is closed")
            started = thread_time()
            db = self._db = self._db or self._connect()
            db.execute("BEGIN")
            try:
                page = _read_page(db, query)
                (version,) = db.execute("PRAGMA data_version").fetchone()
            finally:
                db.execute("COMMIT")
            self._plan_rest(thread_time() - started, version != self._version)
            self._version = version
            return page
        except sqlite3.Error as error:
            raise StoreError(f"{self._path}: cannot read: {error}") from error
        finally:
            self._turn.release()

    def close(self) -> None:
        """Wait for the page that is being read, then close the connection."""
        self._closed.set()
        with self._turn:
            if self._db:
                self._db.close()

    def _plan_rest(self, cost: float, has_commits: bool) -> None:
        """Decide how long to rest after a page that took `cost` seconds of processor time."""
        now, used = monotonic(), process_time()
        if has_commits:
            cores = (used - self._used - cost) / max(now - self._ended_at, 1e-6)  # that the other threads have used
            share = min(1.0, max(0.0, cores / FULL_REST_CORES))
            self._rest_until = now + min(MAX_REST_SECONDS, REST_RATIO * cost * share)
        self._ended_at, self._used = now, used

    def _connect(self) -> sqlite3.Connection:
        self._file.check_in_place()  # the path may lead to another database by now
        uri = f"file:{quote(os.fsencode(self._file.real_path))}?mode=ro"
        db = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
        db.execute(f"PRAGMA busy_timeout = {sqlite_file.BUSY_TIMEOUT_MS}")
        return db


def _read_page(db: sqlite3.Connection, query: Query) -> Page:
    (oldest, newest) = db.execute("SELECT (SELECT min(id) FROM record), (SELECT max(id) FROM record)").fetchone()
    after = None if query.after is None else _parse_id(query.after, newest or 0)
    if newest is None:
        return Page(b"", 0, query.after or "0", False)
    first, last = oldest, newest
    if query.since_ms is not None:
        first = max(first, _first_since(db, query.since_ms, newest))
    if after is not None and query.descending:
        last = min(last, after - 1)
    elif after is not None:
        first = max(first, after + 1)
    before = str(last + 1) if query.descending else str(first - 1)  # the `after` that leads to the same place
    source = None
    if query.source is not None:
        row = db.execute("SELECT id FROM source WHERE uuid = ?", (query.source,)).fetchone()
        source = row[0] if row else None
        if source is None:
            return Page(b"", 0, before if query.descending else str(max(newest, first - 1)), False)
    if first > last:
        return Page(b"", 0, before, False)
    limit = min(query.limit, PAGE_RECORDS)
    end, more, choice = _page_end(db, query.descending, first, last, source, limit)
    low, high = (end, last) if query.descending else (first, end)
    parameters = {"batch": _batch_of(db, low), "first": low, "last": high, "source": source}
    statement = _STATEMENTS[query.form, query.descending, choice]
    lines, count, lowest, highest = db.execute(statement, parameters).fetchone()
    if not count:
        return Page(b"", 0, before if query.descending else str(end), more)
    return Page(lines, count, str(lowest if query.descending else highest if more or source is None else last), more)


def _parse_id(text: str, newest: int) -> int:
    """Return the id in a cursor. Raises ValueError if no record has had this id yet."""
    if not (text.isascii() and text.isdigit() and len(text) <= 19):
        raise ValueError("it must be a cursor of an earlier answer, or the id of a record")
    if int(text) > newest:
        raise ValueError("no record has this id yet: the cursor is of another database")
    return int(text)


def _batch_of(db: sqlite3.Connection, record: int) -> int:
    """Return the first id of the batch that has a record."""
    (first,) = db.execute("SELECT coalesce(max(first_id), 0) FROM batch WHERE first_id <= ?", (record,)).fetchone()
    return int(first)


def _first_since(db: sqlite3.Connection, since_ms: int, newest: int) -> int:
    """Return the id of the first record that arrived at `since_ms` or later; newest + 1 if no record did.

    The batches are in the order of their arrival, so a binary search finds it. If the clock was set back, it finds one
    of the places where the time passes `since_ms`.
    """
    low, high = 1, newest + 1
    while low < high:
        middle = (low + high) // 2
        first_id, received_at_ms = db.execute(
            "SELECT first_id, received_at_ms FROM batch WHERE first_id <= ? ORDER BY first_id DESC LIMIT 1", (middle,)
        ).fetchone() or (0, -1)
        if received_at_ms >= since_ms:
            high = first_id
        else:
            low = middle + 1
    return low


def _page_end(
    db: sqlite3.Connection, descending: bool, first: int, last: int, source: Any, limit: int
) -> tuple[int, bool, str]:
    """Return the last id of a page of `limit` records, in its order, whether more ids follow, and which of _CHOICES."""
    if source is None:
        end = max(first, last - limit + 1) if descending else min(last, first + limit - 1)
        return end, end != (first if descending else last), "all"
    choice, batches = _batches_of(db, descending, _batch_of(db, first), last, source, limit + 1)
    for batch_first, batch_last in batches:  # one of them may have lost its records
        low, high = max(batch_first, first), min(batch_last, last)
        count = max(0, high - low + 1)
        if count >= limit:
            end = high - limit + 1 if descending else low + limit - 1
            return end, True, choice
        limit -= count
    return (first if descending else last), False, choice


def _batches_of(
    db: sqlite3.Connection, descending: bool, first: int, last: int, source: Any, limit: int
) -> tuple[str, list[tuple[int, int]]]:
    """Return the first and the last id of the next `limit` batches of a source, and which of _CHOICES has found them.

    The index finds the batches of a source, but in the order of their sequences, so all of them must be sorted. That
    takes long if they are many. Many batches are usually close to each other, so the table is read first, in part.
    """
    order = "DESC" if descending else "ASC"
    far = db.execute(
        f"SELECT first_id FROM batch WHERE first_id BETWEEN ? AND ? ORDER BY first_id {order} LIMIT 1 OFFSET ?",
        (first, last, NEAR_BATCHES),
    ).fetchone()
    near = (first, last) if not far else (far[0], last) if descending else (first, far[0])
    columns = "SELECT first_id, first_id + count - 1 FROM batch"
    batches = db.execute(
        f"{columns} WHERE +source_id = ? AND first_id BETWEEN ? AND ? ORDER BY first_id {order} LIMIT ?",
        (source, *near, limit),
    ).fetchall()
    if not far or len(batches) == limit:
        return "near", batches
    batches = db.execute(
        f"{columns} WHERE source_id = ? AND +first_id BETWEEN ? AND ? ORDER BY +first_id {order} LIMIT ?",
        (source, first, last, limit),
    ).fetchall()
    return "far", batches
