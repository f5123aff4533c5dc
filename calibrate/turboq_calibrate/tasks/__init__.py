"""Retrieval and other tasks that break first, generated offline: one task per file.

A 135M model fails many of them outright, so what is scored is what quantization changes (`score`).
"""

from __future__ import annotations

from collections.abc import Sequence

from turboq.errors import TurboqError
from turboq_calibrate.tasks import (
    arithmetic,
    common_words,
    copying,
    distant_code,
    frequent_words,
    key_value,
    needle_multi_key,
    needle_multi_value,
    needle_single,
    number_strings,
    passkey,
    tool_calls,
    variable_tracking,
)
from turboq_calibrate.tasks.contract import Sample as Sample
from turboq_calibrate.tasks.contract import Task as Task

_MODULES = (
    passkey, needle_single, needle_multi_key, needle_multi_value, key_value, number_strings,
    copying, variable_tracking, common_words, frequent_words, tool_calls, distant_code, arithmetic,
)  # fmt: skip
TASKS = {module.TASK.name: module.TASK for module in _MODULES}


def tasks_of(names: Sequence[str]) -> list[Task]:
    """The tasks of these names; "all" is every one.

    Raises:
      TurboqError: an unknown name, one given twice, or none.
    """
    names = list(TASKS) if list(names) == ["all"] else list(names)
    for name in names:
        if name not in TASKS:
            raise TurboqError(f"unknown task {name!r}: known are all, {', '.join(TASKS)}")
    if not names or len(set(names)) != len(names):
        raise TurboqError(f"tasks {','.join(names)!r} must be one or more, each named once")
    return [TASKS[name] for name in names]
