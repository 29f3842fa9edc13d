"""The folder of a private cluster, without Ray."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from cluster import connect
from tests.small_run import ROOT

HOLD = """
import sys, time
from cluster.connect import _private_folder
with _private_folder(sys.argv[1]) as folder:
    print(folder, flush=True)
    time.sleep(600)
"""


def test_what_a_killed_process_left_is_removed_by_the_next_and_what_lives_is_not(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        held = Path(holder.stdout.readline().strip())
        stranger = tmp_path / "ray-of-another-program"
        stranger.mkdir()
        long_ago = time.time() - 2 * connect.LEFT_AFTER_S
        os.utime(held / connect.LOCK, (long_ago, long_ago))
        with connect._private_folder(str(tmp_path)) as folder:
            assert held.is_dir() and Path(folder).is_dir()
        assert not Path(folder).exists()
    finally:
        holder.kill()
        holder.communicate()
    assert held.is_dir(), "it was killed"
    with connect._private_folder(str(tmp_path)):
        assert not held.exists() and stranger.is_dir()


def test_what_others_put_beside_it_is_neither_waited_for_nor_removed(tmp_path):
    long_ago = time.time() - 2 * connect.LEFT_AFTER_S
    precious = tmp_path / "precious"
    precious.mkdir()
    for name in ("ray-pipe", "ray-link"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "ray-pipe" / connect.LOCK)
    (precious / connect.LOCK).touch()
    (tmp_path / "ray-link" / connect.LOCK).symlink_to(precious / connect.LOCK)
    (tmp_path / "ray-folder").symlink_to(precious)
    for path in (tmp_path / "ray-pipe" / connect.LOCK, precious / connect.LOCK):
        os.utime(path, (long_ago, long_ago))
    with connect._private_folder(str(tmp_path)):
        assert (precious / connect.LOCK).is_file() and (tmp_path / "ray-pipe").is_dir() and (tmp_path / "ray-link").is_dir()
