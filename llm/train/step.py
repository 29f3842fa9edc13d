"""One optimizer step, and one evaluation. The loss is in nats per predicted token of the whole batch, whatever the layout.

A step is judged before the weights move, by llm/train/guard.py, and tried once more where it is bad.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from llm.data.batches import Batch
from llm.model.loss import model_inputs, sum_loss
from llm.parallel.zero import Engine
from llm.train.guard import Judge

ATTEMPTS = 2


@dataclass(frozen=True)
class StepResult:
    """`loss`: mean over the batch's predicted tokens, in nats; `grad_norm`: before clipping; `troubles`: what was wrong with each attempt;
    `outcome`: what became of a batch that did not move the weights."""

    loss: float
    grad_norm: float
    troubles: tuple[str, ...] = ()
    outcome: str = ""


def train_step(
    engine: Engine,
    batch: Batch,
    judge: Judge,
    *,
    microbatch_rows: int,
    isolate: bool,
    lr_factor: float,
    before_update: Callable[[], None] = lambda: None,
) -> StepResult:
    """Forward and backward over this rank's microbatches, then one update, if the judge finds nothing wrong; else both once more, and then
    no update. All ranks must call it. `before_update` returns when the weights may change: a checkpoint may still be copying them.
    """
    troubles: list[str] = []
    for _ in range(ATTEMPTS):
        attempt = _Attempt(engine, judge, _forward_backward(engine, batch, microbatch_rows, isolate), before_update)
        norm = engine.step(lr_factor, attempt.may_update)
        if attempt.trouble is None:
            return StepResult(attempt.loss, norm, tuple(troubles))
        troubles.append(attempt.trouble)
    return StepResult(attempt.loss, norm, tuple(troubles), "skipped")


def _forward_backward(engine: Engine, batch: Batch, microbatch_rows: int, isolate: bool) -> Tensor:
    """This rank's share of the batch's loss.

    Each microbatch's summed loss is divided by the predicted tokens of the *whole* batch before backward, so unequally masked
    microbatches weigh as they should: 1 microbatch of 8 rows, 2 of 4 and 4 of 2 give the same gradient.
    """
    share = torch.zeros((), device=engine.device)
    for first in range(0, len(batch.ids), microbatch_rows):
        rows = slice(first, first + microbatch_rows)
        loss = _summed_loss(engine, batch.ids[rows], batch.segments[rows], isolate) / batch.predicted_tokens
        share += loss.detach()
        engine.backward(loss, last=rows.stop >= len(batch.ids))
    return share


@dataclass
class _Attempt:
    """What all ranks find of one forward and backward pass, once the gradient's norm is known."""

    engine: Engine
    judge: Judge
    share: Tensor  # of the loss, this rank's
    before_update: Callable[[], None]
    loss: float = math.nan
    trouble: str | None = None

    def may_update(self, norm: float) -> bool:
        """Agreed over all ranks: a rank that alone held back would part from the others for ever."""
        overflowed = self.engine.precision == "fp16" and norm == math.inf  # the loss scale was too high, which is no trouble
        of_gradient = None if overflowed else self.judge.of_gradient(norm)
        told = torch.stack([self.share, torch.full_like(self.share, of_gradient is not None)])
        self.loss, bad_gradients = _over_data_ranks(self.engine, told).tolist()
        self.trouble = self.judge.of_loss(self.loss) or of_gradient or ("another rank's gradient is bad" if bad_gradients else None)
        if self.trouble is None:
            self.before_update()
        return self.trouble is None


@torch.no_grad()
def evaluate(engine: Engine, ids: Tensor, segments: Tensor, *, microbatch_rows: int, isolate: bool) -> tuple[float, int]:
    """(mean loss in nats per predicted token, predicted tokens) of the rows, shared out over the data ranks. All ranks must call it.

    Rows are padded to whole microbatches on all data ranks: at ZeRO 3 every rank must run the same number of forward passes.
    """
    mesh = engine.mesh
    unit = mesh.data_size * microbatch_rows
    missing = -len(ids) % unit
    ids = torch.cat([ids, ids.new_zeros((missing, ids.shape[1]))])
    segments = torch.cat([segments, segments.new_zeros((missing, segments.shape[1]))])
    engine.deepspeed.eval()
    sums = torch.zeros(2, device=engine.device, dtype=torch.float64)
    for first in range(0, len(ids), unit):
        mine = slice(first + mesh.data_rank * microbatch_rows, first + (mesh.data_rank + 1) * microbatch_rows)
        inputs, labels, valid = model_inputs(ids[mine].to(engine.device), segments[mine].to(engine.device), isolate)
        sums[0] += sum_loss(engine.forward(**inputs), labels, valid)
        sums[1] += valid.sum()
    engine.deepspeed.train()
    sums = _over_data_ranks(engine, sums)
    return float(sums[0] / sums[1].clamp(min=1)), round(float(sums[1]))


def _summed_loss(engine: Engine, ids: Tensor, segments: Tensor, isolate: bool) -> Tensor:
    ids, segments = (rows.to(engine.device, non_blocking=True) for rows in (ids, segments))
    inputs, labels, valid = model_inputs(ids, segments, isolate)
    return sum_loss(engine.forward(**inputs), labels, valid)


def _over_data_ranks(engine: Engine, value: Tensor) -> Tensor:
    """The sum over data ranks; tensor peers hold equal values, so the sum over all ranks counts each tensor_size times."""
    dist.all_reduce(value)
    return value / engine.mesh.tensor_size
