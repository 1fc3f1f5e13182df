"""New UUIDs: ids of requests, and sources for connections and requests that bring none of their own.

Any thread may call the functions.
"""

import os
import time
import uuid
from collections import deque

RANDOM_UUIDS = 64
"""UUIDs for which random bytes are read at once."""
_random: deque[bytes] = deque()  # its methods are atomic
_VERSION_7 = 7 << 76


def new_request_id() -> str:
    """Return a new UUID (version 4) in upper case."""
    return str(_random_uuid()).upper()


def new_source() -> bytes:
    """Return the 16 bytes of a new UUID that begins with the time (version 7, RFC 9562 section 5.7).

    A database keeps sources in the order of their bytes. New ones come last in it, so a commit of many new sources
    changes few pages; with random UUIDs it would change two pages for each.
    """
    milliseconds = time.time_ns() // 1_000_000
    bits = _random_uuid().int & ~(0xF << 76) & ((1 << 80) - 1)
    return (milliseconds << 80 | _VERSION_7 | bits).to_bytes(16, "big")


def _random_uuid() -> uuid.UUID:
    """Return a new UUID (version 4) from the system's random numbers.

    They are read for many UUIDs at once: each read gives Python's lock away, which delays a busy server.
    """
    try:
        data = _random.pop()
    except IndexError:
        block = os.urandom(16 * RANDOM_UUIDS)
        _random.extend([block[at : at + 16] for at in range(16, len(block), 16)])
        data = block[:16]
    return uuid.UUID(bytes=data, version=4)
