"""What both producers promise, `Producer` and `AsyncProducer`: every record is stored once, whatever fails."""

import random
import re
import socket
import threading
import uuid
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from support.both_producers import MakeProducer
from support.broken import BrokenSocket
from support.certificates import Authority, Pair, tls
from support.fake_consumer import Link, fake_consumer
from support.harness import (
    DEADLINE,
    Blocked,
    ServerProcess,
    eventually,
    free_port,
    in_order,
    raw_link,
    rows,
    seeded,
    server,
)
from support.scripted_server import ScriptedServer
from support.short_times import shorten_times

from ringolib.client import base, outbox, producer
from ringolib.client.exchange import Exchange
from ringolib.client.producer import Producer, ProducerError
from ringolib.net import websocket
from ringolib.net.tls import client_context
from ringolib.wire import decode_batch, encode_ack


@pytest.fixture(autouse=True)
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_times(monkeypatch, 0.005, 0.05)
    monkeypatch.setattr(producer, "EXIT_FLUSH_SECONDS", 0.2)


@contextmanager
def peer(answer: Callable[[Link], object]) -> Iterator[str]:
    """Run a server that calls `answer` for each connection, and yield its URL."""
    with fake_consumer(answer) as port:
        yield f"ws://localhost:{port}/v1.0/ingest"


def test_records_sent_before_the_server_starts_are_stored(make_producer: MakeProducer, tmp_path: Path) -> None:
    port = free_port()
    with make_producer(f"ws://localhost:{port}/v1.0/ingest") as sender:
        sender.send(range(1000))
        with pytest.raises(TimeoutError, match=r"1000 records are not acked \(Connection refused\)"):
            sender.flush(0.05)
        with server(tmp_path, "-p", str(port), "-T", str(port)):
            sender.flush(DEADLINE)
            assert (sender.sent, sender.acked, sender.reconnects) == (1000, 1000, 0)
    assert in_order(tmp_path / "ringoexp.db", sender.source) == list(range(1000))


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["consumer", "publisher"])
def test_killed_servers_keep_exactly_once(make_producer: MakeProducer, tmp_path: Path, victim: str) -> None:
    seed = seeded()
    rng = random.Random(seed)
    ports = {"consumer": free_port(), "publisher": free_port()}
    flags = {
        "consumer": ["-I", "false", "-p", str(ports["consumer"]), "-D", "c.db"],
        "publisher": ["-p", str(ports["publisher"]), "-T", str(ports["consumer"])],
    }
    running = {role: ServerProcess(tmp_path, *flags[role]) for role in flags}
    values = array("q", rng.randbytes(8 * 400_000))
    try:
        with make_producer(f"ws://localhost:{ports['publisher']}/v1.0/ingest") as sender:
            call = Blocked(lambda: sender.send(values))
            for turn in range(1, 4):
                eventually(lambda turn=turn: sender.acked > turn * 50_000, "acks")
                running[victim].kill()
                known = sender.acked
                if victim == "consumer":
                    held = {sequence for _, sequence, _ in rows(tmp_path / "c.db")}
                    assert held >= set(range(known)), "an acked record is missing"
                running[victim] = ServerProcess(tmp_path, *flags[victim])
            call.result()
            sender.flush(60)
            assert (sender.reconnects > 0) == (victim == "publisher")
    finally:
        for process in running.values():
            process.kill()
    assert in_order(tmp_path / "c.db", sender.source) == list(values)


def test_partial_acks_and_lost_links_keep_exactly_once(make_producer: MakeProducer) -> None:
    """Every connection is cut after some records; unacked records are sent again with the same numbers."""
    seen: dict[int, int] = {}
    links: list[int] = []
    source = uuid.uuid4()

    def answer(connection: Link) -> None:
        links.append(1)
        total = 0
        for message in connection:
            block = decode_batch(message)  # type: ignore[arg-type]
            (run,) = block.runs
            assert run.source == source.bytes
            for offset, value in enumerate(block.values):
                assert seen.setdefault(run.first + offset, value) == value
                total += 1
                if total == 700 * len(links):
                    connection.send(encode_ack(total))
                    connection.socket.shutdown(socket.SHUT_RDWR)
                    return
            connection.send(encode_ack(total))

    with peer(answer) as url, make_producer(url, source) as sender:
        for start in range(0, 5000, 500):
            sender.send(range(start, start + 500))
        sender.flush(DEADLINE)
        assert sender.acked == 5000 and sender.reconnects == len(links) - 1 > 1
    assert seen == {number: number for number in range(5000)}


