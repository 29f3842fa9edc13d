"""Which parameters get which optimizer settings."""

from __future__ import annotations

from typing import Any

from torch import nn

from llm.config_train import TrainSection
from llm.model.mup import kinds_of_matrices, width_ratio


def param_groups(model: nn.Module, train: TrainSection, mup_base_width: int | None = None) -> list[dict[str, Any]]:
    """Matrices with weight decay, vectors (norms, biases) without. `peak_lr` is the learning rate that the schedule's factor scales.

    With `mup_base_width`, of a transformers model, the matrices whose rate follows the width (llm/model/mup.py) are a group of their own.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    scaled: set[str] = set()
    ratio = 1.0
    if mup_base_width is not None:
        scaled = {name for name, kind in kinds_of_matrices(model).items() if kind != "embedding"}
        ratio = width_ratio(model, mup_base_width)
    groups = [
        {
            "params": [p for name, p in parameters.items() if name in scaled],
            "weight_decay": train.weight_decay * ratio,
            "lr": train.lr / ratio,
        },
        {
            "params": [p for name, p in parameters.items() if p.dim() >= 2 and name not in scaled],
            "weight_decay": train.weight_decay,
            "lr": train.lr,
        },
        {"params": [p for p in parameters.values() if p.dim() < 2], "weight_decay": 0.0, "lr": train.lr},
    ]
    return [{**group, "peak_lr": group["lr"]} for group in groups if group["params"]]
