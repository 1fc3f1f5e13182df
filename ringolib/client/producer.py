"""Producer: a client that stores each record exactly once, through lost connections and restarts of the server.

    with Producer("ws://localhost:6660/v1.0/ingest") as producer:
        producer.send(range(1_000_000))

A producer numbers its records and keeps them until they are acked. After a lost connection it sends the records that
are not acked again, with the same numbers, and the store keeps each number once.

The thread `producer` owns the connection: it connects, sends, and reads acks. `_lock` guards all state that it shares
with callers. Nothing is sent or received under the lock.

A producer belongs to the process that made it. A child has no thread `producer` after a fork, and the child's copy of
the lock may be locked for ever. So the child's calls fail before they take the lock.

At the end of the program, `_close_all` closes the producers that are left open.
"""

import atexit
import os
import select
import socket
import sys
import threading
import uuid
from array import array
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from time import monotonic
from typing import TYPE_CHECKING

from ringolib.client.url import URL, parse_url
from ringolib.net.addresses import Endpoint
from ringolib.net.credentials import TOKEN_FORM, is_token
from ringolib.net.tls import client_context
from ringolib.net.tls_socket import TLSError
from ringolib.net.websocket import HandshakeError
from ringolib.net.websocket_client import ClientConnection
from ringolib.timing import backoff, deadline_after, remaining, start, wait_until
from ringolib.wire import MAX_SEQUENCE, SUBPROTOCOL, Run, WireError, decode_ack, encode_batch

if TYPE_CHECKING:
    import ssl

CHUNK_RECORDS = 16_384
"""Maximum number of records in a message."""
MAX_UNACKED = 1_048_576
"""Maximum number of records that are kept until they are acked; `send` waits while there are more."""
STALL_TIMEOUT = 90.0
"""Seconds without an ack, and without progress in sending a message, after which a connection is dropped.

It is longer than a publisher waits for its consumer. Otherwise clients would send records again that the publisher is
about to store.
"""
EXIT_FLUSH_SECONDS = 5.0
"""How long the end of the program, or of a `with` block with an exception, waits for acks."""
EXIT_CLOSE_SECONDS = 2.0
"""How long the end of the program then waits for the closing handshakes."""
LAST_FINALIZER = -100
"""A priority below all of Python's own finalizers, so that they run first."""
PERMANENT_CLOSE_CODES = (1002, 1003, 1007, 1008, 1009)
"""Close codes after which the same records would be refused again (RFC 6455 section 7.4.1)."""
RETRYABLE_STATUSES = (408, 425, 429)
"""HTTP statuses below 500 after which the same handshake may succeed. Those below 400 come from other servers."""
PERMANENT_SERVER_STATUSES = (501, 505)
"""HTTP statuses from 500 on after which the same handshake would be refused again."""


class ProducerError(Exception):
    """The records cannot be sent: the text says why.

    The server refuses them permanently, the first connection fails because of TLS, or the producer belongs to another
    process.
    """


def is_permanent_status(status: int) -> bool:
    """True if a handshake that was answered with this HTTP status would be answered the same way again."""
    if status < 500:
        return status not in RETRYABLE_STATUSES
    return status in PERMANENT_SERVER_STATUSES


