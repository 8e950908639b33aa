"""The other ways of saving, each made as durable as distckpt is.

What a peer does not sync by itself, files or folders, is synced here, within its time.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import (
    AsyncSaveResponse,
    async_save,
    save,
)
from torch.utils.serialization import config as serialization_config

from distckpt.bench.contender import (
    EAGER,
    LAZY,
    Contender,
    FolderPerSave,
    InThread,
    Pending,
    sync_folder,
    sync_path,
)
from distckpt.bench.measure import files_in
from distckpt.bench.team import Team
from distckpt.bench.workloads import Workload


class _WithGroup(FolderPerSave):
    """A peer that makes collectives.

    On the job's own group they would deadlock with those of the training loop.
    """

    def __init__(self, workload: Workload, team: Team, folder: str) -> None:
        super().__init__(workload, team, folder)
        self.group: dist.ProcessGroup | None = team.new_group()

    def abandon(self) -> None:
        """Close this rank's connections: that ends what other ranks wait for."""
        if self.group is not None:
            dist.destroy_process_group(self.group)
            self.group = None
            gc.collect()


class Dcp(_WithGroup):
    """``torch.distributed.checkpoint`` with its defaults."""

    name = "dcp"
    modes: tuple[str, ...] = (EAGER,)

    def save(self) -> None:
        """Save durably."""
        folder = self.next_folder()
        save(self.workload.state_dict(), checkpoint_id=folder, process_group=self.group)
        sync_folder(folder)

    def start(self, mode: str) -> Pending:
        """Begin a save that goes on behind the caller."""
        folder = self.next_folder()
        future = async_save(
            self.workload.state_dict(), checkpoint_id=folder, process_group=self.group
        )
        return _after(future, folder)

    def load(self) -> None:
        """Restore the newest into the workload's own tensors."""
        load(
            self.workload.state_dict(), checkpoint_id=self.newest, process_group=self.group
        )


class _Staged(InThread):
    """Of a peer that stages in a thread, and whose user has to wait for it."""


class DcpTuned(Dcp):
    """The same, as fast as its options make it."""

    name = "dcp-tuned"
    modes = (EAGER, LAZY)

    def __init__(self, workload: Workload, team: Team, folder: str) -> None:
        super().__init__(workload, team, folder)
        self._planner = DefaultSavePlanner(enable_plan_caching=True)
        self._stager: DefaultStager | None = None

    def save(self) -> None:
        """Save durably."""
        folder = self.next_folder()
        with _without_crc():
            save(
                self.workload.state_dict(),
                storage_writer=self._writer(folder),
                planner=self._planner,
                process_group=self.group,
            )
        sync_folder(folder)

    def start(self, mode: str) -> Pending:
        """Begin a save that goes on behind the caller."""
        folder = self.next_folder()
        if self._stager is None:
            options = StagingOptions(
                use_pinned_memory=self.workload.device.type == "cuda",
                use_shared_memory=False,
                use_async_staging=True,
                use_non_blocking_copy=False,
            )
            self._stager = DefaultStager(options)
        crc = _without_crc()
        crc.__enter__()
        response = async_save(
            self.workload.state_dict(),
            storage_writer=self._writer(folder),
            planner=self._planner,
            process_group=self.group,
            async_stager=self._stager,
        )

        assert isinstance(response, AsyncSaveResponse)

        def finish() -> None:
            try:
                response.upload_completion.result()
            finally:
                crc.__exit__(None, None, None)
            sync_folder(folder)

        pending = _Staged(finish, response.staging_completion.result)
        if mode == EAGER:
            pending.wait_staged()
        return pending

    def close(self) -> None:
        """Let go of the staging memory."""
        if self._stager is not None:
            self._stager.close()
            self._stager = None

    @staticmethod
    def _writer(folder: str) -> FileSystemWriter:
        return FileSystemWriter(folder, thread_count=2)


def _after(future: Any, folder: str) -> Pending:
    def finish() -> None:
        future.result()
        sync_folder(folder)

    return InThread(finish)


@contextmanager
def _without_crc() -> Iterator[None]:
    # A user's setting holds in one thread only, and the writers are others: so the default.
    entry = serialization_config._config["save.compute_crc32"]  # type: ignore[attr-defined]
    before, entry.default = entry.default, False
    try:
        yield
    finally:
        entry.default = before


