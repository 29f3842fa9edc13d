"""What the driver does before Ray starts: reads the tokenizer and the lists of files, checks that all fits, makes the evaluation rows.

Everything that can be refused is refused here, within seconds, and nothing heavy is imported.
"""

from __future__ import annotations

from dataclasses import dataclass

from llm.config import RunConfig
from llm.config_section import Section
from llm.data.corpus import PlannedStream, evaluation_rows, plan_stream, with_builtin_corpus
from llm.data.window import Recipe
from llm.errors import ConfigError
from llm.job import Job
from llm.model.checks import check_model
from llm.model.presets import model_config
from llm.storage import is_s3, local_path, read_bytes
from llm.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Prepared:
    job: Job
    recipe: Recipe
    stream: PlannedStream


def prepare(config: RunConfig, run_uri: str, started_at_s: float) -> Prepared:
    """Raises ConfigError with every problem of the model and its fit, TokenizerError, DataError or StorageError."""
    config = _with_absolute_paths(with_builtin_corpus(config))
    tokenizer = load_tokenizer(config.tokenizer.path, config.tokenizer.eos, config.s3)
    model = model_config(config.model, tokenizer.vocab_size, lambda uri: read_bytes(uri, config.s3))
    problems = check_model(
        model,
        tensor=config.parallel.tensor,
        vocab_size=tokenizer.vocab_size,
        seq_len=config.data.seq_len,
        isolate=config.data.isolate_documents,
        attention=config.model.attention,
        mup_base_width=config.model.mup_base_width,
    )
    if problems:
        raise ConfigError("\n".join(message for _, message in problems))
    stream = plan_stream(config, tokenizer)
    rows = evaluation_rows(config, stream.recipe)
    job = Job(config, run_uri, model, tokenizer, rows, stream.recipe.plan.schedule, started_at_s)
    return Prepared(job, stream.recipe, stream)


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    """Workers load pretrained weights and the checkpoint to start from by these paths, and Ray Train gives them a current directory of
    their own."""
    path, start = config.model.path, config.checkpoint.start_from
    update: dict[str, Section] = {}
    if path is not None and not is_s3(path):
        update["model"] = config.model.model_copy(update={"path": local_path(path)})
    if start is not None and not is_s3(start):
        update["checkpoint"] = config.checkpoint.model_copy(update={"start_from": local_path(start)})
    return config.model_copy(update=update)
