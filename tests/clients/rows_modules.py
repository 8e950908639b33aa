"""Rows: modules with buffers, hooks, extra state, parametrizations and observers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from table import Bundle, Row, fit, fit_on, forward, tokens
from torch import nn
from torch.nn.utils import parametrizations, prune

LIBRARY = "torch.nn"


def _trained(make: Callable[[], nn.Module], **more: Any) -> Callable[[int], Bundle]:
    """Return what makes a module of a seed, and an optimizer of its parameters."""

    def bundle(seed: int) -> Bundle:
        torch.manual_seed(seed)
        model = make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return {"model": model, "optimizer": optimizer, **more}

    return bundle


def _alone(make: Callable[[], nn.Module], **more: Any) -> Callable[[int], Bundle]:
    """Return what makes a module of a seed."""

    def bundle(seed: int) -> Bundle:
        torch.manual_seed(seed)
        return {"model": make(), **more}

    return bundle


def _tokens_shape(vocabulary: int, *shape: int) -> Callable[..., list[torch.Tensor]]:
    def train(bundle: Bundle, steps: range) -> list[torch.Tensor]:
        return fit_on(
            bundle, steps, lambda model, step: model(tokens(step, vocabulary, shape))
        )

    return train


# Buffers


class Buffers(nn.Module):
    """Buffers of all kinds: saved or not, None, a view, counted up."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6))
        self.register_buffer("scale", torch.rand(3))
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("table", torch.arange(3.0), persistent=False)
        self.register_buffer("none", None)
        self.register_buffer("first", self.scale[:1])
        self.factor = 2.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.scale.mul_(0.9)
        return (x @ self.weight.T) * self.scale + self.table * self.factor + self.calls


