"""The training of one worker, from the blocks it is given to the exported model. Knows torch.distributed and DeepSpeed, not Ray.

`steps` yields what each step did; recording, evaluation and checkpoints consume it. A process started by hand (torchrun, a test) runs the
very same code as a Ray worker.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist

from llm.checkpoint.layout import Layout
from llm.checkpoint.newest import newest_state
from llm.checkpoint.restore import restore_newest
from llm.checkpoint.save import CheckpointSaver
from llm.checkpoint.store import CheckpointStore
from llm.data.batches import Batch, BatchFetcher, DataGroups, Reader
from llm.data.ledger import advanced
from llm.errors import ConfigError
from llm.export.huggingface import export_and_check, probe_logits
from llm.job import Job
from llm.model.build import build_model, enable_activation_checkpointing
from llm.parallel.mesh import Mesh
from llm.parallel.zero import Engine, best_precision
from llm.state import COUNTED, History, TrainState
from llm.train.guard import judge_of, settled
from llm.train.optimizer import param_groups
from llm.train.recorder import Recorder, StepTimes
from llm.train.schedule import lr_factor
from llm.train.step import StepResult, evaluate, train_step


def train(job: Job, mesh: Mesh, reader: Reader | None, start: TrainState, phases: Mapping[str, float] | None = None) -> TrainState:
    """Trains from `start` (a fresh state, or the newest checkpoint's) to `train.steps`; returns the last state. All ranks must call it.

    `reader` is this data rank's access to the stream, None on tensor peers. `phases`: what the start-up so far took, in seconds, for the
    record. torch.distributed must be initialized.
    """
    config = job.config
    precision = best_precision(config.train.precision, config.parallel.zero_stage)
    device_name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    recorder = Recorder(job, on=mesh.rank == 0, device_name=device_name, precision=precision)
    fetcher: BatchFetcher | None = None
    try:
        for name, phase_s in (phases or {}).items():
            recorder.event("phase", name=name, phase_s=round(phase_s, 2))
        began_s = time.perf_counter()
        engine = build_engine(job, mesh)
        recorder.event("phase", name="building the model and the engine", phase_s=round(time.perf_counter() - began_s, 2))
        store = CheckpointStore(job.run_uri, config.s3)
        parallel = config.parallel
        layout = Layout(parallel.workers, parallel.tensor, parallel.zero_stage, precision, config.train.optimizer)
        if start.step:
            start = _restore(engine, start, layout, store, recorder)
        else:
            recorder.resume_at(0)
        # After the restoring: it may have gone back to an older checkpoint, and the stream begins where that one stands.
        fetcher = _fetcher(job, mesh, reader, start)
        recorder.event("start", total_steps=config.train.steps, precision=precision, device=device_name)
        with CheckpointSaver(engine, layout, store, keep=config.checkpoint.keep, keep_every=config.checkpoint.keep_every) as saver:
            return _train_and_save(job, engine, recorder, fetcher, saver, store, layout, start)
    finally:
        if fetcher is not None:
            fetcher.close()
        recorder.close()


def _fetcher(job: Job, mesh: Mesh, reader: Reader | None, start: TrainState) -> BatchFetcher:
    config = job.config
    return BatchFetcher(
        reader,
        mesh,
        DataGroups(mesh),
        start=start,
        schedule=job.schedule,
        num_batches=max(0, config.train.steps - start.step),
        rank_rows=config.rank_rows,
        seq_len=config.data.seq_len,
        isolate=config.data.isolate_documents,
        max_bad_frac=config.data.max_bad_frac,
    )


def _restore(engine: Engine, start: TrainState, layout: Layout, store: CheckpointStore, recorder: Recorder) -> TrainState:
    """The state of the newest checkpoint that is whole, at most `start`, put back into the engine."""
    began_s, told = time.perf_counter(), []
    state = restore_newest(engine, start.step, layout, store, lambda *damaged: told.append(damaged))
    recorder.resume_at(state.step)
    for damaged in told:
        _record_damage(recorder, *damaged)
    recorder.event("phase", name="restoring the checkpoint", phase_s=round(time.perf_counter() - began_s, 2))
    reason = "resumed from the newest checkpoint" if not told else "resumed from an older checkpoint: the newest was damaged"
    recorder.event("restart", step=state.step, reason=reason)
    return state


def _record_damage(recorder: Recorder, step: int, why: str, aside: str) -> None:
    recorder.event("damaged", step=step, reason=why, path=aside)


def build_engine(job: Job, mesh: Mesh) -> Engine:
    """The run's model on its layout, with the same weights on every layout: they follow from run.seed alone."""
    config = job.config
    model = build_model(
        job.model_config,
        seed=config.run.seed,
        attention=config.model.attention,
        pretrained=config.model.path if config.model.init == "pretrained" else None,
    )
    if config.train.activation_checkpointing:
        enable_activation_checkpointing(model)
    engine = Engine(
        model,
        mesh,
        config.parallel,
        config.train,
        param_groups=param_groups(model, config.train),
        precision=best_precision(config.train.precision, config.parallel.zero_stage),
        microbatch_rows=config.microbatch_rows,
        microbatches=config.microbatches_per_step,
    )
    if config.train.compile:
        if engine.device.type == "cpu":
            raise ConfigError("train.compile=true needs a GPU, and there is none here. Nearest legal value: false")
        engine.deepspeed.compile()
    return engine


def steps(
    job: Job,
    engine: Engine,
    batches: Iterable[Batch],
    state: TrainState,
    roll_back: Callable[[], int],
    before_update: Callable[[], None] = lambda: None,
) -> Iterator[tuple[TrainState, StepResult, StepTimes]]:
    """Each step's new state, its result and its times. The time of a step ends where the next begins to wait for data, so what the consumer
    does in between is not counted. `roll_back` puts an older checkpoint's weights back and returns its step, 0 where there is none;
    `before_update`: see `train_step`."""
    source = iter(batches)
    while True:
        began_s = time.perf_counter()
        batch = next(source, None)
        if batch is None:
            return
        got_s = time.perf_counter()
        if batch.cursor.began != state.cursor.began:
            state = replace(state, history=History(rollbacks=state.history.rollbacks))  # other data have other losses
        result = train_step(
            engine,
            batch,
            judge_of(job.config, state.history),
            microbatch_rows=job.config.microbatch_rows,
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
        yield state, result, StepTimes(time.perf_counter() - began_s, got_s - began_s)


def _train_and_save(
    job: Job,
    engine: Engine,
    recorder: Recorder,
    batches: Iterable[Batch],
    saver: CheckpointSaver,
    store: CheckpointStore,
    layout: Layout,
    start: TrainState,
) -> TrainState:
    config, state, saved_step = job.config, start, start.step
    if start.step == 0:
        _evaluate(job, engine, recorder, 0)
    evaluated_step = start.step

    def roll_back() -> int:
        saver.wait_published()
        newest = newest_state(store)
        return restore_newest(engine, newest.step, layout, store, partial(_record_damage, recorder)).step if newest.step else 0

    for after, result, times in steps(job, engine, batches, start, roll_back, saver.wait_snapshot):
        recorder.step(state, after, result, times, config.train.lr * lr_factor(config.train, state.step))
        if result.troubles:
            recorder.event("guard", step=after.step, action=result.outcome or "retried", cause=result.troubles[-1])
        state = after
        if _due(config.eval.every_steps, state.step):
            recorder.flush()
            _evaluate(job, engine, recorder, state.step)
            evaluated_step = state.step
        if _due(config.checkpoint.every_steps, state.step):
            recorder.flush()
            saver.save(state)
            saved_step = state.step
        _record_saves(recorder, saver)
    recorder.flush()
    if evaluated_step < state.step:
        _evaluate(job, engine, recorder, state.step)
    if saved_step < state.step:
        saver.save_now(state)
    saver.wait_published()
    _record_saves(recorder, saver)
    if config.export.enabled:
        _export(job, engine, recorder, store, state)
    recorder.event("data", **{name: state.counts.get(name, 0) for name in COUNTED})
    recorder.event("end", status="finished", step=state.step)
    return state


def _due(every_steps: int, step: int) -> bool:
    return bool(every_steps) and step % every_steps == 0


def _evaluate(job: Job, engine: Engine, recorder: Recorder, step: int) -> None:
    if not len(job.eval_rows):
        return
    loss, tokens = evaluate(
        engine,
        torch.tensor(job.eval_rows.ids),  # a copy: Ray gives arrays that must not be written
        torch.from_numpy(job.eval_rows.segments()),
        microbatch_rows=job.config.microbatch_rows,
        isolate=job.config.data.isolate_documents,
    )
    recorder.evaluation(step, loss, tokens)


def _record_saves(recorder: Recorder, saver: CheckpointSaver) -> None:
    for saved in saver.finished():
        recorder.event("checkpoint", step=saved.step, path=saved.uri, took_s=round(saved.took_s, 3), stall_s=round(saved.stall_s, 4))


def _export(job: Job, engine: Engine, recorder: Recorder, store: CheckpointStore, state: TrainState) -> None:
    """Rank 0 writes the export from the checkpoint and holds it against the engine; the others wait."""
    logits = probe_logits(engine, job)
    if engine.mesh.rank == 0:
        done = export_and_check(job, store, state.step, logits, engine.precision)
        recorder.event("export", path=done.uri, max_logit_difference=done.max_logit_difference)
        if done.sample is not None:
            recorder.event("sample", prompt=job.config.export.sample_prompt, text=done.sample)
    dist.barrier()
