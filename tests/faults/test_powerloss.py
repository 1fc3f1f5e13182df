"""Tests that acked records are on disk: acks leave after the sync of their records, and power cuts lose none.

A server runs under strace. For every moment, the log shows which bytes are certainly on disk: those written before a
sync that has returned. Later writes may be on disk or not, in whole or in part, in any order. The tests assume nothing
of the kernel, the file system or SQLite beyond POSIX, except that a disk writes sectors of 512 bytes.

Every value is sent once and names its client, so that the tests recognize it on the pages of the database.
"""

import http.client
import json
import os
import random
import re
import shutil
import sqlite3
import struct
import uuid
from array import array
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest
from support import strace
from support.harness import DEADLINE, Blocked, RawClient, ServerProcess, frame, seeded

import store
from ringolib.storage.interface import StoreError
from ringolib.storage.sqlite_file import APPLICATION_ID, SPOOL_APPLICATION_ID
from ringolib.wire import SUBPROTOCOL, Run, encode_batch, encode_plain

TAG = 0x5AC3A55A
"""The upper half of every value. The lower half has 8 bits for the client and 24 for the number of the record."""
VALUE = re.compile(TAG.to_bytes(4, "big") + rb"(.{4})", re.DOTALL)
SECTOR = 512
ROLES = {
    "consumer": ["-I", "false", "-p", "0", "-D"],
    "single process": ["-p", "0", "-T", "0", "-D"],
    "spool": ["-p", "0", "-T", "1", "-S"],  # of a publisher whose consumer is unreachable: port 1 is closed
}
SMALL_WAL = (  # checkpoints every 20 pages
    "store.connect = (lambda real: lambda *args:"
    " [db := real(*args), db.execute('PRAGMA wal_autocheckpoint = 20')][0])(store.connect)"
)
TRUNCATED_WAL = "storage.wal.LARGE_WAL_BYTES = 100_000"
SYNCHRONOUS = SMALL_WAL.replace("wal_autocheckpoint = 20", "synchronous = {}")
ACK_BEFORE_COMMIT = (
    "web.intake.StoreIntake._commit = lambda self, group: ([setattr(queued, 'outcome', True) for queued in group],"
    " self._listener(), [self._store.append(*queued.block) for queued in group])"
)


class Sender:
    """A client that remembers the values it has sent, in order, and its port, which identifies it in the log."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.port = 0
        self.source = b""  # empty if the server assigns one
        self.sent = array("q")  # every value in the order sent, including repeated ones

    def value(self, sequence: int) -> int:
        """Return the value of a record."""
        return TAG << 32 | self.number << 24 | sequence

    def one_by_one(self, server: ServerProcess, count: int) -> None:
        """Send plain messages, each after the ack of the one before."""
        with RawClient(server.port) as client:
            self.port = client.sock.getsockname()[1]
            for sequence in range(count):
                self.sent.append(self.value(sequence))
                client.send(frame(2, struct.pack(">q", self.sent[-1])))
                client.acked(sequence + 1)

    def stream(self, server: ServerProcess, count: int, rng: random.Random) -> None:
        """Send batches with a source of its own, without waiting for every ack, and send some records again."""
        self.source = uuid.UUID(int=rng.getrandbits(128)).bytes
        headers: dict[str, str | None] = {"Sec-WebSocket-Protocol": SUBPROTOCOL}
        with RawClient(server.port, headers) as client:
            self.port = client.sock.getsockname()[1]
            first = acked = 0
            while acked < len(self.sent) or first < count:
                if first < count and len(self.sent) - acked < rng.randrange(1, 1500):
                    again = rng.randrange(min(first, 50) + 1) if rng.random() < 0.1 else 0
                    run = Run(self.source, first - again, min(again + rng.randrange(1, 300), count - first + again))
                    values = array("q", map(self.value, range(run.first, run.first + run.count)))
                    client.send(frame(2, encode_batch([run], values)))
                    self.sent += values
                    first = run.first + run.count
                else:
                    acked = client.acked(acked + 1)

    def post(self, server: ServerProcess, count: int) -> None:
        """Send all records in one HTTP request."""
        self.sent = array("q", map(self.value, range(count)))
        with closing(http.client.HTTPConnection("localhost", server.port, timeout=DEADLINE)) as connection:
            connection.connect()
            self.port = connection.sock.getsockname()[1]
            connection.request("POST", "/v1.0/ingest", encode_plain(self.sent))
            assert json.load(connection.getresponse()) == {"stored": count}


class Ack(NamedTuple):
    """An ack for the first `count` records of a sender; `begun` is the line of the call in the log."""

    begun: int
    sender: Sender
    count: int


class Recording(NamedTuple):
    """The record of a server's run: its calls, clients and acks, in order."""

    database: Path
    application_id: int
    calls: list[strace.Call]
    senders: list[Sender]
    acks: list[Ack]


