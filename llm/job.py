"""What the driver tells every training worker. Picklable and light: importing it brings in no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llm.config import RunConfig
from llm.data.order import Schedule
from llm.data.pack import Rows
from llm.tokenizer import Tokenizer


def no_fence() -> None:
    """For a run that nobody else can be training."""


@dataclass(frozen=True)
class Job:
    config: RunConfig
    run_uri: str  # <storage>/<name>: where metrics, checkpoints and the export go
    model_config: dict[str, Any]  # the Hugging Face config of the model to build
    tokenizer: Tokenizer
    eval_rows: Rows  # held out of training; empty where eval.rows is 0
    schedule: Schedule  # of the mixture's stages
    started_at_s: float  # Unix time at which the user's command began: start-up is counted from there
    noise_steps: int = 0  # above 0: a run of so many steps that measures gradient noise (llm/train/tune/noise_run.py) and leaves no model
    fence: Callable[[], None] = no_fence  # raises LeaseError where another driver has taken the run over