def test_producer_reconnects_to_a_stalled_server(make_producer: MakeProducer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "STALL_TIMEOUT", 0.2)
    links: list[int] = []

    def answer(connection: Link) -> None:
        links.append(1)
        for _ in connection:
            if len(links) > 2:
                connection.send(encode_ack(3))

    with peer(answer) as url, make_producer(url) as sender:
        sender.send([1, 2, 3])
        sender.flush(DEADLINE)
    assert len(links) == 3


def test_server_without_acks_is_stalled_while_records_arrive_slowly(
    make_producer: MakeProducer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "STALL_TIMEOUT", 0.3)
    links: list[int] = []

    def answer(connection: Link) -> None:
        links.append(1)
        for _ in connection:
            pass

    with peer(answer) as url:
        sender = make_producer(url)

        def trickled() -> bool:
            sender.send([1])
            return len(links) > 1

        eventually(trickled)
        sender.close()


def test_send_waits_while_too_many_records_are_unacked(
    make_producer: MakeProducer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "MAX_UNACKED", 10)
    monkeypatch.setattr(outbox, "CHUNK_RECORDS", 5)
    gate = threading.Event()

    def answer(connection: Link) -> None:
        total = 0
        for message in connection:
            total += len(decode_batch(message).values)  # type: ignore[arg-type]
            assert gate.wait(DEADLINE)
            connection.send(encode_ack(total))

    with peer(answer) as url, make_producer(url) as sender:
        sender.send(range(10))
        more = Blocked(lambda: sender.send(range(3)))
        assert more.still()
        gate.set()
        more.result()
        sender.flush(DEADLINE)
        assert sender.acked == 13


