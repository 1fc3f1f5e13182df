"""`GET /v1.0/ready`: 200 while a record sent now would be stored now, or else 503 and why. Disks: test_faults_disk."""

import datetime
import json
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from support.harness import (
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

from ringolib.net.addresses import Endpoint
from ringolib.net.credentials import CredentialSet
from ringolib.status import probe, readiness
from ringolib.status.probe import Reason, _Question

QUICK = "status.probe.FRESH = 0.05; status.probe.PATIENCE = 0.5; status.readiness.STUCK = 0.1"


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
        assert publisher.stats()["totalConnections"] > 0 and publisher.stats()["consumerState"] == "down"
        assert publisher.errors.read_text() == "", "no record has found it out, so nothing is logged"


def test_stats_and_metrics_know_of_an_idle_publishers_consumer(tmp_path: Path) -> None:
    """They ask, too, but wait for nobody: the next look has the answer."""
    port = free_port()
    with server(tmp_path, "-p", "0", "-T", str(port), patch=QUICK) as publisher:

        def known(state: str, codes: list[str]) -> bool:
            stats, metrics = publisher.stats(), publisher.get("/metrics")[2].decode()
            up = f"\nringoexp_consumer_up {int(state != 'down')}\n" in metrics
            ready = f"\nringoexp_ready {int(not codes)}\n" in metrics
            return (stats["consumerState"], stats["notReady"]) == (state, codes) and up and ready

        eventually(lambda: known("down", ["consumer_unreachable"]))
        stats = publisher.stats()
        assert f"localhost:{port}" in stats["consumerReason"] and stats["consumerAwayMs"] > 0
        with server(tmp_path, "-I", "false", "-p", str(port), patch=QUICK):
            eventually(lambda: known("up", []))
            assert publisher.stats()["consumerAwayMs"] == 0
        eventually(lambda: known("down", ["consumer_unreachable"]))


def test_since_is_when_it_began_and_stays(tmp_path: Path) -> None:
    """The moment is counted back from the clock each time it is asked: within a few ms of each other."""
    with server(tmp_path, "-p", "0", "-T", str(free_port()), patch=QUICK) as publisher:

        def since() -> float:
            return datetime.datetime.fromisoformat(reasons(publisher)[0]["since"].replace("Z", "+00:00")).timestamp()

        first, asked = since(), publisher.stats()["totalConnections"]
        eventually(lambda: abs(since() - first) < 0.1 and publisher.stats()["totalConnections"] > asked + 60)
        with RawClient(publisher.port) as client:
            client.send(frame(2, bytes(4)))
            eventually(lambda: "event=link_down" in publisher.errors.read_text())
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
    patch = f"app.DRAIN_SECONDS = 600; {QUICK}"
    with (
        server(tmp_path, "-p", "0", "-T", str(free_port()), patch=patch) as publisher,
        RawClient(publisher.port) as client,
    ):
        client.send(frame(2, bytes(4)))
        eventually(lambda: publisher.stats()["ringDepth"] == 1)
        publisher.send_signal(signal.SIGTERM)
        eventually(lambda: not_ready(publisher) == ["draining"])


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
        for _ in range(5):
            assert not_ready(publisher) == []
            eventually(lambda: publisher.stats()["totalConnections"])
        with server(tmp_path, "-p", "0", "-T", str(consumer.port), patch=QUICK) as other:
            assert not_ready(other) == ["consumer_not_ready"], "it has no link, and would get none"


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
    flags = ["-S", "s.spool", "--spool_max", "4"]
    with server(tmp_path, "-p", "0", "-T", str(free_port()), *flags, patch=QUICK) as publisher:
        assert not_ready(publisher) == []
        assert request(publisher.port, "POST", "/v1.0/ingest", bytes(24))[0] == 200
        assert publisher.stats()["consumerState"] == "down" and not_ready(publisher) == []
        assert request(publisher.port, "POST", "/v1.0/ingest", bytes(8))[0] == 200
        assert not_ready(publisher) == ["consumer_unreachable", "spool_full"]


def test_a_spool_leaves_room_on_its_disk_and_ready_knows(tmp_path: Path) -> None:
    flags = ["-S", "s.spool"]
    patch = f"{QUICK}; forward.spool.MIN_FREE_BYTES = 2**62"
    with server(tmp_path, "-p", "0", "-T", str(free_port()), *flags, patch=patch) as publisher:
        assert not_ready(publisher) == ["consumer_unreachable", "spool_full"]


def test_what_one_link_loses_and_another_one_stores_leaves_the_consumer_up(tmp_path: Path) -> None:
    """The worker whose link failed has nothing to try again with; ready must not wait for it."""
    with (
        server(tmp_path, "-I", "false", "-p", "0", "-n", "1", patch=QUICK) as consumer,
        server(
            tmp_path,
            "-p",
            "0",
            "-T",
            str(consumer.port),
            "-r",
            "64",
            patch=f"forward.workers.IDLE_SECONDS = 0.3; forward.workers.QUIET_SECONDS = 0; {QUICK}",
        ) as publisher,
        RawClient(publisher.port) as client,
    ):
        sent = 0
        while publisher.stats()["mostWorkers"] < 2 or "link_down" not in publisher.errors.read_text():
            client.send(frame(2, bytes(8)) * 100)
            sent += 100
            assert sent < 1_000_000
        client.acked(sent)
        eventually(lambda: publisher.stats()["consumerState"] == "up")
        eventually(lambda: not_ready(publisher) == [])


@pytest.mark.parametrize("role", ["consumer", "publisher"])
def test_whatever_hangs_who_asks_is_answered_and_the_server_ends(tmp_path: Path, role: str) -> None:
    """The consumer's disk hangs; to the publisher the consumer answers, but ever so slowly."""
    patch = f"{QUICK}; app.DRAIN_SECONDS = 1"
    with socket.create_server(("localhost", 0)) as listener:
        if role == "consumer":
            flags = ["-I", "false"]
            patch += "; store.Store.check = lambda self: __import__('time').sleep(600)"
        else:
            flags = ["-T", str(listener.getsockname()[1])]
        with server(tmp_path, "-p", "0", *flags, patch=patch) as running:
            over = threading.Event()

            def dribble() -> None:
                peer, _ = listener.accept()
                with peer:
                    while not over.wait(0.1):
                        peer.sendall(b"H" if peer.recv(65536) else b"")

            dribbling = Blocked(dribble) if role == "publisher" else None
            codes = ["store_failing"] if role == "consumer" else ["consumer_unreachable"]
            asking = [Blocked(lambda: not_ready(running)) for _ in range(5)]
            assert [each.result(10) for each in asking] == [codes] * 5
            assert not_ready(running) == codes
            over.set()
            assert dribbling is None or dribbling.result() is None
            assert running.stop() == 0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "consumer_unreachable"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n{"ready": true}', None),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 2\r\n\r\n[]", "consumer_unreachable"),
        (b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n", "consumer_unreachable"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "consumer_unreachable"),
        (b"", "consumer_unreachable"),
    ],
)
def test_a_consumer_that_answers_otherwise(answer: bytes, expected: str | None) -> None:
    with socket.create_server(("localhost", 0)) as listener:
        asked = Blocked(
            lambda: readiness._check_consumer(
                Endpoint("localhost", listener.getsockname()[1], "localhost"), CredentialSet(), linked=False
            )
        )
        peer, _ = listener.accept()
        with peer:
            peer.recv(65536)
            peer.sendall(answer)
        found = asked.result()
    assert (found and found[0]) == expected


