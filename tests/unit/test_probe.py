"""Probes: one question at a time for all callers, its cached answer, and the question to a consumer."""

import logging
import socket
import threading

import pytest
from support.harness import Blocked, eventually

from ringolib.net.addresses import Endpoint
from ringolib.net.credentials import CredentialSet
from ringolib.status import probe
from ringolib.status.probe import Answer, Probe, check_consumer
from ringolib.status.readiness_rules import Reason

LATE = "late", "no answer"
AWAY = "away", "because"


class Question:
    """A question that is answered with `answer` once `gate` is open. `calls` counts how often it was asked."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.calls = 0
        self.gate = threading.Event()

    def ask(self) -> Answer:
        self.calls += 1
        assert self.gate.wait(30)
        return self.answer


def test_callers_at_the_same_time_share_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "CACHE_SECONDS", 600)
    monkeypatch.setattr(probe, "ANSWER_TIMEOUT_SECONDS", 600)
    question = Question(AWAY)
    tested = Probe("x", question.ask, LATE)
    callers = [Blocked(lambda: tested.reason(wait=True)) for _ in range(10)]
    assert all(caller.still(0.01) for caller in callers)
    question.gate.set()
    assert {caller.result()[:2] for caller in callers} == {AWAY} and question.calls == 1
    assert isinstance(tested.reason(wait=True), Reason) and question.calls == 1, "the answer is cached"


def test_previous_answer_does_not_count_while_a_caller_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "CACHE_SECONDS", 0)
    monkeypatch.setattr(probe, "ANSWER_TIMEOUT_SECONDS", 0.1)
    question = Question(None)
    question.gate.set()
    tested = Probe("x", question.ask, LATE)
    eventually(lambda: tested.reason(wait=True) is None)
    question.gate.clear()
    for _ in range(2):
        reason = tested.reason(wait=True)
        assert reason and reason.code == "late"
    question.gate.set()
    eventually(lambda: tested.reason(wait=True) is None)


def test_caller_that_does_not_wait_gets_the_previous_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "CACHE_SECONDS", 0)
    monkeypatch.setattr(probe, "GLANCE_TIMEOUT_SECONDS", 0.01)
    monkeypatch.setattr(probe, "ANSWER_TIMEOUT_SECONDS", 600)
    question = Question(AWAY)
    tested = Probe("x", question.ask, LATE)
    assert tested.reason(wait=False) is None and not tested.answered, "there is no answer yet"
    question.gate.set()
    eventually(lambda: tested.answered)
    question.gate.clear()
    reason = tested.reason(wait=False)
    assert reason and reason[:2] == AWAY
    monkeypatch.setattr(probe, "ANSWER_TIMEOUT_SECONDS", 0)
    reason = tested.reason(wait=False)
    assert reason and reason[:2] == LATE, "a question that hangs is an answer for every caller"
    question.gate.set()


def test_expired_answer_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "CACHE_SECONDS", 0)
    monkeypatch.setattr(probe, "EXPIRY_SECONDS", 0)
    monkeypatch.setattr(probe, "GLANCE_TIMEOUT_SECONDS", 0.01)
    question = Question(AWAY)
    question.gate.set()
    tested = Probe("x", question.ask, LATE)
    tested.refresh()
    eventually(lambda: tested.answered)
    question.gate.clear()
    assert tested.reason(wait=False) is None and not tested.answered
    question.gate.set()


def test_seconds_count_from_the_first_answer_with_the_same_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "CACHE_SECONDS", 0)
    question = Question(AWAY)
    question.gate.set()
    tested = Probe("x", question.ask, LATE)

    def seconds() -> float:
        reason = tested.reason(wait=True)
        assert reason and reason.seconds is not None
        return reason.seconds

    first = seconds()
    question.answer = AWAY[0], "another text"
    eventually(lambda: seconds() > first + 0.05)
    question.answer = "other", "another code"
    eventually(lambda: seconds() < first + 0.05)


def test_unexpected_error_is_an_answer(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(probe, "CACHE_SECONDS", 600)

    def ask() -> None:
        raise ZeroDivisionError

    tested = Probe("x", ask, LATE)
    for _ in range(2):
        reason = tested.reason(wait=True)
        assert reason and reason[:2] == ("failed", "ZeroDivisionError: ")
    assert [(record.levelno, record.msg) for record in caplog.records] == [(logging.ERROR, "worker_error")]


@pytest.mark.parametrize(
    ("response", "code"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "consumer_unreachable"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n{"ready": true}', None),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 2\r\n\r\n[]", "consumer_unreachable"),
        (b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n", "consumer_unreachable"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "consumer_unreachable"),
        (b"", "consumer_unreachable"),
    ],
)
def test_only_a_response_of_ringoexp_is_an_answer(response: bytes, code: str | None) -> None:
    with socket.create_server(("localhost", 0)) as listener:
        endpoint = Endpoint("localhost", listener.getsockname()[1], "localhost")
        asking = Blocked(lambda: check_consumer(endpoint, CredentialSet(), linked=False))
        peer, _ = listener.accept()
        with peer:
            peer.recv(65536)
            peer.sendall(response)
        answer = asking.result()
    assert (answer and answer[0]) == code


@pytest.mark.parametrize("name", ["a b", "a..b", "x" * 64, "caf\xe9.invalid"])
def test_impossible_host_name_is_an_unreachable_consumer(name: str) -> None:
    answer = check_consumer(Endpoint(name, 1, name), CredentialSet(), linked=False)
    assert answer and answer[0] == "consumer_unreachable" and name in answer[1]
