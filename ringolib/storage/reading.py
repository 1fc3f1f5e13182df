"""Reads the stored records of a SQLite database in pages, for `GET /v1.0/records`.

One read-only connection serves all readers in turn; `_turn` guards it. SQLite makes the text of a page in one call, so
Python's lock is free meanwhile. Each page has a read transaction of its own: a reader never keeps the WAL from being
emptied for longer than a page.

If records were committed since the last page, the connection rests for up to REST_RATIO times the processor time of the
page: for less if the rest of the process uses less than FULL_REST_CORES, and hardly at all if few records arrive. So
readers slow the storing of records by a few percent at most. While nothing is stored, they do not rest.
"""

import sqlite3
import threading
from time import monotonic, process_time, sleep, thread_time
from typing import Any
from urllib.parse import quote

from ringolib.storage import sqlite_file
from ringolib.storage.interface import PAGE_RECORDS, Page, Query, StoreError
from ringolib.storage.sqlite_file import SOURCE_TEXT

REST_RATIO = 64.0
FULL_REST_CORES = 0.5
"""A busy server may get no more, if other programs use the processors, too."""
TURN_SECONDS = 10.0
"""How long a reader waits for its turn before it fails."""

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


def _page_statement(form: str, order: str, by_source: bool) -> str:
    """Return the SQL of a page: the records of the batches from `:batch` on, with ids from `:first` to `:last`."""
    source, time, line = _LINES[form]
    # The + keeps SQLite from reading all batches between the first and the last one of a source.
    condition = "batch.source_id = :source AND +" if by_source else ""
    return f"""
    SELECT CAST(group_concat(line, char(10)) || char(10) AS BLOB), count(*), min(id), max(id) FROM (
      SELECT record.id AS id, {line} AS line
        FROM (SELECT first_id, first_id + count - 1 AS last_id, sequence - first_id AS shift,
                     {source} AS source, {time} AS time
                FROM batch JOIN source ON source.id = batch.source_id
               WHERE {condition}batch.first_id BETWEEN :batch AND :last ORDER BY first_id LIMIT -1) AS part
        CROSS JOIN record ON record.id BETWEEN max(part.first_id, :first) AND min(part.last_id, :last)
       ORDER BY record.id {order} LIMIT -1)"""


_STATEMENTS = {
    (form, descending, by_source): _page_statement(form, "DESC" if descending else "ASC", by_source)
    for form in _LINES
    for descending in (False, True)
    for by_source in (False, True)
}


class Reading:
    """The connection for readers of the database file `real_path`. It opens with the first page."""

    def __init__(self, path: str, real_path: str) -> None:
        self._path = path
        self._real_path = real_path
        self._turn = threading.Lock()
        # Guarded by _turn.
        self._db: sqlite3.Connection | None = None
        self._closed = False
        self._version = 0  # SQLite's number of the last commit that a page has seen
        self._rest_until = 0.0  # monotonic seconds
        self._ended_at, self._used = monotonic(), process_time()  # the end of the last page, in seconds of both clocks

    def read(self, query: Query) -> Page:
        """Return the next page of a query. Raises ValueError if `after` is no id of this database, or StoreError."""
        if not self._turn.acquire(timeout=TURN_SECONDS):
            raise StoreError(f"{self._path}: other readers are busy: retry later, or with a lower limit")
        try:
            if self._closed:
                raise StoreError(f"{self._path} is closed")
            sleep(max(0.0, self._rest_until - monotonic()))
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
        with self._turn:
            self._closed = True
            if self._db:
                self._db.close()

    def _plan_rest(self, cost: float, has_commits: bool) -> None:
        """Decide how long to rest after a page that took `cost` seconds of processor time."""
        now, used = monotonic(), process_time()
        if has_commits:
            cores = (used - self._used - cost) / max(now - self._ended_at, 1e-6)  # that the other threads have used
            self._rest_until = now + REST_RATIO * cost * min(1.0, max(0.0, cores / FULL_REST_CORES))
        self._ended_at, self._used = now, used

    def _connect(self) -> sqlite3.Connection:
        uri = f"file:{quote(self._real_path)}?mode=ro"
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
    end, more = _page_end(db, query.descending, first, last, source, limit)
    low, high = (end, last) if query.descending else (first, end)
    parameters = {"batch": _batch_of(db, low), "first": low, "last": high, "source": source}
    statement = _STATEMENTS[query.form, query.descending, source is not None]
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
) -> tuple[int, bool]:
    """Return the last id of a page of `limit` records, in its order, and whether more ids follow."""
    if source is None:
        end = max(first, last - limit + 1) if descending else min(last, first + limit - 1)
        return end, end != (first if descending else last)
    order = "DESC" if descending else "ASC"
    batches = db.execute(
        f"""SELECT first_id, first_id + count - 1 FROM batch
             WHERE source_id = ? AND +first_id BETWEEN ? AND ? ORDER BY +first_id {order} LIMIT ?""",
        (source, _batch_of(db, first), last, limit + 1),  # one batch may have lost its records
    )
    for batch_first, batch_last in batches:
        low, high = max(batch_first, first), min(batch_last, last)
        count = max(0, high - low + 1)
        if count >= limit:
            end = high - limit + 1 if descending else low + limit - 1
            return end, True
        limit -= count
    return (first, False) if descending else (last, False)
