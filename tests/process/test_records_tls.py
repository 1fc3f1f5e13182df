"""Tests of reading stored records through TLS: at the consumer, through a publisher, and with `ringoexp read`."""

import http.client
import json
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from support.certificates import Authority, Pair, tls
from support.harness import DEADLINE, ROOT, server

from ringolib.client.producer import Producer
from ringolib.net.tls import client_context

COUNT = 5000
PATH = "/v1.0/records"


class Servers(NamedTuple):
    """Two ports with TLS. Both admit only clients that have a certificate of `authority`."""

    authority: Authority
    mine: Pair  # a client's certificate
    consumer: int
    publisher: int

    def context(self) -> ssl.SSLContext:
        context: ssl.SSLContext = client_context(str(self.authority.ca), str(self.mine.cert), str(self.mine.key))
        return context


@pytest.fixture(scope="module")
def servers(authority: Authority, pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """A consumer with the records 0 to COUNT - 1, and a publisher in front of it."""
    mutual = [*tls(pair), "--client_ca", str(authority.ca)]
    directory = tmp_path_factory.mktemp("records")
    with server(directory, "-p", "0", "-I", "false", "-D", "c.db", *mutual) as consumer:
        link = ["-T", str(consumer.port), "-W", "1", "--consumer_tls", "--consumer_ca", str(authority.ca)]
        with server(directory, "-p", "0", *link, *mutual) as publisher:
            servers = Servers(authority, authority.issue("client"), consumer.port, publisher.port)
            with Producer(f"wss://localhost:{publisher.port}/v1.0/ingest", context=servers.context()) as producer:
                producer.send(range(COUNT))
            yield servers


@pytest.fixture(params=["consumer", "publisher"])
def port(request: pytest.FixtureRequest, servers: Servers) -> int:
    return int(getattr(servers, request.param))


@contextmanager
def get(servers: Servers, port: int, query: str) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPSConnection("localhost", port, timeout=DEADLINE, context=servers.context())
    with closing(connection):
        connection.request("GET", f"{PATH}?{query}")
        with connection.getresponse() as response:
            yield response


def read(port: int, *flags: str) -> "subprocess.CompletedProcess[bytes]":
    command = [sys.executable, str(ROOT / "ringoexp.py"), "read", "--url", f"https://localhost:{port}", *flags]
    return subprocess.run(command, capture_output=True, timeout=DEADLINE)


@pytest.mark.parametrize("limit", [7, 10**6])
def test_records_are_read_through_tls(servers: Servers, port: int, limit: int) -> None:
    with get(servers, port, f"limit={limit}") as response:
        records = json.loads(response.read())["records"]
    assert [record["value"] for record in records] == list(range(COUNT))[:limit]


def test_follower_gets_new_records_through_tls(servers: Servers, port: int) -> None:
    with get(servers, port, "order=desc&limit=1") as response:
        newest = json.loads(response.read())["records"][0]["id"]
    with get(servers, port, f"follow=1&format=text&after={newest}") as response:
        url = f"wss://localhost:{servers.publisher}/v1.0/ingest"
        for value in (-1, -2):
            with Producer(url, context=servers.context()) as producer:
                producer.send([value])
            assert response.readline() == b"%d\n" % value


def test_read_uses_authority_certificate_and_key(servers: Servers, port: int, tmp_path: Path) -> None:
    ca = ["--ca", str(servers.authority.ca)]
    expected = b"".join(b"%d\n" % n for n in range(4500))
    both = tmp_path / "both.pem"
    both.write_bytes(servers.mine.cert.read_bytes() + servers.mine.key.read_bytes())
    for certificate in (["--cert", str(servers.mine.cert), "--key", str(servers.mine.key)], ["--cert", str(both)]):
        done = read(port, *ca, *certificate, "--limit", "4500")
        assert (done.returncode, done.stdout, done.stderr) == (0, expected, b"")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ([], "its certificate is not accepted: "),
        (["--ca", "{ca}"], "it requires a client certificate (--cert)"),
        (["--ca", "{cert}"], "its certificate is not accepted: "),
        (["--ca", "/nonexistent"], "/nonexistent"),
        (["--ca", "{ca}", "--cert", "{cert}"], "--key"),
    ],
)
def test_read_explains_why_tls_fails(servers: Servers, port: int, flags: list[str], reason: str) -> None:
    flags = [flag.format(ca=servers.authority.ca, cert=servers.mine.cert) for flag in flags]
    done = read(port, *flags)
    errors = done.stderr.decode()
    assert (done.returncode, done.stdout, errors.count("\n")) == (1, b"", 1), errors
    assert errors.startswith("ringoexp read: error: ") and reason in errors


def test_publisher_says_why_the_consumer_is_not_trusted(servers: Servers, tmp_path: Path) -> None:
    """The publisher has no certificate of its own, and then trusts another authority."""
    for number, flags in enumerate((["--consumer_ca", str(servers.authority.ca)], [])):
        (tmp_path / str(number)).mkdir()
        link = ["-T", str(servers.consumer), "--consumer_tls", *flags]
        with server(tmp_path / str(number), "-p", "0", *link) as publisher:
            connection = http.client.HTTPConnection("localhost", publisher.port, timeout=DEADLINE)
            connection.request("GET", PATH)
            with connection.getresponse() as response:
                error = json.loads(response.read())["error"]
                assert response.status == 502
            connection.close()
            assert ("requires a client certificate" if flags else "its certificate is not accepted") in error
