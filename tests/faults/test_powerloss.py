"""Acks against the disk: what a server had asked of the kernel when an ack left, and what a power cut leaves of it.

A server is run under strace. From the log follows, for every moment, what is certain to be on disk: what was written
before a sync that has returned. Everything later may be there or not, whole or in part, in any order. No more is
believed of the kernel, the file system or SQLite than POSIX says, and that a sector of 512 bytes is the unit.

Every value is sent once and tells whose it is, so that it is recognized on the pages that carry it.
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
"""The upper half of every value; in the lower are 8 bits for its client and 24 for its number."""
VALUE = re.compile(TAG.to_bytes(4, "big") + rb"(.{4})", re.DOTALL)
SECTOR = 512
ROLES = {
    "consumer": ["-I", "false", "-p", "0", "-D"],
    "single process": ["-p", "0", "-T", "0", "-D"],
    "spool": ["-p", "0", "-T", "1", "-S"],  # of a publisher whose consumer is away: nobody listens there
}
SMALL_WAL = (
    "store.connect = (lambda real: lambda *args:"
    " [db := real(*args), db.execute('PRAGMA wal_autocheckpoint = 20')][0])(store.connect)"
)
CUT_WAL = "store.LARGE_WAL_BYTES = 100_000"
UNSYNCED = SMALL_WAL.replace("wal_autocheckpoint = 20", "synchronous = {}")
EARLY = (
    "web.intake.StoreIntake.put = lambda self, block, timeout: (__import__('threading').Thread("
    "target=self._store.append, args=(block.runs, block.values)).start(), (len(block.values), 0))[1]"
)


class Sender:
    """A client that knows what it has sent, in order, and the port that the log names it by."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.port = 0
        self.source = b""  # unless it brings its own
        self.sent = array("q")  # every value, in the order sent, those sent again too

    def value(self, sequence: int) -> int:
        """The value of its record of that number."""
        return TAG << 32 | self.number << 24 | sequence

    def one_by_one(self, server: ServerProcess, count: int) -> None:
        """Plain messages, each sent when the last one is acked."""
        with RawClient(server.port) as client:
            self.port = client.sock.getsockname()[1]
            for sequence in range(count):
                self.sent.append(self.value(sequence))
                client.send(frame(2, struct.pack(">q", self.sent[-1])))
                client.acked(sequence + 1)

    def stream(self, server: ServerProcess, count: int, rng: random.Random) -> None:
        """Batches of a source of its own; some, or none, are not acked at any time, and some are sent again."""
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
        """One HTTP call."""
        self.sent = array("q", map(self.value, range(count)))
        with closing(http.client.HTTPConnection("localhost", server.port, timeout=DEADLINE)) as connection:
            connection.connect()
            self.port = connection.sock.getsockname()[1]
            connection.request("POST", "/v1.0/ingest", encode_plain(self.sent))
            assert json.load(connection.getresponse()) == {"stored": count}


class Ack(NamedTuple):
    """The first `count` of a sender's records are said to be stored by a call that began there."""

    begun: int
    sender: Sender
    count: int


class Recording(NamedTuple):
    """A run of a server: its calls, its clients and its acks, in order."""

    database: Path
    application_id: int
    calls: list[strace.Call]
    senders: list[Sender]
    acks: list[Ack]


def record(directory: Path, role: str, patch: str, seed: int, records: int, *flags: str) -> Recording:
    """Runs a server for four streams of `records` in all, one client that waits for each ack, and two POSTs."""
    strace.needed()
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
    calls_made = strace.parse(log)
    kind = SPOOL_APPLICATION_ID if role == "spool" else APPLICATION_ID
    return Recording(database, kind, calls_made, senders, list(acks_in(calls_made, senders)))


def acks_in(calls: list[strace.Call], senders: list[Sender]) -> Iterator[Ack]:
    """What the server told its clients, in order."""
    ports = {sender.port: sender for sender in senders}
    for call in calls:
        peer = re.search(r":(\d+)]$", call.path)
        if call.name not in strace.SENDS.split(",") or not peer or int(peer[1]) not in ports:
            continue
        assert call.name == "sendto" and call.result in (None, -1, len(call.data)), f"a part was sent: {call}"
        sender, data = ports[int(peer[1])], call.data
        if stored := re.search(rb'{"stored": (\d+)}', data):
            yield Ack(call.begun, sender, int(stored[1]))
        while data[:1] == b"\x82":
            yield Ack(call.begun, sender, int.from_bytes(data[2:10], "big"))
            data = data[10:]


