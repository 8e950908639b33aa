"""What rank functions share: telling how a call ended, and small models to save."""

from __future__ import annotations

import logging
import os
import time
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from harness import held_up_seconds
from torch import nn

from distckpt import Checkpoint, CheckpointManager, paths, readers
from distckpt.run_directory import AttemptDirectory, RunDirectory
from distckpt.verify import verify_attempt


class Outcome(NamedTuple):
    """How one call ended on one rank.

    ``kind`` is ``"ok"`` or the exception's class, ``text`` its message or the result,
    ``held_up_seconds`` how long the rank's threads waited for a processor meanwhile.
    """

    kind: str
    text: Any
    cause: str
    failures: dict[int, str] | None
    seconds: float
    bases: tuple[str, ...] = ()
    held_up_seconds: float = 0.0

    @property
    def net_seconds(self) -> float:
        """How long it took, without what a busy machine added to it."""
        return self.seconds - self.held_up_seconds


def outcome(call, *args, **kwargs):
    """Call and tell how it ended; every exception is an answer too."""
    held_up, started = held_up_seconds(), time.monotonic()
    try:
        result = call(*args, **kwargs)
    except BaseException as error:
        return Outcome(
            type(error).__name__,
            str(error),
            "" if error.__cause__ is None else repr(error.__cause__),
            getattr(error, "failures", None),
            time.monotonic() - started,
            tuple(kind.__name__ for kind in type(error).__mro__),
            max(0.0, held_up_seconds() - held_up),
        )
    seconds = time.monotonic() - started
    held_up = max(0.0, held_up_seconds() - held_up)
    return Outcome("ok", result, "", None, seconds, (), held_up)


class LoggedTexts(logging.Handler):
    """Collects what the library logs in this process, from warnings on."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []
        logging.getLogger("distckpt").addHandler(self)

    def emit(self, record):
        self.texts.append(record.getMessage())


class Trap:
    """An object with state whose methods do what a test has set."""

    def __init__(self):
        self.on_save = self.on_load = None

    def state_dict(self):
        if self.on_save is not None:
            self.on_save()
        return {"kept": 1}

    def load_state_dict(self, state):
        if self.on_load is not None:
            self.on_load()


def make_model(seed=0, width=8):
    """Make a small network with a normalization, the same for the same seed."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


def make_checkpoint(seed=0, **more):
    """Make a checkpoint of a small model, its optimizer and a step."""
    model = make_model(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = torch.zeros((), dtype=torch.int64)
    return Checkpoint(model=model, optimizer=optimizer, step=step, **more)


def make_manager(
    directory, max_to_keep, when=None, *, checkpoint=None, timeout_seconds=20.0, **more
):
    """Make a manager that goes by the checkpoint's step; returns both."""
    checkpoint = checkpoint or make_checkpoint()
    manager = CheckpointManager(
        checkpoint,
        directory,
        max_to_keep,
        step_counter=checkpoint.step,
        checkpoint_interval=when,
        timeout=timedelta(seconds=timeout_seconds),
        **more,
    )
    return checkpoint, manager


def train(checkpoint, steps=1):
    """Train some steps on data that follows from the step; returns the last loss."""
    loss = torch.zeros(())
    for _ in range(steps):
        generator = torch.Generator().manual_seed(int(checkpoint.step))
        data = torch.rand(16, 4, generator=generator)
        checkpoint.optimizer.zero_grad()
        loss = checkpoint.model(data).square().mean()
        loss.backward()
        checkpoint.optimizer.step()
        checkpoint.step += 1
    return loss.item()


def state_of(checkpoint):
    """Return everything a small checkpoint holds as plain Python, for comparison."""
    optimizer = checkpoint.optimizer
    return {
        "model": {k: v.tolist() for k, v in checkpoint.model.state_dict().items()},
        "momentum": [
            optimizer.state[p]["momentum_buffer"].tolist() if p in optimizer.state else None
            for group in optimizer.param_groups
            for p in group["params"]
        ],
        "step": int(checkpoint.step),
        "save_counter": checkpoint.save_counter,
    }


def committed(directory):
    """Return the prefixes of all committed checkpoints, newest first."""
    record = readers.read_record(RunDirectory.at(directory))
    return [] if record is None else [e.attempt.prefix for e in record.committed]


def assert_all_whole(directory):
    """Fail unless every committed checkpoint verifies byte for byte."""
    record = readers.read_record(RunDirectory.at(directory))
    for entry in record.committed:
        report = verify_attempt(
            AttemptDirectory.at(os.path.join(directory, entry.attempt.published)),
            entry.manifest,
        )
        assert report.ok, report.problems


def leftovers(directory):
    """Return the names of pending, trash and probe entries."""
    return [
        name
        for name in os.listdir(directory)
        if paths.parse_pending(name) or paths.parse_trash(name) or "probe" in name
    ]


def attempt_directory(path):
    """Return the directory behind a checkpoint's path."""
    return str(readers.locate(path).directory)


def flip_last_bit(path):
    """Change the last bit of a file: of the last tensor's last element."""
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))


def tree_of(directory):
    """Return every file below a directory with its content, but for the history."""
    found = {}
    for folder, folders, names in os.walk(directory):
        folders[:] = [name for name in folders if name != paths.EVENTS_DIRECTORY]
        for name in names:
            path = os.path.join(folder, name)
            with open(path, "rb") as file:
                found[os.path.relpath(path, directory)] = file.read()
    return found
