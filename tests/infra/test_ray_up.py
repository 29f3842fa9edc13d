"""infra/ray_up as Ray takes it: its schema, its own preparation, its command line; on AWS what its provider starts, against moto's EC2."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.infra.ray_up_head import FILES, shipped_head
from tests.infra.ray_up_policies import start_options
from tests.infra.test_ray_up_policies import RAY_UP, load

REGION = "us-east-1"


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """With Ray's defaults, and checked by Ray's schema: what `ray up` does before it asks a cloud for anything."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(config)
    validate_config(config)
    return config


@pytest.mark.parametrize("file", FILES)
def test_ray_accepts_the_file(file: str) -> None:
    shipped = load(file)
    config = prepared(shipped)
    for key in ("docker", "setup_commands", "head_start_ray_commands", "worker_start_ray_commands", "initialization_commands"):
        assert config[key] == shipped[key], f"Ray's defaults have changed {key}"
    assert config["head_setup_commands"] == config["worker_setup_commands"] == [], "Ray's defaults install something"


@pytest.mark.parametrize("file", FILES)
def test_ray_would_notice_a_wrong_key(file: str) -> None:
    import jsonschema

    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_min"):
        prepared(load(file) | {"idle_timeout_min": 5})


@pytest.mark.parametrize("where", ["head", "worker"])
@pytest.mark.parametrize("file", FILES)
def test_ray_start_knows_every_option(file: str, where: str) -> None:
    from ray.scripts.scripts import start

    arguments = [f"{name}={value}" if value else name for name, value in start_options(load(file), where).items()]
    context = start.make_context("start", arguments)
    assert context.params["head"] == (where == "head") and not context.args


def _listening_on(port: int, folder: str) -> set[str]:
    """The addresses on which a process with `folder` on its command line listens."""
    found: set[str] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if folder in " ".join(process.cmdline()):
                connections = process.net_connections("inet")
                found |= {each.laddr.ip for each in connections if each.status == "LISTEN" and each.laddr.port == port}
    return found


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_the_heads_command_starts_a_ray_that_asks_for_the_token_and_shows_its_dashboard_to_the_head_alone() -> None:
    with shipped_head() as head:
        answers = [head.status(token) for token in ("", "0" * 64, head.token)]
        listening = _listening_on(head.ports["dashboard-port"], head.folder)
    assert answers == [401, 403, 200] and listening == {"127.0.0.1"}


@pytest.mark.parametrize("file", FILES)
def test_what_is_mounted_from_the_repository_is_there(file: str) -> None:
    for local in load(file)["file_mounts"].values():
        assert local.startswith("~/") or (RAY_UP.parents[1] / local).is_dir()


# AWS


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """aws.yaml with the names of what its reader has to make, made in moto's cloud; prepared and bootstrapped by Ray."""
    moto = pytest.importorskip("moto", reason="moto, which plays AWS here, is not installed: pip install 'headrace[dev]'")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray keeps the key that it makes in ~/.ssh
    import boto3
    from ray.autoscaler._private.aws import config as aws_config
    from ray.autoscaler._private.aws import utils

    utils.resource_cache.cache_clear()  # Ray keeps its connections for the process
    aws_config._get_subnets_or_die.cache_clear()
    with moto.mock_aws():
        ec2, iam = boto3.client("ec2", REGION), boto3.client("iam", REGION)
        vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
        made = {
            "subnet-0123456789abcdef0": ec2.create_subnet(VpcId=vpc, CidrBlock="10.0.0.0/24")["Subnet"]["SubnetId"],
            "sg-0123456789abcdef0": ec2.create_security_group(GroupName="headrace", Description="x", VpcId=vpc)["GroupId"],
            "ami-0123456789abcdef0": ec2.describe_images()["Images"][0]["ImageId"],
        }
        for role in ("headrace-head", "headrace-worker"):
            iam.create_role(RoleName=role, AssumeRolePolicyDocument="{}")
            iam.create_instance_profile(InstanceProfileName=role)
            iam.add_role_to_instance_profile(InstanceProfileName=role, RoleName=role)
            document = (RAY_UP / f"aws_{role.removeprefix('headrace-')}_policy.json").read_text()
            iam.put_role_policy(RoleName=role, PolicyName=role, PolicyDocument=document)  # AWS's own rules for such documents
        before = ec2.describe_security_groups()["SecurityGroups"]
        config = aws_config.bootstrap_aws(prepared(_with(load("aws"), made)))
        assert ec2.describe_security_groups()["SecurityGroups"] == before, "Ray made a security group of its own"
        yield config


