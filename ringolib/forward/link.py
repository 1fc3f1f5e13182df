"""Links: the sink that sends batches to a consumer over WebSocket, and the state of that consumer.

A `LinkSink` belongs to the thread of its worker; `abort` alone is for other threads. A `LinkState` is shared by all
links to one consumer. Its `_lock` guards its fields. Changes of state are logged under the lock, so that the lines are
in order. Nothing is sent under it.
"""

import logging
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any, NamedTuple

from ringolib.forward.sink import InDoubt, NotStored
from ringolib.net.addresses import Address, Endpoint, format_address
from ringolib.net.credentials import Credentials
from ringolib.net.sockets import peer_address, shut_down
from ringolib.net.websocket import HandshakeError
from ringolib.net.websocket_client import ClientConnection
from ringolib.timing import deadline_after, log_unexpected, remaining
from ringolib.wire import INGEST_PATH, SUBPROTOCOL, Block, WireError, decode_ack, encode_batch

log = logging.getLogger("ringoexp.link")

ACK_TIMEOUT_SECONDS = 30.0
"""How long a consumer may take to receive a batch, and again to ack it, before the link is dropped."""
CHECK_AFTER_SECONDS = 0.02
"""If the last ack is at least this old, the link is checked before a block is sent over it: it may have ended."""
GOING_AWAY = 1001
"""The close code of a server that stops (RFC 6455 section 7.4.1)."""


class LinkSink:
    """A WebSocket link to a consumer, made when a block needs it.

    `connected` is called for each link that is made. `ack_timeout` is how many seconds the consumer may take to receive
    a block, and again to ack it. `is_own` recognises the server's own addresses: a server must not link to itself.
    `credentials` are the token and the TLS context for the link. If `host` is one of several addresses of a name,
    `name` is that name.
    """

    def __init__(
        self,
        host: str,
        port: int,
        connected: Callable[[], None] = lambda: None,
        ack_timeout: float | None = None,
        is_own: Callable[[Address], bool] = lambda address: False,
        credentials: Credentials | None = None,
        name: str | None = None,
    ) -> None:
        self._host = host
        self._port = port
        self._connected = connected
        self._ack_timeout = ack_timeout or ACK_TIMEOUT_SECONDS
        self._is_own = is_own
        self._credentials = credentials or Credentials()
        self._name = name
        self._link: ClientConnection | None = None
        self._sent = 0  # records sent over this link; all acked unless `store` is running
        self._acked = 0  # records acked over this link
        self._acked_at = float("-inf")  # monotonic seconds
        self._pinged = False  # a ping was sent, and nothing has arrived since
        # Shared with the threads that call `abort`.
        self._opening: Any = None  # the socket of a link that is in its handshake
        self._aborted = False

    @property
    def ready(self) -> bool:
        """True while there is a link."""
        return self._link is not None

    @property
    def identity(self) -> str | None:
        """The identity of the store at the other end of the link; None without a link, or if it reports none."""
        return self._link.store if self._link else None

    def store(self, block: Block) -> None:
        """Return when the consumer has acked the block. If an error comes up meanwhile, the link is closed.

        Raises NotStored if nothing was sent, or if the consumer cannot have stored the block. Raises InDoubt if it may
        have stored it, whatever the error: after an unexpected error, for example MemoryError, a part of the
        message may be on its way, and the next message over this link would complete it. If the link has ended while it
        was idle, raises NotStored instead of making a new link: at the other end of the new link might be another store
        than the one that the block is for.
        """
        message = encode_batch(*block)
        if self._link and monotonic() - self._acked_at >= CHECK_AFTER_SECONDS:
            try:
                self._check_open(self._link)
            except OSError as error:
                self._drop()
                raise NotStored(self._describe(error)) from error
            except BaseException:
                self._drop()
                raise
        self.connect()
        link = self._link
        assert link is not None
        try:
            link.sock.settimeout(self._ack_timeout)
            link.send_bytes(message)
            self._sent += len(block.values)
            self._await_ack(link)
            self._pinged, self._acked_at = False, monotonic()
            if link.ending:  # the consumer acked, then said goodbye
                self.close()
        except BaseException as error:
            self._drop()
            if not isinstance(error, (OSError, WireError)):
                log_unexpected(log, "worker_error", error)
                raise InDoubt(self._describe(repr(error)), link.store) from error
            reason = self._describe(error)
            if self._cannot_be_stored(link, len(block.values)):
                raise NotStored(reason) from error
            raise InDoubt(reason, link.store) from error

    def connect(self) -> None:
        """Make a link, unless there is one. Raises NotStored if that fails."""
        if self._link:
            return
        try:
            self._connect()
        except (OSError, HandshakeError, WireError) as error:
            self._drop()
            raise NotStored(self._describe(error)) from error
        except BaseException:  # unexpected: the state of the link is unknown, so the next block gets a new one
            self._drop()
            raise

    def idle(self) -> None:
        """Answer the consumer's pings, and send one. Drop a link that has ended or that left the last ping unanswered.

        The next block then starts with a new link, instead of losing time with a dead one.
        """
        if self._link is None:
            return
        try:
            self._check_open(self._link)
            if self._pinged:
                raise TimeoutError("no answer to the last ping")
            self._link.ping()
            self._pinged = True
        except OSError as error:
            log.debug("idle_link_lost", {"reason": str(error)})
            self._drop()
        except BaseException:
            self._drop()
            raise

    def abort(self) -> None:
        """Make the running `store` or `connect` fail, and every later one. For other threads."""
        self._aborted = True
        if link := self._link:
            link.abort()
        if opening := self._opening:
            shut_down(opening)

    def close(self) -> None:
        """Close the link with a closing handshake, if there is one."""
        link, self._link = self._link, None
        if link:
            link.finish(1000, "")

    def _connect(self) -> None:
        keys = self._credentials.current
        endpoint = Endpoint(self._host, self._port, self._name or self._host)
        try:
            self._link = ClientConnection(
                endpoint, INGEST_PATH, SUBPROTOCOL, keys.client, keys.token, self._on_socket_open
            )
        finally:
            self._opening = None
        self._sent = self._acked = 0
        self._pinged = False
        # The check at the start misses a name that did not resolve then, or resolves to another address now.
        if self._is_own(peer_address(self._link.sock, self._host)):
            raise OSError("that is this server itself: it would forward in a circle")
        if self._aborted:  # during the handshake, when `abort` saw no link yet
            raise OSError("the server is stopping")
        self._connected()

    def _on_socket_open(self, sock: Any) -> None:
        """Let `abort` reach the socket during the handshake."""
        self._opening = sock
        if self._aborted:
            raise OSError("the server is stopping")

    def _check_open(self, link: ClientConnection) -> None:
        """Handle the frames that have arrived, without waiting. Raises OSError if the link has ended."""
        link.sock.setblocking(False)
        while data := link.read(wait=False):
            self._pinged = False
            link.parse(data)
        if link.ending or data == b"":
            raise ConnectionResetError("the consumer closed the connection")

    def _await_ack(self, link: ClientConnection) -> None:
        """Return when everything sent is acked. Raises OSError if the link ends or the timeout passes before."""
        deadline = deadline_after(self._ack_timeout)
        data = b""  # first, parse the bytes that arrived together with the handshake
        while True:
            for message in link.parse(data):
                acked = decode_ack(message.payloads)
                if acked > self._sent:
                    raise WireError(f"acked {acked} records of {self._sent} sent")
                self._acked = acked
                if acked == self._sent:
                    return
            if link.ending:
                raise ConnectionResetError(f"the consumer {link.ending_text}")
            seconds = remaining(deadline)
            if not seconds:
                raise TimeoutError(f"no ack within {self._ack_timeout:.0f} s")
            link.sock.settimeout(seconds)
            data = link.read() or b""
            if not data:
                raise ConnectionResetError("the consumer closed the connection")

    def _cannot_be_stored(self, link: ClientConnection, size: int) -> bool:
        """True if the consumer's goodbye means that it has not stored the last block, of `size` records.

        A consumer with a store that stops (close code 1001) acks every block that it has stored, or will have stored,
        before its goodbye. No store acks a part of a block, so if a part is acked, the block is in doubt. A peer that
        reports no store may be a publisher, whose goodbye means nothing.
        """
        none_acked = self._sent - self._acked == size
        said_goodbye = link.ending is not None and link.ending[0] == GOING_AWAY and not link.at_fault
        return bool(link.store) and said_goodbye and none_acked

    def _describe(self, error: Exception | str) -> str:
        return f"{format_address(self._host, self._port)}: {error}"

    def _drop(self) -> None:
        """Close the link without a closing handshake."""
        link, self._link = self._link, None
        if link:
            try:
                link.abort()
            finally:
                link.sock.close()


