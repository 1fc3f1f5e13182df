"""The store on ClickHouse under load, while servers, consumers and replicas are killed or cut off.

Against Debian's 18.16: a server, shards and replicas as processes.
"""

import random
import signal
import uuid
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic

import pytest
from support.checks import SHORT_TIMES, Load, short_times
from support.clickhouses import (
    ClickHouseServer,
    Cluster,
    block,
    block_records,
    clickhouse_server,
    need_zookeeper,
)
from support.harness import ServerProcess, eventually, free_port, not_ready, seeded, server
from support.proxy import DOWN, UP, Proxy

from ringolib.client import outbox
from ringolib.storage.clickhouse import http, schema, store
from ringolib.storage.clickhouse.store import ClickHouse
from ringolib.storage.clickhouse.url import parse_url
from ringolib.storage.interface import StoreError
from ringolib.wire import Run

FREQUENT_INSERTS = "storage.clickhouse.store.INSERT_INTERVAL_SECONDS = 0.1"


@pytest.fixture(scope="module")
def clickhouse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClickHouseServer]:
    with clickhouse_server(tmp_path_factory.mktemp("clickhouse")) as running:
        yield running


@pytest.fixture
def database(clickhouse: ClickHouseServer) -> str:
    return clickhouse.create_database()


def acked_is_stored(load: Load, records: Callable[[], dict[tuple[str, int], int]]) -> None:
    """Fail if the database lacks an acked record, or shows another value than the one sent."""
    acked = load.acked()  # before the database is read
    stored = records()
    for source, count in acked.items():
        missing = [n for n in range(count) if stored.get((str(source), n)) != load.sent[source][n]]
        assert not missing, f"{source}: {missing[:5]} are acked and not stored"
    for (source, n), value in stored.items():
        assert load.sent[uuid.UUID(source)][n] == value


@pytest.mark.parametrize("role", [["-I", "false"], ["-T", "0", "-r", "100000"]], ids=["consumer", "own consumer"])
def test_killed_server_loses_no_acked_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: list[str]) -> None:
    short_times(monkeypatch)
    monkeypatch.setattr(outbox, "STALL_TIMEOUT", 5.0)
    patch = f"{SHORT_TIMES}; {FREQUENT_INSERTS}; storage.clickhouse.store.INSERT_TIMEOUT_SECONDS = 1.0"
    with clickhouse_server(tmp_path / "clickhouse") as clickhouse:
        database = clickhouse.create_database()
        with server(tmp_path, "-p", "0", *role, "-D", clickhouse.url(database), patch=patch) as process:
            with Load(process.url, random.Random(seeded())) as load:
                for _ in range(3):
                    load.goes_on()
                    clickhouse.kill()
                    eventually(lambda: not_ready(process) == ["store_failing"])
                    clickhouse.start()
                    acked_is_stored(load, lambda: clickhouse.records(database))
                load.goes_on()
                load.finish()
                acked_is_stored(load, lambda: clickhouse.records(database))
                assert len(clickhouse.records(database)) == sum(map(len, load.sent.values()))
            assert process.stop() == 0


