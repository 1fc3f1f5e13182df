"""The tables in ClickHouse: how they are created and checked, and how to insert into them safely.

An unknown setting is an error in ClickHouse, and all versions from 18.16 on are supported: so each server is first
asked which settings it knows. The module has functions only. No thread runs here.

A record is a row of the table `record`: (source, sequence, value, version). `version` is MAX_VERSION minus the time of
arrival in nanoseconds. ReplacingMergeTree keeps the row with the largest version, which is the first that arrived.
It removes the others during merges, some time later; the view `records` reads with FINAL, as if they had happened.

The view `ringoexp` is created last, and has the database's identity in its definition. If two servers create it at
the same time, one of them wins; rows of a table could come from both.
"""

import re
import uuid
from collections.abc import Mapping
from typing import NamedTuple

from ringolib.storage.clickhouse.http import PermanentError, Server

SCHEMA_VERSION = 1
MAX_VERSION = 2**63 - 1
DDL_TIMEOUT_SECONDS = 60.0
QUERY_TIMEOUT_SECONDS = 5.0
SHARD_CHUNK_RECORDS = 1_048_576
"""Consecutive records of a source that go to the same shard. The next chunk may go to another shard."""
_COLUMNS = [["source", "UUID"], ["sequence", "UInt64"], ["value", "Int64"], ["version", "UInt64"]]
_SORTING_KEY = "source, sequence"
_FSYNC_SETTINGS = ("fsync_after_insert", "fsync_part_directory")
_INSERT_SETTINGS = {
    "async_insert": "0",
    "insert_distributed_sync": "1",
    "distributed_foreground_insert": "1",  # the new name of insert_distributed_sync
    # One insert becomes one part: the server reads the whole block before it splits it.
    "max_insert_block_size": "2097152",
    "min_insert_block_size_rows": "2097152",
    "min_insert_block_size_bytes": "536870912",
}
_QUORUM_SETTINGS = ("insert_quorum", "insert_quorum_timeout", "insert_quorum_parallel")
_TOKEN_SETTING = "insert_deduplication_token"


class Tables(NamedTuple):
    """The tables of one server, and how to insert into them."""

    identity: str  # the UUID of the database
    insert: str  # the INSERT statement, to be followed by the rows
    settings: Mapping[str, str]  # for the INSERT
    accepts_token: bool  # the server recognises a repeated insert by a token
    is_shared: bool  # every host of the target can read and insert the same records
    power_safe: bool  # an insert is confirmed after it was synced to disk, or is on two machines
    ttl: str | None  # the TTL expression of the table


class _Table(NamedTuple):
    """An existing table, as system.tables lists it."""

    engine: str
    sorting_key: str
    definition: str  # engine and settings; ClickHouse 18.16 lists a new table with an empty definition for a moment


def quote_identifier(name: str) -> str:
    """Return `name` as an SQL identifier."""
    return "`" + name.replace("\\", "\\\\").replace("`", "\\`") + "`"


