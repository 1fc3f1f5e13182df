"""Random input at the port: the server survives it, keeps no memory of it, and serves good clients at the same time.

The content of each connection depends only on its name and the seed. RINGOEXP_SEED repeats a run;
RINGOEXP_ONLY='plain-0 137' repeats one connection until the time is over.
"""

import os
import random
import re
import socket
import struct
import sys
import threading
import time
import uuid
from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support.gauges import RETURNING, back_to, complaints, settled
from support.harness import (
    HANDSHAKE_LINES,
    ROLES,
    UPGRADE,
    Blocked,
    RawClient,
    ServerProcess,
    frame,
    request,
    rows,
    seeded,
    server,
)

from ringolib.client.producer import Producer
from ringolib.net.frames import MAX_MESSAGE
from ringolib.wire import SUBPROTOCOL, Run, encode_batch, encode_plain

GRACE_SECONDS = 10.0
"""The time for an ack to a good client, and for the server's end of a connection after the client's end."""
PATCH = "forward.workers.IDLE_SECONDS = 0.3; storage.sqlite_file.CACHE_KIB = 1024"
"""SQLite's page cache is small, so that it is full at once: while it fills, the memory grows."""
MAX_GROWTH = 4_000_000
"""Bytes by which the server's memory may grow during the last three quarters of the run: its caches."""
STATUSES = {100, 101, 200, 400, 403, 404, 405, 406, 408, 411, 412, 413, 414, 415, 417, 421, 426, 431, 501, 505}
"""The HTTP statuses that random input may cause. 500 is not one of them."""
REQUIRED_ANSWERS = {200, 400, 404, 405, 406, 1002, 1003, 1007}
"""Statuses and close codes that a run must have caused before it may end."""


class Claim(NamedTuple):
    """The first `acked` records of a connection must be stored once, and begin with `values`.

    The first value identifies the connection, unless the connection has its own `source`.
    """

    values: list[int]
    acked: int
    source: str = ""


class Input(NamedTuple):
    """A message or a request, and the values it surely contains; None if only the server can decide."""

    data: bytes
    values: list[int] | None = None


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Return `data` with bytes changed, removed, doubled or inserted, or with a missing end."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(changed) + 1)
        size = rng.choice([1, 1, 2, 4, 30])
        kind = rng.randrange(6)
        if kind < 2 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            changed[at : at + size] = rng.randbytes(size)
        elif kind == 3:
            del changed[at : at + size]
        elif kind == 4:
            changed[at:at] = changed[at : at + size]
        elif rng.randrange(3) == 0:
            del changed[at:]
    return bytes(changed)


def pieces(rng: random.Random, data: bytes) -> Iterator[bytes]:
    """Yield `data` in one piece, or in several pieces of random size."""
    at = sorted(rng.randrange(len(data) + 1) for _ in range(rng.choice([0, 0, 0, 1, 3, 12])))
    for start, end in zip([0, *at], [*at, len(data)], strict=True):
        yield data[start:end]


# The inputs of a WebSocket connection.


def mask(rng: random.Random) -> bytes:
    return rng.choice([rng.randbytes(4), bytes(4)])


def fragments(rng: random.Random, message: bytes) -> bytes:
    """Return `message` in fragments, some of them empty, with pings and pongs between them."""
    at = sorted(rng.randrange(len(message) + 1) for _ in range(rng.randrange(1, 6)))
    parts = [message[start:end] for start, end in zip([0, *at], [*at, len(message)], strict=True)]
    sent = b""
    for number, part in enumerate(parts):
        sent += frame(0 if number else 2, part, number == len(parts) - 1, mask(rng))
        if number < len(parts) - 1 and rng.randrange(2):
            sent += frame(rng.choice([9, 10]), rng.randbytes(rng.randrange(126)), mask=mask(rng))
    return sent


