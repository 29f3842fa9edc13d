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

T = TypeVar("T")
_jitter = random.Random()  # its own, so that the program's other random numbers stay what they are

# What pyarrow says of S3. Everything else (no such key, access denied) will be no better in half a minute.
_MAY_PASS = re.compile(
    r"AWS Error (NETWORK_CONNECTION|SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|THROTTLING|REQUEST_TIMEOUT)|HTTP status (429|5\d\d)"
)
# What boto3 says of it.
_BUSY_CODES = ("SlowDown", "Throttling", "ThrottlingException", "RequestThrottled", "RequestTimeout", "RequestTimeoutException")
_LOST_CONNECTION = (
    "ConnectTimeoutError", "ConnectionClosedError", "ConnectionError", "EndpointConnectionError", "HTTPClientError", "IncompleteReadError",
    "ProxyConnectionError", "ReadTimeoutError", "ResponseStreamingError", "SSLError",
)  # fmt: skip
_PASSING = (errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT, errno.ECONNRESET)  # of network file systems


class ShortReadError(OSError):
    """Fewer bytes came than the file holds."""


def patiently(attempt: Callable[[], T]) -> T:
    """What `attempt` returns; called again, READ_ATTEMPTS times in all, after an error that may pass, with longer and longer random waits
    between, so that many readers do not come back at once."""
    for number in range(READ_ATTEMPTS):
        try:
            return attempt()
        except Exception as error:  # botocore's errors share no base with OSError, and importing it costs 0.3 s
            if number + 1 >= READ_ATTEMPTS or not _may_pass(error):
                raise
        time.sleep(FIRST_WAIT_S * 2**number * _jitter.uniform(0.5, 1))
    raise AssertionError("READ_ATTEMPTS must be 1 or more")


def _may_pass(error: Exception) -> bool:
    if type(error).__module__.startswith("botocore"):
        answer = getattr(error, "response", None)
        if isinstance(answer, dict):
            status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return status == 429 or status >= 500 or answer.get("Error", {}).get("Code") in _BUSY_CODES
        return type(error).__name__ in _LOST_CONNECTION
    if not isinstance(error, OSError | pa.ArrowException):
        return False
    return isinstance(error, ShortReadError) or getattr(error, "errno", None) in _PASSING or _MAY_PASS.search(str(error)) is not None
