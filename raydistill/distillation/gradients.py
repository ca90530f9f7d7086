"""Gradients of one worker's micro-batches, their mean over all workers, and the optimizers that take them.

A batch is computed in `distill.micro_batches` micro-batches. Every loss is a mean over samples of what each sample gives
by itself, so the mean of the micro-batches' gradients is the batch's, up to rounding. Where fewer workers than usual share
them, some have more of them than others: each divides by what they have on average, before the mean of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from raydistill.config.schema import Config
from raydistill.distillation import optimizers
from raydistill.distillation.finite import OTHERS_SAMPLE, OTHERS_VALUE, Finite
from raydistill.distillation.gradient_scale import GradientScale
from raydistill.distillation.networks import Networks
from raydistill.spaces.adapter import trained

T = TypeVar("T")
Average = Callable[[list[torch.Tensor]], None]  # tensors of one dtype, in place, over all workers

OF_FAKE = ("fake", "discriminator")  # optimizers whose updates have a batch of their own
OTHERS = "another worker's part of the"  # of a mean over workers, where this one's own part is finite


def alone(gradients: list[torch.Tensor]) -> None:
    """The mean over one worker."""


def optimizers_of(networks: Networks, config: Config) -> dict[str, Optimizer]:
    """AdamW for each trained network (`optimizers.make`).

    On CUDA in torch's fused form: one kernel, without copies as large as the weights.
    """
    fused = True if networks.device.type == "cuda" else None

    def adamw(parameters: list[nn.Parameter], lr: float, kind: optimizers.Kind = "adamw") -> Optimizer:
        return optimizers.make(parameters, lr, kind, fused=fused)

    found = {
        "student": adamw(list(trained(networks.student).values()), config.student.lr, config.student.optimizer),
        "fake": adamw(list(networks.fake.trainable().values()), config.fake_score.lr, config.fake_score.optimizer),
    }
    if config.bridge.trainable:
        found["bridge"] = adamw(networks.bridge.trainable_parameters(), config.bridge.trainable_lr)
    if networks.discriminator is not None:
        found["discriminator"] = adamw(list(networks.discriminator.parameters()), config.discriminator.lr)
    return found


class Gradients:
    """The optimizers by name, and what they step on.

    Args:
        by_name: the optimizers.
        mean_micro_batches: micro-batches of a worker, on average over all workers.
        finite: looked at before every step.
        average: mean of tensors over the workers.
        mean_fake_micro_batches: those of the fake score's and the discriminator's updates; None: as many.
        share: of the learning rates, by the number of student updates before this one; None: always all of them.
        scale: of the student's gradients; None: there is none.
    """

    def __init__(
        self,
        by_name: dict[str, Optimizer],
        mean_micro_batches: float,
        finite: Finite,
        average: Average = alone,
        *,
        mean_fake_micro_batches: float | None = None,
        share: Callable[[int], float] | None = None,
        scale: GradientScale | None = None,
    ) -> None:
        self.optimizers, self.mean_micro_batches, self.finite = by_name, mean_micro_batches, finite
        self.average, self.share, self.scale = average, share, scale
        self.mean_fake_micro_batches = mean_fake_micro_batches or mean_micro_batches
        self.tolerant = False  # whether samples may be left out: all workers have to know of another's
        self._rates = {name: float(one.param_groups[0]["lr"]) for name, one in by_name.items()}

    def set_rates(self, updates: int) -> None:
        """Set the learning rates of the update that follows `updates` of the student; a function of nothing else."""
        if self.share is None:
            return
        share = self.share(updates)
        for name, optimizer in self.optimizers.items():
            optimizers.set_lr(optimizer, share * self._rates[name])

    def parameters(self, name: str) -> list[nn.Parameter]:
        """Those of one optimizer."""
        return [p for group in self.optimizers[name].param_groups for p in group["params"]]

    def accumulate(self, loss: torch.Tensor, *names: str, keep: bool = False, weight: float = 1.0) -> None:
        """Add a micro-batch's share of the mean gradient to that of the named optimizers' parameters.

        Args:
            keep: the graph, for another loss that shares it.
            weight: share of the micro-batch's samples that the loss is the mean of; the others count as 0. Where it is 0,
                the loss is another micro-batch's: its passes run, as those of all workers must, and add nothing.
        """
        self.finite.note(loss, f"the {' and '.join(names)} loss")
        parameters = [p for name in names for p in self.parameters(name)]
        mean_micro_batches = self.mean_fake_micro_batches if names[0] in OF_FAKE else self.mean_micro_batches
        own = loss / (mean_micro_batches / weight) if weight else 0 * loss
        torch.autograd.backward(own, inputs=parameters, retain_graph=keep)

    def step(self, **max_norms: float) -> dict[str, torch.Tensor]:
        """Average the gradients over workers, clip them and step the named optimizers. It waits for the device once.

        Returns:
            Each one's gradient norm before clipping, on the device.

        Raises:
            GradientOverflow: of the student's scaled gradient, on all workers alike, before anything but it has changed.
            NonFiniteError: of a gradient, or of what it was computed from, before anything has changed. Weights that an
                update leaves not finite are noted: the next look names them.
        """
        groups = {name: self.parameters(name) for name in max_norms}
        parameters = [p for group in groups.values() for p in group]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        scaled = "student" if self.scale is not None else None
        self._hear_of_others(self.tolerant, scaled in groups)
        if self.average is not alone:  # the mean of all workers does not say whose part it was
            for name, group in groups.items():
                # of scaled ones the largest number: squares may be infinite here, and not in the mean, on which all decide
                norm = nn.utils.get_total_norm([p.grad for p in group], math.inf if name == scaled else 2.0)
                self.finite.note(norm, f"the {name} gradient", scaled=name == scaled)
        self.average([p.grad for p in parameters])
        if scaled in groups:
            self.scale.leave([p.grad for p in groups[scaled]])
        norms = {name: nn.utils.clip_grad_norm_(group, max_norms[name]) for name, group in groups.items()}
        of_all = self.average is not alone
        for name, norm in norms.items():
            source = f"{OTHERS if of_all else 'the'} {name} gradient"
            self.finite.note(norm, source, elsewhere=of_all, scaled=name == scaled)
        self.finite.look()  # before any step: a bad gradient must change nothing
        for name, group in groups.items():
            optimizers.step(self.optimizers[name])
            self.optimizers[name].zero_grad(set_to_none=True)
            with torch.no_grad():
                self.finite.note(nn.utils.get_total_norm(group), f"the {name} weights after their update")
        return norms

    def _hear_of_others(self, of_samples: bool, of_any: bool) -> None:
        """Note what other workers have noted, before the mean of all spoils every worker's gradient.

        Args:
            of_samples: whether it was of samples, which may then be left out by all.
            of_any: whether it was anything: then it is no matter of a gradient's scale.
        """
        if self.average is alone:
            return
        for asked, bad, source in (
            (of_samples, self.finite.of_samples, OTHERS_SAMPLE),
            (of_any, self.finite.of_any, OTHERS_VALUE),
        ):
            if asked and (flag := bad()) is not None:
                self.average([flag])
                self.finite.note((1 - (flag > 0).float()).log()[0], source, elsewhere=True)  # log 0

    def scaled(self, phase: Callable[[], T], names: Sequence[str]) -> T:
        """A phase of the student, which accumulates for the named optimizers and steps them; see `GradientScale.run`."""

        def drop() -> None:
            for name in names:
                self.optimizers[name].zero_grad(set_to_none=True)

        return phase() if self.scale is None else self.scale.run(phase, drop)

    def taken(self, names: Sequence[str]) -> Callable[[], None]:
        """What is accumulated now for the named optimizers; the function that is returned brings it back."""
        parameters = [p for name in names for p in self.parameters(name)]
        kept = [None if p.grad is None else p.grad.clone() for p in parameters]

        def restore() -> None:
            for parameter, gradient in zip(parameters, kept, strict=True):
                parameter.grad = None if gradient is None else gradient.clone()

        return restore

    def state_dict(self) -> dict[str, Any]:
        state = {"optimizers": {name: optimizers.state_dict(one) for name, one in self.optimizers.items()}}
        return state | ({} if self.scale is None else {"gradient_scale": self.scale.state_dict()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, optimizer in self.optimizers.items():
            optimizers.load_state_dict(optimizer, state["optimizers"][name])
        if self.scale is not None:
            self.scale.load_state_dict(state["gradient_scale"])
