"""The HTTP server: its connections, its routes, and the upgrade of `/v1.0/ingest` to a WebSocket.

`Server` is a `ThreadingHTTPServer` that owns its threads: `accept` takes connections, and each
connection has one, `conn-N`, that reads, works and writes for it from beginning to end.
`Server._lock` guards the table of connections and its counts; `_ended` shares it and is notified
when a connection ends. `Handler` is one connection and belongs to its thread.

Shutdown, all from the server's main thread: `stop` accepts no more and makes every connection read no more;
`wait_ended` waits until each has finished what it had read; `abort` ends those that do not; `close` comes last.
"""

import base64
import binascii
import errno
import io
import json
import logging
import select
import socket
import sys
import threading
import uuid
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import monotonic
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from ingest import Intake, Session, plain_block
from stats import Totals
from store import StoreError
from websock import HandshakeError, ServerConnection, linger
from wire import MAX_MESSAGE, SUBPROTOCOL, WireError, decode_plain

log = logging.getLogger("ringoexp.http")

REQUEST_TIMEOUT = 30.0
"""Seconds a client has to send a request, or the next one on the same connection, up to its body."""
BODY_RATE = 64 * 1024
"""Bytes a second that a body has to come with, on top of REQUEST_TIMEOUT."""
REFUSED_TIMEOUT = 2.0
"""Seconds for a request on a connection beyond the limit."""
MOST_REFUSED = 64
"""Connections beyond the limit that are answered at once; the next ones wait to be accepted."""
KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}
"""A client whose machine is gone is noticed after two minutes."""
INGEST_TIMEOUT = 10.0
"""Seconds a POST waits for its records to be stored before it is answered with 503."""
BODY_TYPES = ("application/octet-stream", "application/x-www-form-urlencoded")
"""What a POST may call its body. The second is what `curl --data-binary` says by itself."""
GET_OR_HEAD = ("GET", "HEAD")


class ConnectionStats(NamedTuple):
    """Connections admitted and open now, admitted ever, and requests refused because there were too many."""

    now: int
    total: int
    refused: int


class _Entry(NamedTuple):
    sock: socket.socket
    admitted: bool
    stream: bool = False


