"""Discovery: the addresses of the consumers that a publisher's options name.

A host may be a name with several addresses, which come and go. So names are resolved again: soon after a link failed,
and regularly. The forwarder's thread `resolve` waits in `wait` for the addresses. Discovery itself calls no other
part.

`Discovery._lock` guards the reasons to resolve again. `_changed` shares it: the thread waits on it, and `hurry` and
`stop` notify it. Names are not resolved under the lock.
"""

import logging
import threading
from collections.abc import Callable, Sequence

from ringolib.net.addresses import AddressError, Endpoint, format_address, is_fixed, resolve_endpoints
from ringolib.timing import RUNTIME, Runtime

log = logging.getLogger("ringoexp.link")

MIN_RESOLVE_INTERVAL_SECONDS = 1.0
"""After a link failed, names are resolved again, but not more often than this."""
RESOLVE_INTERVAL_SECONDS = 30.0
"""Names are resolved again after this time in any case."""


class Discovery:
    """The addresses of `hosts`, in order. With `by_name` each host is one consumer, however many addresses it has.

    `resolve` returns the addresses of one host, or raises AddressError. A host that does not resolve now may do so
    later, but if no host resolves, raises AddressError.
    """

    def __init__(
        self,
        hosts: Sequence[tuple[str, int]],
        by_name: bool = False,
        resolve: Callable[[str, int], list[Endpoint]] | None = None,
        runtime: Runtime = RUNTIME,
    ) -> None:
        self.has_names = not by_name and not all(is_fixed(host) for host, _ in hosts)
        self._hosts = hosts
        self._resolve_host = resolve or resolve_endpoints
        self._runtime = runtime
        self._resolved: dict[tuple[str, int], list[Endpoint]] = {}  # only one thread at a time uses it
        self._lock = threading.Lock()
        self._changed = runtime.condition(self._lock)
        # Guarded by _lock.
        self._link_lost = False  # since names were last resolved
        self._stopping = False

        if by_name:
            self._resolved = {(host, port): [Endpoint(host, port, host)] for host, port in hosts}
            return
        errors = self._resolve()
        if not any(self._resolved.values()):
            raise errors[0]
        for error in errors:
            log.warning("consumer_unresolved", {"reason": str(error)})

    @property
    def endpoints(self) -> list[Endpoint]:
        """The addresses that were last found. If two names have an address in common, it is there once."""
        endpoints = [endpoint for host in self._hosts for endpoint in self._resolved.get(host, ())]
        by_address = {(endpoint.host, endpoint.port): endpoint for endpoint in reversed(endpoints)}
        return list(by_address.values())[::-1]

    def wait(self) -> list[Endpoint] | None:
        """Wait until there is a reason to resolve the names again. Return the addresses now, or None after `stop`."""
        resolved_at = self._runtime.monotonic()
        with self._lock:
            due = resolved_at + RESOLVE_INTERVAL_SECONDS
            self._runtime.wait_until(self._changed, lambda: self._stopping or self._link_lost, due)
            self._runtime.wait_until(self._changed, lambda: self._stopping, resolved_at + MIN_RESOLVE_INTERVAL_SECONDS)
            if self._stopping:
                return None
            self._link_lost = False
        for error in self._resolve():
            log.debug("consumer_unresolved", {"reason": str(error)})
        return self.endpoints

    def hurry(self) -> None:
        """Have the names resolved soon: a link failed, so a name may have other addresses now."""
        with self._lock:
            if not self._link_lost:
                self._link_lost = True
                self._changed.notify()

    def stop(self) -> None:
        """End `wait`, unless a name service does not answer."""
        with self._lock:
            self._stopping = True
            self._changed.notify()

    def _resolve(self) -> list[AddressError]:
        """Resolve each host again. If a host does not resolve, keep its endpoints. Return the errors."""
        errors = []
        for host, port in self._hosts:
            try:
                self._resolved[host, port] = self._resolve_host(host, port)
            except AddressError as error:
                errors.append(AddressError(f"-U {format_address(host, port)}: {error}"))
        return errors
