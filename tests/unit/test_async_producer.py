"""What only `AsyncProducer` has: cancellation, many tasks, the end of the event loop, forks of it, and no thread."""

import asyncio
import re
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from support.both_producers import run_program
from support.fake_consumer import Link, fake_consumer
from support.harness import DEADLINE, ROOT, ServerProcess, free_port, in_order
from support.short_times import short_times  # noqa: F401  # a fixture for each test

from ringolib.client import async_producer, outbox, producer
from ringolib.client.async_producer import AsyncProducer
from ringolib.client.producer import ProducerError
from ringolib.wire import decode_batch, encode_ack


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run the coroutine of a test, for DEADLINE at most."""

    async def limited() -> None:
        await asyncio.wait_for(main, DEADLINE)

    asyncio.run(limited())


async def eventually(predicate: Callable[[], object]) -> None:
    """Wait until the predicate is true."""
    end = monotonic() + DEADLINE
    while not predicate():
        assert monotonic() < end
        await asyncio.sleep(0.001)


@contextmanager
def gated() -> Iterator[tuple[str, threading.Event, dict[int, int]]]:
    """Run a server that acks once the event is set; yields its URL, the event, and the values that it has received."""
    gate, received = threading.Event(), dict[int, int]()

    def answer(connection: Link) -> None:
        total = 0
        for message in connection:
            block = decode_batch(message)
            received.update(enumerate(block.values, block.runs[0].first))
            total += len(block.values)
            assert gate.wait(DEADLINE)
            connection.send(encode_ack(total))

    with fake_consumer(answer) as port:
        yield f"ws://127.0.0.1:{port}/", gate, received
        gate.set()


def test_block_stores_all_records_at_its_end(shared: ServerProcess) -> None:
    async def main() -> None:
        before = asyncio.all_tasks()
        async with AsyncProducer(shared.url) as sender:
            await sender.send(range(100_000))
            await sender.send([-1])
        assert (sender.acked, sender.reconnects, sender.trouble) == (100_001, 0, None)
        assert in_order(shared.database, sender.source) == [*range(100_000), -1]
        assert asyncio.all_tasks() == before

    run(main())


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_producer_has_no_thread_of_its_own(host: str) -> None:
    """The event loop looks `localhost` up in a thread of its executor."""

    async def main() -> None:
        before = set(threading.enumerate())
        with gated() as (url, gate, _):
            async with AsyncProducer(url.replace("127.0.0.1", host)) as sender:
                await sender.send([1])
                await eventually(lambda: sender.connected)
                more = [thread.name for thread in set(threading.enumerate()) - before if "asyncio" in thread.name]
                assert len(more) == (host == "localhost")
                gate.set()

    run(main())


def test_cancelled_send_accepts_none_of_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for room. The next ones in the queue are not affected, and keep their order."""
    monkeypatch.setattr(outbox, "MAX_UNACKED", 10)
    monkeypatch.setattr(outbox, "CHUNK_RECORDS", 4)

    async def main() -> None:
        with gated() as (url, gate, received):
            async with AsyncProducer(url) as sender:
                await sender.send(range(10))
                waiting = [asyncio.create_task(sender.send([n] * 6)) for n in (20, 21, 22, 23)]
                await asyncio.sleep(0.05)
                assert sender.sent == 10 and not any(task.done() for task in waiting)
                waiting[0].cancel()
                waiting[2].cancel()
                with pytest.raises(TimeoutError if sys.version_info >= (3, 11) else asyncio.TimeoutError):
                    await asyncio.wait_for(sender.send([24]), 0.05)
                gate.set()
                await asyncio.wait(waiting)
                assert [task.cancelled() for task in waiting] == [True, False, True, False]
            assert sender.acked == sender.sent == 22
            assert [received[n] for n in range(22)] == [*range(10), *[21] * 6, *[23] * 6]

    run(main())


def test_send_waits_for_room_and_its_values_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "MAX_UNACKED", 50)
    monkeypatch.setattr(outbox, "CHUNK_RECORDS", 7)

    async def main() -> None:
        most = 0
        with gated() as (url, gate, received):
            gate.set()
            async with AsyncProducer(url) as sender:

                async def send(task: int) -> None:
                    nonlocal most
                    for _ in range(20):
                        await sender.send([task] * 30)
                        most = max(most, sender.sent - sender.acked)

                await asyncio.gather(*map(send, range(10)))
            values = [received[n] for n in range(6000)]
            assert all(len(set(values[n : n + 30])) == 1 for n in range(0, 6000, 30)), "values of a call are mixed"
            assert sorted(values) == sorted(list(range(10)) * 600)
            assert most < 50 + 30

    run(main())


