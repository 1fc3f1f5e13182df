"""The ingest loop: one thread, `ingest`, with a selector, owns every WebSocket after its upgrade.

A turn of the loop has four steps. It reads from the clients that are ready, without blocking. It decodes the data
(`session`). It offers all blocks to the intake at once. It sends the acks of the records that are stored by now. No
step waits, and the work for one client in a turn is bounded, so no client delays the others.

Blocks that the intake has no room for wait in `_backlog`. The loop reads from no client until the backlog is empty:
that is the backpressure, and the backlog is at most the reads of one turn.

A commit wakes the loop once through a socket pair, however many clients wait for it: any thread may call `_wake`.
`add`, `stop` and `abort` leave their news under `_lock`. Everything else belongs to the thread.

An error in the work for one client ends that client's connection with 1011. After an error in the loop's own
bookkeeping, acks may be wrong. So `fatal` ends the process: acked records are on disk, and a restart is correct.
"""

import heapq
import logging
import select
import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable
from math import inf
from time import monotonic
from typing import Any

from ringolib.counters import Totals
from ringolib.net.tls_socket import TLSSocket
from ringolib.storage.interface import StoreError
from ringolib.timing import fatal, start_thread
from ringolib.web.intake import Intake
from ringolib.web.session import GOING_AWAY, LOST, UNSTORED, Session
from ringolib.wire import Block

log = logging.getLogger("ringoexp.ingest")

READ_SIZE = 256 * 1024
"""Bytes read from a client that is alone; of several that are ready, each gets SHARED_READ_SIZE in a turn."""
SHARED_READ_SIZE = 64 * 1024
OFFER_RECORDS = 65_536
"""Records after which a turn offers what it has read, before it reads on."""
MAX_MARKS = 1024
"""Reads of one client, and offers, whose acks are kept apart while their records wait to be stored."""
GONE_CHECK_SECONDS = 1.0
"""How often a client that is not read from is asked whether it is still there."""
_GONE = select.POLLHUP | select.POLLERR
_HALF_CLOSED = getattr(select, "POLLRDHUP", 0)  # Linux


class Client:
    """A connection in the loop."""

    __slots__ = (
        "sock",
        "session",
        "on_end",
        "unsent",
        "marks",
        "put",
        "waiting",
        "scheduled",
        "reading",
        "is_tls",
        "eof",
    )

    def __init__(self, sock: Any, session: Session, on_end: Callable[[Session], None]) -> None:
        self.sock = sock
        self.session = session
        self.on_end = on_end
        self.unsent = b""
        self.marks: deque[tuple[Any, int, float]] = deque()  # (ticket, the connection's records up to it, when read)
        self.put = 0  # records of the connection that the intake has
        self.waiting = 0  # blocks in the backlog
        self.scheduled = inf  # the earliest entry in the heap of deadlines
        self.reading = False
        self.is_tls = isinstance(sock, TLSSocket)
        self.eof = False


