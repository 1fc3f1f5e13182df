"""Nothing depends on the wall clock, but retention (`test_retention`): it may jump by years, either way, at each look.

Only `received_at_ms`, the log and `startTime` say what it says; intervals and deadlines are monotonic.
"""

import ast
import itertools
import json
import sqlite3
import struct
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from support.gauges import complaints
from support.harness import (
    DEADLINE,
    ROOT,
    Blocked,
    RawClient,
    ServerProcess,
    eventually,
    frame,
    free_port,
    imports_for,
    program_files,
    request,
    rows,
    seeded,
)

from ringolib.wire import encode_plain

ALLOWED = {
    ("store.py", "time.time_ns"): "received_at_ms",
    (
        "ringolib/storage/clickhouse/store.py",
        "time.time_ns",
    ): "received_at_ms, and which of two values was first, as nobody else may say",
    ("ringolib/status/report.py", "datetime.datetime.now"): "startTime",
    ("ringolib/timing.py", "datetime.datetime.now"): "since when a server is not ready",
    ("ringolib/timing.py", "datetime.timedelta"): "the same",
    ("ringolib/status/profiler.py", "time.time_ns"): "when a heap profile was made",
    ("ringolib/status/sampler.py", "time.time_ns"): "when a profile was begun",
    ("ringolib/status/sampler.py", "time.clock_gettime_ns"): "the CPU clocks of threads",
    ("ringolib/status/logs.py", "time.time"): "the same",
    ("ringolib/status/logs.py", "datetime.datetime.fromtimestamp"): "when a line was logged",
    ("ringolib/net/credentials.py", "time.time"): "whether the certificate has expired: words in the log, no more",
    ("ringolib/timing.py", "datetime.datetime.fromtimestamp"): "a moment as text",
    (
        "ringolib/storage/retention.py",
        "time.time",
    ): "what is older than --retain: the one thing that has to ask it; a leap ahead must last",
    (
        "ringolib/forward/spool.py",
        "time.time",
    ): "how old the oldest record in it is, also after a restart: a figure to show, no more",
}
"""The uses of the wall clock that there may be, and what for."""
HARMLESS = {
    "monotonic",
    "monotonic_ns",
    "perf_counter",
    "perf_counter_ns",
    "thread_time",
    "thread_time_ns",
    "process_time",
    "sleep",
}
"""What the `time` module has that is not the wall clock."""
SQL_CLOCKS = ("current_timestamp", "current_time", "current_date", "'now'", "unixepoch(", "strftime(", "julianday(")


def uses_of_the_clock(source: str) -> set[str]:
    """What in a module's source may be the wall clock's: names of `time` and `datetime`, and SQL that asks for it."""
    modules: dict[str, str] = {}  # what names in the source stand for
    found = set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {each.asname or each.name: each.name for each in node.names if each.name in ("time", "datetime")}
        elif isinstance(node, ast.ImportFrom) and node.module in ("time", "datetime"):
            found |= {f"{node.module}.{each.name}" for each in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {clock for clock in SQL_CLOCKS if clock in node.value.lower()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            if first in modules and rest not in ("datetime", "timezone", "timezone.utc"):
                found.add(f"{modules[first]}.{rest}")
    return found - {f"time.{name}" for name in HARMLESS}


def test_only_what_is_to_show_the_time_looks_at_the_wall_clock() -> None:
    found = {
        (str(path.relative_to(ROOT)), use) for path in program_files() for use in uses_of_the_clock(path.read_text())
    }
    assert found <= set(ALLOWED)
    assert ("store.py", "time.time_ns") in found, "it can find them"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import time\nuntil = time.time() + 5", {"time.time"}),
        ("import time as clock\nclock.time_ns()", {"time.time_ns"}),
        ("from time import time as monotonic", {"time.time"}),
        ("from datetime import datetime", {"datetime.datetime"}),
        ("import datetime\ndatetime.date.today()", {"datetime.date", "datetime.date.today"}),
        ("import time\ntime.clock_gettime(0)", {"time.clock_gettime"}),
        ("db.execute('DELETE FROM x WHERE at < unixepoch() - 5')", {"unixepoch("}),
        ("from time import monotonic\nimport time\ntime.sleep(1), time.perf_counter()", set()),
    ],
)
def test_a_use_of_the_wall_clock_is_found(source: str, expected: set[str]) -> None:
    assert uses_of_the_clock(source) == expected