def quote_text(value: str) -> str:
    """Return `value` as an SQL string literal."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def inspect_tables(server: Server, database: str, cluster: str | None, timeout: float | None = None) -> Tables | None:
    """Return the existing tables, or None if they must be created or completed.

    Each query may take `timeout` seconds; None means QUERY_TIMEOUT_SECONDS. Raises RetryableError or PermanentError;
    the second also if the tables belong to another program, version or setup.
    """
    timeout = timeout or QUERY_TIMEOUT_SECONDS
    tables = _list_tables(server, database, timeout)
    if "ringoexp" not in tables:
        _check_incomplete(server, database, tables, timeout)
        return None
    _check_complete(server, database, cluster, tables, timeout)
    record = tables["record"]
    replicated = record.engine.startswith("Replicated")
    ttl = re.search(r"\bTTL (.*?)(?: SETTINGS |$)", record.definition)
    identity = _read_identity(server, database, timeout)
    replicas = _count_replicas(server, database, cluster, timeout) if replicated else 1
    settings, accepts_token = _insert_settings(server, replicas, timeout)
    synced = all(re.search(rf"\b{name} = 1\b", record.definition) for name in _FSYNC_SETTINGS)
    target = f"{quote_identifier(database)}.{insert_table(cluster)}"
    return Tables(
        identity=identity,
        insert=f"INSERT INTO {target} (source, sequence, value, version) FORMAT RowBinary",
        settings=settings,
        accepts_token=accepts_token,
        is_shared=replicated or bool(cluster),
        power_safe=synced or "insert_quorum" in settings,
        ttl=ttl[1] if ttl else None,
    )


def create_tables(server: Server, database: str, cluster: str | None) -> None:
    """Create the missing tables, on every server of the cluster if there is one.

    Raises RetryableError or PermanentError.
    """
    if cluster:
        _check_cluster(server, cluster)
    settings = {name for (name,) in server.query("SELECT name FROM system.merge_tree_settings", QUERY_TIMEOUT_SECONDS)}
    for statement in _create_statements(database, cluster, settings):
        server.post(statement, b"", DDL_TIMEOUT_SECONDS)


def set_retention(server: Server, database: str, cluster: str | None, tables: Tables, days: float) -> None:
    """Let the server delete records some time after they are `days` old. Raises RetryableError or PermanentError."""
    ((version,),) = server.query("SELECT version()", QUERY_TIMEOUT_SECONDS)
    numbers = [int(number) for number in re.findall(r"\d+", version)[:2]]
    if numbers < [19, 6]:
        raise PermanentError(
            f"--retain {days:g}: {server.name} is ClickHouse {version}, but 19.6 or newer is required: update it"
        )
    arrived = f"toDateTime(intDiv({MAX_VERSION} - version, 1000000000))"
    ttl = f"{arrived} + toIntervalSecond({round(days * 86400)})"
    if tables.ttl == ttl:
        return
    table = f"{quote_identifier(database)}.record{_on_cluster(cluster)}"
    server.post(f"ALTER TABLE {table} MODIFY TTL {ttl}", b"", DDL_TIMEOUT_SECONDS)


def insert_table(cluster: str | None) -> str:
    """Return the name of the table with the records of all servers."""
    return "record_all" if cluster else "record"


def _on_cluster(cluster: str | None) -> str:
    return f" ON CLUSTER {quote_identifier(cluster)}" if cluster else ""


def _list_tables(server: Server, database: str, timeout: float) -> dict[str, _Table]:
    """Return the existing tables by name.

    Raises PermanentError if the database does not exist, or the server is no ClickHouse.
    """
    rows = server.query(
        "SELECT name, engine, sorting_key, engine_full FROM system.tables "
        f"WHERE database = {quote_text(database)} AND name IN ('ringoexp', 'record', 'record_all', 'records')",
        timeout,
    )
    if any(len(row) != 1 + len(_Table._fields) for row in rows):
        raise PermanentError(f"{server.name} is not a ClickHouse server: check host and port")
    return {name: _Table(*columns) for name, *columns in rows}


def _check_incomplete(server: Server, database: str, tables: Mapping[str, _Table], timeout: float) -> None:
    """Raise PermanentError if the tables are not the beginning of ours.

    Another server may be creating them at this moment, or may have been killed while it did.
    """
    if not tables:
        return
    record = tables.get("record")
    if record:
        undefined = not record.definition and record.engine.endswith("ReplacingMergeTree")
        if _has_our_columns(server, database, record, timeout) and (undefined or _keeps_first(record)):
            return
    raise PermanentError(
        f"{server.name}: the table {min(tables)} in {database} belongs to another program: use another database"
    )


def _check_complete(
    server: Server, database: str, cluster: str | None, tables: Mapping[str, _Table], timeout: float
) -> None:
    """Raise PermanentError if a table is missing, of another schema, or belongs to another setup."""
    for name in ("record", insert_table(cluster), "records"):
        if name not in tables:
            remedy = "restore it, or use another database"
            if name == "record_all" and "record" in tables:
                remedy = "it was created without --clickhouse_cluster: omit that, or use another database"
            raise PermanentError(f"{server.name}: {database} has no table {name}: {remedy}")
    if not cluster and "record_all" in tables:
        raise PermanentError(f"{server.name}: {database} belongs to a cluster: set --clickhouse_cluster")
    record = tables["record"]
    if not (_has_our_columns(server, database, record, timeout) and _keeps_first(record)):
        raise PermanentError(
            f"{server.name}: the table record in {database} has a different schema: use another database"
        )


def _has_our_columns(server: Server, database: str, record: _Table, timeout: float) -> bool:
    columns = server.query(
        f"SELECT name, type FROM system.columns WHERE database = {quote_text(database)} AND table = 'record'", timeout
    )
    return columns == _COLUMNS and record.sorting_key == _SORTING_KEY


def _keeps_first(record: _Table) -> bool:
    """True if the table keeps the row with the largest version, replicated or not."""
    return bool(re.search(r"ReplacingMergeTree\((?:'[^']*', *'[^']*', *)?version\)", record.definition))


def _read_identity(server: Server, database: str, timeout: float) -> str:
    """Return the UUID of the database. Raises PermanentError if its schema is newer than this program's."""
    sql = f"SELECT toString(identity), schema FROM {quote_identifier(database)}.ringoexp"
    ((identity, version),) = server.query(sql, timeout)
    if int(version) > SCHEMA_VERSION:
        raise PermanentError(
            f"{server.name}: {database} has schema version {version}, and this program supports {SCHEMA_VERSION}: "
            "use a newer version of the program"
        )
    return identity


