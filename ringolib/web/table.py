"""The table of open connections: which ones are admitted, their counters, and the waits for room and for the end.

`ConnectionTable._lock` guards everything in the table. `_changed` is the condition on this lock. It is notified when a
connection leaves the table, and when the server begins to stop or to close. The acceptor thread waits on it for room.
The main thread waits on it until no connections are left. The only system call under the lock is `shutdown`, which does
not block.
"""

import socket
import threading
from collections import Counter
from typing import Any, NamedTuple

from ringolib.net.addresses import UNIX_PEER
from ringolib.net.sockets import shut_down
from ringolib.timing import deadline_after, wait_until
from ringolib.web import budget

MAX_REFUSED = 64
"""Connections that are not admitted and still get a response, at once. For the next one, the oldest that waits for its
client's request is cut off; if none does, it waits to be accepted."""


class Limits(NamedTuple):
    """How many connections may be open at once. 0 means any number."""

    admitted: int = 0  # in total
    per_address: int = 0  # admitted from one client address; not applied to Unix sockets
    refused: int | None = None  # open without being admitted; None: MAX_REFUSED
    threads: int = 0  # admitted connections that have a thread: all but WebSockets
    unfinished: int = budget.DEFAULT_MIB * budget.MIB  # bytes of unfinished messages and bodies
    limited_by: str = "-n"  # what sets `admitted`, for people


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
    late: bool  # accepted after `begin_stop`
    websocket: bool = False
    detached: bool = False  # its thread has handed it to the loop


