"""The HTTP server's routes, and the upgrade of `/v1.0/ingest` to a WebSocket.

A `Handler` is one connection and belongs to its thread; `connections` owns the threads, and tells how they end.
Nothing here is shared between threads but what locks for itself.
"""

import base64
import binascii
import logging
import re
import uuid
from time import monotonic
from typing import Any, Protocol
from urllib.parse import urlsplit

from ringolib.counters import Totals
from ringolib.net.credentials import BEARER_PREFIX, Credentials
from ringolib.net.frames import MAX_MESSAGE
from ringolib.net.listeners import Listeners
from ringolib.net.websocket import STORE_HEADER, HandshakeError
from ringolib.net.websocket_server import ServerConnection
from ringolib.status.prometheus import CONTENT_TYPE as METRICS
from ringolib.status.readiness_rules import CONNECTIONS_FULL, Reason
from ringolib.storage.interface import StoreError
from ringolib.timing import format_ago
from ringolib.web import handler as web
from ringolib.web.connections import Connections
from ringolib.web.handler import GET_OR_HEAD, JSON, Refusal, Routes, WebHandler, peer_name, request_id
from ringolib.web.intake import Intake, plain_block
from ringolib.web.page import HTML, load_page
from ringolib.web.session import LOST, Session
from ringolib.wire import PLAIN_SUBPROTOCOL, SUBPROTOCOL, WireError, decode_plain

log = logging.getLogger("ringoexp.http")

BODY_RATE = 64 * 1024
"""Bytes a second that a body has to come with, on top of web.REQUEST_TIMEOUT."""
INGEST_TIMEOUT = 10.0
"""Seconds a POST waits for its records to be stored before it is answered with 503."""
BODY_TYPES = ("application/octet-stream", "application/x-www-form-urlencoded")
"""What a POST may call its body. The second is what `curl --data-binary` says by itself."""
_WRITTEN = re.compile("[!-~]+")
"""What a subprotocol is written with: more than RFC 6455 section 4.1 has, for tokens that are not percent-encoded."""


class Monitor(Protocol):
    """What a server says of itself: `/v1.0/stats`, `/metrics`, why it is not ready, if it is not, and
    which database it stores in, if it has one."""

    def report(self) -> dict[str, Any]: ...
    def metrics(self) -> str: ...
    def reasons(self) -> list[Reason]: ...
    def identity(self) -> str | None: ...


class Server(Connections):
    """Takes connections from `listeners`, which it owns, for an intake once `serve` is called."""

    def __init__(
        self,
        listeners: Listeners,
        name: str,
        limit: int,
        per_address: int,
        credentials: Credentials,
        totals: Totals,
    ) -> None:
        super().__init__(listeners, Handler, name, limit, per_address, credentials)
        self.totals = totals
        # From `serve` on, before any connection is taken:
        self.intake: Intake
        self.monitor: Monitor

    def serve(self, intake: Intake, monitor: Monitor) -> None:
        """Start to accept connections: records go to `intake`, and `monitor` describes the server."""
        self.intake = intake
        self.monitor = monitor
        self.start()


