"""Votes and answers survive the wire, and every rank raises the same error."""

from __future__ import annotations

import errno

import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt import errors, messages
from distckpt.messages import Phase, Status, Vote

MAX_EXAMPLES = examples(100)

_common = {
    "phase": st.sampled_from(Phase),
    "status": st.sampled_from(Status),
    "digest_a": st.binary(min_size=16, max_size=16),
    "digest_b": st.binary(min_size=12, max_size=12),
    "call": st.binary(min_size=12, max_size=12),
    "detail": st.binary(max_size=20),
    "rank": st.just(0),
    "seconds": st.floats(0, 1e6, width=32),
}
_votes = st.builds(
    Vote, size_bytes=st.integers(0, 2**63 - 1), step=st.none(), **_common
) | st.builds(Vote, size_bytes=st.just(0), step=st.integers(-(2**63), 2**63 - 1), **_common)


def sent(votes):
    """Return votes as the chief receives them, one a rank."""
    packed = [vote.pack() for vote in votes]
    return messages.unpack_votes(packed, [vote.detail for vote in votes])


@settings(max_examples=MAX_EXAMPLES)
@given(votes=st.lists(_votes, max_size=4))
def test_votes_packed_and_unpacked_are_the_same(votes):
    """Nothing of a vote is lost, and each is that of its rank."""
    assert sent(votes) == [vote._replace(rank=rank) for rank, vote in enumerate(votes)]


@settings(max_examples=MAX_EXAMPLES)
@given(vote=_votes)
def test_vote_packed_has_always_the_same_size(vote):
    """Votes are gathered as one fixed-size tensor; two a save are at most 128 bytes."""
    assert len(vote.pack()) == messages.VOTE_BYTES == 58


@settings(max_examples=MAX_EXAMPLES)
@given(votes=st.lists(_votes, max_size=4))
def test_packed_votes_say_how_long_their_details_are(votes):
    """Details are gathered only when some rank has one."""
    lengths = messages.detail_lengths([vote.pack() for vote in votes])
    assert lengths == [len(vote.detail) for vote in votes]


def test_vote_with_both_bytes_and_a_step_cannot_be_sent():
    """There is room for one number."""
    with pytest.raises(ValueError, match="not both"):
        Vote(Phase.WRITE, size_bytes=1, step=1).pack()


def test_second_digest_of_full_length_is_cut():
    """Twelve bytes tell values apart."""
    vote = Vote(Phase.DECIDE, digest_b=bytes(range(16)))
    assert sent([vote])[0].digest_b == bytes(range(12))


@pytest.mark.parametrize("status", Status)
def test_vote_is_ok_only_with_status_ok(status):
    """Every other status is a failure."""
    assert Vote(Phase.WRITE, status).ok is (status is Status.OK)


def failed(rank, error, status=Status.FAILED):
    """Make the vote of a failed rank as the others receive it."""
    return sent([messages.failure(Phase.WRITE, error, status)])[0]._replace(rank=rank)


def good(rank):
    """Make the vote of a rank where all went well."""
    return sent([Vote(Phase.WRITE)])[0]._replace(rank=rank)


def raise_failures(votes):
    messages.raise_failures(votes, "saving ckpt-1", errors.SaveFailed)


def test_raise_failures_with_all_well_returns():
    """No failure, no error."""
    raise_failures([good(0), good(1)])


def test_raise_failures_of_one_rank_names_it_with_its_text():
    """Everybody learns who failed and why."""
    with pytest.raises(errors.SaveFailed) as caught:
        raise_failures([good(0), failed(1, RuntimeError("boom"))])
    assert caught.value.failures == {1: "RuntimeError: boom"}


def test_raise_failures_of_one_rank_says_of_how_many():
    """One lame rank is told from a broken filesystem."""
    with pytest.raises(errors.SaveFailed, match=r"\(1 of 3 ranks\): rank 2: ValueError: x"):
        raise_failures([good(0), good(1), failed(2, ValueError("x"))])


def test_raise_failures_alike_on_all_ranks_says_it_once():
    """A wrong argument on all ranks reads as if there were one."""
    votes = [failed(rank, errors.ConfigError("bad number")) for rank in range(3)]
    with pytest.raises(errors.ConfigError, match=r"^saving ckpt-1: bad number$"):
        raise_failures(votes)


