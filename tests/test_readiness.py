"""`GET /v1.0/ready`: 200 while a record sent now would be stored now, or else 503 and why. Disks: test_faults_disk."""

import datetime
import json
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from harness import (
    Blocked,
    RawClient,
    ServerProcess,
    eventually,
    frame,
    free_port,
    not_ready,
    raw_link,
    request,
    server,
)

import readiness
from readiness import Reason, _Fresh

QUICK = "readiness.FRESH = 0.05; readiness.PATIENCE = 0.5; readiness.STUCK = 0.1"


def reasons(running: ServerProcess) -> list[dict[str, Any]]:
    return list(json.loads(running.get("/v1.0/ready")[2])["reasons"])


@pytest.mark.parametrize("role", [["-T", "0"], ["-I", "false"]], ids=["publisher", "consumer"])
def test_a_server_with_a_database_is_ready(tmp_path: Path, role: list[str]) -> None:
    with server(tmp_path, "-p", "0", *role) as running:
        assert not_ready(running) == []
        assert request(running.port, "HEAD", "/v1.0/ready")[::2] == (200, b"")
        status, headers, _ = request(running.port, "POST", "/v1.0/ready")
        assert (status, headers["Allow"]) == (405, "GET, HEAD")
        assert request(running.port, "GET", "/v1.0/ready", headers={"Accept": "text/html"})[0] == 406
        assert running.stats()["commits"] == 0, "to find out is no commit of records"


def test_a_publisher_is_ready_while_its_consumer_is_before_any_record_is_sent(tmp_path: Path) -> None:
    """As to an idle publisher nothing shows that the consumer has gone, it has to ask."""
    port = free_port()
    with server(tmp_path, "-p", "0", "-T", str(port), patch=QUICK) as publisher:
        assert not_ready(publisher) == ["consumer_unreachable"]
        (why,) = reasons(publisher)
        since = datetime.datetime.fromisoformat(why["since"].replace("Z", "+00:00"))
        assert abs((datetime.datetime.now(datetime.timezone.utc) - since).total_seconds()) < 600
        assert f"localhost:{port}" in why["detail"]
        for _ in range(2):
            with server(tmp_path, "-I", "false", "-p", str(port), patch=QUICK) as consumer:
                eventually(lambda: not_ready(publisher) == [])
                consumer.send_signal(signal.SIGSTOP)
                eventually(lambda: not_ready(publisher) == ["consumer_unreachable"])
                consumer.send_signal(signal.SIGCONT)
                eventually(lambda: not_ready(publisher) == [])
            eventually(lambda: not_ready(publisher) == ["consumer_unreachable"])
        assert publisher.get("/v1.0/alive")[0] == 200
        assert publisher.stats()["totalConnections"] > 0 and publisher.stats()["consumerState"] == "unknown"


def test_since_is_when_it_began_and_stays(tmp_path: Path) -> None:
    """The moment is counted back from the clock each time it is asked: within a few ms of each other."""
    with server(tmp_path, "-p", "0", "-T", str(free_port()), patch=QUICK) as publisher:

        def since() -> float:
            return datetime.datetime.fromisoformat(reasons(publisher)[0]["since"].replace("Z", "+00:00")).timestamp()

        first, asked = since(), publisher.stats()["totalConnections"]
        eventually(lambda: abs(since() - first) < 0.1 and publisher.stats()["totalConnections"] > asked + 60)
        with RawClient(publisher.port) as client:
            client.send(frame(2, bytes(4)))
            eventually(lambda: publisher.stats()["consumerState"] == "down")
            known = since()
            assert publisher.stats()["consumerReason"] in json.dumps(reasons(publisher))
            eventually(lambda: publisher.stats()["consumerAwayMs"] > 300)
            assert abs(since() - known) < 0.1


def test_a_full_ring_counts_once_it_stands_still(tmp_path: Path) -> None:
    """The consumer answers every question, and acks nothing."""
    with (
        socket.create_server(("localhost", 0)) as listener,
        server(
            tmp_path, "-p", "0", "-T", str(listener.getsockname()[1]), "-r", "4", "-W", "1", patch=QUICK
        ) as publisher,
        RawClient(publisher.port) as client,
    ):
        client.send(frame(2, bytes(8)) * 10)
        with raw_link(listener):
            eventually(lambda: "ring_full" in not_ready(publisher))
            assert [why["detail"] for why in reasons(publisher) if why["code"] == "ring_full"] == [
                "all 4 slots are taken"
            ]


