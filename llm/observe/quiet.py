"""Third-party noise goes to a log file; errors go to the user's terminal as well. Nothing happens at import.

`redirect_noise` is for the driver, `quiet_worker` for a training worker. Ray, DeepSpeed and transformers install
console handlers of their own whenever they are first imported, so taking those away once would not do: their loggers
are made to refuse them.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from llm.errors import StorageError
from llm.redact import clean_records
from llm.storage import is_s3, local_path

# Loggers that get, or are known to set up, console handlers of their own. Children propagate to them.
NOISY_LOGGERS = (
    *(
        "ray",
        "ray.data",
        "ray.train",
        "ray.tune",
        "ray.serve",
        "ray.rllib",
        "DeepSpeed",
        "deepspeed",
        "transformers",
        "tokenizers",
    ),
    *(
        "datasets",
        "huggingface_hub",
        "torch",
        "torch.distributed",
        "accelerate",
        "tensorboard",
        "matplotlib",
        "mlflow",
        "wandb",
    ),
    *("alembic", "urllib3", "botocore", "boto3", "s3transfer", "fsspec", "absl", "asyncio", "py.warnings"),
)

# Set unless the user has set them. Only what has no other switch.
DRIVER_ENV = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
WORKER_ENV = {
    "TOKENIZERS_PARALLELISM": "false",  # Rust threads and a fork do not mix: it warns each time otherwise
    "TRANSFORMERS_VERBOSITY": "warning",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}


def quiet_ray_options() -> dict[str, Any]:
    """Options of `ray.init` that keep the lines of raylets and workers out of the driver's terminal."""
    return {"log_to_driver": False, "logging_level": logging.WARNING}


class Quiet:
    """Noise is redirected from the constructor to `close()`, which puts back everything as it was. Not to be nested."""

    def __init__(self, log_file: Path | str, env: Mapping[str, str], *, redirect_stdout: bool = False) -> None:
        path = Path(log_file)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            to_file: logging.Handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise StorageError(f"{path} cannot be written as a log file: {error.strerror}.") from error
        to_file.setLevel(logging.INFO)  # Ray Data and Ray Train log at DEBUG, which fills a disk
        to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        to_user = _CurrentStderr(level=logging.ERROR)
        to_user.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))

        self.log_file = path
        self._new_env = [name for name in env if name not in os.environ]
        os.environ.update({name: env[name] for name in self._new_env})
        self._showwarning = warnings.showwarning
        warnings.showwarning = _warning_to_log
        self._muted = [_Muted(logging.getLogger(name)) for name in NOISY_LOGGERS]
        root = logging.getLogger()
        self._root_before = list(root.handlers)
        self._root_handlers = [handler for handler in root.handlers if _writes_to_console(handler)]
        for handler in self._root_handlers:
            root.removeHandler(handler)
        self._records = clean_records()
        self._records.__enter__()
        self._handlers = (to_file, to_user)
        for handler in self._handlers:
            root.addHandler(handler)
        self._stdout = _StdoutToFile(path) if redirect_stdout else None

    def close(self) -> None:
        """Put everything back; a second call does nothing."""
        if not self._handlers:
            return
        if self._stdout is not None:
            self._stdout.close()
        self._records.__exit__(None, None, None)
        root = logging.getLogger()
        for handler in self._handlers:
            root.removeHandler(handler)
            handler.close()
        self._handlers = ()
        _put_back(root, self._root_before, self._root_handlers)
        for muted in self._muted:
            muted.restore()
        warnings.showwarning = self._showwarning
        for name in self._new_env:
            os.environ.pop(name, None)

    def __enter__(self) -> Quiet:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def redirect_noise(log_file: Path | str) -> Quiet:
    """For the driver, before Ray is imported: warnings and third-party records go to `log_file`, errors also to stderr.

    The rest is for `ray.init`: pass it `quiet_ray_options()`. `close()` (or leaving the `with`) puts everything back.
    Raises StorageError where the file cannot be written.
    """
    return Quiet(log_file, DRIVER_ENV)