class Producer:
    """Sends integers to the server at `url`, as records `first`, `first + 1`, ... of `source`.

    `source` is a new UUID by default. To resume after the program was killed, use the same source; `first` is a number
    up to which all records are known to be acked, and `send` gets the values from there on. `token` is the server's
    access token. For `wss:` URLs, `context` verifies the server; by default, the system's authorities do.

    Raises ValueError for a URL that `parse_url` refuses and for a malformed token, and ThreadError. As a context
    manager, it flushes at the end of the block, after an exception for EXIT_FLUSH_SECONDS at most. So does the end of
    the program.
    """

    def __init__(
        self,
        url: str = URL,
        source: uuid.UUID | None = None,
        first: int = 0,
        token: str | None = None,
        context: "ssl.SSLContext | None" = None,
    ) -> None:
        self._target = parse_url(url)
        if context and not self._target.secure:
            raise ValueError(f"{url!r} is not accepted with certificates: TLS needs wss://")
        if token is not None and not is_token(token):
            raise ValueError(f"malformed token: expected {TOKEN_FORM}, without a newline")
        if not 0 <= first < MAX_SEQUENCE:
            raise ValueError(f"first {first} is not accepted: 0 to 2**63 - 2")
        self.url = url
        self.source = source or uuid.uuid4()
        self.first = first
        self._token = token
        self._pid = os.getpid()
        self._context = (context or client_context(None)) if self._target.secure else None

        self._lock = threading.Lock()
        # Notified when there are records to send, and by close. The thread waits for it.
        self._work = threading.Condition(self._lock)
        # Notified when acks arrive, when the producer fails, and by close. Callers of send and flush wait for it.
        self._progress = threading.Condition(self._lock)
        # Guarded by _lock.
        self._chunks: deque[tuple[int, array[int]]] = deque()  # (first sequence, values); the oldest is not fully acked
        self._unsent = 0  # chunks, counted from the right, that are not sent on this connection
        self._next = first  # sequence of the next record
        self._acked = first  # all records before it are stored
        self._transmitted = first  # all records before it were sent at least once; the last message may be incomplete
        self._connections = 0
        self._connected = False
        self._error: ProducerError | None = None
        self._trouble: str | None = None
        self._closed = False

        # A byte in this socket pair wakes the thread while it waits for the connection.
        self._wakeup_reader, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        # A daemon, so that a program that ends without `close` does not hang: see `_close_all`.
        self._thread = threading.Thread(target=self._run, name="producer", daemon=True)
        try:
            start(self._thread)
        except RuntimeError:
            self._wakeup_reader.close()
            self._wakeup.close()
            raise
        _open_producers.add(self)
        _close_with_multiprocessing(self._pid)

    @property
    def sent(self) -> int:
        """Records that `send` has accepted."""
        return self._next - self.first

    @property
    def acked(self) -> int:
        """Records that are known to be stored."""
        return self._acked - self.first

    @property
    def transmitted(self) -> int:
        """Records that were sent to the server at least once."""
        return self._transmitted - self.first

    @property
    def reconnects(self) -> int:
        """Connections beyond the first."""
        return max(0, self._connections - 1)

    @property
    def connected(self) -> bool:
        """True while there is a connection."""
        return self._connected

    @property
    def trouble(self) -> str | None:
        """Why the last connection failed; None once a record is acked again."""
        return self._trouble

    def send(self, values: Iterable[int]) -> None:
        """Accept `values`, 64-bit integers, which are stored in this order. Returns once they are in memory here.

        Waits while MAX_UNACKED records are not acked. Raises OverflowError for a value beyond 64 bits (then none of
        `values` is accepted), ProducerError if the server refuses permanently or another process made this producer,
        and ValueError if the producer is closed or the numbers of the source are used up.
        """
        self._check_process()
        block = values if isinstance(values, array) and values.typecode == "q" else array("q", values)
        for start_index in range(0, len(block), CHUNK_RECORDS):
            chunk = block[start_index : start_index + CHUNK_RECORDS]
            with self._lock:
                while self._next - self._acked >= MAX_UNACKED and not self._error and not self._closed:
                    self._progress.wait()
                self._check_usable()
                if self._next + len(chunk) > MAX_SEQUENCE:
                    raise ValueError("sequences end at 2**63 - 1: go on with a new source")
                self._chunks.append((self._next, chunk))
                self._next += len(chunk)
                self._unsent += 1
                self._wake_thread()

    def flush(self, timeout: float | None = None) -> None:
        """Wait until all records are acked. Raises TimeoutError after `timeout` seconds, and what `send` raises."""
        self._check_process()

        def ended() -> bool:
            return self._acked >= self._next or self._error is not None or self._closed

        with self._lock:
            wait_until(self._progress, ended, deadline_after(timeout))
            if self._acked < self._next:
                self._check_usable()
                raise TimeoutError(f"{self._next - self._acked} records are not acked")

    def close(self, timeout: float | None = None, report: bool = True) -> None:
        """Close the connection. Records that are not acked by then may or may not be stored. Idempotent.

        Waits for the closing handshake, for `timeout` seconds at most. If records are not acked, a line on stderr says
        how to resume, unless `report` is false. In a process that did not make the producer, this does nothing: the
        connection is still the other process's.
        """
        if self._pid != os.getpid():
            return
        self._begin_close()
        self._thread.join(timeout)
        self._end_close(report)

    def __enter__(self) -> "Producer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self.flush()
            else:
                self._try_to_flush(EXIT_FLUSH_SECONDS)
        finally:
            self.close(None if kind is None else EXIT_CLOSE_SECONDS)

    def _try_to_flush(self, seconds: float) -> None:
        """Wait until all records are acked, for `seconds` at most, or until the producer fails."""
        try:
            self.flush(seconds)
        except (TimeoutError, ProducerError, ValueError):
            pass  # `close` reports the records that are not acked

    def _begin_close(self) -> None:
        """Make all calls fail, and the thread end."""
        with self._lock:
            self._closed = True
            self._work.notify_all()
            self._progress.notify_all()
            self._wake_thread()

    def _end_close(self, report: bool) -> None:
        """Report the records that are not acked, once."""
        try:
            _open_producers.remove(self)
        except KeyError:
            return
        if report and self._acked < self._next and sys.stderr:
            try:
                print(self._resumption(), file=sys.stderr, flush=True)
            except Exception:
                pass  # stderr belongs to the program, and may be any object: `close` does not fail because of it

    def _resumption(self) -> str:
        """Return how many records are not acked, why, and how to resume."""
        cause = self._error or self._trouble
        values = f"the values after the first {self.acked}" if self.acked else "all values again"
        return (
            f"ringoexp Producer: {self.sent - self.acked} of {self.sent} records are not acked by {self.url}"
            f"{f' ({cause})' if cause else ''}: send {values} with source {self.source} and first {self._acked}"
        )

    def _check_process(self) -> None:
        """Raise ProducerError in a process that did not make this producer."""
        if self._pid != os.getpid():
            raise ProducerError("another process made this producer: after a fork, make a new one, with its own source")

    def _check_usable(self) -> None:
        """Raise the error that ended the producer, if there is one."""
        assert self._lock.locked()
        if self._error:
            raise ProducerError(str(self._error)) from self._error
        if self._closed:
            raise ValueError("the producer is closed")

    def _wake_thread(self) -> None:
        """Wake the thread, whether it waits for work or for its connection."""
        assert self._lock.locked()
        self._work.notify()
        if self._wakeup.fileno() >= 0:
            try:
                self._wakeup.send(b"x")
            except BlockingIOError:
                pass  # the buffer is full, so the thread wakes up anyway

    # The thread.

    def _run(self) -> None:
        """Send records until `close`, a permanent refusal, or an unexpected error."""
        try:
            self._run_attempts()
        except MemoryError:
            self._fail("not enough memory (ulimit -v limits it)")
        except BaseException as error:  # a bug: callers that wait must see it
            self._fail(f"{self.url}: {type(error).__name__}: {error}")
        finally:
            with self._lock:
                self._wakeup_reader.close()
                self._wakeup.close()

    def _run_attempts(self) -> None:
        """Connect when there are records to send, serve the connection until it is lost, and pause between attempts."""
        failures = 0
        while True:
            with self._lock:
                wait_until(self._work, lambda: bool(self._chunks) or self._closed)
                if self._closed:
                    return
            acked = self._acked
            self._attempt()
            failures = 0 if self._acked > acked else failures + 1
            with self._lock:
                wait_until(self._work, lambda: self._closed, deadline_after(backoff(failures)))
                if self._closed or self._error:
                    return

    def _attempt(self) -> None:
        """Serve one connection and note how it fails: for now, or permanently."""
        try:
            self._serve()
        except (OSError, HandshakeError, WireError) as error:
            with self._lock:
                self._connected = False
                self._trouble = str(error)
            refused = isinstance(error, HandshakeError) and error.status and is_permanent_status(error.status)
            # TLS fails permanently only before the first connection. Later, the server's certificate may have been
            # replaced, and may be replaced again.
            if refused or isinstance(error, TLSError) and not self._connections:
                self._fail(f"{self.url}: {error}")
        except ProducerError as error:
            self._fail(f"{self.url}: {error}")

    def _fail(self, reason: str) -> None:
        """End the producer: `send` and `flush` raise ProducerError from now on."""
        with self._lock:
            self._error = ProducerError(reason)
            self._progress.notify_all()

    def _serve(self) -> None:
        """Serve one connection: send all records that are not acked, and new ones, until the producer is closed.

        Raises OSError, HandshakeError or WireError if the connection fails, and ProducerError if the server refuses
        permanently. After any error, the connection is closed: a part of a message may be on its way.
        """
        host, port, path, _ = self._target
        link = ClientConnection(Endpoint(host, port, host), path, SUBPROTOCOL, self._context, self._token)
        try:
            self._exchange(link)
        except BaseException:
            try:
                link.abort()
            finally:
                link.sock.close()
            raise
        link.finish(1000, "")

    def _exchange(self, link: ClientConnection) -> None:
        """Send records and read acks until the producer is closed."""
        with self._lock:
            self._connections += 1
            self._connected = True
            self._unsent = len(self._chunks)
            base = self._chunks[0][0] if self._chunks else self._next  # acks on this connection count from here
        link.sock.setblocking(False)
        progress_at = monotonic()  # when an ack arrived, or a part of a waiting message was sent
        sent = base  # all records before it are sent, or their message is begun
        while True:
            # Only a message that could not be sent at once shows progress: the socket's buffer takes the others.
            unsent_before = link.unsent
            acks_arrived = self._read_acks(link, base, sent)
            link.flush()
            if acks_arrived or link.unsent < unsent_before:
                progress_at = monotonic()
            with self._lock:
                if self._closed:
                    return
                chunk = self._next_chunk(link)
                waiting = bool(self._chunks)
            if chunk:
                first, values = chunk
                link.begin_bytes(encode_batch([Run(self.source.bytes, first, len(values))], values))
                sent = first + len(values)
                self._transmitted = max(self._transmitted, sent)
                link.flush()
                continue
            if waiting and monotonic() > progress_at + STALL_TIMEOUT:
                raise TimeoutError(f"no ack arrived, and nothing could be sent, within {STALL_TIMEOUT:.0f} s")
            self._wait(link, progress_at + STALL_TIMEOUT - monotonic() if waiting else None)
            if not waiting:
                progress_at = monotonic()

    def _next_chunk(self, link: ClientConnection) -> "tuple[int, array[int]] | None":
        """Take the next chunk to send; None if all are sent, or a message is still being sent."""
        assert self._lock.locked()
        if not self._unsent or link.unsent:
            return None
        chunk = self._chunks[-self._unsent]
        self._unsent -= 1
        return chunk

    def _wait(self, link: ClientConnection, seconds: float | None) -> None:
        """Wait until the connection is ready, the thread is woken, or `seconds` have passed."""
        poll = select.poll()
        poll.register(link.sock, select.POLLIN | (select.POLLOUT if link.unsent else 0))
        poll.register(self._wakeup_reader, select.POLLIN)
        for fd, _ in poll.poll(None if seconds is None else max(0.0, seconds) * 1000):
            if fd == self._wakeup_reader.fileno():
                self._wakeup_reader.recv(4096)

    def _read_acks(self, link: ClientConnection, base: int, sent: int) -> bool:
        """Handle the acks that have arrived, without waiting. True if there were any."""
        acks_arrived = False
        data: bytes | None = b""  # first parse the bytes that arrived with the handshake
        while data is not None:
            acks = [base + decode_ack(message.payloads) for message in link.parse(data)]
            if acks:
                acks_arrived = True
                if acks[-1] > sent:
                    raise WireError(f"acked {acks[-1] - base} records of {sent - base} sent")
                self._on_ack(acks[-1])
            if link.ending:
                # A fault in the server's own frames says nothing about the records: another attempt may succeed.
                refused = link.ending[0] in PERMANENT_CLOSE_CODES and not link.at_fault
                raise (ProducerError if refused else ConnectionResetError)(link.ending_text)
            data = link.read(wait=False)
            if data == b"":
                raise ConnectionResetError("the server closed the connection")
        return acks_arrived

    def _on_ack(self, acked: int) -> None:
        """Drop the chunks that are fully acked: all records before `acked` are stored."""
        with self._lock:
            self._acked = max(self._acked, acked)
            self._trouble = None
            while self._chunks and self._chunks[0][0] + len(self._chunks[0][1]) <= self._acked:
                self._chunks.popleft()
            self._unsent = min(self._unsent, len(self._chunks))
            self._progress.notify_all()


