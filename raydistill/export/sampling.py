"""Pictures of an exported one-step student, at its own size or, through the Bridge, at the teacher's.

A picture depends on the student, its prompt, its seed and its prompt's number; neither on the batch nor on the other
pictures (arithmetic of another batch size may differ in the last bits). Shapes: B pictures a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn
from torch.nn.functional import interpolate

from raydistill.bridge.model import Bridge, check_pair
from raydistill.config import schema
from raydistill.data.prompts import PromptSet
from raydistill.diffusion.noise import normal
from raydistill.errors import InputError, NonFiniteError
from raydistill.export.source import Export
from raydistill.export.tensors import first_difference
from raydistill.pictures.grids import grid, to_pil
from raydistill.spaces import load_space
from raydistill.spaces.base import Space
from raydistill.spaces.published_students import load_student
from raydistill.storage.resolve import resolve

SHEETS = ("grid.png", "sheet.png")  # pictures of pictures
SHEET_CELL = 256  # pixels a picture has at most on the contact sheet


@dataclass(frozen=True)
class Picture:
    """What decides one picture's noise and content."""

    prompt: str
    number: int  # of the prompt: its row in a file
    seed: int

    @property
    def file_name(self) -> str:
        return f"{self.number:05d}-seed{self.seed}.png"


def typed_prompts(texts: Sequence[str], first: int = 1) -> PromptSet:
    """Prompts from a command line, numbered from `first`. Raises InputError for blank or undecodable ones."""
    for text in texts:
        if not text.strip() or any("\ud800" <= character <= "\udfff" for character in text):
            raise InputError(f"prompt {text!r}: is blank, or not valid UTF-8")
    return PromptSet([text.strip() for text in texts], range(first, first + len(texts)))


def pictures_of(prompts: PromptSet, seeds: Sequence[int]) -> list[Picture]:
    """One picture for every prompt and seed; a prompt's pictures follow each other."""
    pairs = zip(prompts.prompts, prompts.ids.tolist(), strict=True)
    return [Picture(prompt, number, seed) for prompt, number in pairs for seed in seeds]


# -- the upgrade to the teacher's size ----------------------------------------------------------------------


@dataclass(frozen=True)
class Upgrade:
    """What takes student latents to pictures of the teacher's size; checked, nothing loaded."""

    bridge: Path
    base: Space  # the student model that the Bridge was trained with: its decoder is the Bridge's first part
    teacher: Space


def find_upgrade(export: Export, bridge: str | None, teacher: str | None, base: str | None) -> Upgrade:
    """The Bridge, teacher and base model as named, or as the run was configured that made the export.

    Args:
        export: the student.
        bridge: a trained Bridge's folder; None: the run's.
        teacher: a diffusers folder, or a hub model in the cache; None: the run's.
        base: the student model that the Bridge was trained with; None: the run's, without a run the export itself.

    Raises:
        InputError: something is neither named nor known, or the student has another VAE than the base.
        InputError: the Bridge belongs to another pair of VAEs.
        InputError: a model that is not there, or no model.
    """
    config = export.run_config()
    if config is not None:
        if bridge is None and config.bridge.projector == "identity":
            raise InputError(f"{export.name}: its run has the identity Bridge, so there is no larger size to go to")
        bridge = bridge or _bridge_of(export.run, config.bridge)
        teacher, base = teacher or config.teacher.model, base or config.student.model
    missing = [option for option, value in (("--bridge", bridge), ("--teacher", teacher)) if value is None]
    if missing:
        raise InputError(
            f"{export.folder} does not lie in a run's folder that tells its Bridge and teacher: name {' and '.join(missing)}"
        )
    teacher_space = load_space(_existing(teacher, "--teacher"))
    base_space = load_space(_existing(base or str(export.folder), "--base"), "StableDiffusionPipeline")
    folder = _existing(bridge, "--bridge")
    try:
        check_pair(folder, base_space, teacher_space)
    except InputError as error:
        hint = "" if base else ". An export's VAE may be a half-precision copy: name the original model with --base"
        raise InputError(f"{error}{hint}") from None
    if base is not None:
        difference = first_difference(Path(base_space.folder, "vae"), Path(export.folder, "vae"))
        if difference is not None:
            raise InputError(f"{export.folder}: its VAE is not that of {base_space.folder}: {difference}")
    return Upgrade(folder, base_space, teacher_space)


