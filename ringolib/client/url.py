"""URLs of servers: `ws:`, `wss:`, `http:`, `https:` and `ws+unix:`, and their parts. This module does no I/O."""

from typing import NamedTuple
from urllib.parse import SplitResult, urlsplit

from ringolib.net.addresses import decode_zone
from ringolib.wire import INGEST_PATH

URL = f"ws://localhost:6660{INGEST_PATH}"
URL_FORMS = f"ws://HOST:PORT or http://HOST:PORT, wss:// or https:// for TLS, or ws+unix:PATH:{INGEST_PATH}"
"""What `parse_url` accepts. http:// and https:// mean the same as ws:// and wss://: a server prints its address so."""


class Target(NamedTuple):
    """The parts of a URL. For a Unix socket, the host is `unix:PATH`."""

    host: str
    port: int
    path: str
    secure: bool


def parse_url(url: str) -> Target:
    """Return the parts of a URL in one of the URL_FORMS; the path may be left out.

    Raises ValueError for other URLs. Its text does not show a URL with a name or a password.
    """
    target: Target | None = None
    try:
        parts = urlsplit(url)
        is_unix = parts.scheme == "ws+unix"
        has_credentials = not is_unix and "@" in parts.netloc
        target = _unix_target(url) if is_unix else _network_target(parts)
    except ValueError:
        if "@" in url:
            raise ValueError("the URL is malformed; it is not shown, because it may contain a password") from None
        has_credentials = False
    if has_credentials:
        raise ValueError("a URL with a name or a password in it is not accepted: a token is given separately")
    if target is None or not all("!" <= c <= "~" for c in target.path):
        raise ValueError(f"{url!r} is not accepted: use {URL_FORMS}")
    return target._replace(path=INGEST_PATH) if target.path in ("", "/") else target


def _network_target(parts: SplitResult) -> Target | None:
    """Return the parts of a URL of one host, None for another scheme. Raises ValueError for a wrong host or port."""
    secure = parts.scheme in ("wss", "https")
    host = decode_zone(parts.hostname or "")
    host.encode("idna")  # raises UnicodeError, a ValueError
    port = (443 if secure else 80) if parts.port is None else parts.port
    if parts.scheme not in ("ws", "wss", "http", "https") or not host or not port or parts.query or parts.fragment:
        return None
    return Target(host, port, parts.path, secure)


def _unix_target(url: str) -> Target | None:
    """Return the parts of a `ws+unix:SOCKET:/PATH` URL, the form of Node's ws; None if the socket is missing."""
    file, _, path = url.partition(":")[2].removeprefix("//").partition(":")
    if not file or "\0" in file or (path and not path.startswith("/")):
        return None
    return Target(f"unix:{file}", 80, path, secure=False)
