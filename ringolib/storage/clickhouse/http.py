"""A client for ClickHouse's HTTP interface: one request, its response, and the errors.

A failed request raises `RetryableError` if a retry may succeed, or `PermanentError` if the configuration or the data
must be changed first. A `Server` belongs to one thread at a time. No thread runs here, and nothing is locked.
"""

import base64
import math
import re
from collections.abc import Mapping
from time import monotonic
from typing import Any
from urllib.parse import quote, urlencode

from ringolib.net import tls
from ringolib.net.addresses import Endpoint, format_address, host_header
from ringolib.net.http_client import MAX_BODY_BYTES, Head, HTTPConnection, HTTPError, open_stream
from ringolib.storage.clickhouse.url import PASSWORD_VARIABLE, Target
from ringolib.timing import deadline_after, remaining

IDLE_SECONDS = 2.0
"""How long an idle connection is kept for reuse. Servers close idle connections after 3 s or more."""
CONNECT_TIMEOUT = 5.0
MAX_ERROR_CHARACTERS = 300
SUCCESSES = (200, 204)
"""The statuses of an executed statement. A proxy may send 204, No Content, for ClickHouse's 200 with an empty body."""

_WRONG_SCHEMA = "the table has a different schema: use another database"
_REMEDIES = {
    16: _WRONG_SCHEMA,
    27: _WRONG_SCHEMA,
    33: _WRONG_SCHEMA,
    47: _WRONG_SCHEMA,
    53: _WRONG_SCHEMA,
    60: "a table is missing: restart to create it",
    62: "the server does not understand this SQL: use another version of ClickHouse",
    81: "create it with CREATE DATABASE, or use another one",
    139: "add it to the server's configuration",
    164: "the user is read-only: use another user, or change the user's profile",
    170: "system.clusters on the server lists its clusters",
    192: "check the user name",
    193: f"check the password, in the address or in {PASSWORD_VARIABLE}",
    194: f"a password is required, in the address or in {PASSWORD_VARIABLE}",
    195: "the user may not connect from this address: change the user's networks",
    291: "the user may not use this database: grant access to it",
    452: "the user may not change a setting that makes inserts safe: change the user's profile",
    497: "grant this privilege to the user",
    516: f"check the user name and the password, in the address or in {PASSWORD_VARIABLE}",
}
"""Error codes of the server that are permanent, from its ErrorCodes.cpp, and what to do. All others are retried."""
_EXCEPTION = re.compile(
    r"^Code: ([0-9]{1,9})[.,] *(?:e\.displayText\(\) = )?(?:DB::(?:NetException|Exception): )?(.*)", re.DOTALL
)
_NOISE = (
    re.compile(r"[, ]*e\.what\(\) = .*", re.DOTALL),
    re.compile(r"\. Expected one of: .*|[:. ]*\(version [^)]*\).*|: While executing.*", re.DOTALL),
)
"""Parts of the server's error texts that do not help a reader."""


class ClickHouseError(Exception):
    """A request failed. The text names cause and remedy; `code` is the server's error code, or 0 without one."""

    def __init__(self, text: str, code: int = 0) -> None:
        super().__init__(text)
        self.code = code


class RetryableError(ClickHouseError):
    """The statement may or may not have been executed. A retry may succeed."""


class PermanentError(ClickHouseError):
    """The statement was not executed, and a retry fails too until the cause is removed."""


