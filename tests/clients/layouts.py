"""Real layouts of real libraries: saved in each of them, restored in each other.

Run it in the environment of the libraries (``launch/clients_env.sh`` makes it):

    .venv-clients/bin/python tests/clients/layouts.py            all models
    .venv-clients/bin/python tests/clients/layouts.py Mixtral    one of them

It starts jobs of gloo ranks. They are forked, so that the libraries are imported once. Each
layout saves once. Then each restores, into fresh objects of other weights, what every
layout of the same model has saved. Compared are the full tensors of the model and of the
optimizer, bit by bit; in the same layout also what two further steps make of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
import torch.multiprocessing
from reach import bits_of
from table import Bundle
from torch import nn
from torch.distributed.tensor import DTensor

from distckpt import Checkpoint, CheckpointManager, Replicated

# By model and layout: ranks, and what the library is asked for.
LAYOUTS: dict[str, dict[str, tuple[int, dict[str, Any]]]] = {
    "transformers, Llama": {
        "one process": (1, {}),
        'tp_plan="auto"': (2, {"tp_plan": "auto"}),
        "fsdp_size=2": (2, {"fsdp_size": 2}),
    },
    "transformers, Mixtral": {
        "one process": (1, {}),
        "tp_size=2, ep_size=2": (2, {"tp_size": 2, "ep_size": 2}),
        "fsdp_size=2, ep_size=2": (2, {"fsdp_size": 2, "ep_size": 2}),
        "fsdp_size=4, ep_size=2": (4, {"fsdp_size": 4, "ep_size": 2}),
        "fsdp_size=2, tp_size=2, ep_size=4": (
            4,
            {"fsdp_size": 2, "tp_size": 2, "ep_size": 4},
        ),
    },
    # Two experts: where there are more ranks, they are cut along another dimension, too.
    "torchtitan, two experts": {
        "one process": (1, {"experts": 2}),
        "ep 2": (2, {"experts": 2, "ep": 2}),
        "fsdp 2": (2, {"experts": 2}),
        "fsdp 3": (3, {"experts": 2}),
        "fsdp 4, ep 2: Shard(0) and Shard(1)": (4, {"experts": 2, "ep": 2}),
    },
    "torchtitan, four experts": {
        "one process": (1, {"experts": 4}),
        "fsdp 4, ep 2: Shard(0) twice": (4, {"experts": 4, "ep": 2}),
        "fsdp 4, ep 4": (4, {"experts": 4, "ep": 4}),
        "fsdp 4": (4, {"experts": 4}),
    },
}

# These are refused, with this in the message. In the first the library packs two matrices
# into one, and cuts each of them. In the second one name lies on two meshes, undeclared.
REFUSED: dict[str, dict[str, tuple[int, dict[str, Any], str]]] = {
    "transformers, Mixtral": {
        'tp_plan="auto"': (
            2,
            {"tp_plan": "auto"},
            "experts.gate_up_proj' cannot be stored: it has placements [_StridedShard(",
        ),
        "fsdp_size=2, tp_size=2, not declared": (
            4,
            {"fsdp_size": 2, "tp_size": 2, "ep_size": 4, "declared": False},
            "if they are copies of one tensor, Checkpoint(model=Replicated(model))",
        ),
    },
}


# transformers: a tiny Llama and a tiny Mixtral


def _transformers(
    name: str, seed: int, folder: Path, settings: dict[str, Any]
) -> nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    more: dict[str, Any] = {}
    settings = {key: value for key, value in settings.items() if key != "declared"}
    if "tp_plan" in settings:
        more = settings
    elif settings:
        more = {"distributed_config": DistributedConfig(**settings)}
    # Sharded as it is read, so it has to be read from files.
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder / f"{name} {seed}", **more
    )
    return model.train()


def _step_of_transformers(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    batch = torch.randint(0, 50, (2, 8), generator=generator)
    model(batch, labels=batch).loss.backward()


# torchtitan: a block with its MoE, sharded by its own functions


class _Block(nn.Module):
    moe_enabled = True

    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.moe = moe


class _Decoder(nn.Module):
    """What ``apply_fsdp_to_decoder`` asks a model for."""

    enable_weight_tying = False
    tok_embeddings = None

    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"0": _Block(moe)})
        self.norm, self.lm_head = nn.LayerNorm(12), nn.Linear(12, 5)


def _import_torchtitan() -> Any:
    name = "torchtitan.distributed.minimal_async_ep"
    if name not in sys.modules:
        # Kernels for GPUs: they need triton, and nothing here calls them.
        stand_in = types.ModuleType(name)
        for function in ("combine_op", "dispatch_op", "init_buffer"):
            setattr(stand_in, function, None)
        stand_in.maybe_update_minimal_async_ep_config = None
        stand_in.MinimalAsyncEPDispatchMetadata = object
        sys.modules[name] = stand_in
    import torchtitan.distributed.parallel_dims
    from torchtitan.models.common import moe

    # Without an accelerator it takes the CPU for a GPU.
    torchtitan.distributed.parallel_dims.device_type = "cpu"
    return moe


def _torchtitan(
    _name: str, seed: int, _folder: Path, settings: dict[str, Any]
) -> nn.Module:
    moe = _import_torchtitan()
    import spmd_types as spmd
    from torchtitan.distributed.fsdp import apply_fsdp_to_decoder
    from torchtitan.distributed.parallel_dims import ParallelDims
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe_sharding import set_moe_sharding_config
    from torchtitan.models.common.token_dispatcher import (
        AllToAllTokenDispatcher,
        LocalTokenDispatcher,
    )

    experts, ep = settings["experts"], settings.get("ep", 1)
    dispatcher = LocalTokenDispatcher if ep == 1 else AllToAllTokenDispatcher
    config = moe.MoE.Config(
        num_experts=experts,
        router=moe.TokenChoiceTopKRouter.Config(
            num_experts=experts, gate=Linear.Config(in_features=12, out_features=experts)
        ),
        routed_experts=moe.RoutedExperts.Config(
            inner_experts=moe.GroupedExperts.Config(
                dim=12, hidden_dim=24, num_experts=experts
            ),
            token_dispatcher=dispatcher.Config(num_experts=experts, top_k=1),
        ),
    )
    size = dist.get_world_size() if dist.is_initialized() else 1
    if ep > 1:
        set_moe_sharding_config(
            config,
            enable_ep=True,
            enable_sp=False,
            expert_param_layout={
                "w1_EFD": spmd.S(1),
                "w2_EDF": spmd.S(2),
                "w3_EFD": spmd.S(1),
            },
        )
    torch.manual_seed(seed)
    model = _Decoder(config.build())
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    if size == 1:
        return model
    dims = ParallelDims(
        dp_replicate=1,
        dp_shard=size,
        cp=1,
        tp=1,
        pp=1,
        ep=ep,
        world_size=size,
        spmd_backend="partial_dtensor",
    )
    if ep > 1:
        model.layers["0"].moe.parallelize(dims)
    apply_fsdp_to_decoder(
        model,
        dims.get_mesh("fsdp"),
        param_dtype=torch.float32,
        reduce_dtype=torch.float32,
        pp_enabled=False,
        ep_degree=ep,
        edp_mesh=dims.get_optional_mesh(["efsdp"]),
    )
    return model


def _step_of_torchtitan(model: nn.Module, step: int) -> None:
    # Each rank has a part of each gradient, and a part of a cosine is a cosine of it.
    for parameter in model.parameters():
        parameter.grad = torch.cos(parameter.detach() * (step + 1))


MODELS: dict[str, tuple[Callable[..., nn.Module], Callable[..., None]]] = {
    "transformers": (_transformers, _step_of_transformers),
    "torchtitan": (_torchtitan, _step_of_torchtitan),
}


# What each rank does


def _objects(model: str, seed: int, folder: Path, settings: dict[str, Any]) -> Bundle:
    make, _ = MODELS[model.partition(",")[0]]
    module = make(model, seed, folder, settings)
    return {"model": module, "optimizer": torch.optim.AdamW(module.parameters(), lr=1e-2)}


def _checkpoint(bundle: Bundle, settings: dict[str, Any]) -> Checkpoint:
    model = bundle["model"]
    if settings.get("fsdp_size", 1) > 1 < settings.get("tp_size", 1):
        # What transformers' tensor parallelism does not cut is sharded by FSDP2 in each of
        # its groups, on a mesh of that group.
        model = Replicated(model) if settings.get("declared", True) else model
    return Checkpoint(model=model, optimizer=bundle["optimizer"])


def _train(model: str, bundle: Bundle, steps: range) -> None:
    _, backward = MODELS[model.partition(",")[0]]
    for step in steps:
        backward(bundle["model"], step)
        bundle["optimizer"].step()
        bundle["optimizer"].zero_grad()


def _full(bundle: Bundle) -> dict[str, str]:
    """Return digests of all tensors, put together of all ranks' parts, by name."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in bundle["model"].named_parameters():
        found[name] = parameter
        for key, value in bundle["optimizer"].state.get(parameter, {}).items():
            found[f"{name}: {key}"] = value
    for name, value in bundle["model"].state_dict().items():
        found.setdefault(name, value)
    digests = {}
    for name, value in found.items():
        whole = value.detach()
        whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
        kind = f"{whole.dtype} {list(whole.shape)} "
        digests[name] = kind + hashlib.sha256(bits_of(whole).tobytes()).hexdigest()
    return digests


