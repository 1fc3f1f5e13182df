"""Helpers for tests of addresses and listening sockets."""

import socket

import pytest

from support.harness import DEADLINE


def has_ipv6() -> bool:
    """True if this machine has ::1."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


IPV6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


def accepts(host: str, port: int) -> bool:
    """True if a server listens on this address."""
    try:
        socket.create_connection((host, port), DEADLINE).close()
    except ConnectionRefusedError:
        return False
    return True
