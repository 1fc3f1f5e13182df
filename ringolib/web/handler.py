"""One HTTP connection: requests with deadlines, a table of routes, and responses and errors in JSON.

A `WebHandler` belongs to the thread of its connection; threads share nothing here. The module knows nothing about
records. `wsserver` builds the server's routes on it, and `status.profiler` builds the profiler's routes.
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
from ringolib.timing import deadline_after
from ringolib.web.connections import Connections
from ringolib.web.headers import Refusal, has_body, offered_subprotocols

log = logging.getLogger("ringoexp.http")

REQUEST_TIMEOUT_SECONDS = 30.0
"""The time for the request line and the headers, counted from the start of the connection or the last response."""
REFUSED_TIMEOUT_SECONDS = 2.0
"""The same for a connection that was not admitted."""
MAX_HEAD = 32 * 1024
"""Bytes of the request line and the headers together. `http.client` accepts at most 100 headers."""
JSON = "application/json;charset=utf-8"
GET_OR_HEAD = ("GET", "HEAD")
CHALLENGE = 'Bearer realm="ringoexp"'
"""The WWW-Authenticate header of a response with status 401 (RFC 6750 section 3)."""
_HEADER_LINE = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\0\r]*)?\r?\n?")
"""One header on one line, or the empty line after the headers (RFC 9112 section 5)."""

Routes = dict[str, dict[str, Callable[[], None]]]
"""Path -> method -> the function that answers it."""


class _HeadTooLarge(http.client.HTTPException):
    """The request line and the headers exceed MAX_HEAD."""


class _Reader(io.RawIOBase):
    """Reads from a socket until a deadline, and at most `limit` bytes.

    `deadline` is a reading of the monotonic clock; if it is None, a read does not wait. `limit` None means no limit.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.deadline: float | None = 0.0
        self.limit: int | None = None

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Read at least one byte; return 0 at the end of the stream, and None if a read would have to wait.

        Raises TimeoutError after the deadline, and _HeadTooLarge beyond the limit.
        """
        timeout = 0.0 if self.deadline is None else self.deadline - monotonic()
        if self.deadline is not None and timeout <= 0:
            raise TimeoutError("too slow")
        self._sock.settimeout(timeout)
        if self.limit is not None and self.limit <= 0:
            raise _HeadTooLarge
        try:
            size = self._sock.recv_into(buffer)
        except BlockingIOError:
            return None
        if self.limit is not None:
            self.limit -= size
        return size


class _HeaderLines:
    """The lines of the headers. `malformed` becomes true at a line that is not a header."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        self._file = file
        self.malformed = False

    def readline(self, size: int) -> bytes:
        """Return the next line, at most `size` bytes of it."""
        line = self._file.readline(size)
        self.malformed = self.malformed or not _HEADER_LINE.fullmatch(line)
        return line


class _Writer(io.BufferedIOBase):
    """Writes to a socket; `write` always sends all of the data."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data: Any) -> int:
        """Send all of `data`. Raises OSError if the socket's timeout expires first."""
        self._sock.sendall(data)
        return len(data)


