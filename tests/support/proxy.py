"""A TCP proxy between the two ends of a link, for faults: delays, black holes, cuts and resets.

One thread, `proxy`, owns every socket. Methods of `Proxy` pass a call to that thread and wait until it is done. The
directions are UP, from the end that connects to the end that listens, and DOWN, back.

As in TCP, a stream has no gaps: bytes that are held back arrive later, and after discarded bytes no more bytes arrive.
"""

import select
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from time import monotonic

from support.harness import DEADLINE

UP, DOWN = 0, 1
MAX_PIECES = 16
"""Pieces that a direction keeps, at most. Then it reads no more: the sender is blocked as by a full network."""


class _Flow:
    """One direction of a link. An empty piece is the end of the stream."""

    def __init__(self, direction: int, source: socket.socket, target: socket.socket) -> None:
        self.direction = direction
        self.source = source
        self.target = target
        self.pieces: deque[tuple[float, bytes]] = deque()  # monotonic seconds when to forward, and the bytes
        self.discards = False  # True: only the end of the stream is forwarded
        self.read_all = False  # True: the source has ended its stream
        self.ended = False  # True: the end is forwarded

    def end(self) -> None:
        """Forward the end of the stream."""
        self.ended = True
        try:
            self.target.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the target is closed

    def discard(self) -> None:
        """Discard the pieces that are not forwarded yet, and all further bytes."""
        self.discards = True
        self.pieces.clear()
        if self.read_all:
            self.end()


class Proxy:
    """Listens on `port`, a free port of 127.0.0.1, and forwards to the port `target`."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.links = 0  # accepted so far
        self.cuts = 0  # links cut so far

        # Only the thread uses these.
        self._links: list[tuple[_Flow, _Flow]] = []
        self._delays = [0.0, 0.0]
        self._held = [False, False]
        self._left: list[int | None] = [None, None]  # bytes until the next cut
        self._reset = False  # whether that cut is a reset
        self._closing = False

        self._calls: deque[Callable[[], None]] = deque()
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._run, name="proxy")
        self._thread.start()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def close(self) -> None:
        """End all links and the thread."""

        def close() -> None:
            self._closing = True

        self._do(close)
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive()

    def delay(self, up: float = 0.0, down: float = 0.0) -> None:
        """Delay bytes that arrive from now on, in seconds for each direction."""

        def delay() -> None:
            self._delays = [up, down]

        self._do(delay)

    def hold(self, *directions: int) -> None:
        """Become a black hole: accept links and bytes, but forward nothing, not even the end of a stream."""

        def hold() -> None:
            for direction in directions:
                self._held[direction] = True

        self._do(hold)

    def heal(self) -> None:
        """End delays and the black hole, and forward the bytes that were held."""

        def heal() -> None:
            self._delays = [0.0, 0.0]
            self._held = [False, False]

        self._do(heal)

    def cut(self, reset: bool) -> None:
        """Cut all links, with a reset or with the end of both streams. Bytes in flight are lost."""

        def cut() -> None:
            for link in self._links[:]:
                self._cut(link, reset)

        self._do(cut)

    def cut_after(self, size: int, direction: int, reset: bool) -> None:
        """Cut a link after `size` more bytes in this direction: in the middle of a message, for example."""

        def cut_after() -> None:
            self._left[direction] = size
            self._reset = reset

        self._do(cut_after)

    def discard(self, direction: int = DOWN) -> None:
        """Discard all bytes in one direction of the open links. The other direction and new links are not affected."""

        def discard() -> None:
            for link in self._links:
                link[direction].discard()

        self._do(discard)

    # In the thread, except `_do`.

    def _do(self, call: Callable[[], None]) -> None:
        """Run `call` in the thread, and wait until it is done."""
        done = threading.Event()
        self._calls.append(lambda: (call(), done.set())[1])  # type: ignore[func-returns-value]
        self._wake_sender.send(b"x")
        assert done.wait(DEADLINE), "the proxy's thread has died"

    def _run(self) -> None:
        while not self._closing:
            self._step()
        for link in self._links[:]:
            self._drop(link, reset=True)
        for sock in (self._listener, self._wake_receiver, self._wake_sender):
            sock.close()

    def _step(self) -> None:
        """Wait until a socket is ready, a piece is due or a call is queued, and handle it."""
        now = monotonic()
        flows = [flow for link in self._links for flow in link]
        reading = {flow for flow in flows if self._can_read(flow)}
        forwarding = {flow for flow in flows if flow.pieces and not self._held[flow.direction]}
        due = {flow for flow in forwarding if flow.pieces[0][0] <= now}
        wait = min((flow.pieces[0][0] - now for flow in forwarding - due), default=None)
        sources = [flow.source for flow in reading]
        ready = select.select([self._wake_receiver, self._listener, *sources], [flow.target for flow in due], [], wait)
        if self._wake_receiver in ready[0]:
            self._wake_receiver.recv(4096)
            while self._calls:
                self._calls.popleft()()
            return  # the calls may have changed the links
        if self._listener in ready[0]:
            self._accept()
        for link in self._links[:]:
            try:
                for flow in link:
                    if flow in reading and flow.source in ready[0]:
                        self._read(flow)
                    if flow in due and flow.target in ready[1] and self._forward(flow):
                        self._cut(link, self._reset)
                        break
            except OSError:  # one end was reset: reset the other, too
                self._drop(link, reset=True)
            if link in self._links and all(flow.read_all and flow.ended for flow in link):
                self._drop(link, reset=False)

    def _can_read(self, flow: _Flow) -> bool:
        held = self._held[flow.direction] or len(flow.pieces) >= MAX_PIECES
        return not flow.read_all and (flow.discards or not held)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        self.links += 1
        try:
            server = socket.create_connection(("127.0.0.1", self.target), 1)
        except OSError:
            _abort(client)
            return
        for sock in (client, server):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._links.append((_Flow(UP, client, server), _Flow(DOWN, server, client)))

    def _read(self, flow: _Flow) -> None:
        data = flow.source.recv(65536)
        flow.read_all = not data
        if not flow.discards:
            flow.pieces.append((monotonic() + self._delays[flow.direction], data))
        elif not data:
            flow.end()

    def _forward(self, flow: _Flow) -> bool:
        """Forward the oldest piece or a part of it. Return True if the link must be cut then."""
        due, data = flow.pieces.popleft()
        if not data:
            flow.end()
            return False
        left = self._left[flow.direction]
        try:
            sent = flow.target.send(data[:left])
        except (BrokenPipeError, ConnectionResetError):
            flow.discard()  # the other direction decides whether the other end notices
            return False
        if sent < len(data):
            flow.pieces.appendleft((due, data[sent:]))
        if left is None:
            return False
        self._left[flow.direction] = left - sent or None
        return left == sent

    def _cut(self, link: tuple[_Flow, _Flow], reset: bool) -> None:
        self.cuts += 1
        if reset:
            self._drop(link, reset=True)
        else:  # the link stays until both ends have closed
            for flow in link:
                flow.discard()
                flow.end()

    def _drop(self, link: tuple[_Flow, _Flow], reset: bool) -> None:
        self._links.remove(link)
        for flow in link:
            (_abort if reset else socket.socket.close)(flow.source)


def _abort(sock: socket.socket) -> None:
    """Close with a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
