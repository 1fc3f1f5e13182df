"""A consumer for tests, independent of the program's code: a WebSocket server whose answers are a function.

Each link runs in its own thread: the handshake, then `answer(link)`. When `answer` returns, the link is closed with
1000. The server side of RFC 6455 here is small: no fragments out, no extensions, masked frames in.
"""

import base64
import hashlib
import re
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


class LinkClosed(Exception):
    """The client has closed the link, or it is lost."""


class Pong:
    """The answer to one ping, which `wait` reads for."""

    def __init__(self, link: "Link", payload: bytes) -> None:
        self._link = link
        self._payload = payload

    def wait(self, seconds: float) -> bool:
        """Read frames until the pong has come; False after `seconds`, or if the link ends before."""
        deadline = monotonic() + seconds
        try:
            while self._payload not in self._link.pongs:
                self._link.read_frame(max(0.001, deadline - monotonic()))
        except (LinkClosed, TimeoutError):
            return False
        return True


class Link:
    """The server's end of one link. One thread uses it; `socket` is for tests that break it."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.pongs: set[bytes] = set()
        self._messages: deque[bytes] = deque()
        self._message = b""  # the fragments that have come of the next one
        self._pings = 0
        self._ended = False

    def recv(self) -> bytes:
        """Return the next message. Raises LinkClosed at the end."""
        while not self._messages:
            self.read_frame()
        return self._messages.popleft()

    def __iter__(self) -> Iterator[bytes]:
        try:
            while True:
                yield self.recv()
        except LinkClosed:
            return

    def send(self, message: bytes | str) -> None:
        """Send a binary message, or a text message for a str."""
        if isinstance(message, str):
            self._send(TEXT, message.encode())
        else:
            self._send(BINARY, message)

    def ping(self) -> Pong:
        """Send a ping."""
        self._pings += 1
        payload = struct.pack(">I", self._pings)
        self._send(PING, payload)
        return Pong(self, payload)

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Send a Close frame and read until the client closes, too."""
        self._send(CLOSE, struct.pack(">H", code) + reason.encode())
        try:
            while not self._ended:
                self.read_frame(20)
        except (LinkClosed, TimeoutError):
            pass

    def read_frame(self, seconds: float | None = None) -> None:
        """Read one frame: keep a message, answer a ping, note a pong. Raises LinkClosed, TimeoutError."""
        self.socket.settimeout(seconds)
        first, second = self._read(2)
        size = second & 0x7F
        if size > 125:
            width = 2 if size == 126 else 8
            size = int.from_bytes(self._read(width), "big")
        assert second & 0x80, "a client masks its frames"
        mask = self._read(4)
        payload = self._read(size)
        keys = (mask * (size // 4 + 1))[:size]
        payload = (int.from_bytes(keys, "big") ^ int.from_bytes(payload, "big")).to_bytes(size, "big")
        opcode = first & 0x0F
        if opcode in (0, TEXT, BINARY):
            self._message += payload
            if first & 0x80:
                self._messages.append(self._message)
                self._message = b""
        elif opcode == PING:
            self._send(PONG, payload)
        elif opcode == PONG:
            self.pongs.add(payload)
        elif opcode == CLOSE:
            self._ended = True
            try:
                self._send(CLOSE, payload)
            except OSError:
                pass
            raise LinkClosed

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                piece = self.socket.recv(min(size - len(data), 1 << 20))
            except TimeoutError:
                raise
            except OSError as error:
                raise LinkClosed from error
            if not piece:
                raise LinkClosed
            data += piece
        return data

    def _send(self, opcode: int, payload: bytes) -> None:
        size = len(payload)
        if size < 126:
            head = struct.pack(">BB", 0x80 | opcode, size)
        elif size < 65536:
            head = struct.pack(">BBH", 0x80 | opcode, 126, size)
        else:
            head = struct.pack(">BBQ", 0x80 | opcode, 127, size)
        self.socket.sendall(head + payload)


def answer_handshake(
    sock: socket.socket, subprotocol: str | None = "ringoexp.batch.v1", store: str | None = None
) -> None:
    """Read the client's handshake, and accept it."""
    head = b""
    while b"\r\n\r\n" not in head:
        data = sock.recv(65536)
        if not data:
            raise LinkClosed
        head += data
    keys = re.findall(rb"Sec-WebSocket-Key: (\S+)", head)
    if not keys:  # `GET /v1.0/ready` of a publisher that asks
        sock.sendall(b"HTTP/1.1 426 Upgrade Required\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        raise LinkClosed
    (key,) = keys
    lines = [
        "HTTP/1.1 101 Switching Protocols",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Accept: {base64.b64encode(hashlib.sha1(key + GUID).digest()).decode()}",
    ]
    if subprotocol:
        lines.append(f"Sec-WebSocket-Protocol: {subprotocol}")
    if store is not None:
        lines.append(f"X-Ringoexp-Store: {store}")
    sock.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())


@contextmanager
def fake_consumer(
    answer: Callable[[Link], object], store: str | None = None, subprotocol: str | None = "ringoexp.batch.v1"
) -> Iterator[int]:
    """Run a consumer that serves each link with `answer`, and says that it has `store`; yields its port."""
    listener = socket.create_server(("localhost", 0))
    threads: list[threading.Thread] = []
    links: list[socket.socket] = []

    def serve(sock: socket.socket) -> None:
        with sock:
            link = Link(sock)
            try:
                answer_handshake(sock, subprotocol, store)
                answer(link)
                link.close()
            except (LinkClosed, OSError):
                pass  # the client, or the test, has ended the link

    def accept() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return  # closed
            links.append(sock)
            thread = threading.Thread(target=serve, args=(sock,), daemon=True)
            thread.start()
            threads.append(thread)

    acceptor = threading.Thread(target=accept, daemon=True)
    acceptor.start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        acceptor.join(20)
        for sock in links:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # ended already
        for thread in threads:
            thread.join(20)
