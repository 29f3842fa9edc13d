"""What a run is: frozen sections, one YAML file a run. Nothing here does I/O; `load_run` in `llm/config_file.py` reads the file.

Lengths are in the unit that the name carries (`_rows` are sequences, `_steps` optimizer updates, `_bytes` bytes, `_frac` a fraction of 1).
Numbers that follow from others are properties, so they can never disagree with what they follow from.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from llm.config_section import Section
from llm.config_train import TrainSection

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"  # of runs, sweeps and jobs: a folder, and a part of a URL
BUILTIN = "builtin"  # the uri of the embedded corpus, and the path of the tokenizer trained on it

# With microbatch_rows=auto, where nothing was measured, a microbatch holds at most this many tokens: enough to fill a CPU's or a GPU's
# matrix units on the small presets, small enough for 8B parameters in 80 GiB with activation checkpointing.
AUTO_MICROBATCH_TOKENS = 8192


class RunSection(Section):
    name: str = Field(pattern=NAME)
    storage: str = Field(default="runs", min_length=1, description="a folder, or s3://bucket/prefix")
    seed: int = Field(default=0, ge=0, lt=2**63)
    if_finished: Literal["stop", "again"] = Field(
        default="stop", description="what the same command does after the run has ended: say so, or train anew as NAME-2, NAME-3, ..."
    )


class S3Section(Section):
    """Where s3:// is. Credentials never stand here: they come from the environment, a profile or the instance's role."""

    endpoint_url: str | None = Field(default=None, pattern=r"^https?://", description="None: AWS_ENDPOINT_URL or AWS itself")
    region: str | None = None
    connect_timeout_s: float = Field(default=10, gt=0)
    request_timeout_s: float = Field(default=60, gt=0)


class ModelSection(Section):
    preset: str | None = Field(default=None, description="a name from llm/model/presets.py")
    path: str | None = Field(default=None, description="a Hugging Face folder: config.json, with or without weights")
    config: dict[str, Any] = Field(default_factory=dict, description="keys of the model's own config to override")
    init: Literal["random", "pretrained"] = "random"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    mup_base_width: int | None = Field(
        default=None, ge=1, description="the hidden_size at which train.lr was found: wider models scale from there (llm/model/mup.py)"
    )


class TokenizerSection(Section):
    path: str = Field(default=BUILTIN, min_length=1, description="a tokenizer.json, a folder that holds one, or 'builtin'")
    eos: str | None = Field(default=None, description="the token that ends a document; None: as the tokenizer's own files say")


