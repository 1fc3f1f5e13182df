"""The command `ringoexp send`: stores the integers of a file, each exactly once.

The main thread reads the file in pieces and passes the integers to a `Producer`. The thread `progress` prints to
stderr.
"""

import argparse
import errno
import json
import select
import signal
import sys
import threading
import uuid
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from time import monotonic
from typing import Any, BinaryIO, NoReturn

from ringolib.client.output import print_line
from ringolib.client.producer import EXIT_CLOSE_SECONDS, Producer, ProducerError
from ringolib.client.url import URL
from ringolib.net.credentials import CredentialError, read_token
from ringolib.net.tls import CredentialFileError, client_context
from ringolib.timing import ThreadError, start
from ringolib.wire import MAX_SEQUENCE, decode_plain

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
"""A signal ends the command with 128 and the number of the signal."""
READ_BYTES = 64 * 1024
MAX_LINE = 64 * 1024
"""Bytes of a line, at most. Without a limit, input that is no text would fill the memory."""
MAX_DIGITS = 19
"""Digits of a 64-bit integer, without leading zeros."""
PROGRESS_SECONDS = 0.5
WAIT_MILLISECONDS = 500
"""How long a wait for input may delay a signal."""


class BadInput(Exception):
    """The input is not a list of integers. The text says where, and shows the bad line."""


def _binary_integers(source: BinaryIO) -> Iterator["array[int]"]:
    """Yield the integers of a file, 8 bytes each, in blocks. Raises BadInput at the end if bytes are left."""
    rest = b""
    while data := _read(source):
        block = rest + data
        end = len(block) // 8 * 8
        rest = block[end:]
        if end:
            yield decode_plain(block[:end])
    if rest:
        raise BadInput(f"{len(rest)} bytes are left at the end: an integer has 8")


def _text_integers(source: BinaryIO) -> Iterator["array[int]"]:
    """Yield the integers of a text file in blocks. Raises BadInput after all integers that precede the bad line."""
    lines_before = 0
    data, rest = b"-", b""
    while data:
        data = _read(source)
        block = rest + data
        end = block.rfind(b"\n") + 1 if data else len(block)  # the last line may have no end
        lines, rest = block[:end].split(b"\n"), block[end:]
        try:
            if len(lines[0]) > MAX_LINE or block[:end].translate(None, b"0123456789-+ \t\r\n"):
                raise ValueError
            values = array("q", map(int, filter(bytes.strip, lines)))
        except (ValueError, OverflowError):
            yield from _integers_line_by_line(lines, lines_before)
        else:
            yield values
        lines_before += len(lines) - 1
        if len(rest) > MAX_LINE:
            raise _bad_line(rest, lines_before + 1)


def _read(source: BinaryIO) -> bytes:
    """Return the bytes that have arrived, READ_BYTES at most; b"" at the end. Waits until there are any.

    A signal that arrives just before a system call does not interrupt it. So no call waits for long. If another program
    has made a shared stdin non-blocking, `read` may return None.
    """
    arrived = select.poll()
    arrived.register(source, select.POLLIN)
    while not arrived.poll(WAIT_MILLISECONDS) or (data := source.read(READ_BYTES)) is None:
        pass
    return data


def _integers_line_by_line(lines: list[bytes], number: int) -> Iterator["array[int]"]:
    """Yield the integers of the lines, or those before a bad line; then raise BadInput. `number` lines precede them."""
    values = array("q")
    for line in lines:
        number += 1
        try:
            if len(line) > MAX_LINE:
                raise ValueError
            if text := line.strip(b" \t\r"):
                values.append(_integer(text))
        except (ValueError, OverflowError):
            yield values
            raise _bad_line(line, number) from None
    yield values


def _integer(text: bytes) -> int:
    """Return an integer of any number of leading zeros, which `int` limits. Raises ValueError if it is too large."""
    sign, digits = (text[:1], text[1:]) if text[:1] in (b"-", b"+") else (b"", text)
    digits = digits.lstrip(b"0") or digits[-1:]
    if not digits.isdigit() or len(digits) > MAX_DIGITS:
        raise ValueError
    return int(sign + digits)


