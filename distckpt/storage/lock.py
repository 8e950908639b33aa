"""The directory lock: tells a second job early that the first still runs.

A courtesy. Where locks do not work, or a stopped process holds one for ever, the record
chain still keeps two chiefs apart; so a lock that cannot be had for technical reasons
is no error.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from weakref import WeakValueDictionary

from filelock import FileLock, Timeout

from distckpt import paths
from distckpt.calls import watched

_logger = logging.getLogger(__name__)
_POLL_SECONDS = 0.1
_TRIAL_SECONDS = 20.0
_TRY_IT = (
    "import sys, filelock\n"
    "try: filelock.FileLock(sys.argv[1]).acquire(timeout=0)\n"
    "except filelock.Timeout: sys.exit(7)\n"
)
_REFUSED = 7

# Of two managers in one process the newer wins: it takes the lock from the older one,
# whose next append is fenced.
_held_here: WeakValueDictionary[str, DirectoryLock] = WeakValueDictionary()


class DirectoryLock:
    """Exclusive use of one run directory, as far as locks go.

    Let go when it is released or no longer referenced.
    """

    def __init__(self, directory: str) -> None:
        self._key = os.path.realpath(directory)
        # Not thread-local: whichever thread lets go of the manager lets go of the lock.
        self._lock = FileLock(os.path.join(directory, paths.LOCK_FILE), thread_local=False)

    def acquire(self, wait_seconds: float) -> bool:
        """Take the lock, from an older manager of this process too.

        Args:
            wait_seconds: How long to wait for another process.

        Returns:
            False if another process still holds it.
        """
        older = _held_here.get(self._key)
        if older is not None and older is not self:
            older.release()
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                with watched("lock", self._key):
                    self._lock.acquire(timeout=0)
            except Timeout:
                if time.monotonic() >= deadline:
                    return False
                time.sleep(_POLL_SECONDS)
                continue
            except (OSError, NotImplementedError) as error:
                _logger.warning("no lock on %s: %s", self._key, error)
            _held_here[self._key] = self
            return True

    def release(self) -> None:
        """Let go; harmless if it is not held."""
        with watched("unlock", self._key):
            self._lock.release(force=True)
        if _held_here.get(self._key) is self:
            del _held_here[self._key]


def keeps_others_out(path: str) -> bool:
    """Try out whether a lock on a file keeps another process of this host away from it.

    Args:
        path: Of the file; made, and not removed.
    """
    command = [sys.executable, "-c", _TRY_IT, path]
    try:
        with watched("lock", path), FileLock(path, timeout=0):
            done = subprocess.run(
                command, check=False, capture_output=True, timeout=_TRIAL_SECONDS
            )
    # NotImplementedError is how filelock says that the filesystem has no locks; the second
    # process may wait for ever on one whose locks hang.
    except (OSError, NotImplementedError, Timeout, subprocess.TimeoutExpired) as error:
        _logger.warning("no lock on %s: %s", path, error)
        return False
    return done.returncode == _REFUSED
