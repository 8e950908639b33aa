"""Jobs of every layout, made from names alone: each process knows what must come back."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

from distckpt import Checkpoint

# Even, uneven, shorter than there are ranks, without elements, without dimensions.
SHAPES = {
    "wide": (7, 10),
    "tall": (10, 7),
    "even": (8, 16),
    "few": (3, 4),
    "bias": (9,),
    "cube": (4, 3, 5),
    "none": (0, 4),
    "scale": (),
}
DTYPES = {"wide": torch.bfloat16, "cube": torch.float64}
# Which of them tensor parallelism cuts along which dimension.
BY_ROWS, BY_COLUMNS = {"wide", "even", "cube"}, {"tall", "few"}


def full(name, shape, dtype=torch.float32):
    """Make all of a tensor, full of numbers that follow from its name."""
    count = torch.Size(shape).numel()
    start = zlib.crc32(name.encode()) % 1000
    return ((torch.arange(count) * 7 + start) % 509).to(dtype).view(shape)


def _chunk(tensor, count, dim, index):
    """Return one part as ``torch.chunk`` cuts it; those at the end may be empty."""
    parts = tensor.chunk(count, dim)
    return parts[index] if index < len(parts) else tensor.narrow(dim, 0, 0)


@dataclass(frozen=True)
class Layout:
    """How a kind of job lays its tensors on a mesh.

    Attributes:
        mesh_shape: Of the job with so many ranks; None: no mesh, plain tensors.
        placements: Of a tensor, by its name and number of dimensions.
    """

    mesh_shape: Callable[[int], tuple[int, ...]] | None
    placements: Callable[[str, int], tuple[Any, ...]] = lambda name, dims: ()


def _rows(name, dims):
    return (Shard(0) if dims else Replicate(),)


def _parallel(name, dims):
    if name in BY_COLUMNS:
        return (Shard(1),)
    return (Shard(0) if name in BY_ROWS else Replicate(),)


def _columns(name, dims):
    return (Shard(1) if dims > 1 else Replicate(),)


def _hybrid(name, dims):
    return (Replicate(), *_rows(name, dims))


def _both(name, dims):
    if dims == 0:
        return (Replicate(), Replicate())
    if name in BY_ROWS:
        return (_StridedShard(0, split_factor=2), Shard(0))
    return (Shard(0), Shard(1) if name in BY_COLUMNS else Replicate())


LAYOUTS = {
    "one": Layout(None),
    "ddp": Layout(None),
    "stages": Layout(None),
    "fsdp": Layout(lambda size: (size,), _rows),
    "tp": Layout(lambda size: (size,), _parallel),
    "columns": Layout(lambda size: (size,), _columns),
    "hsdp": Layout(lambda size: (2, size // 2), _hybrid),
    "fsdp-tp": Layout(lambda size: (size // 2, 2), _both),
}


class Job:
    """One job of a layout: what it tracks, and what each tensor of it must hold.

    Args:
        kind: Which layout.
        scale: Multiplies the first dimension of every tensor.
        filled: Whether the tensors hold what follows from their names; else zeros.
        with_state: Whether optimizers have state already.
    """

    def __init__(self, kind, *, filled, with_state, scale=1):
        self._layout = LAYOUTS[kind]
        self._filled = filled
        self._mesh = None
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        if self._layout.mesh_shape is not None:
            self._mesh = init_device_mesh("cpu", self._layout.mesh_shape(self.world_size))
        self._tensors = []
        shapes = {
            name: (shape[0] * scale, *shape[1:]) if shape else shape
            for name, shape in SHAPES.items()
        }
        if kind == "stages":
            # Each rank has other tensors; with many ranks some have none.
            names = sorted(shapes)[self.rank :: self.world_size]
            shapes = {name: shapes[name] for name in names}
        model = nn.Module()
        for name, shape in shapes.items():
            tensor = self._make(name, name, shape, DTYPES.get(name, torch.float32))
            model.register_parameter(name, nn.Parameter(tensor))
        tracked = model
        if kind == "ddp" and self.world_size > 1:
            tracked = DistributedDataParallel(model)
        self.objects = {"model": tracked, "notes": {"epoch": 3 if filled else 0}}
        if shapes:
            self._add_optimizers(model, with_state)

    def _add_optimizers(self, model, with_state):
        parameters = dict(model.named_parameters())
        makers = {
            "adamw": (torch.optim.AdamW, ("exp_avg", "exp_avg_sq")),
            "sgd": (
                lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
                ("momentum_buffer",),
            ),
            "factored": (torch.optim.SGD, ()),
        }
        for kind, (make, keys) in makers.items():
            optimizer = make(parameters.values(), lr=0.5 if self._filled else 0.1)
            for name, parameter in parameters.items() if with_state else ():
                state = optimizer.state[parameter]
                shape = tuple(parameter.shape)
                for key in keys:
                    state[key] = self._make(f"{kind}.{name}.{key}", name, shape)
                if kind == "adamw":
                    state["step"] = self._plain(f"{kind}.{name}.step", ())
                if kind == "factored" and len(shape) > 1:
                    # As Adafactor's: of other shapes than the parameter's.
                    for key, part in (("row", shape[:-1]), ("col", shape[-1:])):
                        state[key] = self._make(f"{kind}.{name}.{key}", "", part)
            self.objects[kind] = optimizer

    def _plain(self, key, shape, dtype=torch.float32):
        expected = full(key, shape, dtype)
        tensor = expected.clone() if self._filled else torch.zeros_like(expected)
        self._tensors.append((key, tensor, expected))
        return tensor

    def _make(self, key, name, shape, dtype=torch.float32):
        """Make a tensor as the layout has it: whatever has no name of its own, whole."""
        if self._mesh is None:
            return self._plain(key, shape, dtype)
        placements = self._layout.placements(name, len(shape))
        if not name:
            placements = (Replicate(),) * self._mesh.ndim
        expected = full(key, shape, dtype)
        part = expected
        # Of a strided cut the dimension behind it comes first.
        order = [*range(self._mesh.ndim)]
        if any(type(placed) is _StridedShard for placed in placements):
            order.reverse()
        coordinate = self._mesh.get_coordinate()
        for dim in order:
            if not placements[dim].is_replicate():
                length = self._mesh.shape[dim]
                part = _chunk(part, length, placements[dim].dim, coordinate[dim])
        part = part.contiguous()
        local = part.clone() if self._filled else torch.zeros_like(part)
        meta = torch.empty(shape, device="meta")
        tensor = DTensor.from_local(
            local,
            self._mesh,
            placements,
            run_check=False,
            shape=meta.shape,
            stride=meta.stride(),
        )
        self._tensors.append((key, tensor, part))
        return tensor

    def checkpoint(self):
        """Track everything."""
        return Checkpoint(**self.objects)

    def check(self, expected):
        """Compare all that is tracked with what a filled job tracks; return how many.

        Args:
            expected: That job, of the same layout, with state.
        """
        found = dict(self._walk())
        wanted = dict(expected._walk())
        assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
        for name, tensor in wanted.items():
            one, other = _raw(found[name]), _raw(tensor)
            assert found[name].dtype == tensor.dtype and one == other, name
        assert self.objects["notes"] == {"epoch": 3}
        for kind in ("adamw", "sgd", "factored"):
            if kind in self.objects:
                assert self.objects[kind].param_groups[0]["lr"] == 0.5, kind
        return len(wanted)

    def _walk(self):
        model = self.objects["model"]
        model = getattr(model, "module", model)
        for name, parameter in model.named_parameters():
            yield name, parameter.detach()
            for kind in ("adamw", "sgd", "factored"):
                state = self.objects[kind].state.get(parameter, {})
                for key, value in state.items():
                    yield f"{kind}.{name}.{key}", value


def _raw(tensor):
    plain = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    plain = plain.contiguous().reshape(-1)
    return (*tensor.shape,), bytes(plain.view(torch.uint8).numpy().tobytes())