def wrong_frame(rng: random.Random, message: bytes) -> bytes:
    """Return a frame that is invalid, or may be."""
    kind = rng.randrange(14)
    if kind < 4:
        return mutated(rng, frame(2, message, mask=mask(rng)))
    if kind == 4:  # a random head
        cover = rng.choice([None, mask(rng)])
        return frame(rng.randrange(16), message[:125], rng.randrange(2) > 0, cover, rng.choice([0, 0, 1, 4, 7]))
    if kind == 5:  # a wrong length
        lie = rng.choice(
            [0, 1, 125, 126, 65_535, 65_536, MAX_MESSAGE, MAX_MESSAGE + 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1]
        )
        short = struct.pack(">BH", 254, lie) if lie < 65_536 else struct.pack(">BQ", 255, lie)
        return bytes([rng.choice([0x82, 2, 0x80, 0x89, 0x88])]) + short + mask(rng) + message
    if kind == 6:
        return frame(2, message, mask=None)
    if kind == 7:
        return frame(1, rng.choice(["text é".encode(), rng.randbytes(20), b""]))
    if kind == 8:  # a Close frame with a random code and reason
        code = rng.choice([0, 999, 1000, 1001, 1004, 1005, 1006, 1007, 1015, 1016, 2999, 3000, 4999, 5000, 65_535])
        return frame(8, struct.pack(">H", code) + rng.randbytes(rng.choice([0, 3, 123])))
    if kind == 9:
        return frame(8, rng.randbytes(rng.choice([0, 1, 126, 300])))
    if kind == 10:  # a message of an invalid length, mostly a short one
        return frame(2, rng.randbytes(rng.choice([0, 1, 3, 5, 12, 127, 1001])), mask=mask(rng))
    if kind == 11:  # a message within a fragmented one, or a continuation of nothing
        return frame(rng.choice([0, 2]), message[:9], fin=False) + frame(2, message)
    if kind == 12 and rng.randrange(40) == 0:  # a large message: not a multiple of 8 bytes, or beyond the limit
        large = bytes(rng.choice([MAX_MESSAGE - 1, MAX_MESSAGE + 1]))
        return rng.choice([frame(2, large), frame(2, large, fin=False), frame(1, large)])
    return rng.randbytes(rng.randrange(1, 60))


def plain_inputs(rng: random.Random, tag: int) -> Iterator[Input]:
    """Yield messages of integers. The first integer is `tag`."""
    yield Input(frame(2, struct.pack(">q", tag), mask=mask(rng)), [tag])
    while rng.randrange(15):
        kind = rng.randrange(12)
        if kind < 4:  # several messages of one size, which are decoded together
            size = rng.choice([4, 4, 8, 16, 64, 72])
            for _ in range(rng.choice([1, 2, 5, 9])):
                bits = 32 if size == 4 else 64
                values = [rng.getrandbits(bits) - (1 << bits - 1) for _ in range(max(1, size // 8))]
                payload = struct.pack(">i", *values) if size == 4 else encode_plain(values)
                yield Input(frame(2, payload, mask=mask(rng)), values)
        elif kind < 6:
            yield Input(frame(rng.choice([9, 10]), rng.randbytes(rng.randrange(126)), mask=mask(rng)), [])
        else:
            size = 8000 if rng.randrange(200) == 0 else rng.randrange(1, 20)
            values = [rng.getrandbits(64) - (1 << 63) for _ in range(size)]
            message = encode_plain(values)
            whole = kind < 9
            yield Input(frame(2, message, mask=mask(rng)) if whole else fragments(rng, message), values)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 6])):
        yield Input(wrong_frame(rng, encode_plain([rng.getrandbits(63)] * rng.randrange(1, 5))))


def batch_inputs(rng: random.Random, source: bytes) -> Iterator[Input]:
    """Yield valid batches of `source` in order, then overlapping batches of another source, then invalid ones."""
    sequence = 0
    message = b""
    while rng.randrange(12):
        runs, values = [], array("q")
        for _ in range(rng.choice([1, 1, 2, 5])):
            runs.append(Run(source, sequence, rng.randrange(1, 30)))
            sequence += runs[-1].count
            values.frombytes(rng.randbytes(8 * runs[-1].count))
        message = encode_batch(runs, values)
        yield Input(frame(2, message, mask=mask(rng)) if rng.randrange(3) else fragments(rng, message), list(values))
    for _ in range(rng.choice([0, 1, 4, 20])):  # valid batches that overlap, or end at the largest sequence
        first = rng.choice([0, 5, 100, 2**40, 2**63 - 100])
        runs = [Run(bytes(15) + source[:1], first + rng.randrange(60), rng.randrange(1, 40)) for _ in range(5)]
        message = encode_batch(runs, array("q", rng.randbytes(8 * sum(run.count for run in runs))))
        yield Input(frame(2, message, mask=mask(rng)))
    message = message or encode_batch([Run(source, 0, 1)], array("q", [0]))
    for _ in range(rng.choice([1, 1, 2])):
        if rng.randrange(3):  # invalid runs, counts and sequences
            broken = bytearray(message)
            for _ in range(rng.choice([1, 1, 3])):
                at = rng.choice([0, 20, 28]) + rng.randrange(5)
                broken[at : at + 4] = struct.pack(">I", rng.choice([0, 1, 2, 65_536, 65_537, 2**31, 2**32 - 1]))
            yield Input(frame(2, rng.choice([bytes(broken), mutated(rng, message)]), mask=mask(rng)))
        else:
            yield Input(wrong_frame(rng, message))


