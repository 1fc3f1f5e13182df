"""The store on ClickHouse, for what is its own: passwords, the pace of inserts, and what a server can do to one.

Against Debian's 18.16, as a process; what a current engine adds is tried on chdb.
"""

import json
import logging
import random
import signal
import socket
import ssl
import threading
import uuid
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from support.certificates import Authority
from support.checks import SHORT_TIMES, Load, short_times
from support.clickhouses import PASSWORD, ClickHouseServer, Cluster, NewClickHouse, need_chdb, need_zookeeper, program
from support.harness import DEADLINE, Blocked, ServerProcess, eventually, free_port, not_ready, seeded, server
from support.proxy import DOWN, UP, Proxy

from ringolib import options
from ringolib.storage.clickhouse import http as clickhouse_http
from ringolib.storage.clickhouse import schema as clickhouse_tables
from ringolib.storage.clickhouse import store as clickhouse
from ringolib.storage.clickhouse.http import PermanentError, RetryableError, parse, redacted
from ringolib.storage.clickhouse.store import ClickHouse
from ringolib.storage.group_commit import PendingBlock, Turn
from ringolib.storage.interface import StoreError
from ringolib.wire import Run

A = b"a" * 16
A_TEXT = "61616161-6161-6161-6161-616161616161"
COLUMNS = "source UUID, sequence UInt64, value Int64, version UInt64"
BY_CHANCE = "ENGINE = ReplacingMergeTree ORDER BY (source, sequence)"
NEWER = f"SELECT toUUID('{A_TEXT}') AS identity, 2 AS schema"
IN_URL = "s3cret%2F%40%3A%3F"


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClickHouseServer]:
    program()
    made = ClickHouseServer(tmp_path_factory.mktemp("clickhouse"))
    yield made
    made.kill()


@pytest.fixture(scope="module")
def today(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NewClickHouse]:
    need_chdb()
    made = NewClickHouse(tmp_path_factory.mktemp("chdb"))
    yield made
    made.kill()


@pytest.fixture
def database(house: ClickHouseServer) -> str:
    return house.database()


@pytest.fixture
def opened(house: ClickHouseServer, database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ClickHouse]:
    monkeypatch.setattr(clickhouse, "INTERVAL", 0.0)
    made = ClickHouse(parse(house.url(database)))
    yield made
    made.close()


@pytest.fixture
def proxy(house: ClickHouseServer) -> Iterator[Proxy]:
    with Proxy(house.port) as made:
        yield made


def block(first: int, end: int) -> tuple[list[Run], "array[int]"]:
    """Records `first` to `end`, with values that tell their sequence."""
    return [Run(A, first, end - first)], array("q", range(first * 10, end * 10, 10))


def expected(first: int, end: int) -> dict[tuple[str, int], int]:
    return {(A_TEXT, n): n * 10 for n in range(first, end)}


# Addresses, and the password.


@pytest.mark.parametrize(
    ("text", "hosts", "user", "password", "database", "shown"),
    [
        ("clickhouse://h/d", [("h", 8123)], "default", "", "d", "clickhouse://h:8123/d"),
        ("clickhouses://h", [("h", 8443)], "default", "", "default", "clickhouses://h:8443/default"),
        ("clickhouse://u:p@h:1,[::1]:2,g/d", [("h", 1), ("::1", 2), ("g", 8123)], "u", "p", "d", None),
        ("ClickHouses://u:p@h/d", [("h", 8443)], "u", "p", "d", "clickhouses://u@h:8443/d"),
        ("clickhouse://u:@h/d", [("h", 8123)], "u", "", "d", "clickhouse://u@h:8123/d"),
        ("clickhouse://u%40x:a%2Fb@c@h/d%20e", [("h", 8123)], "u@x", "a/b@c", "d e", "clickhouse://u%40x@h:8123/d%20e"),
    ],
)
def test_what_an_address_says(
    text: str, hosts: list[tuple[str, int]], user: str, password: str, database: str, shown: str | None
) -> None:
    found = parse(text)
    assert (list(found.hosts), found.user, found.password, found.database) == (hosts, user, password, database)
    assert clickhouse_http.is_address(text) and found.tls == text.lower().startswith("clickhouses:")
    assert shown is None or found.shown == shown


