"""Addresses: a host and a port, or `unix:PATH`; how they are parsed, formatted, resolved and compared.

Pure functions, no state. Only `resolve` and its callers ask the name service, and may block for it.
"""

import ipaddress
import os
import socket
from typing import Any, NamedTuple
from urllib.parse import unquote

UNIX_PREFIX = "unix:"
"""The start of a host that is the path of a Unix socket."""
UNIX_PEER = ("unix",)
"""The address of a client on a Unix socket, which has no address of its own."""
_LOCALHOST = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))

Address = tuple[int, Any]
"""A socket family, and an address in the form that the family's sockets use."""


class AddressError(Exception):
    """An address cannot be used. The text names the address and the reason."""


class Endpoint(NamedTuple):
    """An address to connect to, and the name of its server in certificates and requests."""

    host: str
    port: int
    name: str

    def __str__(self) -> str:
        return format_address(self.host, self.port)


def parse_host(text: str) -> str:
    """Return a single host, without the brackets that may surround an IPv6 address.

    Raises ValueError, with a text for the user, for a Unix socket without a path.
    """
    if text.startswith(UNIX_PREFIX) and not text.removeprefix(UNIX_PREFIX).strip():
        raise ValueError("expected unix:PATH, with the path of a Unix socket")
    return text[1:-1] if text.startswith("[") and text.endswith("]") and ":" in text else text


def parse_hosts(text: str, port: int) -> list[tuple[str, int]]:
    """Return the hosts and ports of a list with commas. `port` is for hosts that have no port.

    A host is `host`, `host:port`, an IPv6 address, `[address]`, `[address]:port` or `unix:PATH`; the port of a Unix
    socket is 0. Raises ValueError with a text for the user.
    """
    hosts = [_parse_host_port(part.strip(), port) for part in text.split(",")]
    if len(set(hosts)) < len(hosts):
        raise ValueError("a host is named twice")
    return hosts


def _parse_host_port(text: str, port: int) -> tuple[str, int]:
    if text.startswith(UNIX_PREFIX):
        return parse_host(text), 0
    host, colon, number = text.rpartition(":")
    bracketed = text.startswith("[")
    if (bracketed and text.endswith("]")) or (not bracketed and text.count(":") != 1):  # no port, or an IPv6 address
        host, colon = text, ""
    if colon:
        if not (number.isascii() and number.isdigit() and len(number) < 6 and 0 < int(number) < 65536):
            raise ValueError(f"the port {number!r} of {text!r} is not a number from 1 to 65535")
        port = int(number)
    host = parse_host(host)
    if not host.strip() or "[" in host or "]" in host:
        raise ValueError(f"{text!r} is not HOST, HOST:PORT, [IPv6]:PORT or unix:PATH")
    return host, port


def is_fixed(host: str) -> bool:
    """True if no name service can change the addresses of the host: an IP address, a Unix socket, `localhost`."""
    if host.lower() == "localhost" or host.startswith(UNIX_PREFIX):
        return True
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def resolve_endpoints(host: str, port: int) -> list[Endpoint]:
    """Return the servers behind a host: one for each address, if its name has several. Raises AddressError.

    Only the family with more addresses counts, IPv4 or IPv6: a name with one of each is one server with both.
    """
    if is_fixed(host):
        return [Endpoint(host, port, host)]
    addresses = resolve(host, port)
    ipv4 = [address for address in addresses if address[0] == socket.AF_INET]
    ipv6 = [address for address in addresses if address[0] != socket.AF_INET]
    servers = ipv4 if len(ipv4) >= len(ipv6) else ipv6
    if len(servers) == 1:
        return [Endpoint(host, port, host)]
    return [Endpoint(str(address[0]), port, host) for _, address in servers]


def unix_path(host: str) -> str | None:
    """Return the path of a Unix socket; None for any other host."""
    return host.removeprefix(UNIX_PREFIX) if host.startswith(UNIX_PREFIX) else None


