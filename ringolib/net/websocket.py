"""simple-websocket without its reader: one thread per connection, which reads, answers and writes.

`simple_websocket` does the upgrade and `wsproto` stays the judge of the protocol, but the library's
reader thread, its unbounded message list, its `send` and its compression are not used. Both ends
live here: `ServerConnection` for a request that `http.server` has read, `ClientConnection` for a
worker's link.

A connection belongs to one thread, and nothing here is locked. `abort` is for other threads: it makes
the owner's reads and writes fail. A server's connection never waits for its client to read: acks and
pongs wait in a short buffer, so that a client that reads late, or not at all, keeps nobody from stopping.

A client that stalls is given up: one that is silent and answers no ping, that leaves a message unfinished, or that
reads nothing until its acks no longer leave.
"""

import select
import socket
import ssl
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any

from simple_websocket.ws import Base
from wsproto import ConnectionType
from wsproto.connection import ConnectionState
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
from wsproto.utilities import LocalProtocolError

from ringolib.net import sockets
from ringolib.net.addresses import certified_name, host_header
from ringolib.net.frames import MAX_MESSAGE, Messages, frame_head, take_frames
from ringolib.net.sockets import connect
from ringolib.net.tls_socket import TLSSocket

READ_SIZE = 256 * 1024
CONNECT_TIMEOUT = 5.0
PING_AFTER = 20.0
"""Seconds of silence after which a server asks a client, with a ping, whether it is there."""
PING_TIMEOUT = 20.0
"""Seconds the client has to send anything after that, its pong for one."""
MESSAGE_TIMEOUT = 150.0
"""Seconds a client has to finish a message, pings or not: 8 MiB at the rate that is asked of an HTTP body."""
STALL_TIMEOUT = 60.0
"""Seconds a peer may leave what is unsent to it where it is, when the system's buffers are full."""
MAX_STORE = 200
"""Bytes of what a store is called."""
MAX_UNSENT = 64 * 1024
"""Bytes of pongs that a peer may leave unread, beyond what the system buffers, before it is given up."""
_HINTS = {
    400: ": does it want TLS (wss://, --consumer_tls)?",
    401: ": it wants a token, or another one than it got (--token_file, or RINGOEXP_TOKEN)",
}
STORE_HEADER = "X-Ringoexp-Store"
"""In the answer to an upgrade: which store it is that takes the records."""
_GONE = select.POLLHUP | select.POLLERR
_HALF_CLOSED = getattr(select, "POLLRDHUP", 0)  # Linux


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
    (RFC 6455 section 7.4): the peer's own, or ours for what it did wrong, and then `at_fault` is true.
    """

    max_unsent = MAX_UNSENT

    def __init__(self, sock: socket.socket, role: ConnectionType) -> None:
        self.ending: tuple[int, str] | None = None
        self.at_fault = False
        self._unsent = b""
        self._begun: float | None = None  # monotonic seconds: the owner waits for the rest of a message
        self._masked = role is ConnectionType.SERVER  # clients mask what they send
        # What has arrived and is not parsed yet: less than _needed bytes, the start of a frame.
        self._tail = bytearray()
        self._needed = 1
        # What wsproto is in the middle of: bytes left of a frame, and a message in fragments.
        self._judged = 0
        self._fragments = False
        self._message = bytearray()  # what there is of the message it has begun
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

    def is_gone(self) -> bool:
        """True when the peer has closed its side, even if it left something to read.

        After its Close frame it may do so and still wait for our last words: then only once it is gone altogether.
        """
        poll = select.poll()
        poll.register(self.sock, _GONE if self.ending else _GONE | _HALF_CLOSED)
        return bool(poll.poll(0))

    def parse(self, data: bytes | bytearray) -> list[Messages]:
        """The binary messages that `data` completes, in order; pings in it are answered before it returns.

        Frames that are a whole message each are taken out here, those of one size together; all others
        go to wsproto, frame by frame. Sets `ending` when the peer closes, sends text or too large a
        message, or breaks the protocol; what stood before that is returned, what comes after is
        ignored.
        """
        messages: list[Messages] = []
        if self.ending:
            return messages
        if self._tail:
            self._tail += data
            if len(self._tail) < self._needed:
                return messages
            data, self._tail = self._tail, bytearray()
        at, end, needed = 0, len(data), 1
        while at < end and not self.ending:
            if self._judged:  # within a frame that wsproto has the head of
                part = data[at : at + self._judged]
                self._judged -= len(part)
                at += len(part)
                self._judge(part, messages)
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
        self._tail += data[at:]
        self._needed = needed
        if messages:
            self._begun = None
        return messages

    def _judge(self, data: bytes | bytearray, messages: list[Messages]) -> None:
        """Gives `data` to wsproto, adds the messages it completes, and answers pings."""
        self.ws.receive_data(data)
        for event in self.ws.events():
            if isinstance(event, BytesMessage):
                self._message += event.data
                if len(self._message) > MAX_MESSAGE:
                    self._end(CloseReason.MESSAGE_TOO_BIG, f"a message has at most {MAX_MESSAGE} bytes", True)
                    break
                if event.message_finished:
                    messages.append(Messages(self._message, len(self._message)))
                    self._message = bytearray()
            elif isinstance(event, Ping):
                try:
                    self.queue(self.ws.send(event.response()))
                except OSError as error:  # what came before the ping counts all the same
                    self._end(CloseReason.ABNORMAL_CLOSURE, f"connection lost: {error}")
                    break
            elif isinstance(event, TextMessage):
                self._end(CloseReason.UNSUPPORTED_DATA, "text is not accepted: send binary messages", True)
                break
            elif isinstance(event, CloseConnection):
                # wsproto reports what broke the protocol as a Close of the peer's that never came.
                self._end(event.code, event.reason or "", self.ws.state is ConnectionState.OPEN)
                break

    def queue(self, frame: bytes) -> None:
        """Sends a whole frame behind what is unsent, as far as the socket takes it without waiting.

        Raises OSError when the connection is lost, or the peer has left more than `max_unsent` bytes unread.
        """
        behind = len(self._unsent)
        self._unsent += frame
        if not self.flush() and behind > self.max_unsent:
            raise TimeoutError("the peer does not read")

    def flush(self) -> bool:
        """Sends what is unsent, as far as the socket takes it. True when nothing is left.

        It does not wait for that, but on a socket that has a timeout, which is a client's. Raises OSError when
        the connection is lost.
        """
        if self._unsent:
            try:
                self._unsent = self._unsent[self.sock.send(self._unsent, socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                pass
        return not self._unsent

    @property
    def unsent(self) -> int:
        """Bytes that `flush` has to send."""
        return len(self._unsent)

    def ping(self) -> None:
        """Asks the peer whether it is there. Raises OSError as `queue` does."""
        self.queue(self.ws.send(Ping()))

    def finish(self, code: int, reason: str, last: bytes = b"") -> None:
        """Closing handshake and closed socket: our Close frame, then at most sockets.CLOSE_TIMEOUT for the peer's.

        Sends `last`, at most 125 bytes, as a last message before it. Answers the peer's Close frame,
        if it has sent one, with its own code. Never raises.
        """
        try:
            frame = self.ws.send(CloseConnection(code, reason or None))
            self.sock.settimeout(sockets.CLOSE_TIMEOUT)
            self.sock.sendall(self._unsent + (_short_frame(last) if last else b"") + frame)
        except (OSError, LocalProtocolError):
            pass  # lost already
        else:
            sockets.linger(self.sock)
        self.sock.close()

    def abort(self) -> None:
        """For other threads: the owner's reads and writes end at once."""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # closed already

    def _end(self, code: int, reason: str, at_fault: bool = False) -> None:
        self.ending = (code, reason)
        self.at_fault = at_fault
        self._message = bytearray()