def test_cancelled_flush_may_be_called_again() -> None:
    async def main() -> None:
        with gated() as (url, gate, _):
            async with AsyncProducer(url) as sender:
                await sender.send([1, 2])
                flushing = [asyncio.create_task(sender.flush()) for _ in range(3)]
                await asyncio.sleep(0.01)
                flushing[0].cancel()
                for _ in range(3):
                    with pytest.raises(TimeoutError, match="2 records are not acked"):
                        await sender.flush(0.001)
                assert len(sender._flushes) == 2, "calls that ended are forgotten"
                gate.set()
                await sender.flush()
                await asyncio.wait(flushing)
                assert [task.cancelled() for task in flushing] == [True, False, False]

    run(main())


def test_each_of_many_tasks_gets_its_own_acks(shared: ServerProcess) -> None:
    async def main() -> None:
        async with AsyncProducer(shared.url) as sender:

            async def one(task: int) -> None:
                for n in range(5):
                    await sender.send([task * 10 + n])
                    before = sender.sent
                    await sender.flush()
                    assert sender.acked >= before - 400

            await asyncio.gather(*map(one, range(400)))
        assert sorted(in_order(shared.database, sender.source)) == sorted(
            t * 10 + n for t in range(400) for n in range(5)
        )

    run(main())


def test_loop_of_small_sends_lets_the_task_send() -> None:
    """`send` returns without a wait while there is room. The event loop must go on nevertheless."""

    async def main() -> None:
        with gated() as (url, _, received):
            sender = AsyncProducer(url)
            await sender.send([0])
            await eventually(lambda: received)
            for n in range(1, 10 * async_producer.MAX_WAKES):
                await sender.send([n])
            assert sender._outbox.next - sender._outbox._handed_out <= async_producer.MAX_WAKES
            await sender.close(report=False)

    run(main())


@pytest.mark.parametrize("phase", ["handshake", "pause", "TLS"])
def test_close_does_not_wait_for_an_attempt(phase: str) -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as hung:
            port = free_port() if phase == "pause" else hung.getsockname()[1]
            sender = AsyncProducer(f"{'wss' if phase == 'TLS' else 'ws'}://127.0.0.1:{port}/")
            await sender.send([1])
            if phase == "pause":
                await eventually(lambda: sender.trouble)
            started = monotonic()
            await sender.close(report=False)
            assert monotonic() - started < 1
            with pytest.raises(ValueError, match="closed"):
                await sender.send([2])

    run(main())


