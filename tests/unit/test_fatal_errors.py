"""Which errors end a run at once, and that they are kept for whoever would repeat them."""

from __future__ import annotations

import pytest
import ray.exceptions
import torch

from raydistill.errors import InputError, NonFiniteError
from raydistill.teachers.request import NonFiniteScores, TeacherError, TeacherGone, TeacherUnavailable
from raydistill.workers.checkpoint import CheckpointError
from raydistill.workers.ray_train import fatal_error, forget_fatal_error, is_fatal, recording_fatal_errors


@pytest.mark.parametrize(
    "error",
    [InputError, NonFiniteError, CheckpointError, NonFiniteScores, TeacherError, TeacherGone, torch.OutOfMemoryError],
)  # fmt: skip
def test_wrong_input_and_bad_numbers_last(error, tmp_path):
    assert is_fatal(error("why"))

    def worker():
        with recording_fatal_errors(tmp_path):
            raise error("why")

    with pytest.raises(error):
        worker()
    assert fatal_error(tmp_path) == f"{error.__name__}: why"
    forget_fatal_error(tmp_path)
    assert fatal_error(tmp_path) is None


@pytest.mark.parametrize(
    "error",
    [TeacherUnavailable("away"), OSError("disk"), RuntimeError("NCCL"), ray.exceptions.RayActorError(), MemoryError()],
    ids=lambda e: type(e).__name__,
)
def test_what_may_come_back_is_left_to_ray(error, tmp_path):
    def worker():
        with recording_fatal_errors(tmp_path):
            raise error

    with pytest.raises(type(error)):
        worker()
    assert fatal_error(tmp_path) is None


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["named first", "named last"])
def test_the_worker_whose_value_it_was_is_believed_whoever_writes_last(order, tmp_path):
    errors = (
        NonFiniteError("the fake score: not finite"),
        NonFiniteError("another worker's part of the fake gradient: not finite", elsewhere=True),
    )
    for index in order:
        with pytest.raises(NonFiniteError), recording_fatal_errors(tmp_path):
            raise errors[index]
    assert fatal_error(tmp_path) == "NonFiniteError: the fake score: not finite"
    forget_fatal_error(tmp_path)
    assert fatal_error(tmp_path) is None
    with pytest.raises(NonFiniteError), recording_fatal_errors(tmp_path):
        raise errors[1]
    assert fatal_error(tmp_path) == f"NonFiniteError: {errors[1]}", "every part was finite, and the mean is not"
