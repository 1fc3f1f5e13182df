"""Totals, percentiles, histograms, and the memory and descriptors of this process."""

import sys
import threading

import pytest

from ringolib.counters import BOUNDS_SECONDS, MAX_LATENCIES, Histogram, Totals
from ringolib.status import process


def test_totals_add_up_from_many_threads() -> None:
    totals = Totals()

    def add() -> None:
        for _ in range(1000):
            totals.add_bytes(10)
            totals.add_records(3)
            totals.add_refused()
            totals.add_acked(2, [0.001])
            totals.client_opened(batches=False)
            totals.client_opened(batches=True)
            totals.client_closed(batches=False)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    snapshot = totals.snapshot()
    assert snapshot[:-1] == (12_000, 4000, 40_000, 8000, 4000, 4000, 1.0, 1.0)
    assert sum(snapshot.ack_latency.counts) == 4000 and snapshot.ack_latency.sum == pytest.approx(4)


def test_percentiles_are_none_before_the_first_ack() -> None:
    snapshot = Totals().snapshot()
    assert snapshot.ack_latency_p50_ms is snapshot.ack_latency_p99_ms is None


@pytest.mark.parametrize(
    ("seconds", "p50", "p99"),
    [([0.001], 1, 1), ([0.002, 0.001], 1, 2), ([n / 1000 for n in range(100, 0, -1)], 50, 99)],
)
def test_percentiles_use_the_nearest_rank(seconds: list[float], p50: float, p99: float) -> None:
    totals = Totals()
    totals.add_acked(1, seconds)
    snapshot = totals.snapshot()
    assert (snapshot.ack_latency_p50_ms, snapshot.ack_latency_p99_ms) == (p50, p99)


def test_percentiles_use_only_the_latest_latencies() -> None:
    totals = Totals()
    totals.add_acked(1, [9.0] * MAX_LATENCIES)
    totals.add_acked(1, [0.001] * MAX_LATENCIES)
    snapshot = totals.snapshot()
    assert (snapshot.ack_latency_p50_ms, snapshot.ack_latency_p99_ms) == (1.0, 1.0)


def test_bounds_of_buckets_are_inclusive() -> None:
    histogram = Histogram()
    for bound in BOUNDS_SECONDS:
        histogram.add(bound)
    assert histogram.snapshot().counts == (1,) * len(BOUNDS_SECONDS) + (0,)
    histogram.add(BOUNDS_SECONDS[-1] + 1)
    histogram.add(0.0)
    assert histogram.snapshot().counts == (2,) + (1,) * len(BOUNDS_SECONDS)
    assert histogram.snapshot().sum == pytest.approx(sum(BOUNDS_SECONDS) + BOUNDS_SECONDS[-1] + 1)


def test_memory_describes_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = process.memory()
    assert 5e6 < memory.resident_bytes <= memory.peak_bytes
    assert memory.threads == threading.active_count()
    assert len(memory.gc_collections) == len(memory.gc_counts) == 3

    def no_proc(*unused: object, **also: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(process, "open", no_proc, raising=False)
    if sys.platform != "win32":
        memory = process.memory()
        assert memory.resident_bytes == memory.peak_bytes > 5e6


def test_descriptors_are_none_if_the_system_reports_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_proc(path: str) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr(process.os, "listdir", no_proc)
    assert process.open_descriptors() is None
    unlimited = process.resource.RLIM_INFINITY
    monkeypatch.setattr(process.resource, "getrlimit", lambda kind: (unlimited, unlimited))
    assert process.max_descriptors() is None


def test_cpu_time_and_descriptors_grow_with_their_use() -> None:
    before, cpu = process.open_descriptors(), process.cpu_seconds()
    with open("/dev/null") as file:
        assert file
        if before is not None:
            assert process.open_descriptors() == before + 1
    while process.cpu_seconds() == cpu:
        sum(range(10_000))
