"""The table of numbers: its names, its values with and without each part, and the documents that list it."""

import json
import re

import pytest
from support.harness import ROOT

from ringbuffer import RingLayout, RingStats
from ringolib.counters import BOUNDS_SECONDS, HistogramSnapshot, TotalsSnapshot
from ringolib.forward.health import HealthStats
from ringolib.forward.pool import ForwarderStats
from ringolib.forward.spool import SpoolStats
from ringolib.status.numbers import MEMORY_STATS, NUMBERS, STATS, Number, to_json
from ringolib.status.process import MemoryStats
from ringolib.status.prometheus import metrics_text
from ringolib.status.readiness import ConsumerStats
from ringolib.status.snapshot import Snapshot
from ringolib.storage.interface import Sizes, StoreStats
from ringolib.storage.retention import RetentionStats
from ringolib.web.connections import ConnectionStats

METRICS_DOC = (ROOT / "docs/metrics.md").read_text()
METRICS = [number.metric for number in NUMBERS if number.metric]

HISTOGRAM = HistogramSnapshot(counts=(1,) * (len(BOUNDS_SECONDS) + 1), sum=2.5)
BARE = Snapshot(
    version="1.2.3",
    started_at=0.0,
    memory=MemoryStats(1, 2, 3, [4, 5, 6], [7, 8, 9]),
    totals=TotalsSnapshot(10, 11, 12, 13, 14, 15, None, None, HISTOGRAM),
    connections=ConnectionStats(16, 17, 18, 19, 20),
    unfinished=55,
    ring=None,
    layout=None,
    forwarder=None,
    consumers=[],
    store=None,
    spool=None,
    retention=None,
    disk=None,
    sizes=None,
    certificate_ends=None,
    not_ready=[],
)
STORE = StoreStats(21, 22, 23, 24, None, 25, HISTOGRAM)
FULL = BARE._replace(
    totals=BARE.totals._replace(ack_latency_p50_ms=1.5, ack_latency_p99_ms=2.5),
    ring=RingStats(
        capacity=30,
        cursor=31,
        reserved=32,
        committed=33,
        stored=34,
        depth=35,
        backlog=36,
        in_flight=37,
        high_water=38,
        times_full=39,
        oldest_in_flight=0.0404,
    ),
    layout=RingLayout(30, 33, 32, 31, [], [], 0),
    forwarder=ForwarderStats(41, 42, 43),
    consumers=[ConsumerStats("a:1", HealthStats("down", "gone", 4.4, 5.0), 45, 46)],
    store=STORE,
    spool=SpoolStats(47, 4.8, 49),
    retention=RetentionStats(50, 5.1),
    disk=STORE._replace(error="full"),
    sizes=Sizes(52, 53, 54),
    certificate_ends=86400.0,
    not_ready=["disk_full"],
)
"""A snapshot with every part, which no single server has, and a different value for each number."""


def test_keys_and_metric_names_are_unique() -> None:
    for numbers in (STATS, MEMORY_STATS):
        keys = [number.key for number in numbers if number.key]
        assert len(set(keys)) == len(keys) > 3
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names) > 40


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.key or number.metric.name)
def test_number_has_a_key_or_a_metric_with_a_proper_name(number: Number) -> None:
    assert number.key or number.metric
    if number.key:
        assert re.fullmatch("[a-z][A-Za-z0-9]+", number.key)
    if number.metric:
        name, kind, text = number.metric
        assert re.fullmatch("(ringoexp|process|python)_[a-z_]+", name)
        assert kind in ("counter", "gauge", "histogram") and name.endswith("_total") == (kind == "counter")
        assert re.fullmatch(r"[A-Z0-9][^\n\\|]+\.", text), "one line, which needs no escapes"


def test_full_snapshot_has_every_number() -> None:
    missing = [number.key or number.metric for number in NUMBERS if number.read(FULL) is None]
    assert missing == []
    json.dumps([to_json(STATS, FULL), to_json(MEMORY_STATS, FULL)])


