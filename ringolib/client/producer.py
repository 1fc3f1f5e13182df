"""A client that neither loses nor doubles: what it is given is stored exactly once, whatever fails in between.

    with Producer("ws://localhost:6660/v1.0/ingest") as producer:
        producer.send(range(1_000_000))

It names its records (source, sequence), keeps them until they are acked, and after a lost connection
sends what is not acked again, under the same names: the store keeps each once.

The thread `producer` owns the connection: it connects, sends, and reads acks. `_lock` guards everything that it
shares with callers; `_work` (there is something to send, or to end) and `_progress` (acks came, or it
gave up) share it. Nothing is sent or received under the lock.
"""

import select
import socket
import ssl
import threading
import uuid
from array import array
from collections import deque
from collections.abc import Iterable
from time import monotonic
from urllib.parse import urlsplit

from ringolib.net.addresses import Endpoint
from ringolib.net.tls import client_context
from ringolib.net.tls_socket import TLSError
from ringolib.net.websocket import HandshakeError
from ringolib.net.websocket_client import ClientConnection
from ringolib.timing import backoff
from ringolib.wire import INGEST_PATH, MAX_SEQUENCE, SUBPROTOCOL, Run, WireError, decode_ack, encode_batch

URL = f"ws://localhost:6660{INGEST_PATH}"
CHUNK_RECORDS = 16_384
"""Most records in a message."""
MAX_UNACKED = 1_048_576
"""Records kept for sending again; `send` waits while there are more."""
STALL_TIMEOUT = 90.0
"""Seconds without an ack, or with a message half sent, before the connection is given up: more than a publisher takes
to give up a link to its consumer, or its clients would send again what it is about to store."""
PERMANENT_CLOSE_CODES = (1002, 1003, 1007, 1008, 1009)
"""Close codes that say that sending the same again is of no use (RFC 6455 section 7.4.1)."""


class ProducerError(Exception):
    """The server takes nothing, however often it is sent, or TLS fails from the start. The text says why."""


