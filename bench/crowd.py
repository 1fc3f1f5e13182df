"""A crowd of clients with little to say: each has one message of one integer in flight, or sends one per interval.

`python bench/crowd.py PORT CLIENTS SECONDS [--interval SECONDS]` opens CLIENTS WebSockets from one thread, lets them
send for SECONDS, waits for the last acks, and prints one line of JSON. Without `--interval` a client sends its next
message as soon as the last one is acked. With it, each client sends one message per interval, and the clients take
turns evenly. If the last message of a client is not acked when the next one is due, that one is skipped.

The generator shares the machine's cores with the server. So the loop does little for a message: frames are built before
the start, and all acks that one `poll` reports get the same time of arrival.
"""

import argparse
import base64
import json
import os
import resource
import select
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

HANDSHAKES_IN_FLIGHT = 200
TIMEOUT_SECONDS = 30.0
SPARE_FILES = 256
"""Descriptors that a process has open beside its clients."""
ACK_HEAD, ACK_BYTES = b"\x82\x08", 10
PING = 0x89


@dataclass
class Result:
    """What a crowd has measured. Latencies are in ms, from sending a message to its ack."""

    due: int  # messages that were sent or skipped
    sent: int
    acked: int
    seconds: float  # from the first message to the last ack
    p50: float
    p99: float
    slowest: float

    @property
    def rate(self) -> float:
        """The acked messages per second."""
        return self.acked / self.seconds

    @property
    def served(self) -> float:
        """The share of the due messages that were sent and acked."""
        return self.acked / self.due


