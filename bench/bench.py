"""Measures Ringo Exp on this machine, and the limits of the machine itself, in less than 3 minutes.

    python bench/bench.py [--json FILE] [--memory-seconds N] [--grow-to N] [--quick]

The bench runs a consumer, a publisher and the load generator of `load.py` as processes. Machines differ and are shared,
so compare ratios: the limits of the machine (ceilings) are measured in the same run, once before each round of Ringo
Exp. Throughputs are medians of the rounds; other figures are measured once. All acks are sent after fsync, except in
the row with `-A ring`, and the database must hold exactly the records that were sent.
"""

import argparse
import http.client
import json
import os
import platform
import random
import re
import resource
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import load

ROOT = Path(__file__).resolve().parent.parent
ROWS_A_TRANSACTION = 65_536
ROWS_A_STATEMENT = 1024


@dataclass
class Row:
    """A row of the table. Without a target, `target` is empty and `met` is None."""

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
    memory_seconds: float
    idle: int
    grow_to: int
    stretch: int  # records in each measurement of growth


WHOLE = Sizes(rounds=3, records=6_000_000, pings=4000, memory_seconds=20, idle=1000, grow_to=10**7, stretch=3_000_000)
QUICK = Sizes(rounds=1, records=200_000, pings=100, memory_seconds=0.5, idle=50, grow_to=10**6, stretch=200_000)


