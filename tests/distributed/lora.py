"""What the tests of adapters do on every rank: build the run's model frozen, with peft's low-rank adapters beside some of its matrices."""

from __future__ import annotations

from typing import Any

TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]


def with_lora(model: Any) -> Any:
    """The model with adapters, the same ones whatever was drawn before, and a persistent buffer in each layer, which counts."""
    import torch
    from peft import LoraConfig, get_peft_model

    def count(module: Any, *_: Any) -> None:
        module.calls += 1

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"))
    for name, module in wrapped.named_modules():
        if name.endswith(".self_attn"):
            module.register_buffer("calls", torch.zeros((), dtype=torch.int64))
            module.register_forward_pre_hook(count)
    return wrapped


def on_lora(act: Any, shift: float, rank: int, *args: Any) -> Any:
    """`act` on a run whose model has adapters, and whose frozen weights are moved by `shift`: what the restored ones must not be."""
    import torch

    from llm.train import build

    original = build.build_model

    def build_model(*arguments: Any, **options: Any) -> Any:
        model: Any = original(*arguments, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(shift)
        return with_lora(model)

    build.build_model = build_model
    return act(rank, *args)
