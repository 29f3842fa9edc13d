"""Rank 0's pen: turns step results into rows of metrics.jsonl. Other ranks hold one that writes nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from llm.config import S3Section
from llm.errors import HeadraceError
from llm.job import Job
from llm.metrics import MetricsWriter, eval_row, event_row, step_row
from llm.metrics_file import UploadSink
from llm.model.flops import flops_per_token, peak_flops
from llm.state import TrainState
from llm.storage import exists, is_s3, join, read_bytes, write_bytes
from llm.train.life import Incident
from llm.train.step import StepResult

FENCE_EVERY_S = 1.0


@dataclass(frozen=True)
class StepTimes:
    step_s: float
    data_wait_s: float


class Recorder:
    """`on` on rank 0 only. Rows of steps are written together every `log.every_steps`, which on S3 is a request each time."""

    def __init__(self, job: Job, *, on: bool, device_name: str, precision: str) -> None:
        self.job = job
        self._pending: list[tuple[TrainState, TrainState, StepResult, StepTimes, float, float]] = []
        self._writer = _open_writer(job) if on else None
        self._fenced_at_s = time.monotonic()
        per_token = flops_per_token(job.model_config, job.config.data.seq_len)
        peak = peak_flops(device_name, precision)
        # FLOPs of a token over the FLOP/s of all devices: a rate in tokens/s times it is the MFU.
        self._mfu_factor = per_token / (peak * job.config.parallel.workers) if per_token and peak else None

    def elapsed_s(self) -> float:
        return max(0.0, time.time() - self.job.started_at_s)

    def event(self, event: str, **fields: object) -> None:
        if self._writer is not None:
            self._require_lease()
            self._writer.write(event_row(event, elapsed_s=self.elapsed_s(), **fields))

    def evaluation(self, step: int, loss: float, tokens: int, eval_s: float) -> None:
        if self._writer is not None:
            self._writer.write(eval_row(step=step, eval_loss=loss, eval_tokens=tokens, eval_s=eval_s))

    def resume_at(self, step: int, incident: Incident | None, phases: Mapping[str, float], *, is_start: bool = False) -> None:
        """Drops the rows after `step`, whose steps are done again, and writes what that and the time since the last row cost.

        `incident`: why the group before this one ended, None where the command itself is new; `phases`: this group's start-up, in seconds;
        `is_start`: `step` is another run's, where this one starts.
        """
        if self._writer is None:
            return
        self.job.fence()
        rows = self._writer.rows()
        self._writer.truncate_after(step)
        if (not step or is_start) and incident is None:
            return
        redone = [row for row in rows if row["kind"] in ("step", "eval") and row["step"] > step]
        steps_redone = [row for row in redone if row["kind"] == "step"]
        fields: dict[str, object] = {
            "reason": "the command was run again" if incident is None else incident.told,
            "cause": "new command" if incident is None else incident.cause,
            "steps_redone": len(steps_redone),
            "redone_s": round(sum(row.get("step_s") or row.get("eval_s") or 0.0 for row in redone), 3),
        }
        if incident is not None:
            last_s = max((row["elapsed_s"] for row in rows if row.get("elapsed_s") is not None), default=0.0)
            noticed_s = incident.at_s - self.job.started_at_s - last_s
            fields |= {
                "number": incident.number,
                "down_s": round(max(0.0, self.elapsed_s() - last_s), 3),
                "noticed_s": round(max(0.0, noticed_s), 3),
                "phases": {name: round(phase_s, 2) for name, phase_s in phases.items()},
            }
        self.event("restart", step=step, **fields)

    def step(self, before: TrainState, after: TrainState, result: StepResult, times: StepTimes, lr: float) -> None:
        self._pending.append((before, after, result, times, lr, self.elapsed_s()))
        if after.step % self.job.config.log.every_steps == 0:
            self.flush()

    def flush(self) -> None:
        """Writes the pending rows. Raises LeaseError, on rank 0, where another driver has the run now."""
        pending, self._pending = self._pending, []
        if self._writer is not None:
            self._require_lease()
        for before, after, result, times, lr, elapsed_s in pending:
            if self._writer is not None:
                tokens_per_s = (after.tokens - before.tokens) / times.step_s
                row = step_row(
                    step=after.step,
                    loss=result.loss,
                    tokens=after.tokens,
                    tokens_per_s=tokens_per_s,
                    data_wait_frac=min(1.0, times.data_wait_s / times.step_s),
                    lr=lr,
                    grad_norm=result.grad_norm,
                    step_s=times.step_s,
                    mfu=tokens_per_s * self._mfu_factor if self._mfu_factor else None,
                    elapsed_s=elapsed_s,
                    epoch=after.cursor.epoch,
                    window=after.cursor.window,
                    offset=after.cursor.offset,
                    ledger=after.ledger,
                    outcome=result.outcome,
                )
                self._writer.write(row)

    def _require_lease(self) -> None:
        """A driver that takes a run over needs seconds until it writes a row, so once a second is often enough."""
        if time.monotonic() - self._fenced_at_s >= FENCE_EVERY_S:
            self.job.fence()
            self._fenced_at_s = time.monotonic()

    def close(self) -> None:
        if self._writer is not None:
            with suppress(HeadraceError):  # what ends the run is the error to show
                self.flush()
            self._writer.close()


def _open_writer(job: Job) -> MetricsWriter:
    uri, s3 = join(job.run_uri, "metrics.jsonl"), job.config.s3
    if not is_s3(uri):
        return MetricsWriter(uri)
    return MetricsWriter(UploadSink(get=partial(_get, uri, s3), put=partial(_put, job, uri)))


def _get(uri: str, s3: S3Section) -> bytes:
    return read_bytes(uri, s3) if exists(uri, s3) else b""


def _put(job: Job, uri: str, data: bytes) -> None:
    job.fence()
    write_bytes(uri, data, job.config.s3)
