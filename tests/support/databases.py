"""Blocks to store, and queries of the database file by a connection of the test's own."""

import sqlite3
from array import array
from contextlib import closing
from pathlib import Path
from typing import Any

from ringolib.wire import Run
from support.harness import rows

A, B = b"a" * 16, b"b" * 16
"""Two sources."""
A_TEXT = "61616161-6161-6161-6161-616161616161"


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
