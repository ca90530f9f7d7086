"""What every Ray Data stream of this project has in common."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import ray.data
from ray.util.debug import log_once

from raydistill.data.stage_error import StageError
from raydistill.teachers.request import TeacherError

MAX_BLOCKS = 4096  # Ray Data spends about 0.6 ms per block before the first batch


@functools.lru_cache(maxsize=4)
def fetched(stored: ray.ObjectRef) -> Any:
    """What lies in the object store, one copy a process; arrays stay where they lie."""
    return ray.get(stored)


def dataset_of(rows: list[dict[str, Any]], in_order: bool = False) -> ray.data.Dataset:
    """One row a block where they are not too many, without lines on the screen; settings are this data set's alone.

    Args:
        in_order: keep the order of the rows. Otherwise a slow one holds up no other.
    """
    _quiet()
    data = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS))
    data.context.execution_options.preserve_order = in_order
    data.context.enable_progress_bars = False
    data.context.print_on_execution_start = False
    data.context.issue_detectors_config.detectors = []
    return data


def telling(call: Callable[..., Any]) -> Callable[..., Any]:
    """Raise StageError from whatever `call` raises."""

    @functools.wraps(call)
    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        with _as_stage_error():
            return call(*arguments, **keywords)

    @functools.wraps(call)
    def wrapped_generator(*arguments: Any, **keywords: Any) -> Iterator[Any]:
        with _as_stage_error():
            yield from call(*arguments, **keywords)

    return wrapped_generator if inspect.isgeneratorfunction(call) else wrapped


@contextlib.contextmanager
def _as_stage_error() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise StageError(str(error), type(error).__name__, of_teacher=isinstance(error, TeacherError)) from error


def _quiet() -> None:
    """Keep Ray Data's lines about every execution off the screen; its own log file still has them."""
    log_once("ray_data_progress_manager_disabled")  # or it warns that `enable_progress_bars` is off
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.WARNING)
