"""ClickHouse's HTTP interface, as little of it as a store needs: addresses, a request and its answer, and what fails.

What is found wrong is `RetryableError`, which may pass, or `PermanentError`, which somebody has to mend. A password is in a `Target` and
in the header of a request, and nowhere else: `redacted` takes it out of whatever a user typed.

A `Server` belongs to one thread at a time. No thread runs here, and nothing is guarded.
"""

import base64
import http.client
import os
import re
import ssl
from collections.abc import Mapping
from time import monotonic
from typing import NamedTuple
from urllib.parse import quote, unquote, urlencode

from ringolib.net import tls
from ringolib.net.tls_socket import explain

PASSWORD = "RINGOEXP_CLICKHOUSE_PASSWORD"
"""The variable that a password may be in instead of the address: whoever is on a machine can read command lines."""
PORT, TLS_PORT = 8123, 8443
IDLE_SECONDS = 2.0
"""For how long a connection may rest and be used again: servers close theirs after 3 s or more."""
CONNECT_TIMEOUT = 5.0
SCHEMES = ("clickhouse://", "clickhouses://")

# Codes are those of the server's ErrorCodes.cpp. Whatever is not here may pass by itself.
_FINAL = {
    16: "the table is of another shape: name another database",
    27: "the table is of another shape: name another database",
    33: "the table is of another shape: name another database",
    47: "the table is of another shape: name another database",
    53: "the table is of another shape: name another database",
    60: "a table is missing: start again to have it made",
    62: "this program and that server do not understand each other",
    81: "make it with CREATE DATABASE, or name another one",
    139: "it is not configured for that",
    164: "the user may not write",
    170: "see system.clusters there",
    192: "check the user's name",
    193: f"check the password, in the address or in {PASSWORD}",
    194: f"it wants a password, in the address or in {PASSWORD}",
    195: "the user may not come from this address",
    291: "the user may not use this database",
    452: "the user may not change a setting that makes inserts safe",
    497: "the user needs to be granted that",
    516: f"check user and password, in the address or in {PASSWORD}",
}
_CODE = re.compile(r"^Code: (\d+)[.,] *(?:e\.displayText\(\) = )?(?:DB::(?:NetException|Exception): )?(.*)", re.DOTALL)
_MAX_SAID = 300


class RetryableError(Exception):
    """Not done, or perhaps: it may be tried again. The text says why. `code` is the server's, 0 without one."""

    def __init__(self, text: str, code: int = 0) -> None:
        super().__init__(text)
        self.code = code


class PermanentError(Exception):
    """Not done, and not to be had until somebody changes something. The text says what."""

    def __init__(self, text: str, code: int = 0) -> None:
        super().__init__(text)
        self.code = code


class Target(NamedTuple):
    """What `clickhouse://USER:PASSWORD@HOST:PORT,HOST:PORT/DATABASE` says."""

    tls: bool
    hosts: tuple[tuple[str, int], ...]
    user: str
    password: str
    database: str

    @property
    def shown(self) -> str:
        """The address without the password."""
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        user = "" if self.user == "default" else f"{quote(self.user)}@"
        return f"{SCHEMES[self.tls]}{user}{hosts}/{quote(self.database)}"


def is_address(text: str) -> bool:
    """True when it names a ClickHouse database, well or not, rather than a file."""
    return text.lower().startswith(SCHEMES)


def redacted(text: str) -> str:
    """`text` without what may be a password in an address in it."""
    flags = re.DOTALL | re.IGNORECASE
    text = re.sub(r"(clickhouses?://)(?:([^:@]*):.*@|([^@]*)@)", _user_only, text, flags=flags)
    return re.sub(r"(clickhouses?://[^?#]*[?#]).*", r"\1***", text, flags=flags)


def _user_only(found: "re.Match[str]") -> str:
    scheme, user, alone = found.groups()
    return f"{scheme}{alone}@" if user is None else f"{scheme}{user}:***@"


def parse(text: str) -> Target:
    """What an address says; a password it does not have is that of the environment. Raises ValueError, without it."""
    scheme, _, rest = text.partition("://")
    secure = scheme.lower() == "clickhouses"
    before, _, where = rest.rpartition("@")
    user, colon, password = before.partition(":")
    hosts, _, database = where.partition("/")
    if any(mark in where for mark in "?#"):
        raise ValueError("nothing may follow the database's name")
    found = [_host(each, TLS_PORT if secure else PORT) for each in hosts.split(",")]
    if len(set(found)) < len(found):
        raise ValueError("a host is named twice")
    user, database = unquote(user) or "default", unquote(database) or "default"
    if ":" in user:
        raise ValueError("a user's name must not have a colon")
    if re.search(r"[\0-\x1f\x7f/]", user + database):
        raise ValueError("the name of user and database must be plain text, without a slash")
    return Target(secure, tuple(found), user, unquote(password) if colon else os.environ.get(PASSWORD, ""), database)