class ListsAndTies(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.listed = nn.ParameterList([torch.randn(6, 6), torch.randn(6, 6)])
        self.named = nn.ParameterDict({"a/b": torch.randn(6)})
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.layers[1].weight = self.layers[0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x @ self.listed[0] @ self.listed[1] + self.named["a/b"]
        return self.layers[1](self.layers[0](x))


# Extra state


class Extra(nn.Module):
    """Extra state, as its class says."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.linear(x) * self.calls


class ExtraDict(Extra):
    def get_extra_state(self) -> Any:
        return {"calls": self.calls, "history": [self.calls, None, (1, 2.5)]}

    def set_extra_state(self, state: Any) -> None:
        self.calls = state["calls"]


class ExtraTensor(Extra):
    def get_extra_state(self) -> Any:
        return torch.tensor([self.calls])

    def set_extra_state(self, state: Any) -> None:
        self.calls = int(state)


class ExtraNone(Extra):
    def get_extra_state(self) -> Any:
        return self.calls or None

    def set_extra_state(self, state: Any) -> None:
        self.calls = state or 0


class ExtraThatGrows(Extra):
    """As TransformerEngine's: bytes in a tensor, empty before the first pass."""

    def get_extra_state(self) -> Any:
        return torch.full((16 if self.calls else 0,), self.calls, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        self.calls = int(state[0]) if state.numel() else 0


# Hooks and overridden methods


class Fused(nn.Module):
    """Saves one tensor in place of three, and divides it when it is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))
        self.register_state_dict_post_hook(self._fuse)
        self.register_load_state_dict_pre_hook(self._divide)

    @staticmethod
    def _fuse(module: Any, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        parts = [state.pop(f"{prefix}{name}.weight") for name in "qkv"]
        state[f"{prefix}qkv.weight"] = torch.cat([part.detach() for part in parts])

    @staticmethod
    def _divide(module: Any, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
        parts = state.pop(f"{prefix}qkv.weight").chunk(3)
        state.update({f"{prefix}{n}.weight": p for n, p in zip("qkv", parts, strict=True)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x) * self.k(x) + self.v(x)


class FusedOnLoad(nn.Module):
    """Saves three tensors, and joins them when they are loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)
        self.register_state_dict_post_hook(self._divide)
        self.register_load_state_dict_pre_hook(self._fuse)

    @staticmethod
    def _divide(module: Any, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        parts = state.pop(f"{prefix}qkv.weight").chunk(3)
        state.update({f"{prefix}{n}.weight": p for n, p in zip("qkv", parts, strict=True)})

    @staticmethod
    def _fuse(module: Any, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
        parts = [state.pop(f"{prefix}{name}.weight") for name in "qkv"]
        state[f"{prefix}qkv.weight"] = torch.cat(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.qkv(x)


class Packed(nn.Module):
    """Keeps a packed form of its weight, made anew by a hook after the load."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6), requires_grad=False)
        self.pack()
        self.register_load_state_dict_post_hook(lambda module, keys: module.pack())

    def pack(self) -> None:
        self.packed = self.weight.detach().half()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.half() @ self.packed


class LoadsItself(nn.Module):
    """Overrides ``_load_from_state_dict``; its buffer is as large as it was saved."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.register_buffer("seen", torch.zeros(0, 6))
        self.loads = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = torch.cat([self.seen, x.detach()[:1]])
        return self.linear(x) + self.seen.sum()

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        self.seen = torch.empty_like(state[f"{prefix}seen"])
        self.loads += 1
        super()._load_from_state_dict(state, prefix, *rest)


class SavesMore(nn.Module):
    """Saves an entry that its own load does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.factor = torch.rand(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.factor

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}factor"] = self.factor.clone()


class OwnStateDict(nn.Module):
    """Has a state dict of its own, of other names and with a plain value."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 3)
        self.epoch = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.epoch += 1
        return self.inner(x) * self.epoch

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {"weights": self.inner.state_dict(), "epoch": self.epoch}

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        self.epoch = state["epoch"]
        return self.inner.load_state_dict(state["weights"], strict, assign)


class OwnLoadOnly(nn.Module):
    """Has a ``load_state_dict`` of its own, which computes something of the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 3)
        self.norm = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) / self.norm

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        answer = super().load_state_dict(state, strict, assign)
        self.norm = float(self.inner.weight.norm())
        return answer


class Versioned(nn.Module):
    """Reads the version of its class from the state dict's metadata."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.loaded_version = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * (1 + self.loaded_version)

    def _load_from_state_dict(
        self, state: Any, prefix: str, metadata: Any, *rest: Any
    ) -> None:
        self.loaded_version = metadata.get("version", 1)
        super()._load_from_state_dict(state, prefix, metadata, *rest)


class Assigned(nn.Module):
    """Keeps a reference to its weight under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.cache = {"weight": self.linear.weight, "view": self.linear.weight.detach()[:1]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.cache["view"].sum() + self.cache["weight"].sum()


# Parametrizations, pruning


def _pruned() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.random_unstructured(model[1], "bias", 0.4)
    return model


def _weight_norm_of_old() -> nn.Module:
    from torch.nn.utils.weight_norm import weight_norm

    return nn.Sequential(weight_norm(nn.Linear(6, 5)), nn.Linear(5, 3))


# Observers of torch.ao


def _quantized(make_module: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(6, 4), make_module())


def _fake(**settings: Any) -> nn.Module:
    from torch.ao.quantization import FakeQuantize

    return FakeQuantize(**settings)


def _per_channel() -> nn.Module:
    from torch.ao.quantization import PerChannelMinMaxObserver

    return _fake(
        observer=PerChannelMinMaxObserver,
        quant_min=-128,
        quant_max=127,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
        ch_axis=1,
    )


def _observer(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torch.ao.quantization

        return getattr(torch.ao.quantization, name)()

    return make


def _qat_model() -> nn.Module:
    from torch.ao import quantization

    model = nn.Sequential(
        quantization.QuantStub(),
        nn.Conv1d(6, 4, 1),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        quantization.DeQuantStub(),
    )
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.fuse_modules_qat(model, [["1", "2", "3"]], inplace=True)
    return quantization.prepare_qat(model)


def _dynamically_quantized() -> nn.Module:
    from torch.ao import quantization

    torch.backends.quantized.engine = "fbgemm"
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    return quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)


# Wrapped


def _scripted() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    return torch.jit.script(model)


def _compiled() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    return torch.compile(model, backend="eager")


def _checkpointed() -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        checkpoint_wrapper,
    )

    return nn.Sequential(checkpoint_wrapper(nn.Linear(6, 5)), nn.Linear(5, 3))


class ExpectsTuple(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)[0]


_IMAGE = {"_shape": (4, 6, 5)}

ROWS = [
    Row(LIBRARY, "buffers: not saved, None, a view", _trained(Buffers), fit),
    Row(LIBRARY, "lists, dicts and ties of parameters", _trained(ListsAndTies), fit),
    Row(
        LIBRARY,
        "BatchNorm1d",
        _trained(
            lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
        ),
        fit,
    ),
    Row(
        LIBRARY,
        "BatchNorm1d of a cumulative average",
        _trained(lambda: nn.BatchNorm1d(6, momentum=None)),
        fit,
    ),
    Row(
        LIBRARY,
        "SyncBatchNorm",
        lambda seed: {
            **_alone(
                lambda: nn.SyncBatchNorm.convert_sync_batchnorm(
                    nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
                ).eval()
            )(seed)
        },
        forward,
    ),
    Row(
        LIBRARY,
        "InstanceNorm1d with statistics",
        _trained(
            lambda: nn.InstanceNorm1d(6, affine=True, track_running_stats=True), **_IMAGE
        ),
        fit,
    ),
    Row(
        LIBRARY,
        "MultiheadAttention",
        _trained(
            lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), _shape=(2, 4, 6)
        ),
        fit,
    ),
    Row(
        LIBRARY,
        "LSTM, two layers, both directions",
        _trained(
            lambda: ExpectsTuple(nn.LSTM(6, 4, 2, bidirectional=True)), _shape=(3, 2, 6)
        ),
        fit,
    ),
    Row(
        LIBRARY,
        "Embedding with max_norm, EmbeddingBag",
        _trained(lambda: nn.Sequential(nn.Embedding(20, 6, max_norm=1.0), nn.Linear(6, 3))),
        _tokens_shape(20, 2, 5),
    ),
    Row(
        LIBRARY,
        "LazyLinear into one that was used",
        _alone(lambda: nn.LazyLinear(3)),
        forward,
        warm=1,
    ),
    Row(
        LIBRARY,
        "LazyLinear into a fresh one",
        _alone(lambda: nn.LazyLinear(3)),
        forward,
        expected="model.*(initialized|lazy|Uninitialized)",
    ),
    Row(
        LIBRARY,
        "LazyLinear before its first use",
        _alone(lambda: nn.LazyLinear(3)),
        forward,
        before=0,
        expected="model.*(initialized|lazy|Uninitialized)",
    ),
    Row(LIBRARY, "extra state: a dict", _trained(ExtraDict), fit),
    Row(LIBRARY, "extra state: a tensor", _trained(ExtraTensor), fit),
    Row(LIBRARY, "extra state: None at first", _trained(ExtraNone), fit),
    Row(LIBRARY, "extra state: None", _trained(ExtraNone), fit, before=0, warm=2),
    Row(LIBRARY, "extra state: a tensor that grows", _trained(ExtraThatGrows), fit),
    Row(LIBRARY, "hooks: q, k and v saved as one", _trained(Fused), fit),
    Row(LIBRARY, "hooks: fused qkv saved as three", _trained(FusedOnLoad), fit),
    Row(LIBRARY, "hook after the load packs the weight", _alone(Packed), forward),
    Row(LIBRARY, "own _load_from_state_dict, buffer grows", _trained(LoadsItself), fit),
    Row(LIBRARY, "own _load_from_state_dict reads the version", _trained(Versioned), fit),
    Row(
        LIBRARY,
        "saves an entry that it does not load",
        _trained(SavesMore),
        fit,
        expected="factor",
    ),
    Row(LIBRARY, "own state_dict and load_state_dict", _alone(OwnStateDict), forward),
    Row(LIBRARY, "own load_state_dict", _trained(OwnLoadOnly), fit),
    Row(LIBRARY, "keeps references to its weight", _trained(Assigned), fit),
    Row(
        LIBRARY,
        "weight_norm of nn.utils (the older)",
        _trained(_weight_norm_of_old),
        fit,
    ),
    Row(
        LIBRARY,
        "parametrizations.weight_norm",
        _trained(lambda: parametrizations.weight_norm(nn.Linear(6, 3))),
        fit,
    ),
    Row(
        LIBRARY,
        "spectral_norm of nn.utils (the older)",
        _trained(lambda: nn.utils.spectral_norm(nn.Linear(6, 3))),
        fit,
    ),
    Row(
        LIBRARY,
        "parametrizations.spectral_norm",
        _trained(lambda: parametrizations.spectral_norm(nn.Linear(6, 3))),
        fit,
    ),
    Row(
        LIBRARY,
        "parametrizations.orthogonal",
        _trained(lambda: parametrizations.orthogonal(nn.Linear(6, 3))),
        fit,
    ),
    Row(LIBRARY, "pruning", _trained(_pruned), fit),
    Row(LIBRARY, "torch.jit.script", _trained(_scripted), fit),
    Row(LIBRARY, "torch.compile", _trained(_compiled), fit),
    Row(LIBRARY, "activation checkpointing", _trained(_checkpointed), fit),
    Row(
        LIBRARY,
        "DataParallel",
        _trained(lambda: nn.DataParallel(nn.Linear(6, 3))),
        fit,
    ),
    Row(
        LIBRARY, "MinMaxObserver", _alone(_quantized(_observer("MinMaxObserver"))), forward
    ),
    Row(
        LIBRARY,
        "MovingAverageMinMaxObserver",
        _alone(_quantized(_observer("MovingAverageMinMaxObserver"))),
        forward,
    ),
    Row(
        LIBRARY,
        "PerChannelMinMaxObserver",
        _alone(_quantized(_observer("PerChannelMinMaxObserver"))),
        forward,
    ),
    Row(
        LIBRARY,
        "HistogramObserver",
        _alone(_quantized(_observer("HistogramObserver"))),
        forward,
    ),
    Row(LIBRARY, "FakeQuantize", _trained(_quantized(_fake)), fit),
    Row(LIBRARY, "FakeQuantize, per channel", _trained(_quantized(_per_channel)), fit),
    Row(
        LIBRARY,
        "prepare_qat: conv, norm and relu fused",
        _trained(_qat_model, **_IMAGE),
        fit,
    ),
    Row(
        LIBRARY,
        "quantize_dynamic",
        _alone(_dynamically_quantized),
        forward,
        expected=r"_packed_params.*qint8",
    ),
]
