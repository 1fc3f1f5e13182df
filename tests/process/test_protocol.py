"""docs/protocol.md is correct and complete.

Its vectors are tried on the decoders, on real servers, and with independent WebSocket clients. Its examples run, and a
client written from it keeps exactly once while the server is killed.
"""

import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import uuid
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.checks import problems
from support.documents import table
from support.harness import (
    DEADLINE,
    ROLES,
    ROOT,
    RawClient,
    ServerProcess,
    eventually,
    frame,
    free_port,
    request,
    rows,
    seeded,
    server,
)

from ringolib.wire import (
    SUBPROTOCOL,
    Run,
    WireError,
    decode_ack,
    decode_batch,
    decode_plain,
    encode_ack,
    encode_batch,
    encode_plain,
)

DOCUMENT = (ROOT / "docs" / "protocol.md").read_text()
VECTORS = json.loads((ROOT / "docs" / "protocol-vectors.json").read_text())
EXAMPLE = ROOT / "docs" / "examples" / "exactly_once.mjs"
MESSAGES = [(None, vector) for vector in VECTORS["plain"]] + [(SUBPROTOCOL, vector) for vector in VECTORS["batch"]]

Stored = list[dict[str, Any]]


def each_vector(section: str) -> Any:
    """Decorate a test to run once for each vector of a section."""
    ids = [vector.get("name", vector.get("payload")) for vector in VECTORS[section]]
    return pytest.mark.parametrize("vector", VECTORS[section], ids=ids)


def integers(texts: list[str]) -> list[int]:
    return [int(text) for text in texts]


# The decoders.


@each_vector("plain")
def test_decoder_agrees_with_the_plain_vectors(vector: dict[str, Any]) -> None:
    payload = bytes.fromhex(vector["payload"])
    if "close" in vector:
        with pytest.raises(WireError) as refused:
            decode_plain(payload)
        assert (refused.value.close_code, refused.value.status) == (vector["close"], vector["status"])
        return
    values = integers(vector["values"])
    assert list(decode_plain(payload)) == values
    if len(payload) > 4:
        assert encode_plain(values) == payload


@each_vector("batch")
def test_decoder_agrees_with_the_batch_vectors(vector: dict[str, Any]) -> None:
    payload = bytes.fromhex(vector["payload"])
    if "close" in vector:
        with pytest.raises(WireError) as refused:
            decode_batch(payload)
        assert refused.value.close_code == vector["close"]
        return
    runs = [Run(uuid.UUID(run["source"]).bytes, int(run["first"]), run["count"]) for run in vector["runs"]]
    block = decode_batch(payload)
    assert (block.runs, list(block.values)) == (runs, integers(vector["values"]))
    assert encode_batch(runs, block.values) == payload


@each_vector("acks")
def test_decoder_agrees_with_the_ack_vectors(vector: dict[str, str]) -> None:
    assert decode_ack(bytes.fromhex(vector["payload"])) == int(vector["count"])
    assert encode_ack(int(vector["count"])).hex() == vector["payload"]


# Servers.


class Target(ServerProcess):
    """A server under test, and its database. A batch vector works only once: its source is known afterwards."""

    def __init__(self, directory: Path, *flags: str, env: dict[str, str] | None = None) -> None:
        super().__init__(directory, *flags, env=env)
        self.database = directory / "ringoexp.db"
        self.bytewise = False  # clients send byte by byte
        self._seen = len(rows(self.database))

    def new(self) -> dict[str, list[tuple[int, int]]]:
        """Return the records stored since the last call: source -> [(sequence, value), ...]."""
        records = rows(self.database)[self._seen :]
        self._seen += len(records)
        sources: dict[str, list[tuple[int, int]]] = {}
        for source, sequence, value in sorted(records):
            sources.setdefault(source, []).append((sequence, value))
        return sources


