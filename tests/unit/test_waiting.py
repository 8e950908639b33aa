"""How long one rank waits for the others, and what it says then."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest

from distckpt.errors import PeerLost, PeerTimeout
from distckpt.liveness import HERE, WAIT, Round, Verdict
from distckpt.messages import Phase
from distckpt.waiting import Waiting, Whereabouts
from distckpt.worker import Worker

pytestmark = pytest.mark.alone

ROUND = Round("decisions", 1)
GONE = Verdict(True, (2,), "rank 2 died.")
MISSING = Verdict(False, (3,), "no answer from rank 3.")


class Others:
    """What the chief's thread would say: one word for each roll call."""

    def __init__(self, *words):
        self.words = list(words)
        self.verdict = None
        self.last_progress = 0.0
        self.num_calls = 0

    def call_roll(self, round_, broken=False):
        """Answer as a ``Liveness`` does."""
        assert round_ == ROUND
        self.num_calls += 1
        return self.words.pop(0)


def _waiting(others, seconds=0.0, patient=False):
    return Waiting("rank 0 of 4", Phase.WRITE, seconds, ROUND, others, patient)


def _wait_until_it_raises(waiting, seconds=2.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        waiting.go_on()
        time.sleep(0.01)


def test_who_is_missing_at_the_deadline_is_named():
    with pytest.raises(PeerTimeout, match=r"rank 0 of 4, .* WRITE\): no answer") as caught:
        _wait_until_it_raises(_waiting(Others(MISSING)))
    assert caught.value.ranks == (3,)


def test_before_the_deadline_nobody_is_asked():
    others = Others(MISSING)
    waiting = _waiting(others, seconds=60.0)
    waiting.go_on()
    assert others.num_calls == 0


def test_all_here_twice_means_that_what_they_send_does_not_arrive():
    """Their answer has a moment to come; then something is wrong with the network."""
    others = Others(HERE, HERE)
    started = time.monotonic()
    with pytest.raises(PeerTimeout, match="what they send does not arrive") as caught:
        _wait_until_it_raises(_waiting(others))
    assert caught.value.ranks == () and others.num_calls == 2
    assert 0.25 < time.monotonic() - started < 1.0


def test_a_chief_that_begins_to_work_after_all_were_here_is_waited_for():
    """The time counts anew; only then is the roll called again."""
    others = Others(HERE, WAIT, HERE, MISSING)
    with pytest.raises(PeerTimeout, match="no answer from rank 3"):
        _wait_until_it_raises(_waiting(others))
    assert others.words == []


def test_what_comes_in_the_moment_after_the_news_counts_for_more():
    """All others may have it already: then the round is over for everybody."""
    others = Others()
    waiting = _waiting(others, seconds=60.0)
    others.verdict = GONE
    waiting.go_on()
    time.sleep(0.15)
    with pytest.raises(PeerLost, match="rank 2 died") as caught:
        waiting.go_on()
    assert caught.value.ranks == (2,)


def test_progress_of_any_rank_moves_the_deadline_of_who_is_patient():
    others = Others(MISSING)
    waiting = _waiting(others, seconds=0.2, patient=True)
    for _ in range(6):
        others.last_progress = time.monotonic()
        time.sleep(0.1)
        waiting.go_on()
    assert others.num_calls == 0
    with pytest.raises(PeerTimeout):
        _wait_until_it_raises(waiting)


def test_whereabouts_tell_of_all_lanes_and_of_what_hangs():
    """The first one always, the other while it does something."""
    worker = Worker(timedelta(seconds=5).total_seconds())
    whereabouts = Whereabouts()
    decisions = whereabouts.lane("decisions", worker, "in no call")
    commits = whereabouts.lane("commits", worker, "saving nothing")
    assert whereabouts().text == "in no call"
    assert commits.come_to("waiting in phase WRITE") == Round("commits", 1)
    place = whereabouts()
    assert place.text == "in no call; waiting in phase WRITE"
    assert place.reached == {"decisions": 0, "commits": 1} and place.deciding == ()
    commits.decide("deciding in phase WRITE")
    assert decisions.come_to("waiting in phase SYNC") == Round("decisions", 1)
    place = whereabouts()
    assert place.deciding == ("commits",)
    assert place.text == "waiting in phase SYNC; deciding in phase WRITE"
    commits.be_idle()
    decisions.be_idle()
    assert whereabouts().text == "in no call" and whereabouts().deciding == ()