# The inputs of an HTTP connection.

METHODS = [*b"GET GET GET HEAD POST POST PUT BREW get finish".split(), b"", b"G\0T", b"X" * 500]
PATHS = [
    *b"/v1.0/alive /v1.0/stats /v1.0/ingest /v1.0/ingest / * //v1.0/alive /v1.0/../v1.0/stats".split(),
    b"",
    b"/a b",
]
PATHS += [b"/\0", b"/%00?\xff", b"http://localhost/v1.0/alive", b"/v1.0/alive?" + b"q" * 9000]
VERSIONS = [b" HTTP/" + version for version in b"1.1 1.1 1.1 1.1 1.1 1.1 1.0 0.9 9.9 1.x 2.0".split()] + [
    b"",
    b" HTTP/1.1 x",
]
ACCEPTS = [*b"*/* application/json text/html application/json;q=x */*;q=nan ;;q=".split(), b"," * 500]
ORIGINS = [*b"http://localhost null http://[ http://localhost:99999 // http://a:b@c".split(), b"http://\xff"]
LENGTHS = [*b"0 4 8 8 16 7 -1 +8 0x8 8,8 8388616".split(), b"9" * 5000, b"\xb2", b""]
BODY = b"application/octet-stream"
HEADERS: list[tuple[bytes, list[bytes]]] = [
    (b"Host", [b"localhost", b"localhost:1", b"", b"[", b"\xff"]),
    (b"Accept", ACCEPTS),
    (
        b"Content-Type",
        [
            b"application/json",
            BODY,
            b"text/plain",
            b"application/x-www-form-urlencoded",
            b";",
            b"\xe9/\xff;=",
            b'a/b; c="',
        ],
    ),
    (b"Origin", ORIGINS),
    (b"Connection", [b"keep-alive", b"close", b"Upgrade", b"keep-alive, Upgrade", b""]),
    (b"Expect", [b"100-continue", b"200-ok"]),
    (b"Content-Length", LENGTHS),
    (b"Transfer-Encoding", [b"chunked", b"identity", b"gzip, chunked", b""]),
    (b"Upgrade", [b"websocket", b"websocket, h2c", b"h2c"]),
    (b"Sec-WebSocket-Version", [b"13", b"8", b"", b"13, 8"]),
    (b"Sec-WebSocket-Key", [b"AAAAAAAAAAAAAAAAAAAAAA==", b"AAAA", b"?" * 24, b"\xff" * 24, b""]),
    (b"Sec-WebSocket-Protocol", [SUBPROTOCOL.encode(), b"x, y", b"\x01", b"\xe9", b",", b""]),
    (b"Sec-WebSocket-Extensions", [b"permessage-deflate", b";;", b"\xff"]),
    (b"X-Long", [b"x" * 5000]),
    (b"X-Longer", [b"x" * 70_000]),
    (b"", [b"no name"]),
    (b" folded", [b"further"]),
    (b"no colon\r\nX", [b"y"]),
    (b"X\0", [b"\0"]),
    (b"X-Bare", [b"a\rb", b"a\nb", b"a\n\tb"]),
]


