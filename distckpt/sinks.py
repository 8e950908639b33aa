"""Ready callbacks for events: JSON lines, Prometheus, TensorBoard, Python's logging."""

from __future__ import annotations

import logging
import os
from typing import Any

from distckpt import files, words
from distckpt.errors import ConfigError
from distckpt.events import (
    COMMIT,
    DELETE,
    ERROR,
    FALLBACK,
    FENCE,
    RESTORE,
    SAVE,
    WRITE,
    Event,
)
from distckpt.locations import absolute, checked_path

_logger = logging.getLogger("distckpt")

_GIB = 2**30


class JsonLines:
    """Appends each event to a file as one line of JSON.

    Args:
        path: The file. Each rank needs its own: ``{rank}`` in it becomes the rank.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # Absolute: it is written for as long as the job runs, perhaps after a chdir.
        self._path = absolute(checked_path(path, "the file of events"))

    def __call__(self, event: Event) -> None:
        """Append one."""
        line = event.to_json() + "\n"
        files.append_to_file(self._path.replace("{rank}", str(event.rank)), line.encode())


class PrometheusFile:
    """Writes a file for Prometheus' textfile collector, replaced after each save.

    Needs the package ``prometheus_client`` (``pip install 'distckpt[prometheus]'``). Of the
    chief: when what was committed last, how large it is, how long it took; and of each
    rank that has one: how many saves there were, how long they have blocked the loop, how
    much was written, how many errors there were.

    Args:
        path: The file, ``*.prom``. Each rank needs its own: ``{rank}`` becomes the rank.
        labels: More labels for all of it, such as ``{"run": "gpt"}``.

    Raises:
        ConfigError: The package is missing.
    """

    def __init__(
        self, path: str | os.PathLike[str], labels: dict[str, str] | None = None
    ) -> None:
        try:
            import prometheus_client
        except ImportError as error:
            msg = "PrometheusFile needs a package: pip install 'distckpt[prometheus]'."
            raise ConfigError(msg) from error
        # Absolute: it is written for as long as the job runs, perhaps after a chdir.
        self._path = absolute(checked_path(path, "the file of events"))
        self._labels = {**(labels or {})}
        self._write = prometheus_client.write_to_textfile
        self._registry = prometheus_client.CollectorRegistry()
        self._gauge, self._counter = prometheus_client.Gauge, prometheus_client.Counter
        self._metrics: dict[str, Any] = {}

    def __call__(self, event: Event) -> None:
        """Count one, and write the file where it matters."""
        if event.kind == COMMIT:
            self._set("last_commit_timestamp_seconds", "When", event.time, event)
            self._set("last_commit_size_bytes", "Size", event.size_bytes, event)
            self._set("last_commit_seconds", "Manifest and record", event.seconds, event)
            if event.step is not None:
                self._set("last_commit_step", "Training step", event.step, event)
            slowest = event.detail.get("slowest_seconds", 0.0)
            self._set("last_write_slowest_seconds", "Of the slowest rank", slowest, event)
            self._add("commits", "Checkpoints committed", 1, event)
        elif event.kind == SAVE:
            self._add("blocked_seconds", "The loop, by saves", event.seconds, event)
        elif event.kind == WRITE:
            self._add("written_bytes", "Into shard files", event.size_bytes, event)
        elif event.kind == DELETE:
            self._add("deletions", "Checkpoints deleted", 1, event)
        elif event.kind in (ERROR, FENCE):
            self._add("errors", "Calls that raised an error", 1, event)
        elif event.kind == FALLBACK:
            self._add("fallbacks", "Checkpoints passed over in a restore", 1, event)
        elif event.kind == RESTORE:
            self._set("last_restore_seconds", "How long it took", event.seconds, event)
        else:
            return
        self._write(self._path.replace("{rank}", str(event.rank)), self._registry)

    def _set(self, name: str, about: str, value: float, event: Event) -> None:
        self._metric(self._gauge, name, about, event).set(value)

    def _add(self, name: str, about: str, value: float, event: Event) -> None:
        self._metric(self._counter, name, about, event).inc(value)

    def _metric(self, kind: Any, name: str, about: str, event: Event) -> Any:
        if name not in self._metrics:
            labels = [*self._labels, "rank"]
            self._metrics[name] = kind(
                f"distckpt_{name}", about, labels, registry=self._registry
            )
        return self._metrics[name].labels(*self._labels.values(), str(event.rank))


class TensorBoard:
    """Writes scalars: how long phases took, how fast and how large; by training step.

    Args:
        writer: A ``torch.utils.tensorboard.SummaryWriter``, or what has its ``add_scalar``.
        prefix: Before each name.
    """

    def __init__(self, writer: Any, prefix: str = "distckpt") -> None:
        self._writer = writer
        self._prefix = prefix

    def __call__(self, event: Event) -> None:
        """Write one, if it has a step to stand at."""
        if event.step is None:
            return
        self._write(f"{event.kind}_seconds", event.seconds, event)
        if event.size_bytes:
            self._write(f"{event.kind}_gib", event.size_bytes / _GIB, event)
            gib_per_second = event.bytes_per_second / _GIB
            self._write(f"{event.kind}_gib_per_second", gib_per_second, event)
        if "slowest_seconds" in event.detail:
            self._write("slowest_rank", event.detail["slowest_rank"], event)
            self._write("slowest_write_seconds", event.detail["slowest_seconds"], event)

    def _write(self, name: str, value: float, event: Event) -> None:
        self._writer.add_scalar(
            f"{self._prefix}/{name}", value, event.step, walltime=event.time
        )


class Log:
    """Says by Python's logging what happens: a line a save at INFO, all else at DEBUG.

    Args:
        logger: By default the one called ``distckpt``, where the chief says its line a save
            in any case.
    """

    def __init__(self, logger: logging.Logger = _logger) -> None:
        self._logger = logger

    def __call__(self, event: Event) -> None:
        """Say one."""
        if self._logger is not _logger:
            say_line(event, self._logger)
        if event.kind not in (COMMIT, RESTORE):
            self._logger.debug("rank %d: %s", event.rank, event.to_json())


def say_line(event: Event, logger: logging.Logger = _logger) -> None:
    """Say in one line that something was committed or restored; nothing of all else."""
    at_step = "" if event.step is None else f" at step {event.step}"
    if event.kind == COMMIT:
        detail = event.detail
        seconds = float(detail.get("total_seconds", event.seconds))
        slowest = ""
        if detail.get("ranks", 1) > 1:
            writing = words.took(float(detail.get("slowest_seconds", 0.0)))
            slowest = f" (rank {detail.get('slowest_rank')} was slowest, {writing})"
        logger.info(
            "saved %s%s: %s in %s, %s/s%s; %s",
            *(event.checkpoint, at_step, words.size(event.size_bytes)),
            *(words.took(seconds), words.size(event.size_bytes / max(seconds, 1e-9))),
            *(slowest, "; ".join(detail.get("reasons", ()))),
        )
    elif event.kind == RESTORE and event.rank == 0:
        logger.info(
            "restored %s%s in %s", event.checkpoint, at_step, words.took(event.seconds)
        )
