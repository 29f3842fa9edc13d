"""Where a URI becomes a filesystem: disks and S3 behind one set of calls, and one error that says what is wrong.

A URI is a local path (absolute, relative to the working directory, or file://) or s3://bucket/key. Bytes go through
pyarrow; listing and diagnosis on S3 go through boto3, which gives ETags in the listing and tells "no such bucket" from
"access denied", as pyarrow does not. Credentials come from the environment, a profile or the instance's role, never
from a configuration.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import ssl
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
from pyarrow import fs as pafs

from llm.config import S3Section
from llm.errors import StorageError

S3_PREFIX = "s3://"
S3_ATTEMPTS = 6  # with exponential waits, about 20 s: longer than a throttled bucket, shorter than a collective's time-out
_GLOB_CHARS = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class FoundFile:
    uri: str
    path: str  # inside its filesystem
    size_bytes: int
    version: str  # the ETag on S3, the modification time in ns on a disk


def open_storage(uri: str, s3: S3Section) -> tuple[pafs.FileSystem, str]:
    """The filesystem that holds `uri`, and the path inside it. Does not look whether that path exists.

    The first call for an S3 endpoint tries to connect to it, so that a wrong one fails within `s3.connect_timeout_s`
    and not after all retries. Raises StorageError for another scheme, a URI without a bucket, or an endpoint that
    cannot be reached.
    """
    if not is_s3(uri):
        return pafs.LocalFileSystem(), local_path(uri)
    bucket, key = split_s3(uri)
    with storage_errors(uri, s3):
        endpoint = _endpoint(s3)
        resolve = bucket if endpoint is None and s3.region is None else None
        filesystem = _s3_filesystem(endpoint, s3.region, resolve, s3.connect_timeout_s, s3.request_timeout_s, _aws_environment())
    return filesystem, f"{bucket}/{key}" if key else bucket


def is_s3(uri: str) -> bool:
    return uri.startswith(S3_PREFIX)


def local_path(uri: str) -> str:
    """The absolute path of a local URI, symbolic links kept. Raises StorageError for a scheme that is not supported."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return os.path.abspath(Path(uri).expanduser())  # noqa: PTH100 (Path.resolve would follow links)
    if scheme != "file":
        raise StorageError(f"{uri}: {scheme}:// is not supported. Legal: a local path, file:///path or s3://bucket/key.")
    if not rest.startswith("/"):
        raise StorageError(f"{uri}: a file URI needs an absolute path. Nearest legal form: file:///{rest}")
    return unquote(rest)


def split_s3(uri: str) -> tuple[str, str]:
    """(bucket, key); the key may be empty. Raises StorageError when there is no bucket."""
    bucket, _, key = uri.removeprefix(S3_PREFIX).partition("/")
    if not bucket:
        raise StorageError(f"{uri}: names no bucket. Legal form: s3://bucket/key.")
    return bucket, key


def join(uri: str, *parts: str) -> str:
    """`uri` with path parts added: join("s3://b/runs/", "a", "b.json") == "s3://b/runs/a/b.json"."""
    joined = "/".join(part.strip("/") for part in parts if part.strip("/"))
    return f"{uri.rstrip('/')}/{joined}" if joined else uri


def read_bytes(uri: str, s3: S3Section) -> bytes:
    """All of a file, as stored. Raises StorageError."""
    filesystem, path = open_storage(uri, s3)
    with storage_errors(uri, s3), filesystem.open_input_file(path) as stream:
        return stream.read()


def write_bytes(uri: str, data: bytes, s3: S3Section) -> None:
    """Creates or replaces a file as one act: a reader sees the old bytes or the new, never a part. Makes folders."""
    filesystem, path = open_storage(uri, s3)
    with storage_errors(uri, s3, doing="write"):
        if is_s3(uri):
            with filesystem.open_output_stream(path) as stream:
                stream.write(data)
        else:
            _write_local(Path(path), data)


def exists(uri: str, s3: S3Section) -> bool:
    """Whether there is a file or folder. A bucket that does not exist is a StorageError: a wrong address."""
    filesystem, path = open_storage(uri, s3)
    with storage_errors(uri, s3):
        found = filesystem.get_file_info(path).type != pafs.FileType.NotFound
        if not found and is_s3(uri):
            s3_client(s3).list_objects_v2(Bucket=split_s3(uri)[0], MaxKeys=1)
        return found


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


