"""The two WebSocket handshakes (RFC 6455, section 4), on a connected socket. After them, `protocol` has the frames.

`simple_websocket` performs the server's. Only the library's handshake is used, not its reader thread, its unbounded
message list, its `send` or its compression. The client's is an HTTP request (`http_client`) with a few checks.

Functions for one thread. The server's end waits as long as the socket's timeout, the client's for HANDSHAKE_TIMEOUT.
"""

import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

from wsproto import ConnectionType
from wsproto.events import AcceptConnection
from wsproto.utilities import generate_accept_token, generate_nonce

from ringolib.net.http_client import SWITCHING_PROTOCOLS, Head, HTTPConnection, HTTPError, json_error
from ringolib.printable import escape_controls
from ringolib.timing import deadline_after

STORE_HEADER = "X-Ringoexp-Store"
"""Response header of an upgrade: the identity of the store behind the server."""
HANDSHAKE_TIMEOUT = 5.0
"""Seconds that a server has to answer a client's upgrade request."""
MAX_STORE_BYTES = 200
"""A longer identity of a store is ignored."""
MAX_REASON_CHARACTERS = 300
"""A longer reason of a refusal is cut."""
_STATUS_REASONS = {  # of refusals that give no reason themselves
    400: "it may require TLS (--consumer_tls, send: wss://)",
    401: "the token is missing or wrong (--token_file, or RINGOEXP_TOKEN)",
    403: "this may be a proxy in between",
    407: "a proxy requires a user name and a password, which are not supported",
}


class HandshakeError(Exception):
    """The upgrade failed. `status` is the HTTP status of the response, if there was a response."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


class Accepted(NamedTuple):
    """A server's answer to an upgrade: the bytes behind it, and the identity of the server's store, or None."""

    rest: bytes
    store: str | None


def accept_upgrade(
    sock: Any, headers: Mapping[str, str], extra_headers: Mapping[str, str], subprotocols: tuple[str, ...]
) -> str | None:
    """Answer 101 to a checked upgrade request with `headers`, without extensions; return the subprotocol.

    `extra_headers` go into the response. `subprotocols` are the supported ones. Raises HandshakeError if the headers
    are not a WebSocket handshake, OSError if the response cannot be sent.
    """
    subprotocol: str | None = _ServerHandshake(sock, headers, extra_headers, subprotocols).subprotocol
    return subprotocol


class UpgradeRequest:
    """A client's request to upgrade `path` to this subprotocol, without I/O. `token` is sent as a bearer token."""

    def __init__(self, host: str, path: str, subprotocol: str, token: str | None) -> None:
        self._key = generate_nonce()
        self._subprotocol = subprotocol
        self.headers = {
            "Host": host,
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": self._key.decode(),
            "Sec-WebSocket-Protocol": subprotocol,
        }
        if token:
            self.headers["Authorization"] = f"Bearer {token}"

    def accept(self, head: Head, rest: bytes) -> Accepted:
        """Return what a 101 with this head says; `rest` are the bytes behind it. Raises HandshakeError."""
        _check_accepted(head, generate_accept_token(self._key).decode(), self._subprotocol)
        stores = [value for value in head.values(STORE_HEADER) if len(value) <= MAX_STORE_BYTES]
        return Accepted(rest, stores[-1] if stores else None)


def request_upgrade(sock: Any, host: str, path: str, subprotocol: str, token: str | None = None) -> Accepted:
    """Request the upgrade of `path` to this subprotocol, and read the response. `token` is sent as a bearer token.

    Raises HandshakeError if the server refuses or does not answer in time, OSError if the connection is lost.
    """
    request = UpgradeRequest(host, path, subprotocol, token)
    connection = HTTPConnection(sock)
    deadline = deadline_after(HANDSHAKE_TIMEOUT)
    try:
        connection.send("GET", path, request.headers, deadline)
        head = connection.read_head(deadline)
    except (TimeoutError, HTTPError) as error:
        raise explain_no_answer(error) from error
    if head.status != SWITCHING_PROTOCOLS:
        raise refusal(head.status, _read_refusal(connection, deadline))
    return request.accept(head, connection.rest)


