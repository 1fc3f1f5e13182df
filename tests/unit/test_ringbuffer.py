"""The ring: each guarantee to producers and workers by itself, then all of them under load."""

import random
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
from support.harness import DEADLINE, Blocked, eventually, seeded

import ringbuffer
from ringbuffer import Batch, Closed, Full, Interrupted, Ring
from ringolib.timing import Runtime
from ringolib.wire import Block, Run

A, B = b"a" * 16, b"b" * 16


def ints(*values: int) -> "array[int]":
    return array("q", values)


def ring_of(capacity: int, *values: int) -> Ring:
    """A ring that holds these values of source A."""
    ring = Ring(capacity)
    ring.put(ints(*values), A, 0, 0)
    return ring


def check(ring: Ring) -> None:
    """Check the invariant of the ring in its statistics."""
    stats = ring.stats()
    assert 0 <= stats.committed <= stats.cursor
    assert stats.depth == stats.cursor - stats.committed <= stats.capacity
    assert stats.backlog + stats.in_flight <= stats.depth <= stats.high_water


@pytest.mark.parametrize("capacity", [0, -1])
def test_ring_has_at_least_one_slot(capacity: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Ring(capacity)


@pytest.mark.parametrize("capacity", [1, 2, 3, 7])
def test_values_keep_their_order_across_the_wrap(capacity: int) -> None:
    ring = Ring(capacity)
    out: list[int] = []
    for first in range(0, 60, 3):
        call = Blocked(lambda first=first: ring.put(ints(first, first + 1, -first - 2), A, first))
        taken = 0
        while taken < 3:
            batch = ring.reserve(2)
            taken += len(batch)
            out += batch.values
            ring.commit(batch)
        assert call.result() == first + 3
        check(ring)
    assert out == [value for first in range(0, 60, 3) for value in (first, first + 1, -first - 2)]


def test_put_returns_the_cursor_and_empty_put_changes_nothing() -> None:
    ring = ring_of(4, 1, 2, 3)
    assert ring.put(ints(), A, 3) == 3
    assert ring.put(ints(4), A, 3) == 4
    assert ring.cursor == 4


def test_put_accepts_views_and_copies_values() -> None:
    values = ints(1, 2, 3)
    ring = Ring(4)
    with memoryview(values)[1:] as view:
        ring.put(view, A, 0)
    values[1] = 99
    assert list(ring.reserve(4).values) == [2, 3]


def test_ring_holds_smallest_and_largest_64_bit_values() -> None:
    ring = ring_of(2, 2**63 - 1, -(2**63))
    assert list(ring.reserve(2).values) == [2**63 - 1, -(2**63)]


def test_put_blocks_until_commit_frees_slots() -> None:
    ring = ring_of(2, 1, 2)
    call = Blocked(lambda: ring.put(ints(3), A, 2))
    assert call.still()
    batch = ring.reserve(1)
    assert call.still()
    ring.commit(batch)
    assert call.result() == 3
    assert ring.stats().times_full == 1


def test_put_larger_than_ring_goes_in_piece_by_piece() -> None:
    ring = Ring(2)
    call = Blocked(lambda: ring.put(ints(*range(5)), A, 0))
    out: list[int] = []
    while len(out) < 5:
        batch = ring.reserve(9)
        assert len(batch) <= 2
        out += batch.values
        ring.commit(batch)
    assert call.result() == 5
    assert out == list(range(5))


def test_full_reports_accepted_count_and_rest_leaves_no_trace() -> None:
    ring = Ring(3)
    with pytest.raises(Full) as full:
        ring.put(ints(*range(5)), A, 0, 0.01)
    assert full.value.accepted == 3
    assert not isinstance(full.value, OSError), "`except OSError` for a lost connection must not catch it"
    with pytest.raises(Full) as full:
        ring.put(ints(7), A, 5, 0)
    assert full.value.accepted == 0
    batch = ring.reserve(9)
    assert (list(batch.values), batch.runs) == ([0, 1, 2], [Run(A, 0, 3)])
    ring.commit(batch)
    ring.put(ints(8), B, 0, 0)
    assert list(ring.reserve(9).values) == [8]
    assert ring.cursor == 4


def test_commit_wakes_all_producers_that_fit() -> None:
    ring = ring_of(4, 1, 2, 3, 4)
    calls = [Blocked(lambda n=n: ring.put(ints(*range(n)), A, 0)) for n in (1, 2, 1)]
    assert all(call.still(0.02) for call in calls)
    ring.commit(ring.reserve(4))
    for call in calls:
        call.result()


def test_commit_frees_only_the_gapless_prefix() -> None:
    ring = ring_of(6, *range(6))
    first, second, third = (ring.reserve(2) for _ in range(3))
    ring.commit(third)
    ring.commit(second)
    assert ring.committed == 0
    with pytest.raises(Full):
        ring.put(ints(9), A, 6, 0)
    assert not ring.wait_committed(0, 1, 0)
    ring.commit(first)
    assert ring.committed == 6
    assert ring.wait_committed(0, 6, 0)
    assert ring.stats().depth == 0


def test_reserve_returns_oldest_requeued_batch_first_unchanged() -> None:
    ring = ring_of(6, *range(6))
    first, second, third = (ring.reserve(2) for _ in range(3))
    ring.requeue(third)
    ring.requeue(first)
    assert ring.reserve(1) is first  # whole, whatever the limit
    assert ring.reserve(9) is third
    assert list(first.values) == [0, 1]
    for batch in (second, third, first):
        ring.commit(batch)
    assert ring.committed == 6


def test_batch_cannot_be_committed_or_requeued_twice() -> None:
    ring = ring_of(2, 1, 2)
    batch, other = ring.reserve(1), ring.reserve(1)
    ring.commit(batch)
    for operation in (ring.commit, ring.requeue):
        with pytest.raises(ValueError, match="not in flight"):
            operation(batch)
    ring.requeue(other)
    for operation in (ring.commit, ring.requeue):
        with pytest.raises(ValueError, match="not in flight"):
            operation(other)
    with pytest.raises(ValueError, match="not in flight"):
        ring.commit(Batch(1, 2, [], array("q", (1,)), 0))  # equal is not identical


def test_reserve_blocks_until_put_or_timeout() -> None:
    ring = Ring(2)
    with pytest.raises(TimeoutError):
        ring.reserve(1, 0.01)
    call = Blocked(lambda: ring.reserve(1))
    assert call.still()
    ring.put(ints(5), A, 0)
    assert list(call.result().values) == [5]


def test_two_waiting_workers_share_the_values_of_one_put() -> None:
    ring = Ring(4)
    calls = [Blocked(lambda: ring.reserve(1)) for _ in range(2)]
    assert all(call.still(0.02) for call in calls)
    ring.put(ints(1, 2), A, 0)
    assert sorted(call.result().values[0] for call in calls) == [1, 2]


def test_adjacent_runs_merge_and_batches_split_runs() -> None:
    ring = Ring(20)
    ring.put(ints(0, 1), A, 0)
    ring.put(ints(2), A, 2)
    ring.put(ints(9), B, 7)
    ring.put(ints(5), A, 5)
    ring.put(ints(6), A, 6)
    ring.put(ints(6), A, 6)  # the same again does not continue
    assert ring.reserve(2).runs == [Run(A, 0, 2)]
    assert ring.reserve(4).runs == [Run(A, 2, 1), Run(B, 7, 1), Run(A, 5, 2)]
    assert ring.reserve(9).runs == [Run(A, 6, 1)]


def test_closed_ring_refuses_put_and_hands_out_the_rest() -> None:
    ring = ring_of(3, 1, 2)
    ring.close()
    with pytest.raises(Closed) as closed:
        ring.put(ints(3), A, 2)
    assert closed.value.accepted == 0
    batch = ring.reserve(9)
    assert not ring.join(0)
    ring.commit(batch)
    assert ring.join(0)
    with pytest.raises(Closed):
        ring.reserve(1)


def test_close_wakes_blocked_put_which_reports_accepted_count() -> None:
    ring = Ring(2)
    call = Blocked(lambda: ring.put(ints(1, 2, 3), A, 0))
    assert call.still()
    ring.close()
    with pytest.raises(Closed) as closed:
        call.result()
    assert closed.value.accepted == 2


def test_reserve_of_closed_ring_waits_for_batches_in_flight() -> None:
    for requeued in (True, False):
        ring = ring_of(2, 1)
        batch = ring.reserve(1)
        ring.close()
        call = Blocked(lambda ring=ring: ring.reserve(1))
        assert call.still()
        if requeued:
            ring.requeue(batch)
            assert call.result() is batch
        else:
            ring.commit(batch)
            with pytest.raises(Closed):
                call.result()


def test_close_wakes_all_idle_workers_of_empty_ring() -> None:
    ring = Ring(1)
    calls = [Blocked(lambda: ring.reserve(1)) for _ in range(3)]
    assert all(call.still(0.02) for call in calls)
    ring.close()
    for call in calls:
        with pytest.raises(Closed):
            call.result()


def test_abort_ends_every_wait() -> None:
    ring = ring_of(1, 1)
    batch = ring.reserve(1)
    calls = [
        Blocked(lambda: ring.put(ints(2), A, 1)),
        Blocked(lambda: ring.reserve(1)),
        Blocked(lambda: ring.wait_committed(0, 1)),
        Blocked(lambda: ring.join()),
    ]
    assert all(call.still(0.02) for call in calls)
    ring.abort()
    for call in calls[:2]:
        with pytest.raises(Closed):
            call.result()
    assert calls[2].result() is False
    assert calls[3].result() is False
    ring.commit(batch)  # a batch in flight can still be committed
    assert ring.wait_committed(0, 1, 0) and ring.join(0)


def test_wait_committed_blocks_until_all_before_is_stored() -> None:
    ring = ring_of(3, 1, 2, 3)
    first, second = ring.reserve(1), ring.reserve(2)
    call = Blocked(lambda: ring.wait_committed(0, 2))
    ring.commit(first)
    assert call.still()
    ring.commit(second)
    assert call.result() is True
    assert ring.wait_committed(0, 4, 0.01) is False


def test_ring_wants_workers_if_values_wait_and_no_worker_does() -> None:
    ring = Ring(4)
    assert not ring.wants_workers
    ring.put(ints(1), A, 0)
    assert ring.wants_workers
    batch = ring.reserve(4)
    assert not ring.wants_workers
    ring.requeue(batch)
    assert ring.wants_workers


def test_stored_counts_values_after_a_gap() -> None:
    ring = ring_of(5, 1, 2, 3)
    first, second = ring.reserve(1), ring.reserve(2)
    ring.commit(second)
    assert (ring.stats().stored, ring.stats().committed) == (2, 0)
    ring.commit(first)
    assert (ring.stats().stored, ring.stats().committed) == (3, 3)


def test_values_stay_in_the_ring_if_their_copy_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = ring_of(5, 1, 2, 3)

    def no_memory(start: int, end: int) -> "array[int]":
        raise MemoryError

    with monkeypatch.context() as short:
        short.setattr(ring, "_read", no_memory)
        with pytest.raises(MemoryError):
            ring.reserve(2)
    assert ring.stats().in_flight == 0
    batch = ring.reserve(1)
    assert (list(batch.values), batch.end) == ([1], 1)


def test_stats_are_consistent_and_show_age_of_oldest_batch() -> None:
    ring = ring_of(5, 1, 2, 3, 4)
    assert ring.stats().oldest_in_flight == 0
    batch = ring.reserve(3)
    stats = ring.stats()
    assert stats[:10] == (5, 4, 3, 0, 0, 4, 1, 3, 4, 0)
    assert 0 <= stats.oldest_in_flight < 60
    ring.commit(batch)
    assert (ring.stats().depth, ring.stats().high_water, ring.stats().oldest_in_flight) == (1, 4, 0)


def test_age_of_requeued_batch_counts_from_first_reserve() -> None:
    now = [100.0]

    class Stopped(Runtime):
        def monotonic(self) -> float:
            return now[0]

    ring = Ring(5, Stopped())
    ring.put(ints(1, 2), A, 0, 0)
    for age in (0, 10, 20):
        assert ring.stats().oldest_in_flight == age
        batch = ring.reserve(1)
        ring.requeue(batch)
        now[0] += 10
    ring.commit(ring.reserve(1))
    assert ring.stats().oldest_in_flight == 0


def test_layout_shows_ranges_in_flight_and_finished() -> None:
    ring = ring_of(8, *range(8))
    assert ring.layout()[:-1] == (8, 0, 0, 8, [], [])
    first, second, third, fourth = (ring.reserve(1) for _ in range(4))
    assert ring.layout()[:-1] == (8, 0, 4, 8, [(0, 4)], [])
    ring.requeue(second)
    assert ring.layout()[:-1] == (8, 0, 4, 8, [(0, 1), (2, 4)], [])
    ring.commit(fourth)
    ring.commit(third)
    assert ring.layout()[:-1] == (8, 0, 4, 8, [(0, 1)], [(2, 4)])
    ring.commit(first)
    ring.commit(ring.reserve(1))
    assert ring.layout()[:-1] == (8, 4, 4, 8, [], [])


def test_layout_has_the_largest_depth_since_the_last_one() -> None:
    ring = ring_of(8, *range(6))
    assert ring.layout().highest == 6
    ring.commit(ring.reserve(4))
    assert ring.layout().highest == 6, "the slots were used when the measurement began"
    assert ring.layout().highest == 2
    ring.put(ints(6, 7, 8), A, 6, 0)
    ring.commit(ring.reserve(5))
    assert (ring.stats().depth, ring.layout().highest, ring.layout().highest) == (0, 5, 0)
    assert ring.stats().high_water == 6


def test_failing_workers_lose_and_duplicate_nothing_under_load() -> None:
    seed = seeded()
    ring = Ring(37)
    sources = [bytes([number]) * 16 for number in range(6)]
    stored: dict[tuple[bytes, int], int] = {}
    errors: list[BaseException] = []
    lock = threading.Lock()

    def produce(number: int) -> None:
        rng, first = random.Random(seed + number), 0
        while first < 4000:
            size = min(rng.choice((1, 1, 2, 5, 36, 37, 90)), 4000 - first)
            block = array("q", range(number * 10_000 + first, number * 10_000 + first + size))
            timeout = rng.choice((None, 0.001))
            try:
                end = ring.put(block, sources[number], first, timeout)
                first += size
            except Full as full:
                first += full.accepted
                continue
            if rng.random() < 0.02:
                assert ring.wait_committed(0, end, 20)

    def work(number: int) -> None:
        rng = random.Random(-seed - number)
        while True:
            try:
                batch = ring.reserve(rng.randrange(1, 40), rng.choice((None, 0.001)))
            except Closed:
                return
            except TimeoutError:
                continue
            if rng.random() < 0.3:
                ring.requeue(batch)
                continue
            with lock:
                values = iter(batch.values)
                for run in batch.runs:
                    for sequence in range(run.first, run.first + run.count):
                        assert (run.source, sequence) not in stored
                        stored[run.source, sequence] = next(values)
            check(ring)
            ring.commit(batch)

    def guarded(job: object, number: int) -> None:
        try:
            job(number)  # type: ignore[operator]
        except BaseException as error:
            errors.append(error)
            ring.abort()

    producers = [threading.Thread(target=guarded, args=(produce, n), daemon=True) for n in range(6)]
    workers = [threading.Thread(target=guarded, args=(work, n), daemon=True) for n in range(5)]
    for thread in producers + workers:
        thread.start()
    for thread in producers:
        thread.join(40)
    ring.close()
    assert ring.join(20)
    for thread in workers:
        thread.join(20)
    assert not errors and not any(thread.is_alive() for thread in producers + workers)
    assert stored == {(sources[n], k): n * 10_000 + k for n in range(6) for k in range(4000)}
    assert ring.stats().high_water <= 37


def test_batch_set_aside_frees_its_slots_and_is_not_stored() -> None:
    ring = ring_of(4, 1, 2, 3, 4)
    doubt, other = ring.reserve(2), ring.reserve(2)
    ring.set_aside(doubt)
    ring.set_aside(doubt)
    check(ring)
    assert not ring.is_stored(0, 2) and not ring.is_stored(0, 1)
    ring.put(ints(5, 6), A, 4, 0)
    ring.commit(other)
    check(ring)
    assert ring.stats().stored == 2 and ring.committed == 4
    assert ring.is_stored(2, 4) and ring.wait_committed(2, 4, 0)
    assert not ring.is_stored(1, 4) and not ring.wait_committed(1, 4, 0)
    assert not ring.is_stored(2, 6), "values that were never reserved are not stored"
    waiting = Blocked(lambda: ring.wait_committed(0, 4, DEADLINE))
    joining = Blocked(lambda: (ring.close(), ring.join(DEADLINE)))
    assert waiting.still() and joining.still()
    ring.commit(ring.reserve(9))
    idle = Blocked(lambda: ring.reserve(1))
    assert joining.still() and idle.still(), "a batch that is set aside may be requeued"
    ring.requeue(doubt)
    assert idle.result() is doubt and list(doubt.values) == [1, 2], "its slots hold other values by now"
    assert ring.aside_stored == 0
    ring.commit(doubt)
    assert waiting.result() and joining.result() == (None, True) and ring.stats().stored == 6
    assert ring.aside_stored == 1
    for finished in (doubt, other):
        with pytest.raises(ValueError, match="not in flight"):
            ring.set_aside(finished)


def test_listener_is_called_when_slots_may_be_free() -> None:
    """After a commit, and after a batch was set aside. A batch that is requeued frees nothing."""
    ring = Ring(4)
    free: list[int] = []
    ring.on_advance(lambda: free.append(ring.stats().capacity - ring.stats().depth))  # takes the lock itself
    ring.put(ints(1, 2, 3, 4), A, 0)
    ring.requeue(ring.reserve(2))
    assert free == []
    batch = ring.reserve(2)
    ring.set_aside(batch)
    assert free == [2]
    ring.set_aside(batch)
    assert free == [2], "it was set aside before"
    ring.commit(ring.reserve(2))
    assert free == [2, 4]


def test_batches_beyond_the_limit_stay_in_their_slots() -> None:
    ring, batches = Ring(4), []
    for turn in range(2):
        ring.put(ints(1, 2, 3), A, 3 * turn, 0)
        batches.append(ring.reserve(3))
        ring.set_aside(batches[-1])
        check(ring)
    assert ring.stats().depth == 3 == ring.stats().in_flight, "only the first batch is set aside"
    ring.commit(batches[1])
    check(ring)
    assert ring.stats().depth == 0 and ring.stats().stored == 3
    ring.commit(batches[0])
    assert ring.stats().stored == ring.committed == 6


def test_batch_is_set_aside_once_there_is_room() -> None:
    """Otherwise a batch whose consumer is gone for good would block a ring that has room."""
    ring, batches = Ring(4), []
    for turn in range(2):
        ring.put(ints(1, 2, 3, 4), A, 4 * turn, 0)
        batches.append(ring.reserve(4))
        ring.set_aside(batches[-1])
    producer = Blocked(lambda: ring.put(ints(5), A, 8, DEADLINE))
    assert producer.still()
    ring.commit(batches[0])
    assert producer.result() == 9 and ring.is_stored(0, 4) and not ring.is_stored(4, 8)
    check(ring)
    assert ring.stats().depth == 1 and ring.stats().stored == 4


def test_interrupt_ends_each_wait_for_a_batch() -> None:
    """Unless the worker has looked for other work since, or there is a batch."""
    ring = ring_of(9)
    before = ring.interrupts
    workers = [Blocked(lambda: ring.reserve(1, DEADLINE, before)) for _ in range(3)]
    patient = Blocked(lambda: ring.reserve(1, DEADLINE))
    assert patient.still() and all(worker.still(0) for worker in workers)
    ring.interrupt()
    for worker in workers:
        with pytest.raises(Interrupted):
            worker.result()
    with pytest.raises(Interrupted):
        ring.reserve(1, DEADLINE, before)
    with pytest.raises(TimeoutError):
        ring.reserve(1, 0.01, ring.interrupts)
    ring.put(ints(1), A, 0)
    ring.commit(patient.result())
    ring.put(ints(2), A, 1)
    ring.commit(ring.reserve(1, DEADLINE, before))
    ring.close()
    with pytest.raises(Closed):
        ring.reserve(1, DEADLINE, before)


def test_batches_set_aside_alone_want_no_workers() -> None:
    ring = ring_of(9, 1)
    ring.set_aside(ring.reserve(1))
    assert not ring.wants_workers
    ring.put(ints(2), A, 1)
    assert ring.wants_workers


def test_batches_in_doubt_are_never_lost_doubled_or_acked_early() -> None:
    """Threads put, reserve, requeue, set aside and commit. Each record is committed once, and not acked before."""
    seed = seeded()
    ring = Ring(23)
    stored: dict[tuple[bytes, int], int] = {}
    sources = [bytes([number]) * 16 for number in range(5)]
    errors: list[BaseException] = []
    lock = threading.Lock()
    doubts: list[Batch] = []
    aside = []

    def keep(batch: Batch) -> None:
        values = iter(batch.values)
        with lock:
            for run in batch.runs:
                for sequence in range(run.first, run.first + run.count):
                    assert (run.source, sequence) not in stored
                    stored[run.source, sequence] = next(values)

    def produce(number: int) -> None:
        rng, first = random.Random(seed + number), 0
        while first < 3000:
            size = min(rng.choice((1, 2, 5, 22, 23, 60)), 3000 - first)
            since = ring.cursor
            end = ring.put(
                array("q", range(number * 10_000 + first, number * 10_000 + first + size)), sources[number], first
            )
            first += size
            if rng.random() < 0.1 and ring.wait_committed(since, end, rng.choice((0.001, 20))):
                assert ring.is_stored(since, end)
                with lock:
                    assert all((sources[number], n) in stored for n in range(first - size, first))

    def take(rng: random.Random) -> Batch:
        interrupts = ring.interrupts
        with lock:
            if doubts:
                return doubts.pop(rng.randrange(len(doubts)))
        return ring.reserve(rng.randrange(1, 30), rng.choice((None, 0.001)), interrupts)

    def work(number: int) -> None:
        rng = random.Random(-seed - number)
        while True:
            try:
                batch = take(rng)
            except Closed:
                return
            except (TimeoutError, Interrupted):
                continue
            check(ring)
            fate = rng.random()
            if fate < 0.3:
                aside.append(batch)
                ring.set_aside(batch)
                if rng.random() < 0.1:
                    time.sleep(0.01)  # its consumer is late
            if fate < 0.1:
                ring.requeue(batch)
            elif fate < 0.2:
                with lock:
                    doubts.append(batch)
                ring.interrupt()
            else:
                keep(batch)
                ring.commit(batch)

    def guarded(job: object, number: int) -> None:
        try:
            job(number)  # type: ignore[operator]
        except BaseException as error:
            errors.append(error)
            ring.abort()

    producers = [threading.Thread(target=guarded, args=(produce, n), daemon=True) for n in range(5)]
    workers = [threading.Thread(target=guarded, args=(work, n), daemon=True) for n in range(6)]
    for thread in producers + workers:
        thread.start()
    for thread in producers:
        thread.join(40)
    ring.close()
    assert ring.join(20)
    for thread in workers:
        thread.join(20)
    assert not errors and not any(thread.is_alive() for thread in producers + workers)
    assert stored == {(sources[n], k): n * 10_000 + k for n in range(5) for k in range(3000)}
    assert len(aside) > 20 and ring.stats().stored == 15_000


def test_timed_out_producers_do_not_swallow_notifications() -> None:
    """The single notification for a free slot may go to a producer that times out at that moment."""
    seed = seeded()
    rng = random.Random(seed)
    ring = Ring(3)

    def produce(number: int, timeouts: list[float]) -> None:
        for turn, timeout in enumerate(timeouts):
            done, size = 0, 1 + turn % 5
            while done < size:
                try:
                    ring.put(array("q", range(size - done)), bytes([number]) * 16, turn * 10 + done, timeout or None)
                    done = size
                except Full as full:
                    done += full.accepted

    timeouts = [[rng.choice([0, 1e-5, 1e-4]) for _ in range(300)] for _ in range(6)]
    producers = [Blocked(lambda n=n: produce(n, timeouts[n])) for n in range(6)]
    total = 6 * 60 * (1 + 2 + 3 + 4 + 5)
    while ring.committed < total:
        ring.commit(ring.reserve(2, DEADLINE))
    for producer in producers:
        producer.result()
    assert ring.cursor == total


class Faults:
    """Raises MemoryError in one of the steps of a ring's method that may need memory, after `arm(steps)`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._left = -1

        def failing(works: Callable[..., Any]) -> Callable[..., Any]:
            def step(*arguments: Any, **keywords: Any) -> Any:
                self._strike()
                return works(*arguments, **keywords)

            return step

        growing = {deque: ("append", "extend"), dict: ("__setitem__",), list: ("append", "insert")}
        self._monotonic = failing(time.monotonic)
        self._kinds = {
            kind: type(kind.__name__, (kind,), {name: failing(getattr(kind, name)) for name in names})
            for kind, names in growing.items()
        }
        monkeypatch.setattr(ringbuffer, "memoryview", failing(memoryview), raising=False)
        monkeypatch.setattr(ringbuffer, "Run", failing(Run))
        monkeypatch.setattr(ringbuffer, "Batch", failing(Batch))
        monkeypatch.setattr(threading.Condition, "notify", failing(threading.Condition.notify))

    def put_into(self, ring: Ring) -> None:
        """Make the containers of the ring fail, too."""
        for name in ("_runs", "_in_flight", "_requeued", "_aside", "_crowded", "_finished"):
            kept = getattr(ring, name)
            setattr(ring, name, self._kinds[type(kept)](kept))
        read = ring._read
        runtime = Runtime()
        runtime.monotonic = self._monotonic  # type: ignore[method-assign]
        ring._runtime = runtime

        def failing_read(start: int, end: int) -> "array[int]":
            self._strike()
            return read(start, end)

        ring._read = failing_read  # type: ignore[method-assign]

    def arm(self, steps: int) -> None:
        """Let `steps` steps succeed, and fail in the next one; after it, all succeed. With -1 no step fails."""
        self._left = steps

    @property
    def struck(self) -> bool:
        return self._left < 0

    def _strike(self) -> None:
        self._left -= 1
        if self._left == -1:
            raise MemoryError


def state_of(ring: Ring) -> list[Any]:
    """All that a ring knows, but for the contents of free slots."""

    def described(batches: Iterable[Batch]) -> list[Any]:
        return [(batch.start, batch.end, list(batch.runs), list(batch.values)) for batch in batches]

    containers = [described(getattr(ring, name)) for name in ("_in_flight", "_requeued", "_aside", "_crowded")]
    taken = [ring._slots[sequence % ring.capacity] for sequence in range(ring._committed, ring._cursor)]
    counters = [ring._cursor, ring._reserved, ring._committed, ring._aside_size, ring._high_water, ring._highest]
    counters.append(ring._idle_workers)
    return [*counters, *containers, list(ring._runs), dict(ring._finished), taken]


def full_of_batches(ring: Ring) -> list[Batch]:
    """Fill the ring of 8 slots, after a few values that have left it again, and reserve four batches of 2."""
    ring.put(array("q", range(5)), A, 0)
    ring.commit(ring.reserve(8))
    ring.put(array("q", range(10, 13)), A, 5)
    ring.put(array("q", range(13, 18)), B, 0)
    return [ring.reserve(2) for _ in range(4)]


def empty_and_wrapping(ring: Ring) -> None:
    ring.put(array("q", range(6)), A, 0)
    ring.commit(ring.reserve(4))


def with_requeued(ring: Ring, aside: bool) -> None:
    batches = full_of_batches(ring)
    if aside:
        ring.set_aside(batches[2])
    ring.requeue(batches[2])
    ring.requeue(batches[1])


def crowded(ring: Ring) -> list[Batch]:
    """Return four batches in flight: two are set aside, the third is not, for want of room, the last was not tried."""
    first, second, third, fourth = full_of_batches(ring)
    for batch in (first, second, third):
        ring.set_aside(batch)
    ring.put(array("q", range(20, 26)), A, 8)
    ring.commit(fourth)
    fifth, sixth = ring.reserve(3), ring.reserve(3)
    ring.set_aside(fifth)
    return [first, second, fifth, sixth]


BLOCKS = [
    Block([Run(A, 6, 1)], array("q", (6,))),
    Block([Run(A, 7, 2), Run(B, 0, 1)], array("q", (7, 8, 100))),
    Block([Run(B, 1, 9)], array("q", range(101, 110))),
]
Call = Callable[[], object]
METHODS: dict[str, Callable[[Ring], Call]] = {
    "put": lambda ring: (empty_and_wrapping(ring), lambda: ring.put(array("q", range(6, 10)), A, 6))[1],
    "put, new source": lambda ring: (empty_and_wrapping(ring), lambda: ring.put(array("q", (1,)), B, 6))[1],
    "try_put": lambda ring: (empty_and_wrapping(ring), lambda: ring.try_put(BLOCKS))[1],
    "reserve": lambda ring: (empty_and_wrapping(ring), ring.try_put(BLOCKS), lambda: ring.reserve(4))[2],
    "reserve all": lambda ring: (empty_and_wrapping(ring), ring.try_put(BLOCKS), lambda: ring.reserve(9))[2],
    "reserve requeued": lambda ring: (with_requeued(ring, False), lambda: ring.reserve(9))[1],
    "reserve set aside": lambda ring: (with_requeued(ring, True), ring.reserve(9), lambda: ring.reserve(9))[2],
    "commit the oldest": lambda ring: partial(ring.commit, full_of_batches(ring)[0]),
    "commit behind a gap": lambda ring: partial(ring.commit, full_of_batches(ring)[2]),
    "commit closing a gap": lambda ring: (
        (batches := full_of_batches(ring)) and ring.commit(batches[1]) or partial(ring.commit, batches[0])
    ),
    "commit the last": lambda ring: (
        ring.put(array("q", (1,)), A, 0) and (batch := ring.reserve(1)) and ring.close() or partial(ring.commit, batch)
    ),
    "commit set aside": lambda ring: partial(ring.commit, crowded(ring)[1]),
    "commit crowded": lambda ring: partial(ring.commit, crowded(ring)[2]),
    "commit, room for crowded": lambda ring: partial(ring.commit, crowded(ring)[0]),
    "requeue": lambda ring: partial(ring.requeue, full_of_batches(ring)[1]),
    "requeue set aside": lambda ring: partial(ring.requeue, crowded(ring)[0]),
    "requeue crowded": lambda ring: partial(ring.requeue, crowded(ring)[2]),
    "set aside": lambda ring: partial(ring.set_aside, full_of_batches(ring)[0]),
    "set aside behind a gap": lambda ring: partial(ring.set_aside, full_of_batches(ring)[1]),
    "set aside without room": lambda ring: partial(ring.set_aside, crowded(ring)[3]),
}


@pytest.mark.parametrize("method", METHODS)
def test_ring_is_as_it_was_if_a_method_raises(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = Ring(8)
    METHODS[method](clean)()
    for steps in range(1000):
        with monkeypatch.context() as short:
            faults, ring = Faults(short), Ring(8)
            call = METHODS[method](ring)
            faults.put_into(ring)
            before = state_of(ring)
            faults.arm(steps)
            try:
                call()
            except MemoryError:
                assert state_of(ring) == before, f"the error in step {steps} changed the ring"
            else:
                assert not faults.struck
                assert steps > 0, "some steps may fail"
                assert state_of(ring) == state_of(clean)
                return
            call()
            assert state_of(ring) == state_of(clean), "and the same call succeeds afterwards"


def test_thread_that_fails_passes_its_notification_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several threads that wait, one is notified. If it fails, another one gets the rest."""
    ring = ring_of(4)
    read, failures = ring._read, iter([MemoryError()])

    def failing(start: int, end: int) -> "array[int]":
        for error in failures:
            raise error
        return read(start, end)

    monkeypatch.setattr(ring, "_read", failing)
    workers = [Blocked(lambda: ring.reserve(4)) for _ in range(2)]
    eventually(lambda: ring._idle_workers == 2)
    ring.put(array("q", (1,)), A, 0)
    eventually(lambda: ring._idle_workers == 0)
    results = []
    for worker in workers:
        try:
            results.append(list(worker.result().values))
        except MemoryError:
            results.append([])
    assert sorted(results) == [[], [1]]


def test_commit_wakes_only_the_threads_whose_values_it_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    woken: list[int] = []
    waiter = ringbuffer._Waiter
    real = waiter.wake
    monkeypatch.setattr(waiter, "wake", lambda self: (woken.append(self.end), real(self)))
    ring = ring_of(4, 1, 2, 3)
    calls = [Blocked(lambda end=end: ring.wait_committed(0, end, DEADLINE)) for end in (3, 1, 2)]  # type: ignore[misc]
    eventually(lambda: len(ring._waiters) == 3)
    ring.commit(ring.reserve(1))
    assert calls[1].result() and woken == [1]
    assert not ring.wait_committed(0, 3, 0.01) and len(ring._waiters) == 2, "a waiter that gives up leaves nothing"
    ring.commit(ring.reserve(2))
    assert calls[0].result() and calls[2].result() and woken == [1, 2, 3] and not ring._waiters