@contextmanager
def storage_errors(uri: str, s3: S3Section, doing: str = "read") -> Iterator[None]:
    """Turns what the system, pyarrow and boto3 raise inside into a StorageError: the URI, the cause, the nearest fix.

    `doing` is the verb for the message: read, write, list. The original is not chained: it tells a user nothing more.
    """
    try:
        yield
        return
    except (OSError, pa.ArrowException) as error:
        caught: Exception = error
    except Exception as error:  # botocore's errors share no base with OSError, and importing it costs 0.3 s
        if not type(error).__module__.startswith("botocore"):
            raise
        caught = error
    why = _explain_s3(caught, split_s3(uri)[0], s3) if is_s3(uri) else _explain_local(caught)
    raise StorageError(f"{uri}: cannot {doing}: {why}") from None


def s3_client(s3: S3Section, patient: bool = True) -> Any:
    """A boto3 client for `s3`. `patient=False` tries once, shortly: to learn why something failed."""
    import boto3
    from botocore.config import Config

    endpoint = _endpoint(s3)
    if patient and endpoint is not None:
        _check_reachable(endpoint, s3.connect_timeout_s)
    config = Config(
        connect_timeout=s3.connect_timeout_s if patient else min(s3.connect_timeout_s, 5),
        read_timeout=s3.request_timeout_s if patient else min(s3.request_timeout_s, 10),
        retries={"mode": "standard", "total_max_attempts": S3_ATTEMPTS if patient else 1},
        s3={"addressing_style": "path" if endpoint else "auto"},  # a name before a private host rarely resolves
    )
    region = s3.region or os.environ.get("AWS_REGION") or ("us-east-1" if endpoint else None)
    return boto3.Session().client("s3", endpoint_url=endpoint, region_name=region, config=config)


def _explain_local(error: Exception) -> str:
    number = getattr(error, "errno", None)
    if number in _LOCAL_FIXES:
        return f"{os.strerror(number)}. {_LOCAL_FIXES[number]}"
    return os.strerror(number) if number else _without_noise(error)


def _explain_s3(error: Exception, bucket: str, s3: S3Section) -> str:
    """Cause and fix in words. pyarrow reports a missing bucket, a wrong key and no key alike: boto3 asks the server."""
    where = _endpoint(s3) or "AWS"
    code = _s3_code(error)
    if code is None:
        try:
            client = s3_client(s3, patient=False)
            client.list_objects_v2(Bucket=bucket, MaxKeys=1)  # a HEAD would be refused without a body to say why
        except Exception as asked:
            error, code = asked, _s3_code(asked)
    if code == "Connect":
        return f"cannot connect to {where} ({_without_noise(error)}). {_S3_FIXES[code][1]}"
    if code == "NoSuchBucket":
        return f"no such bucket {bucket!r} at {where}. {_nearest_bucket(bucket, s3)}"
    if code in _S3_FIXES:
        cause, fix = _S3_FIXES[code]
        return f"{cause} ({code}) at {where}. {fix}"
    if isinstance(error, FileNotFoundError):
        return f"no such object in bucket {bucket!r} at {where}. Check the spelling"
    return f"{_without_noise(error)} (at {where})"


def _s3_code(error: Exception) -> str | None:
    """The key of _S3_FIXES that fits an error of botocore, pyarrow or our own; None when only the server can tell."""
    name, response = type(error).__name__, getattr(error, "response", None)
    if isinstance(response, dict):
        code = str(response.get("Error", {}).get("Code", "unknown"))
        return _CODE_TWINS.get(code, code)
    if "Credential" in name or name in ("ProfileNotFound", "TokenRetrievalError"):
        return "NoCredentials"
    is_connection = name.endswith(("ConnectionError", "TimeoutError", "SSLError", "ConnectionClosedError"))
    return "Connect" if is_connection or "NETWORK_CONNECTION" in str(error) else None


def _nearest_bucket(bucket: str, s3: S3Section) -> str:
    try:
        names = [item["Name"] for item in s3_client(s3, patient=False).list_buckets()["Buckets"]]
    except Exception:  # most keys may not list buckets: then there is no suggestion
        names = []
    near = difflib.get_close_matches(bucket, names, n=1)
    return f"Nearest existing bucket: {near[0]!r}" if near else "Create it first, or correct the name; buckets are never created here"


def _without_noise(error: Exception) -> str:
    text = str(error).rpartition("Details: ")[2]
    text = re.sub(r"\s*(\(Request ID.*?\)|\[Errno \d+\]|Detail: \[errno.*)", "", text, flags=re.DOTALL)
    return text.strip() or type(error).__name__


