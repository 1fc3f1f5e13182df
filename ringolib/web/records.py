"""`GET /v1.0/records`: reads the query, and sends the stored records in pages, in bounded memory.

The functions run on the thread of the connection. `StoredRecords` is shared by all of them, and `LongAnswers` limits
the answers that last. An answer of one page is sent whole, with its length and a Link to the next page. Values and
queries are never logged.
"""

import datetime
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple
from urllib.parse import quote, unquote

from ringolib.storage.interface import PAGE_RECORDS, Page, Query, StoreError
from ringolib.web import handler
from ringolib.web.handler import JSON, WebHandler
from ringolib.web.headers import Refusal, media_weight

DEFAULT_LIMIT = 100
MAX_LIMIT = 2**63 - 1
MAX_STREAMS = 16
"""Answers of more than a page, or that follow, at once: each keeps a thread."""
FOLLOW_INTERVAL_SECONDS = 0.25
"""How often an answer that follows looks for new records."""
WRITE_BYTES = 64 * 1024
"""Bytes that a client must read within the time for a response."""
PARAMETERS = ("after", "limit", "source", "since", "order", "format", "follow", "consumer")
TYPES = {
    "json": JSON,
    "ndjson": "application/x-ndjson",
    "csv": "text/csv;charset=utf-8;header=present",
    "text": "text/plain;charset=utf-8",
}
_MEDIA = {"json": "application/json", "ndjson": "application/x-ndjson", "csv": "text/csv", "text": "text/plain"}
CSV_HEADER = b"id,source,sequence,value,received_at\n"
STOPPING = "the server is stopping"
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_AGO = re.compile(r"(\d{1,9})([smhd])", re.ASCII)
_TIME = re.compile(r"(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d)(:\d\d)?(\.\d{1,6})?(Z|[+-]\d\d:\d\d)?)?", re.ASCII)


class RecordsRequest(NamedTuple):
    """A query, and how to answer it."""

    query: Query
    form: str  # of TYPES
    follow: bool
    consumer: str | None  # which of a publisher's consumers to ask

    @property
    def lasts(self) -> bool:
        """True if the answer is longer than a page, or follows."""
        return self.follow or self.query.limit > PAGE_RECORDS


def parse(text: str, accept: str) -> RecordsRequest:
    """Return the request of a query string and the value of Accept. Raises Refusal."""
    values = _split(text)
    follow = _choice(values, "follow", ("0", "1"), "0") == "1"
    descending = _choice(values, "order", ("asc", "desc"), "asc") == "desc"
    form = _form(values, accept, follow)
    if follow and descending:
        raise Refusal(400, "order=desc ends with the oldest record, so it cannot follow: omit one of the two")
    limit = values.get("limit", str(MAX_LIMIT if follow else DEFAULT_LIMIT))
    if not (limit.isascii() and limit.isdigit() and len(limit) <= 19 and 0 < int(limit) <= MAX_LIMIT):
        raise _bad("limit", "a number of records, 1 or more")
    source = None
    if "source" in values:
        try:
            source = uuid.UUID(values["source"]).bytes
        except ValueError:
            raise _bad("source", "a UUID") from None
    since_ms = _parse_time(values["since"]) if "since" in values else None
    line = "ndjson" if form == "json" else form
    query = Query(line, int(limit), values.get("after"), source, since_ms, descending)
    return RecordsRequest(query, form, follow, values.get("consumer"))


def _split(text: str) -> dict[str, str]:
    """Return the parameters of a query string. A + is no space: a time may have one in its offset. Raises Refusal."""
    values: dict[str, str] = {}
    for part in filter(None, text.split("&")):
        name, _, value = part.partition("=")
        name, value = unquote(name), unquote(value)
        if name not in PARAMETERS:
            raise Refusal(400, f"unknown parameter {name[:40]!r}: use {', '.join(PARAMETERS)}")
        if name in values:
            raise Refusal(400, f"{name} is given twice: omit one")
        values[name] = value
    return values


def _bad(name: str, expected: str) -> Refusal:
    return Refusal(400, f"{name} must be {expected}")


