"""Rows: transformers, peft, accelerate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from table import Bundle, Row, batch, fit_on, small_model, tokens

from distckpt import PerRank

VOCABULARY = 50
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 4, "intermediate_size": 24, "max_position_embeddings": 32}


def llama(**settings: Any) -> Any:
    """Make a tiny Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(**_SIZES, **_HEADS, num_key_value_heads=2, **settings)
    )


def _tied_llama() -> Any:
    return llama(tie_word_embeddings=True)


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=32,
            n_embd=16,
            n_layer=2,
            n_head=4,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def _bert() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**_SIZES, **_HEADS))


def _t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=4,
            d_ff=24,
            num_layers=1,
            num_heads=4,
            decoder_start_token_id=0,
        )
    )


def mixtral(**settings: Any) -> Any:
    """Make a tiny Mixtral: a mixture of four experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            **_SIZES,
            **_HEADS,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            **settings,
        )
    )


def _adamw(model: Any) -> Any:
    return torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01
    )


def _of(make: Callable[[], Any], optimizer: Callable[[Any], Any] = _adamw) -> Any:
    def bundle(seed: int) -> Bundle:
        torch.manual_seed(seed)
        model = make()
        model.train()
        return {"model": model, "optimizer": optimizer(model)}

    return bundle


def _compute(model: Any, step: int) -> torch.Tensor:
    batch = tokens(step, VOCABULARY)
    return model(batch, labels=batch).logits


def fit_language(bundle: Bundle, steps: range) -> list[torch.Tensor]:
    """Train a language model."""
    return fit_on(bundle, steps, _compute)


def _with_schedule(seed: int) -> Bundle:
    from transformers import get_cosine_schedule_with_warmup
    from transformers.optimization import Adafactor

    torch.manual_seed(seed)
    model = llama()
    optimizer = Adafactor(model.parameters(), lr=0.01, relative_step=False, beta1=0.9)
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": get_cosine_schedule_with_warmup(optimizer, 2, 10),
    }


# peft


def _peft(kind: str, **settings: Any) -> Callable[[], Any]:
    def make() -> Any:
        import peft

        config = getattr(peft, kind)(task_type="CAUSAL_LM", **settings)
        return peft.get_peft_model(llama(), config)

    return make


def _two_adapters() -> Any:
    import peft

    model = _peft("LoraConfig", target_modules=["q_proj"], r=2)()
    model.add_adapter("second", peft.LoraConfig(target_modules=["v_proj"], r=3))
    model.set_adapter("second")
    return model


_TARGETS = {"target_modules": ["q_proj", "v_proj"]}


# accelerate


def _prepared(seed: int, stateful: bool = False) -> Bundle:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DataLoaderConfiguration

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    accelerator = Accelerator(
        cpu=True,
        dataloader_config=DataLoaderConfiguration(use_stateful_dataloader=stateful),
    )
    model = small_model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    data = torch.utils.data.TensorDataset(batch(seed, 40, 6))
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
    objects = accelerator.prepare(model, optimizer, scheduler, loader)
    bundle = dict(zip(("model", "optimizer", "scheduler", "loader"), objects, strict=True))
    loader = bundle.pop("loader")
    if stateful:
        # The data, too, are to be those of the saved objects.
        bundle["data"], bundle["loader"] = data.tensors[0], PerRank(loader)
    else:
        bundle["_loader"] = loader
    return {**bundle, "_accelerator": accelerator, "_iterator": None}


def _fit_prepared(bundle: Bundle, steps: range) -> list[torch.Tensor]:
    model, optimizer = bundle["model"], bundle["optimizer"]
    loader = bundle["loader"].value if "loader" in bundle else None
    outputs = []
    for step in steps:
        if loader is None:
            data = batch(step, 4, 6)
        else:
            if bundle["_iterator"] is None:
                bundle["_iterator"] = iter(loader)
            (data,) = next(bundle["_iterator"])
        output = model(data)
        bundle["_accelerator"].backward(output.square().mean())
        optimizer.step()
        bundle["scheduler"].step()
        optimizer.zero_grad()
        outputs.append(output.detach().clone())
    return outputs


ROWS = [
    Row("transformers", "Llama", _of(llama), fit_language),
    Row("transformers", "Llama, tied", _of(_tied_llama), fit_language),
    Row("transformers", "GPT-2 (tied, dropout)", _of(_gpt2), fit_language),
    Row("transformers", "BERT (tied, dropout)", _of(_bert), fit_language),
    Row("transformers", "T5 (shared embedding)", _of(_t5), fit_language),
    Row("transformers", "Mixtral (four experts)", _of(mixtral), fit_language),
    Row(
        "transformers",
        "Llama, bfloat16",
        _of(lambda: llama().bfloat16()),
        fit_language,
    ),
    Row(
        "transformers",
        "its Adafactor and cosine schedule",
        _with_schedule,
        fit_language,
    ),
    Row("peft", "LoRA", _of(_peft("LoraConfig", r=2, **_TARGETS)), fit_language),
    Row(
        "peft",
        "LoRA, modules_to_save",
        _of(_peft("LoraConfig", r=2, modules_to_save=["lm_head"], **_TARGETS)),
        fit_language,
    ),
    Row(
        "peft",
        "DoRA",
        _of(_peft("LoraConfig", r=2, use_dora=True, **_TARGETS)),
        fit_language,
    ),
    Row("peft", "two adapters", _of(_two_adapters), fit_language),
    Row(
        "peft",
        "VeRA",
        _of(_peft("VeraConfig", r=2, target_modules=["q_proj"])),
        fit_language,
    ),
    Row(
        "peft",
        "IA3",
        _of(
            _peft(
                "IA3Config",
                feedforward_modules=["down_proj"],
                target_modules=["k_proj", "down_proj"],
            )
        ),
        fit_language,
    ),
    Row(
        "peft",
        "prompt tuning",
        _of(_peft("PromptTuningConfig", num_virtual_tokens=3)),
        fit_language,
    ),
    Row(
        "accelerate",
        "prepared model, optimizer, scheduler",
        lambda seed: _prepared(seed),
        _fit_prepared,
    ),
    Row(
        "accelerate",
        "the same with a prepared StatefulDataLoader",
        lambda seed: _prepared(seed, stateful=True),
        _fit_prepared,
    ),
]
