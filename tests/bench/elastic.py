"""The same batches whatever the number of ranks: ours and mosaicml-streaming, which promises it as elastic determinism.

    python -m tests.bench.elastic --peer-python PYTHON [--config FILE] [--steps 1500]

Both go through the same packed rows, in batches of the same size, on 1, 2 and 4 ranks, undisturbed and with a resume in the middle on
another number of ranks. Counted are the batches that are identical to those of 1 undisturbed rank: as a set of rows, and row by row, put
together as each library deals them. Ours are computed by the functions that the stream's tasks run (`tests/ray/test_stream.py` shows that
Ray Data gives these); the peer runs as real processes, one a rank, on 127.0.0.1.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from llm.config import S3Section
from llm.config_file import load_run
from llm.data.cache import TokenCache
from llm.data.order import Cursor
from llm.data.stream import Quarantine, _window_block, rank_major, units_per_group
from llm.data.window import Recipe, make_window
from llm.train.prepare import prepare

PEER = Path(__file__).with_name("mosaic_peer.py")
BATCH_ROWS = 16
RESUMES = ((1, 2), (2, 4), (4, 1), (4, 2))  # ranks before and after
Batches = list[list[Any]]  # the rows of each batch, by name, put together from the ranks


def main() -> None:
    parser = argparse.ArgumentParser(description="identical batches on other numbers of ranks, and after a resume with another number")
    parser.add_argument("--config", default="jobs/recipes/tiny_cpu.yaml")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--peer-python", default=sys.executable)
    options = parser.parse_args()
    recipe = prepare(load_run(options.config, ["eval.rows=0"]), "/none", 0.0).recipe
    with tempfile.TemporaryDirectory() as scratch:
        cache = TokenCache(f"{scratch}/cache", S3Section(), 1 << 33)
        told("ours", options.steps, lambda ranks, steps, state: ours(recipe, cache, ranks, steps, state))
        if subprocess.run([options.peer_python, "-W", "ignore", "-c", "import streaming"], capture_output=True, check=False).returncode:
            print(f"{options.peer_python} has no mosaicml-streaming: its cases are left out")
            return
        rows = np.concatenate([make_window(recipe, 0, w, (), cache.slice).rows.ids for w in range(recipe.plan.windows_per_epoch)])
        np.save(f"{scratch}/rows.npy", rows.astype(np.uint16))
        subprocess.run([options.peer_python, str(PEER), "write", f"{scratch}/rows.npy", f"{scratch}/mds"], check=True)
        print(f"\nthe corpus is {len(rows)} rows, {len(rows) / BATCH_ROWS:.2f} batches an epoch")
        for nodes in (1, 4):
            name = f"mosaicml-streaming, num_canonical_nodes={nodes}"
            told(
                name,
                options.steps,
                lambda ranks, steps, state, n=nodes: mosaic(options.peer_python, f"{scratch}/mds", n, ranks, steps, state),
            )


def told(name: str, steps: int, run: Callable[[int, int, Any], tuple[Batches, Any]]) -> None:
    """Prints the cases of one library. `run(ranks, steps, state)`: the next batches and the state after them."""
    half = steps // 2
    print(f"\n{name}: batches identical to those of 1 undisturbed rank {'as a set':>18}{'in order':>12}")
    expected, _ = run(1, steps, None)
    for ranks in (2, 4):
        print(case(f"{ranks} ranks", run(ranks, steps, None)[0], expected))
    for before, after in RESUMES:
        _, state = run(before, half, None)
        found, _ = run(after, steps - half, state)
        print(case(f"{before} rank(s), from step {half} on {after}", found, expected[half:]))


def case(name: str, found: Batches, expected: Batches) -> str:
    sets = sum(sorted(a) == sorted(b) for a, b in zip(found, expected, strict=True))
    exact = sum(a == b for a, b in zip(found, expected, strict=True))
    return f"  {name:60}{sets:>16} of {len(expected)}{exact:>6} of {len(expected)}"


def ours(recipe: Recipe, cache: TokenCache, ranks: int, steps: int, state: Cursor | None) -> tuple[Batches, Cursor]:
    start = state or Cursor()
    group = units_per_group(recipe.seq_len, BATCH_ROWS, steps)
    found: Batches = []
    for dealt in groups(recipe, cache, start, group * BATCH_ROWS):
        by_rank = rank_major(group * BATCH_ROWS, group, ranks, {"ids": dealt})["ids"].reshape(ranks, group, -1, 3)
        found += [[tuple(row) for row in by_rank[:, i].reshape(BATCH_ROWS, 3).tolist()] for i in range(group)]
        if len(found) >= steps:
            break
    epoch, window, offset = found[steps - 1][-1]
    return found[:steps], Cursor(epoch, window, offset + 1)


def groups(recipe: Recipe, cache: TokenCache, start: Cursor, group_rows: int) -> Iterator[np.ndarray]:
    """Positions (epoch, window, offset) of the rows of each group."""
    held = np.zeros((0, 3), dtype=np.int64)
    for number in count():
        for block in _window_block(recipe, start, number, Quarantine("/none", S3Section()), cache):
            held = np.concatenate([held, block["position"]])
        while len(held) >= group_rows:
            yield held[:group_rows]
            held = held[group_rows:]


def mosaic(python: str, folder: str, canonical_nodes: int, ranks: int, steps: int, state: Any) -> tuple[Batches, Any]:
    options = {"batch_rows": BATCH_ROWS // ranks, "canonical_nodes": canonical_nodes, "num_steps": steps, "state": state}
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [python, "-W", "ignore", str(PEER), "order", folder, json.dumps(options)],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    answers = [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]
    by_step = zip(*(answer["rows"] for answer in answers), strict=True)
    # It deals a batch's rows to the ranks in turn, where ours gives each rank consecutive ones.
    return [[row for dealt in zip(*parts, strict=True) for row in dealt] for parts in by_step], answers[0]["state"]


if __name__ == "__main__":
    main()
