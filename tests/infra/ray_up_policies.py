"""The secure defaults of infra/ray_up: each a check of one file, and the ways to take it away again.

A check returns what is wrong, in words; none is wrong for what ships. A removal is one edit of the file, after which the check of the same
name has to find something: so no check is empty. Where insecurity has many spellings (options of `docker run`, shell commands) a check
names what may be there, and whatever else is put there has to be looked at first.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]
Edit = Callable[[Config], None]
Removal = tuple[str, Edit]

CLOUDS = ("aws", "gcp")
EVERYWHERE = (*CLOUDS, "on_premise")
GPU_TYPES = {"aws": ("gpu_spot", "gpu_efa"), "gcp": ("gpu_spot",)}


@dataclass(frozen=True)
class Policy:
    name: str
    files: tuple[str, ...]
    check: Callable[[Config], Iterator[str]]
    removals: Callable[[Config], list[Removal]]


POLICIES: list[Policy] = []


def policy(files: tuple[str, ...], removals: Callable[[Config], list[Removal]]) -> Callable[[Callable[[Config], Iterator[str]]], None]:
    def register(check: Callable[[Config], Iterator[str]]) -> None:
        POLICIES.append(Policy(check.__name__, files, check, removals))

    return register


def put(value: Any, *path: str | int) -> Removal:
    """Another value at a place of the file; None where the place goes."""

    def edit(config: Config) -> None:
        *parents, last = path
        place: Any = config
        for key in parents:
            place = place[key]
        if value is None:
            del place[last]
        else:
            place[last] = value

    return f"{'/'.join(map(str, path))} {'removed' if value is None else f'= {value!r}'}", edit


def without_option(option: str) -> Removal:
    return f"{option} removed", lambda config: config["docker"]["run_options"].remove(option)


def with_option(option: str, key: str = "run_options", node_type: str | None = None) -> Removal:
    """An option more, for all containers or those of a node type."""

    def edit(config: Config) -> None:
        place = config if node_type is None else config["available_node_types"][node_type]
        place.setdefault("docker", {}).setdefault(key, []).append(option)

    return f"{option} added to {key} of {node_type or 'all'}", edit


def with_command(command: str, key: str = "setup_commands") -> Removal:
    return f"{command} added to {key}", lambda config: config[key].append(command)


def in_command(old: str, new: str, where: str = "head") -> Removal:
    """`old` replaced in the commands that start Ray."""

    def edit(config: Config) -> None:
        key = f"{where}_start_ray_commands"
        assert any(old in command for command in config[key])
        config[key] = [command.replace(old, new) for command in config[key]]

    return f"{old} -> {new or 'nothing'} on the {where}", edit


def of_nodes(*removals: Callable[[str], Removal]) -> Callable[[Config], list[Removal]]:
    """The removals in every node type."""
    return lambda config: [removal(name) for name in config["available_node_types"] for removal in removals]


def in_node(value: Any, *path: str | int) -> Callable[[str], Removal]:
    return lambda name: put(value, "available_node_types", name, "node_config", *path)


def node_configs(config: Config) -> Iterator[tuple[str, Config]]:
    for name, node_type in config["available_node_types"].items():
        yield name, node_type["node_config"]


def started_with(config: Config, where: str) -> list[tuple[str, str]]:
    """The options of every `ray start`, in order: [("--port", "6379"), ("--head", "")]."""
    commands = [command.split("ray start", 1)[1] for command in config[f"{where}_start_ray_commands"] if "ray start" in command]
    words = [word for command in commands for word in shlex.split(command)]
    return [(name, value) for name, _, value in (word.partition("=") for word in words)]


def start_options(config: Config, where: str = "head") -> dict[str, str]:
    return dict(started_with(config, where))


def all_options(config: Config) -> Iterator[tuple[str, str]]:
    """(the key that it is under, option) of everything that is handed to `docker run`."""
    every = [config["docker"], *(node_type.get("docker", {}) for node_type in config.get("available_node_types", {}).values())]
    yield from ((key, option) for docker in every for key in docker if key.endswith("run_options") for option in docker[key])


def all_commands(config: Any) -> Iterator[str]:
    """Those of the cluster and of its node types."""
    if isinstance(config, dict):
        for key, value in config.items():
            yield from value if key.endswith("_commands") else all_commands(value)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    else:
        yield str(value)


# Everywhere


TOKEN_MODE, TOKEN_PATH = "--env=RAY_AUTH_MODE=token", "--env=RAY_AUTH_TOKEN_PATH=/home/headrace/auth/token"


@policy(
    EVERYWHERE,
    lambda config: [
        without_option(TOKEN_MODE),
        with_option("--env=RAY_AUTH_MODE=disabled"),
        without_option(TOKEN_PATH),
        put(None, "file_mounts", "/home/headrace/auth"),
        put({"/home/headrace/auth": "infra/auth"}, "file_mounts"),
    ],
)
def every_node_asks_for_the_token_which_comes_from_a_folder_of_the_users(config: Config) -> Iterator[str]:
    options = config["docker"]["run_options"]
    if [option for option in options if "RAY_AUTH_MODE" in option] != [TOKEN_MODE]:
        yield f"Ray is open to everybody: {TOKEN_MODE} has to be in docker.run_options"
    paths = [option.rsplit("=", 1)[1] for option in options if "RAY_AUTH_TOKEN_PATH" in option]
    if len(paths) != 1 or not str(config["file_mounts"].get(paths[0].rpartition("/")[0], "")).startswith("~/"):
        yield "the token's folder has to be mounted, from the user's own and not from the repository"


@policy(
    EVERYWHERE,
    lambda config: [
        with_option("--env=RAY_AUTH_TOKEN=0123456789abcdef"),
        with_option("--env=AWS_SECRET_ACCESS_KEY=abc"),
        with_option("--env=WANDB_API_KEY=abc"),
        put({"aws_access_key_id": "a", "aws_secret_access_key": "b"}, "provider", "aws_credentials"),
        put({"type": "service_account", "credentials": "{}"}, "provider", "gcp_credentials"),
        put(["docker login --password hunter2"], "initialization_commands"),
    ],
)
def no_secret_is_in_the_file(config: Config) -> Iterator[str]:
    pattern = r"RAY_AUTH_TOKEN=|(secret|api)_?(access_)?key|credentials|passw(or)?d|PRIVATE KEY|\bAKIA"
    for text in _texts(config):
        if re.search(pattern, text, re.I):
            yield f"{text.split('=')[0]} looks like a secret: the token comes by file_mounts, rights by the node's role"


@policy(
    EVERYWHERE,
    lambda config: [
        in_command("--dashboard-host=127.0.0.1", ""),
        *(
            in_command("--dashboard-host=127.0.0.1", f"--dashboard-host={host}")
            for host in ("0.0.0.0", "::", "localhost --dashboard-host=::")
        ),
        in_command("--dashboard-host=127.0.0.1", "--dashboard-host 0.0.0.0"),
        in_command("--dashboard-port=8265", "--dashboard-port=8265 --dashboard-host=0.0.0.0"),
        in_command("--dashboard-port=8265", "--dashboard-port=8265 --dashboard-host 0.0.0.0"),
        in_command("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0 --dashboard-host=127.0.0.1"),
        with_command("ray start --head --dashboard-host=0.0.0.0", "head_start_ray_commands"),
    ],
)
def the_dashboard_listens_on_loopback(config: Config) -> Iterator[str]:
    if [value for name, value in started_with(config, "head") if name == "--dashboard-host"] != ["127.0.0.1"]:
        yield "the dashboard, which starts jobs, has to listen on 127.0.0.1, told once: it is reached through a tunnel"


@policy(EVERYWHERE, lambda config: [in_command("--num-cpus=0", ""), in_command("--num-gpus=0", "--num-gpus=1")])
def the_head_runs_no_tasks(config: Config) -> Iterator[str]:
    options = start_options(config)
    if (options.get("--num-cpus"), options.get("--num-gpus")) != ("0", "0"):
        yield "a task that takes the head's memory ends every run: --num-cpus=0 --num-gpus=0"


@policy(
    EVERYWHERE,
    lambda config: [
        put(image, "docker", key)
        for image in ("registry.example.com/headrace", "registry.example.com/headrace:latest", "headrace:0.1.0")
        for key in ("image", "head_image", "worker_image")
    ],
)
def the_image_has_a_version_and_a_registry(config: Config) -> Iterator[str]:
    every = [config["docker"], *(node_type.get("docker", {}) for node_type in config.get("available_node_types", {}).values())]
    for image in (docker[key] for docker in every for key in docker if key.endswith("image")):
        registry, _, name = image.rpartition("/")
        if "." not in registry or ":" not in name or name.endswith(":latest"):
            yield f"the image {image} has to name its registry and a version"


# What a container may be started with. Ray itself adds --net=host, a name, and the mounts of file_mounts.
HARMLESS_OPTION = re.compile(
    rf"{re.escape(TOKEN_MODE)}|{re.escape(TOKEN_PATH)}|--env=RAY_USAGE_STATS_ENABLED=0|--env=AWS_REGION=[a-z0-9-]+|--group-add=1000"
    r"|--cap-drop=ALL|--security-opt=no-new-privileges|--ulimit=(nofile=65536:65536|memlock=-1)"
    r"|--volume=/var/lib/headrace/ray:/tmp/ray|--device=/dev/infiniband/uverbs[0-9]"
)
INSECURE_OPTIONS = (
    *(
        "--privileged",
        "--privileged=true",
        "'--privileged'",
        "--env=AWS_REGION=a --privileged",
        "--env=AWS_REGION=$(id)",
        "--group-add=docker",
    ),
    *(
        "-p 8265:8265",
        "-p8265:8265",
        "-p=8265:8265",
        "--publish=8265:8265",
        "--publish 0.0.0.0:8265:8265",
        "-P",
        "--publish-all",
        "-dp 80:80",
    ),
    *(
        "--net=host",
        "--net host",
        "--network=host",
        "--network host",
        "--pid=host",
        "--pid host",
        "--ipc=host",
        "--uts=host",
        "--userns=host",
    ),
    *("-v /:/host", "-v/:/host", "--volume=/:/host", "--volume /:/host:rw", "--mount=type=bind,source=/,target=/host", "--volumes-from=x"),
    *(
        "--volume=/var/run/docker.sock:/var/run/docker.sock",
        "--volume=/var/lib/headrace/ray:/tmp/ray,/:/x",
        "--device=/dev/sda",
        "--device /dev/mem",
    ),
    *("--cap-add=SYS_ADMIN", "--cap-add SYS_ADMIN", "--cap-add=ALL", "--user=root", "--user 0", "-u 0:0", "-u0", "--group-add=0"),
    *("--security-opt=seccomp=unconfined", "--security-opt apparmor=unconfined", "--security-opt=no-new-privileges=false"),
    *("-e RAY_AUTH_MODE=disabled", "-eRAY_AUTH_MODE=disabled", "-e=RAY_AUTH_MODE=disabled", "--env RAY_AUTH_MODE=disabled"),
    *(
        "--env=RAY_AUTH_MODE=disabled",
        "--env=RAY_AUTH_MODE=",
        "--env=RAY_AUTH_MODE",
        "--env-file=/x",
        "--env-file /x",
        "--entrypoint=/bin/sh",
    ),
)


@policy(
    EVERYWHERE,
    lambda config: [
        without_option("--cap-drop=ALL"),
        without_option("--security-opt=no-new-privileges"),
        *(with_option(option, key) for option in INSECURE_OPTIONS for key in ("run_options", "head_run_options", "worker_run_options")),
        *(
            with_option(option, key, node_type)
            for option in (*INSECURE_OPTIONS, TOKEN_MODE)
            for node_type in config.get("available_node_types", {})
            for key in ("run_options", "worker_run_options")
            if (option, key) != (TOKEN_MODE, "worker_run_options")
        ),
    ],
)
def containers_have_no_rights_on_their_machine(config: Config) -> Iterator[str]:
    for needed in ("--cap-drop=ALL", "--security-opt=no-new-privileges"):
        if needed not in config["docker"]["run_options"]:
            yield f"docker.run_options needs {needed}"
    for key, option in all_options(config):
        if not HARMLESS_OPTION.fullmatch(option):
            yield f"{key}: {option} may give a container rights on its machine, or take its token away: it is not of HARMLESS_OPTION"
    for name, node_type in config.get("available_node_types", {}).items():
        if "run_options" in node_type.get("docker", {}):
            yield f"{name}: docker.run_options of a node type take the place of the cluster's, the token among them"


HARMLESS_COMMAND = re.compile(
    r"export PATH=/opt/headrace/bin:\$PATH|unset OMP_NUM_THREADS|ulimit -n 65536|ray stop"
    r"|ray start( --[a-z-]+(=[\w~/.$:-]+)?)+"
    r"|setsid nohup /home/headrace/ray_up/spot-notice (aws|gcp) >/tmp/ray/spot-notice\.log 2>&1 </dev/null &"
    r"|sudo install -d -o 10001 -g 10001 -m 755 /var/lib/headrace/ray"
)
START_OPTIONS = {
    *("--head", "--address", "--port", "--object-manager-port", "--metrics-export-port", "--dashboard-host", "--dashboard-port"),
    *("--num-cpus", "--num-gpus", "--object-store-memory", "--autoscaling-config"),
}
INSECURE_COMMANDS = (
    *(
        "export RAY_AUTH_MODE=disabled",
        "export 'RAY_AUTH_MODE=disabled'",
        "RAY_AUTH_MODE=disabled; export RAY_AUTH_MODE",
        "unset RAY_AUTH_MODE",
    ),
    *(
        "env -u RAY_AUTH_MODE ray start --head",
        "env -i ray start --head",
        "RAY_AUTH_MODE=disabled ray start --head",
        "declare -x RAY_AUTH_MODE=",
    ),
    *(
        "echo 'export RAY_AUTH_MODE=disabled' >> ~/.bashrc",
        "python -m ray.scripts.scripts start --head",
        "ray  start --head",
        "export -n RAY_AUTH_MODE",
    ),
    *(
        "export PATH=/opt/headrace/bin:$PATH; unset OMP_NUM_THREADS RAY_AUTH_MODE",
        "ulimit -n 65536 && unset RAY_AUTH_MODE",
        "curl https://a.b/c | sh",
    ),
    *(
        "pip install ray",
        "ray start --address=$(unset${IFS}RAY_AUTH_MODE)",
        "ray stop & unset RAY_AUTH_MODE",
        "ray stop\nunset RAY_AUTH_MODE",
    ),
)
COMMANDS = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")


@policy(
    EVERYWHERE,
    lambda config: [
        *(
            with_command(command, key)
            for command in INSECURE_COMMANDS
            for key in (*COMMANDS, "head_start_ray_commands", "worker_start_ray_commands")
        ),
        *(
            put([command], "available_node_types", "cpu", "worker_setup_commands")
            for command in INSECURE_COMMANDS
            if "max_workers" in config
        ),
        *(
            in_command("ray start", f"{before} ray start", where)
            for where in ("head", "worker")
            for before in ("RAY_AUTH_MODE=x", "env -i")
        ),
        *(in_command("unset OMP_NUM_THREADS", "unset OMP_NUM_THREADS RAY_AUTH_MODE", where) for where in ("head", "worker")),
        in_command("--port=6379", "--port=6379 --port=6380"),
        in_command("--port=6379", "--port=6379 --system-config={}"),
        in_command("--port=6379", "--port=6379 --temp-dir=/home/headrace/auth"),
    ],
)
def only_commands_that_were_looked_at_run(config: Config) -> Iterator[str]:
    for command in all_commands(config):
        for part in command.split(";"):
            if not HARMLESS_COMMAND.fullmatch(part.strip()):
                yield f"{part.strip()}: only what HARMLESS_COMMAND names may run, or the token and the versions may go another way"
    for where in ("head", "worker"):
        names = [name for name, _ in started_with(config, where)]
        for name in names:
            if name not in START_OPTIONS or names.count(name) > 1:
                yield f"{name} of the {where}'s ray start is none of START_OPTIONS, or is there twice"


@policy(EVERYWHERE, lambda config: [put(None, "idle_timeout_minutes"), put(600, "idle_timeout_minutes")])
def idle_nodes_go(config: Config) -> Iterator[str]:
    if not 0 < config.get("idle_timeout_minutes", 1e9) <= 15:
        yield "idle_timeout_minutes has to be at most 15: an idle GPU node costs what a busy one does"


@policy(EVERYWHERE, lambda config: [without_option("--env=RAY_USAGE_STATS_ENABLED=0")])
def nothing_is_reported_to_others(config: Config) -> Iterator[str]:
    if "--env=RAY_USAGE_STATS_ENABLED=0" not in config["docker"]["run_options"]:
        yield "Ray reports usage to its makers unless RAY_USAGE_STATS_ENABLED=0"


# On clouds


@policy(
    CLOUDS,
    lambda config: [
        put(None, "max_workers"),
        *(put(None, "available_node_types", name, "max_workers") for name in config["available_node_types"]),
        *(put(1, "available_node_types", name, "min_workers") for name in config["available_node_types"] if name != "head"),
    ],
)
def a_cluster_begins_at_zero_and_has_an_upper_bound(config: Config) -> Iterator[str]:
    if "max_workers" not in config:
        yield "max_workers is the bound on what can be spent"
    for name, node_type in config["available_node_types"].items():
        if "max_workers" not in node_type:
            yield f"{name}.max_workers is missing"
        if node_type.get("min_workers", 0):
            yield f"{name}.min_workers={node_type['min_workers']}: nodes that nobody asked for"


@policy(CLOUDS, lambda config: [put(None, "provider", "cache_stopped_nodes"), put(True, "provider", "cache_stopped_nodes")])
def nodes_are_ended_and_not_stopped(config: Config) -> Iterator[str]:
    if config["provider"].get("cache_stopped_nodes", True):
        yield "provider.cache_stopped_nodes has to be false: the disks of stopped nodes are paid for, and keep what was on them"


@policy(
    CLOUDS,
    lambda config: [
        put(None, "auth", "ssh_proxy_command"),
        put("ssh -W %h:%p bastion", "auth", "ssh_proxy_command"),
        put(False, "auth", "ssh_proxy_use_node_id"),
        put("root", "auth", "ssh_user"),
    ],
)
def the_head_is_reached_through_the_clouds_own_tunnel(config: Config) -> Iterator[str]:
    auth = config["auth"]
    if not re.match(r"aws ssm start-session |gcloud compute start-iap-tunnel ", auth.get("ssh_proxy_command", "")):
        yield "auth.ssh_proxy_command has to be the cloud's tunnel: every other way needs an open port"
    if not auth.get("ssh_proxy_use_node_id"):
        yield "the tunnel takes the node's id: auth.ssh_proxy_use_node_id"
    if auth["ssh_user"] == "root":
        yield "auth.ssh_user=root"


# On AWS


@policy(
    ("aws",),
    of_nodes(
        in_node(None, "MetadataOptions"),
        in_node("optional", "MetadataOptions", "HttpTokens"),
        in_node(2, "MetadataOptions", "HttpPutResponseHopLimit"),
    ),
)
def the_nodes_role_is_read_with_imdsv2_and_from_the_node_only(config: Config) -> Iterator[str]:
    for name, node in node_configs(config):
        options = node.get("MetadataOptions", {})
        if options.get("HttpTokens") != "required" or options.get("HttpPutResponseHopLimit") != 1:
            yield f"{name}: MetadataOptions need HttpTokens=required and HttpPutResponseHopLimit=1"


@policy(
    ("aws",),
    of_nodes(
        in_node(None, "BlockDeviceMappings"),
        in_node(False, "BlockDeviceMappings", 0, "Ebs", "Encrypted"),
        in_node(None, "BlockDeviceMappings", 0, "Ebs", "Encrypted"),
        in_node(False, "BlockDeviceMappings", 0, "Ebs", "DeleteOnTermination"),
    ),
)
def disks_are_encrypted_and_go_with_their_node(config: Config) -> Iterator[str]:
    for name, node in node_configs(config):
        disks = [mapping["Ebs"] for mapping in node.get("BlockDeviceMappings", [])]
        if not disks or not all(disk.get("Encrypted") and disk.get("DeleteOnTermination") for disk in disks):
            yield f"{name}: each disk needs Encrypted and DeleteOnTermination"


def _public_address_removals(config: Config) -> list[Removal]:
    found = [put(None, "provider", "use_internal_ips")]
    for name, node in node_configs(config):
        found += [in_node(None, "NetworkInterfaces")(name), in_node(True, "NetworkInterfaces", 0, "AssociatePublicIpAddress")(name)]
        if len(node["NetworkInterfaces"]) == 1:
            found.append(in_node(None, "NetworkInterfaces", 0, "AssociatePublicIpAddress")(name))
    return found


@policy(("aws",), _public_address_removals)
def no_node_has_a_public_address(config: Config) -> Iterator[str]:
    if not config["provider"].get("use_internal_ips"):
        yield "provider.use_internal_ips has to be true"
    for name, node in node_configs(config):
        interfaces = node.get("NetworkInterfaces", [])
        told = [interface.get("AssociatePublicIpAddress") for interface in interfaces]
        # AWS gives none to a node with several interfaces, and refuses the word.
        if not interfaces or any(told) or (len(interfaces) == 1 and told != [False]):
            yield f"{name}: its interface needs AssociatePublicIpAddress=false, or the subnet decides"


@policy(
    ("aws",),
    lambda config: [
        *(in_node(None, "NetworkInterfaces", 0, "Groups")(name) for name in config["available_node_types"]),
        put({"IpPermissions": [{"FromPort": 8265, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]}, "provider", "security_group"),
    ],
)
def the_security_group_is_ours(config: Config) -> Iterator[str]:
    if "security_group" in config["provider"]:
        yield "provider.security_group makes Ray write the rules, port 22 open to the world among them"
    for name, node in node_configs(config):
        if not all(interface.get("Groups") for interface in node.get("NetworkInterfaces", [{}])):
            yield f"{name}: without Groups Ray makes a security group with port 22 open to the world"


@policy(
    ("aws",),
    lambda config: [
        *of_nodes(in_node(None, "IamInstanceProfile"))(config),
        *(in_node({"Name": "headrace-head"}, "IamInstanceProfile")(name) for name in config["available_node_types"] if name != "head"),
    ],
)
def every_node_has_a_role_and_workers_not_the_heads(config: Config) -> Iterator[str]:
    roles = {name: node.get("IamInstanceProfile") for name, node in node_configs(config)}
    for name, role in roles.items():
        if role is None:
            yield f"{name}: without IamInstanceProfile the head gets all rights on EC2 and S3, a worker none"
        elif name != config["head_node_type"] and role == roles[config["head_node_type"]]:
            yield f"{name}: a worker may not start and end nodes"


@policy(
    ("aws",),
    lambda config: [
        *(in_node(None, "InstanceMarketOptions")(name) for name in GPU_TYPES["aws"]),
        *(in_node("stop", "InstanceMarketOptions", "SpotOptions", "InstanceInterruptionBehavior")(name) for name in GPU_TYPES["aws"]),
        *(in_node({"MarketType": "spot"}, "InstanceMarketOptions")(name) for name in ("head", "cpu")),
    ],
)
def gpus_are_spot_and_what_a_run_cannot_lose_is_not(config: Config) -> Iterator[str]:
    for name, node in node_configs(config):
        market = node.get("InstanceMarketOptions", {})
        if (market.get("MarketType") == "spot") != (name in GPU_TYPES["aws"]):
            yield f"{name}: spot is for GPU nodes, and for them alone"
        elif market and market.get("SpotOptions", {}).get("InstanceInterruptionBehavior") != "terminate":
            yield f"{name}: a node that is taken away has to be terminated, or its disk stays"


@policy(("aws",), of_nodes(in_node(None, "TagSpecifications"), in_node(None, "TagSpecifications", 1)))
def what_is_paid_for_is_tagged(config: Config) -> Iterator[str]:
    for name, node in node_configs(config):
        tagged = {
            tags["ResourceType"] for tags in node.get("TagSpecifications", []) if {"Key": "project", "Value": "headrace"} in tags["Tags"]
        }
        if tagged != {"instance", "volume"}:
            yield f"{name}: instances and volumes need the tag project=headrace, or nobody finds what costs"


@policy(
    ("aws",),
    lambda config: [
        in_node(None, "Placement")("gpu_efa"),
        put(None, "available_node_types", "gpu_efa", "docker"),
        put(["--ulimit=memlock=-1"], "available_node_types", "gpu_efa", "docker", "worker_run_options"),
    ],
)
def nodes_with_efa_are_side_by_side_and_may_use_it(config: Config) -> Iterator[str]:
    for name, node in node_configs(config):
        cards = [card for card in node.get("NetworkInterfaces", []) if card.get("InterfaceType") == "efa"]
        options = config["available_node_types"][name].get("docker", {}).get("worker_run_options", [])
        if cards and not node.get("Placement", {}).get("GroupName"):
            yield f"{name}: EFA without a cluster placement group is paid for in vain"
        if cards and sum("/dev/infiniband/" in option for option in options) != len(cards):
            yield f"{name}: the container needs every EFA card as a device"
        if cards and "--ulimit=memlock=-1" not in options:
            yield f"{name}: EFA pins memory: --ulimit=memlock=-1"


# On Google Cloud


@policy(
    ("gcp",),
    lambda config: [
        put(None, "provider", "use_internal_ips"),
        *of_nodes(in_node(None, "networkInterfaces"), in_node([{"type": "ONE_TO_ONE_NAT"}], "networkInterfaces", 0, "accessConfigs"))(
            config
        ),
    ],
)
def no_vm_has_an_external_address(config: Config) -> Iterator[str]:
    if not config["provider"].get("use_internal_ips"):
        yield "provider.use_internal_ips has to be true"
    for name, node in node_configs(config):
        if not node.get("networkInterfaces") or any("accessConfigs" in interface for interface in node["networkInterfaces"]):
            yield f"{name}: needs networkInterfaces without accessConfigs, or Ray gives it an external address"


SHIELD = ("enableSecureBoot", "enableVtpm", "enableIntegrityMonitoring")


@policy(
    ("gcp",),
    of_nodes(in_node(None, "shieldedInstanceConfig"), *(in_node(False, "shieldedInstanceConfig", part) for part in SHIELD)),
)
def vms_are_shielded(config: Config) -> Iterator[str]:
    for name, node in node_configs(config):
        if not all(node.get("shieldedInstanceConfig", {}).get(part) for part in SHIELD):
            yield f"{name}: shieldedInstanceConfig needs {', '.join(SHIELD)}"


CLOUD_PLATFORM = "https://www.googleapis.com/auth/cloud-platform"


@policy(
    ("gcp",),
    lambda config: [
        removal(name)
        for name in ("gpu_spot", "cpu")
        for removal in (
            in_node(None, "serviceAccounts"),
            in_node([CLOUD_PLATFORM], "serviceAccounts", 0, "scopes"),
            in_node("default", "serviceAccounts", 0, "email"),
        )
    ],
)
def workers_have_an_account_of_their_own_with_few_scopes(config: Config) -> Iterator[str]:
    for name, node in node_configs(config):
        if name == config["head_node_type"]:
            continue  # Ray gives it its own, whatever stands here
        accounts = node.get("serviceAccounts", [])
        if len(accounts) != 1 or not accounts[0]["email"].startswith("headrace-worker@") or CLOUD_PLATFORM in accounts[0]["scopes"]:
            yield f"{name}: needs serviceAccounts with headrace-worker and no scope over the whole platform"


@policy(
    ("gcp",),
    lambda config: [
        in_node(None, "scheduling")("gpu_spot"),
        in_node("STOP", "scheduling", "instanceTerminationAction")("gpu_spot"),
        *(in_node({"provisioningModel": "SPOT"}, "scheduling")(name) for name in ("head", "cpu")),
    ],
)
def gpu_vms_are_spot_and_what_a_run_cannot_lose_is_not(config: Config) -> Iterator[str]:
    for name, node in node_configs(config):
        scheduling = node.get("scheduling", {})
        if (scheduling.get("provisioningModel") == "SPOT") != (name in GPU_TYPES["gcp"]):
            yield f"{name}: spot is for GPU nodes, and for them alone"
        elif scheduling and scheduling.get("instanceTerminationAction") != "DELETE":
            yield f"{name}: a VM that is taken away has to be deleted, or its disk stays"


@policy(
    ("gcp",),
    of_nodes(
        in_node(None, "metadata"),
        in_node("TRUE", "metadata", "items", 0, "value"),
        in_node(False, "disks", 0, "autoDelete"),
        in_node(None, "labels"),
    ),
)
def vms_leave_nothing_and_have_no_serial_console(config: Config) -> Iterator[str]:
    for name, node in node_configs(config):
        if {"key": "serial-port-enable", "value": "FALSE"} not in node.get("metadata", {}).get("items", []):
            yield f"{name}: metadata serial-port-enable has to be FALSE"
        if not all(disk.get("autoDelete") for disk in node["disks"]) or node.get("labels", {}).get("project") != "headrace":
            yield f"{name}: disks need autoDelete, and the VM the label project=headrace"


# On machines of one's own


@policy(("on_premise",), lambda config: [put(None, "auth", "ssh_private_key"), put("root", "auth", "ssh_user")])
def machines_are_reached_by_a_key_and_not_as_root(config: Config) -> Iterator[str]:
    if not config["auth"].get("ssh_private_key", "").startswith("~/.ssh/") or config["auth"]["ssh_user"] == "root":
        yield "auth needs a ssh_private_key in ~/.ssh and a ssh_user that is not root"