@pytest.fixture(scope="module", params=[(role, bytewise) for role in ROLES for bytewise in (False, True)], ids=str)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    role, bytewise = request.param
    process = Target(tmp_path_factory.mktemp(role), *ROLES[role])
    process.bytewise = bytewise
    try:
        yield process
    finally:
        process.kill()
    assert "Traceback" not in process.errors.read_text()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A server that requires the token of the vectors."""
    (token,) = {vector["token"] for vector in VECTORS["handshakes"] + VECTORS["requests"] if "token" in vector}
    process = Target(tmp_path_factory.mktemp("guarded"), *ROLES["consumer"], env={"RINGOEXP_TOKEN": token})
    try:
        yield process
    finally:
        process.kill()


def check_stored(target: Target, expected: Stored) -> None:
    """Check that exactly the expected records were stored since the last call. Source None: a UUID of the server."""
    stored = target.new()
    unnamed = []
    for run in expected:
        records = list(enumerate(integers(run["values"]), int(run["first"])))
        if run["source"] is None:
            unnamed.append(records)
        else:
            assert stored.pop(run["source"], []) == records
    assert sorted(stored.values()) == sorted(unnamed)
    assert all(uuid.UUID(source).version == 7 for source in stored)


def headers(subprotocol: str | None) -> dict[str, str | None]:
    return {"Sec-WebSocket-Protocol": subprotocol} if subprotocol else {}


def as_stored(subprotocol: str | None, vector: dict[str, Any]) -> Stored:
    """Return the records that a server stores for the vector of a message."""
    values = list(vector["values"])
    if subprotocol is None:
        return [{"source": None, "first": "0", "values": values}]
    merged: dict[str, dict[str, Any]] = {}
    for run in vector["runs"]:
        new = {"source": run["source"], "first": run["first"], "values": []}
        merged.setdefault(run["source"], new)["values"] += values[: run["count"]]
        del values[: run["count"]]
    return list(merged.values())


@pytest.mark.parametrize(("subprotocol", "vector"), MESSAGES, ids=[vector["name"] for _, vector in MESSAGES])
def test_server_answers_messages_as_the_vectors_say(
    target: Target, subprotocol: str | None, vector: dict[str, Any]
) -> None:
    with RawClient(target.port, headers(subprotocol)) as client:
        client.send(frame(2, bytes.fromhex(vector["payload"])))
        if "close" in vector:
            assert client.closed()[0] == vector["close"]
        else:
            client.acked(len(vector["values"]))
    check_stored(target, [] if "close" in vector else as_stored(subprotocol, vector))


@each_vector("plain")
def test_server_answers_posts_as_the_vectors_say(target: Target, vector: dict[str, Any]) -> None:
    status, _, body = request(target.port, "POST", "/v1.0/ingest", bytes.fromhex(vector["payload"]))
    assert status == vector.get("status", 200)
    if status == 200:
        assert json.loads(body) == {"stored": len(vector["values"])}
    check_stored(target, as_stored(None, vector) if status == 200 else [])


def converse(target: Target, connection: dict[str, Any]) -> None:
    """Perform the steps of one connection of a conversation."""
    subprotocol = connection["subprotocol"]
    with RawClient(target.port, headers(subprotocol)) as client:
        assert client.status == 101
        assert subprotocol is None or f"Sec-WebSocket-Protocol: {subprotocol}" in client.head
        client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        acked = 0
        for step in connection["steps"]:
            if "send" in step:
                data = bytes.fromhex(step["send"]) + bytes(step.get("zeros", 0))
                size = 1 if target.bytewise and "zeros" not in step else len(data)
                try:
                    for at in range(0, len(data), size):
                        client.send(data[at : at + size])
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the server may close before it has read everything
            elif "stops" in step:
                target.send_signal(signal.SIGTERM)
            elif "acked" in step:
                while acked < int(step["acked"]):
                    ack = client.read_frame()
                    assert ack and ack[:2] == b"\x82\x08", f"expected an ack, got {ack!r}"
                    (count,) = struct.unpack(">Q", ack[2:])
                    assert acked < count, "acks grow"
                    acked = count
                assert ack.hex() == step["frame"]
            elif "closed" in step:
                close = client.read_frame()
                assert close and close[0] == 0x88, f"expected a Close frame, got {close!r}"
                assert (struct.unpack(">H", close[2:4])[0] if close[1] else 1005) == step["closed"]
                close[4:].decode()
                if "frame" in step:
                    assert close.hex() == step["frame"]
                else:
                    assert close[1] > 7, "the Close frame has a reason"
                assert client.read_frame() is None
            else:
                received = client.read_frame()
                assert received and received.hex() == step["frame"]


def stops(vector: dict[str, Any]) -> bool:
    return any("stops" in step for connection in vector["connections"] for step in connection["steps"])


@each_vector("conversations")
def test_server_answers_conversations_as_the_vectors_say(
    target: Target, vector: dict[str, Any], tmp_path: Path
) -> None:
    with ExitStack() as stack:
        if stops(vector):
            target = Target(tmp_path, *ROLES["publisher"])
            stack.callback(target.kill)
        for connection in vector["connections"]:
            converse(target, connection)
        check_stored(target, vector["stored"])


def ask(port: int, data: bytes) -> tuple[http.client.HTTPResponse, bytes]:
    """Send `data`, end the client's side unless it is a handshake, and return the response."""
    with socket.create_connection(("localhost", port), DEADLINE) as sock:
        sock.sendall(data)
        if not data.startswith(b"GET /v1.0/ingest"):
            sock.shutdown(socket.SHUT_WR)
        response = http.client.HTTPResponse(sock, method=data.split()[0].decode())
        response.begin()
        return response, b"" if response.status == 101 else response.read()


