"""The secure defaults of infra/kuberay: each a check of a set of manifests, and the ways to take it away again.

A check returns what is wrong, in words; none is wrong for what ships. A removal is one edit of the manifests, after which the check of
the same name has to find something: so no check is empty.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network, ip_network
from pathlib import PurePosixPath
from typing import Any

from tests.infra.kuberay_build import Manifest, cluster_specs

Path = tuple[str | int, ...]
DELETE = object()  # in place of a value: the key goes
APPEND = "+"  # as the last key: the value is added to the list there


@dataclass(frozen=True)
class Removal:
    path: Path
    value: Any = DELETE

    def __str__(self) -> str:
        return "/".join(map(str, self.path)) + (" removed" if self.value is DELETE else f" = {self.value!r}")

    def applied(self, manifests: list[Manifest]) -> list[Manifest]:
        """A copy of `manifests` with the edit made; what lies beside its path is shared with the original."""
        changed = list(manifests)
        *parents, last = self.path
        place: Any = changed
        for key in parents:
            place[key] = copy.copy(place[key])
            place = place[key]
        if last == APPEND:
            place.append(self.value)
        elif self.value is DELETE:
            del place[last]
        else:
            place[last] = self.value
        return changed


@dataclass(frozen=True)
class Part:
    """A pod or a container, where it stands and what it is: head, worker, submitter, autoscaler."""

    path: Path
    spec: dict[str, Any]
    role: str
    pod: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.role} at {'/'.join(map(str, self.path))}"


Check = Callable[[list[Manifest]], Iterator[str]]
Removals = Callable[[list[Manifest]], Iterator[Removal]]


@dataclass(frozen=True)
class Policy:
    name: str
    check: Check
    removals: Removals


POLICIES: list[Policy] = []


def policy(removals: Removals) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        POLICIES.append(Policy(check.__name__, check, removals))
        return check

    return register


def pods(manifests: list[Manifest]) -> Iterator[Part]:
    for path, spec in cluster_specs(manifests):
        head = spec["headGroupSpec"]["template"]["spec"]
        yield Part((*path, "headGroupSpec", "template", "spec"), head, "head", head)
        for index, group in enumerate(spec["workerGroupSpecs"]):
            worker = group["template"]["spec"]
            yield Part((*path, "workerGroupSpecs", index, "template", "spec"), worker, "worker", worker)
    for index, manifest in enumerate(manifests):
        if manifest["kind"] == "RayJob":
            submitter = manifest["spec"]["submitterPodTemplate"]["spec"]
            yield Part((index, "spec", "submitterPodTemplate", "spec"), submitter, "submitter", submitter)


def containers(manifests: list[Manifest]) -> Iterator[Part]:
    """Every container; the autoscaler's, which KubeRay adds to the head's pod, as autoscalerOptions describe it."""
    for pod in pods(manifests):
        for kind in ("initContainers", "containers"):
            for index, container in enumerate(pod.spec.get(kind, [])):
                yield Part((*pod.path, kind, index), container, pod.role, pod.spec)
    for path, spec in cluster_specs(manifests):
        head = spec["headGroupSpec"]["template"]["spec"]
        yield Part((*path, "autoscalerOptions"), spec["autoscalerOptions"], "autoscaler", head)


def of_kind(manifests: list[Manifest], *kinds: str) -> Iterator[tuple[int, Manifest]]:
    return ((index, manifest) for index, manifest in enumerate(manifests) if manifest["kind"] in kinds)


def namespaces(manifests: list[Manifest]) -> set[str]:
    """Those in which pods run."""
    return {manifest["metadata"]["namespace"] for _, manifest in of_kind(manifests, "RayCluster", "RayJob")}


def _get(place: Any, *keys: str) -> Any:
    for key in keys:
        place = place.get(key) if isinstance(place, dict) else None
    return place


def _each(parts: Callable[[list[Manifest]], Iterator[Part]], *keys: str, weaker: Any = DELETE) -> Removals:
    """The same key taken from every pod or container, and with `weaker`, that value in its place."""

    def removals(manifests: list[Manifest]) -> Iterator[Removal]:
        for part in parts(manifests):
            yield Removal((*part.path, *keys))
            if weaker is not DELETE:
                yield Removal((*part.path, *keys), weaker)

    return removals


def _clusters(*keys: str, weaker: Any) -> Removals:
    def removals(manifests: list[Manifest]) -> Iterator[Removal]:
        for path, _ in cluster_specs(manifests):
            yield Removal((*path, *keys))
            yield Removal((*path, *keys), weaker)

    return removals


# --- who gets in ---


def _no_token(manifests: list[Manifest]) -> Iterator[Removal]:
    yield from _clusters("authOptions", "mode", weaker="disabled")(manifests)
    for part in containers(manifests):
        if part.role in ("head", "worker"):
            yield Removal((*part.path, "env", APPEND), {"name": "RAY_AUTH_MODE", "value": "disabled"})


@policy(_no_token)
def token_auth(manifests: list[Manifest]) -> Iterator[str]:
    for path, spec in cluster_specs(manifests):
        if _get(spec, "authOptions", "mode") != "token":
            yield f"the cluster at {path} lets everyone in"
    for part in containers(manifests):
        if any(entry["name"].startswith("RAY_AUTH_") for entry in part.spec.get("env", [])):
            yield f"{part} has settings of its own for Ray's authentication: KubeRay leaves those as they are"


def _exposed(manifests: list[Manifest]) -> Iterator[Removal]:
    yield from _clusters("headGroupSpec", "serviceType", weaker="LoadBalancer")(manifests)
    for path, _ in cluster_specs(manifests):
        yield Removal((*path, "headGroupSpec", "enableIngress"), True)
        yield Removal((*path, "headGroupSpec", "headService"), {"spec": {"type": "LoadBalancer"}})
    yield Removal((APPEND,), {"kind": "Service", "metadata": {"name": "dashboard"}, "spec": {"externalIPs": ["192.0.2.1"]}})
    yield Removal((APPEND,), {"kind": "Ingress", "metadata": {"name": "dashboard"}, "spec": {}})
    yield Removal((APPEND,), {"kind": "Service", "metadata": {"name": "dashboard"}, "spec": {"type": "NodePort"}})


@policy(_exposed)
def inside_the_cluster_only(manifests: list[Manifest]) -> Iterator[str]:
    for path, spec in cluster_specs(manifests):
        if spec["headGroupSpec"].get("serviceType") != "ClusterIP":
            yield f"the head's service at {path} is not ClusterIP"
        if "headService" in spec["headGroupSpec"]:
            yield f"the head at {path} has a service that is not KubeRay's"
        if spec["headGroupSpec"].get("enableIngress"):
            yield f"the head at {path} has an Ingress"
    for _, manifest in of_kind(manifests, "Ingress", "Service", "HTTPRoute", "Route"):
        inside = manifest["kind"] == "Service" and manifest["spec"].get("type", "ClusterIP") == "ClusterIP"
        if not inside or manifest["spec"].get("externalIPs"):
            yield f"{manifest['kind']} {manifest['metadata']['name']} opens the cluster to the outside"


# --- what a pod may do on its node ---


def _weaker_namespaces(manifests: list[Manifest]) -> Iterator[Removal]:
    for index, _ in of_kind(manifests, "Namespace"):
        yield Removal((index,))
        yield Removal((index, "metadata", "labels", "pod-security.kubernetes.io/enforce"))
        yield Removal((index, "metadata", "labels", "pod-security.kubernetes.io/enforce"), "baseline")


@policy(_weaker_namespaces)
def restricted_namespaces(manifests: list[Manifest]) -> Iterator[str]:
    levels = {
        manifest["metadata"]["name"]: _get(manifest, "metadata", "labels", "pod-security.kubernetes.io/enforce")
        for _, manifest in of_kind(manifests, "Namespace")
    }
    for name in namespaces(manifests):
        if levels.get(name) != "restricted":
            yield f"namespace {name} admits pods below the standard `restricted`"


@policy(_each(pods, "securityContext", "runAsNonRoot", weaker=False))
def not_root(manifests: list[Manifest]) -> Iterator[str]:
    yield from (f"{pod} may run as root" for pod in pods(manifests) if _get(pod.spec, "securityContext", "runAsNonRoot") is not True)


@policy(_each(pods, "securityContext", "runAsUser", weaker=0))
def numeric_user(manifests: list[Manifest]) -> Iterator[str]:
    yield from (f"{pod} has no user number" for pod in pods(manifests) if not _get(pod.spec, "securityContext", "runAsUser"))


@policy(_each(pods, "securityContext", "seccompProfile", "type", weaker="Unconfined"))
def seccomp(manifests: list[Manifest]) -> Iterator[str]:
    for pod in pods(manifests):
        if _get(pod.spec, "securityContext", "seccompProfile", "type") != "RuntimeDefault":
            yield f"{pod} may make any system call"


@policy(_each(containers, "securityContext", "allowPrivilegeEscalation", weaker=True))
def no_privilege_escalation(manifests: list[Manifest]) -> Iterator[str]:
    for part in containers(manifests):
        if _get(part.spec, "securityContext", "allowPrivilegeEscalation") is not False:
            yield f"{part} may gain privileges"


@policy(_each(containers, "securityContext", "capabilities", "drop", weaker=["NET_RAW"]))
def no_capabilities(manifests: list[Manifest]) -> Iterator[str]:
    for part in containers(manifests):
        capabilities = _get(part.spec, "securityContext", "capabilities") or {}
        if capabilities.get("drop") != ["ALL"] or capabilities.get("add"):
            yield f"{part} keeps capabilities"


@policy(_each(containers, "securityContext", "readOnlyRootFilesystem", weaker=False))
def read_only_root(manifests: list[Manifest]) -> Iterator[str]:
    for part in containers(manifests):
        if _get(part.spec, "securityContext", "readOnlyRootFilesystem") is not True:
            yield f"{part} may change its image's files"


# Of a container, in place of its pod's.
OVERRIDES = {"privileged": True, "runAsUser": 0, "runAsNonRoot": False, "seccompProfile": {"type": "Unconfined"}, "procMount": "Unmasked"}


def _overridden(manifests: list[Manifest]) -> Iterator[Removal]:
    for part in containers(manifests):
        for key, value in OVERRIDES.items():
            yield Removal((*part.path, "securityContext", key), value)
    for pod in pods(manifests):
        yield Removal((*pod.path, "initContainers"), [{"name": "first", "securityContext": {"privileged": True}}])


@policy(_overridden)
def containers_as_their_pods(manifests: list[Manifest]) -> Iterator[str]:
    for part in containers(manifests):
        if mine := sorted(OVERRIDES.keys() & (part.spec.get("securityContext") or {})):
            yield f"{part} has its own {', '.join(mine)}"


RUN_PODS = ("Pod", "DaemonSet", "Deployment", "StatefulSet", "ReplicaSet", "Job", "CronJob")


def _more_pods(manifests: list[Manifest]) -> Iterator[Removal]:
    for kind in RUN_PODS:
        yield Removal((APPEND,), {"kind": kind, "metadata": {"name": "more"}, "spec": {}})


@policy(_more_pods)
def pods_of_ray_alone(manifests: list[Manifest]) -> Iterator[str]:
    for _, found in of_kind(manifests, *RUN_PODS):
        yield f"{found['kind']} {found['metadata']['name']} runs pods that nothing here checks"


def _host(manifests: list[Manifest]) -> Iterator[Removal]:
    for pod in pods(manifests):
        for key in ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"):
            yield Removal((*pod.path, key), True)
        yield Removal((*pod.path, "volumes", APPEND), {"name": "host", "hostPath": {"path": "/"}})


@policy(_host)
def nothing_of_the_host(manifests: list[Manifest]) -> Iterator[str]:
    for pod in pods(manifests):
        if any(pod.spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace")):
            yield f"{pod} shares a namespace with its host, or its containers share their processes"
        if any("hostPath" in volume for volume in pod.spec["volumes"]):
            yield f"{pod} mounts a folder of its host"


def _unbounded(manifests: list[Manifest]) -> Iterator[Removal]:
    for part in containers(manifests):
        yield Removal((*part.path, "resources", "limits", "cpu"))
        yield Removal((*part.path, "resources", "limits", "memory"))
    for pod in pods(manifests):
        for index, volume in enumerate(pod.spec["volumes"]):
            if "emptyDir" in volume:
                yield Removal((*pod.path, "volumes", index, "emptyDir", "sizeLimit"))


@policy(_unbounded)
def bounded(manifests: list[Manifest]) -> Iterator[str]:
    for part in containers(manifests):
        limits = _get(part.spec, "resources", "limits") or {}
        if not {"cpu", "memory"} <= set(limits) or limits["memory"] != _get(part.spec, "resources", "requests", "memory"):
            yield f"{part} may take its neighbours' memory or CPU"
    for pod in pods(manifests):
        for volume in pod.spec["volumes"]:
            if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
                yield f"{pod} may fill its node's disk through {volume['name']}"


# --- credentials ---


def _tokens(manifests: list[Manifest]) -> Iterator[Removal]:
    yield from _each(pods, "automountServiceAccountToken", weaker=True)(manifests)
    for index, _ in of_kind(manifests, "ServiceAccount"):
        yield Removal((index, "automountServiceAccountToken"))
    mount = {"name": "kubernetes-token", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"}
    for part in containers(manifests):
        if part.role == "head":
            yield Removal((*part.path, "volumeMounts", APPEND), mount)


@policy(_tokens)
def kubernetes_token_for_the_autoscaler_alone(manifests: list[Manifest]) -> Iterator[str]:
    for pod in pods(manifests):
        if pod.spec.get("automountServiceAccountToken") is not False:
            yield f"{pod} gets a token of Kubernetes"
    for _, account in of_kind(manifests, "ServiceAccount"):
        if account.get("automountServiceAccountToken") is not False:
            yield f"pods of account {account['metadata']['name']} get a token of Kubernetes"
    for part in containers(manifests):
        tokens = {volume["name"] for volume in part.pod["volumes"] if None in _audiences(volume)}
        if part.role != "autoscaler" and tokens & {mount["name"] for mount in part.spec["volumeMounts"]}:
            yield f"{part} mounts a token of Kubernetes"


def _audiences(volume: dict[str, Any]) -> list[str | None]:
    """Of the service account's tokens in a volume; None is Kubernetes itself."""
    sources = _get(volume, "projected", "sources") or []
    return [source["serviceAccountToken"].get("audience") for source in sources if "serviceAccountToken" in source]


