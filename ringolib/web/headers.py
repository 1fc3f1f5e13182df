"""The headers of a request, and their checks: functions without I/O that return a value or raise Refusal.

`Refusal` is the only exception that answers a request. It carries the HTTP status, the text for the user and the
response headers; `WebHandler` sends it. Each text names the cause and the remedy. The checks of `Host` and `Origin` are
in `names`.
"""

import base64
import binascii
import re
from collections.abc import Iterable
from typing import Any

from ringolib.net.credentials import BEARER_PREFIX
from ringolib.wire import PLAIN_SUBPROTOCOL, SUBPROTOCOL

OCTETS_TYPE = "application/octet-stream"
TEXT_TYPE = "text/plain"
FORM_TYPE = "application/x-www-form-urlencoded"
"""The type that `curl -d` sends unless told otherwise. The body is a text of integers, not a form."""
JSON_TYPES = ("application/json", "application/x-ndjson", "application/ndjson", "application/jsonl")
_BODY_FORM = (
    f"send decimal integers as {TEXT_TYPE} or {JSON_TYPES[0]}, or as bytes, 4 or 8 each, big-endian, as {OCTETS_TYPE}; "
    "see docs/protocol.md"
)
WEBSOCKET_VERSION = "13"
MAX_SHOWN = 100
"""Characters of a header value that are repeated in an error message."""
_SUBPROTOCOL = re.compile("[!-~]+")
"""The characters of a subprotocol. RFC 6455 section 4.1 allows fewer: tokens may come without percent-encoding."""
_UPGRADE = {"Upgrade": "websocket", "Connection": "Upgrade"}
_TYPE = re.compile(r"[\w!#$&^.+-]+(?:/[\w!#$&^.+-]+)?", re.ASCII)
"""A media type (RFC 6838 section 4.2), or one word."""
_TAG = re.compile('"[^"]*"')
_ELEMENT = re.compile(r'(?:[^,"]|"(?:[^"\\]|\\.)*"?)+')
"""An element of a list with commas, where a quoted string may contain commas (RFC 9110 section 5.6.4)."""
_PARAMETER = re.compile(r'(?:[^;"]|"(?:[^"\\]|\\.)*"?)+')
"""The same for the parameters of an element, with semicolons."""


