"""A checkpoint that an attacker planted, its manifest self-consistent: nothing executes, every refusal has a name, memory stays bounded."""

from __future__ import annotations

import json
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.checkpoints import main as checkpoints
from llm.checkpoint import manifest as manifests
from llm.checkpoint.digest import digest
from llm.checkpoint.index import INDEX
from llm.checkpoint.layout import STATE, rank_file, step_folder
from llm.checkpoint.manifest import MANIFEST, FileEntry, Manifest
from llm.checkpoint.newest import read_newest
from llm.checkpoint.published import Published
from llm.checkpoint.store import CheckpointStore
from llm.checkpoint.strict_json import strict_json
from llm.config import S3Section
from llm.errors import CheckpointError, DamagedCheckpointError
from tests.made_checkpoint import contents, publish, read_all

STEP = 30
ROOT = Path(__file__).parents[2]


class Payload:
    """Unpickled, it makes the folder `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.mark,)


def payloads(mark: Path) -> dict[str, bytes]:
    import io

    import torch

    archive, old = io.BytesIO(), io.BytesIO()
    torch.save({"weights": Payload(mark)}, archive)
    torch.save({"weights": Payload(mark)}, old, _use_new_zipfile_serialization=False)
    return {"pickle": pickle.dumps(Payload(mark)), "torch": archive.getvalue(), "old torch": old.getvalue()}


def use_everything(store: CheckpointStore) -> None:
    """Every way in which a checkpoint is read."""
    published = store.open(STEP)
    published.require_whole()
    read_newest(store)
    read_all(store, STEP)
    digest(published)


def require_refused(store: CheckpointStore, match: str | None = None) -> None:
    with pytest.raises(CheckpointError, match=match):
        use_everything(store)
    for command in ("ls", "verify", "inspect", "digest"):
        extra = [] if command in ("ls", "verify") else ["--step", str(STEP)]
        code = checkpoints([command, "--run", store.uri.removesuffix("/checkpoints"), *extra])
        assert code in (0, 1, 2)  # a CheckpointError's; anything else would have been raised


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(str(tmp_path / "run"), S3Section())


def plant(store: CheckpointStore, changes: dict[str, bytes]) -> Path:
    """Publishes the made-up checkpoint with some files changed, hashes and all."""
    publish(store, STEP, {**contents(STEP), **changes})
    return Path(store.path_of(STEP))


def plant_manifest(store: CheckpointStore, change: Callable[[dict[str, Any]], None]) -> Path:
    """Changes the manifest and makes its own hash right again."""
    folder = plant(store, {})
    raw = json.loads((folder / MANIFEST).read_bytes())
    change(raw)
    body = {key: value for key, value in raw.items() if key != "sha256"}
    (folder / MANIFEST).write_bytes(manifests._canonical({**body, "sha256": manifests._own_hash(body)}))
    return folder


@pytest.mark.parametrize("kind", ["pickle", "torch", "old torch"])
@pytest.mark.parametrize("name", [STATE, INDEX, MANIFEST, rank_file(0)])
def test_no_pickle_in_any_file_is_executed(store, tmp_path, name, kind):
    data = payloads(tmp_path / "owned")[kind]
    if name == MANIFEST:
        (plant(store, {}) / MANIFEST).write_bytes(data)
    else:
        plant(store, {name: data})
    require_refused(store)
    assert not (tmp_path / "owned").exists()


def test_no_pickle_beside_the_files_is_opened(store, tmp_path):
    """Names under which other libraries look for pickles."""
    folder = plant(store, {})
    for name in ("pytorch_model.bin", "mp_rank_00_model_states.pt", "optimizer.pt", "rng_state.pth", "training_args.bin", "latest"):
        (folder / name).write_bytes(payloads(tmp_path / "owned")["torch"])
    use_everything(store)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "name",
    ["../../../outside.json", "/etc/hostname", "a/b.json", "..", ".", "", "a\\b", "a\0b", MANIFEST, "-rf", ".hidden", "x" * 300, "état"],
)
def test_no_name_leads_outside(store, name):
    def change(raw: dict[str, Any]) -> None:
        raw["files"][name] = raw["files"].pop(STATE)

    plant_manifest(store, change)
    require_refused(store, "is no name of a checkpoint's file")


@pytest.mark.parametrize("folder", ["..", "../step-00000020", "/etc", "a/b", "0123456789abcdef/..", 7, None])
def test_no_folder_leads_outside(store, folder):
    plant_manifest(store, lambda raw: raw.update(folder=folder))
    require_refused(store, "names the folder")


@pytest.mark.parametrize("what", ["file", "manifest", "checkpoint", "attempt"])
def test_no_symbolic_link_is_followed(store, tmp_path, what):
    """Not even to a file with the very bytes that were saved."""
    folder = plant(store, {})
    outside = tmp_path / "outside"
    outside.mkdir()
    if what in ("file", "manifest"):
        path = folder / (STATE if what == "file" else MANIFEST)
        path.rename(outside / path.name)
        path.symlink_to(outside / path.name)
    elif what == "checkpoint":
        folder.rename(outside / folder.name)
        folder.symlink_to(outside / folder.name)
    else:
        attempt = "0123456789abcdef"
        whole = Manifest(STEP, attempt, store.open(STEP).files)
        for path in list(folder.iterdir()):
            path.rename(outside / path.name)
        (folder / MANIFEST).write_bytes(whole.to_bytes())
        (folder / attempt).symlink_to(outside)
    with pytest.raises(CheckpointError):
        use_everything(store)
    assert what not in ("checkpoint", "manifest") or store.steps() == []


def test_a_folder_or_a_fifo_in_place_of_a_file_is_refused_at_once(store):
    folder = plant(store, {})
    (folder / STATE).unlink()
    os.mkfifo(folder / STATE)
    require_refused(store, "no regular file")
    with pytest.raises(DamagedCheckpointError, match="regular file"):
        store._files.read_into(STEP, "", STATE, 0, memoryview(bytearray(4)))
    (folder / MANIFEST).unlink()
    os.mkfifo(folder / MANIFEST)
    assert store.steps() == []
    with pytest.raises(DamagedCheckpointError, match="no regular file"):
        store.open(STEP)


@pytest.mark.parametrize("size", [-1, 2**50 + 1, 2**63, 1e3, "7", True, None, float("nan")])
def test_absurd_sizes_are_refused(store, size):
    plant_manifest(store, lambda raw: raw["files"][STATE].update(size_bytes=size))
    require_refused(store)


@pytest.mark.parametrize("hashes", [None, [], ["0" * 63], ["G" * 64], ["0" * 64] * 2, "0" * 64, [7], [["0" * 64]]])
def test_absurd_hashes_are_refused(store, hashes):
    plant_manifest(store, lambda raw: raw["files"][STATE].update(block_sha256=hashes))
    require_refused(store)


def edited(name: str, change: Callable[[Any], None]) -> dict[str, bytes]:
    raw = json.loads(contents(STEP)[name])
    change(raw)
    return {name: json.dumps(raw).encode()}


def put(path: str, value: Any) -> Callable[[Any], None]:
    def change(raw: Any) -> None:
        *above, last = path.split("/")
        for part in above:
            raw = raw[int(part) if isinstance(raw, list) else part]
        if value is KeyError:
            del raw[last]
        else:
            raw[int(last) if isinstance(raw, list) else last] = value

    return change


NAN = float("nan")
STATES = [("train/step", each) for each in (31, -1, "30", None, NAN, 30.0, True, 2**70, KeyError)]
STATES += [("train/tokens", each) for each in (-1, "many", NAN)] + [
    ("train/counts", each) for each in ({"bad": NAN}, {"bad": -1}, [], 7, None)
]
STATES += [("train/cursor", each) for each in (None, 7, [], {}, KeyError)] + [("train/cursor/began", each) for each in (7, None, {})]
STATES += [
    ("train/ledger", 7),
    ("train", None),
    ("layout", []),
    ("layout/workers", "2"),
    ("layout/optimizer", 7),
    ("layout/tensor", KeyError),
]
STATES += [("train/cursor/offset", NAN), ("layout/zero_stage", NAN), ("layout/workers", 1e400)]
INDEXES = [("tensors", each) for each in (None, [], 7)] + [("format", 7), ("rng", None), ("undivided", None), ("extra", 1)]
INDEXES += [("tensors/norm.weight/shape", each) for each in ([9], [2**62, 4], [-8], [NAN], "8", None, [8] * 100, [0], [])]
INDEXES += [("tensors/norm.weight/dtype", each) for each in ("F64", "F16", "object", 7, None)]
INDEXES += [("tensors/norm.weight/keys", each) for each in ([], ["exp_avg"], ["weight", "weight"], None, "weight")]
INDEXES += [("tensors/norm.weight/kind", "secret"), ("tensors/norm.weight/split_dim", 5), ("tensors/norm.weight/split_dim", -1)]
INDEXES += [
    ("tensors/norm.weight/counters", {"step": NAN}),
    ("tensors/norm.weight/counters", {"step": "1"}),
    ("tensors/norm.weight/pieces", []),
]
INDEXES += [(f"tensors/norm.weight/pieces/0/{i}", each) for i in range(6) for each in (-1, 2**60, NAN, "0", None, 10**6)]
INDEXES += [("tensors/norm.weight/pieces/0", [0, 0, 1, 0]), ("tensors/../../norm.weight|x", {})]


@pytest.mark.parametrize(("name", "path", "value"), [(STATE, *each) for each in STATES] + [(INDEX, *each) for each in INDEXES])
def test_values_that_no_checkpoint_has_are_refused(store, name, path, value):
    if path.startswith("tensors/../"):
        changes = edited(name, lambda raw: raw["tensors"].update({path[8:]: value}))
    else:
        changes = edited(name, put(path, value))
    plant(store, changes)
    require_refused(store)


JSONS = {
    "deep list": b"[" * 200_000 + b"]" * 200_000,
    "deep object": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a key twice": b'{"train": {}, "train": {}}',
    "NaN": b'{"train": NaN}',
    "infinity": b'{"train": -Infinity}',
    "1e999": b'{"train": 1e999}',
    "a long number": b'{"train": ' + b"9" * 100_000 + b"}",
    "not UTF-8": b'{"train": "\xff\xfe"}',
    "empty": b"",
    "nothing": b"null",
    "a list": b"[]",
    "a BOM": b"\xef\xbb\xbf{}",
    "cut": b'{"train": {"step": 3',
}


@pytest.mark.parametrize("name", [STATE, INDEX, MANIFEST])
@pytest.mark.parametrize("kind", JSONS)
def test_json_of_every_kind_is_refused(store, name, kind):
    if name == MANIFEST:
        (plant(store, {}) / MANIFEST).write_bytes(JSONS[kind])
    else:
        plant(store, {name: JSONS[kind]})
    require_refused(store)


def test_a_file_less_in_a_consistent_manifest_is_refused(store):
    for name in (STATE, INDEX, rank_file(1)):
        plant_manifest(store, lambda raw, name=name: raw["files"].pop(name))
        require_refused(store)
        store.set_aside(STEP)


HUGE = """
import json, resource, sys
from pathlib import Path
from llm.checkpoint import manifest as m
from llm.checkpoint.newest import read_newest
from llm.checkpoint.read import read_index
from llm.checkpoint.store import CheckpointStore
from llm.config import S3Section
from llm.errors import CheckpointError

