"""The log on stderr: one line per event, in a format of `log_format`, from `started` to `stopped`.

A call is `log.info("link_up", {"consumer": "there:6661"})`: the message is the event's name, and its one argument the
fields. Fields name the client or consumer, counts, durations and causes. They never contain a record's value or a
token.

Clients can cause some events at any rate, so these are rate-limited (RATE_LIMITED_EVENTS). Each event and HTTP status
is a kind, and of each kind one line is written every RATE_LIMIT_SECONDS. If the status is in STATUSES_WITH_NAMES, each
reason is a kind of its own, because it has the name that the client sent. Events in between are pending: they are
counted, and the next line of this kind has the fields of the last event, and the `count`. Pending events are written
at the end of the interval.

If the reader of stderr stalls, lines are dropped and counted, so that the server goes on. So are lines that cannot be
made or written, for example because memory or the disk is full. The next line that can be written is `log_dropped`,
with the count.

The event `stopped` is the last line: pending events are written before it, and nothing after it.

`LineHandler` is the only handler. The logging module holds its lock during `emit`. The thread `log`, which the handler
owns, writes pending events that are due. Without it, they are written with the next line.
"""

import logging
import os
import select
import sys
import threading
import time
from collections.abc import Mapping
from time import monotonic
from typing import Any

from ringolib.status.log_format import STOPPED, Format, choose_format, format_logfmt, is_own
from ringolib.timing import ThreadError, start_thread

RATE_LIMITED_EVENTS = (
    "refused",
    "tls_failed",
    "dashboard_missing",
    "connection_error",
    "cannot_accept",
    "no_thread",
    "slow_commit",
    "waiting_for_room",
    "worker_error",
)
RATE_LIMIT_SECONDS = 1.0
STATUSES_WITH_NAMES = (403, 421)
"""HTTP statuses of refused names and origins: an operator must see each of them."""
MAX_NAMES = 16
"""Reasons of one of these statuses with a line of their own within RATE_LIMIT_SECONDS. The others share a line."""
STALL_TIMEOUT_SECONDS = 0.1
"""How long a line waits for a stalled reader of stderr. Lines after it do not wait until it reads again."""

Kind = tuple[str, Any, Any]
"""Event, HTTP status and name of a rate-limited line. The name is the reason, or None if the events share a line."""


def setup(debug: bool, as_json: bool) -> "LineHandler":
    """Send the log of the whole process to stderr. `debug` includes all events and lifts the rate limit."""
    _open_standard_descriptors()
    handler = LineHandler(choose_format(as_json), rate_limited=() if debug else RATE_LIMITED_EVENTS)
    root = logging.getLogger()
    root.setLevel(logging.DEBUG if debug else logging.INFO)
    root.addHandler(handler)
    return handler


