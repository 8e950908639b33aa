"""The objects in golden run directories: made to be saved, and made anew to be restored.

Each function of ``BUILDERS`` makes the objects of one directory. It is called with a seed,
so that the objects a checkpoint is restored into have other values, and with ``as_job``:
whether the ranks of a job call it, or one process, where nothing is sharded. The function
of the same name in ``TRAINED`` gives these objects their optimizer state.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import enum
import math
import random
import types
import uuid
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from decimal import Decimal
from fractions import Fraction
from pathlib import PurePosixPath, PureWindowsPath
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import lr_scheduler, swa_utils

from distckpt import PerRank, RngState

# Modules


class Net(nn.Module):
    """A small model whose parameters no number of ranks divides evenly.

    On four ranks the last parts of ``odd.weight`` and ``norm.weight`` (3 rows) and all but
    one of ``scale`` are empty.
    """

    def __init__(self, width=10):
        super().__init__()
        self.first = nn.Linear(6, width)
        self.odd = nn.Linear(width, 3)
        self.norm = nn.LayerNorm(3)
        self.scale = nn.Parameter(torch.rand(1))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.seen += 1
        return self.norm(self.odd(torch.tanh(self.first(x)))) * self.scale


class Tied(nn.Module):
    """A model whose last layer is its first one."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x))


class Extra(nn.Module):
    """A module with extra state, a buffer that is not saved, and one that is a view."""

    def __init__(self, seed):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 3))
        self.register_buffer("view", self.weight.detach()[0])
        self.register_buffer("mask", torch.rand(2), persistent=False)
        self.register_buffer("absent", None)
        self.extra = {"seed": seed, "history": [seed, (seed, None)], "sum": torch.rand(2)}

    def get_extra_state(self):
        """Return what is no tensor of the module."""
        return self.extra

    def set_extra_state(self, state):
        """Take it back."""
        self.extra = state


class Everything(nn.Module):
    """Ties, normalizations, parametrizations and extra state in one module."""

    def __init__(self, seed):
        super().__init__()
        self.tied = Tied()
        self.batch = nn.BatchNorm1d(3)
        self.weighted = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))
        self.extra = Extra(seed)
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.ParameterDict({"a/b~": _rand(2)})])
        self.frozen = nn.Parameter(torch.rand(3, 2).to(torch.bfloat16), requires_grad=False)

    def forward(self, x):
        hidden = self.batch(self.layers[0](self.spectral(self.weighted(x))))
        return hidden.sum() + self.extra.weight.sum() + self.tied(torch.arange(7)).sum()


def _rand(*shape):
    return nn.Parameter(torch.rand(shape))


class Loader:
    """What a data loader has: an object with a state dict."""

    def __init__(self, left):
        self.state = {"left": [*left], "epoch": 0, "window": (1, None)}

    def state_dict(self):
        """Return a copy of the state."""
        return dict(self.state)

    def load_state_dict(self, state):
        """Take it back."""
        self.state = dict(state)


class Stateful(Loader):
    """An object whose state has tensors in containers."""

    def __init__(self):
        super().__init__([])
        self.state = OrderedDict(
            momentum=torch.rand(2, 3),
            history=[torch.rand(2), (torch.rand(()), 7)],
            by_key={3: torch.ones(1), "a/b": {"~": torch.zeros(2)}, "plain": 0.5},
            numbers=(1, 2),
        )

    def state_dict(self):
        """Return the state, an ``OrderedDict``."""
        return OrderedDict(self.state)

    def load_state_dict(self, state):
        """Take it back."""
        self.state = OrderedDict(state)


class Phase(enum.Enum):
    """A member is a value of its own."""

    WARM_UP = "warm up"
    MAIN = ("main", 1)


class Level(enum.IntEnum):
    """A member is a number, too."""

    LOW = 1
    HIGH = 2


class Point(NamedTuple):
    """A tuple with names."""

    x: int
    y: tuple[int, ...] = ()


class Label(str):
    """A text of its own kind."""


@dataclasses.dataclass
class Record:
    """What a training notes."""

    loss: float = 0.0
    phase: Phase = Phase.WARM_UP
    point: Point | None = None
    history: list[Record] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, slots=True)
