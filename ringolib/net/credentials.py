"""Credentials: the access token, and the TLS contexts for incoming and outgoing connections, read from files.

`Credentials.current` is replaced as a whole when the main thread reads the files again. Other threads read it without
a lock, once for each use. The token is never logged and is in no error text.
"""

from __future__ import annotations

import hmac
import os
import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

from ringolib.net import tls
from ringolib.timing import format_unix_time

if TYPE_CHECKING:
    import ssl

TOKEN_VARIABLE = "RINGOEXP_TOKEN"
MAX_TOKEN_LENGTH = 4096
"""Characters in a token, at most: a token must fit into a header."""
EXPIRY_WARNING_SECONDS = 14 * 86_400.0
"""How long before its end a certificate is reported."""
BEARER_PREFIX = "bearer."
"""The start of a subprotocol that carries a token, for clients that cannot set headers."""
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # RFC 6750 section 2.1
_BEARER = re.compile(r"bearer +([^ ]+) *", re.IGNORECASE)


class CredentialError(Exception):
    """A token, a certificate or a key cannot be used. The text names its source and the reason."""


class CredentialFiles(NamedTuple):
    """The paths of the files, or None."""

    token: str | None = None
    cert: str | None = None
    key: str | None = None
    client_ca: str | None = None
    consumer_tls: bool = False
    consumer_ca: str | None = None


class CredentialSet(NamedTuple):
    """The contents of the files."""

    token: str | None = None
    server: ssl.SSLContext | None = None  # None: no TLS
    client: ssl.SSLContext | None = None  # for links to the consumer
    valid: tuple[float, float] | None = None  # begin and end of the server certificate's validity, Unix times, if known


class Credentials:
    """The credentials in `files`. Reads them now, and again in `reload`. Raises CredentialError."""

    def __init__(self, files: CredentialFiles = CredentialFiles()) -> None:  # noqa: B008  # a constant
        self._files = files
        self.current = _read(files)

    def reload(self) -> None:
        """Read the files again. Raises CredentialError, and then keeps the old credentials."""
        self.current = _read(self._files)

    def certificate_problem(self) -> str | None:
        """Return why clients reject the server's certificate, or will reject it soon, by its dates; else None."""
        if not self.current.valid:
            return None
        begins, ends = self.current.valid
        now = time.time()
        if now < begins:
            return f"it is not valid before {format_unix_time(begins)}"
        if now > ends:
            return f"it expired at {format_unix_time(ends)}"
        return f"it expires soon, at {format_unix_time(ends)}" if now > ends - EXPIRY_WARNING_SECONDS else None

    def accepts(self, authorization: Sequence[str], subprotocols: Sequence[str] = ()) -> bool:
        """True if no token is required, or a request has it: in its `Authorization` header, or in a subprotocol.

        The header is RFC 6750's (section 2.1); a subprotocol is `bearer.TOKEN`, percent-encoded. The time of the
        comparison does not depend on the wrong token.
        """
        token = self.current.token
        if token is None:
            return True
        bearer = _BEARER.fullmatch(authorization[0]) if len(authorization) == 1 else None
        candidates = [bearer.group(1)] if bearer else []
        candidates += [unquote(name[len(BEARER_PREFIX) :]) for name in subprotocols if name.startswith(BEARER_PREFIX)]
        # A list, not a generator: all candidates are compared.
        return any([hmac.compare_digest(candidate.encode(), token.encode()) for candidate in candidates])


def read_token(path: str | None) -> str | None:
    """Return the token in the file, or without a path the one in the environment, or None. Raises CredentialError."""
    if path is None:
        token, source = os.environ.get(TOKEN_VARIABLE), TOKEN_VARIABLE
        if token is None:
            return None
    else:
        source = f"--token_file {path}"
        try:
            with open(path, "rb") as file:
                token = file.read(MAX_TOKEN_LENGTH + 3).decode("ascii", "replace")
        except (OSError, ValueError) as error:
            raise CredentialError(f"{source}: {getattr(error, 'strerror', None) or error}") from error
    token = token.strip()
    if not token:
        raise CredentialError(f"{source}: the token is empty")
    if len(token) > MAX_TOKEN_LENGTH or not _TOKEN.fullmatch(token):
        raise CredentialError(
            f"{source}: malformed token: expected at most {MAX_TOKEN_LENGTH} letters, digits and - . _ ~ + /, with = "
            "only at the end"
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
