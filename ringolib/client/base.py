"""What both producers share: their arguments, their counts, and the report of records that were not acked.

A producer belongs to the process that made it. A child has no thread `producer` after a fork, the child's copy of a
lock may be locked for ever, and the connection is the parent's. So the child's calls fail at once.
"""

import os
import sys
import uuid
from typing import TYPE_CHECKING

from ringolib.client.outbox import Outbox, ProducerError
from ringolib.client.url import parse_url
from ringolib.net.addresses import Endpoint
from ringolib.net.credentials import TOKEN_FORM, is_token
from ringolib.net.tls import client_context
from ringolib.wire import MAX_SEQUENCE

if TYPE_CHECKING:
    import ssl


class BaseProducer:
    """A producer without its way to wait: see `Producer` and `AsyncProducer`."""

    def __init__(
        self, url: str, source: uuid.UUID | None, first: int, token: str | None, context: "ssl.SSLContext | None"
    ) -> None:
        host, port, self._path, secure = parse_url(url)
        if context and not secure:
            raise ValueError(f"{url!r} is not accepted with certificates: TLS needs wss:// or https://")
        if token is not None and not is_token(token):
            raise ValueError(f"malformed token: expected {TOKEN_FORM}, without a newline")
        if not 0 <= first < MAX_SEQUENCE:
            raise ValueError(f"first {first} is not accepted: 0 to 2**63 - 2")
        self._endpoint = Endpoint(host, port, host)
        self._token = token
        self._context = (context or client_context(None)) if secure else None
        self._pid = os.getpid()
        self._outbox = Outbox(url, source or uuid.uuid4(), first)

    # Read without a lock: each is one attribute of the outbox, or two of which one never changes.

    @property
    def url(self) -> str:
        """The server's URL."""
        return self._outbox.url

    @property
    def source(self) -> uuid.UUID:
        """The source of the records."""
        return self._outbox.source

    @property
    def first(self) -> int:
        """The number of the first record of this producer."""
        return self._outbox.first

    @property
    def sent(self) -> int:
        """Records that `send` has accepted."""
        return self._outbox.next - self._outbox.first

    @property
    def acked(self) -> int:
        """Records that are known to be stored."""
        return self._outbox.acked - self._outbox.first

    @property
    def transmitted(self) -> int:
        """Records that were sent to the server at least once."""
        return self._outbox.transmitted - self._outbox.first

    @property
    def reconnects(self) -> int:
        """Connections beyond the first."""
        return max(0, self._outbox.connections - 1)

    @property
    def connected(self) -> bool:
        """True while there is a connection."""
        return self._outbox.connected

    @property
    def trouble(self) -> str | None:
        """Why the last connection failed; None once a record is acked again."""
        return self._outbox.trouble

    def _is_foreign(self) -> bool:
        """True in a process that did not make this producer."""
        return self._pid != os.getpid()

    def _check_process(self) -> None:
        """Raise ProducerError in a process that did not make this producer."""
        if self._is_foreign():
            raise ProducerError("another process made this producer: after a fork, make a new one, with its own source")

    def _end_close(self, report: bool) -> None:
        """Report the records that are not acked, once."""
        try:
            open_producers.remove(self)
        except KeyError:
            return
        if report and self._outbox.unacked and sys.stderr:
            try:
                print(f"ringoexp {type(self).__name__}: {self._outbox.resumption()}", file=sys.stderr, flush=True)
            except Exception:
                pass  # stderr belongs to the program, and may be any object: `close` does not fail because of it


open_producers: set[BaseProducer] = set()
"""Producers that are not closed. `add` and `remove` are atomic."""