def format_address(host: str, port: int) -> str:
    """Format an address for people: `host:port`, `[host]:port` for IPv6, `unix:PATH`."""
    if host.startswith(UNIX_PREFIX):
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def format_url(host: str, port: int, tls: bool) -> str:
    """Return the URL of a server that listens on this address, for people; `unix:PATH` for a Unix socket.

    A server on all addresses of the machine is on localhost, too. A `%` in an IPv6 zone becomes `%25` (RFC 6874).
    """
    if path := unix_path(host):
        return UNIX_PREFIX + os.path.abspath(path)
    name = "localhost" if host in ("0.0.0.0", "::") else host.replace("%", "%25")
    return f"{'https' if tls else 'http'}://{format_address(name, port)}/"


def decode_zone(host: str) -> str:
    """Return the host of a URL with its IPv6 zone as the system writes it: URLs have `%25` for `%` (RFC 6874).

    A `%` alone is accepted, too. Any other host is returned as it is.
    """
    address, _, zone = host.partition("%")
    return f"{address}%{unquote(zone[2:])}" if ":" in host and zone.startswith("25") and zone != "25" else host


def host_header(host: str, port: int) -> str:
    """Return the `Host` header of a request to this address.

    It has no IPv6 zone, which is known on this machine only (RFC 6874 section 4). Raises ValueError if no host can
    have this name.
    """
    if host.startswith(UNIX_PREFIX):
        return "localhost"
    name = host.partition("%")[0] if ":" in host else host.encode("idna").decode()
    return format_address(name, port)


def certified_name(host: str) -> str:
    """Return the name that this host's certificate must have.

    The name has no trailing dot (RFC 6066 section 3) and no IPv6 zone, which is known on this machine only.
    """
    return "localhost" if host.startswith(UNIX_PREFIX) else host.partition("%")[0].removesuffix(".")


def is_loopback(host: str) -> bool:
    """True if only this machine can reach the host."""
    if host == "localhost" or host.startswith(UNIX_PREFIX):
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def resolve(host: str, port: int) -> list[Address]:
    """Return the addresses of a host, IPv4 first. `localhost` has an IPv4 and an IPv6 address (RFC 6761 section 6.3).

    Raises AddressError if the name cannot be resolved or has no IP address.
    """
    if path := unix_path(host):
        return [(socket.AF_UNIX, path)]
    try:
        entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        if host.lower() == "localhost":  # a hosts file may list only one of the two; browsers try both
            for family, address in _LOCALHOST:
                entries += socket.getaddrinfo(address, port, family, socket.SOCK_STREAM, 0, socket.AI_NUMERICHOST)
    except (OSError, UnicodeError) as error:
        raise AddressError(f"the host's name cannot be resolved ({error})") from error
    addresses: list[Address] = [
        (entry[0], entry[4]) for entry in entries if entry[0] in (socket.AF_INET, socket.AF_INET6)
    ]
    if not addresses:
        raise AddressError("the host has no IP address")
    return sorted(dict.fromkeys(addresses), key=lambda address: address[0] != socket.AF_INET)


def is_same_listener(address: Address, listening: Address) -> bool:
    """True if a socket that listens on `listening` accepts connections to `address`."""
    family, target = address
    if socket.AF_UNIX in (family, listening[0]):
        return family == listening[0] and os.path.realpath(target) == os.path.realpath(listening[1])
    if target[1] != listening[1][1]:
        return False
    host, own_host = _unmapped(target[0]), listening[1][0]
    if own_host == "::" or (own_host == "0.0.0.0" and ":" not in host):
        return _is_local(family, target)
    return host == _unmapped(own_host)


def _unmapped(host: str) -> str:
    """Return the IPv4 address in an IPv4-mapped IPv6 address (RFC 4291 section 2.5.5.2), else `host`."""
    inner = host.removeprefix("::ffff:")
    return inner if "." in inner else host


def _is_local(family: int, address: Any) -> bool:
    """True if this machine has the address: only then can a socket be bound to it."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address[0], 0, *address[2:]))
        except OSError:
            return False
        return True
