"""A head that does not answer is told as gone, once the patience with it is over; an address that is none, with the nearest that is."""

from __future__ import annotations

import json
import os
import socket

import pytest

from cluster.errors import ClusterError, HeadLostError
from cluster.head import HeadWatch, require_head
from jobs import doctor
from tests.fake_job_server import answering


def test_a_head_is_gone_when_nothing_answers_any_more():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        impatient, patient = (HeadWatch(address, patience_s, every_s=0) for patience_s in (0, 1000))
        impatient.look()
    patient.look()
    with pytest.raises(HeadLostError, match=f"{address}.*Run the same command"):
        impatient.look()


HINT = "Give HOST:PORT of a head that lives (--address or RAY_ADDRESS); the port is what `ray start --head --port` named, else 6379."


SCHEME = (
    "'{0}' is an address with {1}, and a run connects to the head's control service, HOST:PORT. Nearest: {2}:6379, on a machine of the "
    "cluster; from elsewhere send the job there: headrace submit JOB --address {3} --config FILE."
)
CLIENT = "ray:// (Ray Client's, whose driver is no part of the cluster)"


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("http://10.0.0.1:8265", SCHEME.format("http://10.0.0.1:8265", "http:// (the dashboard's)", "10.0.0.1", "http://10.0.0.1:8265")),
        ("https://head", SCHEME.format("https://head", "https:// (the dashboard's)", "head", "https://head")),
        ("ray://head:10001", SCHEME.format("ray://head:10001", CLIENT, "head", "http://head:8265")),
        ("127.0.0.1:99999", f"'127.0.0.1:99999' has port 99999, and ports are 1 to 65535. Nearest: 127.0.0.1:6379. {HINT}"),
        ("127.0.0.1:0", f"'127.0.0.1:0' has port 0, and ports are 1 to 65535. Nearest: 127.0.0.1:6379. {HINT}"),
        ("127.0.0.1", f"'127.0.0.1' is no HOST:PORT. Nearest: 127.0.0.1:6379. {HINT}"),
        ("127.0.0.1:8265/x", f"'127.0.0.1:8265/x' is no HOST:PORT. Nearest: 127.0.0.1:6379. {HINT}"),
        ("[::1]:x", f"'[::1]:x' is no HOST:PORT. Nearest: HOST:6379. {HINT}"),
        ("127.0.0.1:1", f"no head answers at 127.0.0.1:1 (Connection refused). Nearest: 127.0.0.1:6379. {HINT}"),
        (
            "no.such.host.invalid:1",
            f"no head answers at 'no.such.host.invalid:1': no machine is known here as 'no.such.host.invalid'. {HINT}",
        ),
        ("a..b:6379", f"no head answers at 'a..b:6379': no machine is known here as 'a..b'. {HINT}"),
        ("me:hunter2@head:6379", f"the head's address holds a user name or password. Leave them out. {HINT}"),
    ],
)
def test_an_address_that_is_none_is_told_with_the_rule_and_the_nearest(address: str, told: str) -> None:
    with pytest.raises(ClusterError) as caught:
        require_head(address)
    assert str(caught.value) == told


@pytest.mark.parametrize("words", [b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", b"SSH-2.0-OpenSSH_9.2\r\n"])
def test_another_service_is_not_taken_for_a_head(words: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with (
        answering(words) as address,
        pytest.raises(ClusterError, match=rf"answers at {address} is not the control service"),
    ):
        require_head(address)


@pytest.mark.parametrize(
    ("words", "code", "what", "seen"),
    [
        (("--config", "none.yaml"), 2, "configuration", "There is no config file"),
        (("--config", "run.yaml"), 2, "configuration", "train.lr"),
        (("--address", "ray://head:10001"), 3, "connection", "'ray://head:10001' is an address with ray://"),
    ],
)
def test_the_doctor_tells_an_error_as_json_too(words, code: int, what: str, seen: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {**os.environ, "MY_TOKEN": "canary-0123456789"})
    (tmp_path / "run.yaml").write_text("train: {lr: 'no \"number\"'}\nrun: {name: canary-0123456789}")
    assert doctor.main([*words, "--json"]) == code
    told = capsys.readouterr()
    (finding,) = json.loads(told.out)
    assert (finding["severity"], finding["what"]) == ("red", what) and seen in finding["seen"]
    assert seen in told.err and "canary" not in told.out + told.err


def test_the_doctor_tells_its_own_mistakes_as_json_too(monkeypatch, capsys) -> None:
    def broken(*_: object) -> None:
        raise KeyError('Authorization: Digest "abc"')

    monkeypatch.setattr(doctor, "diagnose", broken)
    assert doctor.main(["--json"]) == 1
    (finding,) = json.loads(capsys.readouterr().out)
    assert finding["what"] == "doctor" and finding["seen"].startswith("KeyError: ") and "abc" not in finding["seen"]
