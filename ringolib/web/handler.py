"""One HTTP connection: requests with deadlines, a table of routes, answers and errors in JSON.

Knows nothing of records. A `WebHandler` belongs to its connection's thread, from `connections`; nothing here is
shared between threads. `wsserver` serves clients with it, `profiler` developers.
"""

import http.client
import io
import json
import logging
import re
import socket
import uuid
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

from ringolib.net.addresses import format_address
from ringolib.net.sockets import linger
from ringolib.net.tls_socket import RECORD_TYPE
from ringolib.web.connections import Connections

log = logging.getLogger("ringoexp.http")

REQUEST_TIMEOUT = 30.0
"""Seconds a client has to send a request, or the next one on the same connection, up to its body."""
REFUSED_TIMEOUT = 2.0
"""Seconds for a request on a connection that was not admitted."""
MAX_HEAD = 32 * 1024
"""Bytes of a request up to its body: its first line and its headers, of which `http.client` takes a hundred."""
JSON = "application/json;charset=utf-8"
GET_OR_HEAD = ("GET", "HEAD")
_FIELD = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\0\r]*)?\r?\n?")
"""A line of the headers, or the empty one behind them (RFC 9112 section 5): one line is one header."""

Routes = dict[str, dict[str, Callable[[], None]]]
"""Path -> method -> what answers it."""


