"""The server's end of a WebSocket: the upgrade's response, acks, and the deadlines of a client.

`ServerConnection` belongs to its connection's thread, as `websocket.Connection` says. It never waits for its client to
read: acks and pongs are queued in a short buffer, so that a client that reads late, or not at all, cannot delay a stop.

A client that stalls is given up: it is silent and answers no ping, or leaves a message unfinished, or reads so little
that acks cannot be sent.
"""

import select
import socket
from collections.abc import Mapping
from time import monotonic

from wsproto import ConnectionType
from wsproto.events import AcceptConnection

from ringolib.net.frames import encode_short_frame
from ringolib.net.websocket import Connection, HandshakeError
from ringolib.timing import remaining

PING_AFTER = 20.0
"""Seconds of silence after which a client is pinged."""
PING_TIMEOUT = 20.0
"""Seconds a client has, after a ping, to send any bytes: its pong, for example."""
MESSAGE_TIMEOUT = 150.0
"""Seconds a client has to finish a message, even if it answers pings: 8 MiB at the slowest rate of an HTTP body."""
STALL_TIMEOUT = 60.0
"""Seconds that queued bytes may wait for a client to read, while the system's buffers are full."""


class ServerConnection(Connection):
    """A client's connection, after a checked upgrade request with `headers`. Sends the response.

    `extra_headers` go into the response. `subprotocols` are the supported ones. `stop` becomes readable when the server
    stops. Raises HandshakeError if the headers are not a WebSocket handshake, OSError if the response cannot be sent.
    """

    def __init__(
        self,
        sock: socket.socket,
        headers: Mapping[str, str],
        extra_headers: Mapping[str, str],
        subprotocols: tuple[str, ...],
        stop: socket.socket,
    ) -> None:
        self._headers = headers
        self._extra_headers = extra_headers
        self._supported = subprotocols
        self._stop = stop
        # Monotonic seconds:
        self._heard_at = monotonic()  # when the client last sent bytes
        self._pinged_at: float | None = None  # when it was pinged since then
        self._stuck_since: float | None = None  # when `flush` sent none of the unsent bytes, and has sent none since
        super().__init__(sock, ConnectionType.SERVER)

    def handshake(self) -> None:
        """Answer 101, without extensions. The library's constructor calls this."""
        headers = [(name.encode(), value.encode("latin-1")) for name, value in self._headers.items()]
        extra = [(name.encode(), value.encode("latin-1")) for name, value in self._extra_headers.items()]
        try:
            self.ws.initiate_upgrade_connection(headers, "/")
            request = next(self.ws.events())
        except Exception as error:  # h11's and wsproto's errors: the client's request is wrong
            raise HandshakeError(str(error), 400) from error
        self.subprotocol = next((name for name in request.subprotocols if name in self._supported), None)
        accept = AcceptConnection(subprotocol=self.subprotocol, extensions=[], extra_headers=extra)
        self.sock.sendall(self.ws.send(accept))
        self.connected = True

    def read(self, wait: bool = True) -> bytes | None:
        """Read as the base class does, and remember when the client sent bytes."""
        data = super().read(wait)
        if data:
            self._heard_at, self._pinged_at = monotonic(), None
        return data

    def flush(self) -> bool:
        """Send as the base class does. Raises TimeoutError if no byte could be sent for STALL_TIMEOUT."""
        unsent = len(self._unsent)
        if super().flush() or len(self._unsent) < unsent:
            self._stuck_since = None
        else:
            now = monotonic()
            self._stuck_since = self._stuck_since or now
            if now >= self._stuck_since + STALL_TIMEOUT:
                raise TimeoutError(f"the peer has read nothing for {STALL_TIMEOUT:.0f} s")
        return not self._unsent

    def wait(self) -> None:
        """Wait until bytes can be read, unsent bytes were sent, the server stops, or it is time to call this again.

        Call it only if there is nothing to read. It pings a silent client. Raises OSError if the connection is lost,
        TimeoutError if the client has stalled.
        """
        deadline = self._check_deadlines()
        poll = select.poll()
        poll.register(self.sock, select.POLLIN | (select.POLLOUT if self._unsent else 0))
        poll.register(self._stop, select.POLLIN)
        poll.poll(remaining(deadline) * 1000 + 1)
        self.flush()

    def _check_deadlines(self) -> float:
        """Ping a silent client, and return the next deadline. Raises TimeoutError if one has passed."""
        now = monotonic()
        if not (self._tail or self._frame_left or self._fragmented):
            self._unfinished_since = None
        elif self._unfinished_since is None:
            self._unfinished_since = now
        if self._unfinished_since is not None and now >= self._unfinished_since + MESSAGE_TIMEOUT:
            raise TimeoutError(f"a message was not finished within {MESSAGE_TIMEOUT:.0f} s")
        if self._pinged_at is None and now >= self._heard_at + PING_AFTER:
            self.ping()
            self._pinged_at = now
        elif self._pinged_at is not None and now >= self._pinged_at + PING_TIMEOUT:
            raise TimeoutError(f"no answer to a ping within {PING_TIMEOUT:.0f} s")
        deadline = self._heard_at + PING_AFTER if self._pinged_at is None else self._pinged_at + PING_TIMEOUT
        if self._unfinished_since is not None:
            deadline = min(deadline, self._unfinished_since + MESSAGE_TIMEOUT)
        return deadline

    def send_ack(self, payload: bytes) -> bool:
        """Send a binary message of at most 125 bytes. Return False, and send nothing, if earlier bytes are unsent.

        It works after the peer's Close frame, too: RFC 6455 section 5.5.1 allows an endpoint to delay its own Close
        frame until its message is sent, but wsproto does not. Raises OSError if the connection is lost.
        """
        if not self.flush():
            return False
        self.queue(encode_short_frame(payload))
        return True
