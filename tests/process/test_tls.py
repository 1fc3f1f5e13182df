"""TLS: the socket against OpenSSL's own, servers and links over it, and what goes wrong in a handshake."""

import datetime
import http.client
import json
import os
import random
import re
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import uuid
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.certificates import Authority, Pair, tls
from support.fake_consumer import answer_handshake
from support.harness import (
    DEADLINE,
    ROOT,
    Blocked,
    RawClient,
    ServerProcess,
    eventually,
    free_port,
    in_order,
    not_ready,
    rows,
    seeded,
    server,
)
from websockets.sync.client import connect

from ringolib.client.producer import Producer, ProducerError
from ringolib.forward.link import LinkSink
from ringolib.forward.sink import SinkError
from ringolib.net import tls as room
from ringolib.net.credentials import CredentialFiles, Credentials
from ringolib.net.tls import client_context, server_context
from ringolib.net.tls_socket import NotTLS, TLSError, TLSSocket
from ringolib.wire import Block, Run


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def pair(authority: Authority) -> Pair:
    return authority.issue()


@pytest.fixture
def ends(authority: Authority, pair: Pair) -> Iterator[tuple[TLSSocket, TLSSocket]]:
    """Client and server, connected."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        server_end = TLSSocket(theirs, server_context(str(pair.cert), str(pair.key), None))
        shaking = Blocked(server_end.handshake)
        client_end = TLSSocket(ours, client_context(str(authority.ca)), "localhost")
        client_end.handshake()
        shaking.result()
        yield client_end, server_end


def secure(port: int, ca: Path, pair: Pair | None = None) -> ssl.SSLSocket:
    """A TLS connection by Python's own socket."""
    context = client_context(str(ca), *(map(str, pair) if pair else ()))
    return context.wrap_socket(socket.create_connection(("localhost", port), DEADLINE), server_hostname="localhost")


def get(port: int, path: str, ca: Path, **headers: str) -> tuple[int, bytes]:
    """Status and body of a GET over TLS."""
    connection = http.client.HTTPSConnection("localhost", port, timeout=DEADLINE, context=client_context(str(ca)))
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def log_of(running: ServerProcess) -> str:
    return running.errors.read_text()


# The socket.


def test_what_one_end_sends_the_other_gets_in_order_whatever_the_sizes(ends: tuple[TLSSocket, TLSSocket]) -> None:
    client, other = ends
    rng = random.Random(seeded())
    sent = [rng.randbytes(rng.choice((1, 100, 16_384, 16_385, 300_000))) for _ in range(40)]

    def send() -> None:
        for piece in sent:
            client.sendall(piece)
        client.shutdown(socket.SHUT_WR)

    sending = Blocked(send)
    got = bytearray()
    other.settimeout(DEADLINE)
    while data := other.recv(rng.choice((1, 1000, 100_000))):
        got += data
    sending.result()
    assert bytes(got) == b"".join(sent)


def test_what_was_decrypted_is_given_out_though_nothing_more_comes(ends: tuple[TLSSocket, TLSSocket]) -> None:
    """A record is decrypted whole: the rest of it is no longer seen by poll."""
    client, other = ends
    client.sendall(b"0123456789")
    other.settimeout(DEADLINE)
    assert other.recv(4) == b"0123" and other.recv(4) == b"4567" and other.recv(4) == b"89"
    with pytest.raises(BlockingIOError):
        other.recv(4, socket.MSG_DONTWAIT)


def test_recv_without_waiting_says_that_there_is_nothing_and_poll_tells_when_there_is(
    ends: tuple[TLSSocket, TLSSocket],
) -> None:
    client, other = ends
    with pytest.raises(BlockingIOError):
        other.recv(1, socket.MSG_DONTWAIT)
    poll = select.poll()
    poll.register(other, select.POLLIN)
    client.sendall(b"x")
    assert poll.poll(DEADLINE * 1000) and other.recv(9, socket.MSG_DONTWAIT) == b"x"


