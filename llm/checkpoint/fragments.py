"""What this rank owns: where DeepSpeed keeps each rank's fp32 weights and optimizer state, and what must be refreshed after writing them.

Stage 0 keeps whole parameters on every data rank. Stages 1 and 2 keep one flat fp32 partition per parameter group, of which a
parameter's `_hp_mapping` names this rank's piece. Stage 3 keeps each parameter's own piece (`grad_position`) in flat fp32 groups. In all of
them the optimizer's state is keyed by the flat tensor, so a piece of state lies at the same place as the piece of the weight. Frozen
parameters are in no optimizer: stages 0 to 2 keep them whole, stage 3 in pieces (`ds_tensor`). Buffers are whole everywhere.

What several ranks hold alike (`copies`) is saved by one of them: copy n mod `copies` for the model's n-th tensor, so that all write alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llm.checkpoint.dtypes import DTYPES
from llm.checkpoint.index import WEIGHT, Counters
from llm.errors import CheckpointError
from llm.parallel.mesh import Mesh
from llm.parallel.zero import Engine


@dataclass(frozen=True)
class Fragment:
    """A piece of a tensor that this rank owns: elements [start, start + numel) of its flattened tensor-parallel part, which is
    [part_offset, part_offset + part_size) of dimension `split_dim` (0, 1 where it is not split).

    `weight`: the live values, 1-D. `flat`: the tensor that `optimizer` keys its state by, in which the fragment begins at `flat_start`
    (None: not trained); `group` is its number. `number`: of the tensor in the model. Writing into the views changes the engine.
    """

    name: str
    number: int
    kind: str
    shape: tuple[int, ...]
    split_dim: int | None
    part_offset: int
    part_size: int
    start: int
    weight: Tensor
    flat: Tensor | None = None
    flat_start: int = 0
    group: int = 0
    optimizer: Any = None
    copy: int = 0
    copies: int = 1

    @property
    def numel(self) -> int:
        return self.weight.numel()

    @property
    def is_saved_here(self) -> bool:
        """Whether of all ranks that hold it this one saves it. Tensor ranks may cut what they hold alike in pieces at other places, since
        their flat groups differ in size: so the tensor decides which of them, not the piece."""
        return self.number % self.copies == self.copy

    def values(self) -> dict[str, Tensor]:
        """Views of everything that the rank owns of this fragment, by key: the weight and each moment."""
        moments = {key: value for key, value in self._state_tensors().items() if value.numel() == self._flat_numel}
        return {WEIGHT: self.weight, **{key: value.view(-1).narrow(0, self.flat_start, self.numel) for key, value in moments.items()}}

    def undivided(self) -> dict[str, Tensor]:
        """State of the fragment's flat tensor that is not laid out as it is, such as Muon's momentum."""
        return {key: value for key, value in self._state_tensors().items() if value.numel() != self._flat_numel}

    def counters(self) -> Counters:
        return {
            key: value if isinstance(value, int) else float(value)
            for key, value in self._entry().items()
            if isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0)
        }

    @property
    def _flat_numel(self) -> int:
        return self.flat.numel() if self.flat is not None else 0

    def _entry(self) -> dict[str, Any]:
        # To ask the optimizer's state for what it does not hold would make it.
        return self.optimizer.state[self.flat] if self.flat is not None and self.flat in self.optimizer.state else {}

    def _state_tensors(self) -> dict[str, Tensor]:
        return {key: value for key, value in self._entry().items() if isinstance(value, Tensor) and value.dim() > 0}


class Ownership:
    """Says what this rank owns. All ranks must make it together: tensor ranks tell each other how they split each parameter."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._splits: dict[str, tuple[int, int]] = {}  # of split parameters: dimension, offset of this rank's part
        sizes: list[int] = []
        for name, parameter in engine.module.named_parameters():
            dim = _split_dim(name, _part_shape(parameter), engine.full_shapes[name])
            if dim is not None:
                _require_one_band(name, parameter)
                self._splits[name] = dim, 0
                sizes.append(_part_shape(parameter)[dim])
        if not sizes:
            return
        mine = torch.tensor(sizes, dtype=torch.int64)
        every = [torch.empty_like(mine) for _ in range(engine.mesh.world_size)]
        dist.all_gather(every, mine)
        before = [every[rank] for rank in engine.mesh.tensor_group if rank < engine.mesh.rank]
        for i, (name, (dim, _)) in enumerate(self._splits.items()):
            self._splits[name] = dim, sum(int(sizes[i]) for sizes in before)

    def fragments(self) -> list[Fragment]:
        """This rank's fragments as they are now: parameters in their order, then persistent buffers."""
        return [*self._parameters(), *self._buffers()]

    def _parameters(self) -> Iterator[Fragment]:
        engine = self._engine
        zero = engine.optimizer
        mesh = engine.mesh
        groups = _group_numbers(zero.bit16_groups) if engine.stage in (1, 2) else {}
        parameter: Any  # DeepSpeed hangs ds_* attributes on it
        for number, (name, parameter) in enumerate(engine.module.named_parameters()):
            shape, part = engine.full_shapes[name], _part_shape(parameter)
            dim, offset = self._splits.get(name, (None, 0))
            trained = parameter.requires_grad
            about: dict[str, Any] = {
                "name": name,
                "number": number,
                "kind": "trained" if trained else "frozen",
                "shape": shape,
                "split_dim": dim,
                "part_offset": offset,
                "part_size": 1 if dim is None else part[dim],
            }
            on_every_data_rank = engine.stage == 0 or (engine.stage < 3 and not trained)
            about |= _copies(mesh, alike_over_data=on_every_data_rank, alike_over_tensor=dim is None)
            if on_every_data_rank:
                flat = parameter if trained else None
                yield Fragment(**about, start=0, weight=parameter.data.view(-1), flat=flat, group=number, optimizer=zero)
            elif engine.stage < 3:
                mapping = parameter._hp_mapping
                if mapping is not None:
                    group = groups[id(parameter)]
                    flat, there, here = (
                        zero.single_partition_of_fp32_groups[group],
                        mapping.lp_fragment_address,
                        mapping.hp_fragment_address,
                    )
                    yield self._of_flat(about, flat, group, here.start, there.start, here.numel)
            else:
                start = parameter.ds_tensor.ds_numel * dist.get_rank(parameter.ds_process_group)
                real = max(0, min(parameter.ds_tensor.ds_numel, parameter.ds_numel - start))  # the last rank's piece is padded
                if not real:
                    continue
                if trained:
                    group, flat_start, _ = zero.grad_position[zero.get_param_id(parameter)]
                    yield self._of_flat(about, zero.fp32_partitioned_groups_flat[group], group, flat_start, start, real)
                else:
                    yield Fragment(**about, start=start, weight=parameter.ds_tensor.data.view(-1).narrow(0, 0, real))

    def _of_flat(self, about: dict[str, Any], flat: Tensor, group: int, flat_start: int, start: int, numel: int) -> Fragment:
        weight = flat.data.view(-1).narrow(0, flat_start, numel)
        optimizer = self._engine.optimizer.optimizer
        return Fragment(**about, start=start, weight=weight, flat=flat, flat_start=flat_start, group=group, optimizer=optimizer)

    def _buffers(self) -> Iterator[Fragment]:
        alike = _copies(self._engine.mesh, alike_over_data=True, alike_over_tensor=True)
        for number, (name, buffer) in enumerate(_persistent_buffers(self._engine.module)):
            if buffer.dtype not in DTYPES:
                raise CheckpointError(f"the buffer {name} is of type {buffer.dtype}, which checkpoints do not hold.")
            if buffer.numel():
                yield Fragment(name, number, "buffer", tuple(buffer.shape), None, 0, 1, 0, buffer.data.view(-1), **alike)


