"""What tests of asynchronous saves share: writes that can be held, things to save."""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from distckpt import Checkpoint, CheckpointOptions, PerRank, RngState

EAGER = CheckpointOptions(enable_async=True)
LAZY = CheckpointOptions(enable_async=True, staging="lazy")
SKIP = CheckpointOptions(enable_async=True, when_busy="skip")


class Writes:
    """Stands before this process's writes of shard files: holds them, or lets them fail.

    Attributes:
        begun: Set when one is held.
    """

    def __init__(self):
        self._go = threading.Event()
        self._go.set()
        self.begun = threading.Event()
        self._error = None
        self._real = os.pwritev
        os.pwritev = self._write

    def _write(self, descriptor, *arguments):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".safetensors"):
            self.begun.set()
            self._go.wait(60)
            if self._error is not None:
                raise OSError(self._error, os.strerror(self._error))
        return self._real(descriptor, *arguments)

    def hold(self):
        """Let the next write wait."""
        self.begun.clear()
        self._go.clear()

    def go_on(self, error=None):
        """Let all writes go on, or fail from now on."""
        self._error = error
        self._go.set()

    @contextmanager
    def held(self, error=None):
        """Hold the writes while the body runs; then let them go on, or fail."""
        self.hold()
        try:
            yield
        finally:
            self.go_on(error)


def is_copying(manager):
    """Tell whether a save is under way whose copies are not all made."""
    flight = manager._save_state.flight
    return flight is not None and not flight.staged.is_set()


class Loader:
    """Something with a state of its own that changes outside optimizers."""

    def __init__(self):
        self.position = 0
        self.order = torch.arange(1000)

    def state_dict(self):
        return {"position": self.position, "order": self.order}

    def load_state_dict(self, state):
        self.position, self.order = state["position"], state["order"]


class Trained:
    """A model in training with everything beside it that a job may save.

    Args:
        seed: What it begins with follows from this alone.
        width: Of the layers.
        wrap: Called with the model before it has an optimizer.
    """

    def __init__(self, seed, width=64, wrap=None):
        torch.manual_seed(seed)
        self.model = nn.Sequential(
            nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, width)
        )
        self.model = self.model if wrap is None else wrap(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, foreach=True)
        self.ema = {
            name: value.detach().clone() for name, value in self.model.named_parameters()
        }
        self.loader = Loader()
        self.step = torch.zeros((), dtype=torch.int64)
        self.own = torch.zeros(1000)
        self.checkpoint = Checkpoint(
            model=self.model,
            optimizer=self.optimizer,
            ema=self.ema,
            loader=self.loader,
            plain={"lr": 0.5, "epochs": [0]},
            step=self.step,
            rng=PerRank(RngState()),
            own=PerRank({"noise": self.own}),
        )
        self._width = width

    def forward_and_backward(self):
        """Leave gradients, and other statistics in the buffers."""
        self.optimizer.zero_grad()
        self.model(torch.rand(4, self._width)).square().mean().backward()

    def change_what_no_optimizer_changes(self):
        """Change all else."""
        for value in self.ema.values():
            value.mul_(0.5).add_(1.0)
        for buffer in self.model.buffers():
            buffer.add_(3)
        self.loader.position += 7
        self.loader.order.add_(1)
        self.checkpoint.plain["lr"] += 1.0
        self.checkpoint.plain["epochs"].append(len(self.checkpoint.plain["epochs"]))
        self.step += 1
        self.own.add_(1.0)
        torch.rand(3)

    def content(self):
        """Return a copy of all that is saved."""
        state = self.optimizer.state
        found = {f"model/{k}": _copy(v) for k, v in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in state[parameter].items():
                found[f"state/{name}/{key}"] = _copy(value)
        found |= {f"ema/{name}": _copy(value) for name, value in self.ema.items()}
        found["order"], found["own"] = _copy(self.loader.order), _copy(self.own)
        found["rng"] = torch.get_rng_state()
        found["plain"] = (
            self.checkpoint.plain["lr"],
            [*self.checkpoint.plain["epochs"]],
            self.loader.position,
            int(self.step),
        )
        return found


def _copy(tensor):
    with torch.no_grad():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return local.detach().clone()


def assert_same(found, expected):
    """Fail unless two contents are the same, bit for bit."""
    assert found.keys() == expected.keys()
    differing = [
        name
        for name, value in expected.items()
        if not (
            torch.equal(found[name], value)
            if isinstance(value, torch.Tensor)
            else found[name] == value
        )
    ]
    assert not differing, differing
