"""What is sent to a cluster, what is refused before, and that a log with broken connections is shown once."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import zipfile
from importlib import metadata
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import package, submit
from cluster.errors import ClusterError, HeadLostError, SubmitError
from cluster.job_server import JobServer, JobState, read_token
from cluster.package import pack
from cluster.printable import PrintableLog, printable
from jobs import jobs as listing
from jobs import submit as job
from tests.fake_job_server import Fake, answering, fake_job_server

ROOT = Path(__file__).parents[2]
RUN = """
run: {name: small}
model: {preset: llama_1m}
data: {seq_len: 32, sources: [{name: made, uri: corpus}]}
train: {steps: 4, batch_rows: 8, lr: 1.0e-2}
"""
TOKEN = "RAY_AUTH_TOKEN"


@pytest.fixture(autouse=True)
def no_other_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", TOKEN, "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)


def fake(**told) -> Fake:
    return Fake(**{"ray_version": metadata.version("ray"), **told})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(RUN)
    return tmp_path


def write(path: Path, text: str = "x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_same_files_go_along_as_with_ray(tmp_path: Path) -> None:
    for name in ("a.py", "runs/x", "runs/keep/y", "deep/b.py", "deep/c.log", "deep/er/d.log", ".hidden", "skipped", "data/1.bin"):
        write(tmp_path / name, name)
    write(tmp_path / ".gitignore", "runs/\n*.log\n!deep/er/d.log\n")
    write(tmp_path / ".rayignore", "/data\n")
    write(tmp_path / "deep" / ".rayignore", "b.py\n")
    from ray._private.runtime_env.packaging import create_package

    create_package(str(tmp_path), tmp_path.parent / "theirs.zip", include_gitignore=True)
    theirs = {name for name in zipfile.ZipFile(tmp_path.parent / "theirs.zip").namelist() if not name.endswith("/")}
    write(tmp_path / ".git" / "config", "url = https://me:secret@host/repo")
    write(tmp_path / "deep" / "__pycache__" / "a.pyc")
    ours = pack(tmp_path)
    assert set(zipfile.ZipFile(BytesIO(ours.archive)).namelist()) == theirs
    assert "deep/er/d.log" in theirs and "a.py" in theirs and "data/1.bin" not in theirs


SECRET_NAMES = (
    *(".env", "conf/.ENV.local", "prod.env", "ca/tls.pem", "tls.key", "id_rsa", "deep/id_ed25519.bak", ".netrc", ".pypirc", "token"),
    *(".aws/config", "me/.ssh/known", "credentials", "gcp-credentials.json", "Secrets.yaml", "terraform.tfstate", "kubeconfig"),
    *("deep/secrets/prod", "hf_token", "k8s/secret.yaml", "my-secrets.yml", ".bash_history"),
)
ORDINARY_NAMES = (
    "run.yaml",
    "id_rsa.pub",
    "environment.py",
    "tokenizer.json",
    "tokens.txt",
    "credentials.py",
    "secretive/a.py",
    "secret.py",
    "keys.txt",
)


def test_no_secret_goes_along_and_all_that_stays_is_told(folder: Path, capsys) -> None:
    for name in (*SECRET_NAMES, *ORDINARY_NAMES[1:]):
        write(folder / name, name)
    (folder / "plain.txt").symlink_to(folder / ".env")
    (folder / "conf" / "link").symlink_to(folder / ".aws")
    (folder / "loop").symlink_to("loop")
    found = pack(folder)
    assert {path.as_posix() for path in found.files} == set(ORDINARY_NAMES)
    folders = {".aws/config": ".aws", "me/.ssh/known": "me/.ssh", "deep/secrets/prod": "deep/secrets"}
    told = {*(folders.get(name, name) for name in SECRET_NAMES), "plain.txt", "conf/link"}
    assert {path.as_posix() for path in found.left_out} == told
    assert set(zipfile.ZipFile(BytesIO(found.archive)).namelist()) == set(ORDINARY_NAMES)
    write(folder / ".rayignore", "*\n!run.yaml\n!.env\n")
    with fake_job_server(fake()) as there:
        words = ["pretrain", "--address", there.address, "--config", "run.yaml", "--no-wait"]
        assert job.main(words) == 0
        assert capsys.readouterr().err == (
            "not sent, as their names are those of files with secrets: .env. What the job needs of them belongs into the environment of "
            "the nodes; what holds no secret goes along under another name.\n"
        )
        (folder / ".rayignore").unlink()
        assert job.main(words) == 0
        assert " and 19 more. What" in capsys.readouterr().err
        write(folder / "prod.env", RUN)
        assert job.main([*words[:4], "prod.env", "--no-wait"]) == 2
        assert "prod.env would not be uploaded: its name is that of files with secrets" in capsys.readouterr().err


def test_equal_files_make_equal_packages(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name / "a.py")
    os.utime(tmp_path / "two" / "a.py", (0, 0))
    assert pack(tmp_path / "one").uri == pack(tmp_path / "two").uri
    write(tmp_path / "two" / "a.py", "y")
    assert pack(tmp_path / "one").uri != pack(tmp_path / "two").uri


def test_too_much_is_refused_by_its_largest_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "LIMIT_BYTES", 3 << 20)
    for name, size in (("data/a.bin", 2 << 20), ("data/b.bin", 1 << 20), ("model.bin", 1 << 19), ("small.py", 10)):
        write(tmp_path / name, "x" * size)
    with pytest.raises(SubmitError) as caught:
        pack(tmp_path)
    told = str(caught.value).splitlines()
    assert "has 3.5 MiB in 4 files; at most 3.0 MiB" in told[0]
    assert [line.split()[-1] for line in told[1:4]] == ["data/", "model.bin", "small.py"]
    assert "data/a.bin is the largest file" in str(caught.value) and ".rayignore" in told[-1]
    write(tmp_path / ".rayignore", "data\n")
    assert len(pack(tmp_path).files) == 3


def test_links_that_go_round_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    with pytest.raises(SubmitError, match="is a link to a folder that it is in"):
        pack(tmp_path)


@given(st.text(max_size=40), st.lists(st.lists(st.integers(0, 40), max_size=5), max_size=5))
def test_a_log_is_shown_once_however_it_comes(log: str, connections: list[list[int]]) -> None:
    """Each connection tells the log from its start, in pieces, up to where it breaks."""
    seen: list[str] = []
    shown = submit._Shown(seen.append)
    for ends in connections:
        at = 0
        for end in sorted(ends):
            shown.piece(log[at:end], at)
            at = max(at, min(end, len(log)))
    shown.whole(log)
    assert "".join(seen) == log


def test_broken_connections_repeat_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "LOOK_S", 0.01)
    log = "".join(f"line {i}\n" for i in range(40))
    with fake_job_server(fake(log=log, cuts=[35, 3, 140], exit_code=3)) as there:
        seen: list[str] = []
        state = submit.follow(JobServer(there.address), "a", seen.append)
    assert there.connections == 4 and "".join(seen) == log
    assert state.exit_code == 3


def test_a_head_that_starts_again_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands before it, or it itself, answers for a while as if something were wrong."""
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        there.status = 200 if len(waits) > 2 else 503

    monkeypatch.setattr(submit.time, "sleep", sleep)
    with fake_job_server(fake(log="all\n")) as there:
        server, seen = JobServer(there.address), list[str]()
        there.status = 502
        state = submit.follow(server, "a", seen.append)
    assert state.exit_code == 0 and "".join(seen) == "all\n" and len(waits) == 3


