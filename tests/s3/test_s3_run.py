"""The main job with corpus, tokenizer and run on S3: nothing but the report's mirror is kept on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.export import main as export
from jobs.pretrain import main
from llm.metrics import MetricsTail, rows_of
from tests.s3_server import S3Server
from tests.small_run import start_run, write_small_run

ON_S3 = (
    "run.storage=s3://lake/runs",
    "data.sources.0.uri=s3://lake/corpus/*.jsonl",
    "tokenizer.path=s3://lake/tokenizer",
    "parallel.workers=2",
    "parallel.zero_stage=2",
)


@pytest.fixture(scope="module")
def recipe(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_small_run(tmp_path_factory.mktemp("run"))
    client = s3_server.client()
    client.create_bucket(Bucket="lake")
    for folder in ("corpus", "tokenizer"):
        for file in (path.parent / folder).iterdir():
            client.put_object(Bucket="lake", Key=f"{folder}/{file.name}", Body=file.read_bytes())
    return path


def objects(server: S3Server) -> dict[str, bytes]:
    client = server.client()
    listed = client.list_objects_v2(Bucket="lake", Prefix="runs/small/").get("Contents", [])
    return {item["Key"].removeprefix("runs/small/"): client.get_object(Bucket="lake", Key=item["Key"])["Body"].read() for item in listed}


def test_a_run_on_s3_trains_exports_and_resumes(s3_env: S3Server, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for steps in (6, 8):
        done = start_run(recipe, *ON_S3, f"train.steps={steps}", "train.schedule=constant")
        _, err = done.communicate(timeout=400)
        assert done.returncode == 0, err[-3000:]
    kept = objects(s3_env)
    rows = MetricsTail(lambda offset: kept["metrics.jsonl"][offset:]).poll()
    assert [row["step"] for row in rows_of(rows, "step")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert rows_of(rows, "event", "restart")[0]["step"] == 6
    assert rows_of(rows, "event", "export")[-1]["max_logit_difference"] < 1e-4
    for name in (
        "config.yaml",
        "report.html",
        "export/model.safetensors",
        "export/tokenizer.json",
        "checkpoints/step-00000008/MANIFEST.json",
    ):
        assert len(kept[name]) > 100, name
    assert any(name.startswith("quarantine/") for name in kept)
    assert export(["--run", "s3://lake/runs/small", "--to", "s3://lake/runs/small/export"]) == 2
    assert "it exists, and nothing is overwritten" in capsys.readouterr().err
    assert export(["--run", "s3://lake/runs/small", "--to", "s3://lake/exported"]) == 0


@pytest.mark.parametrize("override", ["run.storage=s3://lake/runs", "data.sources.0.uri=s3://lake/corpus/*.jsonl"])
def test_a_bucket_that_may_not_be_read_is_one_named_error(s3_env, recipe, override, monkeypatch, capsys) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    monkeypatch.chdir(recipe.parent)
    assert main(["--config", str(recipe), "--set", override, "--set", "run.name=denied"]) != 0
    told = capsys.readouterr().err
    assert "s3://lake" in told and "access denied" in told and "Traceback" not in told