def test_cancelled_block_ends_in_bounded_time(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(producer, "EXIT_FLUSH_SECONDS", 0.1)

    async def main() -> None:
        with gated() as (url, _, _), suppress(asyncio.TimeoutError):

            async def block() -> None:
                async with AsyncProducer(url) as sender:
                    await sender.send([1])
                    await asyncio.sleep(DEADLINE)

            started = monotonic()
            await asyncio.wait_for(block(), 0.1)
        assert monotonic() - started < 5

    run(main())
    assert "ringoexp AsyncProducer: 1 of 1 record is not acked by " in capsys.readouterr().err


def test_other_event_loop_gets_an_error(shared: ServerProcess) -> None:
    sender = AsyncProducer(shared.url)

    async def main() -> None:
        await sender.send([1])
        await sender.flush()

    run(main())
    for call in (sender.send([2]), sender.flush(), sender.close()):
        with pytest.raises((RuntimeError, ValueError), match="event loop|closed"):
            asyncio.run(call)


def test_destroyed_coroutine_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    async def numbers(url: str) -> AsyncGenerator[int, None]:
        async with AsyncProducer(url) as sender:
            await sender.send([1])
            yield 1

    loop = asyncio.new_event_loop()
    with gated() as (url, _, _):
        generator = numbers(url)
        loop.run_until_complete(generator.__anext__())
        task = next(iter(asyncio.all_tasks(loop)))
        with pytest.raises(StopIteration):  # a wait would be an error
            generator.aclose().send(None)
        assert "1 of 1 record is not acked" in capsys.readouterr().err
        loop.run_until_complete(asyncio.wait([task], timeout=DEADLINE))
    loop.close()


# The end of the event loop and of the program, and forks. Each test runs a script.

SCRIPT = """
import asyncio, os, sys, time, uuid
from ringoexp import AsyncProducer
from ringolib.client import producer
from ringolib.client.producer import ProducerError
"""


def run_script(script: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a script to its end."""
    command = [sys.executable, "-W", "ignore", "-c", f"{SCRIPT}\n{script}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "Exception ignored" not in done.stderr and "never retrieved" not in done.stderr
    return done


@pytest.mark.parametrize("end", ["", "sys.exit()", "raise KeyError", "await asyncio.sleep(0.1)"])
def test_end_of_the_loop_stores_records_without_flush(shared: ServerProcess, end: str) -> None:
    source = uuid.uuid4()
    script = f"""
async def main():
    sender = AsyncProducer(sys.argv[1], uuid.UUID(sys.argv[2]))
    await sender.send(range(100_000))  # the look-up of the name may be a task, which is cancelled, too
    {end}
asyncio.run(main())
"""
    done = run_script(script, shared.url, str(source))
    assert "not acked" not in done.stderr
    assert in_order(shared.database, source) == list(range(100_000))


ENDS = {
    "run": "asyncio.run(main())",
    "Ctrl-C twice": "import signal, threading\n"
    "producer.EXIT_FLUSH_SECONDS = 30\n"
    "threading.Timer(0.3, signal.raise_signal, [signal.SIGINT]).start()\n"
    "try: asyncio.run(main())\n"
    "except KeyboardInterrupt: pass",
    "loop that is not ended": "loop = asyncio.new_event_loop(); loop.run_until_complete(main())",
}


@pytest.mark.parametrize("end", ENDS)
def test_end_of_the_loop_reports_records_without_ack(end: str) -> None:
    source = uuid.uuid4()
    script = f"""
producer.EXIT_FLUSH_SECONDS = 0.3
async def main():
    sender = AsyncProducer(sys.argv[1], uuid.UUID(sys.argv[2]), 7)
    await sender.send(range(1000))
    while not sender.trouble:
        await asyncio.sleep(0.01)
{ENDS[end]}
"""
    started = monotonic()
    done = run_script(script, f"ws://127.0.0.1:{free_port()}/", str(source))
    assert monotonic() - started < 15
    lines = [line for line in done.stderr.splitlines() if "not acked" in line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("ringoexp AsyncProducer: 1000 of 1000 records are not acked by ws://127.0.0.1:")
    assert lines[0].endswith(f"Connection refused): send all values again with source {source} and first 7")


@pytest.mark.slow
@pytest.mark.parametrize("child", ["sends", "goes on", "ends"])
def test_fork_of_the_loop_leaves_the_connection_to_the_parent(shared: ServerProcess, child: str) -> None:
    """The child's copy of the task must not send, and must not touch the selector that both share."""
    source = uuid.uuid4()
    work = {
        "sends": "await sender.send([1])",
        "goes on": "await asyncio.sleep(0.1); await sender.send([1])",
        "ends": "await asyncio.sleep(0); sys.exit(42)",
    }[child]
    script = f"""
async def main():
    sender = AsyncProducer(sys.argv[1], uuid.UUID(sys.argv[2]))
    statuses = []
    for turn in range(10):
        for start in range(0, 100_000, 10_000):
            await sender.send(range(turn * 100_000 + start, turn * 100_000 + start + 10_000))
        child = os.fork()
        if not child:
            try:
                {work}
            except ProducerError as error:
                os._exit(42 if "after a fork" in str(error) else 1)
            except RuntimeError as error:
                os._exit(42 if "no running event loop" in str(error) else 3)
            finally:
                os._exit(42 if isinstance(sys.exc_info()[1], SystemExit) else 2)
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            await asyncio.sleep(0.001)
        statuses.append(os.waitstatus_to_exitcode(ended[1]))
    await sender.flush(30)
    print(set(statuses), sender.acked, sender.reconnects)
    await sender.close()
asyncio.run(main())
"""
    done = run_script(script, shared.url, str(source))
    assert (done.stdout, done.stderr) == ("{42} 1000000 0\n", "")
    assert in_order(shared.database, source) == list(range(1_000_000))


def test_child_closes_the_copy_of_a_producer_without_effect(shared: ServerProcess) -> None:
    source = uuid.uuid4()
    script = """
async def main():
    async with AsyncProducer(sys.argv[1], uuid.UUID(sys.argv[2])) as sender:
        await sender.send([1])
        await sender.flush()
        child = os.fork()
        if not child:
            await sender.close()
            os._exit(0)
        os.waitpid(child, 0)
        await sender.send([2])
    print(sender.acked, sender.reconnects)
asyncio.run(main())
"""
    done = run_script(script, shared.url, str(source))
    assert (done.stdout, done.stderr) == ("2 0\n", "")
    assert in_order(shared.database, source) == [1, 2]


@pytest.mark.slow
def test_child_of_multiprocessing_stores_its_records_at_its_end(shared: ServerProcess, tmp_path: Path) -> None:
    source = uuid.uuid4()
    script = f"""
import asyncio, multiprocessing, uuid
from ringoexp import AsyncProducer

async def send():
    await AsyncProducer({shared.url!r}, uuid.UUID({str(source)!r})).send([1, 2])

def work():
    asyncio.run(send())

if __name__ == "__main__":
    child = multiprocessing.Process(target=work)
    child.start()
    child.join()
    print(child.exitcode)
"""
    done = run_program(tmp_path, script)
    assert (done.stdout, done.stderr) == ("0\n", "")
    assert in_order(shared.database, source) == [1, 2]


def test_error_of_a_permanent_refusal_is_the_same_for_all_tasks(shared: ServerProcess) -> None:
    async def main() -> None:
        sender = AsyncProducer(shared.url.replace("ingest", "nothing"))
        await sender.send([1])
        results = await asyncio.gather(*(sender.flush() for _ in range(3)), return_exceptions=True)
        assert len({re.sub("source .*", "", str(error)) for error in results}) == 1
        assert all(isinstance(error, ProducerError) and "404" in str(error) for error in results)
        await sender.close(report=False)

    run(main())
