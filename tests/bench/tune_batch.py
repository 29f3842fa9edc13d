"""`python -m tests.bench.tune_batch`: the micro-batch that `tune_batch` finds, beside an exhaustive scan of all legal sizes.

Both under the same memory limit, in the same kind of fresh processes with the malloc settings of a training worker, without Ray. The scan
runs every size alone to see whether it fits, then times all that fit in turn within one group, several times over.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping
from dataclasses import replace

from llm.job import Job
from llm.train.tune.advice import advise
from llm.train.tune.collect import Found, listen, search_largest
from llm.train.tune.events import ProbeTask
from llm.train.tune.memory_model import legal_rows
from llm.train.tune.speed import speed_of

TIMEOUT_S = 600.0
NO_LIMIT = 1 << 40  # of the timing: sizes that fit alone need not fit after one another
VOCAB, SEQ_LEN = 8192, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--zero-stage", type=int, default=1)
    parser.add_argument("--rank-rows", type=int, default=24)
    parser.add_argument("--memory-gib", type=float, default=0.9)
    parser.add_argument("--rounds", type=int, default=2, help="timings of all sizes that fit")
    options = parser.parse_args()
    from llm.train.launch import KEEP_FREED_MEMORY

    os.environ |= KEEP_FREED_MEMORY  # before the processes that ranks are forked from begin
    job, limit = _job(options), int(options.memory_gib * 2**30)
    from tests.distributed.probes import LocalProbes

    began_s = time.perf_counter()
    probes = LocalProbes(job)
    measured = search_largest(job.config.rank_rows, limit, probes, print, TIMEOUT_S)
    took_s = time.perf_counter() - began_s
    usable = measured.usable_rows
    assert usable and measured.speed
    parallel = job.config.parallel
    advice = advise(
        measured.speed,
        fits_rows=usable,
        batch_rows=job.config.train.batch_rows,
        data_size=parallel.data_size,
        row_tokens=SEQ_LEN,
        noise=None,
        tokens_a_row=SEQ_LEN,
        keep_batch=True,
    )
    found = advice.now.microbatch_rows
    print(f"tune_batch: recommends {found} rows, at most {usable}; {len(probes.tasks)} probes, {took_s:.0f} s")
    print(f"  peaks {_mib(measured.search.peaks)}, failed {measured.search.failed}")
    rates = _scan(job, limit, options.rounds)
    best, legal = max(rates, key=rates.__getitem__), list(rates)
    print(f"scan: largest that fits {legal[-1]}; tokens/s {{{', '.join(f'{rows}: {rate:,.0f}' for rows, rate in rates.items())}}}")
    print(f"the most that it would use is that or the next smaller: {usable in legal[-2:]}")
    print(f"the recommended size's tokens/s are {rates[found] / rates[best]:.3f} of the best's")


def _scan(job: Job, limit: int, rounds: int) -> dict[int, float]:
    """Tokens/s of every size that fits."""
    fitting = [rows for rows in legal_rows(job.config.rank_rows) if rows in _run(job, ProbeTask((rows,), (), limit)).peaks]
    print(f"scan: {fitting} fit")
    samples: dict[tuple[int, int], tuple[float, ...]] = {}
    for _ in range(rounds):
        for key, times in _run(job, ProbeTask((fitting[-1],), tuple(fitting), NO_LIMIT)).samples.items():
            samples[key] = samples.get(key, ()) + times
    speed = speed_of([samples])
    assert speed is not None
    return speed.for_rank_rows(job.config.rank_rows, SEQ_LEN, job.config.parallel.data_size)


def _run(job: Job, task: ProbeTask) -> Found:
    from tests.distributed.probes import LocalProbes

    with LocalProbes(job)(task) as ranks:
        return listen(ranks, task, TIMEOUT_S)


def _job(options: argparse.Namespace) -> Job:
    from tests.distributed.layouts import llama, make_config, make_job

    config = make_config(
        data={"seq_len": SEQ_LEN},
        parallel={"workers": options.workers, "tensor": options.tensor, "zero_stage": options.zero_stage},
        train={"batch_rows": options.rank_rows * options.workers // options.tensor, "microbatch_rows": 1},
    )
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "max_position_embeddings": SEQ_LEN}
    job = make_job(config, llama(vocab_size=VOCAB, **sizes))
    return replace(job, tokenizer=replace(job.tokenizer, vocab_size=VOCAB))


def _mib(peaks: Mapping[int, int]) -> dict[int, int]:
    return {rows: round(peak / 2**20) for rows, peak in sorted(peaks.items())}


if __name__ == "__main__":
    main()
