"""TLS of whole servers: clients, links to the consumer, failed handshakes, and new files at SIGHUP."""

import datetime
import http.client
import json
import os
import re
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
from pathlib import Path
from typing import Any

import pytest
from support.certificates import Authority, Pair, tls
from support.fake_consumer import answer_handshake
from support.harness import (
    DEADLINE,
    ROOT,
    Blocked,
    RawClient,
    eventually,
    frame,
    free_port,
    in_order,
    not_ready,
    rows,
    server,
)

from ringolib.client.producer import Producer, ProducerError
from ringolib.forward.link import LinkSink
from ringolib.forward.sink import NotStored
from ringolib.net.credentials import CredentialFiles, Credentials
from ringolib.net.tls import client_context, server_context
from ringolib.wire import Block, Run


def secure(port: int, ca: Path, pair: Pair | None = None) -> ssl.SSLSocket:
    """Open a TLS connection with Python's own socket."""
    context = client_context(str(ca), *(map(str, pair) if pair else ()))
    return context.wrap_socket(socket.create_connection(("localhost", port), DEADLINE), server_hostname="localhost")


def get(port: int, path: str, ca: Path, **headers: str) -> tuple[int, bytes]:
    """Send a GET over TLS; return status and body."""
    connection = http.client.HTTPSConnection("localhost", port, timeout=DEADLINE, context=client_context(str(ca)))
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


# Servers.


def test_all_routes_work_over_tls(authority: Authority, pair: Pair, tmp_path: Path) -> None:
    """Alive, ready, page, POST, a foreign WebSocket client, a producer, and a stop that drains the ring."""
    connect: Any = pytest.importorskip("websockets.sync.client").connect
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


def test_server_accepts_only_tls_1_2_and_newer(authority: Authority, pair: Pair, tmp_path: Path) -> None:
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
        eventually(lambda: "event=tls_failed" in running.errors.read_text())


