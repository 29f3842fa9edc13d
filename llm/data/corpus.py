"""The corpus of a run: its sources listed and cut, what is held out, how it is mixed. From here on the order of the stream is fixed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llm.config import BUILTIN, RunConfig
from llm.data.builtin import prepare_builtin, prepare_builtin_tokenizer
from llm.data.encode import fastest
from llm.data.identity import Corpus
from llm.data.order import hold_out, plan_corpus
from llm.data.pack import Rows, joined, no_rows
from llm.data.records import BadRecord, read_slice
from llm.data.slices import plan_slices, slice_bytes_for
from llm.data.sources import list_files
from llm.data.window import Packed, Recipe, held_out_rows, sample_texts
from llm.errors import DataError
from llm.storage import is_s3, join, local_path, write_bytes
from llm.tokenizer import Tokenizer

# Held-out slices are chosen to hold this many bytes a token: enough for any language, little enough to leave the rest for training.
EVAL_BYTES_PER_TOKEN = 8
LOOKED_AT_SLICES = 8  # of each source, to find out why it has no text
SAMPLE_CHARS = 100_000  # of the corpus, on which a fast tokenizer must give the right ids; 30 ms


@dataclass(frozen=True)
class PlannedStream:
    recipe: Recipe
    files: Corpus


def plan_stream(config: RunConfig, tokenizer: Tokenizer) -> PlannedStream:
    """Lists every source and plans the order of its slices. `config` names no builtin corpus any more."""
    data = config.data
    files = {source.name: list_files(source, config.s3) for source in data.sources}
    text_bytes = {name: sum(file.text_bytes for file in found) for name, found in files.items()}
    slice_bytes = slice_bytes_for(data.slice_bytes, data.seq_len, sum(text_bytes.values()))
    sources = [plan_slices(name, found, slice_bytes) for name, found in files.items()]
    weights = {source.name: source.weight for source in data.sources}
    rows = evaluation_shares(config, text_bytes)
    held_out = {s.name: hold_out(s, rows[s.name] * (data.seq_len + 1) * EVAL_BYTES_PER_TOKEN) for s in sources}
    schedule = [(stage.from_step, stage.weights) for stage in data.schedule]
    plan = plan_corpus(sources, weights, held_out=held_out, window_slices=data.window_slices, seed=config.run.seed, schedule=schedule)
    text_fields = {source.name: source.text_field for source in data.sources}
    sample = sample_texts(data.clean, (source[0] for source in sources), text_fields, config.s3, SAMPLE_CHARS)
    recipe = Recipe(plan, tokenizer, fastest(tokenizer, sample), data.seq_len, data.clean, text_fields, config.s3)
    return PlannedStream(recipe, Corpus.of(files))


def evaluation_shares(config: RunConfig, text_bytes: dict[str, int]) -> dict[str, int]:
    """Evaluation rows of each source. Evaluation mixes them as training does at first: by weight, or by bytes."""
    shares = {source.name: source.weight or text_bytes[source.name] for source in config.data.sources}
    rows, rows_left, shares_left = {}, config.eval.rows, sum(shares.values())
    for name, share in shares.items():
        rows[name] = round(rows_left * share / max(shares_left, 1e-300))
        rows_left, shares_left = rows_left - rows[name], shares_left - share
    return rows


def evaluation_rows(config: RunConfig, recipe: Recipe) -> Rows:
    """The rows that evaluation is on. Raises DataError where rows are asked for, and no text is left to make them of."""
    shares = evaluation_shares(config, {source.name: source.text_bytes for source in recipe.plan.sources})
    parts: list[Packed] = []
    for number, source in enumerate(recipe.plan.sources):
        if shares[source.name]:
            parts += _held_out(recipe, number, shares[source.name])
    if not parts:
        return no_rows(recipe.seq_len)
    rows = joined([part.rows for part in parts], [len(part.documents) for part in parts])
    if len(rows):
        return rows
    names = ", ".join(source.uri for source in config.data.sources)
    bad = next((record for part in parts for record in part.bad), None) or _first_bad(recipe)
    if bad:
        raise DataError(
            f"no readable text was found in {names}. The first record that cannot be read: {bad.uri}, at {bad.position}: {bad.reason}."
        )
    raise DataError(
        f"no text is left to hold out for evaluation in {names}: the corpus is empty after cleaning, or has a single record. "
        "Add text, lower data.clean.min_chars, or set eval.rows=0."
    )


def _first_bad(recipe: Recipe) -> BadRecord | None:
    """An unreadable record of the first slices, to say why there is no text."""
    for source in recipe.plan.sources:
        for number in range(min(len(source), LOOKED_AT_SLICES)):
            for record in read_slice(source[number], recipe.text_fields[source.name], recipe.s3):
                if isinstance(record, BadRecord):
                    return record
    return None


def _held_out(recipe: Recipe, source: int, num_rows: int) -> Iterator[Packed]:
    """About as many rows of each held-out slice; what one lacks, the next ones give."""
    slices = recipe.plan.held_out_slices(source)
    for number, piece in enumerate(slices):
        part = held_out_rows(recipe, piece, -(-num_rows // (len(slices) - number)))
        num_rows -= len(part.rows)
        yield part


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


def _uses_builtin(config: RunConfig) -> bool:
    return config.tokenizer.path == BUILTIN or any(source.uri == BUILTIN for source in config.data.sources)
