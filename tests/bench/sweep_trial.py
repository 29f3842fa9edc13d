"""A trial of tests/bench/sweep.py: the run of a YAML file, trained by the product's own loop in this process alone, without Ray.

What is left out is the start of a Ray group for each of some hundred trials, and with `warm_server` that of Python; data, model, training,
evaluation, checkpoints and metrics are the run's.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    import numpy as np


def train_alone(path: str) -> None:
    """Raises HeadraceError as a job would print it."""
    import torch
    import torch.distributed as dist

    from llm.checkpoint.start import first_state
    from llm.checkpoint.store import CheckpointStore
    from llm.config_file import load_run
    from llm.parallel.mesh import Mesh
    from llm.train.loop import train
    from llm.train.prepare import prepare
    from llm.train.runs import run_uri

    config = load_run(path)
    torch.set_num_threads(1)
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}  # DeepSpeed asks for them
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
        try:
            prepared = prepare(config, run_uri(config), time.time())
            start = first_state(CheckpointStore(run_uri(config), config.s3), config)
            train(prepared.job, Mesh(0, 1, 1), Windows(prepared), start)
        finally:
            dist.destroy_process_group()


def main() -> int:
    """Trains the run of the last argument in this process; with a socket's path before it, in one that the server there forks."""
    if len(sys.argv) == 2:
        return _exit_code(sys.argv[1], sys.stderr)
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(sys.argv[1])
        line.sendall(json.dumps({"path": sys.argv[2], "folder": str(Path.cwd())}).encode() + b"\n")
        with line.makefile() as told:
            code, *text = told.read().splitlines()
    print(*text, sep="\n", file=sys.stderr)
    return int(code)


@contextmanager
def warm_server(folder: Path) -> Iterator[Path]:
    """A process that has imported what a trial needs, and forks one for each connection to the socket in `folder` that is given."""
    address, context = folder / "trials.sock", multiprocessing.get_context("spawn")
    ready = context.Event()
    server = context.Process(target=_serve, args=(str(address), ready), daemon=False)
    server.start()
    try:
        while not ready.wait(1.0):
            assert server.is_alive(), "the server of trials did not start"
        yield address
    finally:
        server.kill()
        server.join()


def _serve(address: str, ready: Event) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # two at once, on what a small machine has
    import deepspeed  # noqa: F401
    import transformers  # noqa: F401

    import llm.train.loop
    import llm.train.prepare  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(address)
        door.listen(64)
        ready.set()
        while True:
            line, _ = door.accept()
            if os.fork() == 0:
                door.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                with line, line.makefile("rw") as told:
                    wanted = json.loads(told.readline())
                    os.chdir(wanted["folder"])
                    errors = io.StringIO()
                    code = _exit_code(wanted["path"], errors)
                    told.write(f"{code}\n{errors.getvalue()}")
                os._exit(0)
            line.close()


def _exit_code(path: str, errors: TextIO) -> int:
    from llm.errors import HeadraceError

    try:
        train_alone(path)
    except HeadraceError as error:
        print(f"error: {error}", file=errors)
        return error.exit_code
    except Exception:
        traceback.print_exc(file=errors)
        return 1
    return 0


class Windows:
    """A reader of the run's own stream: one window after another, made in this process."""

    def __init__(self, prepared) -> None:
        self._prepared = prepared

    def begin(self, cursor) -> Iterator[dict[str, np.ndarray]]:
        import numpy as np

        from llm.data.window import make_window
        from llm.state import COUNTED

        plan, unit, number = self._prepared.recipe.plan, self._prepared.job.config.rank_unit_rows, 0
        ids, segments, position = [], [], []
        while True:
            epoch, window = plan.nth_window(cursor, number)
            rows = make_window(self._prepared.recipe, epoch, window).rows
            first, count = cursor.offset if number == 0 else 0, len(rows.ids)
            number += 1
            ids.append(rows.ids[first:])
            segments.append(rows.segments()[first:])
            position.append(np.stack([np.full(count, epoch), np.full(count, window), np.arange(count)], axis=1)[first:])
            ids, segments, position = ([np.concatenate(parts)] for parts in (ids, segments, position))
            for offset in range(0, len(ids[0]) - unit + 1, unit):
                part = slice(offset, offset + unit)
                yield {
                    "ids": ids[0][part].astype(np.int32),
                    "segments": segments[0][part].astype(np.int32),
                    "position": position[0][part].astype(np.int64),
                    "counts": np.zeros((unit, len(COUNTED)), dtype=np.int64),
                }
            done = len(ids[0]) // unit * unit
            ids, segments, position = ([parts[0][done:]] for parts in (ids, segments, position))


if __name__ == "__main__":
    sys.exit(main())
