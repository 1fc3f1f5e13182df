"""Intakes: where the ingest loop and HTTP requests put records, and how they learn that records are stored.

A publisher's intake is its ring; a consumer's is its store, which a thread of the intake, `commit`, feeds. Both take
blocks from the loop without blocking (`offer`), and from an HTTP request's thread, which waits (`put`, `wait`). A
*ticket* identifies a block that was taken.

`StoreIntake._lock` guards its queue. The condition `_filled` on it is notified when blocks are queued, and by `stop`.
`_emptied` is notified when a commit takes the queue, and by `stop`: requests wait on it for room. No commit runs
under the lock. A request waits for its block on a lock of its own, so that a commit wakes only the requests whose
records it has stored.

The only error that a commit may raise is StoreError. After any other error, `commit` ends the process: some blocks
would never get an outcome, or a wrong one.
"""

import logging
import threading
from array import array
from collections.abc import Callable, Iterable
from time import monotonic
from typing import Any, NamedTuple, Protocol

from ringbuffer import Closed, Full, Ring
from ringolib.storage.interface import Storage, StoreError
from ringolib.timing import deadline_after, fatal, start_thread, wait_until
from ringolib.wire import Block, Rest, Run

log = logging.getLogger("ringoexp.ingest")

MAX_QUEUED = 262_144
"""Records that wait for a commit before the loop reads no more, a run counted as RUN_COST records."""
RUN_COST = 64


class RingTicket(NamedTuple):
    """The ring's sequences `[since, end)`; values of other producers may be among them."""

    since: int
    end: int


class Intake(Protocol):
    """See the module's docstring. `closed` is true once no more is taken; records taken before are still stored.

    `name` says what the intake is, for people.
    """

    name: str

    @property
    def closed(self) -> bool: ...
    @property
    def room(self) -> int:
        """How many records would be taken now; at a consumer, roughly."""

    @property
    def aside_stored(self) -> int:
        """How many parts that were set aside, in spite of `passed`, have been stored since."""

    def offer(self, blocks: Iterable[Block | Rest]) -> list[tuple[Any, int]]:
        """Take blocks in order, without blocking: for each the ticket and how many of its records were taken.

        The list is shorter than `blocks`, or its last count is less than all, if there is no room for more. `blocks` is
        read once, and no further than to the first block that does not fit: the cost depends on the records taken.
        """

    def outcome(self, ticket: Any) -> bool | StoreError:
        """True if the records of the ticket are stored, False if that is not known yet, or the error."""

    def passed(self, ticket: Any) -> bool:
        """True if everything up to this ticket is stored, or set aside to be stored later, or has failed."""

    def join_tickets(self, older: Any, newer: Any) -> Any:
        """Return one ticket for both, or None if the intake itself limits the number of tickets."""

    def on_progress(self, listener: Callable[[], None]) -> None:
        """Have `listener` called, by any thread, when there may be new outcomes, or room."""

    def put(self, block: Block, timeout: float) -> tuple[int, Any]:
        """Take the block, waiting for room: how many records were taken within `timeout` seconds, and the ticket."""

    def wait(self, ticket: Any, timeout: float) -> bool:
        """True once the records of the ticket are stored; False after `timeout` seconds, or on abort.

        Raises StoreError if they were not stored. Only the thread that has put them may call.
        """

    def stop(self, timeout: float) -> None:
        """End the intake's own thread, if it has one."""


class RingIntake:
    """A publisher's intake. With `ack_in_ring` a record counts as stored as soon as it is in the ring (`-A ring`)."""

    name = "ring"

    def __init__(self, ring: Ring, ack_in_ring: bool = False) -> None:
        self._ring = ring
        self._ack_in_ring = ack_in_ring

    @property
    def closed(self) -> bool:
        """True once the ring takes nothing more."""
        return self._ring.closed

    @property
    def room(self) -> int:
        """See Intake."""
        return self._ring.committed + self._ring.capacity - self._ring.cursor

    @property
    def aside_stored(self) -> int:
        """See Intake."""
        return self._ring.aside_stored

    def on_progress(self, listener: Callable[[], None]) -> None:
        """See Intake."""
        self._ring.on_advance(listener)

    def offer(self, blocks: Iterable[Block | Rest]) -> list[tuple[RingTicket, int]]:
        """See Intake. Takes nothing once the ring is closed."""
        try:
            counts, start = self._ring.try_put(blocks)
        except Closed:
            return []
        taken = []
        for count in counts:
            taken.append((RingTicket(start, start + count), count))
            start += count
        return taken

    def passed(self, ticket: RingTicket) -> bool:
        """See Intake."""
        return self._ack_in_ring or self._ring.committed >= ticket.end

    def join_tickets(self, older: RingTicket, newer: RingTicket) -> RingTicket:
        """See Intake."""
        return RingTicket(older.since, newer.end)

    def outcome(self, ticket: RingTicket) -> bool:
        """See Intake. A worker tries until it has stored, so there is no error."""
        return self._ack_in_ring or self._ring.is_stored(ticket.since, ticket.end)

    def put(self, block: Block, timeout: float) -> tuple[int, RingTicket]:
        """See Intake."""
        deadline = monotonic() + timeout
        accepted, since = 0, self._ring.cursor
        end = since
        with memoryview(block.values) as values:
            for run in block.runs:
                part = values[accepted : accepted + run.count]
                left = max(0.0, deadline - monotonic())
                try:
                    end = self._ring.put(part, run.source, run.first, left)
                except (Full, Closed) as stop:
                    accepted += stop.accepted
                    end = self._ring.cursor  # Full and Closed carry no cursor; a later one only delays the ack
                    break
                finally:
                    part.release()
                accepted += run.count
        return accepted, RingTicket(since, end)

    def wait(self, ticket: RingTicket, timeout: float) -> bool:
        """See Intake."""
        return self._ack_in_ring or self._ring.wait_committed(ticket.since, ticket.end, timeout)

    def stop(self, timeout: float) -> None:
        """See Intake. It has no thread."""


