"""`headrace jobs list|status|logs|stop`: the jobs that were submitted to a cluster."""

from __future__ import annotations

import argparse
import re
import sys
from datetime import datetime

from cluster.job_server import JobServer, JobState
from cluster.printable import PrintableLog
from cluster.submit import BASE, stop
from jobs.checkpoints import show as show_table
from jobs.exit_code import exit_code_of
from jobs.submit import follow_to_the_end, show

TITLES = ("id", "status", "exit code", "started", "took")
ABOUT = {
    "list": "one line a job, the oldest first",
    "status": "what one job is, and how it ended",
    "logs": "what a job has printed so far",
    "stop": "end a job in order, and wait until it has ended",
}


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0; of `logs --follow` the job's; 3 where the cluster is in the way or knows no such job."""
    parser = argparse.ArgumentParser(prog="headrace jobs", description="The jobs that were submitted to a cluster.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, what in ABOUT.items():
        command = commands.add_parser(name, help=what, description=what)
        if name != "list":
            command.add_argument("id", metavar="ID", help="as `list` tells it")
        if name == "logs":
            command.add_argument("--follow", action="store_true", help="go on until the job has ended; Ctrl-C leaves it alone")
        command.add_argument("--address", metavar="http://HOST:8265", help="the head's dashboard; default: RAY_API_SERVER_ADDRESS")
    options = parser.parse_args(argv)
    return exit_code_of(
        lambda: act(options), "a job that was asked to end still ends" if options.command == "stop" else "no job was changed"
    )


def act(options: argparse.Namespace) -> int:
    server = JobServer(options.address)
    if options.command == "list":
        show_table((*TITLES, "job"), [(*row(job), kind(job)) for job in server.jobs()])
        return 0
    if options.command == "logs":
        if options.follow:
            return follow_to_the_end(server, options.id)
        PrintableLog(show)(server.log(options.id))
        return 0
    if options.command == "stop":
        return end(server, options.id)
    state = server.job(options.id)
    told = zip((*TITLES, "command", "told"), (*row(state), state.entrypoint.removeprefix("exec "), state.message), strict=True)
    indent = " " * 10  # of a message's further lines too: none looks like a field
    print("\n".join(f"{title:10}{value}".replace("\n", f"\n{indent}") for title, value in told if value))
    return 0


def end(server: JobServer, job_id: str) -> int:
    before = server.job(job_id)
    state = before if before.ended else stop(server, job_id)
    print(f"{job_id}: {'had ended before' if before.ended else 'has ended'} ({state.status.lower()})")
    for other in server.jobs():
        if before.ended and not other.ended and other.metadata.get(BASE) == before.metadata.get(BASE, job_id):
            print(f"{other.job_id} is its successor, and {other.status.lower()}: name that one to stop it")
    return 0


def row(job: JobState) -> tuple[str, ...]:
    code = "" if job.driver_exit_code is None else str(job.exit_code)
    began = "" if job.began_at_s is None else datetime.fromtimestamp(job.began_at_s).isoformat(" ", "seconds")
    took = "" if job.began_at_s is None or job.ended_at_s is None else f"{job.ended_at_s - job.began_at_s:.0f} s"
    return job.job_id, job.status.lower(), code, began, took


def kind(job: JobState) -> str:
    """pretrain, sweep, ...; for jobs that others submitted, how their command begins."""
    found = re.match(r"(?:exec )?python -m jobs\.(\w+)", job.entrypoint)
    return found[1] if found else job.entrypoint.partition("\n")[0][:40]


if __name__ == "__main__":
    sys.exit(main())
