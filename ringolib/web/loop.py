"""The ingest loop: one thread, `ingest`, with a selector, owns every WebSocket after its upgrade.

A turn of the loop has four steps. It reads from the clients that are ready, without blocking. It decodes the data
(`session`). It offers all blocks to the intake at once. It sends the acks of the records that are stored by now. No
step waits, and the work for one client in a turn is bounded. If many clients send little, the loop waits for a
millisecond between turns (`gathering`). Clients that are ready are served in rounds, each once in
a round, so no client delays the others. A round may take several turns.

Blocks that the intake has no room for wait in `_backlog`. The loop pauses then: it reads from no client until the
backlog is empty. That is the backpressure, and the backlog is at most the reads of one turn. If a block fits in part,
its rest waits behind the blocks of other clients.

A commit wakes the loop once through a socket pair, however many clients wait for it: any thread may call `_wake`.
`add`, `stop` and `abort` leave their news under `_lock`. Everything else belongs to the thread.

An error in the work for one client ends that client's connection: with 1011, or without a Close frame if the socket's
state is not known. After an error in the loop's own bookkeeping, acks may be wrong. So `fatal` ends the process: acked
records are on disk, and a restart is correct.
"""

import logging
import select
import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable
from math import inf
from operator import itemgetter
from time import monotonic
from typing import Any

from ringolib.counters import Totals
from ringolib.net.poller import Poller
from ringolib.storage.interface import StoreError
from ringolib.timing import fatal, log_unexpected, start_thread
from ringolib.web import session as session_module
from ringolib.web.budget import Budget
from ringolib.web.client import Client, Mark
from ringolib.web.deadlines import Deadlines
from ringolib.web.gathering import Gathering
from ringolib.web.intake import Intake
from ringolib.web.session import GOING_AWAY, LOST, UNSTORED, Session
from ringolib.wire import Block, Rest

log = logging.getLogger("ringoexp.ingest")

READ_SIZE = 256 * 1024
"""Bytes read from the client in a turn if there is no other."""
SHARED_READ_SIZE = 64 * 1024
"""Bytes read from each client in a turn, at most, if there are several: the others wait while they are stored."""
BYTES_PER_SLOT = 8
"""Bytes read from each client in a turn if there are several, for each record that the intake has room for.

A client with more than fits would fill the backlog, and all would wait until it is stored.
"""
MIN_READ_SIZE = 2048
"""Bytes read from a client in a turn, at most, if the intake has next to no room."""
OFFER_RECORDS = 65_536
"""A turn that has read this many records, or more than the intake has room for, offers them.

The other ready clients are read in the next turn.
"""
READ_SECONDS = 0.005
"""Time after which a turn reads from no other client, as with OFFER_RECORDS."""
SLOW_READ_SECONDS = 0.002
"""Time for one client in a turn, beyond which the next read from it is a small one."""
MAX_MARKS = 1024
"""A client may have this many marks, and the loop this many offers. Beyond it, the newest two are merged."""
INTERNAL_ERROR = "internal error"
"""Why a connection is closed with 1011 after an error that nothing expected; the log has it."""
GONE_CHECK_SECONDS = 1.0
"""How often the loop checks whether clients from which it does not read have left."""
_BLOCK_OF = itemgetter(1)  # of an entry of the backlog
_GONE = select.POLLHUP | select.POLLERR
_HALF_CLOSED = getattr(select, "POLLRDHUP", 0)  # Linux only


