"""Group commit: blocks that arrive during a commit are committed together by the next one.

Every store builds on this. There is no writer thread: any thread may call `append`, which queues its block. The first
caller becomes the leader: it commits the queued blocks in one transaction and wakes their callers. Other work on the
database, for example a deletion, needs an exclusive turn. The turn is in one of four states (`Turn`):

            append: the caller            commit ends, and
            becomes the leader            an exclusive caller waits
      +----------------------> COMMIT ------------------------+
      |                          |                            |
      |   commit ends, and       |                            v
    FREE <--- none waits --------+                        RESERVED
     ^|                                                       |
     ||   _exclusive, if the queue                            | an exclusive caller
     ||   is empty                                            | takes the turn
     |+----------------------> EXCLUSIVE <--------------------+
     |                           |
     +------ work ends ----------+

RESERVED keeps new leaders out until an exclusive caller has taken the turn. After an exclusive turn, the queued blocks
are committed before the next exclusive caller gets the turn. So commits and exclusive work alternate while both wait,
and neither starves the other. Once the store is closed, an exclusive caller gives the turn back and raises StoreError.

`_lock` guards the queue, the turn and the totals. Two conditions share it:

- `_turn_ended` is notified at the end of each turn and wakes all its waiters: callers of `append`, which wait for the
  turn or for the commit of their block; callers of `_exclusive`, which wait for the turn; and `_close`.
- `_group_ready` is notified when the queue is large enough to commit, and on close. Only the leader waits on it.

The database connection belongs to the thread that holds the turn, and needs no lock.

If SQL or the disk fails, so does the commit, with a StoreError. After an error in the bookkeeping around it, callers
might get a wrong outcome, or none. So an error there ends the process (`timing.fatal`).
"""

import enum
import logging
import threading
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import NamedTuple

from ringolib.counters import Histogram
from ringolib.storage.interface import StoreError, StoreStats
from ringolib.timing import fatal
from ringolib.wire import Run

log = logging.getLogger("ringoexp.store")


class Turn(enum.Enum):
    """The state of the turn; see the diagram above."""

    FREE = enum.auto()
    COMMIT = enum.auto()  # a leader gathers and commits blocks
    RESERVED = enum.auto()  # the next turn belongs to an exclusive caller
    EXCLUSIVE = enum.auto()


class PendingBlock:
    """A block from its arrival until its commit. The store's lock guards `done` and `error`."""

    __slots__ = ("runs", "values", "cost", "arrived_at", "done", "error")

    def __init__(self, runs: Sequence[Run], values: "array[int]", run_cost: int) -> None:
        self.runs = runs
        self.values = values
        self.cost = len(values) + run_cost * (len(runs) - 1)
        self.arrived_at = monotonic()
        self.done = False
        self.error: StoreError | None = None


class CommitResult(NamedTuple):
    """The result of a commit: new and duplicate records, and how many records the database holds afterwards."""

    stored: int
    duplicates: int
    held: int


