"""Random number generators of this process: kept as they are while others' code runs."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def generators_kept() -> Iterator[None]:
    """Put the generators back at the end: a data loader's ``state_dict()`` draws from them.

    Those of ``per_rank.RngState``.
    """
    numpy: Any = sys.modules.get("numpy")
    of_torch, of_python = torch.get_rng_state(), random.getstate()
    of_numpy = None if numpy is None else numpy.random.get_state()
    of_devices = None
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        of_devices = torch.cuda.get_rng_state_all()
    try:
        yield
    finally:
        torch.set_rng_state(of_torch)
        random.setstate(of_python)
        if of_numpy is not None:
            numpy.random.set_state(of_numpy)
        if of_devices is not None:
            torch.cuda.set_rng_state_all(of_devices)
