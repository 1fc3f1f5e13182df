"""One HTTP connection: requests with deadlines, a table of routes, and responses and errors in JSON.

A `WebHandler` belongs to the thread of its connection; threads share nothing here. `request` parses. The module knows
nothing about records. `wsserver` builds the server's routes on it, and `status.profiler` builds the profiler's routes.
"""

import functools
import json
import logging
from collections.abc import Callable
from email.utils import formatdate
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from math import inf
from time import monotonic, time
from typing import Any

from ringolib.net.addresses import format_address
from ringolib.net.sockets import Stream, linger
from ringolib.timing import deadline_after
from ringolib.web.connections import Connections
from ringolib.web.headers import Refusal, offered_subprotocols
from ringolib.web.names import origin_of
from ringolib.web.request import Request, RequestReader
from ringolib.web.uuids import new_request_id

log = logging.getLogger("ringoexp.http")

REQUEST_TIMEOUT_SECONDS = 30.0
"""The time for the request line and the headers from their first byte on, for a client's first byte, and to send."""
IDLE_TIMEOUT_SECONDS = 75.0
"""The time between two requests. Load balancers usually close connections that are idle for 60 s; they must be first,
or the server closes a connection while a request is on its way."""
REFUSED_TIMEOUT_SECONDS = 2.0
"""The same times on a connection that was not admitted: it must soon give its place to another one."""
PREFLIGHT_SECONDS = 600
"""How long a browser may keep the answer to a CORS preflight."""
JSON = "application/json;charset=utf-8"
GET_OR_HEAD = ("GET", "HEAD")
CHALLENGE = 'Bearer realm="ringoexp"'
"""The WWW-Authenticate header of a response with status 401 (RFC 6750 section 3)."""
_TOKEN_FLAGS = "(with ringoexp: --token_file or RINGOEXP_TOKEN)"
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in HTTPStatus}

Routes = dict[str, dict[str, Callable[[], None]]]
"""Path -> method -> the function that answers it."""


