"""A Ray cluster whose nodes come and go by Ray's autoscaler (v2), on this machine: its provider starts a raylet for a cloud's machine.

`ray.cluster_utils.AutoscalingCluster` does not work from the wheel, which lacks a file, and ends every Ray on the machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import psutil
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE, FakeMultiNodeProvider

from tests.ports import free_port
from tests.small_run import ROOT

MARK = "HEADRACE_FAKE_CLUSTER"  # inherited by all of its processes
STORE_BYTES = 100_000_000  # each node's object store
UNUSED = {
    **{name: {} for name in ("auth", "docker", "file_mounts")},
    **{name: [] for name in ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")},
    **{
        name: []
        for name in ("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter")
    },
    "file_mounts_sync_continuously": False,
}


class Autoscaled:
    """A head without CPUs, and at first no other node. `types`: by name the resources of a node and the most of them."""

    def __init__(self, folder: Path, types: dict[str, tuple[dict[str, float], int]], idle_s: float = 15.0) -> None:
        self.mark, self.address = uuid.uuid4().hex, f"127.0.0.1:{free_port()}"
        self._folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: the path of a socket is at most 107 characters long
        config = folder / "autoscaler.json"
        config.write_text(json.dumps(self._config(types, idle_s)))
        token = os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)
        self.environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, MARK: self.mark}
        own = {
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_NODE_TYPE_NAME": FAKE_HEAD_NODE_TYPE,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=0", "--include-dashboard=false"]
        command += ["--node-ip-address=127.0.0.1", f"--port={self.address.split(':')[1]}", f"--temp-dir={self._folder}"]
        command += [f"--object-store-memory={STORE_BYTES}", f"--autoscaling-config={config}"]
        self.head = subprocess.Popen(
            command, env=self.environment | own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self.await_nodes({})

    def _config(self, types: dict[str, tuple[dict[str, float], int]], idle_s: float) -> dict[str, Any]:
        provider = {
            "type": "external",
            "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "gcs_address": self.address,
            "head_node_id": FAKE_HEAD_NODE_ID,
        }
        made = {FAKE_HEAD_NODE_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}}
        for name, (resources, most) in types.items():
            own = {"resources": {**resources, "object_store_memory": STORE_BYTES}, "node_config": {}, "min_workers": 0, "max_workers": most}
            made[name] = own
        whole = {"max_workers": sum(most for _, most in types.values()), "upscaling_speed": 1.0, "idle_timeout_minutes": idle_s / 60}
        return {
            "cluster_name": "fake",
            **whole,
            "provider": provider,
            "head_node_type": FAKE_HEAD_NODE_TYPE,
            "available_node_types": made,
            **UNUSED,
        }

    def nodes(self, with_ended: bool = False) -> dict[str, str]:
        """The node type of each living node but the head, by its id; as a client of its own is told, so that this process needs no Ray.
        `with_ended`: of all that ever lived."""
        script = (
            "import json, sys; from ray._raylet import GcsClient\n"
            "from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply as R\n"
            "reply = R.FromString(GcsClient(sys.argv[1]).get_cluster_status(timeout_s=5))\n"
            "states = reply.cluster_resource_state.node_states\n"
            f"print(json.dumps({{s.node_id.hex(): s.ray_node_type_name for s in states if s.status != 2 or {with_ended}}}))"
        )
        command = [sys.executable, "-c", script, self.address]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        return {node: kind for node, kind in found.items() if kind != FAKE_HEAD_NODE_TYPE}

    def await_nodes(self, wanted: dict[str, int], timeout_s: float = 120.0) -> None:
        """Returns when exactly so many nodes of each type live."""
        deadline_s, found = time.monotonic() + timeout_s, None
        while time.monotonic() < deadline_s:
            with contextlib.suppress(subprocess.SubprocessError):
                found = list(self.nodes().values())
                if {kind: found.count(kind) for kind in found} == wanted:
                    return
            time.sleep(1.0)
        raise AssertionError(f"the nodes are {found}, not {wanted}, after {timeout_s:.0f} s")

    def kill_node(self, node: str) -> None:
        """SIGKILL to the raylet of that node, and with it to its workers."""
        raylets = [process for process in psutil.process_iter() if process.name() == "raylet" and self._is_ours(process)]
        (raylet,) = [process for process in raylets if process.environ().get("RAY_OVERRIDE_NODE_ID_FOR_TESTING") == node]
        for process in [raylet, *raylet.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def start(self, recipe: Path, *settings: str, job: str = "jobs.pretrain") -> subprocess.Popen[str]:
        command = [sys.executable, "-m", job, "--config", str(recipe)]
        for setting in settings:
            command += ["--set", setting]
        environment = self.environment | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": self.address}
        return subprocess.Popen(command, cwd=recipe.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def close(self) -> None:
        """Ends every process of the cluster and of the runs on it."""
        for _ in range(3):  # what the autoscaler starts meanwhile
            ours = [process for process in psutil.process_iter() if self._is_ours(process)]
            for process in ours:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(ours, timeout=10)
        self.head.wait(10)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _is_ours(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):
            return process.environ().get(MARK) == self.mark
        return False
