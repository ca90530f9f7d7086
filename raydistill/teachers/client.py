"""Ask a teacher service for scores or samples, from any driver, task or actor of the cluster.

A score is a pure function of its request, so a lost replica costs time, never a number: the client asks again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from raydistill.config.schema import TeacherServiceConfig
from raydistill.teachers import service
from raydistill.teachers.request import (
    GenerateRequest,
    NonFiniteScores,
    ReplicaBroken,
    RequestTooLong,
    ScoreRequest,
    TeacherError,
    TeacherUnavailable,
    all_finite,
    one_line,
    shared_tensor,
)
from raydistill.teachers.utilisation import LoadLog

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = ["NonFiniteScores", "PendingScores", "ScoreRequest", "TeacherClient", "TeacherError", "TeacherUnavailable"]

log = logging.getLogger(__name__)

LOOK_EVERY_S = 10.0  # while an answer is awaited: is the service still there?
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 5.0


class TeacherClient:
    """Speaks to the service `name` (see service.start). Holds no connection until it is used.

    Args:
        place: where among equally busy replicas its requests begin, 0 <= place < 1: `rank / world` keeps clients apart that
            ask at the same moment. None: at random.
    """

    def __init__(self, name: str, config: TeacherServiceConfig, place: float | None = None) -> None:
        if place is not None and not 0 <= place < 1:
            raise ValueError(f"place must be at least 0 and below 1, not {place}")
        self.name, self.config, self.place = name, config, place
        self._handle: Any = None
        self.load = LoadLog()  # of this process's requests
        self.asked = self.answered = self.repeated = 0  # requests, those with an answer, and attempts after the first

    def __reduce__(self) -> tuple[type[TeacherClient], tuple[str, TeacherServiceConfig, float | None]]:
        return TeacherClient, (self.name, self.config, self.place)

    def submit(self, request: ScoreRequest) -> PendingScores:
        """Send a request and return at once. Raises TeacherError if the request itself is wrong."""
        times = request.t.tolist()
        return self._send("predict_x0", request, lambda i: f"sample {i} (t={times[i]:.4f})")

    def generate(
        self,
        noise: torch.Tensor,
        conditioning: dict[str, torch.Tensor],
        unconditional: dict[str, torch.Tensor] | None,
        steps: int,
        guidance_scale: float,
    ) -> PendingScores:
        """Ask for multi-step samples, latents [B, C, H, W], and return at once. Fields as in GenerateRequest."""
        request = GenerateRequest(noise, conditioning, unconditional, steps, guidance_scale)
        return self._send("sample", request, lambda i: f"sample {i}")

    def metrics(self) -> dict[str, float]:
        """Of this process's requests: latency, busy fraction and queue; how many wait for an answer, and were repeated."""
        counts = {"teachers/unanswered": self.asked - self.answered, "teachers/repeated": self.repeated}
        return self.load.metrics() | {name: float(count) for name, count in counts.items()}

    def describe(self) -> list[dict[str, Any]]:
        """What the ranks of one replica say of themselves: rank, pid, node, numel, full_numel, load_s."""
        return self.handle().describe.remote().result(timeout_s=60)

    def handle(self) -> Any:
        """The Serve handle. Raises RayServeException while there is no such service, TeacherError after Ray's end."""
        if not ray.is_initialized():  # in a thread that outlives a run which failed: Serve would start a cluster for it
            raise TeacherError("Ray was shut down")
        if self._handle is None:
            self._handle = serve.get_app_handle(self.name)
        return self._handle

    def forget_handle(self) -> None:
        """Look the service up again at the next call."""
        self._handle = None

    def _send(self, method: str, request: ScoreRequest | GenerateRequest, label: Callable[[int], str]) -> PendingScores:
        payload = request.payload()
        self.asked += 1
        return PendingScores(self, method, ray.put(payload), payload["latents"].shape, label)


