"""Damage of every kind is found before a tensor is used, and the next older checkpoint is taken."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llm.checkpoint.digest import digest
from llm.checkpoint.layout import rank_file, step_folder
from llm.checkpoint.manifest import MANIFEST
from llm.checkpoint.newest import newest_good, read_newest
from llm.checkpoint.published import Published
from llm.checkpoint.store import CheckpointStore
from llm.config import S3Section
from llm.errors import DamagedCheckpointError
from tests.made_checkpoint import contents, publish, read_all, values

NEWEST, OLDER = 30, 20


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    store = CheckpointStore(str(tmp_path / "run"), S3Section())
    for step in (10, OLDER, NEWEST):
        publish(store, step)
    return store


def _any_file(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.iterdir()))


def flip(folder: Path, rng: random.Random) -> str:
    path = _any_file(folder, rng)
    data = bytearray(path.read_bytes())
    at = rng.randrange(8 * len(data))
    data[at // 8] ^= 1 << at % 8
    path.write_bytes(data)
    return f"bit {at} of {path.name}"


def truncate(folder: Path, rng: random.Random) -> str:
    path = _any_file(folder, rng)
    data = path.read_bytes()
    kept = rng.choice([0, len(data) - 1, rng.randrange(len(data))])
    path.write_bytes(data[:kept])
    return f"{path.name} cut to {kept} bytes"


def extend(folder: Path, rng: random.Random) -> str:
    path = _any_file(folder, rng)
    more = rng.choice([b"\n", b" ", bytes(rng.randint(1, 5000)), rng.randbytes(rng.randint(1, 5000))])
    path.write_bytes(path.read_bytes() + more)
    return f"{path.name} with {len(more)} bytes more"


def zero(folder: Path, rng: random.Random) -> str:
    path = _any_file(folder, rng)
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data))
    stop = rng.randint(start + 1, len(data))
    data[start:stop] = bytes(stop - start)
    path.write_bytes(data)
    return f"zeros in {path.name}"


def swap(folder: Path, rng: random.Random) -> str:
    names = rng.sample([path.name for path in folder.iterdir()], 2) if rng.random() < 0.5 else [rank_file(0), rank_file(1)]
    first, second = ((folder / name).read_bytes() for name in names)
    (folder / names[0]).write_bytes(second)
    (folder / names[1]).write_bytes(first)
    return f"{names} swapped"


def stale(folder: Path, rng: random.Random) -> str:
    path = _any_file(folder, rng)
    path.write_bytes((folder.with_name(step_folder(rng.choice([10, OLDER]))) / path.name).read_bytes())
    return f"{path.name} of an older checkpoint"


def delete(folder: Path, rng: random.Random) -> str:
    path = rng.choice([path for path in folder.iterdir() if path.name != MANIFEST])  # without a manifest it is no checkpoint at all
    path.unlink()
    return f"{path.name} deleted"


def edit_manifest(folder: Path, rng: random.Random) -> str:
    raw = json.loads((folder / MANIFEST).read_text())
    name, other = rng.sample(sorted(raw["files"]), 2)
    edits: dict[str, Callable[[], object]] = {
        "size": lambda: raw["files"][name].update(size_bytes=raw["files"][name]["size_bytes"] + rng.choice([-1, 1, 10**6])),
        "hash": lambda: raw["files"][name].update(block_sha256=[rng.randbytes(32).hex()]),
        "swapped": lambda: raw["files"].update({name: raw["files"][other], other: raw["files"][name]}),
        "no file": lambda: raw["files"].pop(name),
        "one more": lambda: raw["files"].update({"extra.json": raw["files"][name]}),
        "renamed": lambda: raw["files"].update({f"{name}.bak": raw["files"].pop(name)}),
        "step": lambda: raw.update(step=OLDER),
        "folder": lambda: raw.update(folder=rng.randbytes(8).hex()),
        "format": lambda: raw.update(format=rng.choice([1, 3, "2", None])),
        "no hash": lambda: raw.pop("sha256"),
        "key": lambda: raw.update(note="mine"),
    }
    kind = rng.choice(sorted(edits))
    edits[kind]()
    (folder / MANIFEST).write_text(json.dumps(raw, sort_keys=True))
    return f"manifest: {kind} of {name}"


def respace_manifest(folder: Path, rng: random.Random) -> str:
    text = (folder / MANIFEST).read_text()
    at = rng.choice([i for i, letter in enumerate(text) if letter in ",:{"])
    (folder / MANIFEST).write_text(text[: at + 1] + rng.choice(" \n\t") + text[at + 1 :])
    return f"manifest: a space at {at}"


def duplicate_key(folder: Path, rng: random.Random) -> str:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text[:-1] + rng.choice([', "step": 30}', ', "format": 2}', ', "folder": ""}']))
    return "manifest: a key twice"


def other_manifest(folder: Path, rng: random.Random) -> str:
    (folder / MANIFEST).write_bytes((folder.with_name(step_folder(OLDER)) / MANIFEST).read_bytes())
    return "the manifest of another step"


CORRUPTIONS = [flip, flip, flip, truncate, extend, zero, swap, stale, delete, edit_manifest, edit_manifest, respace_manifest, duplicate_key]
CORRUPTIONS += [other_manifest]


def corrupt_many(store: CheckpointStore, number: int, seed: int) -> Counter[str]:
    """Damages the newest checkpoint `number` times, each time from the whole one. What was done, by kind."""
    folder = Path(store.path_of(NEWEST))
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    rng, done = random.Random(seed), Counter[str]()
    while sum(done.values()) < number:
        kind = CORRUPTIONS[sum(done.values()) % len(CORRUPTIONS)]
        what = kind(folder, rng)
        if {path.name: path.read_bytes() for path in folder.iterdir()} != whole:  # zeros where zeros were are no damage
            done[kind.__name__] += 1
            require_detected(store, what)
        for name, data in whole.items():
            (folder / name).write_bytes(data)
    return done


def require_detected(store: CheckpointStore, what: str) -> None:
    used: list[str] = []

    def use(name: str, key: str, tensor: object) -> None:
        """Tensors that come before the damage is met must be the right ones."""
        used.append(name)
        assert np.array_equal(np.asarray(tensor), values(name, key, NEWEST)), what

    with pytest.raises(DamagedCheckpointError):
        read_all(store, NEWEST, use)
        store.open(NEWEST).require_whole()  # bytes that no tensor lies in
        pytest.fail(f"not detected: {what}")
    found = newest_good(store, Published.require_whole)
    assert found is not None and found.published.step == OLDER, what
    assert len(found.damage) == 1 and found.damage[0][0] == NEWEST and step_folder(NEWEST) in (found.note or ""), what
    read_all(store, OLDER, lambda name, key, tensor: np.testing.assert_array_equal(tensor, values(name, key, OLDER)))
    cheap = read_newest(store)
    assert cheap is not None and cheap.published.step in (NEWEST, OLDER), what


def test_a_sample_of_corruptions_is_found_and_passed_over(store):
    done = corrupt_many(store, 70, seed=1)
    assert set(done) == {kind.__name__ for kind in CORRUPTIONS}


@pytest.mark.faults
def test_1000_corruptions_are_found_and_passed_over(store):
    print(dict(corrupt_many(store, 1000, seed=2)))


def test_what_was_not_damaged_reads_as_it_was_saved(store):
    read_all(store, NEWEST, lambda name, key, tensor: np.testing.assert_array_equal(tensor, values(name, key, NEWEST)))
    assert store.open(NEWEST).damage() == {}
    assert {name: store.open(NEWEST).read(name) for name in contents(NEWEST)} == contents(NEWEST)
    assert len({digest(store.open(step)) for step in store.steps()}) == 3
