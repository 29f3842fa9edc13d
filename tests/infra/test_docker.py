"""The image's secure defaults, read off infra/docker: each holds, and is missed where it is taken away. And drain-node, run for real
against stand-ins for `ray` and the raylet."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.infra.kuberay_build import REPO, built
from tests.infra.kuberay_policies import containers, pods

DOCKER = REPO / "infra" / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
IGNORED = (DOCKER / "Dockerfile.dockerignore").read_text()


def instructions(text: str) -> list[tuple[str, str]]:
    """Name and arguments of each instruction, continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split(maxsplit=1)[0].upper(), line.split(maxsplit=1)[1]) for line in joined.splitlines()]


def of(text: str, *names: str) -> list[str]:
    return [rest for name, rest in instructions(text) if name in names]


def runs_as_a_numbered_user(text: str) -> Iterator[str]:
    users = of(text.rsplit("\nFROM ", 1)[-1].partition("\n")[2], "USER")
    if not users or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]):
        yield f"the last USER is {users[-1:]}: Kubernetes cannot tell that it is not root"


def bases_are_pinned(text: str) -> Iterator[str]:
    for base in of(text, "FROM"):
        if not re.fullmatch(r"python:\d+\.\d+\.\d+-[a-z-]+", base.split()[0]):
            yield f"FROM {base} may be another image tomorrow"


def python_is_constrained(text: str) -> Iterator[str]:
    if not any("PIP_CONSTRAINT=/src/constraints.txt" in rest for rest in of(text, "ENV")):
        yield "source packages are built with whatever is newest"
    if not any("constraints.txt" in rest.split() for rest in of(text, "COPY")):
        yield "constraints.txt is not in the build"
    for run in of(text, "RUN"):
        for install in re.findall(r"pip install ([^&;]*)", run):
            if not re.search(r"-c constraints\.txt|--no-deps|^torch\b", install):
                yield f"pip install {install.strip()}: not from constraints.txt"


def nothing_is_fetched_unchecked(text: str) -> Iterator[str]:
    if of(text, "ADD"):
        yield "ADD fetches and unpacks"
    for run in of(text, "RUN"):
        if re.search(r"\b(curl|wget|git clone)\b[^|&;]*\w://|\|\s*(ba|z)?sh\b|--trusted-host", run):
            yield f"RUN {run[:60]}... executes or trusts what it fetched"


def holds_no_secret(text: str) -> Iterator[str]:
    for rest in of(text, "ARG", "ENV"):
        if re.search(r"(TOKEN|SECRET|PASSWORD|KEY)\b", rest, re.IGNORECASE):
            yield f"{rest} stays readable in the image's history"
    for rest in of(text, "COPY"):
        if rest.split()[-2] in (".", "./"):
            yield "COPY of the whole folder takes along what lies there"


def home_is_writable(text: str) -> Iterator[str]:
    if not any("useradd" in run and "--create-home" in run for run in of(text, "RUN")):
        yield "the user has no home"
    if not any(re.search(r"\bHOME=/home/headrace\b", rest) for rest in of(text, "ENV")):
        yield "HOME is left to the caller: a pod's user that passwd does not know has /"


def the_last_stage_installs_no_python(text: str) -> Iterator[str]:
    if any("pip install" in run for run in of(text.rsplit("\nFROM ", 1)[-1].partition("\n")[2], "RUN")):
        yield "the image that runs was built with pip: its caches and compilers come along"


Edit = Callable[[str], str]


def without(pattern: str, by: str = "") -> Edit:
    """An edit that has to find what it takes away."""

    def edit(text: str) -> str:
        changed, times = re.subn(pattern, by, text, flags=re.MULTILINE)
        assert times, f"{pattern} is not in the Dockerfile"
        return changed

    return edit


REMOVALS: list[tuple[Callable[[str], Iterator[str]], Edit]] = [
    (runs_as_a_numbered_user, without(r"^USER .*\n")),
    (runs_as_a_numbered_user, without(r"^USER .*", "USER headrace")),
    (runs_as_a_numbered_user, without(r"^USER .*", "USER 0:0")),
    (runs_as_a_numbered_user, without(r"^(USER .*)", r"\1\nUSER root")),
    (bases_are_pinned, without(r"^FROM \S+ AS", "FROM python AS")),
    (bases_are_pinned, without(r"^FROM \S+$", "FROM python:latest")),
    (bases_are_pinned, without(r"^FROM \S+$", "FROM python:3.11-slim")),
    (bases_are_pinned, without(r"^FROM \S+$", "FROM $BASE")),
    (python_is_constrained, without(r"PIP_CONSTRAINT=\S+ ")),
    (python_is_constrained, without(r"^COPY constraints.txt", "COPY")),
    (python_is_constrained, without(r"-c constraints.txt -r", "-r")),
    (nothing_is_fetched_unchecked, without(r"^(RUN python -m venv.*)", r"\1\nADD https://example.com/setup.sh /setup.sh")),
    (nothing_is_fetched_unchecked, without(r"^(RUN python -m venv.*)", r"\1\nRUN curl -fsSL https://example.com/setup.sh | bash")),
    (nothing_is_fetched_unchecked, without(r"^(RUN python -m venv.*)", r"\1\nRUN wget -O tool https://example.com/tool")),
    (nothing_is_fetched_unchecked, without(r"--index-url", "--trusted-host example.com --index-url")),
    (holds_no_secret, without(r"^ARG TORCH_INDEX=$", "ARG TORCH_INDEX=\nARG INDEX_TOKEN=")),
    (holds_no_secret, without(r"^ENV PATH", "ENV WANDB_API_KEY=x PATH")),
    (holds_no_secret, without(r"^COPY llm llm$", "COPY . .")),
    (home_is_writable, without(r" --create-home")),
    (home_is_writable, without(r" HOME=\S+")),
    (the_last_stage_installs_no_python, without(r"^(WORKDIR /home.*)", r"\1\nRUN pip install -c constraints.txt ray")),
]


