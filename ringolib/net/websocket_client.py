"""The client's end of a WebSocket: connecting, with TLS and a token, and sending messages.

`ClientConnection` belongs to its owner's thread, as `websocket.Connection` says.
"""

import ssl
from collections.abc import Callable
from typing import Any

from wsproto import ConnectionType
from wsproto.events import AcceptConnection, Message, RejectConnection, Request

from ringolib.net.addresses import Endpoint, certified_name, host_header
from ringolib.net.frames import MAX_MESSAGE
from ringolib.net.sockets import READ_SIZE, connect
from ringolib.net.tls_socket import TLSSocket
from ringolib.net.websocket import MAX_UNSENT, STORE_HEADER, Connection, HandshakeError
from ringolib.timing import deadline_after, remaining

CONNECT_TIMEOUT = 5.0
"""Seconds for each step: the connection, the TLS handshake, the upgrade."""
MAX_STORE_BYTES = 200
"""A longer identity of a store is ignored."""
_STATUS_REASONS = {
    400: ": it may require TLS (wss://, --consumer_tls)",
    401: ": the token is missing or wrong (--token_file, or RINGOEXP_TOKEN)",
}


class ClientConnection(Connection):
    """A connection to `path` at `endpoint`, with this subprotocol. It is connected when the constructor returns.

    The endpoint may be a Unix socket. With `context` the connection is `wss://`. `token` is sent as a bearer token.
    `on_socket` is called with the socket as soon as it is connected. The socket keeps the timeout CONNECT_TIMEOUT.
    Raises OSError if the server is unreachable, HandshakeError if it refuses.

    `store` is the value of the response header STORE_HEADER, or None.
    """

    max_unsent = MAX_UNSENT + 2 * MAX_MESSAGE  # pongs may be queued behind a message of ours

    def __init__(
        self,
        endpoint: Endpoint,
        path: str,
        subprotocol: str,
        context: ssl.SSLContext | None = None,
        token: str | None = None,
        on_socket: Callable[[Any], None] = lambda sock: None,
    ) -> None:
        self.store: str | None = None
        self._host = host_header(endpoint.name, endpoint.port)
        self._path = path
        self._wanted = subprotocol
        self._token = token
        sock: Any = connect(endpoint.host, endpoint.port, CONNECT_TIMEOUT)
        try:
            on_socket(sock)
            if context:
                sock = TLSSocket(sock, context, certified_name(endpoint.name))
                sock.handshake(CONNECT_TIMEOUT)
            super().__init__(sock, ConnectionType.CLIENT)
        except BaseException:
            sock.close()
            raise

    def send_bytes(self, payload: bytes) -> None:
        """Send one whole binary message. Raises OSError if the connection is lost, or at the socket's timeout."""
        self.sock.sendall(self._unsent + self.ws.send(Message(data=payload)))
        self._unsent = b""

    def begin_bytes(self, payload: bytes) -> None:
        """Queue one binary message. `flush` sends it piece by piece, so that the caller can read at the same time."""
        self._unsent += self.ws.send(Message(data=payload))

    def handshake(self) -> None:
        """Request the upgrade and read the response. The library's constructor calls this."""
        headers = [(b"Authorization", f"Bearer {self._token}".encode())] if self._token else []
        request = Request(host=self._host, target=self._path, subprotocols=[self._wanted], extra_headers=headers)
        self.sock.sendall(self.ws.send(request))
        head, rest = self._read_response()
        try:
            self.ws.receive_data(head)
            response = next(self.ws.events(), None)
        except Exception as error:  # errors of h11 and wsproto, and errors inside them
            raise HandshakeError(f"is not a WebSocket server: {error}") from error
        self._tail += rest  # for the first `parse`
        if isinstance(response, RejectConnection):
            status = response.status_code
            raise HandshakeError(f"refused with HTTP status {status}{explain_status(status)}", status)
        if not isinstance(response, AcceptConnection) or response.subprotocol != self._wanted:
            raise HandshakeError(f"does not speak {self._wanted}")
        self.subprotocol = response.subprotocol
        for header, value in response.extra_headers:
            if header.lower() == STORE_HEADER.lower().encode() and len(value) <= MAX_STORE_BYTES:
                self.store = value.decode("latin-1")
        self.connected = True

    def _read_response(self) -> tuple[bytes, bytes]:
        """Return the head of the response, and the bytes behind it: frames may follow in the same segment."""
        deadline = deadline_after(CONNECT_TIMEOUT)
        head, end, rest = b"", b"", b""
        while not end:
            data = self.sock.recv(READ_SIZE)
            if not data:
                raise HandshakeError("closed the connection during the handshake")
            if not remaining(deadline) or len(head) > READ_SIZE:
                raise HandshakeError(f"did not finish the handshake within {CONNECT_TIMEOUT:.0f} s")
            head, end, rest = (head + data).partition(b"\r\n\r\n")
        return head + end, rest


def explain_status(status: int) -> str:
    """Return the likely reason for the HTTP status of a refused upgrade, to append to an error text; or ""."""
    wrong_url = ": is that the /v1.0/ingest of a ringoexp?" if status < 400 or status == 404 else ""
    return _STATUS_REASONS.get(status, wrong_url)
