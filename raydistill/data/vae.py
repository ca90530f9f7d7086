"""Pictures to latents in both spaces: z_T = E_T(picture), z_S = E_S(picture at the student's resolution).

Both describe one picture (arXiv 2606.32020). Pictures go through the VAEs in chunks of one fixed size, filled up
with repeats, so that a row's numbers do not depend on how many others came with it.

Shapes: B pictures [B, 3, S, S] in [-1, 1], C×H×W normalised latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from raydistill.config.stages import Posterior
from raydistill.diffusion.noise import normal
from raydistill.pictures.augment import augmented
from raydistill.pictures.files import png_bytes
from raydistill.spaces.base import Space

PREVIEW_PIXELS = 64
VAE_BATCH = 8  # pictures per VAE forward, at most


def resized(images: torch.Tensor, pixels: int) -> torch.Tensor:
    """Images at `pixels` a side, bilinear with antialiasing."""
    if images.shape[-2:] == (pixels, pixels):
        return images
    return F.interpolate(images, size=(pixels, pixels), mode="bilinear", antialias=True, align_corners=False)


def previews(images: torch.Tensor, pixels: int = PREVIEW_PIXELS) -> list[bytes]:
    """PNG bytes of small versions of the images."""
    small = ((resized(images.float(), pixels).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [png_bytes(Image.fromarray(image)) for image in small.permute(0, 2, 3, 1).cpu().numpy()]


def in_chunks(space: Space, forward: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """forward(*inputs) along the batch, as many at a time as the VAE of `space` may see, at most VAE_BATCH.

    The last chunk is filled up by repeating its last row.
    """
    size, results = space.vae_batch(VAE_BATCH), []
    for chunks in zip(*(tensor.split(size) for tensor in inputs), strict=True):
        count = len(chunks[0])
        filled = [torch.cat([chunk, chunk[-1:].expand(size - count, *chunk.shape[1:])]) for chunk in chunks]
        results.append(forward(*filled)[:count])
    return torch.cat(results)


class PairEncoder:
    """Teacher samples or pictures -> (z_T, z_S, previews), with both VAEs loaded once.

    Args:
        posterior: take the mean of each VAE's posterior, or a sample of it.
        seed: of those samples, and of changed pictures; row i's are drawn for (seed, i).
        dtype: of latents that are kept.
        with_previews: make small pictures as well.
        augment_share: of the pictures that are blended and recoloured before they are encoded.
    """

    def __init__(
        self,
        teacher: Space,
        student: Space,
        device: str = "cpu",
        posterior: Posterior = "mean",
        seed: int = 0,
        *,
        dtype: torch.dtype = torch.float16,
        with_previews: bool = True,
        augment_share: float = 0.0,
    ) -> None:
        self.teacher, self.student, self.device = teacher, student, device
        self.posterior, self.seed, self.dtype, self.with_previews = posterior, seed, dtype, with_previews
        self.augment_share = augment_share
        self._teacher_vae = teacher.load_vae().to(device)
        self._student_vae = student.load_vae().to(device)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [B, C, H, W] of the teacher -> pictures on `device`; one that is not finite is NaN."""
        return in_chunks(
            self.teacher, lambda chunk: self.teacher.decode_each(self._teacher_vae, chunk), latents.to(self.device)
        )

    @torch.no_grad()
    def encode(
        self, pictures: torch.Tensor, rows: Sequence[int] | np.ndarray | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, list[bytes]]:
        """Pictures at the teacher's resolution -> z_T and z_S on the CPU, float32, and B PNGs of what was encoded, if any.

        `rows`: B positions in the set, needed when the posterior is sampled or pictures are changed.
        """
        pictures = pictures.to(self.device)
        if self.augment_share > 0:
            if rows is None:
                raise ValueError("a picture is changed for a row of the set: rows must be given")
            pictures = augmented(pictures, self.seed, rows, self.augment_share)
        small = resized(pictures, self.student.resolution)
        z_teacher = self._latents(self.teacher, self._teacher_vae, pictures, rows, "posterior_T")
        z_student = self._latents(self.student, self._student_vae, small, rows, "posterior_S")
        return z_teacher, z_student, previews(pictures) if self.with_previews else []

    def _latents(
        self,
        space: Space,
        vae: nn.Module,
        pictures: torch.Tensor,
        rows: Sequence[int] | np.ndarray | None,
        purpose: str,
    ) -> torch.Tensor:
        if self.posterior == "mean":
            return in_chunks(space, lambda chunk: space.encode(vae, chunk), pictures).float().cpu()
        if rows is None:
            raise ValueError("a sample of the posterior is drawn for a row of the set: rows must be given")
        noise = normal(self.seed, rows, space.latent_shape, purpose).to(pictures)

        def sample(chunk: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
            mean, deviation = space.posterior(vae, chunk)
            return space.normalise(mean + deviation * noise.to(mean))

        return in_chunks(space, sample, pictures, noise).float().cpu()
