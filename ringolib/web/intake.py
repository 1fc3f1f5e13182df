"""TODO: ringolib/web/intake.py."""

from array import array
from time import monotonic
from typing import NamedTuple, Protocol

from ringbuffer import Closed, Full, Ring
from ringolib.storage.interface import Storage
from ringolib.wire import Block, Run


class Ticket(NamedTuple):
    """What was put is within these numbers of the intake's own, perhaps among what others put."""

    since: int
    end: int


class Intake(Protocol):
    """Takes blocks and tells when they are stored. A *ticket* stands for a block that was put.

    `put` returns how many records were taken within `timeout` seconds, and the ticket for those; fewer
    than all when there was no room, or when `closed`. Raises StoreError when nothing was stored.
    `stored` says whether those of the ticket are; `wait` returns True once they are.
    """

    @property
    def closed(self) -> bool: ...
    def put(self, block: Block, timeout: float) -> tuple[int, Ticket]: ...
    def stored(self, ticket: Ticket) -> bool: ...
    def wait(self, ticket: Ticket, timeout: float) -> bool: ...


class RingIntake:
    """A publisher's intake: a ring that workers drain. Tickets are ring sequences.

    With `ack_in_ring` a record counts as stored as soon as it is in the ring (`-A ring`).
    """

    def __init__(self, ring: Ring, ack_in_ring: bool = False) -> None:
        self._ring = ring
        self._ack_in_ring = ack_in_ring

    @property
    def closed(self) -> bool:
        """True when nothing more is taken, nor will be stored."""
        return self._ring.closed

    def put(self, block: Block, timeout: float) -> tuple[int, Ticket]:
        """How many records are in the ring after at most `timeout` seconds, and their ticket."""
        deadline = monotonic() + timeout
        accepted, since = 0, self._ring.cursor
        with memoryview(block.values) as values:
            for run in block.runs:
                part = values[accepted : accepted + run.count]
                left = max(0.0, deadline - monotonic())
                try:
                    self._ring.put(part, run.source, run.first, left)
                except (Full, Closed) as stop:
                    accepted += stop.accepted
                    break
                finally:
                    part.release()
                accepted += run.count
        # Not what `put` returned: after Full or Closed there is no such thing, and later is safe.
        return accepted, Ticket(since, self._ring.cursor)

    def stored(self, ticket: Ticket) -> bool:
        """True when the records of the ticket may be acked."""
        return self._ack_in_ring or self._ring.is_stored(ticket.end, ticket.since)

    def wait(self, ticket: Ticket, timeout: float) -> bool:
        """True once the records of the ticket may be acked; False after `timeout` seconds or on abort."""
        return self._ack_in_ring or self._ring.wait_committed(ticket.end, timeout, ticket.since)


STORED = Ticket(0, 0)


class StoreIntake:
    """A consumer's intake: `put` is a commit, so that there is nothing to wait for afterwards."""

    closed = False

    def __init__(self, store: Storage) -> None:
        self._store = store

    def put(self, block: Block, timeout: float) -> tuple[int, Ticket]:
        """Returns when the block is on disk, however long that takes. Raises StoreError if it is not."""
        self._store.append(block.runs, block.values)
        return len(block.values), STORED

    def stored(self, ticket: Ticket) -> bool:
        """What was put is stored."""
        return True

    def wait(self, ticket: Ticket, timeout: float) -> bool:
        """What was put is stored."""
        return True


def plain_block(values: "array[int]", source: bytes, first: int) -> Block:
    """Values that came without a source of their own, as records `first`, ... of `source`."""
    return Block([Run(source, first, len(values))] if values else [], values)
