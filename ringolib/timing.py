"""Time and threads: deadlines, waiting on conditions, pauses between retries, starting threads, time formats.

A *deadline* is a reading of `time.monotonic`, so it does not move while a call waits several times, and a change of
the wall clock does not affect it. `math.inf` is the deadline that never comes. The formats are the only readers of the
wall clock here, for people.
"""

import datetime
import logging
import math
import random
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any

BACKOFF_FIRST_SECONDS = 0.1
BACKOFF_MAX_SECONDS = 5.0


class ThreadError(RuntimeError):
    """No thread could be started. The text names the system's limit."""


def deadline_after(seconds: float | None) -> float:
    """Return the deadline that is `seconds` away; None means never."""
    return math.inf if seconds is None else monotonic() + seconds


def remaining(deadline: float) -> float:
    """Return the seconds left until `deadline`, at least 0."""
    return max(0.0, deadline - monotonic())


def wait_until(condition: threading.Condition, predicate: Callable[[], bool], deadline: float = math.inf) -> bool:
    """Wait until `predicate` is true or `deadline` has passed, and return whether it is true.

    The caller holds the condition's lock. The predicate is called at least once, under the lock.
    """
    while not predicate():
        seconds = deadline - monotonic()
        if seconds <= 0:
            return False
        condition.wait(None if seconds == math.inf else seconds)
    return True


def backoff(failures: int) -> float:
    """Return the seconds to wait after `failures` failed attempts in a row: exponential, with full jitter."""
    return random.uniform(0, min(BACKOFF_MAX_SECONDS, BACKOFF_FIRST_SECONDS * 2 ** min(failures, 16)))


def start(thread: threading.Thread) -> None:
    """Start `thread`. Raises ThreadError if the system has no thread to give."""
    try:
        thread.start()
    except RuntimeError as error:
        raise ThreadError(f"cannot start a thread: {error} (ulimit -u limits threads)") from error


def start_thread(target: Callable[..., None], *args: Any, name: str) -> threading.Thread:
    """Start a named daemon thread and return it. Raises ThreadError as `start` does.

    A daemon, because a second signal must end the process without the ordered stop.
    """
    thread = threading.Thread(target=target, args=args, name=name, daemon=True)
    start(thread)
    return thread


def log_unexpected(log: logging.Logger, event: str, error: BaseException) -> None:
    """Log an error that nothing expected, as `event`; with its cause if the log is in detail."""
    log.error(event, {"error": repr(error)}, exc_info=error if log.isEnabledFor(logging.DEBUG) else None)


def format_utc(moment: datetime.datetime) -> str:
    """Format a moment in UTC as ISO 8601 with milliseconds."""
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def format_unix_time(seconds: float) -> str:
    """Format a Unix time as ISO 8601 in UTC."""
    return format_utc(datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc))


def format_ago(seconds: float) -> str:
    """Format the moment `seconds` ago, by the wall clock, as ISO 8601 in UTC."""
    return format_utc(datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(seconds=seconds))
