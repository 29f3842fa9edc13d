"""A run's checkpoints while it trains: when one is saved, which one it goes back to, and what the record says of them."""

from __future__ import annotations

from types import TracebackType

from llm.checkpoint.layout import Layout
from llm.checkpoint.restore import restore_checkpoint, restore_newest, restore_sound
from llm.checkpoint.save import CheckpointSaver
from llm.checkpoint.start import start_store
from llm.checkpoint.store import CheckpointStore
from llm.checkpoint.together import bytes_of_first, together
from llm.job import Job
from llm.parallel.zero import Engine
from llm.state import TrainState
from llm.train.recorder import Recorder
from llm.train.watchdog import Unwatched, Watchdog


class Checkpoints:
    """All ranks must call every method, in the same order. As a context manager it ends as `CheckpointSaver` does."""

    def __init__(self, job: Job, engine: Engine, recorder: Recorder, watchdog: Watchdog | Unwatched) -> None:
        config = job.config
        self.store = CheckpointStore(job.run_uri, config.s3, job.fence)
        self._layout = Layout(
            engine.mesh.world_size, engine.mesh.tensor_size, config.parallel.zero_stage, engine.precision, config.train.optimizer
        )
        self._engine, self._recorder, self._watchdog = engine, recorder, watchdog
        self._config, self._section = config, config.checkpoint
        self.is_start = False  # whether what was restored is the checkpoint that the run starts from
        self._saver = CheckpointSaver(engine, self._layout, self.store, keep=self._section.keep, keep_every=self._section.keep_every)
        self._saved_step, self._due = 0, False

    def restore(self, at_most: int) -> TrainState:
        """The state of the newest checkpoint that is whole, of at most so many steps, put back into the engine; where the run has none,
        that of the one that it starts from."""
        if self._section.start_from is None or self._has_own():
            state = restore_newest(self._engine, at_most, self._layout, self.store, self._tell)
            self._saved_step = state.step
            return state
        self.is_start = True
        state = self._restore_start(at_most + 1)
        assert state is not None
        self._recorder.event("started", step=state.step, path=self._section.start_from)
        return state

    def roll_back(self, before: int) -> int:
        """Puts the newest sound weights of before that step back; the step that they are of, 0 where there are none."""
        with self._watchdog.phase("going back to a checkpoint"):
            self._saver.wait_published()
            state = restore_sound(self._engine, before, self._layout, self.store, self._tell) or self._restore_start(before)
        return state.step if state else 0

    def wait_snapshot(self) -> None:
        """Returns when the weights may change: a checkpoint may still be copying them."""
        with self._watchdog.phase("waiting for the copy of a checkpoint"):
            self._saver.wait_snapshot()

    def after_step(self, state: TrainState) -> None:
        """Begins to save the state where that is due; within a row of bad steps, after it: they are no place to go back to."""
        every = self._section.every_steps
        self._due = self._due or bool(every and state.step % every == 0)
        if self._due and state.history.sound:
            self._due = False
            self._recorder.flush()
            with self._watchdog.phase("save"):
                self._saver.save(state)
            self._saved_step = state.step
        self._record()

    def save_last(self, state: TrainState) -> None:
        """Returns when the state is published, sound or not: nothing of it is to be done again."""
        self._recorder.flush()
        if self._saved_step < state.step:
            self._saver.save_now(state)
        self._saver.wait_published()
        self._record()

    def _has_own(self) -> bool:
        """Whether rank 0 sees a checkpoint of this run."""
        steps = together(self.store.steps, "list the checkpoints")
        return bool(bytes_of_first(bytes(bool(steps))))

    def _restore_start(self, before: int) -> TrainState | None:
        """The state of the checkpoint that the run starts from, put back into the engine; None where it has none of before that step."""
        found = together(lambda: start_store(self._config), "look for the checkpoint to start from")
        if found is None or found[1] >= before:
            return None
        return restore_checkpoint(self._engine, found[1], self._layout, found[0])

    def _record(self) -> None:
        for saved in self._saver.finished():
            told = {"path": saved.uri, "took_s": round(saved.took_s, 3), "stall_s": round(saved.stall_s, 4)}
            self._recorder.event("checkpoint", step=saved.step, **told, **({"unpruned": saved.unpruned} if saved.unpruned else {}))

    def _tell(self, step: int, why: str, aside: str) -> None:
        self._recorder.event("damaged", step=step, reason=why, path=aside)

    def __enter__(self) -> Checkpoints:
        self._saver.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._saver.__exit__(kind, error, traceback)
