"""The sweep's search, run by Ray Tune: it begins trials, as many at once as fit, asks the scheduler about each evaluation and stops what it
says.

Tune's own restore is not used: it unpickles what it finds, and begins a cut trial's reports anew. Here a command that goes on gives Tune
the recorded trials first: those that have ended tell their evaluations again, so that the scheduler knows them, and train nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from llm.redact import SECRET_VARIABLE
from llm.search.study import Study
from llm.search.trial import run_trial
from llm.search.trials import FAILED, STOPPED, tokens_after
from llm.watched import watched

METRIC, TIME = "eval_loss", "tokens"
TRIAL_CPUS = 1  # of the process that waits for a trial's run
RESTARTS = 3  # of a trial whose own process was lost, with its node for example: it goes on from its last checkpoint


def search(study: Study, max_concurrent: int, folder: str, watch: Callable[[], None]) -> None:
    """Runs trials until the study has no more. `folder` is for Tune's own files, local and temporary; `watch` is called every half second
    meanwhile, and what it raises ends the search."""
    os.environ |= {
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the command, and with it all
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial may fail before its first evaluation
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_AUTO_CALLBACK_SYNCER": "1",
        "TUNE_MAX_PENDING_TRIALS_PG": str(max_concurrent),
        "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",  # nobody reads Tune's own record
    }
    import ray
    from ray import tune
    from ray.tune.execution import class_cache

    # Tune copies the driver's AWS keys into its actors' runtime environment, which the cluster shows and logs. Nodes have their own.
    class_cache.ENV_VARS_TO_PROPAGATE = {name for name in class_cache.ENV_VARS_TO_PROPAGATE if not SECRET_VARIABLE.search(name)}

    address = ray.get_runtime_context().gcs_address

    def train(config: dict[str, Any]) -> None:
        run_trial(config["run"], tune.report, address)

    tuner = tune.Tuner(
        tune.with_resources(train, {"CPU": TRIAL_CPUS}),
        tune_config=tune.TuneConfig(
            search_alg=suggestions(study),
            max_concurrent_trials=max_concurrent,
            scheduler=_scheduler(study),
            num_samples=-1,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=folder,
            verbose=0,
            callbacks=[told(study)],
            stop=budget(study),
            failure_config=tune.FailureConfig(max_failures=RESTARTS),
        ),
    )
    watched(tuner.fit, watch, "ray-tune")


def _scheduler(study: Study) -> Any:
    """Tune's own part: rungs and populations are the study's (llm/search/rungs.py, llm/search/population.py)."""
    from ray.tune.schedulers import FIFOScheduler, MedianStoppingRule

    section, base = study.sweep.file.scheduler, study.sweep.base
    if section.kind != "median":
        return FIFOScheduler()
    first = max(1, round(section.first_frac * tokens_after(base, base.train.steps)))
    return MedianStoppingRule(TIME, METRIC, "min", grace_period=first, min_samples_required=3)


def suggestions(study: Study) -> Any:
    """The study as Tune asks it. Made here, since Tune, whose classes it extends, is imported when a sweep begins and not before."""
    from ray.tune.search import Searcher

    class Suggestions(Searcher):
        def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # pyright: ignore[reportIncompatibleMethodOverride]
            run = study.next()
            if run is None:
                return None if study.waits else Searcher.FINISHED
            return {"run": run}

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None: ...

    return Suggestions(metric=METRIC, mode="min")


def told(study: Study) -> Any:
    """What tells the study of every evaluation and end."""
    from ray.tune import Callback

    class Told(Callback):
        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
            number = trial.config["run"].number
            study.learn(number, result)
            if "status" in result:
                study.end(number, result["status"], result["cause"])

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            if "status" not in (trial.last_result or {}):  # the scheduler stopped it
                study.end(trial.config["run"].number, STOPPED)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            why = str(trial.get_error() or "its process was lost").strip().splitlines()[-1]
            study.end(trial.config["run"].number, FAILED, f"the trial's own process failed: {why[:300]}")

    return Told()


def budget(study: Study) -> Any:
    """What ends the search where the budget is used up."""
    from ray.tune import Stopper

    class Budget(Stopper):
        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return study.budget_used()

    return Budget()
