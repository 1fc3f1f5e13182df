"""A TCP proxy that fails when it is told to: what the fault tests put between the two ends of a link.

One thread, `proxy`, owns every socket. What another thread asks for is done by it, in its turn, and the asking
thread waits for that. The directions are UP, from the end that connects to the one that listens, and DOWN, back.

A stream never has a hole, as it never has with TCP: what is held back comes later, and where something was thrown
away nothing comes any more.
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
"""Reads that a direction keeps; then it reads no more, so that the sender is held up as by a full network."""


class _Flow:
    """One direction of a link. An empty piece stands for the end of the stream."""

    def __init__(self, direction: int, source: socket.socket, target: socket.socket) -> None:
        self.direction = direction
        self.source = source
        self.target = target
        self.pieces: deque[tuple[float, bytes]] = deque()  # when to pass it on, and what
        self.swallows = False  # from now on nothing is passed on but the end
        self.read_all = False
        self.passed_all = False

    def end(self) -> None:
        """Passes on the end."""
        self.passed_all = True
        try:
            self.target.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # gone

    def swallow(self) -> None:
        """Throws away what there is and all that comes."""
        self.swallows = True
        self.pieces.clear()
        if self.read_all:
            self.end()


class Proxy:
    """Listens on `port`, any free one of this machine's own, and forwards to `target`."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.links = 0  # taken, ever
        self.cuts = 0  # links cut, ever

        # The thread's.
        self._links: list[tuple[_Flow, _Flow]] = []
        self._delays = [0.0, 0.0]
        self._held = [False, False]
        self._left: list[int | None] = [None, None]  # bytes to pass before the link they pass on is cut
        self._reset = False  # and how
        self._closing = False

        self._calls: deque[Callable[[], None]] = deque()
        self._waked, self._wake = socket.socketpair()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._run, name="proxy")
        self._thread.start()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all links, and the thread."""

        def close() -> None:
            self._closing = True

        self._do(close)
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive()

    def delay(self, up: float = 0.0, down: float = 0.0) -> None:
        """What comes from now on takes so many seconds more."""

        def delay() -> None:
            self._delays = [up, down]

        self._do(delay)

    def hold(self, *directions: int) -> None:
        """A black hole: links are taken and the system takes bytes, but nothing passes, not even the end."""

        def hold() -> None:
            for direction in directions:
                self._held[direction] = True

        self._do(hold)

    def heal(self) -> None:
        """No more delays and no black hole: what it held passes on."""

        def heal() -> None:
            self._delays = [0.0, 0.0]
            self._held = [False, False]

        self._do(heal)

    def cut(self, reset: bool) -> None:
        """Cuts all links there are, with a reset or with the end of both streams; what was under way is lost."""

        def cut() -> None:
            for link in self._links[:]:
                self._cut(link, reset)

        self._do(cut)

    def cut_after(self, size: int, direction: int, reset: bool) -> None:
        """Once that many more bytes have passed in a direction, cuts the link that they pass on: mid-message, say."""

        def cut_after() -> None:
            self._left[direction] = size
            self._reset = reset

        self._do(cut_after)

    def swallow(self, direction: int = DOWN) -> None:
        """Throws away what comes in a direction of the links there are; the other goes on, and so do new links."""

        def swallow() -> None:
            for link in self._links:
                link[direction].swallow()

        self._do(swallow)

    # The thread.

    def _do(self, call: Callable[[], None]) -> None:
        done = threading.Event()
        self._calls.append(lambda: (call(), done.set())[1])  # type: ignore[func-returns-value]
        self._wake.send(b"x")
        assert done.wait(DEADLINE), "the proxy's thread has died"

    def _run(self) -> None:
        while not self._closing:
            self._turn()
        for link in self._links[:]:
            self._drop(link, reset=True)
        for sock in (self._listener, self._waked, self._wake):
            sock.close()

    def _turn(self) -> None:
        """Waits until there is something to do, and does it."""
        now = monotonic()
        flows = [flow for link in self._links for flow in link]
        reading = {flow for flow in flows if self._reads(flow)}
        passing = {flow for flow in flows if flow.pieces and not self._held[flow.direction]}
        due = {flow for flow in passing if flow.pieces[0][0] <= now}
        wait = min((flow.pieces[0][0] - now for flow in passing - due), default=None)
        sources = [flow.source for flow in reading]
        ready = select.select([self._waked, self._listener, *sources], [flow.target for flow in due], [], wait)
        if self._waked in ready[0]:
            self._waked.recv(4096)
            while self._calls:
                self._calls.popleft()()
            return  # it may be another picture now
        if self._listener in ready[0]:
            self._accept()
        for link in self._links[:]:
            try:
                for flow in link:
                    if flow in reading and flow.source in ready[0]:
                        self._read(flow)
                    if flow in due and flow.target in ready[1] and self._pass_on(flow):
                        self._cut(link, self._reset)
                        break
            except OSError:  # one end was reset, and so is the other
                self._drop(link, reset=True)
            if link in self._links and all(flow.read_all and flow.passed_all for flow in link):
                self._drop(link, reset=False)

    def _reads(self, flow: _Flow) -> bool:
        held = self._held[flow.direction] or len(flow.pieces) >= MAX_PIECES
        return not flow.read_all and (flow.swallows or not held)

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
        if not flow.swallows:
            flow.pieces.append((monotonic() + self._delays[flow.direction], data))
        elif not data:
            flow.end()

    def _pass_on(self, flow: _Flow) -> bool:
        """Passes on the oldest piece, or a part of it; True when the link is to be cut then."""
        due, data = flow.pieces.popleft()
        if not data:
            flow.end()
            return False
        left = self._left[flow.direction]
        try:
            sent = flow.target.send(data[:left])
        except (BrokenPipeError, ConnectionResetError):
            flow.swallow()  # whether the other end hears of it is for the other direction to say
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
        else:  # and stays until both ends have closed
            for flow in link:
                flow.swallow()
                flow.end()

    def _drop(self, link: tuple[_Flow, _Flow], reset: bool) -> None:
        self._links.remove(link)
        for flow in link:
            (_abort if reset else socket.socket.close)(flow.source)


def _abort(sock: socket.socket) -> None:
    """Closes with a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
