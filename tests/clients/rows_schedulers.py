"""Rows: every scheduler of torch, the gradient scaler, averaged models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from table import Bundle, Row, batch, fit, small_model
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

LIBRARY = "torch schedulers, scaler, averages"


class Warmup:
    """A factor of the learning rate that has state of its own."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, epoch: int) -> float:
        self.calls += 1
        return 1 / (1 + self.calls)


MAKERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda epoch: 0.9**epoch),
    "LambdaLR of an object with state": lambda o: schedulers.LambdaLR(o, Warmup()),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 4, 4], 0.5),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.1, total_iters=5),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o,
        [schedulers.LinearLR(o, 0.1, total_iters=2), schedulers.ExponentialLR(o, 0.9)],
        [2],
    ),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 8, 2.0),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 5),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.StepLR(o, 2), schedulers.ExponentialLR(o, 0.9)], o
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, 2),
    "CyclicLR, own function": lambda o: schedulers.CyclicLR(
        o, 0.01, 0.1, 2, scale_fn=lambda cycle: 0.5**cycle
    ),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.2, total_steps=10),
    "SWALR": lambda o: SWALR(o, 0.05, 3),
}


def _scheduled(make: Callable[[Any], Any], seed: int, lr: Any = 0.1) -> Bundle:
    model = small_model(seed)
    lr = lr.clone() if isinstance(lr, torch.Tensor) else lr
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, foreach=False)
    return {"model": model, "optimizer": optimizer, "scheduler": make(optimizer)}


def _scaled(seed: int) -> Bundle:
    model = small_model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    return {"model": model, "optimizer": optimizer, "scaler": scaler}


def _fit_scaled(bundle: Bundle, steps: range) -> list[torch.Tensor]:
    optimizer, scaler = bundle["optimizer"], bundle["scaler"]
    outputs = []
    for step in steps:
        output = bundle["model"](batch(step, 4, 6))
        optimizer.zero_grad()
        scaler.scale(output.square().mean()).backward()
        if step == 1:
            bundle["model"][0].weight.grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
        outputs.append(torch.tensor(scaler.get_scale()))
    return outputs


def _averaged(seed: int, **settings: Any) -> Bundle:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    return {
        "model": model,
        "averaged": AveragedModel(model, **settings),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    }


def _fit_averaged(bundle: Bundle, steps: range) -> list[torch.Tensor]:
    outputs = []
    for step in steps:
        outputs += fit(bundle, range(step, step + 1))
        bundle["averaged"].update_parameters(bundle["model"])
        outputs.append(bundle["averaged"](batch(step, 4, 6)).detach())
    return outputs


ROWS = [
    *(
        Row(LIBRARY, name, lambda seed, make=make: _scheduled(make, seed), fit)
        for name, make in MAKERS.items()
    ),
    Row(
        LIBRARY,
        "LambdaLR, lr is a tensor",
        lambda seed: _scheduled(MAKERS["LambdaLR"], seed, torch.tensor(0.1)),
        fit,
    ),
    Row(LIBRARY, "GradScaler", _scaled, _fit_scaled),
    Row(LIBRARY, "AveragedModel", _averaged, _fit_averaged),
    Row(
        LIBRARY,
        "AveragedModel, EMA with buffers",
        lambda seed: _averaged(
            seed, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True
        ),
        _fit_averaged,
    ),
]
