"""Addresses: a host and a port, or `unix:PATH`. How they are written, found, listened on and connected to.

No thread runs here. `Listeners` belongs to who makes it; only `is_own` is for other threads too, and reads what never
changes. Where several of our servers might take over a Unix socket's file at once, a lock on its directory makes
them take turns.
"""

import ipaddress
import logging
import os
import socket
from typing import Any, NamedTuple

log = logging.getLogger("ringoexp.http")

UNIX = "unix:"
"""What a host begins with that is the path of a Unix socket."""
UNIX_PEER = ("unix",)
"""In place of the address of a client on a Unix socket, which has none."""
_LOCALHOST = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))

Address = tuple[int, Any]
"""A family and what its sockets call an address."""


class AddressError(Exception):
    """An address cannot be had. The text says which, and why."""


class Endpoint(NamedTuple):
    """Where to connect to, and by which name its server goes, in its certificate and in requests."""

    host: str
    port: int
    name: str

    def __str__(self) -> str:
        return format_address(self.host, self.port)


def parse_hosts(text: str, port: int) -> list[tuple[str, int]]:
    """The hosts and ports of a list with commas; `port` where there is none. Raises ValueError, which says why.

    Each is `host`, `host:port`, an IPv6 address, that in brackets, `[address]:port`, or `unix:PATH`.
    """
    found = [_host_port(part.strip(), port) for part in text.split(",")]
    if len(set(found)) < len(found):
        raise ValueError("one of them is named twice")
    return found


def parse_host(text: str) -> str:
    """Return a host without the brackets of an IPv6 address. Raises ValueError for `unix:` without a path."""
    if text.startswith(UNIX) and not text.removeprefix(UNIX).strip():
        raise ValueError("unix:PATH, the path of a Unix socket")
    return text[1:-1] if text.startswith("[") and text.endswith("]") and ":" in text else text


def _host_port(text: str, port: int) -> tuple[str, int]:
    host, colon, number = text.rpartition(":")
    if text.startswith(UNIX):
        return parse_host(text), 0
    if text.startswith("[") and text.endswith("]"):
        host, colon = text, ""
    elif text.count(":") != 1 and not text.startswith("["):  # none, or an IPv6 address
        host, colon = text, ""
    if colon:
        if not (number.isascii() and number.isdigit() and len(number) < 6 and 0 < int(number) < 65536):
            raise ValueError(f"the port {number!r} of {text!r}: 1 to 65535")
        port = int(number)
    host = parse_host(host)
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


def resolve_endpoints(host: str, port: int) -> list[Endpoint]:
    """The servers behind a host: one for each address of a name with several. Raises AddressError.

    Of IPv4 and IPv6, that of which it has more: a name with one of each is one server that has both.
    """
    if is_fixed(host):
        return [Endpoint(host, port, host)]
    found = resolve(host, port)
    four = [address for address in found if address[0] == socket.AF_INET]
    six = [address for address in found if address[0] != socket.AF_INET]
    most = four if len(four) >= len(six) else six
    if len(most) == 1:
        return [Endpoint(host, port, host)]
    return [Endpoint(str(address[0]), port, host) for _, address in most]


def unix_path(host: str) -> str | None:
    """The path of a host that is a Unix socket."""
    return host.removeprefix(UNIX) if host.startswith(UNIX) else None


def format_address(host: str, port: int) -> str:
    """An address as it is written: `host:port`, `[host]:port` for IPv6, `unix:PATH`."""
    if host.startswith(UNIX):
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def host_header(host: str, port: int) -> str:
    """What a request to this address says in its `Host` header."""
    return "localhost" if host.startswith(UNIX) else format_address(host, port)


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


def is_same_listener(address: Address, listening: Address) -> bool:
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