def _with(value: Any, made: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _with(item, made) for key, item in value.items()}
    if isinstance(value, list):
        return [_with(item, made) for item in value]
    return made.get(value, value) if isinstance(value, str) else value


def launched(config: dict[str, Any], node_type: str, count: int) -> tuple[Any, list[dict[str, Any]]]:
    """Ray's provider, and the instances that it has started as the autoscaler would."""
    import boto3
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler.tags import NODE_KIND_HEAD, NODE_KIND_WORKER, TAG_RAY_NODE_KIND, TAG_RAY_NODE_NAME, TAG_RAY_USER_NODE_TYPE

    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    kind = NODE_KIND_HEAD if node_type == config["head_node_type"] else NODE_KIND_WORKER
    tags = {TAG_RAY_NODE_KIND: kind, TAG_RAY_NODE_NAME: f"ray-headrace-{kind}", TAG_RAY_USER_NODE_TYPE: node_type}
    asked: list[dict[str, Any]] = []
    resource: Any = provider.ec2_fail_fast
    resource.meta.client.meta.events.register("provide-client-params.ec2.RunInstances", lambda params, **_: asked.append(params))
    for _ in range(count):  # one by one: Ray asks for one at least, and that many moto gives
        provider.create_node(config["available_node_types"][node_type]["node_config"], tags, 1)
    assert len(asked) == count
    efa = [interface.get("InterfaceType") == "efa" for interface in asked[0]["NetworkInterfaces"]]  # moto does not keep these two
    assert (asked[0].get("Placement"), efa) == (({"GroupName": "headrace"}, [True] * 4) if node_type == "gpu_efa" else (None, [False]))
    ids = provider.non_terminated_nodes({TAG_RAY_USER_NODE_TYPE: node_type})
    reservations = boto3.client("ec2", REGION).describe_instances(InstanceIds=ids)["Reservations"]
    return provider, [instance for reservation in reservations for instance in reservation["Instances"]]


@pytest.mark.parametrize(("node_type", "count"), [("head", 1), ("gpu_spot", 2), ("gpu_efa", 2), ("cpu", 2)])
def test_what_ray_starts_on_aws_is_what_the_file_says(aws: dict[str, Any], node_type: str, count: int) -> None:
    import boto3

    _, instances = launched(aws, node_type, count)
    assert len(instances) == count
    for instance in instances:
        metadata = instance["MetadataOptions"]
        assert (metadata["HttpTokens"], metadata["HttpPutResponseHopLimit"]) == ("required", 1)
        assert instance.get("InstanceLifecycle") == ("spot" if node_type.startswith("gpu") else None)
        role = "headrace-head" if node_type == "head" else "headrace-worker"
        assert instance["IamInstanceProfile"]["Arn"].endswith(f"instance-profile/{role}")
        assert "PublicIpAddress" not in instance and instance["PrivateIpAddress"].startswith("10.0.0.")
        assert [group["GroupName"] for group in instance["NetworkInterfaces"][0]["Groups"]] == ["headrace"]
        tags = {tag["Key"]: tag["Value"] for tag in instance["Tags"]}
        assert tags["project"] == "headrace" and tags["ray-cluster-name"] == "headrace" and tags["ray-user-node-type"] == node_type
    attached = [{"Name": "attachment.instance-id", "Values": [instance["InstanceId"] for instance in instances]}]
    volumes = boto3.client("ec2", REGION).describe_volumes(Filters=attached)["Volumes"]
    assert len(volumes) == count and all(volume["Encrypted"] and volume["Size"] == 200 for volume in volumes)
    assert all(disk["Ebs"]["DeleteOnTermination"] for instance in instances for disk in instance["BlockDeviceMappings"])


