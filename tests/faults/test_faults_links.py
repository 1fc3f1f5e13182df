"""A proxy makes links fail in every way it can, under load, and every record is stored once.

Every acked record is stored at that moment.
"""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from threading import Event
from time import monotonic

import pytest
from support.both_producers import MakeProducer
from support.checks import LINKS, TIMEOUT, VICTIMS, Load, Servers, short_times
from support.harness import DEADLINE, eventually, seeded
from support.proxy import DOWN, UP, Proxy

from ringolib.client import outbox


@pytest.fixture(autouse=True)
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    short_times(monkeypatch)


@contextmanager
def through(proxy: Proxy, listener: socket.socket) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Open a link through the proxy and yield both of its ends."""
    with socket.create_connection(("127.0.0.1", proxy.port), DEADLINE) as client:
        served, _ = listener.accept()
        with served:
            served.settimeout(DEADLINE)
            yield client, served


def silent(sock: socket.socket) -> bool:
    """True if no data arrives for a moment."""
    sock.settimeout(0.1)
    try:
        return not sock.recv(100) and False
    except TimeoutError:
        return True
    finally:
        sock.settimeout(DEADLINE)


def test_proxy_injects_each_fault() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, Proxy(listener.getsockname()[1]) as proxy:
        listener.settimeout(DEADLINE)
        with through(proxy, listener) as (client, served):
            for delays, sender, receiver in (({"up": 0.2}, client, served), ({"down": 0.2}, served, client)):
                proxy.delay(**delays)
                began = monotonic()
                sender.sendall(b"late")
                assert receiver.recv(100) == b"late" and monotonic() - began >= 0.2
            proxy.heal()
            for direction, sender, receiver in ((UP, client, served), (DOWN, served, client)):
                proxy.hold(direction)
                sender.sendall(b"held")
                receiver.sendall(b"not held")
                assert sender.recv(100) == b"not held" and silent(receiver)
                proxy.heal()
                assert receiver.recv(100) == b"held"
            proxy.discard()
            served.sendall(b"discarded")
            client.sendall(b"forwarded")
            assert served.recv(100) == b"forwarded" and silent(client)
        for reset in (False, True):
            with through(proxy, listener) as (client, served):
                proxy.cut_after(3, UP, reset=False)
                client.sendall(b"message")
                assert (served.recv(100), served.recv(100), client.recv(100)) == (b"mes", b"", b"")
            with through(proxy, listener) as (client, served):
                proxy.cut(reset)
                for end in (client, served):
                    if reset:
                        with pytest.raises(ConnectionResetError):
                            end.recv(100)
                    else:
                        assert end.recv(100) == b""
        with through(proxy, listener) as (client, served):
            proxy.hold(UP, DOWN)
            client.close()
            assert silent(served)
            proxy.heal()
            assert served.recv(100) == b""
        assert proxy.links == 6


FAULTS: dict[str, Callable[[Proxy, Random], None]] = {
    "late both ways": lambda proxy, rng: proxy.delay(rng.uniform(0, 0.1), rng.uniform(0, 0.1)),
    "cut by a reset": lambda proxy, rng: proxy.cut(reset=True),
    "cut by an end": lambda proxy, rng: proxy.cut(reset=False),
    "cut within a message": lambda proxy, rng: proxy.cut_after(rng.randrange(1, 2000), UP, rng.random() < 0.5),
    "cut within an ack": lambda proxy, rng: proxy.cut_after(rng.randrange(1, 10), DOWN, rng.random() < 0.5),
    "acks discarded": lambda proxy, rng: proxy.discard(DOWN),
    "black hole up": lambda proxy, rng: proxy.hold(UP),
    "black hole down": lambda proxy, rng: proxy.hold(DOWN),
    "black hole": lambda proxy, rng: proxy.hold(UP, DOWN),
}


def strike(name: str, proxy: Proxy, rng: Random) -> Callable[[], bool]:
    """Make a link fail. The returned function is true once the fault has taken effect and a new link is open."""
    links, cuts = proxy.links, proxy.cuts + ("cut" in name)
    FAULTS[name](proxy, rng)
    return lambda: proxy.cuts >= cuts and proxy.links > links


@pytest.mark.slow
@pytest.mark.parametrize("turns", [1, pytest.param(10, marks=pytest.mark.long)])
@pytest.mark.parametrize("link", LINKS)
def test_failing_link_keeps_exactly_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_producer: MakeProducer, link: str, turns: int
) -> None:
    """If the link to the consumer fails, the clients of the publisher stay connected."""
    rng = Random(seeded())
    if link == "publisher to consumer":
        monkeypatch.setattr(outbox, "STALL_TIMEOUT", DEADLINE)
    with Servers(tmp_path, proxied=True) as servers, Load(servers.url, rng, make_producer=make_producer) as load:
        proxy = servers.proxies[link]
        for _ in range(turns):
            for name in rng.sample(sorted(FAULTS), len(FAULTS)):
                load.goes_on()
                Event().wait(rng.uniform(0, 0.1))  # a random moment, not a synchronisation
                recovered = strike(name, proxy, rng)
                assert not load.problems(servers.database), name
                if name == "late both ways":
                    load.goes_on()
                else:
                    eventually(recovered, f"a new link after {name}")
                assert not load.problems(servers.database), name
                proxy.heal()
                load.goes_on()
                assert not load.problems(servers.database), name
        load.finish()
        assert not load.problems(servers.database, whole=True)
        stats = servers.running["consumer"].stats()
        print(f"{sum(load.acked().values())} records, {stats['recordsDuplicate']} sent again, {proxy.links} links")
        assert stats["recordsDuplicate"] > 0, "no record was sent twice: the faults had no effect"
        assert (load.reconnects() > 0) == (link == "client to publisher")


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [3, pytest.param(50, marks=pytest.mark.long)])
def test_failing_links_and_servers_keep_exactly_once(tmp_path: Path, make_producer: MakeProducer, rounds: int) -> None:
    rng = Random(seeded())
    with Servers(tmp_path, proxied=True) as servers, Load(servers.url, rng, make_producer=make_producer) as load:
        for turn in range(rounds):
            load.goes_on()
            names = [rng.choice(sorted(FAULTS)) for _ in LINKS]
            for name, proxy in zip(names, servers.proxies.values(), strict=True):
                FAULTS[name](proxy, rng)
            Event().wait(rng.uniform(0, 2 * TIMEOUT))  # a random moment, not a synchronisation
            victims = rng.choice(VICTIMS)
            servers.kill(*victims)
            assert not load.problems(servers.database, dead="consumer" in victims), f"{turn}: {names}, {victims}"
            servers.start(*victims)
            Event().wait(rng.uniform(0, TIMEOUT))
            assert not load.problems(servers.database), f"{turn}: {names}, {victims}"
            for proxy in servers.proxies.values():
                proxy.heal()
        load.goes_on()
        load.finish()
        assert not load.problems(servers.database, whole=True)
        print(f"{sum(load.acked().values())} records, {load.reconnects()} reconnects")
