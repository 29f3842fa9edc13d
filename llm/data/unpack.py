"""Compressed streams, unpacked in chunks, up to the first damage or to where they turn out to be bombs."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import zstandard

from llm.data.exact_file import ExactFile
from llm.data.slices import Compression

# A compressed stream that unpacks to more than so many times its size, by more than so many bytes, is a bomb: the rest of it is skipped.
MAX_UNPACK_RATIO, MAX_UNPACK_EXCESS_BYTES = 200, 32 << 20
UNPACKED_BYTES = 1 << 20  # given out at once
_BITE_BYTES = 1 << 9  # compressed bytes unpacked at a time: a bomb expands to at most 16 MiB of memory
_MAX_WINDOW_BYTES = 128 << 20


class DamagedStreamError(Exception):
    """Nothing more can be read from this stream; the text says why."""


def unpacked(stream: ExactFile, compression: Compression, chunk_bytes: int) -> Iterator[bytes]:
    """Chunks of the unpacked stream, over all gzip members or zstd frames; raises DamagedStreamError after the last good."""
    ready: list[bytes] = []
    ready_bytes = 0
    damage: str | None = None  # not the error: it would hold this frame, and the frame it, with all that was unpacked
    bites = _bites(stream, compression, chunk_bytes)
    while damage is None:
        try:
            unpacked = next(bites, None)
        except DamagedStreamError as error:
            damage, unpacked = str(error), None
        if unpacked is not None:
            ready.append(unpacked)
            ready_bytes += len(unpacked)
        if unpacked is None or ready_bytes >= UNPACKED_BYTES:
            whole = b"".join(ready)
            ready, ready_bytes = [], 0
            for at in range(0, len(whole), UNPACKED_BYTES):  # a bite of a bomb is larger
                yield whole[at : at + UNPACKED_BYTES]
        if unpacked is None and damage is None:
            return
    raise DamagedStreamError(damage)


def _bites(stream: ExactFile, compression: Compression, chunk_bytes: int) -> Iterator[bytes]:
    """Fed in small bites, because both libraries throw away what they unpacked from a bite that turns out damaged."""
    zstd = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
    unpacker: Any = None
    excess_bytes = 0
    while chunk := stream.read(chunk_bytes):
        for at in range(0, len(chunk), _BITE_BYTES):
            bite = chunk[at : at + _BITE_BYTES]
            excess_bytes = max(0, excess_bytes - MAX_UNPACK_RATIO * len(bite))
            while bite:
                if unpacker is None:
                    bite = bite.lstrip(b"\0")  # archives are padded with zeros
                    if not bite:
                        break
                    unpacker = zstd.decompressobj() if compression == "zstd" else zlib.decompressobj(wbits=31)
                try:
                    unpacked = unpacker.decompress(bite)
                except (zlib.error, zstandard.ZstdError) as error:
                    raise DamagedStreamError(f"damaged {compression} stream: {error}") from None
                bite = unpacker.unused_data if unpacker.eof else b""
                unpacker = None if unpacker.eof else unpacker
                excess_bytes += len(unpacked)
                if excess_bytes > MAX_UNPACK_EXCESS_BYTES:
                    raise DamagedStreamError(f"a {compression} stream that unpacks to more than {MAX_UNPACK_RATIO} times its size: a bomb?")
                if unpacked:
                    yield unpacked
    if unpacker is not None:
        raise DamagedStreamError(f"truncated {compression} stream")
