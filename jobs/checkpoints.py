"""`python -m jobs.checkpoints ls|verify|inspect|digest --run RUN [--step N]`: what a run's checkpoints are, without a GPU."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from llm.checkpoint.index import INDEX, Index
from llm.checkpoint.layout import step_folder
from llm.checkpoint.manifest import FORMAT
from llm.checkpoint.newest import newest_good, state_of
from llm.checkpoint.published import Published
from llm.checkpoint.store import CheckpointStore
from llm.config import S3Section
from llm.errors import CheckpointError, DamagedCheckpointError, HeadraceError

DAMAGED = 1
ABOUT = {
    "ls": "one line a checkpoint, newest first; reads no tensors",
    "verify": "read and hash every byte of one checkpoint, or of all",
    "inspect": "the state, files and tensors of one checkpoint",
    "digest": "a hash of weights, moments and ledger, whatever the layout that saved them",
}


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0; 1 where `verify` or `ls` finds damage; else the error's."""
    parser = argparse.ArgumentParser(prog="headrace checkpoints", description="List, verify, inspect and compare a run's checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, what in ABOUT.items():
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument("--run", required=True, metavar="RUN", help="the run's folder, local or s3://")
        if name != "ls":
            newest = "all of them" if name == "verify" else "the newest good one"
            command.add_argument("--step", type=int, metavar="N", help=f"default: {newest}")
    options = parser.parse_args(argv)
    try:
        store = CheckpointStore(options.run, S3Section())
        if not store.steps():
            raise CheckpointError(f"{store.uri} holds no checkpoint. Name the folder of a run, such as runs/NAME.")
        if options.command == "ls":
            return list_all(store)
        if options.command == "verify":
            return verify(store, store.steps() if options.step is None else [options.step])
        published = choose(store, options.step)
        inspect(published) if options.command == "inspect" else print_digest(published)
    except HeadraceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def choose(store: CheckpointStore, step: int | None) -> Published:
    """The checkpoint of `step`, or the newest whole one, with a note on stderr where newer ones are damaged."""
    if step is not None:
        return open_step(store, step)
    found = newest_good(store, Published.require_whole)
    if found is None:
        raise CheckpointError(f"{store.uri} holds no checkpoint any more.")
    if found.note:
        print(found.note, file=sys.stderr)
    return found.published


def open_step(store: CheckpointStore, step: int) -> Published:
    if step not in (steps := store.steps()):
        near = sorted(steps, key=lambda each: abs(each - step))[:3]
        raise CheckpointError(f"{store.uri} has no checkpoint of step {step}. Nearest: {', '.join(map(str, near))}.")
    return store.open(step)


def list_all(store: CheckpointStore) -> int:
    rows, damaged = [], False
    for step in store.steps():
        try:
            published = store.open(step)
            published.require_files()
            saved = state_of(published)
            state, layout = saved.train, saved.layout
            size_mb = sum(entry.size_bytes for entry in published.files.values()) / 1e6
            where = f"{layout.workers} x ZeRO {layout.zero_stage}, tensor {layout.tensor}, {layout.precision}"
            rows.append((str(step), f"{state.tokens:,}", where, f"{size_mb:,.1f}", "complete"))
        except DamagedCheckpointError as error:
            damaged = True
            rows.append((str(step), "", "", "", str(error)))
    show(("step", "tokens", "saved by", "MB", "files"), rows)
    return DAMAGED if damaged else 0


def verify(store: CheckpointStore, steps: list[int]) -> int:
    damaged = 0
    for step in steps:
        try:
            published = open_step(store, step)
            found = list(published.damage().values())
            told = f"{len(published.files)} files, {sum(entry.size_bytes for entry in published.files.values()) / 1e6:,.1f} MB"
        except DamagedCheckpointError as error:
            found, told = [str(error)], ""
        damaged += bool(found)
        print(f"{step_folder(step)}: {'DAMAGED' if found else f'whole ({told})'}")
        for each in found:
            print(f"  {each}")
    return DAMAGED if damaged else 0


def inspect(published: Published) -> None:
    saved = state_of(published)
    state, layout = saved.train, saved.layout
    cursor = state.cursor
    print(f"{published.uri}, format {FORMAT}")
    print(f"step {state.step}, {state.tokens:,} tokens, cursor: epoch {cursor.epoch}, window {cursor.window}, row {cursor.offset}")
    print(f"ledger {state.ledger}")
    print(f"layout: {', '.join(f'{name}={value}' for name, value in vars(layout).items())}")
    show(("file", "bytes", "blocks"), [(name, f"{e.size_bytes:,}", str(len(e.block_sha256))) for name, e in published.files.items()])
    sizes = {name: entry.size_bytes for name, entry in published.files.items()}
    tensors = Index.from_json(published.read(INDEX), sizes).tensors
    rows = [
        (
            name,
            "x".join(map(str, t.shape)),
            t.dtype,
            t.kind,
            ", ".join(t.keys),
            str(len(t.pieces)),
            "" if t.split_dim is None else str(t.split_dim),
        )
        for name, t in tensors.items()
    ]
    show(("tensor", "shape", "type", "kind", "holds", "pieces", "split"), rows)


def print_digest(published: Published) -> None:
    from llm.checkpoint.digest import digest  # imports torch

    print(f"{digest(published)}  {published.uri}")


def show(titles: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    table = Table(*titles, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False, emoji=False).print(table)


if __name__ == "__main__":
    sys.exit(main())
