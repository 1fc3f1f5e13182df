"""The client's handshake: which answers of a server open a WebSocket, and what the error says about all others."""

import base64
import hashlib
import re
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

import pytest
from support.fake_consumer import GUID
from support.harness import Blocked, eventually

from ringolib.net import websocket, websocket_client
from ringolib.net.addresses import Endpoint
from ringolib.net.frames import Messages
from ringolib.net.websocket import HandshakeError
from ringolib.net.websocket_client import ClientConnection
from ringolib.wire import SUBPROTOCOL

HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\n\r\n"
FRAME = b"\x82\x01x"
Answer = Callable[[socket.socket, bytes], None]
"""Answers a handshake on the socket; its second argument is the 101 that accepts it."""


def accepting_head(request: bytes) -> bytes:
    """Return the 101 for a handshake."""
    (key,) = re.findall(rb"Sec-WebSocket-Key: (\S+)", request)
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: %b\r\nSec-WebSocket-Protocol: %b\r\n\r\n"
        % (base64.b64encode(hashlib.sha1(key + GUID).digest()), SUBPROTOCOL.encode())
    )


@contextmanager
def connecting(answer: Answer, name: str = "127.0.0.1") -> Iterator[tuple[Blocked, list[bytes]]]:
    """Connect to a server that gives this answer; yields the connecting call, and the requests that arrived."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = Endpoint("127.0.0.1", listener.getsockname()[1], name)
        call = Blocked(lambda: ClientConnection(endpoint, "/", SUBPROTOCOL))
        peer, _ = listener.accept()
        requests = [b""]
        with peer:
            while b"\r\n\r\n" not in requests[0]:
                requests[0] += peer.recv(65536)
            answer(peer, accepting_head(requests[0]))
            yield call, requests


def refusal(answer: Answer) -> HandshakeError:
    """Return the error for this answer."""
    with connecting(answer) as (call, _), pytest.raises(HandshakeError) as error:
        call.result()
    return error.value


@pytest.mark.parametrize(
    "interim",
    [
        HINTS,
        HINTS * 5,
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 102 Processing\r\n\r\n",
        b"HTTP/1.1 199 Odd\r\nConnection: close\r\n\r\n",
        HINTS[:-2] + b"Link: </%b>\r\n\r\n" % (b"x" * 100_000),
    ],
    ids=["103", "103 five times", "100", "102", "199", "103 of 100 KB"],
)
@pytest.mark.parametrize("together", [True, False])
def test_interim_answers_before_the_101_are_skipped(interim: bytes, together: bool) -> None:
    def answer(peer: socket.socket, head: bytes) -> None:
        if together:
            peer.sendall(interim + head + FRAME)
        else:
            for i in range(0, len(interim), 5000):
                peer.sendall(interim[i : i + 5000])
            for byte in head + FRAME:
                peer.sendall(bytes([byte]))

    with connecting(answer) as (call, _):
        connection = call.result()
        connection.sock.setblocking(False)
        assert eventually(lambda: connection.parse(connection.read(wait=False) or b"")) == [Messages(b"x", 1)]
        connection.sock.close()


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (b"Sec-WebSocket-Accept: ", b"Sec-WebSocket-Accept: x", "Sec-WebSocket-Accept is wrong"),
        (b"Sec-WebSocket-Accept", b"X-Other", "Sec-WebSocket-Accept is wrong"),
        (b"Upgrade: websocket", b"Upgrade: h2c", "it switches to another protocol"),
        (b"Connection: Upgrade", b"Connection: keep-alive", "its answer has no Connection: Upgrade"),
        (b"Connection", b"Sec-WebSocket-Extensions: permessage-deflate\r\nConnection", "an extension that was not"),
        (SUBPROTOCOL.encode(), b"ringoexp.plain.v1", f"does not speak {SUBPROTOCOL}"),
        (b"Sec-WebSocket-Protocol", b"X-Other", f"does not speak {SUBPROTOCOL}"),
    ],
)
def test_101_that_does_not_answer_our_request_is_refused(before: bytes, after: bytes, message: str) -> None:
    def answer(peer: socket.socket, head: bytes) -> None:
        assert before in head
        peer.sendall(head.replace(before, after, 1))

    assert message in str(refusal(answer))


def test_slow_handshake_leaves_the_socket_its_usual_timeout() -> None:
    def answer(peer: socket.socket, head: bytes) -> None:
        assert not select.select([peer], [], [], 0.3)[0]
        peer.sendall(head)

    with connecting(answer) as (call, _):
        connection = call.result()
        assert connection.sock.gettimeout() == websocket_client.CONNECT_TIMEOUT
        connection.sock.close()


def test_header_names_and_tokens_may_have_any_case() -> None:
    def answer(peer: socket.socket, head: bytes) -> None:
        lines = [b"UPGRADE: WebSocket", b"connection: keep-alive, upGRADE", b"x-ringoexp-store: s"]
        lines += [line for line in head.split(b"\r\n")[1:-2] if line.startswith(b"Sec")]
        peer.sendall(b"HTTP/1.1 101 \r\n" + b"\r\n".join(lines) + b"\r\n\r\n")

    with connecting(answer) as (call, _):
        connection = call.result()
        assert connection.store == "s"
        connection.sock.close()


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (421, b'{"error": "evil.example is not a name of this server: --allow_host adds it"}',
         ": evil.example is not a name of this server: --allow_host adds it"),
        (401, b'{"error": "wrong token"}',
         ": wrong token"),
        (401, b"", ": the token is missing or wrong (--token_file, or RINGOEXP_TOKEN)"),
        (400, b'{"error": "bad header"}', ": bad header"),
        (400, b"<html>Bad Request</html>", ": it may require TLS (--consumer_tls, send: wss://)"),
        (403, b"<html>Forbidden</html>", ": this may be a proxy in between"),
        (404, b"", ": is that the /v1.0/ingest of a ringoexp?"),
        (400, b'{"error": 7}', ": it may require TLS (--consumer_tls, send: wss://)"),
        (503, b'{"error": "no\\u001b[2J\\nroom"}', r": no\x1b[2J\nroom"),
        (503, b'{"error": "%b"}' % (b"x" * 1000), ": " + "x" * websocket.MAX_REASON_CHARACTERS),
        (503, b"[" * 100_000, ""),
        (503, b"\xff", ""),
        (302, b"[]", ": is that the /v1.0/ingest of a ringoexp?"),
    ],
)  # fmt: skip
def test_refusal_gives_the_reason_that_the_server_gives(status: int, body: bytes, reason: str) -> None:
    def answer(peer: socket.socket, head: bytes) -> None:
        peer.sendall(HINTS + b"HTTP/1.1 %d No\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body))

    error = refusal(answer)
    assert (error.status, str(error)) == (status, f"refused with HTTP status {status}{reason}")


@pytest.mark.parametrize(
    "start",
    [b"", b"HTTP/1.1 101 Switching", HINTS, b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"],
)
def test_server_that_does_not_finish_its_answer_is_given_up(start: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "HANDSHAKE_TIMEOUT", 0.2)
    started = monotonic()
    error = refusal(lambda peer, head: peer.sendall(start))
    assert "did not finish the handshake" in str(error) and monotonic() - started < 5


def test_refusal_whose_body_does_not_come_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "HANDSHAKE_TIMEOUT", 0.2)
    error = refusal(lambda peer, head: peer.sendall(b"HTTP/1.1 403 No\r\nContent-Length: 9\r\n\r\n{"))
    assert (error.status, str(error)) == (403, "refused with HTTP status 403: this may be a proxy in between")


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-OpenSSH_9.2\r\n", HINTS])
def test_server_that_closes_instead_of_an_answer_is_an_error(answer: bytes) -> None:
    def answer_and_close(peer: socket.socket, head: bytes) -> None:
        peer.sendall(answer)
        peer.shutdown(socket.SHUT_WR)

    with connecting(answer_and_close) as (call, _), pytest.raises((HandshakeError, OSError), match="before it|is not"):
        call.result()


@pytest.mark.parametrize(
    ("name", "host"),
    [
        ("example.com", b"example.com"),
        ("127.0.0.1", b"127.0.0.1"),
        ("::1", b"[::1]"),
        ("fe80::1%eth0", b"[fe80::1]"),
        ("fe80::1%25eth0", b"[fe80::1]"),
        ("b\xfccher.example", b"xn--bcher-kva.example"),
        ("unix:/run/x.sock", b"localhost"),
    ],
)
def test_host_header_is_the_name_without_the_zone(name: str, host: bytes) -> None:
    with connecting(lambda peer, head: peer.sendall(head), name) as (call, (request,)):
        call.result().sock.close()
    (value,) = re.findall(rb"(?i)\r\nhost: (.*)\r\n", request)
    assert re.sub(rb":\d+$", b"", value) == host
