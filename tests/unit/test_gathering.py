"""When the ingest loop waits for more messages, and when it stops to wait because waits did not pay."""

import pytest

from ringolib.web.gathering import MIN_CLIENTS, SKIPPED_TURNS, Gathering

MANY = 2000


@pytest.mark.parametrize("clients, waiting, waits", [(MANY, 5, True), (MANY, 500, False), (MIN_CLIENTS - 1, 0, False)])
def test_loop_waits_if_few_of_many_clients_wait_for_acks(clients, waiting, waits):
    assert Gathering().wait(clients, waiting) is waits


def test_waits_go_on_while_they_pay():
    gathering = Gathering()
    for served in (2, 1, 3, 1, 2, 125):  # one in vain is luck
        assert gathering.wait(MANY, 3)
        gathering.note(True, served, MANY)
    assert gathering.wait(MANY, 3)


@pytest.mark.parametrize("served", [0, 1, 126])
def test_two_waits_in_vain_end_the_waits_for_some_turns(served):
    gathering = Gathering()
    for _ in range(2):
        assert gathering.wait(MANY, 0)
        gathering.note(True, served, MANY)
    for _ in range(SKIPPED_TURNS):
        gathering.note(False, 0, MANY)  # a turn that reads nothing does not count
        assert not gathering.wait(MANY, 0)
        gathering.note(False, 1, MANY)
    assert gathering.wait(MANY, 0)
