"""Connects and closes a link in an event loop: all addresses of a name, TLS and the upgrade, without blocking.

`Waiter` is the one place where the task of an `AsyncProducer` waits. It has no thread. Only `loop.getaddrinfo` looks
names up in a thread of the loop's executor.
"""

import asyncio
import errno
import math
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ringolib.net import sockets, websocket, websocket_client
from ringolib.net.addresses import Endpoint, certified_name, host_header, unix_path
from ringolib.net.http_client import SWITCHING_PROTOCOLS, HTTPError, HTTPExchange
from ringolib.net.sockets import READ_SIZE, time_left
from ringolib.net.tls_socket import TLSSocket
from ringolib.net.websocket import Accepted, UpgradeRequest, explain_no_answer, refusal
from ringolib.net.websocket_client import Link
from ringolib.timing import deadline_after, remaining

if TYPE_CHECKING:
    import ssl


class ForkedError(BaseException):
    """This is a copy of a task, in the child of a fork: its socket and its event loop's selector are the parent's."""


class Waiter:
    """Lets one task wait for its socket, for a deadline, and for `wake`.

    `on_cancel` is called when the task is cancelled for the first time. The task goes on then, and should soon end. A
    second cancellation ends it at once. If `is_over` returns true, connecting ends.
    """

    def __init__(self, is_over: Callable[[], bool], on_cancel: Callable[[], None]) -> None:
        self.is_over = is_over
        self.wakes = 0  # calls of `wake` since the task went on
        self._on_cancel = on_cancel
        self._event = asyncio.Event()
        self._cancelled = False

    def wake(self) -> None:
        """Let the task go on."""
        self.wakes += 1
        self._event.set()

    async def wait(self, deadline: float, sock: Any = None, reading: bool = False, writing: bool = False) -> bool:
        """Wait until the socket is ready, `deadline` has passed, or `wake` is called. True if the socket is ready.

        Raises ForkedError in the child of a fork, which must not touch the parent's selector.
        """
        loop = asyncio.get_running_loop()
        pid = os.getpid()
        ready = False

        def on_ready() -> None:
            nonlocal ready
            ready = True
            self._event.set()

        timer = None if deadline == math.inf else loop.call_later(remaining(deadline), self._event.set)
        fd = sock.fileno() if sock else -1
        if reading:
            loop.add_reader(fd, on_ready)
        if writing:
            loop.add_writer(fd, on_ready)
        try:
            await self._event.wait()
        except asyncio.CancelledError:
            if self._cancelled or os.getpid() != pid:
                raise
            self._cancelled = True
            self._on_cancel()
        finally:
            if os.getpid() != pid:
                raise ForkedError
            if timer:
                timer.cancel()
            if reading:
                loop.remove_reader(fd)
            if writing:
                loop.remove_writer(fd)
        self._event.clear()
        self.wakes = 0
        return ready

    async def until_ready(self, deadline: float, sock: Any, reading: bool = False, writing: bool = False) -> None:
        """Wait until the socket is ready. Raises TimeoutError at the deadline, ConnectionAbortedError if `is_over`."""
        ready = False
        while not ready:
            self.check(deadline)
            ready = await self.wait(deadline, sock, reading, writing)

    def check(self, deadline: float) -> None:
        """Raise TimeoutError after the deadline, ConnectionAbortedError if `is_over`."""
        if self.is_over():
            raise ConnectionAbortedError("the producer is closed")
        time_left(deadline)


async def connect(
    endpoint: Endpoint,
    path: str,
    subprotocol: str,
    context: "ssl.SSLContext | None",
    token: str | None,
    waiter: Waiter,
) -> Link:
    """Return a connected link, as the constructor of `ClientConnection` does, with the same time limits.

    Raises OSError if the server is unreachable, HandshakeError if it refuses.
    """
    deadline = deadline_after(websocket_client.CONNECT_TIMEOUT)
    sock: Any = await _open_socket(endpoint, deadline, waiter)
    try:
        if context:
            sock = TLSSocket(sock, context, certified_name(endpoint.name))
            while not sock.try_handshake():
                await waiter.until_ready(deadline, sock, reading=True, writing=sock.has_output)
        request = UpgradeRequest(host_header(endpoint.name, endpoint.port), path, subprotocol, token)
        accepted = await _upgrade(sock, request, path, waiter)
    except BaseException:
        sock.close()
        raise
    return Link(sock, accepted)


