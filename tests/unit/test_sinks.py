"""TensorBoard files load in TensorBoard, also after a restart; other trackers are off by default and leak no key."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from llm.config import LogSection
from llm.errors import ConfigError
from llm.metrics import eval_row, event_row, step_row
from llm.observe.sinks import Sinks, TensorBoardSink, flat_params, open_sinks, scalars
from llm.observe.tfrecord import crc32c
from llm.redact import without_secrets


def a_step(step: int, loss: float = 2.0) -> dict:
    return step_row(
        step=step, loss=loss, tokens=512 * step, tokens_per_s=1000.0, data_wait_frac=0.02, lr=1e-3, grad_norm=0.7,
        step_s=0.5, mfu=None, elapsed_s=step * 0.5, epoch=0, window=1, offset=32 * step, ledger="0" * 32,
    )  # fmt: skip


def curve(folder, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, round(event.value, 4)) for event in events.Scalars(tag)]


def test_crc32c_is_the_standard_one():
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4


def test_tensorboard_reads_each_metric(tmp_path):
    sink = TensorBoardSink(tmp_path)
    for row in (
        eval_row(step=0, eval_loss=8.0, eval_tokens=4),
        a_step(1),
        a_step(2),
        event_row("checkpoint", elapsed_s=1),
    ):
        sink.write({**row, "written_at_s": 1_700_000_000.5})
    sink.write(eval_row(step=2, eval_loss=4.0, eval_tokens=4))
    sink.close()
    assert curve(tmp_path, "train/loss") == [(1, 2.0), (2, 2.0)]
    assert curve(tmp_path, "train/data_wait_frac") == [(1, 0.02), (2, 0.02)]
    assert curve(tmp_path, "eval/eval_loss") == [(0, 8.0), (2, 4.0)]


@pytest.mark.parametrize("new_process", [False, True])
def test_a_restart_leaves_one_curve(tmp_path, new_process):
    sink = TensorBoardSink(tmp_path)
    for step in range(1, 11):
        sink.write(a_step(step))
    if new_process:
        sink.close()
        sink = TensorBoardSink(tmp_path)
    for step in range(7, 13):
        sink.write(a_step(step, loss=1.0))
    sink.close()
    assert curve(tmp_path, "train/loss") == [(s, 2.0) for s in range(1, 7)] + [(s, 1.0) for s in range(7, 13)]


def test_a_driver_that_reads_the_file_again_from_the_start_leaves_one_curve(tmp_path):
    for _ in range(2):
        sink = TensorBoardSink(tmp_path)
        for row in (
            eval_row(step=0, eval_loss=8.0, eval_tokens=4),
            a_step(1),
            a_step(2),
            eval_row(step=2, eval_loss=4.0, eval_tokens=4),
        ):
            sink.write(row)
        sink.close()
    assert curve(tmp_path, "train/loss") == [(1, 2.0), (2, 2.0)]
    assert curve(tmp_path, "eval/eval_loss") == [(0, 8.0), (2, 4.0)]


def test_nulls_are_not_written(tmp_path):
    row = a_step(1, loss=float("nan"))
    assert "train/loss" not in scalars(row) and "train/mfu" not in scalars(row) and "train/lr" in scalars(row)
    assert scalars(event_row("end", elapsed_s=1)) == {}


def test_tensorboard_files_need_no_framework(tmp_path):
    code = f"""
