"""One snapshot of all parts of a server, and the figures that follow from it."""

from typing import NamedTuple

from ringbuffer import RingLayout, RingStats
from ringolib.counters import TotalsSnapshot
from ringolib.forward.spool import SpoolStats
from ringolib.forward.workers import ForwarderStats
from ringolib.status.readiness import ConsumerStats
from ringolib.storage.interface import Sizes, StoreStats
from ringolib.storage.retention import RetentionStats
from ringolib.web.table import ConnectionStats


class Snapshot(NamedTuple):
    """What the rooms say at nearly one moment; None for those that this server does not have."""

    version: str
    started_at: float  # Unix time
    totals: TotalsSnapshot
    connections: ConnectionStats
    ring: RingStats | None
    layout: RingLayout | None
    forwarder: ForwarderStats | None
    consumers: list[ConsumerStats]  # where they are not the server itself
    store: StoreStats | None  # its own database, where it has one
    spool: SpoolStats | None
    retention: RetentionStats | None  # where old records are deleted
    disk: StoreStats | None  # of its own database, or else of its spool
    sizes: Sizes | None  # of that
    certificate_ends: float | None  # Unix time, of its own certificate
    not_ready: list[str]  # the codes of why a record sent now would not be stored now, as far as known without a commit


def consumer_state(now: Snapshot) -> str | None:
    """How it stands with the consumers: "up" if it is with one of them, "down" if they all are; "own" for a publisher
    that is its own, None for a server without one.
    """
    states = [each.link.state for each in now.consumers]
    if not states:
        return "own" if now.ring else None
    return "up" if "up" in states else "unknown" if "unknown" in states else "down"


def consumer_away(now: Snapshot) -> float:
    """Seconds since the last consumer of all has gone; 0 if one is there."""
    return min(each.link.away for each in now.consumers) if consumer_state(now) == "down" else 0.0


def records_stored(store: StoreStats | None, ring: RingStats | None) -> int:
    """Records stored since the start: new ones in the own database, or else acked by the consumer or spooled."""
    return store.stored if store else ring.stored if ring else 0
