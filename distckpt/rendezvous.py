"""Start ``torch.distributed`` so that a restart under torchrun works."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import (  # type: ignore[attr-defined]  # public, not exported
    PrefixStore,
    TCPStore,
)
from torch.distributed.constants import default_pg_timeout


def init_process_group(
    backend: str | None = None, timeout: timedelta | None = None, **options: Any
) -> None:
    """Initialize the default process group; in place of torch's function of this name.

    torchrun's agent keeps its store through a restart of the workers, and a plain
    ``init_process_group`` then reads the addresses of the dead ones: over half of the
    restarts on gloo hang or fail. Here each restart uses keys of its own. Outside
    torchrun this is torch's function.

    Called by: every rank, once. Collectives: a rendezvous.

    Args:
        backend: As torch's; any.
        timeout: As torch's: for the rendezvous and for the group's collectives.
        **options: Passed on; ``init_method``, ``store``, ``rank`` and ``world_size`` are
            set here under torchrun.

    Source:
        https://github.com/pytorch/pytorch/issues/135712
    """
    arguments = dict(options)
    if timeout is not None:
        arguments["timeout"] = timeout
    if dist.is_torchelastic_launched() and "init_method" not in options:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        agent_has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            world_size,
            is_master=rank == 0 and not agent_has_store,
            timeout=timeout or default_pg_timeout,
            wait_for_workers=False,
        )
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        arguments |= {
            "store": PrefixStore(f"distckpt/restart-{restart}", store),
            "rank": rank,
            "world_size": world_size,
        }
    dist.init_process_group(backend, **arguments)
