"""Names of a module's tensors that do not depend on how the module is wrapped.

DDP, ``torch.compile`` and activation checkpointing put prefixes into names. They are
removed by the wrapper's type, anywhere in the tree, so that a submodule that a user
happens to call ``module`` keeps its name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from distckpt.errors import UnsupportedError

# A state dict comes without this one, removed by the wrapper's own hook, while what is
# further inside still has its prefixes.
_CLEANED = "_checkpoint_wrapped_module"
# (module that defines the wrapper, class, attribute that holds the wrapped module).
# Looked up among what is imported already: importing torch._dynamo takes seconds.
_WRAPPERS = (
    (DistributedDataParallel.__module__, "DistributedDataParallel", "module"),
    (DataParallel.__module__, "DataParallel", "module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
        _CLEANED,
    ),
)
_REFUSED = (
    (
        "torch.distributed.fsdp.fully_sharded_data_parallel",
        "FullyShardedDataParallel",
        "FSDP1 (FullyShardedDataParallel) is not supported; use fully_shard (FSDP2).",
    ),
    (
        "torch.distributed.optim.zero_redundancy_optimizer",
        "ZeroRedundancyOptimizer",
        "ZeroRedundancyOptimizer is not supported: each rank holds another part of the "
        "state. Use fully_shard (FSDP2).",
    ),
)


# How torch lets DDP train what tensor parallelism has cut.
_LOCALIZING = "torch.distributed.tensor.parallel.ddp"
_LOCALIZED = (
    "tensor parallelism under DDP is not supported: torch hides the layout of the "
    "parameters from all but the forward pass, and each rank's part looks like the whole. "
    "Use fully_shard (FSDP2, or HSDP on a mesh of two dimensions) over tensor parallelism."
)


def check_supported(value: object, path: str) -> None:
    """Raise ``UnsupportedError`` for modules and optimizers that would be saved wrong."""
    members = value.modules() if isinstance(value, nn.Module) else (value,)
    kinds = {*map(type, members)}
    for module_name, class_name, reason in _REFUSED:
        refused = _class(module_name, class_name)
        if refused is not None and any(issubclass(kind, refused) for kind in kinds):
            msg = f"{path}: {reason}"
            raise UnsupportedError(msg)
    if isinstance(value, nn.Module) and _is_localized(value):
        msg = f"{path}: {_LOCALIZED}"
        raise UnsupportedError(msg)


def _is_localized(module: nn.Module) -> bool:
    """Tell whether DDP has replaced sharded parameters by local ones, anywhere inside.

    DDP puts its hooks into every module that it is given with a part of a mesh. Only what
    they have found there to replace tells whether there is tensor parallelism, too.
    """
    if _LOCALIZING not in sys.modules:
        return False
    if any(hasattr(parameter, "_st_info") for parameter in module.parameters()):
        return True
    # A forward pass leaves sharded tensors that are no parameters any more.
    return any(
        _is_a(tensor, "torch.distributed.tensor", "DTensor")
        for member in module.modules()
        if _has_localizing_hook(member)
        for inner in member.modules()
        for tensor in vars(inner).values()
    )


def _has_localizing_hook(module: nn.Module) -> bool:
    hook = getattr(sys.modules[_LOCALIZING], "_reconstruct_dtensor", None)
    return hook is not None and hook in module._forward_pre_hooks.values()


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside all wrappers around it."""
    attribute = _wrapped_attribute(module)
    while attribute is not None:
        module = getattr(module, attribute)
        attribute = _wrapped_attribute(module)
    return module


def wrappers(module: nn.Module) -> Iterator[nn.Module]:
    """Walk the wrappers around a module, from the outermost."""
    attribute = _wrapped_attribute(module)
    while attribute is not None:
        yield module
        module = getattr(module, attribute)
        attribute = _wrapped_attribute(module)


class CanonicalNames:
    """Maps the names that one (unwrapped) module uses to those without wrappers.

    Attributes:
        of_members: The same for the names of all modules in it.
    """

    def __init__(self, module: nn.Module) -> None:
        self.of_members = dict(_prefixes(module, "", ""))

    def __getitem__(self, raw_name: str) -> str:
        # The longest known prefix decides: hooks may have cleaned the name already.
        parent, _, leaf = raw_name.rpartition(".")
        rest = leaf
        while parent not in self.of_members:
            parent, _, part = parent.rpartition(".")
            rest = f"{part}.{rest}"
        prefix = self.of_members[parent]
        return f"{prefix}.{rest}" if prefix else rest


def parameters(members: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Return the parameters of some modules, tied ones again and again."""
    every = chain.from_iterable(member._parameters.values() for member in members)
    return [parameter for parameter in every if parameter is not None]


def buffers(members: Iterable[nn.Module]) -> list[torch.Tensor]:
    """Return the buffers likewise."""
    every = chain.from_iterable(member._buffers.values() for member in members)
    return [buffer for buffer in every if buffer is not None]


def named_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Walk the parameters by canonical name, tied ones under each of their names."""
    inner = unwrap(module)
    canonical = CanonicalNames(inner)
    for name, parameter in inner.named_parameters(remove_duplicate=False):
        yield canonical[name], parameter


def tensors_by_name(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers by canonical name, tied ones under each."""
    inner = unwrap(module)
    canonical = CanonicalNames(inner)
    found: dict[str, torch.Tensor] = dict(named_parameters(module))
    for name, buffer in inner.named_buffers(remove_duplicate=False):
        found[canonical[name]] = buffer
    return found


def _prefixes(module: nn.Module, raw: str, canonical: str) -> Iterator[tuple[str, str]]:
    yield raw, canonical
    wrapped = _wrapped_attribute(module)
    for name, child in module._modules.items():
        if child is not None:
            child_raw = f"{raw}.{name}" if raw else name
            if name != wrapped:
                child_canonical = f"{canonical}.{name}" if canonical else name
                yield from _prefixes(child, child_raw, child_canonical)
                continue
            yield from _prefixes(child, child_raw, canonical)
            if name == _CLEANED:
                yield from _prefixes(child, raw, canonical)


def _wrapped_attribute(module: nn.Module) -> str | None:
    for module_name, class_name, attribute in _WRAPPERS:
        if _is_a(module, module_name, class_name):
            return attribute
    return None


def _is_a(value: Any, module_name: str, class_name: str) -> bool:
    kind = _class(module_name, class_name)
    return kind is not None and isinstance(value, kind)


def _class(module_name: str, class_name: str) -> type | None:
    """Return a class if its module is imported: else nothing can be of it."""
    kind: type | None = getattr(sys.modules.get(module_name), class_name, None)
    return kind
