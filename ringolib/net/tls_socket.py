"""A socket that speaks TLS, with the methods of `socket.socket` that the program uses, and with the same meaning.

`TLSSocket` is an `ssl.SSLObject` with a buffer on either side, not an `ssl.SSLSocket`, for three reasons: it reads
whole blocks from the system, not record by record; its timeouts are deadlines for the whole call, not for each piece;
and another thread may shut the socket down while the owner still encrypts.

A `TLSSocket` belongs to one thread at a time: the `http-N` of its connection, then the ingest loop if it becomes a
WebSocket; or the link that connected it. Only `shutdown(SHUT_RDWR)` is for other threads. Nothing is locked.
"""

from __future__ import annotations

import math
import select
import socket
from time import monotonic
from typing import Any

try:
    import ssl
except ImportError:
    ssl = None  # type: ignore[assignment]  # then there is no context to make a TLSSocket with

from ringolib.net.sockets import READ_SIZE
from ringolib.net.tls import error_text
from ringolib.timing import deadline_after, remaining

HANDSHAKE_TIMEOUT = 10.0
"""Seconds a client has for its part of the handshake."""
RECORD_TYPE = 0x16
"""The first byte of every TLS connection: a handshake record (RFC 8446 section 5.1)."""
WRITE_SIZE = 64 * 1024
"""Bytes that are encrypted at once. Encrypted bytes that the system does not take stay in memory."""
HTTP_METHODS = (b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"CONNECT", b"TRACE", b"PRI")
NO_WAIT = -math.inf
"""The deadline of a call that must not wait."""
_REASONS = {
    "TLSV1_ALERT_UNKNOWN_CA": "does not trust the authority that signed our certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "rejected our certificate as expired: renew it, then send SIGHUP",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "rejected our certificate",
    "SSLV3_ALERT_BAD_CERTIFICATE": "rejected our certificate, or the name in it",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "requires a client certificate (--tls_cert, send: --cert)",
    "TLSV1_ALERT_PROTOCOL_VERSION": "does not support our versions of TLS",
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "rejected the handshake: no cipher in common, or a client certificate is required",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "has no certificate, which --client_ca requires",
    "UNSUPPORTED_PROTOCOL": "supports only TLS older than 1.2",
    "WRONG_VERSION_NUMBER": "does not speak TLS on this port",
    "HTTP_REQUEST": "speaks HTTP without TLS",
}
"""OpenSSL's reasons in plain words, with the peer as the subject."""


class TLSError(OSError):
    """TLS with the peer failed. The text is a sentence about the peer: "it does not speak TLS on this port"."""


class NotTLS(TLSError):
    """The first bytes of the peer are not TLS. `http` is true if they look like an HTTP request."""

    def __init__(self, http: bool) -> None:
        super().__init__("it speaks HTTP without TLS" if http else "it does not speak TLS")
        self.http = http


