"""The ring: a bounded buffer of 64-bit integers between many producers and many workers.

Producers `put` values. A worker reserves a batch with `reserve`, stores it elsewhere, and calls `commit`; if the batch
could not be stored, it calls `requeue`. A slot stays taken until its value is committed, so the ring is its own retry
buffer. The values are in one `array('q')`. The ring knows nothing of sockets, databases or destinations.

The vocabulary is the LMAX Disruptor's. A *sequence* numbers the values in the order of their arrival, from 0, and is
never reused. The value with sequence `s` is in slot `s % capacity`. Three sequences divide the ring:

    committed             reserved             cursor             committed + capacity
        |  handed to workers  |  not reserved yet  |        free         |

- *cursor* is the sequence of the next value: how many values were ever put. Producers copy their values to the slots
  from here on, then move the cursor. Both happen under the lock, so no slot is ever claimed and not yet published.
- *reserved* is how many values were ever handed to workers. A batch before it is in flight, which means that a worker
  has it, or requeued, or finished.
- *committed* is the gating sequence: every value before it has left the ring. Producers must not overtake it by more
  than one round. Batches finish in any order. If a batch finishes before an older one, the ring remembers it, and frees
  the slots of both when the older one finishes.

Whenever the lock is free, `committed <= reserved <= cursor <= committed + capacity`.

The worker of a batch may have to wait for a long time until it is known whether the batch is stored. So it may *set the
batch aside*: the batch has a copy of its values, and its slots become free as if it were stored. The batch stays in
flight, and does not count as stored until it is committed. At most `capacity` values are set aside. A batch that finds
no room there stays in its slots until there is room. So every value before *committed* is either stored or set aside.

One lock guards everything. Three conditions share it, beside the waiters:

- `_not_full`: producers wait in `put` for free slots. When slots become free, one producer is notified, and it notifies
  the next one if it leaves some. Waking all of them would cause a thundering herd. `close` notifies all.
- `_not_empty`: workers wait in `reserve`. If there are values, one worker is notified, and it notifies the next one if
  it leaves some. All are notified by `interrupt`, and at the end, when the ring is closed and everything is stored.
- `_stored`: callers of `join` wait for all values to be stored. All are notified when `committed` grows, when a batch
  that was set aside is stored, and by `abort`.
- `_waiters`, for `wait_committed`: each caller has a lock of its own to wait on, so that a commit wakes those whose
  values it stores, and no others. `abort` wakes all. A waiter that was woken too early waits again.

The ring runs no thread. Nothing but bookkeeping and copying is done under the lock.

If a method raises, for example MemoryError, the ring is as it was. So each method first does what may fail: it copies
values to slots that are still free, allocates, adds entries, and notifies. Then it changes what remains, which cannot
fail: it assigns and removes. Entries that were added are removed again if a later step fails. A thread that is notified
too early finds nothing, and waits again.
"""

import bisect
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from math import inf
from typing import NamedTuple, TypeAlias

from ringolib.timing import RUNTIME, Runtime
from ringolib.wire import Block, Rest, Run

Values: TypeAlias = "array[int] | memoryview[int]"


class Closed(Exception):
    """The ring is closed: it takes no more values, or `reserve` has no more to give.

    `accepted` is how many values of a `put` are in the ring nevertheless.
    """

    def __init__(self, accepted: int = 0) -> None:
        super().__init__(f"the ring is closed; {accepted} values were accepted")
        self.accepted = accepted


class Full(Exception):
    """The ring was full until the timeout of `put`. The first `accepted` values are in the ring, and stay there."""

    def __init__(self, accepted: int) -> None:
        super().__init__(f"the ring is full; {accepted} values were accepted")
        self.accepted = accepted


class Interrupted(Exception):
    """A call of `interrupt` has ended the wait of `reserve`."""


class Batch:
    """The values `[start, end)` of the ring, handed out to one worker at a time. Batches are compared by identity.

    `values` is a copy, so it stays valid when the slots are reused. `runs` names the sources of the values, in order.
    """

    __slots__ = ("start", "end", "runs", "values", "reserved_at")

    def __init__(self, start: int, end: int, runs: list[Run], values: "array[int]", reserved_at: float) -> None:
        self.start = start
        self.end = end
        self.runs = runs
        self.values = values
        self.reserved_at = reserved_at  # monotonic seconds, the first time

    def __len__(self) -> int:
        return self.end - self.start


