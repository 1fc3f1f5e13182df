"""`GET /v1.0/ready` of running servers: 200 if a record sent now would be stored now, else 503 and the reasons.

The rules by themselves are in test_readiness_rules.py, probes in test_probe.py, failing disks in test_faults_disk.py.
"""

import datetime
import http.client
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

QUICK = (
    "status.probe.CACHE_SECONDS = 0.05; status.probe.ANSWER_TIMEOUT_SECONDS = 0.5; "
    "status.readiness_rules.RING_STUCK_SECONDS = 0.1"
)


def reasons(running: ServerProcess) -> list[dict[str, Any]]:
    """Return the reasons for which a server says that it is not ready."""
    return list(json.loads(running.get("/v1.0/ready")[2])["reasons"])


@pytest.mark.slow
@pytest.mark.parametrize("role", [["-T", "0"], ["-I", "false"]], ids=["publisher", "consumer"])
def test_server_with_a_database_is_ready(tmp_path: Path, role: list[str]) -> None:
    with server(tmp_path, "-p", "0", *role) as running:
        assert not_ready(running) == []
        assert request(running.port, "HEAD", "/v1.0/ready")[::2] == (200, b"")
        status, headers, _ = request(running.port, "POST", "/v1.0/ready")
        assert (status, headers["Allow"]) == (405, "GET, HEAD")
        assert request(running.port, "GET", "/v1.0/ready", headers={"Accept": "text/html"})[0] == 406
        assert running.stats()["commits"] == 0, "a test commit does not count"


@pytest.mark.slow
def test_idle_publisher_is_ready_while_its_consumer_is(tmp_path: Path) -> None:
    """No record in flight shows the publisher that the consumer has gone, so it must ask."""
    port = free_port()
    with server(tmp_path, "-p", "0", "-T", str(port), patch=QUICK) as publisher:
        assert not_ready(publisher) == ["consumer_unreachable"]
        (reason,) = reasons(publisher)
        since = datetime.datetime.fromisoformat(reason["since"].replace("Z", "+00:00"))
        assert abs((datetime.datetime.now(datetime.timezone.utc) - since).total_seconds()) < 600
        assert f"localhost:{port}" in reason["detail"]
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
        assert "event=link_" not in publisher.errors.read_text(), "only links log, and there was no link"


@pytest.mark.slow
def test_stats_and_metrics_show_the_consumer_of_an_idle_publisher(tmp_path: Path) -> None:
    """They make the publisher ask but do not wait long for the answer: the next request has it."""
    port = free_port()
    with server(tmp_path, "-p", "0", "-T", str(port), patch=QUICK) as publisher:

        def shown(state: str, codes: list[str]) -> bool:
            stats, metrics = publisher.stats(), publisher.get("/metrics")[2].decode()
            up = f"\nringoexp_consumer_up {int(state != 'down')}\n" in metrics
            ready = f"\nringoexp_ready {int(not codes)}\n" in metrics
            return (stats["consumerState"], stats["notReady"]) == (state, codes) and up and ready

        eventually(lambda: shown("down", ["consumer_unreachable"]))
        stats = publisher.stats()
        assert f"localhost:{port}" in stats["consumerReason"] and stats["consumerAwayMs"] > 0
        with server(tmp_path, "-I", "false", "-p", str(port), patch=QUICK):
            eventually(lambda: shown("up", []))
            assert publisher.stats()["consumerAwayMs"] == 0
        eventually(lambda: shown("down", ["consumer_unreachable"]))


@pytest.mark.slow
def test_since_stays_the_time_of_the_first_failure(tmp_path: Path) -> None:
    """It is computed from the clock for each response, so it may differ by a few milliseconds."""
    with server(tmp_path, "-p", "0", "-T", str(free_port()), patch=QUICK) as publisher:

        def since() -> float:
            return datetime.datetime.fromisoformat(reasons(publisher)[0]["since"].replace("Z", "+00:00")).timestamp()

        first, asked = since(), publisher.stats()["totalConnections"]
        eventually(lambda: abs(since() - first) < 0.1 and publisher.stats()["totalConnections"] > asked + 60)
        with RawClient(publisher.port) as client:
            client.send(frame(2, bytes(4)))
            eventually(lambda: "event=link_down" in publisher.errors.read_text())
            link_down = since()
            assert publisher.stats()["consumerReason"] in json.dumps(reasons(publisher))
            eventually(lambda: publisher.stats()["consumerAwayMs"] > 300)
            assert abs(since() - link_down) < 0.1


@pytest.mark.slow
def test_full_ring_is_a_reason_once_it_is_stuck(tmp_path: Path) -> None:
    """The consumer answers requests but does not ack records."""
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
            details = [reason["detail"] for reason in reasons(publisher) if reason["code"] == "ring_full"]
            assert details == ["all 4 slots are in use"]


