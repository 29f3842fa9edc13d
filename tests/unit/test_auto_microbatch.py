"""`train.microbatch_rows: auto` is decided once, by a measurement of the same setting, else by a rule; a run keeps what was decided."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm.config import RunConfig
from llm.config_changes import config_differences
from llm.config_file import dump_run, parse_run
from llm.errors import ConfigError
from llm.job import Job
from llm.train.elastic import with_workers
from llm.train.tune.auto import Record, as_recorded, decide, decided, is_open, read_record, record_uri, write_record
from tests.distributed.layouts import llama, make_config, make_job

RECORD = Record(12, 16, 1 << 30, 1 << 29, "2026-01-01T00:00:00+00:00")


def job(tmp_path, **changes) -> Job:
    parallel = {"workers": 2, **changes.pop("parallel", {})}
    config = make_config(
        run={"name": "a", "storage": str(tmp_path)}, parallel=parallel, data={"seq_len": 2048}, train={"batch_rows": 96, **changes}
    )
    return make_job(config, llama(max_position_embeddings=2048))


def test_without_a_measurement_the_rule_of_8192_tokens_counts_and_is_recorded(tmp_path):
    assert decide(job(tmp_path), "one GPU") == (4, None)
    assert job(tmp_path).config.microbatch_rows == decided(job(tmp_path).config, 4).microbatch_rows == 4


def test_a_measurement_of_the_same_setting_is_taken(tmp_path):
    write_record(job(tmp_path), "one GPU", RECORD)
    at_most, told = decide(job(tmp_path), "one GPU")
    assert at_most == 12 and told is not None and "12 rows" in told
    assert decided(job(tmp_path).config, at_most).microbatch_rows == 12
    other_batch = job(tmp_path, batch_rows=2 * 10)  # a rank's 10 rows: 5 is the largest legal size under 12 but 10 itself
    assert decided(other_batch.config, decide(other_batch, "one GPU")[0]).microbatch_rows == 10


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel": {"zero_stage": 3}},
        {"parallel": {"workers": 4}},
        {"parallel": {"tensor": 2}},
        {"activation_checkpointing": True},
        {"optimizer": "sgd"},
        {"precision": "bf16"},
    ],
)
def test_a_measurement_of_another_setting_is_not(tmp_path, changes):
    write_record(job(tmp_path), "one GPU", RECORD)
    assert read_record(job(tmp_path, **changes), "one GPU") is None
    assert read_record(job(tmp_path), "another GPU") is None


def test_what_only_changes_the_batch_or_the_name_keeps_the_measurement(tmp_path):
    assert record_uri(job(tmp_path, batch_rows=48, lr=1e-4, steps=7), "x") == record_uri(job(tmp_path), "x")


def test_a_damaged_record_is_refused_by_name(tmp_path):
    uri = write_record(job(tmp_path), "one GPU", RECORD)
    for text in ("{", "{}", '{"measured": {"rows": 3}}'):
        Path(uri).write_text(text)
        with pytest.raises(ConfigError, match="measure again with headrace tune_batch"):
            decide(job(tmp_path), "one GPU")


def test_a_run_that_goes_on_keeps_what_was_decided(tmp_path):
    config = job(tmp_path).config
    before = parse_run(dump_run(decided(config, 6)), "config.yaml")
    again = as_recorded(config, before)
    assert (again.microbatch_rows, is_open(again)) == (6, False)
    assert not config_differences(before, config)
    # Recorded before there was anything to decide: the rule that it ran with.
    assert as_recorded(config, config).microbatch_rows == 4


@pytest.mark.parametrize("changes", [{"parallel": {"zero_stage": 3}}, {"parallel": {"workers": 4}}, {"activation_checkpointing": True}])
def test_on_another_layout_it_is_decided_anew(tmp_path, changes):
    before = decided(job(tmp_path).config, 6)
    assert is_open(as_recorded(job(tmp_path, **changes).config, before))


def test_the_users_own_number_stays(tmp_path):
    before = decided(job(tmp_path).config, 6)
    for own in ({"microbatch_rows": 3}, {"microbatch_rows_at_most": 3}):
        config = job(tmp_path, **own).config
        assert not is_open(config)
        assert as_recorded(config, before).microbatch_rows == 3


def test_fewer_workers_than_were_measured_take_no_more_than_the_rule():
    config = decided(make_config(parallel={"workers": 4, "min_workers": 2}, data={"seq_len": 2048}, train={"batch_rows": 96}), 12)
    assert config.microbatch_rows == 12
    assert with_workers(config, 4).microbatch_rows == 12
    assert with_workers(config, 2).microbatch_rows == 4
    small = decided(config, 2)
    assert with_workers(small, 2).microbatch_rows == 2


def test_it_must_be_at_least_one():
    with pytest.raises(ValueError):
        RunConfig.model_validate({**decided(make_config(), 1).model_dump(), "train": {"steps": 1, "lr": 1, "microbatch_rows_at_most": 0}})
