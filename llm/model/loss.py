"""What goes into the model and what comes out: inputs, labels and positions of packed rows, and the summed loss."""
# ruff: noqa: F722 (the shapes in jaxtyping's annotations are not Python)

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

_IGNORED = -100  # a label that cross_entropy skips


def sum_loss(
    logits: Float[Tensor, "rows seq vocab"], labels: Int[Tensor, "rows seq"], valid: Bool[Tensor, "rows seq"]
) -> Float[Tensor, ""]:
    """Sum of the cross entropy over valid positions, in nats, computed in fp32 whatever the logits' type.

    Divide by the *global* number of valid tokens of the batch to get the mean. `logits` must span the whole vocabulary:
    under tensor parallelism that means DeepSpeed's `vocab_parallel_lm_head: false`. Holds an fp32 copy of the logits.
    """
    targets = labels.masked_fill(~valid, _IGNORED)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=_IGNORED, reduction="sum")


def model_inputs(
    ids: Int[Tensor, "rows seq1"], segments: Int[Tensor, "rows seq1"], isolate: bool
) -> tuple[dict[str, Tensor], Int[Tensor, "rows seq"], Bool[Tensor, "rows seq"]]:
    """(the model's forward arguments, labels, which labels count) of packed rows of seq_len + 1 ids.

    `segments` holds 0 for padding, which only ends a row, and the document's number within the row, from 1, elsewhere.
    A label counts unless it is padding; with `isolate`, also only if it belongs to its input's document. Without
    `isolate` the row is one causal text and the model gets no mask: padding at its end cannot be seen from before.

    With `isolate`, positions restart at each document. That is all the model needs: transformers masks attention
    between documents wherever positions do not go up by one (in eager and sdpa attention, also within sliding windows),
    for the families in `llm.model.families.ISOLATES`; `check_model` refuses the others. A 4-D mask would be taken too,
    but used as it is: a boolean one is silently wrong in eager attention, which adds it, a float one must have the type
    of the activations, and either switches sliding windows off.

    Example: ids [5 6 7 8 9 0], segments [1 1 2 2 2 0], isolate -> input_ids [5 6 7 8 9], position_ids [0 1 0 1 2],
    labels [6 7 8 9 0], valid [1 0 1 1 0].
    """
    labels, label_segments = ids[:, 1:].long(), segments[:, 1:]
    inputs: dict[str, Tensor] = {"input_ids": ids[:, :-1].long()}
    valid = label_segments != 0
    if isolate:
        valid = valid & (label_segments == segments[:, :-1])
        inputs["position_ids"] = positions_within_documents(segments[:, :-1])
    return inputs, labels, valid


def positions_within_documents(segments: Int[Tensor, "rows seq"]) -> Int[Tensor, "rows seq"]:
    """Each token's place in its run of equal segment numbers, from 0, as int64. [1 1 2 2 2 0] -> [0 1 0 1 2 0]."""
    place = torch.arange(segments.shape[1], device=segments.device).expand(segments.shape)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return place - torch.where(begins, place, 0).cummax(dim=1).values
