"""Lines for the user, on stdout and stderr."""

import os
import re
import sys


def print_line(line: str, error: bool = False, end: str = "\n") -> None:
    """Print a line to stdout or stderr. A stream that is closed, or that cannot show a character, is no error."""
    stream = sys.stderr if error else sys.stdout
    if stream is None:  # closed from the start
        return
    try:
        encoding = stream.encoding or "ascii"
        print(line.encode(encoding, "backslashreplace").decode(encoding), end=end, file=stream, flush=True)
    except OSError:
        with open(os.devnull, "wb") as devnull:
            os.dup2(devnull.fileno(), stream.fileno())  # otherwise Python reports the error again at exit


def own_hints(text: str) -> str:
    """Return an error text with the flags of the commands only. It may have `(--flag, send: --other)`."""
    return re.sub(r"\([^()]*\bsend: ([^()]*)\)", r"(\1)", text)


def is_drawable(stream: object) -> bool:
    """True if the stream is a terminal on which a line can be drawn again."""
    return (
        stream is not None
        and hasattr(stream, "isatty")
        and bool(stream.isatty())
        and os.environ.get("TERM", "dumb") not in ("", "dumb")
    )


def is_in_foreground(stream: object) -> bool:
    """True unless this process is a background job of the terminal `stream`, which another program uses then."""
    try:
        return os.tcgetpgrp(stream.fileno()) == os.getpgrp()  # type: ignore[attr-defined]
    except OSError:  # it is a terminal without job control
        return True
