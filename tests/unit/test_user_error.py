"""What a failure in Ray is told as: the error's own words, in one line, never a traceback."""

from __future__ import annotations

from ray.exceptions import RayTaskError

from llm.errors import StorageError, TrainingError
from llm.train.launch import user_error


def test_an_error_in_a_task_is_told_without_its_traceback() -> None:
    cause = StorageError("/data/a.txt: cannot read: Permission denied")
    raised = RayTaskError("tokenize", "Traceback (most recent call last):\n  many\n  lines", cause).as_instanceof_cause()
    assert isinstance(raised, StorageError) and "many\n" in str(raised)
    wrapped = RuntimeError("training failed")
    wrapped.__cause__ = raised
    for error in (raised, wrapped):
        assert str(user_error(error)) == str(cause)


def test_an_error_of_nobody_is_one_line() -> None:
    told = user_error(RuntimeError("Traceback:\n  somewhere\nKeyError: 'x'"))
    assert isinstance(told, TrainingError) and "\n" not in str(told)
