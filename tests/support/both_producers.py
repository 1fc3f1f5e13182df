"""Both producers with one interface, so that a test runs with each: the asyncio producer gets blocking methods.

A test that uses the fixture `make_producer` runs with each of them.
"""

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from ringolib.client.async_producer import AsyncProducer
from ringolib.client.producer import Producer
from support.harness import ROOT

Result = TypeVar("Result")
MakeProducer = Callable[..., Any]
"""Makes a producer: the arguments and methods are `Producer`'s."""


class BlockingAsyncProducer:
    """An `AsyncProducer` whose methods other threads call. It runs in an event loop in a thread of its own."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *arguments: Any, **named: Any) -> None:
        self.inner = AsyncProducer(*arguments, **named)
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def _call(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def send(self, values: Iterable[int]) -> None:
        self._call(self.inner.send(values))

    def flush(self, timeout: float | None = None) -> None:
        self._call(self.inner.flush(timeout))

    def close(self, timeout: float | None = None, report: bool = True) -> None:
        self._call(self.inner.close(timeout, report))

    def __enter__(self) -> "BlockingAsyncProducer":
        return self

    def __exit__(self, *error: Any) -> None:
        self._call(self.inner.__aexit__(*error))


@contextmanager
def producers(kind: str) -> Iterator[MakeProducer]:
    """Yield a function that makes producers of this kind: `thread` or `asyncio`."""
    if kind == "thread":
        yield Producer
        return
    loop = asyncio.new_event_loop()
    problems: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda loop, problem: problems.append(problem))
    thread = threading.Thread(target=loop.run_forever, name="event loop")
    thread.start()
    try:
        yield lambda *arguments, **named: BlockingAsyncProducer(loop, *arguments, **named)
    finally:
        asyncio.run_coroutine_threadsafe(_end_others(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
    assert not problems, problems


async def _end_others() -> None:
    """Cancel the tasks that are left, and wait for them."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for _ in range(2):  # a producer goes on after the first one
        for task in tasks:
            task.cancel()
        await asyncio.sleep(0)
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture(params=["thread", "asyncio"])
def make_producer(request: pytest.FixtureRequest) -> Iterator[MakeProducer]:
    """Make producers of either kind."""
    with producers(request.param) as make:
        yield make


def run_program(directory: Path, program: str) -> "subprocess.CompletedProcess[str]":
    """Run a program that imports the producers, from a file, as `multiprocessing` needs it."""
    path = directory / "parent.py"
    path.write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", str(path)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
