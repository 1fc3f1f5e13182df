"""One ingest client without I/O: bytes and time in; blocks of records, acks and close frames out.

A `Session` has no socket, no thread and no clock of its own, in the manner of h11 and wsproto: its owner, the ingest
loop, passes it the received bytes, the number of stored records and the time. It decides what to send and when to give
up:

- `receive(data, now)` returns the block of records that `data` completes
- `stored(count)` says that the connection's first `count` records are on disk
- `data_to_send()` returns pongs, the ack that is due and, at the end, the Close frame
- `next_deadline` and `expire(now)` cover pings, unfinished messages and unread acks
- `ending` is the close code and reason once no more input is taken; `close(now)` queues the Close frame

States: open, until `ending` is set by the client, by an error, or by the owner (`end`); then settling, while the owner
waits for records that are on their way to the disk; then closing, from `close` until the owner closes the socket.

All times are seconds of one monotonic clock.
"""

from array import array
from math import inf
from struct import Struct

from ringolib.net.protocol import PING, Protocol
from ringolib.web.uuids import new_source
from ringolib.wire import Block, Run, decode_batch_messages, decode_plain_messages, encode_ack

PING_AFTER_SECONDS = 20.0
"""Silence after which the server sends a ping."""
PING_TIMEOUT_SECONDS = 20.0
"""Time that the client has to send anything after a ping, for example its pong."""
MESSAGE_TIMEOUT_SECONDS = 150.0
"""Time that a client has to finish a message: 8 MiB at the rate that is asked of an HTTP body."""
STALL_TIMEOUT_SECONDS = 60.0
"""Time that a client may read nothing while the server has something to send."""
CLOSE_TIMEOUT_SECONDS = 2.0
"""Time that a client has to answer the Close frame before the socket is closed."""
MAX_REPLIES = 64 * 1024
"""Bytes of pongs that a client may leave unread, beyond what the system buffers."""

PATIENCE_SECONDS = 1.0
"""Time for which a client that has ended its side without a Close frame still gets acks."""

GOING_AWAY = (1001, "the server is stopping")
UNSTORED = (1011, "not stored before the server stopped")
LOST = (1006, "connection lost")
NOTHING = Block([], array("q"))
_SINGLE = Struct(">xxII")  # a whole frame: its head, its mask and its masked payload of four bytes