def _rights(manifests: list[Manifest]) -> Iterator[Removal]:
    yield from _each(pods, "serviceAccountName", weaker="default")(manifests)
    for pod in pods(manifests):
        if pod.role != "head":
            yield Removal((*pod.path, "serviceAccountName"), "headrace-head")
    for kind in ("RoleBinding", "ClusterRoleBinding"):
        yield Removal((APPEND,), {"kind": kind, "metadata": {"name": "more"}, "subjects": []})
    for index, account in of_kind(manifests, "ServiceAccount"):
        if account["metadata"]["name"] == "headrace":
            yield Removal((index,))


@policy(_rights)
def accounts_without_rights(manifests: list[Manifest]) -> Iterator[str]:
    there = {(account["metadata"]["namespace"], account["metadata"]["name"]) for _, account in of_kind(manifests, "ServiceAccount")}
    for pod in pods(manifests):
        name, namespace = pod.spec.get("serviceAccountName"), manifests[int(pod.path[0])]["metadata"]["namespace"]
        if name != ("headrace-head" if pod.role == "head" else "headrace") or (namespace, name) not in there:
            yield f"{pod} runs as account {name}, whose rights are not ours to know, or are the autoscaler's"
    for _, binding in of_kind(manifests, "RoleBinding", "ClusterRoleBinding"):
        yield f"{binding['kind']} {binding['metadata']['name']} gives rights"


