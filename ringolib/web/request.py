"""The requests of one connection, without I/O: bytes in, requests and the pieces of their bodies out.

h11 parses: it finds where a request and its body begin and end; `chunks` does it for a body in chunks. What h11 leaves
to its user is done here: empty lines before a request, the limits of a head, folded headers, versions, the forms of a
target, and the syntax of a host. Whether the server answers to that host is the job of `names`.

A `RequestReader` belongs to the thread of its connection.
"""

import re
from typing import NamedTuple

import h11

from ringolib.web.chunks import ChunkedBody
from ringolib.web.headers import Headers, Refusal, tokens

MAX_HEAD = 32 * 1024
"""Bytes of the request line and the headers together."""
MAX_HEADERS = 100
HEAD_READ_SIZE = 4096
"""Bytes that one read of a head takes at most. Each read allocates as many, so more would fragment the memory."""
BODY_READ_SIZE = 64 * 1024
"""Bytes that one read of a body takes at most."""
MAX_EMPTY_LINES = 2
"""Empty lines that are skipped before a request (RFC 9112 section 2.2)."""
MAX_PORT = 65_535
_TLS_RECORD = 0x16
_FOLDED = re.compile(rb"\n[ \t]")
_AUTHORITY = re.compile(
    r"(\[(?:[0-9A-Fa-f:.]+(?:%25[\w.~-]+)?|[Vv][0-9A-Fa-f]+\.[\w.~!$&'()*+,;=:-]+)\]"  # IPv6, with or without a zone
    r"|(?:[\w.~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*)"  # a name, or IPv4
    r"(?::(\d*))?",
    re.ASCII,
)
"""A host, with or without a port (RFC 3986 section 3.2)."""
_ENCODED = re.compile("%([0-9A-Fa-f]{2})")
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")

_MALFORMED_HEADER = "malformed header line: expected NAME: VALUE on one line"
_MALFORMED_LINE = "malformed request line: expected METHOD TARGET HTTP/1.1"
_HOST = "a request in HTTP/1.1 must have exactly one Host header, with a valid host and port"
_LENGTH = "Content-Length must be one whole number of at most 20 digits"
_TWO_LENGTHS = "a request must not have both Content-Length and Transfer-Encoding: omit Transfer-Encoding"
_CODING = "this Transfer-Encoding is not supported: send the body with a Content-Length, or chunked"
_CHUNKS_IN_1_0 = "a request in HTTP/1.0 must not have Transfer-Encoding: send the body with a Content-Length"
_TOO_LARGE = f"a request may have at most {MAX_HEADERS} headers, and at most {MAX_HEAD} bytes before its body"
_REASONS = {
    "illegal header line": _MALFORMED_HEADER,
    "continuation line": _MALFORMED_HEADER,
    "illegal request line": _MALFORMED_LINE,
    "no request line": _MALFORMED_LINE,
    "Missing mandatory Host": _HOST,
    "Found multiple Host": _HOST,
    "bad Content-Length": _LENGTH,
    "conflicting Content-Length": _LENGTH,
    "Only Transfer-Encoding": _CODING,
    "multiple Transfer-Encoding": _CODING,
}
"""The start of an error text of h11, and our text for the same error. h11's text may contain a header's value."""


class Authority(NamedTuple):
    """A host as it was sent, in lower case, and its port, or None if there was none. IPv6 has no brackets."""

    host: str
    port: int | None


class Request(NamedTuple):
    """The head of a request.

    `path` has no query, and its percent-encoded unreserved characters are decoded. `host` is what the client calls the
    server; only a request in HTTP/1.0 may have none. `wants_close` is true if no other request may follow.
    """

    method: str
    path: str
    query: str
    version: str
    headers: Headers
    host: Authority | None
    wants_close: bool


class BodyEnded(Exception):
    """The client has ended its side before the body was complete."""