# Ack after sync.


def unsynced(run: Recording) -> list[str]:
    """What was acked before the sync that covers it had returned, or is not in the log of writes at all."""
    wal = f"{run.database}-wal"
    written: dict[int, int] = {}  # value: where the first write that carries it ended
    commits, syncs = [], []  # where commits ended; where syncs began and ended
    committing = False
    for call in run.calls:
        if call.path != wal or not call.ok or call.ended is None:
            continue
        if call.name in ("fdatasync", "fsync"):
            syncs.append((call.begun, call.ended))
        elif call.name == "pwrite64" and len(call.data) == 24:
            committing = call.data[4:8] != bytes(4)  # https://www.sqlite.org/fileformat2.html#walformat
        elif call.name == "pwrite64" and len(call.data) != 32:
            for found in VALUE.finditer(call.data):
                written.setdefault(TAG << 32 | int.from_bytes(found[1], "big"), call.ended)
            if committing:
                commits.append(call.ended)
    wrong = []
    known: dict[Sender, int] = defaultdict(int)
    for ack in run.acks:
        for value in ack.sender.sent[known[ack.sender] : ack.count]:
            commit = bisect_left(commits, written.get(value, ack.begun))
            done = commits[commit] if commit < len(commits) else ack.begun
            sync = bisect_left(syncs, (done, 0))
            if value not in written or sync == len(syncs) or syncs[sync][1] >= ack.begun:
                wrong.append(f"{value:x} acked at {ack.begun}, written at {written.get(value)}")
        known[ack.sender] = max(known[ack.sender], ack.count)
    return wrong


# Power loss.


class Op(NamedTuple):
    """A write at `offset`, or, without data, a truncation to `offset`."""

    begun: int
    ended: int | None
    offset: int
    data: bytes | None


def apply(content: bytearray, op: Op, rng: random.Random | None = None) -> None:
    """Changes the content; with `rng`, only in some of its sectors, and others are left full of rubbish."""
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
        fate = rng.random()
        if fate < 0.5:
            content[at:upto] = op.data[at - op.offset : upto - op.offset]
        elif fate < 0.6:
            content[at:upto] = rng.randbytes(upto - at)
        at = upto


class File:
    """An inode: what is certain to be in it, and what may be."""

    def __init__(self) -> None:
        self.certain = bytearray()
        self.pending: list[Op] = []

    def synced(self, since: int) -> None:
        """A sync that began there has returned."""
        kept = []
        for op in self.pending:
            if op.ended is not None and op.ended < since:
                apply(self.certain, op)
            else:
                kept.append(op)
        self.pending = kept

    def after_cut(self, fate: str, rng: random.Random) -> bytes:
        """What may be left of it."""
        content = bytearray(self.certain)
        for op in self.pending:
            dice = rng.random() if fate == "some" else {"none": 0.0, "all": 1.0}[fate]
            if dice >= 0.6:
                apply(content, op)
            elif dice >= 0.3 and op.data is not None:
                apply(content, op, rng)
        return bytes(content)


class Disk:
    """The disk under a directory, as far as the calls of a log, taken one by one, determine it."""

    def __init__(self, database: Path) -> None:
        self.directory = str(database.parent)
        self.paths = {f"{database}{suffix}" for suffix in ("", "-wal", "-journal")}  # -shm is rebuilt
        self.files: dict[str, File] = {}
        self.certain: dict[str, File] = {}  # the names that are there after a cut, for sure
        self.pending: list[tuple[int, str, File | None]] = []  # names given and taken since

    def begin(self, call: strace.Call) -> None:
        """The call has begun: what it does may be done."""
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
                assert call.name in ("openat", "fsync", "fdatasync"), f"what does this do to the disk? {call}"

    def end(self, call: strace.Call) -> None:
        """The call has returned: what it syncs is certain."""
        if call.name not in ("fsync", "fdatasync") or not call.ok:
            return
        if call.path in self.files:
            self.files[call.path].synced(call.begun)
        elif call.path == self.directory:
            for _, name, file in self.pending:
                self._give(self.certain, name, file)
            self.pending = []

    def after_cut(self, fate: str, rng: random.Random) -> dict[str, bytes]:
        """What may be left: files and their content. `fate` says of how much that is not certain: none, some, all."""
        names = dict(self.certain)
        for _, name, file in self.pending:
            if fate == "all" or fate == "some" and rng.random() < 0.5:
                self._give(names, name, file)
        return {name: file.after_cut(fate, rng) for name, file in names.items()}

    @staticmethod
    def _give(names: dict[str, File], name: str, file: File | None) -> None:
        if file:
            names[name] = file
        else:
            names.pop(name, None)