def explain_no_answer(error: TimeoutError | HTTPError) -> HandshakeError:
    """Return the error for a server that has not answered in time, or not in HTTP."""
    if isinstance(error, TimeoutError):
        return HandshakeError(f"did not finish the handshake within {HANDSHAKE_TIMEOUT:.0f} s")
    return HandshakeError(f"is not a WebSocket server: {error}")


def refusal(status: int, body: bytes) -> HandshakeError:
    """Return the error for an answer with another status than 101."""
    return HandshakeError(f"refused with HTTP status {status}{explain_refusal(status, body)}", status)


def explain_refusal(status: int, body: bytes) -> str:
    """Return why a server refuses, to append to an error text; or "". A ringoexp says it as `error`, in JSON."""
    reason = json_error(body)
    if isinstance(reason, str) and reason:
        return f": {escape_controls(reason[:MAX_REASON_CHARACTERS])}"
    if known := _STATUS_REASONS.get(status):
        return f": {known}"
    return ": is that the /v1.0/ingest of a ringoexp?" if status < 400 or status == 404 else ""


def _check_accepted(head: Head, accept_token: str, subprotocol: str) -> None:
    """Raise HandshakeError unless the 101 is the answer to our request (RFC 6455 section 4.1)."""
    connection = ",".join(head.values("Connection")).lower().split(",")
    if [value.lower() for value in head.values("Upgrade")] != ["websocket"]:
        raise HandshakeError("is not a WebSocket server: it switches to another protocol")
    if "upgrade" not in [token.strip() for token in connection]:
        raise HandshakeError("is not a WebSocket server: its answer has no Connection: Upgrade")
    if head.values("Sec-WebSocket-Accept") != [accept_token]:
        raise HandshakeError("is not a WebSocket server: its Sec-WebSocket-Accept is wrong")
    if head.values("Sec-WebSocket-Extensions"):
        raise HandshakeError("is not a WebSocket server: it selects an extension that was not offered")
    if head.values("Sec-WebSocket-Protocol") != [subprotocol]:
        raise HandshakeError(f"does not speak {subprotocol}")


def _read_refusal(connection: HTTPConnection, deadline: float) -> bytes:
    """Return the body of a refusal, or b"" if it cannot be read."""
    try:
        return connection.read_body(deadline)
    except (OSError, HTTPError):
        return b""


class _NoThread:
    """Replaces the library's reader thread, which its constructor would start."""

    name = ""

    def __init__(self, target: Any) -> None:
        pass

    def start(self) -> None:
        pass


def _import_base() -> Any:
    """Return simple_websocket's base class.

    The library imports `ssl`, which only its own client needs. If this Python has no `ssl`, the import gets an empty
    module instead.
    """
    try:
        import ssl  # noqa: F401
    except ImportError:
        import asyncio  # noqa: F401  # before the empty module is there: asyncio can do without `ssl`

        sys.modules["ssl"] = ModuleType("ssl")
        try:
            from simple_websocket.ws import Base
        finally:
            del sys.modules["ssl"]
    else:
        from simple_websocket.ws import Base
    return Base


class _ServerHandshake(_import_base()):  # type: ignore[misc]  # the library has no types
    """The server's end. The library's constructor calls `handshake`."""

    def __init__(
        self, sock: Any, headers: Mapping[str, str], extra_headers: Mapping[str, str], subprotocols: tuple[str, ...]
    ) -> None:
        self._headers = headers
        self._extra_headers = extra_headers
        self._supported = subprotocols
        super().__init__(sock, connection_type=ConnectionType.SERVER, thread_class=_NoThread)

    def handshake(self) -> None:
        headers = [(name.encode(), value.encode("latin-1")) for name, value in self._headers.items()]
        extra = [(name.encode(), value.encode("latin-1")) for name, value in self._extra_headers.items()]
        try:
            self.ws.initiate_upgrade_connection(headers, "/")
            request = next(self.ws.events())
        except Exception as error:  # h11's and wsproto's errors: the client's request is wrong
            raise HandshakeError(str(error), 400) from error
        self.subprotocol = next((name for name in request.subprotocols if name in self._supported), None)
        accept = AcceptConnection(subprotocol=self.subprotocol, extensions=[], extra_headers=extra)
        self.sock.sendall(self.ws.send(accept))
        self.connected = True