class WebHandler(BaseHTTPRequestHandler):
    """One connection: HTTP/1.1 requests one after the other, each answered by one of `routes`.

    A subclass defines `make_routes`, and two sets of paths. `paths_beyond_limit` are answered also on a connection that
    was not admitted. `paths_without_token` are answered also to a client that has no token. `parsed` is the current
    request.
    """

    server: Connections
    parsed: Request
    paths_beyond_limit: tuple[str, ...] = ()
    paths_without_token: tuple[str, ...] = ()
    lingering = False  # before the close, discard what the client still sends: see `linger`
    handed_over = False  # another thread owns the socket: this one must not touch it any more

    def make_routes(self) -> Routes:
        """Return the table of routes."""
        raise NotImplementedError

    def check_site(self) -> None:
        """Raise Refusal if a page of another site sends the request. Each subclass decides which requests matter."""

    def admission_refusal(self) -> Refusal:
        """Return the error for a connection that was not admitted."""
        return Refusal(503, "the server is stopping", {"Retry-After": "1"})

    def refuse_unauthorized(self, path: str) -> None:
        """Answer a request that lacks the server's token. Raises Refusal."""
        self.server.table.count_unauthorized()
        if "authorization" not in self.parsed.headers:
            raise Refusal(
                401,
                f"this server requires a token: send Authorization: Bearer TOKEN {_TOKEN_FLAGS}",
                {"WWW-Authenticate": CHALLENGE},
            )
        challenge = f'{CHALLENGE}, error="invalid_token"'
        raise Refusal(
            401, f"wrong token: send the token of this server {_TOKEN_FLAGS}", {"WWW-Authenticate": challenge}
        )

    # The life of a connection. The constructor of the base class calls setup, handle and finish.

    def setup(self) -> None:
        """Prepare to read requests."""
        self.connection = self.request
        self.stream = Stream(self.connection, self.server.stopping.is_set)
        self.reader = RequestReader()
        self.routes = self.make_routes()
        self.admitted = self.server.table.is_admitted()
        self.may_be_cut_off = not self.admitted or self.server.table.limits.refused == 0
        self.command = ""  # the method of the current request; "" if the request is malformed
        self.cors: dict[str, str] = {}  # headers for a page that --allow_origin admits
        self.request_timeout = REQUEST_TIMEOUT_SECONDS if self.admitted else REFUSED_TIMEOUT_SECONDS
        self.idle_timeout = self.request_timeout  # until the first request

    def handle_one_request(self) -> None:
        """Read and answer one request. The base class calls this until `close_connection` is true."""
        self.close_connection, self.command, self.cors = True, "", {}
        try:
            request = self._read_head()
            if request:
                self._mark_busy(True)
                self.parsed, self.command = request, request.method
                self._answer(request.path)
        except TimeoutError as error:  # while waiting for a request, or for the client to read
            log.debug("http", {"client": self.client_address[0], "message": f"timed out: {error}"})
            self.close_connection = True
        except Refusal as refusal:
            self._refuse(refusal)
        if self.handed_over:
            return
        self._mark_busy(False)
        if self.close_connection:
            return
        self.reader.start_next()
        self.idle_timeout = IDLE_TIMEOUT_SECONDS

    def _mark_busy(self, busy: bool) -> None:
        """While a connection waits for a request, it may be cut off in favour of another one: see `wait_for_room`."""
        if self.may_be_cut_off:
            self.server.table.mark_busy(busy)

    def finish(self) -> None:
        """End the connection, unless it was handed over. If the client may still be sending, `linger` before."""
        if self.lingering and not self.handed_over:
            linger(self.connection)

    # Reading.

    def _read_head(self) -> Request | None:
        """Return the next request, or None at the end of the stream. Raises TimeoutError, or Refusal if malformed."""
        timeout, deadline = self.idle_timeout, inf
        while (request := self.reader.next_request()) is None:
            if self.reader.begun:
                if deadline == inf:
                    deadline = deadline_after(self.request_timeout)
                timeout = deadline - monotonic()
            data = self.stream.read(self.reader.room, timeout)
            if not data:
                return None
            self.reader.receive(data)
            if self.reader.is_tls:
                raise Refusal(400, "a client sent TLS to a port without TLS: connect with http:// or ws://")
        return request

    def read_piece(self, deadline: float) -> bytes:
        """Return a piece of the body; b"" at its end. Raises TimeoutError at the deadline, and BodyEnded."""
        if self.reader.expects_continue:
            self.stream.write(self.reader.continue_response(), REQUEST_TIMEOUT_SECONDS)
        while (piece := self.reader.next_piece()) is None:
            self.reader.receive(self.stream.read(self.reader.room, deadline - monotonic()))
        return piece

    # Answering.

    def _answer(self, path: str) -> None:
        """Check host, admission and token, then call the route. Raises Refusal."""
        request = self.parsed
        self.close_connection = request.wants_close or self.server.stopping.is_set()
        if self.reader.has_body:  # a route that reads the body resets this
            self.close_connection = self.lingering = True
        origin = origin_of(request.headers)
        if self.server.names.admits_others:
            self._admit_origin(origin)
        self.server.names.check_host(request.host)
        if not self.admitted:
            self.close_connection = True
            if path not in self.paths_beyond_limit:
                raise self.admission_refusal()
        if origin is not None and self.command == "OPTIONS" and path in self.routes:
            self._answer_preflight(path)
            return
        self.check_site()
        if path not in self.paths_without_token and not self.has_token():
            self.refuse_unauthorized(path)
            return
        self._call_route(path)

    def _call_route(self, path: str) -> None:
        methods = self.routes.get(path)
        if methods is None:
            if path == "*" or self.command == "CONNECT":
                raise Refusal(405, f"{self.command} is not supported", {"Allow": ", ".join(GET_OR_HEAD)})
            raise Refusal(404, f"no such path: use one of {', '.join(self.routes)}")
        action = methods.get(self.command)
        if action is None:
            elsewhere = [other for other, known in self.routes.items() if self.command in known]
            hint = f"; use {self.command} with {', '.join(elsewhere)}" if elsewhere else ""
            raise Refusal(405, f"{path} supports only {', '.join(methods)}{hint}", {"Allow": ", ".join(methods)})
        action()

    def _admit_origin(self, origin: str | None) -> None:
        """Let the page of another site read the response, if --allow_origin admits it (https://fetch.spec.whatwg.org)."""
        self.cors = {"Vary": "Origin"}  # also without an Origin: caches must not reuse the response for a page
        if origin and self.server.names.admits(origin):
            exposed = "X-Request-Id, Retry-After, WWW-Authenticate, Link"
            self.cors |= {"Access-Control-Allow-Origin": origin, "Access-Control-Expose-Headers": exposed}

    def _answer_preflight(self, path: str) -> None:
        """Answer the question of a browser whether a page may send a request to this path."""
        if "Access-Control-Allow-Origin" not in self.cors:
            self.server.names.check_origin(self.parsed)
        allowed = {
            "Access-Control-Allow-Methods": ", ".join(self.routes[path]),
            "Access-Control-Allow-Headers": "Authorization, Content-Type, Accept",
            "Access-Control-Max-Age": str(PREFLIGHT_SECONDS),
        }
        self.reply(204, b"", "", allowed)

    def _refuse(self, refusal: Refusal) -> None:
        """Answer a request with an error."""
        if not self.command:  # malformed: where the next request begins is unknown
            self.close_connection = self.lingering = True
        log.info("refused", {"client": self.client_address[0], "status": refusal.status, "reason": str(refusal)})
        self.reply_json(refusal.status, refusal.body, refusal.headers)

    def has_token(self) -> bool:
        """True if the request carries the server's token, or the server requires none."""
        credentials = self.server.credentials
        if credentials.current.token is None:
            return True
        headers = self.parsed.headers
        return credentials.accepts(headers.get_all("authorization"), offered_subprotocols(headers))

    def reply_json(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        """Send a response with a JSON body."""
        self.reply(status, json.dumps(body).encode() + b"\n", JSON, headers)

    def reply(
        self, status: int, content: bytes | None, content_type: str, headers: dict[str, str] | None = None
    ) -> None:
        """Send a response. The body is omitted for HEAD, and for status 304, where the client has it already.

        For HEAD, `content` may be None: it is unknown.
        """
        if log.isEnabledFor(logging.DEBUG):  # without the query, which may contain a secret
            path = self.parsed.path[:200] if self.command else ""
            client = self.client_address[0]
            log.debug("request", {"client": client, "method": self.command, "path": path, "status": status})
        fields = {**self.cors, **headers} if headers else self.cors
        if self.close_connection:
            options = f"{fields['Connection']}, close" if "Connection" in fields else "close"
            fields = {**fields, "Connection": options}
        lines = "".join([f"{name}: {value}\r\n" for name, value in fields.items()])
        kind = f"Content-Type: {content_type}\r\n" if content_type else ""
        if content is not None and status != HTTPStatus.NO_CONTENT:
            kind += f"Content-Length: {len(content)}\r\n"
        head = (
            f"{_STATUS_LINES[status]}Server: {self.server.name}\r\nDate: {_format_date(int(time()))}\r\n{kind}"
            f"X-Request-Id: {new_request_id()}\r\n{lines}\r\n"
        ).encode("latin-1")
        omitted = content is None or self.command == "HEAD" or status == HTTPStatus.NOT_MODIFIED
        self.stream.write(head if omitted else head + (content or b""), self.request_timeout)


@functools.lru_cache(maxsize=2)
def _format_date(seconds: int) -> str:
    """Return the Date header for this Unix time (RFC 9110 section 6.6.1)."""
    return formatdate(seconds, usegmt=True)


def peer_name(address: tuple[Any, ...]) -> str:
    """Return HOST:PORT of a client, `[HOST]:PORT` for IPv6, and `unix` for a client on a Unix socket."""
    return format_address(*address[:2]) if len(address) > 1 else str(address[0])
