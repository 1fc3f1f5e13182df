"""The state of a producer, without I/O: which records are not acked, which message is next, and how an attempt ended.

An `Outbox` numbers the records of a source and keeps them until they are acked. On each new connection it hands out all
records that are not acked again, with the same numbers, so the store keeps each number once.

It has no socket, no thread and no clock: `now` is a reading of `time.monotonic`. Nothing here is locked. The threaded
producer calls it under its lock, the asyncio producer from its event loop.
"""

import math
import uuid
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ringolib.net.sockets import reason_of
from ringolib.net.tls_socket import TLSError
from ringolib.net.websocket import HandshakeError
from ringolib.timing import backoff
from ringolib.wire import MAX_SEQUENCE, Buffer, Run, WireError, decode_ack, encode_batch

CHUNK_RECORDS = 16_384
"""Maximum number of records in a message."""
MAX_UNACKED = 1_048_576
"""Number of unacked records from which on an outbox is full: `send` waits then."""
STALL_TIMEOUT = 90.0
"""Seconds without an ack, and without progress in sending a message, after which a connection is dropped.

It is longer than a publisher waits for its consumer. Otherwise clients would send records again that the publisher is
about to store.
"""
PERMANENT_CLOSE_CODES = (1002, 1003, 1007, 1008, 1009)
"""Close codes after which the same records would be refused again (RFC 6455 section 7.4.1)."""
RETRYABLE_STATUSES = (408, 425, 429)
"""HTTP statuses below 500 after which the same handshake may succeed. Those below 400 come from other servers."""
PERMANENT_SERVER_STATUSES = (501, 505)
"""HTTP statuses from 500 on after which the same handshake would be refused again."""


class ProducerError(Exception):
    """The records cannot be sent: the text says why.

    The server refuses them permanently, the first connection fails because of TLS, or the producer belongs to another
    process.
    """


class RecordsRefused(Exception):
    """The server has closed the connection because of the records: it would refuse them again."""


class Chunk(NamedTuple):
    """Consecutive records of a message: `values` are numbered `first`, `first + 1`, ..."""

    first: int
    values: "array[int]"

    @property
    def end(self) -> int:
        """The sequence after the last record."""
        return self.first + len(self.values)


def split(values: Iterable[int]) -> Iterator["array[int]"]:
    """Copy `values` into blocks of at most CHUNK_RECORDS.

    Raises, at once, OverflowError for a value beyond 64 bits, and TypeError for other than integers.
    """
    if isinstance(values, int):
        raise TypeError(f"send takes several integers, for example a list or a range: send([{values}])")
    whole = values if isinstance(values, array) and values.typecode == "q" else array("q", values)
    return (whole[start : start + CHUNK_RECORDS] for start in range(0, len(whole), CHUNK_RECORDS))


def _not_acked(count: int, total: int = 0) -> str:
    """Return that so many records, of a total if there is one, are not acked."""
    last, verb = (total or count), "is" if count == 1 else "are"
    return f"{count}{f' of {total}' if total else ''} {'record' if last == 1 else 'records'} {verb} not acked"


def is_permanent_status(status: int) -> bool:
    """True if a handshake that was answered with this HTTP status would be answered the same way again."""
    if status < 500:
        return status not in RETRYABLE_STATUSES
    return status in PERMANENT_SERVER_STATUSES


