"""Rows: torchao, bitsandbytes: state and weights of few bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from table import Bundle, Row, fit, forward, seeded
from torch import nn

# From 4,096 elements on these libraries keep the state in few bits.
_WIDTH = 64
_SHAPE = {"_shape": (4, _WIDTH)}


def _wide(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(_WIDTH, _WIDTH), nn.Tanh(), nn.Linear(_WIDTH, _WIDTH))


def _torchao(
    name: str, dtype: torch.dtype = torch.float32, **settings: Any
) -> Callable[[int], Bundle]:
    def bundle(seed: int) -> Bundle:
        import torchao.optim

        model = _wide(seed).to(dtype)
        optimizer = getattr(torchao.optim, name)(model.parameters(), lr=0.01, **settings)
        return {"model": model, "optimizer": optimizer, **_SHAPE}

    return bundle


def _fit_uncompiled(bundle: Bundle, steps: range) -> list[torch.Tensor]:
    """Train without compiling the optimizer's step, which takes a minute."""
    with torch.compiler.set_stance("force_eager"):
        return fit(bundle, steps)


def _fit_uncompiled_bfloat16(bundle: Bundle, steps: range) -> list[torch.Tensor]:
    inner = bundle["model"]
    return _fit_uncompiled({**bundle, "model": lambda x: inner(x.bfloat16())}, steps)


def _quantized(config: str, group: int = 0, **settings: Any) -> Callable[[int], Bundle]:
    def bundle(seed: int) -> Bundle:
        import torchao.quantization
        from torchao.quantization.granularity import PerGroup

        model = _wide(seed).bfloat16()
        if group:
            settings["weight_granularity"] = PerGroup(group)
        chosen = getattr(torchao.quantization, config)(**settings)
        torchao.quantization.quantize_(model, chosen)
        return {"model": model, "_shape": (4, _WIDTH)}

    return bundle


def _forward_bfloat16(bundle: Bundle, steps: range) -> list[torch.Tensor]:
    return forward({**bundle, "model": lambda x: bundle["model"](x.bfloat16())}, steps)


def _int4(seed: int) -> Bundle:
    """Weights as torchao packs them for kernels that this machine lacks."""
    from torchao.quantization import Int4Tensor

    model = nn.Sequential(nn.Linear(_WIDTH, _WIDTH))
    generator = seeded(seed)
    weight = Int4Tensor(
        torch.randint(-128, 127, (_WIDTH, _WIDTH // 2), generator=generator).to(torch.int8),
        torch.randn(2, _WIDTH, generator=generator).bfloat16(),
        torch.randn(2, _WIDTH, generator=generator).bfloat16(),
        [1, 32],
        torch.Size([_WIDTH, _WIDTH]),
    )
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    return {"model": model}


def _unpacked(bundle: Bundle, steps: range) -> list[torch.Tensor]:
    weight = bundle["model"][0].weight
    return [weight.qdata.clone(), weight.scale.clone(), weight.zero_point.clone()]


def _nf4(seed: int) -> Bundle:
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    model = _wide(seed)
    for layer in (model[0], model[2]):
        weight = to_nf4(layer.weight.detach(), block_size=32, scaler_block_size=32)
        layer.weight = nn.Parameter(weight, requires_grad=False)
    return {"model": model, **_SHAPE}


def _forward_nf4(bundle: Bundle, steps: range) -> list[torch.Tensor]:
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import linear_nf4

    first, second = bundle["model"][0], bundle["model"][2]

    def compute(x: torch.Tensor) -> torch.Tensor:
        middle = torch.tanh(linear_nf4(x, first.weight) + first.bias)
        return linear_nf4(middle, second.weight) + second.bias

    return forward({**bundle, "model": compute}, steps)


def _int8_trained(seed: int) -> Bundle:
    from torchao.prototype.quantized_training import int8_weight_only_quantized_training
    from torchao.quantization import quantize_

    model = _wide(seed)
    quantize_(model, int8_weight_only_quantized_training())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
    return {"model": model, "optimizer": optimizer, **_SHAPE}


def _qat_quantizer(seed: int) -> Bundle:
    from torchao.quantization.qat import Int8DynActInt4WeightQATQuantizer

    model = Int8DynActInt4WeightQATQuantizer(groupsize=32).prepare(_wide(seed))
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters()), **_SHAPE}


def _qat_config(seed: int) -> Bundle:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    model = _wide(seed)
    config = QATConfig(
        activation_config=IntxFakeQuantizeConfig(
            torch.int8, "per_token", is_symmetric=False
        ),
        weight_config=IntxFakeQuantizeConfig(torch.int4, group_size=32),
        step="prepare",
    )
    quantize_(model, config)
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters()), **_SHAPE}


def _bitsandbytes(name: str, **settings: Any) -> Callable[[int], Bundle]:
    def bundle(seed: int) -> Bundle:
        import bitsandbytes

        model = _wide(seed)
        kind = getattr(bitsandbytes.optim, name)
        optimizer = kind(model.parameters(), **{"lr": 0.01, **settings})
        return {"model": model, "optimizer": optimizer, **_SHAPE}

    return bundle