def explain(error: ssl.SSLError) -> str:
    """Return the reason of an error as a sentence about the peer."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    reason = _REASONS.get(error.reason or "")
    return f"it {reason}" if reason else f"TLS failed: {error_text(error)}"


class TLSSocket:
    """Encrypts `sock`, which belongs to it from then on. Call `handshake` first.

    `send` may return, or raise, before the system has taken all encrypted bytes. The bytes that `send` did not report
    as sent must be the first bytes of the next call, as OpenSSL requires. Methods raise TLSError for violations of TLS.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, host: str | None = None) -> None:
        """Without `host`, be the server; with `host`, the client of a server whose certificate has this name."""
        self._sock = sock
        self._timeout = sock.gettimeout()
        self._server_side = host is None
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        try:
            self._tls = context.wrap_bio(
                self._incoming, self._outgoing, server_side=self._server_side, server_hostname=host
            )
        except ValueError as error:  # no certificate can have this name
            raise TLSError(f"{host}: {error}") from error
        self._out = b""  # encrypted bytes that the system has not taken yet
        self._encrypted = 0  # bytes that were given to `send`, are encrypted in _out, and are not reported as sent
        self._ended = False
        sock.setblocking(False)  # the methods wait with poll

    def handshake(self, timeout: float = HANDSHAKE_TIMEOUT) -> None:
        """Perform the TLS handshake within `timeout` seconds. Raises NotTLS, TLSError or another OSError."""
        self._handshake(deadline_after(timeout))

    def try_handshake(self) -> bool:
        """Go on with a client's handshake without waiting, and return whether it is done. Raises as `handshake` does.

        If it is not done, call it again when the socket is readable, or writable if `has_output`.
        """
        try:
            self._handshake(NO_WAIT)
        except BlockingIOError:
            return False
        return True

    @property
    def has_output(self) -> bool:
        """True if the system has not taken all encrypted bytes yet."""
        return bool(self._out)

    def _handshake(self, deadline: float) -> None:
        first = self._server_side
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                self._try_flush()  # the alert with the reason
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
        """Return 1 to `size` bytes, or b"" at the end of the stream, as a socket does.

        A stream that is cut off without a TLS close_notify ends in the same way: the protocols above TLS mark their own
        ends.
        """
        pieces: list[bytes] = []
        left = size
        deadline = self._deadline(flags)
        received = False
        while left:
            try:
                data = self._tls.read(left)
            except ssl.SSLWantReadError:
                if pieces:
                    break
                if received and deadline == NO_WAIT:
                    # The bytes just read contained no data, only TLS messages. A peer could send them without end, so
                    # this returns; poll reports the rest.
                    raise BlockingIOError from None
                if self._outgoing.pending:  # a TLS message of our own, which the peer may wait for
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
                if pieces:
                    break  # the next call raises the error again
                raise TLSError(explain(error)) from error
            if not data:
                break
            pieces.append(data)
            left -= len(data)
        if self._outgoing.pending:
            self._try_flush()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def recv_into(self, buffer: Any) -> int:
        """Read into `buffer` as `recv` does, and return the number of bytes."""
        with memoryview(buffer) as view:
            data = self.recv(len(view))
            view[: len(data)] = data
        return len(data)

    def send(self, data: Any, flags: int = 0) -> int:
        """Send as much of `data` as leaves before the timeout, at least one byte. Return the number of bytes."""
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
        """Send all of `data` within the timeout. Raises OSError if that fails."""
        deadline = self._deadline(0)
        timeout = self._timeout
        sent = 0
        with memoryview(data) as view:
            try:
                while sent < len(view):
                    self._timeout = None if deadline == math.inf else max(0.001, remaining(deadline))
                    sent += self.send(view[sent:])
            finally:
                self._timeout = timeout

    def shutdown(self, how: int) -> None:
        """Shut the socket down. The owner's SHUT_WR sends a close_notify first; other threads use SHUT_RDWR only."""
        if how == socket.SHUT_WR:
            try:
                self._tls.unwrap()
            except (ssl.SSLError, ValueError):
                pass  # ours is written; do not wait for the peer's
            self._try_flush()
        self._sock.shutdown(how)

    def settimeout(self, timeout: float | None) -> None:
        """Set the seconds that each call may wait: None is no limit, 0 is no wait."""
        self._timeout = timeout

    def setblocking(self, flag: bool) -> None:
        """Set the timeout to None or 0."""
        self._timeout = None if flag else 0.0

    def gettimeout(self) -> float | None:
        """Return the timeout in seconds; None is no limit."""
        return self._timeout

    def fileno(self) -> int:
        """Return the descriptor, for poll.

        Poll only after a `recv` that found no data: poll does not see decrypted bytes that `recv` left here.
        """
        return self._sock.fileno()

    @property
    def family(self) -> int:
        """As the socket's."""
        return self._sock.family

    def setsockopt(self, *option: Any) -> None:
        """As the socket's."""
        self._sock.setsockopt(*option)

    def getsockname(self) -> Any:
        """As the socket's."""
        return self._sock.getsockname()

    def getpeername(self) -> Any:
        """As the socket's."""
        return self._sock.getpeername()

    def close(self) -> None:
        """As the socket's."""
        self._sock.close()

    def _deadline(self, flags: int) -> float:
        """Return the deadline of a call that begins now."""
        if flags & socket.MSG_DONTWAIT or self._timeout == 0:
            return NO_WAIT
        return deadline_after(self._timeout)

    def _wait(self, event: int, deadline: float) -> None:
        """Wait until the socket is ready. Raises BlockingIOError for NO_WAIT, TimeoutError at the deadline."""
        if deadline == NO_WAIT:
            raise BlockingIOError
        poll = select.poll()
        poll.register(self._sock, event)
        milliseconds = None if deadline == math.inf else remaining(deadline) * 1000 + 1
        if not poll.poll(milliseconds) and milliseconds is not None:
            raise TimeoutError("timed out")

    def _receive(self, deadline: float) -> bytes:
        """Return encrypted bytes; b"" at the end of the stream.

        Raises TimeoutError after the deadline, even if bytes are there: a peer may send TLS messages without data for
        ever.
        """
        if NO_WAIT < deadline < monotonic():
            raise TimeoutError("timed out")
        while True:
            try:
                return self._sock.recv(READ_SIZE)
            except BlockingIOError:
                self._wait(select.POLLIN, deadline)

    def _flush(self, deadline: float) -> None:
        """Pass all encrypted bytes to the system."""
        self._out += self._outgoing.read()
        while self._out:
            try:
                self._out = self._out[self._sock.send(self._out) :]
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline)

    def _try_flush(self) -> None:
        """Pass the encrypted bytes to the system that it takes without waiting. Errors are for the next call."""
        try:
            self._flush(NO_WAIT)
        except OSError:
            pass  # a TLS message of our own; the caller's data is not affected
