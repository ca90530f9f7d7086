"""Data sets of teacher samples: prompt -> teacher's picture -> the latents of that picture in both spaces.

z_T is the teacher VAE's encoding of the decoded picture and z_S the student VAE's encoding of the same picture at the
student's resolution (arXiv 2606.32020), so both describe one image. Row i of a set is position i of the prompt
set's order, its noise is drawn for (seed, i), and requests always have `batch_size` samples: neither an interruption
nor a larger count changes a row.

Shapes: B samples, C×H×W normalised latents, images [B, 3, S, S] in [-1, 1].
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

from raydistill.data.encode import TextEncoder
from raydistill.data.pairs import existing_shards, png, shard_file, write_pairs
from raydistill.data.prompts import PromptSet
from raydistill.diffusion.noise import normal
from raydistill.spaces import Conditioning, Space

PREVIEW_PIXELS = 64
IN_FLIGHT = 2  # requests the teacher may work on while a batch is decoded here
VAE_BATCH = 8  # pictures per VAE forward
SETTINGS_FILE = "synthesis.json"


class SynthesisError(ValueError):
    """A set of teacher samples that must not be made; the message says why."""


class Samples(Protocol):
    """Samples on their way."""

    def result(self) -> torch.Tensor:
        """Latents [B, C, H, W], float32."""


class Sampler(Protocol):
    """What generates: a `TeacherClient` of the service, or a `LocalTeacher`."""

    def generate(
        self,
        noise: torch.Tensor,
        conditioning: Conditioning,
        unconditional: Conditioning | None,
        steps: int,
        guidance_scale: float,
    ) -> Samples: ...


# -- a teacher in this process --------------------------------------------------------------------------


@dataclass(frozen=True)
class LocalSamples:
    """Samples that are drawn when they are asked for."""

    teacher: LocalTeacher
    arguments: tuple[torch.Tensor, Conditioning, Conditioning | None, int, float]

    def result(self) -> torch.Tensor:
        noise, conditioning, unconditional, steps, guidance_scale = self.arguments
        device = next(self.teacher.network.parameters()).device

        def moved(tensors: Conditioning | None) -> Conditioning | None:
            return tensors and {name: value.to(device) for name, value in tensors.items()}

        latents = self.teacher.space.sample(
            self.teacher.network, noise.to(device), moved(conditioning), moved(unconditional), steps, guidance_scale
        )
        return latents.float().cpu()


@dataclass(frozen=True)
class LocalTeacher:
    """A teacher without the service, for one process: notebooks and small sets."""

    space: Space
    network: nn.Module

    def generate(
        self,
        noise: torch.Tensor,
        conditioning: Conditioning,
        unconditional: Conditioning | None,
        steps: int,
        guidance_scale: float,
    ) -> LocalSamples:
        """Multi-step samples from noise [B, C, H, W]; drawn at `.result()`."""
        return LocalSamples(self, (noise, conditioning, unconditional, steps, guidance_scale))


# -- pictures -------------------------------------------------------------------------------------------


def resized(images: torch.Tensor, pixels: int) -> torch.Tensor:
    """Images at `pixels` a side, bilinear with antialiasing."""
    if images.shape[-2:] == (pixels, pixels):
        return images
    return F.interpolate(images, size=(pixels, pixels), mode="bilinear", antialias=True, align_corners=False)


def previews(images: torch.Tensor, pixels: int = PREVIEW_PIXELS) -> list[bytes]:
    """PNG bytes of small versions of the images."""
    small = ((resized(images.float(), pixels).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [png(Image.fromarray(image)) for image in small.permute(0, 2, 3, 1).cpu().numpy()]


class PairEncoder:
    """Teacher samples -> (z_T, z_S, previews), with both VAEs loaded once."""

    def __init__(self, teacher: Space, student: Space, device: str = "cpu") -> None:
        self.teacher, self.student, self.device = teacher, student, device
        self._teacher_vae = teacher.load_vae().to(device)
        self._student_vae = student.load_vae().to(device)

    @torch.no_grad()
    def __call__(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[bytes]]:
        """Latents [B, C, H, W] of the teacher -> z_T and z_S of the decoded pictures on the CPU, and B PNGs."""
        parts = latents.to(self.device).split(VAE_BATCH)
        return self.encode(torch.cat([self.teacher.decode(self._teacher_vae, part) for part in parts]))

    @torch.no_grad()
    def encode(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[bytes]]:
        """Pictures [B, 3, S, S] at the teacher's resolution -> z_T and z_S on the CPU, and B PNGs."""
        z_T, z_S, pngs = [], [], []
        for images in pictures.to(self.device).split(VAE_BATCH):
            z_T.append(self.teacher.encode(self._teacher_vae, images).float().cpu())
            z_S.append(self.student.encode(self._student_vae, resized(images, self.student.resolution)).float().cpu())
            pngs += previews(images)
        return torch.cat(z_T), torch.cat(z_S), pngs


# -- the set --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Request:
    """Rows first … first + batch_size - 1 of the set, of which the first `kept` belong to the shard."""

    shard: int
    first: int
    kept: int
    last_of_shard: bool


