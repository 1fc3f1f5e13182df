"""The ring: a bounded buffer of 64-bit integers between many producers and many workers.

It lives in one `array('q')` and knows nothing of sockets or databases. Producers (connection
threads) `put`, workers `reserve` a batch, store it elsewhere and `commit` it, or `requeue` it.
A reserved slot is not free until it is committed: the ring is its own retry buffer.

Vocabulary (LMAX Disruptor, Linux kfifo): a *sequence* numbers what was ever put, from 0, and is
never reused; its *slot* is `sequence % capacity`; *cursor* counts what was ever put, *reserved*
what was ever handed out, and everything before *committed* is stored. At every release of the lock

    committed <= reserved <= cursor <= committed + capacity

A requeued batch may be *marked*, for good: then only workers that take its mark get it. What a mark is only they
know. As it may have to wait for long it is *set aside*: it has its own copy of its values, so its slots are free as
if it were stored, but nobody is told that it is, until it is. What is set aside is at most another `capacity` values;
a marked batch beyond that stays in its slots until there is room. So, precisely: everything before *committed* is
stored or set aside.

One `Lock` guards everything; three conditions share it, one for each kind of waiter:

- `_not_full`, producers in `put`: one is notified when slots are freed, and passes on what it leaves; all on close.
- `_not_empty`, workers in `reserve`: one is notified when there is something that any of them may have, and passes on
  what it leaves; all when it is marked, as one may not be the right one; all when there never will be anything
  (closed and drained).
- `_advanced`, in `wait_committed` and `join`: notified when `committed` grows, when what was set aside is stored, and
  on abort.

No thread runs here and nothing is done under the lock but copying.
"""

import bisect
import threading
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic
from typing import NamedTuple, TypeAlias

from ringolib.wire import Block, Run

Values: TypeAlias = "array[int] | memoryview[int]"


class Closed(Exception):
    """The ring takes no more values, or (`reserve`) has no more to give.

    `accepted` is how many values of a `put` are in the ring all the same.
    """

    def __init__(self, accepted: int = 0) -> None:
        super().__init__(f"the ring is closed; {accepted} values were accepted")
        self.accepted = accepted


class Full(TimeoutError):
    """The ring stayed full until `put`'s timeout. `accepted` values are in, and stay in."""

    def __init__(self, accepted: int) -> None:
        super().__init__(f"the ring is full; {accepted} values were accepted")
        self.accepted = accepted


class Batch:
    """One worker's contiguous range of the ring, `[start, end)`: a token, compared by identity.

    `values` is a copy, so it outlives the slots; `runs` says whose the values are, in order. `mark` says which workers
    may have it, once it was requeued with one.
    """

    __slots__ = ("start", "end", "runs", "values", "reserved_at", "mark")

    def __init__(self, start: int, end: int, runs: list[Run], reserved_at: float) -> None:
        self.start = start
        self.end = end
        self.runs = runs
        self.values = array("q")
        self.reserved_at = reserved_at  # the first time, monotonic seconds
        self.mark: object = None

    def __len__(self) -> int:
        return self.end - self.start


class RingStats(NamedTuple):
    """A snapshot under one hold of the lock, so that its numbers agree. Counts are of values."""

    capacity: int
    cursor: int  # ever put
    reserved: int  # ever handed out
    committed: int  # everything before it is stored, or set aside
    stored: int  # ever stored, those beyond a gap among them
    depth: int  # slots taken: cursor - committed
    backlog: int  # could be reserved now, but for what is set aside, as the following
    in_flight: int  # reserved, neither committed nor requeued
    high_water: int  # the largest depth ever
    times_full: int  # how often a put found no free slot
    oldest_in_flight: float  # seconds since the oldest batch that is not stored was first reserved, 0 if none


class RingLayout(NamedTuple):
    """Where in the ring what is, at one moment: ranges `[start, end)` of sequences, merged and in order."""

    capacity: int
    committed: int
    reserved: int
    cursor: int
    in_flight: list[tuple[int, int]]
    finished: list[tuple[int, int]]  # stored or set aside, and not free yet: older ones are neither


