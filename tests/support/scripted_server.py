"""An HTTP server for tests of clients: it reads requests and answers each of them with the next piece of a script."""

import re
import socket
import threading
import time
from collections.abc import Sequence

from support.harness import DEADLINE

Script = bytes | Sequence[bytes]
"""The answer to one request: its bytes, or pieces that are sent one after the other with short pauses."""
PAUSE_SECONDS = 0.02


class ScriptedServer:
    """Accepts one connection for each of `scripts`, reads a request, answers it, and closes the connection.

    If a script is a list of scripts, its connection serves as many requests. `requests` holds the requests.
    """

    def __init__(self, *scripts: Script | list[Script]) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._scripts = scripts
        self.requests: list[bytes] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        for script in self._scripts:
            try:
                client, _ = self._listener.accept()
                with client:
                    client.settimeout(DEADLINE)
                    for answer in script if isinstance(script, list) else [script]:
                        self.requests.append(_read_request(client))
                        for piece in (answer,) if isinstance(answer, bytes) else answer:
                            client.sendall(piece)
                            if not isinstance(answer, bytes):
                                time.sleep(PAUSE_SECONDS)
            except OSError:
                pass  # the client has left, or the test has ended

    def __enter__(self) -> "ScriptedServer":
        return self

    def __exit__(self, *unused: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(DEADLINE)


def _read_request(client: socket.socket) -> bytes:
    """Return one request with its body."""
    request = b""
    while b"\r\n\r\n" not in request:
        data = client.recv(65536)
        if not data:
            raise ConnectionResetError
        request += data
    length = re.search(rb"(?i)content-length: *(\d+)", request)
    end = request.index(b"\r\n\r\n") + 4 + int(length[1] if length else 0)
    while len(request) < end:
        request += client.recv(65536)
    return request