@each_vector("handshakes")
def test_server_answers_handshakes_as_the_vectors_say(target: Target, guarded: Target, vector: dict[str, Any]) -> None:
    target = guarded if "token" in vector else target
    response, body = ask(target.port, "\r\n".join([*vector["request"], "", ""]).encode())
    assert response.status == vector["status"]
    for name, value in vector["headers"].items():
        assert response.headers[name] == value
    if response.status != 101 and not vector["request"][0].startswith("HEAD"):
        assert json.loads(body)["error"]


@each_vector("requests")
def test_server_answers_requests_as_the_vectors_say(target: Target, guarded: Target, vector: dict[str, Any]) -> None:
    target = guarded if "token" in vector else target
    data = "\r\n".join([*vector["request"], "", ""]).encode() + bytes.fromhex(vector["body"])
    response, body = ask(target.port, data)
    assert response.status == vector["status"]
    for name, value in vector["headers"].items():
        assert response.headers[name] == value
    if response.status >= 400:
        assert json.loads(body)["error"]
    elif vector["json"]:
        answer = json.loads(body)
        assert {name: answer[name] for name in vector["json"]} == vector["json"]
    check_stored(target, vector["stored"])


# Cases that a vector cannot express.


def test_failed_write_is_answered_1011_and_503(tmp_path: Path) -> None:
    """The consumer's files may not grow beyond a limit. The records stored before it are acked, and can be read."""
    limited = ["bash", "-c", 'ulimit -f 1000; exec "$@"', "x"]
    source, block = uuid.uuid4(), 1000
    with server(tmp_path, *ROLES["consumer"], under=limited) as consumer:
        with RawClient(consumer.port, headers(SUBPROTOCOL)) as client:
            acked, received = 0, None
            while received is None or received[0] == 2:
                assert acked < 1_000_000
                run = Run(source.bytes, acked, block)
                client.send(frame(2, encode_batch([run], array("q", range(acked, acked + block)))))
                received = client.read()
                acked += block if received and received[0] == 2 else 0
        assert received and received[0] == 8 and struct.unpack(">H", received[1][:2]) == (1011,)
        assert received[1][2:].startswith(b"not stored: ")
        status, fields, body = request(consumer.port, "POST", "/v1.0/ingest", encode_plain(range(100_000)))
        assert (status, fields["Retry-After"], json.loads(body)["accepted"]) == (503, "5", 0)
        assert consumer.get("/v1.0/alive")[0] == 200
        assert [row[1:] for row in rows(tmp_path / "ringoexp.db")] == [(n, n) for n in range(acked)]
    assert acked > 0


def test_late_body_is_answered_408(tmp_path: Path) -> None:
    with server(tmp_path, *ROLES["consumer"], patch="web.handler.REQUEST_TIMEOUT_SECONDS = 0.2") as consumer:
        head = "POST /v1.0/ingest HTTP/1.1\r\nHost: localhost\r\nContent-Length: 8\r\n\r\n"
        with socket.create_connection(("localhost", consumer.port), DEADLINE) as sock:
            sock.sendall(head.encode() + bytes(7))
            response = http.client.HTTPResponse(sock)
            response.begin()
            assert response.status == 408 and json.loads(response.read())["error"]
        assert not rows(tmp_path / "ringoexp.db")


# Independent clients.


def outcome(vector: dict[str, Any]) -> dict[str, int]:
    """Return the expected end of a connection that sends only this message."""
    return {"close": vector["close"]} if "close" in vector else {"acked": len(vector["values"])}


