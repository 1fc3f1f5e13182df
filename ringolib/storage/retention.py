"""Retention: deletes records older than `--retain` days in short steps, while new records are stored.

The thread `retain` deletes for a few milliseconds, then pauses so that commits get most of the time, and so on. When no
record is old enough, it waits until the oldest one will be, but at most MAX_WAIT_SECONDS. `_lock` guards the figures
for the stats and the stop flag. `_stop_requested` shares it: `stop` notifies it, and only the thread waits on it. The
thread deletes without the lock.

The age of a record follows from `received_at_ms`, the wall clock at its arrival. A clock that is set a year ahead would
make every record too old. Therefore a clock that leaps ahead, by itself or compared with the newest record at the
start, is trusted only after it has stayed there for LEAP_TRUSTED_SECONDS. A clock that goes back is trusted at once.
No other module depends on the wall clock in a way that can lose records.

Rows of `batch` identify duplicates. They stay for DUPLICATES_KNOWN_SECONDS after their records: a publisher may lose
its connection before it receives an ack, and send the records again from its spool much later. They cannot stay for
ever: each connection of a client without a source of its own gets a new source, and its rows are larger than its
records.
"""

import logging
import threading
import time
from time import monotonic
from typing import NamedTuple, Protocol

from ringolib.storage.oldest import ExpireResult
from ringolib.timing import deadline_after, start_thread, wait_until

log = logging.getLogger("ringoexp.retain")

DAY_SECONDS = 86_400.0
STEP_SECONDS = 0.005
"""How long a step deletes before it commits. Commits of records wait for it."""
MAX_STEP_SECONDS = 0.1
"""The longest step, used if commits are long: a step waits for a commit each time, so short steps would fall behind."""
PAUSE_RATIO = 3.0
"""Step and pause: a pause is this many times as long as the step before it, less the time that the step waited."""
MIN_WAIT_SECONDS, MAX_WAIT_SECONDS = 1.0, 60.0
"""Limits of the wait after a step that has left nothing to delete."""
RETRY_SECONDS = 5.0
"""The wait after an error."""
DUPLICATES_KNOWN_SECONDS = 7 * DAY_SECONDS
"""How long after its deletion a record that is sent again is still known, and not stored again."""
LEAP_TRUSTED_SECONDS = DAY_SECONDS
"""How long a clock that has leapt ahead must stay there: time for NTP or an operator to correct it."""
CLOCK_TOLERANCE_SECONDS = 60.0
"""A clock may be ahead of the expected time by this much; more is a leap."""
LOG_INTERVAL_SECONDS = 3600.0
"""The time between two log lines with the number of deleted records. The rest is logged at the stop."""


class RetentionStats(NamedTuple):
    """A snapshot."""

    expired: int  # records deleted since the start
    oldest: float  # seconds since the arrival of the oldest record, by the wall clock; 0 without records


class ExpiringStore(Protocol):
    """A store that can delete its oldest records; see `store.Store.expire`."""

    def expire(self, before_ms: int, forget_ms: int, seconds: float) -> ExpireResult: ...


class Clock:
    """The wall clock in Unix time, except that a leap ahead takes effect only after LEAP_TRUSTED_SECONDS.

    `newest_record` is the time of the newest record; the first reading is compared with it.
    """

    def __init__(self, newest_record: float | None) -> None:
        wall = time.time()
        self._now = wall if newest_record is None else min(wall, newest_record)
        self._read_at = monotonic()
        self._leapt_at: float | None = None  # monotonic seconds; None if the wall clock is not ahead

    def now(self) -> float:
        """Return the trusted time."""
        wall, read_at = time.time(), monotonic()
        expected = self._now + read_at - self._read_at
        if wall <= expected + CLOCK_TOLERANCE_SECONDS:
            self._leapt_at = None
        else:
            self._leapt_at = read_at if self._leapt_at is None else self._leapt_at
            if read_at - self._leapt_at < LEAP_TRUSTED_SECONDS:
                wall = expected
        self._now, self._read_at = wall, read_at
        return wall


