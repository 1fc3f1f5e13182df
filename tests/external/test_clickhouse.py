"""The store on ClickHouse against real servers: passwords, tables, the pace of inserts, and failures of a server.

Most tests run against Debian's 18.16 as a process. Features of current versions are tested with chdb. What all stores
have in common is tested in `test_stores.py`.
"""

import json
import logging
import random
import socket
import ssl
import threading
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from support.certificates import Authority
from support.checks import Load
from support.clickhouses import (
    PASSWORD,
    SOURCE,
    SOURCE_TEXT,
    ChdbServer,
    ClickHouseServer,
    block,
    block_records,
    chdb_server,
    clickhouse_server,
)
from support.harness import DEADLINE, Blocked, ServerProcess, eventually, free_port, not_ready, request, seeded, server
from support.proxy import DOWN, UP, Proxy

from ringolib.storage.clickhouse import http, schema, store
from ringolib.storage.clickhouse.http import RetryableError
from ringolib.storage.clickhouse.store import ClickHouse
from ringolib.storage.clickhouse.url import PASSWORD_VARIABLE, parse_url
from ringolib.storage.group_commit import PendingBlock, Turn
from ringolib.storage.interface import StoreError
from ringolib.wire import Run

COLUMNS = "source UUID, sequence UInt64, value Int64, version UInt64"
WITHOUT_VERSION = "ENGINE = ReplacingMergeTree ORDER BY (source, sequence)"
NEWER = f"SELECT toUUID('{SOURCE_TEXT}') AS identity, 2 AS schema"
QUOTED_PASSWORD = "s3cret%2F%40%3A%3F"


@pytest.fixture(scope="module")
def clickhouse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClickHouseServer]:
    with clickhouse_server(tmp_path_factory.mktemp("clickhouse")) as running:
        yield running


@pytest.fixture(scope="module")
def chdb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChdbServer]:
    with chdb_server(tmp_path_factory.mktemp("chdb")) as running:
        yield running


@pytest.fixture
def database(clickhouse: ClickHouseServer) -> str:
    return clickhouse.create_database()


@pytest.fixture
def storage(clickhouse: ClickHouseServer, database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ClickHouse]:
    monkeypatch.setattr(store, "INSERT_INTERVAL_SECONDS", 0.0)
    opened = ClickHouse(parse_url(clickhouse.url(database)))
    yield opened
    opened.close()


@pytest.fixture
def proxy(clickhouse: ClickHouseServer) -> Iterator[Proxy]:
    with Proxy(clickhouse.port) as running:
        yield running


# The password.


def test_password_appears_in_no_output(clickhouse: ClickHouseServer, database: str, tmp_path: Path) -> None:
    url = clickhouse.url(database)
    assert QUOTED_PASSWORD in url
    with server(tmp_path, "-p", "0", "-T", "0", "-d", "-D", url) as process:
        assert f"storing in clickhouse://bob@127.0.0.1:{clickhouse.port}/{database}" in process.greeting
        with Load(process.url, random.Random(1), 1) as load:
            load.finish()
        stats = json.loads(process.get("/v1.0/stats")[2])
        assert stats["info"]["database"] == f"clickhouse://bob@127.0.0.1:{clickhouse.port}/{database}"
        assert stats["options"][-1] == f"clickhouse://bob:***@127.0.0.1:{clickhouse.port}/{database}"
        assert stats["stats"]["powerSafe"] is False
        clickhouse.query(f"DROP TABLE {database}.record")
        eventually(lambda: not_ready(process) == ["store_failing"])
        texts = [process.get(path)[2].decode() for path in ("/", "/v1.0/stats", "/metrics", "/v1.0/ready")]
        process.stop()
        texts += [process.greeting, process.tally, process.errors.read_text()]
        assert "not_power_safe" in texts[-1] and database in texts[-1]
        for text in texts:
            assert PASSWORD not in text and QUOTED_PASSWORD not in text and "s3cret" not in text