run = Path(sys.argv[1])
store = CheckpointStore(str(run), S3Section())
folder = Path(store.path_of(30))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
zeros = m.hashlib.sha256(bytes(m.BLOCK_BYTES)).hexdigest()
told = []
for name, size in (("state.json", 1 << 40), ("index.json", 1 << 36), ("state.json", 1 << 26)):
    whole = json.loads(sys.argv[2])
    with (folder / name).open("wb") as file:
        file.truncate(size)
    whole["files"][name] = {"size_bytes": size, "block_sha256": [zeros] * (size // m.BLOCK_BYTES)}
    body = {key: value for key, value in whole.items() if key != "sha256"}
    (folder / m.MANIFEST).write_bytes(m._canonical({**body, "sha256": m._own_hash(body)}))
    try:
        if name == "state.json":
            read_newest(store)
        else:
            read_index(store.open(30))
        told.append("nothing")
    except CheckpointError as error:
        told.append(type(error).__name__)
many = b'{"files": {' + b'"a":{},' * 4_000_000 + b'"b":{}}}'
for data in (b"[" + b"0," * 30_000_000 + b"0]", b'{"a":' * 10_000_000, many, b" " * (1 << 28)):
    (folder / m.MANIFEST).write_bytes(data)
    try:
        store.open(30)
        told.append("nothing")
    except CheckpointError as error:
        told.append(type(error).__name__)
print(json.dumps({"told": told, "grew_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}))
"""


def test_a_terabyte_and_millions_of_values_take_little_memory(store, tmp_path):
    folder = plant(store, {})
    text = (folder / MANIFEST).read_text()
    limit = 6 << 30  # of address space: a terabyte could not even be asked for
    done = subprocess.run(
        [sys.executable, "-c", HUGE, str(tmp_path / "run"), text],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert "nothing" not in found["told"], found
    assert found["grew_mb"] < 700, found
    print(found)


def test_strict_json_takes_what_a_checkpoint_has():
    text = b'{"a": [1, -2.5e3, "\\u00e9", true, null, {"b": []}], "c": 18446744073709551615}'
    assert strict_json(text, "x") == json.loads(text)
    with pytest.raises(DamagedCheckpointError, match="x is damaged: the key 'a' stands there twice"):
        strict_json(b'{"a": 1, "a": 1}', "x")


def test_reading_is_bounded_by_what_the_file_may_hold(store):
    plant(store, {})
    published = store.open(STEP)
    size = published.entry(rank_file(0)).size_bytes
    for start, stop in ((-1, 1), (2, 1), (0, size + 1), (2**60, 2**61)):
        with pytest.raises(DamagedCheckpointError, match="were asked for"):
            published.read_range(rank_file(0), start, stop)
    with pytest.raises(DamagedCheckpointError, match="more than the 10"):
        published.read(rank_file(0), limit_bytes=10)
    with pytest.raises(DamagedCheckpointError, match="names none"):
        published.read("../MANIFEST.json")
    assert isinstance(published, Published) and isinstance(published.entry(STATE), FileEntry)
    assert step_folder(STEP) in published.uri