@pytest.mark.slow
def test_draining_server_is_not_ready(tmp_path: Path) -> None:
    patch = f"app.DRAIN_SECONDS = 600; {QUICK}"
    with (
        server(tmp_path, "-p", "0", "-T", str(free_port()), patch=patch) as publisher,
        RawClient(publisher.port) as client,
    ):
        client.send(frame(2, bytes(4)))
        eventually(lambda: publisher.stats()["ringDepth"] == 1)
        publisher.send_signal(signal.SIGTERM)

        def is_draining() -> bool:
            try:
                return not_ready(publisher) == ["draining"]
            except http.client.RemoteDisconnected:
                return False  # the server began to stop between accepting this connection and reading its request

        eventually(is_draining)


@pytest.mark.slow
def test_server_at_its_connection_limit_is_not_ready(tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", "-n", "1", patch=QUICK) as running:
        with RawClient(running.port):
            assert not_ready(running) == ["connections_full"]
        eventually(lambda: not_ready(running) == [])


@pytest.mark.slow
def test_linked_publisher_ignores_the_consumers_connection_limit(tmp_path: Path) -> None:
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
            assert not_ready(other) == ["consumer_not_ready"], "it has no link, and cannot get one"


@pytest.mark.slow
def test_chain_of_publishers_is_ready_if_all_of_them_are(tmp_path: Path) -> None:
    port = free_port()
    with (
        server(tmp_path, "-p", "0", "-T", str(port), patch=QUICK) as region,
        server(tmp_path, "-p", "0", "-T", str(region.port), patch=QUICK) as edge,
    ):
        assert not_ready(edge) == ["consumer_not_ready"]
        assert f"localhost:{port}" in reasons(edge)[0]["detail"], "the detail names the unreachable server"
        with server(tmp_path, "-I", "false", "-p", str(port), patch=QUICK):
            eventually(lambda: not_ready(edge) == [])


@pytest.mark.slow
def test_publisher_with_a_spool_is_ready_until_it_is_full(tmp_path: Path) -> None:
    flags = ["-S", "s.spool", "--spool_max", "4"]
    with server(tmp_path, "-p", "0", "-T", str(free_port()), *flags, patch=QUICK) as publisher:
        assert not_ready(publisher) == []
        assert request(publisher.port, "POST", "/v1.0/ingest", bytes(24))[0] == 200
        assert publisher.stats()["consumerState"] == "down" and not_ready(publisher) == []
        assert request(publisher.port, "POST", "/v1.0/ingest", bytes(8))[0] == 200
        assert not_ready(publisher) == ["consumer_unreachable", "spool_full"]


@pytest.mark.slow
def test_spool_on_a_nearly_full_disk_is_a_reason(tmp_path: Path) -> None:
    flags = ["-S", "s.spool"]
    patch = f"{QUICK}; forward.spool.MIN_FREE_BYTES = 2**62"
    with server(tmp_path, "-p", "0", "-T", str(free_port()), *flags, patch=patch) as publisher:
        assert not_ready(publisher) == ["consumer_unreachable", "spool_full"]


@pytest.mark.slow
def test_consumer_is_up_if_one_link_fails_and_another_stores(tmp_path: Path) -> None:
    """The worker whose link failed has no record left to try again. The consumer must not stay down because of it."""
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
            patch=f"forward.workers.IDLE_SECONDS = 0.3; forward.health.QUIET_SECONDS = 0; {QUICK}",
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


@pytest.mark.slow
@pytest.mark.parametrize("role", ["consumer", "publisher"])
def test_ready_answers_and_server_stops_if_a_probe_hangs(tmp_path: Path, role: str) -> None:
    """The consumer's disk hangs. The publisher's consumer sends single bytes, and never completes an answer."""
    patch = f"{QUICK}; app.DRAIN_SECONDS = 1"
    with socket.create_server(("localhost", 0)) as listener:
        if role == "consumer":
            flags = ["-I", "false"]
            patch += "; store.Store.check = lambda self: __import__('time').sleep(600)"
        else:
            flags = ["-T", str(listener.getsockname()[1])]
        with server(tmp_path, "-p", "0", *flags, patch=patch) as running:
            done = threading.Event()

            def dribble() -> None:
                peer, _ = listener.accept()
                with peer:
                    while not done.wait(0.1):
                        peer.sendall(b"H" if peer.recv(65536) else b"")

            dribbling = Blocked(dribble) if role == "publisher" else None
            codes = ["store_failing"] if role == "consumer" else ["consumer_unreachable"]
            asking = [Blocked(lambda: not_ready(running)) for _ in range(5)]
            assert [caller.result(10) for caller in asking] == [codes] * 5
            assert not_ready(running) == codes
            done.set()
            assert dribbling is None or dribbling.result() is None
            assert running.stop() == 0
