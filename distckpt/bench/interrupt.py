"""Leave nothing behind when interrupted, whatever the main thread is doing then."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time

EXIT_INTERRUPTED = 130

_CLEANING_SECONDS = 5.0
_GRACE_SECONDS = 5.0


def clean_up_at_signals(folder: str) -> None:
    """Have a folder removed at SIGINT and SIGTERM; to be called by the main thread.

    The main thread is told by ``KeyboardInterrupt``. In a collective it does not hear of
    that before the collective ends, which may be after the launcher has lost its patience:
    then a thread does the work.
    """
    # torchrun passes Ctrl-C on as SIGTERM.
    signal.signal(signal.SIGTERM, _interrupt)
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(heard, folder), daemon=True).start()


def remove(folder: str) -> None:
    """Remove a folder; another rank, or a thread, may still be writing there."""
    deadline = time.monotonic() + _CLEANING_SECONDS
    while os.path.exists(folder) and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)


def _interrupt(number: int, frame: object) -> None:
    # Once: what comes after it is the cleaning up.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _watch(heard: int, folder: str) -> None:
    while os.read(heard, 1)[0] not in (signal.SIGINT, signal.SIGTERM):
        pass
    time.sleep(_GRACE_SECONDS)
    remove(folder)
    os._exit(EXIT_INTERRUPTED)
