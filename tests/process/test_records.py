"""Tests of `GET /v1.0/records` and `ringoexp read`, on a server with a database and on publishers in front of it."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import uuid
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.harness import (
    DEADLINE,
    ROLES,
    ROOT,
    RawClient,
    ServerProcess,
    connected,
    eventually,
    exchange,
    frame,
    free_port,
    logged,
    request,
    server,
)

from ringolib.wire import SUBPROTOCOL, Run, encode_batch

SOURCE, OTHER = uuid.UUID(int=1), uuid.UUID(int=2)
PATH = "/v1.0/records"


def store_records(port: int, source: uuid.UUID, first: int, count: int) -> None:
    """Store records of a source; each value is its sequence."""
    with RawClient(port, {"Sec-WebSocket-Protocol": SUBPROTOCOL}) as client:
        client.send(frame(2, encode_batch([Run(source.bytes, first, count)], array("q", range(first, first + count)))))
        client.acked(count)


@pytest.fixture(scope="module", params=["consumer", "own consumer", "publisher", "two publishers"])
def port(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a server that answers for a database with 3000 records of one source, then 2 of another."""
    directory = tmp_path_factory.mktemp("records")
    flags = [*ROLES["publisher"], "-W", "1"] if request.param == "own consumer" else ROLES["consumer"]
    with server(directory, *flags) as running:
        at = running.port
        store_records(at, SOURCE, 0, 3000)
        store_records(at, OTHER, 7, 2)
        if "publisher" not in request.param:
            yield at
            return
        (directory / "a").mkdir()
        (directory / "b").mkdir()
        with server(directory / "a", "-p", "0", "-T", str(at)) as publisher:
            if request.param == "publisher":
                yield publisher.port
                return
            with server(directory / "b", "-p", "0", "-T", str(publisher.port)) as second:
                yield second.port


def values(port: int, query: str) -> list[int]:
    status, _, body = request(port, "GET", f"{PATH}?{query}&format=text")
    assert status == 200, body
    return list(map(int, body.split()))


def test_json_has_the_records_and_the_next_cursor(port: int) -> None:
    status, headers, body = request(port, "GET", PATH)
    answer = json.loads(body)
    assert (status, headers["Content-Type"], len(answer["records"])) == (200, "application/json;charset=utf-8", 100)
    first = answer["records"][0]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.pop("received_at"))
    assert first == {"id": "1", "source": str(SOURCE), "sequence": 0, "value": 0}
    assert headers["Link"] == f'<?after={answer["next"]}>; rel="next"' and headers["Cache-Control"] == "no-store"
    assert values(port, f"limit=2&after={answer['next']}") == [100, 101]


@pytest.mark.parametrize("limit", [1000, 2048, 2049, 10**7])
@pytest.mark.parametrize("form", ["json", "ndjson", "csv", "text"])
@pytest.mark.parametrize("order", ["asc", "desc"])
def test_answer_has_each_record_once_in_order(port: int, limit: int, form: str, order: str) -> None:
    status, _, body = request(port, "GET", f"{PATH}?limit={limit}&format={form}&order={order}")
    if form == "json":
        found = [record["value"] for record in json.loads(body)["records"]]
    elif form == "ndjson":
        found = [json.loads(line)["value"] for line in body.splitlines()]
    elif form == "csv":
        header, *lines = body.decode().splitlines()
        assert header == "id,source,sequence,value,received_at"
        found = [int(line.split(",")[3]) for line in lines]
    else:
        found = list(map(int, body.split()))
    expected = [*range(3000), 7, 8][:: 1 if order == "asc" else -1]
    assert (status, found) == (200, expected[:limit])


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_links_lead_through_all_records(port: int, order: str) -> None:
    query, found = f"limit=700&format=text&since=1d&order={order}", []
    for _ in range(10):
        _, headers, body = request(port, "GET", f"{PATH}?{query}")
        found += list(map(int, body.split()))
        link = headers.get("Link")
        if not link or not body:
            break
        query = link[2 : link.index(">")]
    assert sorted(found) == sorted([*range(3000), 7, 8])


def test_link_of_an_encoded_query_keeps_since(port: int) -> None:
    _, headers, _ = request(port, "GET", f"{PATH}?order=%64esc&since=1d&limit=1")
    assert headers["Link"] == '<?after=3002&order=%64esc&since=1d&limit=1>; rel="next"'


