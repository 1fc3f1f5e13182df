"""Destinations: each is one place where workers store batches, a consumer or the local store."""

from collections.abc import Callable

from ringolib.forward.health import Health
from ringolib.forward.sink import Sink
from ringolib.net.addresses import Endpoint


class Destination:
    """One place to store batches, through the sinks that `make_sink` makes, one for each worker.

    `make_sink` gets a callback for the sink to call each time it makes a link. If the sinks are links, `endpoint` is
    the address of their consumer. `health` is what its workers experience. With a spool that may be well while the
    consumer is down, so the consumer then has a health of its own, `consumer`.

    The destination is `fixed` if the user named this very address, which then always means the same consumer, even with
    another store. An address that a name resolved to may become another consumer's, and so may a name that has other
    addresses later; then it is no longer fixed.

    If it is the `only` destination, now and later, no batch is in doubt: a retry goes to the same place. Otherwise a
    worker makes its link before it takes a batch. So no batch waits for an unreachable consumer, and the worker knows
    which store it reaches.
    """

    def __init__(
        self,
        make_sink: Callable[[Callable[[], None]], Sink],
        health: Health | None = None,
        endpoint: Endpoint | None = None,
        fixed: bool = True,
        only: bool = True,
        consumer: Health | None = None,
    ) -> None:
        self.make_sink = make_sink
        self.health = health or Health()
        self.consumer = consumer or self.health
        self.endpoint = endpoint
        self.only = only
        self.unexpected: str | None = None  # the last error that nothing expected, until a batch is stored
        # Guarded by the pool's lock.
        self.fixed = fixed  # never again True once it is False
        self.workers = 0  # without the retiring ones
        self.dropped = False  # no name or option leads here any more: the workers end
