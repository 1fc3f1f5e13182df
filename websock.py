"""simple-websocket without its reader: one thread per connection, which reads, answers and writes.

`simple_websocket` does the upgrade and `wsproto` stays the judge of the protocol, but the library's
reader thread, its unbounded message list, its `send` and its compression are not used. Both ends
live here: `ServerConnection` for a request that `http.server` has read, `ClientConnection` for a
worker's link.

A connection belongs to one thread, and nothing here is locked. Two calls are for other threads:
`interrupt` makes the owner's reads end, `abort` makes its writes fail too.
"""

import socket
from collections.abc import Mapping
from time import monotonic
from typing import Any

from simple_websocket.ws import Base
from wsproto import ConnectionType
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Message,
    Ping,
    RejectConnection,
    Request,
    TextMessage,
)
from wsproto.frame_protocol import CloseReason
from wsproto.utilities import LocalProtocolError, RemoteProtocolError

from wire import MAX_MESSAGE, Messages, frame_head, take_frames

READ_SIZE = 256 * 1024
CLOSE_TIMEOUT = 2.0
"""Seconds the other side has to answer a Close frame before the socket is closed all the same."""
CONNECT_TIMEOUT = 5.0


class HandshakeError(Exception):
    """The upgrade did not take place. `status` is the HTTP status of the answer, if there was one."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


class _NoThread:
    """Takes the place of the library's reader thread, which its constructor would start."""

    name = ""

    def __init__(self, target: Any) -> None:
        pass

    def start(self) -> None:
        pass