def http_request(rng: random.Random) -> bytes:
    """Return a request: valid, invalid, or nearly valid."""
    if rng.randrange(12) == 0:
        return mutated(rng, UPGRADE)
    line = rng.choice(METHODS) + b" " + rng.choice(PATHS) + rng.choice(VERSIONS)
    kinds = rng.choices(HEADERS[:-7] if rng.randrange(3) else HEADERS, k=rng.choice([0, 1, 1, 2, 3, 6]))
    fields = [name + rng.choice([b": ", b": ", b":", b" : "]) + rng.choice(values) for name, values in kinds]
    if rng.randrange(60) == 0:
        fields *= 60
    if rng.randrange(8):  # without it, a request in HTTP/1.1 gets 400 only
        fields.insert(0, b"Host: localhost")
    end = b"\n" if rng.randrange(10) == 0 else b"\r\n"
    data = end.join([line, *fields, b"", b""])
    if any(name in (b"Content-Length", b"Transfer-Encoding") for name, _ in kinds):
        data += rng.choice(
            [bytes(4), bytes(8), b"4\r\n\0\0\0\0\r\n0\r\n\r\n", b"POST ", b"", b"[1,", b"1,,2", b"4\n\0"]
        )
    return mutated(rng, data) if rng.randrange(5) == 0 else data


def chunked(rng: random.Random, body: bytes) -> bytes:
    """Return the body in chunks, some with extensions, and with or without a trailer."""
    data, at = b"", 0
    while at < len(body):
        part = body[at : at + rng.choice([1, 3, 10, 1000])]
        data += b"%x%b\r\n%b\r\n" % (len(part), rng.choice([b"", b"", b";a", b' ; a="b;"']), part)
        at += len(part)
    return data + b"0\r\n" + rng.choice([b"", b"A: b\r\n"]) + b"\r\n"


def http_inputs(rng: random.Random, tag: int) -> Iterator[Input]:
    """Yield valid POSTs, then requests of all kinds, pipelined on one connection."""
    for number in range(rng.choice([0, 1, 1, 2, 5])):
        values = [tag + number, *(rng.getrandbits(64) - (1 << 63) for _ in range(rng.randrange(9)))]
        kind, body = rng.choice(
            [
                (BODY, encode_plain(values)),
                (b"text/plain", b", ".join(b"%d" % value for value in values)),
                (b"application/json", b"[%b]" % b",".join(b"%d" % value for value in values)),
                (b"application/x-ndjson", b"\n".join(b"%d" % value for value in values)),
            ]
        )
        framing = b"Content-Length: %d" % len(body)
        if rng.randrange(2):
            framing, body = b"Transfer-Encoding: chunked", chunked(rng, body)
        head = b"POST /v1.0/ingest HTTP/1.1\r\nHost: localhost\r\nContent-Type: %b\r\n%b\r\n\r\n" % (kind, framing)
        yield Input(head + body, values)
    for _ in range(rng.randrange(1, 40)):
        if rng.randrange(3):  # requests that do not end the connection
            path = rng.choice([b"/v1.0/alive", b"/v1.0/stats", b"/v1.0/ingest", b"/" + rng.randbytes(5).hex().encode()])
            head = b" HTTP/1.1\r\nHost: localhost\r\nAccept: " + rng.choice(ACCEPTS) + b"\r\n\r\n"
            yield Input(rng.choice([b"GET ", b"HEAD ", b"PUT "]) + path + head)
        else:
            yield Input(http_request(rng))


def random_inputs(rng: random.Random) -> Iterator[Input]:
    """Yield random bytes, some of them after the beginning of a valid input."""
    for _ in range(rng.choice([1, 1, 2, 5])):
        start = rng.choice(
            [b"", b"", b"GET ", b"POST /v1.0/ingest HTTP/1.1\r\n", b"\x16\x03\x01", b"PRI * HTTP/2.0\r\n\r\n"]
        )
        size = rng.choice([1, 10, 100, 1000, 100_000])
        yield Input(start + rng.randbytes(size) + rng.choice([b"", b"\r\n\r\n", b"\n\n"]))


# The clients.