class Server(ThreadingHTTPServer):
    """Listens on `address` from the start, takes connections for an intake once `start` is called.

    At most `limit` connections are admitted at once (0: any number); more are answered 503, but for
    alive and stats. `report` makes what `/v1.0/stats` says. Raises OSError when it cannot listen.
    """

    daemon_threads = True  # `wait_ended` waits for them; a second signal must not
    request_queue_size = 1024

    def __init__(
        self,
        family: socket.AddressFamily,
        address: tuple[Any, ...],
        name: str,
        limit: int,
        totals: Totals,
        report: Callable[[], dict[str, Any]],
    ) -> None:
        self.address_family = family
        self.name = name
        self.limit = limit
        self.totals = totals
        self.report = report
        self.stopping = threading.Event()
        self.intake: Intake  # from `start` on, before any connection is taken

        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)
        # Guarded by _lock.
        self._entries: dict[threading.Thread, _Entry] = {}
        self._admitted = 0
        self._total = 0
        self._refused = 0
        self._accepted = 0

        super().__init__(address, Handler)
        self.socket.setblocking(False)  # a client may be gone between select and accept
        self._wake, self._woken = socket.socketpair()
        # Daemon: a second signal ends the process at once.
        self._acceptor = threading.Thread(target=self.serve_forever, name="accept", daemon=True)

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self.socket.getsockname()[1])

    def server_bind(self) -> None:
        """Binds as the base class does, but does not ask the resolver for the host's name."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def start(self, intake: Intake) -> None:
        """Starts to accept; records go to `intake`."""
        self.intake = intake
        self._acceptor.start()

    def serve_forever(self, poll_interval: float = 0.0) -> None:
        """Accepts until `stop`. Does not poll, as the base class would."""
        poll = select.poll()  # not select: it ends at descriptor 1023
        poll.register(self.socket, select.POLLIN)
        poll.register(self._woken, select.POLLIN)
        while not self.stopping.is_set():
            poll.poll()
            with self._lock:  # beyond the limit, connections have to make room for each other
                while self._crowded():
                    self._ended.wait()
            if not self.stopping.is_set():
                self._handle_request_noblock()  # type: ignore[attr-defined]  # the documented loop body

    def _crowded(self) -> bool:
        """True while the next connection would be one too many beyond the limit."""
        assert self._lock.locked()
        refused = len(self._entries) - self._admitted
        return refused >= MOST_REFUSED and self._admitted >= self.limit and not self.stopping.is_set()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accepts one connection. Out of descriptors, it waits a little for some to be closed."""
        try:
            request, address = super().get_request()
            request.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in KEEPALIVE.items():
                if hasattr(socket, option):  # macOS has other names
                    request.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
            return request, address
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                log.error("event=cannot_accept error=%r", str(error))
                self.stopping.wait(0.2)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Starts the connection's own thread."""
        with self._lock:
            admitted = not self.limit or self._admitted < self.limit
            self._total += admitted
            self._admitted += admitted
            self._accepted += 1
            # Daemon: see daemon_threads.
            thread = threading.Thread(
                target=self._serve,
                args=(request, client_address),
                name=f"conn-{self._accepted}",
                daemon=True,
            )
            self._entries[thread] = _Entry(request, admitted)
        try:
            thread.start()
        except RuntimeError as error:  # no more threads to be had
            log.error("event=no_thread error=%r", str(error))
            self.shutdown_request(request)
            self._leave(thread)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says in the log why a connection's thread ended: lost connections in detail only."""
        error = sys.exc_info()[1]
        level = logging.DEBUG if isinstance(error, OSError) else logging.ERROR
        log.log(
            level,
            "event=connection_error error=%r",
            f"{type(error).__name__}: {error}",
            exc_info=log.isEnabledFor(logging.DEBUG),
        )

    def admitted(self) -> bool:
        """True when the calling connection's thread was within the limit when it came."""
        with self._lock:
            return self._entries[threading.current_thread()].admitted

    def refuse(self) -> None:
        """Counts a request answered 503 because there are too many connections."""
        with self._lock:
            self._refused += 1

    def stats(self) -> ConnectionStats:
        """The connections now and since the start."""
        with self._lock:
            return ConnectionStats(self._admitted, self._total, self._refused)

    @property
    def stop_sign(self) -> socket.socket:
        """Becomes readable, and stays so, when the server stops."""
        return self._woken

    def stream(self) -> None:
        """The calling connection's thread serves a WebSocket from now on."""
        with self._lock:
            me = threading.current_thread()
            self._entries[me] = self._entries[me]._replace(stream=True)

    def stop(self) -> None:
        """Accepts no more, and makes every connection finish what it has read. Does nothing the second time."""
        if self.stopping.is_set():
            return
        with self._lock:
            self.stopping.set()
            self._ended.notify_all()
        self._wake.send(b"x")
        if self._acceptor.is_alive():
            self._acceptor.join()
        self.server_close()
        self._shut_all(socket.SHUT_RD, streams=False)  # WebSockets see `stop_sign`, and can still close in order

    def close(self) -> None:
        """Frees what `stop` has left, once all connections have ended; while some have not they need it."""
        self.stop()
        if self.wait_ended(0):
            self._wake.close()
            self._woken.close()

    def wait_ended(self, timeout: float) -> bool:
        """True once no connection is left; False after `timeout` seconds."""
        deadline = monotonic() + timeout
        with self._lock:
            while self._entries:
                left = deadline - monotonic()
                if left <= 0:
                    return False
                self._ended.wait(left)
            return True

    def abort(self) -> None:
        """Makes reading and writing fail on every connection that is left."""
        self._shut_all(socket.SHUT_RDWR, streams=True)

    def server_close(self) -> None:
        """Closes the listening socket; threads are waited for elsewhere."""
        self.socket.close()

    def _serve(self, request: socket.socket, client_address: Any) -> None:
        """A connection's thread."""
        try:
            self.process_request_thread(request, client_address)
        finally:
            self._leave(threading.current_thread())

    def _leave(self, thread: threading.Thread) -> None:
        with self._lock:
            self._admitted -= self._entries.pop(thread).admitted
            self._ended.notify_all()

    def _shut_all(self, how: int, streams: bool) -> None:
        with self._lock:
            for entry in self._entries.values():
                if entry.stream and not streams:
                    continue
                try:
                    entry.sock.shutdown(how)  # does not wait
                except OSError:
                    pass  # closed already