async def finish(link: Link, waiter: Waiter) -> None:
    """Close the link as its own `finish` does: with our Close frame, and at most CLOSE_TIMEOUT for the server's."""
    deadline = deadline_after(sockets.CLOSE_TIMEOUT)
    sock = link.sock
    link.begin_close(1000, "")
    try:
        while not link.flush():
            time_left(deadline)
            await waiter.wait(deadline, sock, writing=True)
        sock.shutdown(socket.SHUT_WR)
        while (data := link.read(wait=False)) != b"":
            time_left(deadline)
            if data is None:
                await waiter.wait(deadline, sock, reading=True)
    except OSError:
        pass  # the connection is lost
    finally:
        sock.close()


async def _open_socket(endpoint: Endpoint, deadline: float, waiter: Waiter) -> socket.socket:
    """Connect to one address of the endpoint after the other, as `sockets.connect` does."""
    path = unix_path(endpoint.host)
    if path is not None:
        return await _connect_address(socket.AF_UNIX, path, deadline, waiter)
    entries = await _look_up(endpoint.host, endpoint.port, deadline, waiter)
    for index, (family, _, _, _, address) in enumerate(entries):
        share = deadline_after(time_left(deadline) / (len(entries) - index))
        try:
            sock = await _connect_address(family, address, share, waiter)
        except OSError:
            if index == len(entries) - 1:
                raise
        else:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
    raise OSError("the host has no address")


async def _look_up(host: str, port: int, deadline: float, waiter: Waiter) -> Any:
    """Return the addresses of a host, in the form of `getaddrinfo`. An IP address needs no thread."""
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        pass  # it is a name
    loop = asyncio.get_running_loop()
    lookup = asyncio.ensure_future(loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    lookup.add_done_callback(lambda done: waiter.wake())
    try:
        while not lookup.done():
            waiter.check(deadline)
            await waiter.wait(deadline)
        if lookup.cancelled():  # the loop ends, and has cancelled all tasks
            raise ConnectionAbortedError("the look-up of the host's name was cancelled")
        return lookup.result()
    finally:
        lookup.cancel()


async def _connect_address(family: int, address: Any, deadline: float, waiter: Waiter) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        try:
            sock.connect(address)
        except BlockingIOError as error:
            if error.errno != errno.EINPROGRESS:
                raise
            await waiter.until_ready(deadline, sock, writing=True)
            if code := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(code, os.strerror(code)) from None
    except BaseException:
        sock.close()
        raise
    return sock


async def _upgrade(sock: Any, request: UpgradeRequest, path: str, waiter: Waiter) -> Accepted:
    """Request the upgrade, and read the answer, as `websocket.request_upgrade` does."""
    exchange = HTTPExchange()
    deadline = deadline_after(websocket.HANDSHAKE_TIMEOUT)
    sock.setblocking(False)
    try:
        with suppress(ConnectionError):  # the answer says why
            await _send(sock, b"".join(exchange.request("GET", path, request.headers)), deadline, waiter)
        while (head := exchange.head()) is None:
            exchange.receive(await _receive(sock, deadline, waiter))
    except (TimeoutError, HTTPError) as error:
        raise explain_no_answer(error) from error
    if head.status == SWITCHING_PROTOCOLS:
        return request.accept(head, exchange.rest)
    body: bytes | None = None
    with suppress(OSError, HTTPError):  # the status is a reason, too
        while (body := exchange.body()) is None:
            exchange.receive(await _receive(sock, deadline, waiter))
    raise refusal(head.status, body or b"")


async def _send(sock: Any, data: bytes, deadline: float, waiter: Waiter) -> None:
    while data:
        try:
            data = data[sock.send(data) :]
        except BlockingIOError:
            await waiter.until_ready(deadline, sock, writing=True)


async def _receive(sock: Any, deadline: float, waiter: Waiter) -> bytes:
    """Return bytes that arrive before the deadline; b"" at the end of the stream."""
    while True:
        waiter.check(deadline)
        try:
            data: bytes = sock.recv(READ_SIZE)
        except BlockingIOError:
            await waiter.until_ready(deadline, sock, reading=True)
        else:
            return data
