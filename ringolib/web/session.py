"""From what a client sends to the ack it gets: the job behind `/v1.0/ingest`, without HTTP.

An *intake* is where records go: a publisher's ring, or straight to a consumer's store. A `Session`
is one WebSocket client, run by its connection's own thread from the first byte to the last.
Nothing here is shared between threads but the intake and the totals, which lock for themselves.
"""

import uuid
from array import array
from collections import deque
from threading import Event
from time import monotonic
from typing import NamedTuple

from ringolib.counters import Totals
from ringolib.net.websocket_server import ServerConnection
from ringolib.storage.interface import StoreError
from ringolib.web.intake import Intake, Ticket, plain_block
from ringolib.wire import SUBPROTOCOL, Block, decode_batch_messages, decode_plain_messages, encode_ack

PATIENCE = 1.0
"""Seconds a session waits, for the ring or the disk, before it looks at its socket again."""
MAX_MARKS = 1024
"""Reads whose acks are kept apart, for a client whose records are long in being stored."""
GOING_AWAY = (1001, "the server is stopping")
UNSTORED = (1011, "not stored before the server stopped")
LOST = (1006, "connection lost")
NOTHING = Block([], array("q"))


class _Mark(NamedTuple):
    """When what `ticket` stands for is stored, as that of all marks before, the connection's first `records` are."""

    ticket: Ticket
    records: int
    read_at: float  # monotonic seconds


class Session:
    """One WebSocket client: reads, decodes, puts, waits for stored, acks. `run` it once.

    `stopping` makes it read no more, finish what it has read, and close with 1001.
    """

    def __init__(self, connection: ServerConnection, intake: Intake, totals: Totals, stopping: Event) -> None:
        self._connection = connection
        self._intake = intake
        self._totals = totals
        self._stopping = stopping
        self._batches = connection.subprotocol == SUBPROTOCOL
        self._source = uuid.uuid4().bytes  # of plain messages
        # Records of this connection:
        self.received = 0
        self._put = 0  # of those, put into the intake
        self._stored = 0  # of those, stored
        self.acked = 0  # and of those, acked
        self._marks: deque[_Mark] = deque()
        self._block = NOTHING  # decoded, and not in the intake yet

    def run(self, rest: bytes) -> tuple[int, str]:
        """Serves the client until either side ends, closes, and returns the code and reason.

        `rest` is what came right behind the handshake. What was read is put and acked before the
        close, unless the client leaves while there is no room for it; one that ends its side without a
        Close frame gets the acks of the next PATIENCE. Never raises OSError: a lost connection ends with 1006.
        """
        ending = None
        data: bytes | None = rest
        rest = b""
        try:
            while ending is None:
                if data:
                    read_at = monotonic()
                    ending = self._decode(data)
                    data = None  # a thread that waits for room, or a client, holds no more than _block
                    ending = self._put_all(read_at) or ending
                self._ack()
                if ending is None and self._stopping.is_set():
                    ending = GOING_AWAY
                if ending is None:
                    data = self._connection.read(wait=False)
                    if data == b"":
                        ending = LOST
                    elif data is None and self._marks:
                        self._intake.wait(self._marks[0].ticket, PATIENCE)
                    elif data is None:
                        self._connection.wait()
            self._settle(patient=ending[0] != LOST[0])
            if self._batches and self._marks and ending == GOING_AWAY:
                ending = UNSTORED  # it may be stored yet: 1001 says to a publisher's link that it will not be
        except OSError as error:
            ending = (LOST[0], f"{LOST[1]}: {error}")
        if ending[0] == LOST[0]:
            self._connection.abort()
        last = b""
        if self._stored > self.acked and ending[0] != LOST[0]:  # the client has not read the acks before it
            last = encode_ack(self._stored)
            self._totals.add_acked(self._stored - self.acked)
            self.acked = self._stored
        self._connection.finish(*ending, last)
        return ending

    def _decode(self, data: bytes) -> tuple[int, str] | None:
        """Makes a block of `data`; the code and reason to close with after it, if that is the end."""
        self._totals.add_bytes(len(data))
        messages = self._connection.parse(data)
        ending = self._connection.ending
        if self._batches:
            self._block, error = decode_batch_messages(messages)
        else:
            values, error = decode_plain_messages(messages)
            self._block = plain_block(values, self._source, self._put)
        if error:
            ending = (error.close_code, str(error))
        if error or self._connection.at_fault:
            self._totals.add_refused()
        if self._block.values:
            self.received += len(self._block.values)
            self._totals.add_records(len(self._block.values))
        return ending

    def _put_all(self, read_at: float) -> tuple[int, str] | None:
        """Puts the block, however long there is no room for it; the code and reason to close with, if not all is in."""
        while self._block.values:
            try:
                accepted, ticket = self._intake.put(self._block, PATIENCE)
            except StoreError as error:
                self._totals.add_refused(len(self._block.values))
                return 1011, f"not stored: {error}"
            if accepted:
                self._put += accepted
                if len(self._marks) >= MAX_MARKS:  # its latency counts from the older one's read
                    last = self._marks.pop()
                    ticket, read_at = Ticket(last.ticket.since, ticket.end), last.read_at
                self._marks.append(_Mark(ticket, self._put, read_at))
            if accepted == len(self._block.values):
                break
            self._block = self._block.after(accepted)
            if self._intake.closed or self._connection.is_gone():
                self._totals.add_refused(len(self._block.values))
                return GOING_AWAY if self._intake.closed else LOST
            self._ack()
        self._block = NOTHING
        return None

    def _ack(self) -> None:
        """Tells the client how many of its records are stored, if more are than it knows."""
        now = monotonic()
        latencies = []
        while self._marks and self._intake.stored(self._marks[0].ticket):
            mark = self._marks.popleft()
            self._stored = mark.records
            latencies.append(now - mark.read_at)
        sent = self._stored > self.acked and self._connection.send_ack(encode_ack(self._stored))
        if sent or latencies:
            self._totals.add_acked(self._stored - self.acked if sent else 0, latencies)
        if sent:
            self.acked = self._stored

    def _settle(self, patient: bool) -> None:
        """Waits until all that was put is stored, and acks it; gives up when the client is gone, when nothing will
        be stored any more, or, if not `patient`, after PATIENCE.
        """
        while self._marks:
            stored = self._intake.wait(Ticket(self._marks[0].ticket.since, self._marks[-1].ticket.end), PATIENCE)
            self._ack()
            over = self._stopping.is_set() and self._intake.closed
            if stored or over or not patient or self._connection.is_gone():
                return