class RequestReader:
    """Takes the bytes of a connection with `receive`, and returns its requests in order."""

    def __init__(self) -> None:
        self._h11 = h11.Connection(h11.SERVER, MAX_HEAD - 1)
        self._unparsed = b""  # received, and not given to h11 yet
        self._head = b""  # of the current request: what h11 has
        self._empty_lines = 0
        self._chunks: ChunkedBody | None = None  # the current body, if it comes in chunks: h11 does not get it
        self._piece: bytes | None = None  # the first piece of the body, if it came with the head
        self.has_body = False
        """True while the body of the current request is not read to its end."""

    @property
    def begun(self) -> bool:
        """True if a part of the next head has come."""
        return bool(self._head or self._unparsed or self._empty_lines)

    @property
    def is_tls(self) -> bool:
        """True if the connection begins with a TLS handshake."""
        return self._unparsed[:1] == bytes([_TLS_RECORD])

    @property
    def room(self) -> int:
        """How many bytes a read may take: in a head, not more than the rest of MAX_HEAD."""
        if self.has_body:
            return BODY_READ_SIZE
        return min(HEAD_READ_SIZE, max(1, MAX_HEAD - len(self._head) - len(self._unparsed)))

    @property
    def expects_continue(self) -> bool:
        """True if the client waits for 100 Continue before it sends the body."""
        begun = self._chunks is not None and self._chunks.begun
        return self._h11.they_are_waiting_for_100_continue and not begun

    def continue_response(self) -> bytes:
        """Return the response 100 Continue. The client does not wait for another one then."""
        return self._h11.send(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue"))

    @property
    def rest(self) -> bytes:
        """The bytes behind the current request, after its body was read."""
        return self._chunks.rest if self._chunks else self._h11.trailing_data[0]

    def receive(self, data: bytes) -> None:
        """Take bytes of the connection; b"" is the end of the stream, within a body."""
        if self.has_body and self._chunks:
            self._chunks.receive(data)
        elif self.has_body:
            self._h11.receive_data(data)
        else:
            self._unparsed += data

    def next_request(self) -> Request | None:
        """Return the next request once its head is complete. Raises Refusal if it is malformed."""
        if not self._head and not self._skip_empty_lines():
            return None
        self._h11.receive_data(self._unparsed)
        self._head, self._unparsed = self._head + self._unparsed, b""
        try:
            event = self._h11.next_event()
            if event is h11.NEED_DATA:
                return None
            assert isinstance(event, h11.Request)
            self._head = self._head[: len(self._head) - len(self.rest)]
            request = _check(event, self._head)
            if "transfer-encoding" in request.headers:
                self._chunks = ChunkedBody(self.rest)
            self._piece = self._next_piece()
        except h11.RemoteProtocolError as error:
            raise self._explain(error) from error
        self.has_body = self._piece != b""
        return request

    def next_piece(self) -> bytes | None:
        """Return a piece of the current body, b"" at its end, or None if more bytes must be received.

        Raises BodyEnded if no more bytes can come, and Refusal if the body is malformed.
        """
        piece, self._piece = self._piece, None
        try:
            piece = self._next_piece() if piece is None else piece
        except h11.RemoteProtocolError as error:
            if self._h11.trailing_data[1]:
                raise BodyEnded from error
            raise self._explain(error) from error
        if piece is None and self._chunks and self._chunks.is_cut_off:
            raise BodyEnded
        self.has_body = piece != b""
        return piece

    def start_next(self) -> None:
        """Begin with the next request, after the body of the current one was read."""
        assert not self.has_body
        self._unparsed = self.rest
        self._h11 = h11.Connection(h11.SERVER, MAX_HEAD - 1)  # cheaper than to tell h11 of our response
        self._chunks = None
        self._head, self._empty_lines = b"", 0

    def _next_piece(self) -> bytes | None:
        if self._chunks:
            return self._chunks.next_piece()
        event = self._h11.next_event()
        if event is h11.NEED_DATA:
            return None
        return bytes(event.data) if isinstance(event, h11.Data) else b""  # b"": an EndOfMessage

    def _skip_empty_lines(self) -> bool:
        """Drop empty lines before a request. Return True if there is something else."""
        while self._empty_lines < MAX_EMPTY_LINES and self._unparsed[:1] in (b"\r", b"\n"):
            size = 2 if self._unparsed[:2] == b"\r\n" else 1
            if self._unparsed == b"\r":
                return False
            if self._unparsed[:size] == b"\r":
                break
            self._unparsed = self._unparsed[size:]
            self._empty_lines += 1
        return bool(self._unparsed)

    def _explain(self, error: h11.RemoteProtocolError) -> Refusal:
        """Return our error for one of h11's."""
        if error.error_status_hint == 431:
            if b"\n" not in self._head:
                return Refusal(414, f"the request line has more than {MAX_HEAD} bytes: shorten it")
            return Refusal(431, _TOO_LARGE)
        text = next((reason for start, reason in _REASONS.items() if str(error).startswith(start)), "malformed request")
        return Refusal(error.error_status_hint, text)


def parse_authority(text: str) -> Authority | None:
    """Return host and port, or None if the text has another form."""
    match = _AUTHORITY.fullmatch(text)
    if not match:
        return None
    host, port = match[1].lower(), match[2]
    if port and (len(port.lstrip("0")) > 5 or int(port) > MAX_PORT):
        return None
    return Authority(host[1:-1] if host.startswith("[") else host, int(port) if port else None)


def _check(event: h11.Request, head: bytes) -> Request:
    """Return the request, after the checks that h11 leaves to its user. Raises Refusal."""
    method, version = event.method.decode(), event.http_version.decode()
    if version[0] != "1":
        raise Refusal(505, f"HTTP/{version} is not supported: use HTTP/1.1")
    if _FOLDED.search(head):  # a proxy in front of this server may see other headers (RFC 9112 section 5.2)
        raise Refusal(400, _MALFORMED_HEADER)
    if len(head) > MAX_HEAD or len(event.headers) > MAX_HEADERS:
        raise Refusal(431, _TOO_LARGE)
    headers = Headers(event.headers)
    if (
        "content-length" in headers and "transfer-encoding" in headers
    ):  # a proxy may take the other (RFC 9112 section 6.1)
        raise Refusal(400, _TWO_LENGTHS)
    if version == "1.0" and "transfer-encoding" in headers:  # the framing is faulty (RFC 9112 section 6.1)
        raise Refusal(400, _CHUNKS_IN_1_0)
    hosts = headers.get_all("host")
    host = parse_authority(hosts[0]) if hosts else None
    if host is None and (hosts or version != "1.0"):
        raise Refusal(400, _HOST)
    target = event.target.decode()
    if target[0] != "/":
        authority, target = _take_apart(method, target)
        host = authority or host
    path, _, query = target.partition("?")
    if "%" in path:
        path = _decode_unreserved(path)
    wants_close = version == "1.0" or "close" in map(str.lower, tokens(headers, "connection"))
    return Request(method, path, query, version, headers, host, wants_close)


def _take_apart(method: str, target: str) -> tuple[Authority | None, str]:
    """Return the authority and the rest of a target that is not a path (RFC 9112 section 3.2). Raises Refusal."""
    if method == "CONNECT" or (method, target) == ("OPTIONS", "*"):
        return None, target
    scheme, separator, rest = target.partition("://")
    end = min((at for at in map(rest.find, "/?") if at >= 0), default=len(rest))
    authority = parse_authority(rest[:end])
    if scheme.lower() not in ("http", "https") or not separator or not authority or not authority.host:
        raise Refusal(400, "malformed target: expected a path, or http://HOST:PORT and a path")
    path = rest[end:]
    return authority, path if path.startswith("/") else f"/{path}"


def _decode_unreserved(path: str) -> str:
    """Decode the characters that need no percent-encoding (RFC 3986 section 6.2.2.2). Raises Refusal for a NUL."""

    def decode(match: "re.Match[str]") -> str:
        character = chr(int(match[1], 16))
        if character == "\0":
            raise Refusal(400, "the path contains a NUL: leave out %00")
        return character if character in _UNRESERVED else match[0]

    return _ENCODED.sub(decode, path)
