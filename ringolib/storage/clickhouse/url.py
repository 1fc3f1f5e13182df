"""ClickHouse URLs: `clickhouse://USER:PASSWORD@HOST:PORT,HOST:PORT/DATABASE`, and hiding the password in them.

A password exists only in a `Target` and in the header of a request. `redact_passwords` removes it from text that a
user typed. No thread runs here, and nothing is shared.
"""

import os
import re
from typing import NamedTuple
from urllib.parse import quote, unquote

from ringolib.net.addresses import decode_zone, format_address

PASSWORD_VARIABLE = "RINGOEXP_CLICKHOUSE_PASSWORD"
"""The environment variable for the password: other users of the machine can read command lines."""
PORT, TLS_PORT = 8123, 8443
SCHEMES = ("clickhouse://", "clickhouses://")  # without and with TLS

_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+(?:%[^\[\]\s]+)?)\]|([^\[\]:\s]+))(?::(\d{1,5}))?")
_CREDENTIALS = re.compile(r"(clickhouses?://)(?:([^:@]*):.*@|([^@]*)@)", re.DOTALL | re.IGNORECASE)
_QUERY = re.compile(r"(clickhouses?://[^?#]*[?#]).*", re.DOTALL | re.IGNORECASE)


class Target(NamedTuple):
    """A parsed ClickHouse URL."""

    tls: bool
    hosts: tuple[tuple[str, int], ...]
    user: str
    password: str
    database: str

    @property
    def display_url(self) -> str:
        """The URL without the password."""
        hosts = ",".join(format_address(host, port) for host, port in self.hosts)
        user = "" if self.user == "default" else f"{quote(self.user)}@"
        return f"{SCHEMES[self.tls]}{user}{hosts}/{quote(self.database)}"


def is_clickhouse_url(text: str) -> bool:
    """True if `text` is a ClickHouse URL, valid or not, and not the path of a file."""
    return text.lower().startswith(SCHEMES)


def redact_passwords(text: str) -> str:
    """Return `text` without anything that may be a password in a ClickHouse URL."""
    return _QUERY.sub(r"\1***", _CREDENTIALS.sub(_keep_user, text))


def _keep_user(match: "re.Match[str]") -> str:
    scheme, user, user_alone = match.groups()
    return f"{scheme}{user_alone}@" if user is None else f"{scheme}{user}:***@"


def parse_url(text: str) -> Target:
    """Parse a ClickHouse URL. The password comes from PASSWORD_VARIABLE if the URL has none.

    Raises ValueError; its text never contains the password.
    """
    scheme, _, rest = text.partition("://")
    tls = scheme.lower() == "clickhouses"
    credentials, _, location = rest.rpartition("@")
    user, has_password, password = credentials.partition(":")
    host_list, _, database = location.partition("/")
    if any(mark in location for mark in "?#"):
        raise ValueError("nothing may follow the database name")
    hosts = tuple(_parse_host(host, TLS_PORT if tls else PORT) for host in host_list.split(","))
    if len(set(hosts)) < len(hosts):
        raise ValueError("a host is listed twice")
    user, database = unquote(user) or "default", unquote(database) or "default"
    if ":" in user:
        raise ValueError("a user name must not contain a colon")
    if re.search(r"[\0-\x1f\x7f/]", user + database):
        raise ValueError("the names of user and database must be plain text without a slash")
    password = unquote(password) if has_password else os.environ.get(PASSWORD_VARIABLE, "")
    return Target(tls, hosts, user, password, database)


def _parse_host(text: str, default_port: int) -> tuple[str, int]:
    match = _HOST.fullmatch(text)
    port = int(match[3] or default_port) if match else 0
    if not match or not 0 < port < 65536:
        raise ValueError("hosts must be HOST or HOST:PORT, separated by commas")
    return decode_zone(match[1] or match[2]), port