def _bridge_of(run: Path, config: schema.BridgeConfig) -> str:
    """Where a run has its Bridge: trained along with the student, as it was given, or trained at first."""
    if config.trainable:
        return str(run / "distill" / "bridge")
    return config.checkpoint or str(run / "bridge")


def _existing(name: str, option: str) -> Path:
    path = resolve(name)
    if not path.exists():
        raise InputError(f"{option}: {name} does not exist")
    return path


class Decoder:
    """Student latents -> pictures: the student's own VAE, or the Bridge and the teacher's VAE."""

    def __init__(self, space: Space, upgrade: Upgrade | None, device: torch.device, dtype: torch.dtype) -> None:
        self.bridge: nn.Module | None = None
        self.space = space
        if upgrade is not None:
            self.space = upgrade.teacher
            self.bridge = Bridge.load(upgrade.bridge, upgrade.base, upgrade.teacher).to(device)
        self.vae = self.space.load_vae(dtype).to(device)

    def __call__(self, z_student: torch.Tensor) -> torch.Tensor:
        """[B, C, h, w] float32, normalised -> [B, 3, S, S] in [-1, 1]. The Bridge computes in float32."""
        return self.space.decode(self.vae, z_student if self.bridge is None else self.bridge(z_student))


# -- drawing ------------------------------------------------------------------------------------------------


class Sampler:
    """Draws batches of pictures in one network evaluation each."""

    def __init__(
        self,
        space: Space,
        upgrade: Upgrade | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Load the networks.

        Args:
            space: Space of the export, whose scheduler has one exact step (`open_one_step`).
            upgrade: None draws at the student's size.
            device: where to compute; noise always comes from the CPU, so that devices agree.
            dtype: of UNet, text encoder and VAE; latents stay float32.
        """
        self.space, self.device = space, torch.device(device)
        self.text = space.load_text(dtype).to(self.device)
        self.unet = load_student(space, Path(space.folder)).to(self.device, dtype)
        self.decoder = Decoder(space, upgrade, self.device, dtype)

    @torch.no_grad()
    def latents(self, batch: Sequence[Picture]) -> torch.Tensor:
        """Student latents [B, C, h, w], float32: the single step of the folder's own scheduler, without guidance.

        Raises:
            NonFiniteError: naming the first picture concerned.
        """
        shape = self.space.latent_shape
        noise = torch.cat([normal(p.seed, [p.number], shape, "sample") for p in batch]).to(self.device)
        conditioning = self.space.encode_prompts(self.text, [p.prompt for p in batch])
        latents = self.space.sample(self.unet, noise, conditioning, conditioning, 1, 1.0)
        for picture, finite in zip(batch, latents.isfinite().flatten(1).all(1).tolist(), strict=True):
            if not finite:
                raise NonFiniteError(f"{picture.file_name} ({picture.prompt!r}): the student's latents are not finite")
        return latents

    @torch.no_grad()
    def draw(self, pictures: Sequence[Picture], batch_size: int) -> Iterator[tuple[Picture, torch.Tensor]]:
        """(picture, image [3, S, S] in [-1, 1] on the CPU), in order."""
        for start in range(0, len(pictures), batch_size):
            batch = pictures[start : start + batch_size]
            yield from zip(batch, self.decoder(self.latents(batch)).cpu(), strict=True)


# -- files --------------------------------------------------------------------------------------------------


@dataclass
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
        facts = {"prompt": picture.prompt, "prompt_number": str(picture.number), "seed": str(picture.seed)}
        entries = PngInfo()
        for key, value in (facts | self.about | {"Software": f"raydistill {metadata.version('raydistill')}"}).items():
            entries.add_itxt(key, value)
        pil = to_pil(image)
        pil.save(self.folder / picture.file_name, pnginfo=entries)
        if len(self._images) < self.shown:
            self._images.append(pil)
            size = min(SHEET_CELL, image.shape[-1])
            self._cells.append(interpolate(image[None], size=(size, size), mode="area")[0])
            self._captions.append(f"{picture.prompt} ({picture.number}, seed {picture.seed})")
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
    sampler: Sampler,
    pictures: Sequence[Picture],
    album: Album,
    batch_size: int,
    done: Callable[[int], object] = lambda count: None,
) -> None:
    """Draw all pictures into the album; `done` is called with 1 after each."""
    for picture, image in sampler.draw(pictures, batch_size):
        album.add(picture, image)
        done(1)