class WebHandler(BaseHTTPRequestHandler):
    """One connection: HTTP/1.1 requests one after the other, each answered by one of `routes`.

    A subclass defines `routes`, and two sets of paths. `paths_beyond_limit` are answered also on a connection that was
    not admitted. `paths_without_token` are answered also to a client that has no token.
    """

    server: Connections
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.1"  # a malformed request, too, gets a response with a status line
    paths_beyond_limit: tuple[str, ...] = ()
    paths_without_token: tuple[str, ...] = ()
    lingering = False  # before the close, discard what the client still sends: see `linger`
    handed_over = False  # another thread owns the socket: this one must not touch it any more
    asked_to_close = False  # the client asked to close the connection after this request

    def routes(self) -> Routes:
        """Return the table of routes. Raises Refusal if the client may use none of them."""
        raise NotImplementedError

    def admission_refusal(self) -> Refusal:
        """Return the error for a connection that was not admitted."""
        return Refusal(503, "the server is stopping", {"Retry-After": "1"})

    def refuse_unauthorized(self, path: str) -> None:
        """Answer a request that lacks the server's token. Raises Refusal."""
        self.server.table.count_unauthorized()
        if "Authorization" not in self.headers:
            raise Refusal(
                401, "this server requires a token: send Authorization: Bearer TOKEN", {"WWW-Authenticate": CHALLENGE}
            )
        challenge = f'{CHALLENGE}, error="invalid_token"'
        raise Refusal(401, "wrong token: send the token of this server", {"WWW-Authenticate": challenge})

    def setup(self) -> None:
        """Read with one deadline for a whole request, not with a timeout for each read."""
        self.connection = self.request
        self.reader = _Reader(self.connection)
        self.rfile = io.BufferedReader(self.reader)
        self.wfile = _Writer(self.connection)

    def handle_one_request(self) -> None:
        """Read and answer one request. Limit the time and the size of its head."""
        timeout = REQUEST_TIMEOUT_SECONDS if self.server.table.is_admitted() else REFUSED_TIMEOUT_SECONDS
        self.reader.deadline = deadline_after(timeout)
        self.reader.limit = MAX_HEAD
        # A response to a malformed request must not use the values of the previous request.
        self.command, self.path, self.requestline = "", "", ""
        self.request_version = self.protocol_version
        try:
            if self.rfile.peek(1)[:1] == bytes([RECORD_TYPE]):  # type: ignore[attr-defined]  # a BufferedReader
                reason = "a client sent TLS to a port without TLS (--tls_cert and --tls_key enable TLS)"
                log.info("refused", {"client": self.client_address[0], "status": 400, "reason": reason})
                self.send_error(400, "this port does not use TLS: connect with http:// or ws://")
                return
            super().handle_one_request()
        except TimeoutError as error:  # while waiting for the first byte; the base class handles the others
            self.log_error("Request timed out: %r", error)
            self.close_connection = True
        except _HeadTooLarge:
            self.send_error(414, f"the request line and headers have more than {MAX_HEAD} bytes: shorten them")

    def parse_request(self) -> bool:
        """Parse as the base class does, and refuse malformed header lines.

        The base class ends the headers at a malformed line, and ends a line at a lone CR. A proxy in front of this
        server may see another request then (RFC 9112 sections 2.2 and 5.1).
        """
        file, lines = self.rfile, _HeaderLines(self.rfile)
        self.rfile = lines  # type: ignore[assignment]
        try:
            parsed = super().parse_request()
        finally:
            self.rfile = file
        if parsed and lines.malformed:
            self.send_error(400, "malformed header line: expected NAME: VALUE on one line")
            return False
        return parsed

    def __getattr__(self, name: str) -> Any:
        """Answer every method in `do_GET`. The base class would answer 501 to an unknown one; it has to be 405."""
        if name.startswith("do_"):
            return self.do_GET
        raise AttributeError(name)

    def do_GET(self) -> None:
        """Answer one request of any method."""
        self.connection.settimeout(REQUEST_TIMEOUT_SECONDS)  # for the response; reads set their own timeout
        self.reader.limit = None
        self.asked_to_close = self.close_connection
        try:
            self._answer(self.path.partition("?")[0])
        except Refusal as refusal:
            log.info("refused", {"client": self.client_address[0], "status": refusal.status, "reason": str(refusal)})
            self.reply_json(refusal.status, refusal.body, refusal.headers)

    def has_token(self) -> bool:
        """True if the request carries the server's token, or the server requires none."""
        authorization = self.headers.get_all("Authorization", [])
        return self.server.credentials.accepts(authorization, offered_subprotocols(self.headers))

    def finish(self) -> None:
        """End the connection, unless it was handed over. If the client may still be sending, `linger` before."""
        if self.handed_over:
            return
        if self.lingering:
            linger(self.connection)
        self.wfile.close()
        self.rfile.close()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Send an error of the base class (a malformed request line or header) in JSON, like all other errors."""
        self.close_connection = self.lingering = True
        self.command = self.command or "GET"
        if code == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
            message = f"a request may have at most 100 headers, and at most {MAX_HEAD} bytes before its body"
        self.reply_json(code, {"error": message or HTTPStatus(code).phrase})

    def version_string(self) -> str:
        """Return the value of the `Server` header: the name of this server."""
        return self.server.name

    def log_message(self, format: str, *args: Any) -> None:
        """Log a message of the base class at debug level."""
        log.debug("http", {"client": self.client_address[0], "message": format % args})

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Log a response at debug level, without the query of the request, which may contain a secret."""
        log.debug(
            "request",
            {"client": self.client_address[0], "method": self.command, "path": _path(self.path), "status": code},
        )

    def reply_json(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        """Send a response with a JSON body."""
        self.reply(status, json.dumps(body).encode() + b"\n", JSON, headers)

    def reply(self, status: int, content: bytes, content_type: str, headers: dict[str, str] | None = None) -> None:
        """Send a response. The body is omitted for HEAD, and for status 304, where the client has it already."""
        headers = headers or {}
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("X-Request-Id", new_request_id())
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection and "Connection" not in headers:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD" and status != HTTPStatus.NOT_MODIFIED:
            self.wfile.write(content)

    def _answer(self, path: str) -> None:
        """Check admission and token, then call the route. Raises Refusal."""
        if self.server.stopping.is_set():
            self.close_connection = True
        if has_body(self.headers):  # a route that reads the body resets this
            self.close_connection = self.lingering = True
        if not self.server.table.is_admitted():
            self.close_connection = True
            if path not in self.paths_beyond_limit:
                raise self.admission_refusal()
        if path not in self.paths_without_token and not self.has_token():
            self.refuse_unauthorized(path)
            return
        routes = self.routes()
        if path not in routes:
            raise Refusal(404, f"no such path: use one of {', '.join(routes)}")
        methods = routes[path]
        if self.command not in methods:
            raise Refusal(405, f"{path} supports only {', '.join(methods)}", {"Allow": ", ".join(methods)})
        methods[self.command]()


def _path(target: str) -> str:
    """Return the start of a request's path. The query and the user name are omitted: they may contain secrets."""
    try:
        return urlsplit(target).path[:200]
    except ValueError:
        return ""


def peer_name(address: tuple[Any, ...]) -> str:
    """Return HOST:PORT of a client, `[HOST]:PORT` for IPv6, and `unix` for a client on a Unix socket."""
    return format_address(*address[:2]) if len(address) > 1 else str(address[0])


def new_request_id() -> str:
    """Return a new UUID (version 4) in upper case."""
    return str(uuid.uuid4()).upper()
