"""What the API server would say to a manifest, offline.

Kubernetes' own kinds by the schemas of the package kubernetes-validate, which are made from Kubernetes' OpenAPI. KubeRay's by its
CustomResourceDefinitions where they are at hand (`../shared/kuberay-crds`), and by `kuberay_fields.json`, what those say of KubeRay's own
fields, everywhere: their pod templates are Kubernetes' and are checked as such. The rules in CEL that some fields have are not evaluated.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.infra.kuberay_build import REPO, Manifest, cluster_specs

KUBERNETES = "1.33"
CRDS = REPO.parent / "shared" / "kuberay-crds"
COPY = Path(__file__).with_name("kuberay_fields.json")

# Kubernetes' types, as fields of KubeRay's: the copy leaves them to Kubernetes' own schemas.
_KUBERNETES_FIELDS = {"template", "submitterPodTemplate", "headService", "env", "envFrom", "networkPolicy", "gcsFaultToleranceOptions"}
_LEFT_OUT = _KUBERNETES_FIELDS | {"status", "rayClusterSpec"}  # a RayJob's rayClusterSpec is a RayCluster's spec


def problems(manifest: Manifest) -> list[str]:
    """What is wrong with one object, by the schema of its kind; a kind that nothing here knows is wrong too."""
    group = manifest["apiVersion"].partition("/")[0]
    if group == "ray.io":
        found = [*_by(copied()[manifest["kind"]], manifest), *pod_problems(manifest)]
        if "rayClusterSpec" in manifest["spec"]:
            found += _by(copied()["RayCluster"]["properties"]["spec"], manifest["spec"]["rayClusterSpec"])
    elif group == "kueue.x-k8s.io":
        found = list(_by(KUEUE[manifest["kind"]], manifest))
    else:
        found = list(_kubernetes(manifest))
    return [f"{manifest['kind']} {manifest['metadata']['name']}: {problem}" for problem in found]


def pod_problems(manifest: Manifest) -> Iterator[str]:
    """Of the pod templates inside a RayCluster or RayJob."""
    templates = []
    for _, spec in cluster_specs([manifest]) if manifest["kind"] == "RayCluster" or "rayClusterSpec" in manifest["spec"] else []:
        templates += [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]
    if "submitterPodTemplate" in manifest["spec"]:
        templates.append(manifest["spec"]["submitterPodTemplate"])
    for template in templates:
        yield from _kubernetes({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template})


def _kubernetes(manifest: Manifest) -> Iterator[str]:
    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{'/'.join(map(str, error.absolute_path))}: {error.message[:300]}"
    except kubernetes_validate.SchemaNotFoundError as error:
        yield error.message


def _by(schema: dict[str, Any], manifest: Any) -> Iterator[str]:
    for error in jsonschema.Draft7Validator(schema).iter_errors(manifest):
        yield f"{'/'.join(map(str, error.absolute_path))}: {error.message[:300]}"


@functools.cache
def copied() -> dict[str, dict[str, Any]]:
    return json.loads(COPY.read_text())


@functools.cache
def crd_schemas() -> dict[str, dict[str, Any]]:
    """The whole schemas by kind, from KubeRay's CRDs; skips the test where they are not."""
    if not CRDS.is_dir():
        pytest.skip("KubeRay's CRDs are not in ../shared/kuberay-crds; the project's copy of what they say of its fields is checked")
    found = {}
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for path in sorted(CRDS.glob("ray.io_*.yaml")):
        crd = yaml.load(path.read_text(), Loader=loader)  # noqa: S506 - 2 MB, and both loaders are safe ones
        served = next(version for version in crd["spec"]["versions"] if version["name"] == "v1")
        found[crd["spec"]["names"]["kind"]] = _json_schema(served["schema"]["openAPIV3Schema"])
    return found


def crd_problems(manifest: Manifest) -> list[str]:
    return list(_by(crd_schemas()[manifest["kind"]], manifest))


