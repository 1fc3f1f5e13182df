"""Test harness: servers as processes, a raw WebSocket client, and waiting for conditions with a deadline."""

import atexit
import base64
import errno
import http.client
import json
import os
import random
import re
import shlex
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ringolib.status.log_format import sentence
from support.fake_consumer import answer_handshake

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 30.0
"""Seconds after which a test that waits for something fails."""
MEASURED = "COVERAGE_PROCESS_CONFIG" in os.environ
"""True if coverage measures the tests and the servers that they start."""
SETTLE_SECONDS = 2.0
"""Time that a server has to write its coverage data before it is killed."""


def eventually(predicate: Callable[[], Any], what: str = "", deadline: float = DEADLINE) -> Any:
    """Return the first true value of `predicate`, called again and again. Fail after `deadline` seconds."""
    end = time.monotonic() + deadline
    while not (value := predicate()):
        assert time.monotonic() < end, f"did not happen within {deadline} s: {what or predicate}"
        time.sleep(0.01)
    return value


class Blocked:
    """A call in its own thread: a test can show that it blocks, and see its result once it returns."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:
            self._error = error

    def still(self, seconds: float = 0.1) -> bool:
        """True if the call has not returned after `seconds`."""
        self._thread.join(seconds)
        return self._thread.is_alive()

    def result(self, deadline: float = DEADLINE) -> Any:
        """Return or raise the result of the call. Fail if it is still running after `deadline` seconds."""
        self._thread.join(deadline)
        assert not self._thread.is_alive(), "still blocked"
        if self._error:
            raise self._error
        return self._value


def imports_for(patch: str) -> str:
    """Return import statements for each module that `patch` names. `web.handler` means `ringolib.web.handler`."""
    packages = "app|client|counters|forward|net|options|status|storage|timing|web|wire"
    modules = set()
    for name in re.findall(rf"(?<![\w.])(?:{packages})(?:\.[a-z_]+)*", patch):
        path = f"ringolib.{name}"
        while not (ROOT / f"{path.replace('.', '/')}.py").exists() and path.count(".") > 1:
            path = path.rpartition(".")[0]
        modules.add(path)
    others = {"ringbuffer", "store", "wsserver", *sys.stdlib_module_names}
    tops = sorted(others & set(re.findall(r"(?<![\w.])(\w+)\.", patch)))
    imports = [f"import {name}" for name in [*sorted(modules), *tops]]
    # Each constant is evaluated first: the patch of a name that does not exist would do nothing, silently.
    constants = re.findall(rf"(?<![\w.])((?:{packages}|ringbuffer|store|wsserver)[\w.]*\.[A-Z_]+) = ", patch)
    return "; ".join([*imports, f"from ringolib import {packages.replace('|', ', ')}", *constants])


def program_files(root: Path = ROOT) -> list[Path]:
    """Return the program's modules: the four at the top, and the modules of ringolib."""
    return [*root.glob("*.py"), *(root / "ringolib").rglob("*.py")]


def logged(text: str, event: str) -> dict[str, Any] | None:
    """Return the fields of the last complete line with this event in a log, logfmt or JSON; None without one."""
    for line in reversed(text[: text.rfind("\n") + 1].splitlines()):
        if f'"event": "{event}"' in line:
            return dict(json.loads(line))
        if f" event={event} " in line:
            # shlex is good enough to remove the quotes of a JSON string
            fields = dict(word.split("=", 1) for word in shlex.split(line))
            types = {"true": True, "false": False}
            return {key: types.get(value, _number(value)) for key, value in fields.items()}
    return None


def _number(text: str) -> Any:
    """Return the number that a text is, or else the text."""
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        return text


def started_port(log: Path, process: "subprocess.Popen[Any]") -> int:
    """Wait until the server that writes this log has started. Return its port, or 0 for a Unix socket."""
    fields = wait_started(log, process)
    return 0 if fields["url"].startswith("unix:") else int(fields["url"].rstrip("/").rpartition(":")[2])


def wait_started(log: Path, process: "subprocess.Popen[Any]") -> dict[str, Any]:
    """Return the fields of the event `started` in the log of a process. Fail if the process ends before."""
    while not (fields := logged(log.read_text(errors="replace"), "started")):
        if process.poll() is not None and not logged(log.read_text(errors="replace"), "started"):
            raise AssertionError(f"did not start: {log.read_text(errors='replace')}")
        time.sleep(0.01)
    return fields


