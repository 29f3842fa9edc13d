"""The head's job server over HTTP: what Ray's own client does, but an address that was named is the one that is asked (Ray's gives way to
RAY_API_SERVER_ADDRESS and RAY_ADDRESS), nothing waits for ever, and what goes wrong is told by its cause."""

from __future__ import annotations

import operator
import os
import re
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from http.client import HTTPException, IncompleteRead, RemoteDisconnected
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import requests
from requests import certs
from requests.auth import AuthBase

from cluster.errors import ClusterError, HeadLostError
from cluster.printable import printable, printable_lines

ADDRESS = "RAY_API_SERVER_ADDRESS"
CONNECT_S = 10.0
ANSWER_S = 60.0  # an upload of 64 MiB that the head keeps takes seconds
SILENCE_S = 30.0  # after which a log's connection is asked whether it lives
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class JobState:
    """A submitted job as the server tells it, all texts printable, only `message` of several lines. `status`: PENDING, RUNNING or one of
    ENDED."""

    job_id: str
    status: str
    entrypoint: str
    metadata: Mapping[str, str]
    package: str
    message: str
    began_at_s: float | None
    ended_at_s: float | None
    driver_exit_code: int | None

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    @property
    def exit_code(self) -> int:
        """The job's own, as a shell would tell it; 0 or 1 by the status where the server knows none."""
        if self.driver_exit_code is None:
            return 0 if self.status == "SUCCEEDED" else 1
        return self.driver_exit_code if self.driver_exit_code >= 0 else 128 - self.driver_exit_code