class _FilePerRank(FolderPerSave):
    """One file a rank; of a state that is equal on all ranks, one file in all."""

    def save(self) -> None:
        """Save durably."""
        folder = self.next_folder()
        if self.workload.replicated and self.team.rank != 0:
            return
        path = self._path()
        self._write(path)
        sync_path(path)
        sync_folder(folder)

    def load(self) -> None:
        """Restore the newest into the workload's own tensors."""
        self._read(self._path())

    def _path(self) -> str:
        rank = 0 if self.workload.replicated else self.team.rank
        return os.path.join(self.newest, f"rank{rank}")

    def _write(self, path: str) -> None:
        raise NotImplementedError

    def _read(self, path: str) -> None:
        raise NotImplementedError


class TorchSave(_FilePerRank):
    """``torch.save`` of plain tensors, ``torch.load`` of a mapped file."""

    name = "torch-save"

    def _write(self, path: str) -> None:
        torch.save(self.workload.flat_local(), path)

    def _read(self, path: str) -> None:
        loaded = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
        for name, tensor in self.workload.flat_local().items():
            tensor.copy_(loaded[name])
        self.workload.synchronize()


class Safetensors(_FilePerRank):
    """``save_file`` of plain tensors, ``safe_open``."""

    name = "safetensors"

    def _write(self, path: str) -> None:
        from safetensors.torch import save_file

        save_file(self.workload.flat_local(), path)

    def _read(self, path: str) -> None:
        from safetensors import safe_open

        with safe_open(path, framework="pt", device="cpu") as file:
            for name, tensor in self.workload.flat_local().items():
                tensor.copy_(file.get_tensor(name))
        self.workload.synchronize()


class TorchSnapshot(_WithGroup):
    """``torchsnapshot``, of plain local tensors: it does not know ``DTensor``."""

    name = "torchsnapshot"
    modes = (EAGER,)

    def __init__(self, workload: Workload, team: Team, folder: str) -> None:
        super().__init__(workload, team, folder)
        self._replicated = ["**"] if workload.replicated else []

    def save(self) -> None:
        """Save durably."""
        folder = self.next_folder()
        self._module.Snapshot.take(
            folder, self._app_state(), pg=self.group, replicated=self._replicated
        )
        self._sync(folder)

    def start(self, mode: str) -> Pending:
        """Begin a save that goes on behind the caller."""
        folder = self.next_folder()
        pending = self._module.Snapshot.async_take(
            folder, self._app_state(), pg=self.group, replicated=self._replicated
        )

        def finish() -> None:
            pending.wait()
            self._sync(folder)

        return InThread(finish)

    def load(self) -> None:
        """Restore the newest into the workload's own tensors."""
        state = self._app_state()
        self._module.Snapshot(self.newest, pg=self.group).restore(state)

    @property
    def _module(self) -> Any:
        return importlib.import_module("torchsnapshot")

    def _app_state(self) -> dict[str, Any]:
        return {"state": self._module.StateDict(**self.workload.flat_local())}

    def _sync(self, folder: str) -> None:
        # It syncs nothing. The ranks of a host share the work, as any of them can do it.
        files = list(files_in(folder))
        for path in files[self.team.local_rank :: self.team.local_world_size]:
            sync_path(path)
        for path in {os.path.dirname(path) for path in files}:
            sync_path(path)
        sync_folder(folder)


PEERS: dict[str, Callable[[Workload, Team, str], Contender]] = {
    peer.name: peer for peer in (Dcp, DcpTuned, TorchSave, Safetensors, TorchSnapshot)
}
_MODULES = {
    "dcp": "torch",
    "dcp-tuned": "torch",
    "torch-save": "torch",
    "safetensors": "safetensors.torch",
    "torchsnapshot": "torchsnapshot",
}


def version_of(name: str) -> str | None:
    """Return the version of a peer's package; None if it is not installed."""
    try:
        return importlib.metadata.version(_MODULES[name].partition(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return None


def why_unusable(name: str) -> str:
    """Say why a peer cannot be used here; "" if it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(_MODULES[name])
    except ModuleNotFoundError as error:
        return f"not installed: {error}"
    except Exception as error:
        return f"cannot be imported: {type(error).__name__}: {error}"[:300]
    return ""
