"""Who is running: what tells a restarted job from a second one."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Identity:
    """The job that a manager belongs to.

    Attributes:
        run: The same for all restarts of one job, different for two jobs.
        restart: How often the launcher has restarted it.
    """

    run: str
    restart: int


def current(environ: Mapping[str, str] = os.environ) -> Identity:
    """Tell the job from what launchers set.

    torchrun's run id (unless it is the default ``none``), else Slurm's job id (kept by
    a requeue), else the master's address, else this process.
    """
    restart = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Identity(_run(environ)[:256], int(restart) if restart.isdecimal() else 0)


def this_process() -> str:
    """Return which process this is, for people."""
    return f"process {os.getpid()} on {socket.gethostname()}"[:256]


def host(boot_id: bytes) -> bytes:
    """Return 12 bytes that are equal on the ranks of one host, and differ between hosts.

    Args:
        boot_id: What the kernel calls itself since it was booted; empty if unknown. Hosts
            may have the same name, and containers of one host their own.
    """
    name = socket.gethostname().encode()
    return hashlib.sha256(boot_id + b" " + name).digest()[:12]


def _run(environ: Mapping[str, str]) -> str:
    run_id = environ.get("TORCHELASTIC_RUN_ID")
    if run_id and run_id != "none":
        return f"torchrun-{run_id}"
    job_id = environ.get("SLURM_JOB_ID")
    if job_id:
        return f"slurm-{job_id}"
    host = socket.gethostname()
    address, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if address and port:
        return f"master-{host if address in _LOOPBACK else address}:{port}"
    return f"process-{os.getpid()}@{host}"
