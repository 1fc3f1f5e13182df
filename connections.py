"""The connections of an HTTP server: who is accepted, by which thread each is served, and how all of it ends.

`Connections` is a `ThreadingHTTPServer` that owns its threads: `accept` takes connections, and each
connection has one, `conn-N`, that reads, works and writes for it from beginning to end.
`Connections._lock` guards the table of connections and its counts; `_ended` shares it and is notified
when a connection ends, or the server begins to stop or to close.

Shutdown, all from the program's main thread: `stop` makes every connection read no more, and admits none
(who only looks on is still answered, while the ring is drained); `wait_ended` waits until each has finished
what it had read; `abort` ends those that do not; `close` stops to accept, and comes last.
"""

import errno
import logging
import select
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import monotonic
from typing import Any, NamedTuple

log = logging.getLogger("ringoexp.http")

MOST_REFUSED = 64
"""Connections beyond the limit that are answered at once; the next ones wait to be accepted."""
KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}
"""A client whose machine is gone is noticed after two minutes."""
CLOSE_TIMEOUT = 2.0
"""Seconds that those who only look on have to end when the server closes."""


class ConnectionStats(NamedTuple):
    """Connections admitted and open now, admitted ever, and requests refused because there were too many."""

    now: int
    total: int
    refused: int


class _Entry(NamedTuple):
    sock: socket.socket
    admitted: bool
    late: bool  # it came after `stop`
    stream: bool = False


class Connections(ThreadingHTTPServer):
    """Listens on `address` from the beginning, and accepts once `start` is called; `handler` is one connection's job.

    At most `limit` connections are admitted at once (0: any number), none once it stops; what the others get is the
    handler's choice. `thread` names the acceptor. Raises OSError when it cannot listen.
    """

    daemon_threads = True  # `wait_ended` waits for them; a second signal must not
    request_queue_size = 1024

    def __init__(
        self,
        family: socket.AddressFamily,
        address: tuple[Any, ...],
        handler: type[BaseHTTPRequestHandler],
        name: str,
        limit: int = 0,
        thread: str = "accept",
        connection: str = "conn",
    ) -> None:
        self.address_family = family
        self.name = name
        self.limit = limit
        self.stopping = threading.Event()
        self._connection = connection

        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)
        # Guarded by _lock.
        self._entries: dict[threading.Thread, _Entry] = {}
        self._admitted = 0
        self._total = 0
        self._refused = 0
        self._accepted = 0
        self._closing = False

        super().__init__(address, handler)
        self.socket.setblocking(False)  # a client may be gone between select and accept
        self._stop_wake, self._stop_sign = socket.socketpair()
        self._close_wake, self._close_sign = socket.socketpair()
        # Daemon: a second signal ends the process at once.
        self._acceptor = threading.Thread(target=self.serve_forever, name=thread, daemon=True)

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

    def start(self) -> None:
        """Starts to accept."""
        self._acceptor.start()

    def serve_forever(self, poll_interval: float = 0.0) -> None:
        """Accepts until `close`. Does not poll, as the base class would."""
        poll = select.poll()  # not select: it ends at descriptor 1023
        poll.register(self.socket, select.POLLIN)
        poll.register(self._close_sign, select.POLLIN)
        while True:
            poll.poll()
            with self._lock:  # beyond the limit, connections have to make room for each other
                while self._crowded():
                    self._ended.wait()
                if self._closing:
                    return
            self._handle_request_noblock()  # type: ignore[attr-defined]  # the documented loop body

    def _crowded(self) -> bool:
        """True while the next connection would be one too many beyond the limit."""
        assert self._lock.locked()
        refused = len(self._entries) - self._admitted
        full = self.stopping.is_set() or self._admitted >= self.limit
        return refused >= MOST_REFUSED and full and not self._closing

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
                log.error("cannot_accept", {"error": str(error)})
                with self._lock:
                    if not self._closing:
                        self._ended.wait(0.2)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Starts the connection's own thread."""
        with self._lock:
            late = self.stopping.is_set()
            admitted = not late and (not self.limit or self._admitted < self.limit)
            self._total += admitted
            self._admitted += admitted
            self._accepted += 1
            # Daemon: see daemon_threads.
            thread = threading.Thread(
                target=self._serve,
                args=(request, client_address),
                name=f"{self._connection}-{self._accepted}",
                daemon=True,
            )
            self._entries[thread] = _Entry(request, admitted, late)
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

    def refuse(self) -> None:
        """Counts a request answered 503 because there are too many connections."""
        with self._lock:
            self._refused += 1

    def stats(self) -> ConnectionStats:
        """The connections now and since the start."""
        with self._lock:
            return ConnectionStats(self._admitted, self._total, self._refused)

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
