"""The command `ringoexp send`: the integers of a file, each stored exactly once.

The main thread reads the file and hands it to a `Producer`; the thread `progress` says on stderr how that gets on.
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
from collections.abc import Iterator
from contextlib import ExitStack
from time import monotonic
from typing import Any, BinaryIO, NoReturn

from ringolib.client.producer import URL, Producer, ProducerError
from ringolib.net.credentials import CredentialError, read_token
from ringolib.net.tls import CredentialFileError, client_context
from ringolib.wire import MAX_SEQUENCE, decode_plain


class BadInput(Exception):
    """The input holds something that is not an integer. The text says where and what."""


def _integers(source: BinaryIO, binary: bool) -> Iterator["array[int]"]:
    """The integers of a file, block by block. Raises BadInput for what is none, after all that comes before it."""
    number = 0  # of the lines before the block
    rest = b""
    while True:
        data = source.read1(1 << 16) if hasattr(source, "read1") else source.read(1 << 16)
        block, rest = rest + data, b""
        if data:  # up to the last whole integer
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
                yield from _up_to_the_bad_line(lines, number)
            try:
                values = array("q", map(int, filter(bytes.strip, lines)))
            except (ValueError, OverflowError):
                yield from _up_to_the_bad_line(lines, number)
            else:
                yield values
            number += len(lines) - 1
        if not data:
            return


def _up_to_the_bad_line(lines: list[bytes], number: int) -> Iterator["array[int]"]:
    """The integers before the first bad line, of which there is one; then raises BadInput."""
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
            shown = line[:60].decode("utf-8", "backslashreplace")
            raise BadInput(f"line {number} is not a whole number of 64 bits: {shown!r}") from None


class _Progress:
    """What `send` says on stderr while it runs: once for each new trouble, and on a terminal how far it is.

    The thread `progress` writes it.
    """

    def __init__(self, producer: Producer) -> None:
        self._producer = producer
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        self._done = threading.Event()
        # Daemon: Ctrl-C may come while it is started, and then nobody tells it to end.
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> None:
        try:
            self._thread.start()
        except RuntimeError:
            pass  # no more threads to be had: then it says nothing

    def __exit__(self, *unused: object) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        producer, started, last, known = self._producer, monotonic(), 0, None
        ended = False
        while not ended:
            ended = self._done.wait(0.5)
            trouble = producer.trouble
            if trouble and trouble != known and not ended:
                say(
                    ("\r" if last else "") + f"{f'ringoexp send: {producer.url}: {trouble}; trying again':{last}}", True
                )
            known = trouble
            if not self._terminal:
                continue
            rate = producer.acked / max(0.001, monotonic() - started)
            line = f"{producer.sent:,} sent, {producer.acked:,} acked, {rate:,.0f}/s, {producer.reconnects} reconnects"
            print(f"\r{line:{last}}", end="\n" if ended else "", file=sys.stderr, flush=True)
            last = len(line)


def _sequence(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < MAX_SEQUENCE):
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: a whole number from 0 to 2**63 - 2")
    return int(text)


def _uuid(text: str) -> uuid.UUID:
    try:
        return uuid.UUID(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: a UUID") from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, and where to find more."""
        self.exit(2, f"ringoexp send: error: {message} (ringoexp send --help lists the flags)\n")


def parser() -> argparse.ArgumentParser:
    """The command line of `ringoexp send`."""
    made = _Parser(
        prog="ringoexp send",
        description="Stores the integers of a file, each exactly once, and ends when all are stored.",
        epilog="example: seq 1 1000000 | ringoexp send",
        allow_abbrev=False,
    )
    made.add_argument("file", nargs="?", default="-", metavar="FILE", help="where they are; -: stdin (default)")
    made.add_argument(
        "--url",
        default=URL,
        help=f"where they go (default {URL}); wss:// for TLS; ws+unix:PATH:/v1.0/ingest for a Unix socket",
    )
    made.add_argument(
        "--token_file",
        "--token-file",
        metavar="PATH",
        help="file with the token that the server wants; else the variable RINGOEXP_TOKEN, if it is set",
    )
    made.add_argument(
        "--ca", metavar="PATH", help="wss: who may have signed the server's certificate, PEM; else the system's"
    )
    made.add_argument("--cert", metavar="PATH", help="wss: certificate to show, for a server with --client_ca, PEM")
    made.add_argument("--key", metavar="PATH", help="wss: its key, if that is in another file")
    made.add_argument("--binary", action="store_true", help="8 bytes each, big-endian, signed; else text, one a line")
    made.add_argument("--source", type=_uuid, metavar="UUID", help="go on with this source; else a new one")
    made.add_argument(
        "--first", type=_sequence, default=0, metavar="N", help="number of the first integer in its source (default 0)"
    )
    made.add_argument("--json", action="store_true", help="print a summary, one line of JSON, on stdout")
    return made


