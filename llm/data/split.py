"""Which worker reads the stream: one split per data rank.

Apart from `llm/data/stream.py` because importing ray.train costs 2 s of CPU time, and the processes that tokenize import that file.
"""

from __future__ import annotations

from typing import Any

from ray.train import DataConfig


class OneSplitPerDataRank(DataConfig):
    """Splits the dataset over the data ranks only: tensor rank 0 of each group reads, its peers are given nothing to iterate.

    Ray's default splits over all workers and equalizes the splits, which gives tensor peers different tokens and drops rows.
    """

    def __init__(self, tensor_size: int) -> None:
        super().__init__()
        self.tensor_size = tensor_size

    def configure(
        self,
        datasets: dict[str, Any],
        world_size: int,
        worker_handles: Any,
        worker_node_ids: list[str] | None,
        **_: Any,
    ) -> list[dict[str, Any]]:
        data_size = world_size // self.tensor_size
        readers = [worker_node_ids[d * self.tensor_size] for d in range(data_size)] if worker_node_ids else None
        shards: list[dict[str, Any]] = [dict.fromkeys(datasets) for _ in range(world_size)]
        for name, dataset in datasets.items():
            splits = dataset.streaming_split(data_size, equal=False, locality_hints=readers)
            for data_rank, split in enumerate(splits):
                shards[data_rank * self.tensor_size][name] = split
        return shards