class ServerConnection(Connection):
    """The server's end. `headers` are those of a checked upgrade request, `extra_headers` go into the answer, and
    `stop` becomes readable when the server stops.

    Raises HandshakeError when they do not make a WebSocket handshake after all, OSError when the
    answer cannot be sent.
    """

    def __init__(
        self,
        sock: socket.socket,
        headers: Mapping[str, str],
        extra_headers: Mapping[str, str],
        subprotocols: tuple[str, ...],
        stop: socket.socket,
    ) -> None:
        self._headers = headers
        self._extra_headers = extra_headers
        self._supported = subprotocols
        self._stop = stop
        self._heard = monotonic()  # when the client last sent something
        self._pinged: float | None = None  # when it was asked for something since
        self._stuck_since: float | None = None  # when nothing of _unsent could be sent, and nothing was since
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

    def read(self, wait: bool = True) -> bytes | None:
        """As the base class says; remembers when it was."""
        data = super().read(wait)
        if data:
            self._heard, self._pinged = monotonic(), None
        return data

    def flush(self) -> bool:
        """As the base class says; raises TimeoutError when nothing could be sent for STALL_TIMEOUT."""
        unsent = len(self._unsent)
        if super().flush() or len(self._unsent) < unsent:
            self._stuck_since = None
        else:
            now = monotonic()
            self._stuck_since = self._stuck_since or now
            if now >= self._stuck_since + STALL_TIMEOUT:
                raise TimeoutError(f"the peer has read nothing for {STALL_TIMEOUT:.0f} s")
        return not self._unsent

    def wait(self) -> None:
        """Returns when there is something to read, or the server stops, or some of what was unsent is sent; or when
        it is time to call this again, if nothing is. Call it only when there is nothing to read.

        Pings a silent client. Raises OSError when the connection is lost, TimeoutError when the client has stalled.
        """
        now = monotonic()
        if not (self._tail or self._judged or self._fragments):
            self._begun = None
        elif self._begun is None:
            self._begun = now
        if self._begun is not None and now >= self._begun + MESSAGE_TIMEOUT:
            raise TimeoutError(f"a message was not finished within {MESSAGE_TIMEOUT:.0f} s")
        if self._pinged is None and now >= self._heard + PING_AFTER:
            self.ping()
            self._pinged = now
        elif self._pinged is not None and now >= self._pinged + PING_TIMEOUT:
            raise TimeoutError(f"no answer to a ping within {PING_TIMEOUT:.0f} s")
        until = self._heard + PING_AFTER if self._pinged is None else self._pinged + PING_TIMEOUT
        if self._begun is not None:
            until = min(until, self._begun + MESSAGE_TIMEOUT)
        poll = select.poll()
        poll.register(self.sock, select.POLLIN | (select.POLLOUT if self._unsent else 0))
        poll.register(self._stop, select.POLLIN)
        poll.poll(max(0.0, until - monotonic()) * 1000 + 1)
        self.flush()

    def send_ack(self, payload: bytes) -> bool:
        """Sends a binary message of at most 125 bytes, also after the peer's Close frame; False when the peer
        has not read what came before it, and this would have to wait.

        RFC 6455 section 5.5.1 lets an endpoint finish what it has to say before it answers a Close;
        wsproto does not. Raises OSError when the connection is lost.
        """
        if not self.flush():
            return False
        self.queue(_short_frame(payload))
        return True


