"""`python -m jobs.train_tokenizer --input URI --out DIR`: trains a tokenizer on a sample of the inputs and saves it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import get_args

from llm.config import BUILTIN, S3Section, SourceSection
from llm.data.builtin import prepare_builtin
from llm.data.records import BadRecord, Document, read_slice
from llm.data.slices import Slice, plan_slices
from llm.data.sources import list_files
from llm.errors import DataError, HeadraceError
from llm.tokenizer import TokenizerKind, save_tokenizer, train_tokenizer

SLICE_BYTES = 1 << 20
SAMPLE_BYTES_PER_SLICE = 1 << 18  # of a large corpus only so many slices are opened as give this much each


def main(argv: list[str] | None = None) -> int:
    """Prints one line about what was saved; the exit code is 0, or the error's."""
    options = _parser().parse_args(argv)
    if not 0 < options.max_mb < 1e9:
        print(f"error: --max-mb {options.max_mb} must be above 0 and under 1e9. Nearest legal value: 100", file=sys.stderr)
        return 2
    s3 = S3Section()
    skipped: list[BadRecord] = []
    try:
        texts = sample_texts(options.input, options.text_field, int(options.max_mb * 1e6), s3, skipped)
        tokenizer = train_tokenizer(texts, options.kind, options.vocab_size)
        save_tokenizer(tokenizer, options.out, s3)
    except HeadraceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    fewer = "" if tokenizer.vocab_size == options.vocab_size else f" (asked for {options.vocab_size}: the text yields no more)"
    if skipped:
        first = skipped[0]
        print(f"note: {len(skipped)} records were skipped; the first: {first.uri}, at {first.position}: {first.reason}", file=sys.stderr)
    print(f"{options.out}: {options.kind}, {tokenizer.vocab_size} tokens{fewer}, fingerprint {tokenizer.fingerprint[:12]}")
    return 0


def sample_texts(uris: list[str], text_field: str, max_bytes: int, s3: S3Section, skipped: list[BadRecord]) -> Iterator[str]:
    """About `max_bytes` of UTF-8 text from all over the inputs, the same every time; `skipped` gets the records that cannot be read.

    Raises DataError where an input holds records, and not one that can be read.
    """
    slices = []
    for i, uri in enumerate(uris):
        uri = prepare_builtin().uri if uri == BUILTIN else uri
        files = list_files(SourceSection(name=f"input-{i}", uri=uri, weight=None, text_field=text_field), s3)
        found = plan_slices(uri, files, SLICE_BYTES)
        _require_text(found[0], uri, text_field, s3)
        slices += found
    wanted = min(len(slices), max(16, -(-max_bytes // SAMPLE_BYTES_PER_SLICE)))
    given = 0
    for i in range(wanted):
        allowed = max_bytes * (i + 1) // wanted  # what a slice leaves unused, the next ones may use
        for record in read_slice(slices[i * len(slices) // wanted], text_field, s3):
            if given >= allowed:
                break
            if isinstance(record, BadRecord):
                skipped.append(record)
            else:
                data = record.text.encode("utf-8", "replace")  # JSON may hold half of a surrogate pair
                given += len(data)
                yield data.decode()


def _require_text(piece: Slice, uri: str, text_field: str, s3: S3Section) -> None:
    first_bad = None
    for record in read_slice(piece, text_field, s3):
        if isinstance(record, Document):
            return
        first_bad = first_bad or record
    if first_bad is not None:
        raise DataError(
            f"--input {uri}: none of its first records can be read. The first: {first_bad.uri}, at {first_bad.position}: "
            f"{first_bad.reason}. Name the field that holds the text with --text-field."
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jobs.train_tokenizer", description="Train a tokenizer.")
    parser.add_argument(
        "--input",
        action="append",
        required=True,
        metavar="URI",
        help=f"file, folder or glob, local or s3://; or {BUILTIN}. Repeatable",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="where tokenizer.json is saved, local or s3://")
    parser.add_argument("--kind", choices=get_args(TokenizerKind), default="bpe", help="default: %(default)s")
    parser.add_argument("--vocab-size", type=int, default=4096, metavar="N", help="tokens at most; default: %(default)s")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="of JSON and Parquet records; default: %(default)s")
    parser.add_argument("--max-mb", type=float, default=100, metavar="MB", help="MB of text to read; default: %(default)s")
    return parser


if __name__ == "__main__":
    sys.exit(main())
