"""One WebSocket client of `/v1.0/ingest`: decode its messages, put the records into the intake, and send acks.

A `Session` runs in the thread of its connection from the first byte to the last. Threads share only the intake and the
totals, which have their own locks.
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

WAIT_SECONDS = 1.0
"""How long a session waits for the ring or the disk before it checks its socket again."""
MAX_MARKS = 1024
"""Reads that are acked separately. If a client has more reads in flight, the last ones share a mark."""

Ending = tuple[int, str]
"""Close code and reason (RFC 6455 section 7.4)."""
GOING_AWAY: Ending = (1001, "the server is stopping")
UNSTORED: Ending = (1011, "not stored before the server stopped")
LOST: Ending = (1006, "connection lost")
NOTHING = Block([], array("q"))


class _Mark(NamedTuple):
    """One read of the connection: if the tickets of this mark and all earlier ones are stored, `records` are stored."""

    ticket: Ticket
    records: int  # of the connection, counted from its beginning
    read_at: float  # monotonic seconds


class Session:
    """One WebSocket client. Call `run` once.

    When `stopping` is set, the session reads no more, waits until its records are stored, and closes with 1001.
    """

    def __init__(self, connection: ServerConnection, intake: Intake, totals: Totals, stopping: Event) -> None:
        self._connection = connection
        self._intake = intake
        self._totals = totals
        self._stopping = stopping
        self._batches = connection.subprotocol == SUBPROTOCOL
        self._source = uuid.uuid4().bytes  # of plain messages
        # Counts of this connection's records: received >= _put >= _stored >= acked.
        self.received = 0
        self._put = 0  # put into the intake
        self._stored = 0
        self.acked = 0
        self._marks: deque[_Mark] = deque()  # reads that are put and not stored yet, the oldest first
        self._block = NOTHING  # decoded, and not yet put

    def run(self, received: bytes) -> Ending:
        """Serve the client until either side ends the connection. Return the close code and reason.

        `received` are the bytes that came with the handshake. All records read are put and acked before the close, with
        two exceptions: the client leaves while there is no room for them, or it ends its side without a Close frame and
        they are not stored within WAIT_SECONDS. Never raises OSError: a lost connection ends with 1006.
        """
        try:
            ending = self._serve(received)
            self._settle(patient=ending[0] != LOST[0])
            if self._batches and self._marks and ending == GOING_AWAY:
                ending = UNSTORED  # 1001 tells a publisher's link that these records will not be stored; they may be
        except OSError as error:
            ending = (LOST[0], f"{LOST[1]}: {error}")
        lost = ending[0] == LOST[0]
        if lost:
            self._connection.abort()
        last_ack = b""
        if self._stored > self.acked and not lost:  # the client has not read the earlier acks
            last_ack = encode_ack(self._stored)
            self._totals.add_acked(self._stored - self.acked)
            self.acked = self._stored
        self._connection.finish(*ending, last_ack)
        return ending

    def _serve(self, received: bytes) -> Ending:
        """Read, put and ack until the connection ends. Raises OSError if it is lost."""
        data: bytes | None = received
        while True:
            ending = None
            if data:
                read_at = monotonic()
                ending = self._decode(data)
                data = None  # while the thread waits for room or for the client, it keeps only _block
                ending = self._put_all(read_at) or ending
            self._ack()
            if ending:
                return ending
            if self._stopping.is_set():
                return GOING_AWAY
            data = self._connection.read(wait=False)
            if data == b"":
                return LOST
            if data is None and self._marks:
                self._intake.wait(self._marks[0].ticket, WAIT_SECONDS)
            elif data is None:
                self._connection.wait()

    def _decode(self, data: bytes) -> Ending | None:
        """Decode `data` into `_block`. Return the code and reason if the connection ends after it."""
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

    def _put_all(self, read_at: float) -> Ending | None:
        """Put the block, however long this takes. Return the code and reason to close with if a part is not put."""
        while self._block.values:
            try:
                accepted, ticket = self._intake.put(self._block, WAIT_SECONDS)
            except StoreError as error:
                self._totals.add_refused(len(self._block.values))
                return 1011, f"not stored: {error}"
            if accepted:
                self._put += accepted
                self._add_mark(ticket, read_at)
            if accepted == len(self._block.values):
                break
            self._block = self._block.after(accepted)
            if self._intake.closed or self._connection.is_gone():
                self._totals.add_refused(len(self._block.values))
                return GOING_AWAY if self._intake.closed else LOST
            self._ack()
        self._block = NOTHING
        return None

    def _add_mark(self, ticket: Ticket, read_at: float) -> None:
        """Add a mark for the records put so far. Beyond MAX_MARKS, extend the last mark instead."""
        if len(self._marks) >= MAX_MARKS:
            last = self._marks.pop()
            ticket, read_at = Ticket(last.ticket.since, ticket.end), last.read_at
        self._marks.append(_Mark(ticket, self._put, read_at))

    def _ack(self) -> None:
        """Send the number of stored records to the client, if it has grown."""
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
        """Wait until all records put are stored, and ack them.

        Give up if the client is gone, or if nothing will be stored any more, or after WAIT_SECONDS unless `patient`.
        """
        while self._marks:
            ticket = Ticket(self._marks[0].ticket.since, self._marks[-1].ticket.end)
            stored = self._intake.wait(ticket, WAIT_SECONDS)
            self._ack()
            aborted = self._stopping.is_set() and self._intake.closed
            if stored or aborted or not patient or self._connection.is_gone():
                return
