"""Train a small byte-level GPT on text files, checkpointed with distckpt.

Run it under torchrun, on any number of processes:

    torchrun --nproc-per-node 2 --max-restarts 3 launch/train.py --directory runs/gpt

Started again, or restarted by torchrun after a worker was lost, it goes on from the last
commit. Told to stop (SIGTERM to torchrun), it saves once more and ends, with an exit status
that says that it is not done: by it the launchers of other hosts, which were told nothing,
go on without the one that was. ``--kill-*`` make a worker kill itself, to see that for
yourself. With ``--strategy fsdp`` each rank holds a part of every parameter, and saves just
that.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import signal
import sys
import sysconfig
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import distckpt
from distckpt import Checkpoint, CheckpointManager, PerRank, RngState, on_signal


class Block(nn.Module):
    """One transformer block: causal self-attention and a two-layer network."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm_network = nn.LayerNorm(width)
        self.network = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[batch, time, width]`` to the same shape."""
        batch, length, width = x.shape
        heads = self.query_key_value(self.norm_attention(x)).view(
            batch, length, 3, self.num_heads, width // self.num_heads
        )
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        mixed = mixed.transpose(1, 2).reshape(batch, length, width)
        x = x + self.dropout(self.project(mixed))
        result: torch.Tensor = x + self.dropout(self.network(self.norm_network(x)))
        return result


class GPT(nn.Module):
    """A byte-level language model with tied input and output embeddings."""

    def __init__(
        self, context: int, width: int, num_layers: int, num_heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(
            Block(width, num_heads, dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        self.head.weight = self.embedding.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the loss of predicting each byte of ``[batch, time + 1]`` bytes."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = self.embedding(inputs) + self.position.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        loss: torch.Tensor = functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten()
        )
        return loss


class ShuffledText:
    """Windows of text in a new random order each epoch; the position is its state.

    All ranks walk one order together, each taking every ``world_size``-th window, so one
    position is true for the whole job.
    """

    def __init__(self, files: list[Path], context: int, batch_size: int, seed: int) -> None:
        data = b"\n".join(path.read_bytes() for path in files)
        self._bytes = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self._context = context
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0
        self._position = 0
        self._order = self._shuffled()

    def __len__(self) -> int:
        return (len(self._bytes) - 1) // self._context

    def _shuffled(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return torch.randperm(len(self), generator=generator)

    def next_batch(self, rank: int, world_size: int) -> torch.Tensor:
        """Return this rank's next ``[batch, context + 1]`` bytes."""
        needed = self._batch_size * world_size
        if self._position + needed > len(self):
            self._epoch += 1
            self._position = 0
            self._order = self._shuffled()
        chosen = self._order[self._position + rank : self._position + needed : world_size]
        self._position += needed
        starts = chosen * self._context
        windows = starts[:, None] + torch.arange(self._context + 1)
        return self._bytes[windows].long()

    def state_dict(self) -> dict[str, Any]:
        """Return where in which epoch the job is."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = self._shuffled()


def distribute(model: GPT, strategy: str, device: torch.device) -> nn.Module:
    """Put a model that is equal on all ranks onto them: replicated, or sharded."""
    model = model.to(device)
    if strategy == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def text_files(paths: list[str]) -> list[Path]:
    """List the files to train on: those given, and all .py and .txt below directories."""
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            below = (p for pattern in ("*.py", "*.txt") for p in path.glob(f"**/{pattern}"))
            files += sorted(p for p in below if "site-packages" not in p.parts)
        else:
            files.append(path)
    if not files:
        sys.exit(f"train: no text files in {paths}")
    return files


def kill_this_worker(what: str) -> None:
    """Die as a lost worker does: at once, without any cleaning up."""
    print(f"[rank {os.environ['RANK']}] *** SIGKILL {what} ***", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def kill_when_shard_is_opened() -> None:
    """Arm an audit hook that kills this worker in the middle of its next save."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and ".pending/rank-" in str(arguments[0]):
            kill_this_worker(f"in a save, while opening {Path(arguments[0]).name}")

    sys.addaudithook(hook)


