"""The routes of the HTTP server, and the upgrade of `/v1.0/ingest` to a WebSocket.

A `Handler` is one connection and belongs to its thread. `Connections`, the base class of `Server`, owns the threads and
documents the shutdown. Threads share the table of connections, the intake, the monitor and the totals, which have their
own locks.
"""

import logging
import re
from time import monotonic
from typing import Any, Protocol
from urllib.parse import parse_qs

from ringolib.counters import Totals
from ringolib.net.credentials import Credentials
from ringolib.net.frames import MAX_MESSAGE
from ringolib.net.listeners import Listeners
from ringolib.net.websocket import STORE_HEADER, HandshakeError, accept_upgrade
from ringolib.status.prometheus import CONTENT_TYPE as METRICS_TYPE
from ringolib.status.readiness_rules import CONNECTIONS_FULL, RING_FULL, Reason
from ringolib.storage.interface import StoreError
from ringolib.timing import deadline_after, format_ago, remaining
from ringolib.web import handler, headers
from ringolib.web.budget import SMALL_SIZE, Budget
from ringolib.web.connections import Connections
from ringolib.web.handler import (
    CHALLENGE,
    GET_OR_HEAD,
    JSON,
    Routes,
    WebHandler,
    peer_name,
)
from ringolib.web.headers import Refusal
from ringolib.web.intake import Intake
from ringolib.web.loop import IngestLoop
from ringolib.web.names import Names
from ringolib.web.page import HTML, load_page
from ringolib.web.post import decode_body, not_stored, parse_numbering
from ringolib.web.request import BodyEnded
from ringolib.web.session import LOST, Session
from ringolib.web.table import Limits
from ringolib.web.uuids import new_request_id
from ringolib.wire import INGEST_PATH, READY_PATH, RECORDS_PATH, SUBPROTOCOL, Block

log = logging.getLogger("ringoexp.http")

PAGE_PATH = "/"
ALIVE_PATH = "/v1.0/alive"
STATS_PATH = "/v1.0/stats"
METRICS_PATH = "/metrics"
_CURSOR = re.compile("[0-9]{1,19}")

BODY_BYTES_PER_SECOND = 64 * 1024
"""The rate at which a body must arrive; a request has REQUEST_TIMEOUT_SECONDS on top."""
LOOP_JOIN_SECONDS = 5.0
"""How long the close waits for the thread of the ingest loop."""
INGEST_TIMEOUT_SECONDS = 10.0
"""How long a POST waits for its records to be stored before it is answered 503."""


class Monitor(Protocol):
    """Describes the server: its statistics, its readiness, and the database it stores in."""

    def report(self, since: int | None = None) -> dict[str, Any]:
        """Return the JSON of `/v1.0/stats`. Its `highest` covers the time since the ring's cursor was `since`."""

    def metrics(self) -> str:
        """Return the text of `/metrics`."""

    def reasons(self, wait: bool = True) -> list[Reason]:
        """Return why a record would not be stored now; an empty list means ready.

        If `wait` is false, take the answers that are known.
        """

    def identity(self) -> str | None:
        """Return the identity of the database, or None if the server has no database."""


class Records(Protocol):
    """Answers `GET /v1.0/records`: from the own store, or by asking a consumer."""

    def answer(self, connection: WebHandler) -> None:
        """Answer the request of a connection. Raises Refusal."""


