"""Requests without sockets: parsing with h11, the rules that h11 leaves to its user, and the checks of headers."""

import socket

import pytest

from ringolib.web import headers
from ringolib.web.headers import Refusal
from ringolib.web.names import Names, own_names
from ringolib.web.request import MAX_HEAD, BodyEnded, Request, RequestReader, parse_authority

HOST = b"Host: localhost:6660\r\n"


def parse(data: bytes) -> Request:
    """Return the request in `data`, also if it comes a byte at a time."""
    whole, slow = RequestReader(), RequestReader()
    whole.receive(data)
    request = whole.next_request()
    assert request
    for at in range(len(data)):
        slow.receive(data[at : at + 1])
        if found := slow.next_request():
            assert found.path == request.path and found.host == request.host
            break
    else:
        raise AssertionError("not found byte by byte")
    return request


def get(target: str = "/v1.0/alive", lines: bytes = HOST, version: str = "HTTP/1.1") -> bytes:
    return f"GET {target} {version}\r\n".encode("latin-1") + lines + b"\r\n"


def status(data: bytes) -> int:
    reader = RequestReader()
    reader.receive(data)
    with pytest.raises(Refusal) as refused:
        reader.next_request()
    return refused.value.status


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(get(lines=b""), 400, id="no host"),
        pytest.param(get(lines=HOST * 2), 400, id="two hosts"),
        pytest.param(get(lines=b"Host: a b\r\n"), 400, id="blank in the host"),
        pytest.param(get(lines=b"Host: x:99999\r\n"), 400, id="port beyond 65535"),
        pytest.param(get(lines=b"Host: x:-1\r\n"), 400, id="negative port"),
        pytest.param(get(lines=b"Host: user@x\r\n"), 400, id="user in the host"),
        pytest.param(get(lines=b"Host: x/path\r\n"), 400, id="path in the host"),
        pytest.param(get(lines=b"Host: [::1\r\n"), 400, id="half a bracket"),
        pytest.param(get(lines=b"", version="HTTP/1.2"), 400, id="no host in HTTP/1.2"),
        pytest.param(get(lines=b"Host: a b\r\n", version="HTTP/1.0"), 400, id="malformed host in HTTP/1.0"),
        pytest.param(get(version="HTTP/1.10"), 400, id="1.10"),
        pytest.param(get(version="HTTP/01.01"), 400, id="01.01"),
        pytest.param(get(version="http/1.1"), 400, id="http in lower case"),
        pytest.param(get(version="HTTP/2.0"), 505, id="2.0"),
        pytest.param(b"GET\xa0/v1.0/alive\xa0HTTP/1.1\r\n" + HOST + b"\r\n", 400, id="other blanks"),
        pytest.param(b"GET\t/v1.0/alive\tHTTP/1.1\r\n" + HOST + b"\r\n", 400, id="tabs"),
        pytest.param(b"GET  /v1.0/alive HTTP/1.1\r\n" + HOST + b"\r\n", 400, id="two blanks"),
        pytest.param(b"\r\n\r\n\r\n" + get(), 400, id="three empty lines"),
        pytest.param(b"\r" + get(), 400, id="lone CR before"),
        pytest.param(b" " + get(), 400, id="blank before"),
        pytest.param(get("/v1.0/alive%00"), 400, id="NUL in the path"),
        pytest.param(get("ftp://localhost/v1.0/alive"), 400, id="another scheme"),
        pytest.param(get("http://u:p@localhost/v1.0/alive"), 400, id="user in the target"),
        pytest.param(get("http:///v1.0/alive"), 400, id="no host in the target"),
        pytest.param(get("v1.0/alive"), 400, id="relative target"),
        pytest.param(get(lines=HOST + b"A: b\r\n c\r\n"), 400, id="folded header"),
        pytest.param(get(lines=HOST + b"A : b\r\n"), 400, id="blank before the colon"),
        pytest.param(get(lines=HOST + b"Content-Length: 4\r\nContent-Length: 5\r\n"), 400, id="two lengths"),
        pytest.param(get(lines=HOST + b"Content-Length: 0x4\r\n"), 400, id="hexadecimal length"),
        pytest.param(get(lines=HOST + b"Transfer-Encoding: gzip, chunked\r\n"), 501, id="compressed chunks"),
        pytest.param(
            get(lines=HOST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n") + b"0\r\n\r\n",
            400,
            id="chunks with a length",
        ),
        pytest.param(get(lines=HOST + b"Transfer-Encoding: chunked\r\n", version="HTTP/1.0"), 400, id="chunks in 1.0"),
        pytest.param(get(lines=HOST + b"Transfer-Encoding: identity\r\n"), 501, id="another coding"),
        pytest.param(get(lines=HOST + b"Transfer-Encoding: chunked\r\n" * 2), 501, id="chunked twice"),
        pytest.param(get(lines=HOST + b"Transfer-Encoding: chunked\r\n") + b"4\n", 400, id="malformed first chunk"),
        pytest.param(get("*"), 400, id="GET of all"),
        pytest.param(get(lines=HOST + b"A: b\r\n" * 100), 431, id="101 headers"),
        pytest.param(get(lines=HOST + b"A: " + b"b" * MAX_HEAD + b"\r\n"), 431, id="long header that came at once"),
        pytest.param(get("/" + "a" * MAX_HEAD)[:MAX_HEAD], 414, id="long target"),
        pytest.param(get(lines=HOST + b"A: " + b"b" * MAX_HEAD)[:MAX_HEAD], 431, id="long header"),
    ],
)
def test_malformed_request_is_refused(data: bytes, expected: int) -> None:
    assert status(data) == expected