def test_a_log_is_shown_as_it_grows_where_no_connection_for_pieces_comes_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "LOOK_S", 0.01)
    with fake_job_server(fake(log="one\n", more={"status": "RUNNING"}, no_tail=True)) as there:
        seen: list[str] = []

        def show(text: str) -> None:
            seen.append(text)
            there.log, there.more = "one\ntwo\n", {"status": "SUCCEEDED", "driver_exit_code": 0}

        submit.follow(JobServer(there.address), "a", show)
    assert seen == ["one\n", "two\n"]


def test_a_long_log_that_is_read_whole_each_time_keeps_the_head_busy_for_a_tenth_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, rests = [100.0], []

    class Slow(JobServer):
        def log(self, job_id: str) -> str:
            clock[0] += (4.0, 0.01, 1000.0, 0.0)[len(rests)]
            return "so far\n"

    with fake_job_server(fake(more={"status": "RUNNING"}, no_tail=True)) as there:

        def sleep(rest_s: float) -> None:
            rests.append(rest_s)
            there.more = {"status": "RUNNING" if len(rests) < 3 else "STOPPED"}

        monkeypatch.setattr(submit, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
        submit.follow(Slow(there.address), "a", lambda text: None)
    assert rests == [36.0, submit.LOOK_S, submit.REST_AT_MOST_S]


def test_exit_codes_are_those_of_a_shell() -> None:
    def ended(status: str, code: int | None) -> int:
        return JobState("a", status, "", {}, "", "", None, None, code).exit_code

    assert [ended("FAILED", 2), ended("FAILED", -9), ended("FAILED", None), ended("STOPPED", None)] == [2, 137, 1, 1]
    assert ended("SUCCEEDED", 0) == 0


def test_who_does_not_answer_is_told_by_its_cause() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(HeadLostError, match=r"nobody answers at .*Connection refused.*8265"):
        JobServer(f"127.0.0.1:{port}")
    with fake_job_server(fake(status=401)) as there, pytest.raises(ClusterError, match="wants a token, and there is none here"):
        JobServer(there.address)
    with fake_job_server(fake(status=403)) as there, pytest.raises(ClusterError, match="refuses this client's token"):
        JobServer(there.address)
    with (
        fake_job_server(fake(ray_version="2.9.0")) as there,
        pytest.raises(ClusterError, match=r"runs Ray 2\.9\.0, and this client has Ray"),
    ):
        JobServer(there.address)
    for address in ("ray://head:10001", "http://head:8265/api", "ftp://head", "http://", "http://head:99999", "head:0", "head:-1"):
        with pytest.raises(ClusterError, match=r"is no address of a job server: http\(s\)://HOST:PORT, with a port of 1 to 65535"):
            JobServer(address)
    with pytest.raises(ClusterError, match="holds a user name or password") as caught:
        JobServer("http://me:canary@head:8265")
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    ("scheme", "words", "told"),
    [
        (
            "http",
            b"SSH-2.0-\x1b[31mOpenSSH\r\n",
            r"answers, but not in HTTP \('SSH-2\.0-\\x1b\[31mOpenSSH.*it is another service\. Give .*8265",
        ),
        ("http", b"\x15\x03\x01\x00\x02\x02\n", "answers, but not in HTTP"),
        ("http", b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000 + b"\r\n\r\n", "answers, but not in HTTP"),
        ("http", b"", "nobody answers .*the connection is closed without an answer"),
        ("https", b"HTTP/1.1 200 OK\r\n\r\n", r"answers, but not in TLS\. Nearest: http://127\.0\.0\.1:"),
    ],
)
def test_who_answers_something_else_is_told_as_what_it_is(scheme: str, words: bytes, told: str) -> None:
    with answering(words) as address, pytest.raises(ClusterError, match=told):
        JobServer(f"{scheme}://{address}")


