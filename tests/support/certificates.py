"""Certificates for tests: an authority, and the certificates that it signs, as PEM files. Needs `trustme`."""

import datetime
from pathlib import Path
from typing import NamedTuple

import pytest


class Pair(NamedTuple):
    """A certificate chain and its key."""

    cert: Path
    key: Path


class Authority:
    """Signs certificates and writes their files into `directory`. `ca` is the file of its own certificate.

    Skips the test if `trustme` is not installed.
    """

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self._directory = directory
        self._authority = pytest.importorskip("trustme").CA()
        self._count = 0
        self.ca = directory / f"{name}.pem"
        self._authority.cert_pem.write_to_path(str(self.ca))
        self.name = name

    def issue(self, *names: str, days: int = 30) -> Pair:
        """Issue a certificate for `names`, by default localhost and its addresses. A negative `days` has expired."""
        now = datetime.datetime.now(datetime.timezone.utc)
        begins, ends = now - datetime.timedelta(days=60), now + datetime.timedelta(days=days)
        leaf = self._authority.issue_cert(
            *(names or ("localhost", "127.0.0.1", "::1")), not_before=begins, not_after=ends
        )
        self._count += 1
        pair = Pair(*(self._directory / f"{self.name}-{self._count}.{suffix}" for suffix in ("pem", "key")))
        leaf.private_key_pem.write_to_path(str(pair.key))
        for number, blob in enumerate(leaf.cert_chain_pems):
            blob.write_to_path(str(pair.cert), append=number > 0)
        return pair


def tls(pair: Pair) -> list[str]:
    """Return the flags of a server with this certificate."""
    return ["--tls_cert", str(pair.cert), "--tls_key", str(pair.key)]