def test_a_draining_server_says_so(tmp_path: Path) -> None:
    patch = f"ringoexp.DRAIN_SECONDS = 600; {QUICK}"
    with (
        server(tmp_path, "-p", "0", "-T", str(free_port()), patch=patch) as publisher,
        RawClient(publisher.port) as client,
    ):
        client.send(frame(2, bytes(4)))
        eventually(lambda: publisher.stats()["ringDepth"] == 1)
        publisher.send_signal(signal.SIGTERM)
        eventually(lambda: not_ready(publisher) == ["draining", "consumer_unreachable"])


def test_a_server_with_all_its_connections_taken_is_not_ready_for_the_next_client(tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", "-n", "1", patch=QUICK) as running:
        with RawClient(running.port):
            assert not_ready(running) == ["connections_full"]
        eventually(lambda: not_ready(running) == [])


def test_a_consumer_whose_connections_are_all_links_of_a_publisher_makes_that_none_less_ready(tmp_path: Path) -> None:
    with (
        server(tmp_path, "-I", "false", "-p", "0", "-n", "1", patch=QUICK) as consumer,
        server(tmp_path, "-p", "0", "-T", str(consumer.port), patch=QUICK) as publisher,
    ):
        assert request(publisher.port, "POST", "/v1.0/ingest", bytes(4))[0] == 200
        assert not_ready(consumer) == ["connections_full"]
        assert not_ready(publisher) == []


def test_a_chain_is_ready_when_all_of_it_is(tmp_path: Path) -> None:
    port = free_port()
    with (
        server(tmp_path, "-p", "0", "-T", str(port), patch=QUICK) as region,
        server(tmp_path, "-p", "0", "-T", str(region.port), patch=QUICK) as edge,
    ):
        assert not_ready(edge) == ["consumer_not_ready"]
        assert f"localhost:{port}" in reasons(edge)[0]["detail"], "it says who it is that cannot be reached"
        with server(tmp_path, "-I", "false", "-p", str(port), patch=QUICK):
            eventually(lambda: not_ready(edge) == [])


def test_with_a_spool_a_publisher_is_ready_until_that_is_full(tmp_path: Path) -> None:
    flags = ["-S", "s.spool", "--spool_max", "3"]
    with server(tmp_path, "-p", "0", "-T", str(free_port()), *flags, patch=QUICK) as publisher:
        assert not_ready(publisher) == []
        assert request(publisher.port, "POST", "/v1.0/ingest", bytes(24))[0] == 200
        assert publisher.stats()["consumerState"] == "down" and not_ready(publisher) == []
        with RawClient(publisher.port) as client:
            client.send(frame(2, bytes(8)))
            eventually(lambda: not_ready(publisher) == ["consumer_unreachable", "spool_full"])


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", None),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 2\r\n\r\n[]", "consumer_unreachable"),
        (b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n", "consumer_unreachable"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "consumer_unreachable"),
        (b"", "consumer_unreachable"),
    ],
)
def test_a_consumer_that_answers_otherwise(answer: bytes, expected: str | None) -> None:
    with socket.create_server(("localhost", 0)) as listener:
        asked = Blocked(lambda: readiness._check_consumer("localhost", listener.getsockname()[1]))
        peer, _ = listener.accept()
        with peer:
            peer.recv(65536)
            peer.sendall(answer)
        found = asked.result()
    assert (found and found[0]) == expected


def test_many_who_ask_at_once_get_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "FRESH", 600)
    gate, calls = threading.Event(), []

    def ask() -> tuple[str, str]:
        calls.append(1)
        assert gate.wait(30)
        return "away", "why"

    fresh = _Fresh(ask)
    asking = [Blocked(fresh.reason) for _ in range(10)]
    assert all(each.still(0.01) for each in asking)
    gate.set()
    assert {each.result()[:2] for each in asking} == {("away", "why")} and len(calls) == 1
    assert isinstance(fresh.reason(), Reason) and len(calls) == 1


def test_an_error_nobody_expected_is_an_answer_for_those_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "FRESH", 600)

    def ask() -> None:
        raise ZeroDivisionError

    fresh = _Fresh(ask)
    with pytest.raises(ZeroDivisionError):
        fresh.reason()
    again = fresh.reason()
    assert again and again.code == "failed"