class GroupCommit(ABC):
    """The part of a store that queues blocks, gives turns and counts. A subclass adds the database.

    `path` is the store's name for people.
    """

    MAX_GROUP_COST: int
    """A commit takes no more blocks once their cost reaches this, so that callers do not wait long. In records."""
    RUN_COST: int
    """The cost of each run after a block's first, in records."""
    SLOW_COMMIT_SECONDS: float
    """A commit that takes this long is logged as slow."""
    power_safe = True

    def __init__(self, path: str) -> None:
        self.path = path

        self._lock = threading.Lock()
        self._turn_ended = threading.Condition(self._lock)
        self._group_ready = threading.Condition(self._lock)
        # Guarded by _lock.
        self._queue: list[PendingBlock] = []
        self._queued_cost = 0
        self._turn = Turn.FREE
        self._exclusive_waiting = 0  # callers of _exclusive that wait for their turn
        self._closed = False
        self._stored = 0
        self._duplicates = 0
        self._held = 0
        self._commits = 0
        self._failed_commits = 0
        self._error: str | None = None
        self._commit_times = Histogram()
        # Monotonic times of the last commits of records; checks and exclusive work do not count.
        self._started_at = self._succeeded_at = self._failed_at = float("-inf")

        # Used only by the thread that holds the turn.
        self._failing_since = 0.0  # monotonic seconds; 0 while commits succeed

    def append(self, runs: Sequence[Run], values: "array[int]") -> None:
        """Return when every record of the block is on disk, whether this call or an earlier one stored it.

        Raises StoreError if any record may not be on disk; the caller may retry the block.
        """
        block = PendingBlock(runs, values, self.RUN_COST)
        with self._lock:
            self._check_open()
            self._queue.append(block)
            self._queued_cost += block.cost
            if self._gather_seconds() <= 0:
                self._group_ready.notify()
        while group := self._lead_unless_done(block):
            self._commit(group)
            if block in group:  # this thread has set its outcome
                break
        if block.error:
            # A new exception for each caller: raising one exception in several threads would mix their tracebacks.
            raise StoreError(str(block.error)) from block.error

    def stats(self) -> StoreStats:
        """Return a consistent snapshot, without waiting for a running commit."""
        with self._lock:
            return StoreStats(
                self._stored,
                self._duplicates,
                self._commits,
                self._failed_commits,
                self._error,
                self._held,
                self._commit_times.snapshot(),
                self.power_safe,
            )

    # Implemented by subclasses. The thread that holds the turn calls these, without the lock unless stated.

    @abstractmethod
    def _write(self, group: list[PendingBlock]) -> CommitResult:
        """Return when every record of `group` is on disk. May raise any exception."""

    @abstractmethod
    def _describe_failure(self, cause: BaseException) -> StoreError:
        """Return an error for the callers of a failed commit, and forget cached state that may now be wrong."""

    def _gather_seconds(self) -> float:
        """Return how many seconds the leader still waits for more blocks; 0 or less means no longer. Needs the lock."""
        assert self._lock.locked()
        return 0.0

    def _slow_commit_details(self) -> dict[str, object]:
        """Return more fields for the log line of a slow commit."""
        return {}

    # For subclasses.

    def _committed_within(self, seconds: float) -> bool:
        """True if a commit of records succeeded in the last `seconds`, and none has failed since.

        Raises StoreError if the store is closed.
        """
        with self._lock:
            self._check_open()
            return monotonic() - self._succeeded_at < seconds and not self._error

    def _set_held(self, held: int) -> None:
        """Set the number of records in the database, after exclusive work has counted them."""
        with self._lock:
            self._held = held

    def _check_open(self) -> None:
        """Raise StoreError if the store is closed. Needs the lock."""
        assert self._lock.locked()
        if self._closed:
            raise StoreError(f"{self.path} is closed")

    def _close(self) -> bool:
        """Refuse new work, and wait until no work runs and the queue is empty. Return True on the first call.

        Waiting exclusive callers raise StoreError.
        """
        with self._lock:
            first, self._closed = not self._closed, True
            self._group_ready.notify_all()
            while self._turn in (Turn.COMMIT, Turn.EXCLUSIVE) or self._queue:
                self._turn_ended.wait()
        return first

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Hold the turn for work other than a commit. Raises StoreError if the store is closed."""
        with self._lock:
            self._exclusive_waiting += 1
            try:
                while not (self._turn is Turn.RESERVED or self._turn is Turn.FREE and not self._queue):
                    self._turn_ended.wait()
            except BaseException:  # for example MemoryError: there may be no other caller that takes a reserved turn
                if self._turn is Turn.RESERVED and self._exclusive_waiting == 1:
                    self._end_turn()
                raise
            finally:
                self._exclusive_waiting -= 1
            if self._closed:
                self._end_turn()  # it may have been reserved, and queued blocks are still committed
            self._check_open()
            self._turn = Turn.EXCLUSIVE
        try:
            yield
        finally:
            try:
                with self._lock:
                    self._end_turn()
            except BaseException:  # the turn would never end
                fatal(log, "a turn at the database")

    # Turns.

    def _lead_unless_done(self, block: PendingBlock) -> list[PendingBlock]:
        """Wait until `block` is committed or the turn is free. Then lead, and return the group to commit.

        Returns an empty list if the block is committed, or has failed; then the turn is not taken.
        """
        with self._lock:
            leads = False
            try:
                while self._turn is not Turn.FREE and not block.done:
                    self._turn_ended.wait()
                if block.done:
                    return []
                self._turn, leads = Turn.COMMIT, True
                while not self._closed and (seconds := self._gather_seconds()) > 0:
                    self._group_ready.wait(seconds)
                self._started_at = monotonic()
                return self._next_group()
            except BaseException:  # for example MemoryError: the other callers go on without this block
                if block in self._queue:
                    self._queue.remove(block)
                    self._queued_cost -= block.cost
                if leads:
                    self._end_turn()
                raise

    def _next_group(self) -> list[PendingBlock]:
        """Take the oldest blocks from the queue: one, and more until their cost reaches MAX_GROUP_COST."""
        assert self._lock.locked()
        count, cost = 0, 0
        while count < len(self._queue) and cost < self.MAX_GROUP_COST:
            cost += self._queue[count].cost
            count += 1
        group, rest = self._queue[:count], self._queue[count:]
        self._queue, self._queued_cost = rest, self._queued_cost - cost
        return group

    def _end_turn(self, successor: Turn = Turn.FREE) -> None:
        """End the turn and wake all waiting callers: their blocks may be done, or they may get the turn."""
        assert self._lock.locked()
        self._turn = successor
        self._turn_ended.notify_all()

    # Commits.

    def _commit(self, group: list[PendingBlock]) -> None:
        """Write `group`, set the outcome of its blocks, end the turn and log, in this order: the log may fail."""
        slow = None
        try:
            started = monotonic()
            result, error = self._try_to_write(group)
            seconds = monotonic() - started
            failing_since = self._note_outcome(error)
            if seconds >= self.SLOW_COMMIT_SECONDS:
                records = sum(len(block.values) for block in group)
                slow = {"seconds": round(seconds, 3), "records": records, **self._slow_commit_details()}
            with self._lock:
                self._count_commit(result, error, seconds)
                for block in group:
                    block.done, block.error = True, error
                self._end_turn(Turn.RESERVED if self._exclusive_waiting else Turn.FREE)
        except BaseException:
            fatal(log, "the commit of a group")
        self._log_outcome(error, failing_since, slow)

    def _try_to_write(self, group: list[PendingBlock]) -> tuple[CommitResult | None, StoreError | None]:
        """Write `group`. Return the result, or None and the error for its callers."""
        try:
            return self._write(group), None
        except BaseException as cause:
            error = self._describe_failure(cause)
            error.__cause__ = cause
            return None, error

    def _count_commit(self, result: CommitResult | None, error: StoreError | None, seconds: float) -> None:
        """Add a commit to the totals; `result` is None if it failed."""
        assert self._lock.locked()
        if result:
            self._stored += result.stored
            self._duplicates += result.duplicates
            self._held = result.held
            self._commits += 1
            self._commit_times.add(seconds)
            self._succeeded_at = monotonic()
        else:
            self._failed_commits += 1
            self._failed_at = monotonic()
        self._error = str(error) if error else None

    def _note_outcome(self, error: StoreError | None) -> float:
        """Note whether commits fail. Return since when they failed before, for `_log_outcome` after the turn."""
        failing_since = self._failing_since
        self._failing_since = (failing_since or monotonic()) if error else 0.0
        return failing_since

    # After the turn, without the lock.

    def _log_outcome(
        self, error: StoreError | None, failing_since: float, slow: Mapping[str, object] | None = None
    ) -> None:
        """Log when commits begin to fail and when they succeed again, but not every failure, and log a slow commit.

        Never raises: a failing handler of the log must not change the outcome that the callers get.
        """
        try:
            if error and error.__cause__:
                log.debug("commit_failed", exc_info=error.__cause__)
            if error and not failing_since:
                log.error("store_failing", {"reason": str(error)})
            elif failing_since and not error:
                log.info("store_ok", {"failing_seconds": round(monotonic() - failing_since, 1)})
            if slow:
                log.warning("slow_commit", slow)
        except Exception:
            pass
        if error and error.__cause__:
            # The frames of the traceback refer to the blocks, and the blocks to this error.
            error.__cause__.__traceback__ = None
