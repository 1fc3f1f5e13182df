"""Group commit: what callers bring is gathered, and written together by one of them. Each store builds on it.

Any thread may `append`. There is no writer thread: the first to come leads, writes what has gathered until then and
wakes the others; who comes meanwhile waits and is written by the next leader. A leader may first wait for more. Other
work than a commit has its turn after a commit at most, however many wait, and then it is the commits' turn again.

`_lock` guards the queue, the leadership and the totals. Two conditions share it: `_turn` is notified when a turn ends,
and who waits for one, or for its records, waits on that; `_gathered` when there is enough to write, or no reason to
wait any more, and the leader alone waits on that. What a store writes with belongs to the leader, without a lock.
"""

import logging
import threading
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import NamedTuple

from ringolib.counters import Histogram
from ringolib.storage.interface import StoreError, StoreStats
from ringolib.wire import Run

log = logging.getLogger("ringoexp.store")


class PendingBlock:
    """One caller's block on its way into a commit; `done` and `error` are guarded by the lock."""

    __slots__ = ("runs", "values", "cost", "since", "done", "error")

    def __init__(self, runs: Sequence[Run], values: "array[int]", run_cost: int) -> None:
        self.runs = runs
        self.values = values
        self.cost = len(values) + run_cost * (len(runs) - 1)
        self.since = monotonic()
        self.done = False
        self.error: StoreError | None = None


class CommitResult(NamedTuple):
    """What a commit did, in records, and how many there are after it."""

    stored: int
    duplicates: int
    held: int


