"""The outcome of a phase on one rank, and how all ranks agree on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Generic, TypeVar

from distckpt.comm import AS_USUAL, Answer, Channel, Decide, How
from distckpt.errors import DistckptError, ManagerBroken
from distckpt.messages import Phase, Status, Vote, failure

_Result = TypeVar("_Result")


class Ran(Generic[_Result]):
    """The outcome of a phase on this rank: a result, or the error that will be its vote.

    Attributes:
        error: The error; None if there was none.
        seconds: How long it took.
    """

    def __init__(self, body: Callable[[], _Result]) -> None:
        self.error: BaseException | None = None
        began = time.monotonic()
        try:
            self._result = body()
        except BaseException as error:
            self.error = error
        self.seconds = time.monotonic() - began

    def value(self) -> _Result:
        """Return the result, or raise the error."""
        if self.error is not None:
            raise self.error
        return self._result

    @property
    def result(self) -> _Result:
        """The result; to be asked for only when all ranks have agreed to go on."""
        assert self.error is None, self.error
        return self._result


def agree(
    channel: Channel,
    phase: Phase,
    ran: Ran[_Result],
    decide: Decide,
    *,
    says: Callable[[_Result], Vote] | None = None,
    status_of: Callable[[BaseException], Status] = lambda _: Status.FAILED,
    how: How = AS_USUAL,
) -> Answer:
    """Vote on the outcome of a phase, and return the chief's answer: collective.

    An error becomes this rank's vote, whatever it is, so that no rank raises between two
    votes; once all agree, a rank raises its own error as the cause.

    Args:
        channel: The channel for the votes and the answer.
        phase: The phase of the protocol.
        ran: The outcome of the phase here.
        decide: The chief's decision from all votes.
        says: Makes the vote from the result; by default a vote that all is well.
        status_of: Returns the status of this rank's error.
        how: The manner of the round; see ``comm.How``.
    """
    if isinstance(ran.error, ManagerBroken):
        raise ran.error  # nobody is left to vote with
    voted = Ran(lambda: says(ran.result) if says and not ran.error else Vote(phase))
    original = ran.error or voted.error
    if original is None:
        vote = voted.result
    else:
        vote = failure(phase, original, status_of(original))
    vote = vote._replace(seconds=ran.seconds)
    try:
        answer = channel.consult(vote, decide, how=how)
    except DistckptError as error:
        if original is None or original is error:
            raise
        if not isinstance(original, Exception):
            raise original from error  # Ctrl-C and exit stay what they are
        raise error from original
    if original is not None and not isinstance(original, Exception):
        raise original
    return answer
