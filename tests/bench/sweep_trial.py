"""A trial of tests/bench/sweep.py: the run of a YAML file, trained by the product's own loop in this process alone, without Ray.

What is left out is the start of a Ray group for each of some hundred trials; data, model, training, evaluation and metrics are the run's.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np


def main() -> int:
    import torch
    import torch.distributed as dist

    from llm.checkpoint.start import first_state
    from llm.checkpoint.store import CheckpointStore
    from llm.config_file import load_run
    from llm.errors import HeadraceError
    from llm.parallel.mesh import Mesh
    from llm.train.loop import train
    from llm.train.prepare import prepare
    from llm.train.runs import run_uri

    config = load_run(sys.argv[1])
    torch.set_num_threads(1)
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}  # DeepSpeed asks for them
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
        try:
            prepared = prepare(config, run_uri(config), time.time())
            start = first_state(CheckpointStore(run_uri(config), config.s3), config)
            train(prepared.job, Mesh(0, 1, 1), Windows(prepared), start)
        except HeadraceError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        finally:
            dist.destroy_process_group()
    return 0


class Windows:
    """A reader of the run's own stream: one window after another, made in this process."""

    def __init__(self, prepared) -> None:
        self._prepared = prepared

    def begin(self, cursor) -> Iterator[dict[str, np.ndarray]]:
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
