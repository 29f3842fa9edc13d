"""Reaching Ray: the cluster of `RAY_ADDRESS` (set inside a submitted job), or a private one on this machine.

Ray reads its settings when it is first imported: so it is imported here, after they are set, and by nothing that runs before.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from cluster.errors import ClusterError
from cluster.head import require_head

# Reserved for blocks of token ids, not for the model: plenty for a laptop.
LOCAL_OBJECT_STORE_BYTES = 512 << 20

LOCK = "driver.lock"
LEFT_AFTER_S = 60.0  # between making a folder and locking it, and for Ray's agents, which notice late that their cluster is gone

# A private cluster lives as long as its run, so what guards and watches long-lived ones is left off: it costs processes at
# start-up, and 5% of a small machine all the time.
_LOCAL_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_enable_metrics_collection": "0",
}


@contextmanager
def connected(logical_cpus: int) -> Iterator[None]:
    """Connects to the cluster that `RAY_ADDRESS` names, or starts one on this machine with `logical_cpus` and ends it afterwards.

    Logical CPUs follow the plan, not the cores: 4 workers on a 2-core laptop are 4 logical CPUs, and their threads share the cores.
    """
    with ExitStack() as stack:
        if is_private():
            folder = stack.enter_context(_private_folder())
            stack.callback(_end_left_over, folder)
            _start_local(logical_cpus, folder)
        else:
            _connect(os.environ["RAY_ADDRESS"])
        import ray

        stack.callback(ray.shutdown)
        yield


def is_private() -> bool:
    """Whether runs get a cluster of their own on this machine, which ends with them."""
    return not os.environ.get("RAY_ADDRESS")


def hardware(on_gpus: bool) -> str:
    """What a measurement of memory or speed holds for: the kinds of GPUs of the connected cluster; or CPUs, how many and with
    how much memory where that is this machine."""
    import psutil
    import ray

    resources = ray.cluster_resources()
    prefix = "accelerator_type:"
    if on_gpus:
        return "GPU " + ", ".join(sorted(name.removeprefix(prefix) for name in resources if name.startswith(prefix)))
    if is_private():
        return f"{os.cpu_count()} CPUs, {round(psutil.virtual_memory().total / 2**30)} GiB"
    return "CPUs"


def head_address() -> str:
    """host:port of the connected cluster's control service (GCS)."""
    import ray

    return ray.get_runtime_context().gcs_address


def _connect(address: str) -> None:
    require_head(address)
    import ray

    _log_what_the_head_tells()
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray raises many kinds here
        text = str(error).strip()
        first = text.splitlines()[0] if text else type(error).__name__
        raise ClusterError(f"cannot connect to the cluster at {address}: {first}") from None


def _log_what_the_head_tells() -> None:
    """Ray prints the cluster's warnings on a driver's stdout even with log_to_driver=False. Under an autoscaler it warns whenever a task
    waits for a node, which is as it should be: so they go to the log."""
    from ray._private import worker

    def log(data: dict[str, Any], ignore_prefix: bool) -> None:
        logging.getLogger("ray").warning("%s: %s", data.get("pid"), "\n".join(data["lines"]))

    worker.print_to_stdstream = log


@contextmanager
def _private_folder(parent: str = "/tmp") -> Iterator[str]:
    """For sockets and Ray's own logs; short, because the path of a socket is at most 107 characters long. Goes with this process: where
    that is killed, the next one removes it. Its lock says so, which process ids would not where containers share `parent`."""
    for left in Path(parent).glob("ray-*/" + LOCK):
        with suppress(OSError):
            _remove_if_left(left)
    with (
        tempfile.TemporaryDirectory(prefix="ray-", dir=parent, ignore_cleanup_errors=True) as folder,
        Path(folder, LOCK).open("w") as lock,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def _remove_if_left(path: Path) -> None:
    """Removes the folder of a lock that nobody holds. Whoever else writes beside it may have put anything there: what is no plain file of
    this user's is left alone, and nothing is waited for, as the opening of a pipe would."""
    lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        seen = os.fstat(lock)
        if stat.S_ISREG(seen.st_mode) and seen.st_uid == os.geteuid() and time.time() - seen.st_mtime > LEFT_AFTER_S:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.parent, ignore_errors=True)
    finally:
        os.close(lock)


def _end_left_over(folder: str) -> None:
    """Ends what is still there of the private cluster whose files are in `folder`. Ray's agents notice only after a minute that a cluster
    is gone which was interrupted while it started."""
    import psutil

    for process in psutil.process_iter():
        with suppress(psutil.Error):
            files = (opened.path for opened in process.open_files())
            if process.pid != os.getpid() and any(path.startswith(f"{folder}/") for path in files):
                process.kill()


def _start_local(logical_cpus: int, folder: str) -> None:
    for name, value in _LOCAL_SETTINGS.items():
        os.environ.setdefault(name, value)
    if "RAY_AUTH_MODE" not in os.environ:
        # A token of this run's own, handed to the processes by environment: Ray would write one into the home directory.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    import ray

    ray.init(
        address="local",
        num_cpus=logical_cpus,
        object_store_memory=LOCAL_OBJECT_STORE_BYTES,
        include_dashboard=False,
        _temp_dir=folder,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
