"""The ClickHouse HTTP client against scripted responses: which ones are errors, and of which kind."""

import socket
import threading

import pytest
from support.harness import DEADLINE

from ringolib.storage.clickhouse.http import PermanentError, RetryableError, Server
from ringolib.storage.clickhouse.url import parse_url


class ScriptedServer:
    """Accepts one connection for each of `responses`, reads a request and sends the response."""

    def __init__(self, *responses: bytes) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._responses = responses
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        for response in self._responses:
            client, _ = self._listener.accept()
            with client:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += client.recv(65536)
                client.sendall(response)

    def __enter__(self) -> "ScriptedServer":
        return self

    def __exit__(self, *unused: object) -> None:
        self._listener.close()
        self._thread.join(DEADLINE)


@pytest.mark.parametrize(
    ("response", "kind", "message"),
    [
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\nCode: 241. DB::Exception: no!\n",
            RetryableError,
            r"no! \(code 241\)",
        ),
        (
            b"HTTP/1.1 200 OK\r\nX-ClickHouse-Exception-Code: 62\r\nContent-Length: 0\r\n\r\n",
            PermanentError,
            r"code 62",
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\n", RetryableError, "IncompleteRead"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc", RetryableError, "IncompleteRead"),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy", RetryableError, "answered 503: busy"),
        (b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n", PermanentError, "answered 403"),
        (
            b"HTTP/1.1 404 No\r\nContent-Length: 35\r\n\r\nCode: 999, e.displayText() = keeper",
            RetryableError,
            "keeper .code 999",
        ),
        (b"SSH-2.0\r\n", RetryableError, "SSH"),
        (b"", RetryableError, "closed"),
    ],
)
def test_incomplete_or_failed_response_raises(response: bytes, kind: type[Exception], message: str) -> None:
    with ScriptedServer(response) as scripted:
        target = parse_url(f"clickhouse://127.0.0.1:{scripted.port}/d")
        server = Server(target, *target.hosts[0])
        with pytest.raises(kind, match=message) as error:
            server.post("INSERT", b"", 5)
        server.close()
        assert "\n" not in str(error.value)
