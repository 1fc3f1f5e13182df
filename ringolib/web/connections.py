"""The connections of an HTTP server: who is accepted, by which thread each is served, and how all of it ends.

`Connections` is a `ThreadingHTTPServer` that owns its threads: `accept` takes connections from every listening socket,
and each connection has one, `conn-N`, that shakes hands, where TLS is spoken, reads, works and writes for it from
beginning to end. `Connections._lock` guards the table of connections and its counts; `_ended` shares it and is notified
when a connection ends, or the server begins to stop or to close.

Shutdown, all from the program's main thread: `stop` makes every connection read no more, and admits none
(who only looks on is still answered, while the ring is drained); `wait_ended` waits until each has finished
what it had read; `abort` ends those that do not; `close` stops to accept, and comes last.
"""

import errno
import logging
import select
import socket
import ssl
import sys
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import BaseServer
from time import monotonic
from typing import Any, NamedTuple

from ringolib.net.addresses import UNIX_PEER
from ringolib.net.credentials import Credentials
from ringolib.net.listeners import Listeners
from ringolib.net.sockets import linger
from ringolib.net.tls_socket import HANDSHAKE_TIMEOUT, NotTLS, TLSSocket

log = logging.getLogger("ringoexp.http")

MAX_REFUSED = 64
"""Connections beyond the limit that are answered at once; the next ones wait to be accepted."""
KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}
"""A client whose machine is gone is noticed after two minutes."""
CLOSE_TIMEOUT = 2.0
"""Seconds that those who only look on have to end when the server closes."""


_HINT = b'{"error": "TLS is spoken on this port: ask for https:// or wss://"}\n'
PLAIN_ON_TLS = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json;charset=utf-8\r\n"
    b"Content-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(_HINT), _HINT)
)
"""What a client is told that speaks HTTP where TLS is spoken."""


class ConnectionStats(NamedTuple):
    """Connections admitted and open now, admitted ever; requests refused because there were too many, and those without
    the token; connections that ended in the TLS handshake.
    """

    now: int
    total: int
    refused: int
    unauthorized: int
    tls_failed: int


class _Entry(NamedTuple):
    sock: socket.socket
    address: str  # the client's
    admitted: bool
    crowding: bool  # not admitted, because of `per_address`
    late: bool  # it came after `stop`
    stream: bool = False


