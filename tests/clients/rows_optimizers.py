"""Rows: every optimizer of torch.optim, and the ways in which one is set up."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from table import Bundle, Row, batch, fit, small_model
from torch import nn

LIBRARY = "torch.optim"


def _optimized(make: Callable[..., Any], seed: int, **settings: Any) -> Bundle:
    model = small_model(seed)
    settings = {key: _own(value) for key, value in settings.items()}
    return {"model": model, "optimizer": make(model.parameters(), **settings)}


def _own(value: Any) -> Any:
    """Give each optimizer a tensor of its own."""
    return value.clone() if isinstance(value, torch.Tensor) else value


def _row(name: str, make: Callable[..., Any], **settings: Any) -> Row:
    return Row(LIBRARY, name, lambda seed: _optimized(make, seed, **settings), fit)


# By class: what each variant is called, and its settings.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "Adadelta": {"": {}, "foreach": {"foreach": True}},
    "Adafactor": {"": {}, "foreach": {"foreach": True}},
    "Adagrad": {
        "": {"lr": 0.1},
        "foreach": {"lr": 0.1, "foreach": True},
        "fused": {"lr": 0.1, "fused": True},
        "initial value": {"lr": 0.1, "initial_accumulator_value": 0.5},
    },
    "Adam": {
        "": {"lr": 0.1},
        "amsgrad": {"lr": 0.1, "amsgrad": True},
        "fused": {"lr": 0.1, "fused": True},
        "decoupled": {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True},
    },
    "AdamW": {
        "": {"lr": 0.1},
        "one by one": {"lr": 0.1, "foreach": False},
        "foreach": {"lr": 0.1, "foreach": True},
        "foreach, amsgrad": {"lr": 0.1, "foreach": True, "amsgrad": True},
        "fused": {"lr": 0.1, "fused": True},
        "fused, amsgrad": {"lr": 0.1, "fused": True, "amsgrad": True},
        "maximize": {"lr": 0.1, "maximize": True},
        "lr is a tensor": {"lr": torch.tensor(0.1), "foreach": False},
        "lr is a tensor, fused": {"lr": torch.tensor(0.1), "fused": True},
    },
    "Adamax": {"": {}, "foreach": {"foreach": True}},
    "ASGD": {"": {"t0": 1.0, "lambd": 0.1}, "foreach": {"t0": 1.0, "foreach": True}},
    "NAdam": {"": {}, "foreach": {"foreach": True}},
    "RAdam": {"": {}, "decoupled": {"decoupled_weight_decay": True, "weight_decay": 0.1}},
    "RMSprop": {
        "": {"momentum": 0.5},
        "centered": {"centered": True, "momentum": 0.5},
        "lr is a tensor": {"lr": torch.tensor(0.1), "foreach": False},
    },
    "Rprop": {"": {}, "foreach": {"foreach": True}},
    "SGD": {
        "": {"lr": 0.1},
        "momentum": {"lr": 0.1, "momentum": 0.9},
        "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        "momentum, foreach": {"lr": 0.1, "momentum": 0.9, "foreach": True},
        "momentum, fused": {"lr": 0.1, "momentum": 0.9, "fused": True},
        "lr is a tensor": {"lr": torch.tensor(0.1), "momentum": 0.9, "foreach": False},
    },
}


def _muon(seed: int) -> Bundle:
    model = small_model(seed)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    optimizers = [torch.optim.Muon(matrices, lr=0.1), torch.optim.AdamW(others, lr=0.1)]
    return {"model": model, "optimizers": optimizers}


def _fit_with_several(bundle: Bundle, steps: range) -> list[torch.Tensor]:
    outputs = []
    optimizers = bundle["optimizers"]
    optimizers = [*optimizers.values()] if isinstance(optimizers, dict) else optimizers
    for step in steps:
        output = bundle["model"](batch(step, 4, 6))
        output.square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        outputs.append(output.detach())
    return outputs


def _lbfgs(seed: int, **settings: Any) -> Bundle:
    model = small_model(seed)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4, **settings)
    return {"model": model, "optimizer": optimizer}


def _fit_with_closure(bundle: Bundle, steps: range) -> list[torch.Tensor]:
    model, optimizer = bundle["model"], bundle["optimizer"]

    def closure(step: int) -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(batch(step, 4, 6)).square().mean()
        loss.backward()
        return loss

    return [optimizer.step(partial(closure, step)).detach() for step in steps]


def _sparse(seed: int) -> Bundle:
    torch.manual_seed(seed)
    model = nn.Embedding(10, 4, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.1)
    return {"model": model, "optimizer": optimizer}


def _fit_sparse(bundle: Bundle, steps: range) -> list[torch.Tensor]:
    model, optimizer = bundle["model"], bundle["optimizer"]
    outputs = []
    for step in steps:
        output = model(torch.tensor([step % 10, 3, 5]))
        optimizer.zero_grad()
        output.square().mean().backward()
        optimizer.step()
        outputs.append(output.detach())
    return outputs


def _grouped(seed: int) -> Bundle:
    """Groups of other settings, one of them empty, and a parameter that is frozen."""
    model = small_model(seed)
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [
            {"params": [model[0].weight], "lr": 0.1, "betas": (0.5, 0.9)},
            {"params": [model[2].bias, model[0].bias], "lr": 0.01, "name": "second"},
            {"params": []},
        ],
        lr=0.3,
    )
    optimizer.add_param_group({"params": [model[2].weight], "weight_decay": 0.2})
    return {"model": model, "optimizer": optimizer}


def _named(seed: int) -> Bundle:
    model = small_model(seed)
    return {"model": model, "optimizer": torch.optim.AdamW(model.named_parameters(), 0.1)}


def _low_precision(seed: int) -> Bundle:
    """Moments of another dtype than the parameters, which torch's own load rounds."""
    model = small_model(seed).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)
    for parameter in model.parameters():
        zeros = torch.zeros_like(parameter, dtype=torch.float32)
        optimizer.state[parameter] = {
            "step": torch.tensor(0.0),
            "exp_avg": zeros,
            "exp_avg_sq": zeros.clone(),
        }
    return {"model": model, "optimizer": optimizer}