class JobServer:
    """`address`: http(s)://HOST:PORT, or HOST:PORT; None: RAY_API_SERVER_ADDRESS. Raises ClusterError where it is no such address, where
    nobody or something else answers, where the token is refused, and where the head runs another Ray than this client."""

    def __init__(self, address: str | None) -> None:
        self.address = _http_address(address)
        self._session = requests.Session()
        self._session.auth = _Bearer(read_token())
        self._require_same_ray()

    def jobs(self) -> list[JobState]:
        """All submitted jobs, the oldest first."""
        with self._understood():
            told = [_state(job) for job in self._ask("GET", "/api/jobs/").json() if job.get("submission_id")]
        return sorted(told, key=lambda job: job.began_at_s or 0.0)

    def job(self, job_id: str) -> JobState:
        with self._understood():
            return _state(self._ask("GET", _job_path(job_id)).json())

    def log(self, job_id: str) -> str:
        """As it is: what shows it makes it printable."""
        with self._understood():
            return _text(self._ask("GET", f"{_job_path(job_id)}/logs").json()["logs"] or "")

    async def tail(self, job_id: str) -> AsyncIterator[str]:
        """The log from its start, in pieces and as it is, until the job has ended or the connection breaks: the caller asks which."""
        import aiohttp

        url = f"{self.address}{_job_path(job_id)}/logs/tail"
        try:
            async with aiohttp.ClientSession(headers=_bearer(read_token()), trust_env=True) as session:
                async with session.ws_connect(url, heartbeat=SILENCE_S, ssl=_trusted()) as stream:
                    async for message in stream:
                        if message.type is not aiohttp.WSMsgType.TEXT:
                            return
                        yield message.data
        except (aiohttp.ClientError, OSError, TimeoutError):
            return

    def has_package(self, uri: str) -> bool:
        """Whether the head has it; then it keeps it for some minutes more."""
        return self._ask("GET", _package_path(uri), missing=True).status_code == 200

    def upload(self, uri: str, archive: bytes) -> None:
        self._ask("PUT", _package_path(uri), data=archive)

    def submit(self, job_id: str, entrypoint: str, runtime_env: Mapping[str, Any], told: Mapping[str, str]) -> None:
        """Starts a job. All of it can be read through the server by everybody who has the token."""
        body = {"submission_id": job_id, "entrypoint": entrypoint, "runtime_env": dict(runtime_env), "metadata": dict(told)}
        self._ask("POST", "/api/jobs/", json=body)

    def stop(self, job_id: str) -> None:
        """Asks the job to end; returns at once."""
        self._ask("POST", f"{_job_path(job_id)}/stop")

    def _require_same_ray(self) -> None:
        with self._understood():
            there = printable(self._ask("GET", "/api/version", missing=True).json()["ray_version"].strip())[:40]
        here = metadata.version("ray")
        if there != here:
            raise ClusterError(
                f"the head at {self.address} runs Ray {there}, and this client has Ray {here}. Install ray=={there} here (an environment "
                "made with the cluster's constraints.txt), or start the cluster with an image of this version."
            )

    @contextmanager
    def _understood(self) -> Iterator[None]:
        """An answer that is none of Ray's."""
        try:
            yield
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
            raise ClusterError(f"{self.address} answers, but not as Ray's job server. {_PORT_HINT}") from None

    def _ask(self, method: str, path: str, missing: bool = False, **content: Any) -> requests.Response:
        """The answer, of status 200, or 404 with `missing`."""
        try:
            answer = self._session.request(method, self.address + path, timeout=(CONNECT_S, ANSWER_S), allow_redirects=False, **content)
        except requests.exceptions.SSLError as error:
            if any(isinstance(each, ssl.SSLCertVerificationError) for each in _causes(error)):
                raise ClusterError(
                    f"{self.address} has no TLS certificate that this client trusts. Set REQUESTS_CA_BUNDLE to its CA's."
                ) from None
            raise ClusterError(f"{self.address} answers, but not in TLS. Nearest: http{self.address.removeprefix('https')}.") from None
        except (requests.exceptions.ConnectTimeout, requests.exceptions.ConnectionError) as error:
            if words := next((str(each) for each in _causes(error) if _is_no_http(each)), None):
                raise ClusterError(
                    f"{self.address} answers, but not in HTTP ({words[:60]!r}): it is another service. {_PORT_HINT}"
                ) from None
            raise HeadLostError(f"nobody answers at {self.address} ({_reason(error)}). {_PORT_HINT}") from None
        except (requests.exceptions.RequestException, ValueError) as error:  # a host that is none is told by many kinds
            raise HeadLostError(f"{self.address} did not answer {method} {path}: {type(error).__name__}. {_PORT_HINT}") from None
        if answer.status_code in (401, 403):
            raise ClusterError(_refused(self.address, answer.status_code))
        if answer.status_code == 200 or (missing and answer.status_code == 404):
            return answer
        lines = [printable(line.strip()) for line in answer.text.splitlines() if line.strip()] or ["without a word"]
        if answer.status_code == 404:
            raise ClusterError(f"{self.address}: {lines[0][:300]}. `headrace jobs list` tells which there are.")
        # The server's answer to a failure is a traceback, whose last line is the error.
        told = f"{self.address} refused {method} {path} with status {answer.status_code}: {lines[-1][:300]}"
        # A head, or what stands before it, that starts again answers so for a while.
        raise HeadLostError(told) if method == "GET" and answer.status_code >= 500 else ClusterError(told)


_PORT_HINT = (
    "Give the address of the head's dashboard, whose port is 8265 unless the head was started with another: --address http://HOST:8265 or "
    f"{ADDRESS}. A head that only its own machine or network can reach needs a tunnel first: kubectl port-forward, or ssh -L."
)


class _Bearer(AuthBase):
    """As requests' own `auth`, so that no password of a .netrc takes the token's place."""

    def __init__(self, token: str | None) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers.update(_bearer(self._token))
        return request


def read_token() -> str | None:
    """The cluster's token, from where Ray looks for it: RAY_AUTH_TOKEN, the file of RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token. None where
    there is none, or where RAY_AUTH_MODE=disabled. Raises ClusterError where the file that is named cannot be read."""
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return _sendable(token, "RAY_AUTH_TOKEN")
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named).expanduser() if named else Path.home() / ".ray" / "auth_token"
    try:
        token = path.read_text().strip()
    except (OSError, ValueError) as error:
        if named:
            why = getattr(error, "strerror", None) or type(error).__name__
            raise ClusterError(f"RAY_AUTH_TOKEN_PATH={named} cannot be read ({why}). Name the file that holds the token.") from None
        return None
    return _sendable(token, str(path)) if token else None


