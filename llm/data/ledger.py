"""The proof of what a run was trained on: a hash chain over its batches, h = H(h, ids of the batch).

A row's ids and segments are hashed by the data rank that holds them, and the batch's digests are chained in the batch's order. So the
ledger of step *s* is the same whatever the data size and the microbatch, and differs from there on when one token does.
"""

from __future__ import annotations

import hashlib

import numpy as np

DIGEST_BYTES = 16
START = "0" * 2 * DIGEST_BYTES  # the ledger of a run that has taken no step


def row_digests(ids: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """uint8 (rows, DIGEST_BYTES) of rows of ids and segments, integers of any width."""
    both = np.concatenate([ids, segments], axis=1).astype("<i4")
    found = b"".join(hashlib.blake2b(row.tobytes(), digest_size=DIGEST_BYTES).digest() for row in both)
    return np.frombuffer(found, dtype=np.uint8).reshape(-1, DIGEST_BYTES)


def advanced(ledger: str, digests: np.ndarray, outcome: str = "") -> str:
    """The ledger after a batch with these row digests, in the batch's order. `outcome`: what became of it, where it was not trained on."""
    return hashlib.blake2b(bytes.fromhex(ledger) + digests.tobytes() + outcome.encode(), digest_size=DIGEST_BYTES).hexdigest()
