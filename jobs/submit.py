"""`headrace submit JOB --address http://HOST:8265 --config FILE`: a job on a cluster, as if it ran here."""

from __future__ import annotations

import argparse
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.errors import SubmitError
from cluster.job_server import JobServer
from cluster.package import inside, pack
from cluster.printable import printable
from cluster.submit import follow, submit
from jobs.exit_code import exit_code_of
from llm.config import NAME
from llm.config_file import load_run
from llm.model.presets import model_config
from llm.redact import without_secrets
from llm.search.sweep_config import load_sweep

JOBS = {
    "pretrain": ("jobs.pretrain", ()),
    "sweep": ("jobs.sweep", ()),
    "tune-batch": ("jobs.tune_batch", ()),
    "prepare": ("jobs.prepare", ("--tokens",)),
    "doctor": ("jobs.doctor", ()),
}
DETACHED = 130
LEFT_OUT_SHOWN = 5


def main(argv: list[str] | None = None) -> int:
    """The job's exit code; 0 with --no-wait; 130 where Ctrl-C left it alone; 2 where nothing was sent; 3 for trouble with the cluster."""
    parser = argparse.ArgumentParser(
        prog="headrace submit", description="Run a job on a cluster and follow it. Ctrl-C stops following, not the job."
    )
    parser.add_argument("job", choices=JOBS, metavar="JOB", help=", ".join(JOBS))
    parser.add_argument("--address", metavar="http://HOST:8265", help="the head's dashboard; default: RAY_API_SERVER_ADDRESS")
    parser.add_argument("--config", required=True, metavar="FILE", help="the run or sweep, in YAML, inside the working directory")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key: train.lr=1e-3")
    parser.add_argument(
        "--working-dir", type=Path, default=Path(), metavar="DIR", help="what goes along, at most 64 MiB; default: this one"
    )
    parser.add_argument("--id", metavar="ID", help="of the job; default: the run's or sweep's name")
    parser.add_argument("--no-wait", action="store_true", help="return when the job is submitted")
    options = parser.parse_args(argv)
    return exit_code_of(lambda: send(options), "nothing was submitted")


def send(options: argparse.Namespace) -> int:
    name, files = described(options.job, options.config, options.set)
    base = options.id or name
    if any(without_secrets(told) != told for told in (base, *options.set)):
        raise SubmitError(
            "a --set or the job's name holds a credential, or the value of a secret variable of this environment: the job server shows the "
            "commands of all jobs. Set that variable where the job runs, in the cluster's environment."
        )
    if not re.fullmatch(NAME, base):
        raise SubmitError(
            f"the job's id {base!r} ({len(base)} characters) must be a letter or digit and up to 99 more, or '.', '_' and '-'. Give "
            "one: --id ID."
        )
    package = pack(options.working_dir, files)
    if package.left_out:
        print(left_out(package.left_out), file=sys.stderr)
    server = JobServer(options.address)
    module, more = JOBS[options.job]
    where = inside(options.working_dir, Path(options.config)).as_posix()
    arguments = [*more, "--config", f"./{where}" if where.startswith("-") else where]
    for change in options.set:
        arguments += ["--set", change]
    sent = submit(server, base, module, arguments, package)
    size = f"{len(package.files)} files, {len(package.archive) / 2**20:.1f} MiB"
    told = f"submitted to {server.address} ({size})" if sent.is_new else "the same command and files run already as this job"
    print(f"{sent.job_id}: {told}", flush=True)
    if options.no_wait:
        print(how_to(sent.job_id, server.address))
        return 0
    return follow_to_the_end(server, sent.job_id)


def follow_to_the_end(server: JobServer, job_id: str) -> int:
    """Shows a job's log until it has ended, then its exit code. Ctrl-C leaves the job alone, and says how to come back."""
    # The log is read in an event loop, which ends in order at SIGINT where its handler is Python's own.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        state = follow(server, job_id, show)
    except KeyboardInterrupt:
        print(f"\n{job_id} goes on without this terminal.\n{how_to(job_id, server.address)}", file=sys.stderr)
        return DETACHED
    if state.exit_code:
        why = (
            f" with exit code {state.driver_exit_code}" if state.driver_exit_code is not None else f": {state.message or 'no reason given'}"
        )
        print(f"{job_id}: {state.status.lower()}{why}", file=sys.stderr)
    return state.exit_code


def described(job: str, config: str, overrides: Sequence[str]) -> tuple[str, list[Path]]:
    """The id that a job of this configuration gets, and the files that it reads. They are read here as the job will, so that a mistake is
    told before anything is sent. Raises ConfigError."""
    if job == "sweep":
        file = load_sweep(config, list(overrides), with_files=False).file
        if Path(file.run).is_absolute():
            raise SubmitError(
                f"{config}: run={file.run} is a path of this machine. Name the run relative to the sweep, as in run: run.yaml"
            )
        return file.sweep.name, [Path(config), Path(config).parent / file.run]
    run = load_run(config, overrides)
    if run.model.preset:  # a model.path is read where the job runs
        model_config(run.model, None, lambda uri: b"")
    name = run.run.name
    return name if job == "pretrain" else f"{name}-{job}", [Path(config)]


def left_out(paths: Sequence[Path]) -> str:
    named = ", ".join(printable(path.as_posix()) for path in paths[:LEFT_OUT_SHOWN])
    more = f" and {len(paths) - LEFT_OUT_SHOWN} more" if len(paths) > LEFT_OUT_SHOWN else ""
    return (
        f"not sent, as their names are those of files with secrets: {named}{more}. What the job needs of them belongs into the environment "
        "of the nodes; what holds no secret goes along under another name."
    )


def how_to(job_id: str, address: str) -> str:
    named = f"{shlex.quote(job_id)} --address {address}"
    return f"  follow it: headrace jobs logs --follow {named}\n  stop it:   headrace jobs stop {named}"


def show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
