"""A short real run on the run's own stream, which records how large gradients are over single microbatches and over the whole batch.

The run is the training's own: the same stream, engine, step and schedule. A tensor hook sees the gradient of each microbatch on each data
rank before anything is reduced, at every ZeRO stage and without a copy; the whole batch's is the norm that every step knows before
clipping. In a tensor group the squares of split parameters add up, and those of replicated ones count once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llm.data.batches import Batch, Reader, count_predicted
from llm.job import Job
from llm.parallel.mesh import Mesh
from llm.parallel.zero import Engine
from llm.state import TrainState
from llm.train.build import build_engine
from llm.train.loop import fetch_batches, steps
from llm.train.step import StepResult
from llm.train.tune.noise_scale import StepNorms
from llm.train.tune.norms_file import write_norms
from llm.train.watchdog import Unwatched, Watchdog


def measure_noise(job: Job, mesh: Mesh, reader: Reader | None, start: TrainState, watchdog: Watchdog | Unwatched) -> TrainState:
    """Trains `job.noise_steps` steps, and writes their norms into the run's folder; returns the last state. Saves and evaluates nothing: a
    group that fails begins again."""
    config, last = job.config, start
    engine = build_engine(job, mesh)
    squares = GradientSquares(engine, config.microbatch_rows, config.data.isolate_documents)
    fetcher = fetch_batches(job, mesh, reader, start, min(job.noise_steps, config.train.steps))
    found: list[StepNorms] = []
    try:
        for state, result, _ in steps(job, engine, squares.watched(fetcher), start, lambda before: 0, watchdog=watchdog):
            last = state
            found += squares.taken(state.step, result)
    finally:
        fetcher.close()
    if mesh.rank == 0:
        write_norms(job, found)
    dist.barrier()
    return last


class GradientSquares:
    """Squared norms of the gradients of this rank's microbatches. One an engine, from before its first step on. All ranks must call every
    method."""

    def __init__(self, engine: Engine, microbatch_rows: int, isolate: bool) -> None:
        self._engine, self._rows, self._isolate = engine, microbatch_rows, isolate
        self._split = torch.zeros((), device=engine.device)
        self._whole = torch.zeros((), device=engine.device)
        self._squares: list[Tensor] = []  # of this step's microbatches: (split parameters, replicated ones)
        self._tokens: list[int] = []  # predicted by each
        self._batch_tokens = 0
        for name, parameter in engine.module.named_parameters():
            if parameter.requires_grad:
                shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
                total = self._split if shape != engine.full_shapes[name] else self._whole
                parameter.register_hook(_adding_to(total))
        self._backward, engine.backward = engine.backward, self._measured_backward

    def watched(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, each noted before it is trained on."""
        for batch in batches:
            starts = range(0, len(batch.ids), self._rows)
            self._tokens = [count_predicted(batch.segments[first : first + self._rows], self._isolate) for first in starts]
            self._batch_tokens = batch.predicted_tokens
            self._squares = []
            yield batch

    def taken(self, step: int, result: StepResult) -> list[StepNorms]:
        """The step's norms, the same on all ranks; none for a batch that was skipped or whose gradient was not finite."""
        squares = self._squares[-len(self._tokens) :]  # of the last attempt
        told = torch.zeros(3, dtype=torch.float64, device=self._engine.device)
        for square, tokens in zip(squares, self._tokens, strict=True):
            told[:2] += square.double()
            told[2] += (tokens / self._batch_tokens) ** 2
        dist.all_reduce(told)
        split, whole, shares = told.tolist()
        tensor = self._engine.mesh.tensor_size
        if result.outcome:
            return []
        # Of losses that were divided by the tokens of the whole batch: see StepNorms for the weights.
        share = shares / tensor
        return [
            StepNorms(step, (split + whole / tensor) / share, result.grad_norm**2, share * self._batch_tokens, float(self._batch_tokens))
        ]

    def _measured_backward(self, loss: Tensor, *, last: bool) -> None:
        self._split.zero_()
        self._whole.zero_()
        scale = self._engine.optimizer.loss_scale if self._engine.precision == "fp16" else 1.0
        self._backward(loss, last=last)
        # DeepSpeed divides by the number of data ranks after this, when it reduces; the engine has multiplied it in.
        factor = (self._engine.mesh.data_size * float(scale)) ** 2
        self._squares.append(torch.stack([self._split, self._whole]) / factor)


def _adding_to(total: Tensor) -> Callable[[Tensor], Any]:
    def add(gradient: Tensor) -> None:
        total.add_(torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32).square())

    return add