def test_the_address_that_is_named_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with fake_job_server(fake()) as there:
        assert JobServer(there.address).jobs() == []
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", there.address)
        assert JobServer(None).address == there.address


def test_the_token_is_where_ray_looks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_token() is None
    write(tmp_path / ".ray" / "auth_token", "at home\n")
    assert read_token() == "at home"
    write(tmp_path / "named", "named\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "named"))
    assert read_token() == "named"
    monkeypatch.setenv(TOKEN, "given")
    assert read_token() == "given"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert read_token() is None
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.delenv(TOKEN)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "gone"))
    with pytest.raises(ClusterError, match=r"RAY_AUTH_TOKEN_PATH=.*gone cannot be read"):
        read_token()


def test_a_job_runs_its_module_with_the_configuration_of_the_working_directory(folder: Path, capsys) -> None:
    write(folder / "sub" / "run.yaml", RUN)
    with fake_job_server(fake()) as there:
        words = ["--address", there.address, "--config", "sub/run.yaml", "--set", "train.lr=1e-3", "--no-wait"]
        assert job.main(["tune-batch", *words, "--working-dir", "."]) == 0, capsys.readouterr().err
        assert job.main(["doctor", *words, "--working-dir", "."]) == 0
        assert job.main(["prepare", *words, "--working-dir", "sub", "--id", "mine"]) == 0
    tuned, looked, prepared = there.submitted
    assert (tuned["submission_id"], prepared["submission_id"]) == ("small-tune-batch", "mine")
    assert tuned["entrypoint"] == "exec python -m jobs.tune_batch --config sub/run.yaml --set train.lr=1e-3"
    assert looked["entrypoint"] == "exec python -m jobs.doctor --config sub/run.yaml --set train.lr=1e-3"
    assert prepared["entrypoint"] == "exec python -m jobs.prepare --tokens --config run.yaml --set train.lr=1e-3"
    sent = [each["runtime_env"]["working_dir"] for each in there.submitted]
    assert [f"gcs://{name}" for name in there.packages] == list(dict.fromkeys(sent)), "the same files are sent once"
    assert "headrace jobs stop mine --address http://" in capsys.readouterr().out


