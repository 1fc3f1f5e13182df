"""ClickHouse servers for the tests: Debian's 18.16, a current engine, and clusters with ZooKeeper.

Debian's server runs as a process on loopback. The current engine is chdb behind `chdb_server.py`. The test that starts
a server kills it at the end.
"""

import functools
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
import uuid
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlencode

import pytest

from ringolib.wire import Run
from support.harness import DEADLINE, eventually, free_port

USER, PASSWORD = "bob", "s3cret/@:?"
ZOOKEEPER_JAR = Path("/usr/share/java/zookeeper.jar")


@functools.cache
def need_clickhouse() -> str:
    """Return the path of Debian's clickhouse-server, which is not in every PATH. Skips the test without it."""
    path = shutil.which("clickhouse-server") or shutil.which("clickhouse-server", path="/usr/sbin")
    if not path:
        pytest.skip("no clickhouse-server")
    return path


def need_chdb() -> None:
    """Skip the test without chdb."""
    if not importlib.util.find_spec("chdb"):
        pytest.skip("no chdb")


def need_zookeeper() -> None:
    """Skip the test without ZooKeeper."""
    if not ZOOKEEPER_JAR.exists() or not shutil.which("java"):
        pytest.skip("no java, or no libzookeeper-java")


class Ports(NamedTuple):
    """The ports of a server. It keeps them when it is killed and started again."""

    http: int
    tcp: int
    interserver: int


def free_ports() -> Ports:
    """Return ports that are free, and stay reserved for this test run."""
    return Ports(free_port(), free_port(), free_port())


@contextmanager
def _killed_on_error(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Kill a process that did not start properly: the caller gets no object to kill it with."""
    try:
        yield
    except BaseException:
        process.kill()
        process.wait()
        raise


class ClickHouseHTTP:
    """A ClickHouse HTTP interface on `port` of loopback."""

    port: int

    def query(self, sql: str, database: str = "default", **settings: str) -> list[list[str]]:
        """Return the rows of a query as text. Raises AssertionError with the server's error text if it fails."""
        parameters = urlencode({"database": database, **settings})
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/?{parameters}", sql.encode(), method="POST")
        request.add_header("Authorization", "Basic Ym9iOnMzY3JldC9AOj8=")
        try:
            with urllib.request.urlopen(request, timeout=DEADLINE) as response:
                content: str = response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(error.read().decode()) from None
        return [line.split("\t") for line in content.splitlines()]

    def create_database(self) -> str:
        """Create an empty database and return its name."""
        name = f"t{uuid.uuid4().hex}"
        self.query(f"CREATE DATABASE {name}")
        return name

    def url(self, database: str, port: int | None = None) -> str:
        """Return the URL of a database for `-D`, with the port of a proxy if there is one."""
        return f"clickhouse://{USER}:s3cret%2F%40%3A%3F@127.0.0.1:{port or self.port}/{database}"

    def records(self, database: str, table: str = "records", **settings: str) -> dict[tuple[str, int], int]:
        """Return the records of the view as {(source, sequence): value}. Fails if it shows a record twice."""
        rows = self.query(f"SELECT source, sequence, value FROM {table}", database, **settings)
        records = {(source, int(sequence)): int(value) for source, sequence, value in rows}
        assert len(records) == len(rows), "the view shows a record twice"
        return records

    def _wait_until_it_answers(self, process: "subprocess.Popen[bytes]", name: str) -> None:
        def answers() -> bool:
            assert process.poll() is None, f"{name} ended with {process.returncode}"
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ping", timeout=5) as response:
                    return bool(response.status == 200)
            except OSError:
                return False

        with _killed_on_error(process):
            eventually(answers, f"{name} answers")


class ClickHouseServer(ClickHouseHTTP):
    """Debian's server, with its files in `directory`. `extra` is added to its configuration."""

    def __init__(self, directory: Path, ports: Ports | None = None, extra: str = "") -> None:
        self.directory = directory
        self.ports = ports or free_ports()
        self.port = self.ports.http
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.xml").write_text(f"""<?xml version="1.0"?>
<yandex>
  <logger><level>warning</level><log>{directory}/log</log><errorlog>{directory}/errors</errorlog></logger>
  <http_port>{self.ports.http}</http_port><tcp_port>{self.ports.tcp}</tcp_port>
  <interserver_http_port>{self.ports.interserver}</interserver_http_port>
  <interserver_http_host>127.0.0.1</interserver_http_host>
  <listen_host>127.0.0.1</listen_host>
  <path>{directory}/data/</path><tmp_path>{directory}/tmp/</tmp_path>
  <user_files_path>{directory}/files/</user_files_path>
  <users_config>users.xml</users_config>
  <default_profile>default</default_profile><default_database>default</default_database>
  <mark_cache_size>16777216</mark_cache_size>
  {extra}
</yandex>
""")
        user = "<networks><ip>127.0.0.1</ip></networks><profile>default</profile><quota>default</quota>"
        (directory / "users.xml").write_text(f"""<?xml version="1.0"?>
<yandex>
  <profiles><default><max_memory_usage>2000000000</max_memory_usage></default>
    <reader><readonly>1</readonly></reader></profiles>
  <quotas><default/></quotas>
  <users>
    <default><password></password>{user}</default>
    <{USER}><password>{PASSWORD}</password>{user}</{USER}>
    <reader><password></password>{user.replace("default</profile>", "reader</profile>")}</reader>
  </users>
</yandex>
""")
        self.start()

    def start(self) -> None:
        """Start the server, for the first time or again, and wait until it answers."""
        with open(self.directory / "out", "ab") as out:
            self.process = subprocess.Popen(
                [need_clickhouse(), "--config-file=config.xml"], cwd=self.directory, stdout=out, stderr=out
            )
        self._wait_until_it_answers(self.process, "clickhouse-server")

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        self.process.kill()
        self.process.wait()


class ChdbServer(ClickHouseHTTP):
    """A current engine behind `chdb_server.py`, with its files in `directory`."""

    def __init__(self, directory: Path) -> None:
        need_chdb()
        self.port = free_port()
        script = Path(__file__).parent / "chdb_server.py"
        directory.mkdir(parents=True, exist_ok=True)
        env = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
        with open(directory / "out", "ab") as out:
            command = [sys.executable, str(script), str(directory), str(self.port)]
            self.process = subprocess.Popen(command, env=env, stdout=out, stderr=out)
        self._wait_until_it_answers(self.process, "chdb")

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        self.process.kill()
        self.process.wait()


class ZooKeeper:
    """Debian's ZooKeeper, a single server."""

    def __init__(self, directory: Path) -> None:
        need_zookeeper()
        self.port = free_port()
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "zoo.cfg").write_text(
            f"tickTime=500\ndataDir={directory}\nclientPort={self.port}\nclientPortAddress=127.0.0.1\n"
            "admin.enableServer=false\n4lw.commands.whitelist=srvr\nmaxClientCnxns=0\nautopurge.purgeInterval=0\n"
        )
        main = (
            "-cp",
            f"{ZOOKEEPER_JAR}:{ZOOKEEPER_JAR.parent}/slf4j-simple.jar",
            "org.apache.zookeeper.server.ZooKeeperServerMain",
            str(directory / "zoo.cfg"),
        )
        with open(directory / "out", "ab") as out:
            self.process = subprocess.Popen(["java", "-Xmx128m", *main], cwd=directory, stdout=out, stderr=out)

        def answers() -> bool:
            assert self.process.poll() is None, "ZooKeeper ended"
            try:
                with socket.create_connection(("127.0.0.1", self.port), DEADLINE) as sock:
                    sock.sendall(b"srvr")
                    return sock.recv(9) == b"Zookeeper"
            except OSError:
                return False

        with _killed_on_error(self.process):
            eventually(answers, "ZooKeeper answers")

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        self.process.kill()
        self.process.wait()


