"""What happens in a manager, told to whoever wants to know: one event a phase and rank.

The loop only leaves an event; who is told (``sinks``) runs on a thread of its own, so that
a callback that is slow, fails or hangs holds up no rank and fails no save.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeAlias

from distckpt import strict_json, words

_logger = logging.getLogger(__name__)

# What is still to be told when nobody listens any more is forgotten beyond this.
_MAX_WAITING = 10_000

CLAIM = "claim"
DECIDE = "decide"
CAPTURE = "capture"
STAGE = "stage"
WRITE = "write"
VOTE = "vote"
COMMIT = "commit"
SAVE = "save"
DELETE = "delete"
RESTORE = "restore"
FALLBACK = "fallback"
FENCE = "fence"
ERROR = "error"


@dataclass(frozen=True, slots=True, repr=False)
class Event:
    """One thing that has happened on one rank.

    Attributes:
        kind: ``"claim"``, ``"capture"`` (names and layouts of what is saved), ``"decide"``
            (agreed with the others), ``"stage"`` (copied, for an asynchronous save),
            ``"write"``, ``"vote"`` (waiting for the others), ``"commit"``, ``"save"`` (the
            call, for as long as it has blocked the loop), ``"delete"``, ``"restore"``,
            ``"fallback"``, ``"fence"`` or ``"error"``. The chief alone tells of commits,
            deletions and fallbacks.
        time: ``time.time()`` when it had ended.
        rank: On which rank.
        seconds: How long it took.
        checkpoint: Which one it is about; "" for none.
        step: The training step, where it is known.
        size_bytes: How much was written, copied, deleted.
        detail: What else there is to say, by name; plain values. Of a commit: ``ranks``,
            ``reasons``, ``metrics``, and by ``slowest_rank``, ``slowest_seconds`` and
            ``mean_seconds`` how long the ranks have written.
    """

    kind: str
    time: float
    rank: int
    seconds: float = 0.0
    checkpoint: str = ""
    step: int | None = None
    size_bytes: int = 0
    detail: Mapping[str, Any] = field(default_factory=dict)

    @property
    def date(self) -> datetime:
        """The time as a datetime in UTC."""
        return words.utc(self.time)

    def __repr__(self) -> str:
        parts = [f"kind={self.kind!r}", f"date={words.utc_date(self.time)!r}"]
        parts += [f"rank={self.rank}", f"seconds={self.seconds:.6g}"]
        for name in ("checkpoint", "step", "size_bytes", "detail"):
            value = getattr(self, name)
            if value or (name == "step" and value is not None):
                parts.append(f"{name}={value!r}")
        return f"Event({', '.join(parts)})"

    @property
    def bytes_per_second(self) -> float:
        """How fast it was; 0.0 where nothing was moved."""
        return self.size_bytes / self.seconds if self.seconds > 0 else 0.0

    def to_json(self) -> str:
        """Encode as one line of JSON; what says nothing is left out."""
        tree: dict[str, Any] = {"kind": self.kind, "time": self.time, "rank": self.rank}
        tree["seconds"] = round(self.seconds, 6)
        for name in ("checkpoint", "step", "size_bytes", "detail"):
            value = getattr(self, name)
            if value or (name == "step" and value is not None):
                tree[name] = dict(value) if name == "detail" else value
        return strict_json.dumps(tree)

    @staticmethod
    def from_json(line: bytes) -> Event | None:
        """Decode such a line; None for anything else, such as one that was cut off."""
        try:
            tree = strict_json.loads(line)
            event = Event(**tree)
        except (strict_json.JsonError, TypeError):
            return None
        kinds: dict[str, Any] = {
            "kind": str,
            "time": (int, float),
            "rank": int,
            "seconds": (int, float),
            "checkpoint": str,
            "step": (int, type(None)),
            "size_bytes": int,
            "detail": dict,
        }
        is_sound = all(isinstance(getattr(event, n), kind) for n, kind in kinds.items())
        return event if is_sound else None


Sink: TypeAlias = Callable[[Event], None]


class Events:
    """Hands the events of one manager on one rank to those who want them, in order.

    Args:
        sinks: Called with each event, one after the other. One that raises is told of once,
            and called again.
        rank: This rank.
    """

    def __init__(self, sinks: Sequence[Sink] = (), rank: int = 0) -> None:
        self._rank = rank
        self._sinks = [*sinks]
        self._complained: set[int] = set()
        self._condition = threading.Condition()
        self._waiting: deque[Event] = deque()
        self._is_running = False
        self._thread: threading.Thread | None = None

    def add(self, sink: Sink) -> None:
        """Have one more told, of all that comes."""
        self._sinks.append(sink)

    def tell(self, kind: str, **fields: Any) -> None:
        """Leave an event that ends now; the fields are those of ``Event``."""
        if not self._sinks:
            return
        event = Event(kind, time.time(), self._rank, **fields)
        with self._condition:
            if len(self._waiting) >= _MAX_WAITING:
                self._waiting.popleft()
            self._waiting.append(event)
            if not self._is_running:
                # Lives only while there is something to be told.
                thread = threading.Thread(
                    target=self._run, name="distckpt-events", daemon=True
                )
                # Without a thread to be had it waits for the next event: raised here, it
                # would keep this rank from its vote, and the others would wait for it.
                with suppress(RuntimeError):
                    thread.start()
                    self._thread, self._is_running = thread, True

    @contextmanager
    def timed(self, kind: str, **fields: Any) -> Iterator[dict[str, Any]]:
        """Tell of a block that ends well, and how long it took.

        Yields:
            More of the event's fields, to be filled in.
        """
        began = time.monotonic()
        yield fields
        self.tell(kind, seconds=time.monotonic() - began, **fields)

    def wait(self, timeout_seconds: float) -> bool:
        """Wait until all is told; False if the time was not enough."""
        with self._condition:
            done = self._condition.wait_for(
                lambda: not self._is_running, timeout=timeout_seconds
            )
            thread = self._thread
        if done and thread is not None and thread is not threading.current_thread():
            thread.join()  # it has nothing left to do but to end
        return done

    def _run(self) -> None:
        while True:
            with self._condition:
                if not self._waiting:
                    self._is_running = False
                    self._condition.notify_all()
                    return
                event = self._waiting.popleft()
            for index, sink in enumerate(self._sinks):
                try:
                    sink(event)
                except Exception:
                    if index not in self._complained:
                        self._complained.add(index)
                        _logger.exception("a callback for events failed: %r", sink)
