"""POST: curl as people use it, text and JSON, requests that are repeated, and bodies in chunks."""

import json
import random
import re
import shutil
import socket
import struct
import subprocess
import time
import uuid
from array import array
from collections.abc import Iterator
from functools import partial
from http.client import HTTPException
from pathlib import Path
from threading import Event

import pytest
from support.checks import Servers, problems
from support.harness import (
    DEADLINE,
    ROLES,
    Blocked,
    RawClient,
    ServerProcess,
    connected,
    eventually,
    exchange,
    frame,
    free_port,
    in_order,
    request,
    rows,
    seeded,
    server,
)

from ringolib.net.frames import MAX_MESSAGE
from ringolib.wire import SUBPROTOCOL, Run, encode_batch, encode_plain

FORM = {"Content-Type": "application/x-www-form-urlencoded"}
TEXT = {"Content-Type": "text/plain"}
HEAD = b"POST /v1.0/ingest HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n"
ALIVE = b"GET /v1.0/alive HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module", params=["publisher", "consumer"])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp(request.param)
    with server(directory, *ROLES[request.param]) as process:
        process.database = directory / "ringoexp.db"  # type: ignore[attr-defined]
        yield process


@pytest.fixture(scope="module", params=["publisher", "consumer"])
def spacious(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server for millions of records. No test reads its database."""
    with server(tmp_path_factory.mktemp(request.param), *ROLES[request.param]) as process:
        yield process


def values(running: ServerProcess) -> list[int]:
    return [value for _, _, value in rows(running.database)]  # type: ignore[attr-defined]


def numbered(source: uuid.UUID, first: int) -> str:
    return f"/v1.0/ingest?source={source}&first={first}"


def statuses(answer: bytes) -> list[int]:
    return [int(code) for code in re.findall(rb"^HTTP/1\.1 (\d+) ", answer, re.M)]


# As people use it.

LINES = "".join(f"{n}\n" for n in range(1, 1001)).encode()


@pytest.mark.parametrize(
    ("flags", "stored"),
    [
        (["-d", "42"], [42]),
        (["-d", "1 2,3"], [1, 2, 3]),
        (["-d", "-7", "-d", "8"], None),  # curl joins them with &
        (["--data-binary", "@-"], list(range(1, 1001))),
        (["--data-binary", "@-", "-H", "Content-Type: text/plain"], list(range(1, 1001))),
        (["-d", "@-"], None),  # curl removes the ends of lines
        (["-X", "POST", "-T", "-", "-H", "Content-Type: text/plain"], list(range(1, 1001))),
        (["-X", "POST", "-T", "-", "-H", "Content-Type: application/x-ndjson"], list(range(1, 1001))),
        (["-d", "[1,2,3]", "-H", "Content-Type: application/json"], [1, 2, 3]),
        (["-d", "[1,2,3]"], None),
        (["--data-urlencode", "value=42"], None),
        (["-F", "value=42"], None),
        (["-T", "-"], None),  # PUT
    ],
    ids=lambda value: " ".join(value) if value and isinstance(value[0], str) else "",
)
def test_curl_stores_what_it_is_given(running: ServerProcess, flags: list[str], stored: list[int] | None) -> None:
    if not shutil.which("curl"):
        pytest.skip("needs curl")
    before = len(values(running))
    command = ["curl", "-s", *flags, f"http://localhost:{running.port}/v1.0/ingest"]
    answer = json.loads(subprocess.run(command, input=LINES, capture_output=True, timeout=DEADLINE).stdout)
    assert answer == {"stored": len(stored)} if stored else answer["error"]
    assert sorted(values(running)[before:]) == sorted(stored or [])


@pytest.mark.parametrize(
    ("headers", "body", "hint"),
    [
        ({}, b"1\n2", "for decimal text, send Content-Type: text/plain"),
        (FORM, bytes(4), "send Content-Type: application/octet-stream"),
        (TEXT, b"[1]", "for JSON, send Content-Type: application/json"),
    ],
)
def test_wrong_type_is_told_the_right_one(
    running: ServerProcess, headers: dict[str, str], body: bytes, hint: str
) -> None:
    status, _, answer = request(running.port, "POST", "/v1.0/ingest", body, headers)
    assert status == 400 and json.loads(answer)["error"].endswith(hint)


def test_answer_says_where_the_first_bad_integer_is(running: ServerProcess) -> None:
    """And nothing is stored; the next request on the connection is answered."""
    before, refused = len(values(running)), running.stats()["recordsRefused"]
    body = b"1 2\n3 four 5"
    data = HEAD + b"Content-Type: text/plain\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    answer = exchange(running.port, data + ALIVE, half_close=True)
    assert statuses(answer) == [400, 200]
    fault = json.loads(answer.partition(b"\r\n\r\n")[2].partition(b"\n")[0])
    assert fault == {"error": "integer 4 (line 2, byte 3): expected a decimal integer", "index": 3}
    assert len(values(running)) == before and running.stats()["recordsRefused"] == refused + 1


@pytest.mark.slow
def test_text_has_as_many_integers_as_bytes_may_have(spacious: ServerProcess) -> None:
    before = spacious.stats()["recordsStored"]
    limit = MAX_MESSAGE // 8
    status, _, answer = request(spacious.port, "POST", "/v1.0/ingest", b"1 " * (limit + 1), TEXT)
    assert status == 413 and str(limit) in json.loads(answer)["error"]
    status, _, answer = request(spacious.port, "POST", "/v1.0/ingest", b"1 " * limit, TEXT)
    assert (status, json.loads(answer)) == (200, {"stored": limit})
    stats = spacious.stats()
    assert (stats["recordsStored"], stats["unfinishedBytes"]) == (before + limit, 0)


@pytest.mark.slow
def test_million_integers_of_text_do_not_stop_the_server(spacious: ServerProcess) -> None:
    """Other clients are answered while a large text is decoded."""
    text = "\n".join(map(str, range(1_000_000))).encode()
    posting = Blocked(lambda: request(spacious.port, "POST", "/v1.0/ingest", text, TEXT)[0])
    worst = 0.0
    with RawClient(spacious.port) as client:
        for count in range(1, 100_000):
            started = time.monotonic()
            client.send(frame(2, struct.pack(">i", 7)))
            client.acked(count)
            worst = max(worst, time.monotonic() - started)
            if not posting.still(0):
                break
    assert posting.result() == 200 and count > 1
    print(f"{count} acks meanwhile, the slowest after {worst * 1000:.0f} ms")


# Requests that are repeated.


def test_repeated_request_is_stored_once(running: ServerProcess) -> None:
    source = uuid.uuid4()
    for first, body, end in [(0, b"5 6 7", 3), (0, b"5 6 7", 3), (2, b"7 8", 4), (1, b"9 9 9 9", 5), (3, b"1", 4)]:
        status, _, answer = request(running.port, "POST", numbered(source, first), body, TEXT)
        assert status == 200
        assert json.loads(answer) == {"stored": len(body.split()), "next": end}, "records known before count, too"
    assert in_order(running.database, source) == [5, 6, 7, 8, 9]  # type: ignore[attr-defined]


def test_gap_between_requests_may_be_filled_later(running: ServerProcess) -> None:
    source = uuid.uuid4()
    for first in (4, 2, 0):
        assert request(running.port, "POST", numbered(source, first), encode_plain([first, first + 1]))[0] == 200
    assert in_order(running.database, source) == list(range(6))  # type: ignore[attr-defined]


def test_source_on_websocket_and_in_posts_is_one_source(running: ServerProcess) -> None:
    """Both send the same records at the same time."""
    source, total, size = uuid.uuid4(), 2000, 40

    def post() -> None:
        for first in range(0, total, size):
            body = json.dumps(list(range(first, first + size))).encode()
            kind = {"Content-Type": "application/json"}
            status, _, answer = request(running.port, "POST", numbered(source, first), body, kind)
            assert (status, json.loads(answer)["stored"]) == (200, size)

    posting = Blocked(post)
    with RawClient(running.port, {"Sec-WebSocket-Protocol": SUBPROTOCOL}) as client:
        for first in reversed(range(0, total, size)):
            run = Run(source.bytes, first, size)
            client.send(frame(2, encode_batch([run], array("q", range(first, first + size)))))
        client.acked(total)
    posting.result()
    assert in_order(running.database, source) == list(range(total))  # type: ignore[attr-defined]


def test_request_without_its_answer_is_repeated(running: ServerProcess) -> None:
    """The client goes away at any moment. It repeats the request until there is an answer."""
    source, body = uuid.uuid4(), LINES
    path = numbered(source, 0)
    data = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\n\r\n"
    for part in (1.0, 1.0, 0.5):
        with connected(running.port) as lost:
            lost.sendall((data.encode() + body)[: int(part * (len(data) + len(body)))])
    assert request(running.port, "POST", path, body, TEXT)[0] == 200
    assert in_order(running.database, source) == list(range(1, 1001))  # type: ignore[attr-defined]


@pytest.mark.slow
def test_request_answered_503_is_repeated(tmp_path: Path) -> None:
    port, source = free_port(), uuid.uuid4()
    patch = "wsserver.INGEST_TIMEOUT_SECONDS = 0.5"
    with server(tmp_path, "-p", "0", "-T", str(port), "-r", "10", patch=patch) as running:

        def post(first: int, count: int) -> tuple[int, dict[str, object]]:
            body = " ".join(map(str, range(first, first + count))).encode()
            status, _, answer = request(running.port, "POST", numbered(source, first), body, TEXT)
            return status, json.loads(answer)

        for first, count, accepted in ((0, 4, 4), (0, 15, 6), (0, 15, 0)):
            status, answer = post(first, count)
            assert (status, answer["accepted"]) == (503, accepted)
            assert "send the " in str(answer["error"]) and "only the other" not in str(answer["error"])
            assert "do not send" not in str(answer["error"]) and "Connection refused" in str(answer["error"])
        with server(tmp_path, "-I", "false", "-p", str(port), "-D", "c.db"):
            eventually(lambda: post(0, 15) == (200, {"stored": 15, "next": 15}))
            assert in_order(tmp_path / "c.db", source) == list(range(15))


@pytest.mark.slow
@pytest.mark.parametrize("spooling", [False, True], ids=["consumer", "spool"])
def test_posts_keep_exactly_once_while_servers_are_killed(tmp_path: Path, spooling: bool) -> None:
    """Clients repeat each request until it is answered 200. Some answers are never read."""
    rng = random.Random(seeded())
    sent: dict[uuid.UUID, array[int]] = {}
    acked: dict[uuid.UUID, int] = {}
    done = Event()

    def feed(source: uuid.UUID, seed: int) -> None:
        rng = random.Random(seed)
        while not done.is_set():
            first = len(sent[source])
            new = array("q", rng.randbytes(8 * rng.choice((1, 10, 300))))
            sent[source] += new
            body = ",".join(map(str, new)).encode()
            while True:
                try:
                    status = request(port, "POST", numbered(source, first), body, TEXT)[0]
                except (OSError, HTTPException):
                    status = 0
                if status == 200 and rng.random() < 0.9:
                    break
                assert status in (0, 200, 503)
                done.wait(0.02)
            acked[source] = first + len(new)

    with Servers(tmp_path, spooling=spooling) as servers:
        port = int(servers.url.split(":")[2].split("/")[0])
        feeders = []
        for _ in range(3):
            source = uuid.uuid4()
            sent[source], acked[source] = array("q"), 0
            feeders.append(Blocked(partial(feed, source, rng.getrandbits(64))))
        for _ in range(4):
            before = sum(acked.values())
            eventually(lambda before=before: sum(acked.values()) > before)
            victims = rng.choice([["consumer"], ["publisher"], ["consumer", "publisher"]])
            servers.kill(*victims)
            Event().wait(rng.uniform(0, 0.1))  # a random moment, not a synchronisation
            servers.start(*victims)
        done.set()
        for feeder in feeders:
            feeder.result()
        expected = sum(map(len, sent.values()))
        eventually(lambda: len(rows(servers.database)) == expected)
        assert not problems(servers.database, sent, acked, False, whole=True)


# Bodies in chunks.


def chunks(body: bytes, size: int) -> bytes:
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@pytest.mark.parametrize("size", [1, 1000, MAX_MESSAGE])
def test_chunked_body_is_stored(running: ServerProcess, size: int) -> None:
    before, expected = len(values(running)), list(range(min(4000, 8 * size)))
    data = CHUNKED + b"\r\n" + chunks(encode_plain(expected), size)
    text = CHUNKED + b"Content-Type: text/plain\r\n\r\n" + chunks(" ".join(map(str, expected)).encode(), size)
    assert statuses(exchange(running.port, data + text + ALIVE, half_close=True)) == [200, 200, 200]
    assert sorted(values(running)[before:]) == sorted(2 * expected)  # several workers store them


@pytest.mark.slow
def test_chunked_body_has_the_limit_of_others(spacious: ServerProcess) -> None:
    before = spacious.stats()["recordsStored"]
    whole = bytes(MAX_MESSAGE)
    assert statuses(exchange(spacious.port, CHUNKED + b"\r\n" + chunks(whole, 100_000), half_close=True)) == [200]
    answer = exchange(spacious.port, CHUNKED + b"\r\n" + chunks(whole + bytes(8), 100_000) + ALIVE)
    assert statuses(answer) == [413] and b"\r\nConnection: close\r\n" in answer
    stats = spacious.stats()
    assert (stats["recordsStored"], stats["unfinishedBytes"]) == (before + MAX_MESSAGE // 8, 0)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"x\r\n", id="malformed at once"),
        pytest.param(b"8\r\n" + bytes(8) + b"0\r\n\r\n", id="no CR LF"),
        pytest.param(b"8\r\n" + bytes(8) + b"\r\n0\r\nno header\r\n\r\n", id="malformed trailer"),
        pytest.param(b"8\r\n" + bytes(8) + b"\r\n0\n\n", id="LF"),
    ],
)
def test_malformed_chunks_close_the_connection(running: ServerProcess, body: bytes) -> None:
    """What follows is no request: the end of the body is unknown."""
    before = len(values(running))
    answer = exchange(running.port, CHUNKED + b"\r\n" + body + ALIVE)
    assert statuses(answer) == [400] and b"\r\nConnection: close\r\n" in answer and len(values(running)) == before
    assert running.get("/v1.0/alive")[0] == 200


@pytest.mark.parametrize("coding", ["gzip", "gzip, chunked", "identity", "chunked, chunked", "x"])
def test_other_transfer_codings_are_refused(running: ServerProcess, coding: str) -> None:
    answer = exchange(running.port, HEAD + b"Transfer-Encoding: %b\r\n\r\n" % coding.encode() + ALIVE)
    assert statuses(answer) == [501] and b"\r\nConnection: close\r\n" in answer


def test_chunked_body_is_asked_for(running: ServerProcess) -> None:
    with connected(running.port) as client:
        client.sendall(CHUNKED + b"Expect: 100-continue\r\n\r\n")
        assert client.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(chunks(bytes(4), 3))
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_chunked_body_has_time_in_proportion_to_its_size(tmp_path: Path) -> None:
    patch = "web.handler.REQUEST_TIMEOUT_SECONDS = 0.5; wsserver.BODY_BYTES_PER_SECOND = 100_000"
    with server(tmp_path, *ROLES["publisher"], patch=patch) as running, connected(running.port) as client:
        client.sendall(CHUNKED + b"\r\n")
        started = time.monotonic()

        def ended() -> bool:
            client.sendall(b"1\r\n0\r\n")
            client.settimeout(0.05)
            try:
                return bool(client.recv(65536).startswith(b"HTTP/1.1 408 "))
            except TimeoutError:
                return False

        eventually(ended, deadline=10)
        assert time.monotonic() - started >= 0.5
        assert not rows(tmp_path / "ringoexp.db")


def test_chunked_body_that_ends_early_is_400(running: ServerProcess) -> None:
    before = len(values(running))
    answer = exchange(running.port, CHUNKED + b"\r\n" + chunks(bytes(16), 8)[:-5], half_close=True)
    assert statuses(answer) == [400] and b"ended after 16 bytes, before its last chunk" in answer
    assert len(values(running)) == before


def test_large_chunked_bodies_wait_for_their_share_of_the_memory(tmp_path: Path) -> None:
    patch = "web.budget.MIB = 1024 * 32"
    with server(tmp_path, "-p", "0", "-T", "0", "-r", "65536", "--unfinished", "16", patch=patch) as running:
        data = CHUNKED + b"\r\n" + chunks(bytes(400_000), 50_000)
        clients: list[socket.socket] = [connected(running.port) for _ in range(5)]
        for client in clients:
            client.sendall(data[:-1])
        eventually(lambda: "level=warning event=waiting_for_room" in running.errors.read_text())
        for client in clients:
            client.sendall(data[-1:])
        for client in clients:
            assert client.recv(65536).startswith(b"HTTP/1.1 200")
            client.close()
        eventually(lambda: running.stats()["unfinishedBytes"] == 0)  # each body is released after its answer
