"""The load generator: sends many WebSocket messages from one process, which builds them before it starts the clock.

`python bench/load.py PORT CONNECTIONS MESSAGES PAYLOAD` sends MESSAGES messages of PAYLOAD bytes on each of CONNECTIONS
connections, as fast as the server takes them, and prints one line of JSON when all are acked. PAYLOAD can also be a
mix: `4/8` alternates between sizes, and `8-64` takes a random multiple of 8 from that range for each message. With
`--in-flight-1`, it sends a message once the one before it is acked, and prints latencies. Values are random 32-bit
numbers for all sizes of messages; with `--wide`, 64-bit numbers.
"""

import argparse
import base64
import json
import os
import random
import selectors
import socket
import statistics
import struct
import sys
import time
from array import array
from itertools import cycle, islice

BLOCK_BYTES = 1 << 20
SEND_BYTES = 256 * 1024
MIXED_FRAMES = 20_000
"""Frames in a block of mixed sizes, which are built one by one."""


def connect(port: int) -> socket.socket:
    """Return a socket that is connected and has done the WebSocket handshake."""
    sock = socket.create_connection(("127.0.0.1", port), 30)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return upgrade(sock, port)


def upgrade(sock: socket.socket, port: int) -> socket.socket:
    """Do the WebSocket handshake on a connected socket and return it."""
    key = base64.b64encode(os.urandom(16)).decode()
    sock.sendall(
        f"GET /v1.0/ingest HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    response = b""
    while not response.endswith(b"\r\n\r\n"):
        data = sock.recv(1)
        if not data:
            raise ConnectionError("closed during the handshake")
        response += data
    if b" 101 " not in response.partition(b"\r\n")[0]:
        raise ConnectionError(response.decode())
    return sock


def frames(payload: int, count: int, wide: bool = False) -> bytes:
    """Return `count` consecutive frames with `payload` bytes of random values and random masks."""
    if payload < 126:
        head = bytes([0x82, 0x80 | payload])
    elif payload < 65536:
        head = bytes([0x82, 0xFE]) + struct.pack(">H", payload)
    else:
        head = bytes([0x82, 0xFF]) + struct.pack(">Q", payload)
    masks = array("I", os.urandom(4 * count))
    values = os.urandom(payload * count)
    if payload > 4 and not wide:
        narrow = array("q", array("i", values[: len(values) // 2]))
        narrow.byteswap()
        values = narrow.tobytes()
    parts = []
    for i, mask in enumerate(masks):
        key = mask.to_bytes(4, "big") * (payload // 4)
        masked = int.from_bytes(key, "big") ^ int.from_bytes(values[i * payload : (i + 1) * payload], "big")
        parts += head, key[:4], masked.to_bytes(payload, "big")
    return b"".join(parts)


def sizes_of(payload: str) -> list[int]:
    """Return the payload sizes of a mix, for example "4", "4/8" or "8-64". Each is equally frequent."""
    if "-" in payload:
        least, greatest = map(int, payload.split("-"))
        return list(range(least, greatest + 1, 8))
    return list(map(int, payload.split("/")))


def records_in(size: int) -> int:
    """Return the number of records in a message of this size."""
    return max(1, size // 8)


def mixed_frames(payload: str, count: int, wide: bool = False) -> tuple[bytes, int]:
    """Return `count` consecutive frames of a mix, and the number of their records."""
    sizes = sizes_of(payload)
    order = random.choices(sizes, k=count) if "-" in payload else list(islice(cycle(sizes), count))
    return b"".join(frames(size, 1, wide) for size in order), sum(map(records_in, order))


class Sender:
    """One connection, with the bytes left to send and the records acked."""

    def __init__(self, sock: socket.socket, block: memoryview, size: int, records: int) -> None:
        self.sock, self.block, self.left, self.records = sock, block, size, records
        self.at = 0
        self.acked = 0
        self.tail = b""

    def send(self) -> bool:
        """Send the bytes that the socket takes at once. True if all are sent."""
        part = self.block[self.at : self.at + min(SEND_BYTES, self.left)]
        try:
            sent = self.sock.send(part)
        except BlockingIOError:
            return False
        self.left -= sent
        self.at = (self.at + sent) % len(self.block)
        return not self.left

    def read(self) -> bool:
        """Read acks. True if all records are acked."""
        data = self.sock.recv(65536)
        if not data:
            raise ConnectionError(f"closed with {self.acked} of {self.records} acked")
        data = self.tail + data
        whole = len(data) // 10 * 10
        self.tail = data[whole:]
        if whole:
            head, self.acked = struct.unpack(">HQ", data[whole - 10 : whole])
            if head != 0x8208:
                raise ConnectionError(f"not an ack: {data[whole - 10 : whole]!r}")
        return self.acked == self.records


def stream(port: int, connections: int, messages: int, payload: str, wide: bool = False) -> dict[str, float]:
    """Send all messages as fast as the server takes them, and wait for the last ack.

    Of a mix, the number of messages is rounded to whole blocks.
    """
    sizes = sizes_of(payload)
    if len(sizes) == 1:
        frame = len(frames(sizes[0], 1))
        block = frames(sizes[0], max(1, BLOCK_BYTES // frame), wide)
        total, records = messages * frame, messages * records_in(sizes[0])
    else:
        count = min(messages, MIXED_FRAMES)
        block, records = mixed_frames(payload, count, wide)
        total, records = messages // count * len(block), messages // count * records
    selector = selectors.DefaultSelector()
    senders = [Sender(connect(port), memoryview(block), total, records) for _ in range(connections)]
    for sender in senders:
        sender.sock.setblocking(False)
        selector.register(sender.sock, selectors.EVENT_READ | selectors.EVENT_WRITE, sender)
    started, cpu = time.perf_counter(), time.process_time()
    waiting = connections
    while waiting:
        for key, events in selector.select():
            sender = key.data
            if events & selectors.EVENT_READ and sender.read():
                selector.unregister(sender.sock)
                sender.sock.close()
                waiting -= 1
            elif events & selectors.EVENT_WRITE and sender.send():
                selector.modify(sender.sock, selectors.EVENT_READ, sender)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return {"seconds": seconds, "cpuSeconds": cpu, "records": records * connections}


def ping_pong(port: int, messages: int, payload: str) -> dict[str, float]:
    """Send with one message in flight; return percentiles of the time from a send to its ack, in milliseconds."""
    sock = connect(port)
    blocks = frames(int(payload), messages)
    frame = len(blocks) // messages
    latencies = []
    for start in range(0, len(blocks), frame):
        started = time.perf_counter()
        sock.sendall(blocks[start : start + frame])
        received = 0
        while received < 10:
            received += len(sock.recv(10 - received)) or sys.exit("closed before the ack")
        latencies.append((time.perf_counter() - started) * 1000)
    sock.close()
    cuts = statistics.quantiles(latencies, n=1000)
    return {"p50": cuts[499], "p99": cuts[989], "p999": cuts[998], "most": max(latencies)}


def main() -> None:
    parser = argparse.ArgumentParser(description="sends WebSocket messages and waits for their acks")
    for name in ("port", "connections", "messages"):
        parser.add_argument(name, type=int)
    parser.add_argument("payload", help="bytes in a message; 4/8: alternating; 8-64: random multiples of 8")
    parser.add_argument("--in-flight-1", action="store_true", help="wait for each ack; CONNECTIONS must be 1")
    parser.add_argument("--wide", action="store_true", help="values of 64 bits, in messages of at least 8 bytes")
    arguments = parser.parse_args()
    if arguments.in_flight_1:
        print(json.dumps(ping_pong(arguments.port, arguments.messages, arguments.payload)))
    else:
        print(
            json.dumps(
                stream(arguments.port, arguments.connections, arguments.messages, arguments.payload, arguments.wide)
            )
        )


if __name__ == "__main__":
    main()