class Connections(ThreadingHTTPServer):
    """Owns `listeners`, and accepts from them once `start` is called; `handler` is one connection's job.

    At most `limit` connections are admitted at once, `per_address` of one client's address (0: any number), none once
    it stops; what the others get is the handler's choice. With a certificate in `credentials` it speaks TLS. `thread` names
    the acceptor.
    """

    daemon_threads = True  # `wait_ended` waits for them; a second signal must not

    def __init__(
        self,
        listeners: Listeners,
        handler: type[BaseHTTPRequestHandler],
        name: str,
        limit: int = 0,
        per_address: int = 0,
        credentials: Credentials | None = None,
        thread: str = "accept",
        connection: str = "conn",
    ) -> None:
        BaseServer.__init__(self, listeners.addresses[0][1], handler)  # the class between would make a socket
        self.listeners = listeners
        self.name = name
        self.limit = limit
        self.per_address = per_address
        self.max_refused = MAX_REFUSED
        self.credentials = credentials or Credentials()
        self.stopping = threading.Event()
        self._connection = connection

        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)
        # Guarded by _lock.
        self._entries: dict[object, _Entry] = {}  # by the connection's thread, or what `detach` has put there
        self._detached: set[int] = set()  # ids of requests that are served elsewhere
        self._admitted = 0
        self._total = 0
        self._refused = 0
        self._unauthorized = 0
        self._tls_failed = 0
        self._accepted = 0
        self._admitted_of: Counter[str] = Counter()  # by the client's address
        self._closing = False

        self._stop_wake, self._stop_sign = socket.socketpair()
        self._close_wake, self._close_sign = socket.socketpair()
        # Daemon: a second signal ends the process at once.
        self._acceptor = threading.Thread(target=self.serve_forever, name=thread, daemon=True)

    @property
    def port(self) -> int:
        """The port it listens on; 0 on a Unix socket."""
        return self.listeners.port

    def start(self) -> None:
        """Starts to accept."""
        self._acceptor.start()

    def serve_forever(self, poll_interval: float = 0.0) -> None:
        """Accepts until `close`, one connection at a time from each socket. Does not poll, as the base class would."""
        sockets = {sock.fileno(): sock for sock in self.listeners.sockets}
        poll = select.poll()  # not select: it ends at descriptor 1023
        for each in (*sockets, self._close_sign.fileno()):
            poll.register(each, select.POLLIN)
        while True:
            for ready, _ in poll.poll():
                with self._lock:  # beyond the limit, connections have to make room for each other
                    while self._crowded():
                        self._ended.wait()
                    if self._closing:
                        return
                self.socket = sockets[ready]
                self._handle_request_noblock()  # type: ignore[attr-defined]  # the documented loop body

    def _crowded(self) -> bool:
        """True while the next connection would be one too many beyond the limit."""
        assert self._lock.locked()
        full = self.stopping.is_set() or bool(self.limit and self._admitted >= self.limit)
        return full and self._turned_away() >= self.max_refused and not self._closing

    def _turned_away(self) -> int:
        """Connections that are open and were not admitted."""
        assert self._lock.locked()
        return len(self._entries) - self._admitted

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accepts one connection. Out of descriptors, it waits a little for some to be closed."""
        try:
            request, address = super().get_request()
            if request.family == socket.AF_UNIX:
                return request, UNIX_PEER
            request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            request.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in KEEPALIVE.items():
                if hasattr(socket, option):  # macOS has other names
                    request.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
            return request, address
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                log.error("cannot_accept", {"error": str(error)})
                with self._lock:
                    if not self._closing:
                        self._ended.wait(0.2)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Starts the connection's own thread. Of an address that has too many, there are MAX_REFUSED at most."""
        address = str(client_address[0])
        with self._lock:
            late = self.stopping.is_set()
            counted = self.per_address and client_address != UNIX_PEER  # which all have
            crowding = bool(counted) and self._admitted_of[address] >= self.per_address
            admitted = not late and not crowding and (not self.limit or self._admitted < self.limit)
            if crowding and self._turned_away() >= MAX_REFUSED:
                self._refused += 1
                self.shutdown_request(request)
                return
            self._total += admitted
            self._admitted += admitted
            if admitted and self.per_address:
                self._admitted_of[address] += 1
            self._accepted += 1
            # Daemon: see daemon_threads.
            thread = threading.Thread(
                target=self._serve,
                args=(request, client_address),
                name=f"{self._connection}-{self._accepted}",
                daemon=True,
            )
            self._entries[thread] = _Entry(request, address, admitted, crowding, late)
        try:
            thread.start()
        except RuntimeError as error:  # no more threads to be had
            log.error("no_thread", {"error": str(error)})
            self.shutdown_request(request)
            self._leave(thread)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says in the log why a connection's thread ended: lost connections in detail only."""
        error = sys.exc_info()[1]
        level = logging.DEBUG if isinstance(error, OSError) else logging.ERROR
        log.log(
            level,
            "connection_error",
            {"client": client_address[0], "error": f"{type(error).__name__}: {error}"},
            exc_info=log.isEnabledFor(logging.DEBUG),
        )

    def admitted(self) -> bool:
        """True when the calling connection's thread was within the limit, and the server not stopping, when it came."""
        with self._lock:
            return self._entries[threading.current_thread()].admitted

    def crowding(self) -> bool:
        """True when the calling connection's thread was not admitted because its client's address had too many."""
        with self._lock:
            return self._entries[threading.current_thread()].crowding

    def refuse(self) -> None:
        """Counts a request answered 503 because there are too many connections."""
        with self._lock:
            self._refused += 1

    def unauthorized(self) -> None:
        """Counts a request that came without the token."""
        with self._lock:
            self._unauthorized += 1

    def stats(self) -> ConnectionStats:
        """The connections now and since the start."""
        with self._lock:
            return ConnectionStats(self._admitted, self._total, self._refused, self._unauthorized, self._tls_failed)

    @property
    def accepting(self) -> bool:
        """True until `close`, unless the acceptor's thread has ended before."""
        with self._lock:
            return self._closing or self._acceptor.is_alive()

    @property
    def stop_sign(self) -> socket.socket:
        """Becomes readable, and stays so, when the server stops."""
        return self._stop_sign

    def stream(self) -> None:
        """The calling connection's thread serves a WebSocket from now on."""
        with self._lock:
            me = threading.current_thread()
            self._entries[me] = self._entries[me]._replace(stream=True)

    def stop(self) -> None:
        """Admits no more, and makes every connection finish what it has read. Does nothing the second time."""
        with self._lock:
            if self.stopping.is_set():
                return
            self.stopping.set()
            self._ended.notify_all()
        self._stop_wake.send(b"x")
        self._shut_all(socket.SHUT_RD, streams=False)  # WebSockets see `stop_sign`, and can still close in order

    def close(self) -> None:
        """Accepts no more, and ends who still looks on. Does nothing the second time.

        Connections that `wait_ended` has not seen end keep what they need.
        """
        self.stop()
        with self._lock:
            if self._closing:
                return
            self._closing = True
            self._ended.notify_all()
        self._close_wake.send(b"x")
        if self._acceptor.is_alive():
            self._acceptor.join()
        self.server_close()
        self._close_wake.close()
        self._close_sign.close()
        self._shut_all(socket.SHUT_RD, streams=False)
        if not self.wait_ended(CLOSE_TIMEOUT, late=True):
            self.abort()
        if self.wait_ended(CLOSE_TIMEOUT, late=True):
            self._stop_wake.close()
            self._stop_sign.close()

    def wait_ended(self, timeout: float, late: bool = False) -> bool:
        """True once no connection is left, but those that came `late`, after `stop`; False after `timeout` seconds."""
        deadline = monotonic() + timeout
        with self._lock:
            while any(late or not entry.late for entry in self._entries.values()):
                left = deadline - monotonic()
                if left <= 0:
                    return False
                self._ended.wait(left)
            return True

    def abort(self) -> None:
        """Makes reading and writing fail on every connection that is left."""
        self._shut_all(socket.SHUT_RDWR, streams=True)

    def server_close(self) -> None:
        """Closes the listening sockets; threads are waited for elsewhere."""
        self.listeners.close()

    def _serve(self, request: socket.socket, client_address: Any) -> None:
        """A connection's thread."""
        try:
            context = self.credentials.current.server
            secured = self._shake_hands(request, context, client_address) if context else request
            if secured:
                self.process_request_thread(secured, client_address)  # type: ignore[arg-type]  # a socket, or as one
        finally:
            with self._lock:
                here = threading.current_thread() in self._entries
            if here:
                self._leave(threading.current_thread())

    def detach(self, request: Any) -> Callable[[], None]:
        """The calling thread's connection is served elsewhere from now on. Call the result once it has ended."""
        key = object()
        with self._lock:
            self._entries[key] = self._entries.pop(threading.current_thread())._replace(stream=True)
            self._detached.add(id(request))
        return lambda: self._leave(key)

    def shutdown_request(self, request: Any) -> None:
        """Close the socket, unless it is served elsewhere."""
        with self._lock:
            if id(request) in self._detached:
                self._detached.discard(id(request))
                return
        super().shutdown_request(request)

    def _shake_hands(self, request: socket.socket, context: ssl.SSLContext, client_address: Any) -> TLSSocket | None:
        """The connection, over TLS; None, and it is closed, if that cannot be had."""
        try:
            secured = TLSSocket(request, context)
            secured.handshake(HANDSHAKE_TIMEOUT if self.admitted() else CLOSE_TIMEOUT)
            return secured
        except OSError as error:
            with self._lock:
                self._tls_failed += 1
            log.warning("tls_failed", {"client": client_address[0], "reason": str(error)})
            if isinstance(error, NotTLS) and error.http:
                try:
                    request.send(PLAIN_ON_TLS)
                    linger(request)
                except OSError:
                    pass  # gone
            self.shutdown_request(request)
            return None

    def _leave(self, key: object) -> None:
        with self._lock:
            entry = self._entries.pop(key)
            self._admitted -= entry.admitted
            if entry.admitted and self.per_address:
                self._admitted_of[entry.address] -= 1
                if not self._admitted_of[entry.address]:
                    del self._admitted_of[entry.address]
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
