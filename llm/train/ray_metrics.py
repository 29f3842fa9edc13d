"""The driver's hand to Ray's metrics: what `llm/observe/exported.py` reads, as gauges and counters that every node's metrics agent shows.

From the driver, and not from rank 0: the driver outlives every group of workers, so its counters do not begin again with each restart and
restarts can be counted at all; it alone sees that no row comes any more; and it costs the step nothing. A private cluster has no metrics
agent, and this module is not imported there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from ray.util.metrics import Counter, Gauge

from llm.metrics import Row
from llm.observe.exported import CAUSE_LABEL, EXPORTED, RUN_LABEL, LiveRun


class RayMetrics:
    """Shows one run's numbers on the connected cluster."""

    def __init__(self, run_name: str, live: LiveRun) -> None:
        self._live = live
        self._run = {RUN_LABEL: run_name}
        self._gauges = {e.name: Gauge(e.name, e.about, e.labels) for e in EXPORTED.values() if e.kind == "gauge"}
        self._counters = {e.name: Counter(e.name, e.about, e.labels) for e in EXPORTED.values() if e.kind == "counter"}

    def show(self, rows: Sequence[Row]) -> None:
        """Takes the rows that came since the last call; to be called also where none did, as time is shown too."""
        reading = self._live.read(rows, time.time())
        for name, value in reading.gauges.items():
            self._gauges[name].set(value, self._run)
        for (name, cause), added in reading.counts.items():
            self._counters[name].inc(added, {**self._run, CAUSE_LABEL: cause} if cause else self._run)