class _Queued:
    """A block on its way into a commit, and its outcome once the commit has ended."""

    __slots__ = ("block", "outcome", "signal")

    def __init__(self, block: Block | Rest, signal: "threading.Lock | None" = None) -> None:
        self.block = block
        self.outcome: bool | StoreError = False
        self.signal = signal  # of a request that waits: a lock that is released once there is an outcome


class StoreIntake:
    """A consumer's intake. The thread `commit` stores all blocks that have gathered in one append.

    Raises ThreadError when there is no thread.
    """

    name = "queue of the store"
    aside_stored = 0

    def __init__(self, store: Storage) -> None:
        self._store = store
        self._listener: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._filled = threading.Condition(self._lock)
        self._emptied = threading.Condition(self._lock)
        # Guarded by _lock.
        self._queue: list[_Queued] = []
        self._cost = 0  # of the queue
        self._stopping = False
        self._thread = start_thread(self._run, name="commit")

    @property
    def room(self) -> int:
        """See Intake."""
        return MAX_QUEUED - self._cost  # one read of an int: no lock needed

    def on_progress(self, listener: Callable[[], None]) -> None:
        """See Intake."""
        self._listener = listener

    @property
    def closed(self) -> bool:
        """True once nothing more is taken."""
        return self._stopping

    def offer(self, blocks: Iterable[Block | Rest]) -> list[tuple[_Queued, int]]:
        """See Intake. There is no room while MAX_QUEUED records wait."""
        taken = []
        with self._lock:
            for block in blocks:
                if self._cost >= MAX_QUEUED or self._stopping:
                    break
                queued = _Queued(block)
                self._enqueue(queued)
                taken.append((queued, len(block.values)))
            if taken:
                self._filled.notify()
        return taken

    def passed(self, ticket: _Queued) -> bool:
        """See Intake."""
        return ticket.outcome is not False

    def join_tickets(self, older: _Queued, newer: _Queued) -> None:
        """See Intake. MAX_QUEUED bounds them."""

    def outcome(self, ticket: _Queued) -> bool | StoreError:
        """See Intake."""
        return ticket.outcome

    def put(self, block: Block, timeout: float) -> tuple[int, _Queued]:
        """See Intake."""
        signal = threading.Lock()
        signal.acquire()
        queued = _Queued(block, signal)
        deadline = deadline_after(timeout)
        with self._lock:
            wait_until(self._emptied, lambda: self._cost < MAX_QUEUED or self._stopping, deadline)
            if self._cost >= MAX_QUEUED or self._stopping:
                return 0, queued
            self._enqueue(queued)
            self._filled.notify()
        return len(block.values), queued

    def wait(self, ticket: _Queued, timeout: float) -> bool:
        """See Intake."""
        assert ticket.signal
        ticket.signal.acquire(timeout=max(0.0, timeout))
        outcome = ticket.outcome
        if isinstance(outcome, StoreError):
            # A new exception for each caller: raising one in several threads would mix their tracebacks.
            raise StoreError(str(outcome)) from outcome
        return outcome

    def stop(self, timeout: float) -> None:
        """End the thread once the queue is stored."""
        with self._lock:
            self._stopping = True
            self._filled.notify()
            self._emptied.notify_all()
        self._thread.join(timeout)

    def _enqueue(self, queued: _Queued) -> None:
        assert self._lock.locked()
        self._queue.append(queued)
        self._cost += len(queued.block.values) + RUN_COST * len(queued.block.runs)

    # The thread.

    def step(self) -> bool:
        """Wait for blocks and commit them all. False when the thread should end."""
        with self._lock:
            while not self._queue and not self._stopping:
                self._filled.wait()
            if not self._queue:
                return False
            group, self._queue, self._cost = self._queue, [], 0
            self._emptied.notify_all()
        self._commit(group)
        return True

    def _commit(self, group: list[_Queued]) -> None:
        outcome: bool | StoreError = True
        try:
            if len(group) == 1 and isinstance(group[0].block, Block):
                self._store.append(*group[0].block)
            else:
                values = array("q")
                for queued in group:
                    values.extend(queued.block.values)
                runs: list[Run] = [run for queued in group for run in queued.block.runs]
                self._store.append(runs, values)
        except StoreError as error:
            outcome = error
        for queued in group:
            queued.outcome = outcome
            if queued.signal:
                queued.signal.release()
        self._listener()

    def _run(self) -> None:
        try:
            while self.step():
                pass
        except BaseException:
            fatal(log, "the thread that commits")
