"""Whether what ships is what the teacher saw.

The student ships as D_S(z_S). The teacher sees B(z_S) alone, whose picture is D_T(B(z_S)). Nothing in the losses holds
the two together: a student may learn latents that the Bridge reads well and its own decoder does not. So both decodings
of the same latents are compared.

Shapes: N pictures [N, 3, S, S] in [-1, 1]; c×h×w student latents, C×H×W teacher latents.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import interpolate

from raydistill.data.vae import resized
from raydistill.distillation.compiled import as_it_is
from raydistill.distillation.networks import Networks
from raydistill.evaluation.evaluator import StudentEvaluator
from raydistill.pictures.fidelity import psnr
from raydistill.spaces.base import Space
from raydistill.spaces.one_step import student_x0

FALL_DB = 3.0  # below the stage's best: the squared difference of the two pictures has doubled


class TeacherDecoder:
    """The teacher's VAE beside a training: it waits in main memory, and decodes one picture at a time.

    Args:
        space: the teacher's.
        device: that decodes. From the first time that the VAE has no room there, the CPU does.
    """

    def __init__(self, space: Space, device: torch.device) -> None:
        self.space, self.device = space, device
        self._vae: torch.nn.Module | None = None

    def __call__(self, latents: torch.Tensor, most: int | None = None) -> torch.Tensor:
        """Pictures of latents [N, C, H, W], on the CPU; what is not finite is black.

        Args:
            most: pixels of a side; larger pictures are shrunk to it, each before the next one is decoded.
        """
        if self._vae is None:
            self._vae = self.space.load_vae()

        def decode() -> list[torch.Tensor]:
            vae = self._vae.to(self.device)
            return [_shrunk(self.space.decode_each(vae, one.to(self.device)), most).cpu() for one in latents.split(1)]

        return torch.cat(self._on_what_fits(decode)).nan_to_num(-1.0)

    @torch.no_grad()
    def _on_what_fits(self, decode: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
        try:
            return decode()
        except torch.OutOfMemoryError:
            print(
                "evaluation: the teacher's VAE has no room on the GPU; its pictures are decoded on the CPU", flush=True
            )
            self.device = torch.device("cpu")
        finally:
            self._vae.to("cpu")
        return decode()


def _shrunk(images: torch.Tensor, most: int | None) -> torch.Tensor:
    return images if most is None or images.shape[-1] <= most else interpolate(images, size=(most, most), mode="area")


class Consistency:
    """The PSNR between D_S(z_S) and D_T(B(z_S)), of the first pictures of a fixed set.

    Args:
        networks: the student and its Bridge.
        evaluator: draws the set.
        decoder: of the teacher.
        count: pictures.
    """

    def __init__(self, networks: Networks, evaluator: StudentEvaluator, decoder: TeacherDecoder, count: int) -> None:
        self.networks, self.evaluator, self.decoder = networks, evaluator, decoder
        self.fixed = evaluator.fixed.first(count)

    @torch.no_grad()
    def psnr(self, start_timestep: int, steps: int = 1) -> float:
        """Mean over the pictures of a student of so many steps, in dB, at its resolution; changes no number of the training."""
        networks, found = self.networks, []
        space, side = networks.student_space, networks.student_space.resolution
        for start, stop, captions in self.fixed.batches(self.evaluator.config.batch_size):
            conditioning = networks.on_device(self.evaluator.table(captions))
            noise = self.fixed.noise(space, start, stop).to(networks.device)
            again = partial(self.fixed.noise, space, start, stop)
            with as_it_is(networks.evaluated):
                latents = student_x0(space, networks.evaluated, noise, conditioning, start_timestep, steps, again)
            ships = space.decode(self.evaluator.vae, latents).cpu()
            # the next update would be blamed for what is not finite here
            with networks.finite.aside(), as_it_is(networks.bridge):
                seen = self.decoder(networks.bridged(latents))
            found.append(psnr(ships, resized(seen, side)))
        return torch.cat(found).mean().item()
