"""One connection of an outbox: sends its messages and reads the acks, without waiting.

Both producers use it: the threaded one waits for the socket with poll, the asyncio one with its event loop. The lock
guards the outbox. It is not held for I/O.
"""

from contextlib import AbstractContextManager
from time import monotonic
from typing import Any

from ringolib.client.outbox import Outbox
from ringolib.net.websocket_client import Link


class Exchange:
    """An exchange of messages and acks on `link`, a new connection, which does not block from then on."""

    def __init__(self, outbox: Outbox, link: Link, lock: AbstractContextManager[Any]) -> None:
        self._outbox = outbox
        self._link = link
        self._lock = lock
        link.sock.setblocking(False)
        with lock:
            outbox.connect(monotonic())

    def turn(self) -> float:
        """Read the acks that have arrived, and send one message at most. Return when the next turn is due.

        The next turn is due earlier if the socket is readable, if it is writable while the link has unsent bytes, and
        when the outbox has a new record or is closed. Raises OSError, WireError or RecordsRefused if the connection
        fails. A part of a message may be on its way then, so the connection must be closed.
        """
        link, outbox = self._link, self._outbox
        unsent_before = link.unsent
        self._read_acks()
        link.flush()
        with self._lock:
            now = monotonic()
            if link.unsent < unsent_before:  # the socket's buffer takes other messages at once
                outbox.note_progress(now)
            chunk = None if link.unsent or outbox.closed else outbox.next_chunk()
            if not chunk:
                return outbox.stall_deadline(now)
        link.begin_bytes(outbox.encode(chunk))
        link.flush()
        return now

    def _read_acks(self) -> None:
        """Handle the acks that have arrived. Raises an error if the server has ended the connection behind them."""
        data: bytes | None = b""  # first parse the bytes that arrived with the handshake
        while data is not None:
            acks = [message.payloads for message in self._link.parse(data)]
            with self._lock:
                for ack in acks:
                    self._outbox.receive(ack, monotonic())
            if self._link.ending:
                raise self._outbox.close_error(self._link.ending[0], self._link.at_fault, self._link.ending_text)
            data = self._link.read(wait=False)
            if data == b"":
                raise ConnectionResetError("the server closed the connection")