class _Waiter:
    """A thread that waits until the values `[start, end)` are stored."""

    __slots__ = ("start", "end", "_signal")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self._signal = threading.Lock()
        self._signal.acquire()

    def wait(self, timeout: float) -> None:
        """Wait for `wake`, for at most `timeout` seconds."""
        self._signal.acquire(timeout=-1 if timeout == inf else min(timeout, threading.TIMEOUT_MAX))

    def wake(self) -> None:
        """End the wait. Called once."""
        self._signal.release()

    def overlaps(self, batches: "list[Batch]") -> bool:
        """True if it waits for values of one of these batches."""
        return any(batch.start < self.end and self.start < batch.end for batch in batches)


class RingStats(NamedTuple):
    """A snapshot of the ring. All numbers are from one moment, and count values."""

    capacity: int
    cursor: int  # ever put
    reserved: int  # ever handed to workers
    committed: int  # all before it are stored or set aside
    stored: int  # ever stored, including those after a gap
    depth: int  # slots taken: cursor - committed
    backlog: int  # in slots, and waiting for a worker
    in_flight: int  # in slots, and in the hands of a worker
    high_water: int  # the largest depth ever
    times_full: int  # how often a put found no free slot
    oldest_in_flight: float  # seconds since the oldest reserved batch still in its slots was first reserved, or 0


class RingLayout(NamedTuple):
    """The use of the slots at one moment. Ranges are `[start, end)` of sequences, merged and in order."""

    capacity: int
    committed: int
    reserved: int
    cursor: int
    in_flight: list[tuple[int, int]]
    finished: list[tuple[int, int]]  # stored or set aside; not free yet, because an older batch is unfinished
    highest: int  # the largest depth since the previous layout


