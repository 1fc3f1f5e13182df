"""The formats of a log line: `key=value` (logfmt), JSON, and lines for people on a terminal.

logfmt and JSON have all fields, with times in UTC. On a terminal, the time is short and local, the level has a colour,
and the events `started` and `stopped` are sentences. All functions are pure, except that `choose_format` looks at
stderr and at the environment.
"""

import datetime
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ringolib.printable import escape_controls
from ringolib.timing import format_utc

STARTED, STOPPED = "started", "stopped"
MAX_TEXT_LENGTH = 1000
"""Characters of a text. The rest is cut off, because clients may have written it."""
MAX_LINE_BYTES = 4096
"""A pipe takes this many bytes at once (PIPE_BUF). Texts of a longer line are cut further."""
COLOURS = {"debug": "2", "info": "32", "warning": "33", "error": "31", "critical": "1;31"}
"""The colour of each level, as a parameter of ECMA-48's SGR: dim, green, yellow, red, bold red."""
LEVEL_WIDTH = len("warning")
ALL_ADDRESSES = {"0.0.0.0": "all IPv4 addresses", "::": "all addresses"}

Format = Callable[[logging.LogRecord], str]
"""Returns a record as a line, without the line end."""


def choose_format(as_json: bool) -> Format:
    """Return the format for stderr. On a terminal that has colours, NO_COLOR turns them off (no-color.org)."""
    if as_json:
        return format_json
    if not (sys.stderr and sys.stderr.isatty()):
        return format_logfmt
    is_plain = os.environ.get("NO_COLOR") or (os.environ.get("TERM") or "dumb") == "dumb"
    return format_plain if is_plain else format_coloured


def is_own(record: logging.LogRecord) -> bool:
    """True if the record comes from this program, not from a library."""
    return record.name.startswith("ringoexp")


def format_json(record: logging.LogRecord) -> str:
    """Return the record as a JSON object."""
    return _shorten(_machine_fields(record), lambda fields: json.dumps(fields, default=str))


def format_logfmt(record: logging.LogRecord) -> str:
    """Return the record as `key=value` words."""
    return _shorten(_machine_fields(record), _words)


def format_plain(record: logging.LogRecord) -> str:
    """Return the record as a line for people, without colours."""
    return _format_for_people(record, lambda text, colour: text)


def format_coloured(record: logging.LogRecord) -> str:
    """Return the record as a line for people, with a colour for the level."""
    return _format_for_people(record, lambda text, colour: f"\x1b[{colour}m{text}\x1b[0m")


def sentence(event: str, fields: Mapping[str, Any]) -> str | None:
    """Return the sentence for the event `started` or `stopped`; None for any other event."""
    if event == STARTED:
        return _started(fields)
    return _stopped(fields) if event == STOPPED else None


# The fields of a record.


def _machine_fields(record: logging.LogRecord) -> dict[str, Any]:
    """Return all fields of a line in their order."""
    created = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
    head = {"time": format_utc(created), "level": record.levelname.lower(), "event": _event(record)}
    return {**head, **_own_fields(record), "thread": record.threadName, "logger": record.name}


def _event(record: logging.LogRecord) -> str:
    """Return the name of the event. What a library logs is the event `message`."""
    return record.msg if is_own(record) else "message"


def _own_fields(record: logging.LogRecord) -> dict[str, Any]:
    """Return the fields that the caller has given, and the cause."""
    fields: dict[str, Any] = {}
    if not is_own(record):
        fields["message"] = record.getMessage()
    elif isinstance(record.args, Mapping):
        fields.update(record.args)
    if record.exc_info and record.exc_info[1]:
        fields["cause"] = " <- ".join(_causes(record.exc_info[1]))
    return {key: _truncate(value, MAX_TEXT_LENGTH) for key, value in fields.items()}


def _causes(error: BaseException | None) -> Iterator[str]:
    """Yield a text for the error and for each error that caused it, with the calls in progress, innermost first."""
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


def _shorten(fields: dict[str, Any], join: Callable[[dict[str, Any]], str]) -> str:
    """Return the fields as a line of less than MAX_LINE_BYTES, with shorter texts if need be."""
    line = join(fields)
    length = MAX_TEXT_LENGTH
    while len(line) >= MAX_LINE_BYTES and length > 10:  # the line is ASCII: a character is a byte
        length //= 4
        line = join({key: _truncate(value, length) for key, value in fields.items()})
    return line


def _truncate(value: Any, length: int) -> Any:
    """Cut a text off after `length` characters. Return any other value as it is."""
    return f"{value[:length]}..." if isinstance(value, str) and len(value) > length else value


def _words(fields: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={_word(value)}" for key, value in fields.items())


def _word(value: Any) -> str:
    """Return a value as one word if it is one, else as a JSON string: quoted, on one line, in ASCII."""
    text = json.dumps(value) if isinstance(value, int | float | None) else str(value)
    is_word = text.isascii() and text.isprintable() and not any(c in text for c in ' "=\\')
    return text if text and is_word else json.dumps(text)


# Lines for people.


def _format_for_people(record: logging.LogRecord, paint: Callable[[str, str], str]) -> str:
    """Return a line without thread and logger. It begins at the left edge, over the ^C of a terminal's Ctrl-C."""
    created = datetime.datetime.fromtimestamp(record.created)
    event, fields, level = _event(record), _own_fields(record), record.levelname.lower()
    head = f"\r{paint(f'{created:%H:%M:%S}', COLOURS['debug'])}"
    if text := sentence(event, fields):
        return f"{head} {escape_controls(text)}"
    return f"{head} {paint(f'{level:<{LEVEL_WIDTH}} {event}', COLOURS[level])} {_words(fields)}".rstrip()


def _started(fields: Mapping[str, Any]) -> str:
    """Return the sentence that tells the address, the role, and where records go."""
    host = str(fields["address"]).rpartition(":")[0].strip("[]")
    reach = f" ({ALL_ADDRESSES[host]})" if host in ALL_ADDRESSES else ""
    if "database" in fields:
        target = f"storing in {fields['database']}"
    else:
        target = f"forwarding to {fields['consumer']}"
    if days := fields.get("retain_days"):
        target += f" for {days:g} days"
    if spool := fields.get("spool"):
        depth = fields["spooled"]
        target += f", spooling in {spool}" + (f" ({depth} records in it)" if depth else "")
    token, tls = ("on" if fields[key] else "off" for key in ("token", "tls"))
    head = f"ringoexp {fields['version']}: {fields['role']} on {fields['url']}{reach}"
    return f"{head} {target}, token {token}, TLS {tls}"


def _stopped(fields: Mapping[str, Any]) -> str:
    """Return the sentence with the numbers of records."""
    tally = f"ringoexp: stopped, {fields['stored']} stored, {fields['unstored']} unstored"
    return f"{tally}, {fields['spooled']} in the spool" if "spooled" in fields else tally
