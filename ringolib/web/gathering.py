"""When the ingest loop waits a moment before a turn, so that one turn and one commit serve several clients.

If 2,000 clients send one message a second each, a turn and a commit for each message take most of a processor core.
PostgreSQL has the same idea: `commit_delay` and `commit_siblings`.
"""

from time import sleep

GATHER_SECONDS = 0.001
"""Time that the loop waits before a turn."""
MIN_CLIENTS = 256
"""With fewer clients, the loop never waits."""
MAX_SHARE = 1 / 16
"""Of the clients: a larger share sends, or waits for acks, if most clients have a message in flight."""
SKIPPED_TURNS = 32
"""Turns without a wait, after two waits in a row that did not pay."""


class Gathering:
    """Decides whether to wait. Only the thread of the loop calls.

    A wait pays if a few of many clients send something meanwhile. It does not pay if one client sends: its messages
    would only be late. It does not pay either if many clients send: they wait for acks, and so for the next commit.
    """

    def __init__(self) -> None:
        self._skip = 0  # turns
        self._in_vain = 0  # waits in a row

    def wait(self, clients: int, waiting: int) -> bool:
        """Wait, if that is likely to pay. `waiting` of the `clients` wait for acks. Return whether it has waited."""
        if self._skip or clients < MIN_CLIENTS or waiting > clients * MAX_SHARE:
            return False
        sleep(GATHER_SECONDS)
        return True

    def note(self, waited: bool, served: int, clients: int) -> None:
        """Note that a turn reads from `served` of the `clients`, after a wait or not."""
        if not waited:
            self._skip -= bool(self._skip and served)
        elif 1 < served <= clients * MAX_SHARE:
            self._in_vain = 0
        else:
            self._in_vain += 1
            if self._in_vain == 2:
                self._skip, self._in_vain = SKIPPED_TURNS, 0
