"""`python -m jobs.prepare --builtin`: writes the embedded corpus, and its tokenizer, to disk, once."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llm.data.builtin import CORPUS_FOLDER, prepare_builtin, prepare_builtin_tokenizer
from llm.errors import HeadraceError


def main(argv: list[str] | None = None) -> int:
    """Prints one line about what is there now; the exit code is 0, or the error's."""
    parser = argparse.ArgumentParser(prog="python -m jobs.prepare", description="Prepare a corpus to train on.")
    parser.add_argument(
        "--builtin",
        action="store_true",
        required=True,
        help="real text from this Python installation; downloads nothing",
    )
    parser.add_argument("--out", type=Path, default=CORPUS_FOLDER, metavar="DIR", help="default: %(default)s")
    options = parser.parse_args(argv)
    try:
        corpus = prepare_builtin(options.out)
        if options.out == CORPUS_FOLDER:
            prepare_builtin_tokenizer()  # where `tokenizer.path: builtin` looks for it
    except HeadraceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    done = "already there" if corpus.cached else f"written in {corpus.elapsed_s:.1f} s"
    print(f"{corpus.folder}: {corpus.num_documents} documents, {corpus.text_bytes / 1e6:.1f} MB of text, {done}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
