"""A teacher's answer that is there at once, for tests of the updates."""

from __future__ import annotations

import torch


class Answer:
    """`schedule.Pending` of scores [B, C, H, W]."""

    def __init__(self, scores: torch.Tensor) -> None:
        self.scores = scores

    def result(self) -> torch.Tensor:
        return self.scores

    def ready(self) -> bool:
        return True