def _save(model: str, settings: dict[str, Any], folder: Path, run: Path) -> Any:
    bundle = _objects(model, 0, folder, settings)
    _train(model, bundle, range(2))
    with CheckpointManager(_checkpoint(bundle, settings), run, 1) as manager:
        manager.save()
    saved = _full(bundle)
    sharded = sum(isinstance(p, DTensor) for p in bundle["model"].parameters())
    placements = {
        str(parameter.placements)
        for parameter in bundle["model"].parameters()
        if isinstance(parameter, DTensor)
    }
    _train(model, bundle, range(2, 4))
    return {
        "saved": saved,
        "further": _full(bundle),
        "sharded": sharded,
        "placements": sorted(placements),
    }


def _restore(
    model: str, settings: dict[str, Any], folder: Path, runs: list[Path], own: Path
) -> Any:
    """Restore what each run has saved; go on where the layout was this one."""
    found = []
    for run in runs:
        bundle = _objects(model, 1, folder, settings)
        with CheckpointManager(_checkpoint(bundle, settings), run, 1) as manager:
            assert manager.restore_or_initialize() is not None
        one = {"restored": _full(bundle)}
        if run == own:
            _train(model, bundle, range(2, 4))
            one["further"] = _full(bundle)
        found.append(one)
    return found


