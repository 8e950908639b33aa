"""Rows: torchdata, torchmetrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from table import Bundle, Row, batch, seeded
from torch import nn

from distckpt import PerRank

# torchdata: the same data for all, of which the seed changes the order only.


def _loader(seed: int, **settings: Any) -> Bundle:
    from torchdata.stateful_dataloader import StatefulDataLoader

    loader = StatefulDataLoader(
        torch.arange(120).reshape(60, 2), batch_size=3, generator=seeded(seed), **settings
    )
    return {"loader": PerRank(loader)}


def _loader_with_sampler(seed: int) -> Bundle:
    from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

    data = torch.arange(120).reshape(60, 2)
    sampler = StatefulDistributedSampler(data, num_replicas=2, rank=1, seed=seed)
    return _loader(seed, sampler=sampler)


class Stream(torch.utils.data.IterableDataset):
    """Data with state of its own."""

    def __init__(self, seed: int) -> None:
        self.generator, self.number = seeded(seed), 0

    def __iter__(self) -> Any:
        while True:
            self.number += 1
            yield torch.randn(2, generator=self.generator) + self.number

    def state_dict(self) -> Any:
        return {"number": self.number, "generator": self.generator.get_state()}

    def load_state_dict(self, state: Any) -> None:
        self.number = state["number"]
        self.generator.set_state(state["generator"])


def _stream(seed: int) -> Bundle:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return {"loader": PerRank(StatefulDataLoader(Stream(seed), batch_size=3))}


def _next_batches(bundle: Bundle, steps: range) -> list[torch.Tensor]:
    loader = bundle["loader"].value
    if "_iterator" not in bundle:
        bundle["_iterator"] = iter(loader)
    return [next(bundle["_iterator"]) for _ in steps]


def _nodes(seed: int) -> Bundle:
    from torchdata.nodes import Batcher, Loader, MapStyleWrapper
    from torchdata.stateful_dataloader.sampler import RandomSampler

    data = torch.arange(60)
    sampler = RandomSampler(data, generator=seeded(seed))
    node = Batcher(MapStyleWrapper(map_dataset=data, sampler=sampler), batch_size=4)
    return {"loader": PerRank(Loader(node))}


# torchmetrics


def _metric(make: Callable[[Any], Any]) -> Callable[[int], Bundle]:
    def bundle(seed: int) -> Bundle:
        import torchmetrics

        return {"metric": make(torchmetrics)}

    return bundle


def _persistent(metric: Any) -> Any:
    metric.persistent(True)
    return metric


def _update(bundle: Bundle, steps: range) -> list[torch.Tensor]:
    metric = bundle["metric"]
    outputs = []
    for step in steps:
        metric.update(batch(step, 8).sigmoid(), batch(step + 100, 8) > 0)
        computed = metric.compute()
        outputs += computed.values() if isinstance(computed, dict) else [computed]
    return [torch.as_tensor(output) for output in outputs]


def _update_with_values(bundle: Bundle, steps: range) -> list[torch.Tensor]:
    metric = bundle["metric"]
    outputs = []
    for step in steps:
        metric.update(batch(step, 4))
        outputs.append(metric.compute().clone())
    return outputs


class Module(nn.Module):
    """A model that has a metric inside, as in Lightning."""

    def __init__(self) -> None:
        import torchmetrics

        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.mean = _persistent(torchmetrics.MeanMetric())
        self.other = torchmetrics.MeanMetric()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.linear(x)
        self.mean.update(output)
        self.other.update(output)
        return output + self.mean.compute()


def _inside(seed: int) -> Bundle:
    torch.manual_seed(seed)
    return {"model": Module()}


def _compute(bundle: Bundle, steps: range) -> list[torch.Tensor]:
    return [bundle["model"](batch(step, 4, 6)).detach() for step in steps]


ROWS = [
    Row("torchdata", "StatefulDataLoader", _loader, _next_batches),
    Row(
        "torchdata",
        "StatefulDataLoader, shuffled",
        lambda seed: _loader(seed, shuffle=True),
        _next_batches,
        lazy=True,
    ),
    Row(
        "torchdata",
        "StatefulDataLoader, shuffled, 2 workers",
        lambda seed: _loader(seed, shuffle=True, num_workers=2),
        _next_batches,
        lazy=True,
    ),
    Row(
        "torchdata",
        "StatefulDataLoader, distributed sampler",
        _loader_with_sampler,
        _next_batches,
    ),
    Row("torchdata", "StatefulDataLoader of a stream with state", _stream, _next_batches),
    Row("torchdata", "nodes.Loader", _nodes, _next_batches),
    Row(
        "torchmetrics", "MeanMetric", _metric(lambda m: m.MeanMetric()), _update_with_values
    ),
    Row(
        "torchmetrics",
        "MeanMetric, persistent",
        _metric(lambda m: _persistent(m.MeanMetric())),
        _update_with_values,
    ),
    Row(
        "torchmetrics",
        "CatMetric, persistent (a list)",
        _metric(lambda m: _persistent(m.CatMetric())),
        _update_with_values,
    ),
    Row(
        "torchmetrics",
        "AUROC, persistent (lists)",
        _metric(lambda m: _persistent(m.AUROC(task="binary"))),
        _update,
    ),
    Row(
        "torchmetrics",
        "Accuracy, persistent",
        _metric(lambda m: _persistent(m.Accuracy(task="binary"))),
        _update,
    ),
    Row(
        "torchmetrics",
        "MetricCollection, persistent",
        _metric(
            lambda m: _persistent(
                m.MetricCollection([m.Accuracy(task="binary"), m.AUROC(task="binary")])
            )
        ),
        _update,
    ),
    Row("torchmetrics", "metrics inside of a model", _inside, _compute),
]
