"""Teachers without a network, that stand for GPUs which this machine does not have.

Everything but the network is the real thing: client, Serve, coordinator, ranks, what they check and copy. A rank takes
its share of a request as it always does, sleeps instead of computing, and answers with the latents it was sent.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

from raydistill.config.networks import TeacherServiceConfig
from raydistill.storage.atomic import replace_text
from raydistill.teachers import service
from raydistill.teachers.client import TeacherClient
from raydistill.teachers.request import Memory, Payload, ScoreRequest, check_payload
from raydistill.teachers.shard import TeacherRank, actor

# torch is imported inside functions: without it dozens of ranks fit one machine.
if TYPE_CHECKING:
    import torch

SETTINGS = "model_index.json"  # where the service expects a model's folder to begin


class IdleRank(TeacherRank):
    """Sleeps for the seconds that the service's folder names at that moment."""

    def __init__(
        self, rank: int, world: int, replica: str = "", config: TeacherServiceConfig | None = None
    ) -> None:  # without the imports of a network
        self.rank, self.world, self.replica, self.memory = rank, world, replica, Memory()
        self.facts = {"rank": rank, "pid": os.getpid(), "requests": 0}

    def open_store(self) -> tuple[str, int]:
        return "", 0

    def load(self, model_folder: str, config: TeacherServiceConfig, address: tuple[str, int] | None) -> None:
        self.file, self.dtype_name, self.slice_size = Path(model_folder, SETTINGS), config.dtype, config.counted_slice

    def recover(self) -> None:
        """Nothing is gathered, and ranks never meet."""

    def predict_x0(self, payload: Payload) -> np.ndarray:
        check_payload(payload)
        self.facts["requests"] += 1
        settings, started = json.loads(self.file.read_text()), time.perf_counter()
        answer = self._without_network(payload) if settings["slices"] else self._without_copies(payload)
        time.sleep(max(0.0, settings["seconds"] - (time.perf_counter() - started)))
        return answer

    def _without_network(self, payload: Payload) -> np.ndarray:
        """What a rank does around its network: cut into slices, to tensors of the teacher's dtype, answer as float32."""
        import torch  # see above

        self.device, self.dtype = torch.device("cpu"), getattr(torch, self.dtype_name)
        self.space = SimpleNamespace(latent_shape=payload["latents"].shape[1:], folder="none")
        return self._slices(payload, self._rows)

    def _rows(self, payload: Payload, rows: np.ndarray) -> torch.Tensor:
        self._conditioning(payload, rows)
        return self._load("latents", payload["latents"], rows)

    def _without_copies(self, payload: Payload) -> np.ndarray:
        """This rank's equal part, without torch."""
        return np.array_split(payload["latents"], self.world)[self.rank]


class IdleReplica(service.TeacherReplica.func_or_class):
    """The coordinator itself, with such ranks."""

    rank_actor = actor(IdleRank)


class IdleService:
    """A running service of idle replicas."""

    def __init__(self, folder: Path, config: TeacherServiceConfig, name: str) -> None:
        self.folder, self.config, self.name = folder, config, name

    def set(self, seconds: float, slices: bool = False) -> None:
        """From the next request on: how long a rank takes, and whether it cuts and converts what it is sent."""
        replace_text(self.folder / SETTINGS, json.dumps({"seconds": seconds, "slices": slices}), durable=False)

    def start(self, replicas: int) -> None:
        """Start, or change the number of replicas."""
        self.config = self.config.model_copy(update={"replicas": replicas})
        service.start(str(self.folder), self.config, self.name, IdleReplica)

    def client(self, position: float | None = None) -> TeacherClient:
        return TeacherClient(self.name, self.config, position)


@contextlib.contextmanager
def idle_service(config: TeacherServiceConfig, name: str = "idle", replicas: int = 1) -> Iterator[IdleService]:
    """Such a service for the length of the block; needs a Ray cluster."""
    with tempfile.TemporaryDirectory(prefix="raydistill-idle-") as folder:
        idle = IdleService(Path(folder), config, name)
        idle.set(0.0)
        try:
            idle.start(replicas)
            yield idle
        finally:
            service.stop(name)


def request_of(nbytes: int, batch: int = 16) -> ScoreRequest:
    """Of about `nbytes`: float32 latents of (batch, 4, 16, 16), and conditioning for the rest.

    The conditioning is a row for each sample and an unconditional one, at least one number wide.
    """
    import torch  # see above

    latents = torch.zeros(batch, 4, 16, 16)
    width = max(1, (nbytes - latents.nbytes) // (4 * (batch + 1)))
    return ScoreRequest(
        latents,
        torch.full((batch,), 0.5),
        {"prompt_embeds": torch.zeros(batch, width)},
        {"prompt_embeds": torch.zeros(1, width)},
        2.0,
    )
