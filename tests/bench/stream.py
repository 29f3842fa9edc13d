"""What the stream costs: MB of text and tokens per CPU-second, beside the tokenizers alone and beside readers of ready tokens.

    python -m tests.bench.stream [--config FILE] [--set data.seq_len=1024 train.batch_rows=64] [--rounds 3] [--peer-python PYTHON]

On the same corpus, in alternating rounds, CPU time of user and system:
- the tokenizers library and gigatoken on cleaned texts held in memory, one thread;
- ours in one process: `make_window`, which reads, cleans, tokenizes and packs, with either of them, and from a warm token cache;
- ours in Ray Data: `sequences` consumed by two readers; all processes of the private cluster count, once the pipeline runs;
- readers of ready tokens, in one process: nanoGPT's (a memmap of uint16), and mosaicml-streaming (MDS shards of the same rows), both
  giving batches of one data rank's shape.

mosaicml-streaming does not install beside us (it wants transformers < 5): give the Python of an environment that has it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count, cycle
from pathlib import Path
from typing import Any

import numpy as np

from llm.config import RunConfig
from llm.config_file import load_run
from llm.data.cache import TokenCache
from llm.data.encode import Encoder
from llm.data.order import CorpusPlan
from llm.data.slices import Slice
from llm.data.window import TOKENIZE_DOCUMENTS, Recipe, make_window, sample_texts
from llm.train.prepare import prepare
from tests.bench.stream_cpu import READERS, roles_told, run_stream

PEER = Path(__file__).with_name("mosaic_peer.py")
SECONDS = 2.0  # CPU seconds of one measurement in one process
HF, FAST = "tokenizers alone", "gigatoken alone"
OURS_HF, OURS, OURS_CACHED = "one process, tokenizers", "one process, gigatoken", "one process, from the cache"
RAY_HF, RAY, RAY_CACHED = "Ray Data, tokenizers", "Ray Data, gigatoken", "Ray Data, from the cache"
MEMMAP, MOSAIC = "memmap reader (nanoGPT's)", "mosaicml-streaming"


def main() -> None:
    parser = argparse.ArgumentParser(description="MB and tokens per CPU-second of the stream, beside its parts and its peers")
    parser.add_argument("--config", default="jobs/recipes/tiny_cpu.yaml")
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--million-tokens", type=float, default=60, help="through Ray Data, a tenth of it with the tokenizers library")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--only", nargs="*", default=[], help="rows of the table, by a part of their names")
    options = parser.parse_args()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        config = load_run(options.config, ["eval.rows=0", *options.set])
        measures = dict(measures_of(config, options.million_tokens * 1e6, options.peer_python, Path(scratch)))
        chosen = [name for name in measures if not options.only or any(part in name for part in options.only)]
        speeds: dict[str, list[float]] = {name: [] for name in chosen}
        for number in range(options.rounds):
            for name in chosen:
                speeds[name].append(measures[name]())
                print(f"  round {number + 1}, {name}: {speeds[name][-1] / 1e6:.2f} M tokens/CPU-s", flush=True)
        recipe = prepare(config, "/none", 0.0).recipe
        table(speeds, bytes_per_token(recipe), f"{config.train.batch_rows} rows of {config.data.seq_len} tokens a batch, {READERS} readers")


def measures_of(config: RunConfig, num_tokens: float, peer_python: str, scratch: Path) -> Iterator[tuple[str, Callable[[], float]]]:
    """(name, tokens per CPU-second of a round) of each row of the table."""
    recipe, cache = prepare(config, "/none", 0.0).recipe, TokenCache(str(scratch / "cache"), config.s3, 1 << 33)
    rank_rows = config.train.batch_rows // READERS
    slow = replace(recipe, engine="tokenizers")
    texts = epoch_texts(recipe)
    yield HF, steady(encoding(Encoder(recipe.tokenizer, "tokenizers"), texts))
    if recipe.engine == "gigatoken":
        yield FAST, steady(encoding(Encoder(recipe.tokenizer, "gigatoken"), texts))
    yield OURS_HF, steady(windows(slow, None))
    yield OURS, steady(windows(recipe, None))
    yield OURS_CACHED, steady(windows(recipe, cache))
    for name, used, kept, tokens in (
        (RAY_HF, slow, None, num_tokens / 10),
        (RAY, recipe, None, num_tokens),
        (RAY_CACHED, recipe, cache, num_tokens),
    ):
        yield name, through_ray(config, used, kept, int(tokens))
    ids = np.concatenate([make_window(recipe, 0, window, (), cache.slice).rows.ids for window in range(recipe.plan.windows_per_epoch)])
    ids.astype(np.uint16).tofile(scratch / "tokens.bin")
    yield MEMMAP, steady(memmap_batches(scratch / "tokens.bin", rank_rows, config.data.seq_len))
    if subprocess.run([peer_python, "-W", "ignore", "-c", "import streaming"], capture_output=True, check=False).returncode:
        print(f"{peer_python} has no mosaicml-streaming: its row is left out")
        return
    np.save(scratch / "rows.npy", ids.astype(np.uint16))
    subprocess.run([peer_python, str(PEER), "write", str(scratch / "rows.npy"), str(scratch / "mds")], check=True)
    yield MOSAIC, lambda: mosaic(peer_python, scratch / "mds", rank_rows)


def steady(tokens_of_steps: Iterator[int]) -> Callable[[], float]:
    """Tokens per CPU-second of this process, over SECONDS of them, after one step that does not count."""

    def measure() -> float:
        next(tokens_of_steps)
        tokens, began = 0, time.process_time()
        while (spent := time.process_time() - began) < SECONDS:
            tokens += next(tokens_of_steps)
        return tokens / spent

    return measure


def epoch_texts(recipe: Recipe) -> list[str]:
    return sample_texts(recipe.clean, epoch_slices(recipe.plan), recipe.text_fields, recipe.s3, 1 << 60)


def epoch_slices(plan: CorpusPlan) -> list[Slice]:
    return [piece for window in range(plan.windows_per_epoch) for piece in plan.window(0, window)]


def bytes_per_token(recipe: Recipe) -> float:
    """Of cleaned text as UTF-8."""
    texts = epoch_texts(recipe)
    return sum(len(text.encode()) for text in texts) / int(Encoder(recipe.tokenizer, recipe.engine).encode(texts)[1].sum())


def encoding(encoder: Encoder, texts: list[str]) -> Iterator[int]:
    """The library alone: no ids are copied or laid out. Tokens are counted as the stream does, with one that ends each document."""
    batches = [texts[first : first + TOKENIZE_DOCUMENTS] for first in range(0, len(texts), TOKENIZE_DOCUMENTS)]
    sizes = [int(encoder.encode(batch)[1].sum()) for batch in batches]
    for batch, tokens in cycle(zip(batches, sizes, strict=True)):
        if encoder._fast is not None:
            encoder._fast.encode_batch(batch, parallel=False)
        else:
            encoder._slow.encode_batch_fast(batch, add_special_tokens=False)
        yield tokens


def windows(recipe: Recipe, cache: TokenCache | None) -> Iterator[int]:
    if cache:
        for piece in epoch_slices(recipe.plan):
            cache.slice(recipe, piece)
    for number in count():
        epoch, window = divmod(number, recipe.plan.windows_per_epoch)
        yield make_window(recipe, epoch, window, (), cache.slice if cache else None).rows.ids.size


def through_ray(config: RunConfig, recipe: Recipe, cache: TokenCache | None, num_tokens: int) -> Callable[[], float]:
    batch_rows = config.train.batch_rows
    num_batches = num_tokens // (batch_rows * (recipe.seq_len + 1))

    def measure() -> float:
        context = multiprocessing.get_context("spawn")  # a cluster and its processes for each round
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=run_stream, args=(recipe, cache, batch_rows, num_batches, config.data.windows_ahead, sender))
        process.start()
        sender.close()
        ids, seconds, took = receiver.recv()
        process.join()
        total = sum(seconds.values())
        print(f"    {total:.1f} CPU-s in {took:.1f} s for {ids / 1e6:.1f} M ids: {', '.join(roles_told(seconds))}")
        return ids / total

    return measure


def memmap_batches(path: Path, batch_rows: int, seq_len: int) -> Iterator[int]:
    """nanoGPT's get_batch: random offsets, int64 x and y; the map is made anew each time, as there."""
    import torch

    torch.set_num_threads(1)
    while True:
        data = np.memmap(path, dtype=np.uint16, mode="r")
        offsets = torch.randint(len(data) - seq_len, (batch_rows,)).tolist()
        x = torch.stack([torch.from_numpy(data[i : i + seq_len].astype(np.int64)) for i in offsets])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + seq_len].astype(np.int64)) for i in offsets])
        assert x.shape == y.shape
        yield x.numel()