def _choice(values: dict[str, str], name: str, choices: tuple[str, ...], default: str) -> str:
    value = values.get(name, default)
    if value not in choices:
        raise _bad(name, f"{', '.join(choices[:-1])} or {choices[-1]}")
    return value


def _form(values: dict[str, str], accept: str, follow: bool) -> str:
    """Return the form of the answer: the parameter's, or the one that Accept prefers. Raises Refusal."""
    forms = tuple(form for form in TYPES if form != "json" or not follow)
    if "format" in values:
        if values["format"] == "json" and follow:
            raise Refusal(400, "an answer that follows has no end, so it cannot be JSON: use format=ndjson")
        return _choice(values, "format", forms, "")
    if not accept.strip():
        return forms[0]
    best = max(forms, key=lambda form: media_weight(accept, _MEDIA[form]))  # the first of equal ones
    if not media_weight(accept, _MEDIA[best]):
        raise Refusal(406, f"Accept excludes all forms of the answer: accept one of {', '.join(_MEDIA.values())}")
    return best


def _parse_time(text: str) -> int:
    """Return a time in Unix milliseconds: ISO 8601, UTC without an offset, or for example 10m ago. Raises Refusal."""
    if ago := _AGO.fullmatch(text):
        return time.time_ns() // 1_000_000 - int(ago[1]) * _UNITS[ago[2]] * 1000
    try:
        match = _TIME.fullmatch(text)
        if not match:
            raise ValueError
        day, minute, second, fraction, zone = match.groups()
        offset = "+00:00" if zone in (None, "Z") else zone
        moment = datetime.datetime.fromisoformat(f"{day}T{minute or '00:00'}{second or ':00'}{offset}")
        return int(moment.timestamp()) * 1000 + int(float(f"0{fraction or '.0'}") * 1000)
    except (ValueError, OverflowError):
        raise _bad("since", "a time like 2026-01-31T12:00:00Z, or 30s, 10m, 2h or 7d ago") from None


class LongAnswers:
    """Places for answers of more than a page, or that follow."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._free = threading.BoundedSemaphore(places)

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place. Raises Refusal if none is free."""
        if not self._free.acquire(blocking=False):
            reason = f"{self._places} long answers are being sent: retry later, or use limit={PAGE_RECORDS} or less"
            raise Refusal(503, reason, {"Retry-After": "5"})
        try:
            yield
        finally:
            self._free.release()


class StoredRecords:
    """Answers from the server's own store, with `read`."""

    def __init__(self, read: Callable[[Query], Page], max_streams: int = MAX_STREAMS) -> None:
        self._read = read
        self._long_answers = LongAnswers(max_streams)

    def answer(self, connection: WebHandler) -> None:
        """Answer the request of a connection. Raises Refusal."""
        parsed = connection.parsed
        request = parse(parsed.query, ",".join(parsed.headers.get_all("accept")))
        if request.consumer is not None:
            raise Refusal(400, "this server has the records itself: omit consumer")
        if not request.lasts:
            self._answer_whole(connection, request)
            return
        with self._long_answers.place():
            self._stream(connection, request)

    def _page(self, query: Query) -> Page:
        try:
            return self._read(query)
        except ValueError as error:
            raise Refusal(400, f"after: {error}") from error
        except StoreError as error:
            raise Refusal(503, str(error), {"Retry-After": "5"}) from error

    def _answer_whole(self, connection: WebHandler, request: RecordsRequest) -> None:
        """Answer with all records at once."""
        lines, query, left = [], request.query, request.query.limit
        while True:
            page = self._page(query)
            lines.append(page.lines)
            left -= page.count
            query = query._replace(after=page.last, limit=left)
            if not left or not page.more:
                break
        cursor = None if query.descending and not page.more else page.last
        body = b"".join(
            [_begin(request.form), _separated(request.form, b"".join(lines), True), _end(request.form, cursor)]
        )
        headers = {"Cache-Control": "no-store"}
        if cursor is not None:
            headers["Link"] = f'<?{_next_query(connection.parsed.query, cursor, query.descending)}>; rel="next"'
        connection.reply(200, body, TYPES[request.form], headers)

    def _stream(self, connection: WebHandler, request: RecordsRequest) -> None:
        """Send the records page by page. Chunked, or up to the end of the connection for a client of HTTP/1.0."""
        pages = self._pages(connection, request)
        first = next(pages)  # raises Refusal before the head is sent
        body = BodyWriter(connection, TYPES[request.form])
        if connection.command == "HEAD":
            return
        try:
            body.write(_begin(request.form))
            page, any_sent = first, False
            while True:
                body.write(_separated(request.form, page.lines, not any_sent))
                any_sent = any_sent or page.count > 0
                following = next(pages, None)
                if following is None:
                    break
                page = following
            cursor = None if request.query.descending and not page.more else page.last
            body.write(_end(request.form, cursor))
            body.end()
        except Refusal as refusal:  # too late for an answer: the missing end shows that records are missing
            cut(connection, str(refusal))

    def _pages(self, connection: WebHandler, request: RecordsRequest) -> Iterator[Page]:
        """Yield the pages of a stream until its end. Raises Refusal."""
        query, left = request.query, request.query.limit
        while True:
            page = self._page(query)
            left -= page.count
            query = query._replace(after=page.last, limit=left, since_ms=query.since_ms if query.descending else None)
            yield page
            if not left or not (page.more or request.follow):
                return
            if not page.more:
                if client_ended(connection, FOLLOW_INTERVAL_SECONDS):
                    return
            elif connection.server.stopping.is_set():
                if request.follow:  # its end says nothing about the records that are left
                    return
                raise Refusal(503, STOPPING)


