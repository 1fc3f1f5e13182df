"""The connections of an HTTP server: accept them, give each a thread, and end them in order.

`Connections` is a `ThreadingHTTPServer` with a table of its connections. The thread `accept` takes connections from all
listening sockets. Each connection has one thread, `conn-N`, from its first byte to its last: the thread does the TLS
handshake, reads, works and writes. The requests themselves are the handler's job.

`_lock` guards the table and the counters. `_changed` is the condition on this lock. It is notified when a connection
leaves the table, and when the server begins to stop or to close. The acceptor waits on it for room in the table, and
`wait_ended` waits on it for the end of the last connection.

Shutdown has these steps. The main thread calls them, in this order:

1. `stop()`: The server admits no more connections. Open connections receive no more requests: HTTP sockets are shut
   down for reading, and WebSocket sessions see `stop_sign`. A connection finishes the requests it has read, and ends.
   The acceptor continues: connections that come after `stop` are *late*. They are not admitted, but the handler may
   still answer, for example with statistics while the ring drains.
2. `wait_ended(timeout)`: The caller waits for all connections except the late ones. They may be waiting for room in the
   ring, or for a commit: a caller that runs out of time ends these waits (`Ring.abort`), and waits again.
3. `abort()`, only if some connections have not ended by then: all reads and writes on their sockets fail from now on.
4. `close()`: The acceptor ends, the listening sockets are closed, and the late connections end.
"""

import errno
import logging
import select
import socket
import ssl
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import BaseServer
from typing import Any, NamedTuple

from ringolib.net.addresses import UNIX_PEER
from ringolib.net.credentials import Credentials
from ringolib.net.listeners import Listeners
from ringolib.net.sockets import linger
from ringolib.net.tls_socket import HANDSHAKE_TIMEOUT, NotTLS, TLSSocket
from ringolib.timing import ThreadError, deadline_after, start, wait_until

log = logging.getLogger("ringoexp.http")

MAX_REFUSED = 64
"""Connections that are not admitted and still get a response, at once. The next ones wait to be accepted."""
KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}
"""TCP keepalive options: the loss of a client's machine is detected after two minutes."""
CLOSE_TIMEOUT_SECONDS = 2.0
"""The time that late connections have to end when the server closes, and that a refused one has for its handshake."""
NO_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
NO_RESOURCES_WAIT_SECONDS = 0.2
"""The pause after a connection could not be accepted because the system lacks descriptors or memory."""

_HINT = b'{"error": "this port uses TLS: connect with https:// or wss://"}\n'
PLAIN_ON_TLS = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json;charset=utf-8\r\n"
    b"Content-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(_HINT), _HINT)
)
"""The response to an HTTP request without TLS on a port with TLS."""


class Limits(NamedTuple):
    """How many connections may be open at once. 0 means any number."""

    admitted: int = 0  # all in all
    per_address: int = 0  # admitted from one client address; Unix sockets do not count
    refused: int | None = None  # open without being admitted; None: MAX_REFUSED


class ConnectionStats(NamedTuple):
    """Counters of connections and refused requests."""

    now: int  # admitted and open
    total: int  # admitted since the start
    refused: int  # requests refused because of Limits
    unauthorized: int  # requests without a valid token
    tls_failed: int  # connections that ended in the TLS handshake


class _Entry(NamedTuple):
    sock: socket.socket
    address: str  # the client's
    admitted: bool
    address_full: bool  # not admitted, because of Limits.per_address
    late: bool  # accepted after `stop`
    websocket: bool = False


