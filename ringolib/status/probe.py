"""Probes: questions that may hang, asked by a thread of their own, with the answer cached.

`Probe._lock` guards the cached answer. `Probe._answered` is a condition on it, notified when an answer arrives; threads
that need the answer wait for it until their deadline. At most one thread per probe, `ask-NAME`, asks at a time,
without the lock.
"""

import json
import logging
import threading
from collections.abc import Callable
from time import monotonic

from ringolib.net.addresses import Endpoint
from ringolib.net.credentials import CredentialSet
from ringolib.net.http_client import HTTPError, get
from ringolib.net.sockets import reason_of
from ringolib.net.websocket import explain_refusal
from ringolib.status.readiness_rules import CONNECTIONS_FULL, Reason
from ringolib.timing import ThreadError, deadline_after, log_unexpected, start_thread, wait_until
from ringolib.wire import READY_PATH

log = logging.getLogger("ringoexp.ready")

CACHE_SECONDS = 1.0
"""How long an answer is valid. Within this time nothing is asked again."""
EXPIRY_SECONDS = 60.0
"""While a new answer is pending, the old one stands in for it, unless it is older than this."""
ANSWER_TIMEOUT_SECONDS = 2.0
"""How long the database or the consumer may take to answer."""
GLANCE_TIMEOUT_SECONDS = 0.1
"""How long stats and metrics wait for an answer. If it comes later, the next request has it."""

Answer = tuple[str, str] | None
"""Code and detail of a reason, or None if there is no reason."""


def answer_deadline(wait: bool) -> float:
    """Return the deadline for an answer, for a caller that waits for it or only glances at it."""
    return deadline_after(ANSWER_TIMEOUT_SECONDS if wait else GLANCE_TIMEOUT_SECONDS)


def no_answer() -> str:
    """Return the text for an answer that has not come in time."""
    return f"no answer within {ANSWER_TIMEOUT_SECONDS:.0f} s"


class Probe:
    """Asks one question, `ask`, at most once every CACHE_SECONDS, for any number of callers.

    While there has been no answer for ANSWER_TIMEOUT_SECONDS, the answer is `late`.
    """

    def __init__(self, name: str, ask: Callable[[], Answer], late: Answer) -> None:
        self._name = name
        self._ask = ask
        self._late = late
        self._lock = threading.Lock()
        self._answered = threading.Condition(self._lock)  # notified when _asking becomes false
        # Guarded by _lock. Times are monotonic seconds.
        self._asking = False
        self._asked_at = 0.0
        self._answer: Answer = None
        self._answered_at = float("-inf")
        self._since = 0.0  # when the answer got its present code

    @property
    def answered(self) -> bool:
        """True if there is an answer that has not expired."""
        return self._answered_at > float("-inf")  # one read: no lock needed

    def refresh(self) -> None:
        """Start to ask if the cached answer is older than CACHE_SECONDS. Does not wait."""
        with self._lock:
            self._ask_if_due()

    def reason(self, wait: bool, deadline: float | None = None) -> Reason | None:
        """Return the answer as a reason, or None if there is no reason. Asks if the cached answer is too old.

        Waits until `deadline`, which is `answer_deadline(wait)` by default. If no answer has come by then, a caller
        that waits gets `late`. Other callers get the previous answer, and `late` once the question has been pending for
        ANSWER_TIMEOUT_SECONDS.
        """
        deadline = deadline or answer_deadline(wait)
        with self._lock:
            self._ask_if_due()
            wait_until(self._answered, lambda: not self._asking, deadline)
            if self._asking and (wait or monotonic() - self._asked_at >= ANSWER_TIMEOUT_SECONDS):
                self._set_answer(self._late)
            return self._answer and Reason(*self._answer, monotonic() - self._since)

    def _ask_if_due(self) -> None:
        assert self._lock.locked()
        age = monotonic() - self._answered_at
        if self._asking or age < CACHE_SECONDS:
            return
        if age >= EXPIRY_SECONDS:
            self._answer, self._answered_at = None, float("-inf")
        try:
            # No owner joins this thread: the question may hang, and nothing depends on its end.
            start_thread(self._run, name=f"ask-{self._name}")
            self._asking, self._asked_at = True, monotonic()
        except ThreadError as error:
            self._set_answer(("failed", str(error)))

    def _run(self) -> None:
        """Ask once and keep the answer. Runs in a thread of its own."""
        try:
            answer = self._ask()
        except Exception as error:
            log_unexpected(log, "worker_error", error)
            answer = "failed", f"{type(error).__name__}: {error}"
        with self._lock:
            self._set_answer(answer)
            self._answered_at = monotonic()
            self._asking = False
            self._answered.notify_all()

    def _set_answer(self, answer: Answer) -> None:
        assert self._lock.locked()
        if answer is None or self._answer is None or answer[0] != self._answer[0]:
            self._since = monotonic()
        self._answer = answer


def check_consumer(endpoint: Endpoint, credentials: CredentialSet, linked: bool) -> Answer:
    """Ask the consumer at `endpoint` whether it is ready. Return why it is not, or None if it is.

    A publisher that is `linked` to the consumer does not care that all connections are in use: it has one of them.
    """
    try:
        deadline = deadline_after(ANSWER_TIMEOUT_SECONDS)
        head, body = get(
            endpoint, credentials.client, credentials.token, READY_PATH, deadline, accept="application/json"
        )
    except TimeoutError:
        return "consumer_unreachable", f"{endpoint}: {no_answer()}"
    except (OSError, HTTPError, ValueError) as error:  # ValueError: no host can have this name
        return "consumer_unreachable", f"{endpoint}: {reason_of(error)}"
    try:
        response = json.loads(body)
        reasons = [(str(reason["code"]), str(reason["detail"])) for reason in response.get("reasons", ())]
        unauthorized = response.get("authorized") is False
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "consumer_unreachable", f"{endpoint}: answered {head.status}: not a ringoexp server?"
    if unauthorized:
        return (
            "consumer_unreachable",
            f"{endpoint}: access token missing or wrong (--token_file, or RINGOEXP_TOKEN)",
        )
    if head.status != 200 and not reasons:
        return "consumer_unreachable", f"{endpoint}: answered {head.status}{explain_refusal(head.status, body)}"
    details = [detail for code, detail in reasons if code != CONNECTIONS_FULL or not linked]
    return ("consumer_not_ready", f"{endpoint}: {'; '.join(details)}") if details else None
