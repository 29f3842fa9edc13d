"""What the order of a run's stream follows from: its files, its tokenizer. Recorded with the run, compared when it goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import zstandard

from llm.config import S3Section
from llm.data.slices import SourceFile
from llm.errors import ConfigError
from llm.storage import exists, join, read_bytes, write_bytes

STREAM = "stream.json.zst"  # beside the run's config.yaml
SHOWN_DIFFERENCES = 5


@dataclass(frozen=True)
class Corpus:
    """All files of all sources: (uri, size_bytes, version) by source."""

    files: dict[str, tuple[tuple[str, int, str], ...]]

    @staticmethod
    def of(found: Mapping[str, Iterable[SourceFile]]) -> Corpus:
        return Corpus({name: tuple((f.uri, f.size_bytes, f.version) for f in files) for name, files in found.items()})


def write_stream(run_uri: str, corpus: Corpus, tokenizer: str, s3: S3Section) -> None:
    data = json.dumps({"tokenizer": tokenizer, "files": corpus.files}).encode()
    write_bytes(join(run_uri, STREAM), zstandard.compress(data), s3)


def require_same_stream(run_uri: str, corpus: Corpus, tokenizer: str, s3: S3Section) -> None:
    """Raises ConfigError that names what differs from what the run was started with. Nothing where it was not recorded."""
    differences = stream_differences(run_uri, corpus, tokenizer, s3)
    if differences:
        told = "\n".join(f"  {line}" for line in differences[:SHOWN_DIFFERENCES])
        more = f"\n  and {len(differences) - SHOWN_DIFFERENCES} more" if len(differences) > SHOWN_DIFFERENCES else ""
        raise ConfigError(
            f"the run {run_uri} was started on other data, so its stream cannot go on:\n{told}{more}\n"
            "  Put the old data back to go on with it, or choose another run.name."
        )


def stream_differences(run_uri: str, corpus: Corpus, tokenizer: str, s3: S3Section) -> list[str]:
    uri = join(run_uri, STREAM)
    if not exists(uri, s3):
        return []
    recorded = json.loads(zstandard.ZstdDecompressor().decompressobj().decompress(read_bytes(uri, s3)))
    return list(_differences(recorded, corpus, tokenizer))


def _differences(recorded: dict, corpus: Corpus, tokenizer: str) -> Iterator[str]:
    if recorded["tokenizer"] != tokenizer:
        yield f"the tokenizer: fingerprint {recorded['tokenizer'][:12]} then, {tokenizer[:12]} now"
    for name in dict.fromkeys([*recorded["files"], *corpus.files]):
        then = {uri: (size, version) for uri, size, version in recorded["files"].get(name, [])}
        now = {uri: (size, version) for uri, size, version in corpus.files.get(name, ())}
        for uri in dict.fromkeys([*then, *now]):
            if uri not in now:
                yield f"source {name!r}: {uri} is gone"
            elif uri not in then:
                yield f"source {name!r}: {uri} is new"
            elif then[uri] != now[uri]:
                what = "another modification time or ETag"
                if then[uri][0] != now[uri][0]:
                    what = f"{then[uri][0]} bytes then, {now[uri][0]} now"
                yield f"source {name!r}: {uri} changed ({what})"
