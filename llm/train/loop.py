"""The training of one worker, from the blocks it is given to the exported model. Knows torch.distributed and DeepSpeed, not Ray.

`steps` yields what each step did; recording, evaluation and checkpoints consume it. A process started by hand (torchrun, a test) runs the
very same code as a Ray worker.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from llm.checkpoint.store import CheckpointStore
from llm.data.batches import Batch, BatchFetcher, DataGroups, Reader
from llm.data.ledger import advanced
from llm.errors import PlannedStop
from llm.export.huggingface import export_and_check, probe_logits
from llm.job import Job
from llm.parallel.mesh import Mesh
from llm.parallel.zero import Engine, best_precision
from llm.state import COUNTED, TrainState
from llm.train.build import build_engine
from llm.train.checkpoints import Checkpoints
from llm.train.guard import judge_of, settled
from llm.train.life import Incident, Wish
from llm.train.pace import ForwardClock, SlowRanks
from llm.train.recorder import Recorder, StepTimes
from llm.train.schedule import lr_factor
from llm.train.step import StepResult, evaluate, train_step
from llm.train.watchdog import Unwatched, Watchdog


def train(
    job: Job,
    mesh: Mesh,
    reader: Reader | None,
    start: TrainState,
    phases: Mapping[str, float] | None = None,
    *,
    nodes: Sequence[int] = (),
    incident: Incident | None = None,
    wish: Callable[[], int] = lambda: 0,
    watchdog: Watchdog | Unwatched | None = None,
) -> TrainState:
    """Trains from `start` (a fresh state, or the newest checkpoint's) to `train.last_step`; returns the last state. All ranks must
    call it.

    `reader` is this data rank's access to the stream, None on tensor peers. For the record: `phases`, what the start-up so far took, in
    seconds; `nodes`, the number of each rank's; `incident`, why the group before this one ended. Where `wish` is above 0 on any rank, all
    save and raise PlannedStop. `watchdog`: told where training is. torch.distributed must be initialized.
    """
    config, started, clock = job.config, dict(phases or {}), ForwardClock()
    watchdog = watchdog or Unwatched()
    precision = best_precision(config.train.precision, config.parallel.zero_stage)
    device_name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    recorder = Recorder(job, on=mesh.rank == 0, device_name=device_name, precision=precision)
    fetcher: BatchFetcher | None = None
    try:
        began_s = time.perf_counter()
        engine = build_engine(job, mesh)
        clock.attach(engine.deepspeed.module, engine.device)
        started["building the model and the engine"] = time.perf_counter() - began_s
        checkpoints = Checkpoints(job, engine, recorder, watchdog)
        if start.step:
            began_s = time.perf_counter()
            start = checkpoints.restore(start.step)
            started["reading the checkpoint"] = time.perf_counter() - began_s
        if incident is None:
            for name, phase_s in started.items():
                recorder.event("phase", name=name, phase_s=round(phase_s, 2))
        recorder.resume_at(start.step, incident, started, is_start=checkpoints.is_start)
        # After the restoring: it may have gone back to an older checkpoint, and the stream begins where that one stands.
        fetcher = fetch_batches(job, mesh, reader, start, config.train.last_step - start.step, stop=wish, pace=clock.take)
        about = {"total_steps": config.train.steps, "workers": mesh.world_size, "precision": precision, "device": device_name}
        recorder.event("start", **about, nodes=list(nodes))
        with checkpoints:
            return _train_and_save(job, engine, checkpoints, fetcher, recorder, start, watchdog)
    finally:
        if fetcher is not None:
            fetcher.close()
        recorder.close()


def fetch_batches(
    job: Job,
    mesh: Mesh,
    reader: Reader | None,
    start: TrainState,
    num_batches: int,
    stop: Callable[[], int] = lambda: 0,
    pace: Callable[[], int] = lambda: 0,
) -> BatchFetcher:
    """The run's batches from `start` on, being fetched already; to be closed. All ranks must call it."""
    config = job.config
    return BatchFetcher(
        reader,
        mesh,
        DataGroups(mesh),
        start=start,
        schedule=job.schedule,
        num_batches=max(0, num_batches),
        rank_rows_at=config.rank_rows_at,
        unit_rows=config.rank_unit_rows,
        seq_len=config.data.seq_len,
        isolate=config.data.isolate_documents,
        max_bad_frac=config.data.max_bad_frac,
        stop=stop,
        pace=pace,
    )


def steps(
    job: Job,
    engine: Engine,
    batches: Iterable[Batch],
    state: TrainState,
    roll_back: Callable[[int], int],
    before_update: Callable[[], None] = lambda: None,
    watchdog: Watchdog | Unwatched | None = None,
) -> Iterator[tuple[TrainState, StepResult, StepTimes]]:
    """Each step's new state, its result and its times. The time of a step ends where the next begins to wait for data, so what the consumer
    does in between is not counted. `roll_back`: see `settled`; `before_update`: see `train_step`."""
    source, watchdog = iter(batches), watchdog or Unwatched()
    while True:
        began_s = time.perf_counter()
        with watchdog.phase("waiting for data"):
            batch = next(source, None)
        if batch is None:
            return
        got_s = time.perf_counter()
        if batch.cursor.began != state.cursor.began:
            state = replace(state, history=state.history.of_other_data())
        watchdog.begin_step(state.step + 1, job.config.train.rows_at(state.step))
        # Dropout follows from the seed and the step, on every device and whatever went before; alike in a tensor group, which shares its
        # activations.
        torch.manual_seed(hash((job.config.run.seed, state.step, engine.mesh.data_rank)) % 2**63)
        result = train_step(
            engine,
            batch,
            judge_of(job.config, state.history),
            microbatch_rows=job.config.microbatch_rows_at(state.step),
            isolate=job.config.data.isolate_documents,
            lr_factor=lr_factor(job.config.train, state.step),
            before_update=before_update,
        )
        result, history = settled(job.config.guard, result, state, roll_back)
        state = TrainState(
            step=state.step + 1,
            tokens=state.tokens + batch.predicted_tokens,
            cursor=batch.cursor,
            ledger=advanced(state.ledger, batch.digests, result.outcome),
            counts=Counter(state.counts) + batch.counts,
            history=history,
        )
        watchdog.end_step()
        yield state, result, StepTimes(time.perf_counter() - began_s, got_s - began_s)


def _train_and_save(
    job: Job,
    engine: Engine,
    checkpoints: Checkpoints,
    batches: BatchFetcher,
    recorder: Recorder,
    start: TrainState,
    watchdog: Watchdog | Unwatched,
) -> TrainState:
    config, state, evaluated_step, slow = job.config, start, start.step, SlowRanks()
    if start.step == 0:
        with watchdog.phase("evaluation"):
            _evaluate(job, engine, recorder, 0)
    for after, result, times in steps(job, engine, batches, start, checkpoints.roll_back, checkpoints.wait_snapshot, watchdog):
        recorder.step(state, after, result, times, config.train.lr * lr_factor(config.train, state.step))
        if result.troubles:
            recorder.event("guard", step=after.step, action=result.outcome or "retried", cause=result.troubles[-1])
        for rank, slower in slow.look(batches.paces).items():
            recorder.event("slow_rank", rank=rank, times=round(slower, 1), step=after.step)
        state = after
        if config.eval.every_steps and state.step % config.eval.every_steps == 0:
            recorder.flush()
            with watchdog.phase("evaluation"):
                _evaluate(job, engine, recorder, state.step)
            evaluated_step = state.step
        checkpoints.after_step(state)
        if batches.stop_asked and state.step < config.train.last_step:
            with watchdog.phase("save before a planned stop"):
                checkpoints.save_last(state)
            raise PlannedStop(Wish(batches.stop_asked).told())
    with watchdog.phase("evaluation, save and export after the last step"):
        recorder.flush()
        if evaluated_step < state.step:
            _evaluate(job, engine, recorder, state.step)
        checkpoints.save_last(state)
        if config.export.enabled and state.step == config.train.steps:
            _export(job, engine, recorder, checkpoints.store, state)
    recorder.event("data", **{name: state.counts.get(name, 0) for name in COUNTED})
    recorder.event("end", status="finished" if state.step == config.train.steps else "paused", step=state.step)
    return state


def _evaluate(job: Job, engine: Engine, recorder: Recorder, step: int) -> None:
    if not len(job.eval_rows):
        return
    began_s = time.perf_counter()
    loss, tokens = evaluate(
        engine,
        torch.tensor(job.eval_rows.ids),  # a copy: Ray gives arrays that must not be written
        torch.from_numpy(job.eval_rows.segments()),
        microbatch_rows=job.config.microbatch_rows,
        isolate=job.config.data.isolate_documents,
    )
    recorder.evaluation(step, loss, tokens, time.perf_counter() - began_s)


def _export(job: Job, engine: Engine, recorder: Recorder, store: CheckpointStore, state: TrainState) -> None:
    """Rank 0 writes the export from the checkpoint and holds it against the engine; the others wait."""
    began_s = time.perf_counter()
    logits = probe_logits(engine, job)
    if engine.mesh.rank == 0:
        done = export_and_check(job, store, state.step, logits, engine.precision)
        recorder.event(
            "export", path=done.uri, max_logit_difference=done.max_logit_difference, took_s=round(time.perf_counter() - began_s, 3)
        )
        if done.sample is not None:
            recorder.event("sample", prompt=job.config.export.sample_prompt, text=done.sample)
    dist.barrier()
