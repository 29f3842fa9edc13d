"""Reading again after a fault that may pass: a lost connection, a busy server, a body cut short."""

from __future__ import annotations

import errno
import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

import pyarrow as pa

READ_ATTEMPTS = 6
FIRST_WAIT_S = 1.0  # doubled each time: up to 31 s of waiting in all, less by the jitter; a stall takes s3.request_timeout_s besides
LONGEST_WAIT = 16  # in first waits

T = TypeVar("T")
_jitter = random.Random()  # its own, so that the program's other random numbers stay what they are

# What pyarrow says of S3. Everything else (no such key, access denied) will be no better in half a minute.
_MAY_PASS = re.compile(
    r"AWS Error (NETWORK_CONNECTION|SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|THROTTLING|REQUEST_TIMEOUT)|HTTP status (429|5\d\d)"
)
# What boto3 says of it.
_PASSING_CODES = (
    "SlowDown", "Throttling", "ThrottlingException", "RequestThrottled", "RequestTimeout", "RequestTimeoutException", "InternalError",
    "BadDigest", "InvalidDigest", "IncompleteBody", "XAmzContentChecksumMismatch",
)  # fmt: skip
_LOST_CONNECTION = (
    "ConnectTimeoutError", "ConnectionClosedError", "ConnectionError", "EndpointConnectionError", "HTTPClientError", "IncompleteReadError",
    "ProxyConnectionError", "ReadTimeoutError", "ResponseParserError", "ResponseStreamingError", "SSLError",
)  # fmt: skip
_PASSING = (errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT, errno.ECONNRESET)  # of network file systems


class ShortReadError(OSError):
    """Fewer bytes came than the file holds."""


def patiently(attempt: Callable[[], T], attempts: int = READ_ATTEMPTS) -> T:
    """What `attempt` returns; called again, `attempts` times in all, after an error that may pass, with longer and longer random waits
    between (at most LONGEST_WAIT), so that many readers do not come back at once."""
    for number in range(attempts):
        try:
            return attempt()
        except Exception as error:  # botocore's errors share no base with OSError, and importing it costs 0.3 s
            if number + 1 >= attempts or not _may_pass(error):
                raise
        time.sleep(FIRST_WAIT_S * min(2**number, LONGEST_WAIT) * _jitter.uniform(0.5, 1))
    raise AssertionError("attempts must be 1 or more")


def _may_pass(error: Exception) -> bool:
    if type(error).__module__.startswith(("botocore", "urllib3")):
        answer = getattr(error, "response", None)
        if isinstance(answer, dict):
            status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return status in (408, 409, 429) or status >= 500 or answer.get("Error", {}).get("Code") in _PASSING_CODES
        return type(error).__module__.startswith("urllib3") or type(error).__name__ in _LOST_CONNECTION
    if not isinstance(error, OSError | pa.ArrowException):
        return False
    if isinstance(error, ShortReadError | ConnectionResetError | ConnectionAbortedError | BrokenPipeError | TimeoutError):
        return True
    return getattr(error, "errno", None) in _PASSING or _MAY_PASS.search(str(error)) is not None