def test_websockets_package_sends_the_vectors(tmp_path: Path) -> None:
    connect = pytest.importorskip("websockets.sync.client").connect
    connection_closed = pytest.importorskip("websockets.exceptions").ConnectionClosed
    target = Target(tmp_path, *ROLES["publisher"])
    with ExitStack() as stack:
        stack.callback(target.kill)
        for subprotocol, vector in MESSAGES:
            offered: Any = [subprotocol] if subprotocol else None
            with connect(target.url, subprotocols=offered, compression=None) as client:
                assert client.subprotocol == subprotocol
                client.send(bytes.fromhex(vector["payload"]))
                result: dict[str, int] = {}
                while result.get("acked", 0) < len(vector.get("values", [0])) and "close" not in result:
                    try:
                        result = {"acked": struct.unpack(">Q", client.recv(timeout=DEADLINE))[0]}
                    except connection_closed as error:
                        assert error.rcvd
                        result = {"close": error.rcvd.code}
            assert result == outcome(vector), vector["name"]
            check_stored(target, [] if "close" in vector else as_stored(subprotocol, vector))


NODE_CLIENT = """
const WebSocket = require('ws');
const [url, path] = process.argv.slice(2);
const vectors = JSON.parse(require('fs').readFileSync(path));
const send = (vector, protocols) => new Promise((resolve) => {
  const ws = new WebSocket(url, protocols);
  const result = { name: vector.name };
  ws.on('open', () => ws.send(Buffer.from(vector.payload, 'hex')));
  ws.on('message', (data) => {
    result.acked = Number(data.readBigUInt64BE());
    if (result.acked >= vector.values.length) ws.close(1000);
  });
  ws.on('close', (code) => { if (code !== 1000) result.close = code; resolve(result); });
});
(async () => {
  const all = [];
  for (const vector of vectors.plain) all.push(await send(vector, []));
  for (const vector of vectors.batch) all.push(await send(vector, ['ringoexp.batch.v1']));
  console.log(JSON.stringify(all));
})();
"""


