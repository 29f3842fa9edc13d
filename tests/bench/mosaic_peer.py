"""mosaicml-streaming, driven as its documentation says. A program of its own: the library wants transformers < 5 and numpy < 2.2, so it
cannot be installed beside Headrace, and this file runs in an environment that has it and imports nothing of ours.

    PYTHON mosaic_peer.py write ROWS.npy FOLDER           rows (uint16, rows x ids) as MDS shards
    PYTHON mosaic_peer.py read FOLDER BATCH_ROWS SECONDS  prints {"ids": n, "cpu_s": s}
    PYTHON mosaic_peer.py order FOLDER OPTIONS_JSON       prints {"rows": [[number, ...], ...], "state": {...}} of this rank, see `order`
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import torch
from streaming import MDSWriter, StreamingDataLoader, StreamingDataset  # pyright: ignore[reportMissingImports]  # the peer's own environment has it
from torch.utils.data import DataLoader


def write(rows_file: str, folder: str) -> None:
    rows = np.load(rows_file)
    with MDSWriter(out=folder, columns={"number": "int", "ids": f"ndarray:uint16:{rows.shape[1]}"}) as out:
        for number, row in enumerate(rows):
            out.write({"number": number, "ids": row})


def read(folder: str, batch_rows: int, seconds: float) -> None:
    """Batches of int64 x and y from one process, epoch after epoch; the first tenth of the seconds is not counted."""
    torch.set_num_threads(1)
    dataset = StreamingDataset(local=folder, shuffle=True, batch_size=batch_rows)
    loader = DataLoader(dataset, batch_size=batch_rows, num_workers=0, collate_fn=_x_and_y, drop_last=True)
    begin, first, ids, done = time.process_time(), None, 0, False
    while not done:
        for x, _ in loader:
            now = time.process_time()
            if first is None:
                if now - begin > seconds / 10:
                    first = now
                continue
            ids += x.numel()
            if now - first > seconds:
                done = True
                break
    assert first is not None
    print(json.dumps({"ids": ids, "cpu_s": now - first}))


def _x_and_y(samples: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.from_numpy(np.stack([sample["ids"] for sample in samples]).astype(np.int64))
    return ids[:, :-1], ids[:, 1:]


def order(folder: str, *, batch_rows: int, canonical_nodes: int, num_steps: int, state: dict | None) -> None:
    """The numbers of the rows in each of this rank's next batches, from `state` on. RANK and the other variables say which rank it is."""
    dataset = StreamingDataset(local=folder, shuffle=True, batch_size=batch_rows, num_canonical_nodes=canonical_nodes, shuffle_seed=0)
    loader = StreamingDataLoader(dataset, batch_size=batch_rows, num_workers=0)
    if state is not None:
        loader.load_state_dict(state)
    found: list[list[int]] = []
    after = None
    while len(found) < num_steps:
        for batch in loader:
            found.append(batch["number"].tolist())
            if len(found) == num_steps:
                after = loader.state_dict()
                break
    print(json.dumps({"rows": found, "state": after}))


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    if command == "write":
        write(*rest)
    elif command == "read":
        read(rest[0], int(rest[1]), float(rest[2]))
    else:
        order(rest[0], **json.loads(rest[1]))
