"""Servers that are killed or stopped at random moments, under load: what is acked is stored at that moment, and in
the end everything is stored once. And the check that says so is itself shown a server that breaks the promise.
"""

import shutil
import sqlite3
from array import array
from contextlib import closing
from pathlib import Path
from random import Random
from threading import Event

import pytest
from support.checks import TIMEOUT, VICTIMS, Load, Servers, problems, short_times
from support.harness import DEADLINE, eventually, seeded, server

from ringolib.client.producer import Producer


@pytest.fixture(autouse=True)
def patient_for_less(monkeypatch: pytest.MonkeyPatch) -> None:
    short_times(monkeypatch)


@pytest.mark.parametrize("rounds", [6, pytest.param(50, marks=pytest.mark.long)])
@pytest.mark.parametrize("fault", ["kill", "stop"])
def test_servers_fail_at_random_moments_and_everything_is_stored_once(tmp_path: Path, fault: str, rounds: int) -> None:
    """Stopped ones go on after a pause that their peers may or may not have the patience for."""
    rng = Random(seeded())
    count = dict.fromkeys(VICTIMS, 0)
    with Servers(tmp_path) as servers, Load(servers.url, rng) as load:
        for turn in range(rounds):
            load.goes_on()
            Event().wait(rng.uniform(0, 0.1))  # not to synchronise: a random moment
            victims = rng.choice(VICTIMS)
            count[victims] += 1
            still = "consumer" in victims  # nobody writes
            getattr(servers, fault)(*victims)
            assert not load.problems(servers.database, dead=still), f"round {turn}, {victims}"
            Event().wait(rng.uniform(0, 0.1 if fault == "kill" else 2 * TIMEOUT))  # and some acks still come
            assert not load.problems(servers.database, dead=still), f"round {turn}, {victims}"
            back = servers.start if fault == "kill" else servers.go_on
            back(*rng.sample(victims, len(victims)))
        load.goes_on()
        load.finish()
        assert not load.problems(servers.database, whole=True)
        if fault == "kill":
            killed = sum(times for victims, times in count.items() if "publisher" in victims)
            assert load.reconnects() >= killed * len(load.producers), "a killed publisher's links are gone"
        print(f"{fault}: {count}, {sum(load.acked().values())} records, {load.reconnects()} reconnects")


@pytest.mark.parametrize("rounds", [5, pytest.param(50, marks=pytest.mark.long)])
def test_with_a_spool_the_acks_go_on_whatever_becomes_of_the_consumer(tmp_path: Path, rounds: int) -> None:
    """Killed or stopped, and the publisher killed meanwhile: what is acked is at the consumer or in the spool."""
    rng = Random(seeded())
    with Servers(tmp_path, spooling=True) as servers, Load(servers.url, rng) as load:
        for turn in range(rounds):
            load.goes_on()
            Event().wait(rng.uniform(0, 0.1))  # not to synchronise: a random moment
            fault, back = rng.choice(((servers.kill, servers.start), (servers.stop, servers.go_on)))
            fault("consumer")
            load.goes_on()  # nobody misses it
            assert not servers.problems(load, {"consumer"}), f"round {turn}"
            if rng.random() < 0.5:
                servers.kill("publisher")
                assert not servers.problems(load, {"consumer", "publisher"}), f"round {turn}, publisher"
                servers.start("publisher")
                load.goes_on()
            back("consumer")
            Event().wait(rng.uniform(0, 0.2))  # while it forwards
            if rng.random() < 0.5:
                servers.kill("publisher")
                assert not servers.problems(load, {"publisher"}), f"round {turn}, forwarding"
                servers.start("publisher")
        load.finish()
        publisher = servers.running["publisher"]
        eventually(lambda: publisher.stats()["spoolDepth"] == 0, "all is forwarded")
        assert not load.problems(servers.database, whole=True)
        print(f"{sum(load.acked().values())} records, {load.reconnects()} reconnects")


LATE = (
    "web.intake.StoreIntake.put = lambda self, block, timeout:"
    " (__import__('threading').Timer(3600, self._store.append, block).start(), (len(block.values), 0))[1]"
)


@pytest.mark.parametrize("patch", ["", LATE])
def test_a_consumer_that_acks_before_it_commits_is_found_out(tmp_path: Path, patch: str) -> None:
    values = array("q", range(1000))
    with server(tmp_path, "-I", "false", "-p", "0", "-D", "c.db", patch=patch) as consumer:
        with server(tmp_path, "-p", "0", "-T", str(consumer.port)) as publisher, Producer(publisher.url) as sender:
            sender.send(values)
            sender.flush(DEADLINE)
            consumer.kill()
            found = problems(tmp_path / "c.db", {sender.source: values}, {sender.source: sender.acked}, dead=True)
    assert found == ([f"{sender.source}: records 0 to 999 are acked and not stored"] if patch else [])


DAMAGE = {
    "": "",
    "UPDATE record SET value = ~value WHERE id = 500": "never sent",
    "UPDATE batch SET sequence = sequence + 1": "records 0 to 0 are acked and not stored",
    "UPDATE source SET uuid = zeroblob(16)": "records 0 to 999 are acked and not stored",
    "INSERT INTO record VALUES (1001, 7); INSERT INTO batch SELECT 1001, 1, source_id, 7, 0 FROM batch": "stored twice",
    "DELETE FROM record WHERE id = 500": "ids: 1000 records in batches, 999 in all",
    "INSERT INTO record VALUES (1002, 7)": "ids: 1000 records in batches, 1001 in all, the last is 1002",
    "DELETE FROM record; DELETE FROM batch": "records 0 to 999 are acked and not stored",
}


def test_a_damaged_database_is_found_out(tmp_path: Path) -> None:
    values = array("q", range(1000))
    with server(tmp_path, "-I", "false", "-p", "0", "-D", "c.db") as consumer, Producer(consumer.url) as sender:
        sender.send(values)
        sender.flush(DEADLINE)
        consumer.stop()
    for number, (damage, said) in enumerate(DAMAGE.items()):
        copy = tmp_path / f"{number}.db"
        shutil.copy(tmp_path / "c.db", copy)
        with closing(sqlite3.connect(copy)) as writer:
            writer.executescript(damage)
        found = problems(copy, {sender.source: values}, {sender.source: 1000})
        assert any(said in problem for problem in found) if said else found == [], damage
