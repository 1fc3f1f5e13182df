"""The command `ringoexp send`: stores the integers of a file, each exactly once.

The main thread reads the file and passes the integers to a `Producer`. The thread `progress` prints to stderr.
"""

import argparse
import errno
import json
import os
import signal
import sys
import threading
import uuid
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from time import monotonic
from typing import Any, BinaryIO, NoReturn

from ringolib.client.producer import URL, Producer, ProducerError
from ringolib.net.credentials import CredentialError, read_token
from ringolib.net.tls import CredentialFileError, client_context
from ringolib.timing import ThreadError, start
from ringolib.wire import MAX_SEQUENCE, decode_plain

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 128 + signal.SIGINT
READ_BYTES = 1 << 16
PROGRESS_SECONDS = 0.5


class BadInput(Exception):
    """The input is not a list of integers. The text says where, and shows the bad line."""


def _integers(source: BinaryIO, binary: bool) -> Iterator["array[int]"]:
    """Yield the integers of a file in blocks. Raises BadInput after all integers that precede the error."""
    lines_before = 0  # lines before the block
    rest = b""
    while True:
        data = source.read1(READ_BYTES) if hasattr(source, "read1") else source.read(READ_BYTES)
        block, rest = rest + data, b""
        if data:  # keep an integer that is not complete for the next block
            end = len(block) // 8 * 8 if binary else block.rfind(b"\n") + 1
            block, rest = block[:end], block[end:]
        if binary:
            if len(block) % 8:
                raise BadInput(f"{len(block) % 8} bytes are left at the end: an integer has 8")
            if block:
                yield decode_plain(block)
        elif block:
            lines = block.split(b"\n")
            if block.translate(None, b"0123456789-+ \t\r\n"):
                yield from _integers_before_bad_line(lines, lines_before)
            try:
                values = array("q", map(int, filter(bytes.strip, lines)))
            except (ValueError, OverflowError):
                yield from _integers_before_bad_line(lines, lines_before)
            else:
                yield values
            lines_before += len(lines) - 1
        if not data:
            return


def _integers_before_bad_line(lines: list[bytes], number: int) -> Iterator["array[int]"]:
    """Yield the integers before the first bad line, then raise BadInput. `number` lines precede `lines`."""
    values = array("q")
    for line in lines:
        number += 1
        try:
            if line.strip(b"0123456789-+ \t\r"):
                raise ValueError
            if line.strip():
                values.append(int(line))
        except (ValueError, OverflowError):
            yield values
            excerpt = line[:60].decode("utf-8", "backslashreplace")
            raise BadInput(f"line {number} is not a whole number of 64 bits: {excerpt!r}") from None


class _Progress:
    """Prints to stderr while records are sent: each new trouble once, and on a terminal the rate."""

    def __init__(self, producer: Producer) -> None:
        self._producer = producer
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        self._done = threading.Event()
        # A daemon: after a Ctrl-C during the start of the thread, `__exit__` may never be called.
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        # Used by the thread only.
        self._width = 0  # of the line on the terminal
        self._trouble: str | None = None  # the trouble seen last

    def __enter__(self) -> None:
        try:
            start(self._thread)
        except ThreadError:
            pass  # send without progress

    def __exit__(self, *unused: object) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        started = monotonic()
        done = False
        while not done:
            done = self._done.wait(PROGRESS_SECONDS)
            trouble = self._producer.trouble
            if trouble and trouble != self._trouble and not done:
                self._print_trouble(trouble)
            self._trouble = trouble
            if self._terminal:
                self._print_rate(monotonic() - started, end="\n" if done else "")

    def _print_trouble(self, trouble: str) -> None:
        line = f"{f'ringoexp send: {self._producer.url}: {trouble}; trying again':{self._width}}"
        print_line(f"\r{line}" if self._width else line, error=True)

    def _print_rate(self, seconds: float, end: str) -> None:
        """Print the rate over the line printed before."""
        producer = self._producer
        rate = producer.acked / max(0.001, seconds)
        verb = "sent" if producer.connected else "read"
        line = f"{producer.sent:,} {verb}, {producer.acked:,} acked, {rate:,.0f}/s, {producer.reconnects} reconnects"
        print(f"\r{line:{self._width}}", end=end, file=sys.stderr, flush=True)
        self._width = len(line)


def _sequence(text: str) -> int:
    """Parse the number of a record."""
    if not (text.isascii() and text.isdigit() and int(text) < MAX_SEQUENCE):
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: a whole number from 0 to 2**63 - 2")
    return int(text)


