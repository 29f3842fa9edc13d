"""Every secure default of infra/kuberay holds in all that ships, and is noticed where it is taken away."""

from __future__ import annotations

import pytest

from tests.infra.kuberay_build import SETS, built
from tests.infra.kuberay_policies import POLICIES, Policy

# Only with a queue.
QUEUED = {"teams_share_by_queue": ["multi-tenant"]}


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@pytest.mark.parametrize("name", SETS)
def test_what_ships_is_secure(name: str, policy: Policy) -> None:
    assert list(policy.check(built(name))) == []


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@pytest.mark.parametrize("name", SETS)
def test_each_default_is_missed_where_it_is_removed(name: str, policy: Policy) -> None:
    manifests = built(name)
    removals = list(policy.removals(manifests))
    assert removals or name not in QUEUED.get(policy.name, SETS)
    unnoticed = [str(removal) for removal in removals if not list(policy.check(removal.applied(manifests)))]
    assert unnoticed == []