_open_producers: set[Producer] = set()
"""Producers that are not closed. `add` and `remove` are atomic."""


@atexit.register
def _close_all() -> None:
    """Close the producers that the program leaves open. They share the time for acks, and the time for the closing.

    Ctrl-C, or a signal handler that raises, ends a wait. Afterwards, the records that are not acked are reported.
    """
    producers = [producer for producer in _open_producers if producer._pid == os.getpid()]
    with suppress(BaseException):
        deadline = deadline_after(EXIT_FLUSH_SECONDS)
        for producer in producers:
            producer._try_to_flush(remaining(deadline))
    for producer in producers:
        producer._begin_close()
    with suppress(BaseException):
        deadline = deadline_after(EXIT_CLOSE_SECONDS)
        for producer in producers:
            producer._thread.join(remaining(deadline))
    for producer in producers:
        producer._end_close(report=True)


@cache
def _close_with_multiprocessing(pid: int) -> None:
    """Have the producers of this process closed at its end if `multiprocessing` forked it.

    The child does not run the functions that its parent registered with `atexit`. It runs the finalizers of
    `multiprocessing`, but before it waits for its threads, which may still send.
    """
    process = sys.modules.get("multiprocessing.process")
    if process and process.parent_process():
        from multiprocessing.util import Finalize

        Finalize(None, _close_all_after_threads, exitpriority=LAST_FINALIZER)


def _close_all_after_threads() -> None:
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    _close_all()