@pytest.mark.parametrize(
    ("data", "path", "host"),
    [
        (b"\r\n" + get(), "/v1.0/alive", ("localhost", 6660)),
        (b"\r\n\n" + get(), "/v1.0/alive", ("localhost", 6660)),
        (get("http://other:80/v1.0/alive"), "/v1.0/alive", ("other", 80)),
        (get("HTTPS://[::1]/v1.0/alive?q"), "/v1.0/alive", ("::1", None)),
        (get("http://other?q"), "/", ("other", None)),
        (get("/v1%2E0/%61live"), "/v1.0/alive", ("localhost", 6660)),
        (get("/%2Fv1.0/alive%zz"), "/%2Fv1.0/alive%zz", ("localhost", 6660)),
        (get(version="HTTP/1.2"), "/v1.0/alive", ("localhost", 6660)),
        (get(lines=b"", version="HTTP/1.0"), "/v1.0/alive", None),
        (get(lines=b"Host: LocalHost.\t\r\n"), "/v1.0/alive", ("localhost.", None)),
        (get(lines=b"Host: [fe80::1%25eth0]:1\r\n"), "/v1.0/alive", ("fe80::1%25eth0", 1)),
        (get(lines=HOST + b"A: b\r\n" * 99), "/v1.0/alive", ("localhost", 6660)),
    ],
)
def test_valid_request_is_understood(data: bytes, path: str, host: object) -> None:
    request = parse(data)
    assert (request.path, request.host) == (path, host)


@pytest.mark.parametrize(
    ("lines", "closes"),
    [
        (b"Connection: close \r\n", True),
        (b"Connection: TE, close\r\n", True),
        (b"Connection: TE\r\nConnection: Close\r\n", True),
        (b"Connection: keep-alive\r\n", False),
        (b"Connection: closed\r\n", False),
    ],
)
def test_connection_is_a_list(lines: bytes, closes: bool) -> None:
    assert parse(get(lines=HOST + lines)).wants_close is closes


def test_http_1_0_connection_closes_even_if_asked_to_stay() -> None:
    assert parse(get(lines=b"Connection: Keep-Alive\r\n", version="HTTP/1.0")).wants_close


