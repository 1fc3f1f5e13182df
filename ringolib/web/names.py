"""The names of a server: which hosts it answers to, and which web pages may use it.

A page of any website can resolve its own name to this machine (DNS rebinding). Then its `Host` and its `Origin` agree,
and the browser takes this server for the page's own. So the server answers only to names that it knows. `Names` does
not change after its construction, so any thread may use it.
"""

import functools
import ipaddress
import re
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from ringolib.web.headers import MAX_SHOWN, Headers, Refusal
from ringolib.web.request import Authority, Request, parse_authority

_ORIGIN = re.compile(r"null|[A-Za-z][A-Za-z0-9+.-]*://[A-Za-z0-9._~%:\[\]-]*")
"""The origins that an error suggests as a flag: a shell passes them on as they are."""
_NAME = re.compile("[A-Za-z0-9_.-]+")
"""The same for hosts."""
_DEFAULT_PORTS = {"http": 80, "https": 443}


class Names:
    """The hosts that a server answers to, beside IP addresses, and the origins of pages that may use it.

    `any_host` is for a server on Unix sockets, which no web page can reach.
    """

    def __init__(self, hosts: Sequence[str] = (), origins: Sequence[str] = (), any_host: bool = False) -> None:
        self._hosts = {"localhost", *(_plain_name(host) for host in hosts)}
        self._origins = {normalize_origin(origin) for origin in origins}
        self._any_host = any_host

    def check_host(self, host: Authority | None) -> None:
        """Raise Refusal unless the server answers to this host. HTTP/1.0 may name none; browsers do not send it."""
        if host is None or host.host in self._hosts or self._any_host:
            return
        name = _plain_name(host.host)
        if name in self._hosts or _is_address(name) or name in own_names():
            return
        raise Refusal(421, _explain_host(host.host))

    def check_origin(self, request: Request) -> None:
        """Raise Refusal if the web page of another site sends the request (RFC 6455 section 10.2).

        Browsers add the Origin header. Requests without it do not come from a web page.
        """
        origin = origin_of(request.headers)
        if origin is None or self.admits(origin) or _is_own_origin(origin, request.host):
            return
        raise Refusal(403, _explain_origin(origin, request.host))

    def admits(self, origin: str) -> bool:
        """True if --allow_origin names this origin."""
        return bool(self._origins) and normalize_origin(origin) in self._origins

    @property
    def admits_others(self) -> bool:
        """True if --allow_origin names any origin: then responses depend on the Origin header."""
        return bool(self._origins)


def origin_of(headers: Headers) -> str | None:
    """Return the Origin header, or None. Raises Refusal if there are two."""
    origins = headers.get_all("origin")
    if len(origins) > 1:
        raise Refusal(400, "a request may have only one Origin header: omit the others")
    return origins[0] if origins else None


def normalize_origin(origin: str) -> str:
    """Return an origin in the form that is compared: in lower case, without the default port of its scheme."""
    origin = origin.strip().lower()
    try:
        url = urlsplit(origin)
        default = _DEFAULT_PORTS.get(url.scheme)
        if default and url.port == default:
            return origin.removesuffix(f":{default}")
    except ValueError:
        pass  # compared as it is
    return origin


@functools.cache
def own_names() -> frozenset[str]:
    """Return the names of this machine. The first call may ask the name service."""
    name = socket.gethostname()
    short = name.partition(".")[0]
    return frozenset(_plain_name(own) for own in (name, short, f"{short}.local", socket.getfqdn(name)))


def _plain_name(host: str) -> str:
    """Return a host's name in lower case, without the dot that may end it."""
    return host.lower().removesuffix(".")


def _explain_host(host: str) -> str:
    """Return the error for a host that the server does not answer to."""
    if not host:
        return "the Host header is empty: send the server's IP address, localhost, or a name given with --allow_host"
    flag = f"--allow_host {host}" if _NAME.fullmatch(host) and len(host) <= MAX_SHOWN else "--allow_host"
    remedy = f"connect to an IP address or localhost, or start the server with {flag}"
    return f"unknown host name {host[:MAX_SHOWN]!r}: {remedy}"


def _explain_origin(origin: str, host: Authority | None) -> str:
    """Return the error for an Origin that is not admitted. A part of a malformed one may be a password or a token."""
    shown = "Origin" if any(c in origin for c in "@?#") else f"Origin {origin[:MAX_SHOWN]!r}"
    advice = "a client that is not a web page should send no Origin"
    if not _ORIGIN.fullmatch(origin) or len(origin) > MAX_SHOWN:
        return f"malformed {shown}: expected SCHEME://HOST[:PORT] without a path or a final slash; {advice}"
    ours = f"does not match Host {_format_authority(host)!r}" if host else "cannot match: there is no Host header"
    return f"{shown} {ours}: start the server with --allow_origin {origin}; {advice}"


def _format_authority(authority: Authority) -> str:
    """Return HOST or HOST:PORT, as in a Host header."""
    host = f"[{authority.host}]" if ":" in authority.host else authority.host
    return (host if authority.port is None else f"{host}:{authority.port}")[:MAX_SHOWN]


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)  # an IPv6 address may have a zone; an IPv4 address with "%" is a name
    except ValueError:
        return False
    return True


def _is_own_origin(origin: str, host: Authority | None) -> bool:
    """True if the Origin header names the same host and port as the request."""
    scheme, separator, rest = origin.partition("://")
    theirs = parse_authority(rest)
    default = _DEFAULT_PORTS.get(scheme.lower())
    if not separator or not default or host is None or theirs is None or not theirs.host:
        return False
    return (theirs.host, theirs.port or default) == (host.host, host.port or default)