def test_a_timeout_is_a_deadline_for_all_of_it_not_for_each_piece(authority: Authority, pair: Pair) -> None:
    """A record that comes a byte at a time must not keep its reader for ever."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        other = TLSSocket(theirs, server_context(str(pair.cert), str(pair.key), None))
        shaking = Blocked(other.handshake)
        context = client_context(str(authority.ca))
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
        while True:
            try:
                client.do_handshake()
                break
            except ssl.SSLWantReadError:
                ours.sendall(outgoing.read())
                incoming.write(ours.recv(65536))
        ours.sendall(outgoing.read())
        shaking.result()
        client.write(b"x" * 1000)
        record = outgoing.read()
        other.settimeout(0.3)
        reading = Blocked(lambda: other.recv(1000))
        for byte in record[:-1]:
            if not reading.still(0.02):
                break
            ours.sendall(bytes([byte]))
        with pytest.raises(TimeoutError):
            reading.result(1)


def test_a_flood_of_what_is_tlss_own_keeps_nobody_reading(pair: Pair) -> None:
    """Key updates, say, 40,000 a second: they hold no data, and `ssl` cannot make them."""

    class Flood(socket.socket):
        until = 0.0

        def recv(self, size: int, flags: int = 0) -> bytes:
            assert time.monotonic() < self.until, "still reading"
            return b"x"

    class NoData:
        def read(self, size: int) -> bytes:
            raise ssl.SSLWantReadError

    with Flood() as sock:
        other = TLSSocket(sock, server_context(str(pair.cert), str(pair.key), None))
        other._tls = NoData()  # type: ignore[assignment]
        sock.until = time.monotonic() + 5
        with pytest.raises(BlockingIOError):
            other.recv(1, socket.MSG_DONTWAIT)
        other.settimeout(0.2)
        with pytest.raises(TimeoutError):
            other.recv(1)


def test_what_does_not_leave_at_once_leaves_later_and_once(ends: tuple[TLSSocket, TLSSocket]) -> None:
    """`send` without waiting: what it does not report as sent is given to it again, first, and more may follow it."""
    client, other = ends
    data = random.Random(seeded()).randbytes(3_000_000)
    unsent, took = data[:2_000_000], 0
    more = data[2_000_000:]
    got = bytearray()
    other.settimeout(DEADLINE)
    while unsent or more:
        try:
            count = client.send(unsent, socket.MSG_DONTWAIT)
            unsent, took = unsent[count:], took + count
        except BlockingIOError:
            unsent, more = unsent + more[:1000], more[1000:]  # longer than before, as acks queue up
            got += other.recv(50_000)
        if not unsent:
            unsent, more = more, b""
    client.shutdown(socket.SHUT_WR)
    while chunk := other.recv(1 << 20):
        got += chunk
    assert took == len(data) and bytes(got) == data


def test_a_send_has_a_deadline(ends: tuple[TLSSocket, TLSSocket]) -> None:
    client, _ = ends
    client.settimeout(0.2)
    with pytest.raises(TimeoutError):
        client.sendall(bytes(50_000_000))


def test_another_threads_shutdown_ends_reading_and_writing_and_nothing_leaves_unencrypted(
    ends: tuple[TLSSocket, TLSSocket],
) -> None:
    client, other = ends
    other.settimeout(None)
    reading = Blocked(lambda: other.recv(1))
    assert reading.still()
    other.shutdown(socket.SHUT_RDWR)
    assert reading.result() == b""
    with pytest.raises(OSError):
        other.sendall(b"secret")
    raw = client._sock
    raw.settimeout(DEADLINE)
    leaked = b""
    while data := raw.recv(65536):
        leaked += data
    assert b"secret" not in leaked


def test_a_stream_that_is_cut_off_ends(ends: tuple[TLSSocket, TLSSocket]) -> None:
    client, other = ends
    client.sendall(b"last words")
    client._sock.shutdown(socket.SHUT_WR)  # no goodbye of TLS's
    other.settimeout(DEADLINE)
    assert other.recv(100) == b"last words" and other.recv(100) == b"" and other.recv(100) == b""


def test_what_was_changed_on_the_way_is_an_error(ends: tuple[TLSSocket, TLSSocket]) -> None:
    client, other = ends
    client._sock.send(b"\x17\x03\x03\x00\x20" + bytes(32))
    other.settimeout(DEADLINE)
    with pytest.raises(TLSError):
        other.recv(1)


@pytest.mark.parametrize(("first", "http"), [(b"GET / HTTP/1.1\r\n\r\n", True), (b"SSH-2.0-x\r\n", False)])
def test_what_is_no_tls_is_told_from_what_is(pair: Pair, first: bytes, http: bool) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(first)
        with pytest.raises(NotTLS) as refused:
            TLSSocket(theirs, server_context(str(pair.cert), str(pair.key), None)).handshake()
        assert refused.value.http is http


# CredentialFiles.


def test_bad_files_are_said_in_one_line_with_their_name(authority: Authority, pair: Pair, tmp_path: Path) -> None:
    garbage, absent, other = tmp_path / "garbage", tmp_path / "absent", authority.issue()
    garbage.write_text("no certificate")
    locked = tmp_path / "locked.key"
    subprocess.run(
        ["openssl", "ec", "-in", str(pair.key), "-aes128", "-passout", "pass:x", "-out", str(locked)],
        check=True,
        capture_output=True,
    )
    cert, key = map(str, pair)
    for files, said in (
        ((str(absent), key), f"{absent}: No such file"),
        ((cert, str(absent)), f"{absent}: No such file"),
        ((str(garbage), key), f"{garbage}, {key}: no certificate and key in PEM"),
        ((cert, str(other.key)), f"{other.key}: the key does not belong to the certificate in {cert}"),
        ((cert, str(locked)), f"{locked}: the key is encrypted"),
        ((str(tmp_path), key), f"{tmp_path}: Is a directory"),
    ):
        with pytest.raises(room.CredentialFileError) as refused:
            server_context(*files, None)
        assert str(refused.value).startswith(said) and "\n" not in str(refused.value)
    with pytest.raises(room.CredentialFileError, match="no certificates of authorities"):
        server_context(cert, key, str(garbage))
    with pytest.raises(room.CredentialFileError, match="no certificates of authorities"):
        client_context(str(garbage))


def test_key_and_certificate_may_be_in_one_file(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(room.CredentialFileError, match="there is no key in it: name the key's file too"):
        server_context(str(pair.cert), None, None)
    both = tmp_path / "both.pem"
    both.write_bytes(pair.key.read_bytes() + pair.cert.read_bytes())
    server_context(str(both), None, None)


def test_a_certificate_out_of_its_time_is_noticed(authority: Authority, pair: Pair) -> None:
    for found, days in ((None, 30), ("it expires soon", 13), ("it has expired", -1)):
        each = authority.issue(days=days)
        keys = Credentials(CredentialFiles(cert=str(each.cert), key=str(each.key)))
        assert (keys.trouble() or "").startswith(found or "") and bool(keys.trouble()) == bool(found)
        assert keys.keys.valid
        begins, ends = keys.keys.valid
        assert abs(ends - time.time() - days * 86_400) < 600 and begins < ends


def test_a_certificate_that_is_replaced_while_it_is_looked_at_does_no_harm(pair: Pair, tmp_path: Path) -> None:
    """The server that reads it again would end."""
    (tmp_path / "half").write_bytes(pair.cert.read_bytes()[:100])
    for path in (tmp_path / "absent", tmp_path / "half"):
        assert room.validity(server_context(str(pair.cert), str(pair.key), None), str(path)) is None


# Servers.


def test_everything_works_over_tls(authority: Authority, pair: Pair, tmp_path: Path) -> None:
    """Alive, stats, page, POST, a foreign WebSocket client, and exactly once; and a stop that drains."""
    ca = authority.ca
    with server(tmp_path, "-p", "0", "-T", "0", "-D", "a.db", *tls(pair)) as running:
        assert get(running.port, "/v1.0/alive", ca)[0] == 200
        assert json.loads(get(running.port, "/v1.0/ready", ca)[1])["ready"] is True
        assert b"<title>" in get(running.port, "/", ca)[1]
        connection = http.client.HTTPSConnection("localhost", running.port, context=client_context(str(ca)))
        connection.request("POST", "/v1.0/ingest", struct.pack(">i", 42))
        assert json.loads(connection.getresponse().read()) == {"stored": 1}
        connection.close()
        url = f"wss://localhost:{running.port}/v1.0/ingest"
        with connect(url, ssl=client_context(str(ca))) as ws:
            ws.send(struct.pack(">100q", *range(100)))
            assert ws.recv() == struct.pack(">Q", 100)
        with Producer(url, context=client_context(str(ca))) as producer:
            producer.send(range(50_000))
        assert running.stop() == 0 and running.tally.endswith("50101 stored, 0 unstored")
    assert in_order(tmp_path / "a.db", producer.source) == list(range(50_000))
    assert sorted(value for source, _, value in rows(tmp_path / "a.db") if source != str(producer.source)) == sorted(
        [42, *range(100)]
    )


def test_only_tls_1_2_and_newer(authority: Authority, pair: Pair, tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", *tls(pair)) as running:
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            context = client_context(str(authority.ca))
            context.maximum_version = context.minimum_version = version
            with context.wrap_socket(
                socket.create_connection(("localhost", running.port)), server_hostname="localhost"
            ) as sock:
                assert sock.version() == {"TLSv1_2": "TLSv1.2", "TLSv1_3": "TLSv1.3"}[version.name]
        done = subprocess.run(
            ["openssl", "s_client", "-connect", f"localhost:{running.port}", "-tls1_1"]
            + ["-cipher", "ALL:@SECLEVEL=0", "-CAfile", str(authority.ca)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=DEADLINE,
        )
        assert done.returncode != 0
        eventually(lambda: "event=tls_failed" in log_of(running))


def test_who_wants_to_renegotiate_is_told_at_once_that_it_cannot(
    authority: Authority, pair: Pair, tmp_path: Path
) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", *tls(pair)) as running:
        done = subprocess.run(
            ["openssl", "s_client", "-connect", f"localhost:{running.port}", "-tls1_2", "-CAfile", str(authority.ca)],
            input=b"R\n",
            capture_output=True,
            timeout=10,
        )
        assert b"no renegotiation" in done.stderr


def test_a_silent_client_blocks_nobody_and_is_closed(authority: Authority, pair: Pair, tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", *tls(pair), patch="net.tls_socket.HANDSHAKE_TIMEOUT = 1") as running:
        silent = [socket.create_connection(("localhost", running.port), DEADLINE) for _ in range(20)]
        silent[0].sendall(b"\x16\x03\x01\x02\x00")  # half a hello
        assert get(running.port, "/v1.0/alive", authority.ca)[0] == 200
        for sock in silent:
            with sock:
                try:
                    assert sock.recv(65536) == b""
                except ConnectionResetError:
                    pass
        assert running.stop() == 0


def test_a_stop_does_not_wait_for_handshakes(authority: Authority, pair: Pair, tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", *tls(pair), patch="net.tls_socket.HANDSHAKE_TIMEOUT = 600") as running:
        with socket.create_connection(("localhost", running.port)):
            eventually(
                lambda: json.loads(get(running.port, "/v1.0/stats", authority.ca)[1])["stats"]["connections"] == 2
            )
            assert running.stop(deadline=20) == 0


def test_http_to_a_port_with_tls_is_told_so_on_both_sides(authority: Authority, pair: Pair, tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", *tls(pair)) as running:
        status, headers, body = running.get("/v1.0/alive")
        assert status == 400 and "https://" in json.loads(body)["error"]
        assert int(headers["Content-Length"]) == len(body)
        with pytest.raises(ProducerError, match="does it want TLS"), Producer(running.url) as producer:
            producer.send([1])
        assert get(running.port, "/v1.0/alive", authority.ca)[0] == 200
        eventually(lambda: "it speaks HTTP without TLS" in log_of(running))
        stats = json.loads(get(running.port, "/v1.0/stats", authority.ca)[1])["stats"]
        assert stats["tlsFailures"] == 2
        assert b"ringoexp_tls_failures_total 2\n" in get(running.port, "/metrics", authority.ca)[1]


def test_when_the_certificate_expires_is_in_stats_and_metrics(authority: Authority, tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", *tls(authority.issue(days=10))) as running:
        ends = json.loads(get(running.port, "/v1.0/stats", authority.ca)[1])["stats"]["certificateExpires"]
        metrics = get(running.port, "/metrics", authority.ca)[1].decode()
        (seconds,) = re.findall(r"^ringoexp_certificate_expires_timestamp_seconds (\S+)$", metrics, re.MULTILINE)
        assert datetime.datetime.fromisoformat(ends.replace("Z", "+00:00")).timestamp() == float(seconds)
        assert abs(float(seconds) - time.time() - 10 * 86_400) < 600
        assert "event=certificate " in log_of(running) and "it expires soon" in log_of(running)


def test_tls_to_a_port_without_is_told_so_on_both_sides(authority: Authority, tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0") as running:
        with pytest.raises(ssl.SSLError):
            get(running.port, "/v1.0/alive", authority.ca)
        url = f"wss://localhost:{running.port}/v1.0/ingest"
        producer = Producer(url, context=client_context(str(authority.ca)))
        producer.send([1])
        eventually(lambda: producer.trouble)
        assert producer.trouble == "it does not speak TLS on this port"
        producer.close()
        assert not_ready(running) == []
        eventually(lambda: "a client sent TLS to a port without TLS" in log_of(running))


def test_stop_during_traffic_over_tls_loses_nothing_acked(authority: Authority, pair: Pair, tmp_path: Path) -> None:
    port, contexts = free_port(), client_context(str(authority.ca))
    url = f"wss://localhost:{port}/v1.0/ingest"
    producer = Producer(url, context=contexts)
    try:
        for last in (False, False, True):
            with server(tmp_path, "-p", str(port), "-T", str(port), "-D", "a.db", *tls(pair)) as running:
                before = producer.acked
                producer.send(range(producer.sent, producer.sent + 30_000))
                eventually(lambda before=before: producer.acked > before)  # type: ignore[misc]
                if last:
                    producer.flush(DEADLINE)
                assert running.stop() == 0
        assert in_order(tmp_path / "a.db", producer.source) == list(range(90_000))
    finally:
        producer.close()


# The link.


def test_a_link_over_tls_with_a_spool_and_readiness(authority: Authority, pair: Pair, tmp_path: Path) -> None:
    consumer_flags = ["-I", "false", "-D", "c.db", *tls(pair)]
    port = free_port()
    link = ["-T", str(port), "--consumer_tls", "--consumer_ca", str(authority.ca), "-S", "p.spool"]
    with server(tmp_path, "-p", "0", *link) as publisher:
        assert not_ready(publisher) == []  # the spool takes over
        with Producer(publisher.url) as producer:
            producer.send(range(1000))
        with server(tmp_path, "-p", str(port), *consumer_flags) as consumer:
            eventually(lambda: publisher.stats()["spoolDepth"] == 0)
            with Producer(publisher.url, producer.source, 1000) as more:
                more.send(range(1000, 5000))
            eventually(lambda: publisher.stats()["consumerState"] == "up")
            assert consumer.stop() == 0
    assert in_order(tmp_path / "c.db", producer.source) == list(range(5000))


def test_a_link_over_tls_is_as_good_as_any(authority: Authority, pair: Pair, tmp_path: Path) -> None:
    """A worker's link, without a spool: nothing unexpected is in either log."""
    with server(tmp_path, "-I", "false", "-p", "0", "-D", "c.db", *tls(pair)) as consumer:
        link = ["-T", str(consumer.port), "--consumer_tls", "--consumer_ca", str(authority.ca)]
        with server(tmp_path, "-p", "0", *link) as publisher:
            with Producer(publisher.url) as producer:
                producer.send(range(1000))
                producer.flush(DEADLINE)
            assert publisher.stop() == 0 and "level=error" not in log_of(publisher)
        assert consumer.stop() == 0 and "level=error" not in log_of(consumer)
    assert in_order(tmp_path / "c.db", producer.source) == list(range(1000))


