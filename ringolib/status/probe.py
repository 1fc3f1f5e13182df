"""TODO: ringolib/status/probe.py."""

import http.client
import json
import logging
import ssl
import threading
from collections.abc import Callable
from time import monotonic
from typing import NamedTuple

from ringolib.net.addresses import Endpoint, certified_name, host_header
from ringolib.net.credentials import CredentialSet
from ringolib.net.sockets import connect
from ringolib.net.tls_socket import explain
from ringolib.net.websocket import hint
from ringolib.wire import READY_PATH

log = logging.getLogger("ringoexp.ready")

FRESH = 1.0
"""Seconds for which an answer holds."""
BRIEFLY = 0.1
"""Seconds that who only wants to know waits for an answer."""
STALE = 60.0
"""Seconds after which an old answer says nothing any more."""
PATIENCE = 2.0
"""Seconds that database and consumer have to answer."""
THEIR_LIMIT = "connections_full"
"""A reason that is none for who has a link: that is one of the connections."""
Answer = tuple[str, str] | None
"""A reason's code and detail, or none."""


class Reason(NamedTuple):
    """Why a record would not be stored now: a word for programs, a text for people, and for how long, if known."""

    code: str
    detail: str
    seconds: float | None = None


class _Question:
    """`ask`, asked by one thread at a time, and its answer, kept for FRESH seconds, with the time it has lasted.

    `late` is the answer while it has none after PATIENCE.
    """

    def __init__(self, name: str, ask: Callable[[], Answer], late: Answer) -> None:
        self._name = name
        self._ask = ask
        self._late = late
        self._lock = threading.Lock()
        self._answered = threading.Condition(self._lock)
        # Guarded by _lock.
        self._asking = False
        self._asked_at = 0.0  # monotonic seconds
        self._answer: Answer = None
        self._at = float("-inf")  # monotonic seconds
        self._since = 0.0  # since when the answer has had this code

    @property
    def answered(self) -> bool:
        """True once there was an answer."""
        return self._at > float("-inf")

    def begin(self) -> None:
        """Asks, if the last answer is FRESH seconds old, for who looks for the answer afterwards."""
        with self._lock:
            self._ask_if_due()

    def reason(self, wait: bool, deadline: float | None = None) -> Reason | None:
        """The answer, at most FRESH seconds old, within PATIENCE. Without `wait`, within BRIEFLY: or else the last one,
        if it is not STALE. `deadline`, in monotonic seconds, in place of these.
        """
        deadline = deadline or monotonic() + (PATIENCE if wait else BRIEFLY)
        with self._lock:
            self._ask_if_due()
            while self._asking and (left := deadline - monotonic()) > 0:
                self._answered.wait(left)
            if self._asking and (wait or monotonic() - self._asked_at >= PATIENCE):
                self._say(self._late)
            return self._answer and Reason(*self._answer, monotonic() - self._since)

    def _ask_if_due(self) -> None:
        assert self._lock.locked()
        if not self._asking and monotonic() - self._at >= FRESH:
            if monotonic() - self._at >= STALE:
                self._answer, self._at = None, float("-inf")
            self._begin()

    def _begin(self) -> None:
        """Has it asked by a thread of its own."""
        assert self._lock.locked()
        # Daemon, and nobody waits for its end: what it asks may hang, and nothing depends on it.
        thread = threading.Thread(target=self._run, name=f"ask-{self._name}", daemon=True)
        try:
            thread.start()
            self._asking, self._asked_at = True, monotonic()
        except RuntimeError as error:
            self._say(("failed", f"no thread to be had: {error}"))

    def _run(self) -> None:
        """The thread: one question."""
        try:
            answer = self._ask()
        except Exception as error:
            log.error("worker_error", {"error": repr(error)}, exc_info=log.isEnabledFor(logging.DEBUG))
            answer = "failed", f"{type(error).__name__}: {error}"
        with self._lock:
            self._say(answer)
            self._at = monotonic()
            self._asking = False
            self._answered.notify_all()

    def _say(self, answer: Answer) -> None:
        assert self._lock.locked()
        if answer is None or self._answer is None or answer[0] != self._answer[0]:
            self._since = monotonic()
        self._answer = answer


def _late() -> str:
    return f"no answer within {PATIENCE:.0f} s"


def _check_consumer(place: Endpoint, keys: CredentialSet, linked: bool) -> Answer:
    """What the consumer says when it is asked whether it is ready; nothing if it is.

    That all its connections are taken is no matter for who is `linked` to it already.
    """
    where, (host, port, name) = str(place), place
    connection: http.client.HTTPConnection | None = None
    try:
        connection = http.client.HTTPConnection(host, port, timeout=PATIENCE)
        connection.sock = connect(host, port, PATIENCE)
        if keys.client:
            connection.sock = keys.client.wrap_socket(connection.sock, server_hostname=certified_name(name))
        headers = {"Host": host_header(name, port), "Accept": "application/json", "Connection": "close"}
        if keys.token:
            headers["Authorization"] = f"Bearer {keys.token}"
        connection.request("GET", READY_PATH, headers=headers)
        response = connection.getresponse()
        status, body = response.status, response.read(65536)
    except TimeoutError:
        return "consumer_unreachable", f"{where}: {_late()}"
    except ssl.SSLError as error:
        return "consumer_unreachable", f"{where}: {explain(error)}"
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: no host can have such a name
        return "consumer_unreachable", f"{where}: {error or type(error).__name__}"
    finally:
        if connection:
            connection.close()
    try:
        said = json.loads(body)
        theirs = [(str(each["code"]), str(each["detail"])) for each in said.get("reasons", ())]
        unauthorized = said.get("authorized") is False
    except (ValueError, KeyError, TypeError, AttributeError):
        return "consumer_unreachable", f"{where}: answered {status}: is that a ringoexp?"
    if unauthorized:
        return "consumer_unreachable", f"{where}: it wants a token, or another one (--token_file, or RINGOEXP_TOKEN)"
    if status != 200 and not theirs:
        return "consumer_unreachable", f"{where}: answered {status}{hint(status)}"
    ours = [detail for code, detail in theirs if code != THEIR_LIMIT or not linked]
    return ("consumer_not_ready", f"{where}: {'; '.join(ours)}") if ours else None
