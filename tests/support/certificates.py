"""Certificates for the tests: an authority of our own, and what it has signed, as PEM files."""

import datetime
from pathlib import Path
from typing import NamedTuple

import trustme


class Pair(NamedTuple):
    """A certificate chain and its key."""

    cert: Path
    key: Path


class Authority:
    """Signs certificates, whose files go into `directory`; `ca` is its own."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self._directory = directory
        self._authority = trustme.CA()
        self._count = 0
        self.ca = directory / f"{name}.pem"
        self._authority.cert_pem.write_to_path(str(self.ca))
        self.name = name

    def issue(self, *names: str, days: int = 30) -> Pair:
        """A certificate for these names, or else for localhost's, that ends in so many days, or has ended."""
        now = datetime.datetime.now(datetime.timezone.utc)
        begins, ends = now - datetime.timedelta(days=60), now + datetime.timedelta(days=days)
        leaf = self._authority.issue_cert(
            *(names or ("localhost", "127.0.0.1", "::1")), not_before=begins, not_after=ends
        )
        self._count += 1
        pair = Pair(*(self._directory / f"{self.name}-{self._count}.{what}" for what in ("pem", "key")))
        leaf.private_key_pem.write_to_path(str(pair.key))
        for number, blob in enumerate(leaf.cert_chain_pems):
            blob.write_to_path(str(pair.cert), append=number > 0)
        return pair


def tls(pair: Pair) -> list[str]:
    """The flags of a server with this certificate."""
    return ["--tls_cert", str(pair.cert), "--tls_key", str(pair.key)]
