"""The measuring functions of the bench. The bench itself measures speed."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.harness import ROOT

BENCH = ROOT / "bench"

BUSY = """
import sys, threading
for _ in sys.stdin:
    thread = threading.Thread(target=sum, args=(range(20_000),))
    thread.start()
    thread.join()
    print("done", flush=True)
"""

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the bench reads /proc and CPU clocks as Linux has them"
)


@pytest.fixture(autouse=True)
def bench_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tests import the modules of the bench."""
    monkeypatch.syspath_prepend(str(BENCH))


def serve(answer: Callable[[socket.socket], object]) -> int:
    """Run a server for one connection: it answers the handshake and calls `answer`. Return its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        with listener:
            sock, _ = listener.accept()
        with sock:
            request = b""
            while not request.endswith(b"\r\n\r\n"):
                request += sock.recv(4096)
            sock.sendall(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
            answer(sock)

    threading.Thread(target=run, daemon=True).start()
    return int(listener.getsockname()[1])


def ack(count: int) -> bytes:
    """Return the frame that acks this number of records."""
    return b"\x82\x08" + count.to_bytes(8, "big")


def payload_sizes(data: bytes) -> list[int]:
    """Return the payload sizes of consecutive masked frames of less than 126 bytes."""
    sizes = []
    while data:
        assert data[0] == 0x82 and 0x80 <= data[1] < 0x80 + 126
        sizes.append(data[1] - 0x80)
        assert len(data) >= 6 + sizes[-1]
        data = data[6 + sizes[-1] :]
    return sizes


def test_cpu_seconds_is_finer_than_a_tick_and_includes_ended_threads() -> None:
    """A tick is 10 ms, longer than twenty short connections take; the measurement of TLS divides by their time."""
    from bench import cpu_seconds

    with subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        readings = []
        for _ in range(5):
            process.stdin.write(b"\n")
            process.stdin.flush()
            assert process.stdout.readline()
            readings.append(cpu_seconds(process.pid))
        process.stdin.close()
    assert readings == sorted(set(readings)), f"each turn takes some time: {readings}"
    steps = [late - early for early, late in zip(readings, readings[1:], strict=False)]
    assert min(steps) < 1 / os.sysconf("SC_CLK_TCK"), f"a turn takes less than a tick: {steps}"


def test_busy_note_appears_above_half_a_core_of_load(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import busy_note

    cores = len(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "getloadavg", lambda: (0.5 * cores, 9.0, 9.0))
    assert busy_note() == ""
    monkeypatch.setattr(os, "getloadavg", lambda: (0.5 * cores + 0.1, 0.0, 0.0))
    assert busy_note().startswith("This machine is busy") and max(map(len, busy_note().splitlines())) <= 100


def test_table_fits_100_columns_and_a_busy_machine_gets_no_verdict() -> None:
    from bench import Row, table

    rows = [
        Row("ceiling: SQLite alone, one thread", "4.71 million rows/s"),
        Row(
            "ack, one message in flight",
            "p50 0.89, p99 12.68, p99.9 138.02 ms",
            "p50 <= 0.45 ms if fsync takes 0.17",
            False,
        ),
        Row("1 connection", "3.43 million records/s", ">= 0.95 x 4-byte messages: 0.90", True),
        Row(
            "2,000 clients",
            "100.0% served, p50 100.74, p99 214.87 ms, 0.82 cores",
            "all, p99 < 50 ms, < 0.5 cores",
            False,
        ),
        Row(
            "by records", "3.52 at 0.1 million, 3.20 at 6.1 million, 3.46 at 12.1 million", "within 1.3 x: 1.10", False
        ),
    ]
    compared, busy = table(rows, compared=True), table(rows, compared=False)
    assert max(map(len, compared)) <= 100
    assert [line.rpartition(", ")[2] for line in compared[3::2]] == ["not met", "met", "not met", "not met"]
    assert not any("met" in line for line in busy)
    assert [line for line in compared if line.isupper() or "MISSED" in line] == []


@pytest.mark.parametrize("interval", [None, 0.1])
def test_crowd_measures_what_the_server_has_stored(interval: float | None) -> None:
    from bench import measure_crowd, own_consumer, stored

    with own_consumer() as (server, database):
        result, cores = measure_crowd(server.port, [server.pid], database, 20, 0.4, interval)
        assert stored(database) == result.acked == result.sent
    assert result.due >= 20 and cores > 0
    assert 0 < result.p50 <= result.p99 <= result.slowest
    if interval is None:
        assert result.due == result.sent
    else:
        assert result.due <= 20 * 4 + 1, "one message per client and interval"


def test_crowd_skips_messages_while_one_is_in_flight() -> None:
    """A server that falls behind does not get the load later. The share of messages served shows it."""
    import crowd

    def answer(sock: socket.socket) -> None:
        for count in range(1, 1000):
            if len(sock.recv(4096)) != 10:
                break
            threading.Event().wait(0.1)
            sock.sendall(ack(count))

    with crowd.connect(serve(answer), 1) as members:
        result = crowd.run(members, 1.0, 0.02)
    assert 0 < result.acked == result.sent < result.due
    assert result.served == result.acked / result.due < 1
    assert result.p50 >= 100


def test_crowd_reads_pings_and_parts_of_acks() -> None:
    import crowd

    def answer(sock: socket.socket) -> None:
        sock.recv(4096)
        for part in (b"\x89\x00", b"\x89\x02hi" + ack(1)[:3], ack(1)[3:]):
            sock.sendall(part)
            threading.Event().wait(0.02)
        sock.recv(4096)

    with crowd.connect(serve(answer), 1) as members:
        result = crowd.run(members, 0)
    assert (result.due, result.sent, result.acked) == (1, 1, 1)


@pytest.mark.parametrize(
    "reply", [ack(2), b"\x88\x02\x03\xe8", b""], ids=["ack of too many records", "close frame", "end of stream"]
)
def test_crowd_fails_if_the_server_does_not_ack(reply: bytes) -> None:
    import crowd

    with crowd.connect(serve(lambda sock: (sock.recv(4096), sock.sendall(reply))), 1) as members:
        with pytest.raises(ConnectionError):
            crowd.run(members, 0)


def test_crowd_uses_as_many_clients_as_the_hard_limit_allows() -> None:
    code = (
        "import crowd, resource; resource.setrlimit(resource.RLIMIT_NOFILE, (300, 1000));"
        "print(crowd.allow_clients(10), resource.getrlimit(resource.RLIMIT_NOFILE)[0]);"
        "print(crowd.allow_clients(10_000) + crowd.SPARE_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCH, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.splitlines() == ["10 300", "1000 1000"]


def test_load_generator_counts_records_of_mixed_sizes() -> None:
    import load

    data, records = load.mixed_frames("4/8", 10)
    assert payload_sizes(data) == [4, 8] * 5 and records == 10
    data, records = load.mixed_frames("8-64", 500)
    sizes = payload_sizes(data)
    assert len(sizes) == 500 and set(sizes) == set(range(8, 65, 8))
    assert records == sum(sizes) / 8


@pytest.mark.parametrize("payload", ["4/8", "8-64"])
def test_bench_stores_all_records_of_mixed_sizes(payload: str) -> None:
    """`throughput` ends the bench unless the database holds all records that were sent."""
    from bench import throughput

    rate, _ = throughput(3000, 4096, 2, payload)
    assert rate > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["node", "go", "websockets_sqlite"])
def test_alternative_stores_what_it_acks_if_it_is_installed(name: str, tmp_path: Path) -> None:
    """Otherwise the bench tells how to install it."""
    import peers

    start: Any = getattr(peers, name)
    tools = peers.Tools(os.environ.get("RINGOEXP_NODE_MODULES", ""), tmp_path)
    try:
        with start(tools) as server:
            run = server.measure(peers.Case("20", 20), 0.3)
    except peers.Missing as reason:
        assert "install" in str(reason)
    else:
        assert run.rate > 0 and run.served == 1 and run.cores > 0 and run.p50 <= run.p99


def test_tables_of_alternatives_fit_100_columns() -> None:
    import peers

    run = peers.Figures(12_345_678.9, 1.25, 1234.5, 12345.6, 0.5)
    figures = {name: dict.fromkeys(cases, run) for name, (_, cases) in peers.PEERS.items()}
    lines = peers.tables(figures)
    assert max(map(len, lines)) <= 100
    assert any("12,345,679" in line for line in lines) and any("1234 / 12346" in line for line in lines)
    assert sum("served 50.0%" in line for line in lines) == 5
