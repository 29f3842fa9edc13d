"""From a configuration to what a run needs: corpus plan, tokenizer, model config, evaluation rows. The driver's part, before Ray starts.

Everything that can be known to be wrong is found here, in seconds: missing files, an empty corpus, a tokenizer that is none, a model that
cannot be split. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llm.config import BUILTIN, RunConfig
from llm.data.builtin import prepare_builtin, prepare_builtin_tokenizer
from llm.data.order import MIN_SLICE_BYTES, SLICES_PER_CORPUS, CorpusPlan, Slice, hold_out, plan_corpus
from llm.data.pack import Rows, pack
from llm.data.sources import list_files, plan_slices
from llm.data.window import Recipe, WindowCounts, held_out_rows
from llm.errors import ConfigError, DataError
from llm.job import Job
from llm.model.checks import check_model
from llm.model.presets import model_config
from llm.storage import is_s3, join, local_path, read_bytes, write_bytes
from llm.tokenizer import load_tokenizer

# Held-out slices are chosen to hold this many bytes a token: enough for any language, little enough to leave the rest for training.
EVAL_BYTES_PER_TOKEN = 8


@dataclass(frozen=True)
class HeldOut:
    """What one source gives to evaluation."""

    slices: list[Slice]
    num_rows: int


@dataclass(frozen=True)
class Prepared:
    job: Job
    recipe: Recipe


def prepare(config: RunConfig, run_uri: str, started_at_s: float) -> Prepared:
    """Raises ConfigError with every problem of the model and its fit, TokenizerError, DataError or StorageError."""
    config = _with_absolute_model_path(with_builtin_corpus(config))
    tokenizer = load_tokenizer(config.tokenizer.path, config.tokenizer.eos, config.s3)
    model = model_config(config.model, tokenizer.vocab_size, lambda uri: read_bytes(uri, config.s3))
    problems = check_model(
        model,
        tensor=config.parallel.tensor,
        vocab_size=tokenizer.vocab_size,
        seq_len=config.data.seq_len,
        isolate=config.data.isolate_documents,
        attention=config.model.attention,
    )
    if problems:
        raise ConfigError("\n".join(message for _, message in problems))
    plan, held_out = plan_sources(config)
    recipe = Recipe(
        plan=plan,
        tokenizer=tokenizer,
        seq_len=config.data.seq_len,
        clean=config.data.clean,
        text_fields={source.name: source.text_field for source in config.data.sources},
        s3=config.s3,
    )
    rows = evaluation_rows(config, recipe, held_out)
    return Prepared(Job(config, run_uri, model, tokenizer, rows, started_at_s), recipe)


def plan_sources(config: RunConfig) -> tuple[CorpusPlan, list[HeldOut]]:
    """(the plan of the training slices, what is held out) of all sources. Evaluation mixes them as training does: by weight or bytes."""
    data = config.data
    files = {source.name: list_files(source, config.s3) for source in data.sources}
    sizes = {name: sum(file.size_bytes for file in found) for name, found in files.items()}
    total = sum(sizes.values())
    # Small corpora are cut finer, so that there is something to mix and to hold out.
    slice_bytes = min(data.slice_bytes, max(MIN_SLICE_BYTES, total // SLICES_PER_CORPUS))
    weights = {source.name: source.weight for source in data.sources}
    shares = {name: weights[name] or size for name, size in sizes.items()}
    training: dict[str, list[Slice]] = {}
    held_out: list[HeldOut] = []
    rows_left, shares_left = config.eval.rows, sum(shares.values())
    for name, found in files.items():
        rows = round(rows_left * shares[name] / shares_left)
        rows_left, shares_left = rows_left - rows, shares_left - shares[name]
        needed_bytes = rows * (data.seq_len + 1) * EVAL_BYTES_PER_TOKEN
        training[name], held = hold_out(plan_slices(found, slice_bytes), needed_bytes, config.run.seed, name)
        held_out.append(HeldOut(held, rows))
    return plan_corpus(training, weights, window_slices=data.window_slices, seed=config.run.seed), held_out


def evaluation_rows(config: RunConfig, recipe: Recipe, held_out: list[HeldOut]) -> Rows:
    counts = WindowCounts()
    parts = [held_out_rows(recipe, each.slices, each.num_rows, counts) for each in held_out if each.num_rows]
    if not parts:
        return pack([], config.data.seq_len, recipe.tokenizer.eos_id)
    rows = Rows(np.concatenate([part.ids for part in parts]), np.concatenate([part.segments for part in parts]))
    if not len(rows):
        names = ", ".join(source.uri for source in config.data.sources)
        if counts.bad:
            first = counts.bad[0]
            raise DataError(
                f"{len(counts.bad)} of the first {counts.records} records of {names} are unreadable, and no text is left. "
                f"The first: {first.uri}, at {first.position}: {first.reason}."
            )
        raise DataError(
            f"no text is left to hold out for evaluation in {names}: the corpus is empty after cleaning, or has a single record. "
            "Add text, lower data.clean.min_chars, or set eval.rows=0."
        )
    return rows


def with_builtin_corpus(config: RunConfig) -> RunConfig:
    """The configuration with 'builtin' resolved to files, which are made first where they are missing.

    They are kept in the run's storage, where all nodes of a cluster see them.
    """
    if not _uses_builtin(config):
        return config
    cache = join(config.run.storage, "cache")
    local = Path("runs/cache") if is_s3(cache) else Path(local_path(cache))
    corpus = prepare_builtin(local / "builtin")
    prepare_builtin_tokenizer(local / "builtin", local / "tokenizer")
    uri = corpus.uri
    if is_s3(cache):
        for path in sorted((local / "builtin").iterdir()):
            write_bytes(join(cache, "builtin", path.name), path.read_bytes(), config.s3)
        uri = join(cache, "builtin", "docs-*")
    sources = [s.model_copy(update={"uri": uri}) if s.uri == BUILTIN else s for s in config.data.sources]
    path = str(local / "tokenizer") if config.tokenizer.path == BUILTIN else config.tokenizer.path
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"sources": sources}),
            "tokenizer": config.tokenizer.model_copy(update={"path": path}),
        }
    )


def _with_absolute_model_path(config: RunConfig) -> RunConfig:
    """Workers load pretrained weights by this path, and Ray Train gives them a current directory of their own."""
    path = config.model.path
    if path is None or is_s3(path):
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"path": local_path(path)})})


def _uses_builtin(config: RunConfig) -> bool:
    return config.tokenizer.path == BUILTIN or any(source.uri == BUILTIN for source in config.data.sources)