class Key:
    """A key of dicts, and in sets."""

    name: str = ""
    level: Level = Level.LOW


class Coded(torch.Tensor):
    """Codes of a byte with a scale for each row: as quantized weights are."""

    @staticmethod
    def __new__(cls, codes, scale, context):
        shape, dtype = codes.shape, scale.dtype
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)

    def __init__(self, codes, scale, context):
        self.codes, self.scale, self.context = codes, scale, context

    def __tensor_flatten__(self):
        return ["codes", "scale"], {"context": self.context}

    @classmethod
    def __tensor_unflatten__(cls, parts, meta, outer_size, outer_stride):
        return cls(parts["codes"], parts["scale"], meta["context"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert func.__name__.partition(".")[0] in ("detach", "alias"), func
        return cls(args[0].codes, args[0].scale, args[0].context)


def divide(saved, rank, world_size):
    """Divide what the loaders of all ranks had left among the ranks that there are now."""
    left = sorted(sample for state in saved for sample in state["left"])
    return {**saved[0], "left": left[rank::world_size]}


def total(saved, rank, world_size):
    """Add up the tensors of all ranks."""
    return torch.stack(saved).sum(0)


def seed_all(seed):
    """Seed what ``RngState`` saves."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# Builders, one for each directory


def small(seed, as_job):
    """Make a state of a few bytes, for directories that are about their records."""
    return {"weight": torch.rand(5), "step": torch.zeros((), dtype=torch.int64)}


def values(seed, as_job):
    """Make plain values of all kinds, under all kinds of names."""
    torch.manual_seed(seed)
    fresh = seed != SAVED
    return {
        "none": 1 if fresh else None,
        "flags": [] if fresh else [True, False],
        "small": 0 if fresh else -7,
        "integers": [] if fresh else [2**63, -(2**100), 2**4096 - 1, 0],
        "floats": []
        if fresh
        else [0.1, -0.0, 5e-324, 1.7e308, math.inf, -math.inf, math.nan],
        "text": "" if fresh else 'Grüße, "\u2603" \U0001f600\n\t\\ \x00\x7f $ ~ /',
        "data": b"" if fresh else b"\x00\xff" * 40,
        "empty": [1] if fresh else [[], {}, (), "", b"", OrderedDict(), Counter()],
        "nested": () if fresh else (1, (2, "b", [(), ({},)])),
        "ordered": OrderedDict() if fresh else OrderedDict([("b", 1), ("a", (2,))]),
        "counted": Counter() if fresh else Counter({"x": 2, 3: 0}),
        "keys": {}
        if fresh
        else {1: "a", (1, "2"): "b", None: "c", 2.5: "d", b"k": "e", False: 1, -4: ()},
        "dollar": {} if fresh else {"$tensor": "not one", "$$": {"$float": "nan"}},
        "numpy": [] if fresh else _numpy_scalars(),
        "a/b~c": 0 if fresh else 1,
        "größe ~1 ~i7": 0 if fresh else "tricky",
        "tree": {
            "first": [torch.rand(2), {"deep/er": torch.rand(3), 7: torch.rand(1)}],
            -3: {"~": torch.rand(()), "plain": 0 if fresh else 5, "list": [torch.rand(2)]},
            "stateful": Stateful(),
            "part[0:1]": torch.rand(2),
        },
        "stateful": Stateful(),
        "scalar": torch.rand((), dtype=torch.float64),
        "step": torch.tensor(0 if fresh else 12),
    }


def classes(seed, as_job):
    """Make instances of classes, and the values that format 1 has no place for."""
    fresh = seed != SAVED
    first = Record(0.5, Phase.MAIN, Point(1, (2, 3)))
    utc = datetime.timezone.utc
    numbers = np.arange(2000, dtype=np.int32).reshape(40, 50)
    made = {
        "phase": Phase.MAIN,
        "level": Level.HIGH,
        "record": Record(0.25, Phase.WARM_UP, Point(-1), [first, Record(point=Point(9))]),
        "point": Point(4, (5,)),
        "label": Label("Grüße"),
        "by_key": {Key("a", Level.HIGH): [Phase.MAIN], Key("b"): Label("c")},
        "sets": [{3, 1, 2}, {"b", "a", None, (1, b"x")}, set(), frozenset({1.5, "y"})],
        "keys": {Key("a"), Key("z", Level.HIGH)},
        "ranges": [range(1, 9, 3), slice(None, 2**70, -1), ..., bytearray(b"\x00\xff")],
        "queues": [deque([1, (2,)], maxlen=3), deque()],
        "defaults": defaultdict(list, a=[1]),
        "complex": [1 - 2j, complex(-0.0, math.inf)],
        "exact": [Decimal("-0.10"), Fraction(-3, 7), uuid.UUID(int=2**127 + 1)],
        "times": [
            datetime.date(2026, 1, 2),
            datetime.datetime(2026, 1, 2, 3, 4, 5, 6, utc),
            datetime.time(23, 59, 1, fold=1),
            datetime.timedelta(-1, 2, 3),
            datetime.timezone(datetime.timedelta(minutes=-90)),
        ],
        "paths": [PurePosixPath("a/../b"), PureWindowsPath("C:\\x")],
        "spaces": [argparse.Namespace(lr=0.1, tags=["a"]), types.SimpleNamespace(a=(1,))],
        "arrays": [
            np.array([[1.5, -0.0], [np.nan, 5e-324]], order="F"),
            np.array([1, -2], ">i4"),
            np.array(["a", "größe"]),
            np.array([b"x\x00y"], "S4"),
            np.array(["2026-01-02", "NaT"], "datetime64[D]"),
            np.array(True),
            np.zeros((0, 3), np.complex64),
        ],
        "large": numbers,
        "torch": [
            torch.Size([2, 3]),
            torch.bfloat16,
            torch.device("cpu", 0),
            torch.strided,
        ],
    }
    if fresh:
        made = {name: _emptied(value) for name, value in made.items()}
    return {
        **made,
        "weights": _coded(seed),
        "layer": _coded_layer(seed),
        "step": torch.tensor(0 if fresh else 12),
    }


def _emptied(value):
    """Make what the live program has: the types, and other contents."""
    if isinstance(value, np.ndarray):
        return np.zeros_like(value)
    if isinstance(value, Record):
        return Record(point=Point(0), history=[Record()])
    if isinstance(value, (Point, Label)):
        return type(value)(0)
    if isinstance(value, enum.Enum):
        return next(iter(type(value)))
    if isinstance(value, set):
        return {Key()}
    if isinstance(value, dict) and Key("b") in value:
        return {Key(): [Phase.WARM_UP, Label()]}
    return type(value)(list) if isinstance(value, defaultdict) else type(value)()


def _coded(seed):
    codes = ((torch.arange(6) * 5 + seed) % 251).to(torch.uint8).view(2, 3)
    return Coded(codes, torch.tensor([0.5, 2.0]) * seed, {"bits": 8, "of": torch.int4})


def _coded_layer(seed):
    module = nn.Linear(3, 2)
    with torch.no_grad():
        module.bias.fill_(seed)
    module.weight = nn.Parameter(_coded(seed + 7), requires_grad=False)
    return module


def _numpy_scalars():
    made = [np.bool_(True), np.int8(-3), np.int16(-300), np.int32(1), np.int64(-(2**60))]
    made += [np.uint8(255), np.uint16(65535), np.uint32(7), np.uint64(2**64 - 1)]
    made += [np.float16(0.1), np.float32(1.5), np.float64("nan"), np.float64(-0.0)]
    return [*made, np.complex64(1 - 2j), np.complex128(3j)]


# torch's names of the dtypes that format 1 has a place for.
DTYPES = (
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    *("float8_e8m0fnu", "float4_e2m1fn_x2", "bits8", "bits16", "bits1x8", "bits2x4"),
    *("bits4x2", *(f"{sign}int{bits}" for bits in range(1, 8) for sign in ("", "u"))),
)


def dtypes(seed, as_job):
    """Make tensors of every dtype that this torch has, and of every memory layout."""
    names = [name for name in DTYPES if isinstance(getattr(torch, name, None), torch.dtype)]
    tensors = {}
    for name in names:
        matrix = _patterned(getattr(torch, name), (3, 4), seed)
        tensors[name] = {
            "matrix": matrix,
            "scalar": _patterned(getattr(torch, name), (), seed),
            "empty": _patterned(getattr(torch, name), (0, 3), seed),
            "transposed": _patterned(getattr(torch, name), (4, 2), seed).t(),
        }
    torch.manual_seed(seed)
    base, complex_base = torch.rand(12), torch.rand(2, 3, dtype=torch.complex64)
    return {
        "dtypes": tensors,
        "layouts": {
            "stepped": torch.rand(12)[1::3],
            "permuted": torch.rand(2, 3, 4).permute(2, 0, 1),
            "channels_last": torch.rand(2, 3, 2, 2).to(memory_format=torch.channels_last),
            "flipped": torch.rand(6).flip(0),
            "conjugated": torch.rand(3, dtype=torch.complex64).conj(),
            "negated": torch.rand(2, 2, dtype=torch.complex64).conj().imag,
            "real": complex_base.real,
            "inner": torch.rand(6, 6)[1:4, 2:5],
            "many": torch.rand(2, 1, 2, 1, 2, 1, 2, 1),
        },
        "views": {"base": base, "again": base, "part": base[2:7], "other": base.view(3, 4)},
    }


def _patterned(dtype, shape, seed):
    """Make a tensor whose bytes follow from the seed."""
    count = math.prod(shape)
    if dtype is torch.bool:
        return ((torch.arange(count) + seed) % 3 == 0).view(shape)
    size = count * torch.empty(0, dtype=dtype).element_size()
    pattern = ((torch.arange(size) * 41 + seed) % 251).to(torch.uint8)
    return pattern.view(dtype).view(shape) if count else torch.empty(shape, dtype=dtype)


def modules(seed, as_job):
    """Make modules of all kinds, averages of them, and what else has their state."""
    torch.manual_seed(seed)
    model = Everything(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    ema = swa_utils.get_ema_multi_avg_fn(0.9)
    return {
        "model": model,
        "average": swa_utils.AveragedModel(model),
        "ema": swa_utils.AveragedModel(model, multi_avg_fn=ema, use_buffers=True),
        "optimizer": optimizer,
        "swa": swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=3),
        "scaler": torch.amp.GradScaler("cpu", init_scale=2.0**10),
        "nets": {"a": nn.Linear(2, 2), "more": [nn.Linear(2, 1), nn.PReLU()]},
    }


def train_modules(objects):
    """Make one step, and average."""
    objects["scaler"].scale(objects["model"](torch.rand(5, 3))).backward()
    objects["scaler"].step(objects["optimizer"])
    objects["scaler"].update()
    objects["swa"].step()
    objects["average"].update_parameters(objects["model"])
    objects["ema"].update_parameters(objects["model"])


def optimizers(seed, as_job):
    """Make one optimizer of each kind on one model, and schedulers."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2, bias=False))
    model[2].weight.requires_grad_(False)  # frozen, and in a group all the same
    every = [*model.parameters()]
    rate = 0.01 if seed == SAVED else 0.5
    groups = [
        {"params": model[0].parameters(), "lr": rate},
        {"params": []},
        {"params": [*model[1].parameters(), model[2].weight], "weight_decay": 0.1},
    ]
    kinds = torch.optim
    made = {
        "sgd": kinds.SGD(groups, lr=rate, momentum=0.9, nesterov=True),
        "plain": kinds.SGD(every, lr=rate),
        "adam": kinds.Adam(every, lr=rate, amsgrad=True, foreach=True),
        "adamw": kinds.AdamW(every, lr=rate, fused=True),
        "tensor_rate": kinds.Adam(every, lr=torch.tensor(rate), foreach=False),
        "adagrad": kinds.Adagrad(every, lr=rate),
        "rmsprop": kinds.RMSprop(every, lr=rate, centered=True, momentum=0.5),
        "adafactor": kinds.Adafactor(every, lr=rate),
        "adadelta": kinds.Adadelta(every, lr=rate),
        "adamax": kinds.Adamax(every, lr=rate),
        "nadam": kinds.NAdam(every, lr=rate),
        "radam": kinds.RAdam(every, lr=rate),
        "asgd": kinds.ASGD(every, lr=rate),
        "rprop": kinds.Rprop(every, lr=rate),
        "lbfgs": kinds.LBFGS(model[:2].parameters(), lr=rate, max_iter=3, history_size=3),
        "fresh": kinds.Adam(every, lr=rate),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a scheduler is stepped before its optimizer
        schedulers = _schedulers(made)
    return {"model": model, **made, "schedulers": schedulers}


def _schedulers(made):
    sgd, adam = made["plain"], made["adamw"]
    warm_up = lr_scheduler.LinearLR(sgd, 0.1, total_iters=2)
    cosine = lr_scheduler.CosineAnnealingLR(sgd, T_max=9)
    return {
        "sequential": lr_scheduler.SequentialLR(sgd, [warm_up, cosine], milestones=[2]),
        "plateau": lr_scheduler.ReduceLROnPlateau(adam, patience=1),
        "step": lr_scheduler.StepLR(made["nadam"], 2),
        "lambda": lr_scheduler.LambdaLR(made["radam"], lambda epoch: 0.95**epoch),
        "one_cycle": lr_scheduler.OneCycleLR(made["adamax"], max_lr=0.1, total_steps=20),
        "restarts": lr_scheduler.CosineAnnealingWarmRestarts(made["rmsprop"], 4),
        "multi": lr_scheduler.MultiStepLR(made["adagrad"], [1, 1, 5]),
    }


def train_optimizers(objects):
    """Make two steps with each but the fresh one."""
    model = objects["model"]
    steppers = [v for k, v in objects.items() if k not in ("model", "fresh", "schedulers")]

    def loss():
        model.zero_grad()
        result = model(torch.ones(2, 3)).square().mean()
        result.backward()
        return result

    for _ in range(2):
        for optimizer in steppers:
            loss()
            if isinstance(optimizer, torch.optim.LBFGS):
                optimizer.step(loss)
            else:
                optimizer.step()
        for scheduler in objects["schedulers"].values():
            more = (1.0,) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else ()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                scheduler.step(*more)


# Shape, dtype and ranks of the tensors that are divided among ranks.
BORDERS = {
    "before_line": ((10,), torch.uint8, (0, 1)),
    "line": ((70_001,), torch.uint8, (0, 1)),
    "before_once": ((5_000,), torch.uint8, (1, 2)),
    "once": ((60_000,), torch.uint8, (1, 2)),
    "before_rows": ((3_000,), torch.int32, (0, 2)),
    "rows": ((8, 12_000), torch.int32, (0, 2)),
    "large": ((5, 22_500), torch.int32, (0, 1, 2)),
}


def replicated(seed, as_job):
    """Make what three ranks hold alike, and what each has of its own.

    ``module`` has a tensor for each rule of the format about where the border between the
    parts of two ranks lies, each held by other ranks: within the rows of ``large``, which
    have more than 64 KiB; between those of ``rows``, which have 47; at any element of
    ``line``; and not in ``once``, which has less than 64 KiB. The part of ``large`` on each
    rank has several blocks.
    """
    torch.manual_seed(seed)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 if seed == SAVED else 0.5)
    rank = dist.get_rank() if as_job else 0
    module = nn.Module()
    for name, (shape, dtype, holders) in BORDERS.items():
        if as_job and rank not in holders:
            continue
        count = math.prod(shape)
        tensor = (torch.arange(count) // (1 + count // 200)).to(dtype).view(shape)
        tensor = tensor if seed == SAVED else torch.zeros_like(tensor)
        # Ranks share the writing of parameters.
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    fresh = seed != SAVED
    torch.manual_seed(seed + rank)
    tracked = model
    if as_job:
        from torch.nn.parallel import DistributedDataParallel

        tracked = DistributedDataParallel(model)
    return {
        "model": tracked,
        "optimizer": optimizer,
        "module": module,
        "counts": {"epoch": 0 if fresh else 3, "samples": [] if fresh else [1, 2]},
        "loader": PerRank(Loader([] if fresh else [rank, rank + 10]), resize=divide),
        "rng": PerRank(RngState(), resize="by_rank"),
        "own": {
            "noise": PerRank(torch.rand(3), resize="by_rank"),
            "sum": PerRank(torch.full((2,), 1.0 + rank), resize=total),
            "none": PerRank(torch.empty(0, 2, dtype=torch.bfloat16), resize="by_rank"),
            "counts": PerRank({"seen": [torch.tensor(seed * 9 + rank)]}, resize="by_rank"),
            "state": PerRank(Stateful(), resize="by_rank"),
            "name": PerRank("" if fresh else f"rank {rank}", resize="by_rank"),
            "shared": 0 if fresh else 4,
        },
        "expert": PerRank(nn.Linear(2, 2), resize="by_rank"),
    }


def train_replicated(objects):
    """Make one step, the same on all ranks."""
    objects["model"](torch.linspace(-1, 1, 12).view(2, 6)).square().sum().backward()
    objects["optimizer"].step()
    objects["optimizer"].zero_grad()


def _net(seed, shard, width=10, foreach=None):
    torch.manual_seed(seed)
    model = Net(width)
    shard(model)
    rate = 0.1 if seed == SAVED else 0.5
    rank = dist.get_rank() if dist.is_initialized() else 0
    loader = Loader([rank] if seed == SAVED else [])
    return {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=rate, foreach=foreach),
        "loader": PerRank(loader, resize=divide),
        "step": torch.tensor(7 if seed == SAVED else 0),
    }


def fsdp(seed, as_job):
    """Make a model under FSDP2: on four ranks with uneven and with empty parts."""

    def shard(model):
        if as_job:
            from torch.distributed.fsdp import fully_shard

            fully_shard(model.first)
            fully_shard(model)

    return _net(seed, shard)


def fsdp_tied(seed, as_job):
    """Make a model with tied parameters under FSDP2, and a plain one beside it."""
    torch.manual_seed(seed)
    model, plain = Tied(), nn.Linear(3, 2)
    if as_job:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    rate = 0.1 if seed == SAVED else 0.5
    both = [*model.parameters(), *plain.parameters()]
    return {
        "model": model,
        "plain": plain,
        "optimizer": torch.optim.SGD(both, lr=rate, momentum=0.9, foreach=False),
        "rng": PerRank(RngState(), resize="by_rank"),
    }


def train_fsdp_tied(objects):
    """Make one step."""
    loss = objects["model"](torch.arange(6)).square().mean()
    (loss + objects["plain"](torch.ones(2, 3)).sum()).backward()
    objects["optimizer"].step()
    objects["optimizer"].zero_grad()


def hsdp(seed, as_job):
    """Make a model that two groups of two ranks hold, each in parts."""

    def shard(model):
        if as_job:
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
            fully_shard(model.first, mesh=mesh)
            fully_shard(model, mesh=mesh)

    return _net(seed, shard)


def _parallelize(model, mesh):
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    plan = {"first": ColwiseParallel(), "odd": RowwiseParallel()}
    parallelize_module(model, mesh, plan)


def tensor_parallel(seed, as_job):
    """Make a model that is cut by columns and by rows."""

    def shard(model):
        if as_job:
            _parallelize(model, init_device_mesh("cpu", (2,)))

    return _net(seed, shard, foreach=False)


def fsdp_over_tp(seed, as_job):
    """Make a model under FSDP2 over tensor parallelism: strided parts, uneven ones too."""

    def shard(model):
        if as_job:
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
            _parallelize(model, mesh["tensor"])
            fully_shard(model, mesh=mesh["data"])

    return _net(seed, shard, foreach=False)


def train_net(objects):
    """Make two steps on equal data."""
    for _ in range(2):
        objects["model"](torch.linspace(-1, 1, 12).view(2, 6)).square().sum().backward()
        objects["optimizer"].step()
        objects["optimizer"].zero_grad()


def meshes(seed, as_job):
    """Make tensors on meshes of all kinds, and what only some of four ranks have."""
    scattered = {
        "line rows": (7, 3),
        "line columns": (3, 7),
        "line replicated": (2, 2),
        "line empty": (0, 4),
        "grid both": (5, 6),
        "grid rows twice": (7, 2),
        "grid hybrid": (3, 3),
        "listed rows": (5, 2),
        "listed columns": (2, 4),
        "some": (3,),
        "tall": (4, 3),
        "copies": (5, 2),
    }
    fulls = {
        name: _patterned(torch.bfloat16 if "grid" in name else torch.float32, shape, seed)
        for name, shape in scattered.items()
    }
    made = fulls
    if as_job:
        made = _placed(fulls)
    stages = {
        str(index): nn.Linear(index + 1, 2)
        for index in range(4)
        if not as_job or index == dist.get_rank()
    }
    with torch.no_grad():
        for index, stage in stages.items():
            for parameter in stage.parameters():
                parameter.copy_(_patterned(torch.uint8, parameter.shape, seed + int(index)))
    return {"tensors": made, "stages": stages}


def _placed(fulls):
    line, grid = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    listed, some = DeviceMesh("cpu", [3, 0, 2]), DeviceMesh("cpu", [1, 3])
    tall = DeviceMesh("cpu", [[2], [0], [1], [3]])
    halves = [DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])]
    placed = {
        "line rows": (line, Shard(0)),
        "line columns": (line, Shard(1)),
        "line replicated": (line, Replicate()),
        "line empty": (line, Shard(0)),
        "grid both": (grid, Shard(1), Shard(0)),
        "grid rows twice": (grid, Shard(0), Shard(0)),
        "grid hybrid": (grid, Replicate(), Shard(0)),
        "listed rows": (listed, Shard(0)),
        "listed columns": (listed, Shard(1)),
        "some": (some, Shard(0)),
        "tall": (tall, Shard(0), Replicate()),
        # Each half of the ranks holds all of it, in two parts.
        "copies": (halves[dist.get_rank() // 2], Shard(0)),
    }
    made = {}
    for name, (mesh, *placements) in placed.items():
        part, coordinate = fulls[name], mesh.get_coordinate()
        if coordinate is None:
            made[name] = _from_local(part.flatten()[:0], fulls[name], mesh, placements)
            continue
        for mesh_dim, placement in enumerate(placements):
            if isinstance(placement, Shard):
                parts = part.chunk(mesh.shape[mesh_dim], placement.dim)
                at = coordinate[mesh_dim]
                empty = part.narrow(placement.dim, 0, 0)
                part = parts[at] if at < len(parts) else empty
        made[name] = _from_local(part.clone(), fulls[name], mesh, placements)
    return made


def _from_local(local, full, mesh, placements):
    layout = {"shape": full.shape, "stride": full.stride(), "run_check": False}
    return DTensor.from_local(local, mesh, placements, **layout)


def imported(seed, as_job):
    """Make what other programs' files were imported from."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 if seed == SAVED else 0.5)
    return {"model": model, "optimizer": optimizer}


def train_imported(objects):
    """Make one step."""
    objects["model"](torch.ones(2, 3)).sum().backward()
    objects["optimizer"].step()


def imported_module(seed, as_job):
    """Make what a file of weights alone was imported from."""
    return {"model": imported(seed, as_job)["model"]}


SAVED, LIVE = 1, 2  # seeds

BUILDERS = {
    "values": values,
    "classes": classes,
    "dtypes": dtypes,
    "modules": modules,
    "optimizers": optimizers,
    "replicated": replicated,
    "fsdp": fsdp,
    "fsdp-async": fsdp_tied,
    "hsdp": hsdp,
    "tensor-parallel": tensor_parallel,
    "fsdp-over-tp": fsdp_over_tp,
    "meshes": meshes,
    "imported-torch": imported,
    "imported-dcp": imported,
    "imported-safetensors": imported_module,
}
TRAINED = {
    "modules": train_modules,
    "optimizers": train_optimizers,
    "replicated": train_replicated,
    "fsdp": train_net,
    "fsdp-async": train_fsdp_tied,
    "hsdp": train_net,
    "tensor-parallel": train_net,
    "fsdp-over-tp": train_net,
    "imported-torch": train_imported,
    "imported-dcp": train_imported,
}


def build(case, seed, *, as_job):
    """Make the objects of a golden directory; by default a state of a few bytes."""
    return BUILDERS.get(case, small)(seed, as_job)


def train(case, objects):
    """Give the objects of a golden directory the state that training gives them."""
    if case in TRAINED:
        TRAINED[case](objects)
