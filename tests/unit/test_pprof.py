"""The encoder of pprof files: a reader that follows the format's definition reads back the encoded profile."""

import sys

from support.pprof_reader import read_profile

from ringolib.status import pprof
from ringolib.status.sampler import INTERVAL_NS, CodePosition, Cost, Profile, Stack


def outer() -> None:
    inner()


def inner() -> None:
    pass


def make_profile() -> Profile:
    """Return a profile of real code with invented costs, and with names that are hard to encode."""
    inner_call, outer_call = (inner.__code__, 4), (outer.__code__, 8)
    odd_call = (compile("0", "/x/od;d\nname.py", "exec"), 0)
    costs: dict[tuple[str, int, Stack], Cost] = {
        ("busy", 41, (inner_call, outer_call)): Cost(3, 5_000_000, 6_000_000),
        ("busy", 42, (inner_call, outer_call)): Cost(2, 1_500_000, 2_000_000),
        ("id;le\n1", 43, (outer_call,)): Cost(9, 0, 2**40),
        ("odd \udcff", 0, (odd_call, outer_call)): Cost(1, 999, 1_000),
    }
    return Profile(1_700_000_000_000_000_000, 10**9, costs)


def test_pprof_file_contains_the_profile() -> None:
    profile = make_profile()
    decoded = read_profile(pprof.encode_profile(profile))
    assert decoded.types == [("samples", "count"), ("cpu", "nanoseconds"), ("wall", "nanoseconds")]
    assert decoded.default == "cpu" and decoded.period == (("cpu", "nanoseconds"), INTERVAL_NS)
    assert (decoded.time_ns, decoded.duration_ns) == (profile.started_at, profile.duration)
    assert decoded.mappings == [sys.executable]
    assert [sample.values for sample in decoded.samples] == [tuple(cost) for cost in profile.costs.values()]
    labels = [sample.labels for sample in decoded.samples]
    assert labels[0] == {"thread": "busy", "thread id": 41} and labels[1] == {"thread": "busy", "thread id": 42}
    assert labels[2]["thread"] == "id;le\n1" and labels[3]["thread"] == "odd ?"
    inner_call, outer_call = decoded.samples[0].calls
    assert (inner_call.function, inner_call.file) == ("test_pprof.inner", __file__)
    assert inner_call.start == inner.__code__.co_firstlineno <= inner_call.line
    assert outer_call.function == "test_pprof.outer"
    assert decoded.samples[0].calls == decoded.samples[1].calls


def test_pprof_file_contains_numbers_of_any_size() -> None:
    for number in (0, 1, 127, 128, 300, 2**31, 2**62, 2**63 - 1):
        profile = Profile(number, number, {("t", 1, ((inner.__code__, 0),)): Cost(number, number, number)})
        decoded = read_profile(pprof.encode_profile(profile))
        assert decoded.samples[0].values == (number,) * 3 and decoded.time_ns == number


def test_location_is_the_line_of_the_call() -> None:
    """In a caller too: its line is the line of the call, not the next one."""

    def position() -> CodePosition:
        frame = sys._getframe(1)
        return frame.f_code, frame.f_lasti

    here = position()
    line = sys._getframe().f_lineno - 1
    location = pprof.locate(here)
    assert (location.line, location.file) == (line, __file__) and location.first_line < line
    assert location.function.endswith("test_location_is_the_line_of_the_call")
    assert pprof.locate((inner.__code__, -1)).line == inner.__code__.co_firstlineno


def test_heap_file_contains_the_traces() -> None:
    traces = [([("/a/b.py", 3), ("/a/c.py", 7)], 2, 100), ([("/a/c.py", 7)], 1, 50)]
    decoded = read_profile(pprof.encode_heap(traces, 77))
    assert decoded.types == [("inuse_objects", "count"), ("inuse_space", "bytes")]
    assert decoded.default == "inuse_space"
    assert decoded.time_ns == 77 and [sample.values for sample in decoded.samples] == [(2, 100), (1, 50)]
    calls = [(call.function, call.file, call.line) for call in decoded.samples[0].calls]
    assert calls == [("b.py:3", "/a/b.py", 3), ("c.py:7", "/a/c.py", 7)]