@torch.no_grad()
def refresh_weights(engine: Engine) -> None:
    """After fragments were written: brings the weights that forward passes use in line with the fp32 ones. All ranks must call it."""
    zero = engine.optimizer
    if engine.stage in (1, 2):
        for parameter in engine.module.parameters():
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:
                mapping.update_lp()
        for group, partitions in enumerate(zero.parallel_partitioned_bit16_groups):
            process_group = zero.real_dp_process_group[group]
            dist.all_gather(list(partitions), partitions[dist.get_rank(process_group)].clone(), group=process_group)
    elif engine.stage == 3:
        for group, flat in enumerate(zero.fp32_partitioned_groups_flat):
            zero.fp16_partitioned_groups_flat[group].data.copy_(flat.data)
            pieces = zero.unflatten(zero.fp16_partitioned_groups_flat[group], zero.fp16_partitioned_groups[group])
            for held, piece in zip(zero.fp16_partitioned_groups[group], pieces, strict=True):
                held.data = piece.data
        # Small weights stay gathered between steps: without this the first forward pass would use the old ones.
        if zero.persistent_parameters:
            zero.persistent_parameters[0].partition(zero.persistent_parameters)
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def _copies(mesh: Mesh, *, alike_over_data: bool, alike_over_tensor: bool) -> dict[str, Any]:
    copy, copies = (mesh.tensor_rank, mesh.tensor_size) if alike_over_tensor else (0, 1)
    if alike_over_data:
        copy, copies = copy + copies * mesh.data_rank, copies * mesh.data_size
    return {"copy": copy, "copies": copies}


def _part_shape(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _split_dim(name: str, part: tuple[int, ...], full: tuple[int, ...]) -> int | None:
    """The dimension in which a tensor-parallel part differs from the whole; None where they are equal."""
    dims = [i for i, (a, b) in enumerate(zip(part, full, strict=True)) if a != b]
    if len(dims) > 1:
        raise CheckpointError(f"{name} is split in several dimensions, {part} of {full}: such a model cannot be saved at this tensor size.")
    return dims[0] if dims else None


def _require_one_band(name: str, parameter: Any) -> None:
    """DeepSpeed splits fused matrices (queries, keys and values in one) within each of their parts: not one range of the dimension."""
    about = getattr(parameter, "ds_autotp_universal_checkpoint_meta", None) or {}
    if about.get("sub_param_shard_widths") or about.get("conversion", {}).get("unsupported_reason"):
        raise CheckpointError(
            f"{name} is a fused matrix that DeepSpeed splits in several ranges: it cannot be saved. Set parallel.tensor=1."
        )


def _group_numbers(groups: list[list[Tensor]]) -> dict[int, int]:
    return {id(parameter): number for number, group in enumerate(groups) for parameter in group}


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that a state dict holds, each once."""
    seen: set[int] = set()
    for prefix, inner in module.named_modules():
        for name, buffer in inner._buffers.items():
            if buffer is not None and name not in inner._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                yield f"{prefix}.{name}" if prefix else name, buffer
