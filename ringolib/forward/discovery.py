"""Discovery: find the consumers named by a publisher's options, with one destination for each address.

If a host is a name to resolve, the thread `resolve` resolves it again: soon after a link failed, and regularly, because
consumers come and go. `Consumers._lock` guards the destinations and the reasons for the thread to go on. `_changed`
shares it: the thread waits on it, and `on_link_lost` and `stop` notify it. Names are not resolved under the lock.

The thread and the forwarder call each other: the thread passes new and dropped destinations to the forwarder (`change`
and `keep`), and a worker of a destination calls `on_link_lost` here. So `Consumers` is made before the forwarder, and
learns of it in `start`.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Protocol

from ringolib.forward.destination import Destination
from ringolib.net.addresses import AddressError, Endpoint, format_address, is_fixed, resolve_endpoints
from ringolib.timing import log_unexpected, start_thread, wait_until

log = logging.getLogger("ringoexp.link")

MIN_RESOLVE_INTERVAL_SECONDS = 1.0
"""After a link failed, names are resolved again, but not more often than this."""
RESOLVE_INTERVAL_SECONDS = 30.0
"""Names are resolved again after this time in any case."""


class Workers(Protocol):
    """The part of the forwarder that the thread calls."""

    def change(self, added: Sequence[Destination], dropped: Sequence[Destination]) -> None: ...
    def keep(self, destination: Destination) -> bool: ...


class Consumers:
    """The destinations for `hosts`. `make` makes each one, from its endpoint and a callback for a failed link.

    A host that does not resolve now may do so later, but if no host resolves, raises AddressError. With `by_name` each
    host is one consumer, however many addresses its name has.
    """

    def __init__(
        self,
        hosts: Sequence[tuple[str, int]],
        make: Callable[[Endpoint, Callable[[], None]], Destination],
        by_name: bool = False,
    ) -> None:
        self._hosts = hosts
        self._make = make
        self._needs_thread = not by_name and not all(is_fixed(host) for host, _ in hosts)
        self._thread: threading.Thread | None = None

        # Only the thread uses these, once it runs.
        self._workers: Workers  # set by `start`
        self._resolved: dict[tuple[str, int], list[Endpoint]] = {}
        self._dropped: dict[Endpoint, Destination] = {}  # still with workers

        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        # Guarded by _lock.
        self._destinations: dict[Endpoint, Destination] = {}
        self._link_lost = False  # since names were last resolved
        self._stopping = False

        if by_name:
            self._resolved = {(host, port): [Endpoint(host, port, host)] for host, port in hosts}
        else:
            errors = self._resolve()
            if not any(self._resolved.values()):
                raise errors[0]
            for error in errors:
                log.warning("consumer_unresolved", {"reason": str(error)})
        self._destinations = {endpoint: make(endpoint, self.on_link_lost) for endpoint in self._endpoints()}

    @property
    def destinations(self) -> list[Destination]:
        """The destinations now, in the order of the options."""
        with self._lock:
            return list(self._destinations.values())

    def start(self, workers: Workers) -> None:
        """Start the thread, if it is needed. It passes changes to `workers`. Raises ThreadError."""
        self._workers = workers
        if self._needs_thread:
            self._thread = start_thread(self._run, name="resolve")

    def on_link_lost(self) -> None:
        """Have the names resolved soon: a link failed, so a name may have other addresses now."""
        with self._lock:
            if not self._link_lost:
                self._link_lost = True
                self._changed.notify()

    def stop(self, timeout: float) -> None:
        """End the thread. If a name service does not answer within `timeout` seconds, leave the thread behind."""
        with self._lock:
            self._stopping = True
            self._changed.notify()
        if self._thread:
            self._thread.join(timeout)

    # The thread.

    def step(self) -> None:
        """Resolve the names, and pass the changes to the workers."""
        for error in self._resolve():
            log.debug("consumer_unresolved", {"reason": str(error)})
        endpoints = self._endpoints()
        dropped = {endpoint: old for endpoint, old in self._destinations.items() if endpoint not in endpoints}
        destinations: dict[Endpoint, Destination] = {}
        added = []
        for endpoint in endpoints:
            destination = self._destinations.get(endpoint) or self._dropped.pop(endpoint, None)
            if destination is None or not self._workers.keep(destination):
                destination = self._make(endpoint, self.on_link_lost)
                added.append(destination)
            destinations[endpoint] = destination
        with self._lock:
            self._destinations = destinations
        candidates = {**self._dropped, **dropped}
        self._dropped = {endpoint: old for endpoint, old in candidates.items() if old.workers}
        if added or dropped:
            addresses = {"added": [str(new.endpoint) for new in added], "gone": [str(old) for old in dropped]}
            log.info("consumers", {key: " ".join(value) for key, value in addresses.items() if value})
            self._workers.change(added, list(dropped.values()))

    def _run(self) -> None:
        """Resolve whenever there is a reason to, until `stop`."""
        unexpected = None  # the last error, until a turn succeeds
        while self._wait_for_reason():
            try:
                self.step()
                unexpected = None
            except Exception as error:
                log_unexpected(log, "worker_error", error, repeated=repr(error) == unexpected)
                unexpected = repr(error)

    def _wait_for_reason(self) -> bool:
        """Wait until the names are to be resolved again. Return False after `stop`."""
        resolved_at = monotonic()
        with self._lock:
            due = resolved_at + RESOLVE_INTERVAL_SECONDS
            wait_until(self._changed, lambda: self._stopping or self._link_lost, due)
            wait_until(self._changed, lambda: self._stopping, resolved_at + MIN_RESOLVE_INTERVAL_SECONDS)
            self._link_lost = False
            return not self._stopping

    def _resolve(self) -> list[AddressError]:
        """Resolve each host again. If a host does not resolve, keep its endpoints. Return the errors."""
        errors = []
        for host, port in self._hosts:
            try:
                self._resolved[host, port] = resolve_endpoints(host, port)
            except AddressError as error:
                errors.append(AddressError(f"-U {format_address(host, port)}: {error}"))
        return errors

    def _endpoints(self) -> list[Endpoint]:
        """Return the endpoints of all hosts, in order. If two names have an address in common, it is there once."""
        endpoints = [endpoint for host in self._hosts for endpoint in self._resolved.get(host, ())]
        by_address = {(endpoint.host, endpoint.port): endpoint for endpoint in reversed(endpoints)}
        return list(by_address.values())[::-1]
