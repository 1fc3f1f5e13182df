"""Tests of reading stored records from a SQLite database, page by page."""

import json
import os
import random
import sqlite3
import threading
from array import array
from contextlib import closing
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from support.databases import A_TEXT, FAR, A, B, append, query, read_pages
from support.harness import Blocked, seeded

from ringolib.storage import oldest, reading, wal
from ringolib.storage.interface import FORMS, Query, StoreError
from ringolib.wire import Run
from store import Store

ORDERS = pytest.mark.parametrize("descending", [False, True], ids=["asc", "desc"])


def fill(store: Store, rng: random.Random, blocks: int) -> None:
    """Store blocks of several sources, some of them with gaps in their sequences."""
    firsts = {bytes([n]) * 16: 0 for n in range(5)}
    for _ in range(blocks):
        source = rng.choice(list(firsts))
        count = rng.choice([1, 1, 2, 50, 700])
        firsts[source] += rng.choice([0, 0, 3])
        append(store, source, firsts[source], firsts[source] + count)
        firsts[source] += count


@ORDERS
@pytest.mark.parametrize("near", [0, 3, reading.NEAR_BATCHES])
@pytest.mark.parametrize("by_source", [False, True])
def test_pages_have_each_record_of_the_view_once(
    opened: Store, path: Path, descending: bool, by_source: bool, near: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "NEAR_BATCHES", near)
    rng = random.Random(seeded())
    fill(opened, rng, 60)
    order = "DESC" if descending else "ASC"
    condition = "WHERE source = '03030303-0303-0303-0303-030303030303'" if by_source else ""
    sql = f"SELECT id, source, sequence, value FROM records {condition} ORDER BY id {order}"
    expected = [dict(zip(("id", "source", "sequence", "value"), row, strict=True)) for row in query(path, sql)]
    for record in expected:
        record["id"] = str(record["id"])
    for size in (1, 7, 256, 2048):
        monkeypatch.setattr(reading, "PAGE_RECORDS", size)
        limit = 40 if size == 1 else 10**9
        wanted = Query("ndjson", limit, source=bytes([3]) * 16 if by_source else None, descending=descending)
        records = [json.loads(line) for line in read_pages(opened, wanted)]
        assert all(record.pop("received_at").endswith("Z") for record in records)
        assert records == expected[:limit]


def test_forms_show_extreme_values_and_times(opened: Store, path: Path) -> None:
    opened.append([Run(A, 2**63 - 3, 2)], array("q", [2**63 - 1, -(2**63)]))
    with closing(sqlite3.connect(path)) as writer, writer:
        writer.execute("UPDATE batch SET received_at_ms = 1767225599007")
    lines: dict[str, list[Any]] = {form: read_pages(opened, Query(form, 10)) for form in FORMS}
    assert lines["text"] == [b"9223372036854775807", b"-9223372036854775808"]
    assert lines["csv"][1].decode() == f"2,{A_TEXT},{2**63 - 2},{-(2**63)},2025-12-31T23:59:59.007Z"
    assert json.loads(lines["ndjson"][0]) == {
        "id": "1",
        "source": A_TEXT,
        "sequence": 2**63 - 3,
        "value": 2**63 - 1,
        "received_at": "2025-12-31T23:59:59.007Z",
    }


def test_cursor_of_the_last_page_finds_what_is_stored_later(opened: Store) -> None:
    for source in (None, A):
        page = opened.read(Query("text", 10, source=source))
        append(opened, B, 0, 3)
        if source is None:
            assert (page.count, page.more, page.last) == (0, False, "0")
        page = opened.read(Query("text", 10, page.last, source=source))
    append(opened, A, 5, 7)
    assert opened.read(Query("text", 10, page.last, source=A)).lines == b"5\n6\n"


@ORDERS
def test_since_begins_with_the_first_record_of_that_time(opened: Store, path: Path, descending: bool) -> None:
    for n in range(20):
        append(opened, A, 10 * n, 10 * n + 1 + n % 3)
    with closing(sqlite3.connect(path)) as writer, writer:
        writer.execute("UPDATE batch SET received_at_ms = 1000 * (sequence / 20)")
    for since in (-5, 0, 1, 1000, 4999, 5000, 9000, 9001, FAR):
        lines = read_pages(opened, Query("text", 10**6, since_ms=since, descending=descending))
        expected = query(path, f"SELECT value FROM records WHERE received_at_ms >= {since} ORDER BY id")
        assert [int(line) for line in lines][:: -1 if descending else 1] == [value for (value,) in expected], since


@ORDERS
@pytest.mark.parametrize("source", [None, A])
def test_deleted_records_are_left_out(
    opened: Store, descending: bool, source: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oldest, "RECORDS_PER_SLICE", 15)
    append(opened, A, 0, 10)
    append(opened, A, 10, 30)
    opened.expire(FAR, 0, 1e-9)
    for after in (None, "15") if descending else (None, "3", "15"):
        lines = read_pages(opened, Query("text", 100, after, source, descending=descending))
        expected = range(15, 30) if after is None or not descending else []
        assert sorted(map(int, lines)) == list(expected)


