"""Learning rate by step, as a factor of `train.lr`. Pure.

All schedules warm up linearly over `warmup_steps`, or `warmup_frac` of the steps, and reach the peak with the last of them; step numbers
count from 0.

- `constant`: stays there.
- `linear`, `cosine`: fall to `min_lr_frac` at the last step.
- `wsd`: warm-up, stable, decay: stays at the peak until the last `decay_frac` of the steps, then falls linearly to `min_lr_frac`
  (Hu et al., "MiniCPM", 2024, section 4). The stable part does not depend on the number of steps, so a run can be prolonged.

On top of it the rate follows the batch by `lr_batch_rule`: with b rows a step the factor is b / `lr_batch_rows`, or its square root, in
each stage of `train.batch_schedule` that stage's own. `linear` is the rule for SGD (Goyal et al., "Accurate, Large Minibatch SGD", 2017,
section 2.1), `sqrt` that for Adam (Malladi et al., "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms", 2022), of which only
the learning rate is followed: betas and eps stay.

Warm-up and decay are counted in steps, whatever their batches. With a budget in `train.tokens`, runs of other batch sizes warm up alike by
`warmup_frac`, and `decay_frac` is a fraction already; with a `batch_schedule` a fraction of the steps is not that fraction of the tokens.
"""

from __future__ import annotations

import math

from llm.config_train import TrainSection

RULES = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}  # the exponent of the batch's ratio


def lr_factor(train: TrainSection, step: int) -> float:
    """The factor on `train.lr` for step 0, 1, ..., steps - 1: the schedule's, times that of the step's batch."""
    return schedule_factor(train, step) * (train.rows_at(step) / (train.lr_batch_rows or 1)) ** RULES[train.lr_batch_rule]


def schedule_factor(train: TrainSection, step: int) -> float:
    """In (0, 1]; at the end `min_lr_frac`."""
    warmup = train.num_warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    if train.schedule == "constant":
        return 1.0
    first = warmup
    if train.schedule == "wsd":
        first = max(first, train.steps - max(1, round(train.decay_frac * train.steps)))
    if step < first:
        return 1.0
    done = (step - first + 1) / max(1, train.steps - first)
    done = min(1.0, done)
    if train.schedule == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return 1.0 - (1.0 - train.min_lr_frac) * done
