"""What the whole-process and socket tests share: servers as processes, raw sockets, and waiting for conditions."""

import atexit
import base64
import errno
import http.client
import json
import os
import random
import re
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

from support.fake_consumer import answer_handshake

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 30.0
"""Seconds after which a test that waits for something fails."""
MEASURED = "COVERAGE_PROCESS_CONFIG" in os.environ
"""True when coverage looks on, and in the processes that these tests start too."""
SETTLE_SECONDS = 2.0


def eventually(predicate: Callable[[], Any], what: str = "", deadline: float = DEADLINE) -> Any:
    """The first true value of `predicate`, which is tried until `deadline` seconds have passed."""
    end = time.monotonic() + deadline
    while not (value := predicate()):
        assert time.monotonic() < end, f"did not happen within {deadline} s: {what or predicate}"
        time.sleep(0.01)
    return value


class Blocked:
    """A call in a thread of its own, to show that it blocks and what it returns once it does not."""

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
        """True when the call has not returned after `seconds`."""
        self._thread.join(seconds)
        return self._thread.is_alive()

    def result(self, deadline: float = DEADLINE) -> Any:
        """What the call returns or raises; fails when it does neither within `deadline` seconds."""
        self._thread.join(deadline)
        assert not self._thread.is_alive(), "still blocked"
        if self._error:
            raise self._error
        return self._value


def imports_for(patch: str) -> str:
    """The statements that import each module which `patch` names: `web.handler` is `ringolib.web.handler`."""
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
    return "; ".join([*imports, f"from ringolib import {packages.replace('|', ', ')}"])


def program_files(root: Path = ROOT) -> list[Path]:
    """The program's modules: the four at the top, and those of ringolib."""
    return [*root.glob("*.py"), *(root / "ringolib").rglob("*.py")]