class Cluster:
    """Several servers and a ZooKeeper. `shards` has the number of replicas of each shard."""

    name = "numbers"

    def __init__(self, directory: Path, shards: Sequence[int]) -> None:
        need_clickhouse()
        self.zookeeper = ZooKeeper(directory / "zookeeper")
        shard_ports = [[free_ports() for _ in range(replicas)] for replicas in shards]
        remote = "".join(
            "<shard><internal_replication>true</internal_replication>"
            + "".join(
                f"<replica><host>127.0.0.1</host><port>{ports.tcp}</port><user>{USER}</user>"
                f"<password>{PASSWORD}</password></replica>"
                for ports in replicas
            )
            + "</shard>"
            for replicas in shard_ports
        )
        self.servers: list[ClickHouseServer] = []
        try:
            for shard, replicas in enumerate(shard_ports, 1):
                for replica, ports in enumerate(replicas, 1):
                    extra = f"""<remote_servers><{self.name}>{remote}</{self.name}></remote_servers>
  <zookeeper><node><host>127.0.0.1</host><port>{self.zookeeper.port}</port></node>
    <session_timeout_ms>3000</session_timeout_ms></zookeeper>
  <macros><shard>{shard}</shard><replica>{replica}</replica></macros>
  <distributed_ddl><path>/clickhouse/task_queue/ddl</path></distributed_ddl>"""
                    self.servers.append(ClickHouseServer(directory / f"server-{shard}-{replica}", ports, extra))
        except BaseException:
            self.kill()
            raise

    def create_database(self) -> str:
        """Create a database on every server and return its name."""
        name = f"t{uuid.uuid4().hex}"
        for server in self.servers:
            server.query(f"CREATE DATABASE {name}")
        return name

    def url(self, database: str) -> str:
        """Return the URL that lists every server."""
        hosts = ",".join(f"127.0.0.1:{server.port}" for server in self.servers)
        return f"clickhouse://{USER}:s3cret%2F%40%3A%3F@{hosts}/{database}"

    def kill(self) -> None:
        """Kill every server with SIGKILL."""
        for server in self.servers:
            server.kill()
        self.zookeeper.kill()


@contextmanager
def clickhouse_server(directory: Path, extra: str = "") -> Iterator[ClickHouseServer]:
    """Run Debian's server, and kill it at the end. Skips the test without one."""
    need_clickhouse()
    server = ClickHouseServer(directory, extra=extra)
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def chdb_server(directory: Path) -> Iterator[ChdbServer]:
    """Run a current engine, and kill it at the end. Skips the test without chdb."""
    need_chdb()
    server = ChdbServer(directory)
    try:
        yield server
    finally:
        server.kill()


SOURCE = b"a" * 16
SOURCE_TEXT = str(uuid.UUID(bytes=SOURCE))


def block(first: int, end: int) -> tuple[list[Run], "array[int]"]:
    """Return the records `first` to `end` of SOURCE. The value of each is ten times its sequence."""
    return [Run(SOURCE, first, end - first)], array("q", range(first * 10, end * 10, 10))


def block_records(first: int, end: int) -> dict[tuple[str, int], int]:
    """Return the records of `block`, as a query of the view `records` shows them."""
    return {(SOURCE_TEXT, sequence): sequence * 10 for sequence in range(first, end)}