def jumping(seed: int) -> str:
    """A patch: each look at the wall clock, `datetime`'s too, finds it up to 40 years off, this way or that."""
    jump = "(lambda rng: lambda: rng.uniform(-40, 40) * 31_557_600)(__import__('random').Random({}))"
    return "; ".join(
        [
            f"time.jump = {jump.format(seed)}",
            "time.time = (lambda real: lambda: real() + time.jump())(time.time)",
            "time.time_ns = lambda: int(time.time() * 1e9)",
            "datetime.datetime = type('Jumping', (datetime.datetime,), {'now': classmethod(lambda kind, tz=None:"
            " kind.fromtimestamp(time.time(), tz))})",
            "timing.BACKOFF_MAX_SECONDS = 0.2",
        ]
    )


def produce(directory: Path, url: str, count: int, patch: str) -> subprocess.Popen[bytes]:
    """`ringoexp send` of the integers below `count`, patched."""
    (directory / "numbers").write_text("".join(f"{n}\n" for n in range(count)))
    start = f"import sys; sys.path[0] = {str(ROOT)!r}; import datetime, ringoexp, time; {imports_for(patch)}; {patch}"
    command = [sys.executable, "-c", f"{start}; sys.exit(ringoexp.main())", "send", "numbers", "--url", url, "--json"]
    return subprocess.Popen(command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_everything_is_stored_once_while_the_clock_jumps_by_years(tmp_path: Path) -> None:
    """Load from three kinds of clients, the consumer killed under it twice, and a publisher that stops in order."""
    seed = seeded()
    patch = jumping(seed)
    ports = {"consumer": free_port(), "publisher": free_port()}
    total, single = 150_000, 500
    log: list[ServerProcess] = []

    def consumer() -> ServerProcess:
        started = ServerProcess(tmp_path, "-I", "false", "-p", str(ports["consumer"]), "-D", "c.db", patch=patch)
        log.append(started)
        return started

    def stream() -> None:
        with RawClient(publisher.port) as client:
            for n in range(single):
                client.send(frame(2, struct.pack(">q", -1 - n)))
                client.acked(n + 1)

    now = consumer()
    publisher = ServerProcess(
        tmp_path, "-p", str(ports["publisher"]), "-T", str(ports["consumer"]), "-r", "1000", patch=patch
    )
    log.append(publisher)
    sending = produce(tmp_path, publisher.url, total, patch)
    try:
        streaming = Blocked(stream)
        for part in (10, 3):
            eventually(lambda part=part: publisher.stats()["recordsStored"] > total // part, "load")
            now.kill()
            eventually(lambda: publisher.stats()["ringDepth"] == 1000, "the ring is full")
            assert request(publisher.port, "GET", "/v1.0/alive")[0] == 200
            now = consumer()
        assert request(publisher.port, "POST", "/v1.0/ingest", encode_plain([2**40]))[0] == 200
        streaming.result()
        out, errors = sending.communicate(timeout=2 * DEADLINE)
        assert (sending.returncode, errors) == (0, b"")
        assert json.loads(out)["acked"] == total
        assert publisher.stop() == 0, publisher.tally
        assert now.stop() == 0
    finally:
        for process in [sending, *log]:
            process.kill()
        sending.communicate()
    found = sorted((value, sequence) for _, sequence, value in rows(tmp_path / "c.db"))
    expected = [(-1 - n, n) for n in reversed(range(single))] + [(n, n) for n in range(total)] + [(2**40, 0)]
    assert found == expected
    with closing(sqlite3.connect(tmp_path / "c.db")) as reader:
        times = [at for (at,) in reader.execute("SELECT received_at_ms FROM batch ORDER BY first_id")]
    years = [round((after - before) / 31_557_600_000) for before, after in itertools.pairwise(times)]
    assert min(years) < -20 and max(years) > 20, "the clock did jump, both ways"
    for process in log:
        assert not complaints(process), complaints(process)
