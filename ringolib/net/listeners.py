"""Listening sockets: every address of a name on one port, or a Unix socket with its file.

A `Listeners` belongs to the thread that made it. Only `is_own` is for other threads, too: it reads attributes that
never change. Several servers may want to take over the file of a Unix socket at the same time: a lock on its directory,
which one server holds at a time, keeps them apart.
"""

import errno
import fcntl
import logging
import os
import socket
import stat
import sys
from collections.abc import Sequence
from time import sleep
from typing import Any

from ringolib.net.addresses import Address, AddressError, format_address, is_loopback, is_same_listener
from ringolib.timing import deadline_after, remaining

log = logging.getLogger("ringoexp.http")

SOCKET_MODE = 0o660
"""Owner and group may connect to a Unix socket, whatever the umask: connecting needs write permission."""
MAX_PATH = 107 if sys.platform == "linux" else 103
"""Bytes in the path of a Unix socket, at most (sockaddr_un)."""
BACKLOG = 1024
PORT_TRIES = 100
"""How often to ask for a free port, until one is free on every address."""
LOCK_TIMEOUT = 5.0
"""Seconds to wait for the lock on the directory of a Unix socket."""
LOCK_RETRY_SECONDS = 0.02
_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


class Listeners:
    """Sockets that listen on all of `addresses`, on the same port. Errors call them `name`.

    An address that this machine does not have is left out, if another one is left. Port 0 is any free port. The file
    of a Unix socket is taken over if no process listens on it, and `close` removes it. Raises AddressError.
    """

    def __init__(self, name: str, addresses: Sequence[Address]) -> None:
        self._name = name
        self._path: str | None = None
        self._file: tuple[int, int] | None = None  # device and inode of the Unix socket
        if addresses[0][0] == socket.AF_UNIX:
            self._path = str(addresses[0][1])
            self.sockets = [self._listen_unix(self._path)]
            self.addresses = list(addresses)
            self.port = 0
        else:
            self.sockets = self._listen_all(addresses)
            self.addresses = [(sock.family, sock.getsockname()) for sock in self.sockets]
            self.port = int(self.addresses[0][1][1])
        for sock in self.sockets:
            sock.setblocking(False)  # a client may be gone between poll and accept

    @property
    def loopback(self) -> bool:
        """True if only this machine can connect."""
        return self._path is not None or all(is_loopback(address[0]) for _, address in self.addresses)

    def is_own(self, address: Address) -> bool:
        """True if connections to `address` are accepted here."""
        if self._path is None or address[0] != socket.AF_UNIX:
            return any(is_same_listener(address, own) for own in self.addresses)
        return _inode(address[1]) == self._file  # one file may have several paths

    def close(self) -> None:
        """Close the sockets, and remove the file of a Unix socket if it is still our own. Never raises."""
        if self._path is not None:
            try:
                with _DirectoryLock(self._path):  # the file goes first: no other server may take it over in between
                    if _inode(self._path) == self._file:
                        os.unlink(self._path)
            except (OSError, AddressError) as error:
                log.debug("socket_not_removed", {"path": self._path, "reason": str(error)})
        for sock in self.sockets:
            sock.close()

    def _listen_all(self, addresses: Sequence[Address]) -> list[socket.socket]:
        port = addresses[0][1][1]
        for attempt in range(1, PORT_TRIES + 1):
            try:
                return self._listen_on(addresses, port)
            except OSError as error:
                if port or error.errno != errno.EADDRINUSE or attempt == PORT_TRIES:
                    raise AddressError(f"cannot listen on {self._name}: {error.strerror}") from error
        raise AssertionError("not reached")

    def _listen_on(self, addresses: Sequence[Address], port: int) -> list[socket.socket]:
        """Return sockets that listen on `port`, or all on the free port of the first one if it is 0.

        Raises OSError with the address in its text.
        """
        bound: list[socket.socket] = []
        absent: OSError | None = None
        where = self._name
        try:
            for family, address in addresses:
                where = format_address(address[0], port)
                try:
                    bound.append(_bind(family, (address[0], port, *address[2:])))
                except OSError as error:
                    if error.errno not in _ABSENT:
                        raise
                    log.debug("address_absent", {"address": where, "reason": error.strerror})
                    absent = error
                else:
                    port = int(bound[-1].getsockname()[1])
            if absent and not bound:
                raise absent
            for sock in bound:
                where = format_address(*sock.getsockname()[:2])
                sock.listen(BACKLOG)
        except OSError as error:
            for sock in bound:
                sock.close()
            suffix = "" if where == self._name else f" at {where}"
            raise OSError(error.errno, f"{error.strerror or error}{suffix}") from error
        return bound

    def _listen_unix(self, path: str) -> socket.socket:
        size = len(os.fsencode(path))
        if size > MAX_PATH:
            raise AddressError(
                f"cannot listen on {self._name}: the path has {size} bytes; the path of a Unix socket has at most "
                f"{MAX_PATH}"
            )
        sock = socket.socket(socket.AF_UNIX)
        try:
            with _DirectoryLock(path):
                _remove_stale(path)
                sock.bind(path)
                self._file = _inode(path)
                os.chmod(path, SOCKET_MODE)  # clients cannot connect before `listen`
                sock.listen(BACKLOG)
        except (OSError, AddressError) as error:
            sock.close()
            if self._file and _inode(path) == self._file:
                os.unlink(path)
            reason = error.strerror if isinstance(error, OSError) else error
            raise AddressError(f"cannot listen on {self._name}: {reason}") from error
        return sock


class _DirectoryLock:
    """Holds the directory of a Unix socket, as one process at a time.

    Raises OSError, and AddressError after LOCK_TIMEOUT.
    """

    def __init__(self, path: str) -> None:
        self._directory = os.path.dirname(path) or "."

    def __enter__(self) -> None:
        deadline = deadline_after(LOCK_TIMEOUT)
        try:
            self._fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise AddressError(f"the directory {self._directory}: {error.strerror}") from error
        try:
            while True:
                try:
                    fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                except BlockingIOError:
                    if not remaining(deadline):
                        raise AddressError(f"another process keeps the directory {self._directory} locked") from None
                sleep(LOCK_RETRY_SECONDS)  # flock has no timeout
        except BaseException:
            os.close(self._fd)
            raise

    def __exit__(self, *unused: object) -> None:
        os.close(self._fd)


def _remove_stale(path: str) -> None:
    """Remove the file of a Unix socket if no process listens on it. Raises AddressError if the path is in use."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise AddressError("the file exists and is not a socket: choose another path, or remove it")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:  # its server was killed
            os.unlink(path)
            return
        except BlockingIOError:
            pass  # a process listens, and its backlog is full
        except OSError as error:
            if error.errno != errno.EPROTOTYPE:  # a socket of another type is in use, too
                raise
    raise AddressError("the socket is in use by another process: choose another path, or stop that process")


def _bind(family: int, address: Any) -> socket.socket:
    """Return a socket bound to this address. A socket on `::` accepts IPv4, too. Raises OSError."""
    sock = socket.socket(family)
    try:
        if address[0] == "::":
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except BaseException:
        sock.close()
        raise
    return sock


def _inode(path: str) -> tuple[int, int] | None:
    """Return device and inode of a file; None if there is no such file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
