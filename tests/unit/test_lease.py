"""Two drivers of one run: only one gets in, and one that was replaced knows."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llm.config import S3Section
from llm.errors import LeaseError
from llm.storage import write_bytes
from llm.train.lease import Lease, held_lease

S3 = S3Section()


def foreign(run: Path, number: int = 1) -> None:
    """Makes the newest lease that of a driver on another machine."""
    path = run / "lease" / f"{number:08d}.json"
    write(path, {**json.loads(path.read_text()), "machine": "another"})


def write(path: Path, fields: dict[str, object]) -> None:
    """As the lease itself does: a reader sees the old text or the new."""
    write_bytes(str(path), json.dumps(fields).encode(), S3)


def test_a_second_driver_is_refused_while_the_first_lives_and_let_in_after(tmp_path):
    run = str(tmp_path)
    with held_lease(run, S3, 30) as first:
        with pytest.raises(LeaseError, match="another driver"), held_lease(run, S3, 30):
            pass
        first.require()
    with held_lease(run, S3, 30) as second:
        assert second.fence.number == first.fence.number + 1
        with pytest.raises(LeaseError, match="taken over"):
            pickle.loads(pickle.dumps(first.fence)).check()  # noqa: S301 - our own bytes
        second.fence.check()


def test_a_driver_killed_on_this_machine_is_replaced_at_once(tmp_path):
    script = (
        "import os, sys; from llm.config import S3Section; from llm.train.lease import held_lease\n"
        f"with held_lease({str(tmp_path)!r}, S3Section(), 30): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], check=False).returncode == -9
    began_s = time.monotonic()
    with held_lease(str(tmp_path), S3, 30) as lease:
        assert lease.fence.number == 2
    assert time.monotonic() - began_s < 5


def test_a_heartbeat_elsewhere_that_moves_keeps_others_out(tmp_path):
    with held_lease(str(tmp_path), S3, 60):
        foreign(tmp_path)
        path = tmp_path / "lease" / "00000001.json"
        fields = json.loads(path.read_text())
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: (time.sleep(1.0), write(path, {**fields, "heartbeat": 7})))
            with pytest.raises(LeaseError), held_lease(str(tmp_path), S3, 10, lambda text: None):
                pass


def test_a_heartbeat_elsewhere_that_stands_still_gives_the_lease_up_and_its_owner_finds_out(tmp_path):
    told: list[str] = []
    first = Lease(str(tmp_path), S3, 3.0, 1)
    first._every_s = 4.0  # asleep for longer than its lease
    assert first.acquire()
    foreign(tmp_path)
    with held_lease(str(tmp_path), S3, 3.0, told.append) as second:
        assert second.fence.number == 2 and "watching its heartbeat" in told[0]
        deadline = time.monotonic() + 10
        with pytest.raises(LeaseError):
            while time.monotonic() < deadline:
                first.require()
                time.sleep(0.1)
        first.release()
        second.require()


def test_of_many_contenders_exactly_one_gets_the_lease(tmp_path):
    contenders = [Lease(str(tmp_path), S3, 30, 1) for _ in range(16)]
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(Lease.acquire, contenders))
    assert won.count(True) == 1
    contenders[won.index(True)].release()
    assert not list((tmp_path / "lease").glob(".*"))


@pytest.mark.parametrize("text", [b"", b'{"owner":', b"[1]", b"{}"])
def test_a_lease_that_lost_its_bytes_locks_nobody_out(tmp_path, text):
    write_bytes(str(tmp_path / "lease" / "00000003.json"), text, S3)
    with held_lease(str(tmp_path), S3, 1.0) as lease:
        assert lease.fence.number == 4
