"""What a save costs training: the stall of one that runs beside it, the time of one that stops it, how much longer steps take meanwhile.

    python -m tests.bench.checkpoint [--ranks 2] [--rounds 5] [--folder DIR]

All three in the same process and alternating, so that a busy machine is busy for all of them. A Llama of 58 M parameters in fp32 (700 MB of
weights and moments), ZeRO 1, batches of 4 rows of 32 tokens. The bar: a stall of at most 2% of what a synchronous save takes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from typing import Any

from tests.distributed import layouts
from tests.distributed.checkpoint_runs import batches_from, engine_layout, open_store
from tests.distributed.layouts import llama, make_config, make_job, run_ranks

MODEL = llama(vocab_size=32000, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8)
SEQ_LEN = 32  # short rows: several steps pass while a checkpoint is written
PLAIN_STEPS = 5  # a round
MAX_STEPS = 400
BAR_FRAC = 0.02


def measure(rank: int, world_size: int, folder: str, rounds: int) -> list[dict[str, Any]]:
    """One row a round."""
    import torch

    from llm.checkpoint.save import CheckpointSaver
    from llm.parallel.mesh import Mesh
    from llm.state import TrainState
    from llm.train.loop import build_engine, steps

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    config = make_config(
        data={"seq_len": SEQ_LEN, "sources": [{"name": "made", "uri": "/none"}]},
        parallel={"workers": world_size, "tensor": 1, "zero_stage": 1},
        train={"steps": MAX_STEPS, "batch_rows": 4, "microbatch_rows": 4 // world_size, "lr": 1e-4},
    )
    mesh, job = Mesh(rank, world_size, 1), make_job(config, MODEL)
    engine, rows = build_engine(job, mesh), []
    thread_cpu_s: list[float] = []

    class Timed(CheckpointSaver):
        def _run(self, save: Any) -> None:
            began_s = time.thread_time()
            super()._run(save)
            thread_cpu_s.append(time.thread_time() - began_s)

    saver = Timed(engine, engine_layout(config), open_store(folder), keep=1)
    updates = steps(job, engine, batches_from(config, mesh, 0, MAX_STEPS), TrainState(), lambda before: 0, saver.wait_snapshot)

    def a_step() -> tuple[TrainState, float]:
        began_s = time.perf_counter()
        state, _, _ = next(updates)
        return state, time.perf_counter() - began_s

    for _ in range(3):
        state, _ = a_step()
    saver.save_now(state)  # the first one takes the memory
    a_step()
    for _ in range(rounds):
        plain = [a_step()[1] for _ in range(PLAIN_STEPS)]
        state, took_s = a_step()
        saver.save_now(state)
        stopped = saver.finished()[-1]
        state, took_s = a_step()
        plain.append(took_s)
        saver.save(state)
        beside = []
        while not beside or _any(saver.is_saving):  # on some rank: all take as many steps
            beside.append(a_step()[1])
        saver.wait_published()
        done = saver.finished()[-1]
        usual_s = statistics.median(plain)
        rows.append(
            {
                "synchronous_s": stopped.took_s,
                "stall_s": done.stall_s,
                "beside_s": done.took_s,
                "step_s": usual_s,
                "steps_beside": len(beside),
                "thread_cpu_s": thread_cpu_s[-1],
                "lost_s": sum(beside) - len(beside) * usual_s,
            }
        )
    return rows


def _any(mine: bool) -> bool:
    import torch
    import torch.distributed as dist

    told = torch.tensor([int(mine)])
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return bool(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where the checkpoints go; a temporary folder where it is not given")
    options = parser.parse_args()
    layouts.TIMEOUT_S = 3600
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = run_ranks(measure, options.ranks, folder, options.rounds)[0]
    for row in rows:
        print(json.dumps({name: round(value, 3) for name, value in row.items()}))
    stall_s, synchronous_s = (statistics.median(row[name] for row in rows) for name in ("stall_s", "synchronous_s"))
    lost_s, step_s = (statistics.median(row[name] for row in rows) for name in ("lost_s", "step_s"))
    verdict = "met" if stall_s <= BAR_FRAC * synchronous_s else "missed"
    print(f"{options.ranks} ranks, medians of {len(rows)} rounds: a synchronous save {synchronous_s:.2f} s")
    share = f"{stall_s / synchronous_s:.1%} of that; bar {BAR_FRAC:.0%}: {verdict}"
    print(f"beside training: training stands still for {1000 * stall_s:.0f} ms ({share})")
    cpu_s = statistics.median(row["thread_cpu_s"] for row in rows)
    print(f"the thread takes {cpu_s:.2f} s of CPU time on rank 0: the most that training can lose where no core is idle")
    print(f"its steps of {step_s:.2f} s lose {lost_s:.2f} s in all to the writing ({lost_s / synchronous_s:.0%} of a synchronous save)")


if __name__ == "__main__":
    main()
