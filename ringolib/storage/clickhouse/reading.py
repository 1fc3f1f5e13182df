"""Reads the stored records of a ClickHouse database in pages, for `GET /v1.0/records`.

The order of arrival is that of `version`, from the largest down; the records of a run have the same one, and follow
each other by sequence. No index has this order, so the server reads the whole table for a query, or all records of one
source. So a query fetches several pages. Those that are left over wait in `_pages` for the reader's next requests.

One query runs at a time; `_turn` guards it. The server ends it after READ_TIMEOUT_SECONDS. Each query has a connection
of its own, so nothing is to be closed.
"""

import math
import re
import threading
import uuid
from collections import OrderedDict
from collections.abc import Sequence

from ringolib.storage.clickhouse import schema
from ringolib.storage.clickhouse.http import ClickHouseError, Server
from ringolib.storage.clickhouse.schema import MAX_VERSION
from ringolib.storage.clickhouse.url import Target
from ringolib.storage.interface import PAGE_RECORDS, Page, Query, StoreError
from ringolib.timing import deadline_after, remaining

READ_TIMEOUT_SECONDS = 15.0
"""For a page, with the wait for other readers. A publisher waits 20 s for the answer."""
FETCH_PAGES = 16
"""Pages that one query fetches, at most."""
WAITING_PAGES = 64
"""Pages that wait for their readers, at most: some 40 MB of NDJSON."""
MAX_ANSWER_BYTES = 16 * 1024 * 1024
"""FETCH_PAGES of the longest lines have 10 MB."""
TIMEOUT_EXCEEDED = 159
"""The server's error code."""

_LAST_SEQUENCE = 2**64 - 1
_ID = re.compile(r"(\d{1,19})-([0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12})-(\d{1,20})", re.ASCII)
_ARRIVED = f"({MAX_VERSION} - version)"
_RECORD_ID = f"toString({_ARRIVED}), '-', toString(source), '-', toString(sequence)"
_SECONDS, _MILLISECONDS = f"intDiv({_ARRIVED}, 1000000000)", f"intDiv({_ARRIVED}, 1000000) % 1000"
# Older servers know neither milliseconds nor padding.
_TIME = (
    f"formatDateTime(toDateTime({_SECONDS}), '%FT%T', 'UTC'), '.', substring(toString(1000 + {_MILLISECONDS}), 2), 'Z'"
)
_LINES = {
    "ndjson": f"""'{{"id": "', {_RECORD_ID}, '", "source": "', toString(source), '", "sequence": ', """
    f"""toString(sequence), ', "value": ', toString(value), ', "received_at": "', {_TIME}, '"}}'""",
    "csv": f"{_RECORD_ID}, ',', toString(source), ',', toString(sequence), ',', toString(value), ',', {_TIME}",
    "text": "toString(value), ''",
}
"""The SQL of a line, as arguments of concat."""


class Reading:
    """Reads the table `table` of the database of `target`, at any of its hosts."""

    def __init__(self, target: Target, table: str) -> None:
        self._target = target
        self._table = f"{schema.quote_identifier(target.database)}.{table}"
        self._turn = threading.Lock()
        self._pages: OrderedDict[Query, Page] = OrderedDict()  # by the query that each answers; guarded by _turn

    def read(self, query: Query, first_host: int) -> Page:
        """Return the next page of a query, from the host with this index or one after it.

        Raises ValueError if `after` is no id, StoreError, or ClickHouseError.
        """
        place = _parse_id(query.after) if query.after is not None else None
        deadline = deadline_after(READ_TIMEOUT_SECONDS)
        if not self._turn.acquire(timeout=READ_TIMEOUT_SECONDS):
            raise StoreError("other readers are busy: retry later")
        try:
            waiting = self._pages.pop(_key(query, query.after), None)
            if waiting and waiting.count <= query.limit:
                return waiting
            records = FETCH_PAGES * PAGE_RECORDS if query.limit >= PAGE_RECORDS else query.limit
            rows = self._fetch(_statement(self._table, query, place, records + 1), first_host, deadline)
            page, *others = _pages(query, rows, records)
            for earlier, later in zip([page, *others], others, strict=False):
                self._pages[_key(query, earlier.last)] = later
            while len(self._pages) > WAITING_PAGES:
                self._pages.popitem(last=False)
            return page
        finally:
            self._turn.release()

    def _fetch(self, sql: str, first_host: int, deadline: float) -> list[bytes]:
        """Return the lines of the answer of the first host that gives one. Raises StoreError or ClickHouseError."""
        hosts = self._target.hosts
        first_error: ClickHouseError | None = None
        for turn in range(len(hosts)):
            server = Server(self._target, *hosts[(first_host + turn) % len(hosts)])
            seconds = remaining(deadline) / (len(hosts) - turn)  # a host that hangs must leave time for the next one
            limit = {"max_execution_time": str(max(1, math.ceil(seconds)))}
            try:
                return server.post(sql, b"", seconds, limit, MAX_ANSWER_BYTES).split(b"\n")[:-1]
            except ClickHouseError as error:
                first_error = first_error or error
            finally:
                server.close()
        assert first_error
        if first_error.code == TIMEOUT_EXCEEDED or not remaining(deadline):
            remedy = "ask for one source, or query the view records with a tool of ClickHouse"
            raise StoreError(f"no records within {READ_TIMEOUT_SECONDS:g} s: {remedy}") from first_error
        raise first_error


