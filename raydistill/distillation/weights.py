"""The weights of a worker's networks: what is trained, its average, and what a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from raydistill.bridge.model import Bridge
from raydistill.config.schema import Config
from raydistill.distillation.discriminator import Discriminator
from raydistill.distillation.fake_score import FakeScore
from raydistill.distillation.rates import decay
from raydistill.distillation.sharding import Shared
from raydistill.spaces.adapter import load_own_state, own_state, trained


class Weights:
    """Of `Networks`, which makes them.

    Attributes:
        shared: student and average by name, where they lie on all workers (`student.shard`); else nothing.
    """

    config: Config
    student: nn.Module
    ema: nn.Module | None
    bridge: Bridge
    fake: FakeScore
    discriminator: Discriminator | None
    shared: Mapping[str, Shared]

    def students(self) -> dict[str, nn.Module]:
        return {"student": self.student} | ({} if self.ema is None else {"ema": self.ema})

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated and exported: the EMA when there is one."""
        return self.ema if self.ema is not None else self.student

    @contextmanager
    def gathered(self, wanted: bool = True) -> Iterator[None]:
        """In the block rank 0 has a shared student and its average whole, and runs them alone. All workers begin it together.

        Args:
            wanted: False: nothing is changed.
        """
        own = self.student, self.ema
        with ExitStack() as stack:
            for name, shared in self.shared.items() if wanted else ():
                setattr(self, name, stack.enter_context(shared.gathered()))
            try:
                yield
            finally:
                self.student, self.ema = own

    def learning(self, name: str = "student") -> list[nn.Parameter]:
        """What this worker trains of the student, or as much of its average ("ema")."""
        return self.shared[name].own if name in self.shared else list(trained(self.students()[name]).values())

    def update_ema(self, updates: int) -> None:
        """Move the average towards the student; `updates`: of the student, before this one."""
        if self.ema is None:
            return
        share = 1 - decay(self.config.student, updates)
        with torch.no_grad():
            torch._foreach_lerp_(self.learning("ema"), self.learning(), share)

    def best_state(self) -> dict[str, Any]:
        """What is kept of the best update: the evaluated student, and a Bridge that is trained along."""
        state = {"student": own_state(self.evaluated)}
        return state | ({"bridge": self.bridge.projector.state_dict()} if self.config.bridge.trainable else {})

    def load_best_state(self, state: dict[str, Any]) -> None:
        load_own_state(self.evaluated, state["student"])
        if self.config.bridge.trainable:
            self.bridge.projector.load_state_dict(state["bridge"])

    def state_dict(self) -> dict[str, Any]:
        """All trained weights; frozen ones are not in it. Of what is shared see `Shared.state_dict`."""
        fake = {name: p.detach() for name, p in self.fake.trainable().items()}
        own = {name: it.state_dict() for name, it in self.shared.items()}
        return {"fake": fake} | {name: own_state(it) for name, it in self._trained().items() if name not in own} | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter in self.fake.trainable().items():
                parameter.copy_(state["fake"][name])
        for name, module in self._trained().items():
            if name in self.shared:
                self.shared[name].load_state_dict(state[name])
            else:
                load_own_state(module, state[name])

    def _trained(self) -> dict[str, nn.Module]:
        """By its name in a checkpoint, whatever it keeps; of the fake score only a part may be trained."""
        bridge = self.bridge.projector if self.config.bridge.trainable else None
        kept = {"student": self.student, "ema": self.ema, "discriminator": self.discriminator, "bridge": bridge}
        return {name: module for name, module in kept.items() if module is not None}
