"""Retrieval and other tasks that break first, generated offline: one task per file.

A 135M model fails many of them outright, so what is scored is what quantization changes (`score`).
Other packages add tasks by entry points (`turboq.tasks`) or `TASKS.register` (`turboq.registry`).
"""

from __future__ import annotations

from collections.abc import Sequence

from turboq.errors import TurboqError, quoted
from turboq.registry import Registry
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
OURS = tuple(module.TASK.name for module in _MODULES)


def _check(found: object) -> Task:
    if not isinstance(found, Task):
        raise TurboqError(f"{quoted(found)} must be a turboq_calibrate.tasks.Task")
    return found


TASKS: Registry[Task] = Registry("turboq.tasks", (module.TASK for module in _MODULES), _check)


def tasks_of(names: Sequence[str]) -> list[Task]:
    """The tasks of these names; "all" is every one of turboq's own, whatever else is installed.

    Raises:
      TurboqError: an unknown name, one given twice, or none.
    """
    names = list(OURS) if list(names) == ["all"] else list(names)
    for name in names:
        if name not in TASKS:
            known = TASKS.missing(name) or f"known are all, {', '.join(TASKS)}"
            raise TurboqError(f"unknown task {name!r}: {known}")
    if not names or len(set(names)) != len(names):
        raise TurboqError(f"tasks {','.join(names)!r} must be one or more, each named once")
    return [TASKS[name] for name in names]