class GroupCommit(ABC):
    """The half of a store that gathers and counts; the other half, which knows the database, is the subclass.

    `path` is the store's name, for people.
    """

    MAX_GROUPED: int
    """Records after which a commit takes no more blocks along, so that nobody waits long; a run counts as RUN_COST."""
    RUN_COST: int
    SLOW: float
    """Seconds from which on a commit is said to be slow."""
    power_safe = True

    def __init__(self, path: str) -> None:
        self.path = path

        self._lock = threading.Lock()
        self._turn = threading.Condition(self._lock)
        self._gathered = threading.Condition(self._lock)
        # Guarded by _lock.
        self._queue: list[PendingBlock] = []
        self._queued = 0  # their cost
        self._leading = False
        self._others = 0  # callers that wait for the lead, for other work than a commit
        self._exclusive_next = False  # the next lead is one of theirs
        self._closed = False
        self._stored = 0
        self._duplicates = 0
        self._held = 0
        self._commits = 0
        self._failed_commits = 0
        self._error: str | None = None
        self._commit_times = Histogram()
        self._began_at = self._committed_at = self._failed_at = float("-inf")  # commits of records, monotonic seconds

        # The leader's.
        self._failing_since = 0.0  # monotonic seconds, 0 while commits succeed

    def append(self, runs: Sequence[Run], values: "array[int]") -> None:
        """Returns when every record of the block is on disk, now or from an earlier time.

        Raises StoreError when that cannot be said; the block may be tried again.
        """
        mine = PendingBlock(runs, values, self.RUN_COST)
        with self._lock:
            self._check_open()
            self._queue.append(mine)
            self._queued += mine.cost
            if self._pace() <= 0:
                self._gathered.notify()
        while True:
            with self._lock:
                while (self._leading or self._exclusive_next) and not mine.done:
                    self._turn.wait()
                if mine.done:
                    break
                self._leading = True
                try:
                    while not self._closed and (left := self._pace()) > 0:
                        self._gathered.wait(left)
                    group = self._next_group()
                except BaseException:  # no memory, say: others lead then, and write what is theirs
                    self._queue.remove(mine)
                    self._queued -= mine.cost
                    self._leading = False
                    self._turn.notify_all()
                    raise
                self._began_at = monotonic()
            self._commit(group)
        if mine.error:
            # A new one for each caller: a traceback grows on whatever is raised.
            raise StoreError(str(mine.error)) from mine.error

    def stats(self) -> StoreStats:
        """What there is now, and the totals since the store was opened."""
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

    @abstractmethod
    def _write(self, group: list[PendingBlock]) -> CommitResult:
        """Has every record of `group` on disk, or raises whatever went wrong. The leader calls it."""

    @abstractmethod
    def _failed(self, cause: BaseException) -> StoreError:
        """What went wrong with a commit, in a line. The leader calls it: what it knows of the database may be wrong."""

    def _pace(self) -> float:
        """For how many seconds a leader should still wait for more; 0 or less: no longer."""
        assert self._lock.locked()
        return 0.0

    def _slow(self) -> dict[str, object]:
        """What else to say of a slow commit."""
        return {}

    def _check_open(self) -> None:
        assert self._lock.locked()
        if self._closed:
            raise StoreError(f"{self.path} is closed")

    def _committed_within(self, seconds: float) -> bool:
        """True when a commit of records has succeeded so shortly ago, and none failed since. Raises StoreError once
        it is closed.
        """
        with self._lock:
            self._check_open()
            return monotonic() - self._committed_at < seconds and not self._error

    def _close(self) -> bool:
        """Returns when nobody leads or waits any more, and nobody can begin to. True the first time."""
        with self._lock:
            already, self._closed = self._closed, True
            self._gathered.notify_all()
            while self._leading or self._queue:
                self._turn.wait()
        return not already

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """The lead, for other work than a commit. Raises StoreError once it is closed."""
        with self._lock:
            self._others += 1
            while self._leading or (self._queue and not self._exclusive_next):
                self._turn.wait()
            self._others -= 1
            self._exclusive_next = False
            if self._closed:
                self._turn.notify_all()  # what waits here is for the commits then
            self._check_open()
            self._leading = True
        try:
            yield
        finally:
            with self._lock:
                self._leading = False
                self._turn.notify_all()

    def _next_group(self) -> list[PendingBlock]:
        """Takes the oldest of the queue, up to MAX_GROUPED, or one."""
        assert self._lock.locked()
        count, cost = 0, 0
        while count < len(self._queue) and cost < self.MAX_GROUPED:
            cost += self._queue[count].cost
            count += 1
        group, self._queue = self._queue[:count], self._queue[count:]
        self._queued -= cost
        return group

    def _commit(self, group: list[PendingBlock]) -> None:
        """Writes `group`, says so to each of it and gives up the lead."""
        written: CommitResult | None = None
        error: StoreError | None = StoreError(f"{self.path}: the commit broke off")
        started = monotonic()
        try:
            written, error = self._write(group), None
        except BaseException as cause:
            log.debug("commit_failed", exc_info=True)
            error = self._failed(cause)
            error.__cause__ = cause.with_traceback(None)  # whose frames hold the blocks, and those this error
        finally:
            self._note(error)
            seconds = monotonic() - started
            if seconds >= self.SLOW:
                records = sum(len(waiting.values) for waiting in group)
                log.warning("slow_commit", {"seconds": round(seconds, 3), "records": records, **self._slow()})
            with self._lock:
                if written:
                    self._stored += written.stored
                    self._duplicates += written.duplicates
                    self._held = written.held
                    self._commits += 1
                    self._commit_times.add(seconds)
                    self._committed_at = monotonic()
                else:
                    self._failed_commits += 1
                    self._failed_at = monotonic()
                self._error = str(error) if error else None
                for waiting in group:
                    waiting.done, waiting.error = True, error
                self._leading = False
                self._exclusive_next = self._others > 0
                self._turn.notify_all()

    def _note(self, error: StoreError | None) -> None:
        """Says in the log when commits begin to fail, and when they succeed again: not once for each."""
        if error and not self._failing_since:
            self._failing_since = monotonic()
            log.error("store_failing", {"reason": str(error)})
        elif self._failing_since and not error:
            log.info("store_ok", {"failing_seconds": round(monotonic() - self._failing_since, 1)})
            self._failing_since = 0.0
