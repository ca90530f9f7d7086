"""Drawing pictures: by an exported student of one step or few, a multi-step student or a teacher.

A picture depends on the model, its prompt, its prompt's number and its seed; neither on the batch nor on the other
pictures (arithmetic of another batch size may differ in the last bits). Shapes: B pictures a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from PIL import Image
from torch import nn
from torch.nn.functional import interpolate

import raydistill
from raydistill.data.prompts import PromptSet
from raydistill.diffusion.guidance import is_guided
from raydistill.diffusion.noise import normal
from raydistill.errors import InputError, NonFiniteError
from raydistill.export.upgrade import Decoder, Upgrade
from raydistill.pictures.files import save_png
from raydistill.pictures.grids import grid, to_pil
from raydistill.pictures.picture import Picture
from raydistill.spaces.base import Space
from raydistill.spaces.folder import cast
from raydistill.spaces.one_step import student_x0

SHEETS = ("grid.png", "sheet.png")  # pictures of pictures
SHEET_CELL = 256  # pixels a picture has at most on the contact sheet


def in_steps(steps: int, start_timestep: int) -> str:
    """How a student draws, in words."""
    return f"{'one step' if steps == 1 else f'{steps} steps'} from t = {start_timestep}"


def typed_prompts(texts: Sequence[str], first: int = 1) -> PromptSet:
    """Prompts from a command line, numbered from `first`. Raises InputError for blank or undecodable ones."""
    for text in texts:
        if not text.strip() or any("\ud800" <= character <= "\udfff" for character in text):
            raise InputError(f"prompt {text!r}: is blank, or not valid UTF-8")
    return PromptSet([text.strip() for text in texts], range(first, first + len(texts)))


def pictures_of(prompts: PromptSet, seeds: Sequence[int]) -> list[Picture]:
    """One picture for every prompt and seed; a prompt's pictures follow each other."""
    known = zip(prompts.prompts, prompts.ids.tolist(), strict=True)
    drawn = ((number, prompt, seed) for prompt, number in known for seed in seeds)
    return [Picture(index, *which) for index, which in enumerate(drawn)]


class Painter:
    """Draws batches of pictures with a loaded network.

    Args:
        space: of the model's folder, whose text encoders and VAE are loaded here.
        network: the student's or teacher's.
        start_timestep: of a student, with its `steps`; None: `steps` steps of the folder's own scheduler.
        guidance_scale: of the scheduler's sampling; a scale of 0 to 1 is no guidance.
        upgrade: None draws at the model's own size.
        device: where to compute. Noise always comes from the CPU, so that devices agree.
        dtype: of network, text encoders and VAE (see `load_vae`). Latents stay float32.
    """

    def __init__(
        self,
        space: Space,
        network: nn.Module,
        *,
        start_timestep: int | None = None,
        steps: int = 1,
        guidance_scale: float = 1.0,
        upgrade: Upgrade | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.space, self.device = space, torch.device(device)
        self.start_timestep, self.steps, self.guidance_scale = start_timestep, steps, guidance_scale
        self.network = cast(network, dtype, self.device)
        self.text = space.load_text(dtype).to(self.device)
        self.decoder = Decoder(space, upgrade, self.device, dtype)
        guided = is_guided(guidance_scale) and start_timestep is None
        self._empty = space.unconditional(space.encode_prompts(self.text, [""])) if guided else None

    @torch.no_grad()
    def latents(self, batch: Sequence[Picture]) -> torch.Tensor:
        """Latents [B, C, h, w], float32.

        Raises:
            NonFiniteError: naming the first picture concerned.
        """
        space, shape = self.space, self.space.latent_shape

        def noise_of(step: int) -> torch.Tensor:
            each = [normal(p.seed, [p.prompt_id], shape, "sample", step) for p in batch]
            return torch.cat(each).to(self.device)

        noise = noise_of(0)
        conditioning = space.encode_prompts(self.text, [p.prompt for p in batch])
        if self.start_timestep is not None:
            start = self.start_timestep
            latents = student_x0(space, self.network, noise, conditioning, start, self.steps, noise_of)
        else:
            latents = space.sample(self.network, noise, conditioning, self._empty, self.steps, self.guidance_scale)
        for picture, finite in zip(batch, latents.isfinite().flatten(1).all(1).tolist(), strict=True):
            if not finite:
                raise NonFiniteError(f"{picture.file_name} ({picture.prompt!r}): the latents are not finite")
        return latents

    @torch.no_grad()
    def draw(self, batch: Sequence[Picture]) -> torch.Tensor:
        """Images [B, 3, S, S] in [-1, 1] on the CPU. Errors as of `latents`, also of pictures."""
        latents = self.latents(batch)
        try:
            return self.decoder(latents).cpu()
        except NonFiniteError as error:
            first = batch[error.rows[0]]
            raise NonFiniteError(f"{first.file_name} ({first.prompt!r}): {error}", error.count, error.rows) from error


# -- files --------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Album:
    """Writes pictures as PNG files that say how they were made, then a grid and a contact sheet of the first ones.

    Attributes:
        folder: is created with its first picture.
        about: what every picture's metadata says beside its prompt, number and seed.
        columns: pictures a row of the grid and the sheet.
        shown: pictures in the grid and on the sheet, at most.
    """

    folder: Path
    about: dict[str, str]
    columns: int = 8
    shown: int = 64
    _images: list[Image.Image] = field(default_factory=list)
    _cells: list[torch.Tensor] = field(default_factory=list)
    _captions: list[str] = field(default_factory=list)

    def add(self, picture: Picture, image: torch.Tensor) -> Path:
        """Write one picture [3, S, S]; returns its file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        drawn, software = to_pil(image), f"raydistill {raydistill.__version__}"
        save_png(self.folder / picture.file_name, drawn, picture.facts | self.about | {"Software": software})
        if len(self._images) < self.shown:
            self._images.append(drawn)
            size = min(SHEET_CELL, image.shape[-1])
            self._cells.append(interpolate(image[None], size=(size, size), mode="area")[0])
            self._captions.append(f"{picture.prompt} ({picture.prompt_id}, seed {picture.seed})")
        return self.folder / picture.file_name

    def finish(self, title: str) -> list[Path]:
        """Write grid.png (pictures alone, edge to edge, in full size) and sheet.png (small, with captions)."""
        columns = min(self.columns, len(self._images))
        rows = -(-len(self._images) // columns)
        blank = Image.new("RGB", self._images[0].size)
        filled = self._images + [blank] * (rows * columns - len(self._images))
        files = [self.folder / name for name in SHEETS]
        make_image_grid(filled, rows, columns).save(files[0])
        grid(torch.stack(self._cells), self._captions, columns, title=title).save(files[1])
        return files


def sample(
    painter: Painter,
    pictures: Sequence[Picture],
    album: Album,
    batch_size: int,
    done: Callable[[int], object] = lambda count: None,
) -> None:
    """Draw all pictures into the album; `done` is called with 1 after each."""
    for start in range(0, len(pictures), batch_size):
        batch = pictures[start : start + batch_size]
        for picture, image in zip(batch, painter.draw(batch), strict=True):
            album.add(picture, image)
            done(1)