import sys
from pathlib import Path
from llm.observe.sinks import TensorBoardSink
TensorBoardSink(Path({str(tmp_path)!r})).close()
print([m for m in ("torch", "numpy", "botocore", "tensorflow", "tensorboardX") if m in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(("key", "module"), [("mlflow_uri", "mlflow"), ("wandb_project", "wandb")])
def test_a_missing_tracker_names_its_extra(tmp_path, monkeypatch, key, module):
    monkeypatch.setitem(sys.modules, module, None)
    log = LogSection.model_validate({key: "x"})
    with pytest.raises(ConfigError, match=rf"log.{key} is set, but {module} is not installed.*pip install 'headrace\[{module}\]'"):
        open_sinks(log, run_name="a", folder=tmp_path, params={}, warn=pytest.fail)


def test_trackers_are_off_by_default(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    open_sinks(LogSection(), run_name="a", folder=tmp_path, params={}, warn=pytest.fail).close()
    assert (tmp_path / "tensorboard").is_dir()


class AWandb(SimpleNamespace):
    """What is used of wandb."""

    def __init__(self) -> None:
        self.inits, self.logged, self.finished = [], [], []
        run = SimpleNamespace(id="run1", define_metric=lambda *a, **k: None, log=self.logged.append)
        run.finish = lambda exit_code: self.finished.append(exit_code)
        super().__init__(Settings=dict, init=lambda **kwargs: self.inits.append(kwargs) or run)


def test_wandb_is_offline_without_a_key_and_goes_on_in_the_same_run(tmp_path, monkeypatch):
    wandb = AWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    log = LogSection(tensorboard=False, wandb_project="p")
    for failed in (True, False):
        sinks = open_sinks(log, run_name="a", folder=tmp_path, params={"train": {"lr": 0.1}}, warn=pytest.fail)
        sinks.write([a_step(3), event_row("end", elapsed_s=1)])
        sinks.close(failed=failed)
        monkeypatch.setenv("WANDB_API_KEY", "local-0123456789")
    first, second = wandb.inits
    assert (first["mode"], first["id"], first["resume"]) == ("offline", None, None)
    assert (second["mode"], second["id"], second["resume"]) == ("online", "run1", "allow")
    assert first["config"] == {"train.lr": "0.1"} and wandb.finished == [1, 0]
    assert [row["step"] for row in wandb.logged] == [3, 3] and wandb.logged[0]["train/loss"] == 2.0


class AnMlflow(SimpleNamespace):
    """What is used of MLflow: a client that keeps its calls."""

    def __init__(self) -> None:
        self.calls = []
        super().__init__(MlflowClient=lambda tracking_uri: self)

    def __getattr__(self, name: str):
        def call(*args, **kwargs):
            self.calls.append((name, *args, kwargs))
            if name == "create_run":
                return SimpleNamespace(info=SimpleNamespace(run_id="r7"))
            return None if name == "get_experiment_by_name" else "0"

        return call

    def named(self, name: str) -> list[tuple]:
        return [call for call in self.calls if call[0] == name]


def test_mlflow_gets_batches_and_goes_on_in_the_same_run(tmp_path, monkeypatch):
    mlflow = AnMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "mlflow.entities", SimpleNamespace(Metric=lambda *values: values))
    log = LogSection(tensorboard=False, mlflow_uri="http://me:hunter2@tracker:5000")
    for _ in range(2):
        sinks = open_sinks(log, run_name="a", folder=tmp_path, params={"train": {"lr": 0.1}}, warn=pytest.fail)
        sinks.write([a_step(step) for step in range(1, 4)])
        sinks.close()
    assert len(mlflow.named("create_run")) == 1
    assert mlflow.named("log_param") == [("log_param", "r7", "train.lr", "0.1", {})]
    (_, run_id, first), _ = mlflow.named("log_batch")
    assert run_id == "r7" and len(first["metrics"]) <= 1000
    assert [(m[1], m[3]) for m in first["metrics"] if m[0] == "train/loss"] == [(2.0, 1), (2.0, 2), (2.0, 3)]
    assert mlflow.named("set_terminated") == [("set_terminated", "r7", {"status": "FINISHED"})] * 2
    assert "hunter2" not in (tmp_path / "trackers.json").read_text()


def test_a_tracker_that_refuses_is_a_config_error_without_the_key(tmp_path, monkeypatch):
    def refuse(**kwargs):
        raise RuntimeError("key local-0123456789 is not valid at https://me:hunter2@host")

    monkeypatch.setenv("WANDB_API_KEY", "local-0123456789")
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse, Settings=dict))
    with pytest.raises(ConfigError) as caught:
        open_sinks(LogSection(wandb_project="p"), run_name="a", folder=tmp_path, params={}, warn=pytest.fail)
    assert str(caught.value) == "log.wandb_project=p: key *** is not valid at https://***@host"
    assert caught.value.__cause__ is None


def test_a_tracker_that_breaks_is_left_out_and_told_once():
    class ABrokenSink:
        name = "Broken"

        def write(self, row):
            raise ConnectionError("gone")

        def close(self, *, failed=False):
            pytest.fail("it was left out")

    told: list[str] = []
    sinks = Sinks([ABrokenSink()], told.append)
    sinks.write([a_step(1), a_step(2)])
    sinks.close()
    assert told == ["Broken stopped: gone. metrics.jsonl has every row."]


def test_secrets_are_blanked_and_tokens_are_not():
    flat = flat_params(
        {
            "a": {"api_key": "s1", "aws_secret_access_key": "s2", "hf_token": "s3"},
            "sample_tokens": 64,
            "tokenizer": {"path": "t"},
        }
    )
    assert set(flat.values()) == {"***", "64", "t"}
    assert without_secrets("http://u:p@h/x and http://h/@x") == "http://***@h/x and http://h/@x"
