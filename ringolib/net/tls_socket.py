"""TODO: ringolib/net/tls_socket.py."""

import select
import socket
import ssl
from time import monotonic
from typing import Any

from ringolib.net.tls import reason_of

HANDSHAKE_TIMEOUT = 10.0
"""Seconds a client has for its part of the handshake."""
RECORD_TYPE = 0x16
"""The first byte of every TLS connection: a handshake record (RFC 8446 section 5.1)."""
READ_SIZE = 256 * 1024
WRITE_SIZE = 64 * 1024
"""Bytes that are encrypted at once: what the socket does not take is kept as long as it takes."""
HTTP_METHODS = (b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"CONNECT", b"TRACE", b"PRI")
_THEIRS = {
    "TLSV1_ALERT_UNKNOWN_CA": "does not know who signed our certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "says that our certificate has expired: renew it, then SIGHUP",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "does not accept our certificate",
    "SSLV3_ALERT_BAD_CERTIFICATE": "does not accept our certificate, or the name in it",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "wants a certificate of ours (--tls_cert, or --cert of send)",
    "TLSV1_ALERT_PROTOCOL_VERSION": "speaks other versions of TLS only",
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "and we have no way of encryption in common, or it wants a certificate of ours",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "has no certificate, which --client_ca asks for",
    "UNSUPPORTED_PROTOCOL": "speaks TLS older than 1.2 only",
    "WRONG_VERSION_NUMBER": "does not speak TLS on this port",
    "HTTP_REQUEST": "speaks HTTP without TLS",
}
"""What OpenSSL's reasons mean here, of the peer."""


class TLSError(OSError):
    """The peer cannot be spoken with over TLS. The text says why, of the peer: "it does not speak TLS on this port"."""


class NotTLS(TLSError):
    """What came is no TLS. `http`: it looks like an HTTP request."""

    def __init__(self, http: bool) -> None:
        super().__init__("it speaks HTTP without TLS" if http else "it does not speak TLS")
        self.http = http


