"""Small helpers for connected sockets: connect, read and write with timeouts, shut down, linger before a close.

A socket belongs to one thread at a time; the socket of a WebSocket client belongs to the ingest loop. Only `shut_down`
may be called from other threads.
"""

import socket
import struct
from collections.abc import Callable
from typing import Any

from ringolib.net.addresses import Address, unix_path
from ringolib.timing import deadline_after, remaining

CLOSE_TIMEOUT = 2.0
"""Seconds to wait for the peer to read the last bytes before the socket is closed."""
HAS_KNOWN_TIMEVAL = struct.calcsize("@l") == 8
"""True if `struct timeval` has two fields of 8 bytes. On 32-bit systems their size depends on the C library."""
READ_SIZE = 256 * 1024
"""Bytes that one read takes at most."""


def reason_of(error: Exception) -> str:
    """Return the text of an error without its number, or its type if it has no text."""
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def connect(host: str, port: int, deadline: float) -> socket.socket:
    """Return a socket connected to this address, without Nagle's delay.

    If a name has several addresses, they are tried in turn. Each has an equal share of the time left, so one that does
    not answer leaves time for the next. Raises OSError, and TimeoutError after `deadline`. Only the name service may
    take longer: its time limits are the system's.
    """
    path = unix_path(host)
    if path is not None:
        return _connect_address(socket.AF_UNIX, path, time_left(deadline))
    entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for index, (family, _, _, _, address) in enumerate(entries):
        try:
            sock = _connect_address(family, address, time_left(deadline) / (len(entries) - index))
        except OSError:
            if index == len(entries) - 1:
                raise
        else:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
    raise OSError("the host has no address")


def _connect_address(family: int, address: Any, timeout: float) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def time_left(deadline: float) -> float:
    """Return the seconds left until `deadline`, for the timeout of a socket. Raises TimeoutError after it."""
    seconds = remaining(deadline)
    if not seconds:
        raise TimeoutError("timed out")
    return seconds


def peer_address(sock: socket.socket, host: str) -> Address:
    """Return the address that a socket connected to `host` has reached. Raises OSError if the connection is lost."""
    return sock.family, unix_path(host) or sock.getpeername()


class Stream:
    """Reads and writes of the thread that owns a connected socket, each with a timeout in seconds.

    A read uses the system's timeout (SO_RCVTIMEO). Python's would take a second system call for each read, and each
    call gives Python's lock away, which costs more than the call if many threads are busy.

    Once `ending` returns true, a write fails if the peer reads nothing for CLOSE_TIMEOUT.
    """

    def __init__(self, sock: Any, ending: Callable[[], bool] = lambda: False) -> None:
        self._sock = sock
        self._ending = ending
        self._timeout = 0.0  # of reads; 0: to be set
        sock.settimeout(None)

    def read(self, size: int, timeout: float) -> bytes:
        """Return 1 to `size` bytes, or b"" at the end of the stream. Raises TimeoutError, or another OSError."""
        if timeout != self._timeout:
            self._set_timeout(timeout)
        try:
            data: bytes = self._sock.recv(size)
        except BlockingIOError:
            raise TimeoutError("too slow") from None
        return data

    def write(self, data: bytes, timeout: float) -> None:
        """Send all of `data`. Raises TimeoutError if that takes longer than `timeout`, or another OSError."""
        try:
            sent = self._sock.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            self._timeout = 0.0
            deadline = deadline_after(timeout)
            with memoryview(data) as view:
                while sent < len(view):
                    sent += self._send(view[sent:], deadline)

    def _send(self, data: memoryview, deadline: float) -> int:
        """Send a part of `data`, and return how many bytes it has; 0 after CLOSE_TIMEOUT. Raises as `write` does."""
        self._sock.settimeout(max(0.001, min(remaining(deadline), CLOSE_TIMEOUT)))
        try:
            return int(self._sock.send(data))
        except TimeoutError:
            if self._ending() or not remaining(deadline):
                raise
            return 0
        finally:
            self._sock.settimeout(None)

    def _set_timeout(self, timeout: float) -> None:
        if timeout <= 0:
            raise TimeoutError("too slow")
        if HAS_KNOWN_TIMEVAL and isinstance(self._sock, socket.socket):
            seconds, microseconds = divmod(max(1, int(timeout * 1_000_000)), 1_000_000)
            value = struct.pack("@ll", seconds, microseconds)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        else:
            self._sock.settimeout(timeout)  # a TLSSocket polls in any case
        self._timeout = timeout


def shut_down(sock: Any, how: int = socket.SHUT_RDWR) -> None:
    """Shut down a socket, so that its owner's reads or writes end at once. Never raises, never waits.

    Any thread may call it. The descriptor stays open: only the owner closes it.
    """
    try:
        sock.shutdown(how)
    except OSError:
        pass  # the connection is lost, or closed


def linger(sock: socket.socket) -> None:
    """End our side and read until the peer closes, for at most CLOSE_TIMEOUT. The caller closes the socket then.

    A close with unread bytes sends a reset, which can overtake our last bytes (RFC 9112 section 9.6).
    """
    deadline = deadline_after(CLOSE_TIMEOUT)
    try:
        sock.shutdown(socket.SHUT_WR)
        while seconds := remaining(deadline):
            sock.settimeout(seconds)
            if not sock.recv(READ_SIZE):
                return
    except OSError:
        pass  # the peer is gone
