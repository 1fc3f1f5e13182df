"""The tables in ClickHouse: made if they are missing, looked at if not, and how to insert into them safely there.

Asks each server what it knows before anything is used of it: an unknown setting is an error, and versions from 18.16
on have to do. Functions only; no thread runs here.

A record is a row of `record`, (source, sequence, value, version). `version` is LATEST less the nanosecond it arrived,
so that ReplacingMergeTree, which keeps the row with the largest, keeps the first to arrive. Merges do that some time;
the view `records` reads FINAL, as if they had.

The view `ringoexp` has the database's identity in its definition: of two that make it at the same time one wins,
without a row that both could insert.
"""

import re
import uuid
from collections.abc import Mapping
from typing import NamedTuple

from ringolib.storage.clickhouse.http import PermanentError, Server

SCHEMA_VERSION = 1
LATEST = 2**63 - 1
DDL_SECONDS = 60.0
ASK_SECONDS = 5.0
SPREAD = 1_048_576
"""Records of a source that go to the same shard, before the next ones may go to another."""
_COLUMNS = [["source", "UUID"], ["sequence", "UInt64"], ["value", "Int64"], ["version", "UInt64"]]
_KEY = "source, sequence"


class Tables(NamedTuple):
    """What one server has, and how it is used there."""

    identity: str  # a UUID, the database's
    insert: str  # the statement that the rows follow
    settings: Mapping[str, str]  # to go with it
    token: bool  # an insert may have a token by which it is known again
    shared: bool  # the same records are to be had, and to be inserted, at the other hosts too
    power_safe: bool  # what is inserted is synced to disk, or on two machines, before it says so
    expires: str | None  # the table's TTL


def quoted(name: str) -> str:
    """A name as an identifier."""
    return "`" + name.replace("\\", "\\\\").replace("`", "\\`") + "`"


