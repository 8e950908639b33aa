"""distckpt: the checkpoint manager for distributed PyTorch.

Every rank writes its shard; one chief rank commits, keeps and deletes; all ranks agree.
The names below are imported when they are first used (PEP 562), so that looking at a
run directory does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from distckpt._version import __version__ as __version__

if TYPE_CHECKING:
    from distckpt.checkpoint import Checkpoint
    from distckpt.errors import (
        CheckpointNotFound,
        ChecksumError,
        ConfigError,
        CorruptStateError,
        Desync,
        DirectoryInUseError,
        DistckptError,
        FencedError,
        FormatError,
        ManagerBroken,
        ManifestError,
        MismatchError,
        NewerFormatError,
        OutcomeUnknown,
        PeerLost,
        PeerTimeout,
        RanksFailed,
        RestoreFailed,
        SaveFailed,
        ShardFileError,
        StorageError,
        StorageTimeout,
        TensorNotFound,
        UnsafeCheckpointError,
        UnsupportedError,
    )
    from distckpt.events import Event
    from distckpt.gate import Decision
    from distckpt.manager import CheckpointManager
    from distckpt.opened import OpenedCheckpoint
    from distckpt.opened import open as open
    from distckpt.parts import Parts
    from distckpt.per_rank import OneRank, PerGroup, PerRank, Replicated, RngState
    from distckpt.policy import (
        CheckpointInfo,
        best,
        every,
        latest,
        on_request,
        on_signal,
    )
    from distckpt.pretrained import from_pretrained
    from distckpt.readers import (
        CheckpointState,
        checkpoints_iterator,
        get_checkpoint_state,
        latest_checkpoint,
    )
    from distckpt.rendezvous import init_process_group
    from distckpt.requests import add_metrics, pin, request_save, unpin
    from distckpt.restore_names import RestoreOptions
    from distckpt.save import CheckpointOptions
    from distckpt.stored_tensor import StoredTensor
    from distckpt.trainable import Trainable

__all__ = [
    "Checkpoint",
    "CheckpointInfo",
    "CheckpointManager",
    "CheckpointNotFound",
    "CheckpointOptions",
    "CheckpointState",
    "ChecksumError",
    "ConfigError",
    "CorruptStateError",
    "Decision",
    "Desync",
    "DirectoryInUseError",
    "DistckptError",
    "Event",
    "FencedError",
    "FormatError",
    "ManagerBroken",
    "ManifestError",
    "MismatchError",
    "NewerFormatError",
    "OneRank",
    "OpenedCheckpoint",
    "OutcomeUnknown",
    "Parts",
    "PeerLost",
    "PeerTimeout",
    "PerGroup",
    "PerRank",
    "RanksFailed",
    "Replicated",
    "RestoreFailed",
    "RestoreOptions",
    "RngState",
    "SaveFailed",
    "ShardFileError",
    "StorageError",
    "StorageTimeout",
    "StoredTensor",
    "TensorNotFound",
    "Trainable",
    "UnsafeCheckpointError",
    "UnsupportedError",
    "add_metrics",
    "best",
    "checkpoints_iterator",
    "every",
    "from_pretrained",
    "get_checkpoint_state",
    "init_process_group",
    "latest",
    "latest_checkpoint",
    "on_request",
    "on_signal",
    "pin",
    "request_save",
    "unpin",
]

_HOMES = {
    "Checkpoint": "checkpoint",
    "CheckpointInfo": "policy",
    "CheckpointManager": "manager",
    "CheckpointOptions": "save",
    "CheckpointState": "readers",
    "Decision": "gate",
    "Event": "events",
    "OneRank": "per_rank",
    "OpenedCheckpoint": "opened",
    "Parts": "parts",
    "PerGroup": "per_rank",
    "PerRank": "per_rank",
    "Replicated": "per_rank",
    "RestoreOptions": "restore_names",
    "RngState": "per_rank",
    "StoredTensor": "stored_tensor",
    "Trainable": "trainable",
    "add_metrics": "requests",
    "best": "policy",
    "checkpoints_iterator": "readers",
    "every": "policy",
    "from_pretrained": "pretrained",
    "get_checkpoint_state": "readers",
    "init_process_group": "rendezvous",
    "latest": "policy",
    "latest_checkpoint": "readers",
    "on_request": "policy",
    "on_signal": "policy",
    "open": "opened",
    "pin": "requests",
    "request_save": "requests",
    "unpin": "requests",
}


# ``from distckpt import *`` must not hide Python's own ``open``.
_PUBLIC = [*__all__, "open"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        # Without near names: each import of a submodule comes by here, too.
        msg = f"module 'distckpt' has no attribute {name!r}"
        raise AttributeError(msg)
    module = import_module(f"distckpt.{_HOMES.get(name, 'errors')}")
    return getattr(module, name)


def __dir__() -> list[str]:
    special = (name for name in globals() if name.startswith("__"))
    return sorted({*special, *_PUBLIC})