def test_source_and_since_choose_records(port: int) -> None:
    assert values(port, f"source={OTHER}") == [7, 8]
    assert (
        values(port, f"source={uuid.UUID(int=3)}") == values(port, "since=0s") == values(port, "since=2999-01-01") == []
    )
    assert values(port, "since=1970-01-01T00:00:00+01:00&limit=3") == [0, 1, 2]


@pytest.mark.parametrize(
    ("accept", "media"),
    [
        ("*/*", "application/json"),
        ("text/csv", "text/csv"),
        ("text/html, text/plain;q=0.9, */*;q=0.8", "text/plain"),
        ("application/x-ndjson", "application/x-ndjson"),
        ("application/json;q=0, */*", "application/x-ndjson"),
        ("text/html", None),
    ],
)
def test_accept_chooses_the_form(port: int, accept: str, media: str | None) -> None:
    status, headers, _ = request(port, "GET", f"{PATH}?limit=1", headers={"Accept": accept})
    assert status == (200 if media else 406)
    assert not media or headers["Content-Type"].partition(";")[0] == media


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("limit=0", "limit must be"),
        ("limit=-1", "limit must be"),
        ("limit=1&limit=2", "limit is given twice"),
        ("source=7", "source must be a UUID"),
        ("since=yesterday", "since must be a time"),
        ("since=2026-13-01", "since must be a time"),
        ("order=up", "order must be asc or desc"),
        ("format=xml", "format must be json, ndjson, csv or text"),
        ("follow=2", "follow must be 0 or 1"),
        ("follow=1&format=json", "use format=ndjson"),
        ("follow=1&order=desc", "cannot follow"),
        ("after=x", "after: it must be a cursor"),
        ("after=3003", "of another database"),
        ("after=3003&limit=10000", "of another database"),
        ("first=1", "unknown parameter 'first'"),
    ],
)
def test_bad_parameter_is_refused_with_the_cause(port: int, query: str, reason: str) -> None:
    status, _, body = request(port, "GET", f"{PATH}?{query}")
    assert status == 400 and reason in json.loads(body)["error"]