class Outbox:
    """The records of `source` that are not acked, from the number `first` on. `url` is for texts only."""

    def __init__(self, url: str, source: uuid.UUID, first: int) -> None:
        self.url = url
        self.source = source
        self.first = first
        self.next = first  # sequence of the next record
        self.acked = first  # all records before it are stored
        self.transmitted = first  # all records before it were handed out at least once; the last message may be cut
        self.connections = 0  # so far
        self.connected = False
        self.error: str | None = None  # the permanent error that has ended the producer
        self.trouble: str | None = None  # why the last attempt failed; None after the next ack
        self.closed = False
        self._chunks: deque[Chunk] = deque()  # only the oldest may be acked in part
        self._unsent = 0  # chunks, counted from the right, that are not handed out on this connection
        self._failures = 0  # attempts in a row that have brought no ack
        self._acked_before = first  # `acked` at the last failure
        # Of the present connection:
        self._base = first  # its acks count from this sequence
        self._handed_out = first  # all records before it were handed out
        self._progress_at = math.inf  # when an ack came, or a part of a waiting message left; inf: no record waits

    @property
    def unacked(self) -> int:
        """The number of records that are not acked."""
        return self.next - self.acked

    @property
    def is_full(self) -> bool:
        """True if no more records should be added until some are acked."""
        return self.unacked >= MAX_UNACKED

    @property
    def has_full_chunk(self) -> bool:
        """True if at least one full message is ready to be handed out."""
        return self._unsent > 1

    @property
    def is_over(self) -> bool:
        """True if no more records are sent: see `check_usable`."""
        return self.closed or self.error is not None

    def check_usable(self) -> None:
        """Raise ProducerError after a permanent error, ValueError if the producer is closed."""
        if self.error:
            raise ProducerError(self.error)
        if self.closed:
            raise ValueError("the producer is closed")

    # Records.

    def add(self, blocks: Iterable["array[int]"]) -> None:
        """Number the values of `blocks`, and keep them. The blocks are the outbox's from then on.

        A small block joins the last chunk if that is not handed out on this connection. Raises ValueError if the
        numbers of the source are used up; then none of the blocks is added.
        """
        blocks = list(blocks)
        if self.next + sum(map(len, blocks)) > MAX_SEQUENCE:
            raise ValueError("sequences end at 2**63 - 1: go on with a new source")
        for block in blocks:
            if self._unsent and len(self._chunks[-1].values) + len(block) <= CHUNK_RECORDS:
                self._chunks[-1].values.extend(block)
            else:
                self._chunks.append(Chunk(self.next, block))
                self._unsent += 1
            self.next += len(block)

    # One connection.

    def connect(self, now: float) -> None:
        """Begin a connection: all records that are not acked are to be sent on it."""
        self.connections += 1
        self.connected = True
        self._unsent = len(self._chunks)
        self._base = self._handed_out = self._chunks[0].first if self._chunks else self.next
        self._progress_at = now if self._chunks else math.inf

    def next_chunk(self) -> Chunk | None:
        """Hand out the next chunk to send on this connection; None if all are handed out."""
        if not self._unsent:
            return None
        chunk = self._chunks[-self._unsent]
        self._unsent -= 1
        self._handed_out = chunk.end
        self.transmitted = max(self.transmitted, chunk.end)
        return chunk

    def encode(self, chunk: Chunk) -> bytes:
        """Return the message of a chunk that was handed out. Needs no lock: the chunk does not change."""
        return encode_batch([Run(self.source.bytes, chunk.first, len(chunk.values))], chunk.values)

    def receive(self, ack: Buffer, now: float) -> None:
        """Drop the chunks that a message of the server acks. Raises WireError if it is not a valid ack."""
        acked = self._base + decode_ack(ack)
        if acked > self._handed_out:
            raise WireError(f"acked {acked - self._base} records of {self._handed_out - self._base} sent")
        self._progress_at = now
        self.acked = max(self.acked, acked)
        self.trouble = None
        while self._chunks and self._chunks[0].end <= self.acked:
            self._chunks.popleft()

    def note_progress(self, now: float) -> None:
        """Note that a part of a message has left that could not leave at once. Other messages prove nothing."""
        self._progress_at = now

    def stall_deadline(self, now: float) -> float:
        """Return when the connection counts as stalled; never while all records are acked.

        Raises TimeoutError if it is stalled.
        """
        if not self._chunks:
            self._progress_at = math.inf
        elif self._progress_at == math.inf:
            self._progress_at = now
        if now > self._progress_at + STALL_TIMEOUT:
            raise TimeoutError(f"no ack arrived, and nothing could be sent, within {STALL_TIMEOUT:.0f} s")
        return self._progress_at + STALL_TIMEOUT

    # How an attempt ends.

    def close_error(self, code: int, at_fault: bool, text: str) -> Exception:
        """Return the error of a connection that the server has ended with this close code, for `fail`.

        A fault in the server's own frames says nothing about the records: another attempt may succeed.
        """
        return (RecordsRefused if code in PERMANENT_CLOSE_CODES and not at_fault else ConnectionResetError)(text)

    def fail(self, error: Exception) -> float:
        """Note why an attempt has failed, and return the seconds until the next attempt.

        After a permanent failure, `error` is set, and no attempt follows.

        TLS fails permanently only before the first connection. Later, the server's certificate may have been replaced,
        and may be replaced again.
        """
        self.connected = False
        self.trouble = reason_of(error)
        refused = isinstance(error, HandshakeError) and error.status and is_permanent_status(error.status)
        if isinstance(error, RecordsRefused) or refused or (isinstance(error, TLSError) and not self.connections):
            self.error = f"{self.url}: {error}"
        self._failures = 0 if self.acked > self._acked_before else self._failures + 1
        self._acked_before = self.acked
        return backoff(self._failures)

    def break_down(self, error: BaseException) -> None:
        """End the producer after an error that nothing expected: callers that wait must see it."""
        if isinstance(error, MemoryError):
            self.error = "not enough memory (ulimit -v limits it)"
        else:
            self.error = f"{self.url}: {type(error).__name__}: {error}"

    def shortfall(self, target: int) -> str:
        """Return how many records before the number `target` are not acked, and why."""
        text = _not_acked(target - self.acked)
        return f"{text} ({self.trouble})" if self.trouble else text

    def resumption(self) -> str:
        """Return how many records are not acked, why, and how to resume."""
        sent, acked = self.next - self.first, self.acked - self.first
        cause = self.error or self.trouble
        values = f"the values after the first {acked}" if acked else "all values again"
        return (
            f"{_not_acked(sent - acked, sent)} by {self.url}{f' ({cause})' if cause else ''}: "
            f"send {values} with source {self.source} and first {self.acked}"
        )