def recovered(path: Path, run: Recording, acked: dict[Sender, int]) -> str:
    """Opens what a power cut has left, and stores again what clients would send again. What is wrong, or ""."""
    try:
        with closing(store.Store(str(path), run.application_id)) as opened:
            opened._db.execute("PRAGMA synchronous = OFF")  # this copy need not last
            if trouble := wrong_in(path, run, {value for each in acked for value in each.sent[: acked[each]]}):
                return trouble
            streams = [sender for sender in run.senders if sender.source]
            for sender in streams:
                values = array("q", sorted(set(sender.sent[acked.get(sender, 0) :])))
                if values:
                    opened.append([Run(sender.source, values[0] & 0xFFFFFF, len(values))], values)
            trouble = wrong_in(path, run, {value for sender in streams for value in sender.sent})
            return trouble and f"{trouble}, when all was sent again"
    except (StoreError, sqlite3.Error) as error:
        return f"{type(error).__name__}: {error}"


def wrong_in(path: Path, run: Recording, acked: set[int]) -> str:
    """What is wrong in a database in which all of `acked` should be, nothing that was not sent, and nothing twice."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as reader:
        (check,) = reader.execute("PRAGMA integrity_check(1)").fetchone()
        if check != "ok":
            return f"integrity: {check}"
        stored = [value for (value,) in reader.execute("SELECT value FROM record ORDER BY id")]
        batches = reader.execute(
            "SELECT first_id, count, uuid, sequence FROM batch JOIN source ON source.id = source_id ORDER BY first_id"
        ).fetchall()
    if missing := acked - set(stored):
        return f"{len(missing)} acked and gone, {min(missing):x} say"
    if len(set(stored)) < len(stored):
        return f"{len(stored) - len(set(stored))} are there twice"
    sources = {sender.source: sender for sender in run.senders}
    next_id = 1
    for first_id, count, source, sequence in batches:
        values = stored[first_id - 1 : first_id - 1 + count]
        sender = sources.get(source) or run.senders[values[0] >> 24 & 0xFF]
        begin = sender.value(sequence)
        if first_id != next_id or values != list(range(begin, begin + count)) or values[-1] > max(sender.sent):
            return f"batch at {first_id} of {sender.number}, sequence {sequence}: other values, or a gap before it"
        next_id += count
    return "" if next_id == len(stored) + 1 else "records without a batch"


def power_cuts(run: Recording, directory: Path, rng: random.Random, cuts: int) -> dict[int, str]:
    """Cuts the power at so many moments, half of them just after an ack; what was wrong, by moment."""
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
        # A call that began there may be done, and has not returned: whether it has cannot be known to others.
        while at < len(steps) and steps[at][:2] <= (moment, 0):
            (disk.end if steps[at][1] else disk.begin)(steps[at][2])
            at += 1
        while ack and ack.begun <= moment:
            acked[ack.sender] = max(acked[ack.sender], ack.count)
            ack = next(acks, None)
        left = disk.after_cut(rng.choice(["none", "some", "some", "some", "all"]), rng)
        place = directory / f"cut-{number}"
        place.mkdir()
        for name, content in left.items():
            (place / os.path.basename(name)).write_bytes(content)
        if trouble := recovered(place / run.database.name, run, acked):
            wrong[moment] = trouble
        shutil.rmtree(place)
    return wrong


@pytest.fixture
def seed() -> int:
    return seeded()


@pytest.mark.parametrize(
    ("role", "patch"),
    [
        pytest.param("consumer", SMALL_WAL, id="consumer"),
        pytest.param("single process", SMALL_WAL, id="single process"),
        pytest.param("consumer", CUT_WAL, id="consumer, a WAL that is cut"),
        pytest.param("spool", SMALL_WAL, id="spool"),
    ],
)
@pytest.mark.parametrize("cuts", [40, pytest.param(1000, marks=pytest.mark.long)])
def test_acked_records_are_synced_first_and_survive_power_cuts(
    tmp_path: Path, seed: int, role: str, patch: str, cuts: int
) -> None:
    """Whatever the disk had of what was not synced; and what is sent again afterwards is stored once."""
    run = record(tmp_path, role, patch, seed, 8000 if cuts < 100 else 20_000)
    resets = sum(c.name == "pwrite64" and c.path == f"{run.database}-wal" and c.numbers[-1] == 0 for c in run.calls)
    print(f"{len(run.calls)} calls, {len(run.acks)} acks, WAL begun {resets} times")
    assert resets > 3, "several checkpoints, and the WAL was begun anew"
    assert len(run.acks) > 50
    for sender in run.senders:
        assert max(ack.count for ack in run.acks if ack.sender is sender) == len(sender.sent)
    assert unsynced(run) == []
    assert power_cuts(run, tmp_path, random.Random(seed), cuts) == {}


def test_torn_first_page_is_recovered_from_wal(tmp_path: Path) -> None:
    """It is written again at a checkpoint, from the WAL, which is kept until that is synced."""
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
    """The journal that SQLite keeps until then says that there was nothing before; so there is an empty database."""
    path = tmp_path / "numbers.db"
    path.write_bytes(random.Random(1).randbytes(SECTOR) + bytes(4096 - SECTOR))
    # https://www.sqlite.org/fileformat2.html#the_rollback_journal: no pages, and none before, of 4096 bytes
    head = bytes.fromhex("d9d505f920a163d7") + struct.pack(">IIIII", 0, 1, 0, SECTOR, 4096)
    path.with_name("numbers.db-journal").write_bytes(head.ljust(SECTOR, b"\0"))
    with closing(store.Store(str(path))) as opened:
        opened.append([Run(bytes(16), 0, 3)], array("q", range(3)))
        assert opened.stats().held == 3


def test_damaged_page_is_harmless_or_refused_in_one_line(tmp_path: Path) -> None:
    """No other exception, and nothing left open: the lock is free afterwards."""
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


@pytest.mark.parametrize("file", ["database", "-wal", "directory"])
def test_power_cuts_detect_missing_syncs(tmp_path: Path, seed: int, file: str) -> None:
    """The log of a good run, but for one file's syncs, or its directory's: the cuts must report it."""
    run = record(tmp_path, "consumer", SMALL_WAL, seed, 8000)
    path = {"directory": str(tmp_path), "database": str(run.database), "-wal": f"{run.database}-wal"}[file]
    kept = [call for call in run.calls if not (call.name in ("fsync", "fdatasync") and call.path == path)]
    assert len(kept) < len(run.calls)
    wrong = power_cuts(run._replace(calls=kept), tmp_path, random.Random(seed), 40)
    print(f"{len(run.calls) - len(kept)} syncs; {len(wrong)} of 40 cuts: {list(wrong.values())[:3]}")
    assert wrong


@pytest.mark.parametrize(
    ("role", "patch", "flags"),
    [
        pytest.param("consumer", UNSYNCED.format("OFF"), [], id="consumer, synchronous = OFF"),
        pytest.param("consumer", UNSYNCED.format("NORMAL"), [], id="consumer, synchronous = NORMAL"),
        pytest.param("single process", UNSYNCED.format("OFF"), [], id="single process, synchronous = OFF"),
        pytest.param("spool", UNSYNCED.format("OFF"), [], id="spool, synchronous = OFF"),
        pytest.param("consumer", EARLY, [], id="consumer, acks before it commits"),
        pytest.param("single process", "", ["-A", "ring"], id="single process, acks in the ring"),
    ],
)
def test_checks_detect_server_that_acks_too_early(
    tmp_path: Path, seed: int, role: str, patch: str, flags: list[str]
) -> None:
    """The two checks above, on servers that do not sync, or ack before they commit: both must report it."""
    run = record(tmp_path, role, patch, seed, 2000, *flags)
    early = unsynced(run)
    wrong = power_cuts(run, tmp_path, random.Random(seed), 40)
    print(f"{len(early)} acked before the sync, {early[:1]}; {len(wrong)} of 40 cuts: {list(wrong.values())[:3]}")
    assert early and wrong
