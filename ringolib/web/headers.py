"""Checks of request headers: functions without I/O that return a value or raise Refusal.

`Refusal` is the only exception that answers a request. It carries the HTTP status, the text for the user and the
response headers; `WebHandler` sends it. Each text names the cause and the remedy.
"""

import base64
import binascii
import re
from email.message import Message
from typing import Any
from urllib.parse import SplitResult, urlsplit

from ringolib.net.credentials import BEARER_PREFIX
from ringolib.wire import PLAIN_SUBPROTOCOL, SUBPROTOCOL

BODY_TYPES = ("application/octet-stream", "application/x-www-form-urlencoded")
"""Content types accepted for a POST. `curl --data-binary` sends the second one unless told otherwise."""
WEBSOCKET_VERSION = "13"
MAX_SHOWN = 100
"""Characters of a header value that are repeated in an error message."""
_SUBPROTOCOL = re.compile("[!-~]+")
"""The characters of a subprotocol. RFC 6455 section 4.1 allows fewer: tokens may come without percent-encoding."""
_JSON_RANGES = ("*/*", "application/*", "application/json")
"""Media ranges that include JSON, the most specific one last."""


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


def tokens(headers: Message, name: str) -> list[str]:
    """Return the comma-separated elements of a header, which may occur several times (RFC 9110 section 5.6.1)."""
    elements = [part.strip() for value in headers.get_all(name, []) for part in value.split(",")]
    return [element for element in elements if element]


def offered_subprotocols(headers: Message) -> list[str]:
    """Return the WebSocket subprotocols that the client offers."""
    return tokens(headers, "Sec-WebSocket-Protocol")


def supported_subprotocols(headers: Message) -> tuple[str, ...]:
    """Return the subprotocols that the server may select for this request.

    A client that offers only its token would treat a response without a subprotocol as a failure. For this client
    the server selects the token itself.
    """
    offered = offered_subprotocols(headers)
    if not {SUBPROTOCOL, PLAIN_SUBPROTOCOL} & set(offered):
        return tuple(subprotocol for subprotocol in offered if subprotocol.startswith(BEARER_PREFIX))
    return SUBPROTOCOL, PLAIN_SUBPROTOCOL


def has_body(headers: Message) -> bool:
    """True if a body follows the headers."""
    return headers.get_all("Content-Length", ["0"]) != ["0"] or "Transfer-Encoding" in headers


def body_length(headers: Message) -> int:
    """Return the length of the body in bytes. Raises Refusal unless Content-Length is one whole number."""
    lengths = set(headers.get_all("Content-Length", []))
    if "Transfer-Encoding" in headers or not lengths:
        raise Refusal(411, "a Content-Length is required: send the integers as one body, without chunked encoding")
    text = lengths.pop()
    if lengths or not (text.isascii() and text.isdigit()):
        raise Refusal(400, "Content-Length must be one whole number")
    return int((text.lstrip("0") or "0")[:20])  # 20 digits are beyond every limit; int() rejects thousands of them


def check_body_type(headers: Message) -> None:
    """Raise Refusal if the body of a POST has a content type other than BODY_TYPES."""
    content_type = headers.get_content_type() if "Content-Type" in headers else BODY_TYPES[0]
    if content_type not in BODY_TYPES:
        raise Refusal(415, f"a body of type {content_type[:MAX_SHOWN]} is not supported: send {BODY_TYPES[0]}")


def check_json_request(headers: Message) -> None:
    """Raise Refusal if the client does not accept JSON, or sends a Content-Type other than JSON."""
    check_accept(headers)
    if "Content-Type" in headers:
        content_type = headers["Content-Type"].partition(";")[0].strip().lower()
        if content_type not in ("application/json", "*/*"):
            shown = content_type[:MAX_SHOWN]
            raise Refusal(415, f"Content-Type {shown} is not supported: send application/json, or no Content-Type")


