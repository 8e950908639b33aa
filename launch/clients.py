"""Real clients of distckpt: transformers' models under FSDP2, a loop of Lightning Fabric's.

Run by ``launch/clients.sh``, which says in which order. Each action is one job:

    torchrun --nproc-per-node 2 launch/clients.py train DIRECTORY
    torchrun --nproc-per-node 3 launch/clients.py restore DIRECTORY
    python launch/clients.py load DIRECTORY
    torchrun --nproc-per-node 2 launch/clients.py fabric DIRECTORY
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import distckpt
from distckpt import Checkpoint, CheckpointManager

KINDS = ("llama", "gpt2")
VOCABULARY, LENGTH, STEPS = 128, 32, 5


def make_model(kind: str, seed: int) -> nn.Module:
    """Make a small model of transformers' with random weights."""
    import transformers

    torch.manual_seed(seed)
    if kind == "llama":
        config: Any = transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=112,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
        )
        llama: nn.Module = transformers.LlamaForCausalLM(config)
        return llama
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=60,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    gpt2: nn.Module = transformers.GPT2LMHeadModel(config)
    return gpt2


def shard(model: Any) -> None:
    """Shard a model by FSDP2, block by block."""
    inner = getattr(model, "model", None) or model.transformer
    for block in getattr(inner, "layers", None) or inner.h:
        fully_shard(block)
    fully_shard(model)


def tokens(seed: int) -> torch.Tensor:
    """Make a batch that is the same on every rank and in every job."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (6, LENGTH), generator=generator)


def logits_of(model: nn.Module) -> np.ndarray[Any, Any]:
    """Return what a model makes of a batch that it was not trained on."""
    model.eval()
    with torch.no_grad():
        logits: torch.Tensor = model(tokens(1000)).logits
    return logits.numpy()


def _job(kind: str, directory: Path, seed: int) -> tuple[nn.Module, Any, CheckpointManager]:
    model = make_model(kind, seed)
    shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    checkpoint = Checkpoint(model=model, optimizer=optimizer)
    return model, optimizer, CheckpointManager(checkpoint, directory / kind, 1)


def train(directory: Path) -> None:
    """Train each model some steps, save it and what it answers."""
    for kind in KINDS:
        model, optimizer, manager = _job(kind, directory, seed=0)
        with manager:
            manager.restore_or_initialize()
            for step in range(STEPS):
                batch = tokens(step)[dist.get_rank() :: dist.get_world_size()]
                loss = model(batch, labels=batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            manager.save()
        logits = logits_of(model)
        if dist.get_rank() == 0:
            np.save(directory / f"{kind}.npy", logits)
            print(f"{kind}: trained on {dist.get_world_size()} ranks, loss {loss:.4f}")


def restore(directory: Path) -> None:
    """Restore each model on another number of ranks, from other weights."""
    for kind in KINDS:
        model, _, manager = _job(kind, directory, seed=7)
        with manager:
            assert manager.restore_or_initialize() is not None
        logits = logits_of(model)
        if dist.get_rank() == 0:
            what = f"restored on {dist.get_world_size()} ranks"
            _compare(what, logits, directory, kind)


def load(directory: Path) -> None:
    """Load what was exported by ``from_pretrained``, and into a fresh job by ours."""
    import transformers

    for kind in KINDS:
        folder = directory / f"{kind}-hf"
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        what = "exported, loaded by transformers' from_pretrained"
        _compare(what, logits_of(model), directory, kind)
        ours = make_model(kind, seed=9)
        start = distckpt.from_pretrained(folder)
        with CheckpointManager(
            Checkpoint(model=ours), directory / f"{kind}-tuned", 1, init_fn=start
        ) as manager:
            assert manager.restore_or_initialize() is None
        _compare("the same as a warm start of ours", logits_of(ours), directory, kind)


def configure(directory: Path) -> None:
    """Write the configurations that an export is to have beside it."""
    for kind in KINDS:
        model: Any = make_model(kind, seed=0)
        model.config.save_pretrained(directory / f"{kind}-config")


def _compare(what: str, logits: np.ndarray[Any, Any], directory: Path, kind: str) -> None:
    worst = float(np.abs(logits - np.load(directory / f"{kind}.npy")).max())
    equal = "equal, bit for bit" if worst == 0 else f"differ by {worst:.1e}"
    print(f"{kind}: {what}: logits {equal}")
    if worst > 1e-6:
        sys.exit("That is too much.")


def fabric(directory: Path) -> None:
    """Train with Lightning Fabric, in two parts; the second goes on from the first."""
    from lightning.fabric import Fabric

    losses: list[float] = []
    for last_step in (STEPS, 2 * STEPS):
        losses += _train_with_fabric(Fabric, directory / "fabric", last_step)
    again = _train_with_fabric(Fabric, directory / "fabric-at-once", 2 * STEPS)
    if dist.get_rank() == 0:
        same = losses == again
        print(f"fabric: {2 * STEPS} steps in two jobs and in one, losses equal: {same}")
        if not same:
            sys.exit(f"{losses} is not {again}")


def _train_with_fabric(make: Any, directory: Path, last_step: int) -> list[float]:
    fabric = make(accelerator="cpu", devices=dist.get_world_size(), strategy="ddp")
    fabric.launch()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = torch.zeros((), dtype=torch.int64)
    checkpoint = Checkpoint(model=model, optimizer=optimizer, step=step)
    wrapped, stepped = fabric.setup(model, optimizer)
    losses = []
    with CheckpointManager(checkpoint, directory, 1, step_counter=step) as manager:
        manager.restore_or_initialize()
        while step < last_step:
            batch = tokens(int(step))[dist.get_rank() :: dist.get_world_size()]
            loss = nn.functional.cross_entropy(
                wrapped(batch).flatten(0, 1), batch.flatten()
            )
            fabric.backward(loss)
            stepped.step()
            stepped.zero_grad()
            step += 1
            losses.append(float(fabric.all_reduce(loss.detach())))
        manager.save()
    return losses


ACTIONS = {
    "train": train,
    "restore": restore,
    "load": load,
    "configure": configure,
    "fabric": fabric,
}


def main() -> None:
    """Run one action."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    is_job = arguments.action in ("train", "restore", "fabric")
    if is_job:
        distckpt.init_process_group("gloo")
    ACTIONS[arguments.action](arguments.directory)
    if is_job:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
