"""The jobs that are measured, made from the run's own. Pure."""

from __future__ import annotations

from dataclasses import replace

from llm.config import RunConfig
from llm.data.pack import no_rows
from llm.errors import ConfigError
from llm.job import Job
from llm.train.tune.collect import Measured
from llm.train.tune.memory_model import legal_rows
from llm.train.tune.noise_scale import small_batch_rows


def for_probes(job: Job) -> Job:
    """The run's job on its full layout, whose probes choose the micro-batch themselves."""
    return replace(job, config=_fixed(job.config, 1), eval_rows=no_rows(job.config.data.seq_len))


def for_noise(job: Job, at_most: int, steps: int) -> Job | None:
    """The job that measures gradient noise, with micro-batches of at most so many rows; None where there is none to measure: no steps are
    wanted, or the batch is one row."""
    config = job.config
    rows = small_batch_rows(config.rank_rows, config.parallel.data_size, at_most)
    if steps < 1 or rows is None:
        return None
    steps = min(steps, config.train.steps)
    return replace(job, config=_fixed(config, rows), eval_rows=no_rows(config.data.seq_len), noise_steps=steps)


def require_something_fits(config: RunConfig, measured: Measured) -> int:
    """The micro-batch to use at most. Raises ConfigError where not even one row fits."""
    usable, search = measured.usable_rows, measured.search
    if usable is not None:
        return usable
    limit = f" of {search.limit_bytes / 2**30:.2f} GiB" if search.limit_bytes else ""
    told = search.failed[min(search.failed)].rstrip(".")
    raise ConfigError(
        f"not even a micro-batch of {legal_rows(config.rank_rows)[0]} row fits the memory{limit} of a worker: {told}. Give it more "
        "(--memory-gib, where that set the limit), raise parallel.zero_stage or parallel.tensor, add workers, set "
        "train.activation_checkpointing=true or parallel.offload=optimizer, or lower data.seq_len."
    )


def _fixed(config: RunConfig, rows: int) -> RunConfig:
    return config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update={"min_workers": None}),
            "train": config.train.model_copy(update={"microbatch_rows": rows, "microbatch_rows_at_most": None}),
        }
    )
