"""`GET /v1.0/records` of a publisher: passes the request on to a consumer, and the answer back piece by piece.

The functions run on the thread of the connection. `RelayedRecords` is shared by all of them, and `LongAnswers` limits
the answers that last. While a thread waits for a consumer, it looks every LOOK_SECONDS whether the server stops.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from http import HTTPStatus
from typing import TypeVar
from urllib.parse import quote, unquote

from ringolib.net.addresses import Endpoint
from ringolib.net.credentials import Credentials
from ringolib.net.http_client import Head, HTTPConnection, HTTPError, json_error, open_stream, request_headers
from ringolib.net.sockets import reason_of
from ringolib.timing import deadline_after, remaining
from ringolib.web.handler import WebHandler
from ringolib.web.headers import Refusal, tokens
from ringolib.web.records import (
    MAX_STREAMS,
    STOPPING,
    BodyWriter,
    LongAnswers,
    client_ended,
    cut,
    parse,
)
from ringolib.wire import RECORDS_PATH

T = TypeVar("T")

ANSWER_TIMEOUT_SECONDS = 20.0
"""How long a consumer may take to connect and to begin its answer, and for each further piece of a page."""
LOOK_SECONDS = 0.5
"""How often a thread that waits for a consumer looks whether the server stops, or a follower's client has gone."""
MAX_PUBLISHERS = 8
"""Publishers in a row, at most. More of them are probably a loop."""
RELAYED = (200, 400, 406, 503, 508)
"""Statuses of a consumer that concern the client. Others concern the publisher: the client gets 502."""


class RelayedRecords:
    """Answers from one of the `consumers`."""

    def __init__(
        self, consumers: Callable[[], Sequence[Endpoint]], credentials: Credentials, max_streams: int = MAX_STREAMS
    ) -> None:
        self._consumers = consumers
        self._credentials = credentials
        self._long_answers = LongAnswers(max_streams)

    def answer(self, connection: WebHandler) -> None:
        """Answer the request of a connection. Raises Refusal."""
        parsed = connection.parsed
        request = parse(parsed.query, ",".join(parsed.headers.get_all("accept")))
        publishers = tokens(parsed.headers, "via")
        if len(publishers) >= MAX_PUBLISHERS:
            reason = f"{MAX_PUBLISHERS} publishers have passed the request on: check their -U for a loop"
            raise Refusal(HTTPStatus.LOOP_DETECTED, reason)
        endpoint = self._choose(request.consumer)
        with ExitStack() as stack:
            if request.lasts:
                stack.enter_context(self._long_answers.place())
            upstream = self._ask(connection, endpoint, ", ".join([*publishers, "1.1 ringoexp"]), stack)
            head, body = _read_answer(connection, upstream, endpoint)
            if body is None:
                _send_stream(connection, upstream, head, request.follow, endpoint)
            else:
                _send_whole(connection, head, body, request.consumer, endpoint)

    def _choose(self, name: str | None) -> Endpoint:
        """Return the consumer with this name, or the only one. Raises Refusal."""
        consumers = self._consumers()
        names = [str(endpoint) for endpoint in consumers]
        if name is None and len(consumers) == 1:
            return consumers[0]
        if name in names:
            return consumers[names.index(name)]
        problem = "this publisher has several consumers" if name is None else "this publisher has no such consumer"
        reason = f"{problem}: choose one with consumer= (ringoexp read: --consumer): {', '.join(names)}"
        raise Refusal(400, reason, fields={"consumers": names})

    def _ask(self, connection: WebHandler, endpoint: Endpoint, via: str, stack: ExitStack) -> HTTPConnection:
        """Send the request to the consumer. `stack` closes the connection to it. Raises Refusal."""
        deadline = deadline_after(ANSWER_TIMEOUT_SECONDS)
        credentials = self._credentials.current
        parts = [part for part in connection.parsed.query.split("&") if unquote(part.partition("=")[0]) != "consumer"]
        accept = ",".join(connection.parsed.headers.get_all("accept"))
        headers = {**request_headers(endpoint, credentials.token, accept), "Via": via}
        try:
            upstream = HTTPConnection(stack.enter_context(closing(open_stream(endpoint, credentials.client, deadline))))
            upstream.send(connection.command, f"{RECORDS_PATH}?{'&'.join(parts)}", headers, deadline)
        except (OSError, HTTPError, ValueError) as error:
            raise _failed(endpoint, error) from None
        return upstream


def _read_answer(connection: WebHandler, upstream: HTTPConnection, endpoint: Endpoint) -> tuple[Head, bytes | None]:
    """Return the head of the consumer's answer, and its body; None if the body has no known length. Raises Refusal."""
    deadline = deadline_after(ANSWER_TIMEOUT_SECONDS)
    try:
        head = _wait(connection, upstream.read_head, deadline)
        if head.status == HTTPStatus.OK and not head.values("content-length"):
            return head, None
        return head, _wait(connection, upstream.read_body, deadline)
    except (OSError, HTTPError) as error:
        raise _failed(endpoint, error) from None


