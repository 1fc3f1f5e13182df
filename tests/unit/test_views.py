"""Tests of the views for readers of a database file: `records` and `sources`."""

import sqlite3
from array import array
from contextlib import closing
from pathlib import Path

import pytest
from support.databases import A_TEXT, FAR, A, B, append, query

from ringolib.storage import oldest, sqlite_file
from ringolib.wire import Run
from store import Store

B_TEXT = "62626262-6262-6262-6262-626262626262"
COLUMNS = ["id", "source", "sequence", "value", "received_at_ms"]


def plan(path: Path, sql: str) -> str:
    """Return how SQLite runs a query, one step a line."""
    return "\n".join(str(row[3]) for row in query(path, f"EXPLAIN QUERY PLAN {sql}"))


def test_sources_view_has_one_row_for_each_source(opened: Store, path: Path) -> None:
    append(opened, A, 5, 15)
    opened.append([Run(B, 2**62, 1), Run(A, 100, 2)], array("q", [1, 2, 3]))
    assert query(path, "SELECT source, records, first_sequence, last_sequence FROM sources ORDER BY source") == [
        (A_TEXT, 12, 5, 101),
        (B_TEXT, 1, 2**62, 2**62),
    ]
    times = "first_received_at_ms, last_received_at_ms"
    assert query(path, f"SELECT source, {times} FROM sources ORDER BY 1") == query(
        path, "SELECT source, min(received_at_ms), max(received_at_ms) FROM records GROUP BY source ORDER BY 1"
    )


def test_sources_view_counts_no_deleted_records(opened: Store, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Retention deletes the records of a batch before the batch, and a part of them before the rest."""
    monkeypatch.setattr(oldest, "RECORDS_PER_SLICE", 7)
    append(opened, B, 0, 3)
    append(opened, A, 10, 30)
    opened.expire(FAR, 0, 1e-9)
    assert query(path, "SELECT count(*), min(sequence) FROM records") == [(16, 14)]
    assert query(path, "SELECT source, records, first_sequence, last_sequence FROM sources") == [(A_TEXT, 16, 14, 29)]


def test_sources_view_of_an_empty_database_is_empty(opened: Store, path: Path) -> None:
    assert query(path, "SELECT * FROM sources") == []


@pytest.mark.parametrize("condition", ["", " AND sequence = 5", " AND sequence BETWEEN 3 AND 8", " ORDER BY sequence"])
def test_look_up_by_source_uses_the_indexes(opened: Store, path: Path, condition: str) -> None:
    for first in range(0, 40, 4):
        append(opened, A, first, first + 4)
        append(opened, B, first, first + 4)
    sql = f"SELECT sequence, value FROM records WHERE source = '{B_TEXT}'{condition}"
    steps = plan(path, sql)
    assert "SEARCH" in steps and "SCAN" not in steps and "source_text" in steps, steps
    expected = {" AND sequence = 5": [5], " AND sequence BETWEEN 3 AND 8": list(range(3, 9))}.get(condition, range(40))
    assert query(path, sql) == [(n, n) for n in expected]


def test_group_by_source_sorts_no_records(opened: Store, path: Path) -> None:
    """Sorting by the text of the source took 50 s for 7.4 million records."""
    append(opened, B, 0, 3)
    append(opened, A, 0, 5)
    sql = "SELECT source, count(*), max(sequence) FROM records GROUP BY source"
    assert "source_text" in plan(path, sql) and "TEMP B-TREE" not in plan(path, sql)
    assert query(path, sql) == [(A_TEXT, 5, 4), (B_TEXT, 3, 2)]


def test_older_file_gets_index_and_views_when_opened(opened: Store, path: Path) -> None:
    """The tables, the columns of `records` and `user_version` stay: older readers and servers depend on them."""
    append(opened, A, 0, 5)
    opened.close()
    new = query(path, "SELECT type, name, sql FROM sqlite_master ORDER BY name")
    with closing(sqlite3.connect(path)) as writer, writer:
        writer.execute("DROP INDEX source_text")
        writer.execute("DROP VIEW sources")
    Store(str(path)).close()
    assert query(path, "SELECT type, name, sql FROM sqlite_master ORDER BY name") == new
    assert query(path, "SELECT records FROM sources") == [(5,)]
    assert query(path, "PRAGMA user_version") == [(1,)]
    assert [name for _, name, *_ in query(path, "PRAGMA table_info(records)")] == COLUMNS
    assert query(path, "PRAGMA integrity_check") == [("ok",)]


def test_file_that_cannot_get_the_views_is_opened_without_them(
    opened: Store, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The second addition fails. What the transaction has added before is taken back."""
    opened.close()
    fails = "CREATE INDEX second ON missing(id)"
    monkeypatch.setattr(sqlite_file, "ADDITIONS", ("CREATE TABLE first(id)", fails))
    store = Store(str(path))
    append(store, A, 0, 5)
    store.close()
    assert query(path, "SELECT name FROM sqlite_master WHERE name = 'first'") == []
    assert [record.getMessage() for record in caplog.records] == ["database_incomplete"]
