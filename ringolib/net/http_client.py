"""HTTP/1.1 as a client: requests on a connected socket, and their answers, which h11 parses.

All HTTP answers that the program reads pass through here: the answer to an upgrade (`websocket`), a consumer's
readiness (`status.probe`), and ClickHouse's (`storage.clickhouse`). Interim answers (1xx, RFC 9110 section 15.2) are
skipped. Each call has one deadline for all that it waits for: an answer that comes byte by byte does not prolong it.

An `HTTPConnection` belongs to one thread. Its socket belongs to the caller.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import h11

from ringolib.net.addresses import Endpoint, certified_name
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


class HTTPConnection:
    """Requests on `sock`, one after the other: `send`, then `read_head`, then `read_body`.

    The methods raise HTTPError, TimeoutError after the deadline, and OSError if the connection is lost. After an error
    the connection cannot be used any more, except after a TimeoutError of `read_piece`.
    """

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self._h11 = h11.Connection(h11.CLIENT, MAX_HEAD_BYTES)
        self._send_error: ConnectionError | None = None  # the request was not sent to its end

    def is_reusable(self) -> bool:
        """Return whether the last exchange is complete, and nothing has arrived since.

        Whatever arrives before the next request cannot be its answer. It may be the end of an idle connection.
        """
        done = self._h11.our_state is h11.DONE and self._h11.their_state is h11.DONE
        if not done or self._send_error or self._h11.trailing_data != (b"", False):
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
        """The bytes that have arrived and are not parsed. Behind the head of a 101 they belong to the new protocol."""
        return bytes(self._h11.trailing_data[0])

    def send(
        self, method: str, target: str, headers: Mapping[str, str], deadline: float, body: bytes | memoryview = b""
    ) -> None:
        """Send a request. A body needs a Content-Length among the `headers`.

        If the peer closes the connection before it has read all, `read_head` has the reason: the peer's answer, if it
        sent one before. Raises ValueError if a header or the target has characters that HTTP does not allow.
        """
        if self._h11.our_state is h11.DONE:
            self._h11.start_next_cycle()
        try:
            head = self._h11.send(h11.Request(method=method, target=target, headers=list(headers.items())))
        except (h11.LocalProtocolError, UnicodeError):  # their texts show the value, which may be a token
            raise ValueError("a header or the path of the request has a character that HTTP does not allow") from None
        pieces: list[bytes] = [head]
        if body:
            pieces += self._h11.send_with_data_passthrough(h11.Data(data=body)) or []  # type: ignore[arg-type]
        self._h11.send(h11.EndOfMessage())
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
            head = self._read_final_head(deadline)
        except (OSError, HTTPError):
            if self._send_error:
                raise self._send_error from None
            raise
        if self._send_error and head.status < 300:
            raise self._send_error
        return head

    def _read_final_head(self, deadline: float) -> Head:
        while True:
            event = self._next_event(deadline)
            is_interim = isinstance(event, h11.InformationalResponse)
            if isinstance(event, h11.Response) or (is_interim and event.status_code == SWITCHING_PROTOCOLS):
                return Head(event.status_code, event.headers)

    def read_body(self, deadline: float) -> bytes:
        """Return the whole body, of at most MAX_BODY_BYTES."""
        body = bytearray()
        while isinstance(event := self._next_event(deadline), h11.Data):
            body += event.data
            if len(body) > MAX_BODY_BYTES:
                raise HTTPError(f"the answer has more than {MAX_BODY_BYTES} bytes")
        return bytes(body)

    def read_piece(self, deadline: float) -> bytes:
        """Return a piece of the body, or b"" at its end. After a TimeoutError, it may be called again."""
        event = self._next_event(deadline)
        return bytes(event.data) if isinstance(event, h11.Data) else b""

    def _next_event(self, deadline: float) -> Any:
        """Return h11's next event, and read from the socket as long as h11 needs data for it."""
        while True:
            try:
                event = self._h11.next_event()
            except h11.RemoteProtocolError as error:
                raise HTTPError(_explain(error)) from error
            if event is not h11.NEED_DATA:
                return event
            self._sock.settimeout(time_left(deadline))
            data = self._sock.recv(READ_SIZE)
            if not data and self._h11.their_state is h11.SEND_RESPONSE:
                if start := self.rest[:MAX_SHOWN_BYTES]:
                    raise HTTPError(f"the answer ends within its head: {start!r}")
                raise ConnectionResetError("closed the connection before it answered")
            self._h11.receive_data(data)


def _explain(error: h11.RemoteProtocolError) -> str:
    if error.error_status_hint == 431:
        return f"the head of the answer has more than {MAX_HEAD_BYTES} bytes"
    return f"the answer is not valid HTTP: {error}"
