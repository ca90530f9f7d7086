"""Which of its steps a sample trains the student in, and what that step sees.

A student of one step sees noise. With `student.steps` above 1 it is DMD2's backward simulation (arXiv 2405.14867, section
4.5): a later step sees what it will see when pictures are drawn, the student's own x0 of the step before, noised again.

    s           step of a sample, 0 … steps - 1
    x_0         = noise
    x_{j+1}     = alpha_{j+1} z(x_j) + sigma_{j+1} eps_{j+1}      j < s, without graph
    z_student   = z(x_s)                                          trained

Every N = steps sample ids that follow each other have all the N steps, beginning at one that chance decides. So a batch
holds equally many of each where N divides it, and a sample takes (N - 1) / 2 evaluations more on average.

Shapes: B samples of a micro-batch, R of them that are not there yet; c×h×w student latents.
"""

from __future__ import annotations

import torch

from raydistill.diffusion.timesteps import student_timesteps
from raydistill.distillation.batches import Draws, MicroBatch
from raydistill.distillation.networks import Networks
from raydistill.spaces.one_step import noised_again
from raydistill.transfer import upload


class Rollout:
    """One worker's student, up to the step that is trained.

    Attributes:
        steps: of the student.
    """

    def __init__(self, networks: Networks, draws: Draws) -> None:
        self.networks, self.draws, student = networks, draws, networks.config.student
        self.steps = student.steps
        self._timesteps = torch.tensor(student_timesteps(student.start_timestep, student.steps), dtype=torch.float64)

    def step_of(self, sample_ids: torch.Tensor) -> torch.Tensor:
        """The trained step of each sample, [B] int64 in main memory: a function of (seed, sample id)."""
        begins = self.draws.of_groups(sample_ids // self.steps, "student_step") * self.steps
        return (sample_ids + begins.long()) % self.steps

    @torch.no_grad()
    def seen(self, micro_batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the trained step of each sample sees [B, c, h, w], and its timesteps [B]; of one step noise, and None."""
        ids, shape = micro_batch.sample_ids, self.networks.student_space.latent_shape
        noise = self.draws.normal(ids, shape, "latents")
        if self.steps == 1:
            return noise, None
        step_B, finite, device = self.step_of(ids), self.networks.finite, self.networks.device
        x_t, timestep_B = noise, self._timesteps[step_B]
        for step in range(1, self.steps):
            rows = (step_B >= step).nonzero().flatten()
            if not len(rows):
                break
            own, at = ids[rows], upload(rows, device)
            before_R, then_R = (
                upload(self._timesteps[number].repeat(len(rows)), device) for number in (step - 1, step)
            )
            text = {name: value[at] for name, value in micro_batch.student_conditioning.items()}
            finite.of(own)
            z_R = self.networks.z_student(x_t[at], text, before_R)
            eps = self.draws.normal(own, shape, "student_noise", step)
            x_t = x_t.index_copy(0, at, noised_again(self.networks.student_space, z_R, eps, then_R))
        finite.of(ids)
        return x_t, upload(timestep_B, device)
