"""The cost of TLS: throughput, latency, CPU time and memory of a connection, with TLS and without.

`python bench/tls_cost.py` measures both in turns, in one run, and prints the medians of the rounds and their ratio:

- throughput of one connection with 4-byte messages (`-r 65536`, own consumer; this process sends, and encrypts on the
  other core)
- time from sending a record to its ack, with one record in flight
- CPU time of the server for a connection with one request
- resident memory of an idle connection

`--quick` takes a few seconds and shows only that the program works. Linux only: it reads /proc.
"""

import argparse
import http.client
import select
import socket
import ssl
import statistics
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "tests")]

import load  # noqa: E402
from support.certificates import Authority, tls  # noqa: E402

from bench import Process, cpu_seconds  # noqa: E402
from ringolib.net.tls import client_context  # noqa: E402

SEND_BYTES = 64 * 1024


class Sizes(NamedTuple):
    """The size of a run."""

    rounds: int
    messages: int  # of the throughput
    acks: int  # of the latency
    connections: int  # of the CPU time
    idle: int  # connections of the memory


WHOLE = Sizes(rounds=3, messages=5_000_000, acks=2000, connections=300, idle=500)
QUICK = Sizes(rounds=1, messages=200_000, acks=50, connections=20, idle=20)


class Result(NamedTuple):
    """The measurements of one run."""

    rate: float  # records a second
    ack: float  # ms, median
    connection: float  # ms of the server's CPU time
    idle: float  # KiB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="only show that the program works")
    sizes = QUICK if parser.parse_args().quick else WHOLE
    with tempfile.TemporaryDirectory(prefix="ringoexp-bench-") as directory:
        authority = Authority(Path(directory))
        flags = tls(authority.issue())
        context = client_context(str(authority.ca))
        runs: list[tuple[Result, Result]] = []
        for _ in range(sizes.rounds):
            runs.append((measure(sizes, [], None), measure(sizes, flags, context)))
    print(f"{'':40}{'plain':>12}{'TLS':>12}{'ratio':>8}")
    for number, (name, unit) in enumerate(
        (("one connection", "records/s"), ("ack, one in flight", "ms"), ("a connection", "ms CPU"), ("idle one", "KiB"))
    ):
        plain, secure = (statistics.median(pair[which][number] for pair in runs) for which in (0, 1))
        digits = 0 if plain > 1000 else 2
        ratio = (
            f"{secure / plain:.2f}" if plain > 0 else "-"
        )  # 0: a few connections may fit into pages that the server already has
        print(f"{f'{name}, {unit}':40}{plain:12,.{digits}f}{secure:12,.{digits}f}{ratio:>8}")


def measure(sizes: Sizes, flags: list[str], context: ssl.SSLContext | None) -> Result:
    """Measure everything on a new server."""
    with tempfile.TemporaryDirectory(prefix="ringoexp-bench-") as directory:
        process = Process(directory, "-p", "0", "-T", "0", "-r", "65536", *flags)
        try:
            rate = stream(process.port, sizes.messages, context)
            ack = ping_pong(process.port, sizes.acks, context)
            before = cpu_seconds(process.pid)
            for _ in range(sizes.connections):
                request_alive(process.port, context).close()
            connection = (cpu_seconds(process.pid) - before) / sizes.connections * 1000
            before = process.resident()
            held = [request_alive(process.port, context) for _ in range(sizes.idle)]
            idle = (process.resident() - before) / sizes.idle / 1024
            for sock in held:
                sock.close()
            return Result(rate, ack, connection, idle)
        finally:
            process.stop()


def connect(port: int, context: ssl.SSLContext | None) -> socket.socket:
    """Connect, with TLS if there is a context."""
    sock = socket.create_connection(("localhost", port), 30)
    return context.wrap_socket(sock, server_hostname="localhost") if context else sock


def request_alive(port: int, context: ssl.SSLContext | None) -> socket.socket:
    """Return a connection after one request for /v1.0/alive."""
    sock = connect(port, context)
    sock.sendall(b"GET /v1.0/alive HTTP/1.1\r\nHost: localhost\r\n\r\n")
    response = http.client.HTTPResponse(sock)
    response.begin()
    assert response.status == 200
    return sock


def stream(port: int, messages: int, context: ssl.SSLContext | None) -> float:
    """Send 4-byte messages on one connection, and return the acked records per second."""
    sock = load.upgrade(connect(port, context), port)
    frame = len(load.frames(4, 1))
    block = memoryview(load.frames(4, SEND_BYTES // frame))
    left, at, acks, acked = messages * frame, 0, b"", 0
    sock.setblocking(False)
    started = time.perf_counter()
    while acked < messages:
        moved = False
        if left:
            try:
                sent = sock.send(block[at : at + min(left, len(block) - at)])
                left, at, moved = left - sent, (at + sent) % len(block), True
            except (BlockingIOError, ssl.SSLWantWriteError):
                pass
        try:
            acks += sock.recv(65536)
            moved = True
        except (BlockingIOError, ssl.SSLWantReadError):
            pass
        if whole := len(acks) // 10 * 10:
            (acked,) = struct.unpack(">Q", acks[whole - 8 : whole])
            acks = acks[whole:]
        if not moved:
            select.select([sock], [sock] if left else [], [], 30)
    seconds = time.perf_counter() - started
    sock.close()
    return messages / seconds


def ping_pong(port: int, messages: int, context: ssl.SSLContext | None) -> float:
    """Return the median time from sending a record to its ack, in ms."""
    sock = load.upgrade(connect(port, context), port)
    frame = load.frames(4, 1)
    latencies = []
    for _ in range(messages):
        sent_at = time.perf_counter()
        sock.sendall(frame)
        received = 0
        while received < 10:
            received += len(sock.recv(10 - received)) or sys.exit("closed before the ack")
        latencies.append((time.perf_counter() - sent_at) * 1000)
    sock.close()
    return statistics.median(latencies)


if __name__ == "__main__":
    main()