class Handler(WebHandler):
    """One connection: HTTP/1.1 requests one after the other, or an upgrade and a WebSocket."""

    server: Server
    open_to_all = ("/", "/v1.0/alive", "/v1.0/ready", "/v1.0/stats", "/metrics")
    without_token = ("/v1.0/alive", "/v1.0/ready")

    def routes(self) -> Routes:
        """What there is."""
        return {
            "/": dict.fromkeys(GET_OR_HEAD, self._page),
            "/v1.0/alive": dict.fromkeys(GET_OR_HEAD, self._alive),
            "/v1.0/ready": dict.fromkeys(GET_OR_HEAD, self._ready),
            "/v1.0/stats": dict.fromkeys(GET_OR_HEAD, self._stats),
            "/v1.0/ingest": {**dict.fromkeys(GET_OR_HEAD, self._upgrade), "POST": self._post},
            "/metrics": dict.fromkeys(GET_OR_HEAD, self._metrics),
        }

    def turn_away(self) -> Refusal:
        """What a connection that was not admitted is told."""
        if self.server.stopping.is_set():
            return super().turn_away()
        self.server.refuse()
        most = f"{self.server.limit} at once"
        if self.server.crowding():
            most = f"{self.server.per_address} from one address"
        return Refusal(503, f"too many connections: at most {most}", {"Retry-After": "1"})

    def unauthorized(self, path: str) -> None:
        """Answers as the base class does, but with the live page where it was asked for: that asks for the token."""
        if path == "/" and self.command in GET_OR_HEAD and (found := load_page()):
            challenge = {"WWW-Authenticate": 'Bearer realm="ringoexp"', "Cache-Control": "no-store"}
            self.reply(401, found.content, HTML, {**found.headers, **challenge})
            return
        super().unauthorized(path)

    # Routes.

    def _page(self) -> None:
        """The live page, unless the browser has it already."""
        found = load_page()
        if not found:
            raise Refusal(404, "dashboard.html is not beside the program: the page was not installed")
        status = 304 if found.headers["ETag"] in self.headers.get("If-None-Match", "") else 200
        self.reply(status, found.content, HTML, found.headers)

    def _alive(self) -> None:
        self._want_json()
        self.reply(200, b"", JSON)

    def _stats(self) -> None:
        self._want_json()
        self.reply_json(200, self.server.monitor.report())

    def _ready(self) -> None:
        """Says whether a record sent now, by somebody who connects now, would be stored now."""
        self._check_accept()
        stopping = self.server.stopping.is_set()
        reasons = [] if stopping else self.server.monitor.reasons()
        if stopping:  # reason enough: nothing is to be asked any more
            reasons.append(Reason("draining", "the server is stopping"))
        elif not self.server.admitted():
            most = f"{self.server.limit} connections (-n, --threads)"
            if self.server.crowding():
                most = f"{self.server.per_address} connections of this address (--per_address)"
            reasons.append(Reason(CONNECTIONS_FULL, f"all {most} are in use"))
        trusted = self.has_token()  # details have addresses and paths in them
        # For a publisher, whose links will be asked for it.
        told: dict[str, Any] = {"authorized": trusted} if self.server.credentials.current.token else {}
        if identity := self.server.monitor.identity():
            told["store"] = identity
        if not reasons:
            self.reply_json(200, {"ready": True, **told})
            return
        named = [
            {
                "code": reason.code,
                "detail": reason.detail if trusted else "details require the access token",
                "since": None if reason.seconds is None else format_ago(reason.seconds),
            }
            for reason in reasons
        ]
        self.reply_json(503, {"ready": False, "reasons": named, **told}, {"Retry-After": "1"})

    def _metrics(self) -> None:
        self.reply(200, self.server.monitor.metrics().encode(), METRICS)

    def _post(self) -> None:
        """Stores the integers of the body and says how many they were."""
        self._check_origin()
        self._check_accept()
        kind = self.headers.get_content_type() if "Content-Type" in self.headers else BODY_TYPES[0]
        if kind not in BODY_TYPES:
            raise Refusal(415, f"the body is {kind[:100]}: send {BODY_TYPES[0]}")
        body = self._read_body()
        self.lingering = False
        self.close_connection = self.asked_to_close or self.server.stopping.is_set()
        try:
            values = decode_plain(body)
        except WireError as error:
            self.server.totals.add_refused()
            raise Refusal(error.status, str(error)) from error
        self.server.totals.add_records(len(values))
        self._ingest(values)

    def _ingest(self, values: Any) -> None:
        """Puts the values, waits until they are stored, and answers."""
        started = monotonic()
        intake = self.server.intake
        try:
            block = plain_block(values, uuid.uuid4().bytes, 0)
            accepted, ticket = intake.put(block, INGEST_TIMEOUT)
        except StoreError as error:
            self.server.totals.add_refused(len(values))
            raise self._not_now(f"not stored: {error}", 0) from error
        left = started + INGEST_TIMEOUT - monotonic()
        if accepted < len(values):
            self.server.totals.add_refused(len(values) - accepted)
            why = "the server is stopping" if intake.closed else "the ring is full"
            raise self._not_now(f"{why}: {accepted} of {len(values)} records were accepted", accepted)
        if not intake.wait(ticket, max(0.0, left)):
            raise self._not_now("accepted, but not stored yet: is the consumer away?", accepted)
        self.server.totals.add_acked(accepted, [monotonic() - started])
        self.reply_json(200, {"stored": accepted})

    def _not_now(self, reason: str, accepted: int) -> Refusal:
        return Refusal(503, reason, {"Retry-After": "5"}, {"accepted": accepted})

    def _upgrade(self) -> None:
        """Makes the connection a WebSocket and serves it to its end."""
        headers = self._check_handshake()
        rest = self._take_buffered()
        self.connection.settimeout(None)
        self.close_connection = True
        self.server.stream()
        extra = {"X-Request-Id": request_id(), "Server": self.server.name}
        if identity := self.server.monitor.identity():
            extra[STORE_HEADER] = identity
        try:
            connection = ServerConnection(self.connection, headers, extra, self._spoken(), self.server.stop_sign)
        except HandshakeError as error:
            raise Refusal(400, f"bad WebSocket handshake: {error}") from error
        batches = connection.subprotocol == SUBPROTOCOL
        who = {"client": peer_name(self.client_address), "kind": "batches" if batches else "plain"}
        log.info("connected", who)
        self.server.totals.client_opened(batches)
        since = monotonic()
        session = Session(connection, self.server.intake, self.server.totals, self.server.stopping)
        code, reason = LOST
        try:
            code, reason = session.run(rest)
        finally:
            self.server.totals.client_closed(batches)
            theirs = connection.ending == (code, reason) and code != LOST[0] and not connection.at_fault
            ended = {"code": int(code), "by": "client"} if theirs else {"code": int(code), "reason": reason}
            counts = {"received": session.received, "acked": session.acked, "seconds": round(monotonic() - since, 3)}
            log.info("disconnected", {**who, **ended, **counts})

    def _spoken(self) -> tuple[str, ...]:
        """The subprotocols to choose from: ours, or, for a client that offers its token only, that one. It would
        take none for a failure.
        """
        offered = self.offered()
        if not {SUBPROTOCOL, PLAIN_SUBPROTOCOL} & set(offered):
            return tuple(each for each in offered if each.startswith(BEARER_PREFIX))
        return SUBPROTOCOL, PLAIN_SUBPROTOCOL

    # Checks. Each raises Refusal.

    def _want_json(self) -> None:
        """What JSON routes ask of a request: it takes JSON, and has nothing else to say."""
        self._check_accept()
        if "Content-Type" in self.headers:
            kind = self.headers["Content-Type"].partition(";")[0].strip().lower()
            if kind not in ("application/json", "*/*"):
                raise Refusal(415, f"Content-Type is {kind[:100]}: send application/json, or none")

    def _check_accept(self) -> None:
        accept = ",".join(self.headers.get_all("Accept", []))
        if accept.strip() and not _admits_json(accept):
            raise Refusal(406, "the answer is application/json, which Accept does not admit")

    def _check_origin(self) -> None:
        """A web page from elsewhere must not write into this server (RFC 6455 section 10.2)."""
        origin = self.headers.get("Origin")
        if origin is not None:
            try:
                theirs = urlsplit(origin)
                ours = urlsplit(f"{theirs.scheme}://{self.headers.get('Host', '')}")
                same = theirs.netloc != "" and _host_port(theirs) == _host_port(ours)
            except ValueError:
                same = False
            if not same:
                raise Refusal(403, "pages from elsewhere may not write here, only this server's own")

    def _check_handshake(self) -> dict[str, str]:
        """The headers of a valid opening handshake (RFC 6455 section 4.2.1), without extensions."""
        upgrade = ("Upgrade", "websocket"), ("Connection", "upgrade")
        if any(token not in self._tokens(name) for name, token in upgrade):
            raise Refusal(
                426,
                "this is a WebSocket: connect with a WebSocket client, or POST the integers",
                {"Upgrade": "websocket", "Connection": "Upgrade"},
            )
        if self.command != "GET" or self.request_version != "HTTP/1.1":
            raise Refusal(400, "a WebSocket handshake is a GET in HTTP/1.1")
        if len(self.headers.get_all("Host", [])) != 1:
            raise Refusal(400, "a WebSocket handshake has one Host header")
        self._check_origin()
        if self.headers.get_all("Sec-WebSocket-Version", []) != ["13"]:
            raise Refusal(426, "Sec-WebSocket-Version is not 13", {"Sec-WebSocket-Version": "13"})
        keys = self.headers.get_all("Sec-WebSocket-Key", [])
        try:
            valid = len(keys) == 1 and len(base64.b64decode(keys[0].strip(), validate=True)) == 16
        except (binascii.Error, ValueError):
            valid = False
        if not valid:
            raise Refusal(400, "Sec-WebSocket-Key is not 16 bytes in base64")
        offered = self.offered()
        if not all(map(_WRITTEN.fullmatch, offered)):  # not shown: a bearer's token may be among them
            raise Refusal(400, "Sec-WebSocket-Protocol is no list of subprotocols: percent-encode what is in one")
        headers = {
            "Host": "localhost",  # checked, and of no more use: wsproto would only decode it
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec-WebSocket-Key": keys[0].strip(),
            "Sec-WebSocket-Version": "13",
        }
        if offered:
            headers["Sec-WebSocket-Protocol"] = ", ".join(offered)
        return headers

    # Helpers.

    def _tokens(self, name: str) -> list[str]:
        """The comma-separated tokens of a header, in lower case."""
        return [token.strip().lower() for value in self.headers.get_all(name, []) for token in value.split(",")]

    def _read_body(self) -> bytes:
        """The body, whole."""
        lengths = set(self.headers.get_all("Content-Length", []))
        if "Transfer-Encoding" in self.headers or not lengths:
            raise Refusal(411, "send the integers as a body with a Content-Length; chunks are not accepted")
        text = lengths.pop()
        if lengths or not (text.isascii() and text.isdigit()):
            raise Refusal(400, "Content-Length is not one whole number")
        length = int((text.lstrip("0") or "0")[:20])
        if length > MAX_MESSAGE:
            self.server.totals.add_refused()
            raise Refusal(413, f"{length} bytes: a body has at most {MAX_MESSAGE}")
        patience = web.REQUEST_TIMEOUT + length / BODY_RATE
        self.reader.deadline = monotonic() + patience
        try:
            body = self.rfile.read(length)
        except TimeoutError:
            raise Refusal(408, f"the body did not come within {patience:.0f} s") from None
        finally:
            self.connection.settimeout(web.REQUEST_TIMEOUT)
        self.server.totals.add_bytes(len(body))
        if len(body) < length:
            if self.server.stopping.is_set():
                raise self._not_now("the server is stopping", 0)
            self.server.totals.add_refused()
            raise Refusal(400, f"Content-Length is {length}, but only {len(body)} bytes came")
        return body

    def _take_buffered(self) -> bytes:
        """What `rfile` has read beyond the request: the first frames may come with the handshake."""
        self.reader.deadline = None
        return self.rfile.peek()  # type: ignore[attr-defined,no-any-return]  # a BufferedReader


def _admits_json(accept: str) -> bool:
    """True when the most specific media range for application/json has a weight above 0 (RFC 9110 section 12.5.1)."""
    best: tuple[int, bool] = (-1, False)
    for part in accept.split(","):
        media, *parameters = (piece.strip().lower() for piece in part.split(";"))
        try:
            specificity = ("*/*", "application/*", "application/json").index(media)
        except ValueError:
            continue
        weights = [p[2:] for p in parameters if p.startswith("q=")]
        try:
            admitted = not weights or float(weights[0]) > 0
        except ValueError:
            admitted = False
        best = max(best, (specificity, admitted))
    return best[1]


def _host_port(url: Any) -> tuple[str | None, int | None]:
    """Host and port of a split URL, the scheme's port if it names none. Raises ValueError for a bad port."""
    return url.hostname, url.port or {"http": 80, "https": 443}.get(url.scheme)