class IngestLoop:
    """Serves the clients that `add` hands over, until `stop`. Raises ThreadError if the thread cannot start."""

    def __init__(self, intake: Intake, totals: Totals, budget: Budget | None = None) -> None:
        self._intake = intake
        self._totals = totals
        # While it is full, the loop reads from clients without a large unfinished message, and from the oldest of the
        # others. So the messages exceed it by one message, and by twice SHARED_READ_SIZE for each client.
        self._budget = budget or Budget()

        self._lock = threading.Lock()
        # Guarded by _lock.
        self._added: list[tuple[Client, bytes]] = []
        self._stop_requested = False
        self._abort_requested = False
        self._ended = False

        self._took_news = threading.Event()  # for `responds`
        self._woken = False  # a byte is in the socket pair, or is about to be; cleared by the loop
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._wake_sender.setblocking(False)

        # The thread's: clients.
        self._clients: set[Client] = set()
        self._by_descriptor: dict[int, Client] = {}
        self._deadlines = Deadlines()
        self._stopping = False
        # Input.
        self._poll = select.poll()  # the sources of news: the socket pair and the two pollers
        self._readers = Poller(selectors.EVENT_READ)
        self._writers = Poller(selectors.EVENT_WRITE)
        self._ready: deque[Client] = deque()  # to be served; `queued` is set, so that each is here once
        self._left_in_round = 0  # of those; the others, behind them, are served in the next round
        self._gathering = Gathering()
        self._holders: dict[Client, None] = {}  # clients with a large unfinished message, in the order they began
        self._suspended: dict[Client, float] = {}  # holders that are not read since, because the budget is full
        self._buffer = memoryview(bytearray(READ_SIZE))
        # Records on their way.
        self._backlog: deque[tuple[Client, Block | Rest, float]] = deque()  # and when each block was read
        self._paused_at: float | None = None  # when the loop stopped to read, for want of room
        self._paused_seconds = 0.0  # of the pauses before
        self._gone_checked_at = 0.0
        # Offers whose records are not all settled, in order: the last ticket, and the clients that have a part in it.
        self._offers: deque[tuple[Any, set[Client]]] = deque()
        self._doubtful: set[Client] = set()  # clients whose oldest mark waits for a batch that was set aside
        self._aside_stored = 0  # batches of the intake that were set aside and are stored, when `_doubtful` was read
        # Counted in this turn.
        self._bytes = self._records = self._acked = 0
        self._latencies: list[float] = []

        for source in (self._wake_receiver, self._readers, self._writers):
            self._poll.register(source, select.POLLIN)
        intake.on_progress(self._on_progress)
        self._budget.on_room = self._wake
        self._thread = start_thread(self._run, name="ingest")

    # For other threads.

    def add(self, sock: Any, session: Session, rest: bytes, on_end: Callable[[Session], None]) -> None:
        """Take over a socket after its handshake; `rest` came behind it. `on_end` is called when the session ends."""
        sock.setblocking(False)
        client = Client(sock, session, on_end)
        with self._lock:
            late = self._ended
            if not late:
                self._added.append((client, rest))
        if late:  # the server has stopped
            client.send_away(monotonic())
            client.close()
        else:
            self._wake()

    def stop(self) -> None:
        """Take no more records, and close each connection once its records are stored."""
        with self._lock:
            self._stop_requested = True
        self._wake()

    def abort(self) -> None:
        """Close all connections at once."""
        with self._lock:
            self._stop_requested = self._abort_requested = True
        self._wake()

    def join(self, timeout: float) -> bool:
        """Wait for the end of the thread, after `stop`. Return whether it has ended."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def responds(self, timeout: float) -> bool:
        """Return True if the loop takes news within `timeout` seconds, or has ended. One thread at a time may call."""
        self._took_news.clear()
        self._wake()
        return not self._thread.is_alive() or self._took_news.wait(timeout) or not self._thread.is_alive()

    def _on_progress(self) -> None:
        """Wake the loop if it may wait for this commit: only clients have records and backlogs."""
        if self._clients:  # one read: no lock needed
            self._wake()

    def _wake(self) -> None:
        if not self._woken:
            self._woken = True
            try:
                self._wake_sender.send(b"x")
            except OSError:
                pass  # the buffer is full, so the loop will wake; or the loop has ended

    # The thread.

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException:
            fatal(log, "the ingest loop")
        for resource in (self._readers, self._writers, self._wake_receiver, self._wake_sender):
            resource.close()

    def _turn(self) -> bool:
        """Do one turn. Return False if the loop has ended."""
        may_read = self._paused_at is None
        goes_on = bool(self._ready) if may_read else not self._backlog
        waited = not goes_on and self._gathering.wait(len(self._clients), self._count_waiting())
        timeout_ms = 0 if goes_on else self._timeout_ms()
        sources = {descriptor for descriptor, _ in self._poll.poll(timeout_ms)}
        now = monotonic()
        is_woken = self._wake_receiver.fileno() in sources
        if is_woken:
            self._take_news(now)
        if self._writers.fileno() in sources:
            for descriptor in self._writers.ready():
                if client := self._by_descriptor.get(descriptor):  # the loss of one may be the loss of another
                    self._send(client, now)
        self._settle(now, is_woken)
        if self._backlog or self._paused_at is not None:  # the clients of the backlog may have left
            self._offer_backlog(now)
        if self._paused_at is None:
            # During a stop, too: data is ignored then, but the end of a stream counts.
            if not self._left_in_round:
                if self._readers.fileno() in sources:
                    for descriptor in self._readers.ready():
                        self._queue(self._by_descriptor[descriptor])
                self._left_in_round = len(self._ready)
                self._gathering.note(waited, self._left_in_round, len(self._clients))
            self._read_all(now)
        if self._paused_at is not None or self._suspended:
            self._check_gone(now)
        self._settle(now)  # with `-A ring`, records in the ring are settled
        self._check_deadlines(now)
        self._count()
        return bool(self._clients) or not self._stopping or not self._end()

    def _count_waiting(self) -> int:
        """Return how many clients wait for acks; a client with records in several offers counts several times."""
        return sum(len(clients) for _, clients in self._offers)

    def _timeout_ms(self) -> int | None:
        """Return the time until the next deadline, or None without a deadline."""
        until = self._deadlines.next
        if self._paused_at is not None or self._suspended:
            until = min(until, self._gone_checked_at + GONE_CHECK_SECONDS)
        return None if until == inf else max(0, int((until - monotonic()) * 1000) + 1)

    def _end(self) -> bool:
        """End the loop, unless a client was added meanwhile. From now on `add` closes the sockets."""
        with self._lock:
            self._ended = not self._added
            return self._ended

    def _take_news(self, now: float) -> None:
        """Take what `add`, `stop` and `abort` have left."""
        try:
            self._wake_receiver.recv(64)
        except BlockingIOError:
            pass
        self._woken = False  # before the news are read: later news send another byte
        with self._lock:
            added, self._added = self._added, []
            stopping, aborting = self._stop_requested, self._abort_requested
        self._took_news.set()
        if self._suspended and not self._budget.full:  # bodies of HTTP requests have ended
            self._resume(next(iter(self._holders), None))
        for client, rest in added:
            self._admit(client, rest, now)
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

    def _admit(self, client: Client, rest: bytes, now: float) -> None:
        self._clients.add(client)
        self._by_descriptor[client.descriptor] = client
        self._totals.client_opened(client.session.batches)
        client.pause_seen = self._paused_seconds
        try:
            self._readers.register(client.descriptor)
        except OSError as error:  # the system has no room
            self._lose(client, error)
            return
        client.reading = True
        self._schedule(client)
        if rest:
            self._receive(client, rest, now)
        if client.is_tls or client.session.has_input:
            self._queue(client)  # its first data may be decrypted already

    # Reading.

    def _queue(self, client: Client) -> None:
        """Have the client served in the next round."""
        if not client.queued:
            client.queued = True
            self._ready.append(client)

    def _read_all(self, now: float) -> None:
        """Serve the clients of the round, as far as there is room and READ_SECONDS allow, and offer the blocks."""
        records, at = 0, monotonic()
        until = at + READ_SECONDS
        is_alone = len(self._clients) == 1
        room = max(1, self._intake.room)
        share = max(MIN_READ_SIZE, min(SHARED_READ_SIZE, BYTES_PER_SLOT * room))
        while self._left_in_round and records < min(OFFER_RECORDS, room) and at < until:
            self._left_in_round -= 1
            client = self._ready.popleft()
            client.queued = False
            if not client.reading:  # it is gone, or has ended its side
                continue
            if client.session.has_input:  # read before, and not parsed yet
                records += self._receive(client, b"", now)
                if client.is_tls:
                    self._queue(client)
            else:
                is_large = is_alone and not client.slow and not self._budget.full
                records += self._read(client, READ_SIZE if is_large else share, now)
            if client.session.has_input:
                self._queue(client)
            started, at = at, monotonic()
            client.slow = at - started > SLOW_READ_SECONDS
        if self._backlog:
            self._offer_backlog(now)

    def _read(self, client: Client, limit: int, now: float) -> int:
        """Read from a client. Return the number of records that came."""
        if self._budget.full and self._suspend(client, now):
            return 0
        try:
            data = client.read(self._buffer, limit)
        except Exception as error:
            self._lose(client, error)
            return 0
        if data is None:
            return 0
        if not data:
            self._end_input(client, now)
            return 0
        if client.is_tls:
            self._queue(client)  # more may be decrypted already, which the poller does not see
        return self._receive(client, data, now)

    def _receive(self, client: Client, data: bytes, now: float) -> int:
        """Decode data of a client, and put the block into the backlog. Return the number of its records."""
        session = client.session
        if session.ending is not None:
            return 0  # data behind the end is ignored
        if self._paused_seconds > client.pause_seen:
            self._excuse(client, now)
        self._bytes += len(data)
        try:
            block = session.receive(data, now)
        except Exception as error:
            self._fail_session(client, error, now)
            return 0
        records = len(block.values)
        if records:
            self._records += records
            client.waiting += 1
            self._backlog.append((client, block, now))
        if session.held != client.held:
            self._hold(client, session.held)
        if session.needs_attention:
            if session.refused:
                session.refused = False
                self._totals.add_refused()
            self._advance(client, now)
        return records

    def _end_input(self, client: Client, now: float) -> None:
        """The client has ended its side of the stream."""
        client.eof = True
        self._stop_reading(client)
        if client.session.closing or client.session.lost:
            self._drop(client)
            return
        client.session.end_of_stream(now)
        self._schedule(client)
        self._advance(client, now)

    def _stop_reading(self, client: Client) -> None:
        if client.reading:
            client.reading = False
            if client in self._suspended:
                del self._suspended[client]
            else:
                self._readers.unregister(client.descriptor)

    # Memory of unfinished messages.

    def _hold(self, client: Client, size: int) -> None:
        """Note that the client's unfinished message has this many bytes now."""
        if size < client.held:
            self._holders.pop(client, None)  # its next message comes after the messages of others
        self._budget.add(size - client.held)
        client.held = size
        if size > SHARED_READ_SIZE:
            self._holders[client] = None
        if self._suspended:
            oldest = next(iter(self._holders), None)
            if not self._budget.full or oldest in self._suspended or client in self._suspended:
                self._resume(oldest)

    def _suspend(self, client: Client, now: float) -> bool:
        """Read no more from a client with a large unfinished message, unless it is the oldest. Return True if so."""
        if client not in self._holders or client is next(iter(self._holders)):
            return False
        self._suspended[client] = now
        self._budget.log_waiting()
        self._readers.unregister(client.descriptor)
        return True

    def _resume(self, oldest: Client | None) -> None:
        """Read again from suspended clients: from the oldest holder, from clients that have ended, or from all."""
        now = monotonic()
        lost = []
        for client, since in list(self._suspended.items()):
            if client is oldest or client not in self._holders or not self._budget.full:
                del self._suspended[client]
                client.session.paused(now - since, now)
                client.pause_seen = self._paused_seconds  # that pause is in it
                try:
                    self._readers.register(client.descriptor)
                    self._queue(client)  # data may be decrypted already
                except OSError as error:  # the system has no room
                    client.reading = False
                    lost.append((client, error))
        for client, cause in lost:
            self._lose(client, cause)

    # Backlog and pauses.

    def _offer_backlog(self, now: float) -> None:
        """Offer the backlog to the intake. Pause if it does not take all, and read on if it does."""
        taken = self._intake.offer(map(_BLOCK_OF, self._backlog)) if self._backlog else []
        clients = set()
        for ticket, count in taken:
            client, block, read_at = self._backlog.popleft()
            if count < len(block.values):
                rest = Rest(block) if isinstance(block, Block) else block
                rest.skip(count)
                if client.waiting == 1:  # the blocks of other clients go first
                    self._backlog.append((client, rest, read_at))
                else:
                    self._backlog.appendleft((client, rest, read_at))
            else:
                client.waiting -= 1
            client.taken += count
            self._mark(client, ticket, read_at)
            clients.add(client)
        if taken:
            if len(self._offers) >= MAX_MARKS:
                clients |= self._offers.pop()[1]
            self._offers.append((taken[-1][0], clients))
        if self._backlog and self._intake.closed:
            self._refuse_backlog(now)
        if self._backlog and self._paused_at is None:
            self._paused_at = self._gone_checked_at = now
            self._poll.unregister(self._readers)
        elif not self._backlog and self._paused_at is not None:
            self._paused_seconds += now - self._paused_at
            self._paused_at = None
            self._poll.register(self._readers, select.POLLIN)

    def _mark(self, client: Client, ticket: Any, read_at: float) -> None:
        """Note that the intake has the client's first `taken` records once `ticket` is settled."""
        if len(client.marks) >= MAX_MARKS and (joined := self._intake.join_tickets(client.marks[-1].ticket, ticket)):
            ticket, read_at = joined, client.marks.pop().read_at  # one mark for two reads
        client.marks.append(Mark(ticket, client.taken, read_at))

    def _refuse_backlog(self, now: float) -> None:
        """Drop the backlog: the server is stopping, and the intake takes nothing more."""
        while self._backlog:
            client, block, _ = self._backlog.popleft()
            client.waiting -= 1
            self._totals.add_refused(len(block.values))
            client.session.end(*GOING_AWAY)
            self._advance(client, now)

    def _check_gone(self, now: float) -> None:
        """Drop clients that are not read, and have left."""
        if now < self._gone_checked_at + GONE_CHECK_SECONDS:
            return
        self._gone_checked_at = now
        poll = select.poll()
        for client in self._clients if self._paused_at is not None else self._suspended:
            is_open = client.session.ending is None and client not in self._suspended
            poll.register(client.descriptor, _GONE | _HALF_CLOSED if is_open else _GONE)
        for descriptor, _ in poll.poll(0):
            self._lose(self._by_descriptor[descriptor], ConnectionResetError("the client has left"))

    def _excuse(self, client: Client, now: float) -> None:
        """Tell the client's session how long the loop has not read from it since the last call.

        A full ring pauses the loop often, so a pause must not cost a step for each client: this is called only before
        the session looks at its deadlines.
        """
        if self._paused_seconds > client.pause_seen:
            client.session.paused(self._paused_seconds - client.pause_seen, now)
            client.pause_seen = self._paused_seconds

    def _schedule(self, client: Client, latest: float = inf) -> None:
        """Note the client's next deadline, at latest `latest`.

        A client that is not read may have deadlines in the past that do not apply. So it is not checked at once again.
        """
        earliest = 0.0
        if self._paused_at is not None:
            earliest = self._gone_checked_at + GONE_CHECK_SECONDS
        elif client in self._suspended:
            earliest = monotonic() + GONE_CHECK_SECONDS
        self._deadlines.schedule(client, earliest, latest)

    # Acks.

    def _settle(self, now: float, is_woken: bool = False) -> None:
        """Take the outcomes that are known by now, and send the acks. Only a wake-up can settle records in doubt."""
        offers, passed = self._offers, self._intake.passed
        clients: set[Client] = set()
        if is_woken and self._doubtful and self._intake.aside_stored != self._aside_stored:
            self._aside_stored = self._intake.aside_stored
            clients, self._doubtful = self._doubtful, clients
        while offers and passed(offers[0][0]):
            clients |= offers.popleft()[1]
        for client in clients:
            if client in self._clients and self._settle_marks(client, now):
                self._advance(client, now)

    def _settle_marks(self, client: Client, now: float) -> bool:
        """Take the outcomes of a client's marks, the oldest first. Return True if one was known."""
        marks, outcome = client.marks, self._intake.outcome
        known = False
        while marks:
            result = outcome(marks[0].ticket)
            if result is False:
                if self._intake.passed(marks[0].ticket):
                    self._doubtful.add(client)
                break
            known = True
            if result is not True:
                self._fail(client, result)
                break
            mark = marks.popleft()
            client.session.stored(mark.records)
            self._latencies.append(now - mark.read_at)
        return known

    def _fail_session(self, client: Client, error: Exception, now: float) -> None:
        """End the connection of a client after an error that nothing expected. It concerns that client only."""
        log_unexpected(log, "session_error", error)
        client.session.end(1011, INTERNAL_ERROR)
        self._advance(client, now)

    def _fail(self, client: Client, error: StoreError) -> None:
        """Records of a client could not be stored. No later one may be acked, as an ack covers all earlier records."""
        self._totals.add_refused(client.taken - client.session.stored_count)
        self._forget_records(client)
        if client.session.ending in (None, GOING_AWAY):  # 1001 would say that nothing of it can be stored
            client.session.replace_ending(1011, f"not stored: {error}")

    def _forget_records(self, client: Client) -> None:
        """Ack no more records of a client, and drop the records that the intake has not taken."""
        client.marks.clear()
        self._doubtful.discard(client)
        if client.waiting:
            dropped = [block for owner, block, _ in self._backlog if owner is client]
            self._totals.add_refused(sum(len(block.values) for block in dropped))
            self._backlog = deque(entry for entry in self._backlog if entry[0] is not client)
            client.waiting = 0

    # Sending and ending.

    def _advance(self, client: Client, now: float) -> None:
        """Send the bytes that are due, and take the next step of an ending connection."""
        session = client.session
        if session.ending is not None and not session.closing and client in self._clients:
            self._hold(client, session.held)  # an ending frees the unfinished message
            is_over = self._stopping and self._intake.closed  # nothing more will be stored
            if is_over or not client.marks and not client.waiting:
                if client.marks and session.batches and session.ending == GOING_AWAY:
                    session.replace_ending(*UNSTORED)
                client.marks.clear()  # no ack can follow the Close frame
                session.close(now)
        self._send(client, now)
        if session.closing and session.lost:
            self._drop(client)

    def _send(self, client: Client, now: float) -> None:
        """Send the bytes that are due, as far as the socket takes it. After the Close frame, end the output."""
        if client not in self._clients:
            return
        session = client.session
        acked = session.acked
        try:
            client.send(now)
            if client.writing != bool(client.unsent):
                self._wait_for_room(client)
        except Exception as error:  # the number of bytes sent is unknown, so no Close frame can follow
            self._lose(client, error)
            return
        self._acked += session.acked - acked
        if client.unsent:
            self._schedule(client)
        elif session.closing:
            client.end_output()
            if client.eof:
                self._drop(client)
            else:
                self._schedule(client)

    def _wait_for_room(self, client: Client) -> None:
        """Wait for room in the system's send buffer exactly if something is unsent."""
        if client.unsent:
            self._writers.register(client.descriptor)
        else:
            self._writers.unregister(client.descriptor)
        client.writing = bool(client.unsent)

    def _lose(self, client: Client, error: Exception) -> None:
        """The connection is lost, or given up. An error that is not the socket's is logged."""
        if not isinstance(error, OSError):
            log_unexpected(log, "session_error", error)
        client.session.end(LOST[0], f"{LOST[1]}: {error}")
        self._drop(client)

    def _drop(self, client: Client) -> None:
        """Close the socket, and forget the client. Records that the intake has are still stored."""
        if client not in self._clients:
            return
        self._clients.discard(client)
        self._stop_reading(client)
        if client.writing:
            self._writers.unregister(client.descriptor)
        del self._by_descriptor[client.descriptor]
        self._forget_records(client)
        self._hold(client, 0)
        self._totals.client_closed(client.session.batches)
        client.close()
        self._deadlines.forget_gone(self._clients)

    def _check_deadlines(self, now: float) -> None:
        """Ping silent clients, and give up clients that have stalled."""
        reading = self._paused_at is None
        for client in self._deadlines.take_passed(now):
            if client not in self._clients:
                continue
            session = client.session
            if reading:
                self._excuse(client, now)
            if session.next_deadline <= now:
                try:
                    if not session.closing:
                        session.expire(now, reading and client not in self._suspended)
                except Exception as error:
                    self._fail_session(client, error, now)
                    continue
                if session.closing or session.lost or client.eof:
                    self._drop(client)
                    continue
                self._send(client, now)
            # The answer to a ping may make the next ping due earlier than the end of the wait for that answer.
            self._schedule(client, latest=now + session_module.PING_AFTER_SECONDS)

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
            self._latencies, self._acked = [], 0
