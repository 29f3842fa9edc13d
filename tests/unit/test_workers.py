"""What a run asks its cluster for, and which nodes have room for it."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.autoscaler import Autoscaler
from cluster.capacity import Chance, History
from cluster.errors import ClusterError
from cluster.workers import Needs, Node, WorkerPlan, group_places, plan_workers, require_room


def plan(workers: int, tensor: int, windows_ahead: int, on_gpus: bool) -> WorkerPlan:
    return plan_workers(Needs(workers, tensor, windows_ahead), on_gpus)


NODES = st.lists(st.builds(Node, cpus=st.integers(0, 9), gpus=st.integers(0, 4)), min_size=1, max_size=4)
PLANS = st.builds(
    lambda groups, tensor, windows_ahead, on_gpus: plan(groups * tensor, tensor, windows_ahead, on_gpus),
    *(st.integers(1, 3), st.integers(1, 4), st.integers(1, 2), st.booleans()),
)


def fits(plan: WorkerPlan, nodes: list[Node]) -> bool:
    """Whether some way of putting each bundle on one node is within every node: all of them are tried."""
    sizes = [(bundle["CPU"], bundle.get("GPU", 0.0)) for bundle in plan.bundles]
    for places in product(range(len(nodes)), repeat=len(sizes)):
        used = [[size for place, size in zip(places, sizes, strict=True) if place == at] for at in range(len(nodes))]
        if all(
            sum(cpus for cpus, _ in here) <= node.cpus and sum(gpus for _, gpus in here) <= node.gpus
            for here, node in zip(used, nodes, strict=True)
        ):
            return True
    return False


@given(PLANS, NODES)
def test_a_plan_is_refused_exactly_where_no_way_of_placing_its_bundles_is_left(asked: WorkerPlan, nodes: list[Node]):
    try:
        require_room(asked, nodes)
    except ClusterError as error:
        assert not fits(asked, nodes)
        assert "Nearest legal value" in str(error) or "use larger nodes" in str(error)
    else:
        assert fits(asked, nodes)


@given(PLANS, NODES)
def test_groups_are_whole_and_within_their_nodes(plan: WorkerPlan, nodes: list[Node]):
    places = group_places(plan, nodes)
    assert len(places) <= plan.num_workers // plan.tensor
    for at, node in enumerate(nodes):
        workers = places.count(at) * plan.tensor
        assert workers * plan.cpus_per_worker <= node.cpus and workers * plan.gpus_per_worker <= node.gpus


@given(PLANS)
def test_bundles_are_whole_groups_and_the_cpus_of_the_data_tasks(plan: WorkerPlan):
    groups = plan.bundles[: -plan.windows_ahead]
    assert [bundle["CPU"] for bundle in groups] == [plan.tensor] * (plan.num_workers // plan.tensor)
    assert all(bundle.get("GPU", 0) == (plan.tensor if plan.gpus_per_worker else 0) for bundle in groups)
    assert plan.bundles[-plan.windows_ahead :] == [{"CPU": 1.0}] * plan.windows_ahead


@pytest.mark.parametrize(
    ("asked", "nodes", "told"),
    [
        (
            plan(4, 2, 1, True),
            [Node(8, 1)] * 4,
            "needs a node of 2 GPUs.*of 1 GPUs and 8 CPUs. Nearest legal value: parallel.tensor=1",
        ),
        (plan(8, 2, 1, True), [Node(9, 3)] * 3, "room for 3. Nearest legal value: parallel.workers=6"),
        (plan(8, 2, 1, True), [Node(9, 5)], "needs 8 GPUs, and the cluster has 5. Nearest legal value: parallel.workers=4"),
        (plan(4, 1, 1, True), [Node(9)], "the cluster has 0. Nearest legal value: parallel.device=cpu"),
        (plan(4, 4, 1, True), [Node(9, 2)], "the cluster has 2. Nearest legal values: parallel.workers=2 with parallel.tensor=2"),
        (plan(4, 1, 2, False), [Node(4), Node(1)], "needs 6 logical CPUs .*the cluster has 5.*--num-cpus=6.*parallel.workers=3"),
        (
            plan(4, 4, 1, True),
            [Node(2, 4), Node(16)],
            "4 GPUs and 4 logical CPUs.*of 4 GPUs and 2 CPUs, or 0 GPUs and 16 CPUs. Nearest",
        ),
        (plan(2, 2, 0, True), [Node(8, 0.5)] * 4, "use larger nodes"),
        (plan(4, 4, 1, False), [Node(3), Node(3)], "needs a node of 4 logical CPUs.*are of 3 CPUs. Nearest legal value: parallel.tensor=2"),
    ],
)
def test_a_plan_without_room_is_refused_with_the_nearest_that_has(asked: WorkerPlan, nodes: list[Node], told: str):
    with pytest.raises(ClusterError, match=told):
        require_room(asked, nodes)


@given(
    st.lists(st.builds(Node, st.integers(0, 9).map(float), st.sampled_from([0.0, 0.5, 1, 2, 4])), min_size=1, max_size=3),
    st.integers(1, 8),
    st.integers(1, 4),
    st.integers(0, 2),
    st.booleans(),
)
def test_the_value_that_is_told_has_room(nodes: list[Node], groups: int, tensor: int, ahead: int, on_gpus: bool):
    asked = plan(groups * tensor, tensor, ahead, on_gpus)
    try:
        require_room(asked, nodes)
    except ClusterError as error:
        told = {name: int(value) for name, value in re.findall(r"parallel\.(workers|tensor)=(\d+)", str(error).partition("Nearest")[2])}
        assert told or "device=cpu" in str(error) or "use larger nodes" in str(error)
        if told:
            require_room(replace(asked, num_workers=told.get("workers", asked.num_workers), tensor=told.get("tensor", tensor)), nodes)


def test_nodes_that_have_come_since_the_autoscaler_told_of_them_are_not_waited_for():
    history = History()
    history.add(Autoscaler(True, version=3, alive={"gpu": 1}))
    history.add(Autoscaler(True, version=9, considered=5, alive={"gpu": 2}, starting={"gpu": 3}))
    assert history.missing() == "2 of 4 gpu nodes"
    history.add(Autoscaler(True, version=11, considered=5, alive={"gpu": 4}, starting={"gpu": 3}))
    assert history.missing() == ""
    history.add(Autoscaler(True, version=13, considered=12, alive={"gpu": 4}, starting={"cpu": 1}))
    assert history.missing() == "1 of 1 cpu node"


def looked(*looks: tuple[int, int, bool, bool]) -> tuple[bool, bool]:
    """After looks of (version, considered, whether the group is refused, whether others use the cluster): (no chance, others may leave)."""
    chance = Chance()
    for version, considered, refused, in_use in looks:
        seen = Autoscaler(True, version=version, considered=considered, refused=frozenset({"ab"} if refused else {"cd"}))
        chance.look(seen, "ab", in_use)
    return chance.is_none, chance.is_others


@pytest.mark.parametrize(
    ("looks", "verdict"),
    [
        ([(1, 0, False, False)], (False, False)),
        ([(5, 4, True, False)], (False, False)),  # of a round before this look
        ([(5, 4, True, False), (6, 5, True, False)], (True, False)),
        ([(5, 4, True, False), (6, 5, False, False), (7, 6, True, False)], (False, False)),
        ([(5, 4, True, True), (6, 5, True, True)], (False, True)),
        ([(5, 4, True, True), (6, 5, True, False)], (False, False)),  # they left just now: the round did not know
        ([(5, 4, True, True), (6, 5, True, False), (7, 6, True, False)], (True, False)),
        ([(5, 4, True, False), (0, 0, False, False)], (False, False)),  # the head did not answer
    ],
)
def test_a_refusal_counts_when_a_later_round_says_so_and_nobody_can_leave_room(looks, verdict):
    assert looked(*looks) == verdict


def test_who_waits_for_nodes_that_are_on_the_way_is_one_that_may_leave_room():
    chance = Chance()
    seen = [Autoscaler(True, version=v, considered=v - 1, pending=frozenset({"ab", "cd"}), refused=frozenset({"ab"})) for v in (5, 6)]
    for look in seen:
        chance.look(look, "ab", in_use=False)
    assert (chance.is_none, chance.is_others) == (False, True)
    for version in (7, 8):  # the other is gone, or refused too
        chance.look(Autoscaler(True, version=version, considered=version - 1, refused=frozenset({"ab", "cd"})), "ab", in_use=False)
    assert chance.is_none
