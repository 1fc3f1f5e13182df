"""A WebSocket connection for one thread: reading, parsing, queued writing and closing, for both ends.

`simple_websocket` performs the handshake and `wsproto` judges the protocol. The library's reader thread, its unbounded
message list, its `send` and its compression are not used. `websocket_server` and `websocket_client` have the two ends.

A connection belongs to one thread, and nothing here is locked. Only `abort` is for other threads: the owner's reads and
writes fail then.
"""

import select
import socket
from typing import Any

from simple_websocket.ws import Base
from wsproto import ConnectionType
from wsproto.connection import ConnectionState
from wsproto.events import BytesMessage, CloseConnection, Ping, TextMessage
from wsproto.frame_protocol import CloseReason
from wsproto.utilities import LocalProtocolError

from ringolib.net import sockets
from ringolib.net.frames import MAX_MESSAGE, Messages, encode_short_frame, frame_head, take_frames
from ringolib.net.sockets import READ_SIZE, linger, shut_down

MAX_UNSENT = 64 * 1024
"""Bytes of pongs that may be queued here, behind the system's buffer, before the peer is given up."""
STORE_HEADER = "X-Ringoexp-Store"
"""Response header of an upgrade: the identity of the store behind the server."""
_GONE = select.POLLHUP | select.POLLERR
_HALF_CLOSED = getattr(select, "POLLRDHUP", 0)  # Linux only


class HandshakeError(Exception):
    """The upgrade failed. `status` is the HTTP status of the response, if there was a response."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


class _NoThread:
    """Replaces the library's reader thread, which its constructor would start."""

    name = ""

    def __init__(self, target: Any) -> None:
        pass

    def start(self) -> None:
        pass


class Connection(Base):  # type: ignore[misc]  # the library has no types
    """Both ends' part of a connection, from the first byte after the handshake to the closed socket.

    `ending` is None while the connection is open for reading. Then it is the close code and reason (RFC 6455 section
    7.4): either the peer's own, or ours for a violation of the protocol; `at_fault` is true for a violation.
    """

    max_unsent = MAX_UNSENT

    def __init__(self, sock: socket.socket, role: ConnectionType) -> None:
        self.ending: tuple[int, str] | None = None
        self.at_fault = False
        self._unsent = b""
        self._unfinished_since: float | None = None  # monotonic seconds since the owner waits for the rest of a message
        self._masked = role is ConnectionType.SERVER  # only clients mask their frames
        # Bytes that are not parsed yet: the start of a frame, and fewer than _needed.
        self._tail = bytearray()
        self._needed = 1
        # The state of wsproto: bytes left of its frame, whether its message has more fragments, and their payloads.
        self._frame_left = 0
        self._fragmented = False
        self._message = bytearray()
        super().__init__(sock, connection_type=role, thread_class=_NoThread)

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

    def is_gone(self) -> bool:
        """True if the peer has closed its side, even if unread bytes are left.

        After its Close frame a peer may close its side and still wait for our last bytes. Then only a lost connection
        counts.
        """
        poll = select.poll()
        poll.register(self.sock, _GONE if self.ending else _GONE | _HALF_CLOSED)
        return bool(poll.poll(0))

    def parse(self, data: bytes | bytearray) -> list[Messages]:
        """Return the binary messages that `data` completes, in order. Answer the pings in it.

        Simple frames are decoded here, all of one size together. wsproto parses all other frames, one by one. If the
        peer closes, sends text or too large a message, or violates the protocol, this sets `ending`. It returns the
        messages before that point and ignores all bytes behind it.
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
            if self._frame_left:  # inside a frame whose head wsproto has
                part = data[at : at + self._frame_left]
                self._frame_left -= len(part)
                at += len(part)
                self._parse_slowly(part, messages)
                continue
            head = frame_head(data, at)
            if head is None:
                needed = end - at + 1
                break
            frame_size = head.size + head.payload_size
            if not head.simple or self._fragmented or not self._masked:
                if data[at] & 0x0F < 8:  # not a control frame
                    self._fragmented = data[at] < 0x80
                self._frame_left = frame_size
            elif frame_size > end - at:
                needed = frame_size
                break
            else:
                group, at = take_frames(data, at, head)
                messages.append(group)
        self._tail += data[at:]
        self._needed = needed
        if messages:
            self._unfinished_since = None
        return messages

    def _parse_slowly(self, data: bytes | bytearray, messages: list[Messages]) -> None:
        """Parse `data` with wsproto: add the messages that it completes, and answer pings."""
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
                except OSError as error:  # the messages before the ping still count
                    self._end(CloseReason.ABNORMAL_CLOSURE, f"connection lost: {error}")
                    break
            elif isinstance(event, TextMessage):
                self._end(CloseReason.UNSUPPORTED_DATA, "text is not accepted: send binary messages", True)
                break
            elif isinstance(event, CloseConnection):
                # wsproto also reports a violation of the protocol as a Close of the peer. Its state is still OPEN then.
                self._end(event.code, event.reason or "", self.ws.state is ConnectionState.OPEN)
                break

    def queue(self, frame: bytes) -> None:
        """Queue a whole frame behind the unsent bytes, and `flush`.

        Raises OSError if the connection is lost, TimeoutError if the peer leaves more than `max_unsent` bytes unread.
        """
        behind = len(self._unsent)
        self._unsent += frame
        if not self.flush() and behind > self.max_unsent:
            raise TimeoutError("the peer does not read")

    def flush(self) -> bool:
        """Send the unsent bytes that the socket takes. Return True if none are left.

        It does not wait, except on a client's socket with a timeout. Raises OSError if the connection is lost.
        """
        if self._unsent:
            try:
                self._unsent = self._unsent[self.sock.send(self._unsent, socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                pass
        return not self._unsent

    @property
    def unsent(self) -> int:
        """The number of bytes that `flush` has to send."""
        return len(self._unsent)

    def ping(self) -> None:
        """Send a ping. Raises OSError as `queue` does."""
        self.queue(self.ws.send(Ping()))

    def finish(self, code: int, reason: str, last: bytes = b"") -> None:
        """Send our Close frame, wait at most sockets.CLOSE_TIMEOUT for the peer's, and close the socket. Never raises.

        `last`, at most 125 bytes, is sent as a last message before the Close frame. If the peer has sent a Close frame,
        ours has the peer's code.
        """
        try:
            frame = self.ws.send(CloseConnection(code, reason or None))
            self.sock.settimeout(sockets.CLOSE_TIMEOUT)
            self.sock.sendall(self._unsent + (encode_short_frame(last) if last else b"") + frame)
        except (OSError, LocalProtocolError):
            pass  # the connection is lost
        else:
            linger(self.sock)
        self.sock.close()

    def abort(self) -> None:
        """Make the owner's reads and writes fail at once. For other threads."""
        shut_down(self.sock)

    def _end(self, code: int, reason: str, at_fault: bool = False) -> None:
        self.ending = (code, reason)
        self.at_fault = at_fault
        self._message = bytearray()
