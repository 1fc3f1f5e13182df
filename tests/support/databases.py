"""Blocks to store, and queries and checks of the database file over a connection of its own."""

import sqlite3
from array import array
from contextlib import closing
from pathlib import Path
from typing import Any

from ringolib.storage.interface import PAGE_RECORDS, Query, Storage
from ringolib.wire import Run
from store import Store
from support.harness import rows

A, B = b"a" * 16, b"b" * 16
"""Two sources."""
A_TEXT = "61616161-6161-6161-6161-616161616161"
FAR = 2**62
"""A time in milliseconds after the arrival of every record."""


def block(source: bytes, first: int, end: int) -> tuple[list[Run], "array[int]"]:
    """Return the records `first` to `end - 1` of a source; each value is ten times the sequence."""
    return [Run(source, first, end - first)], array("q", range(first * 10, end * 10, 10))


def query(path: Path, sql: str) -> list[tuple[Any, ...]]:
    """Return all rows of a query."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as reader:
        return reader.execute(sql).fetchall()


def stored_values(path: Path) -> dict[tuple[str, int], int]:
    """Return the value of each (source, sequence). Fails if one is stored twice."""
    records = rows(path)
    values = {(source, sequence): value for source, sequence, value in records}
    assert len(values) == len(records), "a record is stored twice"
    return values


def append(store: Store, source: bytes, first: int, end: int) -> None:
    """Append the records `first` to `end - 1` of a source; each value equals its sequence."""
    store.append([Run(source, first, end - first)], array("q", range(first, end)))


def read_pages(store: Storage, wanted: Query) -> list[bytes]:
    """Return the lines of all pages of a query."""
    lines: list[bytes] = []
    while True:
        page = store.read(wanted._replace(limit=wanted.limit - len(lines)))
        assert page.count == page.lines.count(b"\n") <= PAGE_RECORDS
        lines += page.lines.splitlines()
        if not page.more or len(lines) == wanted.limit:
            return lines
        wanted = wanted._replace(after=page.last)


def check_file(path: Path) -> None:
    """Fail unless the file is intact, ids have no gaps, and the view has every record once and unchanged."""
    assert query(path, "PRAGMA integrity_check") == [("ok",)]
    ((count, low, high),) = query(path, "SELECT count(*), min(id), max(id) FROM record")
    assert count == high - low + 1, "ids have no gaps"
    assert query(path, "SELECT max(first_id + count - 1) FROM batch") == [(high,)]
    viewed = query(path, "SELECT count(*), count(DISTINCT id), sum(value != sequence), min(id) FROM records")
    assert viewed == [(count, count, 0, low)]
    assert query(path, "SELECT count(*) FROM batch LEFT JOIN source ON source.id = source_id WHERE uuid IS NULL") == [
        (0,)
    ]
