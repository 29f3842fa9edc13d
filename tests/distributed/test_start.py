"""A run that starts from another run's checkpoint: at its weights, its optimizer's state and its place in the data, in any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm.errors import CheckpointError
from llm.metrics import Row, read_rows, rows_of
from tests.distributed.checkpoint_runs import MODEL, Layout, damage, layout_config, open_store, train_run
from tests.distributed.layouts import run_ranks

STEPS, CUT = 8, 4


def run(layout: Layout, folder: Path, start: Path | None = None, **train: Any) -> list[str]:
    checkpoint = {"start_from": str(start / "checkpoints" / f"step-{CUT:08d}")} if start else {}
    config = layout_config(layout, STEPS, checkpoint, **train)
    return run_ranks(train_run, config.parallel.workers, config, str(folder), MODEL)


def steps_of(folder: Path) -> list[Row]:
    return rows_of(read_rows(folder / "metrics.jsonl"), "step")


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of STEPS steps that paused at CUT."""
    folder = tmp_path_factory.mktemp("donor")
    run((1, 1, 2), folder, until_step=CUT)
    return folder


def test_a_paused_run_says_so_and_goes_on_as_if_it_had_not_been(tmp_path):
    layout = (1, 1, 2)
    expected = run(layout, tmp_path / "whole")
    run(layout, tmp_path / "cut", until_step=CUT)
    rows = read_rows(tmp_path / "cut" / "metrics.jsonl")
    assert [(row["status"], row["step"]) for row in rows_of(rows, "event", "end")] == [("paused", CUT)]
    assert run(layout, tmp_path / "cut") == expected
    assert open_store(str(tmp_path / "cut")).steps() == [STEPS, CUT]


def test_the_same_layout_goes_on_bit_for_bit(tmp_path, donor):
    expected = run((1, 1, 2), tmp_path / "whole")
    assert run((1, 1, 2), tmp_path / "other", donor) == expected
    rows = read_rows(tmp_path / "other" / "metrics.jsonl")
    assert [row["step"] for row in rows_of(rows, "step")] == list(range(CUT + 1, STEPS + 1))
    assert rows_of(rows, "event", "started")[0]["step"] == CUT and not rows_of(rows, "event", "restart")
    assert open_store(str(donor)).steps() == [CUT] and open_store(str(tmp_path / "other")).steps() == [STEPS]


@pytest.mark.parametrize("layout", [(3, 1, 2), (1, 2, 1), (0, 1, 1)])
def test_another_layout_goes_on_with_the_same_losses_and_ledger(tmp_path, donor, layout):
    run((1, 1, 1), tmp_path / "whole")
    run(layout, tmp_path / "other", donor)
    expected, found = steps_of(tmp_path / "whole")[CUT:], steps_of(tmp_path / "other")
    assert [row["ledger"] for row in found] == [row["ledger"] for row in expected]
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], abs=1e-4)


def test_another_learning_rate_counts_from_the_start_on(tmp_path, donor):
    run((1, 1, 2), tmp_path / "same", donor)
    run((1, 1, 2), tmp_path / "other", donor, lr=1e-5)
    same, other = steps_of(tmp_path / "same"), steps_of(tmp_path / "other")
    assert other[0]["loss"] == same[0]["loss"] and other[0]["lr"] == 1e-5
    assert other[-1]["loss"] > same[-1]["loss"] + 1e-3


def test_a_run_with_checkpoints_of_its_own_goes_on_from_those(tmp_path, donor):
    expected = run((1, 1, 2), tmp_path / "whole", donor)
    run((1, 1, 2), tmp_path / "cut", donor, until_step=CUT + 2)
    assert run((1, 1, 2), tmp_path / "cut", donor) == expected
    assert [row["step"] for row in rows_of(read_rows(tmp_path / "cut" / "metrics.jsonl"), "event", "restart")] == [CUT + 2]


def test_a_damaged_start_ends_the_run_and_harms_nobody(tmp_path):
    run((1, 1, 2), tmp_path / "donor", until_step=CUT)
    damage(tmp_path / "donor" / "checkpoints" / f"step-{CUT:08d}" / "rank-00000.safetensors")
    with pytest.raises(CheckpointError, match="are not those that were saved"):
        run((1, 1, 2), tmp_path / "other", tmp_path / "donor")
    assert open_store(str(tmp_path / "donor")).steps() == [CUT], "another run's checkpoint is not ours to set aside"
