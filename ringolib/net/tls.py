"""TLS: contexts made of files, and a socket that speaks it, for one thread.

`TLSSocket` has what the other rooms use of a socket, with the same meaning, so that nobody above it has to know. It is
`ssl.SSLObject` with a buffer on either side, not `ssl.SSLSocket`: whole blocks are read from the system at once, not
record by record; waiting has a deadline, not a timeout for each piece; and another thread may shut the socket
down without taking the encryption away from its owner.

A `TLSSocket` belongs to its connection's thread; only `shutdown(SHUT_RDWR)` is for others. A context is for all.
"""

import ssl
from pathlib import Path

NO_CHECK_TIME = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME, which `ssl` has no name for."""


class CredentialFileError(Exception):
    """A certificate, a key or a list of authorities cannot be used. The text names the file, and says why."""


def server_context(cert: str, key: str | None, client_ca: str | None) -> ssl.SSLContext:
    """For a server with this certificate chain and key, PEM files. With `client_ca` clients need a certificate of its.

    TLS 1.2 or newer. Without `key` it is in the file of the certificate. Raises CredentialFileError.
    """
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
    """For a client that trusts the authorities in the file `ca`, or else the system's, and checks the host's name.

    It shows the certificate `cert` to who asks for one. Raises CredentialFileError.
    """
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
    """From when to when a server's certificate is valid, Unix times: it shakes hands with itself, and looks. None if it
    cannot tell.
    """
    judge = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    judge.check_hostname = False
    try:
        judge.load_verify_locations(cert)
    except OSError:  # it is being replaced
        return None
    judge.verify_flags = ssl.VerifyFlags(judge.verify_flags | ssl.VERIFY_X509_PARTIAL_CHAIN | NO_CHECK_TIME)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = context.wrap_bio(to_server, to_client, server_side=True)
    client = judge.wrap_bio(to_client, to_server)
    for end in (client, server, client):  # then the client has seen the certificate
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError:
            return None
    found = client.getpeercert() or {}
    times = [found.get(key) for key in ("notBefore", "notAfter")]
    begins, ends = (ssl.cert_time_to_seconds(each) if isinstance(each, str) else None for each in times)
    return None if begins is None or ends is None else (begins, ends)


def _load_chain(context: ssl.SSLContext, cert: str, key: str | None) -> None:
    for path in filter(None, (cert, key)):
        _readable(path)
    encrypted = CredentialFileError(f"{key or cert}: the key is encrypted: it has to be readable without a password")

    def no_password() -> str:
        raise encrypted

    if key is None and b"PRIVATE KEY-----" not in Path(cert).read_bytes():
        raise CredentialFileError(f"{cert}: there is no key in it: name the key's file too (--tls_key; --key of send)")
    try:
        context.load_cert_chain(cert, key, no_password)
    except CredentialFileError:
        raise
    except ssl.SSLError as error:
        if error.reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"):
            raise CredentialFileError(f"{key or cert}: the key does not belong to the certificate in {cert}") from error
        where = cert if key is None else f"{cert}, {key}"
        raise CredentialFileError(f"{where}: no certificate and key in PEM ({reason_of(error)})") from error
    except OSError as error:
        raise CredentialFileError(f"{cert}: {error.strerror or error}") from error


def _load_authorities(context: ssl.SSLContext, path: str) -> None:
    _readable(path)
    try:
        context.load_verify_locations(path)
    except (ssl.SSLError, OSError) as error:
        raise CredentialFileError(f"{path}: no certificates of authorities in PEM ({reason_of(error)})") from error


def _readable(path: str) -> None:
    """Raises CredentialFileError for what cannot be read: OpenSSL does not say which file it is."""
    try:
        with open(path, "rb") as file:
            file.read(1)
    except (OSError, ValueError) as error:
        raise CredentialFileError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def reason_of(error: OSError) -> str:
    reason = getattr(error, "reason", None)
    return str(reason).replace("_", " ").lower() if reason else str(error.strerror or error)
