from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from llm.config import GuardSection
from llm.errors import TrainingError
from llm.state import History, TrainState
from llm.train.guard import MIN_STEPS, after_update, gradient_trouble, loss_trouble, settled
from llm.train.step import StepResult

GUARD = GuardSection()


def falling(steps: int = 60, seed: int = 0) -> History:
    history, rng = History(), np.random.default_rng(seed)
    for step in range(steps):
        history = after_update(history, 8 - step / 20 + rng.normal(0, 0.1), 1 + abs(rng.normal(0, 0.3)))
    return history


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_bad_from_the_first_step_on_and_cannot_be_switched_off(value):
    off = GuardSection(loss_spike=0, grad_spike=0)
    assert loss_trouble(History(), off, value) and gradient_trouble(History(), off, value, 1.0)


def test_spikes_are_bad_once_something_is_known_of_what_is_usual():
    history = falling()
    assert "spike" in (loss_trouble(history, GUARD, history.loss * 1.5) or "")
    assert loss_trouble(history, GuardSection(loss_spike=0), history.loss * 1.5) is None
    assert "spike" in (gradient_trouble(history, GUARD, 21 * history.grad_norm, 1.0) or "")
    assert gradient_trouble(history, GUARD, 21 * history.grad_norm, 100.0) is None, "clipping does not touch it"
    early = falling(MIN_STEPS - 1)
    assert loss_trouble(early, GUARD, 100.0) is None and gradient_trouble(early, GUARD, 100.0, 1.0) is None


@pytest.mark.parametrize("seed", range(20))
def test_an_ordinary_run_has_no_trouble(seed):
    """Falling fast, then slowly, with noise of heavy tails, as small batches have."""
    rng, history = np.random.default_rng(seed), History()
    for step in range(2000):
        loss = 2 + 6 * math.exp(-step / 100) + 0.1 * min(4.0, max(-4.0, rng.standard_t(3)))
        norm = (0.3 + 3 * math.exp(-step / 50)) * math.exp(rng.normal(0, 0.5))
        assert loss_trouble(history, GUARD, loss) is None and gradient_trouble(history, GUARD, norm, 1.0) is None, step
        history = after_update(history, loss, norm)


def test_skips_in_a_row_go_back_and_then_stop():
    bad, state = StepResult(math.nan, 1.0, ("the loss is nan",) * 2, "skipped"), TrainState(step=40, history=falling())
    outcomes = []
    for _ in range(2 * GUARD.max_skips):
        result, history = settled(GUARD, bad, state, lambda before: 32 if before > 32 else 24)
        outcomes.append(result.outcome)
        state = replace(state, step=state.step + 1, history=history)
        assert not history.sound
    rows = [["skipped", "skipped", f"skipped; weights back to those of step {step}"] for step in (32, 24)]
    assert outcomes == rows[0] + rows[1], "the second time it goes further back"
    with pytest.raises(TrainingError, match=r"gone back 2 times before.*headrace trace --step 48"):
        for _ in range(GUARD.max_skips):
            _, history = settled(GUARD, bad, state, lambda before: 32)
            state = replace(state, step=state.step + 1, history=history)
    with pytest.raises(TrainingError, match="no sound checkpoint"):
        settled(GuardSection(max_skips=1), bad, TrainState(), lambda before: 0)


def test_an_overflow_of_fp16_teaches_nothing():
    state = TrainState(history=falling())
    assert settled(GUARD, StepResult(5.0, math.inf), state, lambda before: 0) == (StepResult(5.0, math.inf), state.history)


def test_an_update_ends_a_row_of_skips():
    history = replace(falling(), skipped=2, back_to=16)
    _, after = settled(GUARD, StepResult(5.0, 1.0), TrainState(history=history), lambda before: 0)
    assert after.sound and after.steps == history.steps + 1
    assert TrainState.from_json(TrainState(history=after).to_json()).history == after
