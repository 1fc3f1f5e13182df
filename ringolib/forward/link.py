"""Sinks: where a worker stores what it took from the ring. The local store, or a WebSocket link to the consumer.

A sink belongs to its worker's thread; only `abort` is for others. `LinkState` is what all links to a consumer
together know of it: its `_lock` guards what it says, in the log too, so that lines are in order; nothing is sent
under it.
"""

import logging
import socket
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any, NamedTuple

from ringolib.forward.sink import InDoubt, SinkError
from ringolib.net.addresses import Address, format_address
from ringolib.net.credentials import Credentials
from ringolib.net.sockets import peer
from ringolib.net.websocket import ClientConnection, HandshakeError
from ringolib.wire import INGEST_PATH, SUBPROTOCOL, Block, WireError, decode_ack, encode_batch

log = logging.getLogger("ringoexp.link")

ACK_TIMEOUT = 30.0
"""Seconds a consumer has to take a batch, and to ack it, before the link is given up."""
LOOK_AFTER = 0.02
"""Seconds after the last ack from when on it is looked whether a link has ended, before a block is sent on it."""
GOING_AWAY = 1001
"""The close code of a server that stops."""


class LinkSink:
    """A WebSocket link to the consumer, connected when a block needs it. `connected` is called each time.

    `patience` is how many seconds the consumer has to take a block, and as many again to ack it. `is_own` knows
    the server's own addresses: it makes no link to itself. What it shows the consumer, and whether it speaks TLS, is
    in `credentials`. `name` is the host's, where `host` is only one of its addresses.
    """

    def __init__(
        self,
        host: str,
        port: int,
        connected: Callable[[], None] = lambda: None,
        patience: float | None = None,
        is_own: Callable[[Address], bool] = lambda address: False,
        credentials: Credentials | None = None,
        name: str | None = None,
    ) -> None:
        self._host = host
        self._port = port
        self._connected = connected
        self._patience = patience or ACK_TIMEOUT
        self._is_own = is_own
        self._credentials = credentials or Credentials()
        self._name = name
        self._link: ClientConnection | None = None
        self._opening: Any = None  # the socket of a link that is being made
        self._sent = 0  # records sent on this link, all acked unless a store is under way
        self._acked = 0  # of these
        self._acked_at = float("-inf")  # monotonic seconds
        self._pinged = False  # and nothing has come from the consumer since
        self._aborted = False

    @property
    def ready(self) -> bool:
        """True while there is a link."""
        return self._link is not None

    @property
    def identity(self) -> str | None:
        """What the consumer at the other end calls its store."""
        return self._link.store if self._link else None

    def store(self, block: Block) -> None:
        """Returns when the consumer has acked the block. Raises SinkError when it has not; the link is closed then.

        InDoubt once it began to send, unless a store says goodbye as it stops (1001): it has acked all that it has, or
        will have, stored.
        It makes no link in place of one that has ended meanwhile: another store might be at the end of that.
        """
        if self._link and monotonic() - self._acked_at >= LOOK_AFTER:
            try:
                self._look(self._link)
            except OSError as error:
                self._drop()
                raise SinkError(f"{format_address(self._host, self._port)}: {error}") from error
        self.connect()
        link = self._link
        assert link is not None
        message = encode_batch(*block)
        try:
            link.sock.settimeout(self._patience)
            link.send_bytes(message)
            self._sent += len(block.values)
            self._await_ack(link)
            self._pinged, self._acked_at = False, monotonic()
            if link.ending:  # acked, and then it said goodbye
                self.close()
        except (OSError, WireError) as error:
            self._drop()
            reason = f"{format_address(self._host, self._port)}: {error}"
            none_acked = self._sent - self._acked == len(block.values)
            if link.store and link.ending and link.ending[0] == GOING_AWAY and not link.at_fault and none_acked:
                raise SinkError(reason) from error
            raise InDoubt(reason, link.store) from error

    def connect(self) -> None:
        """Makes a link, if there is none. Raises SinkError when it cannot."""
        if self._link:
            return
        try:
            self._connect()
        except (OSError, HandshakeError, WireError) as error:
            self._drop()
            raise SinkError(f"{format_address(self._host, self._port)}: {error}") from error
        except BaseException:  # a bug: whatever state the link is in, the next block gets another one
            self._drop()
            raise

    def idle(self) -> None:
        """Answers the consumer's pings and sends one; drops a link that has ended, or did not answer the last one.

        The next block then finds a new link, instead of losing time with a dead one.
        """
        if self._link is None:
            return
        try:
            self._look(self._link)
            if self._pinged:
                raise TimeoutError("no answer to the last ping")
            self._link.ping()
            self._pinged = True
        except OSError as error:
            log.debug("idle_link_lost", {"reason": str(error)})
            self._drop()

    def abort(self) -> None:
        """Makes a `store` or `connect` under way, and every later one, fail. For other threads."""
        self._aborted = True
        if link := self._link:
            link.abort()
        if opening := self._opening:
            _shut(opening)

    def close(self) -> None:
        """Says goodbye to the consumer, if connected."""
        if self._link:
            self._link.finish(1000, "")
            self._link = None

    def _connect(self) -> None:
        keys = self._credentials.current
        where = self._host, self._port, INGEST_PATH, SUBPROTOCOL
        try:
            self._link = ClientConnection(*where, keys.client, keys.token, self._name, self._opened)
        finally:
            self._opening = None
        self._sent = self._acked = 0
        self._pinged = False
        if self._is_own(peer(self._link.sock, self._host)):  # the name did not resolve at the start, or changed
            raise OSError("that is this server itself: it would forward in a circle")
        if self._aborted:  # while it connected: `abort` did not see the link
            raise OSError("the server is stopping")
        self._connected()

    def _opened(self, sock: Any) -> None:
        """A link's socket is connected, and the handshake begins."""
        self._opening = sock
        if self._aborted:
            raise OSError("the server is stopping")

    def _look(self, link: ClientConnection) -> None:
        """Reads what has come while there was nothing to wait for. Raises OSError when the link has ended."""
        link.sock.setblocking(False)
        while data := link.read(wait=False):
            self._pinged = False
            link.parse(data)
        if link.ending or data == b"":
            raise ConnectionResetError("the consumer closed the connection")

    def _await_ack(self, link: ClientConnection) -> None:
        """Reads until everything sent is acked. Raises OSError when the link ends before, or has run out of time."""
        deadline = monotonic() + self._patience
        data = b""  # first, what came right behind the handshake
        while True:
            for message in link.parse(data):
                acked = decode_ack(message.payloads)
                if acked > self._sent:
                    raise WireError(f"acked {acked} records of {self._sent} sent")
                self._acked = acked
                if acked == self._sent:
                    return
            if link.ending:
                code, reason = link.ending
                raise ConnectionResetError(f"the consumer closed with {code:d} {reason}")
            left = deadline - monotonic()
            if left <= 0:
                raise TimeoutError(f"no ack within {self._patience:.0f} s")
            link.sock.settimeout(left)
            data = link.read() or b""
            if not data:
                raise ConnectionResetError("the consumer closed the connection")

    def _drop(self) -> None:
        """Closes the link without ceremony."""
        link, self._link = self._link, None
        if link:
            link.abort()
            link.sock.close()


