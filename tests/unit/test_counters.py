"""Counts, percentiles and the process's own figures."""

import sys
import threading

import pytest

from ringolib import counters as stats
from ringolib.counters import BOUNDS, Histogram, Totals
from ringolib.status import process
from ringolib.status.process import memory


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
    found = totals.snapshot()
    assert found[:-1] == (12_000, 4000, 40_000, 8000, 4000, 4000, 1.0, 1.0)
    assert sum(found.ack_latency.counts) == 4000 and found.ack_latency.sum == pytest.approx(4)


def test_there_is_no_latency_before_the_first_ack() -> None:
    found = Totals().snapshot()
    assert found.ack_latency_p50_ms is found.ack_latency_p99_ms is None


@pytest.mark.parametrize(
    ("seconds", "p50", "p99"),
    [([0.001], 1, 1), ([0.002, 0.001], 1, 2), ([n / 1000 for n in range(100, 0, -1)], 50, 99)],
)
def test_percentiles_are_by_nearest_rank(seconds: list[float], p50: float, p99: float) -> None:
    totals = Totals()
    totals.add_acked(1, seconds)
    found = totals.snapshot()
    assert (found.ack_latency_p50_ms, found.ack_latency_p99_ms) == (p50, p99)


def test_only_the_latest_latencies_count() -> None:
    totals = Totals()
    totals.add_acked(1, [9.0] * stats.LATENCIES_KEPT)
    totals.add_acked(1, [0.001] * stats.LATENCIES_KEPT)
    found = totals.snapshot()
    assert (found.ack_latency_p50_ms, found.ack_latency_p99_ms) == (1.0, 1.0)


def test_an_observation_is_in_the_bucket_whose_bound_it_does_not_exceed() -> None:
    histogram = Histogram()
    for bound in BOUNDS:
        histogram.add(bound)
    assert histogram.snapshot().counts == (1,) * len(BOUNDS) + (0,)
    histogram.add(BOUNDS[-1] + 1)
    histogram.add(0.0)
    assert histogram.snapshot().counts == (2,) + (1,) * len(BOUNDS)
    assert histogram.snapshot().sum == pytest.approx(sum(BOUNDS) + BOUNDS[-1] + 1)


def test_memory_is_that_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    now = memory()
    assert 5e6 < now["residentBytes"] <= now["peakBytes"]
    assert now["threads"] == threading.active_count()
    assert len(now["gcCollections"]) == len(now["gcCounts"]) == 3

    def no_proc(*unused: object, **also: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(process, "open", no_proc, raising=False)
    if sys.platform != "win32":
        assert memory()["residentBytes"] == memory()["peakBytes"] > 5e6
