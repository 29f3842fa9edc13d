"""What `train.microbatch_rows: auto` is, decided once when a run starts, recorded with it, and used again when it goes on.

`tune_batch` leaves what it measured in `cache/tune_batch/` of `run.storage`, under a key of everything that memory and speed follow from:
model, layout, hardware. A new run takes the record of its own key; without one, the rule of a few tokens counts, and that is recorded too:
a run never changes its micro-batch because somebody measured meanwhile. The micro-batch changes no batch and no order, see
llm/train/step.py.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from llm.config import RunConfig
from llm.errors import ConfigError
from llm.job import Job
from llm.storage import is_s3, join, local_path, read_bytes_or_none, write_bytes


@dataclass(frozen=True)
class Record:
    """`microbatch_rows`: what to use; `largest_rows`: the largest that fitted; `peak_bytes`: of `microbatch_rows`, on the fullest rank."""

    microbatch_rows: int
    largest_rows: int
    limit_bytes: int
    peak_bytes: int
    measured_at: str  # ISO 8601, UTC


def hardware_key(job: Job, hardware: str) -> dict[str, Any]:
    """Everything that the memory of a micro-batch follows from. `hardware`: as cluster/connect.py tells it."""
    config = job.config
    parallel, train = config.parallel, config.train
    return {
        "model": job.model_config,
        "attention": config.model.attention,
        "seq_len": config.data.seq_len,
        "isolate_documents": config.data.isolate_documents,
        "workers": parallel.workers,
        "tensor": parallel.tensor,
        "zero_stage": parallel.zero_stage,
        "offload": parallel.offload,
        "optimizer": train.optimizer,
        "precision": train.precision,
        "activation_checkpointing": train.activation_checkpointing,
        "compile": train.compile,
        "hardware": hardware,
    }


def record_uri(job: Job, hardware: str) -> str:
    text = json.dumps(hardware_key(job, hardware), sort_keys=True)
    storage = job.config.run.storage
    name = f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"
    return join(storage if is_s3(storage) else local_path(storage), "cache", "tune_batch", name)


def write_record(job: Job, hardware: str, record: Record) -> str:
    """Where it is written, over an older one."""
    uri = record_uri(job, hardware)
    told = {"measured": asdict(record), "for": hardware_key(job, hardware)}
    write_bytes(uri, (json.dumps(told, indent=1) + "\n").encode(), job.config.s3)
    return uri


def read_record(job: Job, hardware: str) -> Record | None:
    """None where nothing was measured. Raises ConfigError for a file that cannot be read as a record."""
    uri = record_uri(job, hardware)
    data = read_bytes_or_none(uri, job.config.s3)
    if data is None:
        return None
    try:
        record = Record(**json.loads(data)["measured"])
        if record.microbatch_rows < 1:
            raise ValueError(record.microbatch_rows)
    except (ValueError, TypeError, KeyError):
        raise ConfigError(f"{uri} is no record of tune_batch. Remove it, or measure again with headrace tune_batch") from None
    return record


def is_open(config: RunConfig) -> bool:
    """Whether the micro-batch is still to be decided."""
    return config.train.microbatch_rows == "auto" and config.train.microbatch_rows_at_most is None


def decided(config: RunConfig, at_most: int) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"microbatch_rows_at_most": at_most})})


def decide(job: Job, hardware: str) -> tuple[int, str | None]:
    """(the most rows of a micro-batch of a new run, what the user is told of it)"""
    record = read_record(job, hardware)
    if record is None:
        return job.config.unmeasured_rows, None
    at_most = record.microbatch_rows
    rows = decided(job.config, at_most).microbatch_rows
    return at_most, f"micro-batch: {rows} rows (auto; tune_batch measured on {record.measured_at} that {record.largest_rows} fit)"


def as_recorded(config: RunConfig, before: RunConfig) -> RunConfig:
    """A run that goes on: with what was decided when it started, if its layout is still the same; a value in `config` stays."""
    if not is_open(config) or before.train.microbatch_rows != "auto":
        return config
    same = all(
        getattr(config.parallel, name) == getattr(before.parallel, name) for name in ("workers", "tensor", "zero_stage", "offload")
    ) and all(getattr(config.train, name) == getattr(before.train, name) for name in ("activation_checkpointing", "compile"))
    if not same:
        return config
    return decided(config, before.train.microbatch_rows_at_most or before.unmeasured_rows)