@pytest.mark.parametrize("after", ["", "x", "-1", "1e3", "4", "9" * 20, "\u0663"])
def test_cursor_of_another_database_is_refused(opened: Store, after: str) -> None:
    append(opened, A, 0, 3)
    with pytest.raises(ValueError, match="of another database|must be a cursor"):
        opened.read(Query("text", 1, after))


def test_page_leaves_the_wal_free_to_be_emptied(opened: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wal, "READER_WAIT_MS", 0)
    append(opened, A, 0, 5000)
    page = opened.read(Query("ndjson", 5000))
    assert page.more
    assert not opened._wal.empty(), "the reader holds no transaction between two pages"
    assert opened._wal.size() == 0
    assert opened.read(Query("text", 1, page.last)).lines == b"2048\n"


def test_reader_rests_only_while_records_are_stored(opened: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[float] = []
    monkeypatch.setattr(reading, "process_time", reading.monotonic)  # the process uses one core
    append(opened, A, 0, 5000)
    after = None
    for _ in range(3):
        after = opened.read(Query("ndjson", 100, after)).last
        rests.append(opened._reading._rest_until)
        opened._reading._rest_until = 0.0
    assert rests[0] > 0 == rests[1] == rests[2], "the first page has found commits"


def test_rest_is_short_and_ends_with_the_store(opened: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that took long must not make other readers fail, nor the stop of the server wait."""
    monkeypatch.setattr(reading, "REST_RATIO", 1e9)
    monkeypatch.setattr(reading, "process_time", reading.monotonic)
    append(opened, A, 0, 3)
    opened.read(Query("text", 1))
    assert opened._reading._rest_until - monotonic() <= reading.TURN_SECONDS / 4
    opened._reading._rest_until = monotonic() + 3600
    readers = [Blocked(lambda: opened.read(Query("text", 1))) for _ in range(3)]
    assert all(reader.still() for reader in readers)
    Blocked(opened.close).result(reading.TURN_SECONDS / 2)
    for reader in readers:
        with pytest.raises(StoreError, match="is closed"):
            reader.result()


@ORDERS
def test_page_of_a_source_does_not_read_all_its_batches(
    opened: Store, path: Path, descending: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that sends a record at a time has a batch for each."""
    monkeypatch.setattr(reading, "NEAR_BATCHES", 100)
    append(opened, A, 0, 1)
    with closing(sqlite3.connect(path)) as writer, writer:
        writer.executemany("INSERT INTO record VALUES (?, ?)", ((n, n) for n in range(2, 20_001)))
        writer.executemany("INSERT INTO batch VALUES (?, 1, 1, ?, 0)", ((n, n - 1) for n in range(2, 20_001)))
    after = opened.read(Query("text", 1, "10000")).last
    steps: list[int] = []
    assert opened._reading._db
    opened._reading._db.set_progress_handler(lambda: steps.append(100), 100)
    page = opened.read(Query("text", 10, after, A, descending=descending))
    opened._reading._db.set_progress_handler(None, 0)
    first = 10_000 if descending else 10_002
    assert list(map(int, page.lines.split())) == [first - n if descending else first + n for n in range(10)]
    assert sum(steps) < 20_000


def test_reader_refuses_a_database_that_has_replaced_its_own(opened: Store, path: Path) -> None:
    append(opened, A, 0, 3)
    path.rename(path.with_name("moved.db"))
    with closing(Store(str(path.with_name("other.db")))) as other:
        append(other, B, 0, 5)
    path.with_name("other.db").rename(path)
    with pytest.raises(StoreError, match="replaced"):
        opened.read(Query("text", 1))
    path.with_name("moved.db").rename(path)
    assert opened.read(Query("text", 9)).lines == b"0\n1\n2\n"


def test_path_may_have_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9?#%20.db")
    try:
        open(path, "wb").close()
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    with closing(Store(path)) as store:
        append(store, A, 0, 2)
        assert store.read(Query("text", 9)).lines == b"0\n1\n"


def test_reader_hardly_rests_while_few_records_are_stored(opened: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "process_time", lambda: 0.0)
    for first in (0, 5000):
        append(opened, A, first, first + 5000)
        opened.read(Query("ndjson", 5000))
        assert opened._reading._rest_until <= monotonic()


def test_closed_store_refuses_and_leaves_no_wal(opened: Store, path: Path) -> None:
    """The reader's connection is closed first: the last one to close removes the WAL, and must be able to write."""
    append(opened, A, 0, 3)
    opened.read(Query("text", 1))
    assert opened.close()
    assert not path.with_name(f"{path.name}-wal").exists()
    with pytest.raises(StoreError, match="is closed"):
        opened.read(Query("text", 1))


def test_readers_and_writers_at_once_see_records_in_order(opened: Store) -> None:
    done = threading.Event()

    def write() -> None:
        for first in range(0, 3000, 10):
            append(opened, A, first, first + 10)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    values: list[int] = []
    after = None
    while True:
        ended = done.is_set()
        page = opened.read(Query("text", 100, after))
        values += map(int, page.lines.split())
        after = page.last
        if ended and not page.count:
            break
    writer.join()
    assert values == list(range(3000))