class ConnectionTable:
    """The open connections of a server, by their threads. Decides which of them are admitted: see `add`."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.stopping = threading.Event()
        self._max_refused = MAX_REFUSED if limits.refused is None else limits.refused
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        # Guarded by _lock.
        self._entries: dict[object, _Entry] = {}  # by its thread, or by the key of `detach`
        self._silent: dict[object, None] = {}  # keys of connections that may be cut off: they answer no request
        self._cut: set[object] = set()  # keys of connections that were cut off, until their threads end
        self._admitted = 0
        self._threads = 0  # of admitted connections
        self._admitted_from: Counter[str] = Counter()  # by the client's address
        self._total = 0
        self._refused = 0
        self._unauthorized = 0
        self._tls_failed = 0
        self._closing = False

    @property
    def closing(self) -> bool:
        """True after `begin_close`."""
        with self._lock:
            return self._closing

    def stats(self) -> ConnectionStats:
        """Return the counters."""
        with self._lock:
            return ConnectionStats(self._admitted, self._total, self._refused, self._unauthorized, self._tls_failed)

    # For the acceptor thread.

    def wait_for_room(self) -> bool:
        """Wait until the next connection may be accepted. Return False if the server closes.

        A crowd of silent clients must not delay a client with a request: the silent ones are cut off, the oldest first.
        """
        with self._lock:
            while self._is_full():
                self._cut_off_oldest()
                self._changed.wait()
            return not self._closing

    def wait_for_change(self, timeout: float) -> None:
        """Wait until a connection has ended, or until `timeout` seconds have passed, or the server closes."""
        with self._lock:
            if not self._closing:
                self._changed.wait(timeout)

    def add(self, thread: threading.Thread, sock: socket.socket, client_address: Any) -> bool:
        """Enter a connection, before its thread starts, and decide whether it is admitted.

        Return False if the client's address has too many connections, and there is no room for one more refused
        connection. This must not wait as `wait_for_room` does: one address must not block the others.
        """
        address, limits = str(client_address[0]), self.limits
        with self._lock:
            late = self.stopping.is_set()
            counted = limits.per_address and client_address != UNIX_PEER  # all clients of a Unix socket share it
            address_full = bool(counted) and self._admitted_from[address] >= limits.per_address
            admitted = not late and not address_full and not self._limit_reached()
            if address_full and self._unadmitted() >= self._max_refused:
                self._refused += 1
                return False
            self._total += admitted
            self._admitted += admitted
            self._threads += admitted
            if admitted and limits.per_address:
                self._admitted_from[address] += 1
            self._entries[thread] = _Entry(sock, address, admitted, address_full, late)
            if not admitted or not self._max_refused:
                self._silent[thread] = None
            return True

    def remove(self, key: object) -> None:
        """Remove a connection that has ended, by its thread or by the key of `detach`. A second call does nothing."""
        with self._lock:
            entry = self._entries.pop(key, None)
            if entry is None:
                return
            self._silent.pop(key, None)
            self._cut.discard(key)
            self._admitted -= entry.admitted
            self._threads -= entry.admitted and not entry.detached
            if entry.admitted and self.limits.per_address:
                self._admitted_from[entry.address] -= 1
                if not self._admitted_from[entry.address]:
                    del self._admitted_from[entry.address]
            self._changed.notify_all()

    def _is_full(self) -> bool:
        """True if the next connection would not be admitted, and the limit for those connections is reached too."""
        assert self._lock.locked()
        refusing = self._limit_reached() or self.stopping.is_set()
        return refusing and self._unadmitted() >= self._max_refused and not self._closing

    def _cut_off_oldest(self) -> None:
        """Shut down the oldest connection that may be cut off; its thread ends then.

        These are the connections that are not admitted. Without places for such, they are all connections.
        """
        assert self._lock.locked()
        if self._silent and not self._cut:  # else the thread of one is about to end
            key = next(iter(self._silent))
            del self._silent[key]
            self._cut.add(key)
            shut_down(self._entries[key].sock, socket.SHUT_RDWR)

    def _limit_reached(self) -> bool:
        """True if no more connections may be admitted."""
        assert self._lock.locked()
        limits = self.limits
        if limits.admitted and self._admitted >= limits.admitted:
            return True
        return bool(limits.threads) and self._threads >= limits.threads

    def _unadmitted(self) -> int:
        """Return the number of open connections that were not admitted."""
        assert self._lock.locked()
        return len(self._entries) - self._admitted

    # For the thread of a connection.

    def is_admitted(self) -> bool:
        """True if the calling thread's connection was admitted when it was accepted."""
        with self._lock:
            return self._entries[threading.current_thread()].admitted

    def mark_busy(self, busy: bool) -> None:
        """Record whether the calling thread's connection answers a request, or waits for one."""
        with self._lock:
            thread = threading.current_thread()
            if busy:
                self._silent.pop(thread, None)
            elif thread not in self._cut:
                self._silent[thread] = None
                self._changed.notify_all()  # it may be cut off now

    def reached_limit(self) -> str:
        """Return the limit that keeps the calling thread's connection from being admitted, in words."""
        limits = self.limits
        with self._lock:
            if self._entries[threading.current_thread()].address_full:
                return f"{limits.per_address} connections from one address (--per_address)"
            if limits.admitted and self._admitted >= limits.admitted or not limits.threads:
                return f"{limits.admitted} connections at once ({limits.limited_by})"
            return f"{limits.threads} HTTP connections at once (--threads)"

    def mark_websocket(self) -> None:
        """Record that the calling thread's connection becomes a WebSocket: a stop must not end its reading side."""
        with self._lock:
            thread = threading.current_thread()
            self._entries[thread] = self._entries[thread]._replace(websocket=True)

    def detach(self) -> object:
        """Record that the calling thread has given its connection away. Return the key to `remove` it by."""
        key = object()
        with self._lock:
            entry = self._entries.pop(threading.current_thread())
            self._silent.pop(threading.current_thread(), None)
            self._entries[key] = entry._replace(detached=True)
            self._threads -= entry.admitted
            self._changed.notify_all()
        return key

    def count_refused(self) -> None:
        """Count a request that is answered 503 because of Limits."""
        with self._lock:
            self._refused += 1

    def count_unauthorized(self) -> None:
        """Count a request without a valid token."""
        with self._lock:
            self._unauthorized += 1

    def count_tls_failed(self) -> None:
        """Count a connection that ended in the TLS handshake."""
        with self._lock:
            self._tls_failed += 1

    # For the thread that stops the server.

    def begin_stop(self) -> bool:
        """Admit no more connections. Return False if the stop has begun before."""
        with self._lock:
            if self.stopping.is_set():
                return False
            self.stopping.set()
            self._changed.notify_all()
            return True

    def begin_close(self) -> bool:
        """End the waits of the acceptor. Return False if the close has begun before."""
        with self._lock:
            if self._closing:
                return False
            self._closing = True
            self._changed.notify_all()
            return True

    def wait_ended(self, timeout: float, late: bool = False) -> bool:
        """Wait until all connections have ended. Return False after `timeout` seconds.

        Connections that came after `begin_stop` do not count, unless `late` is true.
        """

        def ended() -> bool:
            return not any(late or not entry.late for entry in self._entries.values())

        with self._lock:
            return wait_until(self._changed, ended, deadline_after(timeout))

    def shut_down_sockets(self, how: int, websockets: bool) -> None:
        """Shut down the sockets of all connections. Leave out WebSockets unless `websockets` is true."""
        with self._lock:
            for entry in self._entries.values():
                if entry.websocket and not websockets:
                    continue
                shut_down(entry.sock, how)
