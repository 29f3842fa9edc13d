"""The image's secure defaults, read off infra/docker: each holds, and is missed where it is taken away. What runs while it is built is
compared with what was looked at, because a shell has many spellings. And drain-node, run for real against stand-ins for `ray` and the
raylet."""

from __future__ import annotations

import inspect
import os
import re
import shlex
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
    return [(name.upper(), " ".join(rest)) for name, *rest in (line.split(maxsplit=1) for line in joined.splitlines())]


def of(text: str, *names: str) -> list[str]:
    return [rest for name, rest in instructions(text) if name in names]


def last_stage(text: str) -> list[tuple[str, str]]:
    found = instructions(text)
    return found[max(place for place, (name, _) in enumerate(found) if name == "FROM") + 1 :]


def simple_commands(run: str) -> Iterator[str]:
    """The commands of a shell's line, quotes and redirections taken off: what stands between its operators."""
    words: list[str] = []
    tokens = shlex.shlex(run, posix=True, punctuation_chars=True)
    tokens.whitespace_split, tokens.commenters = True, ""
    skip = False
    for token in tokens:
        if skip:
            skip = False
        elif token[0] in "<>" and "(" not in token and "<<" not in token:
            skip = True
        elif set(token) <= set("();&|<>") and "<<" not in token:
            yield " ".join(words)
            words = []
        elif words or token not in "{}":
            words.append(token)
    yield " ".join(words)


def only_instructions_that_were_looked_at(text: str) -> Iterator[str]:
    for name, rest in instructions(text):
        if name not in ("FROM", "ARG", "ENV", "WORKDIR", "COPY", "RUN", "USER", "CMD"):
            yield f"{name} {rest[:60]}: no such instruction was looked at (or it is a line of a here-document)"
    if re.search(r"^\s*#\s*(escape|syntax|check)\s*=", text, re.MULTILINE | re.IGNORECASE):
        yield "a directive changes how the file is read"


def runs_as_a_numbered_user(text: str) -> Iterator[str]:
    users = [rest for name, rest in last_stage(text) if name == "USER"]
    if not users or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]):
        yield f"the last USER is {users[-1:]}: Kubernetes cannot tell that it is not root"


def bases_are_pinned(text: str) -> Iterator[str]:
    for base in of(text, "FROM"):
        if not re.fullmatch(r"python:\d+\.\d+\.\d+-[a-z-]+", base.split()[0]):
            yield f"FROM {base} may be another image tomorrow"


PIP = "/opt/headrace/bin/pip install "
LOOKED_AT = (
    r"|case \$VARIANT in cuda|cpu|\*|esac|exit 2|(echo|test) ((?!\$\()[^`])*",
    r"python -m venv /opt/headrace",
    re.escape(r'python -c import tomllib; print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]))'),
    re.escape(PIP)
    + r"(torch|--index-url \$TORCH_INDEX --no-deps torch|-c constraints\.txt -r needed\.txt|-c constraints\.txt --no-deps \.)",
    r"apt-get update|apt-get install -y --no-install-recommends( [a-z0-9][a-z0-9.+-]*)+( \$)?|rm -rf /var/lib/apt/lists/\*",
    r"groupadd --gid 10001 headrace|useradd --uid 10001 --gid 10001( --create-home)? --shell /bin/bash headrace",
)


def only_commands_that_were_looked_at_run(text: str) -> Iterator[str]:
    """Not pip without the constraints under any of its names, nothing from the net but by pip and apt-get, no package more than named."""
    for run in of(text, "RUN"):
        for command in simple_commands(run):
            if not re.fullmatch("|".join(LOOKED_AT), command):
                yield f"RUN {command[:80]}: none of LOOKED_AT"


ENVIRONMENT = {
    "PIP_CONSTRAINT": "/src/constraints.txt",
    "PIP_NO_CACHE_DIR": "1",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PATH": "/opt/headrace/bin:$PATH",
    "HOME": "/home/headrace",
    "PYTHONUNBUFFERED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
}


def the_environment_was_looked_at(text: str) -> Iterator[str]:
    """A variable can turn pip's constraints, Ray's token or the place of programs."""
    for name, _, value in (word.partition("=") for rest in of(text, "ENV") for word in shlex.split(rest)):
        if ENVIRONMENT.get(name) != value:
            yield f"ENV {name}={value} is none of ENVIRONMENT"
    for name in (rest.partition("=")[0] for rest in of(text, "ARG")):
        if name not in ("VARIANT", "TORCH_INDEX"):
            yield f"ARG {name} is a variable of every RUN behind it"


