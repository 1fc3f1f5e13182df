"""What TLS costs: records a second, acks, connections, each over TLS and without, measured in turns in one run.

`python bench/tls_cost.py` prints medians of the rounds, and the ratio: records a second on one connection of 4-byte
messages (`-r 65536`, own consumer; this process, which sends, encrypts on the other core); the time from sending a
record to its ack with one in flight; the server's processor time for a connection that is made, asked something, and
closed; resident memory of one that stays open. `--quick` is a few seconds, and shows that all of it works. Linux only:
it reads /proc.
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
    """How much of everything."""

    rounds: int
    messages: int
    acks: int
    connections: int
    idle: int


WHOLE = Sizes(rounds=3, messages=5_000_000, acks=2000, connections=300, idle=500)
QUICK = Sizes(rounds=1, messages=200_000, acks=50, connections=20, idle=20)


class Found(NamedTuple):
    """Of one run."""

    rate: float  # records a second
    ack: float  # ms, median
    connection: float  # ms of the server's processor time
    idle: float  # KiB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="only show that it works")
    sizes = QUICK if parser.parse_args().quick else WHOLE
    with tempfile.TemporaryDirectory(prefix="ringoexp-bench-") as directory:
        authority = Authority(Path(directory))
        flags = tls(authority.issue())
        context = client_context(str(authority.ca))
        runs: list[tuple[Found, Found]] = []
        for _ in range(sizes.rounds):
            runs.append((measure(sizes, [], None), measure(sizes, flags, context)))
    print(f"{'':40}{'plain':>12}{'TLS':>12}{'ratio':>8}")
    for number, (name, unit) in enumerate(
        (("one connection", "records/s"), ("ack, one in flight", "ms"), ("a connection", "ms CPU"), ("idle one", "KiB"))
    ):
        plain, secure = (statistics.median(pair[which][number] for pair in runs) for which in (0, 1))
        digits = 0 if plain > 1000 else 2
        ratio = f"{secure / plain:.2f}" if plain > 0 else "-"  # a few connections may need no page that was not there
        print(f"{f'{name}, {unit}':40}{plain:12,.{digits}f}{secure:12,.{digits}f}{ratio:>8}")


def measure(sizes: Sizes, flags: list[str], context: ssl.SSLContext | None) -> Found:
    """All of it, on a new server."""
    with tempfile.TemporaryDirectory(prefix="ringoexp-bench-") as directory:
        process = Process(directory, "-p", "0", "-T", "0", "-r", "65536", *flags)
        try:
            rate = stream(process.port, sizes.messages, context)
            ack = ping_pong(process.port, sizes.acks, context)
            before = cpu_seconds(process.pid)
            for _ in range(sizes.connections):
                ask(process.port, context).close()
            connection = (cpu_seconds(process.pid) - before) / sizes.connections * 1000
            before = process.resident()
            held = [ask(process.port, context) for _ in range(sizes.idle)]
            idle = (process.resident() - before) / sizes.idle / 1024
            for each in held:
                each.close()
            return Found(rate, ack, connection, idle)
        finally:
            process.stop()


def wrapped(sock: socket.socket, context: ssl.SSLContext | None) -> socket.socket:
    return context.wrap_socket(sock, server_hostname="localhost") if context else sock


def ask(port: int, context: ssl.SSLContext | None) -> socket.socket:
    """A connection over which alive was asked for."""
    sock = wrapped(socket.create_connection(("localhost", port), 30), context)
    sock.sendall(b"GET /v1.0/alive HTTP/1.1\r\nHost: localhost\r\n\r\n")
    response = http.client.HTTPResponse(sock)
    response.begin()
    assert response.status == 200
    return sock


def stream(port: int, messages: int, context: ssl.SSLContext | None) -> float:
    """Records a second, of messages of 4 bytes on one connection, acked."""
    sock = load.upgrade(wrapped(socket.create_connection(("localhost", port), 30), context), port)
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
    """The median time from a record to its ack, in ms."""
    sock = load.upgrade(wrapped(socket.create_connection(("localhost", port), 30), context), port)
    frame = load.frames(4, 1)
    found = []
    for _ in range(messages):
        begun = time.perf_counter()
        sock.sendall(frame)
        got = 0
        while got < 10:
            got += len(sock.recv(10 - got)) or sys.exit("closed before the ack")
        found.append((time.perf_counter() - begun) * 1000)
    sock.close()
    return statistics.median(found)


if __name__ == "__main__":
    main()