# Jobs


def _rank(
    rank: int, size: int, folder: Path, function: Callable[..., Any], *arguments: Any
) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    if size > 1:
        method = f"file://{folder}/rendezvous"
        dist.init_process_group("gloo", init_method=method, rank=rank, world_size=size)
    value = function(*arguments)
    if rank == 0:
        (folder / "value.json").write_text(json.dumps(value))
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


def _job(size: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function on so many ranks; returns what rank 0 has returned."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.multiprocessing.start_processes(
            _rank, (size, folder, function, *arguments), size, start_method="fork"
        )
        return json.loads((folder / "value.json").read_text())


def _save_pretrained(folder: Path) -> None:
    from rows_hugging_face import llama, mixtral

    for name, make in (("Llama", llama), ("Mixtral", mixtral)):
        for seed in (0, 1):
            torch.manual_seed(seed)
            make().save_pretrained(folder / f"transformers, {name} {seed}")


def _differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    return [name for name in {**expected, **found} if expected.get(name) != found.get(name)]


def play(folder: Path, part: str = "") -> list[dict[str, Any]]:
    """Play all pairs of layouts of each model; returns what each has shown."""
    results = []
    for model in LAYOUTS:
        if part in model:
            try:
                _import(model, folder)
            except ImportError as error:
                verdict = f"not run: {error}"
                results.append({"model": model, "from": "", "to": "", "verdict": verdict})
                continue
            results += _play(model, folder)
    return results


def _import(model: str, folder: Path) -> None:
    """Import here what all ranks need, and make what they read."""
    if model.startswith("torchtitan"):
        _import_torchtitan()
    else:
        import transformers.distributed
        import transformers.models.llama.modeling_llama
        import transformers.models.mixtral.modeling_mixtral  # noqa: F401

        _save_pretrained(folder)


def _play(model: str, folder: Path) -> Iterator[dict[str, Any]]:
    layouts = LAYOUTS[model]
    runs = [folder / f"{model} {index}" for index in range(len(layouts))]
    saves = {}
    for run, (name, (size, settings)) in zip(runs, layouts.items(), strict=True):
        saves[name] = _job(size, _save, model, settings, folder, run)
    for own, (name, (size, settings)) in zip(runs, layouts.items(), strict=True):
        restored = _job(size, _restore, model, settings, folder, runs, own)
        for source, one in zip(layouts, restored, strict=True):
            saved = saves[source]
            wrong = _differences(saved["saved"], one["restored"])
            if source == name:
                # In another layout sums are taken in another order.
                wrong += [
                    f"{tensor} after two further steps"
                    for tensor in _differences(saved["further"], one["further"])
                ]
            yield {
                "model": model,
                "from": source,
                "to": name,
                "verdict": f"other: {wrong[:3]}" if wrong else "right",
                "tensors": len(saved["saved"]),
                "sharded": saved["sharded"],
                "placements": saved["placements"],
            }
    for name, (size, settings, message) in REFUSED.get(model, {}).items():
        try:
            _job(size, _save, model, settings, folder, folder / f"{model} {name}")
            verdict = "other: saved, though it is to be refused"
        except torch.multiprocessing.ProcessRaisedException as error:
            text = str(error).strip().splitlines()[-1]
            verdict = f"{'refused' if message in text else 'other'}: {text}"
        yield {"model": model, "from": name, "to": "", "verdict": verdict}


def is_expected(result: dict[str, Any]) -> bool:
    """Tell whether a pair has shown what it is to show."""
    if not result["to"]:
        return bool(result["verdict"].startswith("refused"))
    return result["verdict"] == "right" and result["tensors"] > 0


def main() -> int:
    """Play all; tells whether something is not right."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", nargs="?", default="", help="of the name of a model")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    began = time.monotonic()
    place = tempfile.TemporaryDirectory(
        dir="/dev/shm" if os.path.isdir("/dev/shm") else None
    )
    with place as folder:
        results = play(Path(folder), arguments.part)
    for result in results:
        print(*result.values(), sep=" | ")
    print(f"{len(results)} pairs, {time.monotonic() - began:.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(results))
    return not all(map(is_expected, results))


if __name__ == "__main__":
    sys.exit(main())