@contextmanager
def quiet_search(sweep_uri: str) -> Iterator[None]:
    """For a sweep's driver: like `redirect_noise`, and what Tune and Ray print by themselves, which names neither cause nor trial. The log
    is `<sweep>/driver.log`, or for a sweep on S3 a temporary one."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch if is_s3(sweep_uri) else local_path(sweep_uri)) / "driver.log"
        with redirect_noise(path), path.open("a") as log, redirect_stdout(log), redirect_stderr(log):
            yield


def quiet_worker(log_file: Path | str) -> Quiet:
    """For a training worker, before DeepSpeed and transformers are imported: like `redirect_noise`, and stdout.

    Stdout is redirected as a file descriptor: DeepSpeed prints, and so do the compilers that it starts. Stderr stays
    where it is, so that errors, tracebacks and NCCL's complaints reach Ray's log of the worker. `log_file` is this
    process's own, on its own machine or a shared folder. Raises StorageError where the file cannot be written.
    """
    return Quiet(log_file, WORKER_ENV, redirect_stdout=True)


class _Muted:
    """One logger without console handlers: those it has are set aside, later ones refused; it propagates.

    Handlers that write elsewhere, as Ray's session files, stay. The logger's class is changed, not the logger replaced:
    libraries hold on to the object.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._class = logger.__class__
        self._propagate = logger.propagate
        self._before = list(logger.handlers)
        self._set_aside = [handler for handler in logger.handlers if _is_plain_stream(handler)]
        for handler in self._set_aside:
            logger.removeHandler(handler)
        logger.propagate = True
        if type(logger) is logging.Logger:
            logger.__class__ = _NoConsoleLogger

    def restore(self) -> None:
        logger = self._logger
        if isinstance(logger, _NoConsoleLogger):
            refused = logger.__dict__.pop("_refused", [])
            self._propagate = logger.__dict__.pop("_asked_to_propagate", self._propagate)
            object.__setattr__(logger, "__class__", self._class)
            self._set_aside += refused
        _put_back(logger, self._before, self._set_aside)
        logger.propagate = self._propagate


def _put_back(logger: logging.Logger, before: list[logging.Handler], taken: list[logging.Handler]) -> None:
    """The logger's handlers in their old order, then those that came meanwhile; what others have removed stays removed."""
    now = [*taken, *(handler for handler in logger.handlers if handler not in taken)]
    logger.handlers[:] = [h for h in before if h in now] + [h for h in now if h not in before]


class _NoConsoleLogger(logging.Logger):
    """A logger that takes no console handler and always propagates; `_Muted.restore` does what was asked."""

    def addHandler(self, hdlr: logging.Handler) -> None:
        if _is_plain_stream(hdlr):
            self.__dict__.setdefault("_refused", []).append(hdlr)
        else:
            super().addHandler(hdlr)

    def removeHandler(self, hdlr: logging.Handler) -> None:
        refused = self.__dict__.get("_refused", [])
        if hdlr in refused:
            refused.remove(hdlr)
        super().removeHandler(hdlr)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "propagate":
            self.__dict__["_asked_to_propagate"] = value
            value = True
        super().__setattr__(name, value)


class _CurrentStderr(logging.Handler):
    """Writes to what sys.stderr is at that moment, so a live progress line or a test can stand in between."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


class _StdoutToFile:
    """File descriptor 1 and sys.stdout go to a file; `close` brings both back."""

    def __init__(self, path: Path) -> None:
        self._python_stdout = sys.stdout
        sys.stdout.flush()
        self._saved_fd = os.dup(1)
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(fd, 1)
        os.close(fd)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)

    def close(self) -> None:
        sys.stdout.flush()
        sys.stdout = self._python_stdout
        os.dup2(self._saved_fd, 1)
        os.close(self._saved_fd)


def _is_plain_stream(handler: logging.Handler) -> bool:
    """Whether a library's handler writes to a stream that is no file: the console, as it found it."""
    return isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)


def _writes_to_console(handler: logging.Handler) -> bool:
    consoles = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    return _is_plain_stream(handler) and getattr(handler, "stream", None) in consoles


def _warning_to_log(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    text = warnings.formatwarning(str(message), category, filename, lineno, line)
    logging.getLogger("py.warnings").warning("%s", text.rstrip())
