"""The command `ringoexp read`: prints stored records.

It asks for one page after the other, so a reader that pauses, like `less`, keeps nothing at the server, and `--follow`
outlives a restart of the server. One thread does everything.
"""

import argparse
import os
import re
import select
import signal
import sys
from time import sleep
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from ringolib.client.command_line import EXIT_USAGE, Parser, parse_uuid
from ringolib.client.output import own_hints, print_line
from ringolib.client.url import Target, parse_url
from ringolib.net.addresses import Endpoint
from ringolib.net.credentials import CredentialError, read_token
from ringolib.net.http_client import HTTPError, get, json_error
from ringolib.net.sockets import reason_of
from ringolib.net.tls import CredentialFileError, client_context
from ringolib.printable import escape_controls
from ringolib.timing import backoff, deadline_after
from ringolib.wire import INGEST_PATH, RECORDS_PATH

EXIT_OK, EXIT_FAILED = 0, 1
URL = "http://localhost:6660"
PAGE_RECORDS = 2048
"""Records that one request asks for: the server answers them at once, with a Link to the next page."""
ANSWER_SECONDS = 30.0
FOLLOW_MILLISECONDS = 500
"""The time between two questions for new records."""
_REFUSED_HINT = "is a server running there? Other machines reach it only with its flag -H 0.0.0.0"
_NEXT = re.compile(r'<\?(?:[^>]*&)?after=([^&>]*)[^>]*>; *rel="?next"?')


class ReadError(Exception):
    """The server does not answer, or refuses. `retryable` says whether a later request may succeed."""

    def __init__(self, text: str, status: int = EXIT_FAILED, retryable: bool = True) -> None:
        super().__init__(text)
        self.status = status
        self.retryable = retryable


class _Server(NamedTuple):
    """The server to ask, and how."""

    target: Target
    token: str | None
    context: Any


