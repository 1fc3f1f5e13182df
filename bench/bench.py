"""Measures Ringo Exp on this machine, and the limits of the machine itself, in about 5 minutes.

    python bench/bench.py [--json FILE] [--memory-seconds N] [--grow-to N] [--quick]

The bench runs a consumer, a publisher and the load generator of `load.py` as processes. Many clients that each have
little to say come from `crowd.py`, in the bench's own process. Machines differ and are shared, so compare ratios: the
limits of the machine (ceilings) are measured in the same run, once before each round of Ringo Exp. Throughputs and the
figures of crowds are medians of the rounds; other figures are measured once. All acks are sent after fsync, except in
the row with `-A ring`, and the database must hold exactly the records that were sent.
"""

import argparse
import http.client
import json
import os
import platform
import random
import re
import shutil
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import crowd
import load

ROOT = Path(__file__).resolve().parent.parent
ROWS_A_TRANSACTION = 65_536
ROWS_A_STATEMENT = 1024


@dataclass
class Row:
    """A measure in the table. Without a target, `target` is empty and `met` is None."""

    measure: str
    figure: str
    target: str = ""
    met: bool | None = None


@dataclass
class Sizes:
    """The amounts of a run: a whole run, or a short one that only shows that everything works."""

    rounds: int
    records: int  # in a throughput run
    pings: int
    crowds: tuple[int, ...]  # numbers of clients with one message in flight
    two_processes: int  # the one of these crowds that two processes get, too
    slow: int  # clients that send one message a second
    crowd_seconds: float
    memory_seconds: float
    idle: int
    grow_to: int
    stretch: int  # records in each measurement of growth


WHOLE = Sizes(
    rounds=3,
    records=6_000_000,
    pings=4000,
    crowds=(1, 64, 500, 2000),
    two_processes=500,
    slow=2000,
    crowd_seconds=3,
    memory_seconds=20,
    idle=10_000,
    grow_to=10**7,
    stretch=3_000_000,
)
QUICK = Sizes(
    rounds=1,
    records=200_000,
    pings=100,
    crowds=(1, 8, 16, 64),
    two_processes=16,
    slow=50,
    crowd_seconds=0.4,
    memory_seconds=0.5,
    idle=100,
    grow_to=10**6,
    stretch=200_000,
)
INGEST_PATH = "/v1.0/ingest"
POST_SCRIPT = """
wrk.method = "POST"
wrk.body = "\\0\\0\\0\\42"
wrk.headers["Content-Type"] = "application/octet-stream"
"""
REPORT_SCRIPT = """
function done(summary, latency, requests)
  local errors = summary.errors
  local failed = errors.connect + errors.read + errors.write + errors.status + errors.timeout
  io.write(string.format("ringoexp %d %d %d %d", summary.requests, failed, summary.duration, latency:percentile(99)))
end
"""
"""What wrk prints for `run_wrk`."""
SLOW_INTERVAL_SECONDS = 1.0
FIGURE_COLUMNS = 50
"""With the longest target and its verdict, a line has less than 100 columns."""
BUSY_LOAD = 0.5
"""Load average per core above which other work distorts the figures."""


class Process:
    """A server of Ringo Exp in `directory`, which has logged its port."""

    def __init__(self, directory: str, *flags: str) -> None:
        command = [sys.executable, str(ROOT / "ringoexp.py"), *flags]
        with tempfile.NamedTemporaryFile(dir=directory, prefix="log-") as log:  # the server keeps the file open
            self._process = subprocess.Popen(command, cwd=directory, stderr=log)
            while not (match := re.search(r" event=started .* url=\S*:(\d+)/ ", Path(log.name).read_text())):
                if self._process.poll() is not None:
                    raise SystemExit(f"did not start: {' '.join(command)}")
                time.sleep(0.01)
        self.port = int(match[1])

    @property
    def pid(self) -> int:
        return self._process.pid

    def resident(self) -> int:
        """Return the resident bytes."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) * 1024

    def stop(self) -> None:
        """Stop the server in order."""
        self._process.terminate()
        self._process.wait(timeout=60)


@contextmanager
def system(ring: int, *flags: str) -> Iterator[tuple[Process, Process, Path]]:
    """Run a publisher with this ring size and its consumer; yield both and the consumer's database."""
    with tempfile.TemporaryDirectory(prefix="ringoexp-bench-") as directory, ExitStack() as stack:
        consumer = Process(directory, "-I", "false", "-p", "0", "-D", "bench.db")
        stack.callback(consumer.stop)
        publisher = Process(directory, "-p", "0", "-T", str(consumer.port), "-r", str(ring), *flags)
        stack.callback(publisher.stop)
        yield publisher, consumer, Path(directory, "bench.db")


