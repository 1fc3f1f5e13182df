"""`GET /v1.0/records` of a publisher: passes the request on to a consumer, and the answer back piece by piece.

The functions run on the thread of the connection. `RelayedRecords` is shared by all of them; its semaphore limits the
answers that last.
"""

import json
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from http import HTTPStatus
from urllib.parse import quote, unquote

from ringolib.net.addresses import Endpoint, host_header
from ringolib.net.credentials import Credentials
from ringolib.net.http_client import Head, HTTPConnection, HTTPError, open_stream
from ringolib.storage.interface import PAGE_RECORDS
from ringolib.timing import deadline_after
from ringolib.web.handler import WebHandler
from ringolib.web.headers import Refusal, tokens
from ringolib.web.records import MAX_STREAMS, BodyWriter, RecordsRequest, client_ended, parse
from ringolib.wire import RECORDS_PATH

ANSWER_TIMEOUT_SECONDS = 20.0
"""How long a consumer may take to connect and to begin its answer, and for each further piece of a page."""
LOOK_SECONDS = 0.5
"""How often an answer that follows looks whether its client is still there."""
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
        self._max_streams = max_streams
        self._streams = threading.BoundedSemaphore(max_streams)

    def answer(self, connection: WebHandler) -> None:
        """Answer the request of a connection. Raises Refusal."""
        parsed = connection.parsed
        request = parse(parsed.query, ",".join(parsed.headers.get_all("accept")))
        publishers = tokens(parsed.headers, "via")
        if len(publishers) >= MAX_PUBLISHERS:
            reason = f"{MAX_PUBLISHERS} publishers have passed the request on: check their -U for a loop"
            raise Refusal(HTTPStatus.LOOP_DETECTED, reason)
        endpoint = self._choose(request.consumer)
        lasts = request.follow or request.query.limit > PAGE_RECORDS
        if lasts and not self._streams.acquire(blocking=False):
            reason = (
                f"{self._max_streams} long answers are being sent: retry later, or use limit={PAGE_RECORDS} or less"
            )
            raise Refusal(503, reason, {"Retry-After": "5"})
        try:
            self._relay(connection, request, endpoint, ", ".join([*publishers, "1.1 ringoexp"]))
        finally:
            if lasts:
                self._streams.release()

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

    def _relay(self, connection: WebHandler, request: RecordsRequest, endpoint: Endpoint, via: str) -> None:
        """Ask the consumer, and send its answer. Raises Refusal if it gives no answer."""
        deadline = deadline_after(ANSWER_TIMEOUT_SECONDS)
        credentials = self._credentials.current
        parts = [part for part in connection.parsed.query.split("&") if unquote(part.partition("=")[0]) != "consumer"]
        try:
            headers = {
                "Host": host_header(endpoint.name, endpoint.port),
                "Accept-Encoding": "identity",
                "Connection": "close",
                "Via": via,
            }
            if accept := connection.parsed.headers.get_all("accept"):
                headers["Accept"] = ",".join(accept)
            if credentials.token:
                headers["Authorization"] = f"Bearer {credentials.token}"
            with closing(open_stream(endpoint, credentials.client, deadline)) as sock:
                upstream = HTTPConnection(sock)
                upstream.send(connection.command, f"{RECORDS_PATH}?{'&'.join(parts)}", headers, deadline)
                head = upstream.read_head(deadline)
                if head.status == HTTPStatus.OK and not head.values("content-length"):
                    _send_stream(connection, upstream, head, request.follow)
                    return
                body = upstream.read_body(deadline)
        except TimeoutError:
            reason = f"{endpoint}: no answer within {ANSWER_TIMEOUT_SECONDS:.0f} s"
            raise Refusal(504, reason, {"Retry-After": "5"}) from None
        except (OSError, HTTPError, ValueError) as error:
            raise Refusal(502, f"{endpoint}: {error or type(error).__name__}", {"Retry-After": "5"}) from None
        if head.status not in RELAYED:
            raise Refusal(502, f"{endpoint}: answered {head.status}{_explain(head.status, body)}")
        headers = {name: value for name in ("Cache-Control", "Retry-After") for value in head.values(name)}
        for link in head.values("link"):
            chosen = f"consumer={quote(request.consumer, safe='')}&" if request.consumer else ""
            headers["Link"] = link.replace("<?", f"<?{chosen}", 1)
        content_type = "".join(head.values("content-type")[:1])
        if connection.command == "HEAD":
            headers["Content-Length"] = "".join(head.values("content-length")[:1])
        connection.reply(head.status, None if connection.command == "HEAD" else body, content_type, headers)


def _send_stream(connection: WebHandler, upstream: HTTPConnection, head: Head, follow: bool) -> None:
    """Send an answer of unknown length. If the consumer ends it too early, the client gets no end either."""
    writer = BodyWriter(connection, "".join(head.values("content-type")[:1]))
    if connection.command == "HEAD":
        return
    closes, connection.close_connection = connection.close_connection, True  # unless the end is sent
    while True:
        try:
            piece = upstream.read_piece(deadline_after(LOOK_SECONDS if follow else ANSWER_TIMEOUT_SECONDS))
        except TimeoutError:
            if not follow:
                return
            if client_ended(connection, 0.001):
                break
            continue
        except (OSError, HTTPError):
            return
        if not piece:
            break
        writer.write(piece)
    writer.end()
    connection.close_connection = closes


def _explain(status: int, body: bytes) -> str:
    """Return why the consumer has refused, and what to do, to append to an error text."""
    if status == HTTPStatus.NOT_FOUND:
        return ": it is older than this publisher, and cannot be read from: update it"
    if status == HTTPStatus.UNAUTHORIZED:
        return ": this publisher's token is missing or wrong there (--token_file, or RINGOEXP_TOKEN)"
    try:
        return f": {json.loads(body)['error']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return ": not a ringoexp server?"
