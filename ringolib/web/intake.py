"""The intakes: where the records of clients go, and how a caller learns that they are stored.

A publisher's `RingIntake` puts them into the ring. A consumer's `StoreIntake` commits them to the store. Any thread may
call an intake; the ring and the store have their own locks.
"""

from array import array
from typing import NamedTuple, Protocol

from ringbuffer import Closed, Full, Ring
from ringolib.storage.interface import Storage
from ringolib.timing import deadline_after, remaining
from ringolib.wire import Block, Run


class Ticket(NamedTuple):
    """A range of the intake's own sequence numbers that contains the records of a `put`, and possibly others."""

    since: int
    end: int


class Intake(Protocol):
    """Takes blocks of records, and reports when they are stored. A ticket identifies the records of one `put`."""

    @property
    def closed(self) -> bool:
        """True if the intake takes no more records."""

    def put(self, block: Block, timeout: float) -> tuple[int, Ticket]:
        """Take as many records as possible within `timeout` seconds. Return their number and their ticket.

        The number is smaller than the block if there was no room, or if the intake is closed. Raises StoreError if
        none was stored.
        """

    def stored(self, ticket: Ticket) -> bool:
        """True if the records of the ticket are stored."""

    def wait(self, ticket: Ticket, timeout: float) -> bool:
        """Wait until the records of the ticket are stored. Return False after `timeout` seconds."""


class RingIntake:
    """A publisher's intake: a ring that workers drain. Tickets are ring sequences.

    With `ack_in_ring`, a record counts as stored as soon as it is in the ring (`-A ring`).
    """

    def __init__(self, ring: Ring, ack_in_ring: bool = False) -> None:
        self._ring = ring
        self._ack_in_ring = ack_in_ring

    @property
    def closed(self) -> bool:
        """True if the ring takes no more records."""
        return self._ring.closed

    def put(self, block: Block, timeout: float) -> tuple[int, Ticket]:
        """Put records into the ring for at most `timeout` seconds. Return their number and their ticket."""
        deadline = deadline_after(timeout)
        accepted, since = 0, self._ring.cursor
        with memoryview(block.values) as values:
            for run in block.runs:
                part = values[accepted : accepted + run.count]
                try:
                    self._ring.put(part, run.source, run.first, remaining(deadline))
                except (Full, Closed) as stop:
                    accepted += stop.accepted
                    break
                finally:
                    part.release()
                accepted += run.count
        # The cursor, because Full and Closed have no sequence. It may be later than the last record, which is safe.
        return accepted, Ticket(since, self._ring.cursor)

    def stored(self, ticket: Ticket) -> bool:
        """True if the records of the ticket may be acked."""
        return self._ack_in_ring or self._ring.is_stored(ticket.end, ticket.since)

    def wait(self, ticket: Ticket, timeout: float) -> bool:
        """Wait until the records of the ticket may be acked. Return False after `timeout` seconds, or on abort."""
        return self._ack_in_ring or self._ring.wait_committed(ticket.end, timeout, ticket.since)


STORED = Ticket(0, 0)


class StoreIntake:
    """A consumer's intake: `put` commits the records, so there is nothing left to wait for."""

    closed = False

    def __init__(self, store: Storage) -> None:
        self._store = store

    def put(self, block: Block, timeout: float) -> tuple[int, Ticket]:
        """Commit the block, however long this takes. Raises StoreError if it is not stored."""
        self._store.append(block.runs, block.values)
        return len(block.values), STORED

    def stored(self, ticket: Ticket) -> bool:
        """Return True: `put` has stored the records."""
        return True

    def wait(self, ticket: Ticket, timeout: float) -> bool:
        """Return True: `put` has stored the records."""
        return True


def plain_block(values: "array[int]", source: bytes, first: int) -> Block:
    """Return a block of values that came without a source: records `first`, `first + 1`, ... of `source`."""
    return Block([Run(source, first, len(values))] if values else [], values)
