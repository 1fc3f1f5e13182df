"""Batches in doubt: sent to a destination, and not known to be stored.

The consumer may have stored the batch, although its ack is late or did not come. Another consumer, with a database
of its own, would not recognise it as a duplicate. So the batch stays with its destination: only a link that leads to
the same consumer, or to the same store, may send it again. In the ring the batch is set aside.

A worker *holds* a batch while it waits for its late ack, or sends it again. Otherwise the batch waits for a worker.
`Doubts._lock` guards all of them. Nothing is called under it.
"""

import threading

from ringbuffer import Batch
from ringolib.forward.destination import Destination


class _Doubt:
    """One batch in doubt, and where it may be stored. `store` is None if the consumer did not report an identity."""

    __slots__ = ("batch", "destination", "store", "held")

    def __init__(self, batch: Batch, destination: Destination, store: str | None) -> None:
        self.batch = batch
        self.destination = destination
        self.store = store
        self.held = True

    def may_go(self, destination: Destination, store: str | None) -> bool:
        """True if a link of `destination` that leads to `store` may send the batch.

        A fixed destination is always the same consumer. An address of a name may have become another consumer's, but
        only the identity of its store can tell.
        """
        if self.store is not None and self.store == store:
            return True
        return self.destination is destination and (destination.fixed or self.store is None or store is None)


class Doubts:
    """All batches in doubt of a publisher with several consumers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._doubts: dict[Batch, _Doubt] = {}  # guarded by _lock; the order is that of their first doubt

    def hold(self, batch: Batch, destination: Destination, store: str | None) -> None:
        """Note that `batch` was sent to this destination and store. The calling worker keeps it for now.

        If it was in doubt before, its first destination stays: another one may have it only as long as it leads to the
        same store. If this store has no identity, the identity of an earlier store stays, too.
        """
        with self._lock:
            known = self._doubts.get(batch)
            if known:
                known.store = store or known.store
            else:
                self._doubts[batch] = _Doubt(batch, destination, store)

    def release(self, batch: Batch) -> None:
        """Let the next worker that may send the batch have it."""
        with self._lock:
            self._doubts[batch].held = False

    def settle(self, batch: Batch) -> None:
        """Forget a batch: it is stored, or surely not stored anywhere."""
        if self._doubts:  # one read: no lock needed, because the caller's own batch is here, or not
            with self._lock:
                self._doubts.pop(batch, None)

    def take(self, destination: Destination, store: str | None) -> Batch | None:
        """Return the oldest batch that a link of `destination` to `store` may send. The calling worker holds it."""
        if not self._doubts:
            return None
        with self._lock:
            for doubt in self._doubts.values():
                if not doubt.held and doubt.may_go(destination, store):
                    doubt.held = True
                    return doubt.batch
        return None

    def has_for(self, destination: Destination, store: str | None) -> bool:
        """True if a batch waits that a link of `destination` to `store` may send."""
        with self._lock:
            return any(not doubt.held and doubt.may_go(destination, store) for doubt in self._doubts.values())

    def records(self) -> dict[Destination, int]:
        """Return the number of records in doubt at each destination that has any."""
        records: dict[Destination, int] = {}
        with self._lock:
            for doubt in self._doubts.values():
                records[doubt.destination] = records.get(doubt.destination, 0) + len(doubt.batch)
        return records