class Client:
    """One WebSocket with its frame. `acked` is the number in the last ack, which counts the client's stored records."""

    __slots__ = ("sock", "frame", "sent_at", "sent", "acked", "_send", "_recv", "_rest")

    def __init__(self, port: int) -> None:
        self.sock = socket.socket()
        self.sock.settimeout(TIMEOUT_SECONDS)
        self.sock.connect(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._send, self._recv = self.sock.send, self.sock.recv
        key = base64.b64encode(os.urandom(16)).decode()
        self._send(
            f"GET /v1.0/ingest HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        mask, value = os.urandom(4), os.urandom(4)
        self.frame = b"\x82\x84" + mask + bytes(a ^ b for a, b in zip(mask, value, strict=True))
        self.sent_at = 0.0
        self.sent = self.acked = 0
        self._rest = b""

    def finish_handshake(self) -> None:
        """Read the response to the upgrade request."""
        response = b""
        while not response.endswith(b"\r\n\r\n"):
            data = self._recv(4096)
            if not data:
                raise ConnectionError("closed during the handshake")
            response += data
        if b" 101 " not in response.partition(b"\r\n")[0]:
            raise ConnectionError(response.decode())
        self.sock.setblocking(False)

    def send(self) -> None:
        """Send one message."""
        self.sent += 1
        self.sent_at = time.perf_counter()
        self._send(self.frame)

    def read(self) -> bool:
        """Read the data that has arrived. True if it acks the message in flight."""
        data = self._recv(256)
        if len(data) == ACK_BYTES and data[:2] == ACK_HEAD and not self._rest:
            acked = int.from_bytes(data[2:], "big")
        elif data:
            acked = self._parse(data)
        else:
            raise ConnectionError("closed by the server")
        is_news, self.acked = acked != self.acked, acked
        if is_news and acked != self.sent:
            raise ConnectionError(f"{acked} records are acked, but {self.sent} were sent")
        return is_news

    def _parse(self, data: bytes) -> int:
        """Return the number in the last ack of data that may also hold pings, or a part of a frame."""
        acked, data = self.acked, self._rest + data
        while len(data) >= 2:
            size = 2 + data[1]
            if data[0] != PING and data[:2] != ACK_HEAD:
                raise ConnectionError(f"not an ack: {data[:12]!r}")
            if len(data) < size:
                break
            if data[0] != PING:
                acked = int.from_bytes(data[2:size], "big")
            data = data[size:]
        self._rest = data
        return acked


def allow_clients(wanted: int) -> int:
    """Raise the limit of open files for `wanted` clients; return how many clients it then allows.

    Servers started later inherit the limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    needed = max(soft, wanted + SPARE_FILES)
    limit = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return min(wanted, limit - SPARE_FILES)


@contextmanager
def connect(port: int, clients: int) -> Iterator[list[Client]]:
    """Connect `clients` clients, HANDSHAKES_IN_FLIGHT at a time; close them at the end of the block."""
    crowd: list[Client] = []
    try:
        while len(crowd) < clients:
            first = len(crowd)
            while len(crowd) < min(clients, first + HANDSHAKES_IN_FLIGHT):
                crowd.append(Client(port))
            for client in crowd[first:]:
                client.finish_handshake()
        yield crowd
    finally:
        for client in crowd:
            client.sock.close()


def run(crowd: list[Client], seconds: float, interval: float | None = None) -> Result:
    """Send for `seconds`, wait for the last acks, and return the figures.

    If acks are still missing TIMEOUT_SECONDS later, fewer messages are acked than were sent.
    """
    clients = {client.sock.fileno(): client for client in crowd}
    step = interval / len(crowd) if interval else 0.0  # from one client's turn to the next one's
    latencies: list[float] = []
    due = in_flight = 0
    with select.epoll() as poller:
        for descriptor in clients:
            poller.register(descriptor, select.EPOLLIN)
        started = now = time.perf_counter()
        end = started + seconds
        if interval is None:
            for client in crowd:
                client.send()
            due = in_flight = len(crowd)
        while now < end or in_flight:
            wake_at = end if now < end else end + TIMEOUT_SECONDS
            while interval and now < end and (wake_at := min(end, started + due * step)) <= now:
                client = crowd[due % len(crowd)]
                due += 1
                if client.acked == client.sent:
                    client.send()
                    in_flight += 1
            events = poller.poll(max(0.0, wake_at - now))
            now = time.perf_counter()
            if not events and now > end + TIMEOUT_SECONDS:
                break
            for descriptor, _ in events:
                client = clients[descriptor]
                if not client.read():
                    continue
                latencies.append(now - client.sent_at)
                if interval is None and now < end:
                    client.send()
                    due += 1
                else:
                    in_flight -= 1
    return Result(due, sum(client.sent for client in crowd), len(latencies), now - started, *percentiles(latencies))


def percentiles(latencies: list[float]) -> tuple[float, float, float]:
    """Return p50, p99 and the greatest of latencies in seconds, in ms."""
    if not latencies:
        return (float("nan"),) * 3
    ordered = sorted(latencies)
    p50, p99 = (ordered[len(ordered) * percent // 100] * 1000 for percent in (50, 99))
    return p50, p99, ordered[-1] * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description="a crowd of clients with little to say")
    parser.add_argument("port", type=int)
    parser.add_argument("clients", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--interval", type=float, help="seconds between two messages of a client")
    arguments = parser.parse_args()
    if allow_clients(arguments.clients) < arguments.clients:
        raise SystemExit("the limit of open files is too low for so many clients")
    started = time.perf_counter()
    with connect(arguments.port, arguments.clients) as crowd:
        handshakes = arguments.clients / (time.perf_counter() - started)
        cpu = time.process_time()
        result = run(crowd, arguments.seconds, arguments.interval)
        cpu = time.process_time() - cpu
    figures = {
        "rate": result.rate,
        "served": result.served,
        "p50": result.p50,
        "p99": result.p99,
        "slowest": result.slowest,
        "handshakesPerSecond": handshakes,
        "cpuSeconds": cpu,
    }
    print(json.dumps({"sent": result.sent, "acked": result.acked} | {k: round(v, 3) for k, v in figures.items()}))


if __name__ == "__main__":
    main()
