"""Whatever a crash leaves of a save, a publication or a removal, a reader finds whole checkpoints only, and all that were durable."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from llm.checkpoint import on_disk
from llm.checkpoint.layout import step_folder
from llm.checkpoint.newest import newest_good
from llm.checkpoint.store import CheckpointStore
from llm.config import S3Section
from tests.faults.crash_model import Op, RecordingOs, crash_states, materialize

Mark = Callable[[str], None]
IN_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # thousands of small folders


def contents(step: int) -> dict[str, bytes]:
    return {name: f"{name} of step {step}, ".encode() * 3 for name in ("rank-00000.safetensors", "rank-00001.safetensors", "state.json")}


def save(store: CheckpointStore, step: int, mark: Mark, keep: int = 2, keep_every: int = 0) -> None:
    folder = store.begin(step)
    entries = {name: store.write(folder, name, [data[:20], data[20:]]) for name, data in contents(step).items()}
    store.publish(step, folder, entries)
    mark(f"durable {step}")
    for old in store.steps():  # what prune may touch from here on
        if old not in store.steps()[:keep]:
            mark(f"removing {old}")
    store.prune(keep, keep_every)


def a_life(store: CheckpointStore, mark: Mark) -> None:
    """Three saves, one that ends half-way, the next attempt, a fallback that sets a checkpoint aside and saves its step again."""
    save(store, 1, mark)
    save(store, 2, mark)
    save(store, 3, mark)
    folder = store.begin(4)
    store.write(folder, "rank-00000.safetensors", [b"half of it"])
    save(store, 4, mark)
    mark("removing 4")
    store.set_aside(4)
    save(store, 4, mark)


def two_saves(store: CheckpointStore, mark: Mark) -> None:
    save(store, 1, mark)
    save(store, 2, mark)


def record(folder: Path, monkeypatch: pytest.MonkeyPatch, forget: tuple[str, ...] = (), life=two_saves) -> list[Op]:
    recording = RecordingOs(folder, forget)
    with monkeypatch.context() as patched:
        patched.setattr(on_disk, "os", recording)
        life(CheckpointStore(str(folder / "run"), S3Section()), recording.mark)
    return recording.ops


def expected_steps(ops: list[Op]) -> set[int]:
    """Steps whose publication had returned, and whose removal had not begun."""
    found: set[int] = set()
    for op in ops:
        if op.kind == "mark":
            what, _, step = op.path.partition(" ")
            found = found | {int(step)} if what == "durable" else found - {int(step)}
    return found


def problems(run: Path, durable: set[int]) -> list[str]:
    """What a reader finds amiss."""
    store = CheckpointStore(str(run), S3Section())
    found = []
    for step in store.steps():
        published = store.open(step)
        if published.damage() or {name: published.read(name) for name in published.files} != contents(step):
            found.append(f"half of step {step} is seen")
    if not durable <= set(store.steps()):
        found.append(f"durable steps {sorted(durable - set(store.steps()))} are lost")
    newest = newest_good(store, lambda published: published.require_files())
    if durable and (newest is None or newest.published.step < max(durable)):
        found.append("the newest durable one is not taken")
    return found


def examine(ops: list[Op], enough: int = 10**9) -> tuple[int, list[str]]:
    """(number of states, what was wrong in them); ends early with `enough` problems."""
    number, wrong = 0, []
    for begun, tree in crash_states(ops):
        number += 1
        with tempfile.TemporaryDirectory(dir=IN_MEMORY) as root:
            materialize(tree, Path(root))
            try:
                found = problems(Path(root) / "run", expected_steps(ops[:begun]))
            except Exception as error:
                found = [f"{type(error).__name__}: {error}"]
            wrong += [f"after {begun} operations: {each}" for each in found]
            if len(wrong) >= enough:
                break
    return number, wrong


def test_every_crash_state_of_two_saves(tmp_path, monkeypatch):
    number, wrong = examine(record(tmp_path, monkeypatch))
    assert wrong == []
    assert number > 100


@pytest.mark.faults
def test_every_crash_state_of_a_life(tmp_path, monkeypatch):
    ops = record(tmp_path, monkeypatch, life=a_life)
    number, wrong = examine(ops)
    print(f"{len(ops)} operations, {number} states")
    assert wrong == []
    assert number > 500


def test_a_new_attempt_goes_on_from_any_moment(tmp_path, monkeypatch):
    ops = record(tmp_path, monkeypatch, life=a_life)
    for number, tree in list(crash_states(ops))[::97]:
        with tempfile.TemporaryDirectory(dir=IN_MEMORY) as root:
            materialize(tree, Path(root))
            store = CheckpointStore(f"{root}/run", S3Section())
            save(store, 9, lambda name: None)
            assert store.steps()[0] == 9 and not problems(Path(root) / "run", {9}), number
            left = {path.name for path in Path(store.uri).iterdir() if "damaged" not in path.name}
            assert left == {step_folder(step) for step in store.steps()}


@pytest.mark.parametrize("forget", ["sync", "sync_folder"])
def test_the_harness_finds_a_protocol_without(tmp_path, monkeypatch, forget):
    _, wrong = examine(record(tmp_path, monkeypatch, (forget,)), enough=1)
    assert wrong


def test_the_harness_finds_files_removed_under_their_checkpoint_name(tmp_path, monkeypatch):
    def remove(self, step, attempt):
        self._empty_and_remove(step_folder(step))

    monkeypatch.setattr(on_disk.DiskCheckpoints, "remove", remove)
    _, wrong = examine(record(tmp_path, monkeypatch, life=lambda store, mark: [save(store, step, mark) for step in (1, 2, 3)]))
    assert any("half of step 1" in each or "step-00000001" in each for each in wrong)