class Server(Connections):
    """Serves HTTP and WebSocket clients on `listeners`, which it owns, once `serve` is called."""

    def __init__(
        self,
        listeners: Listeners,
        name: str,
        limits: Limits,
        credentials: Credentials,
        totals: Totals,
        names: Names | None = None,
    ) -> None:
        super().__init__(listeners, Handler, name, limits, credentials, names)
        self.totals = totals
        self.budget = Budget(limits.unfinished)
        # `serve` sets these before the first connection is accepted.
        self.intake: Intake
        self.monitor: Monitor
        self.records: Records
        self.loop: IngestLoop | None = None

    def serve(self, intake: Intake, monitor: Monitor, records: Records) -> None:
        """Begin to accept connections. Raises ThreadError.

        Records go to `intake`, and are read back through `records`; `monitor` describes the server.
        """
        self.intake = intake
        self.records = records
        self.monitor = monitor
        self.loop = IngestLoop(intake, self.totals, self.budget)
        self.start()

    def stop(self) -> None:
        """Stop as Connections does. A WebSocket is closed once the records that it has sent are stored."""
        super().stop()
        if self.loop:
            self.loop.stop()

    def close(self) -> None:
        """Close as Connections does, and wait for the ingest loop."""
        super().close()
        if self.loop:
            self.loop.join(LOOP_JOIN_SECONDS)

    def abort(self) -> None:
        """Close all connections at once."""
        if self.loop:
            self.loop.abort()
        super().abort()