def make_parser() -> Parser:
    """Return the parser of the command line of `ringoexp read`."""
    parser = Parser(
        prog="ringoexp read",
        description="Prints stored records in the order of their arrival.",
        epilog="example: ringoexp read --format csv > records.csv",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--limit", type=_positive, metavar="N", help="print at most N records (default: all)")
    add("--follow", action="store_true", help="after the last record, wait for new ones, until Ctrl-C")
    add("--format", choices=("text", "csv", "ndjson"), default="text", help="text: values only (default)")
    add("--source", type=parse_uuid, metavar="UUID", help="only records of this source")
    add("--since", metavar="TIME", help="from this time on: 2026-01-31T12:00:00Z, or 30s, 10m, 2h, 7d ago")
    add("--after", metavar="ID", help="only records after the one with this id")
    add("--order", choices=("asc", "desc"), default="asc", help="desc: the newest first")
    add("--consumer", metavar="ADDRESS", help="which consumer to ask, if the server is a publisher of several")
    add("--url", default=URL, help=f"the server (default {URL}); https:// for TLS; ws+unix:PATH for a Unix socket")
    parser.add_credentials("https")
    return parser


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19 and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: use a whole number, 1 or more")
    return int(text)


def main(argv: list[str]) -> int:
    """Run `ringoexp read` and return the exit status.

    0 all printed; 1 refused, or cannot connect or write; 2 bad usage; 128 and the number of a signal.
    """
    parser = make_parser()
    try:
        arguments, unknown = parser.parse_known_args(argv)
        parser.refuse_unknown(unknown)
        parser.check_credentials(arguments)
        if arguments.follow and arguments.order == "desc":
            parser.error("--follow and --order desc exclude each other: omit one")
        try:
            return _print_records(_server(arguments), arguments)
        except ValueError as error:
            parser.error(str(error))
        except (CredentialError, CredentialFileError) as error:
            return _fail(str(error))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _server(arguments: argparse.Namespace) -> _Server:
    """Return the server of the command line. Raises ValueError, CredentialError and CredentialFileError."""
    target = parse_url(arguments.url)
    prefix = target.path.removesuffix(INGEST_PATH).removesuffix(RECORDS_PATH).rstrip("/")
    context = client_context(arguments.ca, arguments.cert, arguments.key) if target.secure else None
    return _Server(target._replace(path=prefix + RECORDS_PATH), read_token(arguments.token_file), context)


def _print_records(server: _Server, arguments: argparse.Namespace) -> int:
    """Print page after page, and return the exit status."""
    if sys.stdout is None:
        return _fail("stdout is closed")
    output = sys.stdout.fileno()
    left, cursor, pages, failures = arguments.limit, arguments.after, 0, 0
    while left is None or left > 0:
        limit = min(left or PAGE_RECORDS, PAGE_RECORDS)
        try:
            lines, following = _ask(server, arguments, cursor, limit)
        except ReadError as error:
            if not (arguments.follow and pages and error.retryable):
                resume = f"; --after {cursor} continues" if cursor and pages else ""
                return _fail(f"{error}{resume}", error.status)
            failures += 1
            if failures == 1:
                print_line(f"ringoexp read: {own_hints(str(error))}; trying again", error=True)
            sleep(backoff(failures))
            continue
        header, records = lines[:1], lines[1:]
        if arguments.format != "csv":
            header, records = [], lines
        try:
            _write(output, b"".join(records if pages else header + records))
        except BrokenPipeError:
            return _end_by_broken_pipe(output)
        except OSError as error:
            return _fail(f"stdout: {error.strerror}")
        pages, failures = pages + 1, 0
        left = None if left is None else left - len(records)
        cursor = following or cursor
        if not records and arguments.follow:
            if _reader_has_gone(output):
                return _end_by_broken_pipe(output)
        elif following is None or (len(records) < limit and not arguments.follow):
            break  # a page that is not full is the last one: to ask again would hardly end while records arrive
    return EXIT_OK


def _ask(
    server: _Server, arguments: argparse.Namespace, cursor: str | None, limit: int
) -> tuple[list[bytes], str | None]:
    """Return the lines of a page, and the cursor of the next page or None. Raises ReadError."""
    values = {"limit": str(limit), "format": arguments.format, "order": arguments.order}
    values["after"] = cursor
    values["source"] = arguments.source and str(arguments.source)
    values["since"] = arguments.since if arguments.order == "desc" or cursor is None else None
    values["consumer"] = arguments.consumer
    query = "&".join(f"{name}={quote(value, safe='')}" for name, value in values.items() if value)
    target = server.target
    endpoint = Endpoint(target.host, target.port, target.host)
    deadline = deadline_after(ANSWER_SECONDS)
    try:
        head, body = get(endpoint, server.context, server.token, f"{target.path}?{query}", deadline)
    except TimeoutError:
        raise ReadError(f"{arguments.url}: no answer within {ANSWER_SECONDS:.0f} s") from None
    except (OSError, HTTPError) as error:
        hint = f" ({_REFUSED_HINT})" if isinstance(error, ConnectionRefusedError) else ""
        raise ReadError(f"{arguments.url}: {reason_of(error)}{hint}") from None
    if head.status != 200:
        raise _refusal(arguments.url, head.status, body)
    match = next(filter(None, map(_NEXT.search, head.values("link"))), None)
    return body.splitlines(keepends=True), match and unquote(match[1])


def _refusal(url: str, status: int, body: bytes) -> ReadError:
    """Return the error for an answer of another status than 200."""
    error = json_error(body)
    reason = "not a ringoexp server?" if error is None else escape_controls(str(error))
    retryable = status in (429, 500, 502, 503, 504)
    return ReadError(f"{url}: answered {status}: {reason}", EXIT_USAGE if status == 400 else EXIT_FAILED, retryable)


def _write(output: int, data: bytes) -> None:
    """Write all of `data`, also if another program has made a shared stdout non-blocking. Raises OSError."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(output, view) :]
        except BlockingIOError:
            room = select.poll()
            room.register(output, select.POLLOUT)
            room.poll()


def _reader_has_gone(output: int) -> bool:
    """Wait until it is time to ask again. True if the program that reads the output has ended meanwhile."""
    ended = select.poll()
    ended.register(output, 0)
    return any(event & select.POLLERR for _, event in ended.poll(FOLLOW_MILLISECONDS))


def _end_by_broken_pipe(output: int) -> int:
    """Return the status of a program that SIGPIPE has ended, and make Python's flush at the exit succeed."""
    with open(os.devnull, "wb") as devnull:
        os.dup2(devnull.fileno(), output)
    return 128 + signal.SIGPIPE


def _fail(text: str, status: int = EXIT_FAILED) -> int:
    print_line(f"ringoexp read: error: {own_hints(text)}", error=True)
    return status
