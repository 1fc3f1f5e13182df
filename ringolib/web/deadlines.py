"""The deadlines of many clients, in a heap: finding the passed ones costs nothing for the others.

A client has one valid entry, `Client.scheduled`. An entry is never moved. If a deadline moves later, the old entry
stays, and the client is checked when it passes. One thread uses a `Deadlines`.
"""

import heapq
from collections.abc import Collection
from math import inf

from ringolib.web.client import Client

MAX_STALE_ENTRIES = 1000
"""Invalid entries are removed when there are more than this, plus one for each client."""


class Deadlines:
    """See the module's docstring. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Client]] = []
        self._entries = 0  # ever made; entries with the same deadline keep their order

    @property
    def next(self) -> float:
        """The earliest deadline, or an earlier one that is not valid any more; infinite without a deadline."""
        return self._heap[0][0] if self._heap else inf

    def schedule(self, client: Client, earliest: float = 0.0, latest: float = inf) -> None:
        """Note the session's next deadline, between `earliest` and `latest`, if it is earlier than the noted one."""
        deadline = min(latest, max(earliest, client.session.next_deadline))
        if deadline < client.scheduled:
            client.scheduled = deadline
            self._entries += 1
            heapq.heappush(self._heap, (deadline, self._entries, client))

    def take_passed(self, now: float) -> list[Client]:
        """Remove and return the clients whose noted deadline has passed. Schedule them again."""
        passed = []
        while self._heap and self._heap[0][0] <= now:
            deadline, _, client = heapq.heappop(self._heap)
            if deadline == client.scheduled:
                client.scheduled = inf
                passed.append(client)
        return passed

    def forget_gone(self, clients: Collection[Client]) -> None:
        """Remove the entries of clients that are not in `clients`, if there are many: they keep memory in use."""
        if len(self._heap) > 2 * len(clients) + MAX_STALE_ENTRIES:
            valid = [entry for entry in self._heap if entry[2] in clients and entry[0] == entry[2].scheduled]
            heapq.heapify(valid)
            self._heap = valid
