"""What Ray's autoscaler (v2) tells of itself: whether there is one, what it cannot do, which nodes it is starting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

HEAD_RESOURCE = "node:__internal_head__"
TIMEOUT_S = 10


@dataclass(frozen=True)
class Autoscaler:
    """`manages`: whether it can start nodes. `version` counts the cluster's states, one a look; `considered` is the newest that its last
    round went by.

    `pending`, `refused`: placement groups, in hex, which wait for room; and those of them that it can start no nodes for. `alive`,
    `starting`: nodes by type, the head aside. `failure`: why the cloud refused the last node that it refused.
    """

    manages: bool
    version: int = 0
    considered: int = 0
    pending: frozenset[str] = frozenset()
    refused: frozenset[str] = frozenset()
    alive: Mapping[str, int] = field(default_factory=dict)
    starting: Mapping[str, int] = field(default_factory=dict)
    failure: str = ""


def read_autoscaler(address: str) -> Autoscaler:
    """What the autoscaler last told the control service (GCS) at `address`, host:port, and the nodes that are there.

    Only under an autoscaler does the head have a node type: `ray up` and KubeRay give it one. Version 1 gives none, and tells nothing of
    what it cannot do: it counts as none. On Kubernetes a cluster of fixed size looks as if it had one, which refuses all that does not fit.
    """
    from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply, NodeStatus  # pyright: ignore[reportAttributeAccessIssue]

    reply = GetClusterStatusReply.FromString(GcsClient(address).get_cluster_status(timeout_s=TIMEOUT_S))
    cluster, state = reply.cluster_resource_state, reply.autoscaling_state
    nodes = [node for node in cluster.node_states if node.status != NodeStatus.Value("DEAD")]
    head = next((node.ray_node_type_name for node in nodes if HEAD_RESOURCE in node.total_resources), "")
    starting = Counter(pending.ray_node_type_name for pending in state.pending_instances)
    for request in state.pending_instance_requests:
        starting[request.ray_node_type_name] += request.count
    starting.pop(head, None)
    failures = sorted(state.failed_instance_requests, key=lambda failed: failed.failed_ts)
    return Autoscaler(
        manages=bool(head),
        version=cluster.cluster_resource_state_version,
        considered=state.last_seen_cluster_resource_state_version,
        pending=frozenset(gang.details.split(":")[0] for gang in cluster.pending_gang_resource_requests),
        refused=frozenset(gang.details.split(":")[0] for gang in state.infeasible_gang_resource_requests),
        alive=Counter(node.ray_node_type_name for node in nodes if HEAD_RESOURCE not in node.total_resources),
        starting=starting,
        failure=f"{failures[-1].ray_node_type_name}: {failures[-1].reason}" if failures else "",
    )
