"""A disk that is really full: saves fail, nothing is published in halves, and the run goes on when there is room again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llm.metrics import rows_of
from tests.kills import Watched, checkpoints, finish, ledger
from tests.small_disk import SmallDisk, small_disk
from tests.small_run import start_run

SETTINGS = (
    "train.steps=400",
    "checkpoint.every_steps=10",
    "checkpoint.keep=3",
    "eval.rows=0",
    "export.enabled=false",
    "parallel.workers=2",
    "recovery.max_without_progress=100",
    "recovery.first_wait_s=0",
)
LESS_THAN_A_CHECKPOINT = 64 << 10  # of some 400 KB; enough for rows

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", 24 << 20) as disk:
        yield disk


def start(recipe: Path, disk: SmallDisk, *settings: str) -> Watched:
    process = start_run(recipe, *SETTINGS, *settings, f"run.storage={disk.path}", before=disk.entering)
    return Watched(process, disk.seen / "small")


def assert_ends_as_undisturbed(recipe: Path, run: Path) -> None:
    finish(start_run(recipe, *SETTINGS, "run.name=whole"))
    whole = recipe.parent / "runs" / "whole"
    assert ledger(run) == ledger(whole)
    assert checkpoints(run) == checkpoints(whole)


def test_a_run_finishes_by_itself_when_there_is_room_again_during_its_restarts(recipe: Path, disk: SmallDisk):
    run = start(recipe, disk, "recovery.max_storage_errors=20")
    run.await_row("step", count=25)
    disk.fill(but_for_bytes=LESS_THAN_A_CHECKPOINT)
    restart = rows_of(run.await_row("event", "restart"), "event", "restart")[0]
    assert restart["cause"] == "storage full", restart
    disk.make_room()
    finish(run.process)
    assert_ends_as_undisturbed(recipe, run.run)


def test_a_run_whose_disk_stays_full_says_so_and_the_same_command_goes_on_when_there_is_room(recipe: Path, disk: SmallDisk):
    run = start(recipe, disk, "recovery.max_storage_errors=1")
    run.await_row("step", count=25)
    disk.fill()
    _, err = run.process.communicate(timeout=300)
    assert run.process.returncode == 1, err
    assert "storage full" in err and "No space left" in err and str(disk.path) in err and "Free some space there" in err, err
    assert "recovery.max_storage_errors=1 restarts in 24 hours are used up" in err and "Traceback" not in err, err
    published = list((run.run / "checkpoints").glob("step-*"))
    assert published and all((folder / "MANIFEST.json").stat().st_size for folder in published), published
    disk.make_room()
    run = start(recipe, disk)
    finish(run.process)
    assert_ends_as_undisturbed(recipe, run.run)