def _parse_id(text: str) -> tuple[int, str, int]:
    """Return version, source and sequence of an id. Raises ValueError."""
    match = _ID.fullmatch(text)
    if not match or int(match[1]) > MAX_VERSION or int(match[3]) > _LAST_SEQUENCE:
        raise ValueError("it must be a cursor of an earlier answer, or the id of a record")
    return MAX_VERSION - int(match[1]), match[2].lower(), int(match[3])


def _key(query: Query, after: str | None) -> Query:
    """Return the query whose first page begins behind `after`, as a key. Ascending, `after` replaces `since`."""
    since_ms = query.since_ms if query.descending or after is None else None
    return query._replace(limit=0, after=after, since_ms=since_ms)


def _first_version(since_ms: int) -> int:
    """Return the version of records that arrived at a Unix time."""
    return MAX_VERSION - min(max(since_ms * 1_000_000, 0), MAX_VERSION)


def _statement(table: str, query: Query, place: tuple[int, str, int] | None, limit: int) -> str:
    """Return the SQL of a query: the id and the line of each record behind `place`, at most `limit` of them."""
    later, order, by = ("<", "DESC", "ASC") if query.descending else (">", "ASC", "DESC")
    conditions = ["1"]
    if query.source is not None:
        conditions.append(f"source = toUUID({schema.quote_text(str(uuid.UUID(bytes=query.source)))})")
    if query.since_ms is not None:
        conditions.append(f"version <= {_first_version(query.since_ms)}")
    if place:
        version, source, sequence = place
        of_source = f"toUUID({schema.quote_text(source)})"
        behind = f"source {later} {of_source} OR (source = {of_source} AND sequence {later} {sequence})"
        beyond = ">" if query.descending else "<"
        conditions.append(f"(version {beyond} {version} OR (version = {version} AND ({behind})))")
    ordered = f"ORDER BY version {by}, source {order}, sequence {order}"
    return (
        f"SELECT concat({_RECORD_ID}), concat({_LINES[query.form]}) FROM (SELECT source, sequence, value, version "
        f"FROM {table} FINAL WHERE {' AND '.join(conditions)} {ordered} LIMIT {limit}) {ordered} FORMAT TabSeparated"
    )


def _pages(query: Query, rows: Sequence[bytes], records: int) -> list[Page]:
    """Return the pages of rows with id and line: one or more. Rows beyond `records` show only that more follow."""
    if not rows:
        return [Page(b"", 0, query.after or _start(query), False)]
    pages = []
    more, rows = len(rows) > records, rows[:records]
    for start in range(0, len(rows), PAGE_RECORDS):
        part = [row.partition(b"\t") for row in rows[start : start + PAGE_RECORDS]]
        lines = b"".join([line + b"\n" for _, _, line in part])
        pages.append(Page(lines, len(part), part[-1][0].decode(), more or start + PAGE_RECORDS < len(rows)))
    return pages


def _start(query: Query) -> str:
    """Return the id in front of all records that a query finds."""
    arrived = 0 if query.since_ms is None else max(0, MAX_VERSION - _first_version(query.since_ms) - 1)
    return f"{arrived}-{uuid.UUID(int=2**128 - 1)}-{_LAST_SEQUENCE}"
