"""Small helpers for connected sockets: connect, shut down, linger before a close.

A socket belongs to one thread at a time; that of a WebSocket client belongs to the ingest loop. Only `shut_down` may be
called from other threads.
"""

import socket
from typing import Any

from ringolib.net.addresses import Address, unix_path
from ringolib.timing import deadline_after, remaining

CLOSE_TIMEOUT = 2.0
"""Seconds to wait for the peer to read the last bytes before the socket is closed."""
READ_SIZE = 256 * 1024
"""Bytes that one read takes at most."""


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
