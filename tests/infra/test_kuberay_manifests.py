"""What infra/kuberay ships is valid for the API server, is read by Ray as it is meant, and fits together."""

from __future__ import annotations

import copy
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from llm.config_file import load_run
from llm.search.sweep_config import load_sweep
from tests.infra import kuberay_schemas as schemas
from tests.infra.kuberay_build import KUBERAY, REPO, SETS, Manifest, built, cluster_specs, read
from tests.infra.kuberay_policies import containers, of_kind, pods

FILES = sorted(path for path in KUBERAY.rglob("*.yaml") if path.name != "kustomization.yaml" and path.parent.name != "recipes")


@pytest.mark.parametrize("name", SETS)
def test_every_object_is_valid(name: str) -> None:
    assert [problem for manifest in built(name) for problem in schemas.problems(manifest)] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(KUBERAY)))
def test_every_file_is_valid_before_it_is_built(path: Path) -> None:
    """As far as it goes without kubectl: a RayJob gets its cluster when it is built."""
    manifests = read(path.read_text())
    assert manifests
    assert [problem for manifest in manifests for problem in schemas.problems(manifest)] == []


@pytest.mark.parametrize("name", SETS)
def test_ray_objects_are_valid_for_the_crds(name: str) -> None:
    found = [manifest for _, manifest in of_kind(built(name), "RayCluster", "RayJob")]
    assert found
    assert [problem for manifest in found for problem in schemas.crd_problems(manifest)] == []


def test_the_copy_of_the_crds_says_what_they_say() -> None:
    crds = schemas.crd_schemas()
    assert schemas.copied() == {kind: schemas.own_fields(schema) for kind, schema in crds.items()}
    assert crds["RayJob"]["properties"]["spec"]["properties"]["rayClusterSpec"] == crds["RayCluster"]["properties"]["spec"]


def _edited(manifest: Manifest, path: str, value: Any) -> Manifest:
    """A copy with `value` at a path of keys and indices."""
    changed = copy.deepcopy(manifest)
    *parents, last = [int(key) if key.isdigit() else key for key in path.split("/")]
    place: Any = changed
    for key in parents:
        place = place[key]
    place[last] = value
    return changed


MISTAKES = [
    ("Namespace", "metadata/label", {}),
    ("NetworkPolicy", "spec/policyTypes", "Egress"),
    ("NetworkPolicy", "spec/podSelectors", {}),
    ("PodDisruptionBudget", "spec/selector", "heads"),
    ("ResourceQuota", "spec/hards", {}),
    ("RayJob", "spec/entryPoint", "python"),
    ("RayJob", "spec/backoffLimit", "3"),
    ("RayJob", "spec/rayClusterSpec/authOptions/mode", "password"),
    ("RayJob", "spec/rayClusterSpec/workerGroupSpecs/0/idleTimeout", 60),
    ("RayJob", "spec/rayClusterSpec/headGroupSpec/template/spec/securityContext/runAsNonRoot", "yes"),
    ("RayJob", "spec/rayClusterSpec/workerGroupSpecs/0/template/spec/containers/0/resource", {}),
    ("RayJob", "spec/submitterPodTemplate/spec/nodeSelectors", {}),
    ("ResourceFlavor", "spec/nodeLabel", {}),
    ("ClusterQueue", "spec/cohort", "headrace"),
    ("ClusterQueue", "spec/resourceGroups/0/flavors/0/resources/0/nominalQuota", None),
    ("LocalQueue", "spec/clusterQueue", 1),
]


@pytest.mark.parametrize(("kind", "path", "value"), MISTAKES, ids=lambda value: str(value)[:60])
def test_a_mistake_in_any_kind_is_found(kind: str, path: str, value: Any) -> None:
    manifest = next(found for _, found in of_kind(built("multi-tenant"), kind))
    assert schemas.problems(manifest) == []
    assert schemas.problems(_edited(manifest, path, value)) != []


