"""S3's twin of the crash states: a process may die before any of its requests, and a reader finds whole checkpoints only."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from llm.checkpoint import on_s3
from llm.checkpoint.newest import newest_good
from llm.checkpoint.store import CheckpointStore
from llm.config import S3Section
from llm.errors import CheckpointError, StorageError
from tests.faults.memory_s3 import Death, MemoryS3
from tests.faults.test_crash_states import a_life, contents, save


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> MemoryS3:
    server = MemoryS3()
    monkeypatch.setattr(on_s3, "s3_once", lambda *args, **keys: server)
    monkeypatch.setattr(on_s3, "PART_BYTES", 50)  # the contents have two parts
    return server


def store() -> CheckpointStore:
    return CheckpointStore("s3://bucket/run", S3Section())


def live_until_death(server: MemoryS3, life: Callable) -> set[int]:
    """Steps that were durable and not to be removed when it died."""
    durable: set[int] = set()

    def mark(name: str) -> None:
        what, _, step = name.partition(" ")
        (durable.add if what == "durable" else durable.discard)(int(step))

    with suppress(Death):
        life(store(), mark)
    return durable


def test_every_prefix_of_the_requests(server):
    live_until_death(server, a_life)
    total = server.changes
    assert total > 60
    for number in range(total + 1):
        server.__init__(die_at=number)
        durable = live_until_death(server, a_life)
        server.die_at = None
        reader = store()
        for step in reader.steps():
            published = reader.open(step)
            assert published.damage() == {}
            assert {name: published.read(name) for name in published.files} == contents(step)
        assert durable <= set(reader.steps()), number
        newest = newest_good(reader, lambda published: published.require_files())
        assert not durable or (newest and newest.published.step >= max(durable))
        save(store(), 9, lambda name: None)  # the next attempt
        assert store().steps()[0] == 9 and store().open(9).damage() == {}
        assert server.uploads == {}
        left = {key.split("/")[2] for key in server.objects if "MANIFEST.damaged" not in key}
        visible = {f"step-{step:08d}" for step in store().steps()}
        assert left - visible <= {"step-00000004"}, "only what was set aside is left"


def test_the_loser_of_two_drivers_gives_up_and_the_winner_stays(server):
    first, second = store(), store()
    folders, entries = [], []
    for each, data in ((first, b"a"), (second, b"b")):
        folders.append(each.begin(1))
        entries.append(each.write(folders[-1], "state.json", [data]))
    with pytest.raises(CheckpointError, match="another driver"):
        first.publish(1, folders[0], {"state.json": entries[0]})  # its files were cleared by the second
    second.publish(1, folders[1], {"state.json": entries[1]})
    third = first._files.begin(1, "0" * 16)
    entry = first.write(third, "state.json", [b"c"])
    with pytest.raises(CheckpointError, match="published by another driver"):
        first.publish(1, third, {"state.json": entry})
    assert store().open(1).read("state.json") == b"b"


def test_an_answer_that_was_lost_is_no_other_driver(server, monkeypatch):
    """The commit went through, its answer did not come: the second try is refused, and the object is our own."""
    put = server.put_object
    lost = []

    def put_and_lose(**given):
        answer = put(**given)
        if "IfNoneMatch" in given and not lost:
            lost.append(given["Key"])
            raise ConnectionError("reset by peer")
        return answer

    monkeypatch.setattr(server, "put_object", put_and_lose)
    monkeypatch.setattr(on_s3, "patiently", lambda attempt, *rest: patient(attempt))
    save(store(), 1, lambda name: None)
    assert lost and store().open(1).damage() == {}


def test_a_save_that_was_published_without_any_answer_is_not_taken_back(server, monkeypatch):
    """The saver gives the save up, and what it removes must not be the checkpoint that everybody sees."""
    put = server.put_object

    def put_and_fail(**given):
        put(**given)
        if "IfNoneMatch" in given:
            raise ConnectionError("reset by peer")

    monkeypatch.setattr(server, "put_object", put_and_fail)
    monkeypatch.setattr(on_s3, "patiently", lambda attempt, *rest: attempt())
    saver = store()
    folder = saver.begin(1)
    entry = saver.write(folder, "state.json", [b"a"])
    with pytest.raises(StorageError):
        saver.publish(1, folder, {"state.json": entry})
    saver.abandon(folder)
    unpublished = saver.begin(2)
    saver.write(unpublished, "state.json", [b"b"])
    saver.abandon(unpublished)
    assert store().steps() == [1] and store().open(1).damage() == {}
    assert not [key for key in server.objects if "step-00000002" in key]


def patient(attempt):
    try:
        return attempt()
    except ConnectionError:
        return attempt()


def test_two_drivers_on_a_disk(tmp_path: Path):
    first, second = (CheckpointStore(str(tmp_path), S3Section()) for _ in range(2))
    folder = first.begin(1)
    entry = first.write(folder, "state.json", [b"a"])
    save(second, 1, lambda name: None)  # clears the first one's folder
    with pytest.raises(CheckpointError, match="another driver"):
        first.publish(1, folder, {"state.json": entry})
    late = first._files.begin(1, "0" * 16)
    entry = first.write(late, "state.json", [b"a"])
    with pytest.raises(CheckpointError, match="published by another driver"):
        first.publish(1, late, {"state.json": entry})
    assert second.open(1).damage() == {}


def test_the_fence_is_asked_right_before_publishing(tmp_path: Path):
    lost: list[bool] = []

    def fence() -> None:
        if lost:
            raise CheckpointError("another driver has taken the run over")

    store = CheckpointStore(str(tmp_path), S3Section(), fence)
    folder = store.begin(1)
    entry = store.write(folder, "state.json", [b"a"])
    lost.append(True)
    for act in (lambda: store.publish(1, folder, {"state.json": entry}), lambda: store.begin(2)):
        with pytest.raises(CheckpointError, match="taken the run over"):
            act()
    assert store.steps() == []