def test_password_is_read_from_the_environment(
    clickhouse: ClickHouseServer, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"clickhouse://bob@127.0.0.1:{clickhouse.port}/{database}"
    with pytest.raises(StoreError, match=f"a password is required.*{PASSWORD_VARIABLE}"):
        ClickHouse(parse_url(address))
    monkeypatch.setenv(PASSWORD_VARIABLE, PASSWORD)
    ClickHouse(parse_url(address)).close()
    assert parse_url("clickhouse://bob:other@h").password == "other", "the password in the URL comes first"


@pytest.mark.parametrize(
    ("address", "flags", "message"),
    [
        ("bob:wrong@127.0.0.1:{port}/{database}", [], "check the password"),
        ("nobody:x@127.0.0.1:{port}/{database}", [], "check the user name"),
        ("reader@127.0.0.1:{port}/{database}", [], "the user is read-only"),
        ("127.0.0.1:{port}/nope", [], "CREATE DATABASE"),
        ("127.0.0.1:{port}/{database}", ["--clickhouse_cluster", "c"], "has no cluster of this name (clusters: none)"),
        ("127.0.0.1:{port}/{database}", ["--retain", "3"], "is ClickHouse 18.16.1, but 19.6 or newer is required"),
        ("127.0.0.1:{port},localhost:{port}/{database}", [], "several hosts require --clickhouse_cluster"),
        ("127.0.0.1:{free}/{database}", [], "Connection refused"),
        ("nowhere.invalid/{database}", [], "nowhere.invalid"),
        ("127.0.0.1:{tcp}/{database}", [], "127.0.0.1"),
    ],
)
def test_unavailable_database_is_reported_in_one_line(
    clickhouse: ClickHouseServer, database: str, tmp_path: Path, address: str, flags: list[str], message: str
) -> None:
    url = "clickhouse://" + address.format(
        port=clickhouse.port, database=database, free=free_port(), tcp=clickhouse.ports.tcp
    )
    with pytest.raises(AssertionError) as stop:
        ServerProcess(tmp_path, "-p", "0", "-I", "false", "-D", url, *flags)
    (line,) = str(stop.value).removeprefix("did not start: ").splitlines()
    assert line.startswith("ringoexp: error: clickhouse://") and message in line


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE {}.record (x UInt8) ENGINE = Memory",
        "CREATE TABLE {}.record (source UUID, sequence UInt64, value Int64, version UInt64) ENGINE = Memory",
        "CREATE VIEW {}.records AS SELECT 1",
    ],
)
def test_tables_of_other_programs_are_left_alone(clickhouse: ClickHouseServer, database: str, statement: str) -> None:
    clickhouse.query(statement.format(database))
    with pytest.raises(StoreError, match="belongs to another program: use another database"):
        ClickHouse(parse_url(clickhouse.url(database)))
    assert len(clickhouse.query(f"SHOW TABLES FROM {database}")) == 1


def test_missing_tables_are_created(clickhouse: ClickHouseServer, database: str) -> None:
    ClickHouse(parse_url(clickhouse.url(database))).close()
    for missing in (["ringoexp"], ["ringoexp", "records"]):
        for name in missing:
            clickhouse.query(f"DROP TABLE {database}.{name}")
        ClickHouse(parse_url(clickhouse.url(database))).close()
    assert len(clickhouse.query(f"SHOW TABLES FROM {database}")) == 3


