"""The TLS socket against OpenSSL's own, and TLS contexts from good and bad files."""

import random
import select
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.certificates import Authority, Pair
from support.harness import (
    DEADLINE,
    Blocked,
    seeded,
)

from ringolib.net.credentials import CredentialFiles, Credentials
from ringolib.net.tls import CredentialFileError, client_context, server_context, validity
from ringolib.net.tls_socket import NotTLS, TLSError, TLSSocket


@pytest.fixture
def ends(authority: Authority, pair: Pair) -> Iterator[tuple[TLSSocket, TLSSocket]]:
    """A client and a server, connected."""
    client_sock, server_sock = socket.socketpair()
    with client_sock, server_sock:
        server = TLSSocket(server_sock, server_context(str(pair.cert), str(pair.key), None))
        handshake = Blocked(server.handshake)
        client = TLSSocket(client_sock, client_context(str(authority.ca)), "localhost")
        client.handshake()
        handshake.result()
        yield client, server


# The socket.


def test_pieces_of_any_size_arrive_in_order(ends: tuple[TLSSocket, TLSSocket]) -> None:
    client, server = ends
    rng = random.Random(seeded())
    sent = [rng.randbytes(rng.choice((1, 100, 16_384, 16_385, 300_000))) for _ in range(40)]

    def send() -> None:
        for piece in sent:
            client.sendall(piece)
        client.shutdown(socket.SHUT_WR)

    sending = Blocked(send)
    received = bytearray()
    server.settimeout(DEADLINE)
    while data := server.recv(rng.choice((1, 1000, 100_000))):
        received += data
    sending.result()
    assert bytes(received) == b"".join(sent)


def test_recv_returns_rest_of_decrypted_record(ends: tuple[TLSSocket, TLSSocket]) -> None:
    """A record is decrypted as a whole. Poll does not report the rest of it."""
    client, server = ends
    client.sendall(b"0123456789")
    server.settimeout(DEADLINE)
    assert server.recv(4) == b"0123" and server.recv(4) == b"4567" and server.recv(4) == b"89"
    with pytest.raises(BlockingIOError):
        server.recv(4, socket.MSG_DONTWAIT)


def test_recv_without_waiting_raises_until_poll_reports_data(
    ends: tuple[TLSSocket, TLSSocket],
) -> None:
    client, server = ends
    with pytest.raises(BlockingIOError):
        server.recv(1, socket.MSG_DONTWAIT)
    poll = select.poll()
    poll.register(server, select.POLLIN)
    client.sendall(b"x")
    assert poll.poll(DEADLINE * 1000) and server.recv(9, socket.MSG_DONTWAIT) == b"x"


def test_timeout_is_a_deadline_for_the_whole_call(authority: Authority, pair: Pair) -> None:
    """A record that arrives byte by byte must not block its reader for ever."""
    client_sock, server_sock = socket.socketpair()
    with client_sock, server_sock:
        server = TLSSocket(server_sock, server_context(str(pair.cert), str(pair.key), None))
        handshake = Blocked(server.handshake)
        context = client_context(str(authority.ca))
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
        while True:
            try:
                client.do_handshake()
                break
            except ssl.SSLWantReadError:
                client_sock.sendall(outgoing.read())
                incoming.write(client_sock.recv(65536))
        client_sock.sendall(outgoing.read())
        handshake.result()
        client.write(b"x" * 1000)
        record = outgoing.read()
        server.settimeout(0.3)
        reading = Blocked(lambda: server.recv(1000))
        for byte in record[:-1]:
            if not reading.still(0.02):
                break
            client_sock.sendall(bytes([byte]))
        with pytest.raises(TimeoutError):
            reading.result(1)


def test_flood_of_tls_messages_without_data_ends_recv(pair: Pair) -> None:
    """A real peer could send 40,000 key updates a second. Python's `ssl` cannot send them, so the socket is a fake."""

    class Flood(socket.socket):
        until = 0.0

        def recv(self, size: int, flags: int = 0) -> bytes:
            assert time.monotonic() < self.until, "recv does not end"
            return b"x"

    class NoData:
        def read(self, size: int) -> bytes:
            raise ssl.SSLWantReadError

    with Flood() as sock:
        server = TLSSocket(sock, server_context(str(pair.cert), str(pair.key), None))
        server._tls = NoData()  # type: ignore[assignment]
        sock.until = time.monotonic() + 5
        with pytest.raises(BlockingIOError):
            server.recv(1, socket.MSG_DONTWAIT)
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.recv(1)


def test_send_without_waiting_sends_each_byte_once(ends: tuple[TLSSocket, TLSSocket]) -> None:
    """Bytes that `send` did not report as sent are given to it again, with more bytes behind them."""
    client, server = ends
    data = random.Random(seeded()).randbytes(3_000_000)
    unsent, sent = data[:2_000_000], 0
    more = data[2_000_000:]
    received = bytearray()
    server.settimeout(DEADLINE)
    while unsent or more:
        try:
            count = client.send(unsent, socket.MSG_DONTWAIT)
            unsent, sent = unsent[count:], sent + count
        except BlockingIOError:
            unsent, more = unsent + more[:1000], more[1000:]  # longer than in the first call, as acks queue up
            received += server.recv(50_000)
        if not unsent:
            unsent, more = more, b""
    client.shutdown(socket.SHUT_WR)
    while chunk := server.recv(1 << 20):
        received += chunk
    assert sent == len(data) and bytes(received) == data


