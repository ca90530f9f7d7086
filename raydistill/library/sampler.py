"""Drawing pictures from a script: a one-step student, a multi-step student or a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from raydistill.evaluation.subject import find_subject, load_painter
from raydistill.export.sampling import pictures_of, typed_prompts
from raydistill.pictures.grids import to_pil
from raydistill.storage.resolve import to_place


class Sampler:
    """Draws the pictures that `raydistill sample` and `raydistill evaluate` draw: same prompts and seeds, same noise.

    Args:
        model: a run's name or folder, an export or any diffusers folder, `shapes:NAME`, a URI, a hub model, or an MLflow
            run id.
        storage: where runs are looked for by name.
        steps: of a multi-step model; None: 1 where the folder is a one-step export, else 28.
        guidance_scale: of a multi-step model; None: its family's own.
        unet: one-step weights to put into `model`, as `student.unet` names them.
        start_timestep: of `unet`; None: what the checkpoint says.
        tracking_uri: MLflow's, for a run id that is not in `storage`.
        device: None: cuda where there is one.
        dtype: of the networks.

    Raises:
        InputError: there is no such model, or it cannot be sampled so.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        storage: str | Path = "outputs",
        steps: int | None = None,
        guidance_scale: float | None = None,
        unet: str | Path | None = None,
        start_timestep: int | None = None,
        tracking_uri: str | None = None,
        device: torch.device | str | None = None,
        dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    ) -> None:
        weights = None if unet is None else str(unet)
        self.subject = find_subject(
            str(model), to_place(str(storage)), tracking_uri, steps, guidance_scale, weights, start_timestep
        )
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.painter = load_painter(self.subject, self.device, getattr(torch, dtype))

    def __call__(
        self, prompts: str | Sequence[str], seeds: int | Sequence[int] = 0, batch_size: int = 8
    ) -> list[Image.Image]:
        """One picture for every prompt and seed; those of a prompt follow each other.

        Raises:
            InputError: a prompt is blank.
            NonFiniteError: a picture's latents are not finite.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        pictures = pictures_of(typed_prompts(texts), [seeds] if isinstance(seeds, int) else list(seeds))
        batches = (pictures[start : start + batch_size] for start in range(0, len(pictures), batch_size))
        return [to_pil(image) for batch in batches for image in self.painter.draw(batch)]

    def __repr__(self) -> str:
        return f"Sampler({self.subject.title}, {self.painter.space.resolution} px, {self.device})"