def test_blanks_behind_a_value_do_not_count() -> None:
    request = parse(
        get(lines=HOST + b"Content-Length: 4 \r\nAuthorization: Bearer T\t\r\nSec-WebSocket-Version: 13\t\r\n")
    )
    assert request.headers.get_all("authorization") == ["Bearer T"]
    assert request.headers.get_all("sec-websocket-version") == ["13"]
    assert headers.body_length(request.headers) == 4


def test_body_and_next_request_are_kept_apart() -> None:
    reader = RequestReader()
    reader.receive(b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\n\r\nab")
    assert reader.next_request() and reader.has_body
    assert reader.next_piece() == b"ab" and reader.next_piece() is None
    reader.receive(b"cde" + get("/next"))
    assert reader.next_piece() == b"cde" and reader.next_piece() == b"" and not reader.has_body
    reader.start_next()
    assert (request := reader.next_request()) and request.path == "/next"


def test_body_that_ends_early_is_reported() -> None:
    reader = RequestReader()
    reader.receive(b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\n\r\nab")
    assert reader.next_request() and reader.next_piece() == b"ab"
    reader.receive(b"")
    with pytest.raises(BodyEnded):
        reader.next_piece()


CHUNKED = b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: Chunked\r\n\r\n"


def test_chunked_body_and_next_request_are_kept_apart() -> None:
    """At any cut of the stream."""
    data = CHUNKED + b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nA: b\r\n\r\n" + get("/next")
    for cut in range(len(data)):
        reader = RequestReader()
        body, paths = b"", []
        for part in (data[:cut], data[cut:]):
            reader.receive(part or b"\r\n")  # an empty line before the request: b"" would be the end
            while True:
                if not reader.has_body:
                    if not (request := reader.next_request()):
                        break
                    paths.append(request.path)
                while piece := reader.next_piece():
                    body += piece
                if piece is None:
                    break
                reader.start_next()
        assert (body, paths) == (b"abcde", ["/", "/next"]), cut


def test_chunked_body_that_ends_early_is_reported() -> None:
    for rest in (b"", b"3", b"3\r\n", b"3\r\nab", b"3\r\nabc\r\n", b"0\r\n"):
        reader = RequestReader()
        reader.receive(CHUNKED + rest)
        assert reader.next_request() and reader.has_body
        while reader.next_piece() is not None:
            pass
        reader.receive(b"")
        with pytest.raises(BodyEnded):
            reader.next_piece()


def test_chunked_body_that_has_begun_is_not_asked_for() -> None:
    head = CHUNKED[:-2] + b"Expect: 100-continue\r\n\r\n"
    for data, expects in ((head, True), (head + b"1", False)):
        reader = RequestReader()
        reader.receive(data)
        assert reader.next_request() and reader.expects_continue is expects
    reader.receive(b"0\r\n\r\n")


def test_frames_behind_a_handshake_are_the_rest() -> None:
    reader = RequestReader()
    reader.receive(get(lines=HOST + b"Upgrade: websocket\r\nConnection: upgrade\r\n") + b"\x82\x84frames")
    assert reader.next_request() and reader.rest == b"\x82\x84frames"


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("localhost", True),
        ("localhost.", True),
        ("127.0.0.1:1", True),
        ("[::1]", True),
        ("[fe80::1%25eth0]", True),
        ("numbers.example", True),
        ("NUMBERS.example.:80", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("127.0.0.1%2Eevil.example", False),
        ("127.0.0.1%25.evil.example", False),
        ("[::1%25.evil.example]", True),  # a zone: the address comes before it
        ("0x7f.1", False),
        ("", False),
    ],
)
def test_server_answers_only_to_its_names(host: str, known: bool) -> None:
    names, authority = Names(["numbers.example"]), parse_authority(host)
    if known:
        names.check_host(authority)
    else:
        with pytest.raises(Refusal, match="--allow_host") as refused:
            names.check_host(authority)
        assert refused.value.status == 421
    Names(any_host=True).check_host(authority)


def test_server_answers_to_the_names_of_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "Pump7.plant.example")
    monkeypatch.setattr(socket, "getfqdn", lambda name: name)
    own_names.cache_clear()
    try:
        for host in ("pump7.plant.example", "pump7", "PUMP7.local"):
            Names().check_host(parse_authority(host))
        with pytest.raises(Refusal):
            Names().check_host(parse_authority("plant.example"))
    finally:
        own_names.cache_clear()


