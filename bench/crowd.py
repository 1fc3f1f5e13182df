"""A crowd of clients with little to say: each has one 4-byte message in flight, or sends one at a fixed interval.

`python bench/crowd.py PORT CLIENTS SECONDS [--interval SECONDS]` opens CLIENTS WebSockets from one thread with a
selector, sends single integers for SECONDS, and prints one line of JSON: messages acked in total and per second, and
the latency of an ack in milliseconds (p50, p99, max). With `--interval` each client sends one message per interval,
spread evenly; without it, the next message as soon as the last one is acked.
"""

import argparse
import base64
import heapq
import json
import os
import selectors
import socket
import struct
import sys
import time

CONNECTING = 200
"""Handshakes in flight at once."""
DEADLINE = 30.0


class Client:
    """One WebSocket: its frame, when it sent the last message, and how many acks have come."""

    __slots__ = ("sock", "frame", "sent_at", "sent", "acked", "head")

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), DEADLINE)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        key = base64.b64encode(os.urandom(16)).decode()
        self.sock.sendall(
            f"GET /v1.0/ingest HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        mask, value = os.urandom(4), os.urandom(4)
        self.frame = b"\x82\x84" + mask + bytes(a ^ b for a, b in zip(mask, value, strict=True))
        self.head = b""
        self.sent = self.acked = 0
        self.sent_at = 0.0

    def finish_handshake(self) -> None:
        """Read the answer of the upgrade."""
        while not self.head.endswith(b"\r\n\r\n"):
            data = self.sock.recv(4096)
            if not data:
                raise ConnectionError("closed during the handshake")
            self.head += data
        if b" 101 " not in self.head.partition(b"\r\n")[0]:
            raise ConnectionError(self.head.decode())
        self.head = b""
        self.sock.setblocking(False)

    def send(self, now: float) -> None:
        """Send one message."""
        self.sent_at = now
        self.sent += 1
        self.sock.send(self.frame)


def connect(port: int, clients: int) -> list[Client]:
    """Open all clients, CONNECTING at a time."""
    crowd: list[Client] = []
    while len(crowd) < clients:
        group = [Client(port) for _ in range(min(CONNECTING, clients - len(crowd)))]
        for client in group:
            client.finish_handshake()
        crowd += group
    return crowd


def run(crowd: list[Client], seconds: float, interval: float | None) -> dict[str, float]:
    """Send for `seconds`, wait for the last acks, and return the figures."""
    selector = selectors.DefaultSelector()
    for client in crowd:
        selector.register(client.sock, selectors.EVENT_READ, client)
    latencies: list[float] = []
    clock = time.perf_counter
    started = clock()
    end = started + seconds
    due: list[tuple[float, int]] = []
    if interval is None:
        for client in crowd:
            client.send(clock())
    else:
        due = [(started + interval * number / len(crowd), number) for number in range(len(crowd))]
    waiting = 0 if interval else len(crowd)
    late = 0
    drain_until = end + DEADLINE
    while True:
        now = clock()
        while due and due[0][0] <= now and now < end:
            at, number = heapq.heappop(due)
            client = crowd[number]
            if client.sent > client.acked:
                late += 1  # the last message is not acked yet: skip this one
            else:
                client.send(at)  # latency counts from the moment it was due
                waiting += 1
            heapq.heappush(due, (at + interval, number))
        if now >= end and not waiting or now > drain_until:
            break
        timeout = max(0.0, min(due[0][0] - now, end - now)) if due and now < end else max(0.0, drain_until - now)
        for key, _ in selector.select(timeout):
            client = key.data
            try:
                data = client.sock.recv(4096)
            except BlockingIOError:
                continue
            if not data:
                raise ConnectionError("closed by the server")
            now = clock()
            at = 0
            while at < len(data):  # acks are whole frames of 10 bytes; a ping has its two
                if data[at] == 0x89:
                    at += 2 + data[at + 1]
                    continue
                if data[at] != 0x82 or len(data) - at < 10:
                    raise ConnectionError(f"not an ack: {data[at : at + 12]!r}")
                (count,) = struct.unpack_from(">Q", data, at + 2)
                at += 10
                client.acked = count
            if client.acked >= client.sent:
                latencies.append(now - client.sent_at)
                waiting -= 1
                if interval is None and now < end:
                    client.send(now)
                    waiting += 1
    taken = clock() - started
    latencies.sort()
    acked = len(latencies)
    served = sum(client.acked > 0 for client in crowd)

    def percentile(percent: float) -> float:
        return round(1000 * latencies[min(acked - 1, int(acked * percent / 100))], 3) if latencies else float("nan")

    return {
        "messages": acked,
        "rate": round(acked / taken, 1),
        "served": served,
        "late": late,
        "p50_ms": percentile(50),
        "p99_ms": percentile(99),
        "max_ms": percentile(100),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="a crowd of clients with little to say")
    parser.add_argument("port", type=int)
    parser.add_argument("clients", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--interval", type=float)
    given = parser.parse_args()
    crowd = connect(given.port, given.clients)
    json.dump(run(crowd, given.seconds, given.interval), sys.stdout)
    print()
    for client in crowd:
        client.sock.close()


if __name__ == "__main__":
    main()