def _wait(connection: WebHandler, read: Callable[[float], T], deadline: float) -> T:
    """Return the result of `read`. Raises its errors, TimeoutError after the deadline, or Refusal at a stop."""
    while True:
        try:
            return read(min(deadline, deadline_after(LOOK_SECONDS)))
        except TimeoutError:
            if connection.server.stopping.is_set():
                raise Refusal(503, STOPPING, {"Retry-After": "5"}) from None
            if not remaining(deadline):
                raise


def _failed(endpoint: Endpoint, error: Exception) -> Refusal:
    """Return the error for a consumer that gives no answer."""
    if isinstance(error, TimeoutError):
        reason = f"{endpoint}: no answer within {ANSWER_TIMEOUT_SECONDS:.0f} s"
        return Refusal(504, reason, {"Retry-After": "5"})
    return Refusal(502, f"{endpoint}: {reason_of(error)}", {"Retry-After": "5"})


def _send_whole(connection: WebHandler, head: Head, body: bytes, consumer: str | None, endpoint: Endpoint) -> None:
    """Send an answer that is known as a whole. Raises Refusal if its status concerns the publisher."""
    if head.status not in RELAYED:
        raise Refusal(502, f"{endpoint}: answered {head.status}{_explain(head.status, body)}")
    headers = {name: value for name in ("Cache-Control", "Retry-After") for value in head.values(name)}
    for link in head.values("link"):
        chosen = f"consumer={quote(consumer, safe='')}&" if consumer else ""
        headers["Link"] = link.replace("<?", f"<?{chosen}", 1)
    content_type = "".join(head.values("content-type")[:1])
    if connection.command == "HEAD":
        headers["Content-Length"] = "".join(head.values("content-length")[:1])
    connection.reply(head.status, None if connection.command == "HEAD" else body, content_type, headers)


def _send_stream(
    connection: WebHandler, upstream: HTTPConnection, head: Head, follow: bool, endpoint: Endpoint
) -> None:
    """Send an answer of unknown length. If the consumer ends it too early, the client gets no end either.

    Raises TimeoutError, or another OSError, only for the client.
    """
    writer = BodyWriter(connection, "".join(head.values("content-type")[:1]))
    if connection.command == "HEAD":
        return
    pieces = _lines(connection, upstream, endpoint) if follow else _pieces(connection, upstream, endpoint)
    try:
        for piece in pieces:
            writer.write(piece)
        writer.end()
    except Refusal as refusal:
        cut(connection, str(refusal))


def _pieces(connection: WebHandler, upstream: HTTPConnection, endpoint: Endpoint) -> Iterator[bytes]:
    """Yield the body of the consumer's answer. Raises Refusal if it is not complete."""
    while True:
        try:
            piece = _wait(connection, upstream.read_piece, deadline_after(ANSWER_TIMEOUT_SECONDS))
        except (OSError, HTTPError) as error:
            raise _failed(endpoint, error) from None
        if not piece:
            return
        yield piece
        if connection.server.stopping.is_set():
            raise Refusal(503, STOPPING)


def _lines(connection: WebHandler, upstream: HTTPConnection, endpoint: Endpoint) -> Iterator[bytes]:
    """Yield the body of an answer that follows, until the client, the consumer or the server ends.

    The end of the server comes behind a whole line: a part of a number would look like another one. Raises Refusal if
    the answer cannot end in order.
    """
    stopping = connection.server.stopping
    line_ends = True
    while not (line_ends and stopping.is_set()):
        try:
            piece = upstream.read_piece(deadline_after(LOOK_SECONDS))
        except TimeoutError:
            if not client_ended(connection, 0.001):
                continue
            if not line_ends:
                raise Refusal(503, STOPPING) from None
            return
        except (OSError, HTTPError) as error:
            raise _failed(endpoint, error) from None
        if not piece:
            return
        if stopping.is_set():
            piece = piece[: piece.rfind(b"\n") + 1] or piece
        yield piece
        line_ends = piece.endswith(b"\n")


def _explain(status: int, body: bytes) -> str:
    """Return why the consumer has refused, and what to do, to append to an error text."""
    if status == HTTPStatus.NOT_FOUND:
        return ": it is older than this publisher, and cannot be read from: update it"
    if status == HTTPStatus.UNAUTHORIZED:
        return ": this publisher's token is missing or wrong there (--token_file, or RINGOEXP_TOKEN)"
    error = json_error(body)
    return ": not a ringoexp server?" if error is None else f": {error}"