def record(directory: Path, role: str, patch: str, seed: int, records: int, *flags: str) -> Recording:
    """Run a server for four streams of `records` in all, one client that waits for each ack, and two POSTs."""
    strace.need_strace()
    rng = random.Random(seed)
    log, database = directory / "strace.log", directory / "numbers.db"
    senders = [Sender(number) for number in range(7)]
    with strace.traced(directory, log, *ROLES[role], str(database), *flags, patch=patch) as server:
        seeds = [rng.random() for _ in range(4)]
        calls = [
            Blocked(lambda n=n: senders[n].stream(server, records // 4, random.Random(seeds[n]))) for n in range(4)
        ]
        calls += [Blocked(lambda: senders[4].one_by_one(server, 50))]
        calls += [Blocked(lambda s=s: s.post(server, 500)) for s in senders[5:]]
        for call in calls:
            call.result()
        server.kill()
    system_calls = strace.parse(log)
    kind = SPOOL_APPLICATION_ID if role == "spool" else APPLICATION_ID
    return Recording(database, kind, system_calls, senders, list(acks_in(system_calls, senders)))


def acks_in(calls: list[strace.Call], senders: list[Sender]) -> Iterator[Ack]:
    """Yield the acks that the server sent, in order."""
    ports = {sender.port: sender for sender in senders}
    for call in calls:
        peer = re.search(r":(\d+)]$", call.path)
        if call.name not in strace.SENDS.split(",") or not peer or int(peer[1]) not in ports:
            continue
        assert call.name == "sendto" and call.result in (None, -1, len(call.data)), f"only a part was sent: {call}"
        sender, data = ports[int(peer[1])], call.data
        if stored := re.search(rb'{"stored": (\d+)}', data):
            yield Ack(call.begun, sender, int(stored[1]))
        while data[:1] == b"\x82":
            yield Ack(call.begun, sender, int.from_bytes(data[2:10], "big"))
            data = data[10:]


# Ack after sync.


def early_acks(run: Recording) -> list[str]:
    """Return the values that were acked before the sync of their write and commit returned, or were never written."""
    wal = f"{run.database}-wal"
    written: dict[int, int] = {}  # value: the end of the first write that contains it
    commits, syncs = [], []  # ends of commits; begins and ends of syncs
    committing = False
    for call in run.calls:
        if call.path != wal or not call.ok or call.ended is None:
            continue
        if call.name in ("fdatasync", "fsync"):
            syncs.append((call.begun, call.ended))
        elif call.name == "pwrite64" and len(call.data) == 24:
            committing = call.data[4:8] != bytes(4)  # https://www.sqlite.org/fileformat2.html#walformat
        elif call.name == "pwrite64" and len(call.data) != 32:
            for match in VALUE.finditer(call.data):
                written.setdefault(TAG << 32 | int.from_bytes(match[1], "big"), call.ended)
            if committing:
                commits.append(call.ended)
    wrong = []
    known: dict[Sender, int] = defaultdict(int)
    for ack in run.acks:
        for value in ack.sender.sent[known[ack.sender] : ack.count]:
            commit = bisect_left(commits, written.get(value, ack.begun))
            committed = commits[commit] if commit < len(commits) else ack.begun
            sync = bisect_left(syncs, (committed, 0))
            if value not in written or sync == len(syncs) or syncs[sync][1] >= ack.begun:
                wrong.append(f"{value:x} acked at {ack.begun}, written at {written.get(value)}")
        known[ack.sender] = max(known[ack.sender], ack.count)
    return wrong


# Power loss.


class Op(NamedTuple):
    """A write at `offset`; without data, a truncation to `offset`."""

    begun: int
    ended: int | None
    offset: int
    data: bytes | None


def apply(content: bytearray, op: Op, rng: random.Random | None = None) -> None:
    """Apply a write to the content. With `rng`, only some of its sectors are written, and some get random bytes."""
    if op.data is None:
        del content[op.offset :]
        content.extend(bytes(op.offset - len(content)))
        return
    content.extend(bytes(max(0, op.offset + len(op.data) - len(content))))
    if rng is None:
        content[op.offset : op.offset + len(op.data)] = op.data
        return
    at, end = op.offset, op.offset + len(op.data)
    while at < end:
        upto = min(end, (at // SECTOR + 1) * SECTOR)
        chance = rng.random()
        if chance < 0.5:
            content[at:upto] = op.data[at - op.offset : upto - op.offset]
        elif chance < 0.6:
            content[at:upto] = rng.randbytes(upto - at)
        at = upto


class File:
    """An inode: its certain content, and the writes that may or may not be on disk."""

    def __init__(self) -> None:
        self.certain = bytearray()
        self.pending: list[Op] = []

    def synced(self, since: int) -> None:
        """Make the writes certain that ended before `since`: a sync that began then has returned."""
        kept = []
        for op in self.pending:
            if op.ended is not None and op.ended < since:
                apply(self.certain, op)
            else:
                kept.append(op)
        self.pending = kept

    def after_cut(self, fate: str, rng: random.Random) -> bytes:
        """Return a possible content after a power cut."""
        content = bytearray(self.certain)
        for op in self.pending:
            dice = rng.random() if fate == "some" else {"none": 0.0, "all": 1.0}[fate]
            if dice >= 0.6:
                apply(content, op)
            elif dice >= 0.3 and op.data is not None:
                apply(content, op, rng)
        return bytes(content)


class Disk:
    """A model of the disk under a directory, fed with the calls of a log one by one."""

    def __init__(self, database: Path) -> None:
        self.directory = str(database.parent)
        self.paths = {f"{database}{suffix}" for suffix in ("", "-wal", "-journal")}  # -shm is rebuilt
        self.files: dict[str, File] = {}
        self.certain: dict[str, File] = {}  # the names that certainly exist after a cut
        self.pending: list[tuple[int, str, File | None]] = []  # names added and removed since the last sync

    def begin(self, call: strace.Call) -> None:
        """Note the begin of a call: from now on its effect may be on disk."""
        if call.path in self.paths:
            if call.name == "pwrite64":
                op = Op(call.begun, call.ended, call.numbers[-1], call.data)
                self.files[call.path].pending.append(op)
            elif call.name == "ftruncate":
                self.files[call.path].pending.append(Op(call.begun, call.ended, call.numbers[-1], None))
            elif call.name == "openat" and "O_CREAT" in call.flags and call.path not in self.files:
                self.files[call.path] = File()
                self.pending.append((call.begun, call.path, self.files[call.path]))
            elif call.name == "unlink":
                del self.files[call.path]
                self.pending.append((call.begun, call.path, None))
            else:
                assert call.name in ("openat", "fsync", "fdatasync"), f"a call that the model does not know: {call}"

    def end(self, call: strace.Call) -> None:
        """Note the return of a call: a sync makes earlier writes certain."""
        if call.name not in ("fsync", "fdatasync") or not call.ok:
            return
        if call.path in self.files:
            self.files[call.path].synced(call.begun)
        elif call.path == self.directory:
            for _, name, file in self.pending:
                self._set_name(self.certain, name, file)
            self.pending = []

    def after_cut(self, fate: str, rng: random.Random) -> dict[str, bytes]:
        """Return possible files after a power cut, by name. `fate` decides on uncertain writes: none, some or all."""
        names = dict(self.certain)
        for _, name, file in self.pending:
            if fate == "all" or fate == "some" and rng.random() < 0.5:
                self._set_name(names, name, file)
        return {name: file.after_cut(fate, rng) for name, file in names.items()}

    @staticmethod
    def _set_name(names: dict[str, File], name: str, file: File | None) -> None:
        if file:
            names[name] = file
        else:
            names.pop(name, None)


def recover(path: Path, run: Recording, acked: dict[Sender, int]) -> str:
    """Open the database that a power cut has left, and store the records that clients would send again.

    Return a description of the first problem, or an empty string.
    """
    try:
        with closing(store.Store(str(path), run.application_id)) as opened:
            opened._db.execute("PRAGMA synchronous = OFF")  # for speed: this copy may be lost
            acked_values = {value for sender in acked for value in sender.sent[: acked[sender]]}
            if trouble := find_problem(path, run, acked_values):
                return trouble
            streams = [sender for sender in run.senders if sender.source]
            for sender in streams:
                values = array("q", sorted(set(sender.sent[acked.get(sender, 0) :])))
                if values:
                    opened.append([Run(sender.source, values[0] & 0xFFFFFF, len(values))], values)
            trouble = find_problem(path, run, {value for sender in streams for value in sender.sent})
            return trouble and f"{trouble}, after all records were sent again"
    except (StoreError, sqlite3.Error) as error:
        return f"{type(error).__name__}: {error}"


def find_problem(path: Path, run: Recording, acked: set[int]) -> str:
    """Return the first problem of a database, or an empty string.

    It must contain all of `acked`, no value that was not sent, and no value twice.
    """
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as reader:
        (check,) = reader.execute("PRAGMA integrity_check(1)").fetchone()
        if check != "ok":
            return f"integrity: {check}"
        stored = [value for (value,) in reader.execute("SELECT value FROM record ORDER BY id")]
        batches = reader.execute(
            "SELECT first_id, count, uuid, sequence FROM batch JOIN source ON source.id = source_id ORDER BY first_id"
        ).fetchall()
    if missing := acked - set(stored):
        return f"{len(missing)} acked values are lost, for example {min(missing):x}"
    if len(set(stored)) < len(stored):
        return f"{len(stored) - len(set(stored))} values are stored twice"
    sources = {sender.source: sender for sender in run.senders}
    next_id = 1
    for first_id, count, source, sequence in batches:
        values = stored[first_id - 1 : first_id - 1 + count]
        sender = sources.get(source) or run.senders[values[0] >> 24 & 0xFF]
        begin = sender.value(sequence)
        if first_id != next_id or values != list(range(begin, begin + count)) or values[-1] > max(sender.sent):
            return f"batch at {first_id} of {sender.number}, sequence {sequence}: wrong values, or a gap before it"
        next_id += count
    return "" if next_id == len(stored) + 1 else "records without a batch"


def power_cuts(run: Recording, directory: Path, rng: random.Random, cuts: int) -> dict[int, str]:
    """Cut the power at so many moments, half of them just after an ack. Return the problems by moment."""
    moments = sorted(
        rng.choices([ack.begun for ack in run.acks], k=cuts // 2 - 1)
        + rng.choices([call.begun for call in run.calls if call.path.startswith(str(run.database))], k=cuts - cuts // 2)
        + [run.acks[-1].begun]
    )
    steps = [(call.begun, 0, call) for call in run.calls]
    steps += [(call.ended, 1, call) for call in run.calls if call.ended is not None]
    steps.sort(key=lambda step: step[:2])
    disk, acks, acked, wrong = Disk(run.database), iter(run.acks), defaultdict(int), {}
    at, ack = 0, next(acks)
    for number, moment in enumerate(moments):
        # A call that begins at this moment may have its effect, but has not returned.
        while at < len(steps) and steps[at][:2] <= (moment, 0):
            (disk.end if steps[at][1] else disk.begin)(steps[at][2])
            at += 1
        while ack and ack.begun <= moment:
            acked[ack.sender] = max(acked[ack.sender], ack.count)
            ack = next(acks, None)
        files = disk.after_cut(rng.choice(["none", "some", "some", "some", "all"]), rng)
        copy = directory / f"cut-{number}"
        copy.mkdir()
        for name, content in files.items():
            (copy / os.path.basename(name)).write_bytes(content)
        if trouble := recover(copy / run.database.name, run, acked):
            wrong[moment] = trouble
        shutil.rmtree(copy)
    return wrong


@pytest.fixture
def seed() -> int:
    return seeded()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("role", "patch"),
    [
        pytest.param("consumer", SMALL_WAL, id="consumer"),
        pytest.param("single process", SMALL_WAL, id="single process"),
        pytest.param("consumer", TRUNCATED_WAL, id="consumer, truncated WAL"),
        pytest.param("spool", SMALL_WAL, id="spool"),
    ],
)
@pytest.mark.parametrize("cuts", [40, pytest.param(1000, marks=pytest.mark.long)])
def test_acked_records_are_synced_first_and_survive_power_cuts(
    tmp_path: Path, seed: int, role: str, patch: str, cuts: int
) -> None:
    """No matter which unsynced writes reached the disk. Records that are sent again afterwards are stored once."""
    run = record(tmp_path, role, patch, seed, 8000 if cuts < 100 else 20_000)
    resets = sum(c.name == "pwrite64" and c.path == f"{run.database}-wal" and c.numbers[-1] == 0 for c in run.calls)
    print(f"{len(run.calls)} calls, {len(run.acks)} acks, WAL restarted {resets} times")
    assert resets > 3, "the WAL was restarted several times"
    assert len(run.acks) > 50
    for sender in run.senders:
        assert max(ack.count for ack in run.acks if ack.sender is sender) == len(sender.sent)
    assert early_acks(run) == []
    assert power_cuts(run, tmp_path, random.Random(seed), cuts) == {}


def test_torn_first_page_is_recovered_from_wal(tmp_path: Path) -> None:
    """A checkpoint rewrites the page from the WAL, which stays until the page is synced."""
    running, cut = tmp_path / "running.db", tmp_path / "cut.db"
    with closing(store.Store(str(running))) as opened:
        opened.append([Run(bytes(16), 0, 1000)], array("q", range(1000)))
        for suffix in ("", "-wal"):
            shutil.copy(f"{running}{suffix}", f"{cut}{suffix}")
    with open(cut, "r+b") as file:
        file.write(random.Random(1).randbytes(SECTOR))
    with closing(store.Store(str(cut))) as opened:
        assert opened.stats().held == 1000


def test_first_page_torn_at_creation_is_rolled_back_by_journal(tmp_path: Path) -> None:
    """The journal shows that the file was empty before, so recovery leaves an empty database."""
    path = tmp_path / "numbers.db"
    path.write_bytes(random.Random(1).randbytes(SECTOR) + bytes(4096 - SECTOR))
    # https://www.sqlite.org/fileformat2.html#the_rollback_journal: no pages, initial size 0, pages of 4096 bytes
    head = bytes.fromhex("d9d505f920a163d7") + struct.pack(">IIIII", 0, 1, 0, SECTOR, 4096)
    path.with_name("numbers.db-journal").write_bytes(head.ljust(SECTOR, b"\0"))
    with closing(store.Store(str(path))) as opened:
        opened.append([Run(bytes(16), 0, 3)], array("q", range(3)))
        assert opened.stats().held == 3


def test_damaged_page_is_harmless_or_refused_in_one_line(tmp_path: Path) -> None:
    """There is no other exception, and the lock is free afterwards."""
    path = tmp_path / "numbers.db"
    with closing(store.Store(str(path))) as opened:
        opened.append([Run(bytes(16), 0, 5000)], array("q", range(5000)))
    good = path.read_bytes()
    refused = 0
    for at in range(0, len(good), 4096):
        path.write_bytes(good[: at + 100 * (not at)] + b"\xff" * (4096 - 100 * (not at)) + good[at + 4096 :])
        try:
            store.Store(str(path)).close()
        except StoreError as error:
            assert "\n" not in str(error) and "in use" not in str(error)
            refused += 1
    assert refused > 2


@pytest.mark.slow
@pytest.mark.parametrize("file", ["database", "-wal", "directory"])
def test_power_cuts_detect_missing_syncs(tmp_path: Path, seed: int, file: str) -> None:
    """The syncs of one file or of the directory are removed from the log of a good run. The test must find problems."""
    run = record(tmp_path, "consumer", SMALL_WAL, seed, 8000)
    path = {"directory": str(tmp_path), "database": str(run.database), "-wal": f"{run.database}-wal"}[file]
    kept = [call for call in run.calls if not (call.name in ("fsync", "fdatasync") and call.path == path)]
    assert len(kept) < len(run.calls)
    wrong = power_cuts(run._replace(calls=kept), tmp_path, random.Random(seed), 40)
    print(f"{len(run.calls) - len(kept)} syncs; {len(wrong)} of 40 cuts: {list(wrong.values())[:3]}")
    assert wrong


@pytest.mark.slow
@pytest.mark.parametrize(
    ("role", "patch", "flags"),
    [
        pytest.param("consumer", SYNCHRONOUS.format("OFF"), [], id="consumer, synchronous = OFF"),
        pytest.param("consumer", SYNCHRONOUS.format("NORMAL"), [], id="consumer, synchronous = NORMAL"),
        pytest.param("single process", SYNCHRONOUS.format("OFF"), [], id="single process, synchronous = OFF"),
        pytest.param("spool", SYNCHRONOUS.format("OFF"), [], id="spool, synchronous = OFF"),
        pytest.param("consumer", ACK_BEFORE_COMMIT, [], id="consumer, acks before it commits"),
        pytest.param("single process", "", ["-A", "ring"], id="single process, acks in the ring"),
    ],
)
def test_checks_detect_server_that_acks_too_early(
    tmp_path: Path, seed: int, role: str, patch: str, flags: list[str]
) -> None:
    """Servers that do not sync, or ack before they commit, must fail both checks above."""
    run = record(tmp_path, role, patch, seed, 2000, *flags)
    early = early_acks(run)
    wrong = power_cuts(run, tmp_path, random.Random(seed), 40)
    print(f"{len(early)} acked before the sync, {early[:1]}; {len(wrong)} of 40 cuts: {list(wrong.values())[:3]}")
    assert early and wrong