def _no_identity(manifests: list[Manifest]) -> Iterator[Removal]:
    for part in containers(manifests):
        if part.role in ("head", "worker"):
            yield Removal((*part.path, "envFrom"))
            for index, mount in enumerate(part.spec["volumeMounts"]):
                if mount["name"] == "s3-token":
                    yield Removal((*part.path, "volumeMounts", index))
    for pod in pods(manifests):
        for index, volume in enumerate(pod.spec["volumes"]):
            if volume["name"] == "s3-token":
                token = (*pod.path, "volumes", index, "projected", "sources", 0, "serviceAccountToken")
                yield Removal((*token, "audience"))
                yield Removal((*token, "expirationSeconds"), 86400 * 30)
    for index, config in of_kind(manifests, "ConfigMap"):
        if config["metadata"]["name"] == "storage":
            yield Removal((index, "data", "AWS_ROLE_ARN"))
            yield Removal((index, "data", "AWS_WEB_IDENTITY_TOKEN_FILE"))


@policy(_no_identity)
def s3_by_web_identity(manifests: list[Manifest]) -> Iterator[str]:
    configs = {
        (config["metadata"]["namespace"], config["metadata"]["name"]): config["data"] for _, config in of_kind(manifests, "ConfigMap")
    }
    for part in containers(manifests):
        if part.role not in ("head", "worker"):
            continue
        namespace = manifests[int(part.path[0])]["metadata"]["namespace"]
        names = [entry["configMapRef"]["name"] for entry in part.spec.get("envFrom", []) if "configMapRef" in entry]
        settings = {key: value for name in names for key, value in configs.get((namespace, name), {}).items()}
        folder = str(PurePosixPath(settings.get("AWS_WEB_IDENTITY_TOKEN_FILE", "/")).parent)
        volumes = {mount["name"] for mount in part.spec["volumeMounts"] if mount["mountPath"] == folder}
        tokens = [volume for volume in part.pod["volumes"] if volume["name"] in volumes]
        if "AWS_ROLE_ARN" not in settings or [_audiences(volume) for volume in tokens] != [["sts.amazonaws.com"]]:
            yield f"{part} has no web identity"
        for volume in tokens:
            if any(source["serviceAccountToken"].get("expirationSeconds", 3600) > 3600 for source in volume["projected"]["sources"]):
                yield f"{part} has a token that is good for more than an hour"


