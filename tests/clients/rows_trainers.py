"""Rows: torchtitan's containers, Lightning's Fabric, Trainer and callbacks."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from table import Bundle, Row, batch, fit, small_model
from torch import nn

# torchtitan


def _part(seed: int, number: int) -> nn.Module:
    """Make a part of a model, whose names are its own."""
    layers = small_model(seed + 10 * number)
    return nn.Sequential(OrderedDict((f"{number}_{i}", m) for i, m in enumerate(layers)))


def _titan(seed: int, parts: int = 1, **settings: Any) -> Bundle:
    from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
    from torchtitan.components.optimizer.lr_scheduler import LRSchedulersContainer

    models = [_part(seed, number) for number in range(parts)]
    groups = [
        ParamGroupConfig(
            pattern="bias$", optimizer_name="Adam", optimizer_kwargs={"lr": 0.02}
        ),
        ParamGroupConfig(
            pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 0.1, **settings}
        ),
    ]
    config = OptimizersContainer.Config(param_groups=groups, implementation="for-loop")
    optimizer = OptimizersContainer(config, model_parts=models)
    scheduler_config = LRSchedulersContainer.Config(warmup_steps=2, total_steps=10)
    scheduler = scheduler_config.build(optimizers=optimizer, training_steps=10)
    model = models[0] if parts == 1 else models
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler}


def _fit_parts(bundle: Bundle, steps: range) -> list[torch.Tensor]:
    outputs = []
    for step in steps:
        output = sum(model(batch(step, 4, 6)) for model in bundle["model"])
        bundle["optimizer"].zero_grad()
        output.square().mean().backward()
        bundle["optimizer"].step()
        bundle["scheduler"].step()
        outputs.append(output.detach())
    return outputs


# Lightning Fabric


def _fabric(seed: int) -> Bundle:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    inner = small_model(seed)
    model, optimizer = fabric.setup(inner, torch.optim.AdamW(inner.parameters(), lr=0.1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer.optimizer, 2, 0.5)
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "_fabric": fabric,
    }


def _fit_with_fabric(bundle: Bundle, steps: range) -> list[torch.Tensor]:
    outputs = []
    for step in steps:
        output = bundle["model"](batch(step, 4, 6))
        bundle["optimizer"].zero_grad()
        bundle["_fabric"].backward(output.square().mean())
        bundle["optimizer"].step()
        bundle["scheduler"].step()
        outputs.append(output.detach().clone())
    return outputs


def _fabric_inner(seed: int) -> Bundle:
    """Track what was given to ``setup``, as docs/migrating.md says."""
    bundle = _fabric(seed)
    return {
        "model": bundle["model"].module,
        "optimizer": bundle["optimizer"].optimizer,
        "scheduler": bundle["scheduler"],
        "_model": bundle["model"],
        "_optimizer": bundle["optimizer"],
        "_fabric": bundle["_fabric"],
    }


def _fit_inner(bundle: Bundle, steps: range) -> list[torch.Tensor]:
    wrapped = {"model": bundle["_model"], "optimizer": bundle["_optimizer"]}
    return _fit_with_fabric({**bundle, **wrapped}, steps)


# Lightning's module, loops and callbacks


def _lightning(seed: int) -> Bundle:
    import lightning
    from lightning.pytorch.callbacks import EarlyStopping

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small_model(seed)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    model = Module()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return {"model": model, "optimizer": optimizer, "stopping": EarlyStopping("loss")}


def _fit_lightning(bundle: Bundle, steps: range) -> list[torch.Tensor]:
    outputs = fit(bundle, steps)
    for output in outputs:
        bundle["stopping"]._evaluate_stopping_criteria(output.square().mean())
    return outputs


ROWS = [
    Row(
        "torchtitan", "OptimizersContainer, LRSchedulersContainer", lambda s: _titan(s), fit
    ),
    Row(
        "torchtitan", "the same of two parts of a model", lambda s: _titan(s, 2), _fit_parts
    ),
    Row("torchtitan", "the same, amsgrad", lambda s: _titan(s, amsgrad=True), fit),
    Row(
        "torchtitan", "the same into ones that have state", lambda s: _titan(s), fit, warm=2
    ),
    Row("lightning", "Fabric: what setup returned", _fabric, _fit_with_fabric),
    Row("lightning", "Fabric: what setup was given", _fabric_inner, _fit_inner),
    Row("lightning", "LightningModule, EarlyStopping", _lightning, _fit_lightning),
]