class Ring:
    """A ring of `capacity` slots. Raises ValueError when `capacity` is below 1."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"a ring has at least 1 slot, not {capacity}")
        self.capacity = capacity

        self._lock = threading.Lock()
        self._not_full = threading.Condition(self._lock)
        self._not_empty = threading.Condition(self._lock)
        self._advanced = threading.Condition(self._lock)

        # All below is guarded by _lock.
        self._slots = array("q", [0]) * capacity
        self._cursor = 0
        self._reserved = 0
        self._committed = 0
        self._runs: deque[Run] = deque()  # who owns [reserved, cursor)
        self._in_flight: dict[Batch, None] = {}  # oldest first
        self._requeued: list[Batch] = []  # for any worker, ordered by start
        self._marked: list[Batch] = []  # requeued with a mark, ordered by start
        self._aside: dict[Batch, None] = {}  # marked, waiting or in flight, and not in their slots any more
        self._aside_size = 0  # their values
        self._finished: dict[int, int] = {}  # start -> end of ranges committed, or set aside, beyond a gap
        self._idle = 0  # workers waiting in reserve
        self._closed = False
        self._aborted = False
        self._high_water = 0
        self._times_full = 0
        self._listener: Callable[[], None] = lambda: None  # set once, before there is traffic

    def put(self, values: Values, source: bytes, first: int, timeout: float | None = None) -> int:
        """Copies `values` in, as records `first`, ... of `source`, and returns the sequence after the last.

        Blocks while the ring is full; more values than fit go in piece by piece, so that pieces of
        other producers may come between. Raises Full after `timeout` seconds and Closed once the ring
        is closed; both carry how many values are in.
        """
        deadline = _deadline(timeout)
        total, done = len(values), 0
        with memoryview(values) as view, self._lock:
            while True:
                if self._closed:
                    raise Closed(done)
                piece = min(self._free(), total - done)
                if piece:
                    self._write(view[done : done + piece])
                    self._own(Run(source, first + done, piece))
                    self._not_empty.notify()
                done += piece
                if done == total:
                    if self._free():
                        self._not_full.notify()
                    return self._cursor
                self._times_full += 1
                if not _wait_until(self._not_full, lambda: self._closed or self._free() > 0, deadline):
                    raise Full(done)

    def try_put(self, blocks: Sequence[Block]) -> tuple[int, int]:
        """Copy in what fits of `blocks`, in order, the last of them perhaps in part. Never blocks.

        Return how many records are in, and the sequence of the first one: they lie together. Raises Closed once the
        ring is closed.
        """
        with self._lock:
            if self._closed:
                raise Closed
            first = self._cursor
            for block in blocks:
                size = len(block.values)
                free = self._free()
                if free < size:
                    self._times_full += 1
                    if free:
                        with memoryview(block.values) as view:
                            self._write(view[:free])
                        self._own_all(block.runs, free)
                    break
                self._write(block.values)
                self._own_all(block.runs, size)
            if self._cursor > first:
                self._not_empty.notify()
            return self._cursor - first, first

    def on_advance(self, listener: Callable[[], None]) -> None:
        """Have `listener` called after each commit, without the lock, by the thread that commits."""
        self._listener = listener

    def reserve(self, limit: int, timeout: float | None = None, takes: Callable[[object], bool] | None = None) -> Batch:
        """Hands out the oldest requeued batch, unchanged, or else up to `limit` of the next values.

        Marked ones only if it `takes` their mark; without it, all. That is called under the lock; what it says must not
        change from no to yes while the call blocks: nobody would wake it.

        Blocks while there is nothing. Raises TimeoutError after `timeout` seconds, and Closed when the
        ring is closed and everything is committed: until then a batch in flight may come back.
        """
        deadline = _deadline(timeout)
        with self._lock:
            self._idle += 1
            try:
                if not _wait_until(self._not_empty, lambda: self._reservable_or_over(takes), deadline):
                    raise TimeoutError("nothing to reserve")
            finally:
                self._idle -= 1
            if self._aborted:
                raise Closed
            now = monotonic()
            requeued = self._requeued[:1] + self._first_marked(takes)
            if requeued:
                batch = min(requeued, key=lambda each: each.start)
                (self._marked if batch.mark is not None else self._requeued).remove(batch)
            elif self._cursor == self._reserved:
                raise Closed
            else:
                end = min(self._cursor, self._reserved + limit)
                batch = Batch(self._reserved, end, self._disown(end - self._reserved), now)
                self._reserved = end
            self._in_flight[batch] = None
            if self._open():
                self._not_empty.notify()
            if batch.values:  # requeued: it has its copy
                return batch
        # Not under the lock: nobody writes these slots before this batch is committed.
        try:
            batch.values = self._read(batch.start, batch.end)
        except BaseException:  # no memory: whoever has it next reads again
            self.requeue(batch)
            raise
        return batch

    def commit(self, batch: Batch) -> None:
        """`batch` is stored. Frees the slots of the gapless prefix that is stored now, and wakes who waits for it.

        Raises ValueError unless `batch` is in flight (committed twice, or requeued).
        """
        with self._lock:
            self._land(batch)
            if batch in self._aside:
                del self._aside[batch]
                self._aside_size -= len(batch)
                for waiting in self._marked_in_slots():
                    self._set_aside(waiting)
                self._advanced.notify_all()
            else:
                self._finish(batch)
            if self._drained():
                self._not_empty.notify_all()
        self._listener()

    def requeue(self, batch: Batch, mark: object = None) -> None:
        """`batch` is not stored: hands it out again, before newer ones, with a mark to who takes that.

        It keeps a mark that it has. Raises ValueError as `commit` does.
        """
        with self._lock:
            self._land(batch)
            if mark is not None:
                batch.mark = mark
            if batch.mark is None:
                bisect.insort(self._requeued, batch, key=lambda other: other.start)
                self._not_empty.notify()
            else:
                bisect.insort(self._marked, batch, key=lambda other: other.start)
                self._not_empty.notify_all()
                if batch not in self._aside:
                    self._set_aside(batch)

    def is_stored(self, sequence: int, since: int = 0) -> bool:
        """True when everything before `sequence`, from `since` on, is stored."""
        if self._committed < sequence:  # one read of each: no lock needed, as nothing is set aside after it is passed
            return False
        if not self._aside:
            return True
        with self._lock:
            return self._is_stored(sequence, since)

    def wait_committed(self, sequence: int, timeout: float | None = None, since: int = 0) -> bool:
        """True once everything before `sequence`, from `since` on, is stored; False after `timeout` seconds or on
        abort.
        """
        deadline = _deadline(timeout)
        with self._lock:
            _wait_until(self._advanced, lambda: self._is_stored(sequence, since) or self._aborted, deadline)
            return self._is_stored(sequence, since)

    def close(self) -> None:
        """Takes no more puts; what is in is still handed out, and `reserve` ends when all is committed."""
        with self._lock:
            self._closed = True
            self._not_full.notify_all()
            self._not_empty.notify_all()
        self._listener()

    def abort(self) -> None:
        """Closes, and ends every wait at once: nobody waits any longer for what is not stored."""
        with self._lock:
            self._closed = self._aborted = True
            self._not_full.notify_all()
            self._not_empty.notify_all()
            self._advanced.notify_all()
        self._listener()

    def join(self, timeout: float | None = None) -> bool:
        """True once everything put is committed; False after `timeout` seconds or on abort."""
        deadline = _deadline(timeout)
        with self._lock:
            _wait_until(self._advanced, lambda: self._all_stored() or self._aborted, deadline)
            return self._all_stored()

    @property
    def committed(self) -> int:
        """Everything before this sequence is stored, or set aside."""
        return self._committed  # one read of an int: no lock needed

    @property
    def cursor(self) -> int:
        """How many values were ever put."""
        return self._cursor

    @property
    def closed(self) -> bool:
        """True when the ring takes no more values."""
        return self._closed

    @property
    def aborted(self) -> bool:
        """True when nobody shall wait any longer for what is not stored."""
        return self._aborted

    @property
    def wants_workers(self) -> bool:
        """True when values could be reserved by any worker, and none is waiting to do it."""
        with self._lock:
            return self._open() > 0 and self._idle == 0

    @property
    def has_marked(self) -> bool:
        """True while a marked batch waits."""
        return bool(self._marked)  # one read: no lock needed

    def has_for(self, takes: Callable[[object], bool]) -> bool:
        """True while a marked batch waits whose mark this takes."""
        with self._lock:
            return bool(self._first_marked(takes))

    def marks(self) -> list[tuple[object, int]]:
        """The mark of each batch that has one and is not stored, waiting or in flight, and its size."""
        with self._lock:
            marked = [*self._marked, *self._in_flight]
            return [(batch.mark, len(batch)) for batch in marked if batch.mark is not None]

    def stats(self) -> RingStats:
        """What the ring holds now."""
        with self._lock:
            depth = self._cursor - self._committed
            in_flight = sum(map(len, self._flying()))
            waiting = [*self._requeued, *self._marked_in_slots()]
            oldest = min((batch.reserved_at for batch in [*self._flying(), *waiting]), default=None)
            return RingStats(
                capacity=self.capacity,
                cursor=self._cursor,
                reserved=self._reserved,
                committed=self._committed,
                stored=self._committed - self._aside_size + sum(e - s for s, e in self._finished.items()),
                depth=depth,
                backlog=self._open() + sum(map(len, self._marked_in_slots())),
                in_flight=in_flight,
                high_water=self._high_water,
                times_full=self._times_full,
                oldest_in_flight=0.0 if oldest is None else monotonic() - oldest,
            )

    def layout(self) -> RingLayout:
        """Where what is. What is neither free, in flight nor finished waits to be reserved."""
        with self._lock:
            marks = self.capacity, self._committed, self._reserved, self._cursor
            in_flight = [(batch.start, batch.end) for batch in self._flying()]
            finished = list(self._finished.items())
        return RingLayout(*marks, _merged(in_flight), _merged(finished))

    # Helpers. All but _read want the lock held.

    def _free(self) -> int:
        return self._committed + self.capacity - self._cursor

    def _open(self) -> int:
        """How many values any worker may have."""
        return self._cursor - self._reserved + sum(map(len, self._requeued))

    def _flying(self) -> list[Batch]:
        """What is in flight, and in its slots; oldest first."""
        return [batch for batch in self._in_flight if batch not in self._aside]

    def _marked_in_slots(self) -> list[Batch]:
        return [batch for batch in self._marked if batch not in self._aside]

    def _first_marked(self, takes: Callable[[object], bool] | None) -> list[Batch]:
        """The oldest marked batch that is for who takes this, in a list, if there is one."""
        for batch in self._marked:
            if takes is None or takes(batch.mark):
                return [batch]
        return []

    def _is_stored(self, sequence: int, since: int) -> bool:
        if self._committed < sequence:
            return False
        return not any(batch.start < sequence and since < batch.end for batch in self._aside)

    def _all_stored(self) -> bool:
        return self._committed == self._cursor and not self._aside

    def _drained(self) -> bool:
        return self._closed and self._all_stored()

    def _set_aside(self, batch: Batch) -> None:
        """Frees the slots of a marked batch that waits, if there is room beside the ring."""
        assert self._lock.locked()
        if self._aside_size + len(batch) <= self.capacity:
            self._aside[batch] = None  # first: who sees the prefix grow must see this
            self._aside_size += len(batch)
            self._finish(batch)

    def _finish(self, batch: Batch) -> None:
        """`batch` needs its slots no more: frees those of the gapless prefix, and wakes who waits for it."""
        assert self._lock.locked()
        if batch.start != self._committed:
            self._finished[batch.start] = batch.end
            return
        self._committed = batch.end
        while self._committed in self._finished:
            self._committed = self._finished.pop(self._committed)
        # One takes what it needs and passes the rest on: were all woken, most would find nothing.
        self._not_full.notify()
        self._advanced.notify_all()

    def _reservable_or_over(self, takes: Callable[[object], bool] | None) -> bool:
        return self._open() > 0 or bool(self._first_marked(takes)) or self._drained() or self._aborted

    def _write(self, values: Values) -> None:
        """Copies `values`, which fit, to the slots at the cursor and moves it."""
        assert self._lock.locked()
        slot = self._cursor % self.capacity
        size = len(values)
        if size == 1:
            self._slots[slot] = values[0]
        else:
            head = min(size, self.capacity - slot)
            with memoryview(self._slots) as slots, memoryview(values) as view:
                slots[slot : slot + head] = view[:head]
                slots[: size - head] = view[head:]
        self._cursor += size
        self._high_water = max(self._high_water, self._cursor - self._committed)

    def _read(self, start: int, end: int) -> "array[int]":
        """A copy of the values `[start, end)`, which must be reserved and not yet committed."""
        slot = start % self.capacity
        head = min(end - start, self.capacity - slot)
        values = self._slots[slot : slot + head]
        values.extend(self._slots[: end - start - head])
        return values

    def _own(self, run: Run) -> None:
        """Notes whose the newest values are; a run that continues its neighbour becomes one with it."""
        assert self._lock.locked()
        if self._runs:
            last = self._runs[-1]
            if last.source == run.source and last.first + last.count == run.first:
                self._runs[-1] = last._replace(count=last.count + run.count)
                return
        self._runs.append(run)

    def _own_all(self, runs: Sequence[Run], count: int) -> None:
        """Note whose the newest `count` values are, by the first of these runs."""
        for run in runs:
            if run.count >= count:
                self._own(run if run.count == count else run._replace(count=count))
                return
            self._own(run)
            count -= run.count

    def _disown(self, count: int) -> list[Run]:
        """Takes the runs of the oldest `count` unreserved values, cutting the last one where they end."""
        assert self._lock.locked()
        taken = []
        while count:
            run = self._runs.popleft()
            if run.count > count:
                self._runs.appendleft(Run(run.source, run.first + count, run.count - count))
                run = run._replace(count=count)
            taken.append(run)
            count -= run.count
        return taken

    def _land(self, batch: Batch) -> None:
        """Takes `batch` out of flight. Raises ValueError if it is not there."""
        assert self._lock.locked()
        if batch not in self._in_flight:
            raise ValueError(f"batch {batch.start}..{batch.end} is not in flight")
        del self._in_flight[batch]


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Disjoint ranges in order, neighbours made one."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else monotonic() + timeout


def _wait_until(condition: threading.Condition, predicate: Callable[[], bool], deadline: float | None) -> bool:
    """Waits on `condition`, whose lock is held, until `predicate()` or the deadline; the predicate's last value."""
    while not predicate():
        left = None if deadline is None else deadline - monotonic()
        if left is not None and left <= 0:
            return False
        condition.wait(left)
    return True
