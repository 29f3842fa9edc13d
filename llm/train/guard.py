"""The numeric guard: which steps must not move the weights, and what is done instead.

A step is bad when its loss or its gradient is NaN or infinite, or far above what the last steps showed. It is tried once more, for a bit
that flipped in the hardware is right the second time; bad again, its batch is skipped: the weights stay, the stream goes on, the ledger
notes it. After `guard.max_skips` batches in a row it is the weights that are bad: they go back to the last sound checkpoint's, while the
stream goes on, so that the data in between is skipped as well (as in Chowdhery et al., "PaLM", 2022, section 5.1). Where no step is good
after that either, the checkpoint before that one comes back.

Pure: it judges by a `History` that is a part of the run's state, so a resumed run judges as the undisturbed one does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from llm.config import GuardSection, RunConfig
from llm.errors import TrainingError
from llm.state import History, TrainState

if TYPE_CHECKING:
    from llm.train.step import StepResult  # imports torch

MIN_STEPS = 20  # before so many steps nothing is known of what is usual: only NaN and infinity are bad
RECENT_STEPS = 50  # means are over about so many steps
LEAST_CHANGE = 0.02  # of the mean loss: one that hardly varies may still rise by ten times this


@dataclass(frozen=True)
class Judge:
    """What is wrong with a step's loss, and with its gradient's norm; None: nothing."""

    of_loss: Callable[[float], str | None]
    of_gradient: Callable[[float], str | None]


def judge_of(config: RunConfig, history: History) -> Judge:
    return Judge(
        partial(loss_trouble, history, config.guard),
        partial(gradient_trouble, history, config.guard, grad_clip=config.train.grad_clip),
    )


def loss_trouble(history: History, guard: GuardSection, loss: float) -> str | None:
    """What is wrong with a step's loss, or None."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    usual = max(history.loss_change, LEAST_CHANGE * history.loss)
    if guard.loss_spike and history.steps >= MIN_STEPS and loss > history.loss + guard.loss_spike * usual:
        return f"the loss of {loss:.4g} is a spike: it was {history.loss:.4g}, and changed by {history.loss_change:.2g}"
    return None


def gradient_trouble(history: History, guard: GuardSection, norm: float, grad_clip: float) -> str | None:
    """What is wrong with a step's gradient, or None. One that clipping does not touch is never too large."""
    if not math.isfinite(norm):
        return f"the gradient's norm is {norm}"
    if guard.grad_spike and history.steps >= MIN_STEPS and norm > max(grad_clip, guard.grad_spike * history.grad_norm):
        return f"the gradient's norm of {norm:.4g} is a spike: it was {history.grad_norm:.4g}"
    return None


def settled(guard: GuardSection, result: StepResult, state: TrainState, roll_back: Callable[[int], int]) -> tuple[StepResult, History]:
    """What follows from a step for those after it. `roll_back` puts the newest sound weights of before a step back; the step that they are
    of, 0 where there are none.

    Raises TrainingError where neither skipping nor going back has helped.
    """
    if not result.outcome:
        if not math.isfinite(result.grad_norm):  # fp16 lowered its loss scale: no update, and nothing to learn from
            return result, state.history
        return result, after_update(state.history, result.loss, result.grad_norm)
    history = replace(state.history, skipped=state.history.skipped + 1)
    if history.skipped < guard.max_skips:
        return result, history
    back_to = roll_back(history.back_to or state.step + 1) if history.rollbacks < guard.max_rollbacks else 0
    if not back_to:
        why = (
            f"the run has gone back {history.rollbacks} times before" if history.rollbacks else "no sound checkpoint is there to go back to"
        )
        raise TrainingError(
            f"the last {guard.max_skips} batches, up to step {state.step + 1}, could not be trained on: {result.troubles[-1]}; and {why}. "
            "Lower train.lr, lengthen train.warmup_steps, set train.precision to fp32 or bf16, or look at the documents with "
            f"headrace trace --step {state.step}."
        )
    # Nothing is known of how the older weights do on the newer data, but how often this has happened.
    return replace(result, outcome=f"skipped; weights back to those of step {back_to}"), History(
        rollbacks=history.rollbacks + 1, back_to=back_to
    )


def after_update(history: History, loss: float, grad_norm: float) -> History:
    """The history with a step that was taken."""
    steps = history.steps + 1
    rate = max(1 / steps, 1 / RECENT_STEPS)
    change = abs(loss - history.last_loss)  # not from the mean, which lags behind where the loss falls
    return History(
        steps,
        loss,
        history.loss + rate * (loss - history.loss),
        history.loss_change + rate * (change - history.loss_change) if history.steps else 0.0,
        history.grad_norm + rate * (grad_norm - history.grad_norm),
        0,
        history.rollbacks,
    )