def test_stats_of_a_full_snapshot() -> None:
    assert to_json(STATS, FULL) == {
        "startTime": "1970-01-01T00:00:00.000Z",
        "recordsReceived": 10,
        "recordsStored": 21,
        "recordsAcked": 13,
        "recordsDuplicate": 22,
        "recordsRefused": 11,
        "recordsExpired": 50,
        "oldestRecordMs": 5100,
        "commits": 23,
        "failedCommits": 24,
        "storeError": "full",
        "powerSafe": True,
        "databaseBytes": 52,
        "walBytes": 53,
        "diskFreeBytes": 54,
        "bytesReceived": 12,
        "connections": 16,
        "totalConnections": 17,
        "unauthorizedRequests": 19,
        "tlsFailures": 20,
        "certificateExpires": "1970-01-02T00:00:00.000Z",
        "refusedConnections": 18,
        "unfinishedBytes": 55,
        "clients": 14,
        "publishers": 15,
        "ringSize": 30,
        "ringDepth": 35,
        "ringInFlight": 37,
        "ringHighWater": 38,
        "ringTimesFull": 39,
        "ringOldestInFlightMs": 40.4,
        "workers": 41,
        "mostWorkers": 42,
        "linkReconnects": 43,
        "notReady": ["disk_full"],
        "consumerState": "down",
        "consumerReason": "gone",
        "consumerAwayMs": 4400,
        "consumers": [
            {"address": "a:1", "state": "down", "reason": "gone", "awayMs": 4400, "workers": 45, "inDoubt": 46}
        ],
        "spoolDepth": 47,
        "spoolOldestMs": 4800,
        "spoolForwarded": 49,
        "ackLatencyP50Ms": 1.5,
        "ackLatencyP99Ms": 2.5,
    }
    assert to_json(MEMORY_STATS, FULL) == {
        "residentBytes": 1,
        "peakBytes": 2,
        "threads": 3,
        "gcCollections": [4, 5, 6],
        "gcCounts": [7, 8, 9],
    }


def test_stats_of_missing_parts_are_zero_or_null() -> None:
    full, bare = to_json(STATS, FULL), to_json(STATS, BARE)
    assert list(bare) == list(full)
    changed = {key: value for key, value in bare.items() if value != full[key]}
    null = {"storeError", "powerSafe", "diskFreeBytes", "certificateExpires", "consumerState", "consumerReason"}
    null |= {"ackLatencyP50Ms", "ackLatencyP99Ms"}
    assert {key for key, value in changed.items() if value is None} == null
    assert {key for key, value in changed.items() if value == []} == {"notReady", "consumers"}
    zero = {key for key, value in changed.items() if value == 0}
    assert zero == changed.keys() - null - {"notReady", "consumers"}
    assert {"recordsStored", "commits", "ringSize", "workers", "spoolDepth", "consumerAwayMs"} <= zero


def test_metrics_of_missing_parts_are_left_out() -> None:
    text = metrics_text(BARE)
    for name in ("ringoexp_ring_slots", "ringoexp_workers", "ringoexp_consumer_up", "ringoexp_link_up"):
        assert name not in text and name in metrics_text(FULL)
    for name in ("ringoexp_spool_records", "ringoexp_commits_total", "ringoexp_database_bytes"):
        assert name not in text and name in metrics_text(FULL)
    assert "ringoexp_disk_free_bytes" not in metrics_text(FULL._replace(sizes=Sizes(1, 2, None)))


def test_metrics_have_base_units_and_booleans_are_numbers() -> None:
    lines = metrics_text(FULL).splitlines()
    for line in (
        'ringoexp_build_info{version="1.2.3",role="publisher"} 1',
        "process_start_time_seconds 0.0",
        "ringoexp_ring_oldest_unstored_seconds 0.0404",
        "ringoexp_store_failing 1",
        "ringoexp_power_safe 1",
        "ringoexp_ready 0",
        "ringoexp_consumer_up 0",
        "ringoexp_consumer_away_seconds 4.4",
        'ringoexp_link_up{consumer="a:1"} 0',
        'ringoexp_link_away_seconds{consumer="a:1"} 4.4',
        'ringoexp_link_workers{consumer="a:1"} 45',
        'ringoexp_link_in_doubt_records{consumer="a:1"} 46',
        "ringoexp_certificate_expires_timestamp_seconds 86400.0",
        'ringoexp_ack_latency_seconds_bucket{le="0.0001"} 1',
        f'ringoexp_ack_latency_seconds_bucket{{le="+Inf"}} {len(BOUNDS_SECONDS) + 1}',
        "ringoexp_ack_latency_seconds_sum 2.5",
        'python_gc_collections_total{generation="2"} 6',
    ):
        assert line in lines, line


def test_metrics_document_lists_exactly_the_metrics() -> None:
    documented = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*) \|$", METRICS_DOC, re.MULTILINE)
    assert documented == [tuple(metric) for metric in METRICS]
