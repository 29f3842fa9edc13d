"""Errors that a user can act on. Each says what is wrong, the rule, and the nearest fix; a job prints only the message."""

from __future__ import annotations

from llm.redact import cleaned


class HeadraceError(Exception):
    """Base of every error meant for users. Positional arguments only, so that it survives pickling between processes; what libraries said
    in them is without secrets."""

    exit_code = 2

    def __init__(self, *told: object) -> None:
        super().__init__(*cleaned(told))


class ConfigError(HeadraceError):
    """The configuration is impossible: every problem found, one a line."""


class DataError(HeadraceError):
    """A source, record or corpus that cannot be used."""


class TokenizerError(HeadraceError):
    """A tokenizer file that cannot be loaded or does not fit the model."""


class ModelError(HeadraceError):
    """A model that cannot be built, loaded or split."""


class CheckpointError(HeadraceError):
    """A checkpoint that is missing, damaged or does not fit this run."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose bytes are not those that were saved, or that asks for what no checkpoint holds: an older one may do."""


class StorageError(HeadraceError):
    """A folder or bucket that cannot be listed, read or written."""


class TrainingError(HeadraceError):
    """Training cannot go on: a non-finite loss, ranks that disagree, data that ran out."""

    exit_code = 1


class RecoveryError(HeadraceError):
    """Training failed, was restarted, and failed again: restarting it once more would not help."""

    exit_code = 1


class PlannedStop(HeadraceError):
    """Training stopped in order, its state saved, to go on at once in another worker group. Recovery acts on it; no user sees it."""

    exit_code = 1


class HangError(HeadraceError):
    """The ranks stopped making progress; says which did not arrive."""

    exit_code = 1


class LeaseError(HeadraceError):
    """Another driver trains this run."""

    exit_code = 4