SWEEP = """
sweep: {name: widths}
run: RUN
space: {train.lr: {choice: [1.0e-2, 1.0e-3]}}
budget: {trials: 2}
"""


def test_a_sweep_takes_its_run_along(folder: Path, capsys) -> None:
    write(folder / "work" / "base.yaml", RUN + "eval: {every_steps: 2, rows: 8}\n")
    write(folder / "base.yaml", RUN + "eval: {every_steps: 2, rows: 8}\n")
    with fake_job_server(fake()) as there:
        words = ["sweep", "--address", there.address, "--config", "work/sweep.yaml", "--working-dir", "work", "--no-wait"]
        for run, told in (
            ("../base.yaml", "is not inside the working directory"),
            (str(folder / "base.yaml"), "is a path of this machine"),
        ):
            write(folder / "work" / "sweep.yaml", SWEEP.replace("RUN", run))
            assert job.main(words) == 2 and told in capsys.readouterr().err
        assert there.submitted == []
        write(folder / "work" / "sweep.yaml", SWEEP.replace("RUN", "base.yaml"))
        assert job.main(words) == 0, capsys.readouterr().err
    assert there.submitted[0]["submission_id"] == "widths"
    assert there.submitted[0]["entrypoint"] == "exec python -m jobs.sweep --config sweep.yaml"


