"""``Trainable``: a module of which only what is trained is saved."""

from __future__ import annotations

from typing import Any

from torch import nn

from distckpt.errors import ConfigError


class Trainable:
    """Track a module without its frozen parameters: adapters on a large model.

    Parameters that need no gradient (``requires_grad=False``) are left out of the
    checkpoint. Their digests are stored, and a restore compares them: trained adapters on
    another model would be wrong without an error. Buffers are saved. What is restored are
    the names of the module, so ``export`` gives the adapters alone.

    A rank compares what it holds of a parameter. Where a sharded one was cut otherwise when
    it was saved, it cannot be compared, and only dtype and shape are.

    Args:
        module: The module; begin with the same frozen parameters before a restore.

    Raises:
        ConfigError: It is no module.

    Example:
        >>> checkpoint = Checkpoint(model=Trainable(model), optimizer=optimizer)
    """

    def __init__(self, module: nn.Module) -> None:
        given: Any = module
        if not isinstance(given, nn.Module):
            msg = f"Trainable takes a module, got {type(given).__name__}."
            raise ConfigError(msg)
        self.module = module
        # Digests by name, for as long as a parameter stays as it is.
        self.digests: dict[str, tuple[Any, str]] = {}

    def __repr__(self) -> str:
        return f"Trainable({type(self.module).__name__})"