_SECRET = re.compile(r"(SECRET|PASSWORD|PASSWD|ACCESS_KEY|API_KEY|AUTH_TOKEN$|_TOKEN$)", re.IGNORECASE)


def _secrets(manifests: list[Manifest]) -> Iterator[Removal]:
    for part in containers(manifests):
        if part.role in ("head", "worker"):
            yield Removal((*part.path, "env", APPEND), {"name": "AWS_SECRET_ACCESS_KEY", "value": "x"})
    for index, _ in of_kind(manifests, "ConfigMap"):
        yield Removal((index, "data", "WANDB_API_KEY"), "x")
    yield Removal((APPEND,), {"kind": "Secret", "metadata": {"name": "ray"}, "stringData": {"auth_token": "x"}})


@policy(_secrets)
def no_secret_value(manifests: list[Manifest]) -> Iterator[str]:
    for part in containers(manifests):
        for entry in part.spec.get("env", []):
            if _SECRET.search(entry["name"]) and "value" in entry:
                yield f"{part} has {entry['name']} in clear"
    for _, config in of_kind(manifests, "ConfigMap"):
        yield from (f"ConfigMap {config['metadata']['name']} has {key} in clear" for key in config["data"] if _SECRET.search(key))
    for _, secret in of_kind(manifests, "Secret"):
        yield f"Secret {secret['metadata']['name']} stands in a manifest"


