"""The command `ringoexp send`: stores the integers of a file, of stdin or of its command line, each exactly once.

The main thread reads the input in pieces and passes the integers to a `Producer`. The thread `progress` prints to
stderr.
"""

import argparse
import json
import signal
import threading
from contextlib import ExitStack
from functools import partial
from time import monotonic
from typing import Any

from ringolib.client.command_line import EXIT_USAGE, Parser
from ringolib.client.numbers_input import STDIN, BadInput, Input, parse_numbers
from ringolib.client.output import own_hints, print_line
from ringolib.client.producer import EXIT_CLOSE_SECONDS, Producer, ProducerError
from ringolib.client.progress import Progress
from ringolib.client.ready import ask_why_not_ready
from ringolib.client.send_options import make_parser, parse_arguments, resume_command
from ringolib.client.url import parse_url
from ringolib.net.credentials import CredentialError, read_token
from ringolib.net.tls import CredentialFileError, client_context
from ringolib.timing import ThreadError

EXIT_OK, EXIT_FAILED, EXIT_TIMEOUT = 0, 1, 4
"""A signal ends the command with 128 and the number of the signal."""


class _Signals:
    """Makes these signals raise KeyboardInterrupt in the `with` block, as Ctrl-C does, with the signal's number.

    The thread `progress` sends SIGALRM after the timeout. Later signals are ignored, so that the command can print how
    to resume. A signal of another program that was ignored before, for example by nohup, stays ignored.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)

    def __init__(self) -> None:
        self.ignored = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        if threading.current_thread() is threading.main_thread():  # no other thread can set handlers
            self._before = {number: signal.getsignal(number) for number in self.NUMBERS}
            for number, handler in self._before.items():
                if handler is not signal.SIG_IGN or number == signal.SIGALRM:  # ALRM is this program's own
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


def main(argv: list[str]) -> int:
    """Run `ringoexp send` and return the exit status.

    0 all stored; 1 refused permanently, the file cannot be read, or memory is short; 2 bad usage or input; 4 no ack
    within the timeout; 128 and the number of a signal.
    """
    parser = make_parser()
    with _Signals() as signals:
        try:
            arguments = parse_arguments(parser, argv)
            parser.check_credentials(arguments)
            return _run(parser, arguments, signals)
        except KeyboardInterrupt as interrupt:  # before the first record
            status, text = _describe_signal(interrupt)
            _print_error(text)
            return status


def _run(parser: Parser, arguments: argparse.Namespace, signals: _Signals) -> int:
    """Send the integers, print how it ended, and return the exit status."""
    started = monotonic()
    with ExitStack() as stack:
        try:
            source = _open_input(parser, arguments, stack)
            producer, progress = _make_producer(arguments, source)
        except ValueError as error:
            parser.error(str(error))
        except (_InputError, CredentialError, CredentialFileError, ThreadError) as error:
            _print_error(str(error))
            return EXIT_FAILED
        except OSError as error:
            _print_error(f"cannot open a socket: {error}")
            return EXIT_FAILED
        stack.callback(producer.close, EXIT_CLOSE_SECONDS, report=False)
        status, error_text = _transfer(producer, source, progress, arguments.timeout)
        signals.ignored = True  # the result is printed once, and the closing does not take long
        if error_text:
            _print_failure(producer, source, arguments, error_text)
        if arguments.json:
            _print_summary(producer, source, monotonic() - started)
    return status


class _InputError(Exception):
    """The input cannot be opened. The text names it and says why."""


def _open_input(parser: Parser, arguments: argparse.Namespace, stack: ExitStack) -> Input:
    """Return the input. Raises _InputError if it cannot be opened; arguments that are no input end the program."""
    try:
        given = parse_numbers(arguments.items)
    except BadInput as error:
        parser.error(str(error))
    if given is not None and arguments.binary:
        parser.error("--binary is for a file or stdin, not for integers on the command line")
    file = arguments.items[0] if arguments.items else STDIN
    try:
        return Input(file, given, stack, arguments.binary, arguments.skip)
    except OSError as error:
        hint = ", and it is no whole number of 64 bits either" if isinstance(error, FileNotFoundError) else ""
        raise _InputError(f"{'stdin' if file == STDIN else file}: {error.strerror}{hint}") from error


def _make_producer(arguments: argparse.Namespace, source: Input) -> tuple[Producer, Progress]:
    """Return the producer, and its progress. Raises ValueError, Credential(File)Error, ThreadError and OSError."""
    token = read_token(arguments.token_file)
    target = parse_url(arguments.url)
    has_certificates = arguments.ca or arguments.cert or arguments.key
    needs_context = has_certificates or target.secure
    context = client_context(arguments.ca, arguments.cert, arguments.key) if needs_context else None
    producer = Producer(arguments.url, arguments.source, arguments.first + arguments.skip, token, context)
    return producer, Progress(producer, source, partial(ask_why_not_ready, target, token, context), arguments.timeout)


def _transfer(producer: Producer, source: Input, progress: Progress, timeout: float | None) -> tuple[int, str]:
    """Send all integers and wait until they are stored. Return the exit status and the error, which may be empty."""
    status, error_text = EXIT_OK, ""
    try:
        with progress:
            try:
                for values in source.blocks():
                    producer.send(values)
            except (BadInput, ValueError) as error:
                status, error_text = EXIT_USAGE, f"{source.name}: {error}"
            producer.flush()
    except (ProducerError, ThreadError) as error:
        status, error_text = EXIT_FAILED, str(error)
    except OSError as error:
        status, error_text = EXIT_FAILED, f"{source.name}: {error.strerror}"
    except MemoryError:
        status, error_text = EXIT_FAILED, "not enough memory (ulimit -v limits it)"
    except KeyboardInterrupt as interrupt:
        status, error_text = _describe_signal(interrupt)
        error_text += " while it waited for the server" if progress.reason else ""
        if status == 128 + signal.SIGALRM:
            status, error_text = EXIT_TIMEOUT, f"no integer was acked within {timeout or 0:g} s"
        error_text += f": {progress.reason}" if progress.reason else ""
    return status, error_text


def _print_failure(producer: Producer, source: Input, arguments: argparse.Namespace, error_text: str) -> None:
    """Print the error and, if anything was sent, the command that sends the rest."""
    acked = producer.acked
    if not producer.transmitted:
        _print_error(f"{error_text}; nothing was sent" if source.read else error_text)
        return
    _print_error(error_text)
    tally = f"{source.read:,} read, {producer.transmitted:,} sent, {acked:,} acked"
    if source.is_typed:
        how = (
            f"to resume, type the integers after the first {acked:,} into"
            if acked
            else "to resume, type all again into"
        )
    elif source.name == "stdin":
        how = "to resume, pipe all of the same input into"
    else:
        how = "to resume"
    print_line(f"ringoexp send: {tally}; {how}:", error=True)
    print_line(f"  {resume_command(arguments, producer.source, acked, source.is_typed)}", error=True)


def _print_summary(producer: Producer, source: Input, seconds: float) -> None:
    summary: dict[str, Any] = {
        "source": str(producer.source),
        "first": producer.first,
        "read": source.read,
        "sent": producer.transmitted,
        "acked": producer.acked,
        "reconnects": producer.reconnects,
        "seconds": round(seconds, 3),
    }
    print_line(json.dumps(summary))


def _print_error(text: str) -> None:
    print_line(f"ringoexp send: error: {own_hints(text)}", error=True)
