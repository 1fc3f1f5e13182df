"""TODO: ringolib/forward/sink.py."""

from typing import Protocol

from ringolib.storage.interface import Storage, StoreError
from ringolib.wire import Block


class SinkError(Exception):
    """A block may not be stored: it has to be stored again. The text says why."""


class InDoubt(SinkError):
    """A block may be stored, or not: nobody but that store can tell. `store` is which one it is, if that is known."""

    def __init__(self, reason: str, store: str | None = None) -> None:
        super().__init__(reason)
        self.store = store


class Sink(Protocol):
    """Where a worker stores. `store` returns when the block is on disk, or raises SinkError: InDoubt when it may be.

    `ready` says that it would not have to connect first, which `connect` does; it raises SinkError. `identity` is which
    store it is at the other end of its link, if there is one, and that is known. `idle` is called
    now and then while there is nothing to store. `abort` is for other threads and makes a `store` that waits for a
    peer, and `connect`, fail.
    """

    @property
    def ready(self) -> bool: ...
    @property
    def identity(self) -> str | None: ...
    def connect(self) -> None: ...
    def store(self, block: Block) -> None: ...
    def idle(self) -> None: ...
    def abort(self) -> None: ...
    def close(self) -> None: ...


class StoreSink:
    """The local store as a sink."""

    ready = True
    identity = None

    def __init__(self, store: Storage) -> None:
        self._store = store

    def store(self, block: Block) -> None:
        """Returns when the block is on disk. Raises SinkError when the commit failed."""
        try:
            self._store.append(*block)
        except StoreError as error:
            raise SinkError(str(error)) from error

    def connect(self) -> None:
        """Does nothing: there is no link."""

    def idle(self) -> None:
        """Does nothing: there is no link to look after."""

    def abort(self) -> None:
        """Does nothing: a commit waits for nobody."""

    def close(self) -> None:
        """Does nothing: the store is the server's."""
