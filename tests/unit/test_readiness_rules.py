"""The rules of readiness as truth tables: facts in, reasons out."""

import pytest

from ringbuffer import RingStats
from ringolib.forward.health import HealthStats
from ringolib.status.readiness_rules import (
    ACK_FRESH_SECONDS,
    RING_STUCK_SECONDS,
    Known,
    Reason,
    consumer_reason,
    must_ask,
    not_ready,
    reported_health,
    ring_full,
)

DISK = Reason("store_failing", "disk I/O error")
A, B = Reason("consumer_unreachable", "a:1: refused"), Reason("consumer_not_ready", "b:1: full")
FULL = "4 of 4 records"
SPOOL = Reason("spool_full", FULL)


def ring(depth: int, oldest_in_flight: float) -> RingStats:
    return RingStats(
        capacity=4,
        cursor=depth,
        reserved=depth,
        committed=0,
        stored=0,
        depth=depth,
        backlog=0,
        in_flight=depth,
        high_water=depth,
        times_full=0,
        oldest_in_flight=oldest_in_flight,
    )


def link(state: str, quiet: float, reason: str | None = None) -> HealthStats:
    return HealthStats(state, reason, 7.0 if state == "down" else 0.0, quiet)


@pytest.mark.parametrize(
    ("known", "reasons"),
    [
        pytest.param(Known(), [], id="own store"),
        pytest.param(Known(disk=DISK), [DISK], id="own store fails"),
        pytest.param(Known([]), [], id="no consumer yet"),
        pytest.param(Known([None]), [], id="consumer stores"),
        pytest.param(Known([A]), [A], id="consumer down"),
        pytest.param(Known([A, None]), [], id="one of two consumers stores"),
        pytest.param(Known([A, B]), [A, B], id="both consumers down"),
        pytest.param(Known([None], has_spool=True, spool_full=FULL), [], id="consumer stores, spool full"),
        pytest.param(Known([A], has_spool=True), [], id="consumer down, spool stores"),
        pytest.param(Known([A], has_spool=True, spool_full=FULL), [A, SPOOL], id="consumer down, spool full"),
        pytest.param(Known([A], has_spool=True, disk=DISK), [A, DISK], id="consumer down, spool fails"),
        pytest.param(
            Known([A, B], has_spool=True, spool_full=FULL, disk=DISK), [A, B, SPOOL], id="spool full before it fails"
        ),
        pytest.param(Known([A, None], has_spool=True, disk=DISK), [], id="one of two consumers stores, spool fails"),
    ],
)
def test_reasons_follow_from_the_facts(known: Known, reasons: list[Reason]) -> None:
    assert not_ready(known, None) == reasons
    assert not_ready(known, ring(depth=3, oldest_in_flight=600)) == reasons
    (*first, last) = not_ready(known, ring(depth=4, oldest_in_flight=600))
    assert first == reasons and last == Reason("ring_full", "all 4 slots are in use", 600)


@pytest.mark.parametrize(
    ("depth", "oldest", "full"),
    [
        (0, 0.0, False),
        (3, 2 * RING_STUCK_SECONDS, False),
        (4, 0.0, False),
        (4, RING_STUCK_SECONDS / 2, False),
        (4, RING_STUCK_SECONDS, True),
    ],
)
def test_ring_is_full_once_its_oldest_batch_is_stuck(depth: int, oldest: float, full: bool) -> None:
    assert (ring_full(ring(depth, oldest)) is not None) == full


FRESH, OLD, NEVER = ACK_FRESH_SECONDS / 2, ACK_FRESH_SECONDS, float("inf")
REFUSED = Reason("consumer_unreachable", "refused", 7.0)


@pytest.mark.parametrize(
    ("state", "quiet", "untried", "asked", "reason"),
    [
        ("unknown", NEVER, False, True, B),
        ("up", FRESH, False, False, None),
        ("up", OLD, False, True, B),
        ("down", FRESH, False, False, REFUSED),
        ("down", OLD, False, False, REFUSED),
        ("down", FRESH, True, True, B),
        ("down", OLD, True, True, B),
    ],
)
def test_consumer_is_asked_if_its_links_show_nothing(
    state: str, quiet: float, untried: bool, asked: bool, reason: Reason | None
) -> None:
    stats = link(state, quiet, "refused" if state == "down" else None)
    assert must_ask(stats, untried) is asked
    assert consumer_reason(stats, untried, B) == reason
    if asked:
        assert consumer_reason(stats, untried, None) is None


def test_failed_link_without_a_text_is_a_reason() -> None:
    assert consumer_reason(link("down", OLD), False, None) == Reason("consumer_unreachable", "", 7.0)


OTHER = Reason("failed", "no thread")


@pytest.mark.parametrize(
    ("state", "reason", "answered", "reported"),
    [
        ("unknown", None, False, "unknown"),
        ("unknown", None, True, "up"),
        ("unknown", B, False, "unknown"),
        ("unknown", B, True, "up"),
        ("unknown", OTHER, True, "unknown"),
        ("unknown", A, True, "down"),
        ("unknown", A, False, "down"),
        ("up", None, True, "up"),
        ("up", B, True, "up"),
        ("up", A, True, "down"),
        ("down", None, True, "down"),
        ("down", A, True, "down"),
    ],
)
def test_answer_corrects_the_reported_state(state: str, reason: Reason | None, answered: bool, reported: str) -> None:
    result = reported_health(link(state, OLD), reason, answered)
    assert result.state == reported
    if reason is A:
        assert (result.reason, result.away) == (A.detail, 0.0)
    else:
        assert result == link(state, OLD)._replace(state=reported)


def test_unreachable_consumer_is_down_for_as_long_as_its_reason() -> None:
    assert reported_health(link("up", OLD), A._replace(seconds=5.0), True).away == 5.0