def talk(rng: random.Random, port: int, start: bytes, inputs: list[Input]) -> bytes | None:
    """Send `start` and `inputs`. Return the response, or None if one side ended the connection without a half-close."""
    with socket.create_connection(("localhost", port), GRACE_SECONDS) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ending = rng.choice(["half-close", "half-close", "half-close", "close", "reset"])
        stream = start + b"".join(item.data for item in inputs)
        if rng.randrange(8) == 0:
            stream, ending = stream[: rng.randrange(len(stream))], rng.choice(["close", "reset"])
        try:
            for piece in pieces(rng, stream):
                client.sendall(piece)
            if ending == "reset":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if ending != "half-close":
                return None
            client.shutdown(socket.SHUT_WR)
        except OSError as error:  # the server may close the connection at an error
            assert not isinstance(error, TimeoutError), "the server neither reads nor ends the connection"
            return None
        answer = b""
        try:
            while data := client.recv(65536):
                answer += data
        except ConnectionResetError:
            return None
        except TimeoutError:
            raise AssertionError(f"not ended within {GRACE_SECONDS} s after {answer[-200:]!r}") from None
        return answer


def frames_of(answer: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield opcode and payload of the server's frames. They must be complete, and shorter than 126 bytes."""
    at = 0
    while at < len(answer):
        head, size = answer[at], answer[at + 1]
        assert head in (0x82, 0x88, 0x8A) and size < 126 and at + 2 + size <= len(answer), answer[at : at + 20]
        yield head & 15, answer[at + 2 : at + 2 + size]
        at += 2 + size


def ending_of(answer: bytes) -> tuple[int, int]:
    """Return the last ack and the code of the Close frame. Fail if the order or content of the frames is invalid."""
    acked, code = 0, 0
    for opcode, payload in frames_of(answer):
        assert not code, "nothing comes after a Close"
        if opcode == 2:
            (count,) = struct.unpack(">Q", payload)
            assert count > acked, "acks grow"
            acked = count
        elif opcode == 8:
            code = struct.unpack(">H", payload[:2])[0] if payload else 1005
            assert 1000 <= code < 5000 and code != 1006 and b"not stored" not in payload, (code, payload)
            payload[2:].decode()
    return acked, code


class Fuzz:
    """The clients that send random input to one server, each in its own thread."""

    def __init__(self, running: ServerProcess, seed: int) -> None:
        self.running = running
        self.seed = seed
        self.claims: list[Claim] = []
        self.inputs: dict[str, int] = defaultdict(int)
        self.connections: dict[str, int] = defaultdict(int)
        self.answers: Counter[int] = Counter()  # close codes (0: no Close frame) and HTTP statuses
        self.recent: dict[str, deque[tuple[str, list[Input]]]] = defaultdict(lambda: deque(maxlen=2))
        self.stop = threading.Event()
        self.only = os.environ.get("RINGOEXP_ONLY", "")

    def run(self, name: str) -> None:
        """Make one connection after the other until `stop`. The start of `name` is the kind of the connections."""
        kind: Callable[[random.Random, str, int], int] = getattr(self, "_" + name.split("-")[0])
        while not self.stop.is_set():
            connection = self.only or f"{name} {self.connections[name]}"
            if connection.split()[0] != name:
                self.stop.wait()
                return
            rng = random.Random(f"{self.seed} {connection}")
            self.inputs[name] += kind(rng, connection, rng.getrandbits(62))
            self.connections[name] += 1

    def _remember(self, connection: str, inputs: Iterator[Input]) -> list[Input]:
        """Return the inputs as a list, and keep it for `explain`."""
        kept = list(inputs)
        self.recent[connection.split("-")[0]].append((connection, kept))
        return kept

    def _certain(self, inputs: list[Input]) -> list[int]:
        values: list[int] = []
        for item in inputs:
            if item.values is None:
                break
            values += item.values
        return values

    def _websocket(self, rng: random.Random, inputs: list[Input], protocol: str, source: str = "") -> None:
        """Send a handshake and `inputs`, check the response, and keep the acks as claims."""
        start = b"GET /v1.0/ingest HTTP/1.1\r\n" + HANDSHAKE_LINES + f"{protocol}\r\n".encode()
        answer = talk(rng, self.running.port, start, inputs)
        if answer is not None:
            head, _, sent = answer.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 101 "), head
            acked, code = ending_of(sent)
            self.answers[code] += 1
            certain = self._certain(inputs)
            if acked:
                self.claims.append(Claim(certain[:acked], acked, source))

    def _plain(self, rng: random.Random, connection: str, tag: int) -> int:
        inputs = self._remember(connection, plain_inputs(rng, tag))
        self._websocket(rng, inputs, "")
        return len(inputs)

    def _batch(self, rng: random.Random, connection: str, tag: int) -> int:
        source = uuid.UUID(int=tag << 64 | 1 << 63)
        inputs = self._remember(connection, batch_inputs(rng, source.bytes))
        self._websocket(rng, inputs, f"Sec-WebSocket-Protocol: {SUBPROTOCOL}\r\n", str(source))
        return len(inputs)

    def _http(self, rng: random.Random, connection: str, tag: int) -> int:
        inputs = self._remember(connection, http_inputs(rng, tag))
        answer = talk(rng, self.running.port, b"", inputs)
        if answer is not None:
            statuses = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", answer)]
            assert set(statuses) <= STATUSES, statuses
            self.answers.update(statuses)
            for item, status in zip(inputs, statuses, strict=False):
                if item.values is None:
                    break
                assert status == 200, "a valid POST before all others is answered 200"
                self.claims.append(Claim(item.values, len(item.values)))
        return len(inputs)

    def _bytes(self, rng: random.Random, connection: str, tag: int) -> int:
        inputs = self._remember(connection, random_inputs(rng))
        talk(rng, self.running.port, b"", inputs)
        return len(inputs)

    def explain(self) -> None:
        """Print the last inputs to stderr, to find the one that made a test fail."""
        print(f"RINGOEXP_SEED={self.seed}; the last connections of each kind:", file=sys.stderr)
        for kept in self.recent.values():
            for connection, inputs in kept:
                print(f"RINGOEXP_ONLY='{connection}' {len(inputs)} inputs, the last ones:", file=sys.stderr)
                for item in inputs[-4:]:
                    print(f"  {len(item.data)} bytes: {item.data[:120]!r}", file=sys.stderr)


class Good:
    """Good clients that run beside the random ones. `check` that they were served."""

    def __init__(self, running: ServerProcess, stop: threading.Event) -> None:
        self.running = running
        self.stop = stop
        self.producer = Producer(running.url)
        self.alive = self.streamed = 0
        self.slowest = 0.0

    def calls(self) -> list[Callable[[], None]]:
        return [self._produce, self._stream, self._ask]

    def _timed(self, started: float) -> None:
        self.slowest = max(self.slowest, time.monotonic() - started)

    def _produce(self) -> None:
        with self.producer as producer:
            while not self.stop.is_set():
                started = time.monotonic()
                producer.send(range(producer.sent, producer.sent + 50))
                producer.flush(GRACE_SECONDS)
                self._timed(started)
                self.stop.wait(0.02)
        assert producer.acked == producer.sent and producer.reconnects == 0

    def _stream(self) -> None:
        with RawClient(self.running.port) as client:
            client.sock.settimeout(GRACE_SECONDS)
            while not self.stop.is_set():
                started = time.monotonic()
                client.send(b"".join(frame(2, struct.pack(">q", self.streamed + n)) for n in range(10)))
                self.streamed += 10
                client.acked(self.streamed)
                self._timed(started)
                self.stop.wait(0.01)

    def _ask(self) -> None:
        while not self.stop.is_set():
            started = time.monotonic()
            assert request(self.running.port, "GET", "/v1.0/alive")[0] == 200
            self._timed(started)
            self.alive += 1
            self.stop.wait(0.05)

    def check(self, stored: dict[str, list[tuple[int, int]]]) -> None:
        assert stored[str(self.producer.source)] == [(n, n) for n in range(self.producer.acked)]
        assert [(n, n) for n in range(self.streamed)] in stored.values()
        assert self.alive and self.streamed and self.producer.acked
        assert self.slowest < GRACE_SECONDS


def check_claims(claims: list[Claim], stored: dict[str, list[tuple[int, int]]]) -> None:
    """Check that every acked record is stored once, with its sequence."""
    by_value = {records[0][1]: records for records in stored.values()}
    for claim in claims:
        records = stored[claim.source] if claim.source else by_value.get(claim.values[0], [])
        known = min(len(claim.values), claim.acked)
        assert records[:known] == list(enumerate(claim.values[:known])), claim
        if not claim.source:
            assert len(records) >= claim.acked, claim


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "least"), [(2.0, 8000), pytest.param(30, 100_000, marks=pytest.mark.long)])
@pytest.mark.parametrize("role", ROLES)
def test_server_survives_random_input_and_serves_good_clients(
    tmp_path: Path, role: str, seconds: float, least: int
) -> None:
    seed = seeded()
    with server(tmp_path, *ROLES[role], patch=PATCH, env=RETURNING) as running:
        assert request(running.port, "POST", "/v1.0/ingest", bytes(4))[0] == 200
        base = settled(running)
        fuzz = Fuzz(running, seed)
        good = []
        held = []
        end = 0.0

        def enough() -> bool:
            return bool(fuzz.only) or (sum(fuzz.inputs.values()) >= least and fuzz.answers.keys() >= REQUIRED_ANSWERS)

        def over() -> bool:
            now = time.monotonic()
            warm = not held and sum(fuzz.inputs.values()) >= least / 4
            return now > end and (warm or enough() or now > end + 60)

        try:
            for share in (0.25, 0.75):
                fuzz.stop = threading.Event()
                good.append(Good(running, fuzz.stop))
                names = ["plain-0", "plain-1", "batch-0", "http-0", "http-1", "bytes-0"]
                calls = [Blocked(lambda name=name: fuzz.run(name)) for name in names]  # type: ignore[misc]
                calls += map(Blocked, good[-1].calls())
                end = time.monotonic() + share * seconds
                while not over() and not complaints(running) and all(call.still(0.01) for call in calls):
                    assert running.process.poll() is None, "the server has ended"
                fuzz.stop.set()
                for call in calls:
                    call.result()
                assert not complaints(running), complaints(running)
                held.append(back_to(running, base))
            print(role, {name: (fuzz.connections[name], fuzz.inputs[name]) for name in fuzz.inputs})
            print(
                f"base {base}; after a quarter {held[0]}; at the end {held[1]}; slowest answer {good[1].slowest:.2f} s"
            )
            print("answers", sorted(fuzz.answers.items()))
            assert enough(), "the run had enough inputs, and all required answers"
            assert held[1].memory - held[0].memory < MAX_GROWTH
            assert running.get("/v1.0/alive")[0] == 200
            counts = running.stats()
            assert running.stop() == 0
            stored: dict[str, list[tuple[int, int]]] = defaultdict(list)
            records_stored = rows(tmp_path / "ringoexp.db")
            for source, sequence, value in records_stored:
                stored[source].append((sequence, value))
            for records in stored.values():
                records.sort()
                assert len({sequence for sequence, _ in records}) == len(records), "stored twice"
            assert len(records_stored) == counts["recordsStored"]
            check_claims(fuzz.claims, stored)
            for clients in good:
                clients.check(stored)
            print(len(fuzz.claims), "connections with acks checked,", len(records_stored), "records stored")
        except BaseException:
            fuzz.explain()
            raise
    assert not complaints(running), complaints(running)


