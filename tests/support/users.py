"""Work as another user, and access for that user to a test's files."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

from ringolib.storage.interface import StoreError

NOBODY = 65534
"""The user and group ids of a user without privileges."""


def as_user(work: Callable[[], object]) -> str:
    """Run `work` in a child process without root's privileges. Return its StoreError, or "done"."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            try:
                work()
                os.write(writing, b"done")
            except StoreError as error:
                os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with open(reading, "rb") as pipe:
        return pipe.read().decode()


def let_others_in(path: Path, base: Path) -> None:
    """Let other users enter the directories above that of `path`: pytest creates them without access for others.

    `base` is pytest's base directory (`tmp_path_factory.getbasetemp()`).
    """
    for parent in path.parents[1:]:
        is_pytests = parent.is_relative_to(base) or "pytest" in parent.name
        if is_pytests and parent.stat().st_uid == os.getuid():
            parent.chmod(parent.stat().st_mode | stat.S_IXOTH)