class Refusal(Exception):
    """A request is answered with an error: `status`, a reason a person can act on, more headers, more JSON."""

    def __init__(
        self,
        status: int,
        reason: str,
        headers: dict[str, str] | None = None,
        more: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(reason)
        self.status = status
        self.headers = headers or {}
        self.body = {"error": reason, **(more or {})}


class _TooLarge(http.client.HTTPException):
    """A request's head is larger than MAX_HEAD."""


class _Reader(io.RawIOBase):
    """What comes from a socket until a deadline: reading beyond it raises TimeoutError, beyond `most` _TooLarge."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.deadline: float | None = 0.0  # monotonic seconds; None: waits for nothing
        self.most: int | None = None  # bytes; None: any number

    def readable(self) -> bool:
        """True: it is for reading."""
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Reads what there is, waiting for at least a byte; 0 at the end of the stream, None if it may not wait."""
        left = 0.0 if self.deadline is None else self.deadline - monotonic()
        if self.deadline is not None and left <= 0:
            raise TimeoutError("too slow")
        self._sock.settimeout(left)
        if self.most is not None and self.most <= 0:
            raise _TooLarge
        try:
            size = self._sock.recv_into(buffer)
        except BlockingIOError:
            return None
        if self.most is not None:
            self.most -= size
        return size


class _Lines:
    """The lines of the headers. `wrong`: one of them was none."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        self._file = file
        self.wrong = False

    def readline(self, size: int) -> bytes:
        """The next line, of at most `size` bytes."""
        line = self._file.readline(size)
        self.wrong = self.wrong or not _FIELD.fullmatch(line)
        return line


class _Writer(io.BufferedIOBase):
    """What goes to a socket, whole."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def writable(self) -> bool:
        """True: it is for writing."""
        return True

    def write(self, data: Any) -> int:
        """Returns once all of it is with the system. Raises OSError when it is not within the socket's timeout."""
        self._sock.sendall(data)
        return len(data)


class WebHandler(BaseHTTPRequestHandler):
    """One connection: HTTP/1.1 requests one after the other, each answered by one of `routes`.

    A request on a connection that was not admitted is answered too if its path is one of `open_to_all`. Those of
    `without_token` are answered to who does not have the server's token.
    """

    server: Connections
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.1"  # also what is no request is answered with a status line
    open_to_all: tuple[str, ...] = ()
    without_token: tuple[str, ...] = ()
    lingering = False  # close gently: the client may still be sending what nobody reads
    asked_to_close = False  # by the client, for after this request

    def routes(self) -> Routes:
        """What there is."""
        raise NotImplementedError

    def turn_away(self) -> Refusal:
        """What a connection that was not admitted is told."""
        return Refusal(503, "the server is stopping", {"Retry-After": "1"})

    def unauthorized(self, path: str) -> None:
        """Answers a request that does not have the token. Raises Refusal."""
        self.server.unauthorized()
        challenge = 'Bearer realm="ringoexp"'
        if "Authorization" not in self.headers:
            raise Refusal(
                401, "this server wants its token: Authorization: Bearer TOKEN", {"WWW-Authenticate": challenge}
            )
        wrong = f'{challenge}, error="invalid_token"'
        raise Refusal(401, "that is not the token of this server", {"WWW-Authenticate": wrong})

    def setup(self) -> None:
        """Reads through a deadline instead of a timeout for each piece."""
        self.connection = self.request
        self.reader = _Reader(self.connection)
        self.rfile = io.BufferedReader(self.reader)
        self.wfile = _Writer(self.connection)

    def handle_one_request(self) -> None:
        """Gives the next request its time, and its head its size."""
        patience = REQUEST_TIMEOUT if self.server.admitted() else REFUSED_TIMEOUT
        self.reader.deadline = monotonic() + patience
        self.reader.most = MAX_HEAD
        self.command, self.path = "", ""  # or a bad request's answer would be logged with those of the one before
        self.requestline = ""  # and in its version
        self.request_version = self.protocol_version
        try:
            if self.rfile.peek(1)[:1] == bytes([RECORD_TYPE]):  # type: ignore[attr-defined]  # a BufferedReader
                reason = "a client speaks TLS where none is spoken (--tls_cert, --tls_key)"
                log.info("refused", {"client": self.client_address[0], "status": 400, "reason": reason})
                self.send_error(400, "no TLS is spoken on this port: ask for http:// or ws://")
                return
            super().handle_one_request()
        except TimeoutError as error:  # of the first byte
            self.log_error("Request timed out: %r", error)
            self.close_connection = True
        except _TooLarge:
            self.send_error(414, f"a request has at most {MAX_HEAD} bytes up to its body")

    def parse_request(self) -> bool:
        """As the base class, but that takes a line that is no header for the end of them, and a lone CR for the end of
        a line: who stands before this server may see another request than that (RFC 9112 sections 2.2 and 5.1).
        """
        file, lines = self.rfile, _Lines(self.rfile)
        self.rfile = lines  # type: ignore[assignment]
        try:
            parsed = super().parse_request()
        finally:
            self.rfile = file
        if parsed and lines.wrong:
            self.send_error(400, "a line of the headers is none: NAME: VALUE, on one line")
            return False
        return parsed

    def __getattr__(self, name: str) -> Any:
        """Methods that HTTP does not know are wrong methods too: 405 here, not the base class's 501."""
        if name.startswith("do_"):
            return self.do_GET
        raise AttributeError(name)

    def do_GET(self) -> None:
        """Answers one request, whatever its method."""
        self.connection.settimeout(REQUEST_TIMEOUT)  # for the answer: reading sets its own
        self.reader.most = None
        path = self.path.partition("?")[0]
        self.asked_to_close = self.close_connection
        try:
            if self.server.stopping.is_set():
                self.close_connection = True
            if self._has_body():  # until somebody has read it
                self.close_connection = self.lingering = True
            if not self.server.admitted():
                self.close_connection = True
                if path not in self.open_to_all:
                    raise self.turn_away()
            if path not in self.without_token and not self.has_token():
                self.unauthorized(path)
                return
            routes = self.routes()
            if path not in routes:
                raise Refusal(404, f"nothing here: there are {', '.join(routes)}")
            methods = routes[path]
            if self.command not in methods:
                raise Refusal(405, f"{path} takes {', '.join(methods)}", {"Allow": ", ".join(methods)})
            methods[self.command]()
        except Refusal as refusal:
            log.info("refused", {"client": self.client_address[0], "status": refusal.status, "reason": str(refusal)})
            self.reply_json(refusal.status, refusal.body, refusal.headers)

    def has_token(self) -> bool:
        """True when the request has the server's token, or it has none."""
        return self.server.credentials.accepts(self.headers.get_all("Authorization", []), self.offered())

    def offered(self) -> list[str]:
        """The WebSocket subprotocols that the request offers, as they are written."""
        found = [
            part.strip() for value in self.headers.get_all("Sec-WebSocket-Protocol", []) for part in value.split(",")
        ]
        return [part for part in found if part]

    def finish(self) -> None:
        """Ends the connection, gently where the client may still be sending."""
        if self.lingering:
            linger(self.connection)
        self.wfile.close()
        self.rfile.close()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answers what the base class refuses (bad request lines and headers), in JSON like the rest."""
        self.close_connection = self.lingering = True
        self.command = self.command or "GET"
        if code == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
            message = f"a request has at most 100 headers, and at most {MAX_HEAD} bytes up to its body"
        self.reply_json(code, {"error": message or HTTPStatus(code).phrase})

    def version_string(self) -> str:
        """The `Server` header: the name this server was given."""
        return self.server.name

    def log_message(self, format: str, *args: Any) -> None:
        """What the base class logs goes to our log, in detail only."""
        log.debug("http", {"client": self.client_address[0], "message": format % args})

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Logs the answer to a request, in detail only; never what follows the path: that may be a secret."""
        asked = {"method": self.command, "path": _path(self.path)}
        log.debug("request", {"client": self.client_address[0], **asked, "status": code})

    def reply_json(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        """Sends a whole response in JSON."""
        self.reply(status, json.dumps(body).encode() + b"\n", JSON, headers)

    def reply(self, status: int, content: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        """Sends a whole response, without its body to HEAD or where the client has it already (304)."""
        headers = headers or {}
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("X-Request-Id", request_id())
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection and "Connection" not in headers:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD" and status != 304:
            self.wfile.write(content)

    def _has_body(self) -> bool:
        """True when a body follows the headers."""
        return self.headers.get_all("Content-Length", ["0"]) != ["0"] or "Transfer-Encoding" in self.headers


def _path(target: str) -> str:
    """The path of a request's target, or its beginning: no query, no name and password, which may be secret."""
    try:
        return urlsplit(target).path[:200]
    except ValueError:
        return ""


def peer_name(address: tuple[Any, ...]) -> str:
    """Host and port of a client's address, `[host]:port` for IPv6; `unix` for one on a Unix socket."""
    return format_address(*address[:2]) if len(address) > 1 else str(address[0])


def request_id() -> str:
    """A fresh UUID (version 4), in upper case."""
    return str(uuid.uuid4()).upper()