class Session:
    """One client. `batches` is true if it speaks batch messages, which carry sources and sequences of their own.

    `received`, `stored_count` and `acked` count the records of this connection. `refused` is true if a message was
    invalid. `lost` is true if the connection ended without a Close frame.
    """

    __slots__ = (
        "batches",
        "received",
        "stored_count",
        "acked",
        "refused",
        "closing",
        "_ending",
        "_protocol",
        "_source",
        "_heard",
        "_pinged",
        "_begun",
        "_stalled",
        "_close_by",
        "_out",
    )

    def __init__(self, batches: bool, now: float) -> None:
        self.batches = batches
        self.received = 0
        self.stored_count = 0
        self.acked = 0
        self.refused = False
        self.closing = False
        self._ending: tuple[int, str] | None = None  # that the owner has set
        self._protocol = Protocol(is_server=True)
        self._source = b"" if batches else new_source()  # of plain messages
        self._heard = now  # when the client last sent something
        self._pinged: float | None = None  # when it was last pinged, if it has sent nothing since
        self._begun: float | None = None  # when the unfinished message began
        self._stalled: float | None = None  # since when the client has read none of the unsent bytes
        self._close_by = inf  # when the socket is closed without an answer to the Close frame
        self._out = b""  # pings and the Close frame

    @property
    def ending(self) -> tuple[int, str] | None:
        """The close code and reason once no more input is taken; None before."""
        return self._ending or self._protocol.ending

    @property
    def by_client(self) -> bool:
        """True if the client closed in order: it sent a Close frame and broke no rule."""
        return self._ending is None and self._protocol.ending is not None and not self._protocol.at_fault

    @property
    def lost(self) -> bool:
        """True if the connection ended without a Close frame."""
        ending = self.ending
        return ending is not None and ending[0] == LOST[0]

    @property
    def has_input(self) -> bool:
        """True if data has come that is not parsed yet: call `receive(b"", now)`."""
        return self._protocol.has_input and self._ending is None

    @property
    def held(self) -> int:
        """Bytes in memory of an unfinished message."""
        return self._protocol.held

    def receive(self, data: bytes | bytearray, now: float) -> Block:
        """Return the records that `data` completes. May set `ending`; later data is ignored."""
        if self.ending:
            return NOTHING
        if data:
            self._heard, self._pinged = now, None
            if len(data) == 10 and data.startswith(b"\x82\x84") and self._source and not self._protocol.unfinished:
                # One message of one 32-bit integer and nothing else: a client with little to say.
                mask, masked = _SINGLE.unpack(data)
                value = mask ^ masked
                run = Run(self._source, self.received, 1)
                self.received += 1
                return Block([run], array("q", (value if value < 0x80000000 else value - 0x100000000,)))
        messages = self._protocol.receive(data)
        if messages:
            if self.batches:
                block, error = decode_batch_messages(messages)
            else:
                values, error = decode_plain_messages(messages)
                block = Block([Run(self._source, self.received, len(values))], values) if values else NOTHING
            self.received += len(block.values)
            if error:
                self.replace_ending(error.close_code, str(error))
                self.refused = True
            self._begun = None
        else:
            block = NOTHING
        if self._protocol.at_fault:
            self.refused = True
        if not self._protocol.unfinished:
            self._begun = None
        elif self._begun is None:
            self._begun = now
        return block

    def stored(self, count: int) -> None:
        """The first `count` records of the connection are on disk."""
        self.stored_count = count

    def end(self, code: int, reason: str) -> None:
        """Take no more input, and close with this code and reason, unless an ending is set already."""
        if not self.ending:
            self.replace_ending(code, reason)

    def end_of_stream(self, now: float) -> None:
        """The client has ended its side. It gets acks for PATIENCE_SECONDS more, or STALL_TIMEOUT_SECONDS if it closed.

        A client that has left looks the same, so it cannot be waited for as long as the records take.
        """
        self._close_by = now + (STALL_TIMEOUT_SECONDS if self.ending else PATIENCE_SECONDS)
        self.end(*LOST)

    def replace_ending(self, code: int, reason: str) -> None:
        """Close with this code and reason, whatever ending there was. Unfinished messages are freed."""
        self._ending = (code, reason)
        self._protocol.discard()

    @property
    def needs_attention(self) -> bool:
        """True after `receive` if there is more to do than to store the block: input left, a reply, or an ending."""
        protocol = self._protocol
        return bool(protocol.replies or self._out or self._ending or protocol.ending or protocol.has_input)

    def data_to_send(self) -> bytes:
        """Return the bytes to be sent now, in whole frames: pongs and pings, then the ack that is due, then the Close
        frame. Call it only when everything that it returned before is with the system: acks are cumulative, so the
        newest one replaces unsent older ones.
        """
        out = self._protocol.replies
        if out:
            self._protocol.replies = b""
        if self.stored_count > self.acked:
            out += b"\x82\x08" + encode_ack(self.stored_count)  # RFC 6455, section 5.2: binary, final, 8 bytes
            self.acked = self.stored_count
        if self._out:
            out += self._out
            self._out = b""
        return out

    def sent(self, progress: bool, rest: int, now: float) -> None:
        """The owner has tried to send: `progress` if the system took something, `rest` bytes are left."""
        if not rest or progress:
            self._stalled = None
        if rest and self._stalled is None:
            self._stalled = now
        if len(self._protocol.replies) > MAX_REPLIES:
            self._lose("the client does not read")

    def close(self, now: float) -> None:
        """Queue the Close frame. No record is on its way to the disk any more, or the client does not wait for it."""
        if self.closing:
            return
        self.closing = True
        ending = self.ending or LOST
        self._close_by = now + CLOSE_TIMEOUT_SECONDS
        if ending[0] != LOST[0]:
            self._out += self._protocol.close_frame(*ending)

    @property
    def next_deadline(self) -> float:
        """When `expire` is to be called, unless something comes before."""
        if self._close_by != inf:
            return self._close_by
        deadline = inf if self._stalled is None else self._stalled + STALL_TIMEOUT_SECONDS
        if self.ending:
            return deadline
        silence = self._heard + PING_AFTER_SECONDS if self._pinged is None else self._pinged + PING_TIMEOUT_SECONDS
        if silence < deadline:
            deadline = silence
        if self._begun is not None:
            deadline = min(deadline, self._begun + MESSAGE_TIMEOUT_SECONDS)
        return deadline

    def expire(self, now: float, reading: bool = True) -> None:
        """Send a ping to a silent client, or give up a client that has stalled: `ending` is set then.

        With `reading` false the owner reads from no client now. Then no client is given up for silence, and the pings
        keep the way to the client open: proxies close a connection on which nothing happens.
        """
        if self._stalled is not None and now >= self._stalled + STALL_TIMEOUT_SECONDS:
            self._lose(f"the client has read nothing for {STALL_TIMEOUT_SECONDS:.0f} s")
        elif self.ending:
            return
        elif reading and self._begun is not None and now >= self._begun + MESSAGE_TIMEOUT_SECONDS:
            self._lose(f"a message was not finished within {MESSAGE_TIMEOUT_SECONDS:.0f} s")
        elif self._pinged is None and now >= self._heard + PING_AFTER_SECONDS:
            self._pinged = now
            self._out += PING
        elif self._pinged is not None and now >= self._pinged + PING_TIMEOUT_SECONDS:
            if reading:
                self._lose(f"no answer to a ping within {PING_TIMEOUT_SECONDS:.0f} s")
            elif not self._out:
                self._pinged = now
                self._out += PING

    def paused(self, seconds: float, now: float) -> None:
        """Do not count `seconds`, in which the owner did not read, as the client's silence."""
        self._heard = min(self._heard + seconds, now)
        if self._pinged is not None:
            self._pinged = min(self._pinged + seconds, now)
        if self._begun is not None:
            self._begun = min(self._begun + seconds, now)

    def _lose(self, reason: str) -> None:
        self.replace_ending(LOST[0], f"{LOST[1]}: {reason}")
