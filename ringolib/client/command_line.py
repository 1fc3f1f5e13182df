"""What the command lines of `ringoexp send` and `ringoexp read` share: flags, and errors of one line."""

import argparse
import uuid
from collections.abc import Sequence
from typing import NoReturn

from ringolib.options.nearest import suggest

EXIT_USAGE = 2


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line. An unknown flag is an error that suggests the nearest flag."""

    def error(self, message: str) -> NoReturn:
        """Print one line, without the usage text, and exit."""
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message} ({self.prog} --help lists the flags)\n")

    def add_credentials(self, scheme: str) -> None:
        """Add the flags for the access token and for TLS, which URLs with this scheme have."""
        add = self.add_argument
        token_help = "file with the server's access token; without the flag: the variable RINGOEXP_TOKEN, if it is set"
        add("--token_file", metavar="PATH", help=token_help)
        add("--token-file", dest="token_file", metavar="PATH", help=argparse.SUPPRESS)
        ca_help = f"{scheme}: certificate authorities for the server's certificate, PEM; without the flag: the system's"
        add("--ca", metavar="PATH", help=ca_help)
        add("--cert", metavar="PATH", help=f"{scheme}: client certificate, PEM, if the server requires one")
        add("--key", metavar="PATH", help=f"{scheme}: private key of --cert, PEM, if it is in another file")

    def check_credentials(self, arguments: argparse.Namespace) -> None:
        """End the program if there is a key without its certificate."""
        if arguments.key and not arguments.cert:
            self.error(f"argument --key: {arguments.key!r} requires --cert")

    def refuse_unknown(self, words: Sequence[str]) -> None:
        """End the program if there are words that are neither flags nor values: what `parse_known_args` returns."""
        if not words:
            return
        if not words[0].startswith("-"):
            self.error(f"{words[0]!r} is not a flag")
        flag = words[0].partition("=")[0]
        self.error(f"{flag!r} is not a flag{suggest(flag, self._long_flags())}")

    def _long_flags(self) -> list[str]:
        """Return one spelling of each flag."""
        shown = [action.option_strings for action in self._actions if action.help is not argparse.SUPPRESS]
        return [next(name for name in names if name.startswith("--")) for names in shown if names]


def parse_uuid(text: str) -> uuid.UUID:
    """Parse a UUID."""
    try:
        return uuid.UUID(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: a UUID") from None
