"""`python -m jobs.export --run RUN --to DIR [--step N]`: a Hugging Face folder from any checkpoint, without a GPU."""

from __future__ import annotations

import argparse
import sys

from jobs.checkpoints import choose
from llm.checkpoint.store import CheckpointStore
from llm.config import RunConfig, S3Section
from llm.config_file import parse_run
from llm.data.corpus import with_builtin_corpus
from llm.errors import ConfigError, HeadraceError
from llm.model.presets import model_config
from llm.storage import exists, join, read_bytes
from llm.tokenizer import load_tokenizer
from llm.train.runs import CONFIG


def main(argv: list[str] | None = None) -> int:
    """Prints one line about what is there now; the exit code is 0, or the error's."""
    parser = argparse.ArgumentParser(prog="headrace export", description="Write a Hugging Face folder from a run's checkpoint.")
    parser.add_argument("--run", required=True, metavar="RUN", help="the run's folder, local or s3://")
    parser.add_argument("--to", required=True, metavar="DIR", help="a new folder, local or s3://")
    parser.add_argument("--step", type=int, metavar="N", help="default: the newest good one")
    options = parser.parse_args(argv)
    try:
        step = export(options.run, options.to, options.step)
    except HeadraceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{options.to}: the weights of step {step}; AutoModelForCausalLM.from_pretrained({options.to!r}) reads them")
    return 0


def export(run: str, to: str, step: int | None) -> int:
    """The step that was exported."""
    if exists(to, S3Section()):
        raise ConfigError(f"--to {to}: it exists, and nothing is overwritten. Name a new folder, or remove this one.")
    config = read_config(run)
    published = choose(CheckpointStore(run, config.s3), step)
    tokenizer = load_tokenizer(config.tokenizer.path, config.tokenizer.eos, config.s3)
    model = model_config(config.model, tokenizer.vocab_size, lambda uri: read_bytes(uri, config.s3))
    from llm.export.huggingface import export_checkpoint  # imports torch and transformers

    export_checkpoint(CheckpointStore(run, config.s3), published.step, model, tokenizer, to, config.s3)
    return published.step


def read_config(run: str) -> RunConfig:
    """What the run was started with, its built-in corpus and tokenizer put in."""
    uri = join(run, CONFIG)
    if not exists(uri, S3Section()):
        raise ConfigError(f"{run} is no run: it has no {CONFIG}. Name the folder of one, such as runs/NAME.")
    return with_builtin_corpus(parse_run(read_bytes(uri, S3Section()).decode(), uri))


if __name__ == "__main__":
    sys.exit(main())