class Ring:
    """A ring of `capacity` slots. Raises ValueError if `capacity` is below 1."""

    def __init__(self, capacity: int, runtime: Runtime = RUNTIME) -> None:
        if capacity < 1:
            raise ValueError(f"a ring has at least 1 slot, not {capacity}")
        self.capacity = capacity
        self._runtime = runtime

        self._lock = threading.Lock()
        self._not_full = runtime.condition(self._lock)
        self._not_empty = runtime.condition(self._lock)
        self._stored = runtime.condition(self._lock)

        # All below is guarded by _lock.
        self._slots = array("q", [0]) * capacity
        self._cursor = 0
        self._reserved = 0
        self._committed = 0
        self._runs: deque[Run] = deque()  # the sources of [reserved, cursor)
        self._in_flight: dict[Batch, None] = {}  # in the hands of workers; oldest first
        self._requeued: list[Batch] = []  # waiting for any worker, ordered by start
        self._aside: dict[Batch, None] = {}  # in flight or requeued, and no longer in their slots
        self._aside_size = 0  # how many values these have
        self._crowded: dict[Batch, None] = {}  # in flight, and to be set aside once there is room
        self._waiters: list[_Waiter] = []  # ordered by end
        self._finished: dict[int, int] = {}  # start -> end of ranges stored or set aside, after a gap
        self._idle_workers = 0  # waiting in reserve
        self._interrupts = 0  # calls of `interrupt`
        self._aside_stored = 0  # commits of batches that were set aside
        self._closed = False
        self._aborted = False
        self._high_water = 0
        self._highest = 0  # the largest depth since the last `layout`
        self._times_full = 0
        self._listener: Callable[[], None] = lambda: None  # set once, before there is traffic

    def put(self, values: Values, source: bytes, first: int, timeout: float | None = None) -> int:
        """Copy `values` into the ring, as records `first`, ... of `source`. Return the cursor.

        If the ring is full, wait up to `timeout` seconds. If the values do not fit at once, they go in piece by piece,
        and values of other producers may come between the pieces. Raises Full after the timeout, and Closed if the
        ring is closed. Both report how many values are in the ring. After any other error, the piece that failed is not
        in the ring, and pieces before it are.
        """
        deadline = self._runtime.deadline_after(timeout)
        total, done = len(values), 0
        with memoryview(values) as view, self._lock:
            try:
                while True:
                    if self._closed:
                        raise Closed(done)
                    piece = min(self._free(), total - done)
                    if piece:
                        self._write(view[done : done + piece], self._cursor)
                        runs = self._last_run()
                        _append_run(runs, Run(source, first + done, piece))
                        if self._free() > piece:
                            self._not_full.notify()
                        self._publish(runs, piece)
                    done += piece
                    if done == total:
                        return self._cursor
                    self._times_full += 1
                    if not self._runtime.wait_until(self._not_full, lambda: self._closed or self._free() > 0, deadline):
                        raise Full(done)
            except BaseException:
                if self._free():
                    self._not_full.notify()  # this thread may have been the only one that was notified
                raise

    def try_put(self, blocks: Iterable[Block | Rest]) -> tuple[list[int], int]:
        """Copy in as much of `blocks` as fits, in order; the last block may be cut. Never blocks.

        Return how many records of each block are in, as far as any fit, and the sequence of the first one: they are
        contiguous. Blocks behind the first one that does not fit are not looked at. Raises Closed once the ring is
        closed.
        """
        with self._lock:
            if self._closed:
                raise Closed
            free = self._free()
            runs = self._last_run()
            counts = []
            count = 0
            is_full = False
            for block in blocks:
                size = len(block.values)
                if free < count + size:
                    is_full = True
                    if rest := free - count:
                        with memoryview(block.values) as view:
                            self._write(view[:rest], self._cursor + count)
                        _append_runs(runs, block.runs, rest)
                        counts.append(rest)
                        count = free
                    break
                self._write(block.values, self._cursor + count)
                _append_runs(runs, block.runs, size)
                counts.append(size)
                count += size
            result = counts, self._cursor
            if count:
                self._publish(runs, count)
            self._times_full += is_full
            return result

    def on_advance(self, listener: Callable[[], None]) -> None:
        """Have `listener` called, without the lock, after each `commit`, `set_aside`, `close` and `abort`.

        Call this once, before any put.
        """
        self._listener = listener

    def reserve(self, limit: int, timeout: float | None = None, interrupts: int | None = None) -> Batch:
        """Return the oldest requeued batch, unchanged, or else a batch of up to `limit` of the next values.

        If there is nothing to reserve, wait. Raises TimeoutError after `timeout` seconds. Raises Closed if the ring is
        closed and everything is stored; until then a batch in flight may be requeued. Raises Closed after `abort`.

        A worker that looks for work elsewhere before it waits here passes the number of `interrupts` from before that
        look. If there were more since, or as soon as there are, raises Interrupted instead of waiting.
        """
        deadline = self._runtime.deadline_after(timeout)
        with self._lock:
            self._idle_workers += 1
            try:
                if not self._runtime.wait_until(
                    self._not_empty, lambda: self._is_reservable_or_over(interrupts), deadline
                ):
                    raise TimeoutError("nothing to reserve")
                if self._aborted:
                    raise Closed
                if self._requeued:
                    return self._take_requeued(self._requeued[0])
                if self._cursor > self._reserved:
                    return self._take_next(min(self._cursor, self._reserved + limit))
                raise Closed if self._is_drained() else Interrupted
            except (TimeoutError, Closed, Interrupted):
                raise
            except BaseException:  # out of memory: another worker may have it
                self._not_empty.notify()
                raise
            finally:
                self._idle_workers -= 1

    def interrupt(self) -> None:
        """End the waits of `reserve`: there is work elsewhere. See `reserve`."""
        with self._lock:
            self._interrupts += 1
            self._not_empty.notify_all()

    def commit(self, batch: Batch) -> None:
        """Record that `batch` is stored. Free the slots of the gapless prefix, and wake the threads that wait for it.

        Raises ValueError unless `batch` is in flight. A batch that was committed or requeued is not.
        """
        with self._lock:
            self._check_in_flight(batch)
            was_aside = batch in self._aside
            aside_size = self._aside_size - (len(batch) if was_aside else 0)
            moved = self._crowded_that_fit(self.capacity - aside_size) if was_aside else []
            aside_size += sum(map(len, moved))
            if was_aside:
                self._stored.notify_all()
            if self._closed:
                self._not_empty.notify_all()  # this may have been the last batch
            woken = self._stage(moved if was_aside else [batch], moved, batch)
            # Nothing below can fail.
            del self._in_flight[batch]
            self._crowded.pop(batch, None)
            if was_aside:
                del self._aside[batch]
                self._aside_size = aside_size
                self._aside_stored += 1
                for other in moved:
                    del self._crowded[other]
            self._advance()
        for waiter in woken:
            waiter.wake()
        self._listener()

    def requeue(self, batch: Batch) -> None:
        """Give `batch` back, surely not stored, to be handed out again before newer values.

        Raises ValueError as `commit` does.
        """
        with self._lock:
            self._check_in_flight(batch)
            self._not_empty.notify()
            bisect.insort(self._requeued, batch, key=_start_of)
            # Nothing below can fail.
            del self._in_flight[batch]
            self._crowded.pop(batch, None)

    def set_aside(self, batch: Batch) -> None:
        """Free the slots of `batch`, which stays in flight, until it is known whether it is stored.

        If too many values are set aside, the batch keeps its slots until there is room. A second call does nothing.
        Raises ValueError as `commit` does.
        """
        with self._lock:
            self._check_in_flight(batch)
            if batch in self._aside:
                return
            if self._aside_size + len(batch) > self.capacity:
                self._crowded[batch] = None
                return
            aside_size = self._aside_size + len(batch)
            woken = self._stage([batch], [batch])
            # Nothing below can fail.
            self._crowded.pop(batch, None)
            self._aside_size = aside_size
            self._advance()
        for waiter in woken:
            waiter.wake()
        self._listener()

    def is_stored(self, start: int, end: int) -> bool:
        """True if all values from `start` up to, and without, `end` are stored."""
        # Without the lock, as each is one read: `_committed` passes a batch only after the batch is in `_aside`.
        if self._committed < end:
            return False
        if not self._aside:
            return True
        with self._lock:
            return self._is_stored(start, end)

    def wait_committed(self, start: int, end: int, timeout: float | None = None) -> bool:
        """Wait until all values from `start` up to, and without, `end` are stored. Return whether they are.

        The wait ends after `timeout` seconds, or if the ring is aborted.
        """
        deadline = self._runtime.deadline_after(timeout)
        while not self.is_stored(start, end):
            seconds = deadline - self._runtime.monotonic()
            with self._lock:
                if self._is_stored(start, end):
                    return True
                if self._aborted or seconds <= 0:
                    return False
                waiter = _Waiter(start, end)
                bisect.insort(self._waiters, waiter, key=_end_of)
            waiter.wait(seconds)
            if self._runtime.monotonic() >= deadline:
                with self._lock:
                    if waiter in self._waiters:
                        self._waiters.remove(waiter)
        return True

    def close(self) -> None:
        """Take no more values. Those in the ring are still handed out; `reserve` ends when all of them are stored."""
        with self._lock:
            self._closed = True
            self._not_full.notify_all()
            self._not_empty.notify_all()
        self._listener()

    def abort(self) -> None:
        """Close the ring and end every wait at once, even if values are not stored."""
        with self._lock:
            self._closed = self._aborted = True
            self._not_full.notify_all()
            self._not_empty.notify_all()
            self._stored.notify_all()
            for waiter in self._waiters:
                waiter.wake()
            self._waiters.clear()
        self._listener()

    def join(self, timeout: float | None = None) -> bool:
        """Wait until all values that were put are stored. Return whether they are.

        The wait ends after `timeout` seconds, or if the ring is aborted.
        """
        deadline = self._runtime.deadline_after(timeout)
        with self._lock:
            self._runtime.wait_until(self._stored, lambda: self._is_all_stored() or self._aborted, deadline)
            return self._is_all_stored()

    @property
    def committed(self) -> int:
        """The sequence before which every value is stored or set aside."""
        return self._committed  # one read of an int: no lock needed

    @property
    def cursor(self) -> int:
        """How many values were ever put."""
        return self._cursor

    @property
    def closed(self) -> bool:
        """True if the ring takes no more values."""
        return self._closed

    @property
    def aborted(self) -> bool:
        """True if every wait has ended."""
        return self._aborted

    @property
    def interrupts(self) -> int:
        """The number of calls of `interrupt`, for `reserve`."""
        return self._interrupts

    @property
    def aside_stored(self) -> int:
        """How many batches that were set aside have been committed."""
        return self._aside_stored

    @property
    def wants_workers(self) -> bool:
        """True if a worker could reserve values now, and no worker is waiting for them."""
        with self._lock:
            return self._backlog() > 0 and self._idle_workers == 0

    def stats(self) -> RingStats:
        """Return a snapshot of the counters."""
        with self._lock:
            in_flight = self._in_slots(self._in_flight)
            requeued = self._in_slots(self._requeued)
            oldest = min((batch.reserved_at for batch in in_flight + requeued), default=None)
            return RingStats(
                capacity=self.capacity,
                cursor=self._cursor,
                reserved=self._reserved,
                committed=self._committed,
                stored=self._committed - self._aside_size + sum(e - s for s, e in self._finished.items()),
                depth=self._cursor - self._committed,
                backlog=self._cursor - self._reserved + sum(map(len, requeued)),
                in_flight=sum(map(len, in_flight)),
                high_water=self._high_water,
                times_full=self._times_full,
                oldest_in_flight=0.0 if oldest is None else self._runtime.monotonic() - oldest,
            )

    def layout(self) -> RingLayout:
        """Return the use of the slots. A slot that is not free, in flight or finished waits for a worker.

        Each call begins a new measurement of `highest`, so this method has one caller (`ringolib/status/peaks.py`).
        """
        with self._lock:
            sequences = self.capacity, self._committed, self._reserved, self._cursor
            in_flight = [(batch.start, batch.end) for batch in self._in_slots(self._in_flight)]
            finished = list(self._finished.items())
            highest, self._highest = self._highest, self._cursor - self._committed
        return RingLayout(*sequences, _merge(in_flight), _merge(finished), highest)

    # Helpers. The caller of each holds the lock.

    def _free(self) -> int:
        """Return how many slots are free."""
        return self._committed + self.capacity - self._cursor

    def _backlog(self) -> int:
        """Return how many values a worker could reserve."""
        return self._cursor - self._reserved + sum(map(len, self._requeued))

    def _in_slots(self, batches: Iterable[Batch]) -> list[Batch]:
        """Return the batches that were not set aside."""
        return [batch for batch in batches if batch not in self._aside]

    def _is_stored(self, start: int, end: int) -> bool:
        if self._committed < end:
            return False
        return not any(batch.start < end and start < batch.end for batch in self._aside)

    def _is_all_stored(self) -> bool:
        return self._committed == self._cursor and not self._aside

    def _is_drained(self) -> bool:
        return self._closed and self._is_all_stored()

    def _is_reservable_or_over(self, interrupts: int | None) -> bool:
        return self._backlog() > 0 or self._is_drained() or self._aborted or interrupts not in (None, self._interrupts)

    def _crowded_that_fit(self, room: int) -> list[Batch]:
        """Return the batches to set aside, in the order of their calls, if there is room for so many values."""
        fitting = []
        for batch in self._crowded:
            if len(batch) <= room:
                fitting.append(batch)
                room -= len(batch)
        return fitting

    def _stage(self, finished: list[Batch], aside: list[Batch], leaving: Batch | None = None) -> Sequence[_Waiter]:
        """Note that `finished` need their slots no more, and that `aside` are set aside. Changes all or nothing.

        The caller then calls `_advance`. In this order: a thread that sees the larger `committed` must see the batches
        in `_aside`. Then it wakes the returned waiters, without the lock; `leaving` is not set aside any more then.
        """
        assert self._lock.locked()
        try:
            for batch in aside:
                self._aside[batch] = None
            for batch in finished:
                self._finished[batch.start] = batch.end
            if self._committed in self._finished:
                self._not_full.notify()
                self._stored.notify_all()
            return self._take_waiters(leaving)
        except BaseException:
            for batch in aside:
                self._aside.pop(batch, None)
            for batch in finished:
                self._finished.pop(batch.start, None)
            raise

    def _take_waiters(self, leaving: Batch | None = None) -> Sequence[_Waiter]:
        """Remove and return the waiters whose values are stored after `_advance`, once `leaving` is not set aside.

        The caller wakes them, without the lock. It must not fail before it does.
        """
        assert self._lock.locked()
        if not self._waiters:
            return ()
        committed = self._committed
        while committed in self._finished:
            committed = self._finished[committed]
        if self._waiters[0].end > committed:
            return ()
        count = bisect.bisect_right(self._waiters, committed, key=_end_of)
        aside = [batch for batch in self._aside if batch is not leaving]
        ready: list[_Waiter] = []
        doubtful: list[_Waiter] = []
        for waiter in self._waiters[:count]:
            (doubtful if waiter.overlaps(aside) else ready).append(waiter)
        self._waiters[:count] = doubtful
        return ready

    def _advance(self) -> None:
        """Free the slots of the gapless prefix. Cannot fail."""
        committed = self._committed
        while committed in self._finished:
            committed = self._finished.pop(committed)
        self._committed = committed

    def _take_requeued(self, batch: Batch) -> Batch:
        """Put a requeued batch in flight, and return it. Changes all or nothing."""
        if self._backlog() > len(batch):
            self._not_empty.notify()
        self._in_flight[batch] = None
        try:
            self._requeued.remove(batch)
        except BaseException:
            del self._in_flight[batch]
            raise
        return batch

    def _take_next(self, end: int) -> Batch:
        """Put the values up to `end` in flight, as a new batch, and return it. Changes all or nothing."""
        start = self._reserved
        runs, rest = _first_runs(self._runs, end - start)
        batch = Batch(start, end, runs, self._read(start, end), self._runtime.monotonic())
        if self._backlog() > end - start:
            self._not_empty.notify()
        taken = iter(runs)
        self._in_flight[batch] = None
        # Nothing below can fail.
        for run in taken:
            if self._runs[0] is run:
                self._runs.popleft()
            else:
                assert rest
                self._runs[0] = rest
        self._reserved = end
        return batch

    def _last_run(self) -> list[Run]:
        """Return the start of the list for `_publish`: the newest run, which the next one may continue."""
        return [self._runs[-1]] if self._runs else []

    def _publish(self, runs: list[Run], count: int) -> None:
        """Move the cursor over `count` values that are in their slots. Changes all or nothing.

        `runs` are their runs, behind the newest run before them (`_last_run`), or joined with it.
        """
        assert self._lock.locked()
        cursor = self._cursor + count
        depth = cursor - self._committed
        known = len(self._runs)
        last = self._runs[-1] if known else None
        try:
            if known:
                self._runs[-1] = runs[0]
            self._runs.extend(islice(runs, 1 if known else 0, None))
            self._not_empty.notify()
        except BaseException:
            while len(self._runs) > known:
                self._runs.pop()
            if last:
                self._runs[-1] = last
            raise
        self._cursor = cursor
        if depth > self._highest:
            self._highest = depth
            self._high_water = max(self._high_water, depth)

    def _write(self, values: Values, start: int) -> None:
        """Copy `values` to the slots from sequence `start` on. The slots must be free."""
        assert self._lock.locked()
        slot = start % self.capacity
        size = len(values)
        if size == 1:
            self._slots[slot] = values[0]
        else:
            head = min(size, self.capacity - slot)
            with memoryview(self._slots) as slots, memoryview(values) as view:
                slots[slot : slot + head] = view[:head]
                slots[: size - head] = view[head:]

    def _read(self, start: int, end: int) -> "array[int]":
        """Return a copy of the values `[start, end)`. They must be reserved and not committed."""
        slot = start % self.capacity
        head = min(end - start, self.capacity - slot)
        values = self._slots[slot : slot + head]
        values.extend(self._slots[: end - start - head])
        return values

    def _check_in_flight(self, batch: Batch) -> None:
        """Raise ValueError if `batch` is not in flight."""
        assert self._lock.locked()
        if batch not in self._in_flight:
            raise ValueError(f"batch {batch.start}..{batch.end} is not in flight")