def _sendable(token: str, where: str) -> str:
    if not (token.isascii() and token.isprintable()):
        raise ClusterError(f"the token of {where} holds a line break or a character that no token has. Copy the cluster's anew.")
    return token


def _trusted() -> ssl.SSLContext:
    """Whose certificates count, as for requests."""
    bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or certs.where()
    return ssl.create_default_context(capath=bundle) if Path(bundle).is_dir() else ssl.create_default_context(cafile=bundle)


def _bearer(token: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


def _refused(address: str, status: int) -> str:
    fix = "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH, a file) to the cluster's token."
    if status == 403:
        return f"the cluster at {address} refuses this client's token. {fix}"
    why = (
        "RAY_AUTH_MODE=disabled keeps this client from sending one"
        if os.environ.get("RAY_AUTH_MODE") == "disabled"
        else "there is none here"
    )
    return f"the cluster at {address} wants a token, and {why}. {fix}"


def _http_address(address: str | None) -> str:
    named = address or os.environ.get(ADDRESS)
    if not named:
        raise ClusterError(f"no address of a cluster is given. {_PORT_HINT}")
    full = named if "://" in named else f"http://{named}"
    try:
        parts = urlsplit(full)
        if "@" in parts.netloc:
            raise ClusterError("the address holds a user name or password. Leave them out: the token comes from RAY_AUTH_TOKEN.")
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.path in ("", "/") and not parts.query and parts.port != 0
    except ValueError:  # brackets that do not close, a port above 65535
        usable = False
    if not usable:
        raise ClusterError(f"{named!r} is no address of a job server: http(s)://HOST:PORT, with a port of 1 to 65535. {_PORT_HINT}")
    return f"{parts.scheme}://{parts.netloc}"


def _job_path(job_id: str) -> str:
    if not job_id.strip("."):
        raise ClusterError(f"no job can be called {job_id!r}. `headrace jobs list` tells which there are.")
    return f"/api/jobs/{quote(job_id, safe='')}"


def _package_path(uri: str) -> str:
    protocol, _, name = uri.partition("://")
    return f"/api/packages/{protocol}/{name}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised for: requests and urllib3 put layers around it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_no_http(error: BaseException) -> bool:
    return isinstance(error, HTTPException) and not isinstance(error, RemoteDisconnected | IncompleteRead)


def _reason(error: Exception) -> str:
    """What the system said, out of the layers that requests and urllib3 put around it."""
    if any(isinstance(each, RemoteDisconnected) for each in _causes(error)):
        return "the connection is closed without an answer"
    text = str(error)
    if found := re.search(r"\[Errno -?\d+\] ([^'\")\]]+)", text):
        return found[1]
    return "no answer in time" if "timed out" in text else type(error).__name__


def _state(job: Mapping[str, Any]) -> JobState:
    """Raises ValueError, TypeError or the like where it is no state of a job."""

    def seconds(name: str) -> float | None:
        if not job.get(name):
            return None
        at_s = job[name] / 1000
        datetime.fromtimestamp(at_s)  # whether it is a time at all
        return at_s

    code = job.get("driver_exit_code")
    return JobState(
        job_id=printable(_text(job.get("submission_id") or job.get("job_id") or "")),
        status=printable(_text(job["status"])),
        entrypoint=printable(_text(job.get("entrypoint") or "")),
        metadata={printable(key): printable(str(value)) for key, value in (job.get("metadata") or {}).items()},
        package=printable(_text((job.get("runtime_env") or {}).get("working_dir") or "")),
        message=printable_lines(_text(job.get("message") or "")),
        began_at_s=seconds("start_time"),
        ended_at_s=seconds("end_time"),
        driver_exit_code=None if code is None else operator.index(code),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(type(value).__name__)
    return value
