"""TODO: ringolib/net/sockets.py."""

import socket
from time import monotonic

from ringolib.net.addresses import Address, unix_path

CLOSE_TIMEOUT = 2.0
"""Seconds to wait for the peer to read the last bytes before the socket is closed."""
READ_SIZE = 256 * 1024


def linger(sock: socket.socket) -> None:
    """Ends our side and reads what still comes, for at most CLOSE_TIMEOUT, so that the peer gets our last words.

    Closing a socket with unread bytes sends a reset, which can overtake them (RFC 9112 section 9.6).
    """
    deadline = monotonic() + CLOSE_TIMEOUT
    try:
        sock.shutdown(socket.SHUT_WR)
        while (left := deadline - monotonic()) > 0:
            sock.settimeout(left)
            if not sock.recv(READ_SIZE):
                return
    except OSError:
        pass  # gone


def peer(sock: socket.socket, host: str) -> Address:
    """What a socket is connected to that was connected to `host`. Raises OSError when it is connected no more."""
    return sock.family, unix_path(host) or sock.getpeername()


def connect(host: str, port: int, timeout: float) -> socket.socket:
    """A socket connected to this address; what it sends leaves at once. It keeps the timeout. Raises OSError."""
    path = unix_path(host)
    if path is None:
        sock = socket.create_connection((host, port), timeout)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(timeout)
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return sock
