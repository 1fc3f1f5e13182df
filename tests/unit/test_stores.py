"""Tests that every store must pass: SQLite, ClickHouse as old as Debian's, and a current ClickHouse (chdb)."""

import datetime
import json
import random
import re
import threading
import time
import uuid
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.clickhouses import ChdbServer, ClickHouseServer, need_chdb, need_clickhouse
from support.databases import A_TEXT, A, B, block, read_pages, stored_values
from support.harness import Blocked, eventually, seeded

from ringolib.storage.clickhouse import store as clickhouse
from ringolib.storage.clickhouse.store import ClickHouse
from ringolib.storage.clickhouse.url import parse_url
from ringolib.storage.interface import PAGE_RECORDS, Query, Storage, StoreError
from ringolib.wire import Run
from store import Store


class Kind:
    """A kind of store, an open store of it, and a way to read its database without the store."""

    def __init__(
        self, name: str, make: Callable[[], Storage], records: Callable[[], dict[tuple[str, int], int]]
    ) -> None:
        self.name = name
        self.make = make
        self.records = records
        self.store = make()

    def reopen(self) -> None:
        self.store.close()
        self.store = self.make()


@pytest.fixture(scope="module", params=["sqlite", "clickhouse 18.16", "current clickhouse"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ClickHouseServer | ChdbServer | None]:
    if request.param == "sqlite":
        yield None
        return
    running: ClickHouseServer | ChdbServer
    if request.param == "clickhouse 18.16":
        need_clickhouse()
        running = ClickHouseServer(tmp_path_factory.mktemp("clickhouse"))
    else:
        need_chdb()
        running = ChdbServer(tmp_path_factory.mktemp("chdb"))
    try:
        yield running
    finally:
        running.kill()


@pytest.fixture
def kind(
    server: ClickHouseServer | ChdbServer | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Kind]:
    monkeypatch.setattr(clickhouse, "INSERT_INTERVAL_SECONDS", 0.0)
    if server:
        database = server.create_database()
        target = parse_url(server.url(database))
        kind = Kind("clickhouse", lambda: ClickHouse(target), lambda: server.records(database))
    else:
        path = tmp_path / "numbers.db"
        kind = Kind("sqlite", lambda: Store(str(path)), lambda: stored_values(path))
    try:
        yield kind
    finally:
        kind.store.close()


def test_appended_records_are_stored_unchanged(kind: Kind) -> None:
    kind.store.append([Run(A, 0, 2), Run(B, 7, 1)], array("q", [2**63 - 1, -(2**63), 5]))
    kind.store.append([Run(A, 2, 1)], array("q", [0]))
    b_text = str(uuid.UUID(bytes=B))
    assert kind.records() == {(A_TEXT, 0): 2**63 - 1, (A_TEXT, 1): -(2**63), (A_TEXT, 2): 0, (b_text, 7): 5}
    stats = kind.store.stats()
    assert (stats.stored, stats.commits, stats.failed_commits, stats.error) == (4, 2, 0, None)


def test_source_text_keeps_order_of_bytes(kind: Kind) -> None:
    source = bytes(range(0xF0, 0x100))
    for name in (source, source[::-1]):
        kind.store.append([Run(name, 1, 1)], array("q", [1]))
    assert {text for text, _ in kind.records()} == {str(uuid.UUID(bytes=name)) for name in (source, source[::-1])}


@pytest.mark.parametrize("size", [1, 4, 5, 1025, 65_536, 100_000])
@pytest.mark.parametrize("first", [0, 65_535, 2**40 - 3, 2**63 - 100_001])
def test_blocks_of_every_size_are_stored_whole(kind: Kind, size: int, first: int) -> None:
    values = array("q", range(-(size // 2), size - size // 2))
    kind.store.append([Run(A, first, size)], values)
    assert kind.records() == {(A_TEXT, first + n): value for n, value in enumerate(values)}


@pytest.mark.parametrize(
    "runs",
    [[(10, 20)], [(5, 12)], [(18, 30)], [(5, 30)], [(0, 60)], [(0, 5), (3, 8), (0, 8)], [(50, 51), (49, 50), (48, 52)]],
)
@pytest.mark.parametrize("reopened", [False, True])
def test_first_value_of_a_record_stays(kind: Kind, runs: list[tuple[int, int]], reopened: bool) -> None:
    """The records 10..19 and 30..39 are stored already. Runs of one block may overlap, too."""
    model: dict[tuple[str, int], int] = {}
    number = iter(range(1000))

    def append(runs: list[tuple[int, int]]) -> None:
        values = array("q")
        for run in runs:
            for sequence in range(*run):
                values.append(next(number))
                model.setdefault((A_TEXT, sequence), values[-1])
        kind.store.append([Run(A, first, end - first) for first, end in runs], values)

    append([(30, 40)])
    append([(10, 20)])
    if reopened:
        kind.reopen()
    append(runs)
    assert kind.records() == model


def test_random_runs_keep_first_value_of_each_sequence(kind: Kind) -> None:
    rng = random.Random(seeded())
    model: dict[tuple[str, int], int] = {}
    for turn in range(40):
        runs, values = [], array("q")
        for _ in range(rng.randrange(1, 20)):
            run = Run(rng.choice((A, B, b"c" * 16)), rng.randrange(300), rng.randrange(1, 30))
            runs.append(run)
            for sequence in range(run.first, run.first + run.count):
                values.append(rng.randrange(-(2**63), 2**63))
                model.setdefault((str(uuid.UUID(bytes=run.source)), sequence), values[-1])
        kind.store.append(runs, values)
        if turn % 10 == 5:
            kind.reopen()
    assert kind.records() == model


def test_append_does_not_change_the_block(kind: Kind) -> None:
    runs, values = block(A, 65_530, 65_550)
    kind.store.append(runs, values)
    assert (runs, values) == block(A, 65_530, 65_550)


def test_many_threads_append_concurrently(kind: Kind) -> None:
    calls = [Blocked(lambda n=n: kind.store.append(*block(A, 100 * n, 100 * n + 150))) for n in range(16)]
    for call in calls:
        call.result()
    assert kind.records() == {(A_TEXT, n): n * 10 for n in range(1650)}
    assert kind.store.stats().commits <= 16


def test_closed_store_refuses_appends_and_checks(kind: Kind) -> None:
    kind.store.append(*block(A, 0, 5))
    for _ in range(2):
        kind.store.close()
    for call in (kind.store.check, lambda: kind.store.append(*block(A, 5, 6))):
        with pytest.raises(StoreError, match="is closed"):
            call()
    assert kind.store.stats().stored == 5 and len(kind.records()) == 5


def test_close_stores_waiting_blocks(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clickhouse, "INSERT_INTERVAL_SECONDS", 30.0)
    kind.store.append(*block(A, 0, 1))
    waiting = [Blocked(lambda n=n: kind.store.append(*block(A, n, n + 1))) for n in (1, 2, 3)]
    if isinstance(kind.store, ClickHouse):
        store = kind.store
        eventually(lambda: len(store._queue) == 3)
        assert all(call.still(0.01) for call in waiting)
    else:
        for call in waiting:
            call.result()
    kind.store.close()
    for call in waiting:
        call.result(5)
    assert len(kind.records()) == 4


def test_identity_belongs_to_the_database(kind: Kind, tmp_path: Path) -> None:
    identity = kind.store.identity
    assert str(uuid.UUID(identity)) == identity
    kind.reopen()
    assert kind.store.identity == identity
    other = Store(str(tmp_path / "other.db"))
    other.close()
    assert other.identity != identity


def test_check_stores_nothing(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    kind.store.append(*block(A, 0, 5))
    kind.store.check()
    monkeypatch.setattr(clickhouse, "SUCCESS_VALID_SECONDS", 0.0)
    monkeypatch.setattr("store.SUCCESS_VALID_SECONDS", 0.0)
    before = kind.store.stats()
    kind.store.check()
    assert kind.store.stats() == before
    assert len(kind.records()) == 5


def test_stats_do_not_wait_for_commit(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, entered = threading.Event(), threading.Event()
    name = "_insert" if isinstance(kind.store, ClickHouse) else "_write"
    write = getattr(kind.store, name)

    def slow(*arguments: object) -> object:
        entered.set()
        assert gate.wait(30)
        return write(*arguments)

    monkeypatch.setattr(kind.store, name, slow)
    call = Blocked(lambda: kind.store.append(*block(A, 0, 5)))
    assert entered.wait(30)
    assert Blocked(kind.store.stats).result(5).stored == 0
    assert Blocked(kind.store.sizes).result(5)
    gate.set()
    call.result()


# Reading.


@pytest.fixture
def filled(kind: Kind) -> list[tuple[str, int, int]]:
    """Records of `kind.store`, in the order of their arrival, as (source, sequence, value). Some were sent twice."""
    rng = random.Random(seeded())
    arrived: dict[tuple[str, int], int] = {}
    for _ in range(12):
        runs, values = [], array("q")
        for _ in range(rng.randrange(1, 6)):
            run = Run(rng.choice((A, B, b"c" * 16)), rng.randrange(900), rng.choice((1, 2, 300, 900)))
            runs.append(run)
            for sequence in range(run.first, run.first + run.count):
                values.append(rng.randrange(-(2**63), 2**63))
                arrived.setdefault((str(uuid.UUID(bytes=run.source)), sequence), values[-1])
        kind.store.append(runs, values)
    return [(source, sequence, value) for (source, sequence), value in arrived.items()]


@pytest.mark.parametrize("descending", [False, True], ids=["asc", "desc"])
def test_read_gives_each_record_once_in_order_of_arrival(
    kind: Kind, filled: list[tuple[str, int, int]], descending: bool
) -> None:
    for source in (None, B):
        expected = [record for record in filled if source is None or record[0] == str(uuid.UUID(bytes=source))]
        expected = expected[:: -1 if descending else 1]
        for limit in (1, 700, PAGE_RECORDS, PAGE_RECORDS + 1, 10**9):
            wanted = Query("ndjson", limit, source=source, since_ms=0, descending=descending)
            records = [json.loads(line) for line in read_pages(kind.store, wanted)]
            found = [(record["source"], record["sequence"], record["value"]) for record in records]
            assert found == expected[:limit]
        middle = len(records) // 2
        after = wanted._replace(after=records[middle]["id"], since_ms=None)
        assert read_pages(kind.store, after._replace(form="text")) == [
            str(value).encode() for _, _, value in expected[middle + 1 :]
        ]


def test_forms_of_a_line_are_the_same_in_all_stores(kind: Kind) -> None:
    kind.store.append([Run(A, 2**63 - 3, 2)], array("q", [2**63 - 1, -(2**63)]))
    text, csv, ndjson = (kind.store.read(Query(form, 1)).lines.decode() for form in ("text", "csv", "ndjson"))
    assert text == "9223372036854775807\n"
    number, source, sequence, value, moment = csv.rstrip("\n").split(",")
    assert (source, sequence, value) == (A_TEXT, str(2**63 - 3), str(2**63 - 1))
    arrived = datetime.datetime.strptime(moment, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=datetime.timezone.utc)
    assert re.fullmatch(r".*\.\d{3}Z", moment) and abs(arrived.timestamp() - time.time()) < 600
    assert ndjson == (
        f'{{"id": "{number}", "source": "{source}", "sequence": {sequence}, "value": {value}, '
        f'"received_at": "{moment}"}}\n'
    )


@pytest.mark.parametrize("since", [None, 0, 10**12])
def test_cursor_of_the_end_leads_to_later_records(kind: Kind, since: int | None) -> None:
    page = kind.store.read(Query("text", 5, since_ms=since))
    assert (page.lines, page.count, page.more) == (b"", 0, False)
    for n in range(3):
        kind.store.append([Run(A, n, 1)], array("q", [n]))
        page = kind.store.read(Query("text", 10**6, page.last))
        assert (page.lines, page.more) == (b"%d\n" % n, False)
        page = kind.store.read(Query("text", 10**6, page.last))
        assert page.count == 0
    assert kind.store.read(Query("text", 5, source=b"x" * 16)).count == 0
    assert kind.store.read(Query("text", 5, since_ms=2**53)).count == 0


@pytest.mark.parametrize("after", ["", "x", "7", "-1", "1' OR 1", "9" * 20, "0-0-0", f"{2**63}-{uuid.UUID(int=0)}-0"])
def test_cursor_of_another_store_is_refused(kind: Kind, after: str) -> None:
    with pytest.raises(ValueError, match="must be a cursor|of another database"):
        kind.store.read(Query("text", 1, after))


def test_closed_store_refuses_to_be_read(kind: Kind) -> None:
    kind.store.close()
    with pytest.raises(StoreError, match="is closed"):
        kind.store.read(Query("text", 1))