@pytest.mark.parametrize("limit", [1, 10_000])
def test_head_has_the_headers_of_get(port: int, limit: int) -> None:
    answers = [
        exchange(
            port, f"{method} {PATH}?limit={limit} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )
        for method in ("HEAD", "GET")
    ]
    heads = [re.sub(rb"(Date|X-Request-Id): .*", b"", answer.partition(b"\r\n\r\n")[0]) for answer in answers]
    assert sorted(heads[0].splitlines()) == sorted(heads[1].splitlines()) and answers[0].endswith(b"\r\n\r\n")


def test_client_of_http_1_0_gets_no_chunks(port: int) -> None:
    answer = exchange(port, f"GET {PATH}?limit=5000&format=text HTTP/1.0\r\n\r\n".encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"chunked" not in head and list(map(int, body.split())) == [*range(3000), 7, 8]


def test_connection_is_kept_after_a_stream(port: int) -> None:
    connection = http.client.HTTPConnection("localhost", port, timeout=DEADLINE)
    for _ in range(2):
        connection.request("GET", f"{PATH}?limit=5000&format=text")
        assert len(connection.getresponse().read().split()) == 3002
    connection.close()


@contextmanager
def chained_servers(directory: Path) -> Iterator[tuple[ServerProcess, ServerProcess]]:
    """Run a consumer, and a publisher in front of it."""
    (directory / "p").mkdir()
    with (
        server(directory, *ROLES["consumer"]) as running,
        server(directory / "p", "-p", "0", "-T", str(running.port)) as front,
    ):
        yield running, front


@contextmanager
def follow(port: int, query: str) -> Iterator[tuple[http.client.HTTPResponse, socket.socket]]:
    """Send a request that follows. Yield the answer, and its socket."""
    with connected(port) as sock:
        sock.sendall(f"GET {PATH}?follow=1&{query} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        response = http.client.HTTPResponse(sock)
        response.begin()
        with response:
            yield response, sock


@pytest.mark.parametrize("chained", [False, True], ids=["consumer", "publisher"])
def test_follower_gets_new_records_until_the_server_stops(tmp_path: Path, chained: bool) -> None:
    with chained_servers(tmp_path) as (running, front):
        store_records(running.port, SOURCE, 0, 2)
        with follow(front.port if chained else running.port, "") as (response, _):
            assert [json.loads(response.readline())["value"] for _ in range(2)] == [0, 1]
            store_records(running.port, OTHER, 5, 1)
            assert json.loads(response.readline())["source"] == str(OTHER)
            assert (front if chained else running).stop() == 0
            assert response.read() == b""


@pytest.mark.parametrize("chained", [False, True], ids=["consumer", "publisher"])
def test_followers_are_limited_and_leave_their_place(tmp_path: Path, chained: bool) -> None:
    """With -n 8, a quarter of the connections may follow. Short answers are not limited."""
    (tmp_path / "p").mkdir()
    limited = ("-n", "8")
    with server(tmp_path, *ROLES["consumer"], *(() if chained else limited)) as running:
        with server(tmp_path / "p", "-p", "0", "-T", str(running.port), *(limited if chained else ())) as front:
            port = front.port if chained else running.port
            store_records(running.port, SOURCE, 0, 1)
            with follow(port, "format=text") as (first, sock), follow(port, "format=text") as (second, _):
                assert first.readline() == second.readline() == b"0\n"
                status, headers, body = request(port, "GET", f"{PATH}?follow=1")
                assert (status, headers["Retry-After"]) == (503, "5") and "2 long answers" in json.loads(body)["error"]
                assert values(port, "limit=5") == [0]
                sock.shutdown(socket.SHUT_RDWR)
                eventually(lambda: request(port, "GET", f"{PATH}?follow=1&limit=1&format=text")[2] == b"0\n")


def store_many(port: int) -> None:
    """Store more records than the system buffers for a client that reads slowly."""
    for first in range(0, 150_000, 50_000):
        store_records(port, SOURCE, first, 50_000)


@pytest.mark.parametrize("chained", [False, True], ids=["consumer", "publisher"])
@pytest.mark.parametrize("query", ["follow=1", "limit=1000000"])
def test_stop_does_not_wait_for_a_client_that_has_paused(tmp_path: Path, chained: bool, query: str) -> None:
    with chained_servers(tmp_path) as (running, front):
        store_many(running.port)
        asked = front if chained else running
        with connected(asked.port) as sock:
            sock.sendall(f"GET {PATH}?{query} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert sock.recv(1)
            assert asked.stop(deadline=15) == 0


@pytest.mark.parametrize("chained", [False, True], ids=["consumer", "publisher"])
def test_follower_that_lags_ends_with_the_server(tmp_path: Path, chained: bool) -> None:
    """Its answer ends in order, although records are left."""
    with chained_servers(tmp_path) as (running, front):
        store_many(running.port)
        asked = front if chained else running
        with follow(asked.port, "") as (response, _):
            for n in range(1000):
                assert json.loads(response.readline())["value"] == n
            asked.send_signal(signal.SIGTERM)
            lines = response.read().splitlines()
            assert len(lines) < 149_000 and json.loads(lines[-1])["value"] == 999 + len(lines)
            assert asked.wait() == 0


def test_publisher_stops_although_a_consumer_does_not_answer(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with server(tmp_path, "-p", "0", "-T", str(silent.getsockname()[1])) as front, connected(front.port) as sock:
            sock.sendall(f"GET {PATH} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            silent.settimeout(DEADLINE)
            links = []
            while not links or PATH.encode() not in links[-1].recv(1024):
                links.append(silent.accept()[0])
            assert front.stop(deadline=10) == 0
            assert b"the server is stopping" in sock.recv(65536)
            for link in links:
                link.close()


@pytest.mark.parametrize("chained", [False, True], ids=["consumer", "publisher"])
def test_request_behind_a_follow_is_not_answered(tmp_path: Path, chained: bool) -> None:
    """The follower's thread reads its first byte, so the rest must not be taken for a request."""
    with chained_servers(tmp_path) as (running, front):
        store_records(running.port, SOURCE, 0, 1)
        with follow((front if chained else running).port, "format=text") as (response, sock):
            assert response.readline() == b"0\n"
            sock.sendall(b"GET /v1.0/alive HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert response.fp.read() == b"\r\n0\r\n\r\n"


def test_client_that_does_not_read_is_no_silent_consumer(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    patch = "web.handler.REQUEST_TIMEOUT_SECONDS = 0.5"
    with (
        server(tmp_path, *ROLES["consumer"]) as running,
        server(tmp_path / "p", "-p", "0", "-T", str(running.port), "--debug", patch=patch) as front,
    ):
        store_many(running.port)
        with connected(front.port) as sock:
            sock.sendall(f"GET {PATH}?limit=1000000 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            eventually(lambda: re.search("timed out|status=50", front.errors.read_text()))
        assert "status=50" not in front.errors.read_text()


def test_lost_consumer_cuts_the_answer(tmp_path: Path) -> None:
    with chained_servers(tmp_path) as (running, front):
        store_records(running.port, SOURCE, 0, 1)
        with follow(front.port, "format=text") as (response, _):
            assert response.readline() == b"0\n"
            running.kill()
            with pytest.raises(http.client.IncompleteRead):
                response.read()
        assert f"localhost:{running.port}" in str(eventually(lambda: logged(front.errors.read_text(), "records_cut")))


def test_token_applies_and_is_passed_on(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret-1")
    flags = ("--token_file", str(token))
    (tmp_path / "p").mkdir()
    with server(tmp_path, *ROLES["consumer"], *flags) as running:
        with server(tmp_path / "p", "-p", "0", "-T", str(running.port), *flags) as front:
            for port in (running.port, front.port):
                assert request(port, "GET", PATH)[0] == 401
                assert request(port, "GET", PATH, headers={"Authorization": "Bearer secret-1"})[0] == 200
        with server(tmp_path / "p", "-p", "0", "-T", str(running.port)) as front:
            status, _, body = request(front.port, "GET", PATH)
            assert status == 502 and "token is missing or wrong" in json.loads(body)["error"]


def test_publisher_of_several_consumers_wants_a_choice(tmp_path: Path) -> None:
    for name in "abp":
        (tmp_path / name).mkdir()
    with server(tmp_path / "a", *ROLES["consumer"]) as a, server(tmp_path / "b", *ROLES["consumer"]) as b:
        store_records(b.port, SOURCE, 0, 5)
        names = [f"127.0.0.1:{running.port}" for running in (a, b)]
        with server(tmp_path / "p", "-p", "0", "-U", ",".join(names)) as front:
            for query in ("", "?consumer=elsewhere:1"):
                status, _, body = request(front.port, "GET", PATH + query)
                assert status == 400 and json.loads(body)["consumers"] == names
                assert "ringoexp read: --consumer" in json.loads(body)["error"]
            status, headers, body = request(front.port, "GET", f"{PATH}?consumer={names[1]}&limit=2&format=text")
            assert (status, body) == (200, b"0\n1\n")
            following = headers["Link"][2 : headers["Link"].index(">")]
            assert request(front.port, "GET", f"{PATH}?{following}")[2] == b"2\n3\n"
            b.kill()
            status, _, body = request(front.port, "GET", f"{PATH}?consumer={names[1]}")
            assert status == 502 and names[1] in json.loads(body)["error"]


def test_loop_of_publishers_is_refused(tmp_path: Path) -> None:
    ports = [free_port(), free_port()]
    for name in "ab":
        (tmp_path / name).mkdir()
    with server(tmp_path / "a", "-p", str(ports[0]), "-T", str(ports[1])):
        with server(tmp_path / "b", "-p", str(ports[1]), "-T", str(ports[0])):
            status, _, body = request(ports[0], "GET", PATH)
            assert status == 508 and "loop" in json.loads(body)["error"]


# The command.


def run_read(*arguments: str, **options: object) -> "subprocess.Popen[bytes]":
    command = [sys.executable, str(ROOT / "ringoexp.py"), "read", *arguments]
    return subprocess.Popen(
        command,
        stdout=options.get("stdout", subprocess.PIPE),
        stderr=subprocess.PIPE,
    )


def read_output(*arguments: str) -> tuple[int, bytes, str]:
    process = run_read(*arguments)
    out, errors = process.communicate(timeout=DEADLINE)
    return process.returncode, out, errors.decode()


def test_read_prints_all_records(port: int) -> None:
    url = f"http://localhost:{port}"
    assert read_output("--url", url) == (0, b"".join(b"%d\n" % n for n in [*range(3000), 7, 8]), "")
    assert read_output("--url", url, "--limit", "2", "--order", "desc") == (0, b"8\n7\n", "")
    status, out, _ = read_output("--url", f"ws://localhost:{port}/v1.0/ingest", "--format", "csv", "--since", "1h")
    lines = out.decode().splitlines()
    assert (status, len(lines), lines[0]) == (0, 3003, "id,source,sequence,value,received_at")
    status, out, _ = read_output("--url", url, "--source", str(OTHER), "--format", "ndjson")
    assert [json.loads(line)["value"] for line in out.splitlines()] == [7, 8]
    status, out, _ = read_output("--url", url, "--after", "2999", "--limit", "2")
    assert (status, out) == (0, b"2999\n7\n")


@pytest.mark.parametrize(
    ("arguments", "status", "error"),
    [
        (["--limit", "0"], 2, "--limit"),
        (["--since", "noon"], 2, "since must be a time"),
        (["--follow", "--order", "desc"], 2, "omit one"),
        (["--follw"], 2, "'--follw' is not a flag: did you mean --follow? ("),
        (["records"], 2, "'records' is not a flag ("),
        (["--url", "ftp://x"], 2, "not accepted"),
        (["--url", f"http://localhost:{free_port()}"], 1, "refused (is a server running there?"),
        (["--url", "localhost:6660"], 2, "use ws://HOST:PORT or http://HOST:PORT"),
        (["--token_file", "/nonexistent"], 1, "No such file"),
    ],
)
def test_read_explains_errors_in_one_line(port: int, arguments: list[str], status: int, error: str) -> None:
    url = [] if "--url" in arguments else ["--url", f"http://localhost:{port}"]
    code, out, errors = read_output(*url, *arguments)
    assert (code, out, errors.count("\n")) == (status, b"", 1) and error in errors
    assert errors.startswith("ringoexp read: error: ")


def test_read_ends_quietly_with_the_reader_of_its_output(port: int) -> None:
    for flags in ([], ["--follow"]):
        process = run_read("--url", f"http://localhost:{port}", "--format", "ndjson", *flags)  # more than a pipe takes
        assert process.stdout and json.loads(process.stdout.readline())["value"] == 0
        process.stdout.close()
        assert process.stderr
        with process.stderr:
            assert process.stderr.read() == b""
        assert process.wait(DEADLINE) == 128 + signal.SIGPIPE


def test_read_reports_a_full_disk(port: int) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    with open("/dev/full", "wb") as full:
        process = run_read("--url", f"http://localhost:{port}", stdout=full)
        _, errors = process.communicate(timeout=DEADLINE)
    assert (process.returncode, errors) == (1, b"ringoexp read: error: stdout: No space left on device\n")


def test_read_follows_over_a_restart_until_ctrl_c(tmp_path: Path) -> None:
    at = free_port()
    flags = ("-I", "false", "-p", str(at))
    with server(tmp_path, *flags) as running:
        store_records(at, SOURCE, 0, 2)
        process = run_read("--url", f"http://localhost:{at}", "--follow")
        assert process.stdout and process.stderr
        assert [process.stdout.readline() for _ in range(2)] == [b"0\n", b"1\n"]
        running.kill()
        assert b"trying again" in process.stderr.readline()
    with server(tmp_path, *flags):
        store_records(at, SOURCE, 2, 1)
        assert process.stdout.readline() == b"2\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=DEADLINE) == (b"", b"")
        assert process.returncode == 128 + signal.SIGINT


def test_read_ends_with_the_first_page_that_is_not_full(tmp_path: Path) -> None:
    """While records arrive, a further request would find more of them each time."""
    with server(tmp_path, *ROLES["consumer"], "--debug") as running:
        store_records(running.port, SOURCE, 0, 2050)
        status, out, _ = read_output("--url", f"http://localhost:{running.port}")
        assert (status, len(out.split())) == (0, 2050)
        assert running.errors.read_text().count(f"path={PATH}") == 2


def test_values_and_queries_are_not_logged(tmp_path: Path) -> None:
    with server(tmp_path, *ROLES["consumer"], "--debug") as running:
        store_records(running.port, SOURCE, 10**15, 1)
        assert values(running.port, f"source={SOURCE}") == [10**15]
        request(running.port, "GET", f"{PATH}?source={SOURCE}&after={10**15}")
        running.stop()
    log = running.errors.read_text()
    assert PATH in log and str(10**15) not in log and str(SOURCE) not in log
