"""What may differ between two configurations of one run, and between a run and the one from whose checkpoint it starts. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from llm.config import RunConfig
from llm.config_fields import shown

# Keys that a resumed run may change, with all keys below them, and still be the same run. All others make another run,
# and so does every key that is new. Layout and microbatch may change because the same rows then make up each step and
# the loss agrees within the stated tolerance. train.steps (or train.tokens) may grow, not shrink: the run goes on under a schedule that
# spans the new length, so the learning rate jumps unless the schedule is constant, or wsd whose decay had not begun.
MAY_CHANGE = (
    "run.name",
    "run.storage",
    "run.if_finished",
    "data.windows_ahead",
    "data.cache",
    "data.max_bad_frac",
    "parallel",
    "train.microbatch_rows",
    "train.microbatch_rows_at_most",
    "train.activation_checkpointing",
    "train.compile",
    "train.until_step",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "checkpoint.keep_every",
    "recovery",
    "eval.every_steps",
    "export",
    "log",
    "s3",
)
# What may differ, besides, between a run and the one from whose checkpoint it starts (checkpoint.start_from): how the next steps move the
# weights. What the weights are and which rows come next is the same.
MAY_DIFFER = (
    *MAY_CHANGE,
    "checkpoint",
    "guard",
    "train.steps",
    "train.tokens",
    "train.lr",
    "train.lr_batch_rule",
    "train.lr_batch_rows",
    "train.min_lr_frac",
    "train.schedule",
    "train.warmup_steps",
    "train.warmup_frac",
    "train.decay_frac",
    "train.betas",
    "train.eps",
    "train.momentum",
    "train.weight_decay",
    "train.grad_clip",
)
ABSENT = "(absent)"


def config_differences(old: RunConfig, new: RunConfig, free: Sequence[str] = MAY_CHANGE) -> list[str]:
    """What makes a run resumed from `old` a different run under `new`: "train.lr: 0.003 -> 0.001", in section order.

    Empty where `new` may go on from a checkpoint of `old`. `free`: keys that may change, with those below them.
    """
    before, after = dict(leaves(old.values(), "")), dict(leaves(new.values(), ""))
    found: list[str] = []
    for key in dict.fromkeys([*before, *after]):
        was, now = before.get(key, ABSENT), after.get(key, ABSENT)
        if was == now and type(was) is type(now):
            continue
        if is_below(key, free):
            continue
        if key in ("train.steps", "train.tokens") and new.train.steps >= old.train.steps:
            continue
        found.append(f"{key}: {told(was)} -> {told(now)}")
    return found


def is_below(key: str, above: Sequence[str]) -> bool:
    """Whether a dotted key is one of `above`, or below one."""
    return any(key == each or key.startswith(each + ".") for each in above)


def told(value: Any) -> str:
    return ABSENT if value is ABSENT else shown(value)


def leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Every (dotted key, scalar) below `value`; an empty list or map counts as a scalar."""
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    if not below or not value:
        yield key, value
    else:
        for name, inner in below:
            yield from leaves(inner, f"{key}.{name}" if key else str(name))