# --- the network ---


def _open_network(manifests: list[Manifest]) -> Iterator[Removal]:
    for index, found in of_kind(manifests, "NetworkPolicy"):
        if found["metadata"]["name"] == "default-deny":
            yield Removal((index,))
            yield Removal((index, "spec", "policyTypes"), ["Ingress"])
            yield Removal((index, "spec", "policyTypes"), ["Egress"])
            yield Removal((index, "spec", "podSelector"), {"matchLabels": {"ray.io/is-ray-node": "yes"}})
            yield Removal((index, "spec", "egress"), [{}])


@policy(_open_network)
def denied_by_default(manifests: list[Manifest]) -> Iterator[str]:
    closed = {
        found["metadata"]["namespace"]
        for _, found in of_kind(manifests, "NetworkPolicy")
        if found["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    }
    yield from (f"namespace {name} has no policy that denies all traffic" for name in namespaces(manifests) - closed)


def _wider_flows(manifests: list[Manifest]) -> Iterator[Removal]:
    for index, found in of_kind(manifests, "NetworkPolicy"):
        for direction, peers in (("ingress", "from"), ("egress", "to")):
            for at, rule in enumerate(found["spec"].get(direction, [])):
                path = (index, "spec", direction, at)
                yield Removal((*path, peers))
                if "ports" in rule:
                    yield Removal((*path, "ports"))
                for number, peer in enumerate(rule[peers]):
                    if "except" in peer.get("ipBlock", {}):
                        yield Removal((*path, peers, number, "ipBlock", "except"))
                        yield Removal((*path, peers, number, "ipBlock", "except"), ["10.0.0.0/8"])
                    if {"namespaceSelector", "podSelector"} <= set(peer):
                        yield Removal((*path, peers, number, "namespaceSelector"), {})
                yield Removal((*path, peers, APPEND), {"namespaceSelector": {}})
                for cidr in ("0.0.0.0/0", "128.0.0.0/1", "169.254.169.254/32"):
                    yield Removal((*path, peers, APPEND), {"ipBlock": {"cidr": cidr}})
                if direction == "egress" and "ports" in rule:
                    yield Removal((*path, "ports", APPEND), {"port": 1, "endPort": 65535})


@policy(_wider_flows)
def known_flows_only(manifests: list[Manifest]) -> Iterator[str]:
    for _, found in of_kind(manifests, "NetworkPolicy"):
        name, ours = found["metadata"]["name"], found["spec"]["podSelector"] == _RAY_NODES
        for direction, peers in (("ingress", "from"), ("egress", "to")):
            for rule in found["spec"].get(direction, []):
                ports = {port["port"] for port in rule.get("ports", [])}
                if any("endPort" in port for port in rule.get("ports", [])):
                    yield f"{name}: {direction} on a range of ports"
                if not rule.get(peers):
                    yield f"{name}: {direction} with everyone"
                for peer in rule.get(peers, []):
                    yield from (f"{name}: {direction} {problem}" for problem in _too_wide(peer, ports, ours))


METADATA = IPv4Network("169.254.0.0/16")
DNS_CACHE = IPv4Network("169.254.20.10/32")  # of the node
INSIDE = (METADATA, *map(IPv4Network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")))
_RAY_NODES = {"matchLabels": {"ray.io/is-ray-node": "yes"}}


def _too_wide(peer: dict[str, Any], ports: set[int], ours: bool) -> Iterator[str]:
    if not ports and not (ours and peer == {"podSelector": _RAY_NODES}):
        yield "on every port, and not among this namespace's nodes of Ray"
    if peer.get("namespaceSelector") == {} or peer.get("podSelector") == {}:
        yield "with pods that no label chooses"
    if "ipBlock" in peer:
        block = ip_network(peer["ipBlock"]["cidr"])
        excepted = [each for cidr in peer["ipBlock"].get("except", []) if isinstance(each := ip_network(cidr), IPv4Network)]
        if not block.is_private and ports != {443}:
            yield "with the internet on more than HTTPS"
        if isinstance(block, IPv4Network) and block != DNS_CACHE:
            for closed in INSIDE:
                wide = block.overlaps(closed) and (closed == METADATA or not block.subnet_of(closed))
                if wide and not any(closed.subnet_of(each) for each in excepted):
                    yield f"with {closed}, of private networks or the nodes' metadata service"


# --- nodes that go ---


def _no_budget(manifests: list[Manifest]) -> Iterator[Removal]:
    for index, _ in of_kind(manifests, "PodDisruptionBudget"):
        yield Removal((index,))
        yield Removal((index, "spec", "minAvailable"), 1)
        yield Removal((index, "spec", "selector"), {"matchLabels": {"ray.io/node-type": "worker"}})


@policy(_no_budget)
def heads_are_not_evicted(manifests: list[Manifest]) -> Iterator[str]:
    kept = {
        budget["metadata"]["namespace"]
        for _, budget in of_kind(manifests, "PodDisruptionBudget")
        if budget["spec"]["selector"] == {"matchLabels": {"ray.io/node-type": "head"}} and budget["spec"]["minAvailable"] >= 1000
    }
    yield from (f"heads in {name} may be evicted" for name in namespaces(manifests) - kept)


def _no_drain(manifests: list[Manifest]) -> Iterator[Removal]:
    for part in containers(manifests):
        if part.role == "worker":
            yield Removal((*part.path, "lifecycle"))
            yield Removal((*part.path, "lifecycle", "preStop", "exec", "command"), ["sleep", "20"])
    for pod in pods(manifests):
        if pod.role == "worker":
            yield Removal((*pod.path, "terminationGracePeriodSeconds"), 10)


@policy(_no_drain)
def nodes_are_drained(manifests: list[Manifest]) -> Iterator[str]:
    for part in containers(manifests):
        if part.role == "worker":
            command = _get(part.spec, "lifecycle", "preStop", "exec", "command") or [""]
            if command[0] != "drain-node":
                yield f"{part} goes without telling Ray"
            elif int(command[1]) >= part.pod.get("terminationGracePeriodSeconds", 30):
                yield f"{part} is killed before its drain ends"


# --- images ---


def _loose_images(manifests: list[Manifest]) -> Iterator[Removal]:
    for part in containers(manifests):
        if part.role != "autoscaler":
            yield Removal((*part.path, "image"), "registry.example.com/headrace")
            yield Removal((*part.path, "image"), "registry.example.com/headrace:latest")
            yield Removal((*part.path, "image"), "rayproject/ray:2.60.0")
        else:
            yield Removal((*part.path, "image"), "rayproject/ray:2.60.0")


@policy(_loose_images)
def one_pinned_image(manifests: list[Manifest]) -> Iterator[str]:
    names: set[str] = set()
    for part in containers(manifests):
        if part.role == "autoscaler":  # without one of its own it runs the head's
            if "image" in part.spec:
                yield f"{part} has an image of its own"
            continue
        name, _, tag = part.spec["image"].partition(":")
        names.add(name)
        if not re.fullmatch(r"\d+\.\d+\.\d+-(cpu|cuda)", tag):
            yield f"{part} runs {part.spec['image']}, whose tag is no version of ours"
    if len(names) > 1:
        yield f"images of several origins: {', '.join(sorted(names))}"


# --- costs and teams ---


def _started(manifests: list[Manifest]) -> Iterator[Removal]:
    for index, _ in of_kind(manifests, "RayJob"):
        yield Removal((index, "spec", "suspend"))
        yield Removal((index, "spec", "suspend"), False)
    for index, _ in of_kind(manifests, "LocalQueue"):
        yield Removal((index, "spec", "stopPolicy"))
    for path, spec in cluster_specs(manifests):
        if manifests[int(path[0])]["kind"] == "RayCluster":
            for number, _ in enumerate(spec["workerGroupSpecs"]):
                yield Removal((*path, "workerGroupSpecs", number, "minReplicas"), 1)
                yield Removal((*path, "workerGroupSpecs", number, "maxReplicas"))
                yield Removal((*path, "workerGroupSpecs", number, "idleTimeoutSeconds"))


@policy(_started)
def applying_pays_for_a_head_at_most(manifests: list[Manifest]) -> Iterator[str]:
    """Kueue starts suspended jobs by itself, unless their queue holds them."""
    for _, job in of_kind(manifests, "RayJob"):
        if job["spec"].get("suspend") is not True:
            yield f"RayJob {job['metadata']['name']} starts when it is applied"
    for _, queue in of_kind(manifests, "LocalQueue"):
        if queue["spec"].get("stopPolicy") != "Hold":
            yield f"LocalQueue {queue['metadata']['name']} starts jobs when they are applied"
    for _, cluster in of_kind(manifests, "RayCluster"):
        for group in cluster["spec"]["workerGroupSpecs"]:
            if group.get("minReplicas") or group.get("replicas") or "maxReplicas" not in group or "idleTimeoutSeconds" not in group:
                yield f"pool {group['groupName']} has nodes that nobody uses, or no bound"


def _unqueued(manifests: list[Manifest]) -> Iterator[Removal]:
    if not list(of_kind(manifests, "ClusterQueue")):
        return
    for index, manifest in of_kind(manifests, "RayJob"):
        yield Removal((index, "spec", "suspend"))
        yield Removal((index, "metadata", "labels", "kueue.x-k8s.io/queue-name"))
        yield Removal((index, "spec", "rayClusterSpec", "enableInTreeAutoscaling"), True)
        spec = manifest["spec"]["rayClusterSpec"]
        cluster = {"kind": "RayCluster", "metadata": {"name": "beside", "namespace": manifest["metadata"]["namespace"]}, "spec": spec}
        yield Removal((APPEND,), cluster)
    for index, _ in of_kind(manifests, "LocalQueue", "ResourceQuota", "LimitRange"):
        yield Removal((index,))
    for index, _ in of_kind(manifests, "LocalQueue"):
        yield Removal((index, "spec", "clusterQueue"), "another-team")
    for index, _ in of_kind(manifests, "ClusterQueue"):
        yield Removal((index, "spec", "namespaceSelector"), {})
    for index, _ in of_kind(manifests, "ResourceQuota"):
        yield Removal((index, "spec", "hard", "requests.nvidia.com/gpu"))


@policy(_unqueued)
def teams_share_by_queue(manifests: list[Manifest]) -> Iterator[str]:
    """Holds where there is a ClusterQueue."""
    admits = {
        queue["metadata"]["name"]: _get(queue, "spec", "namespaceSelector", "matchLabels", "kubernetes.io/metadata.name")
        for _, queue in of_kind(manifests, "ClusterQueue")
    }
    if not admits:
        return
    queues = {
        (queue["metadata"]["namespace"], queue["metadata"]["name"]): queue["spec"]["clusterQueue"]
        for _, queue in of_kind(manifests, "LocalQueue")
    }
    for _, job in of_kind(manifests, "RayJob"):
        name, namespace = job["metadata"]["name"], job["metadata"]["namespace"]
        queue = _get(job, "metadata", "labels", "kueue.x-k8s.io/queue-name")
        if admits.get(queues.get((namespace, queue), "")) != namespace:
            yield f"{namespace}/{name} is in no queue of its team's alone"
        if job["spec"].get("suspend") is not True or job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"]:
            yield f"{namespace}/{name} starts before its gang is admitted, or changes its size, which Kueue refuses"
    yield from (f"RayCluster {found['metadata']['name']} is beside the queue" for _, found in of_kind(manifests, "RayCluster"))
    for kind in ("ResourceQuota", "LimitRange"):
        there = {
            found["metadata"]["namespace"]
            for _, found in of_kind(manifests, kind)
            if kind == "LimitRange" or {"requests.cpu", "requests.memory", "requests.nvidia.com/gpu", "pods"} <= set(found["spec"]["hard"])
        }
        yield from (f"namespace {name} has no {kind}, or one with gaps" for name in namespaces(manifests) - there)
