"""Under a memory limit the search finds the largest micro-batch that really fits, and a process that is killed is one more answer."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from typing import Any

import pytest

from llm.job import Job
from llm.train.tune.collect import listen, search_largest
from llm.train.tune.events import ProbeTask, Trying
from llm.train.tune.memory_model import MAX_PROBES
from tests.distributed.layouts import llama, make_config, make_job, run_ranks
from tests.distributed.probes import LocalProbes, probe_main

VOCAB, SEQ_LEN, TIMEOUT_S = 8192, 256, 300.0
LIMIT = 740 << 20  # of which 400 MiB are libraries; alone, 8 rows take 650 to 700 MiB, 12 take 780 to 830


def job_on(workers: int, tensor: int, zero_stage: int, rank_rows: int) -> Job:
    config = make_config(
        data={"seq_len": SEQ_LEN},
        parallel={"workers": workers, "tensor": tensor, "zero_stage": zero_stage},
        train={"batch_rows": rank_rows * workers // tensor, "microbatch_rows": 1},
    )
    job = make_job(config, llama(vocab_size=VOCAB, hidden_size=128, intermediate_size=256))
    return replace(job, tokenizer=replace(job.tokenizer, vocab_size=VOCAB))


def timed_briefly(*args: Any) -> None:
    from llm.train.tune import probe

    probe.TIMING_S, probe.MIN_ROUNDS, probe.MOST_TIMED = 1.0, 1, 2
    probe_main(*args)


@pytest.mark.faults
@pytest.mark.parametrize(("workers", "tensor", "zero_stage"), [(2, 2, 1), (2, 1, 3)], ids=["tp2", "zero3_dp2"])
def test_the_largest_that_fits_is_found_in_five_probes(workers, tensor, zero_stage):
    """Or the next smaller legal size."""
    job = job_on(workers, tensor, zero_stage, 24)
    probes = LocalProbes(job, timed_briefly)
    measured = search_largest(24, LIMIT, probes, lambda told: None, TIMEOUT_S)
    search = measured.search
    assert search.largest is not None and 1 < search.largest < 24
    assert len(probes.tasks) == search.probes <= MAX_PROBES
    assert measured.speed is not None and measured.usable_rows in measured.speed.microbatch_s
    # By themselves in fresh processes: what was found fits; a size above the next larger one does not.
    place = search.legal.index(search.largest)
    assert search.largest in run(probes, search.largest).peaks
    above = search.legal[place + 2]
    assert "allocate" in run(probes, above).failed[above]


def run(probes: LocalProbes, rows: int) -> Any:
    task = ProbeTask((rows,), (), LIMIT)
    with probes(task) as ranks:
        return listen(ranks, task, TIMEOUT_S)


def killed_at_4_rows(sender: Any, *args: Any) -> None:
    class Deadly:
        def send(self, event: Any) -> None:
            sender.send(event)
            if isinstance(event, Trying) and event.rows >= 4 and args[1].rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        def close(self) -> None:
            sender.close()

    probe_main(Deadly(), *args)


def test_a_killed_process_is_survived_and_bounds_the_search():
    """As the kernel kills one for want of memory: without a word, while its peer waits for it."""
    probes = LocalProbes(job_on(2, 1, 1, 8), killed_at_4_rows)
    measured = search_largest(8, 4 << 30, probes, lambda told: None, TIMEOUT_S)
    assert (measured.search.largest, min(measured.search.failed)) == (2, 4)
    assert "exit code -9" in measured.search.failed[4]
    assert measured.speed is not None and 2 in measured.speed.microbatch_s


def losses_rank(rank: int, world_size: int, config: Any, cuts: list[int]) -> list[tuple[float, float]]:
    """Loss and gradient norm of steps whose batches are cut into so many rows, by one engine."""
    import torch

    from llm.data.batches import count_predicted
    from llm.parallel.mesh import Mesh
    from llm.train.build import build_engine
    from llm.train.guard import Judge
    from llm.train.step import train_step
    from llm.train.tune.probe import _made_up

    mesh = Mesh(rank, world_size, 1)
    job = make_job(config, llama())
    engine = build_engine(job, mesh)
    batch = _made_up(job, mesh, config.rank_rows)
    assert batch.predicted_tokens == count_predicted(torch.ones_like(batch.ids), False) * world_size
    found = []
    for rows in cuts:
        result = train_step(engine, batch, Judge(lambda loss: None, lambda norm: None), microbatch_rows=rows, isolate=False, lr_factor=1.0)
        found.append((result.loss, result.grad_norm))
    return found


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_an_engine_whose_accumulation_changes_trains_as_one_that_was_made_so(zero_stage):
    config = make_config(parallel={"workers": 2, "zero_stage": zero_stage}, train={"microbatch_rows": 1})
    same = run_ranks(losses_rank, 2, config, [1, 1, 1])[0]
    changed = run_ranks(losses_rank, 2, config, [4, 2, 1])[0]
    for (loss, norm), (other_loss, other_norm) in zip(same, changed, strict=True):
        assert other_loss == pytest.approx(loss, abs=1e-5)
        assert other_norm == pytest.approx(norm, rel=1e-4)
    assert same[0][0] > same[2][0] + 1e-3  # the weights moved


def test_of_an_error_that_a_failed_allocation_caused_the_allocation_is_told():
    from llm.train.tune.probe import failed_allocation

    error = RuntimeError("a llama model refuses its config:")
    assert failed_allocation(error) is None
    error.__cause__ = MemoryError("Cannot allocate memory")
    assert failed_allocation(error) is error.__cause__
    own = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    assert failed_allocation(own) is own
