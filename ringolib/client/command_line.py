"""What the command lines of `ringoexp send` and `ringoexp read` share: errors of one line, with a suggestion."""

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
