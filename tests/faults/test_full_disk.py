"""A file system that really is full: the save fails as one of a full disk, nothing half-written is published, and with room it goes on.

A tmpfs of a size of its own, so only where this process may mount one. Under gloo, without Ray: `failure_of` and `Budget` judge each end
as Ray's controller has them do.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from llm.config import RecoverySection, RunConfig
from llm.errors import HeadraceError
from llm.train.causes import Budget, Cause, Verdict, failure_of
from tests.distributed.checkpoint_runs import layout_config, open_store, train_run
from tests.distributed.layouts import llama, run_ranks

MODEL = llama(vocab_size=97, attention_dropout=0.1)
STEPS, SAVE_EVERY = 10, 2


@dataclass
class Disk:
    folder: Path

    def resize(self, num_bytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={num_bytes}", str(self.folder)], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(folder)], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount command here")
    if mounted.returncode:
        pytest.skip(f"this process may not mount a file system: {mounted.stderr.strip()}")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", str(folder)], check=True, capture_output=True)


def _rank(rank: int, world_size: int, config: RunConfig, run_uri: str) -> str:
    return train_run(rank, world_size, config, run_uri, MODEL)


@pytest.mark.faults
def test_a_full_disk_ends_the_run_with_its_name_and_with_room_the_run_ends_the_same(tmp_path: Path, disk: Disk):
    config = layout_config((1, 1, 1), STEPS, {"every_steps": SAVE_EVERY, "keep": 2})
    whole, run = tmp_path / "whole", disk.folder / "run"
    expected = run_ranks(_rank, 1, config, str(whole))
    checkpoint = whole / "checkpoints" / f"step-{STEPS:08d}"
    disk.resize(sum(path.stat().st_size for path in checkpoint.iterdir()) * 3 // 2)

    budget, verdict, failures = Budget(RecoverySection(max_storage_errors=2)), Verdict(), []
    while verdict.gave_up is None:
        with pytest.raises(HeadraceError) as raised:
            run_ranks(_rank, 1, config, str(run))
        failures.append(failure_of({0: raised.value}))
        verdict = budget.judge(failures[-1], SAVE_EVERY, float(len(failures)))
        assert open_store(str(run)).steps() == [SAVE_EVERY]
    assert [failure.cause for failure in failures] == [Cause.STORAGE_FULL] * 3
    for told in (
        str(disk.folder),
        "No space left on device",
        "Free some space",
        "recovery.max_storage_errors=2",
        "The same command goes on",
    ):
        assert told in verdict.gave_up

    disk.resize(256 << 20)
    assert run_ranks(_rank, 1, config, str(run)) == expected
    assert open_store(str(run)).steps() == [STEPS, STEPS - SAVE_EVERY]