def _uuid(text: str) -> uuid.UUID:
    """Parse a UUID."""
    try:
        return uuid.UUID(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: a UUID") from None


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"ringoexp send: error: {message} (ringoexp send --help lists the flags)\n")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line of `ringoexp send`."""
    parser = _Parser(
        prog="ringoexp send",
        description="Stores the integers of a file, each exactly once, and ends when all are stored.",
        epilog="example: seq 1 1000000 | ringoexp send",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("file", nargs="?", default="-", metavar="FILE", help="file with the integers; -: stdin (default)")
    url_help = f"the server (default {URL}); wss:// for TLS; ws+unix:PATH:/v1.0/ingest for a Unix socket"
    add("--url", default=URL, help=url_help)
    token_help = "file with the server's access token; without the flag: the variable RINGOEXP_TOKEN, if it is set"
    add("--token_file", "--token-file", metavar="PATH", help=token_help)
    ca_help = "wss: certificate authorities for the server's certificate, PEM; without the flag: the system's"
    add("--ca", metavar="PATH", help=ca_help)
    add("--cert", metavar="PATH", help="wss: client certificate, for a server with --client_ca, PEM")
    add("--key", metavar="PATH", help="wss: private key of --cert, PEM, if it is in another file")
    add("--binary", action="store_true", help="integers are 8 bytes each, big-endian, signed; default: one per line")
    add("--source", type=_uuid, metavar="UUID", help="source to resume; default: a new one")
    add("--first", type=_sequence, default=0, metavar="N", help="number of the first integer in its source (default 0)")
    add("--json", action="store_true", help="print a summary to stdout, one line of JSON")
    return parser


def main(argv: list[str]) -> int:
    """Run `ringoexp send` and return the exit status.

    0 all stored; 1 refused permanently, or the file cannot be read; 2 bad usage or input; 130 Ctrl-C.
    """
    parser = make_parser()
    try:
        arguments = parser.parse_args(argv)
        if arguments.key and not arguments.cert:
            parser.error(f"argument --key: {arguments.key!r} requires --cert")
        return _run(parser, arguments)
    except KeyboardInterrupt:  # before the first record, or during the end
        _print_error("interrupted")
        return EXIT_INTERRUPTED


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """Send the integers of the file, print how it ended, and return the exit status."""
    started = monotonic()
    name = "stdin" if arguments.file == "-" else arguments.file
    with ExitStack() as stack:
        try:
            source = _open_input(arguments.file, stack)
        except OSError as error:
            _print_error(f"{name}: {error.strerror}")
            return EXIT_FAILED
        try:
            producer = _make_producer(arguments)
        except ValueError as error:
            parser.error(str(error))
        except (CredentialError, CredentialFileError, ThreadError) as error:
            _print_error(str(error))
            return EXIT_FAILED
        except OSError as error:
            _print_error(f"cannot open a socket: {error}")
            return EXIT_FAILED
        stack.callback(producer.close)
        status, error_text = _transfer(producer, _integers(source, arguments.binary), name)
        _print_result(producer, arguments, error_text, started)
        if status == EXIT_INTERRUPTED:
            _on_interrupt(signal.default_int_handler)
    return status


def _open_input(file: str, stack: ExitStack) -> BinaryIO:
    """Return stdin for `-`, or else the open file, which `stack` closes. Raises OSError."""
    if file != "-":
        return stack.enter_context(open(file, "rb"))
    if sys.stdin is None:
        raise OSError(errno.EBADF, "it is closed")
    return sys.stdin.buffer


def _make_producer(arguments: argparse.Namespace) -> Producer:
    """Return the producer. Raises ValueError, CredentialError, CredentialFileError, ThreadError and OSError."""
    token = read_token(arguments.token_file)
    has_certificates = arguments.ca or arguments.cert or arguments.key
    context = client_context(arguments.ca, arguments.cert, arguments.key) if has_certificates else None
    return Producer(arguments.url, arguments.source, arguments.first, token, context)


def _transfer(producer: Producer, blocks: Iterator["array[int]"], name: str) -> tuple[int, str]:
    """Send all blocks and wait until they are stored. Return the exit status and the error, which may be empty.

    After a Ctrl-C, further ones are ignored until `_run` has printed how to resume.
    """
    status, error_text = EXIT_OK, ""
    try:
        with _Progress(producer):
            try:
                for values in blocks:
                    producer.send(values)
            except (BadInput, ValueError) as error:
                status, error_text = EXIT_USAGE, f"{name}: {error}"
            producer.flush()
    except ProducerError as error:
        status, error_text = EXIT_FAILED, str(error)
    except OSError as error:
        status, error_text = EXIT_FAILED, f"{name}: {error.strerror}"
    except KeyboardInterrupt:
        status, error_text = EXIT_INTERRUPTED, "interrupted"
        _on_interrupt(signal.SIG_IGN)
    return status, error_text


def _print_result(producer: Producer, arguments: argparse.Namespace, error_text: str, started: float) -> None:
    """Print the error, how to resume after it, and the summary, if they are needed."""
    acked, seconds = producer.acked, monotonic() - started
    if error_text:
        _print_error(error_text)
    if error_text and producer.sent:
        rest = f"the integers after the first {acked}" if acked else "all of it again"
        flags = f"--source {producer.source} --first {arguments.first + acked}"
        print_line(f"ringoexp send: {acked} of {producer.sent} acked; send {rest} with {flags}", error=True)
    if arguments.json:
        summary: dict[str, Any] = {
            "source": str(producer.source),
            "first": arguments.first,
            "sent": producer.sent,
            "acked": acked,
            "reconnects": producer.reconnects,
            "seconds": round(seconds, 3),
        }
        print_line(json.dumps(summary))


def _on_interrupt(handler: Callable[..., Any] | signal.Handlers) -> None:
    """Set the handler of Ctrl-C, which only the main thread can do."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, handler)


def _print_error(text: str) -> None:
    print_line(f"ringoexp send: error: {text}", error=True)


def print_line(line: str, error: bool = False) -> None:
    """Print a line to stdout or stderr. A stream that is closed, or that cannot show a character, is no error."""
    stream = sys.stderr if error else sys.stdout
    if stream is None:  # closed from the start
        return
    try:
        encoding = stream.encoding or "ascii"
        print(line.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except OSError:
        with open(os.devnull, "wb") as devnull:
            os.dup2(devnull.fileno(), stream.fileno())  # otherwise Python reports the error again at exit
