"""Addresses: hosts without brackets, names in certificates, and the options that take a host."""

import pytest

from ringolib.net.addresses import certified_name, decode_zone, parse_host
from ringolib.options import read_arguments


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("example.com", "example.com"),
        ("::1", "::1"),
        ("[::1]", "::1"),
        ("[name]", "[name]"),  # only an IPv6 address may have brackets: this name fails later
        ("unix:x.sock", "unix:x.sock"),
    ],
)
def test_parse_host_removes_brackets_of_ipv6_address(text: str, host: str) -> None:
    assert parse_host(text) == host


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("example.com", "example.com"),
        ("example.com.", "example.com"),
        ("fe80::1%eth0", "fe80::1"),
        ("127.0.0.1", "127.0.0.1"),
        ("unix:/run/x.", "localhost"),
    ],
)
def test_certified_name_has_no_trailing_dot_and_no_zone(host: str, name: str) -> None:
    assert certified_name(host) == name


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("fe80::1%25eth0", "fe80::1%eth0"),
        ("fe80::1%25en%2D1", "fe80::1%en-1"),
        ("fe80::1%eth0", "fe80::1%eth0"),
        ("fe80::1%25", "fe80::1%25"),  # the zone 25, without the encoding
        ("fe80::1", "fe80::1"),
        ("100%25.example", "100%25.example"),
    ],
)
def test_zone_of_an_address_in_a_url_is_decoded(text: str, host: str) -> None:
    assert decode_zone(text) == host


@pytest.mark.parametrize("host", ["unix:", "unix: "])
def test_unix_socket_without_path_is_usage_error(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("-H", "-U", "--profiler_host"):
        with pytest.raises(SystemExit) as ended:
            read_arguments([flag, host])
        assert ended.value.code == 2
        assert "is not accepted: " in (errors := capsys.readouterr().err) and "unix:PATH" in errors


def test_consumer_port_zero_needs_free_port_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    read_arguments(["-H", "unix:x.sock", "-U", "unix:y.sock", "-T", "0"])
    for words in (["-H", "unix:x.sock", "-T", "0"], ["-H", "unix:x.sock", "-p", "0", "-T", "0"]):
        with pytest.raises(SystemExit):
            read_arguments(words)
        assert "-T/--consumer_port: 0 is not accepted" in capsys.readouterr().err
