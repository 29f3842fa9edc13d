"""kill -9 of a rank at random moments, saves and restores included: the run that is started again each time ends bit by bit as the
undisturbed one: weights, moments, random state and ledger.

Processes under gloo, without Ray: a life of two seconds instead of thirty. When a rank dies the others are ended too, some of them a moment
later, as it happens under Ray.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from llm.config import RunConfig
from tests.distributed.checkpoint_runs import Layout, layout_config, open_store, train_run
from tests.distributed.layouts import CONTEXT, TIMEOUT_S, _rank_main, llama, run_ranks
from tests.ports import free_port

# Dropout draws from the random state in every step, so a state that was not put back shows in the weights.
MODEL = llama(vocab_size=97, attention_dropout=0.1)
STEPS, SAVE_EVERY = 40, 2
KILLED_LAYOUTS: list[Layout] = [(0, 1, 2), (1, 1, 2), (2, 1, 2), (3, 1, 2), (1, 2, 1), (3, 2, 1)]


@dataclass
class Told:
    """Where the kills struck."""

    kills: int = 0
    moments: Counter[str] = field(default_factory=Counter)
    resumed_at: list[int] = field(default_factory=list)


def _rank(rank: int, world_size: int, config: RunConfig, run_uri: str, built: str) -> str:
    return train_run(rank, world_size, config, run_uri, MODEL, partial(Path(f"{built}.{rank}").touch))


def live(config: RunConfig, run_uri: str, rng: random.Random, told: Told, kills_left: int) -> list[str] | None:
    """One life of the run, which is killed at a random moment, unless it ends before that: then what every rank returned."""
    world_size = config.parallel.workers
    with tempfile.TemporaryDirectory() as scratch:
        built, port = Path(scratch) / "built", free_port()
        answers = [CONTEXT.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            CONTEXT.Process(target=_rank_main, args=(answers[r][1], _rank, r, world_size, port, scratch, (config, run_uri, str(built))))
            for r in range(world_size)
        ]
        for process in processes:
            process.start()
        for _, sender in answers:
            sender.close()
        try:
            victim = processes[rng.randrange(world_size)]
            if kills_left and _reaches_the_moment(rng, Path(f"{built}.{processes.index(victim)}"), [r for r, _ in answers]):
                told.moments[_moment(Path(run_uri))] += 1
                told.kills += 1
                victim.kill()
                time.sleep(rng.choice((0.0, 0.0, 0.05, 0.3)))  # the others go on as far as they come
                return None
            results = []
            for receiver, _ in answers:
                assert receiver.poll(TIMEOUT_S), "a rank gives no answer"
                kind, value = receiver.recv()
                assert kind == "value", value
                results.append(value)
            return results
        finally:
            for process in processes:
                process.kill()
                process.join()


def _reaches_the_moment(rng: random.Random, built: Path, receivers: list) -> bool:
    """Waits until the moment of the kill, a random time after the engine is built; whether the run still lives then."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while not built.exists():
        assert time.monotonic() < deadline_s, "the engine is not built"
        if any(receiver.poll() for receiver in receivers):
            return False
        time.sleep(0.005)
    moment_s = time.monotonic() + rng.choice((rng.uniform(0, 0.1), rng.uniform(0, 1.0), rng.uniform(0, 3.0)))
    while time.monotonic() < moment_s:
        if any(receiver.poll() for receiver in receivers):
            return False
        time.sleep(0.005)
    return True


def _moment(run: Path) -> str:
    """What the run's folder says of the moment: is a checkpoint being written?"""
    folders = list((run / "checkpoints").glob("step-*")) if (run / "checkpoints").exists() else []
    if any(".removed-" in folder.name for folder in folders):
        return "while an old checkpoint is removed"
    if any(".tmp-" in folder.name for folder in folders):
        return "while a checkpoint is written"
    return "between saves" if folders else "before the first checkpoint"


def kill_until_finished(folder: Path, layout: Layout, kills: int, seed: int) -> Told:
    """Runs the layout undisturbed, and again with `kills` kills; raises AssertionError where the ends differ."""
    rng, told = random.Random(seed), Told()
    config = layout_config(layout, STEPS, {"every_steps": SAVE_EVERY, "keep": 2})
    expected = run_ranks(_rank, config.parallel.workers, config, str(folder / "whole"), str(folder / "built-whole"))
    number = 0
    while told.kills < kills:  # a run that finishes before all kills were dealt is followed by another
        run, number = folder / f"killed-{number}", number + 1
        ended = None
        while ended is None:
            told.resumed_at.append(max(open_store(str(run)).steps(), default=0))
            ended = live(config, str(run), rng, told, kills - told.kills)
        assert ended == expected, f"layout {layout}, seed {seed}: the run killed {told.kills} times ended otherwise"
    return told


def test_a_few_kills_change_nothing(tmp_path):
    told = kill_until_finished(tmp_path, (1, 2, 1), kills=3, seed=5)
    assert told.kills == 3


@pytest.mark.faults
@pytest.mark.timeout(7200)
def test_200_kills_change_nothing(tmp_path):
    told = []
    for number, layout in enumerate(KILLED_LAYOUTS):
        kills = 200 // len(KILLED_LAYOUTS) + (number < 200 % len(KILLED_LAYOUTS))
        began_s = time.monotonic()
        told.append(kill_until_finished(tmp_path / str(number), layout, kills, seed=number))
        print(f"{layout}: {told[-1].kills} kills in {time.monotonic() - began_s:.0f} s, {dict(told[-1].moments)}", flush=True)
    moments = sum((each.moments for each in told), Counter())
    assert sum(each.kills for each in told) == 200
    assert moments["while a checkpoint is written"] >= 20
