"""Run train.py as it is and tell soak.py when it gets where: one line of output for each.

    time <event> <rank> <restart> <seconds> [...]

Seconds are of the machine's monotonic clock, which all its processes share.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
import traceback
from pathlib import Path
from typing import Any


def tell(event: str, *values: object) -> None:
    """Write one line, whole even if this worker is killed right after."""
    rank = os.environ["RANK"]
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    words = ["time", event, rank, restart, f"{time.monotonic():.4f}", *map(str, values)]
    os.write(1, (" ".join(words) + "\n").encode())


def watch() -> None:
    """Tell of everything from now on that has to do with restarts and saves."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    import distckpt
    from distckpt import CheckpointManager

    connect = distckpt.init_process_group
    restore, save = CheckpointManager.restore_or_initialize, CheckpointManager.save

    def timed_connect(*arguments: Any, **options: Any) -> None:
        connect(*arguments, **options)
        tell("connected")

    def timed_restore(manager: CheckpointManager) -> str | None:
        tell("restoring")
        path = restore(manager)
        tell("restored", int(manager.checkpoint.step), path or "")
        return path

    def timed_save(
        manager: CheckpointManager, *arguments: Any, **options: Any
    ) -> str | None:
        path = save(manager, *arguments, **options)
        if path:
            tell("saved", int(manager.checkpoint.step), path)
        return path

    def on_event(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and ".pending/rank-" in str(arguments[0]):
            tell("saving")

    def on_step(*_: Any) -> None:
        first_step.remove()
        tell("stepped")

    vars(distckpt)["init_process_group"] = timed_connect
    setattr(CheckpointManager, "restore_or_initialize", timed_restore)  # noqa: B010
    setattr(CheckpointManager, "save", timed_save)  # noqa: B010
    sys.addaudithook(on_event)
    first_step = register_optimizer_step_post_hook(on_step)


def main() -> None:
    """Run it."""
    tell("started")  # before torch is imported, which takes most of the time
    watch()
    try:
        runpy.run_path(str(Path(__file__).with_name("train.py")), run_name="__main__")
    except SystemExit as exception:
        if exception.code:
            tell("left")  # a peer is gone
        raise
    except Exception as exception:
        frames = traceback.extract_tb(exception.__traceback__)
        is_ours = Path(frames[-1].filename).parent.name == "distckpt"
        tell("failed", "distckpt" if is_ours else "elsewhere", repr(exception)[:300])
        raise


if __name__ == "__main__":
    main()
