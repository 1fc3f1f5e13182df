"""The sink interface: how a worker stores a batch, and the two ways in which that fails.

Each worker has a sink of its own, and only its thread calls it; `abort` alone is for other threads. A sink is a link to
a consumer (`link.LinkSink`), a link with a spool behind it (`spool.SpoolSink`), or the local store (`StoreSink`).
"""

from collections.abc import Callable
from typing import Protocol

from ringolib.storage.interface import Storage, StoreError
from ringolib.wire import Block


class NotStored(Exception):
    """The block is surely not stored, or a retry goes to the same store, which knows it. The text gives the reason."""


class InDoubt(Exception):
    """The block may be stored: it was sent, and not acked. The text gives the reason.

    Only the store that may have the block recognises it as a duplicate. `store` is the identity of that store, or None
    if the consumer does not report one.
    """

    def __init__(self, reason: str, store: str | None = None) -> None:
        super().__init__(reason)
        self.store = store


def ignore_late() -> None:
    """Do nothing: nothing else could be done with the records of a late batch."""


class Sink(Protocol):
    """How one worker stores its batches at its destination."""

    @property
    def ready(self) -> bool:
        """True if `store` would not have to connect first."""

    @property
    def identity(self) -> str | None:
        """The identity of the store at the other end of the link; None without a link, or if it reports none."""

    def connect(self) -> None:
        """Connect, unless the sink is ready. Raises NotStored."""

    def store(self, block: Block, on_late: Callable[[], None] = ignore_late) -> None:
        """Return when the block is on disk. Raises NotStored or InDoubt.

        If the ack of a consumer is late, the sink calls `on_late`, once, and goes on to wait.
        """

    def idle(self) -> None:
        """Look after the link. The worker calls this regularly while it has nothing to store."""

    def abort(self) -> None:
        """Make a `store` or `connect` fail that waits for a peer. For other threads."""

    def close(self) -> None:
        """Close the link, if there is one."""


class StoreSink:
    """The local store as a sink."""

    ready = True
    identity = None

    def __init__(self, store: Storage) -> None:
        self._store = store

    def store(self, block: Block, on_late: Callable[[], None] = ignore_late) -> None:
        """Return when the block is on disk. Raises NotStored if the commit failed.

        Even if a failed commit stored the block after all, nothing is in doubt: the block is sent to this store again,
        which recognises duplicates.
        """
        try:
            self._store.append(*block)
        except StoreError as error:
            raise NotStored(str(error)) from error

    def connect(self) -> None:
        """Do nothing: the local store needs no link."""

    def idle(self) -> None:
        """Do nothing: the local store needs no link."""

    def abort(self) -> None:
        """Do nothing: a commit does not wait for a peer."""

    def close(self) -> None:
        """Do nothing: the server closes its store."""
