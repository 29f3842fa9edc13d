"""`python -m jobs.prepare`: what can be made before a run. `--builtin`: the embedded corpus and its tokenizer, on disk, once.
`--tokens --config FILE`: a run's whole corpus, packed into its token cache.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from cluster.capacity import Waiting, await_cpus
from cluster.connect import connected, head_address
from cluster.head import HeadWatch
from jobs.exit_code import exit_code_of, take_over_signals
from llm.config import RunConfig
from llm.config_file import load_run
from llm.data.builtin import CORPUS_FOLDER, prepare_builtin, prepare_builtin_tokenizer
from llm.data.cache import require_room, token_cache
from llm.data.corpus import plan_stream, with_builtin_corpus
from llm.errors import ConfigError
from llm.observe.quiet import redirect_noise
from llm.tokenizer import load_tokenizer


def main(argv: list[str] | None = None) -> int:
    """Prints one line about what is there now; the exit code is 0, or the error's."""
    parser = argparse.ArgumentParser(prog="headrace prepare", description="Prepare a corpus to train on.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--builtin", action="store_true", help="real text from this Python installation; downloads nothing")
    what.add_argument("--tokens", action="store_true", help="fill the token cache of the run that --config describes")
    parser.add_argument("--out", type=Path, default=CORPUS_FOLDER, metavar="DIR", help="of --builtin; default: %(default)s")
    parser.add_argument("--config", metavar="FILE", help="the run, in YAML")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key: data.seq_len=1024")
    options = parser.parse_args(argv)
    if options.tokens and not options.config:
        parser.error("--tokens needs --config FILE")

    def run() -> int:
        print(fill_tokens(load_run(options.config, options.set)) if options.tokens else write_builtin(options.out))
        return 0

    return exit_code_of(run, "what is in the token cache stays, and the same command goes on")


def write_builtin(folder: Path) -> str:
    corpus = prepare_builtin(folder)
    if folder == CORPUS_FOLDER:
        prepare_builtin_tokenizer()  # where `tokenizer.path: builtin` looks for it
    done = "already there" if corpus.cached else f"written in {corpus.elapsed_s:.1f} s"
    return f"{corpus.folder}: {corpus.num_documents} documents, {corpus.text_bytes / 1e6:.1f} MB of text, {done}"


def fill_tokens(config: RunConfig) -> str:
    config = with_builtin_corpus(config)
    cache = token_cache(config)
    if cache is None:
        raise ConfigError("data.cache.enabled=false: there is no token cache to fill. Set it to true.")
    recipe = plan_stream(config, load_tokenizer(config.tokenizer.path, config.tokenizer.eos, config.s3)).recipe
    require_room(cache, recipe)
    began_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as logs, redirect_noise(Path(logs) / "ray.log"), connected(os.cpu_count() or 1):
        take_over_signals()  # Ray has put its own handlers in their place
        show, watch = partial(print, file=sys.stderr), HeadWatch(head_address()).look
        tasks = await_cpus(config.data.windows_ahead, Waiting(config.parallel.wait_nodes_s, show, watch))
        from llm.data.stream import fill_cache  # imports Ray, which must be connected first

        found = fill_cache(recipe, cache, tasks)
    took_s = time.perf_counter() - began_s
    return (
        f"{cache.uri}: {found['slices']} slices, {found['rows']:,} rows of {config.data.seq_len + 1}, {found['tokens']:,} tokens, "
        f"{found['bad']} of {found['records']:,} records unreadable, in {took_s:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
