"""Odd but correct answers of ClickHouse, or of a proxy before it, do not repeat an insert; slow ones end it in time.

A relay changes the answers of a real server, Debian's 18.16 and a current engine, on their way to the store.
"""

import http.client
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import monotonic

import pytest
from support.clickhouses import ClickHouseHTTP, block, block_records, chdb_server, clickhouse_server
from support.harness import DEADLINE, Blocked, eventually, not_ready, server

from ringolib.client.producer import Producer
from ringolib.storage.clickhouse import store
from ringolib.storage.clickhouse.store import ClickHouse
from ringolib.storage.clickhouse.url import parse_url
from ringolib.storage.interface import StoreError

Answer = Callable[[bytes], Sequence[bytes]]
"""From the body of the real answer to the pieces of another one."""


def framed(body: bytes, headers: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\n%bContent-Length: %d\r\n\r\n%b" % (headers, len(body), body)


PROGRESS = b'X-ClickHouse-Progress: {"read_rows":"0","read_bytes":"0","total_rows":"0"}\r\n'
ODD: dict[str, Answer] = {
    "103 first": lambda body: [b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n", framed(body)],
    "100 first": lambda body: [b"HTTP/1.1 100 Continue\r\n\r\n" + framed(body)],
    "204": lambda body: [b"HTTP/1.1 204 No Content\r\n\r\n"],
    "99 progress headers": lambda body: [framed(body, PROGRESS * 99)],
    "5000 progress headers": lambda body: [framed(body, PROGRESS * 5000)],
    "header of 100 KB": lambda body: [framed(body, b"X-ClickHouse-Summary: %b\r\n" % (b"x" * 100_000))],
    "chunks": lambda body: [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-Trailer: x\r\n\r\n"],
    "byte by byte": lambda body: [bytes([byte]) for byte in framed(body)],
}


class Relay(ThreadingHTTPServer):
    """Forwards to `target`. While `answer` is set, it changes the answers to inserts of records."""

    daemon_threads = True

    def __init__(self, target: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = target
        self.answer: Answer | None = None
        self.pause_seconds = 0.0  # between the pieces of an answer
        self.inserts = 0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Relay

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.target, timeout=DEADLINE)
        headers = {name: value for name, value in self.headers.items() if name in ("Authorization", "Content-Type")}
        upstream.request("POST", self.path, body, headers)
        response = upstream.getresponse()
        content = response.read()
        upstream.close()
        pieces: Sequence[bytes] = [framed(content)]
        if response.status != 200:
            pieces = [b"HTTP/1.1 %d No\r\nContent-Length: %d\r\n\r\n%b" % (response.status, len(content), content)]
        elif body:
            self.server.inserts += 1
            if self.server.answer:
                pieces = self.server.answer(content)
        try:
            for piece in pieces:
                self.wfile.write(piece)
                time.sleep(self.server.pause_seconds)
        except OSError:
            self.close_connection = True  # the store has given up

    def log_message(self, *unused: object) -> None:
        pass


@pytest.fixture(scope="module", params=["18.16", "current"])
def clickhouse(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClickHouseHTTP]:
    start = clickhouse_server if request.param == "18.16" else chdb_server
    with start(tmp_path_factory.mktemp("clickhouse")) as running:
        yield running


@contextmanager
def running_relay(target: int) -> Iterator[Relay]:
    relay = Relay(target)
    thread = threading.Thread(target=relay.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield relay
    finally:
        relay.shutdown()
        thread.join(DEADLINE)
        relay.server_close()


@pytest.fixture
def relay(clickhouse: ClickHouseHTTP) -> Iterator[Relay]:
    with running_relay(clickhouse.port) as relay:
        yield relay


@pytest.fixture
def storage(clickhouse: ClickHouseHTTP, relay: Relay, monkeypatch: pytest.MonkeyPatch) -> Iterator[ClickHouse]:
    monkeypatch.setattr(store, "INSERT_INTERVAL_SECONDS", 0.0)
    opened = ClickHouse(parse_url(clickhouse.url(clickhouse.create_database(), relay.server_port)))
    yield opened
    opened.close()


@pytest.mark.parametrize("name", ODD)
def test_odd_answer_to_an_insert_is_its_only_answer(
    clickhouse: ClickHouseHTTP, relay: Relay, storage: ClickHouse, name: str
) -> None:
    relay.answer = ODD[name]
    for n in range(3):
        storage.append(*block(10 * n, 10 * n + 10))
    assert relay.inserts == 3 and storage.stats().failed_commits == 0
    assert clickhouse.records(storage._target.database) == block_records(0, 30)


@pytest.mark.parametrize(
    "answer",
    [
        lambda body: [b"HTTP/1.1 200 OK\r\n", *[PROGRESS] * 1000],
        lambda body: [b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", *[b" "] * 1000],
        lambda body: [b"HTTP/1.1 102 Processing\r\n\r\n"] * 1000,
    ],
    ids=["headers", "body", "interim answers"],
)
def test_insert_whose_answer_dribbles_fails_in_time(
    clickhouse: ClickHouseHTTP, relay: Relay, storage: ClickHouse, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "INSERT_TIMEOUT_SECONDS", 1.0)
    monkeypatch.setattr(store, "SUCCESS_VALID_SECONDS", 0.0)
    monkeypatch.setattr(ClickHouse, "SLOW_COMMIT_SECONDS", 0.3)
    relay.answer, relay.pause_seconds = answer, 0.02
    started = monotonic()
    call = Blocked(lambda: storage.append(*block(0, 10)))
    eventually(lambda: storage._inserting_since < monotonic() - 0.3)
    with pytest.raises(StoreError, match="an insert has had no complete answer for"):
        storage.check()
    with pytest.raises(StoreError, match="no complete answer within 1 s"):
        call.result()
    assert monotonic() - started < 4
    relay.answer = None
    storage.append(*block(0, 20))
    storage.check()
    assert clickhouse.records(storage._target.database) == block_records(0, 20)


def test_server_is_not_ready_while_an_insert_dribbles(clickhouse: ClickHouseHTTP, relay: Relay, tmp_path: Path) -> None:
    url = clickhouse.url(clickhouse.create_database(), relay.server_port)
    patch = "storage.clickhouse.store.INSERT_TIMEOUT_SECONDS = 4.0; "
    patch += "storage.clickhouse.store.ClickHouse.SLOW_COMMIT_SECONDS = 0.5; "
    patch += "storage.clickhouse.store.SUCCESS_VALID_SECONDS = 0.0"
    with server(tmp_path, "-p", "0", "-I", "false", "-D", url, patch=patch) as running:
        assert not_ready(running) == []
        relay.answer, relay.pause_seconds = lambda body: [b"HTTP/1.1 102 Processing\r\n\r\n"] * 1000, 0.02
        with Producer(running.url) as producer:
            producer.send(range(100))
            eventually(lambda: not_ready(running) == ["store_failing"])
            relay.answer = None
            producer.flush(DEADLINE)
        eventually(lambda: not_ready(running) == [])


@pytest.mark.parametrize(("window", "counted"), [(0, "20"), (1000, "10")])
def test_materialized_view_counts_a_repeated_insert_unless_it_keeps_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int, counted: str
) -> None:
    """As docs/clickhouse.md describes. The engine is a current one: 18.16 has no such log."""
    monkeypatch.setattr(store, "INSERT_INTERVAL_SECONDS", 0.0)
    with chdb_server(tmp_path) as current, running_relay(current.port) as relay:
        database = current.create_database()
        storage = ClickHouse(parse_url(current.url(database, relay.server_port)))
        current.query(
            f"CREATE TABLE {database}.counts (value Int64, n UInt64) ENGINE = SummingMergeTree ORDER BY value "
            f"SETTINGS non_replicated_deduplication_window = {window}"
        )
        select = f"SELECT value, count() AS n FROM {database}.record GROUP BY value"
        current.query(f"CREATE MATERIALIZED VIEW {database}.view TO {database}.counts AS {select}")
        answers = [b"HTTP/1.1 503 Lost\r\nContent-Length: 0\r\n\r\n"]  # the insert has happened, and is repeated
        relay.answer = lambda body: [answers.pop() if answers else framed(body)]
        storage.append(*block(0, 10))
        assert relay.inserts == 2 and current.records(database) == block_records(0, 10)
        assert current.query(f"SELECT sum(n) FROM {database}.counts") == [[counted]]
        storage.close()
