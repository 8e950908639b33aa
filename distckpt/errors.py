"""Every error that distckpt raises on purpose.

* DistckptError
  + ConfigError (also ValueError)      a bad argument, found before anything is done
  + UnsupportedError (also TypeError)  a value, tensor or object that cannot be stored
  + StorageError (also OSError)        disk full, permission denied, missing mount, ...
    - StorageTimeout                   a call into the filesystem hangs
  + FormatError                        bytes on disk are not what the format says
    - CorruptStateError                the record chain cannot be read
    - ManifestError
    - ShardFileError
    - ChecksumError                    well-formed, but not the bytes that were written
    - UnsafeCheckpointError            a file that could do harm: a link, a device, ...
  + NewerFormatError                   a newer version of distckpt wrote the file
  + CheckpointNotFound
  + TensorNotFound (also KeyError)     a checkpoint has no tensor of that name
  + MismatchError                      checkpoint and live objects do not fit together
  + DirectoryInUseError                another live job holds the run directory
  + FencedError                        a newer manager has taken the run directory over
  + RanksFailed                        some ranks failed; carries {rank: text}
    - SaveFailed
    - RestoreFailed
  + OutcomeUnknown                     the disk will not say whether a commit happened
  + ManagerBroken                      this manager cannot be used any more
    - PeerLost                         another rank died or left
    - PeerTimeout                      another rank did not arrive within the deadline
    - Desync                           ranks are in different calls

All are ``Exception``s, and none is ever pickled: between ranks errors travel as text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping


class DistckptError(Exception):
    """Base class of every error that distckpt raises on purpose."""


class ConfigError(DistckptError, ValueError):
    """A bad argument, found before anything is read or written."""


class UnsupportedError(DistckptError, TypeError):
    """A value, tensor or object that cannot be stored; the message names its path.

    Attributes:
        may_pass: Whether it may be stored later: a lazy module after its first batch.
    """

    may_pass: bool = False


class StorageError(DistckptError, OSError):
    """The filesystem refused an operation.

    Attributes:
        operation: What was tried, for example ``"fsync"``.
        path: On what.
        errno: The operating system's reason, where there is one.
    """

    def __init__(
        self,
        message: str,
        *,
        operation: str = "",
        path: str = "",
        errno: int | None = None,
    ) -> None:
        super().__init__(message)
        self.operation = operation
        self.path = path
        self.errno = errno

    def __str__(self) -> str:
        return str(self.args[0])


class StorageTimeout(StorageError):
    """A call into the filesystem did not come back; it cannot be ended and may hang on."""


class FormatError(DistckptError):
    """Bytes on disk are not what the format says.

    Attributes:
        shard_rank: The rank whose shard file it is; None for another file.
    """

    shard_rank: int | None = None


class CorruptStateError(FormatError):
    """The chain of records cannot be read: never taken for an empty directory."""


class ManifestError(FormatError):
    """A manifest is not valid."""


class ShardFileError(FormatError):
    """A shard file is not a valid safetensors file, or not the one expected."""


class ChecksumError(FormatError):
    """Bytes differ from those that were written."""


class UnsafeCheckpointError(FormatError):
    """A file is a link, a device or the like: nothing of it is read."""


class NewerFormatError(DistckptError):
    """A file is of a newer format, or needs a feature that this version does not know.

    It is not damaged, so this is no ``FormatError``: a restore does not fall back to an
    older checkpoint, and ``repair``, ``prune`` and a claim leave the directory as it is.
    """


class CheckpointNotFound(DistckptError):
    """There is no such checkpoint."""


class TensorNotFound(DistckptError, KeyError):
    """A checkpoint has no tensor of that name."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would put it in quotes


class MismatchError(DistckptError):
    """Checkpoint and live objects do not fit together; lists every difference."""


class DirectoryInUseError(DistckptError):
    """Another live job holds the run directory."""


class FencedError(DistckptError):
    """A newer manager has taken the run directory over; this one may not write."""


class RanksFailed(DistckptError):
    """Some ranks failed; raised on all of them.

    Attributes:
        failures: The failed ranks, each with its error as text.
    """

    def __init__(self, message: str, failures: Mapping[int, str] | None = None) -> None:
        super().__init__(message)
        self.failures = dict(failures or {})


class SaveFailed(RanksFailed):
    """A save failed on some ranks; no checkpoint was made, older ones are untouched."""


class RestoreFailed(RanksFailed):
    """A restore failed; the message says whether live tensors were touched."""


class OutcomeUnknown(DistckptError):
    """The disk would not say whether a commit happened; the next claim will find out.

    Until an append succeeds the manager deletes nothing.
    """


class ManagerBroken(DistckptError):
    """This manager cannot be used any more; restart the job.

    Attributes:
        ranks: The ranks that are gone or missing, as far as that is known.
        committed: If a save was under way: True if it is known to be committed, False
            if it is known not to be, None if that is unknown. The next restore decides
            in any case.
    """

    def __init__(self, message: str, ranks: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)
        self.committed: bool | None = None


class PeerLost(ManagerBroken):
    """Another rank is gone: it died, or left the manager by an error."""


class PeerTimeout(ManagerBroken):
    """Another rank did not arrive within the deadline: stopped, cut off, or elsewhere."""


class Desync(ManagerBroken):
    """Ranks are in different calls of the manager at the same time."""
