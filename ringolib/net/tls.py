"""TLS contexts made from certificate files, and the validity of a certificate.

No state. A context may be used by all threads. `tls_socket` has the socket. A Python without the module `ssl` can do
everything but TLS: the functions that make a context refuse, so nothing else here is reached.
"""

from __future__ import annotations

from pathlib import Path

try:
    import ssl
except ImportError:
    ssl = None  # type: ignore[assignment]

NO_CHECK_TIME = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME, which `ssl` has no name for."""


class CredentialFileError(Exception):
    """A file with a certificate, a key or CA certificates cannot be used. The text names the file and the reason.

    Also raised if this Python has no TLS at all.
    """


def server_context(cert: str, key: str | None, client_ca: str | None) -> ssl.SSLContext:
    """Return the context of a server with this certificate chain and key, paths of PEM files. TLS 1.2 or newer.

    Without `key`, the key is in the file of the certificate. With `client_ca`, clients must show a certificate that
    one of its authorities has signed. Raises CredentialFileError.
    """
    _check_available()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    _load_chain(context, cert, key)
    if client_ca:
        _load_authorities(context, client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(ca: str | None, cert: str | None = None, key: str | None = None) -> ssl.SSLContext:
    """Return the context of a client that checks the host name. TLS 1.2 or newer.

    The client trusts the authorities in the file `ca`; without it, the system's authorities. It shows the certificate
    `cert` to a server that asks for one. Raises CredentialFileError.
    """
    _check_available()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca:
        _load_authorities(context, ca)
    else:
        context.load_default_certs()
    if cert:
        _load_chain(context, cert, key)
    return context


def validity(context: ssl.SSLContext, cert: str) -> tuple[float, float] | None:
    """Return the first and last moment of a server certificate's validity, Unix times; None if they are unknown.

    `ssl` gives the dates of a peer's certificate only, so the server's context shakes hands with a client in memory.
    """
    verifier = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    verifier.check_hostname = False
    try:
        verifier.load_verify_locations(cert)
    except OSError:  # the file is being replaced
        return None
    flags = verifier.verify_flags | ssl.VERIFY_X509_PARTIAL_CHAIN | NO_CHECK_TIME
    verifier.verify_flags = ssl.VerifyFlags(flags)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = context.wrap_bio(to_server, to_client, server_side=True)
    client = verifier.wrap_bio(to_client, to_server)
    for end in (client, server, client):  # after these three steps the client has the certificate
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError:
            return None
    certificate = client.getpeercert() or {}
    begins, ends = certificate.get("notBefore"), certificate.get("notAfter")
    if not isinstance(begins, str) or not isinstance(ends, str):
        return None
    return ssl.cert_time_to_seconds(begins), ssl.cert_time_to_seconds(ends)


def error_text(error: OSError) -> str:
    """Return OpenSSL's reason in lower-case words, or the system's text."""
    reason = getattr(error, "reason", None)
    return str(reason).replace("_", " ").lower() if reason else str(error.strerror or error)


def _check_available() -> None:
    if not ssl:
        raise CredentialFileError(
            "TLS is not possible: this Python was built without the module _ssl (OpenSSL): use another Python"
        )


def _load_chain(context: ssl.SSLContext, cert: str, key: str | None) -> None:
    for path in filter(None, (cert, key)):
        _check_readable(path)
    encrypted = CredentialFileError(f"{key or cert}: the private key is encrypted: remove its password")

    def no_password() -> str:
        raise encrypted

    if key is None and b"PRIVATE KEY-----" not in Path(cert).read_bytes():
        raise CredentialFileError(f"{cert}: the file has no private key: name the key's file (--tls_key, send: --key)")
    try:
        context.load_cert_chain(cert, key, no_password)
    except CredentialFileError:
        raise
    except ssl.SSLError as error:
        if error.reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"):
            raise CredentialFileError(f"{key or cert}: the key does not belong to the certificate in {cert}") from error
        files = cert if key is None else f"{cert}, {key}"
        raise CredentialFileError(f"{files}: not a PEM certificate and private key ({error_text(error)})") from error
    except OSError as error:
        raise CredentialFileError(f"{cert}: {error.strerror or error}") from error


def _load_authorities(context: ssl.SSLContext, path: str) -> None:
    _check_readable(path)
    try:
        context.load_verify_locations(path)
    except (ssl.SSLError, OSError) as error:
        raise CredentialFileError(f"{path}: not a PEM file of CA certificates ({error_text(error)})") from error


def _check_readable(path: str) -> None:
    """Raise CredentialFileError if the file cannot be read: OpenSSL's errors do not name the file."""
    try:
        with open(path, "rb") as file:
            file.read(1)
    except (OSError, ValueError) as error:
        raise CredentialFileError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
