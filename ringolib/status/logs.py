"""What goes to stderr: one line an event, `key=value` (logfmt) or JSON, times in UTC.

A call says `log.info("link_up", {"consumer": "there:6661"})`: the message is the event's name, the one argument its
fields. Fields say who, how many, how long and why; never a record's value, and never a token.

`Lines` is the only handler; logging holds its lock while it writes. No thread runs here.
"""

import datetime
import json
import logging
import os
import select
import time
from collections.abc import Iterator, Mapping
from time import monotonic
from typing import Any

from ringolib.timing import format_utc

LIMITED = (
    "refused",
    "tls_failed",
    "dashboard_missing",
    "connection_error",
    "cannot_accept",
    "no_thread",
    "slow_commit",
)
"""Events that others can cause at any rate: a line of each kind every LIMIT_SECONDS, which says how many there were."""
LIMIT_SECONDS = 1.0
STALL_SECONDS = 0.1
"""How long a line waits for a reader of stderr that has stalled. The next ones do not: they are counted and dropped."""
MAX_TEXT = 1000
"""Characters of a text; more is cut off: others may have written it."""
MAX_BYTES = 4096
"""Bytes of a line, or its texts are cut further: so many a pipe that has room takes at once (PIPE_BUF)."""


def setup(debug: bool, as_json: bool) -> None:
    """Sends the whole process's log to stderr; with `debug` all of it, and nothing left out."""
    for descriptor in range(3):  # who starts a program without one would have a socket take its place, and get the log
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free
    root = logging.getLogger()
    root.setLevel(logging.DEBUG if debug else logging.INFO)
    root.addHandler(Lines(as_json, limited=() if debug else LIMITED))


class Lines(logging.Handler):
    """Writes records as lines to `descriptor`; of the `limited` events what comes too fast is counted, and told by the
    next line. Never waits for a reader that has stalled: it could hold up the whole server.
    """

    def __init__(self, as_json: bool, limited: tuple[str, ...] = LIMITED, descriptor: int = 2) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._line = _json if as_json else _logfmt
        self._writable = select.poll()
        self._writable.register(descriptor, select.POLLOUT)
        self._dropped = 0  # lines, since the reader has stalled; guarded as what follows
        self._limited = limited
        # Guarded by the handler's lock, which logging holds around emit.
        self._said: dict[tuple[str, Any], float] = {}  # kind -> when its last line was written, monotonic seconds
        self._held: dict[tuple[str, Any], tuple[int, logging.LogRecord]] = {}  # kind -> how many, and the last of them

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line, without its end."""
        fields = _fields(record)
        line = self._line(fields)
        most = MAX_TEXT
        while len(line) >= MAX_BYTES and most > 10:  # ASCII: a character is a byte
            most //= 4
            line = self._line({key: _cut(value, most) for key, value in fields.items()})
        return line

    def emit(self, record: logging.LogRecord) -> None:
        """Writes the record, or counts it; then what was counted and is due."""
        now = monotonic()
        for kind in [kind for kind in self._held if now - self._said[kind] >= LIMIT_SECONDS]:
            self._tell(kind, now)
        if record.msg not in self._limited or not record.name.startswith("ringoexp"):
            self._write(self.format(record))
            return
        kind = record.msg, record.args.get("status") if isinstance(record.args, Mapping) else None
        count, _ = self._held.get(kind, (0, None))
        self._held[kind] = count + 1, record
        if now - self._said.get(kind, float("-inf")) >= LIMIT_SECONDS:
            self._tell(kind, now)

    def close(self) -> None:
        """Writes what was counted, and writes no more."""
        self.acquire()
        try:
            for kind in list(self._held):
                self._tell(kind, monotonic())
        finally:
            self.release()
        super().close()

    def _tell(self, kind: tuple[str, Any], now: float) -> None:
        count, record = self._held.pop(kind)
        record.args = {**(record.args if isinstance(record.args, Mapping) else {}), "count": count}
        record.created = time.time()  # of the line, or times would run backwards
        self._said[kind] = now
        self._write(self.format(record))

    def _write(self, line: str) -> None:
        """Writes a line, or counts it."""
        if self._dropped and self._writable.poll(0):
            told = logging.LogRecord("ringoexp.log", logging.WARNING, "", 0, "log_dropped", None, None)
            told.args = {"count": self._dropped}
            self._put(self.format(told))
            self._dropped = 0
        if self._dropped or not self._writable.poll(STALL_SECONDS * 1000):
            self._dropped += 1
            return
        self._put(line)

    def _put(self, line: str) -> None:
        try:
            os.write(self._descriptor, f"{line}\n".encode(errors="replace"))
        except OSError:
            pass  # nobody reads any more


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """What a line says, in order."""
    at = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
    ours = record.name.startswith("ringoexp")
    found: dict[str, Any] = {
        "time": format_utc(at),
        "level": record.levelname.lower(),
        "event": record.msg if ours else "message",
    }
    if not ours:
        found["message"] = record.getMessage()
    elif isinstance(record.args, Mapping):
        found.update(record.args)
    if record.exc_info and record.exc_info[1]:
        found["cause"] = " <- ".join(_told(record.exc_info[1]))
    found = {key: _cut(value, MAX_TEXT) for key, value in found.items()}
    return {**found, "thread": record.threadName, "logger": record.name}


def _cut(value: Any, most: int) -> Any:
    """A text of at most so many characters; other values as they are."""
    return f"{value[:most]}..." if isinstance(value, str) and len(value) > most else value


def _told(error: BaseException | None) -> Iterator[str]:
    """An error and those that caused it, each with where it was raised, innermost call first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        calls = []
        trace = error.__traceback__
        while trace:
            code = trace.tb_frame.f_code
            calls.append(f"{os.path.basename(code.co_filename)}:{trace.tb_lineno} {code.co_name}")
            trace = trace.tb_next
        yield f"{type(error).__name__}: {error}" + (f" ({', '.join(reversed(calls))})" if calls else "")
        error = error.__cause__ or error.__context__


def _json(fields: dict[str, Any]) -> str:
    return json.dumps(fields, default=str)


def _logfmt(fields: dict[str, Any]) -> str:
    return " ".join(f"{key}={_value(value)}" for key, value in fields.items())


def _value(value: Any) -> str:
    """A value that is one word as it is, others as JSON strings: quoted, in one line, in ASCII."""
    text = json.dumps(value) if isinstance(value, int | float | None) else str(value)
    plain = text.isascii() and text.isprintable() and not any(c in text for c in ' "=\\')
    return text if text and plain else json.dumps(text)