class Server:
    """One host of a target. It connects on demand, and keeps an idle connection for IDLE_SECONDS."""

    def __init__(self, target: Target, host: str, port: int) -> None:
        self.name = format_address(host, port)
        self._endpoint = Endpoint(host, port, host)
        self._database = target.database
        credentials = base64.b64encode(f"{target.user}:{target.password}".encode()).decode()
        self._headers = {
            "Authorization": f"Basic {credentials}",
            "Content-Type": "application/octet-stream",
            "Accept-Encoding": "identity",
        }
        self.deadline = math.inf  # monotonic seconds: no request lasts longer, whatever its own timeout
        self._context = tls.client_context(None) if target.tls else None
        self._sock: Any = None
        self._connection: HTTPConnection | None = None  # on _sock
        self._used_at = 0.0  # monotonic seconds

    def query(self, sql: str, timeout: float, settings: Mapping[str, str] | None = None) -> list[list[str]]:
        """Return the rows of a query as text. Raises the same errors as `post`."""
        body = self.post(f"{sql} FORMAT TabSeparated", b"", timeout, settings).decode("utf-8", "replace")
        return [[_unescape(field) for field in line.split("\t")] for line in body.splitlines()]

    def post(
        self,
        sql: str,
        body: bytes | memoryview,
        timeout: float,
        settings: Mapping[str, str] | None = None,
        max_answer: int = MAX_BODY_BYTES,
    ) -> bytes:
        """Execute a statement with `body` as its data, and return the whole response body.

        The body has at most `max_answer` bytes. `timeout` is in seconds and limits the whole request, from the
        connection to the end of the response; so does `deadline`. Raises RetryableError or PermanentError.
        """
        timeout = min(timeout, remaining(self.deadline))
        parameters = {
            "query": sql,
            "database": self._database,
            "wait_end_of_query": "1",
            "send_progress_in_http_headers": "0",
            **(settings or {}),
        }
        try:
            head, content = self._exchange(f"/?{urlencode(parameters, quote_via=quote)}", body, timeout, max_answer)
        except BaseException as error:
            self.close()
            reason = _connection_failure(error, timeout)
            if reason is None:
                raise
            raise RetryableError(f"{self.name}: {reason}") from None
        code = next(iter(head.values("X-ClickHouse-Exception-Code")), "")
        if head.status not in SUCCESSES or code or content.startswith(b"Code: "):
            raise _server_error(self.name, head.status, content.decode("utf-8", "replace"), code)
        return content

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._sock:
            self._sock.close()
            self._sock = self._connection = None

    def _exchange(self, target: str, body: bytes | memoryview, timeout: float, max_answer: int) -> tuple[Head, bytes]:
        """Send a request and read the whole response, because an error may follow at the end of its body."""
        deadline = deadline_after(timeout)
        host = host_header(self._endpoint.name, self._endpoint.port)
        headers = {"Host": host, **self._headers, "Content-Length": str(len(body))}
        connection = self._connect(timeout)
        connection.send("POST", target, headers, deadline, body)
        head = connection.read_head(deadline)
        content = connection.read_body(deadline, max_answer)
        self._used_at = monotonic()
        if not connection.is_reusable():
            self.close()
        return head, content

    def _connect(self, timeout: float) -> HTTPConnection:
        """Return the idle connection, or a new one. It may take CONNECT_TIMEOUT, and at most `timeout` seconds."""
        if self._connection and (monotonic() - self._used_at > IDLE_SECONDS or not self._connection.is_reusable()):
            self.close()
        if not self._connection:
            self._sock = open_stream(self._endpoint, self._context, deadline_after(min(timeout, CONNECT_TIMEOUT)))
            self._connection = HTTPConnection(self._sock)
        return self._connection


def _connection_failure(error: BaseException, timeout: float) -> str | None:
    """Return why no complete response arrived, or None if `error` has another cause than the connection."""
    if isinstance(error, TimeoutError):
        return f"no complete answer within {round(timeout, 1):g} s"
    if isinstance(error, OSError | HTTPError | ValueError):  # ValueError: an impossible host name
        return _one_line(str(error)) or type(error).__name__
    return None


def _server_error(name: str, status: int, content: str, code_header: str) -> ClickHouseError:
    """Return the error that a response reports."""
    match = _EXCEPTION.match(content)
    text = match[2] if match else content
    if match:
        code = int(match[1])
    else:
        code = int(code_header) if re.fullmatch("[0-9]{1,9}", code_header) else 0
    for noise in _NOISE:
        text = noise.sub("", text)
    text = _one_line(text)
    if not code:
        refused = 300 <= status < 500 and status not in (408, 425, 429)  # below 300 it may have been executed
        kind = PermanentError if refused else RetryableError
        return kind(f"{name}: answered {status}" + (f": {text}" if text else ""))
    text = f"{name}: {text or 'failed'} (code {code})"
    if code in _REMEDIES:
        return PermanentError(f"{text}: {_REMEDIES[code]}", code)
    return RetryableError(text, code)


def _one_line(text: str) -> str:
    """Return text from elsewhere on one line, cut to MAX_ERROR_CHARACTERS."""
    text = " ".join(text.split())
    return f"{text[:MAX_ERROR_CHARACTERS]}..." if len(text) > MAX_ERROR_CHARACTERS else text


_ESCAPES = {"t": "\t", "n": "\n", "\\": "\\", "'": "'", "0": "\0", "r": "\r", "b": "\b", "f": "\f"}


def _unescape(text: str) -> str:
    """Return the value of a TabSeparated field."""
    return re.sub(r"\\(.)", lambda match: _ESCAPES.get(match[1], match[1]), text) if "\\" in text else text