def test_renegotiation_is_refused_at_once(authority: Authority, pair: Pair, tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", *tls(pair)) as running:
        done = subprocess.run(
            ["openssl", "s_client", "-connect", f"localhost:{running.port}", "-tls1_2", "-CAfile", str(authority.ca)],
            input=b"R\n",
            capture_output=True,
            timeout=10,
        )
        assert b"no renegotiation" in done.stderr


def test_silent_clients_block_no_others_and_are_closed(authority: Authority, pair: Pair, tmp_path: Path) -> None:
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


def test_stop_does_not_wait_for_handshakes(authority: Authority, pair: Pair, tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", *tls(pair), patch="net.tls_socket.HANDSHAKE_TIMEOUT = 600") as running:
        with socket.create_connection(("localhost", running.port)):
            eventually(
                lambda: json.loads(get(running.port, "/v1.0/stats", authority.ca)[1])["stats"]["connections"] == 2
            )
            assert running.stop(deadline=20) == 0


def test_http_to_tls_port_is_reported_on_both_sides(authority: Authority, pair: Pair, tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", *tls(pair)) as running:
        status, headers, body = running.get("/v1.0/alive")
        assert status == 400 and "https://" in json.loads(body)["error"]
        assert int(headers["Content-Length"]) == len(body)
        with (
            pytest.raises(
                ProducerError,
                match=r"400: this port uses TLS: connect with https:// or wss:// \(a publisher: --consumer_tls\)$",
            ),
            Producer(running.url) as producer,
        ):
            producer.send([1])
        assert get(running.port, "/v1.0/alive", authority.ca)[0] == 200
        eventually(lambda: "it speaks HTTP without TLS" in running.errors.read_text())
        stats = json.loads(get(running.port, "/v1.0/stats", authority.ca)[1])["stats"]
        assert stats["tlsFailures"] == 2
        assert b"ringoexp_tls_failures_total 2\n" in get(running.port, "/metrics", authority.ca)[1]


def test_certificate_expiry_is_in_stats_and_metrics(authority: Authority, tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", *tls(authority.issue(days=10))) as running:
        ends = json.loads(get(running.port, "/v1.0/stats", authority.ca)[1])["stats"]["certificateExpires"]
        metrics = get(running.port, "/metrics", authority.ca)[1].decode()
        (seconds,) = re.findall(r"^ringoexp_certificate_expires_timestamp_seconds (\S+)$", metrics, re.MULTILINE)
        assert datetime.datetime.fromisoformat(ends.replace("Z", "+00:00")).timestamp() == float(seconds)
        assert abs(float(seconds) - time.time() - 10 * 86_400) < 600
        assert "event=certificate " in running.errors.read_text() and "it expires soon" in running.errors.read_text()


def test_tls_to_port_without_tls_is_reported_on_both_sides(authority: Authority, tmp_path: Path) -> None:
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
        eventually(lambda: "a client sent TLS to a port without TLS" in running.errors.read_text())


def test_stop_during_tls_traffic_loses_no_acked_records(authority: Authority, pair: Pair, tmp_path: Path) -> None:
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


def test_spool_is_replayed_over_tls(authority: Authority, pair: Pair, tmp_path: Path) -> None:
    consumer_flags = ["-I", "false", "-D", "c.db", *tls(pair)]
    port = free_port()
    link = ["-T", str(port), "--consumer_tls", "--consumer_ca", str(authority.ca), "-S", "p.spool"]
    with server(tmp_path, "-p", "0", *link) as publisher:
        assert not_ready(publisher) == []  # the spool stores meanwhile
        with Producer(publisher.url) as producer:
            producer.send(range(1000))
        with server(tmp_path, "-p", str(port), *consumer_flags) as consumer:
            eventually(lambda: publisher.stats()["spoolDepth"] == 0)
            with Producer(publisher.url, producer.source, 1000) as more:
                more.send(range(1000, 5000))
            eventually(lambda: publisher.stats()["consumerState"] == "up")
            assert consumer.stop() == 0
    assert in_order(tmp_path / "c.db", producer.source) == list(range(5000))


def test_link_over_tls_logs_no_errors(authority: Authority, pair: Pair, tmp_path: Path) -> None:
    """The link is a worker's, without a spool."""
    with server(tmp_path, "-I", "false", "-p", "0", "-D", "c.db", *tls(pair)) as consumer:
        link = ["-T", str(consumer.port), "--consumer_tls", "--consumer_ca", str(authority.ca)]
        with server(tmp_path, "-p", "0", *link) as publisher:
            with Producer(publisher.url) as producer:
                producer.send(range(1000))
                producer.flush(DEADLINE)
            assert publisher.stop() == 0 and "level=error" not in publisher.errors.read_text()
        assert consumer.stop() == 0 and "level=error" not in consumer.errors.read_text()
    assert in_order(tmp_path / "c.db", producer.source) == list(range(1000))


def test_link_over_tls_to_own_server_is_refused(authority: Authority, pair: Pair) -> None:
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
            with pytest.raises(NotStored, match="that is this server itself"):
                link.store(block)
            serving.result()
            serving = Blocked(serve)


@pytest.mark.parametrize("wrong", ["expired", "name", "authority", "plain"])
def test_untrusted_link_is_refused_with_a_reason(wrong: str, authority: Authority, pair: Pair, tmp_path: Path) -> None:
    """The publisher logs one clear line, keeps the records and sends none. Both servers go on."""
    stranger = Authority(tmp_path, "stranger")
    certificate = {
        "expired": lambda: authority.issue(days=-1),
        "name": lambda: authority.issue("elsewhere.example"),
        "authority": lambda: stranger.issue(),
        "plain": lambda: None,
    }[wrong]()
    reason = {
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
                client.send(frame(2, struct.pack(">i", 42)))
                eventually(lambda: "event=link_down" in publisher.errors.read_text())
                assert reason in publisher.errors.read_text()
                reported = publisher.stats()["consumerReason"]
                assert reason in reported and reported.startswith(f"localhost:{consumer.port}: it")
                assert not_ready(publisher) == ["consumer_unreachable"]
                publisher.kill()
        if wrong != "plain":
            eventually(lambda: "event=tls_failed" in consumer.errors.read_text())
        if wrong == "expired":
            assert "event=certificate " in consumer.errors.read_text()
            assert "it rejected our certificate as expired" in consumer.errors.read_text()
    assert rows(tmp_path / "c.db") == []


def test_link_without_tls_to_tls_consumer_is_explained(authority: Authority, pair: Pair, tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-I", "false", "-D", "c.db", *tls(pair)) as consumer:
        with server(tmp_path, "-p", "0", "-T", str(consumer.port)) as publisher:
            assert not_ready(publisher) == ["consumer_unreachable"]
            hint = b"answered 400: this port uses TLS: connect with https:// or wss:// (a publisher: --consumer_tls)"
            eventually(lambda: hint in publisher.get("/v1.0/ready")[2], "before any record")
            with RawClient(publisher.port) as client:
                client.send(frame(2, struct.pack(">i", 42)))
                eventually(
                    lambda: (
                        "this port uses TLS: connect with https:// or wss:// (a publisher"
                        in publisher.errors.read_text()
                    )
                )
                publisher.kill()


def test_client_ca_admits_only_clients_with_a_certificate(authority: Authority, pair: Pair, tmp_path: Path) -> None:
    mine = authority.issue("publisher")
    with server(
        tmp_path, "-p", "0", "-I", "false", "-D", "c.db", *tls(pair), "--client_ca", str(authority.ca)
    ) as consumer:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            get(consumer.port, "/v1.0/alive", authority.ca)
        eventually(lambda: "it has no certificate, which --client_ca requires" in consumer.errors.read_text())
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
        # The certificate of a publisher is its client certificate for links, too.
        with server(tmp_path, *publisher_flags, *tls(authority.issue())) as publisher:
            url = f"wss://localhost:{publisher.port}/v1.0/ingest"
            with Producer(url, context=client_context(str(authority.ca))) as producer:
                producer.send([3])
        with server(tmp_path, *publisher_flags) as publisher:
            assert not_ready(publisher) == ["consumer_unreachable"]
            with RawClient(publisher.port) as client:
                client.send(frame(2, struct.pack(">i", 42)))
                eventually(lambda: "it requires a client certificate" in publisher.errors.read_text())
                publisher.kill()
    assert [value for _, _, value in rows(tmp_path / "c.db")] == [1, 2, 3]


def test_permanent_tls_failure_ends_send_with_one_line(authority: Authority, pair: Pair, tmp_path: Path) -> None:
    """A retry would not help: the wrong authority, no client certificate, a server without TLS."""
    known = ["--ca", str(authority.ca)]
    mutual = [*tls(pair), "--client_ca", str(authority.ca)]
    for number, (server_flags, host, flags, reason) in enumerate(
        (
            (tls(pair), "localhost", [], "its certificate is not accepted: "),
            (tls(pair), "127.0.0.2", known, "its certificate is not accepted: "),
            (mutual, "localhost", known, "it requires a client certificate"),
            ([], "localhost", known, "it does not speak TLS on this port"),
        )
    ):
        with server(tmp_path, "-p", "0", "-T", "0", "-H", "0.0.0.0", "-D", f"{number}.db", *server_flags) as running:
            url = f"wss://{host}:{running.port}/v1.0/ingest"
            command = [sys.executable, str(ROOT / "ringoexp.py"), "send", "--url", url, *flags]
            done = subprocess.run(command, input=b"1\n", capture_output=True, timeout=DEADLINE)
            errors = done.stderr.decode().splitlines()
            assert done.returncode == 1 and len(errors) == 1, errors
            assert errors[0].startswith(f"ringoexp send: error: {url}: {reason}"), errors
            assert errors[0].endswith("; nothing was sent") and "--tls_cert" not in errors[0], errors


def test_producer_waits_while_a_later_certificate_is_bad(authority: Authority, tmp_path: Path) -> None:
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


def test_sighup_reads_new_certificate_and_keeps_old_one_if_bad(authority: Authority, tmp_path: Path) -> None:
    connect: Any = pytest.importorskip("websockets.sync.client").connect

    def serial() -> object:
        with secure(running.port, authority.ca) as sock:
            certificate = sock.getpeercert()
            assert certificate
            return certificate["serialNumber"]

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
            eventually(lambda: "event=reloaded" in running.errors.read_text())
            second = serial()
            assert second != first
            ws.send(struct.pack(">i", 7))  # an open connection keeps the old certificate
            assert ws.recv() == struct.pack(">Q", 1)
        key.write_text("")
        running.send_signal(signal.SIGHUP)
        eventually(lambda: "event=not_reloaded" in running.errors.read_text())
        assert serial() == second
        assert running.stop() == 0


def test_sighup_ends_server_without_files_to_read_again(tmp_path: Path) -> None:
    """The handler is set to the default first: nohup, which may have started these tests, ignores SIGHUP."""
    default_handler = "signal.signal(signal.SIGHUP, signal.SIG_DFL)"
    with server(tmp_path, "-p", "0", "-T", "0", env={"RINGOEXP_TOKEN": "x"}, patch=default_handler) as running:
        assert running.stop(signal.SIGHUP) == -signal.SIGHUP


def test_server_with_bad_tls_files_does_not_start(authority: Authority, pair: Pair, tmp_path: Path) -> None:
    other = authority.issue()
    for flags, reason in (
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
        assert done.stderr.startswith("ringoexp: error: ") and reason in done.stderr and done.stderr.count("\n") == 1
    assert not os.path.exists(tmp_path / "ringoexp.db")


def test_many_tls_connections_at_once_lose_no_records(authority: Authority, pair: Pair, tmp_path: Path) -> None:
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
