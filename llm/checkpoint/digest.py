"""One hash for what a checkpoint holds, whatever layout it was saved in: equal for equal weights, moments and ledger."""

from __future__ import annotations

import hashlib
import json
from math import prod

import torch

from llm.checkpoint.index import ITEM_BYTES, Index
from llm.checkpoint.layout import STATE, rank_file
from llm.checkpoint.published import Published
from llm.checkpoint.read import read_index, read_whole
from llm.checkpoint.strict_json import strict_json
from llm.errors import DamagedCheckpointError


def digest(published: Published) -> str:
    """SHA-256, as 64 hexadecimal digits, over the ledger and the whole tensors (weights, frozen ones too, moments, persistent buffers)
    in the order of their names, each with its name, kind, shape, type and the optimizer's counters. Verifies all that it reads; holds the
    largest tensor, or some hundred MB of small ones.

    The state of an optimizer that goes to the same layout only (Muon) is hashed rank by rank: its digests are comparable within a layout.
    """
    index = read_index(published)
    total = hashlib.sha256(f"headrace-digest-1 {_ledger(published)}\n".encode())
    for name, key, whole in read_whole(published, index):
        saved = index.tensors[name]
        counters = {counter: float(value) for counter, value in saved.counters.items()}
        about = [name, key, saved.kind, saved.dtype, saved.shape, counters]
        total.update(json.dumps(about, sort_keys=True).encode() + b"\n")
        total.update(whole.view(-1).view(torch.uint8).numpy().data)
    _add_undivided(total, published, index)
    return total.hexdigest()


def _ledger(published: Published) -> str:
    raw = strict_json(published.read(STATE), STATE)
    try:
        return str(raw["train"]["ledger"])
    except (TypeError, KeyError):
        raise DamagedCheckpointError(f"{STATE} of {published.uri} names no ledger.") from None


def _add_undivided(total: hashlib._Hash, published: Published, index: Index) -> None:
    for each in sorted(index.undivided):
        total.update(json.dumps([each.file, each.group, each.key, each.shape]).encode() + b"\n")
        total.update(published.read_range(rank_file(each.file), each.begin, each.begin + prod(each.shape) * ITEM_BYTES["F32"]))