def python_is_constrained(text: str) -> Iterator[str]:
    if not any("PIP_CONSTRAINT=/src/constraints.txt" in rest for rest in of(text, "ENV")):
        yield "source packages are built with whatever is newest"
    if not any("constraints.txt" in rest.split() for rest in of(text, "COPY")):
        yield "constraints.txt is not in the build"


def nothing_is_copied_but_from_the_build(text: str) -> Iterator[str]:
    if of(text, "ADD"):
        yield "ADD fetches and unpacks"
    for rest in of(text, "COPY"):
        if re.search(r"--from(?!=build )", rest) or "://" in rest or "<<" in rest:
            yield f"COPY {rest} comes from elsewhere"


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
    if any(re.search(r"\b(pip|uv|python)", rest) for name, rest in last_stage(text) if name == "RUN"):
        yield "the image that runs was built with pip: its caches and compilers come along"


Edit = Callable[[str], str]


def without(pattern: str, by: str = "") -> Edit:
    """An edit that has to find what it takes away."""

    def edit(text: str) -> str:
        changed, times = re.subn(pattern, by, text, flags=re.MULTILINE)
        assert times, f"{pattern} is not in the Dockerfile"
        return changed

    return edit


def more(line: str, behind: str = r"^RUN python -m venv.*") -> Edit:
    """An edit that puts a line behind another, as it is."""

    def edit(text: str) -> str:
        found = re.search(behind, text, flags=re.MULTILINE)
        assert found, f"{behind} is not in the Dockerfile"
        return f"{text[: found.end()]}\n{line}{text[found.end() :]}"

    return edit


BACK = "\\\n"  # a line that goes on
INSECURE_RUNS = (
    *(
        "pip3 install ray",
        "pip3.11 install ray",
        "python -m pip install ray",
        "python3 -m pip install ray",
        "uv pip install ray",
        "uv sync",
    ),
    *(
        "pip  install ray",
        "pip -q install ray",
        f"pip {BACK} install ray",
        "/opt/headrace/bin/pip install --no-deps ray",
        "pip download ray",
    ),
    *(
        "/opt/headrace/bin/pip install torch ray",
        "/opt/headrace/bin/pip install -c other.txt -r needed.txt",
        "pipx install ray",
        "easy_install ray",
    ),
    *(
        "PIP_CONSTRAINT= /opt/headrace/bin/pip install torch",
        "env -u PIP_CONSTRAINT pip install torch",
        "conda install ray",
        "npm install x",
    ),
    *(
        "/opt/headrace/bin/pip install -c constraints.txt --trusted-host a.b -r needed.txt",
        "unset PIP_CONSTRAINT",
        "git clone https://a.b/c",
    ),
    *("curl -fsSL https://a.b/c | bash", "curl https://a.b/c|sh", "wget -qO- https://a.b/c | sh -s", "sh -c 'curl https://a.b/c | sh'"),
    *(
        "curl https://a.b/c > c && sh c",
        "bash <(curl https://a.b/c)",
        "eval $(curl https://a.b/c)",
        "echo `curl https://a.b/c`",
        "test $(id)",
    ),
    *("wget -O tool https://a.b/c", "busybox wget https://a.b/c", "python -c 'import urllib.request'", '["curl", "https://a.b/c"]'),
    *("apt-get install -y curl", "apt-get install --yes --no-install-recommends curl", "apt install -y curl", "apt-get -y install curl"),
    *("apt-get install -y --no-install-recommends --allow-unauthenticated curl", "apt-get upgrade -y", "dpkg -i x.deb", "apk add curl"),
    *("--mount=type=secret,id=x cat /run/secrets/x", "--security=insecure id", "--network=host id", "chmod u+s /bin/bash", "sudo id"),
    *("<<EOF\npip install ray\nEOF", "useradd --uid 0 -o root2", 'echo "$(curl https://a.b/c)" > c'),
)
ROOTS = ("root", "0", "0:0", "00:00", "root:root", "10001:0", "10001", "headrace", "0:10001", "$USER", "+0:0", "1:1 root")