def _shut(sock: Any) -> None:
    """Ends what a socket's owner waits for. For other threads."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # closed already


class LinkStats(NamedTuple):
    """A snapshot."""

    state: str  # "unknown": nothing was on its way yet; "up"; "down"
    reason: str | None  # why it is down
    away: float  # seconds it has been down, 0 if it is not
    quiet: float  # seconds since something was acked; infinite before


class LinkState:
    """Whether the consumer `peer` takes what is sent, as links to it find out. Each change is logged, once."""

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self._lock = threading.Lock()
        # Guarded by _lock.
        self._state = "unknown"
        self._acked_at = float("-inf")  # monotonic seconds
        self._reason: str | None = None
        self._down_since = 0.0  # monotonic seconds, while it is down

    @property
    def down(self) -> bool:
        """True from a link's failure until something is acked again."""
        return self._state == "down"  # one read: no lock needed

    def works(self) -> None:
        """Something was acked: the consumer is there."""
        self._acked_at = monotonic()
        if self._state != "up":  # hardly ever; a float or a string is read and written at once
            self._up()

    def answers(self) -> None:
        """A link could be made again, with nothing to send over it: if the consumer was away, it is back."""
        if self.down:
            self._up()

    def _up(self) -> None:
        with self._lock:
            before, self._state, self._reason = self._state, "up", None
            if before != "up":
                away = {"away_seconds": round(monotonic() - self._down_since, 1)} if before == "down" else {}
                log.info("link_up", {"consumer": self._peer, **away})

    def failed(self, reason: str) -> None:
        """A link failed, or could not be made: the consumer is away."""
        with self._lock:
            already = self._state == "down"
            if not already:
                self._state, self._down_since = "down", monotonic()
            self._reason = reason
            level = logging.DEBUG if already else logging.WARNING
            log.log(level, "link_down", {"consumer": self._peer, "reason": reason})

    def stats(self) -> LinkStats:
        """What is known now."""
        with self._lock:
            away = monotonic() - self._down_since if self._state == "down" else 0.0
            return LinkStats(self._state, self._reason, away, monotonic() - self._acked_at)