class Retention:
    """Deletes records of `store` that are older than `days`, a number that may have a fraction.

    The constructor starts the thread; it raises ThreadError if none can be started.
    """

    def __init__(self, store: ExpiringStore, days: float) -> None:
        self._store = store
        self._keep_seconds = days * DAY_SECONDS

        self._lock = threading.Lock()
        self._stop_requested = threading.Condition(self._lock)
        # Guarded by _lock.
        self._stopping = False
        self._expired = 0
        self._oldest_ms: int | None = None  # arrival of the oldest record, Unix time

        # Used only by the thread.
        self._clock: Clock | None = None  # None until the first step has succeeded in reading the newest record
        self._step_seconds = STEP_SECONDS  # the length of the next step
        self._failing = False
        self._paused = False  # by a doubtful clock; this is logged
        self._unlogged_records = self._unlogged_batches = 0
        self._logged_at = monotonic()

        self._thread = start_thread(self._run, name="retain")

    def stats(self) -> RetentionStats:
        """Return a snapshot."""
        with self._lock:
            age = 0.0 if self._oldest_ms is None else max(0.0, time.time() - self._oldest_ms / 1000)
            return RetentionStats(self._expired, age)

    def stop(self, timeout: float) -> bool:
        """End the thread after its current step. True if it has ended within `timeout` seconds."""
        with self._lock:
            self._stopping = True
            self._stop_requested.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # The thread.

    def _run(self) -> None:
        stopping = False
        while not stopping:
            deadline = deadline_after(self.step())
            with self._lock:
                stopping = wait_until(self._stop_requested, lambda: self._stopping, deadline)
        self._log_deletions()

    def step(self) -> float:
        """Delete for one step and return the seconds to wait before the next one."""
        try:
            seconds = self._delete()
        except Exception as error:  # for example a full disk; the store has rolled back
            level = logging.DEBUG if self._failing else logging.ERROR
            log.log(
                level, "retain_error", {"error": str(error) or repr(error)}, exc_info=log.isEnabledFor(logging.DEBUG)
            )
            self._failing = True
            return RETRY_SECONDS
        self._failing = False
        return seconds

    def _delete(self) -> float:
        """Delete for one step and return the seconds to wait. Raises StoreError if that fails."""
        if self._clock is None:
            newest_ms = self._store.expire(0, 0, 0).newest_ms
            self._clock = Clock(None if newest_ms is None else newest_ms / 1000)
        now = self._clock.now()
        before = now - self._keep_seconds
        forget = before - DUPLICATES_KNOWN_SECONDS
        started = monotonic()
        result = self._store.expire(int(before * 1000), int(forget * 1000), self._step_seconds)
        waited = monotonic() - started - result.seconds  # for commits of records
        # The next step takes a third of the time that this one waited: then deletions get a quarter of the time.
        self._step_seconds = min(MAX_STEP_SECONDS, max(STEP_SECONDS, waited / PAUSE_RATIO))
        self._count(result)
        if result.more:
            return max(0.0, PAUSE_RATIO * result.seconds - waited)
        self._log_if_clock_pauses_retention(result, now)
        until_oldest_expires = (result.oldest_ms or 0) / 1000 + self._keep_seconds - now
        return min(max(until_oldest_expires, MIN_WAIT_SECONDS), MAX_WAIT_SECONDS)

    def _count(self, result: ExpireResult) -> None:
        """Add a step to the totals, and log them from time to time."""
        with self._lock:
            self._expired += result.records
            self._oldest_ms = result.oldest_ms
        self._unlogged_records += result.records
        self._unlogged_batches += result.batches
        if monotonic() - self._logged_at >= LOG_INTERVAL_SECONDS:
            self._log_deletions()

    def _log_deletions(self) -> None:
        """Log the number of rows deleted since the last such line."""
        if self._unlogged_records or self._unlogged_batches:
            log.info("expired", {"records": self._unlogged_records, "batches_forgotten": self._unlogged_batches})
            self._unlogged_records = self._unlogged_batches = 0
            self._logged_at = monotonic()

    def _log_if_clock_pauses_retention(self, result: ExpireResult, now: float) -> None:
        """Log once if records stay only because the clock is doubtful, or was when they arrived."""
        oldest, wall = (result.oldest_ms or 0) / 1000, time.time()
        reason = None
        if oldest > wall + CLOCK_TOLERANCE_SECONDS:
            reason = "the oldest records are dated in the future: the clock was ahead when they arrived"
        elif (
            wall - now > CLOCK_TOLERANCE_SECONDS
            and oldest < wall - self._keep_seconds
            and result.oldest_ms != result.newest_ms  # the newest record stays in any case
        ):
            reason = "the clock has leapt ahead, or is far ahead of the newest record: it is trusted after a day"
        if reason and not self._paused:
            log.warning("retention_paused", {"reason": reason, "oldest_age_seconds": round(wall - oldest)})
        self._paused = reason is not None