def synthesise(
    client: Sampler,
    teacher: Space,
    student: Space,
    prompts: PromptSet,
    folder: str | Path,
    *,
    count: int,
    batch_size: int,
    shard_size: int,
    steps: int,
    guidance_scale: float,
    seed: int,
    forbidden: Collection[str] = (),
    device: str = "cpu",
    progress: bool = True,
) -> int:
    """Write `count` rows to pairs-*.parquet; complete shards that are already there are kept.

    Args:
        client: what generates.
        teacher, student: the two spaces; the teacher's text encoders and both VAEs are loaded here.
        prompts: row i takes position i of their order under `seed`.
        folder: of the set; also gets synthesis.json, what the set was made with.
        count, batch_size, shard_size: rows in all, per request, and per file.
        steps, guidance_scale: of the teacher's sampling.
        seed: of the order of prompts and of the noise.
        forbidden: held-out prompts.
        device: of text encoders and VAEs.
        progress: show a progress bar where there is a terminal.

    Returns:
        How many rows were made by this call.

    Raises:
        SynthesisError: a forbidden prompt is among the prompts, or the folder's set was made with other settings.
    """
    common = set(prompts.prompts) & set(forbidden)
    if common:
        raise SynthesisError(
            f"{prompts.report.source}: {len(common)} held-out prompts are among the prompts, for example {min(common)!r}"
        )
    folder = Path(folder)
    _check_settings(
        folder,
        {
            "teacher": [teacher.pipeline_class, *teacher.latent_shape],
            "student": [student.pipeline_class, *student.latent_shape],
            "prompts": _fingerprint(prompts),
            "batch_size": batch_size,
            "shard_size": shard_size,
            "steps": steps,
            "guidance_scale": guidance_scale,
            "seed": seed,
        },
    )
    requests = list(_missing_requests(folder, count, batch_size, shard_size))
    if not requests:
        return 0
    text = TextEncoder(teacher, device=device)
    empty = text.encode_unconditional()

    def ask(request: _Request) -> Samples:
        positions = np.arange(request.first, request.first + batch_size)
        conditioning = text.encode(prompts.at(seed, positions)[1])
        return client.generate(
            normal(seed, positions, teacher.latent_shape, "synthesis"), conditioning, empty, steps, guidance_scale
        )

    made = sum(request.kept for request in requests)
    with tqdm(total=count, initial=count - made, desc="synthesis", disable=None if progress else True) as bar:
        _write_shards(PairEncoder(teacher, student, device), prompts, folder, seed, requests, ask, bar)
    return made


def _write_shards(
    encoder: PairEncoder, prompts: PromptSet, folder: Path, seed: int, requests: list[_Request], ask: Any, bar: tqdm
) -> None:
    """Decode and encode each answer, and write a shard when its last one is here."""
    z_T, z_S, pngs, positions = [], [], [], []
    for request, latents in _answers(requests, ask):
        # all of them, since a smaller batch may round differently
        for rows, made in zip((z_T, z_S, pngs), encoder(latents), strict=True):
            rows.append(made[: request.kept])
        positions += range(request.first, request.first + request.kept)
        bar.update(request.kept)
        if request.last_of_shard:
            ids, texts = prompts.at(seed, positions)
            seeds = [seed] * len(positions)
            write_pairs(folder, request.shard, texts, ids, seeds, torch.cat(z_T), torch.cat(z_S), sum(pngs, []))
            z_T, z_S, pngs, positions = [], [], [], []


def _answers(requests: list[_Request], ask: Any) -> Iterator[tuple[_Request, torch.Tensor]]:
    """Answers in order; the next requests are sent before an answer is handed out to be decoded."""
    pending: deque[tuple[_Request, Samples]] = deque()
    for request in requests:
        pending.append((request, ask(request)))
        if len(pending) > IN_FLIGHT:
            oldest, samples = pending.popleft()
            yield oldest, samples.result()
    for oldest, samples in pending:
        yield oldest, samples.result()


def _missing_requests(folder: Path, count: int, batch_size: int, shard_size: int) -> Iterator[_Request]:
    """Requests of the shards that are not there, or that a smaller count left short."""
    present = set(existing_shards(folder))
    for shard, start in enumerate(range(0, count, shard_size)):
        stop = min(start + shard_size, count)
        if shard in present and pq.read_metadata(shard_file(folder, shard)).num_rows >= stop - start:
            continue
        for first in range(start, stop, batch_size):
            kept = min(batch_size, stop - first)
            yield _Request(shard, first, kept, first + kept == stop)


def _fingerprint(prompts: PromptSet) -> str:
    """Short hash of texts and ids."""
    digest = hashlib.blake2b(prompts.ids.tobytes(), digest_size=8)
    for prompt in prompts.prompts:
        digest.update(prompt.encode() + b"\n")
    return digest.hexdigest()


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Remember what a set is made with, and refuse to mix two kinds of rows in one folder."""
    file = folder / SETTINGS_FILE
    if file.is_file():
        found = json.loads(file.read_text())
        changed = [
            f"{key} was {found.get(key)!r}, now {settings[key]!r}"
            for key in settings
            if found.get(key) != settings[key]
        ]
        if changed and existing_shards(folder):
            raise SynthesisError(
                f"{folder}: holds samples of other settings ({'; '.join(changed)}); use another folder"
            )
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(settings, indent=1) + "\n")
    os.replace(unfinished, file)