class IngestLoop:
    """Serves the clients that `add` hands over, until `stop`. Raises ThreadError when there is no thread."""

    def __init__(self, intake: Intake, totals: Totals) -> None:
        self._intake = intake
        self._totals = totals

        self._lock = threading.Lock()
        # Guarded by _lock.
        self._added: list[tuple[Client, bytes]] = []
        self._stop_requested = False
        self._abort_requested = False
        self._ended = False

        self._woken = False  # a byte is on its way; set by any thread, cleared by the loop
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._wake_sender.setblocking(False)

        # The thread's.
        self._clients: set[Client] = set()
        self._readers = selectors.DefaultSelector()
        self._writers = selectors.DefaultSelector()
        self._ready: deque[Client] = deque()  # to be read from
        self._again: deque[Client] = deque()  # with input that is here already
        # Offers that are not stored yet, in order: the last ticket of each, and the clients that have a part in it.
        self._pending: deque[tuple[Any, set[Client]]] = deque()
        self._doubtful: set[Client] = set()  # clients whose oldest mark is passed over
        self._backlog: deque[tuple[Client, Block, float]] = deque()
        self._deadlines: list[tuple[float, int, Client]] = []
        self._counter = 0
        self._paused_at: float | None = None
        self._gone_checked_at = 0.0
        self._stopping = False
        self._buffer = bytearray(READ_SIZE)
        self._view = memoryview(self._buffer)
        self._latencies: list[float] = []
        self._acked = 0
        self._bytes = 0
        self._records = 0
        self._poll = select.poll()
        for source in (self._wake_receiver, self._readers, self._writers):
            self._poll.register(source, select.POLLIN)
        intake.on_progress(self._wake)
        self._thread = start_thread(self._run, name="ingest")

    # For other threads.

    def add(self, sock: Any, session: Session, rest: bytes, on_end: Callable[[Session], None]) -> None:
        """Take over a socket after its handshake. `rest` came behind the handshake. `on_end` is called when it ends."""
        sock.setblocking(False)
        client = Client(sock, session, on_end)
        with self._lock:
            late = self._ended
            if not late:
                self._added.append((client, rest))
        if late:  # the server has stopped
            self._close(client)
        else:
            self._wake()

    def stop(self) -> None:
        """Read no more, and close each connection once what it has sent is stored."""
        with self._lock:
            self._stop_requested = True
        self._wake()

    def abort(self) -> None:
        """Close all connections at once."""
        with self._lock:
            self._stop_requested = self._abort_requested = True
        self._wake()

    def join(self, timeout: float) -> bool:
        """Wait until the thread has ended, after `stop`: True if it has."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _wake(self) -> None:
        if not self._woken:
            self._woken = True
            try:
                self._wake_sender.send(b"x")
            except OSError:
                pass  # full: it is awake; closed: it has ended

    # The thread.

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException:
            fatal(log, "the ingest loop")
        for end in (self._readers, self._writers, self._wake_receiver, self._wake_sender):
            end.close()

    def _turn(self) -> bool:
        """One turn. False when the loop has ended."""
        timeout = 0 if self._paused_at is None and (self._again or self._ready) else self._timeout()
        events = {fd for fd, _ in self._poll.poll(timeout)}
        now = monotonic()
        if self._wake_receiver.fileno() in events:
            self._take_news(now)
        if self._writers.fileno() in events:
            for key, _ in self._writers.select(0):
                self._flush(key.data, now)
        self._settle(now)
        if self._backlog:
            self._offer_backlog(now)
        if self._paused_at is None and not self._stopping:
            if not self._ready and self._readers.fileno() in events:
                self._ready.extend(key.data for key, _ in self._readers.select(0))
            self._read_all(now)
        elif self._paused_at is not None:
            self._check_gone(now)
        self._expire(now)
        self._count()
        if not self._stopping or self._clients:
            return True
        with self._lock:
            self._ended = not self._added
            return not self._ended

    def _timeout(self) -> int | None:
        until = self._deadlines[0][0] if self._deadlines else inf
        if self._paused_at is not None:
            until = min(until, self._gone_checked_at + GONE_CHECK_SECONDS)
        return None if until == inf else max(0, int((until - monotonic()) * 1000) + 1)

    def _take_news(self, now: float) -> None:
        try:
            self._wake_receiver.recv(64)
        except BlockingIOError:
            pass
        self._woken = False
        with self._lock:
            added, self._added = self._added, []
            stopping, aborting = self._stop_requested, self._abort_requested
        for client, rest in added:
            if aborting:
                self._close(client)
                continue
            self._clients.add(client)
            self._totals.client_opened(client.session.batches)
            self._readers.register(client.sock, selectors.EVENT_READ, client)
            client.reading = True
            if rest:
                self._receive(client, rest, now)
            elif client.is_tls:
                self._again.append(client)  # its first data may be decrypted already
            self._schedule(client)
        if added:
            self._offer_backlog(now)
        if stopping:
            self._stopping = True
            for client in list(self._clients):
                client.session.end(*GOING_AWAY)
                self._advance(client, now)
        if aborting:
            for client in list(self._clients):
                self._drop(client)

    # Reading.

    def _read_all(self, now: float) -> None:
        """Read once from each client that is ready, and offer what has come."""
        records = 0
        size = READ_SIZE if len(self._ready) == 1 else SHARED_READ_SIZE
        for _ in range(len(self._again)):
            client = self._again.popleft()
            if client not in self._clients:
                continue
            if client.session.has_input:
                records += self._receive(client, b"", now)
                if client.is_tls and not client.session.has_input:
                    self._again.append(client)
            elif client.is_tls:
                records += self._read(client, size, now)
        while self._ready:
            client = self._ready.popleft()
            if client.reading and not client.session.has_input:
                records += self._read(client, size, now)
            if records >= OFFER_RECORDS:
                break
        if self._backlog:
            self._offer_backlog(now)

    def _read(self, client: Client, size: int, now: float) -> int:
        """Read from a client; how many records came."""
        try:
            if client.is_tls:
                data = client.sock.recv(size, socket.MSG_DONTWAIT)
            else:
                data = bytes(self._view[: client.sock.recv_into(self._view[:size])])
        except BlockingIOError:
            return 0
        except OSError as error:
            client.session.end(LOST[0], f"{LOST[1]}: {error}")
            self._drop(client)
            return 0
        if not data:
            self._end_of_stream(client, now)
            return 0
        if client.is_tls:
            self._again.append(client)  # more may be decrypted already, which the selector does not see
        return self._receive(client, data, now)

    def _receive(self, client: Client, data: bytes, now: float) -> int:
        """Decode data of a client, and queue the block; how many records it has."""
        session = client.session
        if session.closing:
            return 0
        self._bytes += len(data)
        try:
            block = session.receive(data, now)
        except Exception as error:
            log.error("session_error", {"error": repr(error)}, exc_info=log.isEnabledFor(logging.DEBUG))
            session.end(1011, "internal error")
            self._advance(client, now)
            return 0
        count = len(block.values)
        if count:
            self._records += count
            client.waiting += 1
            self._backlog.append((client, block, now))
        if session.has_input:
            self._again.append(client)
        if session.refused:
            session.refused = False
            self._totals.add_refused()
        if session.ending is not None or session.replies_due:
            self._advance(client, now)
        return count

    def _end_of_stream(self, client: Client, now: float) -> None:
        """The client sends nothing more."""
        client.eof = True
        self._stop_reading(client)
        session = client.session
        if session.closing or session.lost:
            self._drop(client)
            return
        session.end_of_stream(now)
        self._advance(client, now)

    def _stop_reading(self, client: Client) -> None:
        if client.reading:
            client.reading = False
            self._readers.unregister(client.sock)

    def _offer_backlog(self, now: float) -> None:
        """Offer the backlog to the intake, and pause or resume reading as there is room."""
        blocks = [block for _, block, _ in self._backlog]
        taken = self._intake.offer(blocks) if blocks else []
        clients = set()
        for ticket, count in taken:
            client, block, read_at = self._backlog.popleft()
            if count < len(block.values):
                self._backlog.appendleft((client, block.after(count), read_at))
            else:
                client.waiting -= 1
            client.put += count
            if len(client.marks) >= MAX_MARKS and (joined := self._intake.join_tickets(client.marks[-1][0], ticket)):
                ticket = joined  # one mark for both: its latency counts from the older read
                read_at = client.marks.pop()[2]
            client.marks.append((ticket, client.put, read_at))
            clients.add(client)
        if taken:
            if len(self._pending) >= MAX_MARKS:
                clients |= self._pending.pop()[1]
            self._pending.append((taken[-1][0], clients))
        if self._backlog and self._intake.closed:
            self._refuse_backlog(now)
        if self._backlog:
            if self._paused_at is None:
                self._paused_at = self._gone_checked_at = now
                self._poll.unregister(self._readers)
        elif self._paused_at is not None:
            for client in self._clients:
                client.session.paused(now - self._paused_at)
            self._paused_at = None
            self._poll.register(self._readers, select.POLLIN)

    def _refuse_backlog(self, now: float) -> None:
        """Nothing more will be taken: the server is stopping."""
        while self._backlog:
            client, block, _ = self._backlog.popleft()
            client.waiting -= 1
            self._totals.add_refused(len(block.values))
            client.session.end(*GOING_AWAY)
            self._advance(client, now)

    def _check_gone(self, now: float) -> None:
        """Drop the clients that have left while nobody reads from them."""
        if now < self._gone_checked_at + GONE_CHECK_SECONDS:
            return
        self._gone_checked_at = now
        poll = select.poll()
        clients = {}
        for client in self._clients:
            clients[client.sock.fileno()] = client
            poll.register(client.sock, _GONE if client.session.ending else _GONE | _HALF_CLOSED)
        for fd, _ in poll.poll(0):
            client = clients[fd]
            client.session.end(*LOST)
            self._drop(client)

    # Acks.

    def _settle(self, now: float) -> None:
        """Note the outcomes that are known by now, and send their acks."""
        pending, passed, outcome = self._pending, self._intake.passed, self._intake.outcome
        if not (self._doubtful or pending and passed(pending[0][0])):
            return
        touched = self._doubtful
        self._doubtful = set()
        while pending and passed(pending[0][0]):
            touched |= pending.popleft()[1]
        for client in touched:
            if client not in self._clients:
                continue
            marks = client.marks
            moved = False
            while marks:
                ticket, count, read_at = marks[0]
                result = outcome(ticket)
                if result is True:
                    client.session.stored(count)
                    self._latencies.append(now - read_at)
                    marks.popleft()
                    moved = True
                elif result is False:
                    break
                else:
                    self._fail(client, result)
                    moved = True
                    break
            if marks and passed(marks[0][0]):
                self._doubtful.add(client)
            if moved:
                self._advance(client, now)

    def _fail(self, client: Client, error: StoreError) -> None:
        """Records of a client could not be stored."""
        self._totals.add_refused(client.put - client.session.stored_count)
        client.marks.clear()
        client.session.end(1011, f"not stored: {error}")

    def _advance(self, client: Client, now: float) -> None:
        """Send what is due, and move an ending connection on."""
        session = client.session
        if session.ending is not None and not session.closing:
            settled = not client.marks and not client.waiting
            over = self._stopping and self._intake.closed
            if settled or over:
                if client.marks and session.batches and session.ending == GOING_AWAY:
                    session.replace_ending(*UNSTORED)
                session.close(now)
                if session.lost:
                    self._flush(client, now)
                    self._drop(client)
                    return
        self._flush(client, now)

    def _flush(self, client: Client, now: float) -> None:
        """Send what is due, as far as the socket takes it."""
        if client not in self._clients:
            return
        session = client.session
        before = session.acked
        unsent = client.unsent or session.data_to_send(now)
        if unsent:
            try:
                sent = client.sock.send(unsent)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                session.end(LOST[0], f"{LOST[1]}: {error}")
                self._drop(client)
                return
            self._acked += session.acked - before
            rest = unsent[sent:]
            if rest and not client.unsent:
                self._writers.register(client.sock, selectors.EVENT_WRITE, client)
            elif not rest and client.unsent:
                self._writers.unregister(client.sock)
            had, client.unsent = client.unsent, rest
            session.sent(sent > 0, len(rest), now)
            if had and not rest:
                self._flush(client, now)  # what became due meanwhile
                return
        if session.closing and not client.unsent:
            try:
                client.sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass
            if client.eof:
                self._drop(client)
                return
        self._schedule(client)

    def _drop(self, client: Client) -> None:
        """Close the socket."""
        if client not in self._clients:
            return
        self._clients.discard(client)
        self._stop_reading(client)
        if client.unsent:
            self._writers.unregister(client.sock)
        if client.waiting:  # records that the intake has not taken
            kept: deque[tuple[Client, Block, float]] = deque()
            for entry in self._backlog:
                if entry[0] is client:
                    self._totals.add_refused(len(entry[1].values))
                else:
                    kept.append(entry)
            self._backlog = kept
        client.marks.clear()
        self._totals.client_closed(client.session.batches)
        self._close(client)

    def _close(self, client: Client) -> None:
        """Close the socket of a client that is not, or not any more, in the loop."""
        try:
            client.sock.close()
        finally:
            client.on_end(client.session)

    # Time.

    def _schedule(self, client: Client) -> None:
        """Note the client's next deadline, if it is earlier than the one that is noted."""
        deadline = client.session.next_deadline
        if deadline < client.scheduled:
            client.scheduled = deadline
            self._counter += 1
            heapq.heappush(self._deadlines, (deadline, self._counter, client))

    def _expire(self, now: float) -> None:
        """Look after the clients whose deadline has come."""
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, _, client = heapq.heappop(self._deadlines)
            if client not in self._clients or deadline != client.scheduled:
                continue
            client.scheduled = inf
            session = client.session
            if session.next_deadline <= now:
                if session.closing:
                    self._drop(client)
                    continue
                session.expire(now)
                if session.lost:
                    self._drop(client)
                    continue
                self._flush(client, now)
            self._schedule(client)

    def _count(self) -> None:
        """Add the turn's figures to the totals."""
        if self._bytes:
            self._totals.add_bytes(self._bytes)
            self._bytes = 0
        if self._records:
            self._totals.add_records(self._records)
            self._records = 0
        if self._latencies or self._acked:
            self._totals.add_acked(self._acked, self._latencies)
            self._latencies = []
            self._acked = 0