@pytest.mark.parametrize(
    "text", ["clickhouse://", "clickhouse://u:pw@/d", "clickhouse://h:0/d", "clickhouse://h:70000/d",
             "clickhouse://u:pw@h/d?password=pw", "clickhouse://u:pw@h,h:8123/d", "clickhouse://u%3Ax:pw@h/d",
             "clickhouse://u:pw@h/d/e", "clickhouse://u:pw@h h/d"]
)  # fmt: skip
def test_a_wrong_address_is_refused_without_its_password(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["-D", text], [f"--database={text}"], [f"--databse={text}"], [text]):
        with pytest.raises(SystemExit) as stop:
            options.read_arguments(["-I", "false", *flags])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1
        assert "pw" not in said


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("clickhouse://", "'clickhouse://' is not accepted: "),
        ("clickhouse://u:pw@h:99999/x", "'clickhouse://u:***@h:99999/x' is not accepted: "),
        ("clickhouse://u:pw@h/x?y=1", "'clickhouse://u:***@h/x?***' is not accepted: nothing may follow"),
    ],
)
def test_what_hides_the_password_leaves_the_reason(address: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options.read_arguments(["-I", "false", "-D", address])
    line = capsys.readouterr().err
    assert said in line and "(clickhouse://USER@HOST:PORT/DATABASE)" in line and "pw" not in line


@pytest.mark.parametrize("before", ["", "x", "-x", "--nix=", "'", '"', "'\"", "-r", "-d"])
@pytest.mark.parametrize("password", ["pw", "p'pw", 'p"pw', "p'\"pw", "p\\pw", "p pw@pw"])
def test_a_password_in_a_wrong_argument_is_not_shown(
    before: str, password: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        options.read_arguments([f"{before}clickhouse://u:{password}@h/d"])
    assert "pw" not in capsys.readouterr().err


def test_a_spool_is_no_clickhouse(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options.read_arguments(["-S", "clickhouse://u:pw@h/d"])
    said = capsys.readouterr().err
    assert "a spool is a file" in said and "pw" not in said


def test_a_password_is_taken_out_of_whatever_was_typed() -> None:
    for text in (
        "clickhouse://u:p/@w@h/d",
        "-Dclickhouse://u:p w@h/d",
        "x clickhouses://u:pw@h,i/d y",
        "CLICKHOUSE://u:w@h",
    ):
        assert "w" not in redacted(text) and ":***@" in redacted(text) and "u" in redacted(text)
    for text in ("clickhouse://u@h/d", "clickhouse://h:1/d", "numbers.db", "a@b:c"):
        assert redacted(text) == text


def test_the_password_is_nowhere_to_be_seen(house: ClickHouseServer, database: str, tmp_path: Path) -> None:
    url = house.url(database)
    assert IN_URL in url
    with server(tmp_path, "-p", "0", "-T", "0", "-d", "-D", url) as running:
        assert f"storing in clickhouse://bob@127.0.0.1:{house.port}/{database}" in running.greeting
        with Load(running.url, random.Random(1), 1) as load:
            load.finish()
        stats = json.loads(running.get("/v1.0/stats")[2])
        assert stats["info"]["database"] == f"clickhouse://bob@127.0.0.1:{house.port}/{database}"
        assert stats["options"][-1] == f"clickhouse://bob:***@127.0.0.1:{house.port}/{database}"
        assert stats["stats"]["powerSafe"] is False
        house.ask(f"DROP TABLE {database}.record")
        eventually(lambda: not_ready(running) == ["store_failing"])
        said = [running.get(path)[2].decode() for path in ("/", "/v1.0/stats", "/metrics", "/v1.0/ready")]
        running.stop()
        said += [running.greeting, running.tally, running.errors.read_text()]
        assert "not_power_safe" in said[-1] and database in said[-1]
        for text in said:
            assert PASSWORD not in text and IN_URL not in text and "s3cret" not in text


def test_the_password_may_be_in_the_environment(
    house: ClickHouseServer, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"clickhouse://bob@127.0.0.1:{house.port}/{database}"
    with pytest.raises(StoreError, match=f"it wants a password.*{clickhouse_http.PASSWORD}"):
        ClickHouse(parse(address))
    monkeypatch.setenv(clickhouse_http.PASSWORD, PASSWORD)
    ClickHouse(parse(address)).close()
    assert parse("clickhouse://bob:other@h").password == "other", "the address's own comes first"


@pytest.mark.parametrize(
    ("address", "flags", "said"),
    [
        ("bob:wrong@127.0.0.1:{port}/{database}", [], "check the password"),
        ("nobody:x@127.0.0.1:{port}/{database}", [], "check the user's name"),
        ("reader@127.0.0.1:{port}/{database}", [], "the user may not write"),
        ("127.0.0.1:{port}/nope", [], "CREATE DATABASE"),
        ("127.0.0.1:{port}/{database}", ["--clickhouse_cluster", "c"], "knows no such cluster, but none"),
        ("127.0.0.1:{port}/{database}", ["--retain", "3"], "is ClickHouse 18.16.1, it needs 19.6 or newer"),
        ("127.0.0.1:{port},localhost:{port}/{database}", [], "several hosts need --clickhouse_cluster"),
        ("127.0.0.1:{free}/{database}", [], "Connection refused"),
        ("nowhere.invalid/{database}", [], "nowhere.invalid"),
        ("127.0.0.1:{tcp}/{database}", [], "127.0.0.1"),
    ],
)
def test_a_database_that_cannot_be_had_is_one_line(
    house: ClickHouseServer, database: str, tmp_path: Path, address: str, flags: list[str], said: str
) -> None:
    url = "clickhouse://" + address.format(port=house.port, database=database, free=free_port(), tcp=house.at.tcp)
    with pytest.raises(AssertionError) as stop:
        ServerProcess(tmp_path, "-p", "0", "-I", "false", "-D", url, *flags)
    (line,) = str(stop.value).removeprefix("did not start: ").splitlines()
    assert line.startswith("ringoexp: error: clickhouse://") and said in line


@pytest.mark.parametrize(
    "made",
    [
        "CREATE TABLE {}.record (x UInt8) ENGINE = Memory",
        "CREATE TABLE {}.record (source UUID, sequence UInt64, value Int64, version UInt64) ENGINE = Memory",
        "CREATE VIEW {}.records AS SELECT 1",
    ],
)
def test_others_tables_are_left_alone(house: ClickHouseServer, database: str, made: str) -> None:
    house.ask(made.format(database))
    with pytest.raises(StoreError, match="of another program: name another database"):
        ClickHouse(parse(house.url(database)))
    assert len(house.ask(f"SHOW TABLES FROM {database}")) == 1


def test_tables_that_were_not_all_made_are_completed(house: ClickHouseServer, database: str) -> None:
    ClickHouse(parse(house.url(database))).close()
    for missing in (["ringoexp"], ["ringoexp", "records"]):
        for name in missing:
            house.ask(f"DROP TABLE {database}.{name}")
        ClickHouse(parse(house.url(database))).close()
    assert len(house.ask(f"SHOW TABLES FROM {database}")) == 3


def test_a_table_that_another_is_making_is_not_taken_for_somebody_elses(
    house: ClickHouseServer, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """18.16 lists it a moment before it has its definition."""
    ClickHouse(parse(house.url(database))).close()
    for name in ("ringoexp", "records"):
        house.ask(f"DROP TABLE {database}.{name}")
    tables, asked = clickhouse_tables._tables, []

    def early(asked_of: clickhouse_http.Server, of: str, seconds: float) -> dict[str, tuple[str, str, str]]:
        found = tables(asked_of, of, seconds)
        if not asked:
            engine, key, _ = found["record"]
            found["record"] = engine, key, ""
        asked.append(of)
        return found

    monkeypatch.setattr(clickhouse_tables, "_tables", early)
    ClickHouse(parse(house.url(database))).close()
    assert len(asked) == 2 and len(house.ask(f"SHOW TABLES FROM {database}")) == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["DROP TABLE {}.record"], "has no table record"),
        (["DROP TABLE {}.records"], "has no table records"),
        (["ALTER TABLE {}.record ADD COLUMN more UInt8"], "of another shape"),
        (["DROP TABLE {}.record", f"CREATE TABLE {{}}.record ({COLUMNS}) {BY_CHANCE}"], "of another shape"),
        (["DROP TABLE {}.ringoexp", f"CREATE VIEW {{}}.ringoexp AS {NEWER}"], "has version 2, this program knows 1"),
    ],
)
def test_tables_of_another_shape_are_refused_at_start_and_while_it_runs(
    opened: ClickHouse, house: ClickHouseServer, database: str, change: list[str], said: str
) -> None:
    opened.append(*block(0, 5))
    for statement in change:
        house.ask(statement.format(database))
    with pytest.raises(StoreError, match=said):
        ClickHouse(parse(house.url(database)))
    opened._known = None  # as after any failure
    for _ in range(2):
        with pytest.raises(StoreError, match=f"clickhouse://.*({said}|start again)"):
            opened.append(*block(5, 10))
    assert opened.stats().failed_commits == 2 and opened.stats().error


def test_tables_that_were_made_anew_are_not_taken_for_the_old_ones(
    opened: ClickHouse, house: ClickHouseServer, database: str
) -> None:
    house.ask(f"DROP DATABASE {database}")
    house.ask(f"CREATE DATABASE {database}")
    with pytest.raises(StoreError):
        opened.append(*block(0, 5))
    ClickHouse(parse(house.url(database))).close()
    with pytest.raises(StoreError, match="the tables are gone, or others"):
        opened.append(*block(0, 5))
    opened._error = None
    with pytest.raises(StoreError, match="the tables are gone, or others"):
        opened.check()


# The pace.


def test_the_first_record_goes_at_once_and_the_next_waits_out_the_second(
    opened: ClickHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clickhouse, "INTERVAL", 1.0)
    began = []
    insert = opened._insert

    def noted(rows: "array[int]", deadline: float) -> None:
        began.append((monotonic(), len(rows) // 5))
        insert(rows, deadline)

    monkeypatch.setattr(opened, "_insert", noted)
    start = monotonic()
    opened.append(*block(0, 1))
    others = [Blocked(lambda n=n: opened.append(*block(n, n + 1))) for n in range(1, 9)]
    for other in others:
        other.result()
    assert [records for _, records in began] == [1, 8]
    assert began[0][0] - start < 0.5 and 1.0 <= began[1][0] - began[0][0] < 3.0


def test_enough_records_do_not_wait(
    opened: ClickHouse, house: ClickHouseServer, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clickhouse, "INTERVAL", 60.0)
    monkeypatch.setattr(clickhouse, "MANY", 1000)
    opened.append(*block(0, 1))
    waiting = Blocked(lambda: opened.append(*block(1, 400)))
    assert waiting.still()
    opened.append(*block(400, 1100))
    waiting.result()
    assert opened.stats().commits == 2
    assert house.records(database) == expected(0, 1100)


def test_a_group_is_bounded(opened: ClickHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClickHouse, "MAX_GROUP_COST", 1000)
    waiting = [PendingBlock(*block(n, n + 600), 16) for n in range(5)]
    with opened._lock:
        opened._queue, opened._queued_cost = list(waiting), 3000
        assert [len(opened._next_group()) for _ in range(3)] == [2, 2, 1]
        assert opened._queued_cost == 0 and opened._queue == []


def test_a_large_block_is_one_part(opened: ClickHouse, house: ClickHouseServer, database: str) -> None:
    opened.append([Run(A, 0, 1_048_576)], array("q", range(1_048_576)))
    assert house.ask("SELECT count(), sum(value) FROM record", database) == [
        ["1048576", str(1_048_576 * 1_048_575 // 2)]
    ]
    parts = house.ask(f"SELECT rows FROM system.parts WHERE active AND database = '{database}'")
    assert parts == [["1048576"]]


# What can happen to an insert.


def test_an_answer_that_is_lost_does_not_double_a_record(
    house: ClickHouseServer, database: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clickhouse, "INTERVAL", 0.0)
    opened = ClickHouse(parse(house.url(database, proxy.port)))
    opened.append(*block(0, 5))
    proxy.hold(DOWN)
    call = Blocked(lambda: opened.append(*block(5, 1000)))
    eventually(lambda: house.ask("SELECT count() FROM record", database) == [["1000"]], "it is there")
    assert call.still()
    proxy.cut(reset=True)
    proxy.heal()
    call.result()
    assert house.ask("SELECT count() FROM record", database) == [["1995"]], "twice, in what has not been merged"
    assert house.records(database) == expected(0, 1000)
    assert opened.stats()[:4] == (1000, 0, 2, 0)
    opened.close()


@pytest.mark.parametrize("reset", [True, False])
def test_a_link_that_is_cut_in_the_middle_of_an_insert(
    house: ClickHouseServer, database: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, reset: bool
) -> None:
    monkeypatch.setattr(clickhouse, "INTERVAL", 0.0)
    rng = random.Random(seeded())
    opened = ClickHouse(parse(house.url(database, proxy.port)))
    for turn in range(5):
        proxy.cut_after(rng.randrange(400_000), UP, reset)
        opened.append(*block(10_000 * turn, 10_000 * turn + 10_000))
    assert proxy.cuts >= 4
    assert house.records(database) == expected(0, 50_000)
    opened.close()


def test_a_server_that_does_not_answer_is_given_up_and_the_records_with_it(
    house: ClickHouseServer,
    database: str,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    for name, value in (("INTERVAL", 0.0), ("GIVE_UP_SECONDS", 1.0), ("CHECK_SECONDS", 0.3), ("TRUST_SECONDS", 0.0)):
        monkeypatch.setattr(clickhouse, name, value)
    monkeypatch.setattr(clickhouse_tables, "ASK_SECONDS", 0.3)
    opened = ClickHouse(parse(house.url(database, proxy.port)))
    opened.append(*block(0, 5))
    proxy.hold(UP, DOWN)
    start = monotonic()
    with pytest.raises(StoreError, match=r"clickhouse://bob@127.0.0.1:\d+/\w+: no answer within"):
        opened.append(*block(5, 10))
    assert monotonic() - start < 4
    with pytest.raises(StoreError, match="no answer"):
        opened.check()
    assert "no answer" in (opened.stats().error or "")
    proxy.heal()
    opened.append(*block(5, 10))
    opened.check()
    assert opened.stats()[2:5] == (2, 1, None)
    assert house.records(database) == expected(0, 10)
    said = [record.getMessage() for record in caplog.records]
    assert [each for each in said if each.startswith("store_")] == ["store_failing", "store_ok"]
    opened.close()


def test_a_check_waits_no_longer_than_a_check_may(
    house: ClickHouseServer, database: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clickhouse, "CHECK_SECONDS", 0.3)
    monkeypatch.setattr(clickhouse_tables, "ASK_SECONDS", DEADLINE)
    opened = ClickHouse(parse(house.url(database, proxy.port)))
    proxy.hold(UP, DOWN)
    start = monotonic()
    with pytest.raises(StoreError, match="no answer"):
        opened.check()
    assert monotonic() - start < 4
    proxy.heal()
    opened.close()


def test_a_check_makes_nothing_good_while_records_are_tried_again(
    opened: ClickHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That takes longer than the doubt about the last insert, and an insert of nothing needs no quorum."""
    monkeypatch.setattr(clickhouse, "DOUBT_SECONDS", 0.0)
    monkeypatch.setattr(clickhouse, "TRUST_SECONDS", 0.0)
    tried, go = threading.Semaphore(0), threading.Semaphore(0)

    def insert(rows: "array[int]", deadline: float) -> None:
        tried.release()
        go.acquire(timeout=DEADLINE)
        raise RetryableError("no quorum")

    monkeypatch.setattr(opened, "_insert", insert)
    for error in (None, "no quorum"):
        call = Blocked(lambda: opened.append(*block(0, 5)))
        assert tried.acquire(timeout=DEADLINE)
        opened.check()
        assert (error or "") in (opened.stats().error or "") and bool(opened.stats().error) == bool(error)
        go.release()
        with pytest.raises(StoreError, match="no quorum"):
            call.result()
    opened.check()
    assert opened.stats().error is None


def test_an_insert_that_fails_is_told_while_it_is_tried_again(
    opened: ClickHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clickhouse, "TRUST_SECONDS", 0.0)
    server, healed = opened._servers[0], threading.Event()
    post = server.post

    def failing(sql: str, body: bytes, *more: Any) -> bytes:
        if body and not healed.is_set():
            raise RetryableError(f"{server.name}: no quorum")
        return post(sql, body, *more)

    monkeypatch.setattr(server, "post", failing)
    call = Blocked(lambda: opened.append(*block(0, 5)))
    eventually(lambda: "no quorum" in (opened.stats().error or ""))
    opened.check()
    assert call.still() and "no quorum" in (opened.stats().error or "")
    healed.set()
    call.result()
    assert opened.stats()[2:5] == (1, 0, None)


def test_records_that_waited_for_an_insert_that_failed_are_tried_for_less(
    opened: ClickHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their link has no patience for as long a time once more."""
    left: list[float] = []
    monkeypatch.setattr(opened, "_insert", lambda rows, deadline: left.append(deadline - monotonic()))
    for waited in (0, 10, 20):
        opened.append(*block(0, 5))
        waiting = PendingBlock(*block(0, 5), 16)
        waiting.arrived_at -= waited
        with opened._lock:
            opened._turn = Turn.COMMIT
        opened._commit([waiting, PendingBlock(*block(5, 10), 16)])
    assert [round(each) for each in left] == [20, 20, 20, 10, 20, 8]


def test_what_it_takes_to_look_again_is_part_of_the_time_of_an_insert(
    opened: ClickHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, given = opened._known, []
    assert known

    def slowly(server: clickhouse_http.Server) -> clickhouse_tables.Tables:
        eventually(lambda: monotonic() - start > 1)
        return known

    def post(sql: str, body: memoryview, seconds: float, settings: object) -> bytes:
        given.append(seconds)
        return b""

    monkeypatch.setattr(opened, "_look_again", slowly)
    monkeypatch.setattr(opened._servers[0], "post", post)
    opened._known = None
    opened._sized_at = start = monotonic()
    opened.append(*block(0, 5))
    assert given[0] <= clickhouse.GIVE_UP_SECONDS - 1


def test_too_many_parts_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program()
    monkeypatch.setattr(clickhouse, "INTERVAL", 0.0)
    few = "<merge_tree><parts_to_delay_insert>3</parts_to_delay_insert><parts_to_throw_insert>3</parts_to_throw_insert>"
    house = ClickHouseServer(tmp_path / "clickhouse", extra=f"{few}</merge_tree>")
    try:
        database = house.database()
        opened = ClickHouse(parse(house.url(database)))
        house.ask("SYSTEM STOP MERGES")
        said: list[str] = []
        monkeypatch.setattr(clickhouse.log, "debug", lambda *said_of, **more: said.append(str(said_of)))
        for n in range(3):
            opened.append(*block(n, n + 1))
        call = Blocked(lambda: opened.append(*block(3, 4)))
        eventually(lambda: any("(code 252)" in each for each in said), "too many parts")
        assert call.still()
        house.ask("SYSTEM START MERGES")
        house.ask(f"OPTIMIZE TABLE {database}.record FINAL")
        call.result()
        assert house.records(database) == expected(0, 4)
        opened.close()
    finally:
        house.kill()


class Scripted:
    """Answers requests over HTTP with what it is told, one after the other."""

    def __init__(self, *answers: bytes) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._answers = answers
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        for answer in self._answers:
            peer, _ = self._listener.accept()
            with peer:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += peer.recv(65536)
                peer.sendall(answer)

    def __enter__(self) -> "Scripted":
        return self

    def __exit__(self, *unused: object) -> None:
        self._listener.close()
        self._thread.join(DEADLINE)


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\nCode: 241. DB::Exception: no!\n",
            RetryableError,
            r"no! \(code 241\)",
        ),
        (
            b"HTTP/1.1 200 OK\r\nX-ClickHouse-Exception-Code: 62\r\nContent-Length: 0\r\n\r\n",
            PermanentError,
            r"code 62",
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\n", RetryableError, "IncompleteRead"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc", RetryableError, "IncompleteRead"),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy", RetryableError, "answered 503: busy"),
        (b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n", PermanentError, "answered 403"),
        (
            b"HTTP/1.1 404 No\r\nContent-Length: 35\r\n\r\nCode: 999, e.displayText() = keeper",
            RetryableError,
            "keeper .code 999",
        ),
        (b"SSH-2.0\r\n", RetryableError, "SSH"),
        (b"", RetryableError, "closed"),
    ],
)
def test_only_a_whole_answer_that_is_no_error_is_one(answer: bytes, kind: type[Exception], said: str) -> None:
    with Scripted(answer) as scripted:
        target = parse(f"clickhouse://127.0.0.1:{scripted.port}/d")
        asked = clickhouse_http.Server(target, *target.hosts[0])
        with pytest.raises(kind, match=said) as error:
            asked.post("INSERT", b"", 5)
        asked.close()
        assert "\n" not in str(error.value)


def test_a_kept_connection_that_the_server_has_closed_is_made_anew(
    opened: ClickHouse, house: ClickHouseServer, database: str
) -> None:
    opened.append(*block(0, 5))
    connection = opened._servers[0]._connection
    assert connection and connection.sock
    connection.sock.shutdown(socket.SHUT_RDWR)
    opened.append(*block(5, 10))
    assert house.records(database) == expected(0, 10) and opened.stats().failed_commits == 0


def test_two_consumers_share_a_database(house: ClickHouseServer, database: str, tmp_path: Path) -> None:
    """Made at the same time, they are one; a record that both are sent is shown once, with its first value."""
    calls = [Blocked(lambda: ClickHouse(parse(house.url(database)))) for _ in range(4)]
    stores = [call.result() for call in calls]
    assert len({each.identity for each in stores}) == 1
    for n, each in enumerate(stores):
        each.append([Run(A, 10 * n, 20)], array("q", [n] * 20))
    values = [value for _, value in sorted(house.records(database).items())]
    assert values == [0] * 20 + [1] * 10 + [2] * 10 + [3] * 10
    for each in stores:
        each.close()
    urls = ["-D", house.url(database)]
    with (
        server(tmp_path, "-p", "0", "-I", "false", *urls) as one,
        server(tmp_path, "-p", "0", "-I", "false", *urls) as two,
    ):
        told = [json.loads(each.get("/v1.0/ready")[2]) for each in (one, two)]
        assert told == [{"ready": True, "store": stores[0].identity}] * 2


def test_a_clock_that_goes_back_does_not_make_a_later_value_the_first(
    opened: ClickHouse, house: ClickHouseServer, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([10**18, 9 * 10**17])
    monkeypatch.setattr(clickhouse.time, "time_ns", lambda: next(now))
    opened.append([Run(A, 0, 5)], array("q", [1] * 5))
    opened.append([Run(A, 0, 6)], array("q", [2] * 6))
    assert sorted(house.records(database).values()) == [1, 1, 1, 1, 1, 2]


def test_tls(house: ClickHouseServer, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's server is behind a proxy that speaks it; its authority is one of the system's, by SSL_CERT_FILE."""
    authority = Authority(tmp_path)
    pair = authority.issue()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert, pair.key)
    done = threading.Event()
    threads: list[threading.Thread] = []

    def pump(one: socket.socket, other: socket.socket) -> None:
        try:
            while data := one.recv(65536):
                other.sendall(data)
        except OSError:
            pass
        for each in (one, other):
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def accept() -> None:
        while not done.is_set():
            try:
                peer, _ = listener.accept()
                front = stack.enter_context(context.wrap_socket(peer, server_side=True))
            except OSError:
                continue
            back = stack.enter_context(socket.create_connection(("127.0.0.1", house.port)))
            for pair in ((front, back), (back, front)):
                threads.append(threading.Thread(target=pump, args=pair))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as stack:
        listener.settimeout(0.1)
        acceptor = threading.Thread(target=accept)
        acceptor.start()
        url = house.url(database, listener.getsockname()[1]).replace("clickhouse:", "clickhouses:")
        try:
            with pytest.raises(StoreError, match="certificate"):
                ClickHouse(parse(url))
            monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca))
            opened = ClickHouse(parse(url))
            opened.append(*block(0, 1000))
            opened.close()
        finally:
            done.set()
            acceptor.join(DEADLINE)
            for thread in threads:
                thread.join(DEADLINE)
    assert house.records(database) == expected(0, 1000)
    monkeypatch.setattr(clickhouse_http, "CONNECT_TIMEOUT", 0.5)
    with pytest.raises(StoreError, match="does not speak TLS|no answer"):  # it may wait for more
        ClickHouse(parse(house.url(database).replace("clickhouse:", "clickhouses:")))


# A current engine.


def test_a_current_server_gets_what_it_knows(today: NewClickHouse, caplog: pytest.LogCaptureFixture) -> None:
    database = today.database()
    opened = ClickHouse(parse(today.url(database)), retain=0.5)
    assert opened.power_safe and not caplog.records
    known = opened._known
    assert known and known.token and known.settings["async_insert"] == "0"
    ((made,),) = today.ask(f"SELECT engine_full FROM system.tables WHERE database = '{database}' AND name = 'record'")
    assert "fsync_after_insert = 1" in made and "fsync_part_directory = 1" in made and "toIntervalSecond(43200)" in made
    opened.append(*block(0, 5))
    opened.close()
    again = ClickHouse(parse(today.url(database)), retain=1.0)
    assert again.identity == opened.identity
    again.close()
    ((made,),) = today.ask(f"SELECT engine_full FROM system.tables WHERE database = '{database}' AND name = 'record'")
    assert "toIntervalSecond(86400)" in made
    assert today.records(database) == expected(0, 5)


def test_what_is_too_old_is_deleted(today: NewClickHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    database = today.database()
    opened = ClickHouse(parse(today.url(database)), retain=1.0)
    opened.append(*block(0, 5))
    monkeypatch.setattr(clickhouse.time, "time_ns", lambda: 10**18)
    opened._last_ns = 0
    opened.append(*block(5, 10))
    today.ask("OPTIMIZE TABLE record FINAL", database)
    assert today.records(database) == expected(0, 5)
    opened.close()


# Whole processes.


def acked_is_stored(load: Load, records: Callable[[], dict[tuple[str, int], int]]) -> None:
    """Fails when something acked is not shown, or not as it was sent."""
    acked = load.acked()  # before the database is read
    found = records()
    for source, count in acked.items():
        missing = [n for n in range(count) if found.get((str(source), n)) != load.sent[source][n]]
        assert not missing, f"{source}: {missing[:5]} are acked and not stored"
    for (source, n), value in found.items():
        assert load.sent[uuid.UUID(source)][n] == value


@pytest.mark.parametrize("role", [["-I", "false"], ["-T", "0", "-r", "100000"]], ids=["consumer", "own consumer"])
def test_a_server_killed_in_mid_load_and_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: list[str]
) -> None:
    program()
    short_times(monkeypatch)
    monkeypatch.setattr("ringolib.client.producer.STALL_TIMEOUT", 5.0)
    house = ClickHouseServer(tmp_path / "clickhouse")
    try:
        database = house.database()
        patch = (
            f"{SHORT_TIMES}; storage.clickhouse.store.INTERVAL = 0.1; storage.clickhouse.store.GIVE_UP_SECONDS = 1.0"
        )
        with server(tmp_path, "-p", "0", *role, "-D", house.url(database), patch=patch) as running:
            with Load(running.url, random.Random(seeded())) as load:
                for _ in range(3):
                    load.goes_on()
                    house.kill()
                    eventually(lambda: not_ready(running) == ["store_failing"])
                    house.start()
                    acked_is_stored(load, lambda: house.records(database))
                load.goes_on()
                load.finish()
                acked_is_stored(load, lambda: house.records(database))
                assert len(house.records(database)) == sum(map(len, load.sent.values()))
            assert running.stop() == 0
    finally:
        house.kill()


def test_a_consumer_killed_in_mid_load_and_started_again(
    house: ClickHouseServer, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_times(monkeypatch)
    monkeypatch.setattr("ringolib.client.producer.STALL_TIMEOUT", 5.0)
    port = free_port()
    flags = ["-p", str(port), "-I", "false", "-D", house.url(database)]
    patch = "storage.clickhouse.store.INTERVAL = 0.1"
    running = ServerProcess(tmp_path, *flags, patch=patch)
    try:
        with Load(running.url, random.Random(seeded())) as load:
            for _ in range(3):
                load.goes_on()
                running.send_signal(signal.SIGKILL)
                running.kill()
                acked_is_stored(load, lambda: house.records(database))
                running = ServerProcess(tmp_path, *flags, patch=patch)
            load.finish()
            acked_is_stored(load, lambda: house.records(database))
            assert len(house.records(database)) == sum(map(len, load.sent.values()))
    finally:
        running.kill()


def test_a_consumer_that_acks_what_it_has_not_inserted_is_found_out(
    house: ClickHouseServer, database: str, tmp_path: Path
) -> None:
    no_insert = "lambda self, rows, deadline: None"
    patch = f"storage.clickhouse.store.INTERVAL = 0.1; storage.clickhouse.store.ClickHouse._insert = {no_insert}"
    with server(tmp_path, "-p", "0", "-I", "false", "-D", house.url(database), patch=patch) as running:
        with Load(running.url, random.Random(1), 1) as load:
            load.goes_on()
            with pytest.raises(AssertionError, match="acked and not stored"):
                acked_is_stored(load, lambda: house.records(database))


# Clusters.


@pytest.fixture
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    need_zookeeper()
    made = Cluster(tmp_path / "cluster", request.param)
    yield made
    made.kill()


@pytest.mark.parametrize("cluster", [[1, 1]], indirect=True, ids=["two shards"])
def test_records_are_spread_over_shards_and_each_is_shown_once(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clickhouse, "INTERVAL", 0.0)
    database = cluster.database()
    opened = ClickHouse(parse(cluster.url(database)), cluster.name)
    rng = random.Random(seeded())
    sources = [rng.randbytes(16) for _ in range(20)]
    model = {}
    for turn in range(4):
        runs = [Run(source, 1000 * turn - 500 * (turn > 0), 1000) for source in sources]
        values = array("q", rng.randbytes(8 * 1000 * len(runs)))
        opened._at = turn % 2  # by either server, also what is sent again
        opened._known = None
        opened.append(runs, values)
        for at, run in enumerate(runs):
            for n in range(run.count):
                model.setdefault((str(uuid.UUID(bytes=run.source)), run.first + n), values[1000 * at + n])
    for each in cluster.servers:
        assert each.records(database) == model
        assert int(each.ask("SELECT count() FROM record", database)[0][0]) > 1000, "each has some"
    opened._measure(opened._servers[0])
    assert opened._records >= len(model)
    opened.close()
    with pytest.raises(StoreError, match="belongs to a cluster: name it with --clickhouse_cluster"):
        ClickHouse(parse(cluster.url(database)))


@pytest.mark.parametrize("cluster", [[1, 1]], indirect=True, ids=["two shards"])
@pytest.mark.parametrize("hangs", [True, False])
def test_another_host_takes_over(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, hangs: bool) -> None:
    """The first one hangs, or is not there: as the shards are the same by way of the other, a block may go there."""
    monkeypatch.setattr(clickhouse, "INTERVAL", 0.0)
    monkeypatch.setattr(clickhouse, "GIVE_UP_SECONDS", 6.0)
    monkeypatch.setattr(clickhouse_http, "CONNECT_TIMEOUT", 0.5)
    monkeypatch.setattr(clickhouse_tables, "ASK_SECONDS", 0.5)
    monkeypatch.setattr(clickhouse, "TRUST_SECONDS", 0.0)
    database = cluster.database()
    first, second = cluster.servers
    with Proxy(first.port) as between:
        url = cluster.url(database).replace(f":{first.port},", f":{between.port},")
        opened = ClickHouse(parse(url), cluster.name)
        opened.append(*block(0, 5000))
        if hangs:
            between.hold(UP, DOWN)
        else:
            between.target = free_port()
            between.cut(reset=True)
        opened.check()
        start = monotonic()
        opened.append(*block(2500, 7500))
        assert monotonic() - start < 5
        opened.append(*block(7500, 10_000))
        assert opened.stats()[3:5] == (0, None) and opened._at == 1
        opened.close()
    assert second.records(database) == expected(0, 10_000)


@pytest.mark.parametrize("cluster", [[3]], indirect=True, ids=["three replicas"])
def test_a_replica_is_killed_in_mid_load(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Acked is on two: with one of three dead the load goes on, by another, and nothing acked is missing there."""
    short_times(monkeypatch)
    monkeypatch.setattr("ringolib.client.producer.STALL_TIMEOUT", 20.0)
    database = cluster.database()
    patch = "storage.clickhouse.store.INTERVAL = 0.2"
    flags = ["-p", "0", "-I", "false", "-D", cluster.url(database), "--clickhouse_cluster", cluster.name]
    with server(tmp_path, *flags, patch=patch) as running:
        assert running.stats()["powerSafe"] is True
        with Load(running.url, random.Random(seeded())) as load:
            load.goes_on()
            cluster.servers[0].kill()
            load.goes_on()
            load.finish()
            for each in cluster.servers[1:]:
                eventually(lambda each=each: _caught_up(each, database), "it has what the other has")
                acked_is_stored(load, lambda each=each: each.records(database, "record FINAL"))
                assert len(each.records(database)) == sum(map(len, load.sent.values()))
            cluster.servers[0].start()
            eventually(lambda: _caught_up(cluster.servers[0], database), "it has what the others have")
            acked_is_stored(load, lambda: cluster.servers[0].records(database, "record FINAL"))
        assert running.stop() == 0


def _caught_up(house: ClickHouseServer, database: str) -> bool:
    rows = house.ask(
        "SELECT is_readonly, is_session_expired, queue_size, absolute_delay FROM system.replicas "
        f"WHERE database = '{database}'"
    )
    return rows == [["0", "0", "0", "0"]]