def _start_of(batch: Batch) -> int:
    return batch.start


def _end_of(waiter: _Waiter) -> int:
    return waiter.end


def _append_run(runs: list[Run], run: Run) -> None:
    """Append `run`. If it continues the last run of the same source, the two become one."""
    if runs:
        last = runs[-1]
        if last.source == run.source and last.first + last.count == run.first:
            runs[-1] = last._replace(count=last.count + run.count)
            return
    runs.append(run)


def _append_runs(runs: list[Run], block: Iterable[Run], count: int) -> None:
    """Append the runs of the first `count` values of a block."""
    for run in block:
        if run.count >= count:
            _append_run(runs, run if run.count == count else run._replace(count=count))
            return
        _append_run(runs, run)
        count -= run.count


def _first_runs(runs: deque[Run], count: int) -> tuple[list[Run], Run | None]:
    """Return the runs of the oldest `count` values; `runs` stays as it is.

    A run that ends later is split: the list has its beginning, and the rest is returned beside the list.
    """
    taken = []
    for run in runs:
        if run.count > count:
            taken.append(run._replace(count=count))
            return taken, Run(run.source, run.first + count, run.count - count)
        taken.append(run)
        count -= run.count
        if not count:
            break
    return taken, None


def _merge(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return disjoint ranges in order, with adjacent ones merged."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged
