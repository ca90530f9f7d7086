"""Pictures that tell: what the student draws, and what teacher and fake score make of it with the same noise.

The student learns from the difference of the two x0 estimates. So they show what the teacher would change, and whether
the fake score knows what the student draws. Nothing here changes a number of the training.

Shapes: N pictures of fixed prompts; B samples of C×H×W teacher latents, c×h×w student latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from PIL import Image

from raydistill.config.schema import Config
from raydistill.diffusion.noise import normal
from raydistill.diffusion.path import add_noise
from raydistill.diffusion.timesteps import sample_t
from raydistill.distillation.batches import Made
from raydistill.distillation.compiled import as_it_is
from raydistill.distillation.networks import Networks
from raydistill.evaluation.consistency import TeacherDecoder
from raydistill.evaluation.evaluator import FixedPrompts
from raydistill.pictures.grids import before_after
from raydistill.spaces.base import Conditioning

CELL = 256  # pixels; larger pictures are shrunk to it
ROWS = ("student", "teacher's x0", "fake score's x0")


class ScorePictures:
    """The same few prompts, noises and times at every evaluation.

    Args:
        fixed: prompts and noise of the N pictures, the first of the periodic evaluation.
        decoder: draws what the latents stand for.
        student, teacher: their conditioning, [N, …] each.
    """

    def __init__(
        self,
        config: Config,
        networks: Networks,
        fixed: FixedPrompts,
        decoder: TeacherDecoder,
        *,
        student: Conditioning,
        teacher: Conditioning,
    ) -> None:
        self.config, self.networks, self.fixed, self.decoder = config, networks, fixed, decoder
        self.student, self.teacher = student, teacher

    @property
    def t_B(self) -> torch.Tensor:
        """Times of the N pictures: evenly over those at which teachers score, from the least noise to the most."""
        count, vsd = len(self.fixed.captions), self.config.vsd
        shift = self.networks.teacher_space.default_shift if vsd.shift is None else vsd.shift
        return sample_t((torch.arange(count) + 0.5) / count, vsd.t_min, vsd.t_max, shift)

    @torch.no_grad()
    def make(self) -> list[tuple[torch.Tensor, Made]]:
        """(x, what the scores see) of the student as it trains now, in parts as large as micro-batches, in main memory."""
        networks, distill, micro_batches = self.networks, self.config.distill, []
        size = distill.batch_size // distill.micro_batches
        for start in range(0, len(self.fixed.captions), size):
            rows = slice(start, min(start + size, len(self.fixed.captions)))
            student, teacher = ({name: v[rows] for name, v in it.items()} for it in (self.student, self.teacher))
            noise = self.fixed.noise(networks.student_space, rows.start, rows.stop)
            # the next update would be blamed for what is not finite here
            with networks.finite.aside(), as_it_is(networks.student, networks.bridge):
                again = partial(self.fixed.noise, networks.student_space, rows.start, rows.stop)
                x, t_B = networks.bridged(networks.drawn(noise, student, again)), self.t_B[rows]
            eps = normal(self.fixed.seed, range(rows.start, rows.stop), x.shape[1:], "scores_grid")
            x_t = add_noise(networks.teacher_space.path, x, eps.to(x.device), t_B.to(x.device))
            seen = (x_t.cpu(), t_B)
            made = Made(
                sample_ids=torch.arange(rows.start, rows.stop),
                student_conditioning=student,
                teacher_conditioning=teacher,
                fake_conditioning=teacher,
                seen=noise,
                timestep_B=None,
                x_t=seen[0],
                t_B=t_B,
                on_device=seen,  # in main memory too, for it goes to other workers
            )
            micro_batches.append((x.cpu(), made))
        return micro_batches

    def picture(self, latents: Sequence[torch.Tensor], step: int) -> Image.Image:
        """One column a prompt, one row each of `latents` [N, C, H, W]: x, the teacher's x0, the fake score's."""
        rows = dict(zip(ROWS, (self.decoder(one, CELL) for one in latents), strict=True))
        captions = [f"t = {t:.2f}: {text}" for t, text in zip(self.t_B.tolist(), self.fixed.captions, strict=True)]
        return before_after(rows, captions, title=f"Update {step}: x, and its estimates at the same noised latent")
