"""Producer: a client that stores each record exactly once, through lost connections and restarts of the server.

    with Producer("ws://localhost:6660/v1.0/ingest") as producer:
        producer.send(range(1_000_000))

A producer numbers its records and keeps them until they are acked. After a lost connection it sends the records that
are not acked again, with the same numbers, and the store keeps each number once: see `outbox`, which has the state.

The thread `producer` owns the connection: it connects, sends, and reads acks. `_lock` guards the outbox. Nothing is
sent or received under the lock.

At the end of the program, `_close_all` closes the producers that are left open.
"""

import atexit
import math
import select
import socket
import sys
import threading
import uuid
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from time import monotonic
from typing import TYPE_CHECKING

from ringolib.client.base import BaseProducer, open_producers
from ringolib.client.exchange import Exchange
from ringolib.client.outbox import ProducerError as ProducerError  # also for users of this module
from ringolib.client.outbox import RecordsRefused, split
from ringolib.client.url import URL
from ringolib.net.websocket import HandshakeError
from ringolib.net.websocket_client import ClientConnection
from ringolib.timing import deadline_after, remaining, start, wait_until
from ringolib.wire import SUBPROTOCOL, WireError

if TYPE_CHECKING:
    import ssl

EXIT_FLUSH_SECONDS = 5.0
"""How long the end of the program, or of a `with` block with an exception, waits for acks."""
EXIT_CLOSE_SECONDS = 2.0
"""How long the end of the program then waits for the closing handshakes."""
LAST_FINALIZER = -100
"""A priority below all of Python's own finalizers, so that they run first."""


class Producer(BaseProducer):
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
        super().__init__(url, source, first, token, context)
        self._lock = threading.Lock()  # guards the outbox
        # Notified when there are records to send, and by close. The thread waits for it.
        self._work = threading.Condition(self._lock)
        # Notified when acks arrive, when the producer fails, and by close. Callers of send and flush wait for it.
        self._progress = threading.Condition(self._lock)
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
        open_producers.add(self)
        _close_with_multiprocessing(self._pid)

    def send(self, values: Iterable[int]) -> None:
        """Accept `values`, 64-bit integers, which are stored in this order. Returns once they are in memory here.

        Waits while MAX_UNACKED records are not acked. Raises OverflowError for a value beyond 64 bits (then none of
        `values` is accepted), ProducerError if the server refuses permanently or another process made this producer,
        and ValueError if the producer is closed or the numbers of the source are used up.
        """
        self._check_process()
        for block in split(values):
            with self._lock:
                wait_until(self._progress, lambda: not self._outbox.is_full or self._outbox.is_over)
                self._outbox.check_usable()
                self._outbox.add([block])
                self._wake_thread()

    def flush(self, timeout: float | None = None) -> None:
        """Wait until all records are acked that `send` has accepted before this call.

        Raises TimeoutError after `timeout` seconds, and what `send` raises.
        """
        self._check_process()
        outbox = self._outbox
        with self._lock:
            target = outbox.next
            wait_until(self._progress, lambda: outbox.acked >= target or outbox.is_over, deadline_after(timeout))
            if outbox.acked < target:
                outbox.check_usable()
                raise TimeoutError(outbox.shortfall(target))

    def close(self, timeout: float | None = None, report: bool = True) -> None:
        """Close the connection. Records that are not acked by then may or may not be stored. Idempotent.

        Waits for the closing handshake, for `timeout` seconds at most. If records are not acked, a line on stderr says
        how to resume, unless `report` is false. In a process that did not make the producer, this does nothing: the
        connection is still the other process's.
        """
        if self._is_foreign():
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
            self._outbox.closed = True
            self._progress.notify_all()
            self._wake_thread()

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
        except BaseException as error:  # a bug: callers that wait must see it
            with self._lock:
                self._outbox.break_down(error)
        finally:
            with self._lock:
                self._progress.notify_all()
                self._wakeup_reader.close()
                self._wakeup.close()

    def _run_attempts(self) -> None:
        """Connect when there are records to send, serve the connection until it is lost, and pause between attempts."""
        outbox = self._outbox
        while True:
            with self._lock:
                wait_until(self._work, lambda: outbox.unacked > 0 or outbox.is_over)
                if outbox.is_over:
                    return
            try:
                self._serve()
            except (OSError, HandshakeError, WireError, RecordsRefused) as error:
                with self._lock:
                    pause = outbox.fail(error)
                    self._progress.notify_all()  # acks may have come before the error
                    wait_until(self._work, lambda: outbox.is_over, deadline_after(pause))

    def _serve(self) -> None:
        """Serve one connection: send all records that are not acked, and new ones, until the producer is closed.

        Raises OSError, HandshakeError, WireError or RecordsRefused if the connection fails. After any error, the
        connection is closed: a part of a message may be on its way.
        """
        link = ClientConnection(self._endpoint, self._path, SUBPROTOCOL, self._context, self._token)
        try:
            exchange = Exchange(self._outbox, link, self._lock)
            while not self._outbox.closed:  # read without the lock: it is set once
                acked = self._outbox.acked
                due = exchange.turn()
                if self._outbox.acked > acked:
                    with self._lock:
                        self._progress.notify_all()
                self._wait(link, due)
        except BaseException:
            try:
                link.abort()
            finally:
                link.sock.close()
            raise
        link.finish(1000, "")

    def _wait(self, link: ClientConnection, due: float) -> None:
        """Wait until the connection is ready, the thread is woken, or the next turn is due."""
        seconds = due - monotonic()
        if seconds <= 0:
            return
        poll = select.poll()
        poll.register(link.sock, select.POLLIN | (select.POLLOUT if link.unsent else 0))
        poll.register(self._wakeup_reader, select.POLLIN)
        for fd, _ in poll.poll(None if seconds == math.inf else seconds * 1000):
            if fd == self._wakeup_reader.fileno():
                self._wakeup_reader.recv(4096)


@atexit.register
def _close_all() -> None:
    """Close the producers that the program leaves open. They share the time for acks, and the time for the closing.

    Ctrl-C, or a signal handler that raises, ends a wait. Afterwards, the records that are not acked are reported.
    """
    producers = [
        producer for producer in list(open_producers) if isinstance(producer, Producer) and not producer._is_foreign()
    ]
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
