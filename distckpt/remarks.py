"""What the user says of a checkpoint when it is saved: metrics and metadata, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from distckpt import strict_json, values
from distckpt.errors import ConfigError, UnsupportedError
from distckpt.record import MAX_METRIC_NAME, MAX_METRICS

MAX_METADATA_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Remarks:
    """What stands in a checkpoint's manifest beside what it holds.

    Attributes:
        metrics: Numbers by name, NaN and infinities included.
        encoded: The metadata, by ``values.encode``: what the user changes later is no part
            of it.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    encoded: Any = field(default_factory=dict)

    @property
    def metadata(self) -> dict[str, Any]:
        """Anything that is plain, by name."""
        decoded: dict[str, Any] = values.decode(self.encoded)
        return decoded

    @property
    def listed(self) -> tuple[tuple[str, float | None], ...]:
        """The metrics as records list them: retention goes by finite numbers only."""
        return tuple(
            (name, value if math.isfinite(value) else None)
            for name, value in sorted(self.metrics.items())
        )

    @staticmethod
    def of(metrics: Any, metadata: Any) -> Remarks:
        """Check what ``save()`` was given.

        Raises:
            ConfigError, UnsupportedError: Says what cannot be stored.
        """
        return Remarks(_checked_metrics(metrics), _encoded_metadata(metadata))


NOTHING = Remarks()


def _checked_metrics(metrics: Any) -> dict[str, float]:
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        msg = f"metrics must be numbers by name, such as a dict; got {metrics!r:.100}."
        raise ConfigError(msg)
    if len(metrics) > MAX_METRICS:
        msg = (
            f"metrics: {len(metrics)} are too many, every record lists them; at most "
            f"{MAX_METRICS}. What no retention rule needs can go to metadata."
        )
        raise ConfigError(msg)
    checked = {}
    for name, value in metrics.items():
        if not isinstance(name, str) or not 0 < len(name) <= MAX_METRIC_NAME:
            msg = (
                f"metrics: a name has 1 to {MAX_METRIC_NAME} characters, got {name!r:.100}."
            )
            raise ConfigError(msg)
        try:
            # A string that float() would read is a mistake. A loss has its gradient's
            # history still, and torch warns of float(loss), not of this.
            number = value.item() if hasattr(value, "item") else value
            checked[name] = float("?" if isinstance(number, (str, bytes)) else number)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            msg = f"metrics: {name!r} must be a number, got {value!r:.100}."
            raise ConfigError(msg) from None
    return checked


def _encoded_metadata(metadata: Any) -> Any:
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping) or not all(isinstance(n, str) for n in metadata):
        msg = f"metadata must be values by name, such as a dict; got {metadata!r:.100}."
        raise ConfigError(msg)
    encoded = values.encode(dict(metadata), "metadata")
    size_bytes = len(strict_json.dumps(encoded))
    if size_bytes > MAX_METADATA_BYTES:
        msg = (
            f"metadata takes {size_bytes} bytes, more than {MAX_METADATA_BYTES}; it is for "
            "what people look at. Track what belongs to the state with the Checkpoint."
        )
        raise UnsupportedError(msg)
    return encoded
