"""The driver's view of a run: reads metrics.jsonl as it grows and passes the rows on to the terminal, TensorBoard and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm.config import LogSection, S3Section
from llm.metrics import MetricsTail, Row, file_reader
from llm.observe.progress import ProgressLine, print_summary
from llm.observe.report import write_report
from llm.observe.sinks import open_sinks
from llm.observe.summary import summarize
from llm.storage import exists, is_s3, join, local_path, read_bytes, write_bytes


class RunWatcher:
    """`folder` is the run's own where it is local; a run on S3 has a local mirror for what the driver writes, uploaded at the end."""

    def __init__(self, run_uri: str, s3: S3Section, log: LogSection, settings: Mapping[str, Any], progress: ProgressLine) -> None:
        name = str(settings["run"]["name"])
        self.run_uri = run_uri
        self.s3 = s3
        self.settings = settings
        self.progress = progress
        self.folder = Path("runs") / name if is_s3(run_uri) else Path(local_path(run_uri))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._dollars_per_worker_hour = log.dollars_per_worker_hour
        self._sinks = open_sinks(log, run_name=name, folder=self.folder, params=settings, warn=progress.note)
        self._tail = MetricsTail(self._read_from)
        self._rows: list[Row] = self._tail.poll()  # of earlier commands: for the report, not shown again

    @property
    def rows(self) -> Sequence[Row]:
        """All so far, those of earlier commands included."""
        return self._rows

    def poll(self) -> list[Row]:
        """Shows what came since the last call, and returns it."""
        rows = self._tail.poll()
        self._rows += rows
        self.progress.update(rows)
        self._sinks.write(rows)
        return rows

    def finish(self) -> None:
        """The closing table and the report; call it once, when the trainer is done."""
        self.poll()
        self.progress.close()
        self._sinks.close()
        report = write_report(self._rows, self.folder, title=self.settings["run"]["name"], config=self.settings)
        if is_s3(self.run_uri):
            for name in ("report.html", "loss.png"):
                if (self.folder / name).exists():
                    write_bytes(join(self.run_uri, name), (self.folder / name).read_bytes(), self.s3)
        outputs = {"metrics": join(self.run_uri, "metrics.jsonl"), "report": str(report)}
        print_summary(summarize(self._rows, outputs, self._dollars_per_worker_hour))

    def abandon(self) -> None:
        """Closes everything after a failure; the rows stay in metrics.jsonl."""
        self.poll()
        self.progress.close()
        self._sinks.close(failed=True)

    def _read_from(self, offset: int) -> bytes:
        uri = join(self.run_uri, "metrics.jsonl")
        if not is_s3(uri):
            return file_reader(local_path(uri))(offset)
        return read_bytes(uri, self.s3)[offset:] if exists(uri, self.s3) else b""
