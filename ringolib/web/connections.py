"""The connections of an HTTP server: accept them, give each a thread, and end them in order.

`Connections` is a `ThreadingHTTPServer`. The thread `accept` takes connections from all listening sockets. Each
connection gets one thread, `http-N`, which does the TLS handshake, reads requests, works and writes. The requests
themselves are the handler's job. A connection that becomes a WebSocket is detached from its thread, which ends then.
`ConnectionTable` holds the state that these threads share, and its lock. `_detach_lock` guards `_detached`.

Shutdown has these steps. The main thread calls them, in this order:

1. `stop()`: The server admits no more connections. Open connections receive no more requests: HTTP sockets are shut
   down for reading, and the ingest loop closes its WebSockets. A connection finishes the requests it has read.
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
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import BaseServer
from typing import TYPE_CHECKING, Any

from ringolib import __version__
from ringolib.net import tls_socket
from ringolib.net.addresses import UNIX_PEER
from ringolib.net.credentials import Credentials
from ringolib.net.listeners import Listeners
from ringolib.net.sockets import linger
from ringolib.net.tls_socket import NotTLS, TLSSocket
from ringolib.timing import ThreadError, start
from ringolib.web.names import Names
from ringolib.web.table import ConnectionStats, ConnectionTable, Limits

if TYPE_CHECKING:
    import ssl

log = logging.getLogger("ringoexp.http")

KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}
"""TCP keepalive options: the loss of a client's machine is detected after two minutes."""
CLOSE_TIMEOUT_SECONDS = 2.0
"""The time that late connections have to end when the server closes, and that a refused one has for its handshake."""
NO_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
NO_RESOURCES_WAIT_SECONDS = 0.2
"""The pause after a connection could not be accepted because the system lacks descriptors or memory."""

_HINT = b'{"error": "this port uses TLS: connect with https:// or wss:// (a publisher: --consumer_tls)"}\n'
PLAIN_ON_TLS = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json;charset=utf-8\r\n"
    b"Content-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(_HINT), _HINT)
)
"""The response to an HTTP request without TLS on a port with TLS."""


