"""What a client makes of Ray Serve's responses: whether a request is under way, and how long it is worth waiting."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError
from raydistill.config.networks import TeacherServiceConfig

from raydistill.teachers import pending as pending_module
from raydistill.teachers.client import PendingScores, TeacherClient
from raydistill.teachers.request import TeacherError

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

    def remote(payload, place):
        responses.append(Response())
        responses[-1].answer = later.pop() if later else None
        return responses[-1]

    client = TeacherClient("teacher", TeacherServiceConfig())
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


class Serve:
    """Ray Serve with one request of ours, on a clock that waiting turns. `states`: (until when, state, answers pings)."""

    def __init__(self, states, answers):
        self.now, self.states, self.answers, self.asked, self.cancelled = 0.0, states, answers, 0, 0
        self.client = TeacherClient("teacher", TeacherServiceConfig(request_timeout_s=600, retry_for_s=600))
        self.client.handle = lambda: SimpleNamespace(
            predict_x0=SimpleNamespace(remote=self.ask),
            describe=SimpleNamespace(remote=lambda: SimpleNamespace(result=self.ping, cancel=lambda: None)),
        )
        self.client.load = SimpleNamespace(add=lambda load: None)

    def state(self):
        return next((state, pings) for until, state, pings in self.states if self.now < until)

    def applications(self):
        state = self.state()[0]
        if state == "controller restarts":
            raise RayActorError
        return {} if state == "absent" else {"teacher": SimpleNamespace(status=SimpleNamespace(value=state))}

    def ask(self, payload, place):
        at, answer = self.answers[self.asked]
        self.asked += 1

        def result(timeout_s):
            if self.now < at:
                self.sleep(timeout_s)
                raise GetTimeoutError
            return answer

        return SimpleNamespace(result=result, cancel=self.cancel)

    def ping(self, timeout_s):
        if not self.state()[1]:
            raise RayActorError

    def cancel(self):
        self.cancelled += 1

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


DONE = ("done", np.ones(SHAPE, dtype=np.float32), None)
LATE = ("late", "1 of 1 ranks did not answer within teachers.request_timeout_s=600 s", None)


@pytest.fixture
def result_on(monkeypatch):
    """`result_on(states, answers)`: (the Serve afterwards, what was raised or None) of a request that is waited for."""

    def wait(states, answers):
        serve = Serve(states, answers)
        monkeypatch.setattr(pending_module, "time", serve)
        monkeypatch.setattr(pending_module.service, "applications", serve.applications)
        monkeypatch.setattr(ray, "is_initialized", lambda: True)
        try:
            PendingScores(serve.client, "predict_x0", None, SHAPE, str).result()
        except TeacherError as error:
            return serve, str(error)
        return serve, None

    return wait


def test_time_in_the_queue_of_a_living_service_is_not_counted(result_on):
    serve, error = result_on([(1e9, "RUNNING", True)], [(20_000, DONE)])
    assert (error, serve.asked) == (None, 1)
    serve, error = result_on([(1e9, "DEPLOYING", True)], [(20_000, DONE)])  # another replica is being replaced
    assert (error, serve.asked) == (None, 1)


def test_a_service_that_is_away_for_retry_for_s_is_given_up_and_the_request_leaves_its_queue(result_on):
    serve, error = result_on([(1000, "RUNNING", True), (1e9, "DEPLOYING", False)], [(1e9, DONE)])
    assert "did not answer for teachers.retry_for_s=600 s" in error
    assert 1590 < serve.now < 1620
    assert (serve.asked, serve.cancelled) == (1, 1)
    away = [(400, "DEPLOYING", False), (5000, "RUNNING", True), (5150, "UNHEALTHY", False), (1e9, "RUNNING", True)]
    serve, error = result_on(away, [(9000, DONE)])
    assert (error, serve.asked) == (None, 1)


GONE = "there is no teacher service teacher on this cluster any more"


def test_a_service_that_is_gone_is_given_up_at_once_and_not_after_retry_for_s(result_on):
    serve, error = result_on([(1000, "RUNNING", True), (1e9, "absent", False)], [(1e9, DONE), (1e9, DONE)])
    assert error.startswith(GONE)
    assert serve.now < 1000 + 3 * pending_module.LOOK_EVERY_S


@pytest.mark.parametrize("state", ["controller restarts", "DEPLOYING", "UNHEALTHY"])
def test_a_service_that_restarts_is_waited_for(result_on, state):
    serve, error = result_on([(500, state, False), (1e9, "RUNNING", True)], [(600, DONE)])
    assert (error, serve.asked) == (None, 1)
    serve, error = result_on([(1e9, state, False)], [(1e9, DONE)])
    assert "did not answer for teachers.retry_for_s=600 s" in error


def test_a_service_that_is_absent_for_one_look_alone_is_not_given_up(result_on):
    serve, error = result_on([(2.1, "absent", False), (1e9, "RUNNING", True)], [(1e9, DONE), (5, DONE)])
    assert (error, serve.asked) == (None, 2)


def test_a_request_that_is_too_slow_for_the_ranks_is_tried_twice_and_the_key_is_named(result_on):
    serve, error = result_on([(1e9, "RUNNING", True)], [(600, LATE), (1200, DONE)])
    assert (error, serve.asked) == (None, 2)
    serve, error = result_on([(1e9, "RUNNING", True)], [(600, LATE), (1200, LATE)])
    assert "too slow for this request twice" in error
    assert "Raise teachers.request_timeout_s" in error


def test_a_thread_that_outlives_its_run_starts_no_cluster(monkeypatch):
    """Of a run that failed while its teacher's pictures were drawn: Ray is shut down, and Serve would start it again."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(TeacherError, match="Ray was shut down"):
        TeacherClient("teacher", TeacherServiceConfig()).handle()
