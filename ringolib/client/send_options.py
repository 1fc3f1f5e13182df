"""The command line of `ringoexp send`: its flags, and the command that resumes a run. This module does no I/O.

`resume_command` asks the system only where programs are.
"""

import argparse
import math
import os
import shlex
import shutil
import sys
import uuid
from collections.abc import Sequence

from ringolib.client.command_line import Parser, parse_uuid
from ringolib.client.url import URL
from ringolib.wire import MAX_SEQUENCE


def _whole_number(text: str) -> int:
    """Parse the number of a record, or how many there are."""
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) < MAX_SEQUENCE):
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: use a whole number from 0 to 2**63 - 2")
    return int(text)


def _seconds(text: str) -> float:
    """Parse a time."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: use a number of seconds above 0")
    return seconds


def make_parser() -> Parser:
    """Return the parser of the command line of `ringoexp send`."""
    parser = Parser(
        prog="ringoexp send",
        description="Stores integers, each exactly once, and ends when all are stored.",
        epilog="examples: ringoexp send 42 -7; seq 1 1000000 | ringoexp send",
        allow_abbrev=False,
    )
    add = parser.add_argument
    items_help = "a file with the integers; -: stdin (default); or the integers themselves, if no such file exists"
    add("items", nargs="*", default=[], metavar="FILE | INTEGER", help=items_help)
    url_help = f"the server (default {URL}); wss:// for TLS; ws+unix:PATH:/v1.0/ingest for a Unix socket"
    add("--url", default=URL, help=url_help)
    parser.add_credentials("wss")
    add("--binary", action="store_true", help="integers are 8 bytes each, big-endian, signed; default: one per line")
    add("--source", type=parse_uuid, metavar="UUID", help="source to resume; default: a new one")
    first_help = "number of the input's first integer in its source (default 0)"
    add("--first", type=_whole_number, default=0, metavar="N", help=first_help)
    skip_help = "do not send the first N integers of the input: they are stored already (default 0)"
    add("--skip", type=_whole_number, default=0, metavar="N", help=skip_help)
    timeout_help = "give up, with exit status 4, if integers wait and none is acked for so long; default: never"
    add("--timeout", type=_seconds, metavar="SECONDS", help=timeout_help)
    add("--json", action="store_true", help="print a summary to stdout, one line of JSON")
    return parser


def parse_arguments(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """Return the arguments. Flags may stand between the items, and behind `--` all are items.

    argparse has one method for each of these, and none for both.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    arguments, unknown = parser.parse_known_intermixed_args(argv[:end])
    parser.refuse_unknown(unknown)
    arguments.items = [*arguments.items, *argv[end + 1 :]]
    return arguments


def resume_command(arguments: argparse.Namespace, source: uuid.UUID, acked: int, typed: bool) -> str:
    """Return the command that sends the rest of the same input, for a shell.

    --skip left out some integers, and the next `acked` integers are acked. Input that was `typed` is not typed again:
    the command numbers the integers that follow.
    """
    words = [*_program(), "send"]
    for name in ("url", "token_file", "ca", "cert", "key"):
        value = getattr(arguments, name)
        if value is not None and (name, value) != ("url", URL):
            words += [f"--{name}={value}"] if value.startswith("-") else [f"--{name}", value]
    words += ["--binary"] if arguments.binary else []
    words += ["--timeout", f"{arguments.timeout:g}"] if arguments.timeout else []
    words += ["--json"] if arguments.json else []
    skip = arguments.skip + acked
    first, skip = (arguments.first + skip, 0) if typed else (arguments.first, skip)
    words += ["--source", str(source)]
    words += ["--first", str(first)] if first else []
    words += ["--skip", str(skip)] if skip else []
    words += ["--"] if any(item.startswith("-") and item != "-" for item in arguments.items) else []
    return shlex.join([*words, *arguments.items])


def _program() -> list[str]:
    """Return the words that start this program again from the same directory."""
    path = sys.argv[0]
    found = shutil.which(os.path.basename(path))
    if found and os.path.realpath(found) == os.path.realpath(path):
        return [os.path.basename(path)]
    if os.sep in path and os.access(path, os.X_OK):
        return [path]
    return [sys.executable or "python3", path]
