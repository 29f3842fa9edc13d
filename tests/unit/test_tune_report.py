"""What is told is one table, one line to copy, JSON without infinities, and a page that stands alone."""

from __future__ import annotations

import json
import math

import pytest

from llm.train.tune.advice import advise
from llm.train.tune.collect import Measured
from llm.train.tune.events import ProbeTask
from llm.train.tune.memory_model import Search, legal_rows
from llm.train.tune.noise_scale import NoiseScale, StepNorms
from llm.train.tune.report import Findings, as_json, as_page, recommendation, summary_table
from llm.train.tune.speed import speed_of
from tests.distributed.layouts import make_config

GIB = 1 << 30


def findings(noise: NoiseScale | None, failed: dict[int, str], batch_rows: int = 480) -> Findings:
    speed = speed_of([{(rows, count): [0.3 + count * (0.1 + 0.1 * rows)] for rows in (1, 2, 4, 8, 12) for count in (1, 2)}])
    search = Search(legal_rows(240), {1: GIB, 2: 2 * GIB, 4: 4 * GIB, 8: 8 * GIB, 12: 12 * GIB}, failed, 3, 13 * GIB)
    config = make_config(parallel={"workers": 2}, train={"batch_rows": batch_rows})
    assert speed is not None
    found = advise(speed, fits_rows=12, batch_rows=batch_rows, data_size=2, row_tokens=16, noise=noise, tokens_a_row=16, keep_batch=False)
    norms = [StepNorms(1, 2.0, math.inf, 16, 160)]
    return Findings(config, "2 CPUs", Measured(search, speed, (ProbeTask((1, 2), (1, 2), None),)), found, noise, norms, 16.0)


@pytest.mark.parametrize("high", [3_000.0, math.inf])
def test_the_recommendation_can_be_copied_and_the_json_read(high):
    found = findings(NoiseScale(1_600.0, 1_200.0, high, 0.95, 40, 1.0, 1.0), {15: "no memory <here>"})
    told = json.loads(json.dumps(as_json(found), allow_nan=False))
    assert (told["largest_rows"], told["microbatch_rows"], told["largest_is_exact"]) == (12, 12, True)
    assert told["noise_scale"]["high_tokens"] == (None if math.isinf(high) else high)
    assert told["gradient_norms"][0]["big_square"] is None
    assert told["recommendation"]["set"] == found.settings
    sets = (
        ["train.microbatch_rows=12"]
        if math.isinf(high)
        else [f"train.batch_rows={told['recommendation']['rows']}", "train.microbatch_rows=12"]
    )
    assert found.settings == sets
    assert recommendation(found).startswith(" ".join(f"--set {setting}" for setting in sets))
    table = dict(summary_table(found))
    assert table["the next larger one"] == "15 rows ran out of memory"
    assert table["memory of a worker"] == "0.00 GiB + 1024.0 MiB a row"
    page = as_page(found)
    assert page.count("data:image/png;base64,") == 3 and "<here>" not in page


def test_without_noise_there_is_no_trade_off_to_show():
    found = findings(None, {})
    table = dict(summary_table(found))
    assert table["the next larger one"] == "15 rows: not tried, the line says 15.00 GiB"
    assert table["critical batch size"] == "not measured"
    assert as_page(found).count("data:image/png;base64,") == 2
    assert as_json(found)["largest_is_exact"] is False