def test_a_link_over_tls_to_itself_is_noticed(authority: Authority, pair: Pair) -> None:
    context = server_context(str(pair.cert), str(pair.key), None)
    credentials = Credentials(CredentialFiles(consumer_tls=True, consumer_ca=str(authority.ca)))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def serve() -> None:
            raw, _ = listener.accept()
            with context.wrap_socket(raw, server_side=True) as secured:
                answer_handshake(secured)

        serving = Blocked(serve)
        link = LinkSink("localhost", port, is_own=lambda address: address[1][1] == port, credentials=credentials)
        block = Block([Run(uuid.uuid4().bytes, 0, 1)], array("q", [1]))
        for _ in range(2):  # nor is it used the next time
            with pytest.raises(SinkError, match="that is this server itself"):
                link.store(block)
            serving.result()
            serving = Blocked(serve)


@pytest.mark.parametrize("wrong", ["expired", "name", "authority", "plain"])
def test_a_link_that_cannot_be_trusted_is_refused_with_a_reason(
    wrong: str, authority: Authority, pair: Pair, tmp_path: Path
) -> None:
    """One clear line on the publisher, which holds the records; nothing is sent; the servers keep running."""
    stranger = Authority(tmp_path, "stranger")
    certificate = {
        "expired": lambda: authority.issue(days=-1),
        "name": lambda: authority.issue("elsewhere.example"),
        "authority": lambda: stranger.issue(),
        "plain": lambda: None,
    }[wrong]()
    said = {
        "expired": "certificate has expired",
        "name": "Hostname mismatch, certificate is not valid for 'localhost'",
        "authority": "unable to get local issuer certificate",
        "plain": "it does not speak TLS on this port",
    }[wrong]
    flags = tls(certificate) if certificate else []
    with server(tmp_path, "-p", "0", "-I", "false", "-D", "c.db", *flags) as consumer:
        link = ["-T", str(consumer.port), "--consumer_tls", "--consumer_ca", str(authority.ca)]
        with server(tmp_path, "-p", "0", *link) as publisher:
            assert not_ready(publisher) == ["consumer_unreachable"]  # before any record
            with RawClient(publisher.port) as client:
                client.send(b"\x82\x84\x00\x00\x00\x00\x00\x00\x00\x2a")
                eventually(lambda: "event=link_down" in log_of(publisher))
                assert said in log_of(publisher)
                reason = publisher.stats()["consumerReason"]
                assert said in reason and reason.startswith(f"localhost:{consumer.port}: it")
                assert not_ready(publisher) == ["consumer_unreachable"]
                publisher.kill()
        if wrong != "plain":
            eventually(lambda: "event=tls_failed" in log_of(consumer))
        if wrong == "expired":
            assert "event=certificate " in log_of(consumer)
            assert "says that our certificate has expired" in log_of(consumer)
    assert rows(tmp_path / "c.db") == []


