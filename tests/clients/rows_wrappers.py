"""Rows: optimizers around optimizers, of several libraries and of widespread code."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from table import Bundle, Row, batch, fit, small_model
from torch import nn

LIBRARY = "wrappers of optimizers"


# schedulefree


def _schedule_free(name: str, **settings: Any) -> Callable[[int], Bundle]:
    def bundle(seed: int) -> Bundle:
        import schedulefree

        model = small_model(seed)
        optimizer = getattr(schedulefree, name)(model.parameters(), lr=0.1, **settings)
        optimizer.train()
        return {"model": model, "optimizer": optimizer}

    return bundle


def _schedule_free_closure(seed: int) -> Bundle:
    import schedulefree

    model = small_model(seed)
    optimizer = schedulefree.AdamWScheduleFreeClosure(model.parameters(), lr=0.1)
    return {"model": model, "optimizer": optimizer}


def _fit_with_closure(bundle: Bundle, steps: range) -> list[torch.Tensor]:
    optimizer = bundle["optimizer"]
    outputs = []
    for step in steps:

        def closure(step: int = step) -> torch.Tensor:
            optimizer.zero_grad()
            loss = bundle["model"](batch(step, 4, 6)).square().mean()
            loss.backward()
            return loss

        outputs.append(optimizer.step(closure).detach())
    return outputs


def _schedule_free_wrapper(base: str, **settings: Any) -> Callable[[int], Bundle]:
    def bundle(seed: int) -> Bundle:
        import schedulefree

        model = small_model(seed)
        inner = getattr(torch.optim, base)(model.parameters(), lr=0.1, **settings)
        optimizer = schedulefree.ScheduleFreeWrapper(inner, momentum=0.9)
        optimizer.train()
        return {"model": model, "optimizer": optimizer}

    return bundle


def _schedule_free_reference(seed: int) -> Bundle:
    import schedulefree

    model = small_model(seed)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = schedulefree.ScheduleFreeWrapperReference(inner, momentum=0.9)
    optimizer.train()
    return {"model": model, "optimizer": optimizer}


def _fit_and_evaluate(bundle: Bundle, steps: range) -> list[torch.Tensor]:
    """Train, and end in evaluation mode, in which the weights are others."""
    bundle["optimizer"].train()
    outputs = fit(bundle, steps)
    bundle["optimizer"].eval()
    return outputs


# timm


def _timm(name: str) -> Any:
    """Import a module of ``timm.optim`` without ``timm``, which needs torchvision."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        msg = "No module named 'timm'"
        raise ImportError(msg)
    folder = Path(spec.origin).parent
    packages = {"timm": folder, "timm.optim": folder / "optim"}
    for package, path in packages.items():
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(path)]
    try:
        return importlib.import_module(f"timm.optim.{name}")
    finally:
        # Else others take them for the whole of timm.
        for package in packages:
            del sys.modules[package]


def _lookahead(base: Callable[..., Any], **settings: Any) -> Callable[[int], Bundle]:
    def bundle(seed: int) -> Bundle:
        model = small_model(seed)
        inner = base(model.parameters(), lr=0.1, **settings)
        return {"model": model, "optimizer": _timm("lookahead").Lookahead(inner, k=2)}

    return bundle


def _of_timm(name: str, **settings: Any) -> Callable[[int], Bundle]:
    def bundle(seed: int) -> Bundle:
        model = small_model(seed)
        kind = getattr(_timm(name.lower()), name)
        return {"model": model, "optimizer": kind(model.parameters(), lr=0.1, **settings)}

    return bundle


