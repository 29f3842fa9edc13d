"""Which worker does what: rank <-> (data rank, tensor rank). Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mesh:
    """`rank = data_rank * tensor_size + tensor_rank`: a tensor group is adjacent ranks, which the cluster places inside one node.

    Example: 4 workers, tensor_size=2 -> data rank 0 is ranks 0, 1; data rank 1 is ranks 2, 3.
    """

    rank: int
    world_size: int
    tensor_size: int

    @property
    def data_size(self) -> int:
        return self.world_size // self.tensor_size

    @property
    def data_rank(self) -> int:
        return self.rank // self.tensor_size

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor_size

    @property
    def tensor_group(self) -> range:
        """The ranks that share this worker's tokens and hold the other parts of its matrices."""
        first = self.data_rank * self.tensor_size
        return range(first, first + self.tensor_size)