@pytest.mark.parametrize(
    ("lines", "version", "expected"),
    [
        (b"Expect: 100-Continue\r\n", "HTTP/1.1", None),
        (b"Expect: 100-continue\r\nExpect: 100-continue\r\n", "HTTP/1.1", None),
        (b"Expect:\r\n", "HTTP/1.1", None),
        (b"Expect: 100-continue, a-miracle\r\n", "HTTP/1.1", 417),
        (b"Expect: a-miracle\r\n", "HTTP/1.0", None),
    ],
)
def test_only_100_continue_may_be_expected(lines: bytes, version: str, expected: int | None) -> None:
    request = parse(get(lines=HOST + lines, version=version))
    if expected is None:
        headers.check_expect(request.version, request.headers)
    else:
        with pytest.raises(Refusal) as refused:
            headers.check_expect(request.version, request.headers)
        assert refused.value.status == expected


def test_app_with_a_scheme_of_its_own_is_another_origin() -> None:
    """An app chooses the host of its pages itself."""
    request = parse(get(lines=b"Host: localhost\r\nOrigin: capacitor://localhost\r\n"))
    with pytest.raises(Refusal, match="--allow_origin"):
        Names().check_origin(request)
    Names(origins=["capacitor://localhost"]).check_origin(request)


@pytest.mark.parametrize(
    ("origin", "admitted"),
    [
        ("http://localhost:6660", True),
        ("HTTP://LOCALHOST:6660", True),
        ("https://tools.example", True),
        ("https://tools.example:443", True),
        ("file://", True),
        ("http://localhost", False),
        ("http://tools.example", False),
        ("https://tools.example:8443", False),
        ("null", False),
        ("", False),
    ],
)
def test_origin_is_the_server_or_an_admitted_page(origin: str, admitted: bool) -> None:
    names = Names(origins=["https://Tools.example", "file://"])
    request = parse(get(lines=HOST + b"Origin: " + origin.encode() + b"\r\n"))
    if admitted:
        names.check_origin(request)
    else:
        with pytest.raises(Refusal, match="a client that is not a web page should send no Origin") as refused:
            names.check_origin(request)
        assert refused.value.status == 403


@pytest.mark.parametrize(
    ("host", "text"),
    [
        ("ringo-svc:6660", "unknown host name 'ringo-svc': connect to an IP address or localhost, or start the server "
         "with --allow_host ringo-svc"),
        ("", "the Host header is empty: send the server's IP address, localhost, or a name given with --allow_host"),
        ("a;b", "unknown host name 'a;b': connect to an IP address or localhost, or start the server "
         "with --allow_host"),
        ("x" * 200, f"unknown host name '{'x' * 100}': connect to an IP address or localhost, or start the server "
         "with --allow_host"),
    ],
)  # fmt: skip
def test_unknown_host_is_told_the_flag_with_its_value(host: str, text: str) -> None:
    with pytest.raises(Refusal) as refused:
        Names().check_host(parse_authority(host))
    assert (refused.value.status, str(refused.value)) == (421, text)


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        (b"Content-Type: text/html", "send decimal integers as text/plain or application/json, or as bytes, 4 or 8 "
         "each, big-endian, as application/octet-stream; see docs/protocol.md"),
        (b"Content-Encoding: gzip", "send the body uncompressed"),
    ],
)  # fmt: skip
def test_415_says_how_to_send_integers(line: bytes, remedy: str) -> None:
    with pytest.raises(Refusal, match=f"is not supported: {remedy}$") as refused:
        headers.body_type(parse(get(lines=HOST + line + b"\r\n")).headers)
    assert refused.value.status == 415


MALFORMED = "expected SCHEME://HOST[:PORT] without a path or a final slash"