def _open_standard_descriptors() -> None:
    """Open stdin, stdout and stderr on the null device if the process was started without them.

    Otherwise the next socket would get the number of stderr, and the log would be written to it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


class LineHandler(logging.Handler):
    """Writes log records as lines to `descriptor`. Limits the rate of some events, and never waits for long."""

    def __init__(
        self,
        line_format: Format = format_logfmt,
        rate_limited: tuple[str, ...] = RATE_LIMITED_EVENTS,
        descriptor: int = 2,
    ) -> None:
        super().__init__()
        self._line_format = line_format
        self._encoding = sys.stderr.encoding if sys.stderr else "ascii"
        self._rate_limited = rate_limited
        self._descriptor = descriptor
        self._writable = select.poll()
        self._writable.register(descriptor, select.POLLOUT)
        assert self.lock
        self._changed = threading.Condition(self.lock)  # notified when an event becomes pending, and by stop
        self._thread: threading.Thread | None = None
        # Guarded by the handler's lock, which logging holds around emit.
        self._dropped = 0  # lines since one could not be written
        self._is_cut = False  # the disk was full within the last line
        self._written_at: dict[Kind, float] = {}  # lines of the last RATE_LIMIT_SECONDS, monotonic seconds
        self._pending: dict[Kind, tuple[int, logging.LogRecord]] = {}  # number of pending events, and the last one
        self._stopping = False
        self._ended = False  # `stopped` has been written: the last line

    def start(self) -> None:
        """Start the thread that writes pending events, if any event is rate-limited and the system has a thread."""
        if self._rate_limited:
            try:
                self._thread = start_thread(self._run, name="log")
            except ThreadError:
                pass  # pending events are written with the next line, and by stop

    def stop(self) -> None:
        """Write all pending events, and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
            self._write_all_pending()
        if self._thread:
            self._thread.join()

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as a line, without the line end."""
        return self._line_format(record)

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record, or count it as pending. Write pending events that are due.

        Never raises: the caller may be in the middle of its work. A record that cannot be written counts as dropped.
        """
        try:
            self._emit(record, monotonic())
        except Exception:
            self._dropped += 1

    def _emit(self, record: logging.LogRecord, now: float) -> None:
        if self._ended:
            return
        if is_own(record) and record.msg == STOPPED:
            self._write_all_pending()
            self._ended = True
        self._write_due(now)
        if record.msg not in self._rate_limited or not is_own(record):
            self._write(record)
            return
        kind = self._kind_of(record)
        count, _ = self._pending.get(kind, (0, None))
        self._pending[kind] = count + 1, record
        if kind not in self._written_at:
            self._write_pending(kind, now)
        elif not count:
            self._changed.notify()

    def close(self) -> None:
        """Write all pending events and close the handler."""
        with self._changed:
            self._write_all_pending()
        super().close()

    def _kind_of(self, record: logging.LogRecord) -> Kind:
        """Return the kind of a rate-limited record."""
        fields = record.args if isinstance(record.args, Mapping) else {}
        status, name = fields.get("status"), None
        if status in STATUSES_WITH_NAMES:
            name = fields.get("reason")
            names = {kind[2] for kind in self._written_at if kind[:2] == (record.msg, status)} - {None}
            if len(names) >= MAX_NAMES and name not in names:
                name = None
        return record.msg, status, name

    def _write_due(self, now: float) -> None:
        """Write the pending events whose interval is over, and forget older lines."""
        for kind in [kind for kind, at in self._written_at.items() if now - at >= RATE_LIMIT_SECONDS]:
            if kind in self._pending:
                self._write_pending(kind, now)
            else:
                del self._written_at[kind]

    def _write_all_pending(self) -> None:
        for kind in list(self._pending):
            self._write_pending(kind, monotonic())

    def _write_pending(self, kind: Kind, now: float) -> None:
        """Write one line for all pending events of a kind."""
        count, record = self._pending.pop(kind)
        record.args = {**(record.args if isinstance(record.args, Mapping) else {}), "count": count}
        record.created = time.time()  # when the line is written; otherwise times would go backwards
        self._written_at[kind] = now
        self._write(record)

    def _write(self, record: logging.LogRecord) -> None:
        """Write a record, or count it as dropped if the reader has stalled or the record has no text."""
        try:
            line = self.format(record)
        except Exception:  # no memory, or a field that fails in `str`
            self._dropped += 1
            return
        if self._dropped and self._writable.poll(0):
            dropped = logging.LogRecord("ringoexp.log", logging.WARNING, "", 0, "log_dropped", None, None)
            dropped.args = {"count": self._dropped}
            if self._write_now(self.format(dropped)):
                self._dropped = 0
        if self._dropped or not self._writable.poll(STALL_TIMEOUT_SECONDS * 1000):
            self._dropped += 1
            return
        if not self._write_now(line):
            self._dropped += 1

    def _write_now(self, line: str) -> bool:
        """Write a line, and return whether that succeeded. The line after one that was cut begins on its own line."""
        start = "\n" if self._is_cut else ""
        data = f"{start}{line}\n".encode(self._encoding, "backslashreplace")
        try:
            written = os.write(self._descriptor, data)
        except OSError:  # the reader has closed its end, or the disk is full
            return False
        self._is_cut = written < len(data)
        return not self._is_cut

    # The thread.

    def _run(self) -> None:
        with self._changed:
            while not self._stopping:
                self._write_due(monotonic())
                due = min((self._written_at[kind] for kind in self._pending), default=None)
                self._changed.wait(None if due is None else max(0.0, due + RATE_LIMIT_SECONDS - monotonic()))
