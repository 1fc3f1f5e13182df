"""One connection of the ingest loop: its socket, its session, and the data in flight in both directions.

The loop's thread alone uses a `Client`. The socket is non-blocking; it may be a TLS socket.
"""

import socket
from collections import deque
from collections.abc import Callable
from math import inf
from typing import Any, NamedTuple

from ringolib.net import sockets
from ringolib.net.sockets import shut_down
from ringolib.net.tls_socket import TLSSocket
from ringolib.web.session import GOING_AWAY, Session

SMALL_READ_SIZE = 2048
"""Bytes read from a client whose last read was small: `recv` allocates as many bytes as it may return."""


class Mark(NamedTuple):
    """Records that the intake has. They are stored when this ticket and the tickets of all older marks are settled."""

    ticket: Any
    records: int  # of the connection, up to and including this read
    read_at: float  # monotonic seconds


class Client:
    """A connection; `on_end` is called when it has ended. Counts are of this connection's records."""

    __slots__ = (
        "sock",
        "descriptor",
        "session",
        "on_end",
        "is_tls",
        "reading",
        "writing",
        "eof",
        "unsent",
        "marks",
        "taken",
        "waiting",
        "pause_seen",
        "queued",
        "slow",
        "held",
        "scheduled",
        "_bulk",
    )

    def __init__(self, sock: Any, session: Session, on_end: Callable[[Session], None]) -> None:
        self.sock = sock
        self.descriptor: int = sock.fileno()
        self.session = session
        self.on_end = on_end
        self.is_tls = isinstance(sock, TLSSocket)
        self.reading = False  # the loop waits for input
        self.writing = False  # the loop waits for room in the system's send buffer
        self.eof = False  # the client has ended its side
        self.unsent = b""  # what the socket did not take
        self.marks: deque[Mark] = deque()  # the oldest first
        self.taken = 0  # records that the intake has taken
        self.waiting = 0  # blocks in the loop's backlog
        self.pause_seen = 0.0  # seconds of the loop's pauses that the session knows of
        self.queued = False  # among the clients that the loop serves next
        self.slow = False  # the last data from it took long to decode
        self.held = 0  # bytes of an unfinished message, as the loop counted them
        self.scheduled = inf  # the deadline in the loop's heap
        self._bulk = False  # the last read returned as much as it may

    def read(self, buffer: memoryview, limit: int) -> bytes | None:
        """Return the received bytes, at most `limit` bytes; b"" at the end of the stream, None if nothing has come.

        Large reads go through `buffer`. Raises OSError if the connection is lost.
        """
        try:
            if self.is_tls:
                return bytes(self.sock.recv(limit, socket.MSG_DONTWAIT))
            if self._bulk:
                size = self.sock.recv_into(buffer, limit)
                self._bulk = size >= SMALL_READ_SIZE
                return bytes(buffer[:size])
            data: bytes = self.sock.recv(SMALL_READ_SIZE)
            self._bulk = len(data) == SMALL_READ_SIZE
            return data
        except BlockingIOError:
            return None

    def send(self, now: float) -> None:
        """Send the bytes that are due, as far as the socket takes it.

        Raises OSError if the connection is lost, TimeoutError if the client leaves too much unread.
        """
        session = self.session
        while data := self.unsent or session.data_to_send():
            try:
                sent = self.sock.send(data)
            except BlockingIOError:
                sent = 0
            was_stuck = bool(self.unsent)
            self.unsent = data[sent:]
            if not self.unsent and not was_stuck:
                return  # the usual case: nothing became due meanwhile
            session.sent(progress=sent > 0, rest=len(self.unsent), now=now)
            if session.lost and not self.eof:
                raise TimeoutError("the client does not read")
            if self.unsent:
                return

    def end_output(self) -> None:
        """Tell the client that nothing more comes. Its own end of the stream is awaited."""
        shut_down(self.sock, socket.SHUT_WR)

    def send_away(self, now: float) -> None:
        """Send the Close frame of a server that has stopped, and wait for the client for a moment. Never raises."""
        self.session.end(*GOING_AWAY)
        self.session.close(now)
        try:
            self.sock.settimeout(sockets.CLOSE_TIMEOUT)
            self.sock.sendall(self.session.data_to_send())
        except OSError:
            return  # the connection is lost
        sockets.linger(self.sock)

    def close(self) -> None:
        """Close the socket."""
        try:
            self.sock.close()
        finally:
            self.on_end(self.session)