def test_table_without_its_definition_yet_is_accepted(
    clickhouse: ClickHouseServer, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ClickHouse 18.16 lists a new table with an empty definition for a moment, while another server creates it."""
    ClickHouse(parse_url(clickhouse.url(database))).close()
    for name in ("ringoexp", "records"):
        clickhouse.query(f"DROP TABLE {database}.{name}")
    list_tables, calls = schema._list_tables, []

    def list_without_definition(server: http.Server, database: str, timeout: float) -> dict[str, schema._Table]:
        tables = list_tables(server, database, timeout)
        if not calls:
            tables["record"] = tables["record"]._replace(definition="")
        calls.append(database)
        return tables

    monkeypatch.setattr(schema, "_list_tables", list_without_definition)
    ClickHouse(parse_url(clickhouse.url(database))).close()
    assert len(calls) == 2 and len(clickhouse.query(f"SHOW TABLES FROM {database}")) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["DROP TABLE {}.record"], "has no table record"),
        (["DROP TABLE {}.records"], "has no table records"),
        (["ALTER TABLE {}.record ADD COLUMN more UInt8"], "different schema"),
        (["DROP TABLE {}.record", f"CREATE TABLE {{}}.record ({COLUMNS}) {WITHOUT_VERSION}"], "different schema"),
        (
            ["DROP TABLE {}.ringoexp", f"CREATE VIEW {{}}.ringoexp AS {NEWER}"],
            "has schema version 2, and this program supports 1",
        ),
    ],
)
def test_different_schema_is_refused_at_start_and_while_running(
    storage: ClickHouse, clickhouse: ClickHouseServer, database: str, change: list[str], message: str
) -> None:
    storage.append(*block(0, 5))
    for statement in change:
        clickhouse.query(statement.format(database))
    with pytest.raises(StoreError, match=message):
        ClickHouse(parse_url(clickhouse.url(database)))
    storage._tables = None  # as after any failure
    for _ in range(2):
        with pytest.raises(StoreError, match=f"clickhouse://.*({message}|restart)"):
            storage.append(*block(5, 10))
    assert storage.stats().failed_commits == 2 and storage.stats().error


def test_replaced_tables_are_not_used(storage: ClickHouse, clickhouse: ClickHouseServer, database: str) -> None:
    clickhouse.query(f"DROP DATABASE {database}")
    clickhouse.query(f"CREATE DATABASE {database}")
    with pytest.raises(StoreError):
        storage.append(*block(0, 5))
    ClickHouse(parse_url(clickhouse.url(database))).close()
    with pytest.raises(StoreError, match="the tables were deleted or replaced"):
        storage.append(*block(0, 5))
    storage._error = None
    with pytest.raises(StoreError, match="the tables were deleted or replaced"):
        storage.check()


# The pace.


def test_first_insert_is_immediate_and_the_next_waits_for_the_interval(
    storage: ClickHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "INSERT_INTERVAL_SECONDS", 1.0)
    began = []
    insert = storage._insert

    def record_start(rows: "array[int]", deadline: float) -> None:
        began.append((monotonic(), len(rows) // 5))
        insert(rows, deadline)

    monkeypatch.setattr(storage, "_insert", record_start)
    start = monotonic()
    storage.append(*block(0, 1))
    others = [Blocked(lambda n=n: storage.append(*block(n, n + 1))) for n in range(1, 9)]
    for other in others:
        other.result()
    assert [records for _, records in began] == [1, 8]
    assert began[0][0] - start < 0.5 and 1.0 <= began[1][0] - began[0][0] < 3.0


def test_full_insert_does_not_wait_for_the_interval(
    storage: ClickHouse, clickhouse: ClickHouseServer, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "INSERT_INTERVAL_SECONDS", 60.0)
    monkeypatch.setattr(store, "FULL_INSERT_RECORDS", 1000)
    storage.append(*block(0, 1))
    waiting = Blocked(lambda: storage.append(*block(1, 400)))
    assert waiting.still()
    storage.append(*block(400, 1100))
    waiting.result()
    assert storage.stats().commits == 2
    assert clickhouse.records(database) == block_records(0, 1100)


def test_group_size_is_limited(storage: ClickHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClickHouse, "MAX_GROUP_COST", 1000)
    waiting = [PendingBlock(*block(n, n + 600), 16) for n in range(5)]
    with storage._lock:
        storage._queue, storage._queued_cost = list(waiting), 3000
        assert [len(storage._next_group()) for _ in range(3)] == [2, 2, 1]
        assert storage._queued_cost == 0 and storage._queue == []


def test_large_block_becomes_one_part(storage: ClickHouse, clickhouse: ClickHouseServer, database: str) -> None:
    storage.append([Run(SOURCE, 0, 1_048_576)], array("q", range(1_048_576)))
    assert clickhouse.query("SELECT count(), sum(value) FROM record", database) == [
        ["1048576", str(1_048_576 * 1_048_575 // 2)]
    ]
    parts = clickhouse.query(f"SELECT rows FROM system.parts WHERE active AND database = '{database}'")
    assert parts == [["1048576"]]


# Failures during an insert.


def test_lost_answer_does_not_duplicate_a_record(
    clickhouse: ClickHouseServer, database: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "INSERT_INTERVAL_SECONDS", 0.0)
    storage = ClickHouse(parse_url(clickhouse.url(database, proxy.port)))
    storage.append(*block(0, 5))
    proxy.hold(DOWN)
    call = Blocked(lambda: storage.append(*block(5, 1000)))
    eventually(lambda: clickhouse.query("SELECT count() FROM record", database) == [["1000"]], "the insert is done")
    assert call.still()
    proxy.cut(reset=True)
    proxy.heal()
    call.result()
    assert clickhouse.query("SELECT count() FROM record", database) == [["1995"]], "stored twice until the next merge"
    assert clickhouse.records(database) == block_records(0, 1000)
    assert storage.stats()[:4] == (1000, 0, 2, 0)
    storage.close()


@pytest.mark.parametrize("reset", [True, False])
def test_connection_cut_during_an_insert_loses_no_record(
    clickhouse: ClickHouseServer, database: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, reset: bool
) -> None:
    monkeypatch.setattr(store, "INSERT_INTERVAL_SECONDS", 0.0)
    rng = random.Random(seeded())
    storage = ClickHouse(parse_url(clickhouse.url(database, proxy.port)))
    for turn in range(5):
        proxy.cut_after(rng.randrange(400_000), UP, reset)
        storage.append(*block(10_000 * turn, 10_000 * turn + 10_000))
    assert proxy.cuts >= 4
    assert clickhouse.records(database) == block_records(0, 50_000)
    storage.close()


def test_insert_fails_if_the_server_does_not_answer(
    clickhouse: ClickHouseServer,
    database: str,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    for name, value in (
        ("INSERT_INTERVAL_SECONDS", 0.0),
        ("INSERT_TIMEOUT_SECONDS", 1.0),
        ("CHECK_TIMEOUT_SECONDS", 0.3),
        ("SUCCESS_VALID_SECONDS", 0.0),
    ):
        monkeypatch.setattr(store, name, value)
    monkeypatch.setattr(schema, "QUERY_TIMEOUT_SECONDS", 0.3)
    storage = ClickHouse(parse_url(clickhouse.url(database, proxy.port)))
    storage.append(*block(0, 5))
    proxy.hold(UP, DOWN)
    start = monotonic()
    with pytest.raises(StoreError, match=r"clickhouse://bob@127.0.0.1:\d+/\w+: no complete answer within"):
        storage.append(*block(5, 10))
    assert monotonic() - start < 4
    with pytest.raises(StoreError, match="no complete answer"):
        storage.check()
    assert "no complete answer" in (storage.stats().error or "")
    proxy.heal()
    storage.append(*block(5, 10))
    storage.check()
    assert storage.stats()[2:5] == (2, 1, None)
    assert clickhouse.records(database) == block_records(0, 10)
    events = [record.getMessage() for record in caplog.records]
    assert [event for event in events if event.startswith("store_")] == ["store_failing", "store_ok"]
    storage.close()


def test_check_times_out(
    clickhouse: ClickHouseServer, database: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "CHECK_TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(schema, "QUERY_TIMEOUT_SECONDS", DEADLINE)
    storage = ClickHouse(parse_url(clickhouse.url(database, proxy.port)))
    proxy.hold(UP, DOWN)
    start = monotonic()
    with pytest.raises(StoreError, match="no complete answer"):
        storage.check()
    assert monotonic() - start < 4
    proxy.heal()
    storage.close()


def test_check_keeps_the_error_while_an_insert_is_retried(storage: ClickHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries may take longer than FAILURE_VALID_SECONDS, and an empty insert succeeds without the quorum."""
    monkeypatch.setattr(store, "FAILURE_VALID_SECONDS", 0.0)
    monkeypatch.setattr(store, "SUCCESS_VALID_SECONDS", 0.0)
    tried, go = threading.Semaphore(0), threading.Semaphore(0)

    def insert(rows: "array[int]", deadline: float) -> None:
        tried.release()
        go.acquire(timeout=DEADLINE)
        raise RetryableError("no quorum")

    monkeypatch.setattr(storage, "_insert", insert)
    for error in (None, "no quorum"):
        call = Blocked(lambda: storage.append(*block(0, 5)))
        assert tried.acquire(timeout=DEADLINE)
        storage.check()
        assert (error or "") in (storage.stats().error or "") and bool(storage.stats().error) == bool(error)
        go.release()
        with pytest.raises(StoreError, match="no quorum"):
            call.result()
    storage.check()
    assert storage.stats().error is None


def test_stats_report_the_error_while_an_insert_is_retried(
    storage: ClickHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "SUCCESS_VALID_SECONDS", 0.0)
    server, healed = storage._servers[0], threading.Event()
    post = server.post

    def failing(sql: str, body: bytes, *more: Any) -> bytes:
        if body and not healed.is_set():
            raise RetryableError(f"{server.name}: no quorum")
        return post(sql, body, *more)

    monkeypatch.setattr(server, "post", failing)
    call = Blocked(lambda: storage.append(*block(0, 5)))
    eventually(lambda: "no quorum" in (storage.stats().error or ""))
    storage.check()
    assert call.still() and "no quorum" in (storage.stats().error or "")
    healed.set()
    call.result()
    assert storage.stats()[2:5] == (1, 0, None)


def test_records_that_waited_for_a_failed_insert_get_less_time(
    storage: ClickHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their link would time out before another full INSERT_TIMEOUT_SECONDS has passed."""
    left: list[float] = []
    monkeypatch.setattr(storage, "_insert", lambda rows, deadline: left.append(deadline - monotonic()))
    for waited in (0, 10, 20):
        storage.append(*block(0, 5))
        waiting = PendingBlock(*block(0, 5), 16)
        waiting.arrived_at -= waited
        with storage._lock:
            storage._turn = Turn.COMMIT
        storage._commit([waiting, PendingBlock(*block(5, 10), 16)])
    assert [round(seconds) for seconds in left] == [20, 20, 20, 10, 20, 8]


def test_insert_timeout_includes_the_inspection_of_the_tables(
    storage: ClickHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables, deadlines = storage._tables, []
    assert tables
    server = storage._servers[0]

    def inspect_slowly(server: http.Server) -> schema.Tables:
        eventually(lambda: monotonic() - start > 1)
        return tables

    def post(sql: str, body: memoryview, timeout: float, settings: object) -> bytes:
        deadlines.append(server.deadline)
        return b""

    monkeypatch.setattr(storage, "_inspect_same", inspect_slowly)
    monkeypatch.setattr(server, "post", post)
    storage._tables = None
    storage._sized_at = start = monotonic()
    storage.append(*block(0, 5))
    assert deadlines[0] < start + store.INSERT_TIMEOUT_SECONDS + 0.5, "the inspection took a second of it"


def test_insert_is_retried_while_there_are_too_many_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "INSERT_INTERVAL_SECONDS", 0.0)
    few = "<merge_tree><parts_to_delay_insert>3</parts_to_delay_insert><parts_to_throw_insert>3</parts_to_throw_insert>"
    with clickhouse_server(tmp_path / "clickhouse", extra=f"{few}</merge_tree>") as clickhouse:
        database = clickhouse.create_database()
        storage = ClickHouse(parse_url(clickhouse.url(database)))
        clickhouse.query("SYSTEM STOP MERGES")
        logged: list[str] = []
        monkeypatch.setattr(store.log, "debug", lambda *arguments, **more: logged.append(str(arguments)))
        for n in range(3):
            storage.append(*block(n, n + 1))
        call = Blocked(lambda: storage.append(*block(3, 4)))
        eventually(lambda: any("(code 252)" in line for line in logged), "too many parts")
        assert call.still()
        clickhouse.query("SYSTEM START MERGES")
        clickhouse.query(f"OPTIMIZE TABLE {database}.record FINAL")
        call.result()
        assert clickhouse.records(database) == block_records(0, 4)
        storage.close()


def test_closed_idle_connection_is_replaced(storage: ClickHouse, clickhouse: ClickHouseServer, database: str) -> None:
    storage.append(*block(0, 5))
    storage._servers[0]._sock.shutdown(socket.SHUT_RDWR)
    storage.append(*block(5, 10))
    assert clickhouse.records(database) == block_records(0, 10) and storage.stats().failed_commits == 0


def test_two_consumers_share_a_database(clickhouse: ClickHouseServer, database: str, tmp_path: Path) -> None:
    """They agree on one database when both create it; a record sent to both is shown once, with its first value."""
    calls = [Blocked(lambda: ClickHouse(parse_url(clickhouse.url(database)))) for _ in range(4)]
    stores = [call.result() for call in calls]
    assert len({opened.identity for opened in stores}) == 1
    for n, opened in enumerate(stores):
        opened.append([Run(SOURCE, 10 * n, 20)], array("q", [n] * 20))
    values = [value for _, value in sorted(clickhouse.records(database).items())]
    assert values == [0] * 20 + [1] * 10 + [2] * 10 + [3] * 10
    for opened in stores:
        opened.close()
    flags = ["-D", clickhouse.url(database)]
    with (
        server(tmp_path, "-p", "0", "-I", "false", *flags) as one,
        server(tmp_path, "-p", "0", "-I", "false", *flags) as two,
    ):
        answers = [json.loads(consumer.get("/v1.0/ready")[2]) for consumer in (one, two)]
        assert answers == [{"ready": True, "store": stores[0].identity}] * 2


def test_repeated_post_is_stored_once_by_any_consumer(
    clickhouse: ClickHouseServer, database: str, tmp_path: Path
) -> None:
    """A client repeats its request, with other values, at another consumer. The last number there is can be stored."""
    flags = ["-p", "0", "-I", "false", "-D", clickhouse.url(database)]
    path, last = f"/v1.0/ingest?source={SOURCE_TEXT}&first=", 2**63 - 2
    with server(tmp_path, *flags) as one, server(tmp_path, *flags) as two:
        for consumer, first, body in ((one, 0, b"5 6"), (two, 0, b"7,8,9"), (two, last, b"10"), (one, last, b"11")):
            status, _, answer = request(consumer.port, "POST", f"{path}{first}", body, {"Content-Type": "text/plain"})
            count = len(body.replace(b",", b" ").split())
            assert (status, json.loads(answer)) == (200, {"stored": count, "next": first + count})
        values = [value for _, value in sorted(clickhouse.records(database).items())]
        assert values == [5, 6, 9, 10]


def test_first_value_is_kept_if_the_clock_goes_back(
    storage: ClickHouse, clickhouse: ClickHouseServer, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([10**18, 9 * 10**17])
    monkeypatch.setattr(store.time, "time_ns", lambda: next(now))
    storage.append([Run(SOURCE, 0, 5)], array("q", [1] * 5))
    storage.append([Run(SOURCE, 0, 6)], array("q", [2] * 6))
    assert sorted(clickhouse.records(database).values()) == [1, 1, 1, 1, 1, 2]


def test_inserts_work_over_tls(
    clickhouse: ClickHouseServer, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy adds TLS to Debian's server. SSL_CERT_FILE makes its authority one of the system's."""
    authority = Authority(tmp_path)
    pair = authority.issue()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert, pair.key)
    done = threading.Event()
    threads: list[threading.Thread] = []

    def pump(one: socket.socket, other: socket.socket) -> None:
        try:
            while data := one.recv(65536):
                other.sendall(data)
        except OSError:
            pass
        for sock in (one, other):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def accept() -> None:
        while not done.is_set():
            try:
                peer, _ = listener.accept()
                front = stack.enter_context(context.wrap_socket(peer, server_side=True))
            except OSError:
                continue
            back = stack.enter_context(socket.create_connection(("127.0.0.1", clickhouse.port)))
            for pair in ((front, back), (back, front)):
                threads.append(threading.Thread(target=pump, args=pair))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as stack:
        listener.settimeout(0.1)
        acceptor = threading.Thread(target=accept)
        acceptor.start()
        url = clickhouse.url(database, listener.getsockname()[1]).replace("clickhouse:", "clickhouses:")
        try:
            with pytest.raises(StoreError, match="certificate"):
                ClickHouse(parse_url(url))
            monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca))
            storage = ClickHouse(parse_url(url))
            storage.append(*block(0, 1000))
            storage.close()
        finally:
            done.set()
            acceptor.join(DEADLINE)
            for thread in threads:
                thread.join(DEADLINE)
    assert clickhouse.records(database) == block_records(0, 1000)
    monkeypatch.setattr(http, "CONNECT_TIMEOUT", 0.5)
    with pytest.raises(StoreError, match="does not speak TLS|no complete answer"):  # the server may wait for more input
        ClickHouse(parse_url(clickhouse.url(database).replace("clickhouse:", "clickhouses:")))


