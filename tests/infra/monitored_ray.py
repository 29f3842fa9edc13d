"""`python -m tests.infra.monitored_ray FOLDER`: a local Ray with its metrics on, whose driver shows a run's numbers until its stdin closes.

For test_monitoring_live.py. It prints Ray's session folder, where the list of targets for Prometheus will be.
"""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Sequence

from llm.metrics import Row, eval_row, event_row, step_row
from llm.observe.exported import LiveRun

RUN = "shown"
WORKERS = 2
DOLLARS_PER_WORKER_HOUR = 4.5


def rows(now_s: float) -> list[Row]:
    """A run that began a minute before `now_s`: two steps, an evaluation, and a restart after a node was lost."""
    began_at_s = now_s - 60
    numbers = {"tokens_per_s": 2048.0, "data_wait_frac": 0.125, "lr": 0.1, "grad_norm": 1.0, "step_s": 2.0, "mfu": 0.375}
    where = {"epoch": 0, "window": 0, "offset": 1, "ledger": "x"}
    made = [
        event_row("start", elapsed_s=40.0, total_steps=8, workers=WORKERS),
        step_row(step=1, loss=4.0, tokens=4096, elapsed_s=42.0, **numbers, **where),
        step_row(step=2, loss=3.5, tokens=8192, elapsed_s=44.0, **numbers, **where),
        eval_row(step=2, eval_loss=3.75, eval_tokens=64, eval_s=1.0),
        event_row("restart", elapsed_s=50.0, step=2, cause="node lost", redone_s=0.0, down_s=5.0),
        event_row("start", elapsed_s=52.0, total_steps=8, workers=WORKERS),
    ]
    return [{**row, "written_at_s": began_at_s + row["elapsed_s"]} if "elapsed_s" in row else row for row in made]


def main(folder: str) -> None:
    import ray

    ray.init(
        address="local",
        num_cpus=1,
        object_store_memory=100 << 20,
        dashboard_host="127.0.0.1",
        _node_ip_address="127.0.0.1",
        _temp_dir=folder,
        log_to_driver=False,
    )
    from llm.train.ray_metrics import RayMetrics

    now_s = time.time()
    shown = RayMetrics(RUN, LiveRun((), now_s - 60, now_s, WORKERS, DOLLARS_PER_WORKER_HOUR))
    new: Sequence[Row] = rows(now_s)
    print(ray.nodes()[0]["MetricsExportPort"], flush=True)
    while not select.select([sys.stdin], [], [], 0.5)[0]:
        shown.show(new)
        new = ()
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