@pytest.mark.slow
def test_acks_are_progress_while_the_server_reads_slowly(
    make_producer: MakeProducer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server reads and acks a little at a time; it takes longer than STALL_TIMEOUT to read a whole message."""
    monkeypatch.setattr(outbox, "STALL_TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sender = make_producer(f"ws://127.0.0.1:{listener.getsockname()[1]}/")
        sender.send(range(outbox.CHUNK_RECORDS * 20))
        with raw_link(listener) as peer:
            start = monotonic()
            acked = 0
            while monotonic() < start + 2.0:  # four times STALL_TIMEOUT
                assert peer.recv(2048)
                acked += 10
                peer.sendall(b"\x82\x08" + encode_ack(acked))
                threading.Event().wait(0.02)  # the server reads slowly
            eventually(lambda: sender.acked == acked)
            assert sender.reconnects == 0
            sender.close()


def test_ack_beyond_sent_records_drops_the_connection(make_producer: MakeProducer) -> None:
    links: list[int] = []

    def answer(connection: Link) -> None:
        links.append(1)
        connection.recv()
        connection.send(encode_ack(3 if len(links) > 1 else 4))

    with peer(answer) as url, make_producer(url) as sender:
        sender.send([1, 2, 3])
        sender.flush(DEADLINE)
    assert len(links) == 2


def test_unexpected_error_reaches_flush(make_producer: MakeProducer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*unused: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Exchange, "turn", broken)
    with peer(list) as url:
        sender = make_producer(url)
        sender.send([1])
        with pytest.raises(ProducerError, match="ZeroDivisionError: a bug"):
            sender.flush(DEADLINE)
        sender.close(report=False)


def break_first_message(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Break a message of the next connection off with `error`."""
    errors = [error]
    connect = Exchange.__init__

    def broken(exchange: Exchange, store: outbox.Outbox, link: Any, lock: Any) -> None:
        if errors:
            link.sock = BrokenSocket(link.sock, errors.pop())
        connect(exchange, store, link, lock)

    monkeypatch.setattr(Exchange, "__init__", broken)


def check_broken_message(
    make_producer: MakeProducer, error: BaseException, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is closed, and callers get the error. Another producer resumes."""
    seen: dict[int, int] = {}
    source = uuid.uuid4()

    def answer(connection: Link) -> None:
        total = 0
        for message in connection:
            block = decode_batch(message)
            for run in block.runs:
                for number in range(run.first, run.first + run.count):
                    assert number not in seen
                    seen[number] = block.values[number - run.first]
            total += len(block.values)
            connection.send(encode_ack(total))

    with peer(answer) as url:
        break_first_message(monkeypatch, error)
        sender = make_producer(url, source)
        sender.send(range(1000))
        with pytest.raises(ProducerError, match=text):
            sender.flush(DEADLINE)
        with pytest.raises(ProducerError, match=text):
            sender.send(range(1000, 2000))
        sender.close()
        assert not seen and sender.acked == 0
        with make_producer(url, source) as again:
            again.send(range(2000))
            again.flush(DEADLINE)
    assert seen == {number: number for number in range(2000)}


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MemoryError(), r"^not enough memory \(ulimit -v limits it\)$"),
        (ZeroDivisionError("a bug"), "ZeroDivisionError: a bug"),
    ],
    ids=repr,
)
def test_message_broken_off_by_an_error_is_followed_by_nothing(
    make_producer: MakeProducer, error: BaseException, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_broken_message(make_producer, error, text, monkeypatch)


def test_message_broken_off_in_the_thread_is_followed_by_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """In an event loop, a KeyboardInterrupt would end the loop."""
    check_broken_message(Producer, KeyboardInterrupt(), "KeyboardInterrupt", monkeypatch)


def test_close_ends_flush_while_the_server_reads_nothing(make_producer: MakeProducer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sender = make_producer(f"ws://127.0.0.1:{listener.getsockname()[1]}/")
        sender.send(range(outbox.CHUNK_RECORDS * 60))
        with raw_link(listener):
            flush = Blocked(sender.flush)
            eventually(lambda: sender._outbox._unsent < 60 and flush.still())
            closing = Blocked(sender.close)
            with pytest.raises(ValueError, match="closed"):
                flush.result()
            closing.result(outbox.STALL_TIMEOUT / 4)


def test_permanent_refusal_reaches_send_and_flush(make_producer: MakeProducer) -> None:
    def answer(connection: Link) -> None:
        connection.recv()
        connection.close(1007, "no")

    with peer(answer) as url:
        sender = make_producer(url)
        sender.send([1])
        with pytest.raises(ProducerError, match="closed with 1007 no"):
            sender.flush(DEADLINE)
        with pytest.raises(ProducerError, match="closed with 1007 no"):
            sender.send([2])
        sender.close()


def test_producer_refuses_misuse(make_producer: MakeProducer) -> None:
    with pytest.raises(ValueError, match="ws://"):
        make_producer("localhost:6660")
    with pytest.raises(ValueError, match="first"):
        make_producer(first=-1)
    sender = make_producer(f"ws://localhost:{free_port()}/")
    with pytest.raises(OverflowError):
        sender.send([1, 2**63])
    assert sender.sent == 0
    sender.close()
    sender.close()
    with pytest.raises(ValueError, match="closed"):
        sender.send([1])
    with pytest.raises(RuntimeError, match="mine"), make_producer(f"ws://localhost:{free_port()}/") as other:
        other.send([1])
        raise RuntimeError("mine")
    assert not [thread for thread in threading.enumerate() if thread.name == "producer"]


@pytest.mark.parametrize("path", ["", "/", "/v1.0/ingest"])
def test_url_path_may_be_left_out(make_producer: MakeProducer, tmp_path: Path, path: str) -> None:
    with server(tmp_path, "-p", "0", "-T", "0") as running:
        with make_producer(f"ws://localhost:{running.port}{path}") as producer:
            producer.send([1])
        assert producer.acked == 1


def test_http_answer_without_upgrade_is_permanent(make_producer: MakeProducer, tmp_path: Path) -> None:
    """A status of 200 or a redirect would be the same for the next attempt."""
    with server(tmp_path, "-p", "0", "-T", "0") as running:
        url = f"ws://localhost:{running.port}/v1.0/alive"
        with pytest.raises(ProducerError, match="HTTP status 200: is that the /v1.0/ingest of a ringoexp"):
            with make_producer(url) as producer:
                producer.send([1])


def test_report_names_the_number_to_resume_with(
    make_producer: MakeProducer, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(connection: Link) -> None:
        connection.recv()
        connection.send(encode_ack(3))
        connection.recv()

    with peer(answer) as url:
        sender = make_producer(url, first=100)
        sender.send(range(10))
        eventually(lambda: sender.acked == 3)
        sender.close()
        sender.close()
    expected = f"7 of 10 records are not acked by {url}: send the values after the first 3 with source "
    error = capsys.readouterr().err
    assert re.match("ringoexp (Async)?Producer: 7 of 10", error)
    assert error.endswith(f" {expected}{sender.source} and first 103\n")


def test_closed_producer_with_all_acks_reports_nothing(
    make_producer: MakeProducer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with server(tmp_path, "-p", "0", "-T", "0") as running, make_producer(running.url) as sender:
        sender.send([1])
    assert capsys.readouterr() == ("", "")
    assert not base.open_producers


def test_flush_does_not_wait_for_records_that_are_sent_after_it(make_producer: MakeProducer) -> None:
    """Otherwise other threads and tasks that go on sending would keep it waiting."""
    gate = threading.Event()

    def answer(connection: Link) -> None:
        count = len(decode_batch(connection.recv()).values)
        assert gate.wait(DEADLINE)
        connection.send(encode_ack(count))
        for _ in connection:
            pass  # no further acks

    with peer(answer) as url:
        sender = make_producer(url)
        sender.send([1, 2])
        eventually(lambda: sender.connected and not sender._outbox._unsent)
        flush = Blocked(lambda: sender.flush(DEADLINE))
        assert flush.still()
        sender.send([3])
        gate.set()
        flush.result()
        assert (sender.acked, sender.sent) == (2, 3)
        sender.close(report=False)


def test_ack_before_the_end_of_the_connection_ends_flush(make_producer: MakeProducer) -> None:
    """The ack and the end arrive together. Afterwards the producer has no reason to connect again."""

    def answer(connection: Link) -> None:
        count = len(decode_batch(connection.recv()).values)
        connection.socket.sendall(b"\x82\x08" + encode_ack(count) + b"\x88\x02\x03\xe9")

    with peer(answer) as url, make_producer(url) as sender:
        sender.send([1])
        Blocked(sender.flush).result(DEADLINE)  # without a timeout, at whose end flush would look again
        eventually(lambda: sender.trouble == "closed with 1001 ")
        assert sender.reconnects == 0


@pytest.mark.parametrize("status", [408, 425, 429, 503])
def test_retryable_status_is_followed_by_another_attempt(make_producer: MakeProducer, status: int) -> None:
    busy = b"HTTP/1.1 %d Busy\r\nContent-Length: 0\r\n\r\n" % status
    with ScriptedServer(busy, busy) as refusing:
        sender = make_producer(f"ws://127.0.0.1:{refusing.port}/")
        sender.send([1])
        eventually(lambda: len(refusing.requests) == 2)
        assert f"refused with HTTP status {status}" in (sender.trouble or "")
        sender.close(report=False)


@pytest.mark.parametrize("status", [401, 404, 501])
def test_permanent_status_reaches_send_and_flush(make_producer: MakeProducer, status: int) -> None:
    body = b'{"error": "as the server says"}'
    answer = b"HTTP/1.1 %d No\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)
    with ScriptedServer(answer) as refusing:
        sender = make_producer(f"ws://127.0.0.1:{refusing.port}/", token="secret")
        sender.send([1])
        for call in (lambda: sender.flush(DEADLINE), lambda: sender.send([2])):
            with pytest.raises(ProducerError, match=f"refused with HTTP status {status}: as the server says$"):
                call()
        assert b"\r\nAuthorization: Bearer secret\r\n" in refusing.requests[0]
        sender.close(report=False)


@pytest.mark.parametrize("answer", [b"SSH-2.0-x\r\n", b"HTTP/1.1 200 OK", b"", b"HTTP/1.1 101 No\r\n\r\n"])
def test_server_that_is_no_websocket_server_is_trouble(make_producer: MakeProducer, answer: bytes) -> None:
    with ScriptedServer(answer) as other:
        sender = make_producer(f"ws://127.0.0.1:{other.port}/")
        sender.send([1])
        eventually(lambda: re.match("is not a WebSocket server: |closed the conn", sender.trouble or ""))
        sender.close(report=False)


def test_server_that_does_not_answer_is_given_up_in_time(
    make_producer: MakeProducer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(websocket, "HANDSHAKE_TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        sender = make_producer(f"ws://127.0.0.1:{silent.getsockname()[1]}/")
        sender.send([1])
        eventually(lambda: "did not finish the handshake" in (sender.trouble or ""))
        sender.close(report=False)


def test_each_address_of_a_name_is_tried(make_producer: MakeProducer, monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo

    def answer(connection: Link) -> None:
        connection.send(encode_ack(len(decode_batch(connection.recv()).values)))
        connection.read_frame(DEADLINE)

    def look_up(host: str, port: int, *arguments: Any, **named: Any) -> Any:
        if host != "several.example":
            return real(host, port, *arguments, **named)
        if named.get("flags"):
            raise socket.gaierror(socket.EAI_NONAME, "not a number")
        return [entry for address in ("127.0.0.2", "127.0.0.1") for entry in real(address, port, *arguments, **named)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with peer(answer) as url, make_producer(url.replace("localhost", "several.example")) as sender:
        sender.send([1, 2])
        sender.flush(DEADLINE)
        assert sender.acked == 2 and sender.trouble is None


def test_name_that_cannot_be_resolved_is_trouble(make_producer: MakeProducer) -> None:
    sender = make_producer("ws://nowhere.invalid/")
    sender.send([1])
    eventually(lambda: sender.trouble)
    assert not sender.connected
    sender.close(report=False)


def test_unix_socket_is_reached(make_producer: MakeProducer, short_path: Path) -> None:
    with server(short_path, "-I", "false", "-H", "unix:x.sock") as running:
        with make_producer(f"ws+unix:{running.at}") as sender:
            sender.send(range(1000))
    assert in_order(short_path / "ringoexp.db", sender.source) == list(range(1000))


@pytest.mark.slow
def test_tls_is_resumed_after_restarts(
    make_producer: MakeProducer, authority: Authority, pair: Pair, tmp_path: Path
) -> None:
    """The messages are larger than the socket's buffer, and the connection ends in the middle of one."""
    port = free_port()
    url = f"wss://localhost:{port}/v1.0/ingest"
    sender = make_producer(url, context=client_context(str(authority.ca)))
    values = array("q", range(300_000))
    sending = Blocked(lambda: [sender.send(values[i : i + 5000]) for i in range(0, len(values), 5000)])
    for turn in range(3):
        with server(tmp_path, "-p", str(port), "-T", str(port), *tls(pair)):
            eventually(lambda turn=turn: sender.acked > turn * 50_000)
            if turn == 2:
                sending.result()
                sender.flush(DEADLINE)
    sender.close()
    assert in_order(tmp_path / "ringoexp.db", sender.source) == list(values)


def test_untrusted_certificate_is_a_permanent_error(
    make_producer: MakeProducer, authority: Authority, pair: Pair, tmp_path: Path
) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", *tls(pair)) as running:
        sender = make_producer(running.url.replace("ws:", "wss:"))
        sender.send([1])
        with pytest.raises(ProducerError, match="its certificate is not accepted"):
            sender.flush(DEADLINE)
        sender.close(report=False)