class Handler(WebHandler):
    """One connection: HTTP/1.1 requests one after the other; the last one may be an upgrade."""

    server: Server
    paths_beyond_limit = (PAGE_PATH, ALIVE_PATH, READY_PATH, STATS_PATH, METRICS_PATH)
    paths_without_token = (ALIVE_PATH, READY_PATH)

    def make_routes(self) -> Routes:
        """Return the table of routes."""
        return {
            PAGE_PATH: dict.fromkeys(GET_OR_HEAD, self._page),
            ALIVE_PATH: dict.fromkeys(GET_OR_HEAD, self._alive),
            READY_PATH: dict.fromkeys(GET_OR_HEAD, self._ready),
            STATS_PATH: dict.fromkeys(GET_OR_HEAD, self._stats),
            INGEST_PATH: {**dict.fromkeys(GET_OR_HEAD, self._upgrade), "POST": self._post},
            RECORDS_PATH: dict.fromkeys(GET_OR_HEAD, self._records),
            METRICS_PATH: dict.fromkeys(GET_OR_HEAD, self._metrics),
        }

    def admission_refusal(self) -> Refusal:
        """Return the error for a connection that was not admitted: a limit is reached, or the server is stopping."""
        if self.server.stopping.is_set():
            return super().admission_refusal()
        self.server.table.count_refused()
        limit = self.server.table.reached_limit()
        return Refusal(503, f"too many connections: the limit is {limit}; retry later", {"Retry-After": "1"})

    def refuse_unauthorized(self, path: str) -> None:
        """Answer a request without the token. The live page is sent as the body: it asks the user for the token."""
        if path == PAGE_PATH and self.command in GET_OR_HEAD and (live_page := load_page()):
            challenge = {"WWW-Authenticate": CHALLENGE, "Cache-Control": "no-store"}
            self.reply(401, live_page.content, HTML, {**live_page.headers, **challenge})
            return
        super().refuse_unauthorized(path)

    # Routes.

    def _page(self) -> None:
        live_page = load_page()
        if not live_page:
            raise Refusal(
                404, "the live page is missing: dashboard.html was not installed with the program; reinstall it"
            )
        fields, tag = self.parsed.headers, live_page.headers["ETag"]
        if "if-match" in fields and not headers.lists_tag(fields, "if-match", tag):
            raise Refusal(412, "If-Match names another version of the page: omit it")
        cached = headers.lists_tag(fields, "if-none-match", tag)
        self.reply(304 if cached else 200, live_page.content, HTML, live_page.headers)

    def _alive(self) -> None:
        headers.check_json_request(self.parsed.headers)
        self.reply(200, b"", JSON)

    def _stats(self) -> None:
        headers.check_json_request(self.parsed.headers)
        (since,) = parse_qs(self.parsed.query).get("since", [""])[-1:]
        if since and not _CURSOR.fullmatch(since):
            raise Refusal(400, "since must be the ring's cursor in an earlier response, a whole number")
        self.reply_json(200, self.server.monitor.report(int(since) if since else None))

    def _metrics(self) -> None:
        self.reply(200, self.server.monitor.metrics().encode(), METRICS_TYPE)

    def _records(self) -> None:
        self.server.records.answer(self)

    def _ready(self) -> None:
        """Answer whether a record that a new client sends now would be stored now."""
        headers.check_accept(self.parsed.headers)
        reasons = self._not_ready_reasons()
        trusted = self.has_token()
        fields: dict[str, Any] = {}
        if self.server.credentials.current.token:
            fields["authorized"] = trusted  # a publisher checks here whether its links have the right token
        if identity := self.server.monitor.identity():
            fields["store"] = identity
        if not reasons:
            self.reply_json(200, {"ready": True, **fields})
            return
        described = [_describe(reason, trusted) for reason in reasons]
        self.reply_json(503, {"ready": False, "reasons": described, **fields}, {"Retry-After": "1"})

    def _not_ready_reasons(self) -> list[Reason]:
        """Return why a record that a new client sends now would not be stored now."""
        if self.server.stopping.is_set():  # reason enough: the monitor is not asked during a stop
            return [Reason("draining", "the server is stopping")]
        reasons = self.server.monitor.reasons()
        if not self.admitted:
            limit = self.server.table.reached_limit()
            reasons.append(Reason(CONNECTIONS_FULL, f"the limit is reached: {limit}"))
        return reasons

    def _post(self) -> None:
        """Store the integers of the body, and answer how many they are."""
        fields = self.parsed.headers
        self.server.names.check_origin(self.parsed)
        headers.check_accept(fields)
        content_type = headers.body_type(fields)
        headers.check_expect(self.parsed.version, fields)
        numbering = parse_numbering(self.parsed.query)
        length = self._body_length()
        try:
            body = self._read_body(length)
            self.lingering = False
            self.close_connection = self.parsed.wants_close or self.server.stopping.is_set()
            try:
                values = decode_body(content_type, body)
                run = numbering.run(len(values))
            except Refusal:
                self.server.totals.add_refused()
                raise
            if len(values) * 8 > max(len(body), SMALL_SIZE):  # a text of short integers
                self.server.budget.grow(self, len(values) * 8)
            del body
            self.server.totals.add_records(len(values))
            self._ingest(Block([run], values), numbering.by_client)
        finally:
            self.server.budget.release(self)

    def _ingest(self, block: Block, may_repeat: bool) -> None:
        """Put the block into the intake, wait until it is stored, and answer. Raises Refusal."""
        started, deadline = monotonic(), deadline_after(INGEST_TIMEOUT_SECONDS)
        intake, total = self.server.intake, len(block.values)
        accepted, ticket = intake.put(block, INGEST_TIMEOUT_SECONDS)
        timeout = remaining(deadline)
        if accepted < total:
            self.server.totals.add_refused(total - accepted)
            cause = "the server is stopping" if intake.closed else f"the {intake.name} is full{self._known_reasons()}"
            raise not_stored(cause, accepted, total, may_repeat=may_repeat)
        try:
            stored = intake.wait(ticket, timeout)
        except StoreError as error:
            self.server.totals.add_refused(accepted)
            raise not_stored(str(error)) from error
        if not stored:
            cause = f"not stored within {INGEST_TIMEOUT_SECONDS:.0f} s{self._known_reasons()}"
            raise not_stored(cause, accepted, total, self.server.stopping.is_set(), may_repeat)
        self.server.totals.add_acked(accepted, [monotonic() - started])
        answer = {"stored": accepted}
        if may_repeat:
            answer["next"] = block.runs[0].first + accepted
        self.reply_json(200, answer)

    def _known_reasons(self) -> str:
        """Return why records are not stored, as far as the server knows, to append to an error text; or ""."""
        if self.server.stopping.is_set():
            return " (the server is stopping)"
        reasons = [reason.detail for reason in self.server.monitor.reasons(wait=False) if reason.code != RING_FULL]
        return f" ({'; '.join(reasons)})" if reasons else ""

    def _upgrade(self) -> None:
        """Answer the upgrade, and hand the connection over to the ingest loop."""
        request = self.parsed
        handshake = headers.check_handshake(request.method, request.version, request.headers)
        self.server.names.check_origin(request)
        subprotocols = headers.supported_subprotocols(request.headers)
        self.connection.settimeout(handler.REQUEST_TIMEOUT_SECONDS)  # for the response: the client may not read it
        self.close_connection = True
        self.server.table.mark_websocket()
        extra = {"X-Request-Id": new_request_id(), "Server": self.server.name}
        if identity := self.server.monitor.identity():
            extra[STORE_HEADER] = identity
        try:
            subprotocol = accept_upgrade(self.connection, handshake, extra, subprotocols)
        except HandshakeError as error:
            raise Refusal(400, f"bad WebSocket handshake: {error}") from error
        self._hand_over(subprotocol == SUBPROTOCOL, self.reader.rest)

    def _hand_over(self, batches: bool, frames: bytes) -> None:
        """Give the connection to the ingest loop. `frames` are bytes that came with the handshake."""
        client = {"client": peer_name(self.client_address), "kind": "batches" if batches else "plain"}
        log.info("connected", {**client})
        started = monotonic()
        self.handed_over = True
        release = self.server.detach(self.connection)

        def on_end(session: Session) -> None:
            code, reason = session.ending or LOST
            ending = {"code": int(code), "by": "client"} if session.by_client else {"code": int(code), "reason": reason}
            counts = {"received": session.received, "acked": session.acked, "seconds": round(monotonic() - started, 3)}
            release()
            log.info("disconnected", {**client, **ending, **counts})

        assert self.server.loop
        self.server.loop.add(self.connection, Session(batches, started), frames, on_end)

    # Reading.

    def _body_length(self) -> int | None:
        """Return the length of the body, or None for chunks. Raises Refusal if it is missing or too large."""
        length = headers.body_length(self.parsed.headers)
        if length is not None and length > MAX_MESSAGE:
            raise self._too_large(f"{length} bytes, and the limit is {MAX_MESSAGE}")
        return length

    def _too_large(self, size: str) -> Refusal:
        self.server.totals.add_refused()
        return Refusal(413, f"the body has {size}: send several smaller requests")

    def _read_body(self, length: int | None) -> bytearray:
        """Return the whole body. Raises Refusal if it is too slow or incomplete, or if there is no room for it."""
        started = monotonic()
        body = bytearray()  # not a list: a client may send pieces that are smaller than the overhead of an object
        timeout = _body_timeout(length or 0)
        try:
            while piece := self.read_piece(started + timeout):
                body += piece
                if length is None:  # the time grows with the body
                    timeout = _body_timeout(len(body))
                    if len(body) > MAX_MESSAGE:
                        raise self._too_large(f"more than {MAX_MESSAGE} bytes")
                if len(body) > SMALL_SIZE and not self.server.budget.hold(self, len(body), started + timeout):
                    raise Refusal(503, "too many bodies are being sent: retry later", {"Retry-After": "5"})
        except TimeoutError:
            raise Refusal(
                408, f"the body did not arrive within {timeout:.0f} s: send it faster, or in smaller requests"
            ) from None
        except BodyEnded:
            if self.server.stopping.is_set():  # which ends the reading side of connections
                raise not_stored("the server is stopping") from None
            self.server.totals.add_refused()
            whole = "before its last chunk" if length is None else f"but Content-Length is {length}"
            raise Refusal(400, f"the body ended after {len(body)} bytes, {whole}: send all of it") from None
        finally:
            self.server.totals.add_bytes(len(body))
        return body


def _body_timeout(size: int) -> float:
    """Return the seconds for a body of this many bytes."""
    return handler.REQUEST_TIMEOUT_SECONDS + size / BODY_BYTES_PER_SECOND


def _describe(reason: Reason, trusted: bool) -> dict[str, Any]:
    """Return the JSON of one reason. Details contain addresses and paths: they are for `trusted` clients."""
    return {
        "code": reason.code,
        "detail": reason.detail if trusted else "details require the access token",
        "since": None if reason.seconds is None else format_ago(reason.seconds),
    }