def test_many_who_ask_at_once_get_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "FRESH", 600)
    gate, calls = threading.Event(), []

    def ask() -> tuple[str, str]:
        calls.append(1)
        assert gate.wait(30)
        return "away", "why"

    question = _Question("x", ask, ("late", "no answer"))
    monkeypatch.setattr(probe, "PATIENCE", 600)
    asking = [Blocked(lambda: question.reason(wait=True)) for _ in range(10)]
    assert all(each.still(0.01) for each in asking)
    gate.set()
    assert {each.result()[:2] for each in asking} == {("away", "why")} and len(calls) == 1
    assert isinstance(question.reason(wait=True), Reason) and len(calls) == 1


def test_while_there_is_no_answer_the_last_one_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "FRESH", 0)
    monkeypatch.setattr(probe, "PATIENCE", 0.1)
    gate = threading.Event()
    gate.set()
    question = _Question("x", lambda: None if gate.wait(30) else None, ("late", "no answer"))
    eventually(lambda: question.reason(wait=True) is None)
    gate.clear()
    for _ in range(2):
        found = question.reason(wait=True)
        assert found and found.code == "late"
    gate.set()
    eventually(lambda: question.reason(wait=True) is None)


@pytest.mark.parametrize("name", ["a b", "a..b", "x" * 64, "caf\xe9.invalid"])
def test_a_name_that_no_host_can_have_is_a_consumer_that_cannot_be_reached(name: str) -> None:
    found = readiness._check_consumer(Endpoint(name, 1, name), CredentialSet(), linked=False)
    assert found and found[0] == "consumer_unreachable" and name in found[1]


def test_an_error_nobody_expected_is_an_answer_for_those_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "FRESH", 600)

    def ask() -> None:
        raise ZeroDivisionError

    question = _Question("x", ask, ("late", "no answer"))
    for _ in range(2):
        found = question.reason(wait=True)
        assert found and found[:2] == ("failed", "ZeroDivisionError: ")