def test_a_model_on_the_clusters_storage_is_searched_without_being_read_here(folder: Path, capsys) -> None:
    write(folder / "run.yaml", RUN.replace("preset: llama_1m", "path: /on/the/cluster/only") + "eval: {every_steps: 2, rows: 8}\n")
    space = "model.config.hidden_size: {choice: [64, 128]}"
    write(folder / "sweep.yaml", SWEEP.replace("RUN", "run.yaml").replace("space: {", f"space: {{{space}, "))
    with fake_job_server(fake()) as there:
        assert job.main(["sweep", "--address", there.address, "--config", "sweep.yaml", "--no-wait"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("change", ["run.storage=s3://b/CANARY", "tokenizer.eos=CANARY", "train.lr=CANARY"])
def test_a_secret_on_the_command_line_is_refused(change: str, folder: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-0123456789")
    with fake_job_server(fake()) as there:
        words = ["pretrain", "--address", there.address, "--config", "run.yaml", "--no-wait"]
        assert job.main([*words, "--set", change.replace("CANARY", "canary-0123456789")]) == 2
    assert "canary" not in capsys.readouterr().err and there.submitted == []


def test_an_id_is_used_once(folder: Path) -> None:
    def known(job_id: str, status: str) -> dict:
        return {"submission_id": job_id, "status": status, "metadata": {submit.BASE: "small"}, "entrypoint": "e"}

    with fake_job_server(fake(jobs=[known("small", "STOPPED"), known("small-2", "FAILED")])) as there:
        sent = submit.submit(JobServer(there.address), "small", "jobs.pretrain", [], pack(folder))
        assert (sent.job_id, sent.is_new) == ("small-3", True)
        there.jobs.append(known("small-3", "PENDING"))
        with pytest.raises(ClusterError, match="small-3 is pending, with another command"):
            submit.submit(JobServer(there.address), "small", "jobs.pretrain", [], pack(folder))
        there.jobs[-1] |= {"entrypoint": there.submitted[0]["entrypoint"], "runtime_env": there.submitted[0]["runtime_env"]}
        again = submit.submit(JobServer(there.address), "small", "jobs.pretrain", [], pack(folder))
    assert (again.job_id, again.is_new, len(there.submitted)) == ("small-3", False, 1)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("none.yaml", "There is no config file"),
        ("../run.yaml", "is not inside the working directory"),
        ("hidden.yaml", "would not be uploaded"),
        ("wrong.yaml", "train.lr"),
        ("preset.yaml", "model.preset='llama_1M' is unknown"),
        (f"{'n' * 99}.yaml", "(110 characters) must be"),
    ],
)
def test_a_configuration_that_the_job_cannot_read_is_refused_before_anything_is_sent(config: str, told: str, folder: Path, capsys) -> None:
    write(folder / "work" / "hidden.yaml", RUN)
    write(folder / "work" / ".rayignore", "hidden.yaml\n")
    write(folder / "work" / "wrong.yaml", RUN.replace("1.0e-2", "-1"))
    write(folder / "work" / "preset.yaml", RUN.replace("llama_1m", "llama_1M"))
    write(folder / "work" / f"{'n' * 99}.yaml", RUN.replace("name: small", f"name: {'n' * 99}"))
    with fake_job_server(fake()) as there:
        what = "tune-batch" if config.startswith("nn") else "pretrain"
        words = [what, "--address", there.address, "--config", f"work/{config}", "--working-dir", "work"]
        assert job.main(words) == 2
    assert told in capsys.readouterr().err
    assert (there.submitted, there.packages) == ([], [])


def test_submitting_needs_no_torch() -> None:
    code = "import sys, jobs.submit, jobs.jobs; print(sorted({'torch', 'ray', 'transformers', 'deepspeed'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ran.stdout.strip(), ran.stderr) == ("[]", "")


def test_what_an_attacker_would_send_is_refused_in_one_line(folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("MY_TOKEN", "it's-a-secret1")
    for words, told in (
        (["--set", "run.storage=/data/it's-a-secret1"], "a --set or the job's name holds a credential"),
        (["--id", "it's-a-secret1"], "a --set or the job's name holds a credential"),
        (["--id", ".."], "the job's id '..' \\(2 characters\\) must be"),
        (["--id=-x"], "the job's id '-x' \\(2 characters\\) must be"),
        (["--id", "x\n"], "must be a letter or digit"),
        (["--id", "x" * 101], "must be a letter or digit"),
        (["--address", "http://[::1"], "is no address of a job server"),
        (["--address", f"http://{'h' * 300}:1"], "did not answer|nobody answers"),
    ):
        assert job.main(["pretrain", "--address", "127.0.0.1:1", "--config", "run.yaml", *words]) in (2, 3)
        error = capsys.readouterr().err
        assert re.search(told, error) and "a-secret1" not in error and error.count("\n") == 1, error
    for token in ("one\ntwo", "€uro-token"):
        monkeypatch.setenv(TOKEN, token)
        with pytest.raises(ClusterError, match=r"the token of RAY_AUTH_TOKEN holds a line break or a character"):
            read_token()
    monkeypatch.delenv(TOKEN)
    (folder / os.fsdecode(b"bad\xff.txt")).write_text("x")
    with pytest.raises(SubmitError, match="has a name that is not UTF-8"):
        pack(folder)


def test_no_job_is_called_by_dots(folder: Path) -> None:
    with fake_job_server(fake()) as there:
        for name in ("", ".", ".."):
            with pytest.raises(ClusterError, match="no job can be called"):
                JobServer(there.address).job(name)


HOSTILE = "\x1b]52;c;ZXZpbA==\x07\x1b[2J\x9b31m\x08\r\u202e\ud800"
HARMFUL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800]")


def hostile_job(**more) -> dict:
    told = {
        "submission_id": f"x{HOSTILE}\n\nfaked",
        "status": f"RUNNING{HOSTILE}",
        "entrypoint": f"evil{HOSTILE}",
        "message": f"m{HOSTILE}",
    }
    return {**told, "metadata": {submit.BASE: "small"}, "runtime_env": {"working_dir": HOSTILE}, **more}


def test_no_control_character_of_a_server_reaches_the_terminal(folder: Path, capsys) -> None:
    with fake_job_server(fake(jobs=[hostile_job()], more={**hostile_job(), "message": f"one\nstatus    fine{HOSTILE}"})) as there:
        named = ["--address", there.address]
        assert listing.main(["list", *named]) == 0
        assert listing.main(["status", "a", *named]) == 0
        shown = capsys.readouterr().out
        assert "\n          status    fine" in shown, "a line of the message looks like a field"
        assert listing.main(["stop", "a", *named]) == 3
        assert listing.main(["list", *named]) == 0
        assert job.main(["pretrain", *named, "--config", "run.yaml", "--no-wait"]) == 3
        told = capsys.readouterr()
        assert "x\\x1b]52;c;ZXZpbA==" in told.out and "the job x\\x1b]52" in told.err
        there.status, there.answer = 500, f"{HOSTILE[:-1]}\nTraceback\x1b[2J"
        assert listing.main(["list", *named]) == 3
    with fake_job_server(fake(ray_version=f"2.9{HOSTILE}")) as there:
        assert listing.main(["list", "--address", there.address]) == 3
    told = shown + told.out + told.err + "".join(capsys.readouterr())
    assert "Traceback\\x1b" in told and "2.9\\x1b" in told
    assert HARMFUL.search(told) is None


def test_an_id_that_a_server_tells_is_no_command_to_copy(folder: Path, capsys) -> None:
    with fake_job_server(fake()) as there:
        words = ["pretrain", "--address", there.address, "--config", "run.yaml", "--no-wait"]
        assert job.main(words) == 0
        there.jobs.append(hostile_job(submission_id="x; rm -rf ~", status="RUNNING", entrypoint=there.submitted[0]["entrypoint"]))
        there.jobs[0]["runtime_env"] = there.submitted[0]["runtime_env"]
        capsys.readouterr()
        assert job.main(words) == 0
    assert "logs --follow 'x; rm -rf ~' --address" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more", [{"start_time": 1e300}, {"start_time": "x"}, {"driver_exit_code": "1"}, {"metadata": [1]}, {"status": None}]
)
def test_a_state_that_is_none_is_told_as_one(more: dict) -> None:
    with fake_job_server(fake(more=more)) as there, pytest.raises(ClusterError, match="answers, but not as Ray's job server"):
        JobServer(there.address).job("a")


