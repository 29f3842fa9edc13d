"""How many workers a run may have, and on which nodes they go. Pure.

Legal sizes keep the batch whole: multiples of the tensor size whose data ranks share out `train.batch_rows` evenly, and the batches of
every stage of `train.batch_schedule`. A tensor group lies inside one node.

Example: workers=4, tensor=2, batch_rows=8, min_workers=2: legal are 4 and 2. Nodes with room for 2 and 2: 4 workers. One of them goes: 2.
With room for 3 and 1 there is one tensor group only: 2.
"""

from __future__ import annotations

from collections.abc import Mapping

from llm.config import RunConfig
from llm.config_section import Section


def legal_workers(config: RunConfig) -> list[int]:
    """The worker counts that the run may have, most first; `parallel.workers` alone where it is not elastic."""
    parallel, train = config.parallel, config.train
    rows = 1 if train.microbatch_rows == "auto" else train.microbatch_rows
    least = parallel.workers if parallel.min_workers is None else parallel.min_workers
    return [
        workers
        for workers in range(parallel.workers, least - 1, -1)
        if workers % parallel.tensor == 0 and train.unit_rows % (workers // parallel.tensor * rows) == 0
    ]


def with_workers(config: RunConfig, workers: int) -> RunConfig:
    """The same run, laid out over so many workers. With other than the run's own, what was measured for those says nothing of the memory
    that a micro-batch leaves: the rule for what was not measured counts."""
    update: dict[str, Section] = {"parallel": config.parallel.model_copy(update={"workers": workers})}
    if workers != config.parallel.workers and config.train.microbatch_rows_at_most is not None:
        least = min(config.train.microbatch_rows_at_most, config.unmeasured_rows)
        update["train"] = config.train.model_copy(update={"microbatch_rows_at_most": least})
    return config.model_copy(update=update)


def place_workers(room: Mapping[str, int], tensor: int, legal: list[int], at_most: int) -> list[str]:
    """The node of each worker, for the most legal workers that fit, at most so many; empty where none do.

    `room`: workers that fit on each node. Tensor groups fill the roomiest nodes first, so that few nodes hold the run.
    """
    groups = {node: workers // tensor for node, workers in room.items()}
    fitting = min(at_most, sum(groups.values()) * tensor)
    workers = next((count for count in legal if count <= fitting), 0)
    slots = [node for node in sorted(groups, key=lambda node: (-groups[node], node)) for _ in range(groups[node] * tensor)]
    return slots[:workers]
