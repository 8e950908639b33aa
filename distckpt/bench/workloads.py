"""States to save: the shapes of real models, filled with random bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xxhash
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from distckpt import Checkpoint
from distckpt.bench.team import Team

_MAX_PER_MODULE = 100

Shapes = dict[str, tuple[int, ...]]


@dataclass
class Workload:
    """One state, as its training job would hold it.

    Attributes:
        name: As on the command line.
        scale: As on the command line.
        modules: By the name it is tracked under.
        optimizer: Whose state is saved, too.
        replicated: Whether every rank holds all of it.
    """

    name: str
    scale: float
    modules: dict[str, nn.Module]
    optimizer: torch.optim.Optimizer | None
    replicated: bool
    device: torch.device
    rank: int
    world_size: int
    local: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.local = [local_of(tensor) for tensor in self.flat().values()]
        self.fill()
        self._digest = self._digest_now()

    def fill(self) -> None:
        """Fill in the same random bytes, each tensor's own, as often as it is called."""
        for number, tensor in enumerate(self.local):
            alike = self.replicated or tensor.dim() == 0
            _fill(tensor, (number, 0 if alike else self.rank))

    def checkpoint(self) -> Checkpoint:
        """Track everything, as a user of distckpt would."""
        if self.optimizer is None:
            return Checkpoint(**self.modules)
        return Checkpoint(**self.modules, optimizer=self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Return the same tensors in the usual form, by fully-qualified names."""
        state: dict[str, Any] = {
            name: {key: value.detach() for key, value in module.named_parameters()}
            for name, module in self.modules.items()
        }
        if self.optimizer is not None:
            state["optimizer"] = {"state": dict(self._optimizer_state())}
        return state

    def _optimizer_state(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        assert self.optimizer is not None
        names: dict[torch.Tensor, str] = {
            parameter: name
            for module in self.modules.values()
            for name, parameter in module.named_parameters()
        }
        for parameter, state in self.optimizer.state.items():
            yield names[parameter], state

    def flat(self) -> dict[str, torch.Tensor]:
        """Return all tensors by one name each, sharded ones as ``DTensor``."""
        return dict(_flatten("", self.state_dict()))

    def flat_local(self) -> dict[str, torch.Tensor]:
        """Return this rank's own memory by name: plain tensors."""
        return {name: local_of(tensor) for name, tensor in self.flat().items()}

    @property
    def share(self) -> list[torch.Tensor]:
        """This rank's part of what must be written once: all that is sharded, or 1/N."""
        return self.local[self.rank :: self.world_size] if self.replicated else self.local

    @property
    def local_bytes(self) -> int:
        """What this rank holds."""
        return sum(tensor.nbytes for tensor in self.local)

    @property
    def share_bytes(self) -> int:
        """What this rank has to write."""
        return sum(tensor.nbytes for tensor in self.share)

    def overwrite(self) -> None:
        """Make sure that only a restore can bring the right bytes back."""
        for tensor in self.local:
            bytes_of(tensor).fill_(0xA5)
        self.synchronize()

    def check(self) -> None:
        """Raise ``ValueError`` if the tensors do not hold what was filled in."""
        if self._digest_now() != self._digest:
            msg = "the restored tensors hold other bytes than were saved"
            raise ValueError(msg)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _digest_now(self) -> bytes:
        hasher = xxhash.xxh3_128()
        for tensor in self.local:
            hasher.update(memoryview(bytes_of(tensor).cpu().numpy()))  # type: ignore[arg-type]
        return hasher.digest()


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's own memory of a tensor."""
    with torch.no_grad():
        own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return own.detach()


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's own memory as bytes."""
    return tensor.reshape(-1).view(torch.uint8)


def _flatten(prefix: str, tree: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _flatten(f"{path}/", value)
        else:
            yield path, value


def _fill(tensor: torch.Tensor, seed: tuple[int, ...]) -> None:
    if tensor.dim() == 0:
        tensor.fill_(1000)  # a step count
        return
    # Random bytes: nothing on the way to the disk can compress or deduplicate them.
    generator = np.random.Generator(np.random.SFC64(seed))
    random = np.frombuffer(generator.bytes(tensor.nbytes), dtype=np.uint8)
    bytes_of(tensor).copy_(torch.from_numpy(random.copy()))


@dataclass(frozen=True, slots=True)
class _Maker:
    """Makes tensors of one workload.

    Attributes:
        mesh: What they are sharded on; None for plain tensors.
    """

    device: torch.device
    rank: int
    world_size: int
    mesh: DeviceMesh | None

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if self.mesh is None:
            return torch.empty(shape, dtype=dtype, device=self.device)
        # As torch.chunk cuts it.
        length = -(-shape[0] // self.world_size)
        start = min(self.rank * length, shape[0])
        stop = min(start + length, shape[0])
        meta = torch.empty(shape, device="meta")
        local = torch.empty((stop - start, *shape[1:]), dtype=dtype, device=self.device)
        return DTensor.from_local(
            local,
            self.mesh,
            [Shard(0)],
            run_check=False,
            shape=meta.shape,
            stride=meta.stride(),
        )

    def module(self, shapes: Shapes, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Make a module whose parameters have these names."""
        root = nn.Module()
        for name, shape in shapes.items():
            *path, last = name.split(".")
            parent = root
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.register_parameter(last, nn.Parameter(self.empty(shape, dtype)))
        return root

    def adamw(self, module: nn.Module) -> torch.optim.Optimizer:
        """Make an optimizer in the state that many steps would leave it in."""
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
        for parameter in module.parameters():
            shape = tuple(parameter.shape)
            optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": self.empty(shape, torch.float32),
                "exp_avg_sq": self.empty(shape, torch.float32),
            }
        return optimizer


@dataclass(frozen=True, slots=True)
class Kind:
    """One workload that can be asked for.

    Attributes:
        about: One line for ``--list``.
        is_sharded: Whether its tensors are ``DTensor``s.
        make: Its modules and optimizer.
    """

    about: str
    is_sharded: bool
    make: Callable[
        [_Maker, float], tuple[dict[str, nn.Module], torch.optim.Optimizer | None]
    ]


def build(name: str, scale: float, team: Team, use_cuda: bool) -> Workload:
    """Make one workload on every rank; collective."""
    kind = KINDS[name]
    device = torch.device("cuda", torch.cuda.current_device()) if use_cuda else _CPU
    mesh = init_device_mesh(device.type, (team.world_size,)) if kind.is_sharded else None
    maker = _Maker(device, team.rank, team.world_size, mesh)
    modules, optimizer = kind.make(maker, scale)
    replicated = not kind.is_sharded
    return Workload(
        name,
        scale,
        modules,
        optimizer,
        replicated,
        device,
        team.rank,
        team.world_size,
    )


_CPU = torch.device("cpu")


def _scaled(shapes: Shapes, scale: float) -> Shapes:
    # The number of tensors is part of a workload's nature; their length is not.
    return {
        name: (max(1, round(shape[0] * scale)), *shape[1:])
        for name, shape in shapes.items()
    }


def _gpt2(maker: _Maker, scale: float) -> tuple[dict[str, nn.Module], Any]:
    width = 768
    shapes: Shapes = {"wte.weight": (50257, width), "wpe.weight": (1024, width)}
    for number in range(12):
        block = f"h.{number}"
        shapes |= _linear(f"{block}.attn.c_attn", (width, 3 * width))
        shapes |= _linear(f"{block}.attn.c_proj", (width, width))
        shapes |= _linear(f"{block}.mlp.c_fc", (width, 4 * width))
        shapes |= _linear(f"{block}.mlp.c_proj", (4 * width, width))
        shapes |= _norm(f"{block}.ln_1", width) | _norm(f"{block}.ln_2", width)
    shapes |= _norm("ln_f", width)
    module = maker.module(_scaled(shapes, scale))
    return {"model": module}, maker.adamw(module)


def _linear(name: str, shape: tuple[int, int]) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[1:]}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _many_small(maker: _Maker, scale: float) -> tuple[dict[str, nn.Module], Any]:
    shape = (16 * maker.world_size, 32)
    count = max(1, round(20_000 * scale))
    shapes: Shapes = {
        f"block{number // _MAX_PER_MODULE}.weight{number % _MAX_PER_MODULE}": shape
        for number in range(count)
    }
    return {"model": maker.module(shapes)}, None


def _replicated(maker: _Maker, scale: float) -> tuple[dict[str, nn.Module], Any]:
    shapes: Shapes = {f"layer{number}.weight": (1024, 6144) for number in range(40)}
    return {"model": maker.module(_scaled(shapes, scale))}, None


def _llama(maker: _Maker, scale: float) -> tuple[dict[str, nn.Module], Any]:
    # The layers of Llama 3.2 1B, two of them, and a slice of its vocabulary.
    width, narrow, wide = 2048, 512, 8192
    shapes: Shapes = {"embed_tokens.weight": (10_688, width), "norm.weight": (width,)}
    for number in range(2):
        layer = f"layers.{number}"
        for name, shape in (
            ("self_attn.q_proj", (width, width)),
            ("self_attn.k_proj", (narrow, width)),
            ("self_attn.v_proj", (narrow, width)),
            ("self_attn.o_proj", (width, width)),
            ("mlp.gate_proj", (wide, width)),
            ("mlp.up_proj", (wide, width)),
            ("mlp.down_proj", (width, wide)),
            ("input_layernorm", (width,)),
            ("post_attention_layernorm", (width,)),
        ):
            shapes[f"{layer}.{name}.weight"] = shape
    shapes = _scaled(shapes, scale)
    model = maker.module(shapes, torch.bfloat16)
    master = maker.module(shapes)
    return {"model": model, "master": master}, maker.adamw(master)


KINDS: dict[str, Kind] = {
    "gpt2-sharded": Kind(
        "GPT-2 small, fp32, with Adam's moments, sharded on dim 0: 444 tensors, 1.5 GB",
        True,
        _gpt2,
    ),
    "many-small": Kind(
        "20,000 sharded tensors, 16x32 fp32 a rank: 41 MB a rank", True, _many_small
    ),
    "ddp-replicated": Kind(
        "40 tensors of 1024x6144 fp32, equal on every rank: 1.0 GB", False, _replicated
    ),
    "llama-large": Kind(
        "two Llama layers, bf16, with fp32 master weights and moments, sharded: 2.0 GB",
        True,
        _llama,
    ),
}


def total_bytes(workload: Workload, team: Team) -> int:
    """Return how many bytes one checkpoint holds."""
    shares: Sequence[str] = team.texts(str(workload.share_bytes))
    return sum(map(int, shares))