class ServerProcess:
    """`python ringoexp.py` with these flags, in `directory`, from its first line of output to its exit.

    `patch` are statements that change something first: `web.handler.REQUEST_TIMEOUT_SECONDS = 1`, for example.
    `under` is a command that runs it, `strace` with its flags, say; `env` is added to the environment. `program`
    runs in its place, another build of it, say.
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
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        assert self.process.stdout
        self.greeting = self.process.stdout.readline()
        if not self.greeting:
            self.kill()
            raise AssertionError(f"did not start: {self.errors.read_text()}")
        unix = re.search(r" on unix:(\S+),", self.greeting)
        self.port = 0 if unix else int(self.greeting.split(",")[0].rsplit(":", 1)[1])
        self.at = directory / unix[1] if unix else self.port
        """What `request` and `RawClient` want to know."""
        self.tally = ""

    @property
    def url(self) -> str:
        return f"ws://localhost:{self.port}/v1.0/ingest"

    def get(self, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a GET."""
        return request(self.at, "GET", path, headers=headers)

    def stats(self) -> dict[str, Any]:
        """The `stats` of `/v1.0/stats`."""
        return dict(json.loads(self.get("/v1.0/stats")[2])["stats"])

    def resident(self) -> int:
        """Resident size in bytes."""
        with open(f"/proc/{self.process.pid}/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def send_signal(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self, number: int = signal.SIGTERM, deadline: float = 45.0) -> int:
        """Ends the server with a signal; its exit status. Its last line is in `tally`."""
        self.process.send_signal(number)
        return self.wait(deadline)

    def wait(self, deadline: float = 45.0) -> int:
        out, _ = self.process.communicate(timeout=deadline)
        self.tally = out.strip()
        return self.process.returncode

    def settle(self) -> None:
        """SIGTERM, and a moment to end in order: what coverage has seen it writes only then."""
        self.process.terminate()
        try:
            self.process.wait(SETTLE_SECONDS)
        except subprocess.TimeoutExpired:
            pass

    def kill(self) -> None:
        """SIGKILL, at once, if it still runs."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()


@contextmanager
def server(
    directory: Path, *flags: str, patch: str = "", under: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> Iterator[ServerProcess]:
    """A running server, killed at the end if it still runs. Its stderr must hold no traceback."""
    running = ServerProcess(directory, *flags, patch=patch, under=under, env=env)
    try:
        yield running
    finally:
        if MEASURED:
            running.settle()
        running.kill()
    assert "Traceback" not in running.errors.read_text()


def not_ready(running: ServerProcess) -> list[str]:
    """The codes of why the server is not ready; none if it is."""
    status, headers, body = running.get("/v1.0/ready")
    said = json.loads(body)
    said.pop("store", None)  # which database it is
    if status == 200:
        assert said == {"ready": True}
        return []
    assert status == 503 and said["ready"] is False and headers["Retry-After"] == "1"
    assert all(reason["detail"] for reason in said["reasons"])
    return [reason["code"] for reason in said["reasons"]]


def seeded() -> int:
    """A random seed, printed, or that of RINGOEXP_SEED, to make the same choices again."""
    seed = int(os.environ.get("RINGOEXP_SEED") or random.randrange(2**32))
    print("seed", seed)
    return seed


def in_order(database: Path, source: object) -> list[int]:
    """The values of a source; fails unless its records are numbered without a gap, each once."""
    found = sorted((sequence, value) for of, sequence, value in rows(database) if of == str(source))
    assert [sequence for sequence, _ in found] == list(range(len(found)))
    return [value for _, value in found]


_keepers = ExitStack()
atexit.register(_keepers.close)


def free_port() -> int:
    """A port that the system gives to nobody else while these tests run, whoever listens on it in between.

    Or another test's servers, on a machine where several suites run, would get it, and what is sent to it.
    """
    keeper = _keepers.enter_context(socket.socket())
    keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    keeper.bind(("127.0.0.1", 0))
    port = int(keeper.getsockname()[1])
    try:  # localhost has another address
        keeper = _keepers.enter_context(socket.socket(socket.AF_INET6))
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind(("::1", port))
    except OSError as error:
        return free_port() if error.errno == errno.EADDRINUSE else port
    return port


def connected(at: int | Path) -> socket.socket:
    """A socket connected to a port of localhost, or to a Unix socket."""
    if isinstance(at, int):
        return socket.create_connection(("localhost", at), DEADLINE)
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(DEADLINE)
    sock.connect(str(at))
    return sock


def request(
    at: int | Path, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of one HTTP request."""
    connection = http.client.HTTPConnection("localhost", at if isinstance(at, int) else None, timeout=DEADLINE)
    try:
        connection.sock = connected(at)
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def rows(database: Path) -> list[tuple[str, int, int]]:
    """Every stored record as (source, sequence, value), in the order of its id."""
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as reader:
        found = reader.execute("SELECT source, sequence, value FROM records ORDER BY id").fetchall()
    reader.close()
    return found


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
    """One WebSocket frame as a client sends it; `mask` None leaves it unmasked, which is an error."""
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
    """A WebSocket client that does as it is told, right or wrong: bytes out, frames in."""

    def __init__(self, at: int | Path, headers: dict[str, str | None] | None = None, behind: bytes = b"") -> None:
        """Sends the handshake with these headers changed (None: left out), and `behind` in the same segment."""
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
        """The next frame, head and all; None at the end of the stream."""

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
        taken, self._buffer = self._buffer[: head + size], self._buffer[head + size :]
        return taken

    def read(self) -> tuple[int, bytes] | None:
        """Opcode and payload of the next frame; None at the end of the stream."""
        found = self.read_frame()
        return found and (found[0] & 15, found[4 if found[1] == 126 else 2 :])

    def acked(self, count: int) -> int:
        """Reads until `count` records are acked; the last ack. Fails when the connection ends before."""
        last = -1
        while last < count:
            found = self.read()
            assert found and found[0] == 2, f"expected an ack, got {found}"
            assert struct.unpack(">Q", found[1])[0] > last, "acks grow"
            (last,) = struct.unpack(">Q", found[1])
        return last

    def closed(self) -> tuple[int, str, int]:
        """Reads to the end: close code, reason, and the last ack before (0 if none). 1006 without a Close frame."""
        acked = 0
        while found := self.read():
            opcode, payload = found
            if opcode == 2:
                (acked,) = struct.unpack(">Q", payload)
            elif opcode == 8:
                code = struct.unpack(">H", payload[:2])[0] if payload else 1005
                return code, payload[2:].decode(), acked
        return 1006, "", acked


def raw_link(listener: socket.socket) -> socket.socket:
    """Accepts a link, and answers its handshake; then it is the test's."""
    peer, _ = listener.accept()
    answer_handshake(peer)
    return peer
