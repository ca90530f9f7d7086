"""An answer that a client waits for: it asks again after a loss, and checks what arrives.

A score is a pure function of its request. So the loss of a replica costs time and never changes a number.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from raydistill.teachers import service
from raydistill.teachers.request import (
    NonFiniteScores,
    ReplicaBroken,
    RequestTooLong,
    TeacherError,
    TeacherGone,
    TeacherUnavailable,
    all_finite,
    one_line,
    shared_tensor,
)

if TYPE_CHECKING:
    import numpy as np
    import torch

    from raydistill.teachers.client import TeacherClient

log = logging.getLogger(__name__)

LOOK_EVERY_S = 10.0  # how often a waiting client checks that the service is still there
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 5.0  # before another attempt
FIRST_LOOK_S = 2.0  # before the first of these
MOST_TOO_LONG = 2  # attempts that the ranks may take too long for
MOST_ABSENT = 2  # attempts in a row that find no service at all
NAMED_SAMPLES = 8  # in an error message


class PendingScores:
    """The answer to one request. It keeps the request's payload alive until the answer is there.

    Args:
        client: sends the request.
        method: of the replica.
        payload: reference to the request.
        shape: of the answer.
        label: names a sample in error messages, by its index.
    """

    def __init__(
        self,
        client: TeacherClient,
        method: str,
        payload: ray.ObjectRef,
        shape: tuple[int, ...],
        label: Callable[[int], str],
    ) -> None:
        self._client, self._method, self._payload, self._shape, self._label = client, method, payload, shape, label
        self._availability = Availability(client)
        self._scores: torch.Tensor | None = None
        self._response: Any = None  # of Serve, to the current attempt
        try:
            self._send()
        except (RayError, RayServeException) as error:
            log.warning("teacher %s cannot be reached yet: %s", client.name, one_line(error))

    def result(self, check_finite: bool = True) -> torch.Tensor:
        """Wait for the scores [B, C, H, W], float32. They are in shared memory and must not be written to.

        Args:
            check_finite: refuse NaN and infinity. A caller that switches this off must check for them itself.

        Raises:
            TeacherGone: there is no such service any more.
            TeacherUnavailable: the service was away for `retry_for_s`.
            NonFiniteScores: the teacher answered with NaN or infinity; names the samples and their t.
            TeacherError: the request cannot be answered, or took longer than `request_timeout_s` twice.
        """
        if self._scores is None:
            answer = self._wait()
            if answer.shape != self._shape:
                raise TeacherError(f"teacher {self._client.name} answered with shape {answer.shape}, not {self._shape}")
            self._scores = shared_tensor(answer)
            self._response = self._payload = None
        if check_finite and not all_finite(self._scores):
            raise self._non_finite(self._scores)
        return self._scores

    def ready(self) -> bool:
        """Whether `result` need not wait for this attempt; True also after a failure, which `result` handles."""
        if self._scores is not None or self._response is None:
            return True
        try:
            self._response.result(timeout_s=0)
        except TimeoutError:
            return False
        except Exception:  # noqa: BLE001 (`result` asks again, or raises it)
            return True
        return True

    def _send(self) -> None:
        """Begin an attempt."""
        method = getattr(self._client.handle(), self._method)
        self._response = method.remote([self._payload], place=self._client.position)

    def _wait(self) -> np.ndarray:
        """Wait for an answer, in as many attempts as it takes. Raises as `result` does."""
        client, pause, too_long, absent = self._client, FIRST_PAUSE_S, 0, 0
        while True:
            try:
                if self._response is None:
                    client.repeated += 1
                    self._send()
                answer = self._wait_for_attempt()
            except Exception as error:
                if not _worth_retrying(error):
                    raise TeacherError(f"teacher {client.name}: {getattr(error, 'cause', error)}") from None
                self._response = None
                client.forget_handle()
                too_long += isinstance(error, RequestTooLong)
                if too_long == MOST_TOO_LONG:
                    raise TeacherError(
                        f"teacher {client.name} was too slow for this request twice: {error}. Raise "
                        "teachers.request_timeout_s, or make the request smaller (distill.batch_size, synthesis.batch_size)"
                    ) from error
                absent = absent + 1 if self._availability.is_absent() else 0
                if absent == MOST_ABSENT:
                    raise TeacherGone(
                        f"there is no teacher service {client.name} on this cluster any more: Serve was shut down, or the "
                        "service was deleted. The same command starts it again, and the run goes on"
                    ) from error
                left = self._availability.seconds_left()
                if left <= 0:
                    raise TeacherUnavailable(
                        f"teacher {client.name} did not answer for teachers.retry_for_s={client.config.retry_for_s:g} s; "
                        f"last failure: {one_line(error)}"
                    ) from error
                log.warning("teacher %s stalls, asking again (%.0f s left): %s", client.name, left, one_line(error))
                time.sleep(min(pause, left))
                pause = min(2 * pause, LONGEST_PAUSE_S)
            else:
                client.answered += 1
                self._availability.is_back()
                return answer

    def _wait_for_attempt(self) -> np.ndarray:
        """Wait for the answer to the current attempt, for as long as the service is there.

        The replica alone limits how long the ranks may work: only it knows when the work began.
        """
        sent, wait = time.monotonic(), FIRST_LOOK_S
        while True:
            try:
                kind, answer, load = self._response.result(timeout_s=wait)
                break
            except TimeoutError as error:
                if isinstance(error, RayTaskError):  # raised in the replica
                    raise
            wait = LOOK_EVERY_S
            if self._availability.check(time.monotonic() - sent):
                self._availability.is_back()
            elif self._availability.seconds_left() <= 0:
                self._response.cancel()
                raise ReplicaBroken("the service does not come back")
        if kind == "done":
            self._client.load.add(load)
            return answer
        raise {"rejected": TeacherError, "late": RequestTooLong}.get(kind, ReplicaBroken)(answer)

    def _non_finite(self, scores: torch.Tensor) -> NonFiniteScores:
        import torch  # slow to load; processes that only import this module do not need it

        bad = (~torch.isfinite(scores).flatten(1).all(1)).nonzero().flatten().tolist()
        more = f" and {len(bad) - NAMED_SAMPLES} more" if len(bad) > NAMED_SAMPLES else ""
        return NonFiniteScores(
            f"teacher {self._client.name} answered with NaN or infinity for {len(bad)} of {len(scores)} samples: "
            f"{', '.join(map(self._label, bad[:NAMED_SAMPLES]))}{more}",
            len(bad),
        )


class Availability:
    """Whether the service is there, and how long it was away while one answer was awaited."""

    def __init__(self, client: TeacherClient) -> None:
        self._client = client
        self._away_before = 0.0  # seconds, of outages that are over
        self._away_since: float | None = None

    def seconds_left(self) -> float:
        """The service is away. For how many more seconds is it worth waiting, given `retry_for_s`?"""
        now = time.monotonic()
        self._away_since = now if self._away_since is None else self._away_since
        return self._client.config.retry_for_s - (self._away_before + now - self._away_since)

    def is_back(self) -> None:
        """The service is there. Ends an outage, if there was one."""
        if self._away_since is None:
            return
        away = time.monotonic() - self._away_since
        self._away_before += away
        self._away_since = None
        log.warning("teacher %s is back after %.1f s", self._client.name, away)

    def is_absent(self) -> bool:
        """Whether Serve answers and knows no such service, or nothing of Serve is left. One that restarts is known."""
        try:  # without Ray, asking would start a cluster
            return ray.is_initialized() and self._client.name not in service.applications()
        except (RayError, RayServeException):  # its controller restarts
            return False

    def check(self, waited_s: float) -> bool:
        """Whether a replica is there to answer; logs that the client waits. Raises ReplicaBroken if there is no service."""
        name = self._client.name
        try:
            application = service.applications().get(name)
        except RayError as error:
            state = f"Serve's controller is away ({type(error).__name__})"
        else:
            if application is None:
                raise ReplicaBroken("there is no such service")
            state = application.status.value
        if state == "RUNNING":
            usual = waited_s < LOOK_EVERY_S  # as while others' requests go first
            log.log(
                logging.DEBUG if usual else logging.INFO,
                "teacher %s: waiting for an answer, %.0f s so far",
                name,
                waited_s,
            )
            return True
        answers = self._a_replica_answers()
        details = f"the service is {state}" if answers else f"no replica answers: {state}"
        log.warning("teacher %s: waiting for an answer, %.0f s so far; %s", name, waited_s, details)
        return answers

    def _a_replica_answers(self) -> bool:
        """Ping the service. Serve does not call it RUNNING while it replaces one of several replicas."""
        try:
            ping = self._client.handle().describe.remote()
        except (RayError, RayServeException):
            return False
        try:
            ping.result(timeout_s=LOOK_EVERY_S)
        except Exception:  # noqa: BLE001 (any failure means that there is no answer)
            ping.cancel()
            return False
        return True


def _worth_retrying(error: Exception) -> bool:
    """Whether another attempt may succeed: after a loss or a timeout, but not after an error of the teacher's own code."""
    losses = (ReplicaBroken, RayError, RayServeException, TimeoutError)
    return isinstance(error.cause if isinstance(error, RayTaskError) else error, losses)
