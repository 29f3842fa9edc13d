"""The order of the stream made twice, without Ray: by the product's functions from any cursor, and by a slow reference that makes every
list and counts from the beginning. Slices hold made-up rows, so a case takes milliseconds.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Literal

import numpy as np

from llm.config import CleanSection, RunConfig, S3Section
from llm.config_problems import checked
from llm.data.batches import RowsInTurn, in_order
from llm.data.order import CorpusPlan, Cursor, permuted, plan_corpus
from llm.data.pack import Rows, shuffle_order
from llm.data.slices import Slice, SourceFile, plan_slices
from llm.data.stream import Quarantine, _window_block, rank_major
from llm.data.window import Packed, Provenance, Recipe
from llm.tokenizer import Tokenizer

SEQ_LEN = 2
NOWHERE = Quarantine("/none", S3Section())


@dataclass(frozen=True)
class Case:
    """A corpus of made-up slices, and how a run goes through it."""

    num_slices: tuple[int, ...]
    held_out: tuple[int, ...]
    weights: tuple[float | None, ...]
    schedule: tuple[tuple[int, dict[str, float]], ...]
    window_slices: int
    seed: int
    batch_rows: int
    batch_schedule: tuple[tuple[int, int], ...]
    microbatch_rows: int | Literal["auto"]
    data_size: int
    resume_data_size: int
    group: int  # units
    step: int  # compared from here on, after a resume

    def plan(self) -> CorpusPlan:
        names = [f"s{i}" for i in range(len(self.num_slices))]
        files = [SourceFile(name, f"/{name}", f"/{name}", 100 * n, "1", "text") for name, n in zip(names, self.num_slices, strict=True)]
        sources = [plan_slices(file.source, [file], 100) for file in files]
        assert [len(source) for source in sources] == list(self.num_slices)
        return plan_corpus(
            sources,
            dict(zip(names, self.weights, strict=True)),
            held_out=dict(zip(names, self.held_out, strict=True)),
            window_slices=self.window_slices,
            seed=self.seed,
            schedule=self.schedule,
        )

    def config(self, data_size: int) -> RunConfig:
        """What the product derives its batches from; the rest of the case is in `plan`."""
        stages = [{"from_step": step, "rows": rows} for step, rows in self.batch_schedule]
        batches = {"batch_rows": self.batch_rows, "batch_schedule": stages, "microbatch_rows": self.microbatch_rows}
        config, problems = checked(
            {
                "run": {"name": "case"},
                "model": {"preset": "llama_1m"},
                "data": {"seq_len": SEQ_LEN, "sources": [{"name": "s0", "uri": "/none"}]},
                "parallel": {"workers": data_size},
                "train": {"steps": 1, "lr": 1.0, **batches},
            }
        )
        assert config is not None, problems
        return config

    def rows_of_step(self, step: int) -> int:
        """By looking through the whole schedule."""
        rows = self.batch_rows
        for begins, of_stage in self.batch_schedule:
            rows = of_stage if begins <= step else rows
        return rows


def random_case(rng: random.Random) -> Case:
    names = rng.randint(1, 4)
    num_slices = tuple(rng.randint(8, 40) for _ in range(names))
    weighted = rng.random() < 0.6
    schedule = []
    if weighted and rng.random() < 0.5:
        step = 0
        for _ in range(rng.randint(1, 3)):
            step += rng.randint(1, 12)
            stage = {f"s{i}": rng.choice([0.0, 0.1, 1.0, 3.0]) for i in range(names)}
            schedule.append((step, {**stage, "s0": 1.0}))
    data_size, resumed = rng.randint(1, 8), rng.randint(1, 8)
    microbatch = rng.randint(1, 3)
    unit, auto = int(np.lcm(data_size, resumed)) * microbatch, rng.random() < 0.3
    batch_schedule, step = [], 0
    if rng.random() < 0.5:
        for _ in range(rng.randint(1, 4)):
            step += rng.randint(1, 10)
            batch_schedule.append((step, unit * rng.randint(1, 4)))
    return Case(
        num_slices,
        tuple(rng.randint(0, n // 2) for n in num_slices),
        tuple(rng.choice([0.02, 0.3, 1.0, 5.0]) if weighted else None for _ in range(names)),
        tuple(schedule),
        rng.randint(1, 6),
        rng.randrange(1 << 40),
        unit * rng.randint(1, 2),
        tuple(batch_schedule),
        "auto" if auto else microbatch,
        data_size,
        resumed,
        rng.randint(1, 5),
        rng.randint(0, 30),
    )


def made_up_rows(piece: Slice) -> np.ndarray:
    """int32 (rows, SEQ_LEN + 1): each row names its source, its slice and its number, so no two rows of a corpus are equal."""
    source, number = int(piece.source[1:]), piece.start // 100
    num_rows = 1 + (number * 7 + source * 3) % 5
    return np.stack([np.array([source, number, row], dtype=np.int32) for row in range(num_rows)])


class MadeUpSlices:
    """Stands in for the token cache."""

    def slice(self, recipe: Recipe, piece: Slice) -> Packed:
        ids = made_up_rows(piece)
        pieces = np.array([[row, 0, row, 0, SEQ_LEN + 1] for row in range(len(ids))], dtype=np.int32)
        documents = Provenance((piece.files[0].uri,), np.zeros(len(ids), dtype=np.int32), np.arange(len(ids), dtype=np.int64))
        return Packed(Rows(ids, pieces), documents, Counter(records=len(ids), documents=len(ids)), ())


def recipe_of(plan: CorpusPlan) -> Recipe:
    return Recipe(plan, Tokenizer("none", 1 << 20, 0, "<eos>", {}), "tokenizers", SEQ_LEN, CleanSection(), {}, S3Section())


def product(case: Case, plan: CorpusPlan, cursor: Cursor, step: int, data_size: int) -> Iterator[tuple[np.ndarray, Cursor]]:
    """(the batch's rows as the data ranks get them, put in order; the cursor after it) of `step` and all later ones."""
    config = case.config(data_size)
    while True:
        began = plan.schedule.at_step(cursor, step)
        shards = [RowsInTurn(_blocks_of_rank(case, plan, began, config, rank)) for rank in range(data_size)]
        while True:
            taken = [_in_microbatches(shard.take(config.rank_rows_at(step)), config.microbatch_rows_at(step)) for shard in shards]
            batch = in_order(np.stack([rows["ids"] for rows in taken]), config.rank_unit_rows)
            epoch, window, offset = (int(x) for x in taken[-1]["position"][-1])
            cursor = Cursor(epoch, window, offset + 1, began.began)
            step += 1
            yield batch, cursor
            if plan.schedule.at_step(cursor, step) != cursor:
                break


def _blocks_of_rank(case: Case, plan: CorpusPlan, start: Cursor, config: RunConfig, rank: int) -> Iterator[dict[str, np.ndarray]]:
    """What Ray Data would make of the windows from `start` on, for one data rank."""
    recipe, group_rows, data_size = recipe_of(plan), case.group * config.train.unit_rows, config.parallel.data_size
    held = {"ids": np.zeros((0, SEQ_LEN + 1), dtype=np.int32), "position": np.zeros((0, 3), dtype=np.int64)}
    for number in count():
        for block in _window_block(recipe, start, number, NOWHERE, MadeUpSlices()):  # pyright: ignore[reportArgumentType]
            held = {name: np.concatenate([column, block[name]]) for name, column in held.items()}
        while len(held["ids"]) >= group_rows:
            dealt = rank_major(group_rows, case.group, data_size, {name: column[:group_rows] for name, column in held.items()})
            held = {name: column[group_rows:] for name, column in held.items()}
            block_rows = group_rows // data_size
            yield {name: column[rank * block_rows : (rank + 1) * block_rows] for name, column in dealt.items()}


def _in_microbatches(rows: Mapping[str, np.ndarray] | None, microbatch_rows: int) -> dict[str, np.ndarray]:
    """The rows as a rank's forward passes see them, one after the other: all of the same size, or they are not counted as they should."""
    assert rows is not None
    microbatches = [
        {name: column[first : first + microbatch_rows] for name, column in rows.items()}
        for first in range(0, len(rows["ids"]), microbatch_rows)
    ]
    assert {len(each["ids"]) for each in microbatches} == {microbatch_rows}
    return {name: np.concatenate([each[name] for each in microbatches]) for name in rows}


def reference(case: Case, plan: CorpusPlan, num_batches: int) -> list[np.ndarray]:
    """The first batches, from lists: every source a queue of shuffled passes, every block a shuffled list of whose turn it is."""
    queues = [_passes(case, plan, source) for source in range(len(case.num_slices))]
    rows: list[np.ndarray] = []
    edges = [0]  # rows before each step
    while len(edges) <= max(num_batches, *(stage.from_step for stage in plan.stages)):
        edges.append(edges[-1] + case.rows_of_step(len(edges) - 1))
    stage = 0
    per_block = plan.windows_per_block
    for block in count():
        # A stage begins in the first block of which no row was taken when its step begins.
        while stage + 1 < len(plan.stages) and edges[plan.stages[stage + 1].from_step] <= len(rows):
            stage += 1
        slots = plan.stages[stage].slots
        turns = [source for source, n in enumerate(slots) for _ in range(n)]
        taken = [[next(queues[source]) for _ in range(n)] for source, n in enumerate(slots)]
        flat = [piece for pieces in taken for piece in pieces]
        order = [permuted(slot, len(turns), (case.seed, "slots", block)) for slot in range(len(turns))]
        assert sorted(order) == list(range(len(turns)))
        for index in range(per_block):
            pieces = [flat[i] for i in order[len(turns) * index // per_block : len(turns) * (index + 1) // per_block]]
            window = np.concatenate([made_up_rows(piece) for piece in pieces])
            epoch, number = divmod(block * per_block + index, plan.windows_per_epoch)
            rows += list(window[shuffle_order(len(window), (case.seed, epoch, number))])
        if len(rows) >= edges[num_batches]:
            break
    return [np.stack(rows[first:stop]) for first, stop in pairwise(edges[: num_batches + 1])]


def _passes(case: Case, plan: CorpusPlan, source: int) -> Iterator[Slice]:
    name, total, held = f"s{source}", case.num_slices[source], case.held_out[source]
    mixed = [permuted(i, total, (case.seed, "hold out", name)) for i in range(total)]
    for number in count():
        order = [permuted(i, total - held, (case.seed, name, number)) for i in range(total - held)]
        assert sorted(order) == list(range(total - held))
        yield from (plan.sources[source][mixed[held + i]] for i in order)


def check(case: Case) -> int:
    """Compares `case.step` and the steps after it, the first with an undisturbed run, then after a resume; the batches compared."""
    plan = case.plan()
    num_batches = case.step + 6
    expected = reference(case, plan, num_batches)
    cursor, run = Cursor(), product(case, plan, Cursor(), 0, case.data_size)
    for step in range(case.step):
        batch, cursor = next(run)
        np.testing.assert_array_equal(batch, expected[step], err_msg=f"step {step} of {case}")
    resumed = product(case, plan, cursor, case.step, case.resume_data_size)
    for step in range(case.step, num_batches):
        batch, _ = next(resumed)
        np.testing.assert_array_equal(batch, expected[step], err_msg=f"step {step} after a resume at {case.step} of {case}")
    return num_batches
