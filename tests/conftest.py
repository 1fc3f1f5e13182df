"""CI installs everything that the tests need, so a skipped test is a failed test there (RINGOEXP_NO_SKIPS).

The exception is NOT_PERMITTED: some machines do not permit a mount, or their kernel lacks a file system.
"""

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import NOT_PERMITTED
from support.both_producers import make_producer  # noqa: F401  # a fixture for all tests
from support.certificates import Authority, Pair
from support.harness import ServerProcess, server

# A shell or `nohup` may have started the tests with these signals ignored. The servers of the tests would ignore them,
# too (see ringoexp.py). A handler that does nothing has the same effect here, and is not inherited.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda number, frame: None)


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("RINGOEXP_NO_SKIPS") and reporter and not session.exitstatus:
        if any(NOT_PERMITTED not in str(report.longrepr) for report in reporter.stats.get("skipped", [])):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A temporary directory with a short path: the path of a Unix socket is limited, and `tmp_path` is longer."""
    with tempfile.TemporaryDirectory(prefix="ringoexp-") as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority that signs the certificates of a test module."""
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def pair(authority: Authority) -> Pair:
    """A certificate for localhost, and its key."""
    return authority.issue()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A complete system for tests that only add records to it."""
    directory = tmp_path_factory.mktemp("shared")
    with server(directory, "-p", "0", "-T", "0") as running:
        running.database = directory / "ringoexp.db"  # type: ignore[attr-defined]
        yield running
