"""The console script `headrace`: the jobs as sub-commands. Only the chosen job is imported, so `--help` is instant."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

JOBS = {
    "pretrain": "train a language model from raw text",
    "sweep": "search the settings of a run that train best",
    "prepare": "write the embedded corpus and its tokenizer to disk",
    "train-tokenizer": "train a tokenizer on the corpus",
    "tune-batch": "find the micro-batch that fits, and the critical batch size",
    "checkpoints": "list, verify, inspect and compare a run's checkpoints",
    "export": "write a Hugging Face folder from any checkpoint of a run",
    "doctor": "check a cluster: versions, disks, clocks, ports, storage, speed between nodes",
    "submit": "run one of these on a cluster, and follow it",
    "jobs": "list, follow and stop the jobs of a cluster",
    "trace": "print the documents that made a step's batch",
}
USAGE = "usage: headrace COMMAND [options]      (headrace COMMAND --help tells the options; --version, --help)"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one job and returns its exit status; 2 for an unknown command or a mixed installation."""
    command, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help", "help"):
        print("\n".join([USAGE, "", *(f"  {name:16}{what}" for name, what in JOBS.items())]))
        return 0
    if command == "--version":
        print(f"headrace {_version()}")
        return 0
    name = command.replace("_", "-")
    if name not in JOBS:
        close = difflib.get_close_matches(name, JOBS, n=1)
        hint = f" Nearest: {close[0]}." if close else ""
        return _refuse(f"unknown command {command!r}.{hint} Commands: {', '.join(JOBS)}")
    if mixed := mixed_checkouts():
        return _refuse(mixed)
    from llm.errors import HeadraceError  # after the check: it may be another project's llm

    try:
        return importlib.import_module(f"jobs.{name.replace('-', '_')}").main(rest)
    except KeyboardInterrupt:
        return 130
    except HeadraceError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code


def mixed_checkouts() -> str | None:
    """What is wrong where cluster, llm and jobs do not lie in one folder: others use these generic names too."""
    homes: dict[str, str] = {}
    for package in ("cluster", "llm", "jobs"):
        spec = importlib.util.find_spec(package)
        homes[package] = str(Path(spec.origin).resolve().parent.parent) if spec and spec.origin else "nowhere"
    if len(set(homes.values())) == 1:
        return None
    found = ", ".join(f"{package} in {home}" for package, home in homes.items())
    return (
        f"cluster, llm and jobs must come from one checkout of Headrace, and here they are {found}. "
        "Uninstall the package that has the same name (pip uninstall llm), or start from Headrace's own folder"
    )


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("headrace")
    except metadata.PackageNotFoundError:
        return "(not installed: run make setup)"


def _refuse(text: str) -> int:
    print(f"headrace: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
