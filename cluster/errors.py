"""Errors about the cluster that a user can act on; a job prints only the message."""

from __future__ import annotations


class ClusterError(Exception):
    """What is wrong with the cluster, the values, and the nearest fix."""

    exit_code = 3


class HeadLostError(ClusterError):
    """The cluster's head does not answer any more."""


class InfeasibleError(ClusterError):
    """The autoscaler has no node types, or may not start enough nodes, for what was asked."""


class SubmitError(ClusterError):
    """What was asked to be submitted cannot be: nothing was sent."""

    exit_code = 2
