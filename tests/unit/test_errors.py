"""The exception tree is what its docstring shows."""

from __future__ import annotations

import inspect
import re

import pytest

from distckpt import errors

CLASSES = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, BaseException)
]


@pytest.mark.parametrize(
    ("kind", "parents"),
    [
        (errors.ConfigError, (errors.DistckptError, ValueError)),
        (errors.UnsupportedError, (errors.DistckptError, TypeError)),
        (errors.StorageError, (errors.DistckptError, OSError)),
        (errors.CorruptStateError, (errors.FormatError,)),
        (errors.ManifestError, (errors.FormatError,)),
        (errors.ShardFileError, (errors.FormatError,)),
        (errors.ChecksumError, (errors.FormatError,)),
        (errors.UnsafeCheckpointError, (errors.FormatError,)),
        (errors.SaveFailed, (errors.RanksFailed,)),
        (errors.RestoreFailed, (errors.RanksFailed,)),
        (errors.PeerLost, (errors.ManagerBroken,)),
        (errors.PeerTimeout, (errors.ManagerBroken,)),
        (errors.Desync, (errors.ManagerBroken,)),
    ],
)
def test_class_in_tree_has_its_documented_parents(kind, parents):
    """Callers can catch by the groups that the tree shows."""
    assert all(issubclass(kind, parent) for parent in parents)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_class_is_ours_and_an_exception(kind):
    """One except clause catches all that distckpt raises on purpose."""
    assert issubclass(kind, errors.DistckptError)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_class_stands_in_the_tree(kind):
    """The docstring's tree forgets no class."""
    assert re.search(rf"[*+-] {kind.__name__}\b", errors.__doc__)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_class_is_made_from_a_message_alone(kind):
    """Errors that travel between ranks as text can be raised again."""
    assert str(kind("what went wrong")) == "what went wrong"


def test_storage_error_carries_operation_path_and_errno():
    """A handler can tell a full disk from a missing mount."""
    error = errors.StorageError("no", operation="fsync", path="/x", errno=28)
    assert (error.operation, error.path, error.errno) == ("fsync", "/x", 28)


def test_ranks_failed_keeps_its_own_copy_of_the_failures():
    """What a caller does to its dictionary later does not change the error."""
    failures = {3: "disk full"}
    error = errors.SaveFailed("save failed", failures)
    failures.clear()
    assert error.failures == {3: "disk full"}
