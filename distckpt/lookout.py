"""Looking for what other processes leave: a disk that fails or hangs holds up nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Generic, TypeVar

from distckpt.errors import FormatError, StorageError, StorageTimeout
from distckpt.worker import Worker

_Result = TypeVar("_Result")

_logger = logging.getLogger(__name__)


class Lookout(Generic[_Result]):
    """Looks for one thing now and then.

    An error is no reason to end a job that could go on: it is a warning, and found is then
    nothing. After a look that hangs there are no more: each would take as long again.

    Args:
        what: What is looked for, for warnings.
        look: Does it.
        worker: Does it on another thread.
    """

    def __init__(self, what: str, look: Callable[[], _Result], worker: Worker) -> None:
        self._what = what
        self._look: Callable[[], _Result] | None = look
        self._worker = worker
        self._complaint = ""

    def look(self, each_time: Callable[[], None]) -> _Result | None:
        """Look now; None for nothing.

        Args:
            each_time: Called now and then meanwhile; what it raises ends this.
        """
        if self._look is None:
            return None
        try:
            found = self._worker.run(self._look, lambda _: each_time())
        except StorageTimeout as error:
            self._look = None
            _logger.warning("%s is not looked for any more: %s", self._what, error)
            return None
        except (StorageError, FormatError) as error:
            if self._complaint != str(error):
                _logger.warning("cannot look for %s: %s", self._what, error)
            self._complaint = str(error)
            return None
        self._complaint = ""
        return found
