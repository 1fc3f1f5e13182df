"""The two WebSocket handshakes (RFC 6455, section 4), performed by `simple_websocket` on a connected socket.

Only the library's handshake is used, not its reader thread, its unbounded message list, its `send` or its compression.
After the handshake, `protocol.Protocol` handles the frames.

Functions for one thread; the timeouts of the socket apply.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from simple_websocket.ws import Base
from wsproto import ConnectionType
from wsproto.events import AcceptConnection, RejectConnection, Request

from ringolib.net.sockets import READ_SIZE
from ringolib.timing import deadline_after, remaining

STORE_HEADER = "X-Ringoexp-Store"
"""Response header of an upgrade: the identity of the store behind the server."""
HANDSHAKE_TIMEOUT = 5.0
"""Seconds that a server has to answer a client's upgrade request."""
MAX_STORE_BYTES = 200
"""A longer identity of a store is ignored."""
_STATUS_REASONS = {
    400: ": it may require TLS (wss://, --consumer_tls)",
    421: ": it does not answer to this name (--allow_host there)",
    401: ": the token is missing or wrong (--token_file, or RINGOEXP_TOKEN)",
}


class HandshakeError(Exception):
    """The upgrade failed. `status` is the HTTP status of the response, if there was a response."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


class Accepted(NamedTuple):
    """A server's answer to an upgrade: the bytes behind it, and the identity of the server's store, or None."""

    rest: bytes
    store: str | None


def accept_upgrade(
    sock: Any, headers: Mapping[str, str], extra_headers: Mapping[str, str], subprotocols: tuple[str, ...]
) -> str | None:
    """Answer 101 to a checked upgrade request with `headers`, without extensions; return the subprotocol.

    `extra_headers` go into the response. `subprotocols` are the supported ones. Raises HandshakeError if the headers
    are not a WebSocket handshake, OSError if the response cannot be sent.
    """
    subprotocol: str | None = _ServerHandshake(sock, headers, extra_headers, subprotocols).subprotocol
    return subprotocol


def request_upgrade(sock: Any, host: str, path: str, subprotocol: str, token: str | None = None) -> Accepted:
    """Request the upgrade of `path` to this subprotocol, and read the response. `token` is sent as a bearer token.

    Raises HandshakeError if the server refuses, OSError if the connection is lost.
    """
    handshake = _ClientHandshake(sock, host, path, subprotocol, token)
    return Accepted(handshake.rest, handshake.store)


def explain_status(status: int) -> str:
    """Return the likely reason for the HTTP status of a refused upgrade, to append to an error text; or ""."""
    wrong_url = ": is that the /v1.0/ingest of a ringoexp?" if status < 400 or status == 404 else ""
    return _STATUS_REASONS.get(status, wrong_url)


class _NoThread:
    """Replaces the library's reader thread, which its constructor would start."""

    name = ""

    def __init__(self, target: Any) -> None:
        pass

    def start(self) -> None:
        pass


class _ServerHandshake(Base):  # type: ignore[misc]  # the library has no types
    """The server's end. The library's constructor calls `handshake`."""

    def __init__(
        self, sock: Any, headers: Mapping[str, str], extra_headers: Mapping[str, str], subprotocols: tuple[str, ...]
    ) -> None:
        self._headers = headers
        self._extra_headers = extra_headers
        self._supported = subprotocols
        super().__init__(sock, connection_type=ConnectionType.SERVER, thread_class=_NoThread)

    def handshake(self) -> None:
        headers = [(name.encode(), value.encode("latin-1")) for name, value in self._headers.items()]
        extra = [(name.encode(), value.encode("latin-1")) for name, value in self._extra_headers.items()]
        try:
            self.ws.initiate_upgrade_connection(headers, "/")
            request = next(self.ws.events())
        except Exception as error:  # h11's and wsproto's errors: the client's request is wrong
            raise HandshakeError(str(error), 400) from error
        self.subprotocol = next((name for name in request.subprotocols if name in self._supported), None)
        accept = AcceptConnection(subprotocol=self.subprotocol, extensions=[], extra_headers=extra)
        self.sock.sendall(self.ws.send(accept))
        self.connected = True


class _ClientHandshake(Base):  # type: ignore[misc]  # the library has no types
    """The client's end. The library's constructor calls `handshake`."""

    def __init__(self, sock: Any, host: str, path: str, subprotocol: str, token: str | None) -> None:
        self._host = host
        self._path = path
        self._wanted = subprotocol
        self._token = token
        self.rest = b""
        self.store: str | None = None
        super().__init__(sock, connection_type=ConnectionType.CLIENT, thread_class=_NoThread)

    def handshake(self) -> None:
        headers = [(b"Authorization", f"Bearer {self._token}".encode())] if self._token else []
        request = Request(host=self._host, target=self._path, subprotocols=[self._wanted], extra_headers=headers)
        self.sock.sendall(self.ws.send(request))
        head, self.rest = self._read_response()
        try:
            self.ws.receive_data(head)
            response = next(self.ws.events(), None)
        except Exception as error:  # errors of h11 and wsproto, and errors inside them
            raise HandshakeError(f"is not a WebSocket server: {error}") from error
        if isinstance(response, RejectConnection):
            status = response.status_code
            raise HandshakeError(f"refused with HTTP status {status}{explain_status(status)}", status)
        if not isinstance(response, AcceptConnection) or response.subprotocol != self._wanted:
            raise HandshakeError(f"does not speak {self._wanted}")
        for header, value in response.extra_headers:
            if header.lower() == STORE_HEADER.lower().encode() and len(value) <= MAX_STORE_BYTES:
                self.store = value.decode("latin-1")
        self.connected = True

    def _read_response(self) -> tuple[bytes, bytes]:
        """Return the head of the response, and the bytes behind it: frames may follow in the same segment."""
        deadline = deadline_after(HANDSHAKE_TIMEOUT)
        head, end, rest = b"", b"", b""
        while not end:
            data = self.sock.recv(READ_SIZE)
            if not data:
                raise HandshakeError("closed the connection during the handshake")
            if not remaining(deadline) or len(head) > READ_SIZE:
                raise HandshakeError(f"did not finish the handshake within {HANDSHAKE_TIMEOUT:.0f} s")
            head, end, rest = (head + data).partition(b"\r\n\r\n")
        return head + end, rest
