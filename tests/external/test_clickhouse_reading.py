"""Reading stored records back from a ClickHouse server, Debian's 18.16: queries, their limits, and the whole server.

What all stores have in common is tested in `test_stores.py`.
"""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from time import monotonic

import pytest
from support.clickhouses import SOURCE_TEXT, ClickHouseServer, Cluster, block, clickhouse_server, need_zookeeper
from support.harness import eventually, free_port, request, server
from support.proxy import DOWN, UP, Proxy

from ringolib.storage.clickhouse import http, reading, store
from ringolib.storage.clickhouse.store import ClickHouse
from ringolib.storage.clickhouse.url import parse_url
from ringolib.storage.interface import PAGE_RECORDS, Query, StoreError


@pytest.fixture(scope="module")
def clickhouse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClickHouseServer]:
    with clickhouse_server(tmp_path_factory.mktemp("clickhouse")) as running:
        yield running


@pytest.fixture
def proxy(clickhouse: ClickHouseServer) -> Iterator[Proxy]:
    with Proxy(clickhouse.port) as running:
        yield running


@pytest.fixture
def storage(clickhouse: ClickHouseServer, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[ClickHouse]:
    """A store behind `proxy`."""
    monkeypatch.setattr(store, "INSERT_INTERVAL_SECONDS", 0.0)
    opened = ClickHouse(parse_url(clickhouse.url(clickhouse.create_database(), proxy.port)))
    yield opened
    opened.close()


def test_one_query_fetches_pages_for_the_next_requests(storage: ClickHouse, proxy: Proxy) -> None:
    storage.append(*block(0, 3 * PAGE_RECORDS))
    links = proxy.links
    wanted, found = Query("text", PAGE_RECORDS, since_ms=0), []
    for last in range(3):
        page = storage.read(wanted)
        assert (page.count, page.more) == (PAGE_RECORDS, last < 2)
        found += list(map(int, page.lines.split()))
        wanted = wanted._replace(after=page.last, since_ms=None)
    assert found == list(range(0, 30 * PAGE_RECORDS, 10)) and proxy.links == links + 1
    storage.append(*block(3 * PAGE_RECORDS, 3 * PAGE_RECORDS + 1))
    assert storage.read(wanted).lines == b"%d\n" % (30 * PAGE_RECORDS), "later records are found, too"
    assert not storage._reading._pages


def test_pages_that_wait_for_readers_are_limited(storage: ClickHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "WAITING_PAGES", 3)
    storage.append(*block(0, 4 * PAGE_RECORDS))
    for form in ("text", "csv", "ndjson"):
        storage.read(Query(form, 10**6))
        assert len(storage._reading._pages) == 3
    page = storage.read(Query("text", 10**6))
    assert storage.read(Query("text", 7, page.last)).count == 7, "a page that waits is too long for this request"


def test_answer_of_the_longest_lines_is_read(storage: ClickHouse) -> None:
    first = 2**63 - 1 - reading.FETCH_PAGES * PAGE_RECORDS
    runs, values = block(0, reading.FETCH_PAGES * PAGE_RECORDS)
    values[:] = type(values)("q", [-(2**63)] * len(values))
    storage.append([runs[0]._replace(first=first)], values)
    wanted, count = Query("ndjson", 10**6), 0
    while (page := storage.read(wanted)).count:
        count += page.count
        wanted = wanted._replace(after=page.last)
    assert count == len(values)


def test_query_that_takes_too_long_is_ended_by_the_server(
    storage: ClickHouse, clickhouse: ClickHouseServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table is replaced by one that takes a minute to read."""
    monkeypatch.setattr(reading, "READ_TIMEOUT_SECONDS", 2.0)
    database = storage._target.database
    storage._reading._table = f"{database}.slow"
    clickhouse.query(
        "CREATE VIEW slow AS SELECT toUUID('{0}') AS source, toUInt64(number) AS sequence, toInt64(0) AS value, "
        "toUInt64(number) AS version FROM system.numbers WHERE NOT ignore(sleep(0.1)) LIMIT 100000000".format(
            SOURCE_TEXT
        ),
        database,
    )
    monkeypatch.setattr(reading, "_statement", lambda *unused: f"SELECT sum(sequence) FROM {database}.slow")
    start = monotonic()
    with pytest.raises(StoreError, match="no records within 2 s: ask for one source"):
        storage.read(Query("text", 1))
    assert monotonic() - start < 10
    eventually(lambda: clickhouse.query("SELECT count() FROM system.processes WHERE query LIKE '%.slow%'") == [["1"]])


def test_server_that_does_not_answer_fails_in_time(
    storage: ClickHouse, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "READ_TIMEOUT_SECONDS", 0.5)
    storage.append(*block(0, 5))
    proxy.hold(UP, DOWN)
    with pytest.raises(StoreError, match="no records within 0.5 s"):
        storage.read(Query("text", 1))
    proxy.heal()
    monkeypatch.setattr(reading, "READ_TIMEOUT_SECONDS", 15.0)
    assert storage.read(Query("text", 1)).lines == b"0\n"


@pytest.mark.parametrize("role", [["-I", "false"], ["-T", "0", "-W", "1"]], ids=["consumer", "own consumer"])
def test_server_answers_from_clickhouse(clickhouse: ClickHouseServer, tmp_path: Path, role: list[str]) -> None:
    database = clickhouse.create_database()
    with server(tmp_path, "-p", "0", *role, "-D", clickhouse.url(database)) as running:
        body = ",".join(map(str, range(5000))).encode()
        path = f"/v1.0/ingest?source={SOURCE_TEXT}&first=7"
        assert request(running.port, "POST", path, body, {"Content-Type": "text/plain"})[0] == 200
        status, headers, body = request(running.port, "GET", "/v1.0/records?limit=2")
        answer = json.loads(body)
        assert status == 200 and f"after={answer['next']}" in headers["Link"]
        assert [(record["sequence"], record["value"]) for record in answer["records"]] == [(7, 0), (8, 1)]
        query = f"after={answer['next']}&limit=1000000&format=text"
        assert list(map(int, request(running.port, "GET", f"/v1.0/records?{query}")[2].split())) == list(range(2, 5000))
        status, _, body = request(running.port, "GET", "/v1.0/records?order=desc&limit=3000&format=csv")
        ids = [line.partition(",")[0] for line in body.decode().splitlines()[1:]]
        assert len(set(ids)) == 3000 and all(later > earlier for later, earlier in pairwise(id_key(i) for i in ids))
        status, _, body = request(running.port, "GET", "/v1.0/records?after=7")
        assert status == 400 and "must be a cursor" in json.loads(body)["error"]
        clickhouse.query(f"DROP TABLE {database}.record")
        status, headers, body = request(running.port, "GET", "/v1.0/records")
        assert (status, headers["Retry-After"]) == (503, "5") and "a table is missing" in json.loads(body)["error"]


def id_key(text: str) -> tuple[int, int]:
    """The time of arrival and the sequence in an id."""
    return int(text.partition("-")[0]), int(text.rpartition("-")[2])


def test_another_host_answers_if_the_first_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two shards: each host has the records of both."""
    need_zookeeper()
    monkeypatch.setattr(store, "INSERT_INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(http, "CONNECT_TIMEOUT", 0.5)
    cluster = Cluster(tmp_path / "cluster", [1, 1])
    try:
        first, _ = cluster.servers
        with Proxy(first.port) as between:
            url = cluster.url(cluster.create_database()).replace(f":{first.port},", f":{between.port},")
            storage = ClickHouse(parse_url(url), cluster.name)
            for n in range(20):
                runs, values = block(n, n + 1)
                storage.append([runs[0]._replace(source=bytes([n]) * 16)], values)
            expected = b"".join(b"%d\n" % (10 * n) for n in range(20))
            assert storage.read(Query("text", 100)).lines == expected
            between.target = free_port()
            assert storage.read(Query("text", 100)).lines == expected
            monkeypatch.setattr(reading, "READ_TIMEOUT_SECONDS", 2.0)
            between.target = first.port
            between.hold(UP, DOWN)
            assert storage.read(Query("text", 100)).lines == expected
            storage.close()
    finally:
        cluster.kill()