# SAM, as davda54's


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization, as widespread: with an optimizer inside."""

    def __init__(self, params: Any, base: Any, rho: float = 0.05, **settings: Any) -> None:
        super().__init__(params, {"rho": rho, **settings})
        self.base_optimizer = base(self.param_groups, **settings)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def first_step(self) -> None:
        norm = torch.stack(
            [p.grad.norm() for group in self.param_groups for p in group["params"]]
        ).norm()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["old_p"] = parameter.detach().clone()
                parameter.add_(parameter.grad * group["rho"] / (norm + 1e-12))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data = self.state[parameter]["old_p"]
        self.base_optimizer.step()
        self.zero_grad()

    def step(self, closure: Any = None) -> Any:
        raise NotImplementedError

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self.base_optimizer.param_groups = self.param_groups


def _sam(base: Any, **settings: Any) -> Callable[[int], Bundle]:
    def bundle(seed: int) -> Bundle:
        model = small_model(seed)
        return {"model": model, "optimizer": SAM(model.parameters(), base, **settings)}

    return bundle


def _sam_and_base(seed: int) -> Bundle:
    bundle = _sam(torch.optim.AdamW, lr=0.1)(seed)
    return {**bundle, "inner_optimizer": bundle["optimizer"].base_optimizer}


def _fit_with_sam(bundle: Bundle, steps: range) -> list[torch.Tensor]:
    model, optimizer = bundle["model"], bundle["optimizer"]
    outputs = []
    for step in steps:
        output = model(batch(step, 4, 6))
        output.square().mean().backward()
        optimizer.first_step()
        model(batch(step, 4, 6)).square().mean().backward()
        optimizer.second_step()
        outputs.append(output.detach())
    return outputs


# Lookahead as in many repositories: state of its own, under keys of its own


class Lookahead(torch.optim.Optimizer):
    """Lookahead as in many repositories: its state dict has the slow weights beside."""

    def __init__(self, optimizer: Any, k: int = 2, alpha: float = 0.5) -> None:
        self.optimizer, self.k, self.alpha, self.counter = optimizer, k, alpha, 0
        super().__init__(optimizer.param_groups, {})
        self.param_groups = optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self.optimizer.step(closure)
        self.counter += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                slow = self.state[parameter].setdefault("slow", parameter.detach().clone())
                if self.counter % self.k == 0:
                    slow.lerp_(parameter, self.alpha)
                    parameter.copy_(slow)
        return loss

    def state_dict(self) -> Any:
        slow = [
            self.state[parameter].get("slow")
            for group in self.param_groups
            for parameter in group["params"]
        ]
        return {"fast": self.optimizer.state_dict(), "slow": slow, "counter": self.counter}

    def load_state_dict(self, state_dict: Any) -> None:
        self.optimizer.load_state_dict(state_dict["fast"])
        self.param_groups = self.optimizer.param_groups
        self.counter = state_dict["counter"]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for parameter, slow in zip(parameters, state_dict["slow"], strict=True):
            if slow is not None:
                self.state[parameter]["slow"] = slow.clone()


def _own_lookahead(seed: int) -> Bundle:
    model = small_model(seed)
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return {"model": model, "optimizer": Lookahead(inner)}


class Container(torch.optim.Optimizer):
    """One optimizer of several, whose own state is empty."""

    def __init__(self, optimizers: list[Any]) -> None:
        self.optimizers = optimizers
        super().__init__(
            [p for o in optimizers for g in o.param_groups for p in g["params"]], {}
        )

    def step(self, closure: Any = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> Any:
        return {str(i): o.state_dict() for i, o in enumerate(self.optimizers)}

    def load_state_dict(self, state_dict: Any) -> None:
        for index, optimizer in enumerate(self.optimizers):
            optimizer.load_state_dict(state_dict[str(index)])


def _container(seed: int) -> Bundle:
    model = small_model(seed)
    parts = [
        torch.optim.AdamW(model[0].parameters(), lr=0.1),
        torch.optim.SGD(model[2].parameters(), lr=0.1, momentum=0.9),
    ]
    return {"model": model, "optimizer": Container(parts)}


class OwnState(torch.optim.Optimizer):
    """Keeps what it needs in attributes, and says so by ``__getstate__`` of its dicts."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.seen = 0
        self.mean = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.seen += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["lr"] / self.seen * parameter.grad
        self.mean = group["params"][0].mean()

    def state_dict(self) -> Any:
        return {**super().state_dict(), "seen": self.seen, "mean": self.mean}

    def load_state_dict(self, state_dict: Any) -> None:
        state = dict(state_dict)
        self.seen, self.mean = state.pop("seen"), state.pop("mean")
        super().load_state_dict(state)


def _own_state(seed: int) -> Bundle:
    model = small_model(seed)
    return {"model": model, "optimizer": OwnState(model.parameters())}


# torch.distributed.optim


def _post_local(seed: int) -> Bundle:
    from torch.distributed.algorithms.model_averaging.averagers import (
        PeriodicModelAverager,
    )
    from torch.distributed.optim import PostLocalSGDOptimizer

    model = small_model(seed)
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    averager = PeriodicModelAverager(period=2, warmup_steps=1)
    return {"model": model, "optimizer": PostLocalSGDOptimizer(inner, averager)}


def _zero(seed: int) -> Bundle:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = small_model(seed)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.1)
    return {"model": model, "optimizer": optimizer}


def _named(seed: int) -> Bundle:
    from torch.distributed.optim import _NamedOptimizer

    model = small_model(seed)
    optimizer = _NamedOptimizer(model.named_parameters(), torch.optim.AdamW, lr=0.1)
    return {"model": model, "optimizer": optimizer}


