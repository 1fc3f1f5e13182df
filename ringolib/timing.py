"""TODO: ringolib/timing.py."""

import datetime
import random

BACKOFF_FIRST = 0.1
BACKOFF_MOST = 5.0


def backoff(failures: int) -> float:
    """Seconds to wait before another connection is tried, after so many failures in a row: exponential, full jitter."""
    return random.uniform(0, min(BACKOFF_MOST, BACKOFF_FIRST * 2 ** min(failures, 16)))


def iso(moment: datetime.datetime) -> str:
    """A moment in UTC, ISO 8601, to the millisecond."""
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def at(moment: float) -> str:
    """A Unix time, ISO 8601 in UTC."""
    return iso(datetime.datetime.fromtimestamp(moment, datetime.timezone.utc))


def ago(seconds: float) -> str:
    """The time so many seconds ago, ISO 8601 in UTC, by the wall clock: for people to read."""
    return iso(datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(seconds=seconds))