class BodyWriter:
    """Sends the head of an answer of unknown length, then its body in pieces."""

    def __init__(self, connection: WebHandler, content_type: str, headers: dict[str, str] | None = None) -> None:
        self._connection = connection
        self._chunked = connection.parsed.version != "1.0"
        coding = {"Transfer-Encoding": "chunked"} if self._chunked else {}
        connection.reply(200, None, content_type, {"Cache-Control": "no-store", **(headers or {}), **coding})

    def write(self, data: bytes) -> None:
        """Send a piece of the body. Raises OSError, and TimeoutError if the client does not read it."""
        for start in range(0, len(data), WRITE_BYTES):
            piece = data[start : start + WRITE_BYTES]
            framed = b"%x\r\n%b\r\n" % (len(piece), piece) if self._chunked else piece
            self._connection.stream.write(framed, handler.REQUEST_TIMEOUT_SECONDS)

    def end(self) -> None:
        """Send the end of the body."""
        if self._chunked:
            self._connection.stream.write(b"0\r\n\r\n", handler.REQUEST_TIMEOUT_SECONDS)


def cut(connection: WebHandler, reason: str) -> None:
    """Log that an answer ends before all its records are sent. The close without an end shows it to the client."""
    connection.close_connection = True
    handler.log.info("records_cut", {"client": connection.client_address[0], "reason": reason})


def client_ended(connection: WebHandler, seconds: float) -> bool:
    """Wait so long for the end of the client, or of the server. True if the answer is to end."""
    try:
        connection.stream.read(1, seconds)
    except TimeoutError:
        return connection.server.stopping.is_set()
    except OSError:
        pass
    connection.close_connection = True  # the client has closed, or sends what nothing would read
    return True


def _begin(form: str) -> bytes:
    return {"json": b'{"records": [\n', "csv": CSV_HEADER}.get(form, b"")


def _separated(form: str, lines: bytes, first: bool) -> bytes:
    """Return lines as they stand in an answer: in JSON with commas between them, and no line feed at the end."""
    if form != "json" or not lines:
        return lines
    return (b"" if first else b",\n") + lines[:-1].replace(b"}\n", b"},\n")


def _end(form: str, cursor: str | None) -> bytes:
    shown = "null" if cursor is None else f'"{cursor}"'
    return f'\n],\n"next": {shown}}}\n'.encode() if form == "json" else b""


def _next_query(text: str, cursor: str, descending: bool) -> str:
    """Return a query string with another `after`, and without `since` in ascending order, where `after` replaces it."""
    dropped = ("after",) if descending else ("after", "since")
    kept = [part for part in text.split("&") if part and unquote(part.partition("=")[0]) not in dropped]
    return "&".join([f"after={quote(cursor, safe='')}", *kept])