def _fit_low_precision(bundle: Bundle, steps: range) -> list[torch.Tensor]:
    model, optimizer = bundle["model"], bundle["optimizer"]
    outputs = []
    for step in steps:
        output = model(batch(step, 4, 6).bfloat16())
        optimizer.zero_grad()
        output.float().square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                state = optimizer.state[parameter]
                state["step"] += 1
                state["exp_avg"].lerp_(parameter.grad.float(), 0.1)
                state["exp_avg_sq"].lerp_(parameter.grad.float().square(), 0.1)
                parameter -= 0.1 * state["exp_avg"].sign().bfloat16()
        outputs.append(output.detach())
    return outputs


def _bfloat16(seed: int) -> Bundle:
    model = small_model(seed).bfloat16()
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.1)}


def _fit_bfloat16(bundle: Bundle, steps: range) -> list[torch.Tensor]:
    return fit({**bundle, "model": lambda x: bundle["model"](x.bfloat16())}, steps)


def _complex(seed: int) -> Bundle:
    torch.manual_seed(seed)
    model = nn.Linear(6, 3, dtype=torch.complex64)
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.1)}


def _fit_complex(bundle: Bundle, steps: range) -> list[torch.Tensor]:
    model = bundle["model"]
    return fit({**bundle, "model": lambda x: torch.view_as_real(model(x.cfloat()))}, steps)


def _channels_last(seed: int) -> Bundle:
    torch.manual_seed(seed)
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return {"model": model, "optimizer": optimizer, "_shape": (2, 3, 5, 5)}


def _with_hooks(seed: int) -> Bundle:
    """State-dict hooks that save something more, and take it back."""
    model = small_model(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.seen = seed

    def saving(one: Any, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "seen": one.seen}

    def loading(one: Any, state: dict[str, Any]) -> None:
        one.seen = state["seen"]

    optimizer.register_state_dict_post_hook(saving)
    optimizer.register_load_state_dict_pre_hook(loading)
    return {"model": model, "optimizer": optimizer}


def _with_load_post_hook(seed: int) -> Bundle:
    """A hook after the load that computes something of the state."""
    model = small_model(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.norms = []

    def loaded(one: Any) -> None:
        one.norms = [s["momentum_buffer"].norm() for s in one.state.values()]

    optimizer.register_load_state_dict_post_hook(loaded)
    return {"model": model, "optimizer": optimizer}


def _several(seed: int) -> Bundle:
    model = small_model(seed)
    return {
        "model": model,
        "optimizers": {
            "first": torch.optim.AdamW(model[0].parameters(), lr=0.1),
            "second": torch.optim.SGD(model[2].parameters(), lr=0.1, momentum=0.9),
        },
    }


_adamw = partial(_optimized, torch.optim.AdamW, lr=0.1)

ROWS = [
    *(
        _row(f"{kind}{variant and ', '}{variant}", getattr(torch.optim, kind), **settings)
        for kind, variants in VARIANTS.items()
        for variant, settings in variants.items()
        if hasattr(torch.optim, kind)
    ),
    Row(LIBRARY, "Muon and AdamW, in a list", _muon, _fit_with_several),
    Row(LIBRARY, "two in a dict", _several, _fit_with_several),
    Row(LIBRARY, "LBFGS", _lbfgs, _fit_with_closure),
    Row(
        LIBRARY,
        "LBFGS, strong_wolfe",
        partial(_lbfgs, line_search_fn="strong_wolfe"),
        _fit_with_closure,
    ),
    Row(LIBRARY, "SparseAdam", _sparse, _fit_sparse),
    Row(LIBRARY, "AdamW, groups, one empty, one frozen", _grouped, fit),
    Row(LIBRARY, "AdamW of named parameters", _named, fit),
    Row(LIBRARY, "AdamW before its first step", lambda seed: _adamw(seed), fit, before=0),
    Row(LIBRARY, "AdamW into one that has state", lambda seed: _adamw(seed), fit, warm=2),
    Row(
        LIBRARY,
        "AdamW without state into one that has some",
        lambda seed: _adamw(seed),
        fit,
        before=0,
        warm=2,
    ),
    Row(LIBRARY, "AdamW, bfloat16", _bfloat16, _fit_bfloat16),
    Row(
        LIBRARY,
        "float32 moments of bfloat16 parameters (as saved, torch's own load rounds)",
        _low_precision,
        _fit_low_precision,
        exact=True,
    ),
    Row(LIBRARY, "AdamW, complex", _complex, _fit_complex),
    Row(LIBRARY, "AdamW, channels last", _channels_last, fit),
    Row(LIBRARY, "SGD, hooks save and load more", _with_hooks, fit),
    Row(LIBRARY, "SGD, a hook after the load", _with_load_post_hook, fit),
]
