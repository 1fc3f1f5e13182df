"""The commands of docs/operations.md do what the document says, while records arrive."""

import json
import re
import shutil
import sqlite3
import subprocess
import threading
from contextlib import closing
from pathlib import Path

import pytest
from support.harness import DEADLINE, ROOT, eventually, rows, server

from ringolib.client.producer import Producer
from store import Store

DOC = (ROOT / "docs" / "operations.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", DOC, re.DOTALL) for line in block.splitlines()]
FLAGS = ("-p", "0", "-T", "0")


@pytest.fixture(autouse=True)
def tools() -> None:
    """Skip the test if a tool of the commands is not installed."""
    for tool in ("sqlite3", "curl"):
        if not shutil.which(tool):
            pytest.skip(f"needs {tool}")


def only(word: str) -> str:
    """Return the only command that contains `word`."""
    (command,) = (line for line in COMMANDS if word in line)
    return command


def run(directory: Path, command: str) -> str:
    """Return the output of a command, which must succeed in time."""
    done = subprocess.run(["bash", "-c", command], cwd=directory, capture_output=True, text=True, timeout=DEADLINE)
    assert (done.returncode, done.stderr) == (0, ""), (command, done)
    return done.stdout


def fill(url: str, count: int) -> None:
    """Store `count` records."""
    with Producer(url) as producer:
        producer.send(range(count))


def test_every_command_of_the_document_is_tested() -> None:
    tried = ["v1.0/ready", "v1.0/stats", ".backup backup", "VACUUM INTO", "integrity_check", "db VACUUM", "UPDATE"]
    assert sorted(only(word) for word in tried) == sorted(COMMANDS)


def test_ready_and_stats_answer_as_documented(tmp_path: Path) -> None:
    with server(tmp_path, *FLAGS) as running:
        assert json.loads(run(tmp_path, only("v1.0/ready").replace("6660", str(running.port))))["ready"] is True
        assert '"recordsStored": 0' in run(tmp_path, only("v1.0/stats").replace("6660", str(running.port)))


@pytest.mark.slow
@pytest.mark.parametrize(("command", "name"), [(".backup backup", "backup.db"), ("VACUUM INTO", "compact.db")])
def test_backup_under_load_has_all_records_acked_before(command: str, name: str, tmp_path: Path) -> None:
    """The backup ends although commits go on. A server opens it and continues from there."""
    with server(tmp_path, *FLAGS) as running:
        fill(running.url, 500_000)  # more pages than one step of a backup copies
        stop = threading.Event()

        def load() -> None:
            with Producer(running.url) as producer:
                while not stop.wait(0.002):
                    producer.send(range(10))
                    producer.flush(DEADLINE)

        thread = threading.Thread(target=load)
        thread.start()
        try:
            commits = running.stats()["commits"]
            eventually(lambda: running.stats()["commits"] > commits + 20, "records arrive")
            acked, before = running.stats()["recordsAcked"], running.stats()["commits"]
            run(tmp_path, only(command))
            commits = running.stats()["commits"] - before
        finally:
            stop.set()
            thread.join()
        assert commits > 0, "no commit ran during the backup"
        assert running.stop() == 0
    check = only("integrity_check").replace("backup.db", name)
    whole, count = run(tmp_path, check).split()
    assert whole == "ok" and acked <= int(count) <= len(rows(tmp_path / "ringoexp.db"))
    with server(tmp_path, *FLAGS, "-D", name) as restored:
        fill(restored.url, 10)
        assert restored.stop() == 0
    assert len(rows(tmp_path / name)) == int(count) + 10


def test_vacuum_shrinks_the_file_and_keeps_ids(tmp_path: Path) -> None:
    path = tmp_path / "ringoexp.db"
    with server(tmp_path, *FLAGS) as running:
        fill(running.url, 200_000)
        assert running.stop() == 0
    with closing(Store(str(path))) as store:
        while store.expire(2**62, 0, 1).more:
            pass
    before, kept = path.stat().st_size, rows(path)
    assert run(tmp_path, only("db VACUUM")) == ""
    assert path.stat().st_size < before / 10
    assert rows(path) == kept
    with closing(Store(str(path))) as store:
        assert store.stats().held == len(kept)


def test_update_corrects_only_batches_dated_in_the_future(tmp_path: Path) -> None:
    path = tmp_path / "ringoexp.db"
    with server(tmp_path, *FLAGS) as running:
        for _ in range(2):
            fill(running.url, 1)
        assert running.stop() == 0
    with closing(sqlite3.connect(path)) as writer:
        with writer:
            writer.execute("UPDATE batch SET received_at_ms = 4e12 WHERE first_id = 1")
        (right,) = writer.execute("SELECT received_at_ms FROM batch WHERE first_id = 2").fetchone()
        run(tmp_path, only("UPDATE"))
        dated = [at for (at,) in writer.execute("SELECT received_at_ms FROM batch ORDER BY first_id")]
    assert dated[1] == right <= dated[0] + 1000 < right + 1000 * (DEADLINE + 1) and isinstance(dated[0], int)