class Process:
    """A server of Ringo Exp in `directory`, which has printed its port."""

    def __init__(self, directory: str, *flags: str) -> None:
        command = [sys.executable, str(ROOT / "ringoexp.py"), *flags]
        self._process = subprocess.Popen(
            command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._process.stdout
        match = re.search(r":(\d+),", self._process.stdout.readline())
        if not match:
            raise SystemExit(f"did not start: {' '.join(command)}")
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
        self._process.communicate(timeout=60)


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


def generate(port: int, connections: int, messages: int, payload: int, *flags: str) -> dict[str, float]:
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


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process so far, including threads that have ended.

    The clock of the kernel counts nanoseconds. /proc/PID/stat counts ticks of 10 ms, of which a short measurement may
    see none. The number of the clock is that of MAKE_PROCESS_CPUCLOCK in the kernel.
    """
    return time.clock_gettime(~pid << 3 | 2)


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
    sizes: Sizes, ring: int, connections: int, payload: int, flags: tuple[str, ...] = (), wide: bool = False
) -> tuple[float, float]:
    """Return the records per second through two processes, and the generator's share of a processor in that time.

    The time runs from the first byte sent to the last ack.
    """
    records_per_message = max(1, payload // 8)
    messages = sizes.records // connections // records_per_message
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


def idle_connections(sizes: Sizes) -> tuple[float, float]:
    """Return the resident KB per idle connection, and the slowest of 50 responses of alive in ms.

    Each connection has sent one message.
    """
    with own_consumer() as (server, _), ExitStack() as stack:
        before = server.resident()
        message = load.frames(4, 1)
        for _ in range(sizes.idle):
            sock = stack.enter_context(load.connect(server.port))
            sock.sendall(message)
            if len(sock.recv(10)) < 10:
                raise SystemExit("no ack")
        per_connection = (server.resident() - before) / sizes.idle / 1000
        slowest = 0.0
        for _ in range(50):
            started = time.perf_counter()
            connection = http.client.HTTPConnection("127.0.0.1", server.port)
            connection.request("GET", "/v1.0/alive")
            if connection.getresponse().status != 200:
                raise SystemExit("alive did not answer 200")
            connection.close()
            slowest = max(slowest, time.perf_counter() - started)
    return per_connection, slowest * 1000


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


def measure(sizes: Sizes) -> list[Row]:
    """Measure all rows of the table."""
    cases: dict[str, tuple[Any, ...]] = {
        "1 connection, 4-byte messages, -r 65536": (65_536, 1, 4),
        "1 connection, 4-byte messages, -r 4096": (4096, 1, 4),
        "64 connections, 4-byte messages, -r 65536": (65_536, 64, 4),
        "64 connections, 4-byte messages, -r 4096": (4096, 64, 4),
        "1 connection, 8-byte messages, -r 65536": (65_536, 1, 8),
        "1 connection, messages of 100 integers, -r 65536": (65_536, 1, 800),
        "1 connection, 8-byte messages of 64-bit values, -r 65536": (65_536, 1, 8, (), True),
        "1 connection, 4-byte messages, -r 65536 -A ring (acked before stored)": (65_536, 1, 4, ("-A", "ring")),
    }
    ceilings: list[float] = []
    ceilings_wide: list[float] = []
    receivers: list[float] = []
    generators: dict[str, float] = {}
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(sizes.rounds):
        say(f"round {turn + 1} of {sizes.rounds}")
        ceilings.append(raw_sqlite(sizes.records, 32))
        ceilings_wide.append(raw_sqlite(sizes.records, 64))
        receivers.append(bare_receiver(sizes.records))
        for name, case in cases.items():
            rate, share = throughput(sizes, *case)
            rates[name].append(rate)
            generators[name] = max(share, generators.get(name, 0))
            say(f"  {name}: {rates[name][-1] / 1e6:.2f} million/s")
    ceiling, ceiling_wide = statistics.median(ceilings), statistics.median(ceilings_wide)
    median = {name: statistics.median(values) for name, values in rates.items()}
    first, second, third, fourth, eight, hundred, wide, _ = median.values()
    rows = [
        Row("ceiling: SQLite alone, one thread", f"{ceiling / 1e6:.2f} million rows/s"),
        Row("ceiling: SQLite alone, 64-bit values", f"{ceiling_wide / 1e6:.2f} million rows/s"),
        Row(
            "ceiling: the generator into a bare receiver",
            f"{statistics.median(receivers) / 1e6:.0f} million messages/s",
        ),
        Row("the generator's processor in the rows below, at most", f"{max(generators.values()):.0%} of the time"),
    ]
    targets = [
        (f">= 0.6 x SQLite alone: {first / ceiling:.2f}", first >= 0.6 * ceiling),
        (">= 1.2 million/s", second >= 1.2e6),
        (f">= 0.7 x 1 connection: {third / first:.2f}", third >= 0.7 * first),
        (f">= 0.7 x 1 connection: {fourth / second:.2f}", fourth >= 0.7 * second),
        (f">= 0.95 x 4-byte messages: {eight / first:.2f}", eight >= 0.95 * first),
        (f">= 0.95 x 4-byte messages: {hundred / first:.2f}", hundred >= 0.95 * first),
        (f"of SQLite alone, 64-bit values: {wide / ceiling_wide:.2f}", None),
        ("", None),
    ]
    for (name, rate), (target, met) in zip(median.items(), targets, strict=True):
        rows.append(Row(name, f"{rate / 1e6:.2f} million records/s", target, met))

    say("latency")
    fsync = fsync_ms(sizes.pings // 4)
    rows.append(Row("fsync of 4 KiB appended", f"{fsync:.2f} ms"))
    with own_consumer() as (process, _):
        own = generate(process.port, 1, sizes.pings, 4, "--in-flight-1")
    with system(4096) as (publisher, _, _):
        two = generate(publisher.port, 1, sizes.pings, 4, "--in-flight-1")
    for name, result, limit in (("own consumer", own, 0.45), ("two processes", two, 0.8)):
        figure = f"p50 {result['p50']:.2f}, p99 {result['p99']:.2f}, p99.9 {result['p999']:.2f} ms"
        target = f"p50 <= {limit} ms if fsync takes 0.17"
        rows.append(Row(f"ack, one message in flight, {name}", figure, target, result["p50"] <= limit))

    for ring, limit_mb in ((4096, 60), (1_048_576, 90)):
        say(f"memory, -r {ring}, {sizes.memory_seconds:.0f} s")
        *both, rate = memory(sizes, ring)
        for role, samples in zip(("publisher", "consumer"), both, strict=True):
            half = len(samples) // 2
            first_half, highest = max(samples[:half]) / 1e6, max(samples) / 1e6
            figure = f"{highest:.0f} MB; {first_half:.0f} in the first half; at {rate / 1e6:.1f} million/s"
            met = highest < limit_mb and highest < 1.1 * first_half
            rows.append(Row(f"resident under full load, -r {ring}, {role}", figure, f"< {limit_mb} MB, flat", met))

    say(f"{sizes.idle} idle connections")
    per_connection, slowest = idle_connections(sizes)
    rows.append(
        Row(
            f"each of {sizes.idle} connections, idle after a message",
            f"{per_connection:.0f} KB with its stack",
            "< 60 KB",
            per_connection < 60,
        )
    )
    rows.append(Row("alive beside them, slowest of 50", f"{slowest:.1f} ms", "< 50 ms", slowest < 50))

    say("growth")
    grown = growth(sizes)
    spread = max(grown.values()) / min(grown.values())
    figure = ", ".join(f"{rate / 1e6:.2f} at {held / 1e6:g} million" for held, rate in grown.items())
    rows.append(Row("million records/s, by records stored", figure, f"within 1.3 x: {spread:.2f}", spread <= 1.3))
    return rows


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


def main() -> None:
    parser = argparse.ArgumentParser(description="measures Ringo Exp on this machine, in less than 3 minutes")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--memory-seconds", type=float, metavar="N", help="duration of each memory run (default 20)")
    parser.add_argument("--grow-to", type=int, metavar="N", help="measure growth up to this number of records (10^7)")
    parser.add_argument(
        "--quick", action="store_true", help="10 seconds: check that everything works; the figures mean nothing"
    )
    arguments = parser.parse_args()
    sizes = QUICK if arguments.quick else WHOLE
    if arguments.memory_seconds:
        sizes.memory_seconds = arguments.memory_seconds
    sizes.grow_to = arguments.grow_to or sizes.grow_to
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    started = time.monotonic()
    rows, facts = measure(sizes), machine()
    say(f"done in {time.monotonic() - started:.0f} s")
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    widths = [max(len(getattr(row, name)) for row in rows) for name in ("measure", "figure", "target")]
    for row in rows:
        met = "" if arguments.quick else {True: "met", False: "MISSED", None: ""}[row.met]
        print(f"{row.measure:{widths[0]}}  {row.figure:{widths[1]}}  {row.target:{widths[2]}}  {met}".rstrip())
    if arguments.json:
        Path(arguments.json).write_text(
            json.dumps({"machine": facts, "rows": [asdict(row) for row in rows]}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
