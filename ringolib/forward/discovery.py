"""The consumers that a publisher's flags name: one destination for each, also where a name has several addresses.

The thread `resolve`, where names are to be resolved at all, asks again when a link has failed, at most every SOON
seconds, and else every NOW_AND_THEN: consumers come and go. `_lock` guards the destinations and what the thread waits for;
`_changed` shares it, is notified when a link fails and by `stop`, and the thread alone waits on it. Nothing is
resolved under it.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Protocol

from ringolib.forward.destination import Destination
from ringolib.net.addresses import AddressError, Endpoint, format_address, is_fixed, resolve_endpoints

log = logging.getLogger("ringoexp.link")

SOON = 1.0
"""Seconds between two questions at least, when links fail."""
NOW_AND_THEN = 30.0
"""Seconds after which a name is resolved again in any case."""


class Workers(Protocol):
    """Who is told which consumers there are: the forwarder."""

    def change(self, added: Sequence[Destination], dropped: Sequence[Destination]) -> None: ...
    def keep(self, destination: Destination) -> bool: ...


class Consumers:
    """Destinations to all of `hosts`, made by `make`, which gets the place, and a callback for when a link fails.

    What does not resolve now may do so later, but raises AddressError if it is all of them. With `by_name` a host is
    one consumer, whatever addresses its name has.
    """

    def __init__(
        self,
        hosts: Sequence[tuple[str, int]],
        make: Callable[[Endpoint, Callable[[], None]], Destination],
        by_name: bool = False,
    ) -> None:
        self._hosts = hosts
        self._make = make
        self._found: dict[tuple[str, int], list[Endpoint]] = {}  # the thread's, once it runs
        self._dropped: dict[Endpoint, Destination] = {}  # the same

        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        # Guarded by _lock.
        self._destinations: dict[Endpoint, Destination] = {}
        self._failed = False  # a link, since names were resolved
        self._stopping = False

        if by_name:
            self._found = {(host, port): [Endpoint(host, port, host)] for host, port in hosts}
        else:
            errors = self._resolve()
            if not any(self._found.values()):
                raise errors[0]
            for error in errors:
                log.warning("consumer_unresolved", {"reason": str(error)})
        self._destinations = {place: self._make(place, self.lost) for place in self._wanted()}
        self._thread: threading.Thread | None = None
        if not by_name and not all(is_fixed(host) for host, _ in hosts):
            # Daemon: a name service may take its time, and nothing depends on its answer.
            self._thread = threading.Thread(target=self._run, name="resolve", daemon=True)

    @property
    def destinations(self) -> list[Destination]:
        """Those there are now, in the order of the flags."""
        with self._lock:
            return list(self._destinations.values())

    def start(self, workers: Workers) -> None:
        """From now on tells these of changes. Raises RuntimeError when there is no thread to be had."""
        self._workers = workers
        if self._thread:
            self._thread.start()

    def lost(self) -> None:
        """A link has failed: perhaps a name has other addresses now."""
        with self._lock:
            if not self._failed:
                self._failed = True
                self._changed.notify()

    def stop(self, timeout: float) -> None:
        """Ends the thread, unless it waits for a name service for longer than `timeout` seconds."""
        with self._lock:
            self._stopping = True
            self._changed.notify()
        if self._thread and self._thread.ident:
            self._thread.join(timeout)

    # The thread.

    def step(self) -> None:
        """Resolves the names, and tells of what has changed."""
        for error in self._resolve():
            log.debug("consumer_unresolved", {"reason": str(error)})
        wanted = self._wanted()
        gone = {place: destination for place, destination in self._destinations.items() if place not in wanted}
        destinations: dict[Endpoint, Destination] = {}
        new = []
        for place in wanted:
            destination = self._destinations.get(place) or self._dropped.pop(place, None)
            if destination is None or not self._workers.keep(destination):
                destination = self._make(place, self.lost)
                new.append(destination)
            destinations[place] = destination
        with self._lock:
            self._destinations = destinations
        self._dropped = {place: each for place, each in {**self._dropped, **gone}.items() if each.workers}
        if new or gone:
            said = {"added": [str(each.place) for each in new], "gone": [str(place) for place in gone]}
            log.info("consumers", {key: " ".join(value) for key, value in said.items() if value})
            self._workers.change(new, list(gone.values()))

    def _run(self) -> None:
        """Waits until there is reason to ask, and asks, until the end."""
        while True:
            asked = monotonic()
            with self._lock:
                while not self._stopping and (left := self._next(asked) - monotonic()) > 0:
                    self._changed.wait(left)
                if self._stopping:
                    return
                self._failed = False
            try:
                self.step()
            except Exception as error:
                log.error("worker_error", {"error": repr(error)}, exc_info=log.isEnabledFor(logging.DEBUG))

    def _next(self, asked: float) -> float:
        assert self._lock.locked()
        return asked + (SOON if self._failed else NOW_AND_THEN)

    def _resolve(self) -> list[AddressError]:
        """Notes what each host stands for now; what cannot be resolved stays as it was. Those errors."""
        errors = []
        for host, port in self._hosts:
            try:
                self._found[host, port] = resolve_endpoints(host, port)
            except AddressError as error:
                errors.append(AddressError(f"-U {format_address(host, port)}: {error}"))
        return errors

    def _wanted(self) -> list[Endpoint]:
        found = [place for each in self._hosts for place in self._found.get(each, ())]
        return list({(place.host, place.port): place for place in reversed(found)}.values())[::-1]  # two names of one
