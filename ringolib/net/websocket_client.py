"""The client's end of a WebSocket: connecting, with TLS and a token, sending messages, reading, closing.

A `ClientConnection` belongs to its owner's thread, and nothing here is locked. Only `abort` is for other threads: the
owner's reads and writes fail then. The protocol is `protocol.Protocol`'s. A `Link` has all but the connecting.
"""

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ringolib.net import sockets
from ringolib.net.addresses import Endpoint, host_header
from ringolib.net.frames import MAX_MESSAGE, MessageGroup
from ringolib.net.http_client import open_stream
from ringolib.net.protocol import Protocol
from ringolib.net.sockets import READ_SIZE, linger, shut_down
from ringolib.net.websocket import Accepted, request_upgrade
from ringolib.printable import escape_controls
from ringolib.timing import deadline_after

if TYPE_CHECKING:
    import ssl

CONNECT_TIMEOUT = 5.0
"""Seconds for the connection and its TLS handshake together. The upgrade has HANDSHAKE_TIMEOUT after that."""
MAX_UNSENT = 64 * 1024 + 2 * MAX_MESSAGE
"""Bytes that may be queued behind the system's buffer: pongs, behind a message of ours. Beyond it the link is lost."""


class Link:
    """The client's end on a connected socket, after the handshake that the server has accepted.

    `store` is the identity of the store behind the server, or None if the server does not report it. `ending` and
    `at_fault` are the protocol's.
    """

    def __init__(self, sock: Any, accepted: Accepted) -> None:
        self.sock = sock
        self.store = accepted.store
        self._protocol = Protocol(is_server=False)
        self._unsent = b""
        self._rest = accepted.rest  # for the first `parse`

    @property
    def ending(self) -> tuple[int, str] | None:
        """See Protocol."""
        return self._protocol.ending

    @property
    def at_fault(self) -> bool:
        """See Protocol."""
        return self._protocol.at_fault

    @property
    def ending_text(self) -> str:
        """The ending in words, with the server as the subject: it closed, or the code is ours for its fault."""
        code, reason = self.ending or (1006, "")
        return f"{'broke the protocol:' if self.at_fault else 'closed with'} {code:d} {escape_controls(reason)}"

    @property
    def unsent(self) -> int:
        """The number of bytes that `flush` has to send."""
        return len(self._unsent)

    def read(self, wait: bool = True) -> bytes | None:
        """Return the bytes that have arrived, at most READ_SIZE; b"" at the end of the stream.

        With `wait` false, return None if no bytes have arrived. Raises OSError if the connection is lost, and
        TimeoutError if the socket has a timeout.
        """
        try:
            data: bytes = self.sock.recv(READ_SIZE, 0 if wait else socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        return data

    def parse(self, data: bytes) -> list[MessageGroup]:
        """Return the binary messages that `data` completes, in order. Answer the pings in it; see Protocol."""
        data, self._rest = self._rest + data, b""
        messages = self._protocol.receive(data)
        while self._protocol.has_input:
            messages += self._protocol.receive(b"")
        if self._protocol.replies:
            replies, self._protocol.replies = self._protocol.replies, b""
            try:
                self._queue(replies)
            except OSError as error:  # the messages before the ping still count
                self._protocol.end(1006, f"connection lost: {error}")
        return messages

    def send_bytes(self, payload: bytes, check: Callable[[], None]) -> None:
        """Send one whole binary message. Raises OSError if the connection is lost.

        `check` is called after each part that the socket takes, and at each timeout of the socket. To give up, it
        raises.
        """
        left = memoryview(self._unsent + self._protocol.message_frame(payload))
        while left:
            try:
                left = left[self.sock.send(left) :]
            except TimeoutError:
                pass
            if left:
                check()
        self._unsent = b""

    def begin_bytes(self, payload: bytes) -> None:
        """Queue one binary message. `flush` sends it piece by piece, so that the caller can read at the same time."""
        self._unsent += self._protocol.message_frame(payload)

    def ping(self) -> None:
        """Send a ping. Raises OSError if the connection is lost, or the server does not read."""
        self._queue(self._protocol.ping_frame())

    def flush(self) -> bool:
        """Send the unsent bytes that the socket takes. Return True if none are left.

        Raises OSError if the connection is lost.
        """
        if self._unsent:
            try:
                self._unsent = self._unsent[self.sock.send(self._unsent, socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                pass
        return not self._unsent

    def begin_close(self, code: int, reason: str) -> None:
        """Queue our Close frame. If the server has sent one, ours has the server's code."""
        self._unsent += self._protocol.close_frame(code, reason)

    def finish(self, code: int, reason: str) -> None:
        """Send our Close frame, wait at most sockets.CLOSE_TIMEOUT for the server's, close the socket. Never raises.

        If the server has sent a Close frame, ours has the server's code.
        """
        try:
            self.sock.settimeout(sockets.CLOSE_TIMEOUT)
            self.begin_close(code, reason)
            self.sock.sendall(self._unsent)
            linger(self.sock)
        except OSError:
            pass  # the connection is lost
        finally:
            self.sock.close()

    def abort(self) -> None:
        """Make the owner's reads and writes fail at once. For other threads."""
        shut_down(self.sock)

    def _queue(self, frame: bytes) -> None:
        """Queue a whole frame behind the unsent bytes, and `flush`."""
        behind = len(self._unsent)
        self._unsent += frame
        if not self.flush() and behind > MAX_UNSENT:
            raise TimeoutError("the peer does not read")


class ClientConnection(Link):
    """A connection to `path` at `endpoint`, with this subprotocol. It is connected when the constructor returns.

    The endpoint may be a Unix socket. With `context` the connection is `wss://`. `token` is sent as a bearer token.
    `on_socket` is called with the socket as soon as it is connected. The socket keeps the timeout CONNECT_TIMEOUT.
    Raises OSError if the server is unreachable, HandshakeError if it refuses.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        path: str,
        subprotocol: str,
        context: "ssl.SSLContext | None" = None,
        token: str | None = None,
        on_socket: Callable[[Any], None] = lambda sock: None,
    ) -> None:
        host = host_header(endpoint.name, endpoint.port)
        sock = open_stream(endpoint, context, deadline_after(CONNECT_TIMEOUT), on_socket)
        try:
            accepted = request_upgrade(sock, host, path, subprotocol, token)
            sock.settimeout(CONNECT_TIMEOUT)
        except BaseException:
            sock.close()
            raise
        super().__init__(sock, accepted)