@pytest.mark.parametrize(
    ("origin", "text"),
    [
        ("http://localhost:8080", "Origin 'http://localhost:8080' does not match Host 'localhost:6660': "
         "start the server with --allow_origin http://localhost:8080"),
        ("null", "Origin 'null' does not match Host 'localhost:6660': start the server with --allow_origin null"),
        ("http://[::1]:1", "Origin 'http://[::1]:1' does not match Host 'localhost:6660': "
         "start the server with --allow_origin http://[::1]:1"),
        ("http://localhost:6660/", f"malformed Origin 'http://localhost:6660/': {MALFORMED}"),
        ("localhost:6660", f"malformed Origin 'localhost:6660': {MALFORMED}"),
        ("http://a;rm", f"malformed Origin 'http://a;rm': {MALFORMED}"),
        ("", f"malformed Origin '': {MALFORMED}"),
        ("http://me:password@a", f"malformed Origin: {MALFORMED}"),
        ("http://a?token=x", f"malformed Origin: {MALFORMED}"),
        ("http://a/#x", f"malformed Origin: {MALFORMED}"),
    ],
)  # fmt: skip
def test_foreign_origin_is_told_the_flag_with_its_value(origin: str, text: str) -> None:
    request = parse(get(lines=HOST + b"Origin: " + origin.encode() + b"\r\n"))
    with pytest.raises(Refusal) as refused:
        Names().check_origin(request)
    advice = "; a client that is not a web page should send no Origin"
    assert (refused.value.status, str(refused.value)) == (403, text + advice)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (b"Content-Encoding: gzip\r\n", 415),
        (b"Content-Encoding: identity, br\r\n", 415),
        (b"Content-Encoding: identity\r\n", None),
        (b"Content-Type: application/octet-stream\r\nContent-Type: text/plain\r\n", 400),
        (b"Content-Type:\r\n", None),
        (b"Content-Type: ; charset=x\r\n", None),
        (b"Content-Type: Application/Octet-Stream; a=b\r\n", None),
        (b"Content-Type: Text/Plain;charset=utf-8\r\n", None),
        (b"Content-Type: application/x-ndjson\r\n", None),
        (b"Content-Type: text/html\r\n", 415),
        (b"Content-Type: multipart/form-data; boundary=x\r\n", 415),
    ],
)
def test_body_type_is_checked(lines: bytes, expected: int | None) -> None:
    fields = parse(get(lines=HOST + lines)).headers
    if expected is None:
        headers.body_type(fields)
        return
    with pytest.raises(Refusal) as refused:
        headers.body_type(fields)
    assert refused.value.status == expected
    assert expected != 415 or b"Encoding" not in lines or refused.value.headers == {"Accept-Encoding": "identity"}


@pytest.mark.parametrize(
    ("accept", "admitted"),
    [
        ('text/html;a="x,application/json"', False),
        ('application/json;a="x,y;q=0";q=0.5', True),
        ('text/html;a="q\\"",application/json', True),
        ('application/json;q="0"', False),
        ('"', False),
    ],
)
def test_quoted_strings_in_accept_are_understood(accept: str, admitted: bool) -> None:
    fields = parse(get(lines=HOST + f"Accept: {accept}\r\n".encode())).headers
    if admitted:
        headers.check_accept(fields)
    else:
        with pytest.raises(Refusal):
            headers.check_accept(fields)


@pytest.mark.parametrize(
    ("lines", "matches"),
    [
        (b"If-None-Match: *\r\n", True),
        (b'If-None-Match: "a"\r\nIf-None-Match: "b", "tag"\r\n', True),
        (b'If-None-Match: W/"tag"\r\n', True),
        (b'If-None-Match: "a tag"\r\n', False),
        (b"", False),
    ],
)
def test_entity_tags_are_found_in_all_lines(lines: bytes, matches: bool) -> None:
    assert headers.lists_tag(parse(get(lines=HOST + lines)).headers, "if-none-match", '"tag"') is matches