REFUSED = {
    "text": frame(1, b"x" * (MAX_MESSAGE - 99)),
    "an invalid length": frame(2, bytes(MAX_MESSAGE - 99)),
    "too large": frame(2, bytes(MAX_MESSAGE + 8)),
    "incomplete": frame(2, bytes(MAX_MESSAGE - 96))[:-1],
    "a fragment without its end": frame(2, bytes(MAX_MESSAGE - 96), fin=False),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", ["an invalid length, posted", "a malformed batch", *REFUSED])
def test_refused_large_message_is_freed(tmp_path: Path, what: str) -> None:
    """The memory must not wait for Python's cycle collector, which runs rarely in an idle server."""
    with server(tmp_path, *ROLES["publisher"], env=RETURNING) as running:
        batch = {"Sec-WebSocket-Protocol": SUBPROTOCOL} if "batch" in what else {}
        wrong = REFUSED.get(what, REFUSED["an invalid length"])

        def refused() -> None:
            if "posted" in what:
                assert request(running.port, "POST", "/v1.0/ingest", bytes(MAX_MESSAGE - 99))[0] == 400
                return
            with RawClient(running.port, {**batch}) as client:
                try:
                    client.send(wrong)
                    client.sock.shutdown(socket.SHUT_WR)
                    client.closed()
                except OSError:  # the server refused it before all of it arrived
                    pass

        base = settled(running)
        for _ in range(5):
            refused()
        held = back_to(running, base)
        assert held.memory - base.memory < MAX_MESSAGE / 2, f"{what}: {held} after five, before them {base}"
