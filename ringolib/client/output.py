"""Lines for the user, on stdout and stderr."""

import os
import sys


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
