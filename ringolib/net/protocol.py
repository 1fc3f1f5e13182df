"""The WebSocket protocol without I/O: bytes in, binary messages and bytes to send out (RFC 6455).

One `Protocol` is one connection after its handshake, at either end. Frames that are a whole message each are taken out
of the data together, without a step per frame (`frames`); all other frames go to wsproto, which stays the judge of the
protocol. wsproto's state is created when the first such frame comes: most connections never need it, and it is the
largest part of an idle connection's memory.

Nothing here is locked: one thread uses a Protocol.
"""

from wsproto import ConnectionType
from wsproto.connection import Connection, ConnectionState
from wsproto.events import BytesMessage, CloseConnection, Message, Ping, TextMessage
from wsproto.frame_protocol import CloseReason
from wsproto.utilities import LocalProtocolError

from ringolib.net.frames import MAX_MESSAGE, MessageGroup, Messages, frame_head, take_frames

SLOW_FRAMES_PER_CALL = 64
"""Frames that go to wsproto in one call of `receive`; the rest of the data waits for the next call.

wsproto needs about 10 us for a frame, so a call takes less than 1 ms. A larger number does not raise the throughput.
"""
PING = b"\x89\x00"
"""A server's ping frame without payload (RFC 6455, section 5.5.2)."""


class Protocol:
    """One end of a connection. `is_server` is true at the end that receives masked frames.

    `ending` is None while the peer may send messages; then it is the close code and reason: the peer's own, or ours
    for what the peer did wrong, and then `at_fault` is true.
    """

    __slots__ = (
        "ending",
        "at_fault",
        "replies",
        "_is_server",
        "_tail",
        "_needed",
        "_judged",
        "_fragments",
        "_message",
        "_wsproto",
    )

    def __init__(self, is_server: bool) -> None:
        self.ending: tuple[int, str] | None = None
        self.at_fault = False
        self.replies = b""  # pongs that `receive` has produced
        self._is_server = is_server
        self._tail: bytes | bytearray = b""  # data that is not parsed yet
        self._needed = 1  # bytes of _tail at which parsing can go on
        self._judged = 0  # bytes left of a frame whose head wsproto has seen
        self._fragments = False  # a message in fragments has begun
        self._message: bytearray | None = None  # the fragments of it that have come
        self._wsproto: Connection | None = None

    @property
    def unfinished(self) -> bool:
        """True if the peer has begun a message and not finished it."""
        return bool(self._tail or self._judged or self._fragments)

    @property
    def has_input(self) -> bool:
        """True if `receive(b"")` would go on with data that is here already."""
        return len(self._tail) >= self._needed and not self.ending

    @property
    def held(self) -> int:
        """Bytes in memory of unfinished messages."""
        return len(self._tail) + len(self._message or b"")

    def receive(self, data: bytes | bytearray) -> list[MessageGroup]:
        """Return the binary messages that `data` completes, in order; pongs for pings in it are in `replies`.

        Sets `ending` when the peer closes, sends text or too large a message, or breaks the protocol. Messages before
        that are returned; data behind it is ignored. After SLOW_FRAMES_PER_CALL frames for wsproto the rest of the
        data is kept, and `has_input` is true.
        """
        messages: list[MessageGroup] = []
        if self.ending:
            return messages
        if self._tail:
            if len(self._tail) + len(data) < self._needed:
                if isinstance(self._tail, bytes):
                    self._tail = bytearray(self._tail)
                self._tail += data
                return messages
            data = self._tail + data
            self._tail = b""
        at, end, needed, slow = 0, len(data), 1, 0
        while at < end and not self.ending:
            if self._judged:  # within a frame whose head wsproto has seen
                part = data[at : at + self._judged]
                self._judged -= len(part)
                at += len(part)
                self._judge(part, messages)
                continue
            if slow >= SLOW_FRAMES_PER_CALL:
                break
            head = frame_head(data, at)
            if head is None:
                needed = end - at + 1
                break
            size = head.size + head.payload_size
            if not head.simple or self._fragments or not self._is_server:
                if data[at] & 0x0F < 8:
                    self._fragments = data[at] < 0x80
                self._judged = size
                slow += 1
            elif size > end - at:
                needed = size
                break
            else:
                group, at = take_frames(data, at, head)
                messages.append(group)
        if at < end and not self.ending:
            self._tail = data[at:]
        self._needed = needed
        return messages

    def message_frame(self, payload: bytes) -> bytes:
        """Return the frame of one binary message."""
        return bytes(self._judge_state().send(Message(data=payload)))

    def ping_frame(self) -> bytes:
        """Return a ping."""
        return bytes(self._judge_state().send(Ping()))

    def end(self, code: int, reason: str) -> None:
        """Receive no more: the connection has this ending, unless it has one already."""
        if not self.ending:
            self._end(code, reason)

    def discard(self) -> None:
        """Free the memory of an unfinished message: nothing more is received."""
        self._tail = b""
        self._message = None

    def close_frame(self, code: int, reason: str) -> bytes:
        """Return our Close frame: the answer to the peer's with its own code, if it has sent one.

        A reason of more than 123 bytes is cut. What UTF-8 cannot encode, as in some file names, is replaced.
        """
        reason = reason.encode("utf-8", "replace").decode()
        try:
            return bytes(self._judge_state().send(CloseConnection(code, reason or None)))
        except LocalProtocolError:
            return b""  # closed already

    def _judge_state(self) -> Connection:
        if self._wsproto is None:
            role = ConnectionType.SERVER if self._is_server else ConnectionType.CLIENT
            self._wsproto = Connection(role)
        return self._wsproto

    def _judge(self, data: bytes | bytearray, messages: list[MessageGroup]) -> None:
        """Give `data` to wsproto, add the messages it completes, and answer pings."""
        judge = self._judge_state()
        judge.receive_data(bytes(data))
        for event in judge.events():
            if isinstance(event, BytesMessage):
                if self._message is None:
                    self._message = bytearray()
                self._message += event.data
                if len(self._message) > MAX_MESSAGE:
                    self._end(CloseReason.MESSAGE_TOO_BIG, f"a message has at most {MAX_MESSAGE} bytes", True)
                    break
                if event.message_finished:
                    messages.append(Messages(self._message, len(self._message)))
                    self._message = None
            elif isinstance(event, Ping):
                self.replies += judge.send(event.response())
            elif isinstance(event, TextMessage):
                self._end(CloseReason.UNSUPPORTED_DATA, "text is not accepted: send binary messages", True)
                break
            elif isinstance(event, CloseConnection):
                # wsproto reports a violation of the protocol as a Close frame of the peer that never came.
                self._end(event.code, event.reason or "", judge.state is ConnectionState.OPEN)
                break

    def _end(self, code: int, reason: str, at_fault: bool = False) -> None:
        self.ending = (code, reason)
        self.at_fault = at_fault
        self.discard()