def test_a_log_comes_without_what_a_terminal_obeys(capsys) -> None:
    log = f"10%\r\x1b[32m20%\x1b[0m\tdone\x1b[1A\n{HOSTILE[:-1]}end\n"
    with fake_job_server(fake(log=log)) as there:  # the fake cuts it into pieces of 7
        assert listing.main(["logs", "a", "--follow", "--address", there.address]) == 0
        assert listing.main(["logs", "a", "--address", there.address]) == 0
    assert capsys.readouterr().out == 2 * "10%\r20%\tdone\n]52;c;ZXZpbA==31m\rend\n"


@given(st.text(st.sampled_from("ab\n\r\t\x1b[;0mé\x07\x9b")), st.lists(st.integers(0, 20)))
def test_a_log_is_printable_however_it_is_cut(log: str, sizes: list[int]) -> None:
    def shown(pieces: list[str]) -> str:
        seen: list[str] = []
        printed = PrintableLog(seen.append)
        for piece in pieces:
            printed(piece)
        return "".join(seen)

    pieces, at = [], 0
    for size in sizes:
        pieces.append(log[at : at + size])
        at += size
    assert shown([*pieces, log[at:]]) == shown([log])
    assert set(shown([log])) <= set("ab\n\r\t[;0mé")


@given(st.text())
def test_a_printable_text_is_one_line_and_ordinary_text_stays(text: str) -> None:
    assert printable(text).isprintable()
    assert printable(text) == text or not text.isprintable()