class PendingScores:
    """An answer on its way. Keeps the request alive until it is here."""

    def __init__(
        self,
        client: TeacherClient,
        method: str,
        payload: ray.ObjectRef,
        shape: tuple[int, ...],
        label: Callable[[int], str],
    ) -> None:
        self._client, self._method, self._payload, self._shape, self._label = client, method, payload, shape, label
        self._scores: torch.Tensor | None = None
        self._response: Any = None
        try:
            self._ask()
        except (RayError, RayServeException) as error:
            log.warning("teacher %s cannot be reached yet: %s", client.name, one_line(error))

    def result(self, check_finite: bool = True) -> torch.Tensor:
        """Wait for the scores [B, C, H, W], float32, in shared memory: not to be written to.

        Args:
            check_finite: refuse NaN and infinity; a caller that switches this off must look for them itself.

        Raises:
            TeacherUnavailable: the service was away for `retry_for_s`, or worked on this request for more than
                `request_timeout_s` twice.
            NonFiniteScores: the teacher answered with NaN or infinity; names the samples and their t.
            TeacherError: the request cannot be answered.
        """
        if self._scores is None:
            self._scores = self._of_right_shape(self._await_answer())
            self._response = self._payload = None
        if check_finite:
            self._refuse_non_finite(self._scores)
        return self._scores

    def ready(self) -> bool:
        """Whether the request is under way no longer; also after a failure, which `result` then meets."""
        if self._scores is not None or self._response is None:
            return True
        try:
            self._response.result(timeout_s=0)
        except TimeoutError:
            return False
        except Exception:  # noqa: BLE001 (whatever it is: `result` asks again, or raises it)
            return True
        return True

    def _ask(self) -> None:
        method = getattr(self._client.handle(), self._method)
        self._response = method.remote([self._payload], place=self._client.place)

    def _await_answer(self) -> np.ndarray:
        client, outage, pause, late = self._client, _Outage(), FIRST_PAUSE_S, 0
        while True:
            try:
                if self._response is None:
                    client.repeated += 1
                    self._ask()
                answer = self._wait_once(outage)
                client.answered += 1
                self._is_back(outage)
                return answer
            except Exception as error:
                if not _worth_retrying(error):
                    raise TeacherError(f"teacher {client.name}: {getattr(error, 'cause', error)}") from None
                self._response = None
                client.forget_handle()
                late += isinstance(error, RequestTooLong)
                if late > 1:
                    raise TeacherError(
                        f"teacher {client.name} was too slow for this request twice: {error}. Raise "
                        "teachers.request_timeout_s, or make the request smaller (distill.batch_size, synthesis.batch_size)"
                    ) from error
                left = client.config.retry_for_s - outage.lasts()
                if left <= 0:
                    raise TeacherUnavailable(
                        f"teacher {client.name} did not answer for teachers.retry_for_s={client.config.retry_for_s:g} s; "
                        f"last failure: {one_line(error)}"
                    ) from error
                log.warning("teacher %s stalls, asking again (%.0f s left): %s", client.name, left, one_line(error))
                time.sleep(min(pause, left))
                pause = min(2 * pause, LONGEST_PAUSE_S)

    def _wait_once(self, outage: _Outage) -> np.ndarray:
        """Wait for the answer of the current attempt, for as long as the service lives.

        How long the ranks may work on it is the replica's to say: only there is it known when the work began.
        """
        asked = time.monotonic()
        while True:
            try:
                kind, answer, load = self._response.result(timeout_s=LOOK_EVERY_S)
                break
            except TimeoutError as error:
                if isinstance(error, RayTaskError):  # of the replica
                    raise
            if self._service_lives(time.monotonic() - asked):
                self._is_back(outage)
            elif outage.lasts() >= self._client.config.retry_for_s:
                self._response.cancel()
                raise ReplicaBroken("the service does not come back")
        if kind == "done":
            self._client.load.add(load)
            return answer
        raise {"rejected": TeacherError, "late": RequestTooLong}.get(kind, ReplicaBroken)(answer)

    def _service_lives(self, waited: float) -> bool:
        """Whether a replica is there to answer; says what is awaited. Raises ReplicaBroken if there is no such service."""
        name = self._client.name
        try:
            application = service.applications().get(name)
        except RayError as error:
            state = f"Serve's controller is away ({type(error).__name__})"
        else:
            if application is None:
                raise ReplicaBroken("there is no such service")
            state = application.status.value
        lives = state == "RUNNING" or self._pings()
        said = "" if state == "RUNNING" else f"; the service is {state}" if lives else f"; no replica answers: {state}"
        log.log(
            logging.INFO if state == "RUNNING" else logging.WARNING,
            "teacher %s: waiting for an answer, %.0f s so far%s",
            name,
            waited,
            said,
        )
        return lives

    def _pings(self) -> bool:
        """Whether some replica answers, although Serve does not call the service RUNNING: another one may be replaced."""
        try:
            ping = self._client.handle().describe.remote()
        except (RayError, RayServeException):
            return False
        try:
            ping.result(timeout_s=LOOK_EVERY_S)
        except Exception:  # noqa: BLE001 (whatever it is: there is no answer)
            ping.cancel()
            return False
        return True

    def _is_back(self, outage: _Outage) -> None:
        if (lasted := outage.end()) is not None:
            log.warning("teacher %s is back after %.1f s", self._client.name, lasted)

    def _of_right_shape(self, answer: np.ndarray) -> torch.Tensor:
        if answer.shape != self._shape:
            raise TeacherError(f"teacher {self._client.name} answered with shape {answer.shape}, not {self._shape}")
        return shared_tensor(answer)

    def _refuse_non_finite(self, scores: torch.Tensor) -> None:
        import torch

        if not all_finite(scores):
            bad = (~torch.isfinite(scores).flatten(1).all(1)).nonzero().flatten().tolist()
            more = f" and {len(bad) - 8} more" if len(bad) > 8 else ""
            raise NonFiniteScores(
                f"teacher {self._client.name} answered with NaN or infinity for {len(bad)} of {len(scores)} samples: "
                f"{', '.join(map(self._label, bad[:8]))}{more}",
                len(bad),
            )


class _Outage:
    """For how long a service was away while one answer was awaited, in all."""

    def __init__(self) -> None:
        self._before, self._since = 0.0, None

    def lasts(self) -> float:
        """It is away (still, or again): seconds in all."""
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        return self._before + now - self._since

    def end(self) -> float | None:
        """It is there: seconds it was away just now, None if it was not."""
        if self._since is None:
            return None
        lasted, self._since = time.monotonic() - self._since, None
        self._before += lasted
        return lasted


def _worth_retrying(error: Exception) -> bool:
    """Losses of replicas, ranks, nodes and time are; errors raised by the teacher's own code are not."""
    losses = (ReplicaBroken, RayError, RayServeException, TimeoutError)
    return isinstance(error.cause if isinstance(error, RayTaskError) else error, losses)
