"""Whether a request is still under way, as the client tells it from Ray Serve's responses."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ray.exceptions import GetTimeoutError, RayActorError

from raydistill.config import Teachers
from raydistill.teachers.client import PendingScores, TeacherClient

SHAPE = (2, 1, 2, 2)


class Response:
    """A Serve response: silent until `answer` is given, which may be an error."""

    def __init__(self):
        self.answer = None

    def result(self, timeout_s):
        if self.answer is None:
            raise GetTimeoutError(f"nothing within {timeout_s} s")
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def asked():
    """(pending, responses so far, answers that later attempts find at once)."""
    responses, later = [], []

    def remote(payload):
        responses.append(Response())
        responses[-1].answer = later.pop() if later else None
        return responses[-1]

    client = TeacherClient("teacher", Teachers())
    client.handle = lambda: SimpleNamespace(predict_x0=SimpleNamespace(remote=remote))
    client.load = SimpleNamespace(add=lambda load: None)
    return PendingScores(client, "predict_x0", None, SHAPE, str), responses, later


def test_a_request_is_under_way_until_its_answer_is_there_and_asking_takes_nothing_away(asked):
    pending, (response,), _ = asked
    assert not pending.ready()
    scores = np.arange(8, dtype=np.float32).reshape(SHAPE)
    response.answer = ("done", scores, None)
    assert pending.ready()
    assert torch.equal(pending.result(), torch.from_numpy(scores))
    assert pending.ready()


def test_a_lost_request_is_under_way_no_longer_and_its_loss_is_met_by_result(asked):
    pending, responses, later = asked
    responses[0].answer = RayActorError()
    assert pending.ready()
    assert len(responses) == 1  # asking again is for `result`
    scores = np.ones(SHAPE, dtype=np.float32)
    later.append(("done", scores, None))
    assert torch.equal(pending.result(), torch.from_numpy(scores))
    assert len(responses) == 2
