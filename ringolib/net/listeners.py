"""TODO: ringolib/net/listeners.py."""

import errno
import fcntl
import logging
import os
import socket
import stat
import sys
from collections.abc import Sequence
from time import monotonic, sleep
from typing import Any

from ringolib.net.addresses import Address, AddressError, format_address, is_loopback, is_same_listener

log = logging.getLogger("ringoexp.http")

SOCKET_MODE = 0o660
"""A Unix socket is for its owner and its group, whatever the umask: who may write it may connect."""
MAX_PATH = 107 if sys.platform == "linux" else 103
"""Bytes of a Unix socket's path (sockaddr_un)."""
BACKLOG = 1024
PORT_TRIES = 100
"""How often a free port is asked for that is free on every address."""
LOCK_TIMEOUT = 5.0
"""Seconds to wait for another server that looks at the same directory's sockets."""
_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


class Listeners:
    """Sockets that listen on all of `addresses`, on the same port; `name` is what they are together.

    An address that this machine does not have is left out if another one is left. Port 0 is a free port. The file
    of a Unix socket is taken over where nobody listens, and removed by `close`. Raises AddressError.
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
        """True when nobody from another machine can connect."""
        return self._path is not None or all(is_loopback(address[0]) for _, address in self.addresses)

    def is_own(self, address: Address) -> bool:
        """True when who connects to `address` is accepted here."""
        if self._path is None or address[0] != socket.AF_UNIX:
            return any(is_same_listener(address, own) for own in self.addresses)
        return _inode(address[1]) == self._file  # it may have several paths

    def close(self) -> None:
        """Listens no more. A Unix socket's file is removed, if it still is the one made here. Never raises."""
        if self._path is not None:
            try:
                with _Turn(self._path):  # before it is closed: nobody may take it over in between
                    if _inode(self._path) == self._file:
                        os.unlink(self._path)
            except (OSError, AddressError) as error:
                log.debug("socket_not_removed", {"path": self._path, "reason": str(error)})
        for sock in self.sockets:
            sock.close()

    def _listen_all(self, addresses: Sequence[Address]) -> list[socket.socket]:
        asked = addresses[0][1][1]
        for tried in range(1, PORT_TRIES + 1):
            try:
                return self._listen_on(addresses, asked)
            except OSError as error:
                if asked or error.errno != errno.EADDRINUSE or tried == PORT_TRIES:
                    raise AddressError(f"cannot listen on {self._name}: {error.strerror}") from error
        raise AssertionError("not reached")

    def _listen_on(self, addresses: Sequence[Address], port: int) -> list[socket.socket]:
        """Sockets that listen on this port; 0: that of the first. Raises OSError, whose text names the address."""
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
            more = "" if where == self._name else f" at {where}"
            raise OSError(error.errno, f"{error.strerror or error}{more}") from error
        return bound

    def _listen_unix(self, path: str) -> socket.socket:
        if len(os.fsencode(path)) > MAX_PATH:
            raise AddressError(
                f"cannot listen on {self._name}: the path has {len(os.fsencode(path))} bytes, a Unix socket's at most "
                f"{MAX_PATH}: name a shorter one"
            )
        sock = socket.socket(socket.AF_UNIX)
        try:
            with _Turn(path):
                self._make_room(path)
                sock.bind(path)
                self._file = _inode(path)
                os.chmod(path, SOCKET_MODE)  # nobody can connect before it listens
                sock.listen(BACKLOG)
        except (OSError, AddressError) as error:
            sock.close()
            if self._file and _inode(path) == self._file:
                os.unlink(path)
            reason = error.strerror if isinstance(error, OSError) else error
            raise AddressError(f"cannot listen on {self._name}: {reason}") from error
        return sock

    def _make_room(self, path: str) -> None:
        """Removes a Unix socket's file that nobody listens on any more. Raises AddressError when it is in use."""
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise AddressError("there is a file, and it is no socket: name another path, or remove it")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            try:
                probe.connect(path)
            except ConnectionRefusedError:  # its server was killed
                os.unlink(path)
                return
            except BlockingIOError:
                pass  # somebody listens, and is busy
            except OSError as error:
                if error.errno != errno.EPROTOTYPE:  # a socket of another kind
                    raise
        raise AddressError("it is in use, somebody listens there: name another path, or stop that one")


class _Turn:
    """Held by one of our servers at a time for a directory. Raises OSError, AddressError when it takes too long."""

    def __init__(self, path: str) -> None:
        self._directory = os.path.dirname(path) or "."

    def __enter__(self) -> None:
        deadline = monotonic() + LOCK_TIMEOUT
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
                    if monotonic() >= deadline:
                        raise AddressError(f"somebody keeps the directory {self._directory} locked") from None
                sleep(0.02)  # there is no wait for a lock with an end
        except BaseException:
            os.close(self._fd)
            raise

    def __exit__(self, *unused: object) -> None:
        os.close(self._fd)


def _bind(family: int, address: Any) -> socket.socket:
    """A socket with this address; `::` is IPv4's too. Raises OSError."""
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
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
