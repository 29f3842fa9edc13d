"""What a crash can leave of three ways to save: ours, DeepSpeed's `latest` file, HF Trainer's folders. For the record.

    python -m tests.bench.crash_states [--peer-path FOLDER_WITH_ACCELERATE]

Each really saves a tiny model three times; its file operations are recorded (ours in the process, the others by strace), and every state
that POSIX allows after a crash at every moment is enumerated (tests/faults/crash_model.py; where a moment has more than MOST states, the
extremes, every single loss and so many at random).

Two kinds of crash: the process is killed (all that it did is there: one state a moment), and the machine loses its power (what was not
synced may be lost). Each state is read by the protocol's own rule, and counted:

half-seen   the checkpoint that a reader takes is not byte for byte what was saved
lost        a save had returned, and the reader takes none, an older one, or one that is not whole
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from llm.checkpoint import on_disk
from llm.checkpoint.newest import newest_good
from llm.checkpoint.published import Published
from llm.checkpoint.store import CheckpointStore
from llm.config import S3Section
from tests.faults.crash_model import Disk, Op, RecordingOs, crash_states, materialize
from tests.made_checkpoint import publish

ROOT = Path(__file__).parents[2]
MOST = 300
SAVES = 3
Tree = dict[str, bytes | None]

DEEPSPEED = """
import os, sys, torch, deepspeed
os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[2]}
deepspeed.init_distributed("gloo")
torch.manual_seed(0)
model = torch.nn.Linear(8, 8)
optimizer = torch.optim.AdamW(model.parameters())
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
for step in range(1, 4):
    engine.backward(engine(torch.ones(1, 8)).sum())
    engine.step()
    engine.save_checkpoint(sys.argv[1], tag=f"step{step}")
    os.access(f"/crash-mark/durable {step}", os.F_OK)
"""

TRAINER = """
import os, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

class Mark(TrainerCallback):
    def on_save(self, args, state, control, **given):
        os.access(f"/crash-mark/durable {state.global_step}", os.F_OK)

torch.manual_seed(0)
small = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, vocab_size=16)
model = LlamaForCausalLM(LlamaConfig(**small))
rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
settings = TrainingArguments(sys.argv[1], max_steps=3, save_steps=1, save_total_limit=2, report_to=[], use_cpu=True, disable_tqdm=True)
Trainer(model=model, args=settings, train_dataset=rows, callbacks=[Mark()]).train()
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer-path", default="", help="a folder that holds accelerate, which HF Trainer needs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        print("| protocol, 3 saves | crash | states | half-seen | newest durable lost |\n|---|---|---|---|---|", flush=True)
        row("Headrace", *count_ours(folder / "ours"))
        row("DeepSpeed's `latest`", *count(trace(DEEPSPEED, folder / "deepspeed", options.peer_path), pick_deepspeed))
        if options.peer_path:
            row("HF Trainer's folders", *count(trace(TRAINER, folder / "trainer", options.peer_path), pick_trainer))


@dataclass
class Counts:
    states: int = 0
    half_seen: int = 0
    lost: int = 0


def row(name: str, of_kill: Counts, of_power: Counts) -> None:
    for crash, found in (("process killed", of_kill), ("power lost", of_power)):
        print(f"| {name} | {crash} | {found.states:,} | {found.half_seen:,} | {found.lost:,} |", flush=True)


def both(ops: list[Op], look: Callable[[Tree, int], tuple[bool, bool]]) -> tuple[Counts, Counts]:
    """`look(tree, newest durable step)`: (half-seen, lost)."""
    killed, power = Counts(), Counts()
    for found, states in ((killed, killed_states(ops)), (power, crash_states(ops, most=MOST))):
        for begun, tree in states:
            half_seen, lost = look(tree, newest_durable(ops[:begun]))
            found.states += 1
            found.half_seen += half_seen
            found.lost += lost
    return killed, power


def killed_states(ops: list[Op]) -> Iterator[tuple[int, Tree]]:
    disk = Disk()
    for number, op in enumerate(ops):
        yield number, disk.now()
        disk.apply(op)
    yield len(ops), disk.now()


