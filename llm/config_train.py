"""How long a run trains, in which batches and with which optimizer: the section `train` of a run (llm/config.py)."""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise
from math import gcd
from typing import Literal

from pydantic import Field

from llm.config_section import Section


class BatchStage(Section):
    from_step: int = Field(ge=1, description="steps done when the first of these batches begins, as in data.schedule")
    rows: int = Field(ge=1, description="sequences a step from then on, over all data ranks")


class TrainSection(Section):
    steps: int = Field(ge=1, description="optimizer updates; or give train.tokens, which they follow from")
    tokens: int | None = Field(
        default=None, ge=1, description="in place of steps: as few steps as see at least these, rows x data.seq_len; padding counts"
    )
    until_step: int | None = Field(
        default=None, ge=1, description="ends the command there, saved; the schedule stays that of all steps. A later one goes on"
    )
    batch_rows: int = Field(ge=1, description="sequences a step, over all data ranks; with batch_schedule: until its first stage")
    batch_schedule: list[BatchStage] = Field(default=[], description="other batch sizes from later steps on; the order stays as it is")
    microbatch_rows: int | Literal["auto"] = Field(default="auto", description="sequences a forward pass on one data rank")
    microbatch_rows_at_most: int | None = Field(
        default=None,
        ge=1,
        description="with auto; None: what `tune_batch` measured for this model, layout and hardware, else 8192 tokens. A run records it",
    )
    optimizer: Literal["adamw", "sgd", "muon"] = "adamw"
    lr: float = Field(gt=0)
    lr_batch_rule: Literal["none", "sqrt", "linear"] = Field(
        default="none",
        description="how the learning rate follows a batch of other than lr_batch_rows: by the root of their ratio, by the ratio",
    )
    lr_batch_rows: int | None = Field(default=None, ge=1, description="sequences a step at which `lr` holds; needed by lr_batch_rule")
    min_lr_frac: float = Field(default=0.1, ge=0, le=1, description="the last step's learning rate, as a fraction of lr")
    schedule: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    warmup_steps: int = Field(default=0, ge=0)
    warmup_frac: float = Field(default=0, ge=0, lt=1, description="in place of warmup_steps: as a fraction of the steps")
    decay_frac: float = Field(default=0.2, gt=0, le=1, description="wsd: the fraction of the steps in which the rate decays")
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1, description="sgd and muon only")
    weight_decay: float = Field(default=0.1, ge=0, description="on matrices; never on norms, biases")
    grad_clip: float = Field(default=1.0, ge=0, description="largest gradient norm; 0: no clipping")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    activation_checkpointing: bool = False
    compile: bool = Field(default=False, description="torch.compile; needs a GPU")

    @property
    def last_step(self) -> int:
        """The step after which the command ends: the run's last, or an earlier one that `until_step` names."""
        return min(self.until_step or self.steps, self.steps)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Sequences a step: of the first steps, then of each stage of the schedule."""
        return self.batch_rows, *(stage.rows for stage in self.batch_schedule)

    @property
    def unit_rows(self) -> int:
        """Sequences that are dealt to the data ranks at once: as many as divide every batch."""
        return gcd(*self.batch_sizes)

    @property
    def num_warmup_steps(self) -> int:
        return self.warmup_steps or int(self.warmup_frac * self.steps)

    def rows_at(self, step: int) -> int:
        """Sequences of the step that begins when `step` are done, 0 for the first."""
        return self.batch_sizes[bisect_right([stage.from_step for stage in self.batch_schedule], step)]

    def rows_before(self, step: int) -> int:
        """Sequences of all steps before it: where in the global order it begins.

        Example: batch_rows=8, batch_schedule=[{from_step: 50, rows: 16}]: step 60 begins with sequence 50 * 8 + 10 * 16 = 560.
        """
        edges = [0, *(min(stage.from_step, step) for stage in self.batch_schedule), step]
        return sum((stop - start) * rows for (start, stop), rows in zip(pairwise(edges), self.batch_sizes, strict=True))

    def steps_for(self, tokens: int, seq_len: int) -> int:
        """The fewest steps whose sequences hold at least so many tokens, seq_len each.

        Example: batch_rows=8, batch_schedule=[{from_step: 50, rows: 16}], seq_len=100: 48,001 tokens are 481 rows, 50 * 8 = 400 of which
        make 50 steps and 81 more 6 of 16: 56 steps.
        """
        rows = -(-tokens // seq_len)
        edges = [0, *(stage.from_step for stage in self.batch_schedule)]
        stage = max(i for i, edge in enumerate(edges) if i == 0 or self.rows_before(edge) < rows)
        return edges[stage] + -(-(rows - self.rows_before(edges[stage])) // self.batch_sizes[stage])
