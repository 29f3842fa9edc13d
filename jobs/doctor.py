"""`python -m jobs.doctor [--config FILE] [--address HOST:PORT]`: what is wrong with a cluster, before a run finds out."""

from __future__ import annotations

import argparse
import json
import os
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial

from cluster.autoscaler import read_autoscaler
from cluster.checks_facts import versions
from cluster.checks_judge import Finding, Wanted, exit_code, judge
from cluster.connect import connected, head_address, is_private
from cluster.doctor import examine
from cluster.errors import ClusterError
from cluster.workers import Needs, total_cpus
from jobs.doctor_table import show
from jobs.exit_code import exit_code_of, take_over_signals
from llm.config import RunConfig
from llm.config_file import load_run
from llm.errors import HeadraceError
from llm.model.flops import num_parameters
from llm.model.presets import model_config
from llm.redact import cleaned, without_secrets
from llm.storage import is_s3, local_path, read_bytes
from llm.storage_check import check_storage, delete_object, put_object

CHECKPOINT_BYTES_A_PARAMETER = 12  # fp32 weights and two moments
STORAGE = "run.storage"


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 where no finding is red, 3 where one is, 2 for a wrong configuration. An error that ends the check is on stderr, and
    with --json the one finding on stdout."""
    parser = argparse.ArgumentParser(prog="headrace doctor", description="Check a cluster: all nodes, red findings first.")
    parser.add_argument("--config", metavar="FILE", help="a run, in YAML: its storage and its needs are checked too")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of it")
    parser.add_argument("--address", metavar="HOST:PORT", help="the head; else RAY_ADDRESS, else a private cluster on this machine")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="the most that each step waits (60)")
    parser.add_argument("--min-gb-per-s", type=float, default=0.1, metavar="X", help="all-reduce slower than this is told (0.1)")
    parser.add_argument("--json", action="store_true", help="the findings as one JSON list")
    options = parser.parse_args(argv)
    if options.set and options.config is None:
        parser.error("--set changes a run: give --config too")
    if options.address:
        os.environ["RAY_ADDRESS"] = options.address

    def run() -> int:
        try:
            config = load_run(options.config, options.set) if options.config else None
            findings = diagnose(config, options.timeout, options.min_gb_per_s)
        except Exception as error:
            if options.json:
                print_json([Finding("red", "driver", *(without_secrets(each) for each in what_failed(error)))])
            raise
        findings = [Finding(**cleaned(asdict(finding))) for finding in findings]
        if options.json:
            print_json(findings)
        else:
            show(findings, [] if config else ["not checked: storage and a run's needs (give --config)"])
        return exit_code(findings)

    return exit_code_of(run, "nothing was changed")


def print_json(findings: list[Finding]) -> None:
    print(json.dumps([asdict(finding) for finding in findings], indent=1))


def what_failed(error: Exception) -> tuple[str, str, str]:
    """What a finding about an error that ends the check is about, what was seen, and the rule."""
    if isinstance(error, ClusterError):
        return "connection", str(error), "the cluster answers this client"
    if isinstance(error, HeadraceError):
        return "configuration", str(error), "the run that --config and --set describe is possible"
    return "doctor", f"{type(error).__name__}: {error}", "the check itself ends in order"


def diagnose(config: RunConfig | None, timeout_s: float, least_gb_per_s: float) -> list[Finding]:
    """Connects to the cluster of RAY_ADDRESS, or starts a private one, and judges it, red findings first. Raises ClusterError where it
    cannot connect."""
    wanted = needs_of(config, least_gb_per_s)
    with connected(total_cpus(wanted.needs.workers, wanted.needs.windows_ahead) if wanted.needs else 1):
        take_over_signals()  # Ray has put its own handler in their place
        wanted = replace(wanted, autoscaled=not is_private() and read_autoscaler(head_address()).manages)
        findings: list[Finding] = []
        check = None
        shared = None
        if config is not None and wanted.storage is not None:
            try:
                shared = put_object(wanted.storage, config.s3)
            except HeadraceError as error:
                findings.append(Finding("red", "driver", "storage", str(error), f"the driver writes in {wanted.storage}"))
            check = partial(check_storage, wanted.storage, config.s3, shared)
        places = {STORAGE: wanted.storage} if wanted.storage and not is_s3(wanted.storage) else {}
        try:
            seen = examine(places, check, measure, timeout_s)
        finally:
            if config is not None and wanted.storage is not None and shared is not None:
                with suppress(HeadraceError):  # each node says so itself
                    delete_object(wanted.storage, shared[0], config.s3)
    return findings + judge(seen.nodes, seen.bandwidth, wanted)


def measure(rank: int, world_size: int, where: str, backend: str, timeout_s: float) -> dict[int, float]:
    """`llm.parallel.all_reduce.measure`. Torch is imported where it runs: the driver needs none."""
    from llm.parallel import all_reduce

    return all_reduce.measure(rank, world_size, where, backend, timeout_s)


def needs_of(config: RunConfig | None, least_gb_per_s: float) -> Wanted:
    """What the run, or any where there is none, needs of a cluster, with this process's versions."""
    if config is None:
        return Wanted(versions(), least_gb_per_s=least_gb_per_s)
    storage = config.run.storage if is_s3(config.run.storage) else local_path(config.run.storage)
    parallel = config.parallel
    return Wanted(
        versions(),
        storage=storage,
        needs=Needs(parallel.min_workers or parallel.workers, parallel.tensor, config.data.windows_ahead, parallel.device),
        free_bytes=_free_bytes(config),
        least_gb_per_s=least_gb_per_s,
    )


def _free_bytes(config: RunConfig) -> dict[str, int]:
    """What the run's checkpoints take at most: those it keeps and the one being written. Empty for a family of unknown size."""
    parameters = num_parameters(model_config(config.model, None, lambda file: read_bytes(file, config.s3)))
    if parameters is None:
        return {}
    return {STORAGE: parameters * CHECKPOINT_BYTES_A_PARAMETER * (max(config.checkpoint.keep, 2) + 1)}


if __name__ == "__main__":
    from jobs import doctor  # what it hands to the nodes is then known by a name that they can import

    raise SystemExit(doctor.main())