class Connections(ThreadingHTTPServer):
    """Accepts connections from `listeners`, which it owns, once `start` is called. Each one is served by `handler`.

    Connections beyond `limits`, and all connections after `stop`, are not admitted: the handler chooses their response.
    If `credentials` have a certificate, all connections use TLS. `names` are the hosts that the server answers to.
    """

    daemon_threads = True  # the ordered stop waits for them; a second signal must end the process without it
    acceptor_name = "accept"
    connection_name = "http"

    def __init__(
        self,
        listeners: Listeners,
        handler: type[BaseHTTPRequestHandler],
        name: str,
        limits: Limits,
        credentials: Credentials | None = None,
        names: Names | None = None,
    ) -> None:
        BaseServer.__init__(self, listeners.addresses[0][1], handler)  # TCPServer.__init__ would open a socket
        self.listeners = listeners
        self.name = name or f"ringoexp/{__version__}"
        self.credentials = credentials or Credentials()
        self.names = names or Names()
        self.table = ConnectionTable(limits)
        self.stopping = self.table.stopping
        self._accepted = 0  # numbers the threads; belongs to the acceptor
        self._detach_lock = threading.Lock()
        self._detached: set[int] = set()  # ids of sockets that their threads must not close; guarded by _detach_lock
        self._close_wake, self._close_sign = socket.socketpair()
        # Daemon: a second signal must end the process without the ordered stop.
        self._acceptor = threading.Thread(target=self.serve_forever, name=self.acceptor_name, daemon=True)

    @property
    def port(self) -> int:
        """The port that the server listens on; 0 on a Unix socket."""
        return self.listeners.port

    @property
    def accepting(self) -> bool:
        """False only if the acceptor thread has died."""
        alive = self._acceptor.is_alive()  # read first: the acceptor ends only after the table is closing
        return self.table.closing or alive

    def start(self) -> None:
        """Begin to accept connections. Raises ThreadError."""
        start(self._acceptor)

    def stats(self) -> ConnectionStats:
        """Return the counters."""
        return self.table.stats()

    # Shutdown: the module's docstring explains the order.

    def stop(self) -> None:
        """Admit no more connections, and let the open ones finish the requests they have read. Idempotent."""
        if self.table.begin_stop():
            # A WebSocket has to read for its closing handshake.
            self.table.shut_down_sockets(socket.SHUT_RD, websockets=False)

    def wait_ended(self, timeout: float) -> bool:
        """Wait until all connections except late ones have ended. Return False after `timeout` seconds."""
        return self.table.wait_ended(timeout)

    def abort(self) -> None:
        """Make all reads and writes fail on the connections that are still open."""
        self.table.shut_down_sockets(socket.SHUT_RDWR, websockets=True)

    def close(self) -> None:
        """Accept no more connections, and end the late ones. Idempotent.

        The sockets of connections that do not end in time stay open, because their threads still use them.
        """
        self.stop()
        if not self.table.begin_close():
            return
        self._close_wake.send(b"x")
        if self._acceptor.is_alive():
            self._acceptor.join()
        self.server_close()
        self._close_wake.close()
        self._close_sign.close()
        self.table.shut_down_sockets(socket.SHUT_RD, websockets=False)
        if not self.table.wait_ended(CLOSE_TIMEOUT_SECONDS, late=True):
            self.abort()
        self.table.wait_ended(CLOSE_TIMEOUT_SECONDS, late=True)

    def server_close(self) -> None:
        """Close the listening sockets. The base class would wait for threads here; `wait_ended` does that."""
        self.listeners.close()

    # The acceptor thread.

    def serve_forever(self, poll_interval: float = 0.0) -> None:
        """Accept connections until `close`, one from each ready socket in turn. Unlike the base class, do not poll."""
        sockets = {sock.fileno(): sock for sock in self.listeners.sockets}
        poll = select.poll()  # select.select fails for descriptors above 1023
        for descriptor in (*sockets, self._close_sign.fileno()):
            poll.register(descriptor, select.POLLIN)
        while True:
            for ready, _ in poll.poll():
                if not self.table.wait_for_room():
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
                self.table.wait_for_change(NO_RESOURCES_WAIT_SECONDS)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start the connection's thread. Close the connection if there is no room for it, or no thread."""
        # Daemon: see daemon_threads.
        thread = threading.Thread(
            target=self._serve,
            args=(request, client_address),
            name=f"{self.connection_name}-{self._accepted + 1}",
            daemon=True,
        )
        if not self.table.add(thread, request, client_address):
            self.shutdown_request(request)
            return
        self._accepted += 1
        try:
            start(thread)
        except ThreadError as error:
            log.error("no_thread", {"error": str(error)})
            self.shutdown_request(request)
            self.table.remove(thread)

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

    # The thread of a connection.

    def _serve(self, request: socket.socket, client_address: Any) -> None:
        try:
            context = self.credentials.current.server
            stream = self._secure(request, context, client_address) if context else request
            if stream:
                self.process_request_thread(stream, client_address)  # type: ignore[arg-type]  # or a TLSSocket
        finally:
            self.table.remove(threading.current_thread())

    def detach(self, request: Any) -> Callable[[], None]:
        """The calling thread's connection is a WebSocket from now on, which the ingest loop serves.

        The thread does not close its socket then. Call the result once the connection has ended.
        """
        with self._detach_lock:
            self._detached.add(id(request))
        key = self.table.detach()
        return lambda: self.table.remove(key)

    def shutdown_request(self, request: Any) -> None:
        """Close the socket, unless the connection was detached."""
        with self._detach_lock:
            if id(request) in self._detached:
                self._detached.discard(id(request))
                return
        super().shutdown_request(request)

    def _secure(self, request: socket.socket, context: "ssl.SSLContext", client_address: Any) -> TLSSocket | None:
        """Return the connection after the TLS handshake. If the handshake fails, close it and return None."""
        timeout = tls_socket.HANDSHAKE_TIMEOUT if self.table.is_admitted() else CLOSE_TIMEOUT_SECONDS
        try:
            secured = TLSSocket(request, context)
            secured.handshake(timeout)
            return secured
        except OSError as error:
            self.table.count_tls_failed()
            late = f"it did not finish the TLS handshake within {timeout:g} s"
            reason = late if isinstance(error, TimeoutError) else str(error)
            log.warning("tls_failed", {"client": client_address[0], "reason": reason})
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
