"""Tests of new sources."""

import time
import uuid

from ringolib.web.uuids import new_source


def test_new_source_is_a_uuid_that_begins_with_the_time() -> None:
    """In their order, the sources of a busy server go to few pages of the database's indexes."""
    before = time.time_ns() // 1_000_000
    sources = [uuid.UUID(bytes=new_source()) for _ in range(1000)]
    after = time.time_ns() // 1_000_000
    assert len(set(sources)) == 1000
    for source in sources:
        assert (source.version, source.variant) == (7, uuid.RFC_4122)
        assert before <= source.int >> 80 <= after