class Connection(Base):  # type: ignore[misc]  # the library has no types
    """What both ends share, from the first byte after the handshake to the closed socket.

    `ending` is None while the connection is open for reading, then the code and reason it ends with
    (RFC 6455 section 7.4): the peer's own, or ours for what it did wrong.
    """

    def __init__(self, sock: socket.socket, role: ConnectionType) -> None:
        self.ending: tuple[int, str] | None = None
        self._masked = role is ConnectionType.SERVER  # clients mask what they send
        # What has arrived and is not parsed yet: less than _needed bytes, the start of a frame.
        self._pieces: list[bytes] = []
        self._arrived = 0
        self._needed = 1
        # What wsproto is in the middle of: bytes left of a frame, and a message in fragments.
        self._judged = 0
        self._fragments = False
        self._parts: list[bytes] = []  # of the message it has begun
        self._size = 0
        super().__init__(sock, connection_type=role, thread_class=_NoThread)

    def read(self, wait: bool = True) -> bytes | None:
        """What has arrived, at most READ_SIZE bytes; b"" at the end of the stream.

        With `wait` false, None when nothing has. Raises OSError when the connection is lost, and
        TimeoutError when the socket has a timeout.
        """
        try:
            data: bytes = self.sock.recv(READ_SIZE, 0 if wait else socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        return data

    def parse(self, data: bytes) -> list[Messages]:
        """The binary messages that `data` completes, in order; pings in it are answered before it returns.

        Frames that are a whole message each are taken out here, those of one size together; all others
        go to wsproto, frame by frame. Sets `ending` when the peer closes, sends text or too large a
        message, or breaks the protocol; what stood before that is returned, what comes after is
        ignored. Raises OSError when the answer to a ping cannot be sent.
        """
        messages: list[Messages] = []
        if self.ending:
            return messages
        self._pieces.append(data)
        self._arrived += len(data)
        if self._arrived < self._needed:
            return messages
        if len(self._pieces) > 1:
            data = b"".join(self._pieces)
        at, end, needed = 0, len(data), 1
        replies = b""
        while at < end and not self.ending:
            if self._judged:  # within a frame that wsproto has the head of
                part = data[at : at + self._judged]
                self._judged -= len(part)
                at += len(part)
                replies += self._judge(part, messages)
                continue
            head = frame_head(data, at)
            if head is None:
                needed = end - at + 1
                break
            size = head.head + head.payload
            if not head.simple or self._fragments or not self._masked:
                if data[at] & 0x0F < 8:
                    self._fragments = data[at] < 0x80
                self._judged = size
            elif size > end - at:
                needed = size
                break
            else:
                found, at = take_frames(data, at, head)
                messages.append(found)
        self._pieces, self._arrived, self._needed = [data[at:]], end - at, needed
        if replies:
            self.sock.sendall(replies)
        return messages

    def _judge(self, data: bytes, messages: list[Messages]) -> bytes:
        """Gives `data` to wsproto, adds the messages it completes, and returns what is to be sent back."""
        replies = b""
        try:
            self.ws.receive_data(data)
            for event in self.ws.events():
                if isinstance(event, BytesMessage):
                    self._size += len(event.data)
                    if self._size > MAX_MESSAGE:
                        self._end(CloseReason.MESSAGE_TOO_BIG, f"a message has at most {MAX_MESSAGE} bytes")
                        break
                    self._parts.append(bytes(event.data))
                    if event.message_finished:
                        messages.append(Messages(b"".join(self._parts), self._size))
                        self._parts, self._size = [], 0
                elif isinstance(event, Ping):
                    replies += self.ws.send(event.response())
                elif isinstance(event, TextMessage):
                    self._end(CloseReason.UNSUPPORTED_DATA, "text is not accepted: send binary messages")
                    break
                elif isinstance(event, CloseConnection):
                    self._end(event.code, event.reason or "")
                    break
        except RemoteProtocolError as error:
            hint = getattr(error, "event_hint", None)
            self._end(getattr(hint, "code", CloseReason.PROTOCOL_ERROR), str(error))
        return replies

    def send_bytes(self, payload: bytes) -> None:
        """Sends one binary message, whole. Raises OSError when the connection is lost."""
        self.sock.sendall(self.ws.send(Message(data=payload)))

    def finish(self, code: int, reason: str) -> None:
        """Closing handshake and closed socket: our Close frame, then at most CLOSE_TIMEOUT for the peer's.

        Answers the peer's Close frame, if it has sent one, with its own code. Never raises.
        """
        try:
            frame = self.ws.send(CloseConnection(code, reason or None))
            self.sock.settimeout(CLOSE_TIMEOUT)
            self.sock.sendall(frame)
        except (OSError, LocalProtocolError):
            pass  # lost already
        else:
            linger(self.sock)
        self.sock.close()

    def interrupt(self) -> None:
        """For other threads: the owner's `read` returns what has arrived, then b""."""
        _shut(self.sock, socket.SHUT_RD)

    def abort(self) -> None:
        """For other threads: the owner's reads and writes end at once."""
        _shut(self.sock, socket.SHUT_RDWR)

    def _end(self, code: int, reason: str) -> None:
        self.ending = (code, reason)
        self._parts = []


class ServerConnection(Connection):
    """The server's end. `headers` are those of a checked upgrade request, `extra_headers` go into the answer.

    Raises HandshakeError when they do not make a WebSocket handshake after all, OSError when the
    answer cannot be sent.
    """

    def __init__(
        self,
        sock: socket.socket,
        headers: Mapping[str, str],
        extra_headers: Mapping[str, str],
        subprotocols: tuple[str, ...],
    ) -> None:
        self._headers = headers
        self._extra_headers = extra_headers
        self._supported = subprotocols
        super().__init__(sock, ConnectionType.SERVER)

    def handshake(self) -> None:
        """Called by the library's constructor: answers 101, with no extension whatever was offered."""
        headers = [(name.encode(), value.encode("latin-1")) for name, value in self._headers.items()]
        extra = [(name.encode(), value.encode("latin-1")) for name, value in self._extra_headers.items()]
        try:
            self.ws.initiate_upgrade_connection(headers, "/")
            request = next(self.ws.events())
        except Exception as error:  # h11's and wsproto's: the request is the peer's to get right
            raise HandshakeError(str(error), 400) from error
        self.subprotocol = next((p for p in request.subprotocols if p in self._supported), None)
        accept = AcceptConnection(subprotocol=self.subprotocol, extensions=[], extra_headers=extra)
        self.sock.sendall(self.ws.send(accept))
        self.connected = True

    def send_bytes(self, payload: bytes) -> None:
        """Sends one binary message of at most 125 bytes, also after the peer's Close frame.

        RFC 6455 section 5.5.1 lets an endpoint finish what it has to say before it answers a Close;
        wsproto does not. Raises OSError when the connection is lost.
        """
        assert len(payload) < 126
        self.sock.sendall(bytes((0x82, len(payload))) + payload)


class ClientConnection(Connection):
    """The client's end of `ws://host:port/path`, connected. Speaks `subprotocol` or does not connect at all.

    Raises OSError when the host cannot be reached, HandshakeError when it refuses. The socket's
    timeout is left at CONNECT_TIMEOUT.
    """

    def __init__(self, host: str, port: int, path: str, subprotocol: str) -> None:
        self._host = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._path = path
        self._wanted = subprotocol
        sock = socket.create_connection((host, port), CONNECT_TIMEOUT)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            super().__init__(sock, ConnectionType.CLIENT)
        except BaseException:
            sock.close()
            raise

    def handshake(self) -> None:
        """Called by the library's constructor: asks for the upgrade and reads the answer."""
        request = Request(host=self._host, target=self._path, subprotocols=[self._wanted])
        self.sock.sendall(self.ws.send(request))
        deadline = monotonic() + CONNECT_TIMEOUT
        answer = None
        while answer is None:
            data = self.sock.recv(READ_SIZE)
            if not data:
                raise HandshakeError("closed the connection during the handshake")
            if monotonic() > deadline:
                raise HandshakeError(f"did not finish the handshake within {CONNECT_TIMEOUT:.0f} s")
            try:
                self.ws.receive_data(data)
                answer = next(self.ws.events(), None)
            except (RemoteProtocolError, LocalProtocolError) as error:
                raise HandshakeError(f"is not a WebSocket server: {error}") from error
        if isinstance(answer, RejectConnection):
            raise HandshakeError(
                f"refused with HTTP status {answer.status_code}: is it a consumer?", answer.status_code
            )
        if not isinstance(answer, AcceptConnection) or answer.subprotocol != self._wanted:
            raise HandshakeError(f"does not speak {self._wanted}")
        self.subprotocol = answer.subprotocol
        self.connected = True


def linger(sock: socket.socket) -> None:
    """Ends our side and reads what still comes, for at most CLOSE_TIMEOUT, so that the peer gets our last words.

    Closing a socket with unread bytes sends a reset, which can overtake them (RFC 9112 section 9.6).
    """
    deadline = monotonic() + CLOSE_TIMEOUT
    try:
        sock.shutdown(socket.SHUT_WR)
        while (left := deadline - monotonic()) > 0:
            sock.settimeout(left)
            if not sock.recv(READ_SIZE):
                return
    except OSError:
        pass  # gone


def _shut(sock: socket.socket, how: int) -> None:
    try:
        sock.shutdown(how)
    except OSError:
        pass  # closed already