class LinkStats(NamedTuple):
    """A snapshot of a LinkState."""

    state: str  # "unknown" before the first batch, then "up" or "down"
    reason: str | None  # why it is down
    away: float  # seconds since it went down; 0 if it is not down
    quiet: float  # seconds since the last ack; infinite before the first


class LinkState:
    """The state of the consumer `peer`, as the links to it report it. Each change is logged once."""

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self._lock = threading.Lock()
        # Guarded by _lock. Two fields are also read or written without it: _state, a string, is read, and _acked_at, a
        # float, is written; each is one step.
        self._state = "unknown"
        self._acked_at = float("-inf")  # monotonic seconds
        self._reason: str | None = None
        self._down_since = 0.0  # monotonic seconds, while it is down

    @property
    def down(self) -> bool:
        """True from the failure of a link until the next ack or link."""
        return self._state == "down"

    def on_ack(self) -> None:
        """Record that the consumer has acked a batch, so it is up."""
        self._acked_at = monotonic()
        if self._state != "up":
            self._set_up()

    def on_connected(self) -> None:
        """Record that a link was made. If the consumer was down, it is up, even if there is no batch to send."""
        if self.down:
            self._set_up()

    def on_failure(self, reason: str) -> None:
        """Record that a link failed or could not be made, so the consumer is down."""
        with self._lock:
            was_down = self._state == "down"
            if not was_down:
                self._state, self._down_since = "down", monotonic()
            self._reason = reason
            level = logging.DEBUG if was_down else logging.WARNING
            log.log(level, "link_down", {"consumer": self._peer, "reason": reason})

    def stats(self) -> LinkStats:
        """Return a snapshot."""
        with self._lock:
            away = monotonic() - self._down_since if self._state == "down" else 0.0
            return LinkStats(self._state, self._reason, away, monotonic() - self._acked_at)

    def _set_up(self) -> None:
        with self._lock:
            before, self._state, self._reason = self._state, "up", None
            if before != "up":
                away = {"away_seconds": round(monotonic() - self._down_since, 1)} if before == "down" else {}
                log.info("link_up", {"consumer": self._peer, **away})
