"""Which files a URI names: a file, a folder or a glob, on a disk or on S3."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from llm.config import S3Section
from llm.s3 import s3_client
from llm.storage import S3_PREFIX, is_s3, join, local_path, split_s3, storage_errors

_GLOB_CHARS = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class FoundFile:
    uri: str
    path: str  # inside its filesystem
    size_bytes: int
    version: str  # the ETag on S3, the modification time in ns on a disk


def find_files(uri: str, s3: S3Section) -> list[FoundFile]:
    """The files that a file, a folder (all below it) or a glob names, sorted by URI; [] when there is none.

    Globs know *, ?, [abc] and ** (any number of folders). A name that exists as it stands is not read as a glob. Names
    that begin with a dot are skipped below the part of the URI that is spelt out. Raises StorageError when something
    cannot be listed.
    """
    with storage_errors(uri, s3, doing="list"):
        found = _find_s3(uri, s3) if is_s3(uri) else _find_local(Path(local_path(uri)))
        return sorted(found, key=lambda file: file.uri)


def nearest_uri(uri: str, s3: S3Section) -> str | None:
    """The existing URI nearest to one that does not exist, by the first of its parts that is missing; None: none is."""
    path = uri.removeprefix(S3_PREFIX) if is_s3(uri) else local_path(uri).lstrip("/")
    parent = S3_PREFIX + path.partition("/")[0] if is_s3(uri) else "/"
    for part in path.split("/")[is_s3(uri) :]:
        with storage_errors(parent, s3):
            names = _children(parent, s3)
        if part not in names:
            near = difflib.get_close_matches(part, names, n=1)
            return join(parent, near[0]) if near else None
        parent = join(parent, part)
    return None


def _find_local(path: Path) -> Iterator[FoundFile]:
    if path.is_file():
        yield _local_file(path)
        return
    base, pattern = (path, ["**"]) if path.is_dir() else _split_glob(str(path))
    if not pattern or not Path(base).is_dir():
        return
    depth = 10**6 if "**" in pattern else len(pattern)
    for file in _walk(Path(base), depth, set()):
        if _matches(file.relative_to(base).parts, pattern):
            yield _local_file(file)


def _local_file(path: Path) -> FoundFile:
    info = path.stat()
    return FoundFile(str(path), str(path), info.st_size, str(info.st_mtime_ns))


def _walk(folder: Path, depth: int, above: set[str]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above:
        return  # a symbolic link to a folder that holds it
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_file():
            yield folder / entry.name
        elif depth > 1 and entry.is_dir():
            yield from _walk(folder / entry.name, depth - 1, above | {real})


def _split_glob(path: str) -> tuple[str, list[str]]:
    """("/data", ["**", "*.txt"]) for "/data/**/*.txt"; no pattern when nothing in it is a glob."""
    parts = path.split("/")
    first = next((i for i, part in enumerate(parts) if _GLOB_CHARS.search(part)), len(parts))
    return "/".join(parts[:first]), parts[first:]


def _matches(parts: tuple[str, ...], pattern: list[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[i:], pattern[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _find_s3(uri: str, s3: S3Section) -> Iterator[FoundFile]:
    bucket, key = split_s3(uri)
    client = s3_client(s3)
    first = client.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1).get("Contents", [])
    if first and first[0]["Key"] == key and not key.endswith("/"):
        yield _s3_file(bucket, first[0])
        return
    base, pattern = _split_glob(key)
    if not pattern:
        base, pattern = key.rstrip("/"), ["**"]
    base = base + "/" if base else ""
    prefix = base + _GLOB_CHARS.split(pattern[0])[0]
    delimiter = {} if len(pattern) > 1 or pattern == ["**"] else {"Delimiter": "/"}  # *.txt does not look into folders
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, **delimiter):
        for item in page.get("Contents", []):
            parts = tuple(item["Key"].removeprefix(base).split("/"))
            if parts[-1] and not any(part.startswith(".") for part in parts) and _matches(parts, pattern):
                yield _s3_file(bucket, item)


def _s3_file(bucket: str, item: dict[str, Any]) -> FoundFile:
    path = f"{bucket}/{item['Key']}"
    version = item.get("ETag", "").strip('"') or str(item["LastModified"].timestamp())
    return FoundFile(S3_PREFIX + path, path, item["Size"], version)


def _children(folder: str, s3: S3Section) -> list[str]:
    """Names in a folder, at most 1000: for suggestions only. [] when it is not a folder."""
    if not is_s3(folder):
        path = Path(folder)
        return sorted(child.name for child in path.iterdir())[:1000] if path.is_dir() else []
    bucket, key = split_s3(folder)
    prefix = key + "/" if key else ""
    page = s3_client(s3).list_objects_v2(Bucket=bucket, Prefix=prefix, Delimiter="/")
    keys = [item["Key"] for item in page.get("Contents", [])] + [item["Prefix"] for item in page.get("CommonPrefixes", [])]
    return sorted(key.removeprefix(prefix).rstrip("/") for key in keys)