def seed_everything(seed: int) -> None:
    """Seed every generator that ``RngState`` saves."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--directory", default="runs/gpt", help="run directory")
    parser.add_argument(
        "--text",
        nargs="+",
        default=[sysconfig.get_paths()["stdlib"]],
        help="files or directories; default: this Python's own standard library",
    )
    parser.add_argument("--strategy", choices=["ddp", "fsdp"], default="ddp")
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cpu",
        help="results are only sure to be bit-identical on the CPU",
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--interval", type=int, default=20, help="steps between saves")
    parser.add_argument("--max-to-keep", type=int, default=3)
    parser.add_argument("--context", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=8, help="windows per rank")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--timeout-seconds", type=float, default=60.0)
    parser.add_argument(
        "--grace-period-seconds",
        type=float,
        default=30.0,
        help="how long it goes on after SIGTERM, by who sends it (default: torchrun's 30)",
    )
    parser.add_argument(
        "--kill-in-training",
        type=int,
        metavar="STEP",
        help="before any restart, the last rank kills itself at this step",
    )
    parser.add_argument(
        "--kill-in-save",
        type=int,
        metavar="STEP",
        help="after the first restart, the last rank kills itself in the first save from "
        "this step on",
    )
    return parser.parse_args()


def main() -> bool:
    """Train to the last step, through all restarts; return whether it came that far."""
    arguments = parse_arguments()
    torch.set_num_threads(1)
    timeout = timedelta(seconds=arguments.timeout_seconds)
    device = torch.device("cpu")
    if arguments.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    distckpt.init_process_group(backend, timeout=timeout)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    is_last_rank = rank == world_size - 1

    def say(text: str) -> None:
        if rank == 0:
            print(text, flush=True)

    torch.manual_seed(arguments.seed)  # the same weights on every rank
    gpt = GPT(
        arguments.context,
        arguments.width,
        arguments.layers,
        arguments.heads,
        arguments.dropout,
    )
    model = distribute(gpt, arguments.strategy, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate)
    warm_up = max(1, arguments.steps // 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(
            (s + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * s / arguments.steps)
        ),
    )
    files = text_files(arguments.text)
    loader = ShuffledText(files, arguments.context, arguments.batch_size, arguments.seed)
    step = torch.zeros((), dtype=torch.int64)
    seed_everything(arguments.seed + 1 + rank)  # other dropout on every rank

    checkpoint = Checkpoint(
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        step=step,
        loader=loader,
        rng=PerRank(RngState(), resize="by_rank"),  # a job may lose hosts and get others
    )
    with CheckpointManager(
        checkpoint,
        arguments.directory,
        max_to_keep=arguments.max_to_keep,
        step_counter=step,
        checkpoint_interval=arguments.interval
        | on_signal("SIGTERM", grace_period_seconds=arguments.grace_period_seconds),
        timeout=timeout,
    ) as manager:
        restored = manager.restore_or_initialize()
        if restored:
            say(f"restart {restart}: restored {restored}, going on from step {int(step)}")
        else:
            say(
                f"training on {len(files)} files, {len(loader)} windows, {world_size} ranks"
            )

        last = time.perf_counter()
        while step < arguments.steps and not manager.should_stop:
            loss = model(loader.next_batch(rank, world_size).to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            step += 1

            if is_last_rank and restart == 0 and step == arguments.kill_in_training:
                kill_this_worker(f"in training, at step {int(step)}")
            if is_last_rank and restart == 1 and step == arguments.kill_in_save:
                kill_when_shard_is_opened()

            saved = manager.save(check_interval=bool(step < arguments.steps))
            if saved:
                now = time.perf_counter()
                say(
                    f"step {int(step):5}  loss {loss.item():.4f}  "
                    f"lr {scheduler.get_last_lr()[0]:.2e}  {now - last:5.2f} s  "
                    f"saved {saved}"
                )
                last = now
        manager.sync()
        is_done = bool(step >= arguments.steps)
        ended = "done" if is_done else "told to stop"
        say(f"{ended} at step {int(step)}; kept: {', '.join(manager.checkpoints)}")
    dist.barrier()
    dist.destroy_process_group()
    return is_done


def is_lost_peer(error: Exception) -> bool:
    """Tell whether an error means that another rank is gone, not that this one failed."""
    if isinstance(error, distckpt.ManagerBroken):
        return True
    return isinstance(error, RuntimeError) and "peer" in str(error)


if __name__ == "__main__":
    try:
        if not main():
            sys.exit(os.EX_TEMPFAIL)
    except Exception as exception:
        if not is_lost_peer(exception):
            raise
        # One line instead of a traceback: torchrun restarts the job now.
        reason = str(exception)[:160]
        print(f"[rank {os.environ['RANK']}] a peer is gone: {reason} ...", flush=True)
        sys.exit(1)