class Refusal(Exception):
    """The request is answered with an error.

    The JSON body has the text of the error as `error`, and `fields` beside it.
    """

    def __init__(
        self,
        status: int,
        reason: str,
        headers: dict[str, str] | None = None,
        fields: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(reason)
        self.status = status
        self.headers = headers or {}
        self.body = {"error": reason, **(fields or {})}


class Headers:
    """The headers of a request. Names are given in lower case; a header may occur several times."""

    __slots__ = ("_values",)

    def __init__(self, fields: Iterable[tuple[bytes, bytes]]) -> None:
        self._values: dict[str, list[str]] = {}
        for name, value in fields:
            self._values.setdefault(name.decode("latin-1"), []).append(value.decode("latin-1"))

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def get_all(self, name: str) -> list[str]:
        """Return the values of all lines with this name."""
        return self._values.get(name, [])


def tokens(headers: Headers, name: str) -> list[str]:
    """Return the comma-separated elements of a header, which may occur several times (RFC 9110 section 5.6.1)."""
    elements = [part.strip() for value in headers.get_all(name) for part in value.split(",")]
    return [element for element in elements if element]


def offered_subprotocols(headers: Headers) -> list[str]:
    """Return the WebSocket subprotocols that the client offers."""
    return tokens(headers, "sec-websocket-protocol")


def supported_subprotocols(headers: Headers) -> tuple[str, ...]:
    """Return the subprotocols that the server may select for this request.

    A client that offers only its token would treat a response without a subprotocol as a failure. For this client
    the server selects the token itself.
    """
    offered = offered_subprotocols(headers)
    if not {SUBPROTOCOL, PLAIN_SUBPROTOCOL} & set(offered):
        return tuple(subprotocol for subprotocol in offered if subprotocol.startswith(BEARER_PREFIX))
    return SUBPROTOCOL, PLAIN_SUBPROTOCOL


def body_length(headers: Headers) -> int | None:
    """Return the length of the body in bytes, or None if it comes in chunks. h11 has checked the form of both headers.

    Raises Refusal without either of them.
    """
    if "transfer-encoding" in headers:
        return None
    lengths = headers.get_all("content-length")
    if not lengths:
        raise Refusal(411, "the request has no body: send a body with a Content-Length, or chunked")
    return int(lengths[0])


def body_type(headers: Headers) -> str:
    """Return the content type of the body of a POST; "" without one, which means OCTETS_TYPE.

    Raises Refusal if the type is not supported, or the body is compressed.
    """
    content_type = _content_type(headers)
    if content_type not in ("", OCTETS_TYPE, TEXT_TYPE, FORM_TYPE, *JSON_TYPES):
        raise Refusal(415, f"a body of type {_shown(content_type)} is not supported: {_BODY_FORM}")
    codings = [coding for coding in tokens(headers, "content-encoding") if coding.lower() != "identity"]
    if codings:
        reason = f"Content-Encoding {_shown(codings[0])} is not supported: send the body uncompressed"
        raise Refusal(415, reason, {"Accept-Encoding": "identity"})
    return content_type


def check_expect(version: str, headers: Headers) -> None:
    """Raise Refusal if a client of HTTP/1.1 expects anything but 100 Continue (RFC 9110 section 10.1.1)."""
    if version != "1.0" and any(token.lower() != "100-continue" for token in tokens(headers, "expect")):
        raise Refusal(417, "Expect may only be 100-continue: send that, or no Expect header")


def _shown(value: str) -> str:
    """Return a media type or a coding for an error text. A value of another form may be a secret."""
    return value[:MAX_SHOWN] if _TYPE.fullmatch(value) else "(malformed)"


def _content_type(headers: Headers) -> str:
    """Return the media type of Content-Type without parameters, in lower case; "" without the header."""
    lines = headers.get_all("content-type")
    if len(lines) > 1:
        raise Refusal(400, "a request may have only one Content-Type header: omit the others")
    return lines[0].partition(";")[0].strip().lower() if lines else ""


def check_json_request(headers: Headers) -> None:
    """Raise Refusal if the client does not accept JSON, or sends a Content-Type other than JSON."""
    check_accept(headers)
    content_type = _content_type(headers)
    if content_type not in ("", "application/json", "*/*"):
        shown = _shown(content_type)
        raise Refusal(415, f"Content-Type {shown} is not supported: send application/json, or no Content-Type")


def lists_tag(headers: Headers, name: str, tag: str) -> bool:
    """True if If-Match or If-None-Match, the header `name`, names this entity tag, or any (RFC 9110 section 13.1)."""
    lines = headers.get_all(name)
    return any(line.strip() == "*" or tag in _TAG.findall(line) for line in lines)


def check_accept(headers: Headers) -> None:
    """Raise Refusal if the client does not accept JSON."""
    accept = ",".join(headers.get_all("accept"))
    if accept.strip() and not media_weight(accept, "application/json") > 0:
        raise Refusal(
            406, "the response is application/json, but the Accept header excludes it: accept application/json"
        )


def check_handshake(method: str, version: str, headers: Headers) -> dict[str, str]:
    """Return the headers of a valid opening handshake, without extensions. Raises Refusal (RFC 6455 section 4.2.1)."""
    upgrade = ("upgrade", "websocket"), ("connection", "upgrade")
    if any(token not in map(str.lower, tokens(headers, name)) for name, token in upgrade):
        reason = "this path requires a WebSocket: connect with a WebSocket client, or POST the integers"
        raise Refusal(426, reason, _UPGRADE)
    if method != "GET" or version == "1.0":
        raise Refusal(400, "a WebSocket handshake must be a GET request in HTTP/1.1")
    for name in ("Transfer-Encoding", "Content-Length"):
        if name.lower() in headers and headers.get_all(name.lower()) != ["0"]:
            reason = f"a WebSocket handshake must have no body: omit {name}, and send the records as messages"
            raise Refusal(400, reason)
    if headers.get_all("sec-websocket-version") != [WEBSOCKET_VERSION]:
        reason = f"Sec-WebSocket-Version must be {WEBSOCKET_VERSION}"
        raise Refusal(426, reason, {**_UPGRADE, "Sec-WebSocket-Version": WEBSOCKET_VERSION})
    handshake = {
        "Host": "localhost",  # the real one is checked, and wsproto would only decode it
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": _websocket_key(headers),
        "Sec-WebSocket-Version": WEBSOCKET_VERSION,
    }
    offered = offered_subprotocols(headers)
    if not all(map(_SUBPROTOCOL.fullmatch, offered)):  # the message does not repeat it: it may contain a token
        raise Refusal(
            400, "Sec-WebSocket-Protocol must be a list of subprotocols: percent-encode other characters in a token"
        )
    if offered:
        handshake["Sec-WebSocket-Protocol"] = ", ".join(offered)
    return handshake


def _websocket_key(headers: Headers) -> str:
    keys = headers.get_all("sec-websocket-key")
    try:
        valid = len(keys) == 1 and len(base64.b64decode(keys[0], validate=True)) == 16
    except (binascii.Error, ValueError):
        valid = False
    if not valid:
        raise Refusal(400, "Sec-WebSocket-Key must be 16 bytes in base64")
    return keys[0]


def media_weight(accept: str, media_type: str) -> float:
    """Return the weight that Accept gives a media type, by the most specific range for it (RFC 9110 section 12.5.1)."""
    ranges = ("*/*", f"{media_type.partition('/')[0]}/*", media_type)
    best: tuple[int, float] = (-1, 0.0)
    for part in _ELEMENT.findall(accept):
        media, *parameters = (piece.strip().lower() for piece in _PARAMETER.findall(part))
        if media not in ranges:
            continue
        weights = [parameter[2:].strip('"') for parameter in parameters if parameter.startswith("q=")]
        try:
            weight = float(weights[0]) if weights else 1.0
        except ValueError:
            weight = 0.0
        best = max(best, (ranges.index(media), weight))
    return best[1]