# Current versions, with chdb.


def test_current_server_gets_all_safe_settings(chdb: ChdbServer, caplog: pytest.LogCaptureFixture) -> None:
    database = chdb.create_database()
    storage = ClickHouse(parse_url(chdb.url(database)), retain_days=0.5)
    assert storage.power_safe and not caplog.records
    tables = storage._tables
    assert tables and tables.accepts_token and tables.settings["async_insert"] == "0"
    ((definition,),) = chdb.query(
        f"SELECT engine_full FROM system.tables WHERE database = '{database}' AND name = 'record'"
    )
    assert (
        "fsync_after_insert = 1" in definition
        and "fsync_part_directory = 1" in definition
        and "toIntervalSecond(43200)" in definition
    )
    storage.append(*block(0, 5))
    storage.close()
    again = ClickHouse(parse_url(chdb.url(database)), retain_days=1.0)
    assert again.identity == storage.identity
    again.close()
    ((definition,),) = chdb.query(
        f"SELECT engine_full FROM system.tables WHERE database = '{database}' AND name = 'record'"
    )
    assert "toIntervalSecond(86400)" in definition
    assert chdb.records(database) == block_records(0, 5)


def test_old_records_are_deleted(chdb: ChdbServer, monkeypatch: pytest.MonkeyPatch) -> None:
    database = chdb.create_database()
    storage = ClickHouse(parse_url(chdb.url(database)), retain_days=1.0)
    storage.append(*block(0, 5))
    monkeypatch.setattr(store.time, "time_ns", lambda: 10**18)
    storage._last_ns = 0
    storage.append(*block(5, 10))
    chdb.query("OPTIMIZE TABLE record FINAL", database)
    assert chdb.records(database) == block_records(0, 5)
    storage.close()
