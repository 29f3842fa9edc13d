"""What a node says of itself: versions, GPUs, disks, shared memory, token. Runs on the node, imports no heavy library."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

LIBRARIES = ("ray", "torch", "deepspeed", "transformers", "pyarrow")
SHARED_MEMORY = Path("/dev/shm")
NVIDIA_SMI_S = 20.0  # it takes seconds to answer where no daemon keeps the driver loaded


@dataclass(frozen=True)
class Disk:
    """`path`: the folder, or the nearest one above it that exists."""

    path: str
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Gpu:
    name: str
    driver: str
    compute_capability: str  # "9.0"
    memory_mib: int


@dataclass(frozen=True)
class NodeFacts:
    """`versions`: of Python and LIBRARIES, None where one is not installed. `disks`: by what they are for. `gpu_error`: why nvidia-smi,
    which is there, told nothing. `shm_bytes`: the size of /dev/shm, None where there is none."""

    versions: dict[str, str | None]
    disks: dict[str, Disk]
    shm_bytes: int | None
    auth_mode: str
    gpus: tuple[Gpu, ...] = ()
    gpu_error: str | None = None


def node_facts(places: dict[str, str]) -> NodeFacts:
    """The facts of this machine, as the processes see it that Ray starts here. `places`: folders by what they are for."""
    gpus, gpu_error = _gpus()
    places = {"Ray's files": _ray_folder(), "home": str(Path.home()), **places}
    return NodeFacts(
        versions=versions(),
        disks={what: _disk(Path(place)) for what, place in places.items()},
        shm_bytes=shutil.disk_usage(SHARED_MEMORY).total if SHARED_MEMORY.is_dir() else None,
        auth_mode=_auth_mode(),
        gpus=gpus,
        gpu_error=gpu_error,
    )


def versions() -> dict[str, str | None]:
    """Of Python and LIBRARIES in this process, by the metadata that comes first on its path; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def parse_gpus(told: str) -> tuple[Gpu, ...]:
    """From nvidia-smi's lines "name, driver version, compute capability, memory in MiB"."""
    rows = [[field.strip() for field in line.split(",")] for line in told.splitlines() if line.strip()]
    return tuple(Gpu(name, driver, capability, int(float(memory))) for name, driver, capability, memory in rows)


def _gpus() -> tuple[tuple[Gpu, ...], str | None]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return (), None
    query = [program, "--query-gpu=name,driver_version,compute_cap,memory.total", "--format=csv,noheader,nounits"]
    try:
        ran = subprocess.run(query, capture_output=True, text=True, timeout=NVIDIA_SMI_S, check=False)
        if ran.returncode:
            return (), (ran.stdout + ran.stderr).strip()[:200] or f"nvidia-smi ended with {ran.returncode}"
        return parse_gpus(ran.stdout), None
    except subprocess.TimeoutExpired:
        return (), f"nvidia-smi did not answer within {NVIDIA_SMI_S:g} s"
    except (OSError, ValueError) as error:
        return (), f"nvidia-smi: {error}"


def _ray_folder() -> str:
    """Where Ray keeps sockets, logs and what its object store spills, on this node."""
    from ray._private import worker

    node = worker._global_node
    return node.get_session_dir_path() if node is not None else "/tmp/ray"


def _auth_mode() -> str:
    """As Ray itself decides it in this process."""
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    return "token" if is_token_auth_enabled() else "disabled"


def _disk(place: Path) -> Disk:
    while not place.exists() and place != place.parent:
        place = place.parent
    usage = os.statvfs(place)
    return Disk(str(place), usage.f_bavail * usage.f_frsize, usage.f_blocks * usage.f_frsize)
