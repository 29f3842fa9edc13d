"""Where a run's rows go besides the terminal: TensorBoard event files, and by config MLflow and Weights & Biases.

The trackers are imported when they are on, never before. TensorBoard's files are written with its protocol buffers and
a record writer of our own: its EventFileWriter imports NumPy, botocore and more (1.4 s and 580 modules, measured) and
tensorboardX imports torch; the protocol buffers alone take 0.05 s.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from llm.config import LogSection
from llm.errors import ConfigError, StorageError
from llm.metrics import METRICS, Row
from llm.observe.tfrecord import tf_record
from llm.redact import HIDDEN, SECRET_VARIABLE, without_secrets


class RowSink(Protocol):
    """Takes every row of the run; `close` makes them durable. `failed` tells trackers how the run ended."""

    name: str

    def write(self, row: Row) -> None: ...
    def close(self, *, failed: bool = False) -> None: ...


class Sinks:
    """All trackers of a run. One that fails is reported once through `warn` and left out then: none ends a run."""

    def __init__(self, sinks: Iterable[RowSink], warn: Callable[[str], None]) -> None:
        self._sinks = list(sinks)
        self._warn = warn

    def write(self, rows: Iterable[Row]) -> None:
        for row in rows:
            for sink in list(self._sinks):
                self._guarded(sink, "stopped", lambda sink=sink, row=row: sink.write(row))

    def close(self, *, failed: bool = False) -> None:
        for sink in list(self._sinks):
            self._guarded(sink, "did not close", lambda sink=sink: sink.close(failed=failed))
        self._sinks.clear()

    def _guarded(self, sink: RowSink, what: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # a tracker's client may raise anything
            self._sinks.remove(sink)
            self._warn(f"{sink.name} {what}: {without_secrets(str(error))}. metrics.jsonl has every row.")


def open_sinks(log: LogSection, *, run_name: str, folder: Path, params: Mapping[str, Any], warn: Callable[[str], None]) -> Sinks:
    """The trackers that `log` switches on. `folder` is local; `params`, the run's config, goes to MLflow and W&B.

    A later command on the same run goes on in the same MLflow and W&B run: their ids are kept in
    `folder`/trackers.json. Raises ConfigError where a tracker is on but not installed, or cannot be reached: before
    anything is trained.
    """
    sinks: list[RowSink] = []
    try:
        if log.tensorboard:
            sinks.append(TensorBoardSink(folder / "tensorboard"))
        if log.mlflow_uri is not None:
            sinks.append(MlflowSink(log.mlflow_uri, run_name=run_name, folder=folder, params=params))
        if log.wandb_project is not None:
            sinks.append(WandbSink(log.wandb_project, run_name=run_name, folder=folder, params=params))
    except BaseException:
        Sinks(sinks, lambda text: None).close(failed=True)
        raise
    return Sinks(sinks, warn)


def scalars(row: Row) -> dict[str, float]:
    """The finite metrics of a step or eval row by tag, "train/loss" or "eval/perplexity"; empty for an event."""
    if row["kind"] not in ("step", "eval"):
        return {}
    group = "train" if row["kind"] == "step" else "eval"
    return {
        f"{group}/{name}": float(row[name])
        for name, metric in METRICS.items()
        if name != "step" and row["kind"] in metric.kinds and row.get(name) is not None
    }


class TensorBoardSink:
    """Event files in `folder`, as TensorBoard reads them; flushed at least each `flush_s`.

    Each file begins by declaring that a session starts at its first step, and so does a step that does not follow the
    last one (the trainer went back to a checkpoint): TensorBoard then drops what it had from that step on, and the
    curves stay single. Raises StorageError where the folder cannot be written.
    """

    name = "TensorBoard"

    def __init__(self, folder: Path, *, flush_s: float = 5.0, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._flush_s = flush_s
        self._flushed_at_s = clock()
        self._last_step: dict[str, int] = {}
        self._pb = importlib.import_module("tensorboard.compat.proto.event_pb2")
        self._summary_pb = importlib.import_module("tensorboard.compat.proto.summary_pb2")
        name = f"events.out.tfevents.{time.time_ns() // 1000:017d}.{socket.gethostname()}.{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / name).open("xb")
        except OSError as error:
            raise StorageError(f"{folder} cannot be written for TensorBoard: {error.strerror}.") from error
        self._add(file_version="brain.Event:2")

    def write(self, row: Row) -> None:
        values = scalars(row)
        if not values:
            return
        kind, step = row["kind"], row["step"]
        if not self._last_step or step <= self._last_step.get(kind, -1) or step < max(self._last_step.values()):
            self._last_step = {}
            self._add(step=step, session_log=self._pb.SessionLog(status=self._pb.SessionLog.START))
        self._last_step[kind] = step
        summary = self._summary_pb.Summary(
            value=[self._summary_pb.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        )
        self._add(step=step, wall_time=row.get("written_at_s"), summary=summary)
        if self._clock() - self._flushed_at_s >= self._flush_s:
            self._file.flush()
            self._flushed_at_s = self._clock()

    def close(self, *, failed: bool = False) -> None:
        self._file.close()

    def _add(self, wall_time: float | None = None, **fields: Any) -> None:
        event = self._pb.Event(wall_time=self._clock() if wall_time is None else wall_time, **fields)
        self._file.write(tf_record(event.SerializeToString()))


class MlflowSink:
    """One MLflow run in the experiment "headrace", sent in batches: at most each `flush_s`, by `log_batch`."""

    name = "MLflow"

    def __init__(self, uri: str, *, run_name: str, folder: Path, params: Mapping[str, Any], flush_s: float = 5.0) -> None:
        """Finds or creates the run. Raises ConfigError where MLflow is missing or its server does not answer."""
        mlflow = _import("mlflow", "log.mlflow_uri", "mlflow")
        self._metric = importlib.import_module("mlflow.entities").Metric
        self._flush_s = flush_s
        self._sent_at_s = time.monotonic()
        self._waiting: list[Any] = []
        try:
            self._client = mlflow.MlflowClient(tracking_uri=uri)
            known = _known_id(folder, f"mlflow {without_secrets(uri)}")
            self._run_id = known or self._new_run(run_name, folder, uri, params)
            self._client.update_run(self._run_id, status="RUNNING")
        except Exception as error:
            raise ConfigError(f"log.mlflow_uri={uri}: {error}") from None

    def write(self, row: Row) -> None:
        values = scalars(row)
        at_ms = int(1000 * (row.get("written_at_s") or time.time()))
        self._waiting += [self._metric(tag, value, at_ms, row["step"]) for tag, value in values.items()]
        if len(self._waiting) > 900 or time.monotonic() - self._sent_at_s >= self._flush_s:
            self._send()

    def close(self, *, failed: bool = False) -> None:
        self._send()
        self._client.set_terminated(self._run_id, status="FAILED" if failed else "FINISHED")

    def _send(self) -> None:
        while self._waiting:  # the server takes 1000 metrics at once
            self._client.log_batch(self._run_id, metrics=self._waiting[:900])
            del self._waiting[:900]
        self._sent_at_s = time.monotonic()

    def _new_run(self, run_name: str, folder: Path, uri: str, params: Mapping[str, Any]) -> str:
        experiment = self._client.get_experiment_by_name("headrace")
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment("headrace")
        run_id = self._client.create_run(experiment_id, run_name=run_name).info.run_id
        for name, value in flat_params(params).items():
            self._client.log_param(run_id, name, value[:500])
        _keep_id(folder, f"mlflow {without_secrets(uri)}", run_id)
        return run_id


class WandbSink:
    """One W&B run: online when WANDB_API_KEY is set, else offline files in `folder`/wandb, for `wandb sync`.

    WANDB_MODE, when the user sets it, decides instead. The key itself is read by wandb alone.
    """

    name = "W&B"

    def __init__(self, project: str, *, run_name: str, folder: Path, params: Mapping[str, Any]) -> None:
        """Opens the run, or goes on in it. Raises ConfigError where wandb is missing or the server refuses."""
        wandb = _import("wandb", "log.wandb_project", "wandb")
        run_id = _known_id(folder, f"wandb {project}")
        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=project,
                name=run_name,
                id=run_id,
                resume="allow" if run_id else None,
                mode=mode,
                dir=str(folder),
                config=flat_params(params),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except Exception as error:
            raise ConfigError(f"log.wandb_project={project}: {error}") from None
        _keep_id(folder, f"wandb {project}", self._run.id)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")  # W&B's own step may not go back, a restart's does

    def write(self, row: Row) -> None:
        if values := scalars(row):
            self._run.log({**values, "step": row["step"]})

    def close(self, *, failed: bool = False) -> None:
        self._run.finish(exit_code=1 if failed else 0)


def flat_params(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested config as {"train.lr": "0.001", ...}, with secrets replaced by "***"."""
    flat: dict[str, str] = {}
    for key, value in params.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flat_params(value, f"{name}.")
        elif SECRET_VARIABLE.search(name.rpartition(".")[2]) and isinstance(value, str):
            flat[name] = HIDDEN
        else:
            flat[name] = without_secrets(value if isinstance(value, str) else json.dumps(value, default=str))
    return flat


def _import(module: str, key: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = f"{key} is set, but {module} is not installed ({error})."
        raise ConfigError(f"{missing} Run: pip install 'headrace[{extra}]'. Or unset {key}.") from None


def _known_id(folder: Path, tracker: str) -> str | None:
    return _ids(folder).get(tracker)


def _keep_id(folder: Path, tracker: str, run_id: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trackers.json").write_text(json.dumps(_ids(folder) | {tracker: run_id}, indent=1) + "\n")


def _ids(folder: Path) -> dict[str, str]:
    try:
        return json.loads((folder / "trackers.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}
