"""Connections to S3 and to what speaks its protocol, and what their errors mean in words.

The bytes of a corpus go through boto3, which can ask for those of a known version only, and reads as fast as pyarrow (measured); so do
listing and diagnosis, for it gives ETags in the listing and tells "no such bucket" from "access denied". All else goes through pyarrow.
Credentials come from the environment, a profile or the instance's role, never from a configuration.
"""

from __future__ import annotations

import difflib
import os
import re
import ssl
import time
from functools import lru_cache
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs as pafs

from llm.config import S3Section

S3_ATTEMPTS = 6  # with exponential waits, about 20 s: longer than a throttled bucket, shorter than a collective's time-out
S3_CONNECTIONS = 16  # that a client keeps open: as many as threads read footers


def s3_filesystem(bucket: str, s3: S3Section, patient: bool = True) -> pafs.S3FileSystem:
    """The filesystem that holds a bucket; `patient=False` tries each request once. Raises ConnectionError where nothing answers at the
    endpoint."""
    endpoint = _endpoint(s3)
    resolve = bucket if endpoint is None and s3.region is None else None
    attempts = S3_ATTEMPTS if patient else 1
    return _s3_filesystem(endpoint, s3.region, resolve, s3.connect_timeout_s, s3.request_timeout_s, attempts, _aws_environment())


def _aws_environment() -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))


@lru_cache(maxsize=16)
def _s3_filesystem(
    endpoint: str | None,
    region: str | None,
    resolve_bucket: str | None,
    connect_timeout_s: float,
    request_timeout_s: float,
    attempts: int,
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
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=attempts),
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


def s3_client(s3: S3Section, patient: bool = True) -> Any:
    """A boto3 client for `s3`. `patient=False` tries once, shortly: to learn why something failed."""
    endpoint = _endpoint(s3)
    if not patient:
        return _client(endpoint, s3.region, min(s3.connect_timeout_s, 5), min(s3.request_timeout_s, 10), attempts=1)
    if endpoint is not None:
        _check_reachable(endpoint, s3.connect_timeout_s)
    return _client(endpoint, s3.region, s3.connect_timeout_s, s3.request_timeout_s, S3_ATTEMPTS)


def s3_once(s3: S3Section) -> Any:
    """The boto3 client for those who try again themselves: it tries each request once. One for each setting, with its open connections;
    threads may share it. Raises ConnectionError where nothing answers at the endpoint."""
    return _s3_once(_endpoint(s3), s3.region, s3.connect_timeout_s, s3.request_timeout_s, _aws_environment())


@lru_cache(maxsize=16)
def _s3_once(
    endpoint: str | None, region: str | None, connect_timeout_s: float, read_timeout_s: float, environment: tuple[tuple[str, str], ...]
) -> Any:
    """`environment` serves to notice that it changed."""
    if endpoint is not None:
        _check_reachable(endpoint, connect_timeout_s)
    return _client(endpoint, region, connect_timeout_s, read_timeout_s, attempts=1)


def _client(endpoint: str | None, region: str | None, connect_timeout_s: float, read_timeout_s: float, attempts: int) -> Any:
    import boto3
    from botocore.config import Config

    config = Config(
        connect_timeout=connect_timeout_s,
        read_timeout=read_timeout_s,
        retries={"mode": "standard", "total_max_attempts": attempts},
        max_pool_connections=S3_CONNECTIONS,
        s3={"addressing_style": "path" if endpoint else "auto"},  # a name before a private host rarely resolves
    )
    region = region or os.environ.get("AWS_REGION") or ("us-east-1" if endpoint else None)
    return boto3.Session().client("s3", endpoint_url=endpoint, region_name=region, config=config)


def _endpoint(s3: S3Section) -> str | None:
    return s3.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def explain_s3(error: Exception, bucket: str, s3: S3Section) -> str:
    """Cause and fix in words. pyarrow reports a missing bucket, a wrong key and no key alike: boto3 asks the server."""
    where = _endpoint(s3) or "AWS"
    code = _s3_code(error)
    if code is None and not type(error).__module__.startswith("botocore"):
        try:
            client = s3_client(s3, patient=False)
            client.list_objects_v2(Bucket=bucket, MaxKeys=1)  # a HEAD would be refused without a body to say why
        except Exception as asked:
            error, code = asked, _s3_code(asked)
        else:  # it may list, so the bucket is there and the keys are known: what is denied is this request
            code = "AccessDenied" if "ACCESS_DENIED" in str(error) else None
    if code == "Connect":
        return f"cannot connect to {where} ({without_noise(error)}). {_S3_FIXES[code][1]}"
    if code == "NoSuchBucket":
        return f"no such bucket {bucket!r} at {where}. {_nearest_bucket(bucket, s3)}"
    if code in _S3_FIXES:
        cause, fix = _S3_FIXES[code]
        return f"{cause} ({code}) at {where}. {fix}"
    if isinstance(error, FileNotFoundError):
        return f"no such object in bucket {bucket!r} at {where}. Check the spelling"
    return f"{without_noise(error)} (at {where})"


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


def without_noise(error: Exception) -> str:
    text = str(error).rpartition("Details: ")[2]
    text = re.sub(r"\s*(\(Request ID.*?\)|\[Errno \d+\]|Detail: \[errno.*)", "", text, flags=re.DOTALL)
    return text.strip() or type(error).__name__


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
        "Give these credentials s3:ListBucket, s3:GetObject and, for runs, s3:PutObject and s3:DeleteObject on the bucket",
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
