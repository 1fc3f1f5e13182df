"""AsyncProducer: the exactly-once producer for asyncio.

    async with AsyncProducer("ws://localhost:6660/v1.0/ingest") as producer:
        await producer.send(range(1_000_000))

It keeps the promises of `Producer`, with the same state, `Outbox`, and the same connection, `Exchange`. One task of the
event loop replaces the thread. All methods run in that loop, so nothing is locked.

A fork copies the task, but the child must not use the parent's connection: see `Waiter`.
"""

import asyncio
import atexit
import uuid
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING

from ringolib.client import producer
from ringolib.client.async_link import ForkedError, Waiter, connect, finish
from ringolib.client.base import BaseProducer, open_producers
from ringolib.client.exchange import Exchange
from ringolib.client.outbox import ProducerError, RecordsRefused, split
from ringolib.client.url import URL
from ringolib.net.websocket import HandshakeError
from ringolib.timing import deadline_after, remaining
from ringolib.wire import SUBPROTOCOL, WireError

if TYPE_CHECKING:
    import ssl

MAX_WAKES = 100
"""Calls of `send` after which one of them lets the task run first: `send` alone does not always give the loop away."""


class AsyncProducer(BaseProducer):
    """Sends integers to the server at `url`, as records `first`, `first + 1`, ... of `source`: see `Producer`.

    The arguments, and the errors of the constructor, are `Producer`'s. The producer belongs to the event loop of its
    first `send`. As a context manager, it flushes at the end of the block, after an exception or a cancellation for
    EXIT_FLUSH_SECONDS at most. So does the end of the event loop, if it cancels its tasks as `asyncio.run` does.
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
        self._task: asyncio.Task[None] | None = None  # from the first `send` on
        self._waiter = Waiter(self._is_done, self._end_soon)
        self._ending = False  # the loop ends: the task ends when all records are acked
        self._adding = asyncio.Lock()  # its holder waits for room; the others wait in order
        self._room = asyncio.Event()  # may be set if the outbox is not full
        self._flushes: OrderedDict[asyncio.Future[None], int] = OrderedDict()  # the sequence that each waits for

    async def send(self, values: Iterable[int]) -> None:
        """Accept `values`, 64-bit integers, which are stored in this order. Returns once they are in memory here.

        Waits while MAX_UNACKED records are not acked. If it is cancelled, or raises an error, none of `values` is
        accepted. Raises what `Producer.send` raises, and RuntimeError in another event loop than before.
        """
        self._check_process()
        self._check_loop()
        blocks = list(split(values))
        async with self._adding:
            if not self._task:
                self._outbox.check_usable()
                self._task = asyncio.create_task(self._run(), name="producer")
                open_producers.add(self)
                await asyncio.sleep(0)  # a task that is cancelled before it has begun could not flush
            elif self._waiter.wakes >= MAX_WAKES or self._outbox.has_full_chunk:
                await asyncio.sleep(0)
            while self._outbox.is_full and not self._outbox.is_over:
                self._room.clear()
                await self._room.wait()
            self._check_process()  # it may have changed during the wait
            self._outbox.check_usable()
            self._outbox.add(blocks)
            self._waiter.wake()

    async def flush(self, timeout: float | None = None) -> None:
        """Wait until all records are acked that `send` has accepted before this call.

        Raises TimeoutError after `timeout` seconds, and what `send` raises. May be cancelled, and called again.
        """
        self._check_process()
        self._check_loop()
        outbox = self._outbox
        target = outbox.next
        if outbox.acked < target and not outbox.is_over:
            acked = asyncio.get_running_loop().create_future()
            self._flushes[acked] = target
            try:
                await asyncio.wait([acked], timeout=timeout)
            finally:
                self._flushes.pop(acked, None)
            self._check_process()
        if outbox.acked < target:
            outbox.check_usable()
            raise TimeoutError(outbox.shortfall(target))

    async def close(self, timeout: float | None = None, report: bool = True) -> None:
        """Close the connection. Records that are not acked by then may or may not be stored. Idempotent.

        Waits for the closing handshake, for `timeout` seconds at most. If records are not acked, a line on stderr says
        how to resume, unless `report` is false. In a process that did not make the producer, this does nothing.
        """
        if self._is_foreign():
            return
        self._check_loop()
        self._stop()
        try:
            if self._task:
                await asyncio.wait([self._task], timeout=timeout)
        finally:
            self._end_close(report)

    async def __aenter__(self) -> "AsyncProducer":
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is GeneratorExit:  # the coroutine is destroyed, and cannot wait
            self._outbox.closed = True
            self._end_close(report=True)
            return
        try:
            if kind is None:
                await self.flush()
            else:
                with suppress(TimeoutError, ProducerError, ValueError):  # `close` reports the records that are left
                    await self.flush(producer.EXIT_FLUSH_SECONDS)
        finally:
            await self.close(None if kind is None else producer.EXIT_CLOSE_SECONDS)

    def _check_loop(self) -> None:
        """Raise RuntimeError unless this is the event loop that runs the task."""
        loop = asyncio.get_running_loop()
        if self._task and self._task.get_loop() is not loop:
            raise RuntimeError("another event loop uses this producer: make a new one for each event loop")

    def _is_done(self) -> bool:
        """True if the task has nothing more to send."""
        return self._outbox.is_over or (self._ending and not self._outbox.unacked)

    def _end_soon(self) -> None:
        """Give the task EXIT_FLUSH_SECONDS to its end: the event loop ends."""
        self._ending = True
        asyncio.get_running_loop().call_later(producer.EXIT_FLUSH_SECONDS, self._stop)

    def _stop(self) -> None:
        """Make all calls fail, and the task end."""
        self._outbox.closed = True
        self._wake_callers()
        self._waiter.wake()

    def _wake_callers(self) -> None:
        """Wake the calls of `send` and `flush` that need not wait any more."""
        outbox = self._outbox
        if not outbox.is_full or outbox.is_over:
            self._room.set()
        while self._flushes:
            acked, target = next(iter(self._flushes.items()))
            if target > outbox.acked and not outbox.is_over:
                return  # those behind it wait for later records
            del self._flushes[acked]
            if not acked.done():
                acked.set_result(None)

    # The task.

    async def _run(self) -> None:
        """Send records until `close`, a permanent refusal, or an unexpected error."""
        try:
            await self._run_attempts()
        except ForkedError:
            return  # the callers, and the report, are the parent's
        except Exception as error:  # a bug: callers that wait must see it
            self._outbox.break_down(error)
        except BaseException:
            self._outbox.closed = True
            raise
        finally:
            if not self._is_foreign():
                with suppress(RuntimeError):  # the loop is closed, so no caller is left
                    self._wake_callers()
        if self._ending:
            self._outbox.closed = True
            self._end_close(report=True)

    async def _run_attempts(self) -> None:
        """Connect when there are records to send, serve the connection until it is lost, and pause between attempts."""
        outbox = self._outbox
        while not self._is_done():
            if not outbox.unacked:
                await self._waiter.wait(deadline_after(None))
                continue
            try:
                await self._serve()
            except (OSError, HandshakeError, WireError, RecordsRefused) as error:
                pause = deadline_after(outbox.fail(error))
                self._wake_callers()  # acks may have come before the error
                while not self._is_done() and remaining(pause):
                    await self._waiter.wait(pause)

    async def _serve(self) -> None:
        """Serve one connection: send all records that are not acked, and new ones, until the producer is closed.

        Raises OSError, HandshakeError, WireError or RecordsRefused if the connection fails. After any error, the
        connection is closed: a part of a message may be on its way.
        """
        link = await connect(self._endpoint, self._path, SUBPROTOCOL, self._context, self._token, self._waiter)
        try:
            exchange = Exchange(self._outbox, link, nullcontext())
            while not self._is_done():
                due = exchange.turn()
                self._wake_callers()
                if not self._is_done():
                    await self._waiter.wait(due, link.sock, reading=True, writing=link.unsent > 0)
        except BaseException:
            link.sock.close()
            raise
        await finish(link, self._waiter)


@atexit.register
def _report_all() -> None:
    """Report the records that are not acked of producers whose event loop did not end in order."""
    for open_producer in list(open_producers):
        if isinstance(open_producer, AsyncProducer) and not open_producer._is_foreign():
            open_producer._end_close(report=True)
