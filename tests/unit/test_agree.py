"""How a phase is run and agreed on, with one rank."""

import pytest

from distckpt.agree import Ran, agree
from distckpt.comm import SoloChannel
from distckpt.errors import SaveFailed, UnsupportedError
from distckpt.messages import Phase, Vote, raise_failures
from distckpt.waiting import Lane
from distckpt.worker import Worker


def _decide(votes):
    raise_failures(votes, "it failed", SaveFailed)
    return {"size": votes[0].size_bytes}


def _agree(body, says=None):
    channel = SoloChannel(Lane("decisions", Worker(10.0), "idle"))
    return agree(channel, Phase.WRITE, Ran(body), _decide, says=says)


def test_a_result_speaks_through_its_vote():
    """What the phase came to reaches the chief's decision."""
    answer = _agree(lambda: 7, lambda size: Vote(Phase.WRITE, size_bytes=size))
    assert answer == {"size": 7}


def test_an_error_is_a_vote_and_then_the_cause():
    """The error that all ranks raise has this rank's own as its cause."""
    with pytest.raises(SaveFailed, match="ZeroDivisionError") as caught:
        _agree(lambda: 1 // 0)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert caught.value.failures == {
        0: "ZeroDivisionError: integer division or modulo by zero"
    }


def test_an_error_of_ours_stays_what_it_is():
    """A kind that says more than "failed" is kept."""

    def fail():
        raise UnsupportedError("no")

    with pytest.raises(UnsupportedError, match="no"):
        _agree(fail)


def test_an_error_while_the_vote_is_made_is_a_vote_too():
    """No rank raises between two votes, whatever it is that fails."""
    with pytest.raises(SaveFailed, match="KeyError"):
        _agree(dict, lambda result: result["size"])


def test_an_interrupt_stays_an_interrupt():
    """Ctrl-C in a phase is told to the others and goes on as Ctrl-C."""

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _agree(interrupt)