def explain(error: ssl.SSLError) -> str:
    """What went wrong, in a sentence about the peer."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    known = _THEIRS.get(error.reason or "")
    return f"it {known}" if known else f"TLS failed: {reason_of(error)}"


class TLSSocket:
    """`sock`, encrypted. Takes it over; `handshake` comes first.

    `send` may return, or raise, before all of what it has encrypted is with the system: what it did not report as
    sent has to be given to it again, first, as OpenSSL asks for too. Raises TLSError for what TLS does not allow.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, host: str | None = None) -> None:
        """The client's side for a `host` whose certificate has to have that name, else the server's."""
        self._sock = sock
        self._timeout = sock.gettimeout()
        self._server_side = host is None
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        try:
            self._tls = context.wrap_bio(
                self._incoming, self._outgoing, server_side=self._server_side, server_hostname=host
            )
        except ValueError as error:  # a name that no certificate can have
            raise TLSError(f"{host}: {error}") from error
        self._out = b""  # encrypted, and not with the system yet
        self._encrypted = 0  # bytes given to `send`, encrypted in _out, and not reported as sent
        self._ended = False
        sock.setblocking(False)  # this class waits

    def handshake(self, timeout: float = HANDSHAKE_TIMEOUT) -> None:
        """Shakes hands within `timeout` seconds. Raises NotTLS, TLSError or another OSError."""
        deadline = monotonic() + timeout
        first = self._server_side
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                self._try_flush()  # the alert that says so
                raise TLSError(explain(error)) from error
            else:
                self._flush(deadline)
                return
            self._flush(deadline)
            data = self._receive(deadline)
            if not data:
                raise ConnectionResetError("it closed the connection during the TLS handshake")
            if first and data[0] != RECORD_TYPE:
                raise NotTLS(data.startswith(HTTP_METHODS))
            first = False
            self._incoming.write(data)

    def recv(self, size: int, flags: int = 0) -> bytes:
        """At most `size` bytes of what has come, at least one, or b"" at the end, as a socket does.

        A stream cut off without TLS's goodbye ends the same: what comes over it says itself where it ends.
        """
        found: list[bytes] = []
        left = size
        deadline = self._deadline(flags)
        received = False
        while left:
            try:
                data = self._tls.read(left)
            except ssl.SSLWantReadError:
                if found:
                    break
                if received and deadline == float("-inf"):
                    raise BlockingIOError from None  # however much comes that is TLS's own: poll tells of it
                if self._outgoing.pending:  # an answer of TLS's own, which the peer may wait for
                    self._try_flush()
                data = b"" if self._ended else self._receive(deadline)
                if data:
                    self._incoming.write(data)
                    received = True
                    continue
                self._ended = True
                self._incoming.write_eof()
                break
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                break
            except ssl.SSLError as error:
                self._try_flush()
                if found:
                    break  # the next call says so again
                raise TLSError(explain(error)) from error
            if not data:
                break
            found.append(data)
            left -= len(data)
        if self._outgoing.pending:
            self._try_flush()
        return found[0] if len(found) == 1 else b"".join(found)

    def recv_into(self, buffer: Any) -> int:
        """As `recv`, into `buffer`: how many bytes."""
        with memoryview(buffer) as view:
            data = self.recv(len(view))
            view[: len(data)] = data
        return len(data)

    def send(self, data: Any, flags: int = 0) -> int:
        """Sends what goes out before the timeout, at least one byte of `data`; how many bytes that were."""
        deadline = self._deadline(flags)
        sent = 0
        with memoryview(data) as view:
            while sent < len(view):
                if not self._encrypted:
                    try:
                        self._encrypted = self._tls.write(view[sent : sent + WRITE_SIZE])
                    except ssl.SSLError as error:
                        raise TLSError(explain(error)) from error
                try:
                    self._flush(deadline)
                except (BlockingIOError, TimeoutError):
                    if sent:
                        break
                    raise
                sent += self._encrypted
                self._encrypted = 0
        return sent

    def sendall(self, data: Any) -> None:
        """Sends all of `data` within the timeout. Raises OSError when it has not."""
        deadline = self._deadline(0)
        timeout = self._timeout
        sent = 0
        with memoryview(data) as view:
            try:
                while sent < len(view):
                    self._timeout = None if deadline is None else max(0.001, deadline - monotonic())
                    sent += self.send(view[sent:])
            finally:
                self._timeout = timeout

    def shutdown(self, how: int) -> None:
        """As a socket's; the owner's SHUT_WR says TLS's goodbye before. For other threads SHUT_RDWR only."""
        if how == socket.SHUT_WR:
            try:
                self._tls.unwrap()
            except (ssl.SSLError, ValueError):
                pass  # said, and the peer's is not waited for
            self._try_flush()
        self._sock.shutdown(how)

    def settimeout(self, timeout: float | None) -> None:
        """Seconds that each call may wait; None: for ever, 0: not at all."""
        self._timeout = timeout

    def setblocking(self, flag: bool) -> None:
        """`settimeout` with None or 0."""
        self._timeout = None if flag else 0.0

    def gettimeout(self) -> float | None:
        """What `settimeout` was given."""
        return self._timeout

    def fileno(self) -> int:
        """The descriptor. Readable means that there may be something to read: what `recv` left is not seen there, so
        poll it only after a `recv` that found nothing.
        """
        return self._sock.fileno()

    @property
    def family(self) -> int:
        """The socket's."""
        return self._sock.family

    def setsockopt(self, *option: Any) -> None:
        """The socket's."""
        self._sock.setsockopt(*option)

    def getsockname(self) -> Any:
        """The socket's."""
        return self._sock.getsockname()

    def getpeername(self) -> Any:
        """The socket's."""
        return self._sock.getpeername()

    def close(self) -> None:
        """The socket's."""
        self._sock.close()

    def _deadline(self, flags: int) -> float | None:
        if flags & socket.MSG_DONTWAIT:
            return float("-inf")
        return None if self._timeout is None else monotonic() + self._timeout if self._timeout else float("-inf")

    def _wait(self, event: int, deadline: float | None) -> None:
        """Returns once the socket is ready. Raises BlockingIOError if it may not wait, TimeoutError at the deadline."""
        if deadline == float("-inf"):
            raise BlockingIOError
        poll = select.poll()
        poll.register(self._sock, event)
        left = None if deadline is None else max(0.0, deadline - monotonic())
        if not poll.poll(None if left is None else left * 1000 + 1) and left is not None:
            raise TimeoutError("timed out")

    def _receive(self, deadline: float | None) -> bytes:
        """What has come, encrypted; b"" at the end of the stream. Raises TimeoutError after the deadline, whatever
        has come: it may be the next of many that say nothing.
        """
        if deadline is not None and deadline != float("-inf") and monotonic() > deadline:
            raise TimeoutError("timed out")
        while True:
            try:
                return self._sock.recv(READ_SIZE)
            except BlockingIOError:
                self._wait(select.POLLIN, deadline)

    def _flush(self, deadline: float | None) -> None:
        """Hands all that is encrypted to the system."""
        self._out += self._outgoing.read()
        while self._out:
            try:
                self._out = self._out[self._sock.send(self._out) :]
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline)

    def _try_flush(self) -> None:
        """Hands to the system what it takes at once."""
        try:
            self._flush(float("-inf"))
        except OSError:
            pass  # later, or never: it is TLS's own business