def _count_replicas(server: Server, database: str, cluster: str | None, timeout: float) -> int:
    """Return the number of replicas that the table has in each shard."""
    if cluster:
        sql = f"SELECT max(replica_num) FROM system.clusters WHERE cluster = {quote_text(cluster)}"
    else:
        sql = (
            "SELECT max(total_replicas) FROM system.replicas "
            f"WHERE database = {quote_text(database)} AND table = 'record'"
        )
    ((count,),) = server.query(sql, timeout)
    return int(count)


def _insert_settings(server: Server, replicas: int, timeout: float) -> tuple[dict[str, str], bool]:
    """Return the settings of a safe insert that the server supports, and whether it supports tokens."""
    names = ", ".join(quote_text(name) for name in (*_INSERT_SETTINGS, *_QUORUM_SETTINGS, _TOKEN_SETTING))
    rows = server.query(f"SELECT name FROM system.settings WHERE name IN ({names})", timeout)
    supported = {name for (name,) in rows}
    settings = {name: value for name, value in _INSERT_SETTINGS.items() if name in supported}
    if "distributed_foreground_insert" in supported:
        settings.pop("insert_distributed_sync", None)
    accepts_token = _TOKEN_SETTING in supported
    if replicas > 1 and "insert_quorum" in supported:
        # An insert must reach two replicas, so that the loss of one does no harm.
        settings["insert_quorum"] = "2"
        if "insert_quorum_timeout" in supported:
            settings["insert_quorum_timeout"] = "10000"  # ms
        if not accepts_token:
            # Older servers confirm a block that they already have without checking its quorum again.
            settings["insert_deduplicate"] = "0"
    return settings, accepts_token


def _check_cluster(server: Server, cluster: str) -> None:
    """Raise PermanentError if the server cannot create replicated tables on the cluster."""
    clusters = {name for (name,) in server.query("SELECT cluster FROM system.clusters", QUERY_TIMEOUT_SECONDS)}
    if cluster not in clusters:
        known = ", ".join(sorted(clusters)) or "none"
        raise PermanentError(
            f"--clickhouse_cluster {cluster}: {server.name} has no cluster of this name (clusters: {known})"
        )
    macros = {name for (name,) in server.query("SELECT macro FROM system.macros", QUERY_TIMEOUT_SECONDS)}
    if missing := sorted({"shard", "replica"} - macros):
        raise PermanentError(
            f"{server.name}: its configuration has no macro {missing[0]}: define it, replicated tables need it"
        )


def _create_statements(database: str, cluster: str | None, merge_tree_settings: set[str]) -> list[str]:
    """Return the statements that create the tables, in order. None of them changes a table that exists."""
    name, on_cluster = quote_identifier(database), _on_cluster(cluster)
    columns = ", ".join(" ".join(column) for column in _COLUMNS)
    engine = "ReplacingMergeTree(version)"
    if cluster:
        path = quote_text(f"/clickhouse/tables/{{shard}}/{database}/record")
        engine = f"ReplicatedReplacingMergeTree({path}, '{{replica}}', version)"
    fsync = ", ".join(f"{setting} = 1" for setting in _FSYNC_SETTINGS if setting in merge_tree_settings)
    statements = [
        f"CREATE TABLE IF NOT EXISTS {name}.record{on_cluster} ({columns}) ENGINE = {engine} ORDER BY ({_SORTING_KEY})"
        + (f" SETTINGS {fsync}" if fsync else "")
    ]
    if cluster:
        shard = f"sipHash64(toString(source), intDiv(sequence, {SHARD_CHUNK_RECORDS}))"
        statements.append(
            f"CREATE TABLE IF NOT EXISTS {name}.record_all{on_cluster} ({columns}) "
            f"ENGINE = Distributed({quote_identifier(cluster)}, {name}, record, {shard})"
        )
    statements.append(
        f"CREATE VIEW IF NOT EXISTS {name}.records{on_cluster} AS SELECT source, sequence, value, "
        f"intDiv({MAX_VERSION} - version, 1000000) AS received_at_ms FROM {name}.{insert_table(cluster)} FINAL"
    )
    statements.append(  # the last one: it marks the others as complete
        f"CREATE VIEW IF NOT EXISTS {name}.ringoexp{on_cluster} AS "
        f"SELECT toUUID('{uuid.uuid4()}') AS identity, {SCHEMA_VERSION} AS schema"
    )
    return statements
