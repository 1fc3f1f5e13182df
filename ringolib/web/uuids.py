"""New sources, for connections and requests that bring none of their own. Any thread may call the function."""

import time
import uuid

_VERSION = 7 << 76


def new_source() -> bytes:
    """Return the 16 bytes of a new UUID that begins with the time (version 7, RFC 9562 section 5.7).

    A database keeps sources in the order of their bytes. New ones come last in it, so a commit of many new sources
    changes few pages; with random UUIDs it would change two pages for each.
    """
    milliseconds = time.time_ns() // 1_000_000
    bits = uuid.uuid4().int & ~(0xF << 76) & ((1 << 80) - 1)
    return (milliseconds << 80 | _VERSION | bits).to_bytes(16, "big")
