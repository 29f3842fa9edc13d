"""The gradient norms of a measuring run, in its folder: one JSON object a step. Light: the driver reads it without torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from llm.job import Job
from llm.storage import join, read_bytes, write_bytes
from llm.train.tune.noise_scale import StepNorms

NAME = "gradient_norms.jsonl"


def write_norms(job: Job, norms: Sequence[StepNorms]) -> None:
    lines = "".join(json.dumps(asdict(step)) + "\n" for step in norms)
    write_bytes(join(job.run_uri, NAME), lines.encode(), job.config.s3)


def read_norms(job: Job) -> list[StepNorms]:
    """Raises StorageError where the workers wrote where this process does not read: `run.storage` must be one that every node sees."""
    return [StepNorms(**json.loads(line)) for line in read_bytes(join(job.run_uri, NAME), job.config.s3).splitlines()]