def _host(text: str, default: int) -> tuple[str, int]:
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^\[\]:\s]+))(?::(\d{1,5}))?", text)
    port = int(found[3] or default) if found else 0
    if not found or not 0 < port < 65536:
        raise ValueError("hosts are HOST or HOST:PORT, with commas between them")
    return found[1] or found[2], port


class Server:
    """One host of a target. A connection is made when one is needed, and kept for IDLE_SECONDS."""

    def __init__(self, target: Target, host: str, port: int) -> None:
        self.name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._host, self._port = host, port
        self._database = target.database
        credentials = base64.b64encode(f"{target.user}:{target.password}".encode()).decode()
        self._headers = {"Authorization": f"Basic {credentials}", "Content-Type": "application/octet-stream"}
        self._context = tls.client_context(None) if target.tls else None
        self._connection: http.client.HTTPConnection | None = None
        self._used_at = 0.0  # monotonic seconds

    def rows(self, sql: str, seconds: float, settings: Mapping[str, str] | None = None) -> list[list[str]]:
        """What a query answers, as text. Raises as `post` does."""
        said = self.post(f"{sql} FORMAT TabSeparated", b"", seconds, settings).decode("utf-8", "replace")
        return [[_unescaped(field) for field in line.split("\t")] for line in said.splitlines()]

    def post(
        self, sql: str, body: bytes | memoryview, seconds: float, settings: Mapping[str, str] | None = None
    ) -> bytes:
        """The whole answer to a statement with `body` as its data, within `seconds`, more or less: for each wait.

        Raises RetryableError or PermanentError.
        """
        query = {"query": sql, "database": self._database, "wait_end_of_query": "1", **(settings or {})}
        try:
            connection = self._connected(seconds)
            connection.request("POST", f"/?{urlencode(query, quote_via=quote)}", body, self._headers)
            response = connection.getresponse()
            said = response.read()  # to the end: only then is it known
        except TimeoutError:
            self.close()
            raise RetryableError(f"{self.name}: no answer within {seconds:.0f} s") from None
        except ssl.SSLError as error:
            self.close()
            raise RetryableError(f"{self.name}: {explain(error)}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: no host can have such a name
            self.close()
            raise RetryableError(f"{self.name}: {_line(str(error)) or type(error).__name__}") from None
        except BaseException:
            self.close()
            raise
        self._used_at = monotonic()
        if response.getheader("Connection", "").lower() == "close":
            self.close()
        told = response.getheader("X-ClickHouse-Exception-Code")
        if response.status != 200 or told or said.startswith(b"Code: "):
            raise _refused(self.name, response.status, said.decode("utf-8", "replace"), told)
        return said

    def close(self) -> None:
        """Gives up the connection, if there is one."""
        if self._connection:
            self._connection.close()
            self._connection = None

    def _connected(self, seconds: float) -> http.client.HTTPConnection:
        """A connection that waits `seconds` at most for each piece."""
        if self._connection and monotonic() - self._used_at > IDLE_SECONDS:
            self.close()
        if not self._connection:
            patience = min(seconds, CONNECT_TIMEOUT)
            if self._context:
                self._connection = http.client.HTTPSConnection(
                    self._host, self._port, timeout=patience, context=self._context
                )
            else:
                self._connection = http.client.HTTPConnection(self._host, self._port, timeout=patience)
            self._connection.connect()
        self._connection.sock.settimeout(seconds)
        return self._connection


def _line(text: str) -> str:
    """What somebody else said, on one line, and not too long."""
    text = " ".join(text.split())
    return f"{text[:_MAX_SAID]}..." if len(text) > _MAX_SAID else text


def _refused(name: str, status: int, said: str, told: str | None) -> Exception:
    """The error that an answer stands for."""
    found = _CODE.match(said)
    code = int(found[1]) if found else int(told) if told and told.isdigit() else 0
    text = found[2] if found else said
    text = re.sub(r"[, ]*e\.what\(\) = .*", "", text, flags=re.DOTALL)
    text = re.sub(r"\. Expected one of: .*|[:. ]*\(version [^)]*\).*|: While executing.*", "", text, flags=re.DOTALL)
    text = _line(text)
    if not code:
        kind = RetryableError if status >= 500 or status in (408, 429) else PermanentError
        return kind(f"{name}: answered {status}" + (f": {text}" if text else ""))
    text = f"{name}: {text or 'failed'} (code {code})"
    return PermanentError(f"{text}: {_FINAL[code]}", code) if code in _FINAL else RetryableError(text, code)


_ESCAPES = {"t": "\t", "n": "\n", "\\": "\\", "'": "'", "0": "\0", "r": "\r", "b": "\b", "f": "\f"}


def _unescaped(text: str) -> str:
    """A field of TabSeparated."""
    return re.sub(r"\\(.)", lambda found: _ESCAPES.get(found[1], found[1]), text) if "\\" in text else text