def test_node_ws_package_sends_the_vectors(tmp_path: Path) -> None:
    modules = os.environ.get("RINGOEXP_NODE_MODULES")
    if not (modules and shutil.which("node")):
        pytest.skip("needs node, and RINGOEXP_NODE_MODULES: a node_modules directory with ws in it")
    with server(tmp_path, *ROLES["publisher"]) as publisher:
        done = subprocess.run(
            ["node", "-e", NODE_CLIENT, "x", publisher.url, str(ROOT / "docs" / "protocol-vectors.json")],
            env={**os.environ, "NODE_PATH": modules},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [{"name": vector["name"], **outcome(vector)} for _, vector in MESSAGES]


# The vectors are complete, and the document explains each code.

ELSEWHERE = {
    ("WebSocket", 1011): "test_failed_write_is_answered_1011_and_503",
    ("WebSocket", 503): "test_connection_beyond_the_limit_gets_503_but_alive_and_stats",
    ("HTTP", 503): "test_post_not_stored_in_time_reports_the_accepted_records",
    **{
        (kind, status): "test_request_head_has_a_total_limit" for kind in ("HTTP", "WebSocket") for status in (414, 431)
    },
    ("HTTP", 408): "test_late_body_is_answered_408",
    ("HTTP", 417): "test_body_is_asked_for_once_and_only_if_it_has_not_come",
    ("HTTP", 421): "test_page_that_resolves_its_name_to_the_server_stores_nothing",
    ("WebSocket", 421): "test_page_that_resolves_its_name_to_the_server_stores_nothing",
}
"""The codes of the table of refused input that no vector can show, and their tests."""


def refused_input() -> set[tuple[str, int]]:
    """Return the close codes and statuses of the table of refused input in docs/http.md, as (kind, code)."""
    codes = set()
    for row in table("docs/http.md", "refused input"):
        for kind, cell in zip(("WebSocket", "HTTP"), row[1:], strict=True):
            codes |= {(kind, int(code)) for code in re.findall(r"\b[1-5]\d\d\d?\b", cell)}
    return codes


def codes_of_vectors() -> set[tuple[str, int]]:
    """Return the close codes and statuses of the vectors, as (kind, code)."""
    codes = {("WebSocket", vector["close"]) for _, vector in MESSAGES if "close" in vector}
    codes |= {("HTTP", vector["status"]) for vector in VECTORS["plain"] if "status" in vector}
    codes |= {("WebSocket", vector["status"]) for vector in VECTORS["handshakes"]}
    codes |= {("HTTP", vector["status"]) for vector in VECTORS["requests"]}
    for vector in VECTORS["conversations"]:
        for connection in vector["connections"]:
            codes |= {("WebSocket", step["closed"]) for step in connection["steps"] if "closed" in step}
    return codes


def test_every_code_of_refused_input_has_a_vector_or_a_test() -> None:
    assert len(refused_input()) > 15, "the table was found"
    assert refused_input() - codes_of_vectors() == set(ELSEWHERE)
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for test in ELSEWHERE.values():
        assert f"def {test}(" in tests


def test_document_explains_every_code_and_status() -> None:
    for kind, code in refused_input() | codes_of_vectors() - {("WebSocket", 4321)}:  # a client's own code
        rows_of_table = table("docs/protocol.md", "status" if code < 1000 else "code", "cause")
        assert any(re.search(rf"\b{code}\b", row[0]) for row in rows_of_table), (kind, code)


def test_document_describes_every_field_of_the_vectors() -> None:
    def fields(value: Any) -> set[str]:
        if isinstance(value, dict):
            return set(value).union(*(fields(item) for name, item in value.items() if name not in ("headers", "json")))
        return set().union(*map(fields, value)) if isinstance(value, list) else set()

    section = DOCUMENT[DOCUMENT.index("\n## The vectors") :]
    missing = [field for field in sorted(fields(VECTORS)) if f"`{field}`" not in section]
    assert not missing


# The examples.


def test_python_client_of_the_document_runs_unchanged(tmp_path: Path) -> None:
    (program,) = re.findall(r"^```python\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)
    with server(tmp_path, *ROLES["publisher"]) as publisher:
        program = program.replace("6660", str(publisher.port))
        done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "3 stored, closed with 1000\n"), done.stderr
    assert [row[1:] for row in rows(tmp_path / "ringoexp.db")] == [(0, 1), (1, -2), (2, 2**40)]


@pytest.mark.slow
@pytest.mark.parametrize("role", ROLES)
def test_example_client_keeps_exactly_once_while_server_is_killed(tmp_path: Path, role: str) -> None:
    """The client runs in Node, without packages. Acked records are in the killed server's files, each once."""
    if not shutil.which("node"):
        pytest.skip("needs node")
    rng = random.Random(seeded())
    port, source, rounds = free_port(), uuid.uuid4(), 5
    flags = ["-I", "false", "-p", str(port)] if role == "consumer" else ["-p", str(port), "-T", str(port)]
    database, sent = tmp_path / "ringoexp.db", array("q")

    def acked() -> int:
        lines = (tmp_path / "out").read_text().split("\n")[:-1]
        return int(lines[-1].removeprefix("acked ")) if lines else 0

    def violations(dead: bool) -> list[str]:
        return problems(database, {source: sent}, {source: acked()}, dead)

    running = ServerProcess(tmp_path, *flags)
    with open(tmp_path / "out", "wb") as out, open(tmp_path / "errors", "wb") as errors:
        command = ["node", str(EXAMPLE), f"ws://localhost:{port}/v1.0/ingest", str(source)]
        client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=errors)
    assert client.stdin
    try:
        for _ in range(rounds):
            more = array("q", rng.randbytes(8 * 15_000))
            minimum = len(sent) + rng.randrange(8_000)
            sent += more
            client.stdin.write("".join(f"{value}\n" for value in more).encode())
            client.stdin.flush()
            eventually(lambda minimum=minimum: acked() >= minimum, "acks")
            running.kill()
            assert not violations(dead=True)
            running = ServerProcess(tmp_path, *flags)
        client.stdin.close()
        assert client.wait(DEADLINE) == 0, (tmp_path / "errors").read_text()
        assert acked() == len(sent) == rounds * 15_000
        assert not violations(dead=False)
        assert running.stop() == 0
    finally:
        client.kill()
        client.wait()
        running.kill()
    assert "the connection was lost" in (tmp_path / "errors").read_text()


@pytest.mark.parametrize(
    ("answer", "message"),
    [("frame", "closed with 1007"), ("status", "refused: HTTP/1.1 404")],
)
def test_example_client_stops_at_a_permanent_error(tmp_path: Path, answer: str, message: str) -> None:
    if not shutil.which("node"):
        pytest.skip("needs node")
    with server(tmp_path, *ROLES["consumer"]) as consumer:
        url = consumer.url + ("s" if answer == "status" else "")
        first = str(2**63 - 2 if answer == "frame" else 0)  # only the first of the three records has a valid sequence
        command = ["node", str(EXAMPLE), url, str(uuid.uuid4()), first]
        done = subprocess.run(command, input="1\n2\n3\n", capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 1 and message in done.stderr
