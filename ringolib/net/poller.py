"""Pollers: which of many descriptors are ready, asked without blocking. A poller can be polled itself.

`EpollPoller` is for Linux, without the bookkeeping of `selectors`, which costs a microsecond for each ready descriptor.
`SelectorPoller` is for other systems. One thread uses a poller.
"""

import select
import selectors


class SelectorPoller:
    """Waits for one kind of event, `selectors.EVENT_READ` or `selectors.EVENT_WRITE`."""

    def __init__(self, event: int) -> None:
        self._event = event
        self._selector = selectors.DefaultSelector()

    def register(self, descriptor: int) -> None:
        """Add a descriptor."""
        self._selector.register(descriptor, self._event)

    def unregister(self, descriptor: int) -> None:
        """Remove a descriptor, before it is closed."""
        self._selector.unregister(descriptor)

    def ready(self) -> list[int]:
        """Return descriptors that are ready now; if there are very many, some of them."""
        return [key.fd for key, _ in self._selector.select(0)]

    def fileno(self) -> int:
        """The poller's own descriptor: readable if a descriptor is ready."""
        return self._selector.fileno()

    def close(self) -> None:
        """Close the poller."""
        self._selector.close()


class EpollPoller:
    """The same with epoll(7), level-triggered."""

    def __init__(self, event: int) -> None:
        self._mask = select.EPOLLIN if event == selectors.EVENT_READ else select.EPOLLOUT
        self._epoll = select.epoll()
        self.unregister = self._epoll.unregister
        self.fileno = self._epoll.fileno
        self.close = self._epoll.close

    def register(self, descriptor: int) -> None:
        """See SelectorPoller."""
        self._epoll.register(descriptor, self._mask)

    def ready(self) -> list[int]:
        """See SelectorPoller."""
        return [descriptor for descriptor, _ in self._epoll.poll(0)]


Poller: type[SelectorPoller] | type[EpollPoller] = EpollPoller if hasattr(select, "epoll") else SelectorPoller
