"""A snapshot of all parts of a server, and values derived from it.

A snapshot is immutable. The functions here are pure.
"""

from typing import NamedTuple

from ringbuffer import RingLayout, RingStats
from ringolib.counters import TotalsSnapshot
from ringolib.forward.pool import ForwarderStats
from ringolib.forward.spool import SpoolStats
from ringolib.status.process import MemoryStats
from ringolib.status.readiness import ConsumerStats
from ringolib.storage.interface import Sizes, StoreStats
from ringolib.storage.retention import RetentionStats
from ringolib.web.table import ConnectionStats


class Snapshot(NamedTuple):
    """The state of all parts of a server at nearly one moment. A part that the server does not have is None."""

    version: str
    started_at: float  # Unix time
    memory: MemoryStats
    totals: TotalsSnapshot
    connections: ConnectionStats
    unfinished: int  # bytes of unfinished messages and request bodies
    ring: RingStats | None
    layout: RingLayout | None
    forwarder: ForwarderStats | None
    consumers: list[ConsumerStats]  # empty if the server forwards to no consumer
    store: StoreStats | None  # its own database
    spool: SpoolStats | None
    retention: RetentionStats | None
    disk: StoreStats | None  # its own database, or else its spool's
    sizes: Sizes | None  # of the database in `disk`
    certificate_ends: float | None  # Unix time at which its own certificate expires
    not_ready: list[str]  # codes of the reasons why it is not ready, as far as known without a test commit


def consumer_state(snapshot: Snapshot) -> str | None:
    """Return "up", "down" or "unknown" for the consumers together: "up" if one is up, "down" if all are down.

    A publisher that stores in its own database is "own". A consumer has no consumers: None.
    """
    states = [consumer.health.state for consumer in snapshot.consumers]
    if not states:
        return "own" if snapshot.ring else None
    for state in ("up", "unknown"):
        if state in states:
            return state
    return "down"


def consumer_reason(snapshot: Snapshot) -> str | None:
    """Return why the consumers are down, or None if they are not."""
    if consumer_state(snapshot) != "down":
        return None
    return "; ".join(consumer.health.reason or "" for consumer in snapshot.consumers)


def consumer_away(snapshot: Snapshot) -> float:
    """Return the seconds for which all consumers have been down, 0 if they are not."""
    if consumer_state(snapshot) != "down":
        return 0.0
    return min(consumer.health.away for consumer in snapshot.consumers)


def records_stored(store: StoreStats | None, ring: RingStats | None) -> int:
    """Return the records stored since the start.

    With a database of its own, a server counts the new records in it. Without one, it counts the records that the
    consumer acked or that went into the spool.
    """
    if store:
        return store.stored
    return ring.stored if ring else 0