def _fit_named(bundle: Bundle, steps: range) -> list[torch.Tensor]:
    """Train without the optimizer's own ``zero_grad``, which fails."""
    model, optimizer = bundle["model"], bundle["optimizer"]
    outputs = []
    for step in steps:
        output = model(batch(step, 4, 6))
        model.zero_grad()
        output.square().mean().backward()
        optimizer.step()
        outputs.append(output.detach())
    return outputs


def _distributed(seed: int) -> Bundle:
    model = nn.parallel.DistributedDataParallel(small_model(seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return {"model": model, "optimizer": optimizer}


def _sharded(seed: int) -> Bundle:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = small_model(seed)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.1)}


class AppState:
    """As in the tutorial of DCP: what ``get_state_dict`` says."""

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> Any:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: Any) -> None:
        from torch.distributed.checkpoint.state_dict import set_state_dict

        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )


def _app_state(seed: int) -> Bundle:
    model = small_model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return {"app": AppState(model, optimizer)}


def _fit_app(bundle: Bundle, steps: range) -> list[torch.Tensor]:
    return fit({"model": bundle["app"].model, "optimizer": bundle["app"].optimizer}, steps)


ROWS = [
    *(
        Row("schedulefree", f"{name}, {mode}", _schedule_free(name, **settings), train)
        for name, settings in (
            ("AdamWScheduleFree", {"warmup_steps": 2}),
            ("SGDScheduleFree", {"momentum": 0.9}),
            ("RAdamScheduleFree", {}),
        )
        for mode, train in (("train", fit), ("eval", _fit_and_evaluate))
    ),
    Row(
        "schedulefree",
        "AdamWScheduleFreeClosure",
        _schedule_free_closure,
        _fit_with_closure,
    ),
    Row("schedulefree", "wrapper of SGD, train", _schedule_free_wrapper("SGD"), fit),
    Row(
        "schedulefree",
        "wrapper of SGD, eval",
        _schedule_free_wrapper("SGD"),
        _fit_and_evaluate,
    ),
    # Of one with momentum, too. With AdamW or RMSprop inside, the wrapper itself fails.
    Row(
        "schedulefree",
        "wrapper of SGD with momentum",
        _schedule_free_wrapper("SGD", momentum=0.5),
        fit,
    ),
    Row("schedulefree", "reference wrapper of SGD", _schedule_free_reference, fit),
    Row("timm", "Lookahead of AdamW", _lookahead(torch.optim.AdamW), fit),
    Row("timm", "Lookahead of SGD", _lookahead(torch.optim.SGD, momentum=0.9), fit),
    *(
        Row("timm", name, _of_timm(name), fit)
        for name in ("Lamb", "Lion", "Adan", "MADGRAD", "Lars", "NAdamW", "AdaBelief")
    ),
    Row(LIBRARY, "SAM of SGD", _sam(torch.optim.SGD, lr=0.1), _fit_with_sam),
    Row(
        LIBRARY,
        "SAM of SGD with momentum",
        _sam(torch.optim.SGD, lr=0.1, momentum=0.9),
        _fit_with_sam,
        expected=r"base_optimizer: SGD\), whose state its state_dict\(\) does not have",
    ),
    Row(
        LIBRARY,
        "SAM of AdamW",
        _sam(torch.optim.AdamW, lr=0.1),
        _fit_with_sam,
        expected=r"base_optimizer: AdamW\), whose state its state_dict\(\) does not have",
    ),
    Row(LIBRARY, "SAM of AdamW, both tracked", _sam_and_base, _fit_with_sam),
    Row(LIBRARY, "Lookahead, own state dict", _own_lookahead, fit),
    Row(LIBRARY, "a container of two", _container, fit),
    Row(LIBRARY, "state in attributes, own state dict", _own_state, fit),
    Row("torch.distributed", "DDP", _distributed, fit, ranks=True),
    Row("torch.distributed", "fully_shard (FSDP2)", _sharded, fit, ranks=True),
    Row("torch.distributed", "PostLocalSGDOptimizer", _post_local, fit, ranks=True),
    Row(
        "torch.distributed",
        "ZeroRedundancyOptimizer",
        _zero,
        fit,
        ranks=True,
        expected="optimizer: ZeroRedundancyOptimizer is not supported",
    ),
    Row("torch.distributed", "_NamedOptimizer", _named, _fit_named, warm=1),
    Row("torch.distributed", "AppState of DCP's tutorial", _app_state, _fit_app),
]
