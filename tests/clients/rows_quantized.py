"""Rows: torchao, bitsandbytes: state and weights of few bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from table import Bundle, Row, fit, forward
from torch import nn

# From 4,096 elements on these libraries keep the state in few bits.
_WIDTH = 64
_SHAPE = {"_shape": (4, _WIDTH)}


def _wide(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(_WIDTH, _WIDTH), nn.Tanh(), nn.Linear(_WIDTH, _WIDTH))


def _torchao(name: str, **settings: Any) -> Callable[[int], Bundle]:
    def bundle(seed: int) -> Bundle:
        import torchao.optim

        model = _wide(seed)
        optimizer = getattr(torchao.optim, name)(model.parameters(), lr=0.01, **settings)
        return {"model": model, "optimizer": optimizer, **_SHAPE}

    return bundle


def _fit_uncompiled(bundle: Bundle, steps: range) -> list[torch.Tensor]:
    """Train without compiling the optimizer's step, which takes a minute."""
    with torch.compiler.set_stance("force_eager"):
        return fit(bundle, steps)


def _quantized(config: str, **settings: Any) -> Callable[[int], Bundle]:
    def bundle(seed: int) -> Bundle:
        import torchao.quantization

        model = _wide(seed).bfloat16()
        chosen = getattr(torchao.quantization, config)(**settings)
        torchao.quantization.quantize_(model, chosen)
        return {"model": model, "_shape": (4, _WIDTH)}

    return bundle


def _forward_bfloat16(bundle: Bundle, steps: range) -> list[torch.Tensor]:
    return forward({**bundle, "model": lambda x: bundle["model"](x.bfloat16())}, steps)


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
            expected=r"optimizer/state/.*exp_avg",
        )
        for name in ("AdamW8bit", "AdamW4bit", "AdamWFp8", "Adam8bit")
    ),
    Row(
        "torchao",
        "int8 weights",
        _quantized("Int8WeightOnlyConfig"),
        _forward_bfloat16,
        expected=r"model/0\.weight",
    ),
    Row(
        "torchao",
        "int8 weights and activations",
        _quantized("Int8DynamicActivationInt8WeightConfig"),
        _forward_bfloat16,
        expected=r"model/0\.weight",
    ),
    Row(
        "torchao",
        "float8 weights",
        _quantized("Float8WeightOnlyConfig"),
        _forward_bfloat16,
        expected=r"model/0\.weight",
    ),
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