class ClientConnection(Connection):
    """The client's end of `ws://host:port/path`, connected. Speaks `subprotocol` or does not connect at all.

    `host` may be `unix:PATH`. With `context` it is `wss://`. Shows `token`, if there is one. `name` is that of the
    host, where `host` is only one of its addresses. `opened` gets the socket as soon as there is one. Raises OSError
    when the host cannot be reached, HandshakeError when it refuses. The socket's timeout is left at CONNECT_TIMEOUT.

    `store` is which store the server says that it stores in, if it does.
    """

    max_unsent = MAX_UNSENT + 2 * MAX_MESSAGE  # pongs may wait behind a message of ours

    def __init__(
        self,
        host: str,
        port: int,
        path: str,
        subprotocol: str,
        context: ssl.SSLContext | None = None,
        token: str | None = None,
        name: str | None = None,
        opened: Callable[[Any], None] = lambda sock: None,
    ) -> None:
        self.store: str | None = None
        self._host = host_header(name or host, port)
        self._path = path
        self._wanted = subprotocol
        self._token = token
        sock: Any = connect(host, port, CONNECT_TIMEOUT)
        try:
            opened(sock)
            if context:
                sock = TLSSocket(sock, context, certified_name(name or host))
                sock.handshake(CONNECT_TIMEOUT)
            super().__init__(sock, ConnectionType.CLIENT)
        except BaseException:
            sock.close()
            raise

    def send_bytes(self, payload: bytes) -> None:
        """Sends one binary message, whole. Raises OSError when the connection is lost, or times out."""
        self.sock.sendall(self._unsent + self.ws.send(Message(data=payload)))
        self._unsent = b""

    def begin_bytes(self, payload: bytes) -> None:
        """Takes one binary message, which `flush` sends, piece by piece: for who reads at the same time."""
        self._unsent += self.ws.send(Message(data=payload))

    def handshake(self) -> None:
        """Called by the library's constructor: asks for the upgrade and reads the answer."""
        headers = [(b"Authorization", f"Bearer {self._token}".encode())] if self._token else []
        request = Request(host=self._host, target=self._path, subprotocols=[self._wanted], extra_headers=headers)
        self.sock.sendall(self.ws.send(request))
        deadline = monotonic() + CONNECT_TIMEOUT
        head, end, rest = b"", b"", b""
        while not end:
            data = self.sock.recv(READ_SIZE)
            if not data:
                raise HandshakeError("closed the connection during the handshake")
            if monotonic() > deadline or len(head) > READ_SIZE:
                raise HandshakeError(f"did not finish the handshake within {CONNECT_TIMEOUT:.0f} s")
            head, end, rest = (head + data).partition(b"\r\n\r\n")
        try:
            self.ws.receive_data(head + end)
            answer = next(self.ws.events(), None)
        except Exception as error:  # h11's, wsproto's, or one of theirs that they did not expect
            raise HandshakeError(f"is not a WebSocket server: {error}") from error
        # Frames may have come right behind it: the first `parse` finds them.
        self._tail += rest
        if isinstance(answer, RejectConnection):
            raise HandshakeError(
                f"refused with HTTP status {answer.status_code}{hint(answer.status_code)}",
                answer.status_code,
            )
        if not isinstance(answer, AcceptConnection) or answer.subprotocol != self._wanted:
            raise HandshakeError(f"does not speak {self._wanted}")
        self.subprotocol = answer.subprotocol
        for header, value in answer.extra_headers:
            if header.lower() == STORE_HEADER.lower().encode() and len(value) <= MAX_STORE:
                self.store = value.decode("latin-1")
        self.connected = True


def hint(status: int) -> str:
    """What a refused handshake may come from."""
    where = ": is that the /v1.0/ingest of a ringoexp?"
    return _HINTS.get(status, where if status < 400 or status == 404 else "")


def _short_frame(payload: bytes) -> bytes:
    """A server's binary message of at most 125 bytes (RFC 6455 section 5.2)."""
    assert len(payload) < 126
    return bytes((0x82, len(payload))) + payload