class Producer:
    """Sends integers to the `/v1.0/ingest` of `url`, as records `first`, `first + 1`, ... of `source`.

    A new source unless one is given. To go on after the program itself was killed, give the same source, and as
    `first` a number up to which all is known to be acked, with the values from there on. To a server that wants a
    `token`, give it. `wss://` is checked against `context`, or else the system's authorities. Raises ValueError for
    a URL that is not `ws://HOST[:PORT]/PATH`, `wss://HOST[:PORT]/PATH` or `ws+unix:SOCKET:/PATH`. As a context manager,
    it flushes at the end
    of the block.
    """

    def __init__(
        self,
        url: str = URL,
        source: uuid.UUID | None = None,
        first: int = 0,
        token: str | None = None,
        context: ssl.SSLContext | None = None,
    ) -> None:
        try:
            parts = urlsplit(url)
            secure = parts.scheme == "wss"
            host, port = parts.hostname or "", (443 if secure else 80) if parts.port is None else parts.port
            host.encode("idna")
            path, right = parts.path, parts.scheme in ("ws", "wss") and host and port
            right = right and not parts.query and not parts.fragment
            if parts.scheme == "ws+unix":  # as Node's ws writes it
                file, _, path = url.partition(":")[2].removeprefix("//").partition(":")
                host, right = f"unix:{file}", bool(file) and "\0" not in file
            named = "@" in parts.netloc and parts.scheme != "ws+unix"
        except ValueError:
            right = named = False
        if named:  # not shown: it may be a secret
            raise ValueError("a URL with a name or a password in it is not accepted: a token is given beside it")
        if not right or not all("!" <= c <= "~" for c in path):
            forms = "ws://HOST:PORT/v1.0/ingest, wss:// for TLS, or ws+unix:PATH:/v1.0/ingest"
            raise ValueError(f"{url!r} is not accepted: {forms}")
        if context and not secure:
            raise ValueError(f"{url!r} is not accepted with certificates: TLS is wss://")
        if not 0 <= first < MAX_SEQUENCE:
            raise ValueError(f"first {first} is not accepted: 0 to 2**63 - 2")
        self.url = url
        self.source = source or uuid.uuid4()
        self.first = first
        self._host, self._port, self._path = host, port, INGEST_PATH if path in ("", "/") else path
        self._token = token
        self._context = (context or client_context(None)) if secure else None

        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._progress = threading.Condition(self._lock)
        # Guarded by _lock.
        self._chunks: deque[tuple[int, array[int]]] = deque()  # (first sequence, values), the oldest not all acked
        self._unsent = 0  # how many chunks, from the right, are not sent on this connection
        self._next = first  # the sequence of the next record
        self._acked = first  # everything before it is stored
        self._links = 0
        self._error: ProducerError | None = None
        self._trouble: str | None = None
        self._closed = False

        # Wakes the thread from waiting for its socket.
        self._waked, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        # Daemon: a program that ends without `close` does not hang.
        self._thread = threading.Thread(target=self._run, name="producer", daemon=True)
        self._thread.start()

    @property
    def sent(self) -> int:
        """Records taken by `send`."""
        return self._next - self.first

    @property
    def acked(self) -> int:
        """Records, of those, that are known to be stored."""
        return self._acked - self.first

    @property
    def reconnects(self) -> int:
        """Connections beyond the first."""
        return max(0, self._links - 1)

    @property
    def trouble(self) -> str | None:
        """Why the last connection failed or could not be had; None once something is acked again."""
        return self._trouble

    def send(self, values: Iterable[int]) -> None:
        """Takes `values`, 64-bit integers, to be stored in this order. Returns once they are in memory here.

        Waits while MAX_UNACKED records are not acked. Raises OverflowError for a value beyond 64 bits
        (none of `values` is taken then), ProducerError when there is no use in trying again, ValueError once
        closed, and where the numbers of a source end.
        """
        block = values if isinstance(values, array) and values.typecode == "q" else array("q", values)
        for start in range(0, len(block), CHUNK_RECORDS):
            chunk = block[start : start + CHUNK_RECORDS]
            with self._lock:
                while self._next - self._acked >= MAX_UNACKED and not self._error and not self._closed:
                    self._progress.wait()
                self._check()
                if self._next + len(chunk) > MAX_SEQUENCE:
                    raise ValueError("sequences end at 2**63 - 1: go on with a new source")
                self._chunks.append((self._next, chunk))
                self._next += len(chunk)
                self._unsent += 1
                self._wake_up()

    def flush(self, timeout: float | None = None) -> None:
        """Returns when all is acked. Raises TimeoutError after `timeout` seconds, else what `send` raises."""
        deadline = None if timeout is None else monotonic() + timeout
        with self._lock:
            while self._acked < self._next:
                self._check()
                left = None if deadline is None else deadline - monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError(f"{self._next - self._acked} records are not acked")
                self._progress.wait(left)

    def close(self) -> None:
        """Ends the connection. What is not acked by then may or may not be stored. Does nothing the second time."""
        with self._lock:
            self._closed = True
            self._work.notify_all()
            self._progress.notify_all()
            self._wake_up()
        self._thread.join()
        self._waked.close()
        self._wake.close()

    def __enter__(self) -> "Producer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            self.close()

    def _check(self) -> None:
        assert self._lock.locked()
        if self._error:
            raise ProducerError(str(self._error)) from self._error
        if self._closed:
            raise ValueError("the producer is closed")

    def _wake_up(self) -> None:
        """Makes the thread look at what there is to do."""
        assert self._lock.locked()
        self._work.notify()
        if self._wake.fileno() >= 0:
            try:
                self._wake.send(b"x")
            except BlockingIOError:
                pass  # it has been told often enough

    # The thread.

    def _run(self) -> None:
        """Connects when there is something to send, serves until the connection is lost, and pauses between tries."""
        failures = 0
        while True:
            with self._lock:
                while not self._chunks and not self._closed:
                    self._work.wait()
                if self._closed:
                    return
            acked = self._acked
            try:
                self._serve()
            except (OSError, HandshakeError, WireError) as error:
                self._trouble = str(error)
                refused = isinstance(error, HandshakeError) and error.status and _for_good(error.status)
                # A certificate, say. Once there was a connection, the server's may have been replaced, and be again.
                if refused or isinstance(error, TLSError) and not self._links:
                    self._give_up(f"{self.url}: {error}")
            except ProducerError as error:
                self._give_up(f"{self.url}: {error}")
            except Exception as error:  # a bug: who waits must hear of it
                self._give_up(f"{self.url}: {type(error).__name__}: {error}")
            failures = 0 if self._acked > acked else failures + 1
            with self._lock:
                until = monotonic() + backoff(failures)
                while not self._closed and (left := until - monotonic()) > 0:
                    self._work.wait(left)
                if self._closed or self._error:
                    return

    def _give_up(self, reason: str) -> None:
        with self._lock:
            self._error = ProducerError(reason)
            self._progress.notify_all()

    def _serve(self) -> None:
        """One connection: sends everything that is not acked, and what comes, until it is closed.

        Raises OSError or HandshakeError when it is lost or cannot be had, ProducerError when the server
        refuses for good.
        """
        endpoint = Endpoint(self._host, self._port, self._host)
        link = ClientConnection(endpoint, self._path, SUBPROTOCOL, self._context, self._token)
        try:
            with self._lock:
                self._links += 1
                self._unsent = len(self._chunks)
                base = self._chunks[0][0] if self._chunks else self._next
            link.sock.setblocking(False)
            moved = monotonic()  # when something was acked, or part of a waiting message sent
            sent = base  # everything before it is sent, or begun
            while True:
                before = link.unsent  # of a message that could not leave at once: what leaves at once tells nothing
                acked = self._read_acks(link, base, sent)
                link.flush()
                if acked or link.unsent < before:
                    moved = monotonic()
                with self._lock:
                    if self._closed:
                        break
                    chunk = self._chunks[-self._unsent] if self._unsent and not link.unsent else None
                    waiting = bool(self._chunks)
                    self._unsent -= chunk is not None
                if chunk:
                    first, values = chunk
                    link.begin_bytes(encode_batch([Run(self.source.bytes, first, len(values))], values))
                    sent = first + len(values)
                    link.flush()
                    continue
                if waiting and monotonic() > moved + STALL_TIMEOUT:
                    raise TimeoutError(f"nothing was acked, nor could be sent, within {STALL_TIMEOUT:.0f} s")
                self._wait(link, moved + STALL_TIMEOUT - monotonic() if waiting else None)
                if not waiting:
                    moved = monotonic()
        except BaseException:
            link.abort()
            link.sock.close()
            raise
        link.finish(1000, "")

    def _wait(self, link: ClientConnection, seconds: float | None) -> None:
        """Returns when there is something to read, or to send and room for it, or after `seconds`."""
        poll = select.poll()
        poll.register(link.sock, select.POLLIN | (select.POLLOUT if link.unsent else 0))
        poll.register(self._waked, select.POLLIN)
        for fd, _ in poll.poll(None if seconds is None else max(0.0, seconds) * 1000):
            if fd == self._waked.fileno():
                self._waked.recv(4096)

    def _read_acks(self, link: ClientConnection, base: int, sent: int) -> bool:
        """Takes in the acks that have come, without waiting. True when there were some."""
        heard = False
        data: bytes | None = b""  # first, what came right behind the handshake
        while data is not None:
            acks = [base + decode_ack(message.payloads) for message in link.parse(data)]
            if acks:
                heard = True
                if acks[-1] > sent:
                    raise WireError(f"acked {acks[-1] - base} records of {sent - base} sent")
                self._take_ack(acks[-1])
            if link.ending:
                code, reason = link.ending
                kind = ProducerError if code in PERMANENT_CLOSE_CODES else ConnectionResetError
                raise kind(f"closed with {code:d} {reason}")
            data = link.read(wait=False)
            if data == b"":
                raise ConnectionResetError("closed the connection")
        return heard

    def _take_ack(self, acked: int) -> None:
        """Everything before `acked` is stored."""
        with self._lock:
            self._acked = max(self._acked, acked)
            self._trouble = None
            while self._chunks and self._chunks[0][0] + len(self._chunks[0][1]) <= self._acked:
                self._chunks.popleft()
            self._unsent = min(self._unsent, len(self._chunks))
            self._progress.notify_all()


def _for_good(status: int) -> bool:
    """True for the answer to a handshake that will be the same the next time."""
    return status < 400 or status in (400, 401, 403, 404, 405, 426)  # below 400: no WebSocket is there
