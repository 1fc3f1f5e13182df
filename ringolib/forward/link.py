"""Links: the sink that sends batches to a consumer over WebSocket.

A `LinkSink` belongs to the thread of its worker; `abort` alone is for other threads. Nothing here is locked.
"""

import logging
from collections.abc import Callable
from typing import Any

from ringolib.forward.sink import InDoubt, NotStored, ignore_late
from ringolib.net.addresses import Address, Endpoint, format_address
from ringolib.net.credentials import Credentials
from ringolib.net.sockets import peer_address, reason_of, shut_down
from ringolib.net.websocket import HandshakeError
from ringolib.net.websocket_client import ClientConnection
from ringolib.timing import RUNTIME, Runtime, log_unexpected
from ringolib.wire import INGEST_PATH, SUBPROTOCOL, Block, WireError, decode_ack, encode_batch

log = logging.getLogger("ringoexp.link")

ACK_TIMEOUT_SECONDS = 30.0
"""How long a consumer may take to receive a batch, and again to ack it, before the link is dropped."""
LATE_SECONDS = 1.0
"""A batch without an ack after this time is late. If there are other consumers, the records of others go on then."""
CHECK_AFTER_SECONDS = 0.02
"""If the last ack is at least this old, the link is checked before a block is sent over it: it may have ended."""
GOING_AWAY = 1001
"""The close code of a server that stops (RFC 6455 section 7.4.1)."""


class _Patience:
    """How long a batch may take to be sent, and again to be acked. `on_late` is called once, after LATE_SECONDS."""

    def __init__(self, timeout: float, on_late: Callable[[], None], monotonic: Callable[[], float]) -> None:
        self._timeout = timeout
        self._monotonic = monotonic
        self._on_late: Callable[[], None] | None = on_late
        self._began = self._restarted = self._monotonic()
        self._complaint = "took no data"
        self.step = min(LATE_SECONDS, timeout)  # a wait calls `check` after so many seconds

    def restart(self) -> None:
        """The batch is sent; its ack may take as long again."""
        self._restarted = self._monotonic()
        self._complaint = "no ack"

    def check(self) -> None:
        """Raise TimeoutError if the time is up."""
        now = self._monotonic()
        if now - self._restarted >= self._timeout:
            complaint = f"{self._complaint} within {self._timeout:g} s"
            raise TimeoutError(f"{complaint}: it hangs, or the network drops packets")
        if self._on_late and now - self._began >= LATE_SECONDS:
            on_late, self._on_late = self._on_late, None
            on_late()


Dial = Callable[[str, int, Callable[[Any], None]], ClientConnection]
"""Connects to a host and a port. The third argument is called with the socket as soon as it is open."""


def dialer(
    credentials: Credentials | None = None,
    is_own: Callable[[Address], bool] = lambda address: False,
    name: str | None = None,
) -> Dial:
    """Return a function that connects over the network. It raises OSError or HandshakeError.

    `credentials` are the token and the TLS context. `is_own` recognises the server's own addresses: a server must not
    link to itself. If the hosts are addresses of a name, `name` is that name.
    """
    credentials = credentials or Credentials()

    def dial(host: str, port: int, on_socket: Callable[[Any], None]) -> ClientConnection:
        keys = credentials.current
        endpoint = Endpoint(host, port, name or host)
        link = ClientConnection(endpoint, INGEST_PATH, SUBPROTOCOL, keys.client, keys.token, on_socket)
        try:
            # The check at the start misses a name that did not resolve then, or resolves to another address now.
            if is_own(peer_address(link.sock, host)):
                raise OSError("that is this server itself: it would forward in a circle")
        except BaseException:
            link.sock.close()
            raise
        return link

    return dial


class LinkSink:
    """A WebSocket link to a consumer, made when a block needs it.

    `dial` connects; by default it is `dialer()`. `connected` is called for each link that is made. `ack_timeout` is how
    many seconds the consumer may take to receive a block, and again to ack it.
    """

    def __init__(
        self,
        host: str,
        port: int,
        connected: Callable[[], None] = lambda: None,
        ack_timeout: float | None = None,
        dial: Dial | None = None,
        runtime: Runtime = RUNTIME,
    ) -> None:
        self._host = host
        self._port = port
        self._connected = connected
        self._ack_timeout = ack_timeout or ACK_TIMEOUT_SECONDS
        self._dial = dial or dialer()
        self._monotonic = runtime.monotonic
        self._link: ClientConnection | None = None
        self._sent = 0  # records sent over this link; all acked unless `store` is running
        self._acked = 0  # records acked over this link
        self._acked_at = float("-inf")  # monotonic seconds
        self._pinged = False  # a ping was sent, and nothing has arrived since
        self._unexpected: str | None = None  # the last error that nothing expected, until a block is acked
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

    def store(self, block: Block, on_late: Callable[[], None] = ignore_late) -> None:
        """Return when the consumer has acked the block. If an error comes up meanwhile, the link is closed.

        Raises NotStored if nothing was sent, or if the consumer cannot have stored the block. Raises InDoubt if it may
        have stored it, whatever the error: after an unexpected error, for example MemoryError, a part of the
        message may be on its way, and the next message over this link would complete it. If the link has ended while it
        was idle, raises NotStored instead of making a new link: at the other end of the new link might be another store
        than the one that the block is for.
        """
        message = encode_batch(*block)
        self._check_idle_link()
        self.connect()
        link = self._link
        assert link is not None
        try:
            patience = _Patience(self._ack_timeout, on_late, self._monotonic)
            link.sock.settimeout(patience.step)
            link.send_bytes(message, patience.check)
            self._sent += len(block.values)
            patience.restart()
            self._await_ack(link, patience)
            self._pinged, self._acked_at, self._unexpected = False, self._monotonic(), None
            if link.ending:  # the consumer acked, then said goodbye
                self.close()
        except BaseException as error:
            self._drop()
            raise self._judge(error, link, len(block.values)) from error

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
        try:
            self._link = self._dial(self._host, self._port, self._on_socket_open)
        finally:
            self._opening = None
        self._sent = self._acked = 0
        self._pinged = False
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

    def _check_idle_link(self) -> None:
        """Drop a link that has ended while it was idle. Raises NotStored then."""
        if self._link and self._monotonic() - self._acked_at >= CHECK_AFTER_SECONDS:
            try:
                self._check_open(self._link)
            except OSError as error:
                self._drop()
                raise NotStored(self._describe(error)) from error
            except BaseException:
                self._drop()
                raise

    def _judge(self, error: BaseException, link: ClientConnection, size: int) -> NotStored | InDoubt:
        """Return what an error means for the last block, of `size` records, which was sent at least in part."""
        if not isinstance(error, (OSError, WireError)):
            text = repr(error)
            log_unexpected(log, "worker_error", error, repeated=text == self._unexpected)
            self._unexpected = text
            return InDoubt(self._describe(text), link.store)
        if self._cannot_be_stored(link, size):
            return NotStored(self._describe(error))
        return InDoubt(self._describe(error), link.store)

    def _await_ack(self, link: ClientConnection, patience: _Patience) -> None:
        """Return when everything sent is acked. Raises OSError if the link ends or patience does."""
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
            patience.check()
            try:
                data = link.read() or b""
            except TimeoutError:
                data = b""
                continue
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
        reason = error if isinstance(error, str) else reason_of(error)
        return f"{format_address(self._host, self._port)}: {reason}"

    def _drop(self) -> None:
        """Close the link without a closing handshake."""
        link, self._link = self._link, None
        if link:
            try:
                link.abort()
            finally:
                link.sock.close()
