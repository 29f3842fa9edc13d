"""The store on a disk: what stays after pruning, reading by blocks, files of every size, and the command that shows it."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from jobs.checkpoints import main as checkpoints
from jobs.export import main as export
from llm.checkpoint import manifest, published
from llm.checkpoint.layout import STATE, rank_file, step_folder
from llm.checkpoint.manifest import MANIFEST, EntryHasher, FileEntry, Manifest
from llm.checkpoint.newest import newest_good, newest_state, read_newest
from llm.checkpoint.published import Published
from llm.checkpoint.store import CheckpointStore
from llm.config import S3Section
from llm.errors import CheckpointError, DamagedCheckpointError, StorageError
from tests.made_checkpoint import contents, publish


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(str(tmp_path / "run"), S3Section())


def damage(store: CheckpointStore, step: int, name: str = rank_file(1)) -> None:
    path = Path(store.path_of(step)) / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_keep_and_keep_every(store):
    for step in range(1, 11):
        publish(store, step)
        store.prune(keep=2, keep_every=4)
    assert store.steps() == [10, 9, 8, 4]
    assert store.prune(keep=1) == [8, 4]  # keep=1 keeps two: one may turn out to be damaged
    assert store.prune(keep=1) == []
    assert sorted(path.name for path in Path(store.uri).iterdir()) == [step_folder(9), step_folder(10)]


@pytest.mark.parametrize("fresh", [False, True], ids=["the process that saved", "another process"])
@pytest.mark.parametrize(
    ("damaged", "left"), [((5,), [5, 4, 3]), ((5, 4), [5, 4, 3, 2]), ((4,), [5, 4, 3]), ((5, 3), [5, 4, 3, 2]), ((2, 3), [5, 4])]
)
def test_pruning_spares_the_last_two_good_ones(store, damaged, left, fresh):
    for step in range(1, 6):
        publish(store, step)
    for step in damaged:
        damage(store, step)
    if fresh:
        store = CheckpointStore(str(Path(store.uri).parent), S3Section())
    store.prune(keep=1)
    assert store.steps() == left


def test_what_this_process_hashed_is_not_hashed_again(store, monkeypatch):
    for step in range(1, 5):
        publish(store, step)
    read: list[int] = []
    hash_all = Published.damage
    monkeypatch.setattr(Published, "damage", lambda self: read.append(self.step) or hash_all(self))
    store.prune(keep=2)
    assert read == []
    damage(store, 4)
    publish(store, 5)
    publish(store, 6)
    assert store.prune(keep=1) == [4, 3] and read == []
    damage(store, 6)
    publish(store, 7)
    store.prune(keep=1)
    assert store.steps() == [7, 6, 5] and read == [6]


def test_a_damaged_checkpoint_is_replaced_and_a_whole_one_is_not(store):
    publish(store, 1)
    with pytest.raises(CheckpointError, match="is there already, and whole"):
        store.begin(1)
    damage(store, 1)
    publish(store, 1)
    assert store.open(1).damage() == {}
    aside = [path for path in Path(store.uri).iterdir() if "damaged" in path.name]
    assert len(aside) == 1 and (aside[0] / MANIFEST).exists()


def test_nothing_is_published_that_is_not_there(store):
    folder = store.begin(1)
    entry = store.write(folder, STATE, [b"a"])
    for entries in ({STATE: FileEntry(2, entry.block_sha256)}, {STATE: entry, rank_file(0): entry}):
        with pytest.raises(CheckpointError, match=r"bytes were written, and (1 are|none are) here"):
            store.publish(1, folder, entries)
    with pytest.raises(DamagedCheckpointError, match="is no name"):
        store.write(folder, "../outside", [b"a"])
    assert store.steps() == [] and newest_state(store).step == 0 and read_newest(store) is None
    store.abandon(folder)
    assert list(Path(store.uri).iterdir()) == []


def test_a_full_disk_leaves_no_part_of_a_file(store, monkeypatch):
    import errno

    from llm.checkpoint import on_disk

    folder = store.begin(1)

    def full(file: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(on_disk.os, "write", full)
        with pytest.raises(StorageError, match=r"rank-00000\.safetensors: cannot write: No space left on device\. Free some space"):
            store.write(folder, rank_file(0), [b"a"])
    assert list((Path(store.uri) / folder).iterdir()) == []
    store.write(folder, rank_file(0), [b"a"])


def test_all_damaged_is_an_error_that_tells_each(store):
    for step in (1, 2):
        publish(store, step)
        damage(store, step, STATE)
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint in .* can be used:.*step-00000002: .*step-00000001: .*start anew"):
        newest_state(store)


def test_an_error_that_no_older_one_would_help_ends_the_search(store):
    for step in (1, 2):
        publish(store, step)

    def another_model(checkpoint: Published) -> None:
        raise CheckpointError(f"{checkpoint.step} is of another model")

    with pytest.raises(CheckpointError, match="2 is of another model"):
        newest_good(store, another_model)


def test_a_checkpoint_of_format_1_is_named(store):
    publish(store, 1)
    (Path(store.path_of(1)) / MANIFEST).write_text('{"format": 1, "step": 1, "files": {"state.json": {"size_bytes": 1, "sha256": "a"}}}')
    with pytest.raises(DamagedCheckpointError, match="is of format 1, of a Headrace before this one, which reads format 2 only"):
        store.open(1)


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 128, 1000])
def test_blocks_read_as_they_were_written(store, monkeypatch, size):
    for module in (manifest, published):
        monkeypatch.setattr(module, "BLOCK_BYTES", 64)
    rng = random.Random(size)
    data = rng.randbytes(size)
    cuts = sorted(rng.randint(0, size) for _ in range(5))
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, size], strict=True)]
    folder = store.begin(1)
    entry = store.write(folder, "x.bin", [bytearray(piece) for piece in pieces])
    assert entry.block_sha256 == tuple(hashlib.sha256(data[i : i + 64]).hexdigest() for i in range(0, size, 64))
    store.publish(1, folder, {"x.bin": entry})
    checkpoint = store.open(1)
    for _ in range(100):
        start, stop = sorted((rng.randint(0, size), rng.randint(0, size)))
        assert checkpoint.read_range("x.bin", start, stop) == data[start:stop]
    assert b"".join(checkpoint.blocks("x.bin")) == data == checkpoint.read("x.bin")
    if size > 64:
        path = Path(checkpoint.uri) / "x.bin"
        path.write_bytes(data[:64] + bytes([data[64] ^ 1]) + data[65:])
        checkpoint = store.open(1)
        assert checkpoint.read_range("x.bin", 3, 64) == data[3:64]  # only what is used is read
        with pytest.raises(DamagedCheckpointError, match=r"x\.bin is damaged: bytes 64 to"):
            checkpoint.read_range("x.bin", 3, 65)


def test_an_entry_and_a_manifest_come_back():
    hasher = EntryHasher()
    hasher.update(memoryview(b"abc"))
    entry = hasher.entry()
    assert FileEntry.from_json(entry.to_json()) == entry
    whole = Manifest(3, "", {"a.json": entry, "b.json": FileEntry(0, ())})
    assert Manifest.from_bytes(whole.to_bytes(), 3, "x") == whole
    with pytest.raises(DamagedCheckpointError, match="x is of step 3, and lies in the folder of step 4"):
        Manifest.from_bytes(whole.to_bytes(), 4, "x")


def test_ls_verify_inspect_digest(store, capsys):
    run = str(Path(store.uri).parent)
    assert checkpoints(["ls", "--run", run]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
    for step in (10, 20):
        publish(store, step)
    assert checkpoints(["ls", "--run", run]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told] == ["step", "20", "10"] and "2 x ZeRO 1, tensor 1, fp32" in told[1] and "2,000" in told[1]
    assert checkpoints(["verify", "--run", run]) == 0
    assert capsys.readouterr().out.count("whole (4 files") == 2
    assert checkpoints(["inspect", "--run", run]) == 0
    told = capsys.readouterr().out
    for part in (
        "step 20, 2,000 tokens, cursor: epoch 0, window 0, row 0",
        "layout: workers=2",
        "embed.weight",
        "12x8",
        "exp_avg_sq",
        STATE,
    ):
        assert part in told, told
    assert checkpoints(["digest", "--run", run, "--step", "10"]) == 0
    first = capsys.readouterr().out.split()[0]
    assert checkpoints(["digest", "--run", run]) == 0
    second = capsys.readouterr().out.split()[0]
    assert len(first) == len(second) == 64 and first != second
    assert checkpoints(["inspect", "--run", run, "--step", "11"]) == 2
    assert "has no checkpoint of step 11. Nearest: 10, 20" in capsys.readouterr().err


def test_damage_in_the_commands(store, capsys):
    run = str(Path(store.uri).parent)
    for step in (10, 20):
        publish(store, step)
    damage(store, 20)
    assert checkpoints(["verify", "--run", run]) == 1
    told = capsys.readouterr().out
    assert "step-00000020: DAMAGED" in told and "rank-00001.safetensors is damaged" in told and "step-00000010: whole" in told
    assert checkpoints(["verify", "--run", run, "--step", "10"]) == 0
    capsys.readouterr()
    assert checkpoints(["digest", "--run", run]) == 0
    done = capsys.readouterr()
    assert "taking step 10 instead" in done.err and step_folder(10) in done.out
    (Path(store.path_of(20)) / STATE).unlink()
    assert checkpoints(["ls", "--run", run]) == 1
    assert "state.json is missing" in capsys.readouterr().out


def test_export_refuses_what_it_would_overwrite_and_what_is_no_run(store, tmp_path, capsys):
    publish(store, 10, contents(10))
    run = Path(store.uri).parent
    assert export(["--run", str(run), "--to", str(tmp_path / "out")]) == 2
    assert "is no run: it has no config.yaml" in capsys.readouterr().err
    assert export(["--run", str(run), "--to", str(tmp_path)]) == 2
    assert "it exists, and nothing is overwritten" in capsys.readouterr().err
