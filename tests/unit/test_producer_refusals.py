"""What ends a `Producer` and `send`: refusals that repetition cannot change, and no fault of the server."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.fake_consumer import Link, fake_consumer
from support.harness import DEADLINE, ROOT, eventually, free_port
from support.scripted_server import ScriptedServer
from support.short_times import short_times  # noqa: F401  # a fixture for each test

from ringolib.client.producer import Producer
from ringolib.net.frames import MAX_MESSAGE
from ringolib.wire import decode_batch, encode_ack


@pytest.mark.parametrize(
    "fault",
    [
        b"\x88\x02" + (1014).to_bytes(2, "big"),  # Bad Gateway, which wsproto does not know
        b"\x88\x02" + (999).to_bytes(2, "big"),
        b"\x88\x01x",
        b"\x88\x04" + (1000).to_bytes(2, "big") + b"\xff\xff",
        b"\x81\x04text",
        b"\x82\x88" + bytes(12),  # masked
        b"\x82\x7f" + (MAX_MESSAGE + 1).to_bytes(8, "big") + bytes(MAX_MESSAGE + 1),
        b"\xc2\x00",  # a reserved bit
    ],
    ids=["1014", "999", "close of one byte", "reason", "text", "masked", "too large", "reserved bit"],
)
def test_fault_in_the_servers_frames_does_not_end_the_producer(fault: bytes) -> None:
    """A close code that we find for the server's fault would be permanent if the server had sent it."""
    served: list[int] = []

    def answer(connection: Link) -> None:
        served.append(1)
        count = len(decode_batch(connection.recv()).values)
        if len(served) == 1:
            connection.socket.sendall(fault)
        else:
            connection.send(encode_ack(count))
        connection.read_frame(DEADLINE)

    with fake_consumer(answer) as port, Producer(f"ws://localhost:{port}/") as sender:
        sender.send([1, 2])
        eventually(lambda: "broke the protocol" in (sender.trouble or "") or sender.acked)
        sender.flush(DEADLINE)
        assert (sender.acked, len(served)) == (2, 2)


@pytest.mark.parametrize("status", [406, 411, 413, 414, 415, 421, 431, 451, 505])
def test_permanent_status_ends_send_with_its_reason(status: int, tmp_path: Path) -> None:
    body = b'{"error": "as the server says"}'
    with ScriptedServer(b"HTTP/1.1 %d No\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)) as refusing:
        command = [sys.executable, str(ROOT / "ringoexp.py"), "send", "--url", f"ws://127.0.0.1:{refusing.port}/"]
        done = subprocess.run(command, cwd=tmp_path, input="1\n", capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 1
    assert f"refused with HTTP status {status}: as the server says; nothing was sent\n" in done.stderr


@pytest.mark.parametrize("token", ["secret\n", " secret", "secr\xe9t", "sec ret", ""])
def test_malformed_token_is_refused_at_once(token: str) -> None:
    """No server would get it: the producer would try for ever."""
    with pytest.raises(ValueError, match="malformed token") as error:
        Producer(f"ws://localhost:{free_port()}/", token=token)
    assert "sec" not in str(error.value)
