"""Every secure default of infra/ray_up holds in what ships, and is noticed where it is taken away."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.infra.ray_up_policies import EVERYWHERE, POLICIES, Policy

RAY_UP = Path(__file__).parents[2] / "infra" / "ray_up"

PAIRS = [pytest.param(policy, file, id=f"{file}-{policy.name}") for policy in POLICIES for file in policy.files]


def load(file: str) -> dict[str, Any]:
    """The file without YAML's anchors: an edit in one node type is in no other."""
    return json.loads(json.dumps(yaml.safe_load((RAY_UP / f"{file}.yaml").read_text())))


def test_every_file_has_its_policies():
    assert {path.stem for path in RAY_UP.glob("*.yaml")} == set(EVERYWHERE) == {file for policy in POLICIES for file in policy.files}


@pytest.mark.parametrize(("policy", "file"), PAIRS)
def test_what_ships_is_secure(policy: Policy, file: str) -> None:
    assert list(policy.check(load(file))) == []


@pytest.mark.parametrize(("policy", "file"), PAIRS)
def test_each_default_is_missed_where_it_is_removed(policy: Policy, file: str) -> None:
    shipped = load(file)
    removals = policy.removals(copy.deepcopy(shipped))
    assert removals
    for told, edit in removals:
        config = copy.deepcopy(shipped)
        edit(config)
        assert config != shipped, told
        assert list(policy.check(config)), f"nobody notices: {told}"


def statements(file: str) -> list[dict[str, Any]]:
    return json.loads((RAY_UP / file).read_text())["Statement"]


def too_much(head: list[dict[str, Any]], worker: list[dict[str, Any]]) -> Iterator[str]:
    """What the roles of AWS's nodes may do beyond what they need."""
    for role, all_statements in (("head", head), ("worker", worker)):
        for one in all_statements:
            actions = [one["Action"]] if isinstance(one["Action"], str) else one["Action"]
            resources = [one["Resource"]] if isinstance(one["Resource"], str) else one["Resource"]
            condition = json.dumps(one.get("Condition", {}))
            if one["Effect"] != "Allow" or any("*" in action for action in actions):
                yield f"{role}: {one['Sid']} has to name its actions"
            if "*" in resources and actions != ["ec2:DescribeInstances"]:
                yield f"{role}: {one['Sid']} is about everything"
            if "ec2:TerminateInstances" in actions and '"ec2:ResourceTag/ray-cluster-name": "headrace"' not in condition:
                yield f"{role}: may end nodes that are not this cluster's"
            if "iam:PassRole" in actions and (
                resources != ["arn:aws:iam::*:role/headrace-worker"] or "iam:PassedToService" not in condition
            ):
                yield f"{role}: may give nodes another role than the workers'"
            if (
                "ec2:RunInstances" in actions
                and any(":instance/" in place for place in resources)
                and (
                    '"aws:RequestTag/ray-cluster-name": "headrace"' not in condition
                    or '"ec2:MetadataHttpTokens": "required"' not in condition
                )
            ):
                yield f"{role}: may start nodes that are not this cluster's, or without IMDSv2"
            if (
                "ec2:RunInstances" in actions
                and any(":volume/" in place for place in resources)
                and '"ec2:Encrypted": "true"' not in condition
            ):
                yield f"{role}: may make disks that are not encrypted"
            if role == "worker" and not all(action.startswith("s3:") for action in actions):
                yield f"{role}: {one['Sid']} is more than the run's bucket"


# (role, statement, key, value)
WIDER = [
    ("head", "StartNodesOfThisClusterOnly", "Condition", {}),
    ("head", "StartNodesOfThisClusterOnly", "Condition", {"StringEquals": {"aws:RequestTag/ray-cluster-name": "headrace"}}),
    ("head", "WithEncryptedDisksOnly", "Condition", {}),
    ("head", "OutOfTheseParts", "Resource", "*"),
    ("head", "TagAndEndNodesOfThisClusterOnly", "Condition", {}),
    ("head", "GiveThemTheWorkersRoleOnly", "Resource", "arn:aws:iam::*:role/*"),
    ("head", "GiveThemTheWorkersRoleOnly", "Condition", {}),
    ("head", "See", "Action", "ec2:*"),
    ("worker", "ReadAndWriteRuns", "Action", "s3:*"),
    ("worker", "ReadAndWriteRuns", "Resource", "*"),
    ("worker", "ReadAndWriteRuns", "Action", "ec2:RunInstances"),
]


def test_the_roles_of_aws_may_do_what_they_need_and_no_more():
    assert list(too_much(statements("aws_head_policy.json"), statements("aws_worker_policy.json"))) == []


@pytest.mark.parametrize(("role", "sid", "key", "value"), WIDER)
def test_a_wider_role_is_noticed(role: str, sid: str, key: str, value: Any) -> None:
    roles = {name: statements(f"aws_{name}_policy.json") for name in ("head", "worker")}
    (statement,) = [statement for statement in roles[role] if statement["Sid"] == sid]
    assert statement[key] != value
    statement[key] = value
    assert list(too_much(roles["head"], roles["worker"]))
