"""HTTP/1.1 as a client: requests on a connected socket, and their answers, which h11 parses.

All HTTP answers that the program reads pass through here: the answer to an upgrade (`websocket`), a consumer's
readiness (`status.probe`), and ClickHouse's (`storage.clickhouse`). Interim answers (1xx, RFC 9110 section 15.2) are
skipped. Each call has one deadline for all that it waits for: an answer that comes byte by byte does not prolong it.

`HTTPExchange` has the parsing without I/O, for the asyncio producer. An `HTTPConnection` adds a socket, which belongs
to the caller. An `HTTPConnection` belongs to one thread.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple

import h11

from ringolib.net.addresses import Endpoint, certified_name, host_header
from ringolib.net.sockets import READ_SIZE, connect, time_left
from ringolib.net.tls_socket import TLSSocket

if TYPE_CHECKING:
    import ssl

MAX_HEAD_BYTES = 1024 * 1024
"""The status line and the headers of an answer together. Their number is not limited: ClickHouse may send thousands."""
MAX_BODY_BYTES = 1024 * 1024
MAX_SHOWN_BYTES = 60
"""Bytes of a malformed answer that an error text shows."""
SWITCHING_PROTOCOLS = 101


class HTTPError(Exception):
    """An exchange failed although the connection did not: the answer is not HTTP, is cut short or is too large."""


class Head(NamedTuple):
    """The status and the headers of an answer."""

    status: int
    headers: Sequence[tuple[bytes, bytes]]  # names in lower case

    def values(self, name: str) -> list[str]:
        """Return the values of the header `name`, in order. It may be absent, or occur several times."""
        wanted = name.lower().encode()
        return [value.decode("latin-1") for header, value in self.headers if header == wanted]


def open_stream(
    endpoint: Endpoint,
    context: "ssl.SSLContext | None",
    deadline: float,
    on_socket: Callable[[Any], None] = lambda sock: None,
) -> Any:
    """Return a socket that is connected to the endpoint, with TLS if there is a context.

    `on_socket` is called with the socket before the TLS handshake. Raises OSError, and TimeoutError after `deadline`.
    """
    sock: Any = connect(endpoint.host, endpoint.port, deadline)
    try:
        on_socket(sock)
        if context:
            sock = TLSSocket(sock, context, certified_name(endpoint.name))
            sock.handshake(time_left(deadline))
    except BaseException:
        sock.close()
        raise
    return sock


def request_headers(endpoint: Endpoint, token: str | None, accept: str | None = None) -> dict[str, str]:
    """Return the headers of a request over a connection of its own. `token` is sent as a bearer token.

    Raises ValueError if no host can have the endpoint's name.
    """
    headers = {
        "Host": host_header(endpoint.name, endpoint.port),
        "Accept-Encoding": "identity",
        "Connection": "close",
    }
    if accept:
        headers["Accept"] = accept
    if token:
        headers["Authorization"] = f"Bearer {token}"
    return headers


def get(
    endpoint: Endpoint,
    context: "ssl.SSLContext | None",
    token: str | None,
    target: str,
    deadline: float,
    accept: str | None = None,
) -> tuple[Head, bytes]:
    """Send a GET over a connection of its own. Return the head and the body of the answer.

    Raises OSError, TimeoutError after the deadline, HTTPError, and ValueError as `request_headers`.
    """
    headers = request_headers(endpoint, token, accept)
    with closing(open_stream(endpoint, context, deadline)) as sock:
        connection = HTTPConnection(sock)
        connection.send("GET", target, headers, deadline)
        return connection.read_head(deadline), connection.read_body(deadline)


def json_error(body: bytes) -> Any:
    """Return the `error` of a ringoexp's answer in JSON, or None if the body has none."""
    try:
        return json.loads(body)["error"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


class HTTPExchange:
    """Requests and their answers without I/O: bytes to send out, received bytes in.

    `head`, `body` and `piece` return None if they need more bytes: pass some to `receive`, and call again.
    """

    def __init__(self) -> None:
        self._h11 = h11.Connection(h11.CLIENT, MAX_HEAD_BYTES)
        self._body = bytearray()

    @property
    def is_done(self) -> bool:
        """True if the last exchange is complete, no other byte has arrived, and the next request may follow."""
        done = self._h11.our_state is h11.DONE and self._h11.their_state is h11.DONE
        return done and self._h11.trailing_data == (b"", False)

    @property
    def rest(self) -> bytes:
        """The bytes that have arrived and are not parsed. Behind the head of a 101 they belong to the new protocol."""
        return bytes(self._h11.trailing_data[0])

    def request(
        self, method: str, target: str, headers: Mapping[str, str], body: bytes | memoryview = b""
    ) -> list[bytes]:
        """Return the pieces of a request. A body needs a Content-Length among the `headers`.

        Raises ValueError if a header or the target has characters that HTTP does not allow.
        """
        if self._h11.our_state is h11.DONE:
            self._h11.start_next_cycle()
        self._body = bytearray()
        try:
            head = self._h11.send(h11.Request(method=method, target=target, headers=list(headers.items())))
        except (h11.LocalProtocolError, UnicodeError):  # their texts show the value, which may be a token
            raise ValueError("a header or the path of the request has a character that HTTP does not allow") from None
        pieces: list[bytes] = [head]
        if body:
            pieces += self._h11.send_with_data_passthrough(h11.Data(data=body)) or []  # type: ignore[arg-type]
        self._h11.send(h11.EndOfMessage())
        return pieces

    def receive(self, data: bytes) -> None:
        """Add received bytes; b"" is the end of the stream.

        Raises HTTPError if the stream ends within the head, ConnectionResetError if it ends before it.
        """
        if not data and self._h11.their_state is h11.SEND_RESPONSE:
            if start := self.rest[:MAX_SHOWN_BYTES]:
                raise HTTPError(f"the answer ends within its head: {start!r}")
            raise ConnectionResetError("closed the connection before it answered")
        self._h11.receive_data(data)

    def head(self) -> Head | None:
        """Return the head of the final answer. A 101 is final if the request asked for an upgrade."""
        while (event := self._next_event()) is not h11.NEED_DATA:
            is_interim = isinstance(event, h11.InformationalResponse)
            if isinstance(event, h11.Response) or (is_interim and event.status_code == SWITCHING_PROTOCOLS):
                return Head(event.status_code, event.headers)
        return None

    def body(self, limit: int = MAX_BODY_BYTES) -> bytes | None:
        """Return the whole body, of at most `limit` bytes."""
        while piece := self.piece():
            self._body += piece
            if len(self._body) > limit:
                raise HTTPError(f"the answer has more than {limit} bytes")
        return None if piece is None else bytes(self._body)

    def piece(self) -> bytes | None:
        """Return the next piece of the body, or b"" at its end."""
        event = self._next_event()
        if event is h11.NEED_DATA:
            return None
        return bytes(event.data) if isinstance(event, h11.Data) else b""

    def _next_event(self) -> Any:
        """Return h11's next event. Raises HTTPError for an answer that is not valid HTTP."""
        try:
            return self._h11.next_event()
        except h11.RemoteProtocolError as error:
            raise HTTPError(_explain(error)) from error


class HTTPConnection:
    """Requests on `sock`, one after the other: `send`, then `read_head`, then `read_body`.

    The methods raise HTTPError, TimeoutError after the deadline, and OSError if the connection is lost. After an error
    the connection cannot be used any more, except that a read may be called again after its TimeoutError.
    """

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self._exchange = HTTPExchange()
        self._send_error: ConnectionError | None = None  # the request was not sent to its end

    def is_reusable(self) -> bool:
        """Return whether the last exchange is complete, and nothing has arrived since.

        Whatever arrives before the next request cannot be its answer. It may be the end of an idle connection.
        """
        if self._send_error or not self._exchange.is_done:
            return False
        self._sock.settimeout(0)
        try:
            self._sock.recv(1)
        except BlockingIOError:
            return True
        except OSError:
            pass  # the connection is lost
        return False

    @property
    def rest(self) -> bytes:
        """See HTTPExchange."""
        return self._exchange.rest

    def send(
        self, method: str, target: str, headers: Mapping[str, str], deadline: float, body: bytes | memoryview = b""
    ) -> None:
        """Send a request. A body needs a Content-Length among the `headers`.

        If the peer closes the connection before it has read all, `read_head` has the reason: the peer's answer, if it
        sent one before. Raises ValueError if a header or the target has characters that HTTP does not allow.
        """
        pieces = self._exchange.request(method, target, headers, body)
        try:
            for piece in pieces:
                self._sock.settimeout(time_left(deadline))
                self._sock.sendall(piece)
        except ConnectionError as error:
            self._send_error = error

    def read_head(self, deadline: float) -> Head:
        """Return the head of the final answer. A 101 is final if the request asked for an upgrade.

        If the request was not sent to its end, only a refusal is an answer to it.
        """
        try:
            while (head := self._exchange.head()) is None:
                self._receive(deadline)
        except (OSError, HTTPError):
            if self._send_error:
                raise self._send_error from None
            raise
        if self._send_error and head.status < 300:
            raise self._send_error
        return head

    def read_body(self, deadline: float, limit: int = MAX_BODY_BYTES) -> bytes:
        """Return the whole body, of at most `limit` bytes."""
        while (body := self._exchange.body(limit)) is None:
            self._receive(deadline)
        return body

    def read_piece(self, deadline: float) -> bytes:
        """Return a piece of the body, or b"" at its end."""
        while (piece := self._exchange.piece()) is None:
            self._receive(deadline)
        return piece

    def _receive(self, deadline: float) -> None:
        self._sock.settimeout(time_left(deadline))
        self._exchange.receive(self._sock.recv(READ_SIZE))


def _explain(error: h11.RemoteProtocolError) -> str:
    if error.error_status_hint == 431:
        return f"the head of the answer has more than {MAX_HEAD_BYTES} bytes"
    return f"the answer is not valid HTTP: {error}"