def count_ours(folder: Path) -> tuple[Counts, Counts]:
    folder.mkdir()
    recording = RecordingOs(folder)
    real, on_disk.os = on_disk.os, recording  # pyright: ignore[reportAttributeAccessIssue]
    try:
        store = CheckpointStore(str(folder / "run"), S3Section())
        for step in range(1, SAVES + 1):
            publish(store, step)
            recording.mark(f"durable {step}")
            store.prune(keep=2)
    finally:
        on_disk.os = real
    whole = {step: {name: store_bytes(recording.ops, step, name) for name in store.open(SAVES).files} for step in range(1, SAVES + 1)}

    def look(tree: Tree, durable: int) -> tuple[bool, bool]:
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as root:
            materialize(tree, Path(root))
            reader = CheckpointStore(f"{root}/run", S3Section())
            opened = [reader.open(step) for step in reader.steps()]
            half_seen = any({name: each.read(name) for name in each.files} != whole[each.step] for each in opened)
            found = newest_good(reader, Published.require_whole)
        return half_seen, durable > (found.published.step if found else 0)

    return both(recording.ops, look)


def store_bytes(ops: list[Op], step: int, name: str) -> bytes:
    """What was written to a file of a step."""
    return b"".join(
        op.data
        for op in ops
        if op.kind == "write" and op.path.startswith(f"run/checkpoints/step-{step:08d}.tmp-") and op.path.endswith(name)
    )


def count(ops: list[Op], pick: Callable[[Tree], tuple[int, str] | None]) -> tuple[Counts, Counts]:
    """`pick`: which step and folder the protocol's reader takes."""
    whole: dict[int, Tree] = {}
    disk = Disk()
    for op in ops:
        disk.apply(op)
        if op.kind == "mark":
            now = disk.now()
            picked = pick(now)
            assert picked is not None and picked[0] == newest_durable([op]), (picked, op)
            whole[picked[0]] = {path: data for path, data in now.items() if path.startswith(f"{picked[1]}/")}
    assert len(whole) == SAVES, "a save left no mark"

    def look(tree: Tree, durable: int) -> tuple[bool, bool]:
        picked = pick(tree)
        is_whole = picked is not None and all(tree.get(path) == data for path, data in whole.get(picked[0], {"": b""}).items())
        return picked is not None and not is_whole, durable > 0 and (picked is None or not is_whole or picked[0] < durable)

    return both(ops, look)


def newest_durable(ops: list[Op]) -> int:
    return max((int(op.path.removeprefix("durable ")) for op in ops if op.kind == "mark"), default=0)


def pick_deepspeed(tree: Tree) -> tuple[int, str] | None:
    """DeepSpeedEngine.load_checkpoint without a tag: what `latest` says; without that file it loads nothing."""
    latest = tree.get("latest")
    if latest is None:
        return None
    found = re.fullmatch(r"step(\d+)", latest.decode(errors="replace").strip())
    return (int(found.group(1)), found.group(0)) if found else (0, "nothing")


def pick_trainer(tree: Tree) -> tuple[int, str] | None:
    """transformers.trainer_utils.get_last_checkpoint: the folder of the highest number."""
    steps = [int(found.group(1)) for path, data in tree.items() if data is None and (found := re.fullmatch(r"checkpoint-(\d+)", path))]
    return (max(steps), f"checkpoint-{max(steps)}") if steps else None


def trace(script: str, folder: Path, peer_path: str) -> list[Op]:
    """Runs a script under strace; its operations on files below `folder`, and its marks."""
    folder.mkdir()
    logs = folder.with_name(f"{folder.name}-strace")
    logs.mkdir()
    calls = "open,openat,creat,write,pwrite64,writev,sendfile,copy_file_range,ftruncate,fsync,fdatasync"
    calls += ",rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,rmdir"
    command = ["strace", "-ff", "-ttt", "-y", "-s", "64", "-e", f"trace={calls},access,faccessat,faccessat2", "-o", str(logs / "log")]
    path = os.pathsep.join(part for part in (str(ROOT), peer_path) if part)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, sys.executable, "-c", script, str(folder), "29517"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = sorted(line for log in logs.iterdir() for line in log.read_text(errors="replace").splitlines())
    ops = parse(lines, folder)
    disk = Disk()
    for op in ops:
        disk.apply(op)
    real = {str(p.relative_to(folder)): p.stat().st_size if p.is_file() else None for p in folder.rglob("*")}
    traced = {path: None if data is None else len(data) for path, data in disk.now().items()}
    assert traced == real, f"the trace is not complete: {sorted(set(traced.items()) ^ set(real.items()))[:5]}"
    return ops


