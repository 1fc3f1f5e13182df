"""Unexpected errors: a socket that breaks a message off, and a stand-in for the end of the process."""

import os
from types import ModuleType
from typing import Any

import pytest

from ringolib.net.websocket_client import ClientConnection

CUT = 800
"""The bytes at the end of a message that are not sent when it breaks off."""


class BrokenSocket:
    """Wraps a socket. Its `send` and `sendall` of a message raise `error`, once, CUT bytes before its end.

    With `on_read`, the error comes from `recv` instead.
    """

    def __init__(self, sock: Any, error: BaseException, on_read: bool = False) -> None:
        self._sock = sock
        self._error: BaseException | None = error
        self._on_read = on_read

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def sendall(self, data: bytes) -> None:
        if self._error and not self._on_read and len(data) > CUT:
            self._sock.sendall(data[:-CUT])
            self._break_off()
        self._sock.sendall(data)

    def send(self, data: bytes, flags: int = 0) -> int:
        if self._error and not self._on_read and len(data) > CUT:
            self._sock.sendall(data[:-CUT])
            self._break_off()
        return int(self._sock.send(data, flags))

    def recv(self, size: int, flags: int = 0) -> bytes:
        if self._error and self._on_read:
            self._break_off()
        return bytes(self._sock.recv(size, flags))

    def _break_off(self) -> None:
        error, self._error = self._error, None
        assert error
        raise error


class ProcessEnded(BaseException):
    """The process would have ended."""


def raise_instead_of_exit(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let `os._exit` raise ProcessEnded in the calling thread. Return a list that gets the exit statuses."""
    statuses: list[int] = []

    def end(status: int) -> None:
        statuses.append(status)
        raise ProcessEnded(status)

    monkeypatch.setattr(os, "_exit", end)
    return statuses


EVERY_NTH_MESSAGE = """
import itertools
from ringolib.net import websocket_client
class Sock:
    messages = itertools.count(1)
    def __init__(self, sock):
        self._sock = sock
    def __getattr__(self, name):
        return getattr(self._sock, name)
    def send(self, data, flags=0):
        if len(data) > 1600 and next(self.messages) % {nth} == 0:
            self._sock.sendall(data[:-800])
            raise MemoryError
        return self._sock.send(data, flags)
open_stream = websocket_client.open_stream
websocket_client.open_stream = lambda *arguments: Sock(open_stream(*arguments))
"""
"""Code for a server process: every nth message of its links breaks off."""


def break_connections(monkeypatch: pytest.MonkeyPatch, module: ModuleType, *errors: BaseException) -> None:
    """Break a message off, with the next one of `errors`, on each of the next connections that `module` makes."""
    left = list(errors)

    class Breaking(ClientConnection):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            if left:
                self.sock = BrokenSocket(self.sock, left.pop(0))

    monkeypatch.setattr(module, "ClientConnection", Breaking)