def test_ray_ends_what_it_has_started_and_leaves_no_stopped_node(aws: dict[str, Any]) -> None:
    import boto3

    provider, instances = launched(aws, "gpu_spot", 2)
    head_provider, heads = launched(aws, "head", 1)
    first, second = sorted(instance["InstanceId"] for instance in instances)
    provider.terminate_node(first)
    assert provider.non_terminated_nodes({"ray-user-node-type": "gpu_spot"}) == [second]
    provider.terminate_nodes([second])
    head_provider.terminate_node(heads[0]["InstanceId"])
    assert provider.non_terminated_nodes({}) == []
    reservations = boto3.client("ec2", REGION).describe_instances()["Reservations"]
    assert {instance["State"]["Name"] for reservation in reservations for instance in reservation["Instances"]} == {"terminated"}


def test_the_resources_in_the_file_are_those_of_the_instance_types(aws: dict[str, Any]) -> None:
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    shipped = {name: dict(node_type["resources"]) for name, node_type in aws["available_node_types"].items()}
    for node_type in aws["available_node_types"].values():
        node_type["resources"] = {}
    found = AWSNodeProvider.fillout_available_node_types_resources(aws)["available_node_types"]
    for name in ("gpu_spot", "gpu_efa", "cpu"):
        assert shipped[name] == {kind: found[name]["resources"].get(kind, 0) for kind in ("CPU", "GPU")}, name


# A spot node's notice


class Metadata(BaseHTTPRequestHandler):
    """Both clouds' metadata services, as far as a notice is concerned."""

    noticed = False

    def do_PUT(self) -> None:
        self._answer(b"session" if self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"] else None)

    def do_GET(self) -> None:
        if self.path == "/latest/meta-data/spot/instance-action" and self.headers["X-aws-ec2-metadata-token"] == "session":
            self._answer(b'{"action": "terminate"}' if self.noticed else None)
        elif self.path == "/computeMetadata/v1/instance/preempted" and self.headers["Metadata-Flavor"] == "Google":
            self._answer(b"TRUE" if self.noticed else b"FALSE")
        else:
            self._answer(None)

    def _answer(self, body: bytes | None) -> None:
        self.send_response(404 if body is None else 200)
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.parametrize(("cloud", "left_s"), [("aws", "110"), ("gcp", "25")])
def test_a_spot_nodes_notice_drains_it_and_nothing_else_does(tmp_path: Path, cloud: str, left_s: str) -> None:
    (tmp_path / "drain-node").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/drained\n')
    (tmp_path / "sleep").write_text("#!/bin/sh\nexec /bin/sleep 0.1\n")
    for stand_in in ("drain-node", "sleep"):
        (tmp_path / stand_in).chmod(0o755)
    service = type("Service", (Metadata,), {"noticed": False})
    with HTTPServer(("127.0.0.1", 0), service) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "GCE_METADATA_HOST": address}
        environment |= {"AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{address}", "no_proxy": "*"}
        waiting = subprocess.Popen(
            [RAY_UP / "spot-notice", cloud], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            time.sleep(1.5)  # several looks
            assert waiting.poll() is None and not (tmp_path / "drained").exists()
            service.noticed = True
            out, err = waiting.communicate(timeout=30)
        finally:
            waiting.kill()
            server.shutdown()
    assert (waiting.returncode, (tmp_path / "drained").read_text().strip(), err) == (0, left_s, ""), out


def test_a_cloud_that_is_not_known_is_refused() -> None:
    ran = subprocess.run([RAY_UP / "spot-notice", "azure"], capture_output=True, text=True, timeout=10, check=False)
    assert ran.returncode == 2 and "aws|gcp" in ran.stderr