class SourceSection(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    uri: str = Field(min_length=1, description="a file, folder or glob, local or s3://; or 'builtin'")
    weight: float | None = Field(default=None, ge=1e-9, le=1e9, description="share of the stream; None for all sources: by their bytes")
    text_field: str = "text"


class CleanSection(Section):
    fix_unicode: bool = True
    strip_control: bool = True
    normalize_whitespace: bool = True
    lowercase: bool = False
    min_chars: int = Field(default=1, ge=0)


class CacheSection(Section):
    enabled: bool = Field(default=True, description="keep packed token ids, so that epochs, restarts and sweep trials read them again")
    uri: str | None = Field(default=None, min_length=1, description="a folder, or s3://bucket/prefix; None: cache/tokens in run.storage")
    max_gib: float = Field(default=20, gt=0, description="the files unused for the longest time go when it is larger")


class MixtureStage(Section):
    from_step: int = Field(ge=1, description="the first block of windows begun at this step has these weights")
    weights: dict[str, float] = Field(min_length=1, description="by source; a source that is not named has 0")


class DataSection(Section):
    seq_len: int = Field(ge=2, description="tokens a row that the model predicts; a row holds seq_len + 1 ids")
    sources: list[SourceSection] = Field(min_length=1)
    clean: CleanSection = CleanSection()
    isolate_documents: bool = Field(default=False, description="attention and loss stop at document boundaries; positions restart")
    schedule: list[MixtureStage] = Field(default=[], description="other weights from later steps on: a curriculum")
    slice_bytes: int = Field(default=1 << 20, ge=4096, description="text that one slice holds, about: what is read and packed at once")
    window_slices: int = Field(default=4, ge=1, description="slices whose rows are shuffled together")
    windows_ahead: int = Field(default=2, ge=1, description="windows tokenized at once, ahead of training")
    cache: CacheSection = CacheSection()
    max_bad_frac: float = Field(default=0.01, ge=0, le=1, description="unreadable records above which the run stops, as a fraction")


class ParallelSection(Section):
    workers: int = Field(default=1, ge=1)
    min_workers: int | None = Field(
        default=None, ge=1, description="elastic: where nodes are missing, as few workers as this; None: always `workers`"
    )
    tensor: int = Field(default=1, ge=1, description="workers that share one copy of the model's matrices")
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload: Literal["none", "optimizer", "all"] = Field(default="none", description="ZeRO offload to CPU memory; all: weights too")
    device: Literal["auto", "gpu", "cpu"] = Field(default="auto", description="auto: GPUs where the cluster has some or can start some")
    wait_nodes_s: float = Field(default=1800, ge=0, description="how long a run waits for room on its cluster before it begins")

    @property
    def data_size(self) -> int:
        return _exact_div(self.workers, self.tensor)


class GuardSection(Section):
    """What a step may show before it is tried again, then skipped. NaN and infinity never move the weights, whatever stands here."""

    loss_spike: float = Field(
        default=10,
        ge=0,
        description="times the usual change from step to step, above the recent mean, at which a loss is a spike; 0: never",
    )
    grad_spike: float = Field(default=20, ge=0, description="times the recent mean of the gradient's norm that are a spike; 0: none")
    max_skips: int = Field(default=3, ge=1, description="batches skipped in a row, before the weights go back to the last checkpoint's")
    max_rollbacks: int = Field(default=2, ge=0, description="times that they do, before the run stops")


class CheckpointSection(Section):
    every_steps: int = Field(default=0, ge=0, description="0: only after the last step")
    keep: int = Field(default=3, ge=1, description="the newest that stay; the last two good ones always do")
    keep_every: int = Field(default=0, ge=0, description="those at multiples of these steps stay too; 0: none")
    start_from: str | None = Field(
        default=None,
        min_length=1,
        description="another run's checkpoint, RUN/checkpoints/step-00000096: a run without one of its own goes on from it, in any layout",
    )


class RecoverySection(Section):
    """What a run does about failures. Each `max_` is the number of restarts for that cause in any 24 hours."""

    max_crashes: int = Field(default=20, ge=0, description="a worker process died, or lost its peers")
    max_out_of_memory: int = Field(default=3, ge=0, description="a worker was killed because its node had no memory left")
    max_node_losses: int = Field(default=100, ge=0, description="a node went away; a preemption that was announced costs nothing")
    max_hangs: int = Field(default=5, ge=0, description="the ranks stopped making steps")
    max_storage_errors: int = Field(default=5, ge=0, description="a checkpoint or row could not be written or read")
    max_without_progress: int = Field(default=3, ge=1, description="restarts in a row that bring no newer step, whatever the cause")
    first_wait_s: float = Field(default=1.0, ge=0, le=60, description="before a restart that follows one without progress; then doubled")
    hang_s: float = Field(default=10.0, ge=1, description="a step that takes longer, and 5 times the slowest of late, is a hang")
    long_phase_s: float = Field(default=1800.0, ge=1, description="the same for start-up, first step, evaluation, save, export, data wait")
    lease_s: float = Field(default=30.0, ge=3, description="a driver that gives no sign for so long may be replaced by another")


class EvalSection(Section):
    every_steps: int = Field(default=0, ge=0, description="0: before the first and after the last step only")
    rows: int = Field(default=64, ge=0, description="held-out sequences; 0: no evaluation, nothing held out")


class ExportSection(Section):
    enabled: bool = True
    sample_prompt: str = "The "
    sample_tokens: int = Field(default=64, ge=0, le=4096)


class LogSection(Section):
    every_steps: int = Field(default=1, ge=1, description="steps between two progress lines; metrics.jsonl has every step")
    tensorboard: bool = True
    mlflow_uri: str | None = None
    wandb_project: str | None = None
    dollars_per_worker_hour: float | None = Field(
        default=None, gt=0, description="what a worker's share of its node costs: the run then tells its dollars and $/Mtok"
    )


class RunConfig(Section):
    run: RunSection
    model: ModelSection
    tokenizer: TokenizerSection = TokenizerSection()
    data: DataSection
    parallel: ParallelSection = ParallelSection()
    train: TrainSection
    guard: GuardSection = GuardSection()
    checkpoint: CheckpointSection = CheckpointSection()
    recovery: RecoverySection = RecoverySection()
    eval: EvalSection = EvalSection()
    export: ExportSection = ExportSection()
    log: LogSection = LogSection()
    s3: S3Section = S3Section()

    @model_validator(mode="before")
    @classmethod
    def _steps_of_tokens(cls, raw: Any) -> Any:
        """Puts train.steps beside train.tokens where it is not given, so that everything that reads or prints the run finds it."""
        train = raw.get("train") if isinstance(raw, dict) else None
        if not isinstance(train, dict) or train.get("tokens") is None or train.get("steps") is not None:
            return raw
        try:
            section = TrainSection.model_validate({**train, "steps": 1})
            steps = section.steps_for(section.tokens or 1, DataSection.model_validate(raw.get("data")).seq_len)
        except ValidationError:  # which the caller will meet too, and tell
            steps = 1
        return {**raw, "train": {**train, "steps": steps}}

    def values(self) -> dict[str, Any]:
        """The values of all sections, of their declared types: a default written 10 is 10.0 where it is a number."""
        return RunConfig.model_validate(self.model_dump()).model_dump()

    @property
    def rank_unit_rows(self) -> int:
        """Sequences of every `train.unit_rows` that one data rank is dealt."""
        return _exact_div(self.train.unit_rows, self.parallel.data_size)

    def rank_rows_at(self, step: int) -> int:
        """Sequences that one data rank sees in the step that begins when `step` are done."""
        return _exact_div(self.train.rows_at(step), self.parallel.data_size)

    def microbatch_rows_at(self, step: int) -> int:
        """Sequences in one forward pass of that step; with `auto`, the most that divide its `rank_rows_at` and are not above
        `train.microbatch_rows_at_most`, which is decided once, when a run starts (llm/train/tune/auto.py); until then `unmeasured_rows`.

        Example: batch_rows=32, data_size=2, seq_len=2048 -> rank_rows=16, 8192 // 2048 = 4 rows, 4 microbatches a step.
        """
        return self._microbatch_rows(self.rank_rows_at(step))

    @property
    def rank_rows(self) -> int:
        """Sequences that one data rank sees in the run's largest batch."""
        return _exact_div(max(self.train.batch_sizes), self.parallel.data_size)

    @property
    def microbatch_rows(self) -> int:
        """Sequences in the run's largest forward pass of training, which is what evaluation takes too."""
        return max(self._microbatch_rows(_exact_div(rows, self.parallel.data_size)) for rows in self.train.batch_sizes)

    def _microbatch_rows(self, rank_rows: int) -> int:
        if self.train.microbatch_rows != "auto":
            return self.train.microbatch_rows
        at_most = self.train.microbatch_rows_at_most or self.unmeasured_rows
        return max(n for n in range(1, min(at_most, rank_rows) + 1) if rank_rows % n == 0)

    @property
    def unmeasured_rows(self) -> int:
        """The most rows of a microbatch, with `auto`, where nothing was measured."""
        return max(1, AUTO_MICROBATCH_TOKENS // self.data.seq_len)


def _exact_div(total: int, part: int) -> int:
    quotient, rest = divmod(total, part)
    assert rest == 0, f"{total} is not a multiple of {part}: cross_checks() was not asked"
    return quotient