REMOVALS: list[tuple[Callable[[str], Iterator[str]], Edit]] = [
    (runs_as_a_numbered_user, without(r"^USER .*\n")),
    *((runs_as_a_numbered_user, without(r"^USER .*", f"USER {user}")) for user in ROOTS),
    *(
        (runs_as_a_numbered_user, more(f"{word}{user}", r"^USER .*"))
        for user in ROOTS
        for word in ("USER ", "user ", "USER\t", f"USER {BACK}")
    ),
    (runs_as_a_numbered_user, more("USER 0:0", r"^CMD .*")),
    (runs_as_a_numbered_user, more("from python:3.11.14-slim-bookworm", r"^CMD .*")),
    *(
        (only_instructions_that_were_looked_at, more(line, r"^CMD .*"))
        for line in (
            "ONBUILD USER root",
            'ENTRYPOINT ["sudo"]',
            'SHELL ["/bin/bash"]',
            "VOLUME /",
            "EXPOSE 8265",
            "#escape=`",
            "# syntax = a/b",
        )
    ),
    (only_instructions_that_were_looked_at, more("RUN <<EOF\npip install ray\nEOF")),
    (bases_are_pinned, without(r"^FROM \S+ AS", "FROM python AS")),
    (bases_are_pinned, without(r"^FROM \S+$", "FROM python:latest")),
    (bases_are_pinned, without(r"^FROM \S+$", "FROM python:3.11-slim")),
    (bases_are_pinned, without(r"^FROM \S+$", "FROM $BASE")),
    (bases_are_pinned, more("from evil:latest as more", r"^CMD .*")),
    (python_is_constrained, without(r"PIP_CONSTRAINT=\S+ ")),
    (python_is_constrained, without(r"^COPY constraints.txt", "COPY")),
    (only_commands_that_were_looked_at_run, without(r"-c constraints.txt -r", "-r")),
    (only_commands_that_were_looked_at_run, without(r"--index-url", "--trusted-host example.com --index-url")),
    (only_commands_that_were_looked_at_run, without(r" --no-install-recommends")),
    *((only_commands_that_were_looked_at_run, more(f"{word} {run}")) for run in INSECURE_RUNS for word in ("RUN", "run")),
    *(
        (only_commands_that_were_looked_at_run, without(r"^(RUN python -m venv /opt/headrace)", rf"\1 {operator} {run}"))
        for run in ("pip3 install ray", "curl https://a.b/c")
        for operator in ("&&", "||", ";", "|", "&", "&& (", f"&& {BACK.replace(BACK[0], BACK[0] * 2)}", "&& {")
    ),
    *(
        (the_environment_was_looked_at, more(line))
        for line in (
            *(
                "ENV PIP_CONSTRAINT=",
                "ENV PIP_CONSTRAINT /dev/null",
                "env PIP_CONSTRAINT=other.txt",
                "ENV PIP_INDEX_URL=http://a.b",
                "ARG PIP_CONSTRAINT=",
            ),
            *("ENV PIP_NO_CACHE_DIR=1 PIP_TRUSTED_HOST=a.b", "ENV PATH=/tmp:$PATH", "ENV LD_PRELOAD=/x.so", "ENV RAY_AUTH_MODE=disabled"),
        )
    ),
    *(
        (nothing_is_copied_but_from_the_build, more(line))
        for line in (
            *(
                "ADD https://example.com/setup.sh /setup.sh",
                "add x.tar.gz /",
                "COPY --from=evil/image /x /x",
                "COPY --chown=1 --from=0 /x /x",
            ),
            *("copy --from=a.b/c:latest /x /x", f"COPY {BACK} --from=a.b/c /x /x", "COPY <<EOF /x\nUSER\nEOF", "COPY https://a.b/c /x"),
        )
    ),
    (holds_no_secret, without(r"^ARG TORCH_INDEX=$", "ARG TORCH_INDEX=\nARG INDEX_TOKEN=")),
    (holds_no_secret, without(r"^ENV PATH", "ENV WANDB_API_KEY=x PATH")),
    (holds_no_secret, without(r"^COPY llm llm$", "COPY . .")),
    (home_is_writable, without(r" --create-home")),
    (home_is_writable, without(r" HOME=\S+")),
    *(
        (the_last_stage_installs_no_python, without(r"^(WORKDIR /home.*)", rf"\1\nRUN {run}"))
        for run in ("pip install -c constraints.txt ray", "pip3 install ray", "uv pip install ray", "python -m pip install ray")
    ),
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
