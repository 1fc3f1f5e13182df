"""ClickHouse for the tests: Debian's server, 18.16, as processes on loopback; a current engine, by chdb, behind a few
lines of HTTP; ZooKeeper for replicas. Whoever starts one has it killed by its pid in the end.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlencode

import pytest

from support.harness import DEADLINE, eventually, free_port

USER, PASSWORD = "bob", "s3cret/@:?"
ZOOKEEPER_JAR = Path("/usr/share/java/zookeeper.jar")


@functools.cache
def program() -> str:
    """Debian's clickhouse-server, which is not in every PATH. Skips the test without it, or without its library."""
    found = shutil.which("clickhouse-server") or shutil.which("clickhouse-server", path="/usr/sbin")
    if not found:
        pytest.skip("no clickhouse-server")
    return found


def need_chdb() -> None:
    """Skips the test without chdb."""
    if not importlib.util.find_spec("chdb"):
        pytest.skip("no chdb")


def need_zookeeper() -> None:
    """Skips the test without ZooKeeper."""
    if not ZOOKEEPER_JAR.exists() or not shutil.which("java"):
        pytest.skip("no java, or no libzookeeper-java")


class Ports(NamedTuple):
    """Of a server; they stay its own when it is killed."""

    http: int
    tcp: int
    interserver: int


def ports() -> Ports:
    """Free ones."""
    return Ports(free_port(), free_port(), free_port())


@contextmanager
def _killed_if_not(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Kills one that does not become what it should: nobody gets hold of it then."""
    try:
        yield
    except BaseException:
        process.kill()
        process.wait()
        raise


class Asked:
    """What can be asked over HTTP."""

    port: int

    def ask(self, sql: str, database: str = "default", **settings: str) -> list[list[str]]:
        """The rows of a query's answer, as text. AssertionError with what the server says, if it fails."""
        query = urlencode({"database": database, **settings})
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/?{query}", sql.encode(), method="POST")
        request.add_header("Authorization", "Basic Ym9iOnMzY3JldC9AOj8=")
        try:
            with urllib.request.urlopen(request, timeout=DEADLINE) as response:
                said: str = response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(error.read().decode()) from None
        return [line.split("\t") for line in said.splitlines()]

    def database(self) -> str:
        """The name of a new, empty database."""
        name = f"t{uuid.uuid4().hex}"
        self.ask(f"CREATE DATABASE {name}")
        return name

    def url(self, database: str, port: int | None = None) -> str:
        """Its address for `-D`, `port` being that of a proxy."""
        return f"clickhouse://{USER}:s3cret%2F%40%3A%3F@127.0.0.1:{port or self.port}/{database}"

    def records(self, database: str, table: str = "records", **settings: str) -> dict[tuple[str, int], int]:
        """What the view shows; fails when it shows something twice."""
        rows = self.ask(f"SELECT source, sequence, value FROM {table}", database, **settings)
        found = {(source, int(sequence)): int(value) for source, sequence, value in rows}
        assert len(found) == len(rows), "a record is shown twice"
        return found

    def _wait(self, process: "subprocess.Popen[bytes]", what: str) -> None:
        def answers() -> bool:
            assert process.poll() is None, f"{what} ended with {process.returncode}"
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ping", timeout=5) as response:
                    return bool(response.status == 200)
            except OSError:
                return False

        with _killed_if_not(process):
            eventually(answers, f"{what} answers")


class ClickHouseServer(Asked):
    """Debian's, with its files in `directory`. `extra` goes into its configuration, `profile` into its users'."""

    def __init__(self, directory: Path, at: Ports | None = None, extra: str = "", profile: str = "") -> None:
        self.directory = directory
        self.at = at or ports()
        self.port = self.at.http
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.xml").write_text(f"""<?xml version="1.0"?>
<yandex>
  <logger><level>warning</level><log>{directory}/log</log><errorlog>{directory}/errors</errorlog></logger>
  <http_port>{self.at.http}</http_port><tcp_port>{self.at.tcp}</tcp_port>
  <interserver_http_port>{self.at.interserver}</interserver_http_port>
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
  <profiles><default><max_memory_usage>2000000000</max_memory_usage>{profile}</default>
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
        """Starts it, also once more; returns when it answers."""
        with open(self.directory / "out", "ab") as out:
            self.process = subprocess.Popen(
                [program(), "--config-file=config.xml"], cwd=self.directory, stdout=out, stderr=out
            )
        self._wait(self.process, "clickhouse-server")

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()


class NewClickHouse(Asked):
    """A current engine; its HTTP is `newhouse.py`'s, and no more than the store needs."""

    def __init__(self, directory: Path) -> None:
        need_chdb()
        self.port = free_port()
        script = Path(__file__).parent / "newhouse.py"
        directory.mkdir(parents=True, exist_ok=True)
        env = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
        with open(directory / "out", "ab") as out:
            command = [sys.executable, str(script), str(directory), str(self.port)]
            self.process = subprocess.Popen(command, env=env, stdout=out, stderr=out)
        self._wait(self.process, "chdb")

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()


class ZooKeeper:
    """Debian's, alone."""

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

        with _killed_if_not(self.process):
            eventually(answers, "ZooKeeper answers")

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()


class Cluster:
    """Servers, and ZooKeeper for them: `shards` says on how many each shard's replicas are."""

    name = "numbers"

    def __init__(self, directory: Path, shards: Sequence[int]) -> None:
        program()
        self.zookeeper = ZooKeeper(directory / "zookeeper")
        at = [[ports() for _ in range(replicas)] for replicas in shards]
        remote = "".join(
            "<shard><internal_replication>true</internal_replication>"
            + "".join(
                f"<replica><host>127.0.0.1</host><port>{each.tcp}</port><user>{USER}</user>"
                f"<password>{PASSWORD}</password></replica>"
                for each in replicas
            )
            + "</shard>"
            for replicas in at
        )
        self.servers: list[ClickHouseServer] = []
        try:
            for shard, replicas in enumerate(at, 1):
                for replica, each in enumerate(replicas, 1):
                    extra = f"""<remote_servers><{self.name}>{remote}</{self.name}></remote_servers>
  <zookeeper><node><host>127.0.0.1</host><port>{self.zookeeper.port}</port></node>
    <session_timeout_ms>3000</session_timeout_ms></zookeeper>
  <macros><shard>{shard}</shard><replica>{replica}</replica></macros>
  <distributed_ddl><path>/clickhouse/task_queue/ddl</path></distributed_ddl>"""
                    self.servers.append(ClickHouseServer(directory / f"server-{shard}-{replica}", each, extra))
        except BaseException:
            self.kill()
            raise

    def database(self) -> str:
        """The name of a new database, on all of them."""
        name = f"t{uuid.uuid4().hex}"
        for server in self.servers:
            server.ask(f"CREATE DATABASE {name}")
        return name

    def url(self, database: str) -> str:
        """The address of all of them."""
        hosts = ",".join(f"127.0.0.1:{server.port}" for server in self.servers)
        return f"clickhouse://{USER}:s3cret%2F%40%3A%3F@{hosts}/{database}"

    def kill(self) -> None:
        """SIGKILL to all."""
        for server in self.servers:
            server.kill()
        self.zookeeper.kill()