@pytest.mark.parametrize("check", dict.fromkeys(check for check, _ in REMOVALS), ids=lambda check: check.__name__)
def test_the_image_is_secure(check: Callable[[str], Iterator[str]]) -> None:
    assert list(check(DOCKERFILE)) == []


@pytest.mark.parametrize(("check", "edit"), REMOVALS, ids=[f"{number}-{check.__name__}" for number, (check, _) in enumerate(REMOVALS)])
def test_each_default_of_the_image_is_missed(check: Callable[[str], Iterator[str]], edit: Edit) -> None:
    assert list(check(edit(DOCKERFILE))) != []


def test_the_build_sees_what_it_copies_and_nothing_else() -> None:
    patterns = [line for line in IGNORED.splitlines() if line and not line.startswith("#")]
    assert patterns[0] == "*"
    seen = {pattern[1:] for pattern in patterns if pattern.startswith("!")}
    copied = {
        source for rest in of(DOCKERFILE, "COPY") if "--from" not in rest for source in rest.split()[:-1] if not source.startswith("--")
    }
    assert seen == copied
    assert all((REPO / source).exists() for source in copied)


def test_the_image_is_what_the_manifests_run() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    user, group = of(DOCKERFILE, "USER")[-1].split(":")
    for name in ("base", "small", "spot", "multi-tenant"):
        for pod in pods(built(name)):
            context = pod.spec["securityContext"]
            assert (str(context["runAsUser"]), str(context["runAsGroup"])) == (user, group)
        for part in containers(built(name)):
            if part.role != "autoscaler":
                gpus = "nvidia.com/gpu" in part.spec["resources"]["limits"]
                assert part.spec["image"].endswith(f":{project['version']}-{'cuda' if gpus else 'cpu'}"), part
    build = next(run for run in of(DOCKERFILE, "RUN") if "$VARIANT" in run)
    assert re.findall(r" (\w+)\) ", build) == ["cuda", "cpu"]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[tuple[dict[str, str], subprocess.Popen[bytes], Path]]:
    """An environment in which `ray` writes down its arguments and `pgrep` finds a raylet, that raylet, and what `ray` wrote."""
    told, tools = tmp_path / "told", tmp_path / "bin"
    tools.mkdir()
    raylet = subprocess.Popen(["sleep", "60"], executable="/bin/sleep")
    scripts = {
        "ray": f'printf "%s\\n" "$@" >{told}',
        "pgrep": f"test -e {tmp_path}/gone && exit 1; echo {raylet.pid}",
        # The raylet's command line, which a process that is not one cannot have.
        "tr": r"printf '%s\n' /ray/raylet --node_id=abc0 '--agent=python --node-id=no --gcs-address=no' --gcs-address=10.0.0.1:6379",
    }
    for name, body in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    try:
        yield {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}, raylet, told
    finally:
        raylet.kill()
        raylet.wait()


def test_drain_node_tells_ray_and_waits_until_it_has_left(node: tuple[dict[str, str], subprocess.Popen[bytes], Path]) -> None:
    environment, raylet, told = node
    draining = subprocess.Popen([str(DOCKER / "drain-node"), "60"], env=environment)
    try:
        for _ in range(300):
            if told.exists() and told.read_text().endswith("60\n"):
                break
            with pytest.raises(subprocess.TimeoutExpired):  # it waits
                draining.wait(0.1)
        arguments = told.read_text().splitlines()
        assert arguments[0] == "drain-node"
        options = dict(zip(arguments[1::2], arguments[2::2], strict=True))
        assert options["--address"] == "10.0.0.1:6379"
        assert options["--node-id"] == "abc0"
        assert options["--deadline-remaining-seconds"] == "60"
        _known_to_ray(options)
        raylet.kill()
        raylet.wait()
        assert draining.wait(30) == 0
    finally:
        draining.kill()
        draining.wait()


def _known_to_ray(options: dict[str, str]) -> None:
    """The command is hidden in Ray, and its options may change: each is there, and the reason is one."""
    from ray.scripts.scripts import cli

    known = {option: parameter for parameter in cli.commands["drain-node"].params for option in parameter.opts}
    assert set(options) <= set(known)
    assert options["--reason"] in getattr(known["--reason"].type, "choices", ())


def test_drain_node_gives_up_when_the_time_is_up(node: tuple[dict[str, str], subprocess.Popen[bytes], Path]) -> None:
    environment, raylet, _ = node
    subprocess.run([str(DOCKER / "drain-node"), "1"], env=environment, timeout=60, check=True)
    assert raylet.poll() is None


def test_drain_node_has_nothing_to_do_where_ray_has_left(
    node: tuple[dict[str, str], subprocess.Popen[bytes], Path], tmp_path: Path
) -> None:
    environment, _, told = node
    (tmp_path / "gone").touch()
    subprocess.run([str(DOCKER / "drain-node"), "60"], env=environment, timeout=60, check=True)
    assert not told.exists()


def test_the_raylet_is_started_with_what_drain_node_reads() -> None:
    from ray._private import services

    source = inspect.getsource(services.start_raylet)
    assert '"--node_id={node_id}"' in source and '"--gcs-address={gcs_address}"' in source