def main(argv: list[str]) -> int:
    """`ringoexp send`: its exit status.

    0 all stored; 1 refused for good, or the file cannot be read; 2 bad usage or input; 130 Ctrl-C.
    """
    made = parser()
    try:
        return _send(made, made.parse_args(argv))
    except KeyboardInterrupt:  # before there was something to go on with, or while it ended
        say("ringoexp send: error: interrupted", error=True)
        return 128 + signal.SIGINT


def _send(made: argparse.ArgumentParser, given: argparse.Namespace) -> int:
    """Sends what `given` names, says how it ended, and returns the exit status."""
    if given.key and not given.cert:
        made.error(f"argument --key: {given.key!r} is of no use without --cert")
    status, trouble = 0, ""
    name = "stdin" if given.file == "-" else given.file
    started = monotonic()
    with ExitStack() as stack:
        try:
            if given.file == "-" and sys.stdin is None:
                raise OSError(errno.EBADF, "it is closed")
            source: BinaryIO = sys.stdin.buffer if given.file == "-" else stack.enter_context(open(given.file, "rb"))
        except OSError as error:
            say(f"ringoexp send: error: {name}: {error.strerror}", error=True)
            return 1
        try:
            token = read_token(given.token_file)
            certificates = given.ca or given.cert or given.key
            context = client_context(given.ca, given.cert, given.key) if certificates else None
            producer = Producer(given.url, given.source, given.first, token, context)
        except ValueError as error:
            made.error(str(error))
        except (CredentialError, CredentialFileError) as error:
            say(f"ringoexp send: error: {error}", error=True)
            return 1
        except (OSError, RuntimeError) as error:
            say(f"ringoexp send: error: no socket or thread to be had: {error}", error=True)
            return 1
        stack.callback(producer.close)
        try:
            with _Progress(producer):
                try:
                    for values in _integers(source, given.binary):
                        producer.send(values)
                except (BadInput, ValueError) as error:
                    status, trouble = 2, f"{name}: {error}"
                producer.flush()
        except ProducerError as error:
            status, trouble = 1, str(error)
        except OSError as error:
            status, trouble = 1, f"{name}: {error.strerror}"
        except KeyboardInterrupt:
            status, trouble = 128 + signal.SIGINT, "interrupted"
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # until it is said how to go on
        # Before the connection is closed, which may take a while.
        acked, seconds = producer.acked, monotonic() - started
        if trouble:
            say(f"ringoexp send: error: {trouble}", error=True)
        if trouble and producer.sent:
            rest = f"what follows the first {acked} integers" if acked else "all of it again"
            how = f"--source {producer.source} --first {given.first + acked}"
            say(f"ringoexp send: {acked} of {producer.sent} acked; send {rest} with {how}", error=True)
        if given.json:
            summary: dict[str, Any] = {
                "source": str(producer.source),
                "first": given.first,
                "sent": producer.sent,
                "acked": acked,
                "reconnects": producer.reconnects,
                "seconds": round(seconds, 3),
            }
            say(json.dumps(summary))
        if status > 128 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.default_int_handler)
    return status


def say(line: str, error: bool = False) -> None:
    """Prints a line to stdout, or stderr, whatever became of who should read it."""
    stream = sys.stderr if error else sys.stdout
    if stream is None:  # closed from the start
        return
    try:
        encoding = stream.encoding or "ascii"
        print(line.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except OSError:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())  # or Python complains once more at its end