def _bad_line(line: bytes, number: int) -> BadInput:
    """Return the error for a line. If it has a NUL, it is probably not text."""
    fault = f"is longer than {MAX_LINE} bytes" if len(line) > MAX_LINE else "is not a whole number of 64 bits"
    hint = " (it has a NUL: --binary reads integers of 8 bytes)" if b"\0" in line else ""
    return BadInput(f"line {number} {fault}: {line[:60].decode('utf-8', 'backslashreplace')!r}{hint}")


class _Signals:
    """Makes SIGTERM and SIGHUP raise KeyboardInterrupt in the `with` block, as Ctrl-C does, with the signal's number.

    Later signals are ignored, so that the command can print how to resume. A signal that was ignored before, for
    example by nohup, stays ignored.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.ignored = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        if threading.current_thread() is threading.main_thread():  # no other thread can set handlers
            self._before = {number: signal.getsignal(number) for number in self.NUMBERS}
            for number, handler in self._before.items():
                if handler is not signal.SIG_IGN:
                    signal.signal(number, self._handle)
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if not self.ignored:
            self.ignored = True
            raise KeyboardInterrupt(number)


def _describe_signal(interrupt: KeyboardInterrupt) -> tuple[int, str]:
    """Return the exit status for a signal, and what the command prints."""
    number = signal.Signals(interrupt.args[0] if interrupt.args else signal.SIGINT)
    return 128 + number, "interrupted" if number == signal.SIGINT else f"ended by {number.name}"


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
        try:
            print(f"\r{line:{self._width}}", end=end, file=sys.stderr, flush=True)
        except OSError:
            pass  # the terminal is closed
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

    0 all stored; 1 refused permanently, the file cannot be read, or memory is short; 2 bad usage or input; 128 and the
    number of a signal.
    """
    parser = make_parser()
    with _Signals() as signals:
        try:
            arguments = parser.parse_args(argv)
            if arguments.key and not arguments.cert:
                parser.error(f"argument --key: {arguments.key!r} requires --cert")
            return _run(parser, arguments, signals)
        except KeyboardInterrupt as interrupt:  # before the first record
            status, text = _describe_signal(interrupt)
            _print_error(text)
            return status


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace, signals: _Signals) -> int:
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
        stack.callback(producer.close, EXIT_CLOSE_SECONDS, report=False)
        blocks = _binary_integers(source) if arguments.binary else _text_integers(source)
        status, error_text = _transfer(producer, blocks, name)
        signals.ignored = True  # the result is printed once, and the closing does not take long
        _print_result(producer, arguments, error_text, started)
    return status


def _open_input(file: str, stack: ExitStack) -> BinaryIO:
    """Return stdin for `-`, or else the open file, which `stack` closes. Both are without a buffer. Raises OSError."""
    if file != "-":
        return stack.enter_context(open(file, "rb", buffering=0))
    if sys.stdin is None:
        raise OSError(errno.EBADF, "it is closed")
    return open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)


def _make_producer(arguments: argparse.Namespace) -> Producer:
    """Return the producer. Raises ValueError, CredentialError, CredentialFileError, ThreadError and OSError."""
    token = read_token(arguments.token_file)
    has_certificates = arguments.ca or arguments.cert or arguments.key
    context = client_context(arguments.ca, arguments.cert, arguments.key) if has_certificates else None
    return Producer(arguments.url, arguments.source, arguments.first, token, context)


def _transfer(producer: Producer, blocks: Iterator["array[int]"], name: str) -> tuple[int, str]:
    """Send all blocks and wait until they are stored. Return the exit status and the error, which may be empty."""
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
    except MemoryError:
        status, error_text = EXIT_FAILED, "not enough memory (ulimit -v limits it)"
    except KeyboardInterrupt as interrupt:
        status, error_text = _describe_signal(interrupt)
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


def _print_error(text: str) -> None:
    print_line(f"ringoexp send: error: {text}", error=True)