def check_accept(headers: Message) -> None:
    """Raise Refusal if the client does not accept JSON."""
    accept = ",".join(headers.get_all("Accept", []))
    if accept.strip() and not _admits_json(accept):
        raise Refusal(
            406, "the response is application/json, but the Accept header excludes it: accept application/json"
        )


def check_origin(headers: Message) -> None:
    """Raise Refusal if a web page of another site sends the request (RFC 6455 section 10.2).

    Browsers add the Origin header. Requests without it do not come from a web page.
    """
    origin = headers.get("Origin")
    if origin is not None and not _is_own_origin(origin, headers.get("Host", "")):
        raise Refusal(
            403, "the Origin header names another site: web pages may send data only to the server they come from"
        )


def check_handshake(method: str, version: str, headers: Message) -> dict[str, str]:
    """Return the headers of a valid opening handshake, without extensions. Raises Refusal (RFC 6455 section 4.2.1)."""
    upgrade = ("Upgrade", "websocket"), ("Connection", "upgrade")
    if any(token not in map(str.lower, tokens(headers, name)) for name, token in upgrade):
        raise Refusal(
            426,
            "this path requires a WebSocket: connect with a WebSocket client, or POST the integers",
            {"Upgrade": "websocket", "Connection": "Upgrade"},
        )
    if method != "GET" or version != "HTTP/1.1":
        raise Refusal(400, "a WebSocket handshake must be a GET request in HTTP/1.1")
    if has_body(headers):
        name = "Transfer-Encoding" if "Transfer-Encoding" in headers else "Content-Length"
        raise Refusal(400, f"a WebSocket handshake must have no body: omit {name}, and send the records as messages")
    if len(headers.get_all("Host", [])) != 1:
        raise Refusal(400, "a WebSocket handshake must have exactly one Host header")
    check_origin(headers)
    if headers.get_all("Sec-WebSocket-Version", []) != [WEBSOCKET_VERSION]:
        raise Refusal(
            426, f"Sec-WebSocket-Version must be {WEBSOCKET_VERSION}", {"Sec-WebSocket-Version": WEBSOCKET_VERSION}
        )
    handshake = {
        "Host": "localhost",  # checked above; wsproto would only decode the real one
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


def _websocket_key(headers: Message) -> str:
    keys = headers.get_all("Sec-WebSocket-Key", [])
    try:
        valid = len(keys) == 1 and len(base64.b64decode(keys[0].strip(), validate=True)) == 16
    except (binascii.Error, ValueError):
        valid = False
    if not valid:
        raise Refusal(400, "Sec-WebSocket-Key must be 16 bytes in base64")
    return str(keys[0]).strip()


def _admits_json(accept: str) -> bool:
    """True if the most specific media range for JSON has a weight above 0 (RFC 9110 section 12.5.1)."""
    best: tuple[int, bool] = (-1, False)
    for part in accept.split(","):
        media, *parameters = (piece.strip().lower() for piece in part.split(";"))
        try:
            specificity = _JSON_RANGES.index(media)
        except ValueError:
            continue
        weights = [parameter[2:] for parameter in parameters if parameter.startswith("q=")]
        try:
            admitted = not weights or float(weights[0]) > 0
        except ValueError:
            admitted = False
        best = max(best, (specificity, admitted))
    return best[1]


def _is_own_origin(origin: str, host: str) -> bool:
    """True if the Origin header names the same host and port as the Host header."""
    try:
        theirs = urlsplit(origin)
        ours = urlsplit(f"{theirs.scheme}://{host}")
        return theirs.netloc != "" and _host_and_port(theirs) == _host_and_port(ours)
    except ValueError:
        return False


def _host_and_port(url: SplitResult) -> tuple[str | None, int | None]:
    """Return host and port of a URL, or the default port of its scheme. Raises ValueError for an invalid port."""
    return url.hostname, url.port or {"http": 80, "https": 443}.get(url.scheme)
