"""What the stack costs: tokens/s of the whole pipeline and of a bare PyTorch loop, side by side in one run; and where start-up goes.

    python -m tests.bench.pipeline [--config FILE] [--workers 1 2] [--steps 110] [--rounds 3]

Both train the same model on the same rows with the same numbers of processes, threads, microbatches and updates. The pipeline is
`jobs.pretrain` as users run it: Ray Data tokenizes while Ray Train and DeepSpeed train. The bare loop reads rows made beforehand; it is
what PyTorch alone offers: one process, or DistributedDataParallel over gloo. It does not know our allocator setting
(`KEEP_FREED_MEMORY`), but is also measured with it, so that this gain is not booked as cheap orchestration. Rounds alternate, because the
machines are noisy.

tokens/s = tokens of all steps after the first WARM_STEPS / the seconds from the end of those to the end of the last: waiting for data,
tokenizing the next windows beside the training, and recording are in it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from llm.config import RunConfig
from llm.config_file import dump_run, load_run
from llm.job import Job
from llm.metrics import read_rows, rows_of
from llm.train.launch import KEEP_FREED_MEMORY
from llm.train.prepare import Prepared, prepare, with_builtin_corpus

ROOT = Path(__file__).parents[2]
WARM_STEPS = 10
BARE, BARE_KEEPING_MEMORY, PIPELINE = "bare loop", "bare loop + our malloc setting", "pipeline"


def main() -> None:
    parser = argparse.ArgumentParser(description="tokens/s of the full pipeline beside a bare PyTorch loop")
    parser.add_argument("--config", default="jobs/recipes/tiny_cpu.yaml")
    parser.add_argument("--workers", type=int, nargs="+", default=[2])
    parser.add_argument("--steps", type=int, default=110)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for workers in options.workers:
        compare(options.config, workers, options.steps, options.rounds)


def compare(recipe: str, workers: int, steps: int, rounds: int) -> None:
    """Prints the table of one number of workers."""
    threads = max(1, (os.cpu_count() or 1) // workers)
    with tempfile.TemporaryDirectory() as scratch:
        config = bench_config(recipe, workers, steps, Path(scratch))
        prepared = prepare(config, "/none", 0.0)
        rows = first_rows(prepared, steps * config.train.batch_rows)
        speeds: dict[str, list[float]] = {BARE: [], BARE_KEEPING_MEMORY: [], PIPELINE: []}
        losses: dict[str, float] = {}
        for number in range(rounds):
            for name in speeds:
                if name == PIPELINE:
                    seconds, losses[name], phases = run_pipeline(config, Path(scratch), number)
                else:
                    seconds, losses[name] = run_bare(prepared.job, rows, threads, keep_memory=name == BARE_KEEPING_MEMORY)
                speeds[name].append(config.train.batch_rows * config.data.seq_len * len(seconds) / sum(seconds))
                print(f"  round {number + 1}, {name}: {speeds[name][-1]:,.0f} tokens/s, last loss {losses[name]:.4f}", flush=True)
    print(f"\n{workers} process(es) x {threads} thread(s), ZeRO {config.parallel.zero_stage}, {config.microbatch_rows} rows a microbatch")
    print(f"  {'':32}{'tokens/s':>10}  pipeline / it, by round")
    for name, values in speeds.items():
        ratios = [f"{a / b:.3f}" for a, b in zip(speeds[PIPELINE], values, strict=True)]
        print(f"  {name:32}{statistics.median(values):10,.0f}  {' '.join(ratios)}")
    for name in (BARE, BARE_KEEPING_MEMORY):
        ratio = statistics.median(a / b for a, b in zip(speeds[PIPELINE], speeds[name], strict=True))
        print(f"  ratio to the {name}: {ratio:.3f}")
    print("  start-up of the last pipeline run, from the command on:")
    for name, seconds_taken in phases:
        print(f"    {seconds_taken:6.1f} s  {name}")
    print(flush=True)


def bench_config(recipe: str, workers: int, steps: int, scratch: Path) -> RunConfig:
    """The recipe with nothing but training steps: no evaluation, checkpoint or export, and a learning rate that stays."""
    overrides = [
        f"parallel.workers={workers}",
        f"train.steps={steps}",
        "train.schedule=constant",
        "train.warmup_steps=0",
        "train.lr=1.0e-3",
        "train.precision=fp32",
        "eval.rows=0",
        "checkpoint.every_steps=0",
        "export.enabled=false",
        "log.tensorboard=false",
    ]
    config = with_builtin_corpus(load_run(recipe, overrides))
    return config.model_copy(update={"run": config.run.model_copy(update={"storage": str(scratch)})})


def first_rows(prepared: Prepared, num_rows: int) -> np.ndarray:
    """The first rows of the stream, as training will see them: int32 (num_rows, seq_len + 1)."""
    from llm.data.order import Cursor
    from llm.data.window import make_window

    found: list[np.ndarray] = []
    while sum(map(len, found)) < num_rows:
        epoch, window = prepared.recipe.plan.nth_window(Cursor(), len(found))
        found.append(make_window(prepared.recipe, epoch, window).rows.ids)
    return np.concatenate(found)[:num_rows]


def run_pipeline(config: RunConfig, scratch: Path, number: int) -> tuple[list[float], float, list[tuple[str, float]]]:
    """(seconds of each step, last loss, start-up phases) of one run of the product."""
    config = config.model_copy(update={"run": config.run.model_copy(update={"name": f"bench-{number}-{config.parallel.workers}"})})
    recipe = scratch / f"{config.run.name}.yaml"
    recipe.write_text(dump_run(config))
    command = [sys.executable, "-m", "jobs.pretrain", "--config", str(recipe)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the pipeline failed:\n{done.stderr[-3000:]}")
    rows = read_rows(scratch / config.run.name / "metrics.jsonl")
    steps = rows_of(rows, "step")
    ends = [row["elapsed_s"] for row in steps]
    phases = [(row["name"], row["phase_s"]) for row in rows_of(rows, "event", "phase")]
    phases.append(("(all of it: the first step is done)", ends[0]))
    return [b - a for a, b in zip(ends[WARM_STEPS:], ends[WARM_STEPS + 1 :], strict=False)], steps[-1]["loss"], phases


def run_bare(job: Job, rows: np.ndarray, threads: int, *, keep_memory: bool) -> tuple[list[float], float]:
    """(seconds of each step, last loss) of plain PyTorch in fresh processes."""
    context = multiprocessing.get_context("spawn")
    size = job.config.parallel.workers
    with tempfile.TemporaryDirectory() as folder:
        receiver, sender = context.Pipe(duplex=False)
        meet = f"file://{folder}/meet"
        processes = [context.Process(target=bare_rank, args=(rank, size, meet, job, rows, threads, sender)) for rank in range(size)]
        with environment(KEEP_FREED_MEMORY if keep_memory else {}):
            for process in processes:
                process.start()
        sender.close()
        try:
            answer = receiver.recv()
        finally:
            for process in processes:  # gloo's processes may wait for each other at the end for ever
                process.kill()
                process.join()
    return answer


@contextmanager
def environment(changes: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def bare_rank(rank: int, size: int, meet: str, job: Job, rows: np.ndarray, threads: int, sender: Any) -> None:
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F

    from llm.model.build import build_model
    from llm.train.optimizer import param_groups

    torch.set_num_threads(threads)
    config = job.config
    bare = build_model(job.model_config, seed=config.run.seed, attention=config.model.attention)
    optimizer = torch.optim.AdamW(param_groups(bare, config.train), lr=config.train.lr, betas=config.train.betas, eps=config.train.eps)
    model: Any = bare
    if size > 1:
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=size)
        model = torch.nn.parallel.DistributedDataParallel(bare)
    microbatches = config.rank_rows // config.microbatch_rows
    batches = torch.from_numpy(rows).long().view(config.train.steps, size, microbatches, config.microbatch_rows, -1)
    ends: list[float] = []
    for batch in batches:
        loss_of_step = 0.0
        for number, ids in enumerate(batch[rank]):
            if size > 1:
                model.require_backward_grad_sync = number == microbatches - 1
            logits = model(input_ids=ids[:, :-1]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()) / microbatches
            loss.backward()
            loss_of_step += loss.item()
        torch.nn.utils.clip_grad_norm_(bare.parameters(), config.train.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        ends.append(time.perf_counter())
    mean = torch.tensor(loss_of_step)
    if size > 1:
        dist.all_reduce(mean)
    if rank == 0:
        sender.send(([b - a for a, b in zip(ends[WARM_STEPS:], ends[WARM_STEPS + 1 :], strict=False)], float(mean) / size))


if __name__ == "__main__":
    main()
