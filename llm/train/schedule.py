"""Learning rate by step, as a factor of the peak. Pure.

All schedules warm up linearly over `warmup_steps` and reach the peak at step `warmup_steps - 1`; step numbers count from 0.

- `constant`: stays there.
- `linear`, `cosine`: fall to `min_lr_frac` at the last step.
- `wsd`: warm-up, stable, decay: stays at the peak until the last `decay_frac` of the steps, then falls linearly to `min_lr_frac`
  (Hu et al., "MiniCPM", 2024, section 4). The stable part does not depend on the number of steps, so a run can be prolonged.
"""

from __future__ import annotations

import math

from llm.config import TrainSection


def lr_factor(train: TrainSection, step: int) -> float:
    """The factor on the peak learning rate for step 0, 1, ..., steps - 1. In (0, 1]; at the end `min_lr_frac`."""
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return 1.0
    first = train.warmup_steps
    if train.schedule == "wsd":
        first = max(first, train.steps - max(1, round(train.decay_frac * train.steps)))
    if step < first:
        return 1.0
    done = (step - first + 1) / max(1, train.steps - first)
    done = min(1.0, done)
    if train.schedule == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return 1.0 - (1.0 - train.min_lr_frac) * done
