"""What every test runs under: a home of its own, no network services, and no process left behind at the end.

Environment variables are set here, at import, because Ray, Hugging Face and Hypothesis read them when imported.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid

import psutil
import pytest

SESSION_MARK = "HEADRACE_TEST_SESSION"  # inherited by every process that a test starts, also by orphans
SESSION_ID = uuid.uuid4().hex
GRACE_S = 15.0  # Ray's daemons take seconds to notice that their driver has gone

_home = tempfile.mkdtemp(prefix="headrace-home-")
os.environ.update(
    {
        "HOME": _home,  # Ray writes a token there
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
        "HYPOTHESIS_STORAGE_DIRECTORY": os.path.join(_home, "hypothesis"),  # noqa: PTH118 - a string for the environment
        SESSION_MARK: SESSION_ID,
    }
)

from hypothesis import settings  # noqa: E402 - it reads its folder from the environment

settings.register_profile("headrace", deadline=None)  # a busy machine is no failure
settings.load_profile("headrace")


def _left_over() -> list[psutil.Process]:
    """The living processes that this session started, whoever their parent is now."""
    found: list[psutil.Process] = []
    children = {process.pid for process in psutil.Process().children(recursive=True)}
    for process in psutil.process_iter():
        try:
            ours = process.pid in children or process.environ().get(SESSION_MARK) == SESSION_ID
            if not ours or process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            line = " ".join(process.cmdline())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        # Python's own helpers live exactly as long as the process that started them: this one.
        if process.pid in children and ("multiprocessing.resource_tracker" in line or "multiprocessing.forkserver" in line):
            continue
        found.append(process)
    return found


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails the session where a test left a process running, and ends that process."""
    left = _left_over()
    psutil.wait_procs(left, timeout=GRACE_S)
    left = _left_over()
    for process in left:
        try:
            told = f"pid {process.pid}: {' '.join(process.cmdline())[:200]}"
            process.kill()
        except psutil.NoSuchProcess:
            continue
        print(f"\nERROR: a test left a process running, {told}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    shutil.rmtree(_home, ignore_errors=True)
