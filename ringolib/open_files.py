"""Open files: the system's limit, and how a server divides it between connections, links and its own files.

If clients could use up the limit, the server could not accept the connection that asks whether it is alive, and could
not open its own files. So it admits fewer connections than the limit allows, and answers the others that there are too
many.
"""

import resource
from typing import NamedTuple

from ringolib.status.process import max_descriptors, open_descriptors
from ringolib.web import table

OWN_FILES = 32
"""Files that the server opens besides the sockets of its connections and links, at most.

A server with a database has 13, one with a spool 12, and the profiler 5. The rest is for files that are open for a
moment, for example certificates and sockets of the name service.
"""
MIN_FREE_FILES = OWN_FILES + 8
"""Fewer would leave no room for connections."""
STANDARD_FILES = 3
"""The files that are open at the start: stdin, stdout and stderr."""


class Shares(NamedTuple):
    """How many files each use may have open."""

    connections: int  # admitted at once; 0: any number
    refused: int | None  # connections at once that are not admitted, and still get a response; None: no limit from here
    links: int  # connections of workers to consumers


def raise_limit(wanted: int) -> None:
    """Raise the soft limit of open files to `wanted`, as far as the hard limit allows.

    The usual soft limit, 1,024, is less than many clients need. It is low for programs that use select(2), which this
    program does not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):
        pass  # the system has a lower limit: keep the old one


def shortage() -> str | None:
    """Return the error for a process that may open too few files to serve anything; None if there are enough."""
    limit, free = max_descriptors(), free_files()
    if limit is None or free is None or free >= MIN_FREE_FILES:
        return None
    needed = limit - free + MIN_FREE_FILES
    return f"this process may open {limit} files, and needs {needed}: raise the limit (ulimit -n {needed})"


def free_files() -> int | None:
    """Return how many more files this process may open; None if the system does not limit them."""
    limit = max_descriptors()
    return None if limit is None else limit - (open_descriptors() or STANDARD_FILES)


def divide(connections: int, links: int) -> Shares:
    """Return the shares of a server that is to have so many connections (0: any number) and links, at most."""
    free = free_files()
    if free is None:
        return Shares(connections, None, links)
    spare = max(0, free - OWN_FILES)
    refused = min(table.MAX_REFUSED, max(1, spare // 4))
    room = spare - refused
    left = room - connections if connections else 0  # files that are left if -n admits no more connections
    links = min(links, max(1, room // 4, left))
    rest = max(1, room - links)
    return Shares(min(connections or rest, rest), refused, links)