def test_raise_failures_of_storage_keeps_the_errno():
    """A full disk is still a full disk on the other ranks."""
    error = errors.StorageError("no space", errno=errno.ENOSPC)
    with pytest.raises(errors.StorageError) as caught:
        raise_failures([good(0), failed(1, error)])
    assert caught.value.errno == errno.ENOSPC


def test_raise_failures_of_storage_with_different_errnos_keeps_none():
    """No rank's reason stands for another's."""
    votes = [
        failed(0, errors.StorageError("a", errno=errno.ENOSPC)),
        failed(1, errors.StorageError("b", errno=errno.EIO)),
    ]
    with pytest.raises(errors.StorageError) as caught:
        raise_failures(votes)
    assert caught.value.errno is None


def test_raise_failures_of_different_kinds_is_the_default():
    """Different errors become one that carries them all."""
    votes = [failed(0, errors.ConfigError("a")), failed(1, errors.MismatchError("b"))]
    with pytest.raises(errors.SaveFailed) as caught:
        raise_failures(votes)
    assert caught.value.failures == {0: "a", 1: "b"}


def test_raise_failures_of_many_ranks_keeps_the_message_short():
    """A thousand failed ranks give sixteen lines; all are in the attribute."""
    votes = [failed(rank, RuntimeError(f"no {rank}")) for rank in range(1000)]
    with pytest.raises(errors.SaveFailed) as caught:
        raise_failures(votes)
    assert str(caught.value).count("rank ") == 16


def test_failure_with_very_long_text_is_cut():
    """A message of any length fits between ranks."""
    text, _ = messages.failure_of(failed(0, RuntimeError("x" * 10**6)))
    assert len(text) <= 2048


@pytest.mark.parametrize("text", ["ä\n\x1b", "\udcff", "'\"\\"])
def test_failure_with_odd_text_survives_the_wire(text):
    """File names that are not Unicode do not break the vote."""
    assert messages.failure_of(failed(0, errors.ConfigError(text)))[0] == text


def test_failure_of_a_shard_file_says_whose_it_is():
    """The chief re-reads the file that a rank blames."""
    error = errors.ChecksumError("wrong bytes")
    error.shard_rank = 5
    assert messages.failure_of(failed(0, error))[1] == 5


def test_raise_failures_without_keeping_the_kind_is_the_default():
    """A protocol can promise one class of error."""
    votes = [good(0), failed(1, errors.StorageError("full"))]
    with pytest.raises(errors.SaveFailed):
        messages.raise_failures(votes, "saving", errors.SaveFailed, keep_kind=False)


def test_answer_encoded_and_decoded_is_the_same():
    """What the chief says is what ranks hear."""
    payload = {"save": True, "number": 3, "why": None}
    assert messages.decode_answer(messages.encode_answer(payload)) == payload


@pytest.mark.parametrize(
    "kind",
    [
        errors.ConfigError,
        errors.FencedError,
        errors.OutcomeUnknown,
        errors.DirectoryInUseError,
        errors.CorruptStateError,
        errors.StorageError,
        errors.SaveFailed,
    ],
)
def test_error_answer_raises_the_same_class_and_text(kind):
    """All ranks can handle the chief's error as the chief would."""
    with pytest.raises(kind, match=r"^what happened$"):
        messages.decode_answer(messages.encode_error(kind("what happened")))


def test_error_answer_with_failures_keeps_them_by_rank():
    """JSON would turn the ranks into strings."""
    error = errors.RestoreFailed("no", {3: "disk"})
    with pytest.raises(errors.RestoreFailed) as caught:
        messages.decode_answer(messages.encode_error(error))
    assert caught.value.failures == {3: "disk"}


def test_error_answer_of_storage_keeps_the_errno():
    """The chief's full disk is a full disk for all."""
    error = errors.StorageError("no", errno=errno.ENOSPC)
    with pytest.raises(errors.StorageError) as caught:
        messages.decode_answer(messages.encode_error(error))
    assert caught.value.errno == errno.ENOSPC
