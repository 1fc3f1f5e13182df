"""The rules of `GET /v1.0/ready`: from the facts about a server to the reasons why it is not ready.

A server is ready if a record sent now would be stored now. All functions here are pure: `readiness.py` collects the
facts, and `probe.py` asks.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ringbuffer import RingStats
from ringolib.forward.health import HealthStats

ACK_FRESH_SECONDS = 1.0
"""An ack at most this old proves that the consumer stores records."""
RING_STUCK_SECONDS = 1.0
"""A full ring is a reason once its oldest batch has waited this long. Before that it is normal backpressure."""
CONNECTIONS_FULL = "connections_full"
"""Code of a reason that does not concern a publisher with a link: the link is one of the connections."""
RING_FULL = "ring_full"
"""Code of a reason that only says that records wait."""


class Reason(NamedTuple):
    """Why a server is not ready: a code for programs, a text for people, and for how many seconds, if known."""

    code: str
    detail: str
    seconds: float | None = None


class Known(NamedTuple):
    """The facts that decide where a record would be stored. A fact that could not change the result may be missing.

    A server with consumers stores at one of them, or else in its spool. Any other server stores in its own database.
    """

    consumers: Sequence[Reason | None] | None = None  # why each one does not store; None without consumers
    has_spool: bool = False
    spool_full: str | None = None  # why the spool takes no more records
    disk: Reason | None = None  # why the database, or the spool's, cannot commit


def not_ready(known: Known, ring: RingStats | None) -> list[Reason]:
    """Return the reasons why a record sent now would not be stored now; an empty list if it would.

    One consumer that stores is enough. A spool that stores replaces all of them.
    """
    reasons: list[Reason | None] = []
    if known.consumers is None:
        reasons = [known.disk]
    elif None not in known.consumers:
        spool = Reason("spool_full", known.spool_full) if known.spool_full else known.disk
        if not known.has_spool or spool:
            reasons = [*known.consumers, spool]
    reasons.append(ring_full(ring) if ring else None)
    return [reason for reason in reasons if reason]


def ring_full(ring: RingStats) -> Reason | None:
    """Return a reason if all slots are in use and the oldest batch does not get on."""
    if ring.depth < ring.capacity or ring.oldest_in_flight < RING_STUCK_SECONDS:
        return None
    return Reason(RING_FULL, f"all {ring.capacity} slots are in use", ring.oldest_in_flight)


def must_ask(health: HealthStats, untried: bool) -> bool:
    """True if the links to a consumer do not show whether it stores, so that it has to be asked.

    While a consumer is down, a worker or the spool's thread tries it again and again. `untried` is true if there is a
    link again but no record to try it with.
    """
    return untried if health.state == "down" else health.quiet >= ACK_FRESH_SECONDS


def consumer_reason(health: HealthStats, untried: bool, answer: Reason | None) -> Reason | None:
    """Return why a consumer does not store. `answer` is its own, and counts only if it must be asked."""
    if must_ask(health, untried):
        return answer
    if health.state == "down":
        return Reason("consumer_unreachable", health.reason or "", health.away)
    return None


def reported_health(health: HealthStats, reason: Reason | None, answered: bool) -> HealthStats:
    """Return the state of a consumer for stats and metrics: the state of its links, corrected by its own answer.

    `reason` is the result of `consumer_reason`. `answered` is true if the consumer
    has answered, and the answer has not expired.
    """
    if reason and reason.code == "consumer_unreachable":
        return health._replace(state="down", reason=reason.detail, away=reason.seconds or 0.0)
    if health.state == "unknown" and answered and (not reason or reason.code == "consumer_not_ready"):
        return health._replace(state="up")
    return health