class Refusal(Exception):
    """A request is answered with an error: `status`, a reason a person can act on, more headers, more JSON."""

    def __init__(
        self,
        status: int,
        reason: str,
        headers: dict[str, str] | None = None,
        more: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(reason)
        self.status = status
        self.headers = headers or {}
        self.body = {"error": reason, **(more or {})}


class _Reader(io.RawIOBase):
    """What comes from a socket until a deadline: reading beyond it raises TimeoutError."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.deadline: float | None = 0.0  # monotonic seconds; None: waits for nothing

    def readable(self) -> bool:
        """True: it is for reading."""
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Reads what there is, waiting for at least a byte; 0 at the end of the stream, None if it may not wait."""
        left = 0.0 if self.deadline is None else self.deadline - monotonic()
        if self.deadline is not None and left <= 0:
            raise TimeoutError("too slow")
        self._sock.settimeout(left)
        try:
            return self._sock.recv_into(buffer)
        except BlockingIOError:
            return None


class Handler(BaseHTTPRequestHandler):
    """One connection: HTTP/1.1 requests one after the other, or an upgrade and a WebSocket."""

    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    _linger = False  # close gently: the client may still be sending what nobody reads
    _asked_to_close = False  # by the client, for after this request

    def setup(self) -> None:
        """Reads through a deadline instead of a timeout for each piece."""
        super().setup()
        self.rfile.close()
        self._reader = _Reader(self.connection)
        self.rfile = io.BufferedReader(self._reader)

    def handle_one_request(self) -> None:
        """Gives the next request its time."""
        patience = REQUEST_TIMEOUT if self.server.admitted() else REFUSED_TIMEOUT
        self._reader.deadline = monotonic() + patience
        super().handle_one_request()

    def __getattr__(self, name: str) -> Any:
        """Methods that HTTP does not know are wrong methods too: 405 here, not the base class's 501."""
        if name.startswith("do_"):
            return self.do_GET
        raise AttributeError(name)

    def do_GET(self) -> None:
        """Answers one request, whatever its method."""
        self.connection.settimeout(REQUEST_TIMEOUT)  # for the answer: reading sets its own
        path = self.path.partition("?")[0]
        self._asked_to_close = self.close_connection
        try:
            if self._has_body():  # until somebody has read it
                self.close_connection = self._linger = True
            routes: dict[str, dict[str, Callable[[], None]]] = {
                "/v1.0/alive": dict.fromkeys(GET_OR_HEAD, self._alive),
                "/v1.0/stats": dict.fromkeys(GET_OR_HEAD, self._stats),
                "/v1.0/ingest": {**dict.fromkeys(GET_OR_HEAD, self._upgrade), "POST": self._post},
            }
            if not self.server.admitted():
                self.close_connection = True
                if path not in ("/v1.0/alive", "/v1.0/stats"):
                    self.server.refuse()
                    raise Refusal(
                        503,
                        f"too many connections: at most {self.server.limit} at once",
                        {"Retry-After": "1"},
                    )
            if path not in routes:
                raise Refusal(404, f"nothing here: there are {', '.join(routes)}")
            methods = routes[path]
            if self.command not in methods:
                raise Refusal(405, f"{path} takes {', '.join(methods)}", {"Allow": ", ".join(methods)})
            methods[self.command]()
        except Refusal as refusal:
            log.debug("event=refused status=%d reason=%r", refusal.status, str(refusal))
            self._reply(refusal.status, refusal.body, refusal.headers)

    def finish(self) -> None:
        """Ends the connection, gently where the client may still be sending."""
        if self._linger:
            linger(self.connection)
        super().finish()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answers what the base class refuses (bad request lines and headers), in JSON like the rest."""
        self.close_connection = self._linger = True
        self.command = getattr(self, "command", None) or "GET"
        self._reply(code, {"error": message or HTTPStatus(code).phrase}, {})

    def version_string(self) -> str:
        """The `Server` header: the name this server was given."""
        return self.server.name

    def log_message(self, format: str, *args: Any) -> None:
        """What the base class logs goes to our log, in detail only."""
        log.debug("event=http client=%s message=%r", self.address_string(), format % args)

    # Routes.

    def _alive(self) -> None:
        self._want_json()
        self._reply(200, None, {})

    def _stats(self) -> None:
        self._want_json()
        self._reply(200, self.server.report(), {})

    def _post(self) -> None:
        """Stores the integers of the body and says how many they were."""
        self._check_origin()
        self._check_accept()
        kind = self.headers.get_content_type() if "Content-Type" in self.headers else BODY_TYPES[0]
        if kind not in BODY_TYPES:
            raise Refusal(415, f"the body is {kind}: send {BODY_TYPES[0]}")
        body = self._read_body()
        self._linger = False
        self.close_connection = self._asked_to_close or self.server.stopping.is_set()
        try:
            values = decode_plain(body)
        except WireError as error:
            self.server.totals.refused()
            raise Refusal(error.status, str(error)) from error
        self.server.totals.received(len(values))
        self._ingest(values)

    def _ingest(self, values: Any) -> None:
        """Puts the values, waits until they are stored, and answers."""
        started = monotonic()
        intake = self.server.intake
        try:
            block = plain_block(values, uuid.uuid4().bytes, 0)
            accepted, ticket = intake.put(block, INGEST_TIMEOUT)
        except StoreError as error:
            self.server.totals.refused(len(values))
            raise self._not_now(f"not stored: {error}", 0) from error
        left = started + INGEST_TIMEOUT - monotonic()
        if accepted < len(values):
            self.server.totals.refused(len(values) - accepted)
            why = "the server is stopping" if intake.closed else "the ring is full"
            raise self._not_now(f"{why}: {accepted} of {len(values)} records were accepted", accepted)
        if not intake.wait(ticket, max(0.0, left)):
            raise self._not_now("accepted, but not stored yet: is the consumer away?", accepted)
        self.server.totals.acked([monotonic() - started])
        self._reply(200, {"stored": accepted}, {})

    def _not_now(self, reason: str, accepted: int) -> Refusal:
        return Refusal(503, reason, {"Retry-After": "5"}, {"accepted": accepted})

    def _upgrade(self) -> None:
        """Makes the connection a WebSocket and serves it to its end."""
        headers = self._check_handshake()
        rest = self._take_buffered()
        self.connection.settimeout(None)
        self.close_connection = True
        self.server.stream()
        extra = {"X-Request-Id": _request_id(), "Server": self.server.name}
        try:
            connection = ServerConnection(self.connection, headers, extra, (SUBPROTOCOL,), self.server.stop_sign)
        except HandshakeError as error:
            raise Refusal(400, f"bad WebSocket handshake: {error}") from error
        log.debug("event=connected client=%s", self.address_string())
        session = Session(connection, self.server.intake, self.server.totals, self.server.stopping)
        code, reason = session.run(rest)
        log.debug(
            "event=disconnected client=%s code=%d reason=%r acked=%d",
            self.address_string(),
            code,
            reason,
            session.acked,
        )

    # Checks. Each raises Refusal.

    def _want_json(self) -> None:
        """What JSON routes ask of a request: it takes JSON, and has nothing else to say."""
        self._check_accept()
        if "Content-Type" in self.headers:
            kind = self.headers["Content-Type"].partition(";")[0].strip().lower()
            if kind not in ("application/json", "*/*"):
                raise Refusal(415, f"Content-Type is {kind}: send application/json, or none")

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
                raise Refusal(403, f"pages of {origin} may not write here, only this server's own")

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
        headers = {
            "Host": "localhost",  # checked, and of no more use: wsproto would only decode it
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec-WebSocket-Key": keys[0].strip(),
            "Sec-WebSocket-Version": "13",
        }
        if "Sec-WebSocket-Protocol" in self.headers:
            headers["Sec-WebSocket-Protocol"] = ", ".join(self.headers.get_all("Sec-WebSocket-Protocol", []))
        return headers

    # Helpers.

    def _tokens(self, name: str) -> list[str]:
        """The comma-separated tokens of a header, in lower case."""
        return [token.strip().lower() for value in self.headers.get_all(name, []) for token in value.split(",")]

    def _has_body(self) -> bool:
        """True when a body follows the headers."""
        return self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers

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
            self.server.totals.refused()
            raise Refusal(413, f"{text} bytes: a body has at most {MAX_MESSAGE}")
        patience = REQUEST_TIMEOUT + length / BODY_RATE
        self._reader.deadline = monotonic() + patience
        try:
            body = self.rfile.read(length)
        except TimeoutError:
            raise Refusal(408, f"the body did not come within {patience:.0f} s") from None
        finally:
            self.connection.settimeout(REQUEST_TIMEOUT)
        self.server.totals.read(len(body))
        if len(body) < length:
            if self.server.stopping.is_set():
                raise self._not_now("the server is stopping", 0)
            self.server.totals.refused()
            raise Refusal(400, f"Content-Length is {length}, but only {len(body)} bytes came")
        return body

    def _take_buffered(self) -> bytes:
        """What `rfile` has read beyond the request: the first frames may come with the handshake."""
        self._reader.deadline = None
        return self.rfile.peek()  # type: ignore[attr-defined,no-any-return]  # a BufferedReader

    def _reply(self, status: int, body: dict[str, Any] | None, headers: dict[str, str]) -> None:
        """Sends a whole response, without its body to HEAD."""
        content = b"" if body is None else json.dumps(body).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json;charset=utf-8")
        self.send_header("X-Request-Id", _request_id())
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection and "Connection" not in headers:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _request_id() -> str:
    return str(uuid.uuid4()).upper()


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