@contextmanager
def own_consumer() -> Iterator[tuple[Process, Path]]:
    """Run a publisher that is its own consumer; yield it and its database."""
    with tempfile.TemporaryDirectory(prefix="ringoexp-bench-") as directory, ExitStack() as stack:
        process = Process(directory, "-p", "0", "-T", "0")
        stack.callback(process.stop)
        yield process, Path(directory, "ringoexp.db")


def generate(port: int, connections: int, messages: int, payload: int | str, *flags: str) -> dict[str, float]:
    """Run the load generator to its end and return its results."""
    numbers = map(str, (port, connections, messages, payload))
    command = [sys.executable, str(Path(__file__).with_name("load.py")), *numbers, *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


def stored(database: Path) -> int:
    """Count the records in the database."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as reader:
        return int(reader.execute("SELECT count(*) FROM record").fetchone()[0])


def say(text: str) -> None:
    """Print progress to stderr."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def busy_note() -> str:
    """Return a warning if other work keeps this machine busy, or ""."""
    average, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if average <= BUSY_LOAD * cores:
        return ""
    return (
        f"This machine is busy: the load average is {average:.1f} on {cores} cores. Other work distorts the\n"
        "figures, so they are not compared with the targets. Run the bench again when the machine is quiet."
    )


def cpu_seconds(*pids: int) -> float:
    """Return the processor time of processes so far, including threads that have ended.

    The clock of the kernel counts nanoseconds. /proc/PID/stat counts ticks of 10 ms, of which a short measurement may
    see none. The number of the clock is that of MAKE_PROCESS_CPUCLOCK in the kernel.
    """
    return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids)


def measure_crowd(
    port: int, pids: Sequence[int], database: Path, clients: int, seconds: float, interval: float | None = None
) -> tuple[crowd.Result, float]:
    """Measure a crowd of clients with one message in flight each, or with one per interval.

    Return its figures, and the processor time per second of the server's processes. End the program if the database
    does not hold the records that were acked.
    """
    with crowd.connect(port, clients) as members:
        before = cpu_seconds(*pids)
        result = crowd.run(members, seconds, interval)
        cores = (cpu_seconds(*pids) - before) / result.seconds
        held = stored(database)
    if not result.acked <= held <= result.sent:  # equal, unless acks are missing
        raise SystemExit(f"{held} records are stored, but {result.acked} of {result.sent} were acked")
    return result, cores


# Ceilings: the limits of the machine without Ringo Exp.


def raw_sqlite(rows: int, bits: int) -> float:
    """Return the rows per second that one thread inserts, with `bits`-bit values and large transactions."""
    with tempfile.TemporaryDirectory(prefix="ringoexp-bench-") as directory:
        with closing(sqlite3.connect(f"{directory}/raw.db", isolation_level=None)) as database:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")
            database.execute("CREATE TABLE record(id INTEGER PRIMARY KEY, value INTEGER NOT NULL)")
            statement = "INSERT INTO record(value) VALUES " + ",".join(["(?)"] * ROWS_A_STATEMENT)
            values = [random.randrange(-(2 ** (bits - 1)), 2 ** (bits - 1)) for _ in range(ROWS_A_TRANSACTION)]
            started, done = time.perf_counter(), 0
            while done < rows:
                database.execute("BEGIN IMMEDIATE")
                for start in range(0, ROWS_A_TRANSACTION, ROWS_A_STATEMENT):
                    database.execute(statement, values[start : start + ROWS_A_STATEMENT])
                database.execute("COMMIT")
                done += ROWS_A_TRANSACTION
            return done / (time.perf_counter() - started)