def test_a_link_without_tls_to_a_consumer_with(authority: Authority, pair: Pair, tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-I", "false", "-D", "c.db", *tls(pair)) as consumer:
        with server(tmp_path, "-p", "0", "-T", str(consumer.port)) as publisher:
            assert not_ready(publisher) == ["consumer_unreachable"]
            hint = b"answered 400: does it want TLS (wss://, --consumer_tls)?"
            eventually(lambda: hint in publisher.get("/v1.0/ready")[2], "before there is any record")
            with RawClient(publisher.port) as client:
                client.send(b"\x82\x84\x00\x00\x00\x00\x00\x00\x00\x2a")
                eventually(lambda: "does it want TLS (wss://, --consumer_tls)?" in log_of(publisher))
                publisher.kill()


def test_mutual_tls_lets_in_who_has_a_certificate(authority: Authority, pair: Pair, tmp_path: Path) -> None:
    mine = authority.issue("publisher")
    with server(
        tmp_path, "-p", "0", "-I", "false", "-D", "c.db", *tls(pair), "--client_ca", str(authority.ca)
    ) as consumer:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            get(consumer.port, "/v1.0/alive", authority.ca)
        eventually(lambda: "it has no certificate, which --client_ca asks for" in log_of(consumer))
        with secure(consumer.port, authority.ca, mine) as sock:
            sock.sendall(b"GET /v1.0/alive HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        url = f"wss://localhost:{consumer.port}/v1.0/ingest"
        command = [sys.executable, str(ROOT / "ringoexp.py"), "send", "--url", url, "--ca", str(authority.ca)]
        certificate = ["--cert", str(mine.cert), "--key", str(mine.key)]
        done = subprocess.run([*command, *certificate], input=b"1\n2\n", capture_output=True, timeout=DEADLINE)
        assert done.returncode == 0, done.stderr
        link = ["--consumer_tls", "--consumer_ca", str(authority.ca)]
        publisher_flags = ["-p", "0", "-T", str(consumer.port), *link]
        with server(tmp_path, *publisher_flags, *tls(authority.issue())) as publisher:  # has one to show
            ours = f"wss://localhost:{publisher.port}/v1.0/ingest"
            with Producer(ours, context=client_context(str(authority.ca))) as producer:
                producer.send([3])
        with server(tmp_path, *publisher_flags) as publisher:
            assert not_ready(publisher) == ["consumer_unreachable"]
            with RawClient(publisher.port) as client:
                client.send(b"\x82\x84\x00\x00\x00\x00\x00\x00\x00\x2a")
                eventually(lambda: "wants a certificate of ours" in log_of(publisher))
                publisher.kill()
    assert [value for _, _, value in rows(tmp_path / "c.db")] == [1, 2, 3]


def test_what_tls_refuses_from_the_start_ends_send_with_one_line(
    authority: Authority, pair: Pair, tmp_path: Path
) -> None:
    """It would be the same for ever: the wrong authority, no certificate to show, a server without TLS."""
    known = ["--ca", str(authority.ca)]
    want = [*tls(pair), "--client_ca", str(authority.ca)]
    for number, (server_flags, host, flags, said) in enumerate(
        (
            (tls(pair), "localhost", [], "its certificate is not accepted: "),
            (tls(pair), "127.0.0.2", known, "its certificate is not accepted: "),
            (want, "localhost", known, "it wants a certificate of ours"),
            ([], "localhost", known, "it does not speak TLS on this port"),
        )
    ):
        with server(tmp_path, "-p", "0", "-T", "0", "-H", "0.0.0.0", "-D", f"{number}.db", *server_flags) as running:
            url = f"wss://{host}:{running.port}/v1.0/ingest"
            command = [sys.executable, str(ROOT / "ringoexp.py"), "send", "--url", url, *flags]
            done = subprocess.run(command, input=b"1\n", capture_output=True, timeout=DEADLINE)
            errors = done.stderr.decode().splitlines()
            assert done.returncode == 1 and len(errors) == 2, errors
            assert errors[0].startswith(f"ringoexp send: error: {url}: {said}"), errors
            assert errors[1].startswith("ringoexp send: 0 of 1 acked; send all of it again with --source ")


def test_a_certificate_that_becomes_unacceptable_later_is_waited_out(authority: Authority, tmp_path: Path) -> None:
    mine, others = authority.issue(), Authority(tmp_path, "other").issue()
    with server(tmp_path, "-p", "0", "-T", "0", *tls(mine)) as running:
        port = running.port
        with Producer(f"wss://localhost:{port}/v1.0/ingest", context=client_context(str(authority.ca))) as producer:
            producer.send([1])
            producer.flush(DEADLINE)
            assert running.stop() == 0
            with server(tmp_path, "-p", str(port), "-T", str(port), *tls(others)):
                producer.send([2])
                eventually(lambda: "its certificate is not accepted" in (producer.trouble or ""))
            with server(tmp_path, "-p", str(port), "-T", str(port), *tls(mine)) as running:
                producer.flush(DEADLINE)
    assert [value for _, _, value in rows(tmp_path / "ringoexp.db")] == [1, 2]


# SIGHUP.


def test_sighup_takes_a_new_certificate_for_new_connections_and_keeps_the_old_one_if_it_is_bad(
    authority: Authority, tmp_path: Path
) -> None:
    def serial() -> object:
        with secure(running.port, authority.ca) as sock:
            found = sock.getpeercert()
            assert found
            return found["serialNumber"]

    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"

    def install(pair: Pair) -> None:
        cert.write_bytes(pair.cert.read_bytes())
        key.write_bytes(pair.key.read_bytes())

    install(authority.issue())
    with server(
        tmp_path, "-p", "0", "-T", "0", "-D", "a.db", "--tls_cert", str(cert), "--tls_key", str(key)
    ) as running:
        first = serial()
        with connect(f"wss://localhost:{running.port}/v1.0/ingest", ssl=client_context(str(authority.ca))) as ws:
            install(authority.issue())
            running.send_signal(signal.SIGHUP)
            eventually(lambda: "event=reloaded" in log_of(running))
            second = serial()
            assert second != first
            ws.send(struct.pack(">i", 7))  # an open connection goes on
            assert ws.recv() == struct.pack(">Q", 1)
        key.write_text("")
        running.send_signal(signal.SIGHUP)
        eventually(lambda: "event=not_reloaded" in log_of(running))
        assert serial() == second
        assert running.stop() == 0


def test_sighup_ends_a_server_with_nothing_to_read_again(tmp_path: Path) -> None:
    """Unless whoever started it has it ignored, as nohup does, and these tests may have been started by that."""
    as_ever = "signal.signal(signal.SIGHUP, signal.SIG_DFL)"
    with server(tmp_path, "-p", "0", "-T", "0", env={"RINGOEXP_TOKEN": "x"}, patch=as_ever) as running:
        assert running.stop(signal.SIGHUP) == -signal.SIGHUP


def test_a_server_with_bad_files_does_not_start(authority: Authority, pair: Pair, tmp_path: Path) -> None:
    other = authority.issue()
    for flags, said in (
        (["--tls_cert", "absent.pem"], "absent.pem: No such file or directory"),
        (["--tls_cert", str(pair.cert), "--tls_key", str(other.key)], "the key does not belong to the certificate"),
        (["--consumer_tls", "--consumer_ca", "absent.pem"], "absent.pem: No such file or directory"),
    ):
        done = subprocess.run(
            [sys.executable, str(ROOT / "ringoexp.py"), "-p", "0", "-T", "0", *flags],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith("ringoexp: error: ") and said in done.stderr and done.stderr.count("\n") == 1
    assert not os.path.exists(tmp_path / "ringoexp.db")


def test_many_connections_over_tls_at_once(authority: Authority, pair: Pair, tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", "-D", "a.db", *tls(pair)) as running:
        url = f"wss://localhost:{running.port}/v1.0/ingest"
        sources = []

        def one() -> None:
            with Producer(url, context=client_context(str(authority.ca))) as producer:
                for start in range(0, 2_000, 100):
                    producer.send(range(start, start + 100))
            sources.append(producer.source)

        threads = [threading.Thread(target=one) for _ in range(12)]
        started = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE)
        assert len(sources) == 12, time.monotonic() - started
        assert running.stop() == 0
    for source in sources:
        assert in_order(tmp_path / "a.db", source) == list(range(2_000))
