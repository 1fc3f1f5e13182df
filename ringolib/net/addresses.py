"""Addresses: a host and a port, or `unix:PATH`. How they are written, found, listened on and connected to.

No thread runs here. `Listeners` belongs to who makes it; only `is_own` is for other threads too, and reads what never
changes. Where several of our servers might take over a Unix socket's file at once, a lock on its directory makes
them take turns.
"""

import errno
import fcntl
import ipaddress
import logging
import os
import socket
import stat
import sys
from collections.abc import Sequence
from time import monotonic, sleep
from typing import Any, NamedTuple

log = logging.getLogger("ringoexp.http")

UNIX = "unix:"
"""What a host begins with that is the path of a Unix socket."""
UNIX_PEER = ("unix",)
"""In place of the address of a client on a Unix socket, which has none."""
SOCKET_MODE = 0o660
"""A Unix socket is for its owner and its group, whatever the umask: who may write it may connect."""
MOST_PATH = 107 if sys.platform == "linux" else 103
"""Bytes of a Unix socket's path (sockaddr_un)."""
BACKLOG = 1024
PORT_TRIES = 100
"""How often a free port is asked for that is free on every address."""
LOCK_TIMEOUT = 5.0
"""Seconds to wait for another server that looks at the same directory's sockets."""
_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
_LOCALHOST = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))

Address = tuple[int, Any]
"""A family and what its sockets call an address."""


class AddressError(Exception):
    """An address cannot be had. The text says which, and why."""


class Place(NamedTuple):
    """Where to connect to, and by which name its server goes, in its certificate and in requests."""

    host: str
    port: int
    name: str

    def __str__(self) -> str:
        return shown(self.host, self.port)


def listed(text: str, port: int) -> list[tuple[str, int]]:
    """The hosts and ports of a list with commas; `port` where there is none. Raises ValueError, which says why.

    Each is `host`, `host:port`, an IPv6 address, that in brackets, `[address]:port`, or `unix:PATH`.
    """
    found = [_host_port(part.strip(), port) for part in text.split(",")]
    if len(set(found)) < len(found):
        raise ValueError("one of them is named twice")
    return found


def _host_port(text: str, port: int) -> tuple[str, int]:
    host, colon, number = text.rpartition(":")
    if text.startswith(UNIX):
        if not text.removeprefix(UNIX).strip():
            raise ValueError("unix:PATH, the path of a Unix socket")
        return text, 0
    if text.startswith("[") and text.endswith("]"):
        host, colon = text, ""
    elif text.count(":") != 1 and not text.startswith("["):  # none, or an IPv6 address
        host, colon = text, ""
    if colon:
        if not (number.isascii() and number.isdigit() and len(number) < 6 and 0 < int(number) < 65536):
            raise ValueError(f"the port {number!r} of {text!r}: 1 to 65535")
        port = int(number)
    if host.startswith("[") and host.endswith("]") and ":" in host:
        host = host[1:-1]
    if not host.strip() or "[" in host or "]" in host:
        raise ValueError(f"{text!r}: HOST, HOST:PORT, [IPv6]:PORT or unix:PATH")
    return host, port


def is_fixed(host: str) -> bool:
    """True for what no name service has a say in: an address, a Unix socket, `localhost`."""
    if host.lower() == "localhost" or host.startswith(UNIX):
        return True
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def places(host: str, port: int) -> list[Place]:
    """The servers behind a host: one for each address of a name with several. Raises AddressError.

    Of IPv4 and IPv6, that of which it has more: a name with one of each is one server that has both.
    """
    if is_fixed(host):
        return [Place(host, port, host)]
    found = resolve(host, port)
    four = [address for address in found if address[0] == socket.AF_INET]
    six = [address for address in found if address[0] != socket.AF_INET]
    most = four if len(four) >= len(six) else six
    if len(most) == 1:
        return [Place(host, port, host)]
    return [Place(str(address[0]), port, host) for _, address in most]


def unix_path(host: str) -> str | None:
    """The path of a host that is a Unix socket."""
    return host.removeprefix(UNIX) if host.startswith(UNIX) else None


def shown(host: str, port: int) -> str:
    """An address as it is written: `host:port`, `[host]:port` for IPv6, `unix:PATH`."""
    if host.startswith(UNIX):
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def host_header(host: str, port: int) -> str:
    """What a request to this address says in its `Host` header."""
    return "localhost" if host.startswith(UNIX) else shown(host, port)


def certified_name(host: str) -> str:
    """The name that this host's certificate has to have: without a last dot (RFC 6066 section 3), nor a zone, which
    only this machine knows.
    """
    return "localhost" if host.startswith(UNIX) else host.partition("%")[0].removesuffix(".")


def is_loopback(host: str) -> bool:
    """True for what only this machine can reach."""
    if host == "localhost" or host.startswith(UNIX):
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def resolve(host: str, port: int) -> list[Address]:
    """The addresses of a host, IPv4 first; `localhost` has both of its own (RFC 6761 section 6.3).

    Raises AddressError when there is none.
    """
    if path := unix_path(host):
        return [(socket.AF_UNIX, path)]
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        if host.lower() == "localhost":  # a hosts file may know only one of them, a browser knows both
            for family, each in _LOCALHOST:
                found += socket.getaddrinfo(each, port, family, socket.SOCK_STREAM, 0, socket.AI_NUMERICHOST)
    except (OSError, UnicodeError) as error:
        raise AddressError(f"the host's name cannot be resolved ({error})") from error
    addresses: list[Address] = [(info[0], info[4]) for info in found if info[0] in (socket.AF_INET, socket.AF_INET6)]
    if not addresses:
        raise AddressError("the host has no IP address")
    return sorted(dict.fromkeys(addresses), key=lambda address: address[0] != socket.AF_INET)


def reaches(address: Address, listening: Address) -> bool:
    """True when who connects to `address` is accepted by a socket that listens on `listening`."""
    family, theirs = address
    if socket.AF_UNIX in (family, listening[0]):
        return family == listening[0] and os.path.realpath(theirs) == os.path.realpath(listening[1])
    if theirs[1] != listening[1][1]:
        return False
    host, ours = _plain(theirs[0]), listening[1][0]
    if ours == "::" or (ours == "0.0.0.0" and ":" not in host):
        return _is_local(family, theirs)
    return host == _plain(ours)


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
            return any(reaches(address, own) for own in self.addresses)
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
                where = shown(address[0], port)
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
                where = shown(*sock.getsockname()[:2])
                sock.listen(BACKLOG)
        except OSError as error:
            for sock in bound:
                sock.close()
            more = "" if where == self._name else f" at {where}"
            raise OSError(error.errno, f"{error.strerror or error}{more}") from error
        return bound

    def _listen_unix(self, path: str) -> socket.socket:
        if len(os.fsencode(path)) > MOST_PATH:
            raise AddressError(
                f"cannot listen on {self._name}: the path has {len(os.fsencode(path))} bytes, a Unix socket's at most "
                f"{MOST_PATH}: name a shorter one"
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


def _plain(host: str) -> str:
    """An IPv4 address within an IPv6 one, as itself (RFC 4291 section 2.5.5.2)."""
    inner = host.removeprefix("::ffff:")
    return inner if "." in inner else host


def _is_local(family: int, address: Any) -> bool:
    """True when it is an address of this machine: only then can a socket be bound to it."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address[0], 0, *address[2:]))
        except OSError:
            return False
        return True