def mosaic(python: str, folder: Path, batch_rows: int) -> float:
    command = [python, "-W", "ignore", str(PEER), "read", str(folder), str(batch_rows), str(SECONDS)]
    told: Any = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return told["ids"] / told["cpu_s"]


def table(speeds: dict[str, list[float]], text_bytes: float, shape: str) -> None:
    middle = {name: statistics.median(values) for name, values in speeds.items()}
    print(f"\n{shape}; {text_bytes:.2f} bytes of text a token; medians of {len(next(iter(speeds.values())))} rounds")
    print(f"  {'':30}{'MB/CPU-s':>10}{'M tokens/CPU-s':>16}  rounds")
    for name, value in middle.items():
        rounds = " ".join(f"{each / 1e6:.2f}" for each in speeds[name])
        print(f"  {name:30}{value * text_bytes / 1e6:10.1f}{value / 1e6:16.2f}  {rounds}")
    for what, ours, theirs, bar in (
        ("cold", OURS_HF, HF, 0.8),
        ("cold", RAY_HF, HF, 0.8),
        ("cold", OURS, HF, 0.8),
        ("cold", RAY, HF, 0.8),
        ("cold", OURS, FAST, 0.8),
        ("cold", RAY, FAST, 0.8),
        ("cached", OURS_CACHED, MEMMAP, 1.0),
        ("cached", RAY_CACHED, MEMMAP, 1.0),
        ("cached", RAY_CACHED, MOSAIC, 1.0),
    ):
        if ours in speeds and theirs in speeds:
            ratio = statistics.median(a / b for a, b in zip(speeds[ours], speeds[theirs], strict=True))
            print(f"  {what}: {ours} / {theirs} = {ratio:.3f}, {'meets' if ratio >= bar else 'misses'} {bar}")


if __name__ == "__main__":
    main()
