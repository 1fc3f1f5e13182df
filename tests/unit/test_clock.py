"""Only retention depends on the wall clock (see `test_retention`). Elsewhere it may jump by years at each reading.

`received_at_ms`, the log and `startTime` show the wall clock; intervals and deadlines are monotonic.
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
    ("ringolib/web/handler.py", "time.time"): "the Date header",
    ("store.py", "time.time_ns"): "received_at_ms",
    ("ringolib/storage/reading.py", "strftime("): "a time as text",
    ("ringolib/web/records.py", "time.time_ns"): "a query for records since a time ago",
    ("ringolib/web/records.py", "datetime.datetime.fromisoformat"): "a time from text",
    ("ringolib/web/uuids.py", "time.time_ns"): "the order of new sources in an index; the rest of each is random",
    ("ringolib/storage/clickhouse/store.py", "time.time_ns"): "received_at_ms, and the order of two writes",
    ("ringolib/status/report.py", "datetime.datetime.now"): "startTime",
    ("ringolib/timing.py", "datetime.datetime.now"): "the time since which a server is not ready",
    ("ringolib/timing.py", "datetime.timedelta"): "the same",
    ("ringolib/timing.py", "datetime.datetime.fromtimestamp"): "a time as text",
    ("ringolib/status/profiler.py", "time.time_ns"): "the time of a heap profile",
    ("ringolib/status/sampler.py", "time.time_ns"): "the start time of a profile",
    ("ringolib/status/sampler.py", "time.clock_gettime_ns"): "the CPU clocks of threads",
    ("ringolib/status/logs.py", "time.time"): "the time of a log line",
    ("ringolib/status/log_format.py", "datetime.datetime.fromtimestamp"): "the same",
    ("ringolib/net/credentials.py", "time.time"): "a log line about an expired certificate",
    ("ringolib/storage/retention.py", "time.time"): "the age of records; a jump forward is believed only if it lasts",
    ("ringolib/forward/spool.py", "time.time"): "the age of the oldest record, also after a restart; only shown",
}
"""The allowed uses of the wall clock, and their purposes."""
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
"""Functions of the `time` module that do not read the wall clock."""
SQL_CLOCKS = ("current_timestamp", "current_time", "current_date", "'now'", "unixepoch(", "strftime(", "julianday(")


def uses_of_the_clock(source: str) -> set[str]:
    """Return the names of `time` and `datetime`, and the SQL functions, that may read the wall clock in a source."""
    modules: dict[str, str] = {}  # modules by their names in the source
    uses = set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {
                alias.asname or alias.name: alias.name for alias in node.names if alias.name in ("time", "datetime")
            }
        elif isinstance(node, ast.ImportFrom) and node.module in ("time", "datetime"):
            uses |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            uses |= {clock for clock in SQL_CLOCKS if clock in node.value.lower()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            if first in modules and rest not in ("datetime", "timezone", "timezone.utc"):
                uses.add(f"{modules[first]}.{rest}")
    return uses - {f"time.{name}" for name in HARMLESS}


def test_only_allowed_code_reads_the_wall_clock() -> None:
    uses = {
        (str(path.relative_to(ROOT)), use) for path in program_files() for use in uses_of_the_clock(path.read_text())
    }
    assert uses <= set(ALLOWED)
    assert ("store.py", "time.time_ns") in uses


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
def test_wall_clock_uses_are_found(source: str, expected: set[str]) -> None:
    assert uses_of_the_clock(source) == expected


def jumping(seed: int) -> str:
    """Return a patch that moves each reading of the wall clock, also by `datetime`, by up to 40 years either way."""
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
    """Start a patched `ringoexp send` of the integers below `count`."""
    (directory / "numbers").write_text("".join(f"{n}\n" for n in range(count)))
    start = f"import sys; sys.path[0] = {str(ROOT)!r}; import datetime, ringoexp, time; {imports_for(patch)}; {patch}"
    command = [sys.executable, "-c", f"{start}; sys.exit(ringoexp.main())", "send", "numbers", "--url", url, "--json"]
    return subprocess.Popen(command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_clock_jumps_by_years_keep_exactly_once(tmp_path: Path) -> None:
    """Three kinds of clients send, the consumer is killed twice, and the publisher stops in order."""
    seed = seeded()
    patch = jumping(seed)
    ports = {"consumer": free_port(), "publisher": free_port()}
    total, single = 150_000, 500
    servers: list[ServerProcess] = []

    def consumer() -> ServerProcess:
        process = ServerProcess(tmp_path, "-I", "false", "-p", str(ports["consumer"]), "-D", "c.db", patch=patch)
        servers.append(process)
        return process

    def stream() -> None:
        with RawClient(publisher.port) as client:
            for n in range(single):
                client.send(frame(2, struct.pack(">q", -1 - n)))
                client.acked(n + 1)

    running = consumer()
    publisher = ServerProcess(
        tmp_path, "-p", str(ports["publisher"]), "-T", str(ports["consumer"]), "-r", "1000", patch=patch
    )
    servers.append(publisher)
    sending = produce(tmp_path, publisher.url, total, patch)
    try:
        streaming = Blocked(stream)
        for part in (10, 3):
            eventually(lambda part=part: publisher.stats()["recordsStored"] > total // part, "load")
            running.kill()
            eventually(lambda: publisher.stats()["ringDepth"] == 1000, "the ring is full")
            assert request(publisher.port, "GET", "/v1.0/alive")[0] == 200
            running = consumer()
        assert request(publisher.port, "POST", "/v1.0/ingest", encode_plain([2**40]))[0] == 200
        streaming.result()
        out, errors = sending.communicate(timeout=2 * DEADLINE)
        assert (sending.returncode, errors) == (0, b"")
        assert json.loads(out)["acked"] == total
        assert publisher.stop() == 0, publisher.tally
        assert running.stop() == 0
    finally:
        for process in [sending, *servers]:
            process.kill()
        sending.communicate()
    stored = sorted((value, sequence) for _, sequence, value in rows(tmp_path / "c.db"))
    expected = [(-1 - n, n) for n in reversed(range(single))] + [(n, n) for n in range(total)] + [(2**40, 0)]
    assert stored == expected
    with closing(sqlite3.connect(tmp_path / "c.db")) as reader:
        times = [at for (at,) in reader.execute("SELECT received_at_ms FROM batch ORDER BY first_id")]
    years = [round((after - before) / 31_557_600_000) for before, after in itertools.pairwise(times)]
    assert min(years) < -20 and max(years) > 20, "the clock did not jump both ways"
    for process in servers:
        assert not complaints(process), complaints(process)