def bare_receiver(messages: int) -> float:
    """Return the 4-byte messages per second that a receiver takes if it only counts bytes and acks the last message."""
    expected = messages * 10

    def serve() -> None:
        sock, _ = listener.accept()
        with sock:
            request = b""
            while b"\r\n\r\n" not in request:
                request += sock.recv(65536)
            sock.sendall(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
            received, buffer = 0, bytearray(256 * 1024)
            while received < expected:
                received += sock.recv_into(buffer)
            sock.sendall(b"\x82\x08" + messages.to_bytes(8, "big"))
            sock.recv(1)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        result = generate(listener.getsockname()[1], 1, messages, 4)
        thread.join()
    return messages / result["seconds"]


def fsync_ms(times: int) -> float:
    """Return the median time of an fsync after an append of 4 KiB, in ms."""
    taken = []
    with tempfile.TemporaryFile(prefix="ringoexp-bench-") as file:
        for _ in range(times):
            file.write(bytes(4096))
            file.flush()
            started = time.perf_counter()
            os.fsync(file.fileno())
            taken.append(time.perf_counter() - started)
    return statistics.median(taken) * 1000


# Ringo Exp.


def throughput(
    records: int, ring: int, connections: int, payload: int | str, flags: tuple[str, ...] = (), wide: bool = False
) -> tuple[float, float]:
    """Return the records per second through two processes, and the generator's share of a processor in that time.

    The time runs from the first byte sent to the last ack.
    """
    counts = [load.records_in(size) for size in load.sizes_of(str(payload))]
    messages = int(records / connections / statistics.mean(counts))
    with system(ring, *flags) as (publisher, consumer, database):
        result = generate(publisher.port, connections, messages, payload, *(["--wide"] if wide else []))
        if flags:  # acked before they are stored: wait until all are stored
            publisher.stop()
        if stored(database) != result["records"]:
            raise SystemExit(f"stored {stored(database)} of {result['records']} records")
    return result["records"] / result["seconds"], result["cpuSeconds"] / result["seconds"]


def memory(sizes: Sizes, ring: int) -> tuple[list[int], list[int], float]:
    """Sample the resident bytes of publisher and consumer under full load; return them and the records per second."""
    samples: tuple[list[int], list[int]] = ([], [])
    with system(ring) as (publisher, consumer, database):
        # More messages than the server can take in this time: the generator is killed at the end.
        command = [sys.executable, str(Path(__file__).with_name("load.py")), str(publisher.port), "1", str(10**9), "4"]
        generator = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            end = time.monotonic() + sizes.memory_seconds
            while time.monotonic() < end:
                time.sleep(sizes.memory_seconds / 40)
                samples[0].append(publisher.resident())
                samples[1].append(consumer.resident())
            if generator.poll() is not None:
                raise SystemExit("the load generator ended too early")
            with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as reader:
                (newest,) = reader.execute(
                    "SELECT coalesce(max(id), 0) FROM record"
                ).fetchone()  # ids are dense, and counting takes long
            rate = newest / sizes.memory_seconds
        finally:
            generator.kill()
            generator.wait()
    return (*samples, rate)


def idle_connections(clients: int) -> tuple[float, float, float]:
    """Return the handshakes per second, the resident KiB per idle connection, and the slowest of 50 alive in ms.

    All clients connect one after another. Then each sends one message, and is idle.
    """
    with own_consumer() as (server, _):
        before, started = server.resident(), time.perf_counter()
        with crowd.connect(server.port, clients) as members:
            handshakes = clients / (time.perf_counter() - started)
            if crowd.run(members, 0).acked != clients:
                raise SystemExit("no ack")
            per_connection = (server.resident() - before) / clients / 1024
            slowest = 0.0
            for _ in range(50):
                started = time.perf_counter()
                connection = http.client.HTTPConnection("127.0.0.1", server.port)
                connection.request("GET", "/v1.0/alive")
                if connection.getresponse().status != 200:
                    raise SystemExit("alive did not answer 200")
                connection.close()
                slowest = max(slowest, time.perf_counter() - started)
    return handshakes, per_connection, slowest * 1000


def growth(sizes: Sizes) -> dict[int, float]:
    """Return the records per second by the number of stored records: the better of two equal runs each time."""
    rates: dict[int, float] = {}
    with system(65_536) as (publisher, _, database):
        held, size = 0, 10**5
        while size <= sizes.grow_to:
            if held < size:
                generate(publisher.port, 1, size - held, 4)
                held = size
            taken = [generate(publisher.port, 1, sizes.stretch, 4)["seconds"] for _ in range(2)]
            rates[held] = sizes.stretch / min(taken)
            say(f"  {held:>11,} stored: {rates[held] / 1e6:.2f} million/s")
            held += 2 * sizes.stretch
            size *= 10
        if stored(database) != held:
            raise SystemExit(f"stored {stored(database)} of {held} records")
    return rates


# The rows of the table.


def throughput_rows(sizes: Sizes) -> list[Row]:
    """Measure the ceilings, and streams of messages."""
    cases: dict[str, tuple[Any, ...]] = {
        "1 connection, 4-byte messages, -r 65536": (65_536, 1, 4),
        "1 connection, 4-byte messages, -r 4096": (4096, 1, 4),
        "64 connections, 4-byte messages, -r 65536": (65_536, 64, 4),
        "64 connections, 4-byte messages, -r 4096": (4096, 64, 4),
        "1 connection, 8-byte messages, -r 65536": (65_536, 1, 8),
        "1 connection, messages of 100 integers, -r 65536": (65_536, 1, 800),
        "1 connection, 8-byte messages of 64-bit values, -r 65536": (65_536, 1, 8, (), True),
        "1 connection, 4-byte messages, -r 65536 -A ring (acked before stored)": (65_536, 1, 4, ("-A", "ring")),
        "1 connection, messages of 4 and 8 bytes in turn, -r 65536": (65_536, 1, "4/8"),
        "1 connection, messages of 1 to 8 integers at random, -r 65536": (65_536, 1, "8-64"),
    }
    ceilings: list[float] = []
    ceilings_wide: list[float] = []
    receivers: list[float] = []
    generators: list[float] = []
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(sizes.rounds):
        say(f"round {turn + 1} of {sizes.rounds}")
        ceilings.append(raw_sqlite(sizes.records, 32))
        ceilings_wide.append(raw_sqlite(sizes.records, 64))
        receivers.append(bare_receiver(sizes.records))
        for name, case in cases.items():
            rate, share = throughput(sizes.records, *case)
            rates[name].append(rate)
            generators.append(share)
            say(f"  {name}: {rate / 1e6:.2f} million/s")
    ceiling, ceiling_wide = statistics.median(ceilings), statistics.median(ceilings_wide)
    median = {name: statistics.median(values) for name, values in rates.items()}
    first, second, third, fourth, eight, hundred, wide, _, alternating, multiples = median.values()
    rows = [
        Row("ceiling: SQLite alone, one thread", f"{ceiling / 1e6:.2f} million rows/s"),
        Row("ceiling: SQLite alone, 64-bit values", f"{ceiling_wide / 1e6:.2f} million rows/s"),
        Row(
            "ceiling: the generator into a bare receiver",
            f"{statistics.median(receivers) / 1e6:.0f} million messages/s",
        ),
        Row("the generator's processor in the rows below, at most", f"{max(generators):.0%} of the time"),
    ]
    targets = [
        (f">= 0.75 x SQLite alone: {first / ceiling:.2f}", first >= 0.75 * ceiling),
        (f">= 0.45 x SQLite alone: {second / ceiling:.2f}", second >= 0.45 * ceiling),
        (f">= 0.9 x 1 connection: {third / first:.2f}", third >= 0.9 * first),
        (f">= 0.9 x 1 connection: {fourth / second:.2f}", fourth >= 0.9 * second),
        (f">= 0.95 x 4-byte messages: {eight / first:.2f}", eight >= 0.95 * first),
        (f">= 0.95 x 4-byte messages: {hundred / first:.2f}", hundred >= 0.95 * first),
        (f"of SQLite alone, 64-bit values: {wide / ceiling_wide:.2f}", None),
        ("", None),
        (">= 1 million/s", alternating >= 1e6),
        (">= 1 million/s", multiples >= 1e6),
    ]
    for (name, rate), (target, met) in zip(median.items(), targets, strict=True):
        rows.append(Row(name, f"{rate / 1e6:.2f} million records/s", target, met))
    return rows


def latency_rows(sizes: Sizes) -> list[Row]:
    """Measure acks of one client with one message in flight."""
    say("latency")
    fsync = fsync_ms(sizes.pings // 4)
    rows = [Row("fsync of 4 KiB appended", f"{fsync:.2f} ms")]
    with own_consumer() as (process, _):
        own = generate(process.port, 1, sizes.pings, 4, "--in-flight-1")
    with system(4096) as (publisher, _, _):
        two = generate(publisher.port, 1, sizes.pings, 4, "--in-flight-1")
    for name, result, limit in (("own consumer", own, 0.45), ("two processes", two, 0.8)):
        figure = f"p50 {result['p50']:.2f}, p99 {result['p99']:.2f}, p99.9 {result['p999']:.2f} ms"
        target = f"p50 <= {limit} ms if fsync takes 0.17"
        rows.append(Row(f"ack, one message in flight, {name}", figure, target, result["p50"] <= limit))
    return rows


def crowd_rows(sizes: Sizes) -> list[Row]:
    """Measure many clients with little to say."""
    one_each, each_second = "one message in flight each", "one message a second each"
    cases: dict[str, tuple[bool, int, float | None]] = {}  # name: (two processes, clients, interval)
    for clients in sizes.crowds:
        cases[f"{clients:,} client{'s' * (clients > 1)}, {one_each}"] = False, clients, None
    cases[f"{sizes.two_processes:,} clients, {one_each}, two processes"] = True, sizes.two_processes, None
    cases[f"{sizes.slow:,} clients, {each_second}"] = False, sizes.slow, SLOW_INTERVAL_SECONDS
    runs: dict[str, list[tuple[float, ...]]] = {name: [] for name in cases}
    for turn in range(sizes.rounds):
        say(f"crowds, round {turn + 1} of {sizes.rounds}")
        for name, (is_two, clients, interval) in cases.items():
            with ExitStack() as stack:
                if is_two:
                    server, consumer, database = stack.enter_context(system(4096))
                    pids = [server.pid, consumer.pid]
                else:
                    server, database = stack.enter_context(own_consumer())
                    pids = [server.pid]
                result, cores = measure_crowd(server.port, pids, database, clients, sizes.crowd_seconds, interval)
            runs[name].append((result.rate, result.p50, result.p99, cores, result.served))
            say(f"  {name}: {result.rate:,.0f}/s, p50 {result.p50:.2f}, p99 {result.p99:.2f} ms, {cores:.2f} cores")
    rows = []
    for name, (_, _, interval) in cases.items():
        rate, p50, p99, cores, served = (statistics.median(column) for column in zip(*runs[name], strict=True))
        done = f"{served:.1%} served" if interval else f"{rate:,.0f}/s"
        row = Row(name, f"{done}, p50 {p50:.2f}, p99 {p99:.2f} ms, {cores:.2f} cores")
        if interval:
            row.target = "all, p99 < 50 ms, < 0.5 cores"
            row.met = served == 1 and p99 < 50 and cores < 0.5
        rows.append(row)
    return rows


def memory_rows(sizes: Sizes) -> list[Row]:
    """Measure resident memory under full load."""
    rows = []
    for ring, limit_mb in ((4096, 60), (1_048_576, 90)):
        say(f"memory, -r {ring}, {sizes.memory_seconds:.0f} s")
        *both, rate = memory(sizes, ring)
        for role, samples in zip(("publisher", "consumer"), both, strict=True):
            half = len(samples) // 2
            first_half, highest = max(samples[:half]) / 1e6, max(samples) / 1e6
            figure = f"{highest:.0f} MB; {first_half:.0f} in the first half; at {rate / 1e6:.1f} million/s"
            met = highest < limit_mb and highest < 1.1 * first_half
            rows.append(Row(f"resident under full load, -r {ring}, {role}", figure, f"< {limit_mb} MB, flat", met))
    return rows


def idle_rows(sizes: Sizes) -> list[Row]:
    """Measure handshakes and idle connections, as many as the limit of open files allows."""
    clients = crowd.allow_clients(sizes.idle)
    fewer = f" (the limit of open files; {sizes.idle:,} wanted)" if clients < sizes.idle else ""
    say(f"{clients:,} idle connections{fewer}")
    handshakes, per_connection, slowest = idle_connections(clients)
    return [
        Row("handshakes from one client process", f"{handshakes:,.0f} a second", ">= 1,000", handshakes >= 1000),
        Row(
            f"each of {clients:,} connections{fewer}, idle after a message",
            f"{per_connection:.1f} KiB",
            "< 8 KiB",
            per_connection < 8,
        ),
        Row("alive beside them, slowest of 50", f"{slowest:.1f} ms", "< 50 ms", slowest < 50),
    ]


def http_rows(sizes: Sizes) -> list[Row]:
    """Measure requests a second on connections that stay open, with wrk (Debian: `apt install wrk`)."""
    if not shutil.which("wrk"):
        return [Row("HTTP requests", "not measured: wrk is not installed")]
    say("HTTP")
    rows = []
    with own_consumer() as (process, database):
        for connections in (1, 16, 100):
            before = stored(database)
            rate, p99_ms = run_wrk(process.port, INGEST_PATH, connections, sizes.crowd_seconds, POST_SCRIPT)
            if stored(database) - before < rate * sizes.crowd_seconds * 0.9:
                raise SystemExit("POSTs were answered and are not stored")
            target = {"target": ">= 3,000, p99 < 60 ms", "met": rate >= 3000 and p99_ms < 60} if connections > 1 else {}
            figure = f"{rate:,.0f} a second, p99 {p99_ms:.1f} ms"
            rows.append(Row(f"POSTs of one integer on {connections} connections", figure, **target))
        rate, p99_ms = run_wrk(process.port, "/v1.0/alive", 16, sizes.crowd_seconds)
        figure = f"{rate:,.0f} a second, p99 {p99_ms:.1f} ms"
        rows.append(Row("alive on 16 connections", figure, ">= 4,000", rate >= 4000))
    return rows


def run_wrk(port: int, path: str, connections: int, seconds: float, script: str = "") -> tuple[float, float]:
    """Send requests with wrk. Return answers a second, and the 99th percentile of the latency in ms."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        file.write(script + REPORT_SCRIPT)
        file.flush()
        duration = f"{max(1, round(seconds))}s"
        command = ["wrk", "-t1", f"-c{connections}", f"-d{duration}", "-s", file.name, f"http://127.0.0.1:{port}{path}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    answers, errors, microseconds, p99 = map(int, done.stdout.rsplit("ringoexp", 1)[1].split())
    if errors:
        raise SystemExit(f"{errors} requests to {path} failed")
    return answers / microseconds * 1e6, p99 / 1000


def growth_rows(sizes: Sizes) -> list[Row]:
    """Measure whether the rate depends on the number of stored records."""
    say("growth")
    grown = growth(sizes)
    spread = max(grown.values()) / min(grown.values())
    figure = ", ".join(f"{rate / 1e6:.2f} at {held / 1e6:g} million" for held, rate in grown.items())
    return [Row("million records/s, by records stored", figure, f"within 1.3 x: {spread:.2f}", spread <= 1.3)]


def measure(sizes: Sizes) -> list[Row]:
    """Measure all rows of the table."""
    parts = (throughput_rows, latency_rows, crowd_rows, http_rows, memory_rows, idle_rows, growth_rows)
    return [row for part in parts for row in part(sizes)]


def machine() -> dict[str, Any]:
    """Return facts about this machine."""
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": model[1] if model else platform.machine(),
        "memoryGB": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "system": f"{platform.system()} {platform.release()}",
    }


def table(rows: Sequence[Row], compared: bool) -> list[str]:
    """Return the lines of the table: a measure, and below it its figure and target, and the verdict if `compared`."""
    verdicts = {True: ", met", False: ", not met", None: ""} if compared else {}
    lines = []
    for row in rows:
        lines += [row.measure, f"  {row.figure:{FIGURE_COLUMNS}}  {row.target}{verdicts.get(row.met, '')}".rstrip()]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="measures Ringo Exp on this machine, in about 5 minutes")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--memory-seconds", type=float, metavar="N", help="duration of each memory run (default 20)")
    parser.add_argument("--grow-to", type=int, metavar="N", help="measure growth up to this number of records (10^7)")
    parser.add_argument(
        "--quick", action="store_true", help="half a minute: check that everything works; the figures mean nothing"
    )
    arguments = parser.parse_args()
    sizes = QUICK if arguments.quick else WHOLE
    if arguments.memory_seconds:
        sizes.memory_seconds = arguments.memory_seconds
    sizes.grow_to = arguments.grow_to or sizes.grow_to
    crowd.allow_clients(sizes.idle)
    started, note = time.monotonic(), busy_note()
    if note:
        say(note)
    rows, facts = measure(sizes), machine()
    say(f"done in {time.monotonic() - started:.0f} s")
    if note:
        print(note)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print(*table(rows, compared=not (note or arguments.quick)), sep="\n")
    if arguments.json:
        Path(arguments.json).write_text(
            json.dumps({"machine": facts, "rows": [asdict(row) for row in rows]}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
