"""What this rank owns: where DeepSpeed keeps each rank's fp32 weights and optimizer state, and what must be refreshed after writing them.

Stage 0 keeps whole parameters on every data rank. Stages 1 and 2 keep one flat fp32 partition per parameter group, of which a
parameter's `_hp_mapping` names this rank's piece. Stage 3 keeps each parameter's own piece (`grad_position`) in flat fp32 groups. In all of
them the optimizer's state is keyed by the flat tensor, so a piece of state lies at the same place as the piece of the weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llm.checkpoint.layout import WEIGHT, FragmentIndex, split_dim
from llm.parallel.zero import Engine


@dataclass(frozen=True)
class Fragment:
    """A piece of one parameter that this rank owns: elements [flat_start, flat_start + numel) of `flat`."""

    name: str
    group: int  # number of the flat tensor, the key of the optimizer's counters
    flat: Tensor
    flat_start: int
    index: FragmentIndex

    def of(self, flat: Tensor) -> Tensor:
        """The view of a tensor shaped like `flat` (the weights, or a moment) that belongs to this fragment."""
        return flat.view(-1).narrow(0, self.flat_start, self.index.numel)


def owned_fragments(engine: Engine) -> Iterator[Fragment]:
    """This rank's fragments, in parameter order. At stage 0 data ranks own the same: the first one's are saved."""
    zero = engine.optimizer
    parameter: Any  # DeepSpeed hangs ds_* attributes on it
    for number, (name, parameter) in enumerate(engine.module.named_parameters()):
        full = engine.full_shapes[name]
        part = tuple(getattr(parameter, "ds_shape", parameter.shape))

        def index(start: int, numel: int, part: tuple[int, ...] = part, full: tuple[int, ...] = full) -> FragmentIndex:
            return FragmentIndex(start, numel, part, full, split_dim(part, full))

        if engine.stage == 0:
            yield Fragment(name, number, parameter.data, 0, index(0, parameter.numel()))
        elif engine.stage in (1, 2):
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:
                group = _group_of(zero.bit16_groups, parameter)
                there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
                flat = zero.single_partition_of_fp32_groups[group]
                yield Fragment(name, group, flat, here.start, index(there.start, here.numel))
        else:
            group, offset, numel = zero.grad_position[zero.get_param_id(parameter)]
            start = parameter.ds_tensor.ds_numel * dist.get_rank(parameter.ds_process_group)
            real = max(0, min(numel, parameter.ds_numel - start))  # the last rank's piece is padded
            if real:
                yield Fragment(name, group, zero.fp32_partitioned_groups_flat[group], offset, index(start, real))


def optimizer_state(engine: Engine, fragment: Fragment) -> dict[str, Any]:
    """The optimizer's own entry for the flat tensor that the fragment lies in: {"exp_avg": ..., "step": ...}."""
    inner = engine.optimizer if engine.stage == 0 else engine.optimizer.optimizer
    if engine.stage == 0:
        key = dict(engine.module.named_parameters())[fragment.name]
    else:
        key = fragment.flat
    return inner.state[key]


def tensors_of(engine: Engine, fragment: Fragment) -> dict[str, Tensor]:
    """Views of everything that the rank owns of this fragment: the fp32 weight and each moment."""
    found = {WEIGHT: fragment.of(fragment.flat)}
    for key, value in optimizer_state(engine, fragment).items():
        if isinstance(value, Tensor) and value.numel() == fragment.flat.numel() and value.dim() > 0:
            found[key] = fragment.of(value)
    return found


def undivided_state(engine: Engine, fragment: Fragment) -> dict[str, Tensor]:
    """State of the fragment's flat tensor that is not laid out as it is, such as Muon's momentum, by a name of its own: it goes to the
    same layout only."""
    return {
        f"group-{fragment.group}|{key}": value
        for key, value in optimizer_state(engine, fragment).items()
        if isinstance(value, Tensor) and value.dim() > 0 and value.numel() != fragment.flat.numel()
    }


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
            mine = partitions[dist.get_rank(process_group)].clone()
            gathered = [torch.empty_like(p) for p in partitions]
            dist.all_gather(gathered, mine, group=process_group)
            for partition, value in zip(partitions, gathered, strict=True):
                partition.copy_(value)
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


def _group_of(groups: list[list[Tensor]], parameter: Tensor) -> int:
    for number, group in enumerate(groups):
        if any(parameter is member for member in group):
            return number
    raise AssertionError("a parameter with a ZeRO mapping is in no group")
