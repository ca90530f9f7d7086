"""Ask a teacher service for scores or samples, from any driver, task or actor of the cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ray
from ray import serve

from raydistill.config.networks import TeacherServiceConfig
from raydistill.teachers import service
from raydistill.teachers.pending import PendingScores
from raydistill.teachers.request import GenerateRequest, Payload, ScoreRequest, TeacherError
from raydistill.teachers.utilisation import LoadLog

if TYPE_CHECKING:
    import torch

__all__ = ["PendingScores", "TeacherClient"]


class TeacherClient:
    """A client of the service `name` (see `service.start`). It connects at its first request.

    Args:
        position: where its requests begin to look among equally busy replicas, 0 <= position < 1. `rank / world` keeps clients
            apart that ask at the same moment. None: at random.
    """

    def __init__(self, name: str, config: TeacherServiceConfig, position: float | None = None) -> None:
        if position is not None and not 0 <= position < 1:
            raise ValueError(f"position must be at least 0 and below 1, not {position}")
        self.name, self.config, self.position = name, config, position
        self._handle: Any = None
        self.load = LoadLog()  # of this process's requests
        self.asked = self.answered = self.repeated = 0  # requests, those with an answer, and attempts after the first

    def __reduce__(self) -> tuple[type[TeacherClient], tuple[str, TeacherServiceConfig, float | None]]:
        return TeacherClient, (self.name, self.config, self.position)

    def submit(self, request: ScoreRequest) -> PendingScores:
        """Send a request and return at once. Raises TeacherError if the request itself is wrong."""
        if not isinstance(request, ScoreRequest):
            raise TeacherError(f"a request for scores must be a ScoreRequest, not {type(request).__name__}")
        payload, times = request.payload(), request.t.tolist()
        return self._send("predict_x0", payload, lambda i: f"sample {i} (t={times[i]:.4f})")

    def generate(
        self,
        noise: torch.Tensor,
        conditioning: dict[str, torch.Tensor],
        unconditional: dict[str, torch.Tensor] | None,
        steps: int,
        guidance_scale: float,
    ) -> PendingScores:
        """Ask for multi-step samples, latents [B, C, H, W], and return at once. Arguments as in GenerateRequest.

        Raises TeacherError if one of them is wrong.
        """
        payload = GenerateRequest(noise, conditioning, unconditional, steps, guidance_scale).payload()
        return self._send("sample", payload, lambda i: f"sample {i}")

    def metrics(self) -> dict[str, float]:
        """Of this process's requests: latency, busy fraction, queue, requests without an answer, repeated attempts."""
        counts = {"teachers/unanswered": self.asked - self.answered, "teachers/repeated": self.repeated}
        return self.load.metrics() | {name: float(count) for name, count in counts.items()}

    def describe(self) -> list[dict[str, Any]]:
        """Facts about the ranks of one replica: rank, pid, node, numel, full_numel, load_s."""
        return self.handle().describe.remote().result(timeout_s=60)

    def handle(self) -> Any:
        """The Serve handle. Raises RayServeException while there is no such service, TeacherError after Ray's end."""
        if not ray.is_initialized():  # a thread may outlive a failed run; Serve would start a new cluster for it
            raise TeacherError("Ray was shut down")
        if self._handle is None:
            service.applications()  # forgets a dead controller
            self._handle = serve.get_app_handle(self.name)
        return self._handle

    def forget_handle(self) -> None:
        """Look the service up again at the next request."""
        self._handle = None

    def _send(self, method: str, payload: Payload, label: Callable[[int], str]) -> PendingScores:
        self.asked += 1
        return PendingScores(self, method, ray.put(payload), payload["latents"].shape, label)