def test_sendall_has_a_deadline(ends: tuple[TLSSocket, TLSSocket]) -> None:
    client, _ = ends
    client.settimeout(0.2)
    with pytest.raises(TimeoutError):
        client.sendall(bytes(50_000_000))


def test_shutdown_by_another_thread_ends_reads_and_leaks_nothing(
    ends: tuple[TLSSocket, TLSSocket],
) -> None:
    client, server = ends
    server.settimeout(None)
    reading = Blocked(lambda: server.recv(1))
    assert reading.still()
    server.shutdown(socket.SHUT_RDWR)
    assert reading.result() == b""
    with pytest.raises(OSError):
        server.sendall(b"secret")
    raw = client._sock
    raw.settimeout(DEADLINE)
    leaked = b""
    while data := raw.recv(65536):
        leaked += data
    assert b"secret" not in leaked


def test_stream_without_close_notify_ends(ends: tuple[TLSSocket, TLSSocket]) -> None:
    client, server = ends
    client.sendall(b"last words")
    client._sock.shutdown(socket.SHUT_WR)  # without TLS's close_notify
    server.settimeout(DEADLINE)
    assert server.recv(100) == b"last words" and server.recv(100) == b"" and server.recv(100) == b""


def test_forged_record_is_an_error(ends: tuple[TLSSocket, TLSSocket]) -> None:
    client, server = ends
    client._sock.send(b"\x17\x03\x03\x00\x20" + bytes(32))
    server.settimeout(DEADLINE)
    with pytest.raises(TLSError):
        server.recv(1)


@pytest.mark.parametrize(("first", "http"), [(b"GET / HTTP/1.1\r\n\r\n", True), (b"SSH-2.0-x\r\n", False)])
def test_handshake_recognises_http_and_other_protocols(pair: Pair, first: bytes, http: bool) -> None:
    client_sock, server_sock = socket.socketpair()
    with client_sock, server_sock:
        client_sock.sendall(first)
        with pytest.raises(NotTLS) as refused:
            TLSSocket(server_sock, server_context(str(pair.cert), str(pair.key), None)).handshake()
        assert refused.value.http is http


# Certificate files.


def test_error_of_bad_file_is_one_line_with_its_name(authority: Authority, pair: Pair, tmp_path: Path) -> None:
    garbage, absent, other = tmp_path / "garbage", tmp_path / "absent", authority.issue()
    garbage.write_text("no certificate")
    locked = tmp_path / "locked.key"
    subprocess.run(
        ["openssl", "ec", "-in", str(pair.key), "-aes128", "-passout", "pass:x", "-out", str(locked)],
        check=True,
        capture_output=True,
    )
    cert, key = map(str, pair)
    for files, reason in (
        ((str(absent), key), f"{absent}: No such file"),
        ((cert, str(absent)), f"{absent}: No such file"),
        ((str(garbage), key), f"{garbage}, {key}: not a PEM certificate and private key"),
        ((cert, str(other.key)), f"{other.key}: the key does not belong to the certificate in {cert}"),
        ((cert, str(locked)), f"{locked}: the private key is encrypted"),
        ((str(tmp_path), key), f"{tmp_path}: Is a directory"),
    ):
        with pytest.raises(CredentialFileError) as refused:
            server_context(*files, None)
        assert str(refused.value).startswith(reason) and "\n" not in str(refused.value)
    with pytest.raises(CredentialFileError, match="not a PEM file of CA certificates"):
        server_context(cert, key, str(garbage))
    with pytest.raises(CredentialFileError, match="not a PEM file of CA certificates"):
        client_context(str(garbage))


def test_key_and_certificate_may_be_in_one_file(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(CredentialFileError, match="the file has no private key: name the key's file"):
        server_context(str(pair.cert), None, None)
    both = tmp_path / "both.pem"
    both.write_bytes(pair.key.read_bytes() + pair.cert.read_bytes())
    server_context(str(both), None, None)


def test_certificate_problem_reports_expiry(authority: Authority, pair: Pair) -> None:
    for problem, days in (("", 30), ("it expires soon, at 20", 13), ("it expired at 20", -1)):
        issued = authority.issue(days=days)
        credentials = Credentials(CredentialFiles(cert=str(issued.cert), key=str(issued.key)))
        reported = credentials.certificate_problem() or ""
        assert reported.startswith(problem) and bool(reported) == bool(problem)
        assert credentials.current.valid
        begins, ends = credentials.current.valid
        assert abs(ends - time.time() - days * 86_400) < 600 and begins < ends


def test_validity_is_unknown_while_file_is_being_replaced(pair: Pair, tmp_path: Path) -> None:
    """An error here would end a server that reads its files again."""
    (tmp_path / "half").write_bytes(pair.cert.read_bytes()[:100])
    for path in (tmp_path / "absent", tmp_path / "half"):
        assert validity(server_context(str(pair.cert), str(pair.key), None), str(path)) is None
