"""Keeps tokenizing a bounded number of windows ahead of training.

Ray Data's own bound is object-store memory. For token ids, which are small, that means minutes of tokenizing beside the training; and with
a small limit its executor polls without pause on outputs that it may not read (seen in 2.60: a whole core). This policy holds back new
windows instead, so that nothing waits half-read.
"""

from __future__ import annotations

import time
from typing import Any

from ray.data._internal.execution.backpressure_policy import BackpressurePolicy

RUN_AHEAD = "headrace.run_ahead"  # (windows, rows): whichever of the two is more may be tokenized and not yet taken
TOKENIZE = "tokenize"  # the name of the map function whose tasks are held back

# With nothing to do, the executor's loop would spin: it asks us once a turn, and a turn costs 5 ms of CPU time. We let it wait, longer
# each time while no task runs; the trainers are given blocks by another thread.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 0.5


class RunAhead(BackpressurePolicy):
    """No new window is begun while enough rows are tokenized and not yet taken by the trainers.

    Enough is so many windows, but also so many rows: where windows are small, the stages after this one need several before they can
    give out anything.
    """

    _pause_s = FIRST_PAUSE_S

    def can_add_input(self, op: Any) -> bool:
        if TOKENIZE not in op.name:
            return True
        windows, rows = self._data_context.get_config(RUN_AHEAD, (1, 1))
        made = op.metrics
        if made.num_tasks_finished == 0:
            return made.num_tasks_running < windows
        rows_per_window = max(1.0, made.rows_outputs_of_finished_tasks / made.num_tasks_finished)
        last = next(reversed(self._topology))
        waiting = made.rows_task_outputs_generated - last.metrics.row_outputs_taken
        if waiting + made.num_tasks_running * rows_per_window < max(windows * rows_per_window, rows):
            return True
        idle = all(other.num_active_tasks() == 0 for other in self._topology)
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S) if idle else FIRST_PAUSE_S
        time.sleep(self._pause_s)
        return False