def test_killed_consumer_loses_no_acked_record(
    clickhouse: ClickHouseServer, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_times(monkeypatch)
    monkeypatch.setattr(outbox, "STALL_TIMEOUT", 5.0)
    port = free_port()
    flags = ["-p", str(port), "-I", "false", "-D", clickhouse.url(database)]
    process = ServerProcess(tmp_path, *flags, patch=FREQUENT_INSERTS)
    try:
        with Load(process.url, random.Random(seeded())) as load:
            for _ in range(3):
                load.goes_on()
                process.send_signal(signal.SIGKILL)
                process.kill()
                acked_is_stored(load, lambda: clickhouse.records(database))
                process = ServerProcess(tmp_path, *flags, patch=FREQUENT_INSERTS)
            load.finish()
            acked_is_stored(load, lambda: clickhouse.records(database))
            assert len(clickhouse.records(database)) == sum(map(len, load.sent.values()))
    finally:
        process.kill()


def test_consumer_that_acks_without_inserting_is_detected(
    clickhouse: ClickHouseServer, database: str, tmp_path: Path
) -> None:
    no_insert = "lambda self, rows, deadline: None"
    patch = f"{FREQUENT_INSERTS}; storage.clickhouse.store.ClickHouse._insert = {no_insert}"
    with server(tmp_path, "-p", "0", "-I", "false", "-D", clickhouse.url(database), patch=patch) as process:
        with Load(process.url, random.Random(1), 1) as load:
            load.goes_on()
            with pytest.raises(AssertionError, match="acked and not stored"):
                acked_is_stored(load, lambda: clickhouse.records(database))


# Clusters.


@pytest.fixture
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    """A cluster with the shards and replicas that the test's parameter names."""
    need_zookeeper()
    servers = Cluster(tmp_path / "cluster", request.param)
    yield servers
    servers.kill()


@pytest.mark.parametrize("cluster", [[1, 1]], indirect=True, ids=["two shards"])
def test_records_are_spread_over_shards_without_duplicates(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "INSERT_INTERVAL_SECONDS", 0.0)
    database = cluster.create_database()
    storage = ClickHouse(parse_url(cluster.url(database)), cluster.name)
    rng = random.Random(seeded())
    sources = [rng.randbytes(16) for _ in range(20)]
    model = {}
    for turn in range(4):
        runs = [Run(source, 1000 * turn - 500 * (turn > 0), 1000) for source in sources]
        values = array("q", rng.randbytes(8 * 1000 * len(runs)))
        storage._current = turn % 2  # by either server, repeated records too
        storage._tables = None
        storage.append(runs, values)
        for at, run in enumerate(runs):
            for n in range(run.count):
                model.setdefault((str(uuid.UUID(bytes=run.source)), run.first + n), values[1000 * at + n])
    for replica in cluster.servers:
        assert replica.records(database) == model
        assert int(replica.query("SELECT count() FROM record", database)[0][0]) > 1000, "each shard has some"
    storage._measure(storage._servers[0])
    assert storage._records >= len(model)
    storage.close()
    with pytest.raises(StoreError, match="belongs to a cluster: set --clickhouse_cluster"):
        ClickHouse(parse_url(cluster.url(database)))


@pytest.mark.parametrize("cluster", [[1, 1]], indirect=True, ids=["two shards"])
@pytest.mark.parametrize("hangs", [True, False])
def test_insert_fails_over_to_another_host(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, hangs: bool) -> None:
    """The first host hangs or refuses connections. The same shards are reached through the second one."""
    monkeypatch.setattr(store, "INSERT_INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(store, "INSERT_TIMEOUT_SECONDS", 6.0)
    monkeypatch.setattr(http, "CONNECT_TIMEOUT", 0.5)
    monkeypatch.setattr(schema, "QUERY_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(store, "SUCCESS_VALID_SECONDS", 0.0)
    database = cluster.create_database()
    first, second = cluster.servers
    with Proxy(first.port) as between:
        url = cluster.url(database).replace(f":{first.port},", f":{between.port},")
        storage = ClickHouse(parse_url(url), cluster.name)
        storage.append(*block(0, 5000))
        if hangs:
            between.hold(UP, DOWN)
        else:
            between.target = free_port()
            between.cut(reset=True)
        storage.check()
        start = monotonic()
        storage.append(*block(2500, 7500))
        assert monotonic() - start < 5
        storage.append(*block(7500, 10_000))
        assert storage.stats()[3:5] == (0, None) and storage._current == 1
        storage.close()
    assert second.records(database) == block_records(0, 10_000)


@pytest.mark.parametrize("cluster", [[3]], indirect=True, ids=["three replicas"])
def test_killed_replica_loses_no_acked_record(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Acked records are on two replicas: if one of three is killed, the load goes on and the others have them all."""
    short_times(monkeypatch)
    monkeypatch.setattr(outbox, "STALL_TIMEOUT", 20.0)
    database = cluster.create_database()
    flags = ["-p", "0", "-I", "false", "-D", cluster.url(database), "--clickhouse_cluster", cluster.name]
    with server(tmp_path, *flags, patch=FREQUENT_INSERTS) as process:
        assert process.stats()["powerSafe"] is True
        with Load(process.url, random.Random(seeded())) as load:
            load.goes_on()
            cluster.servers[0].kill()
            load.goes_on()
            load.finish()
            for replica in cluster.servers[1:]:
                eventually(lambda replica=replica: _caught_up(replica, database), "the replica caught up")
                acked_is_stored(load, lambda replica=replica: replica.records(database, "record FINAL"))
                assert len(replica.records(database)) == sum(map(len, load.sent.values()))
            cluster.servers[0].start()
            eventually(lambda: _caught_up(cluster.servers[0], database), "the replica caught up")
            acked_is_stored(load, lambda: cluster.servers[0].records(database, "record FINAL"))
        assert process.stop() == 0


def _caught_up(clickhouse: ClickHouseServer, database: str) -> bool:
    """True if a replica is connected and has no records left to fetch."""
    rows = clickhouse.query(
        "SELECT is_readonly, is_session_expired, queue_size, absolute_delay FROM system.replicas "
        f"WHERE database = '{database}'"
    )
    return rows == [["0", "0", "0", "0"]]