def _layer(name: str, **settings: Any) -> Callable[[int], Bundle]:
    def bundle(seed: int) -> Bundle:
        import bitsandbytes

        torch.manual_seed(seed)
        layer = getattr(bitsandbytes.nn, name)(_WIDTH, _WIDTH, **settings)
        # Moved, even to where it is, its weight is quantized.
        return {"model": nn.Sequential(layer).to("cpu"), **_SHAPE}

    return bundle


def _stable_embedding(seed: int) -> Bundle:
    import bitsandbytes

    torch.manual_seed(seed)
    model = nn.Sequential(bitsandbytes.nn.StableEmbedding(80, _WIDTH))
    optimizer = bitsandbytes.optim.Adam8bit(model.parameters(), lr=0.01)
    return {"model": model, "optimizer": optimizer}


def _fit_embedding(bundle: Bundle, steps: range) -> list[torch.Tensor]:
    inner = bundle["model"]
    return fit({**bundle, "_shape": (4,), "model": lambda x: inner(x.long().abs())}, steps)


def _qlora(seed: int) -> Bundle:
    """LoRA beside a base of four bits: what QLoRA trains."""
    import bitsandbytes
    import peft

    torch.manual_seed(seed)
    base = nn.Sequential(
        bitsandbytes.nn.Linear4bit(_WIDTH, _WIDTH, compute_dtype=torch.float32), nn.Tanh()
    ).to("cpu")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    return {"model": model, "optimizer": torch.optim.AdamW(trained, lr=0.01), **_SHAPE}


ROWS = [
    *(
        Row(
            "torchao",
            name,
            _torchao(name),
            _fit_uncompiled,
        )
        for name in ("AdamW8bit", "AdamW4bit", "AdamWFp8", "Adam8bit", "Adam4bit")
    ),
    Row(
        "torchao",
        "AdamW8bit, bfloat16",
        _torchao("AdamW8bit", dtype=torch.bfloat16),
        _fit_uncompiled_bfloat16,
    ),
    Row(
        "torchao",
        "AdamW8bit into one that has state",
        _torchao("AdamW8bit"),
        _fit_uncompiled,
        warm=2,
    ),
    *(
        Row("torchao", name, _quantized(config, **settings), _forward_bfloat16)
        for name, config, settings in (
            ("int8 weights", "Int8WeightOnlyConfig", {}),
            (
                "int8 weights and activations",
                "Int8DynamicActivationInt8WeightConfig",
                {},
            ),
            ("float8 weights", "Float8WeightOnlyConfig", {}),
            ("int4 weights (intx)", "IntxWeightOnlyConfig", {"weight_dtype": torch.int4}),
            (
                "int8 activations, int4 weights (intx)",
                "Int8DynamicActivationIntxWeightConfig",
                {"weight_dtype": torch.int4, "group": 32},
            ),
        )
    ),
    Row("torchao", "int4 weights (Int4Tensor), not computed with", _int4, _unpacked),
    Row("torchao", "NF4 weights", _nf4, _forward_nf4),
    Row("torchao", "int8 weights that are trained", _int8_trained, fit),
    Row("torchao", "QAT by a quantizer", _qat_quantizer, fit),
    Row("torchao", "QAT by QATConfig", _qat_config, fit),
    *(
        Row("bitsandbytes", name, _bitsandbytes(name), fit)
        for name in ("AdamW8bit", "Adam8bit", "AdamW", "Lion8bit", "RMSprop8bit")
    ),
    Row("bitsandbytes", "SGD8bit", _bitsandbytes("SGD8bit", momentum=0.9), fit),
    Row("bitsandbytes", "PagedAdamW8bit", _bitsandbytes("PagedAdamW8bit"), fit),
    Row("bitsandbytes", "AdEMAMix8bit", _bitsandbytes("AdEMAMix8bit"), fit),
    Row("bitsandbytes", "StableEmbedding, Adam8bit", _stable_embedding, _fit_embedding),
    Row(
        "bitsandbytes",
        "Linear4bit, NF4",
        _layer("Linear4bit", quant_type="nf4", compute_dtype=torch.float32),
        forward,
        expected=r"weight\.(absmax|quant|nested)",
    ),
    Row(
        "bitsandbytes",
        "Linear4bit, FP4, not nested",
        _layer(
            "Linear4bit",
            quant_type="fp4",
            compress_statistics=False,
            compute_dtype=torch.float32,
        ),
        forward,
        expected=r"weight\.(absmax|quant|nested)",
    ),
    Row(
        "bitsandbytes",
        "Linear8bitLt, weights of eight bits",
        _layer("Linear8bitLt", has_fp16_weights=False),
        forward,
    ),
    Row(
        "bitsandbytes", "Linear8bitLt, weights of sixteen", _layer("Linear8bitLt"), forward
    ),
    Row(
        "bitsandbytes",
        "LoRA beside Linear4bit (QLoRA)",
        _qlora,
        fit,
        expected=r"weight\.(absmax|quant|nested)",
    ),
]