_LOCAL_FIXES = {
    errno.ENOENT: "Check the spelling, and that every node mounts it",
    errno.EACCES: "Give this user the right to it, or name another place",
    errno.EPERM: "Give this user the right to it, or name another place",
    errno.ENOSPC: "Free some space, or name a larger disk",
    errno.EDQUOT: "Free some space, or name a larger disk",
    errno.EROFS: "Name a place that can be written",
    errno.EISDIR: "Name a file",
    errno.ENOTDIR: "A part of the path is a file: name a folder",
}
_KEY_FIX = "Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile that AWS_PROFILE names"
_CODE_TWINS = {
    "403": "AccessDenied",
    "404": "NoSuchBucket",
    "301": "PermanentRedirect",
    "ExpiredTokenException": "ExpiredToken",
}
_S3_FIXES = {
    "AccessDenied": (
        "access denied",
        "Give these credentials s3:ListBucket, s3:GetObject and, for runs, s3:PutObject on the bucket",
    ),
    "InvalidAccessKeyId": ("access denied: the access key is not known there", _KEY_FIX),
    "SignatureDoesNotMatch": ("access denied: the secret key does not belong to the access key", _KEY_FIX),
    "ExpiredToken": ("access denied: the credentials have expired", "Renew them, or use a role that renews itself"),
    "InvalidToken": ("access denied: the session token is not valid", "Set or unset AWS_SESSION_TOKEN to fit the key"),
    "RequestTimeTooSkewed": ("access denied: this machine's clock is wrong", "Set the clock"),
    "PermanentRedirect": ("the bucket is in another region", "Set s3.region to the bucket's region"),
    "AuthorizationHeaderMalformed": ("the bucket is in another region", "Set s3.region to the bucket's region"),
    "NoSuchKey": ("no such object", "Check the spelling"),
    "SlowDown": ("too many requests", "Read from fewer workers at once, or try again later"),
    "NoCredentials": (
        "no credentials found",
        "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the machine a role",
    ),
    "Connect": (
        "cannot connect",
        "Check s3.endpoint_url (or AWS_ENDPOINT_URL), and that the server is up and reached from here",
    ),
}


def _endpoint(s3: S3Section) -> str | None:
    return s3.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def _aws_environment() -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))


@lru_cache(maxsize=16)
def _s3_filesystem(
    endpoint: str | None,
    region: str | None,
    resolve_bucket: str | None,
    connect_timeout_s: float,
    request_timeout_s: float,
    environment: tuple[tuple[str, str], ...],
) -> pafs.S3FileSystem:
    """One filesystem, with its open connections, for each setting. `environment` serves to notice that it changed."""
    options: dict[str, Any] = {}
    if endpoint is not None:
        _check_reachable(endpoint, connect_timeout_s)
        parts = urlsplit(endpoint)
        options |= {"endpoint_override": parts.netloc + parts.path.rstrip("/"), "scheme": parts.scheme}
        region = region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    elif resolve_bucket is not None:
        region = _bucket_region(resolve_bucket)
    if bundle := os.environ.get("AWS_CA_BUNDLE"):
        options["tls_ca_file_path"] = bundle
    return pafs.S3FileSystem(
        region=region,
        connect_timeout=connect_timeout_s,
        request_timeout=request_timeout_s,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS),
        **options,
    )


def _bucket_region(bucket: str) -> str | None:
    try:
        return pafs.resolve_s3_region(bucket)
    except (OSError, pa.ArrowException):
        return None  # then the environment's; what is wrong with the bucket will show when it is used


@lru_cache(maxsize=16)
def _check_reachable(endpoint: str, timeout_s: float) -> None:
    """Returns when an HTTP server answers there, whatever it says; asked once a process. Raises ConnectionError."""
    parts = urlsplit(endpoint)
    deadline_s = time.monotonic() + timeout_s
    for attempt in range(3):  # a server that restarts refuses for a moment
        left_s = max(0.1, deadline_s - time.monotonic())
        if parts.scheme == "https":
            context = ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE"))
            connection = HTTPSConnection(parts.hostname or "", parts.port, timeout=left_s, context=context)
        else:
            connection = HTTPConnection(parts.hostname or "", parts.port, timeout=left_s)
        try:
            connection.request("HEAD", "/")
            connection.getresponse()
            return
        except (OSError, HTTPException) as error:
            if attempt == 2 or time.monotonic() + 0.5 >= deadline_s:
                raise ConnectionError(getattr(error, "strerror", None) or str(error) or "it does not answer") from None
            time.sleep(0.5)
        finally:
            connection.close()


def _write_local(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