@pytest.mark.parametrize("name", SETS)
def test_clusters_run_the_ray_that_was_tested(name: str) -> None:
    pinned = re.search(r"^ray==(\S+)$", (REPO / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    assert {spec["rayVersion"] for _, spec in cluster_specs(built(name))} == {pinned[1]}


@pytest.mark.parametrize("name", ["base", "small", "spot"])
def test_ray_scales_every_pool_from_nothing(name: str) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    for path, spec in cluster_specs(built(name)):
        assert spec["enableInTreeAutoscaling"] and spec["autoscalerOptions"]["version"] == "v2", path
        cluster = {"metadata": {"name": "headrace", "namespace": "headrace"}, "spec": copy.deepcopy(spec)}
        types = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
        head, pools = types.pop("headgroup"), types
        assert head["resources"]["CPU"] == 0 and not head["resources"].get("GPU")
        assert set(pools) == ({"cpu", "gpu"} if name == "small" else {"cpu", "gpu", "gpu-spot"})
        for pool, found in pools.items():
            assert found["min_workers"] == 0 < found["max_workers"], pool
            assert 60 <= found["idle_timeout_s"] <= 1800, pool
            assert ("GPU" in found["resources"]) == pool.startswith("gpu"), pool
        if "gpu-spot" in pools:
            spot_first = pools["gpu-spot"]["priority"] > pools["gpu"]["priority"]
            assert spot_first == (name == "spot")
            assert pools["gpu-spot"]["labels"] == {"ray.io/market-type": "spot"}


@pytest.mark.parametrize("name", SETS)
def test_pods_go_where_they_belong(name: str) -> None:
    """GPU nodes are for GPU pods; only pods of the spot pool tolerate spot nodes: never a head."""
    for pod in pods(built(name)):
        tolerated = {(toleration["key"], toleration.get("value")) for toleration in pod.spec.get("tolerations", [])}
        gpus = any("nvidia.com/gpu" in container["resources"]["limits"] for container in pod.spec["containers"])
        spot = pod.spec.get("nodeSelector") == {"headrace-pool": "gpu-spot"}
        assert (("nvidia.com/gpu", None) in tolerated) == gpus, pod
        assert (("headrace-pool", "gpu-spot") in tolerated) == spot, pod
        assert gpus or not spot, pod


@pytest.mark.parametrize("name", SETS)
def test_what_ray_writes_to_is_writable_on_a_read_only_root(name: str) -> None:
    for part in containers(built(name)):
        mounted = {mount["mountPath"]: mount["name"] for mount in part.spec["volumeMounts"] if not mount.get("readOnly")}
        volumes = {volume["name"]: volume for volume in part.pod["volumes"]}
        needed = {"autoscaler": {"/tmp"}, "submitter": {"/tmp", "/home/headrace"}}.get(part.role, {"/tmp", "/home/headrace", "/dev/shm"})
        assert needed <= set(mounted), part
        assert all("emptyDir" in volumes[mounted[path]] for path in needed), part
        if "/dev/shm" in needed:  # the object store: in memory, and inside the container's limit
            assert volumes[mounted["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
            shm, limit = volumes[mounted["/dev/shm"]]["emptyDir"]["sizeLimit"], part.spec["resources"]["limits"]["memory"]
            assert int(shm.removesuffix("Gi")) <= 0.4 * int(limit.removesuffix("Gi")), part


@pytest.mark.parametrize("name", SETS)
def test_jobs_run_what_their_set_carries(name: str, tmp_path: Path) -> None:
    """The command of every RayJob, up to the point where it would look for a cluster."""
    manifests = built(name)
    for _, job in of_kind(manifests, "RayJob"):
        config = next(
            found["data"]
            for _, found in of_kind(manifests, "ConfigMap")
            if found["metadata"]["name"] == "runs" and found["metadata"]["namespace"] == job["metadata"]["namespace"]
        )
        for file, text in config.items():
            (tmp_path / file).write_text(text)
        python, module_flag, module, *options = shlex.split(job["spec"]["entrypoint"])
        assert (python, module_flag) == ("python", "-m")
        assert (REPO / f"{module.replace('.', '/')}.py").is_file()
        assert options[0] == "--config" and options[1].startswith("/etc/headrace/")
        path, settings = str(tmp_path / Path(options[1]).name), options[2:]
        assert settings[::2] == ["--set"] * (len(settings) // 2)
        if module == "jobs.sweep":
            run = load_sweep(path, settings[1::2]).base
        else:
            run = load_run(path, settings[1::2])
        storage = run.run.storage
        assert storage.startswith("s3://") or storage.startswith("/data/"), "kept where it outlives the cluster"
        mounts = {
            mount["mountPath"] for part in containers(manifests) if part.role in ("head", "worker") for mount in part.spec["volumeMounts"]
        }
        assert storage.startswith("s3://") or "/data" in mounts


def _quantity(value: str | int) -> float:
    """In cores, GiB or pieces."""
    text = str(value)
    return float(text.removesuffix("Gi")) if text.endswith("Gi") else float(text[:-1]) / 1000 if text.endswith("m") else float(text)


def test_every_gang_fits_its_queue_and_every_queue_its_namespace() -> None:
    """A gang above its queue's quota would wait for ever, and pods above the namespace's would be refused after admission."""
    manifests = built("multi-tenant")
    flavors = {found["metadata"]["name"]: found["spec"]["nodeLabels"] for _, found in of_kind(manifests, "ResourceFlavor")}
    for _, queue in of_kind(manifests, "ClusterQueue"):
        (group,) = queue["spec"]["resourceGroups"]
        assert [flavor["name"] for flavor in group["flavors"]] == list(flavors)
        own: dict[str, dict[str, float]] = {}
        most = dict.fromkeys(group["coveredResources"], 0.0)
        for flavor in group["flavors"]:
            assert [resource["name"] for resource in flavor["resources"]] == group["coveredResources"]
            own[flavor["name"]] = {resource["name"]: _quantity(resource["nominalQuota"]) for resource in flavor["resources"]}
            for resource in flavor["resources"]:
                # Without a limit it may borrow all that the other team has, which has as much as this one.
                lent = resource.get("borrowingLimit", resource["nominalQuota"])
                most[resource["name"]] += _quantity(resource["nominalQuota"]) + _quantity(lent)
        team = queue["metadata"]["name"]
        (quota,) = (found["spec"]["hard"] for _, found in of_kind(manifests, "ResourceQuota") if found["metadata"]["namespace"] == team)
        assert all(_quantity(quota[f"requests.{name}"]) >= amount for name, amount in most.items())
        for index, job in of_kind(manifests, "RayJob"):
            if job["metadata"]["namespace"] == team:
                needed = _needed(manifests, index)
                assert all(needed["cpu"][name] <= own["cpu"][name] for name in needed["cpu"])
                assert all(needed["gpu"][name] <= own["gpu"][name] for name in needed["gpu"])


def _needed(manifests: list[Manifest], index: int) -> dict[str, dict[str, float]]:
    """What the gang of a RayJob requests, on CPU nodes and on GPU nodes."""
    sums: dict[str, dict[str, float]] = {kind: {"cpu": 0.0, "memory": 0.0, "nvidia.com/gpu": 0.0} for kind in ("cpu", "gpu")}
    groups = manifests[index]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    for pod in pods(manifests):
        if pod.path[0] != index:
            continue
        group = groups[int(pod.path[4])] if pod.role == "worker" else {"replicas": 1}
        if pod.role == "worker":
            assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] > 0
        (container,) = pod.spec["containers"]
        requests = container["resources"]["requests"]
        for name, amount in requests.items():
            sums["gpu" if "nvidia.com/gpu" in requests else "cpu"][name] += group["replicas"] * _quantity(amount)
    return sums


def test_images_are_named_once() -> None:
    named = [path for path in KUBERAY.rglob("*.yaml") if "registry.example.com" in path.read_text()]
    assert named == [KUBERAY / "base" / "kustomization.yaml"]


def test_the_readme_names_files_that_are_there() -> None:
    text = (KUBERAY / "README.md").read_text()
    paths = re.findall(r"(?:infra|tests|jobs)/[\w./-]*\w|\bbase/[\w./-]*\w", text)
    assert len(paths) > 8
    assert [path for path in paths if not (REPO / path).exists() and not (KUBERAY / path).exists()] == []