class ServerProcess:
    """A running `python ringoexp.py` with these flags, in `directory`. The constructor waits until it has started.

    `patch` holds statements to run before the program starts, such as `web.handler.REQUEST_TIMEOUT_SECONDS = 1`.
    `under` is a command that runs the program, such as `strace` with its options. `env` is added to the environment.
    `program` replaces `python ringoexp.py`, for example by the single file.
    """

    def __init__(
        self,
        directory: Path,
        *flags: str,
        patch: str = "",
        under: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        program: Sequence[str] = (),
    ) -> None:
        script = [str(ROOT / "ringoexp.py")]
        if patch:
            start = f"import sys; sys.path[0] = {str(ROOT)!r}; import ringoexp; {imports_for(patch)}; {patch}"
            script = ["-c", f"{start}; sys.exit(ringoexp.main())"]
        self.errors = directory / f"stderr-{time.monotonic_ns()}"
        with open(self.errors, "wb") as errors:
            self.process = subprocess.Popen(
                [*under, *(program or (sys.executable, *script)), *flags],
                cwd=directory,
                env={**os.environ, **(env or {})},
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
        self.started = wait_started(self.errors, self.process)
        """The fields of the event `started`."""
        self.greeting = sentence("started", self.started) or ""
        """The same as a sentence, as it is on a terminal."""
        self.port = started_port(self.errors, self.process)
        self.at = Path(self.started["url"].removeprefix("unix:")) if not self.port else self.port
        """The address for `request` and `RawClient`: a port, or the path of a Unix socket."""
        self.tally = ""

    @property
    def url(self) -> str:
        return f"ws://localhost:{self.port}/v1.0/ingest"

    def get(self, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Send a GET; return status, headers and body."""
        return request(self.at, "GET", path, headers=headers)

    def stats(self) -> dict[str, Any]:
        """Return the `stats` object of `/v1.0/stats`."""
        return dict(json.loads(self.get("/v1.0/stats")[2])["stats"])

    def resident(self) -> int:
        """Return the resident memory in bytes."""
        with open(f"/proc/{self.process.pid}/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def send_signal(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self, number: int = signal.SIGTERM, deadline: float = 45.0) -> int:
        """End the server with a signal and return its exit status. `tally` is then its last line, as on a terminal."""
        self.process.send_signal(number)
        return self.wait(deadline)

    def wait(self, deadline: float = 45.0) -> int:
        status = self.process.wait(deadline)
        stopped = logged(self.errors.read_text(errors="replace"), "stopped")
        self.tally = (sentence("stopped", stopped) or "") if stopped else ""
        return status

    def settle(self) -> None:
        """Send SIGTERM and wait a moment: coverage writes its data only in an ordered stop."""
        self.process.terminate()
        try:
            self.process.wait(SETTLE_SECONDS)
        except subprocess.TimeoutExpired:
            pass

    def kill(self) -> None:
        """Send SIGKILL if the server still runs."""
        self.process.kill()
        self.process.wait()


@contextmanager
def server(
    directory: Path, *flags: str, patch: str = "", under: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> Iterator[ServerProcess]:
    """Run a server for the `with` block, and kill it afterwards. Its stderr must hold no traceback."""
    running = ServerProcess(directory, *flags, patch=patch, under=under, env=env)
    try:
        yield running
    finally:
        if MEASURED:
            running.settle()
        running.kill()
    assert "Traceback" not in running.errors.read_text()


def not_ready(running: ServerProcess) -> list[str]:
    """Return the codes of the reasons why the server is not ready; an empty list if it is ready."""
    status, headers, body = running.get("/v1.0/ready")
    answer = json.loads(body)
    answer.pop("store", None)  # the identity of the database
    if status == 200:
        assert answer == {"ready": True}
        return []
    assert status == 503 and answer["ready"] is False and headers["Retry-After"] == "1"
    assert all(reason["detail"] for reason in answer["reasons"])
    return [reason["code"] for reason in answer["reasons"]]


def seeded() -> int:
    """Return and print a random seed. RINGOEXP_SEED sets it, to repeat the choices of an earlier run."""
    seed = int(os.environ.get("RINGOEXP_SEED") or random.randrange(2**32))
    print("seed", seed)
    return seed


def in_order(database: Path, source: object) -> list[int]:
    """Return the values of a source. Fail unless its records are numbered from 0 without a gap, each once."""
    records = sorted((sequence, value) for owner, sequence, value in rows(database) if owner == str(source))
    assert [sequence for sequence, _ in records] == list(range(len(records)))
    return [value for _, value in records]


_keepers = ExitStack()
atexit.register(_keepers.close)


def free_port() -> int:
    """Return a free port that the system gives to no other process while these tests run.

    A bound socket keeps it reserved, so that a server may stop and start on it. Without it, another suite on the same
    machine could get the port, and the records that are sent to it.
    """
    keeper = _keepers.enter_context(socket.socket())
    keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    keeper.bind(("127.0.0.1", 0))
    port = int(keeper.getsockname()[1])
    try:  # the other address of localhost
        keeper = _keepers.enter_context(socket.socket(socket.AF_INET6))
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind(("::1", port))
    except OSError as error:
        return free_port() if error.errno == errno.EADDRINUSE else port
    return port


def connected(at: int | Path) -> socket.socket:
    """Return a socket connected to a port of localhost, or to a Unix socket."""
    if isinstance(at, int):
        return socket.create_connection(("localhost", at), DEADLINE)
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(DEADLINE)
        sock.connect(str(at))
    except OSError:
        sock.close()
        raise
    return sock


def exchange(at: int | Path, data: bytes, half_close: bool = False) -> bytes:
    """Send `data` over a new connection. Return all bytes received up to the end of the stream."""
    with connected(at) as client:
        client.sendall(data)
        if half_close:
            client.shutdown(socket.SHUT_WR)
        answer = b""
        while more := client.recv(65536):
            answer += more
        return answer


def request(
    at: int | Path, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Send one HTTP request; return status, headers and body."""
    connection = http.client.HTTPConnection("localhost", at if isinstance(at, int) else None, timeout=DEADLINE)
    try:
        connection.sock = connected(at)
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def rows(database: Path) -> list[tuple[str, int, int]]:
    """Return every stored record as (source, sequence, value), in the order of its id."""
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as reader:
        records = reader.execute("SELECT source, sequence, value FROM records ORDER BY id").fetchall()
    reader.close()
    return records


ROLES = {"publisher": ["-p", "0", "-T", "0"], "consumer": ["-I", "false", "-p", "0"]}
"""The options of a server on a free port: a publisher with its own database, and a consumer."""

HANDSHAKE = {
    "Host": "localhost",
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Key": base64.b64encode(bytes(16)).decode(),
    "Sec-WebSocket-Version": "13",
}


HANDSHAKE_LINES = "".join(f"{name}: {value}\r\n" for name, value in HANDSHAKE.items()).encode()
UPGRADE = b"GET /v1.0/ingest HTTP/1.1\r\n" + HANDSHAKE_LINES + b"\r\n"
"""A whole upgrade request."""


def frame(
    opcode: int, payload: bytes, fin: bool = True, mask: bytes | None = b"\x01\x02\x03\x04", rsv: int = 0
) -> bytes:
    """Return one WebSocket frame as a client sends it. `mask` None leaves it unmasked, which is an error."""
    head = bytes([fin << 7 | rsv << 4 | opcode])
    bit = 128 if mask is not None else 0
    size = len(payload)
    if size < 126:
        head += bytes([bit | size])
    elif size < 65536:
        head += bytes([bit | 126]) + struct.pack(">H", size)
    else:
        head += bytes([bit | 127]) + struct.pack(">Q", size)
    if mask is None:
        return head + payload
    key = (mask * (size // 4 + 1))[:size]
    masked = (int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")).to_bytes(size, "big")
    return head + mask + masked


class RawClient:
    """A WebSocket client that sends any bytes, valid or not, and reads frames."""

    def __init__(self, at: int | Path, headers: dict[str, str | None] | None = None, behind: bytes = b"") -> None:
        """Send the handshake with these headers changed (None: left out), and `behind` in the same segment."""
        self.sock = connected(at)
        self._buffer = b""
        fields = {**HANDSHAKE, **(headers or {})}
        lines = [f"{name}: {value}" for name, value in fields.items() if value is not None]
        self.sock.sendall(("GET /v1.0/ingest HTTP/1.1\r\n" + "\r\n".join(lines) + "\r\n\r\n").encode() + behind)
        while b"\r\n\r\n" not in self._buffer:
            data = self.sock.recv(65536)
            assert data, f"closed during the handshake: {self._buffer!r}"
            self._buffer += data
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        self.status = int(head.split()[1])
        self.head = head.decode()

    def __enter__(self) -> "RawClient":
        return self

    def __exit__(self, *unused: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def read_frame(self) -> bytes | None:
        """Return the next frame with its head; None at the end of the stream."""

        def buffered(size: int) -> bool:
            while len(self._buffer) < size:
                try:
                    data = self.sock.recv(65536)
                except ConnectionResetError:
                    return False
                if not data:
                    return False
                self._buffer += data
            return True

        if not buffered(2):
            return None
        head, size = 2, self._buffer[1]
        if size == 126:
            assert buffered(4), "the stream ended within a frame"
            head, size = 4, struct.unpack(">H", self._buffer[2:4])[0]
        assert buffered(head + size), "the stream ended within a frame"
        data, self._buffer = self._buffer[: head + size], self._buffer[head + size :]
        return data

    def read(self) -> tuple[int, bytes] | None:
        """Return opcode and payload of the next frame; None at the end of the stream."""
        data = self.read_frame()
        return data and (data[0] & 15, data[4 if data[1] == 126 else 2 :])

    def acked(self, count: int) -> int:
        """Read until `count` records are acked and return the last ack. Fail if the connection ends before."""
        last = -1
        while last < count:
            message = self.read()
            assert message and message[0] == 2, f"expected an ack, got {message}"
            assert struct.unpack(">Q", message[1])[0] > last, "acks grow"
            (last,) = struct.unpack(">Q", message[1])
        return last

    def closed(self) -> tuple[int, str, int]:
        """Read to the end; return close code, reason and the last ack (0 if none). 1006: no Close frame came."""
        acked = 0
        while message := self.read():
            opcode, payload = message
            if opcode == 2:
                (acked,) = struct.unpack(">Q", payload)
            elif opcode == 8:
                code = struct.unpack(">H", payload[:2])[0] if payload else 1005
                return code, payload[2:].decode(), acked
        return 1006, "", acked


def raw_link(listener: socket.socket) -> socket.socket:
    """Accept a link, answer its handshake, and return the socket to the test."""
    peer, _ = listener.accept()
    answer_handshake(peer)
    return peer