def text(value: str) -> str:
    """A text as a literal."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def look(server: Server, database: str, cluster: str | None, seconds: float | None = None) -> Tables | None:
    """What there is; None if there is nothing yet. Waits `seconds` for each answer, or ASK_SECONDS.

    Raises RetryableError, or PermanentError, also for tables of another shape.
    """
    seconds = seconds or ASK_SECONDS
    found = _tables(server, database, seconds)
    if "ringoexp" not in found:  # the last to be made: perhaps they are being made, or who did it was killed
        if found and not ("record" in found and _ours(server, database, seconds, *found["record"], begun=True)):
            taken = sorted(found)[0]
            raise PermanentError(
                f"{server.name}: {database} has a table {taken} of another program: name another database"
            )
        return None
    inserted = "record_all" if cluster else "record"
    for name in ("record", inserted, "records"):
        if name not in found:
            hint = "it was made without --clickhouse_cluster" if name == "record_all" and "record" in found else ""
            raise PermanentError(
                f"{server.name}: {database} has no table {name}: {hint or 'restore it, or name another one'}"
            )
    if not cluster and "record_all" in found:
        raise PermanentError(f"{server.name}: {database} belongs to a cluster: name it with --clickhouse_cluster")
    engine, key, made = found["record"]
    if not _ours(server, database, seconds, engine, key, made):
        raise PermanentError(
            f"{server.name}: the table record in {database} is of another shape: name another database"
        )
    ((identity, schema),) = server.rows(f"SELECT toString(identity), schema FROM {quoted(database)}.ringoexp", seconds)
    if int(schema) > SCHEMA_VERSION:
        raise PermanentError(
            f"{server.name}: {database} has version {schema}, this program knows {SCHEMA_VERSION}: use a newer"
        )
    replicated = engine.startswith("Replicated")
    replicas = _replicas(server, database, cluster, seconds) if replicated else 1
    settings, token = _settings(server, replicas, seconds)
    synced = all(re.search(rf"\b{name} = 1\b", made) for name in ("fsync_after_insert", "fsync_part_directory"))
    expires = re.search(r"\bTTL (.*?)(?: SETTINGS |$)", made)
    return Tables(
        identity,
        f"INSERT INTO {quoted(database)}.{inserted} (source, sequence, value, version) FORMAT RowBinary",
        settings,
        token,
        replicated or bool(cluster),
        synced or "insert_quorum" in settings,
        expires[1] if expires else None,
    )


def make(server: Server, database: str, cluster: str | None) -> None:
    """Makes what is missing, on all servers of the cluster, if there is one. Raises RetryableError or PermanentError."""
    if cluster:
        clusters = {name for (name,) in server.rows("SELECT cluster FROM system.clusters", ASK_SECONDS)}
        if cluster not in clusters:
            listed = ", ".join(sorted(clusters)) or "none"
            raise PermanentError(f"--clickhouse_cluster {cluster}: {server.name} knows no such cluster, but {listed}")
        macros = {name for (name, _) in server.rows("SELECT macro, substitution FROM system.macros", ASK_SECONDS)}
        if missing := sorted({"shard", "replica"} - macros):
            raise PermanentError(
                f"{server.name}: its configuration has no macro {missing[0]}, which replicated tables need"
            )
    on = f" ON CLUSTER {quoted(cluster)}" if cluster else ""
    within = quoted(database)
    known = {name for (name,) in server.rows("SELECT name FROM system.merge_tree_settings", ASK_SECONDS)}
    safe = [f"{name} = 1" for name in ("fsync_after_insert", "fsync_part_directory") if name in known]
    engine = "ReplacingMergeTree(version)"
    if cluster:
        path = text(f"/clickhouse/tables/{{shard}}/{database}/record")
        engine = f"ReplicatedReplacingMergeTree({path}, '{{replica}}', version)"
    columns = ", ".join(" ".join(column) for column in _COLUMNS)
    statements = [
        f"CREATE TABLE IF NOT EXISTS {within}.record{on} ({columns}) ENGINE = {engine} ORDER BY ({_KEY})"
        + (f" SETTINGS {', '.join(safe)}" if safe else "")
    ]
    if cluster:
        statements.append(
            f"CREATE TABLE IF NOT EXISTS {within}.record_all{on} ({columns}) ENGINE = Distributed({quoted(cluster)}, "
            f"{within}, record, sipHash64(toString(source), intDiv(sequence, {SPREAD})))"
        )
    statements += [
        f"CREATE VIEW IF NOT EXISTS {within}.records{on} AS SELECT source, sequence, value, "
        f"intDiv({LATEST} - version, 1000000) AS received_at_ms FROM {within}.record{'_all' if cluster else ''} FINAL",
        # Last: it says that the others are there.
        f"CREATE VIEW IF NOT EXISTS {within}.ringoexp{on} AS "
        f"SELECT toUUID('{uuid.uuid4()}') AS identity, {SCHEMA_VERSION} AS schema",
    ]
    for statement in statements:
        server.post(statement, b"", DDL_SECONDS)


def expire(server: Server, database: str, cluster: str | None, tables: Tables, days: float) -> None:
    """Has records deleted that many days after they came, some time. Raises RetryableError or PermanentError."""
    ((version,),) = server.rows("SELECT version()", ASK_SECONDS)
    numbers = [int(number) for number in re.findall(r"\d+", version)[:2]]
    if numbers < [19, 6]:
        raise PermanentError(f"--retain {days:g}: {server.name} is ClickHouse {version}, it needs 19.6 or newer")
    ttl = f"toDateTime(intDiv({LATEST} - version, 1000000000)) + toIntervalSecond({round(days * 86400)})"
    if tables.expires == ttl:
        return
    on = f" ON CLUSTER {quoted(cluster)}" if cluster else ""
    server.post(f"ALTER TABLE {quoted(database)}.record{on} MODIFY TTL {ttl}", b"", DDL_SECONDS)


def _ours(server: Server, database: str, seconds: float, engine: str, key: str, made: str, begun: bool = False) -> bool:
    """Whether the table `record` has our shape; with `begun`, so far: 18.16 lists a table before its definition."""
    columns = server.rows(
        f"SELECT name, type FROM system.columns WHERE database = {text(database)} AND table = 'record'", seconds
    )
    version = re.search(r"ReplacingMergeTree\((?:'[^']*', *'[^']*', *)?version\)", made)
    begun = begun and engine.endswith("ReplacingMergeTree") and not made
    return columns == _COLUMNS and key == _KEY and (version is not None or begun)


def _tables(server: Server, database: str, seconds: float) -> dict[str, tuple[str, str, str]]:
    """Engine, sorting key and definition of the tables there are, by name. Raises PermanentError when there is no database."""
    rows = server.rows(
        "SELECT name, engine, sorting_key, engine_full FROM system.tables "
        f"WHERE database = {text(database)} AND name IN ('ringoexp', 'record', 'record_all', 'records')",
        seconds,
    )
    return {name: (engine, key, made) for name, engine, key, made in rows}


def _replicas(server: Server, database: str, cluster: str | None, seconds: float) -> int:
    """How many replicas the table is to have, for each shard."""
    if cluster:
        sql = f"SELECT max(replica_num) FROM system.clusters WHERE cluster = {text(cluster)}"
    else:
        sql = f"SELECT max(total_replicas) FROM system.replicas WHERE database = {text(database)} AND table = 'record'"
    ((count,),) = server.rows(sql, seconds)
    return int(count)


def _settings(server: Server, replicas: int, seconds: float) -> tuple[dict[str, str], bool]:
    """The settings of a safe insert, as far as the server knows them; and whether it knows tokens."""
    wanted = {
        "async_insert": "0",
        "insert_distributed_sync": "1",
        "distributed_foreground_insert": "1",  # the same, renamed
        # One insert, one part: a whole block is read before it is cut.
        "max_insert_block_size": "2097152",
        "min_insert_block_size_rows": "2097152",
        "min_insert_block_size_bytes": "536870912",
    }
    names = [*wanted, "insert_quorum", "insert_quorum_timeout", "insert_quorum_parallel", "insert_deduplication_token"]
    listed = ", ".join(text(name) for name in names)
    known = {name for (name,) in server.rows(f"SELECT name FROM system.settings WHERE name IN ({listed})", seconds)}
    settings = {name: value for name, value in wanted.items() if name in known}
    if "distributed_foreground_insert" in known:
        settings.pop("insert_distributed_sync", None)
    token = "insert_deduplication_token" in known
    if replicas > 1 and "insert_quorum" in known:
        # On two, so that the loss of one does no harm.
        settings["insert_quorum"] = "2"
        if "insert_quorum_timeout" in known:
            settings["insert_quorum_timeout"] = "10000"  # ms
        if not token:
            # Older servers call a block known, and the insert done, without asking for its quorum again.
            settings["insert_deduplicate"] = "0"
    return settings, token
