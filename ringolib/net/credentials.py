"""Who may come in, and what this server shows where it goes: the token and the TLS contexts, read from files.

`Credentials.keys` is replaced as a whole when the files are read again, by the main thread; who uses it reads it once. The
token is never logged, and stays out of every text.
"""

import hmac
import os
import re
import ssl
import time
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import unquote

from ringolib.net import tls
from ringolib.timing import format_unix_time

TOKEN_VARIABLE = "RINGOEXP_TOKEN"
MAX_TOKEN = 4096
"""Characters of a token: it has to fit into a header."""
SOON = 14 * 86_400.0
"""Seconds before a certificate expires from when on it is said."""
PROTOCOL = "bearer."
"""How the subprotocol begins that carries a token, for clients that cannot set headers."""
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # RFC 6750 section 2.1
_BEARER = re.compile(r"bearer +([^ ]+) *", re.IGNORECASE)


class CredentialError(Exception):
    """A token, a certificate or a key cannot be used. The text names where it comes from, and says why."""


class CredentialFiles(NamedTuple):
    """Where the keys are: paths, or None."""

    token: str | None = None
    cert: str | None = None
    key: str | None = None
    client_ca: str | None = None
    consumer_tls: bool = False
    consumer_ca: str | None = None


class CredentialSet(NamedTuple):
    """What the files hold."""

    token: str | None = None
    server: ssl.SSLContext | None = None  # None: no TLS
    client: ssl.SSLContext | None = None  # for links to the consumer
    valid: tuple[float, float] | None = None  # from when to when the server's certificate is, Unix times, if known


class Credentials:
    """The keys in `files`, read at once, and again by `reload`. Raises CredentialError."""

    def __init__(self, files: CredentialFiles = CredentialFiles()) -> None:  # noqa: B008  # a constant
        self._files = files
        self.current = _read(files)

    def reload(self) -> None:
        """Reads the files again. Raises CredentialError, and then all stays as it was."""
        self.current = _read(self._files)

    def trouble(self) -> str | None:
        """What clients say against the dates of the certificate, by the wall clock, or will say soon, if anything."""
        if not self.current.valid:
            return None
        begins, ends = self.current.valid
        now = time.time()
        if now < begins:
            return f"it is not valid before {format_unix_time(begins)}"
        if now > ends:
            return f"it has expired: it was valid until {format_unix_time(ends)}"
        return f"it expires soon: it is valid until {format_unix_time(ends)}" if now > ends - SOON else None

    def accepts(self, authorization: Sequence[str], subprotocols: Sequence[str] = ()) -> bool:
        """True when there is no token, or it is in the `Authorization` header, or in a subprotocol.

        Takes as long for one wrong token as for another (RFC 6750 section 2.1; `bearer.TOKEN`, percent-encoded).
        """
        token = self.current.token
        if token is None:
            return True
        bearer = _BEARER.fullmatch(authorization[0]) if len(authorization) == 1 else None
        given = [bearer.group(1)] if bearer else []
        given += [unquote(each[len(PROTOCOL) :]) for each in subprotocols if each.startswith(PROTOCOL)]
        return any([hmac.compare_digest(each.encode(), token.encode()) for each in given])


def read_token(path: str | None) -> str | None:
    """The token in a file, or else in the environment; None if there is neither. Raises CredentialError."""
    if path is None:
        token, where = os.environ.get(TOKEN_VARIABLE), TOKEN_VARIABLE
        if token is None:
            return None
    else:
        where = f"--token_file {path}"
        try:
            with open(path, "rb") as file:
                token = file.read(MAX_TOKEN + 3).decode("ascii", "replace")
        except (OSError, ValueError) as error:
            raise CredentialError(f"{where}: {getattr(error, 'strerror', None) or error}") from error
    token = token.strip()
    if not token:
        raise CredentialError(f"{where}: it is empty: it has to hold a token, or not be given")
    if len(token) > MAX_TOKEN or not _TOKEN.fullmatch(token):
        raise CredentialError(
            f"{where}: not a token: at most {MAX_TOKEN} letters, digits, - . _ ~ + and /, and perhaps = at its end"
        )
    return token


def _read(files: CredentialFiles) -> CredentialSet:
    try:
        server = tls.server_context(files.cert, files.key, files.client_ca) if files.cert else None
        client = tls.client_context(files.consumer_ca, files.cert, files.key) if files.consumer_tls else None
    except tls.CredentialFileError as error:
        raise CredentialError(str(error)) from error
    valid = tls.validity(server, files.cert) if server and files.cert else None
    return CredentialSet(read_token(files.token), server, client, valid)
