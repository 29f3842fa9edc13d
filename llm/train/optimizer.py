"""Which parameters get which optimizer settings."""

from __future__ import annotations

from typing import Any

from torch import nn

from llm.config import TrainSection


def param_groups(model: nn.Module, train: TrainSection) -> list[dict[str, Any]]:
    """Matrices with weight decay, vectors (norms, biases) without. `peak_lr` is the learning rate that the schedule's factor scales."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [{**group, "lr": train.lr, "peak_lr": train.lr} for group in groups if group["params"]]