_CALL = re.compile(r"^[\d.]+ (\w+)\((.*)\) += (-?\d+)(?:<(.*)>)?.*$")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')


def parse(lines: list[str], root: Path) -> list[Op]:
    ops: list[Op] = []
    there: set[str] = {""}
    place: dict[str, int] = {}  # where the next write of an open file goes; a wrong one shows in the size of the file

    def inside(path: str) -> str | None:
        path = os.path.normpath(path)
        return path.removeprefix(str(root)).lstrip("/") if f"{path}/".startswith(f"{root}/") else None

    for line in lines:
        found = _CALL.match(line)
        if found is None or (int(found.group(3)) < 0 and "crash-mark" not in line):
            continue
        call, given, result, opened = found.groups()
        strings = [ast.literal_eval(f'b"{text}"') for text in _STRING.findall(given)]
        if call in ("access", "faccessat", "faccessat2"):
            if "/crash-mark/" in given:
                ops.append(Op("mark", strings[0].decode().removeprefix("/crash-mark/")))
            continue
        if call in ("open", "openat", "creat"):
            at = inside(opened or "")
            if at is not None:
                place[at] = 0
            if at is not None and ("O_CREAT" in given or "O_TRUNC" in given or call == "creat"):
                if at not in there:
                    there.add(at)
                    ops.append(Op("create", at))
                elif "O_TRUNC" in given:
                    ops.append(Op("truncate", at))
            continue
        if call in ("write", "pwrite64", "writev", "sendfile", "copy_file_range", "fsync", "fdatasync", "ftruncate"):
            about = re.search(r", \d+<(.*?)>", given) if call == "copy_file_range" else re.match(r"\d+<(.*?)>", given)
            at = inside(about.group(1)) if about else None
            if at is None:
                continue
            if call in ("fsync", "fdatasync"):
                is_folder = not any(op.path == at and op.kind == "create" for op in ops)
                ops.append(Op("sync_folder" if is_folder else "sync", at))
            elif call == "ftruncate":
                # safetensors gives a file its length, maps it and writes there, which strace does not see: all its bytes come here.
                ops.append(Op("write", at, data=bytes([len(ops) % 250 + 1]) * int(given.rpartition(",")[2]), at=0))
            else:
                size = int(result)
                known = call == "write" and len(strings) == 1 and len(strings[0]) == size
                data = strings[0] if known else bytes([len(ops) % 250 + 1]) * size
                offset = int(given.rpartition(",")[2]) if call == "pwrite64" else place.get(at, 0)
                if call != "pwrite64":
                    place[at] = offset + size
                last = ops[-1] if ops else None
                if last is not None and last.kind == "write" and last.path == at and (last.at or 0) + len(last.data) == offset:
                    ops[-1] = replace(last, data=last.data + data)
                else:
                    ops.append(Op("write", at, data=data, at=offset))
            continue
        paths = [inside(name) for name in absolute(given)]
        if not paths or paths[0] is None:
            continue
        if call in ("mkdir", "mkdirat"):
            there.add(paths[0])
            ops.append(Op("mkdir", paths[0]))
        elif call.startswith("rename"):
            assert paths[1] is not None
            there.discard(paths[0])
            there.add(paths[1])
            ops.append(Op("rename", paths[0], other=paths[1]))
        elif call in ("unlink", "unlinkat", "rmdir"):
            there.discard(paths[0])
            ops.append(Op("rmdir" if call == "rmdir" or "AT_REMOVEDIR" in given else "unlink", paths[0]))
    return ops


def absolute(given: str) -> list[str]:
    """The paths among the arguments of a call; those relative to a folder's descriptor are put together."""
    found = []
    for about in re.finditer(r'(?:(?:AT_FDCWD|\d+)<(.*?)>, )?"((?:[^"\\]|\\.)*)"', given):
        base, name = about.group(1) or str(Path.cwd()), ast.literal_eval(f'b"{about.group(2)}"').decode()
        found.append(os.path.join(base, name))  # noqa: PTH118
    return found


if __name__ == "__main__":
    main()