class Connections(ThreadingHTTPServer):
    """Accepts connections from `listeners`, which it owns, once `start` is called. Each one is served by `handler`.

    Connections beyond `limits`, and all connections after `stop`, are not admitted: the handler chooses their response.
    If `credentials` have a certificate, all connections use TLS.
    """

    daemon_threads = True  # the ordered stop waits for them; a second signal must end the process without it
    acceptor_name = "accept"
    connection_name = "conn"

    def __init__(
        self,
        listeners: Listeners,
        handler: type[BaseHTTPRequestHandler],
        name: str,
        limits: Limits = Limits(),  # noqa: B008  # a constant
        credentials: Credentials | None = None,
    ) -> None:
        BaseServer.__init__(self, listeners.addresses[0][1], handler)  # TCPServer.__init__ would open a socket
        self.listeners = listeners
        self.name = name
        self.limits = limits
        self.credentials = credentials or Credentials()
        self.stopping = threading.Event()
        self._max_refused = MAX_REFUSED if limits.refused is None else limits.refused

        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        # Guarded by _lock.
        self._entries: dict[threading.Thread, _Entry] = {}
        self._accepted = 0  # numbers the threads
        self._admitted = 0
        self._admitted_from: Counter[str] = Counter()  # by the client's address
        self._total = 0
        self._refused = 0
        self._unauthorized = 0
        self._tls_failed = 0
        self._closing = False

        self._stop_wake, self._stop_sign = socket.socketpair()
        self._close_wake, self._close_sign = socket.socketpair()
        # Daemon: a second signal must end the process without the ordered stop.
        self._acceptor = threading.Thread(target=self.serve_forever, name=self.acceptor_name, daemon=True)

    @property
    def port(self) -> int:
        """The port that the server listens on; 0 on a Unix socket."""
        return self.listeners.port

    @property
    def accepting(self) -> bool:
        """True until `close`, unless the acceptor thread has died."""
        with self._lock:
            return self._closing or self._acceptor.is_alive()

    @property
    def stop_sign(self) -> socket.socket:
        """A socket that becomes readable, and stays readable, when the server stops."""
        return self._stop_sign

    def start(self) -> None:
        """Begin to accept connections. Raises ThreadError."""
        start(self._acceptor)

    def stats(self) -> ConnectionStats:
        """Return the counters."""
        with self._lock:
            return ConnectionStats(self._admitted, self._total, self._refused, self._unauthorized, self._tls_failed)

    # Shutdown: the module's docstring explains the order.

    def stop(self) -> None:
        """Admit no more connections, and let the open ones finish the requests they have read. Idempotent."""
        with self._lock:
            if self.stopping.is_set():
                return
            self.stopping.set()
            self._changed.notify_all()
        self._stop_wake.send(b"x")
        self._shut_down_sockets(socket.SHUT_RD, websockets=False)  # a WebSocket needs to read for its closing handshake

    def wait_ended(self, timeout: float, late: bool = False) -> bool:
        """Wait until all connections have ended, and return False if `timeout` seconds were not enough.

        Connections that came after `stop` do not count, unless `late` is true.
        """

        def ended() -> bool:
            return not any(late or not entry.late for entry in self._entries.values())

        with self._lock:
            return wait_until(self._changed, ended, deadline_after(timeout))

    def abort(self) -> None:
        """Make all reads and writes fail on the connections that are still open."""
        self._shut_down_sockets(socket.SHUT_RDWR, websockets=True)

    def close(self) -> None:
        """Accept no more connections, and end the late ones. Idempotent.

        The sockets of connections that do not end in time stay open, because their threads still use them.
        """
        self.stop()
        with self._lock:
            if self._closing:
                return
            self._closing = True
            self._changed.notify_all()
        self._close_wake.send(b"x")
        if self._acceptor.is_alive():
            self._acceptor.join()
        self.server_close()
        self._close_wake.close()
        self._close_sign.close()
        self._shut_down_sockets(socket.SHUT_RD, websockets=False)
        if not self.wait_ended(CLOSE_TIMEOUT_SECONDS, late=True):
            self.abort()
        if self.wait_ended(CLOSE_TIMEOUT_SECONDS, late=True):
            self._stop_wake.close()
            self._stop_sign.close()

    def server_close(self) -> None:
        """Close the listening sockets. The base class would wait for threads here; `wait_ended` does that."""
        self.listeners.close()

    # For the thread of a connection.

    def is_admitted(self) -> bool:
        """True if the calling thread's connection was admitted when it was accepted."""
        with self._lock:
            return self._entries[threading.current_thread()].admitted

    def is_address_full(self) -> bool:
        """True if the calling thread's connection was not admitted because of Limits.per_address."""
        with self._lock:
            return self._entries[threading.current_thread()].address_full

    def mark_websocket(self) -> None:
        """Record that the calling thread's connection is a WebSocket from now on."""
        with self._lock:
            thread = threading.current_thread()
            self._entries[thread] = self._entries[thread]._replace(websocket=True)

    def count_refused(self) -> None:
        """Count a request that is answered 503 because of Limits."""
        with self._lock:
            self._refused += 1

    def count_unauthorized(self) -> None:
        """Count a request without a valid token."""
        with self._lock:
            self._unauthorized += 1

    # The acceptor thread.

    def serve_forever(self, poll_interval: float = 0.0) -> None:
        """Accept connections until `close`, one from each ready socket in turn. Unlike the base class, do not poll."""
        sockets = {sock.fileno(): sock for sock in self.listeners.sockets}
        poll = select.poll()  # select.select fails for descriptors above 1023
        for descriptor in (*sockets, self._close_sign.fileno()):
            poll.register(descriptor, select.POLLIN)
        while True:
            for ready, _ in poll.poll():
                with self._lock:
                    wait_until(self._changed, lambda: not self._is_full())
                    if self._closing:
                        return
                self.socket = sockets[ready]
                self._handle_request_noblock()  # type: ignore[attr-defined]  # the documented loop body

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept one connection. If the system lacks descriptors, wait a moment for connections to end."""
        try:
            request, address = super().get_request()
            if request.family == socket.AF_UNIX:
                return request, UNIX_PEER
            _set_tcp_options(request)
            return request, address
        except OSError as error:
            if error.errno in NO_RESOURCES:
                log.error("cannot_accept", {"error": str(error)})
                with self._lock:
                    if not self._closing:
                        self._changed.wait(NO_RESOURCES_WAIT_SECONDS)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start the connection's thread. Close the connection if there is no room for it, or no thread."""
        thread = self._add(request, client_address)
        if thread is None:
            self.shutdown_request(request)
            return
        try:
            start(thread)
        except ThreadError as error:
            log.error("no_thread", {"error": str(error)})
            self.shutdown_request(request)
            self._remove(thread)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log the exception that ended a connection's thread. A lost connection is logged at debug level."""
        error = sys.exc_info()[1]
        level = logging.DEBUG if isinstance(error, OSError) else logging.ERROR
        log.log(
            level,
            "connection_error",
            {"client": client_address[0], "error": f"{type(error).__name__}: {error}"},
            exc_info=log.isEnabledFor(logging.DEBUG),
        )

    def _is_full(self) -> bool:
        """True if the next connection would not be admitted, and the limit for those connections is reached too."""
        assert self._lock.locked()
        limit_reached = bool(self.limits.admitted and self._admitted >= self.limits.admitted)
        refusing = limit_reached or self.stopping.is_set()
        return refusing and self._unadmitted() >= self._max_refused and not self._closing

    def _unadmitted(self) -> int:
        """Return the number of open connections that were not admitted."""
        assert self._lock.locked()
        return len(self._entries) - self._admitted

    def _add(self, request: socket.socket, client_address: Any) -> threading.Thread | None:
        """Enter a connection into the table and return its thread, not yet started.

        Return None if the client's address has too many connections, and there is no room for one more refused
        connection. Unlike `_is_full`, this must not wait: one address must not block the others.
        """
        address = str(client_address[0])
        limits = self.limits
        with self._lock:
            late = self.stopping.is_set()
            counted = limits.per_address and client_address != UNIX_PEER  # all clients of a Unix socket share it
            address_full = bool(counted) and self._admitted_from[address] >= limits.per_address
            admitted = not late and not address_full and (not limits.admitted or self._admitted < limits.admitted)
            if address_full and self._unadmitted() >= self._max_refused:
                self._refused += 1
                return None
            self._total += admitted
            self._admitted += admitted
            if admitted and limits.per_address:
                self._admitted_from[address] += 1
            self._accepted += 1
            # Daemon: see daemon_threads.
            thread = threading.Thread(
                target=self._serve,
                args=(request, client_address),
                name=f"{self.connection_name}-{self._accepted}",
                daemon=True,
            )
            self._entries[thread] = _Entry(request, address, admitted, address_full, late)
            return thread

    def _remove(self, thread: threading.Thread) -> None:
        with self._lock:
            entry = self._entries.pop(thread)
            self._admitted -= entry.admitted
            if entry.admitted and self.limits.per_address:
                self._admitted_from[entry.address] -= 1
                if not self._admitted_from[entry.address]:
                    del self._admitted_from[entry.address]
            self._changed.notify_all()

    def _shut_down_sockets(self, how: int, websockets: bool) -> None:
        """Shut down the sockets of all connections; WebSockets only if `websockets` is true."""
        with self._lock:  # shutdown does not block
            for entry in self._entries.values():
                if entry.websocket and not websockets:
                    continue
                try:
                    entry.sock.shutdown(how)
                except OSError:
                    pass  # closed already

    # The thread of a connection.

    def _serve(self, request: socket.socket, client_address: Any) -> None:
        try:
            context = self.credentials.current.server
            stream = self._secure(request, context, client_address) if context else request
            if stream:
                self.process_request_thread(stream, client_address)  # type: ignore[arg-type]  # or a TLSSocket
        finally:
            self._remove(threading.current_thread())

    def _secure(self, request: socket.socket, context: ssl.SSLContext, client_address: Any) -> TLSSocket | None:
        """Return the connection after the TLS handshake. If the handshake fails, close it and return None."""
        try:
            secured = TLSSocket(request, context)
            secured.handshake(HANDSHAKE_TIMEOUT if self.is_admitted() else CLOSE_TIMEOUT_SECONDS)
            return secured
        except OSError as error:
            with self._lock:
                self._tls_failed += 1
            log.warning("tls_failed", {"client": client_address[0], "reason": str(error)})
            if isinstance(error, NotTLS) and error.http:
                _reply_plain(request)
            self.shutdown_request(request)
            return None


def _set_tcp_options(sock: socket.socket) -> None:
    """Send small messages at once, and detect lost clients. Raises OSError."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE.items():
        if hasattr(socket, option):  # macOS has other names
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _reply_plain(sock: socket.socket) -> None:
    """Answer an HTTP request that came without TLS."""
    try:
        sock.send(PLAIN_ON_TLS)
        linger(sock)
    except OSError:
        pass  # the client has disconnected
