"""Counts, percentiles and the process's own figures."""

import sys
import threading

import pytest

import stats
from stats import Totals, memory


def test_totals_add_up_from_many_threads() -> None:
    totals = Totals()

    def add() -> None:
        for _ in range(1000):
            totals.read(10)
            totals.received(3)
            totals.refused()
            totals.acked([0.001])

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert totals.snapshot() == (12_000, 4000, 40_000, 1.0, 1.0)


def test_there_is_no_latency_before_the_first_ack() -> None:
    assert Totals().snapshot()[3:] == (None, None)


@pytest.mark.parametrize(
    ("seconds", "p50", "p99"),
    [([0.001], 1, 1), ([0.002, 0.001], 1, 2), ([n / 1000 for n in range(100, 0, -1)], 50, 99)],
)
def test_percentiles_are_by_nearest_rank(seconds: list[float], p50: float, p99: float) -> None:
    totals = Totals()
    totals.acked(seconds)
    assert totals.snapshot()[3:] == (p50, p99)


def test_only_the_latest_latencies_count() -> None:
    totals = Totals()
    totals.acked([9.0] * stats.LATENCIES_KEPT)
    totals.acked([0.001] * stats.LATENCIES_KEPT)
    assert totals.snapshot()[3:] == (1.0, 1.0)


def test_memory_is_that_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    now = memory()
    assert 5e6 < now["residentBytes"] <= now["peakBytes"]
    assert now["threads"] == threading.active_count()
    assert len(now["gcCollections"]) == len(now["gcCounts"]) == 3

    def no_proc(*unused: object, **also: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(stats, "open", no_proc, raising=False)
    if sys.platform != "win32":
        assert memory()["residentBytes"] == memory()["peakBytes"] > 5e6