def own_fields(schema: Any) -> Any:
    """A schema without what Kubernetes' own types are made of."""
    if isinstance(schema, list):
        return [own_fields(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: own_fields(value) for key, value in schema.items() if key != "properties"}
    if "properties" in schema:
        kept["properties"] = {name: {} if name in _LEFT_OUT else own_fields(value) for name, value in schema["properties"].items()}
    return kept


def _json_schema(schema: Any) -> Any:
    """JSON Schema that refuses what the API server refuses or, under `--validate=strict`, warns of: unknown keys.

    A structural schema is OpenAPI: int-or-string and preserved unknown fields are extensions there, and defaults are filled in before
    required fields are looked for.
    """
    if isinstance(schema, list):
        return [_json_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out = {
        key: {name: _json_schema(item) for name, item in value.items()} if key == "properties" else _json_schema(value)
        for key, value in schema.items()
        if key not in ("description", "example", "nullable", "format") and not key.startswith("x-kubernetes")
    }
    if schema.get("x-kubernetes-int-or-string"):
        out.pop("anyOf", None)
        out["type"] = ["integer", "string"]
    if "required" in out:
        out["required"] = [name for name in out["required"] if "default" not in schema["properties"].get(name, {})]
    open_ended = "additionalProperties" in out or schema.get("x-kubernetes-preserve-unknown-fields")
    if out.get("type") == "object" and "properties" in out and not open_ended:
        out["additionalProperties"] = False
    if "kind" in out.get("properties", {}) and "metadata" in out["properties"] and "spec" in out["properties"]:
        out["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own
    return out


def _object(required: str = "", **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required.split(), "additionalProperties": False}


def _kind(version: str, spec: dict[str, Any]) -> dict[str, Any]:
    return _object(
        "apiVersion kind metadata spec",
        apiVersion={"const": version},
        kind={},
        metadata={"type": "object", "required": ["name"]},
        spec=spec,
    )


_V1BETA2 = "kueue.x-k8s.io/v1beta2"
_NAME = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$", "maxLength": 253}
_LABELS = {"type": "object", "additionalProperties": {"type": "string"}}
_QUANTITY = {"type": ["integer", "string"]}
_RESOURCE = _object("name nominalQuota", name={"type": "string"}, nominalQuota=_QUANTITY, borrowingLimit=_QUANTITY, lendingLimit=_QUANTITY)
_FLAVOR = _object("name resources", name=_NAME, resources={"type": "array", "minItems": 1, "maxItems": 64, "items": _RESOURCE})

# Kueue's CRDs are not at hand. The fields that we use, with their rules, after Kueue's Go types of v1beta2.
KUEUE: dict[str, dict[str, Any]] = {
    "ResourceFlavor": _kind(
        _V1BETA2,
        _object(
            nodeLabels=_LABELS | {"maxProperties": 8},
            tolerations={
                "type": "array",
                "maxItems": 8,
                "items": _object(
                    key={"type": "string"},
                    operator={"enum": ["Equal", "Exists"]},
                    value={"type": "string"},
                    effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
                ),
            },
        ),
    ),
    "LocalQueue": _kind(_V1BETA2, _object(clusterQueue=_NAME, stopPolicy={"enum": ["None", "Hold", "HoldAndDrain"]})),
    "ClusterQueue": _kind(
        _V1BETA2,
        _object(
            cohortName=_NAME,
            namespaceSelector=_object(matchLabels=_LABELS),
            queueingStrategy={"enum": ["StrictFIFO", "BestEffortFIFO"]},
            flavorFungibility=_object(
                whenCanBorrow={"enum": ["MayStopSearch", "TryNextFlavor"]}, whenCanPreempt={"enum": ["MayStopSearch", "TryNextFlavor"]}
            ),
            preemption=_object(
                reclaimWithinCohort={"enum": ["Never", "LowerPriority", "Any"]},
                withinClusterQueue={"enum": ["Never", "LowerPriority", "LowerOrNewerEqualPriority"]},
            ),
            resourceGroups={
                "type": "array",
                "maxItems": 16,
                "items": _object(
                    "coveredResources flavors",
                    coveredResources={"type": "array", "minItems": 1, "maxItems": 64, "items": {"type": "string"}},
                    flavors={"type": "array", "minItems": 1, "maxItems": 64, "items": _FLAVOR},
                ),
            },
        ),
    ),
}
