"""Sets of pairs of the miniature world, for the question how many a Bridge needs and of what.

    teacher     samples of the teacher, of the world's training captions
    renders     the world's renderer, of scenes that no prompt file has
    pictures    a folder of pictures that have nothing to do with the world; else crops of the photographs that
                scikit-learn and Matplotlib, which MLflow brings along, have in their packages
    mix         a third of each, changed as NAME+
    NAME+       the same pictures, of which a share is blended and recoloured (`synthesis.augment_share`)

A set goes on where it stopped, and its first rows are those of a larger set.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import random
from collections.abc import Iterator
from hashlib import blake2b
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from raydistill.build_shapes.bridges import SAMPLE_GUIDANCE, SAMPLE_STEPS, varied_pairs
from raydistill.data.images import ImageSet, open_images
from raydistill.data.local_teacher import LocalTeacher
from raydistill.data.pairs import Pairs, PairSet, write_pairs
from raydistill.data.prompts import read_prompts
from raydistill.data.synthesis import Recipe, synthesise
from raydistill.data.vae import PairEncoder
from raydistill.errors import InputError
from raydistill.shapes.captions import sample_scene
from raydistill.shapes.render import render
from raydistill.spaces.base import Space
from raydistill.storage.atomic import replacing
from raydistill.storage.resolve import resolve

PLAIN, MIX, CHANGED = ("teacher", "renders", "pictures"), "mix", "+"
SOURCES = (*PLAIN, MIX, *(name + CHANGED for name in PLAIN))
SMALLEST_CROP = 48  # pixels of a photograph
REQUEST, SHARD = 50, 250  # rows
SAMPLES, BESIDE = "psnr_samples", "psnr_beside"


class Sets:
    """Makes sets of at most `count` pairs below a folder.

    Args:
        images: folder of pictures; None: crops of installed photographs.
        share: of the rows that are changed in NAME+ and in the mix.
        seed: of captions, noise, crops and changes.
    """

    def __init__(
        self, folder: Path, teacher: Space, student: Space, *, count: int, images: Path | None, share: float, seed: int
    ) -> None:
        self.folder, self.teacher, self.student = folder, teacher, student
        self.count, self.images, self.share, self.seed = count, images, share, seed

    def make(self, source: str) -> PairSet:
        """A set, of fewer rows where there are fewer pictures. Raises InputError: no such source, or no pictures."""
        if source not in SOURCES:
            raise InputError(f"--sources: no {source!r}; there are {', '.join(SOURCES)}")
        if source == MIX:
            return self._mix()
        name, share = source.removesuffix(CHANGED), self.share if source.endswith(CHANGED) else 0.0
        return self._sampled(self.count, "train", self.seed) if source == "teacher" else self._encoded(name, share)

    def measured(self, count: int) -> Iterator[tuple[str, Pairs]]:
        """What fidelity is measured on, by name: teacher samples of captions and from noise that no set has; and what a
        student draws while it learns, made of them as the shipped Bridges' pairs were."""
        rows = self._sampled(count, "held_out", self.seed + 1).rows(range(count))
        yield SAMPLES, rows
        encoder = PairEncoder(self.teacher, self.student)
        vaes = self.teacher.load_vae(), self.student.load_vae()
        z_teacher, z_student, _ = varied_pairs(encoder, vaes, rows, torch.Generator().manual_seed(self.seed))
        beside = dataclasses.replace(rows, z_teacher=z_teacher, z_student=z_student)
        yield BESIDE, _rows(beside, slice(count // 4, None))  # the others are samples

    # -- sets -------------------------------------------------------------------------------------------------
    def _sampled(self, count: int, captions: str, seed: int) -> PairSet:
        """Teacher samples, drawn in this process as a job's."""
        file = resolve({"train": "shapes:prompts.txt", "held_out": "shapes:heldout.txt"}[captions])
        recipe = Recipe(
            teacher=self.teacher,
            student=self.student,
            source=read_prompts(file, "prompt", "fail", 200),
            count=count,
            batch_size=REQUEST,
            shard_size=SHARD,
            seed=seed,
            steps=SAMPLE_STEPS,
            guidance_scale=SAMPLE_GUIDANCE,
        )
        folder = self.folder / f"teacher-{captions}"
        synthesise(recipe, folder, LocalTeacher(self.teacher, self.teacher.load_network()))
        return PairSet(folder)

    def _encoded(self, name: str, share: float) -> PairSet:
        """Pictures, through both VAEs as a job's."""
        source = open_images(self._pictures(name))
        recipe = Recipe(
            teacher=self.teacher,
            student=self.student,
            source=source,
            count=min(self.count, len(source)),
            batch_size=REQUEST,
            shard_size=SHARD,
            seed=self.seed,
            augment_share=share,
        )
        folder = self.folder / f"{name}-{source.fingerprint}-{share:g}"
        synthesise(recipe, folder)
        return PairSet(folder)

    def _mix(self) -> PairSet:
        sets = [self._encoded(name, self.share) for name in PLAIN]
        count = min(self.count, 3 * min(map(len, sets)))
        rows = [pairs.rows(range(-(-(count - i) // 3))) for i, pairs in enumerate(sets)]
        columns = {}
        for field in dataclasses.fields(Pairs):
            column = [getattr(rows[row % 3], field.name)[row // 3] for row in range(count)]
            columns[field.name] = torch.stack(column) if isinstance(column[0], torch.Tensor) else column
        return PairSet(stored(self.folder / MIX, Pairs(**columns))[0])

    # -- pictures ---------------------------------------------------------------------------------------------
    def _pictures(self, name: str) -> Path:
        """A folder of pictures with captions. Files have numbers as names: the first are those of a larger folder."""
        make, given = {"teacher": self._previews, "renders": self._renders, "pictures": self._crops}[name], name
        if name == "pictures" and self.images is not None:
            images = open_images(self.images)
            make, given = functools.partial(self._shuffled, images), f"pictures-{images.fingerprint}"
        folder = self.folder / f"files-{given}-{self.count}"
        if not folder.is_dir():
            with replacing(folder) as fresh:
                fresh.mkdir()
                for number, (picture, caption) in enumerate(itertools.islice(make(), self.count)):
                    picture.save(fresh / f"{number:06d}.png")
                    if caption:
                        (fresh / f"{number:06d}.txt").write_text(caption)
        return folder

    def _shuffled(self, images: ImageSet) -> Iterator[tuple[Image.Image, str]]:
        """The user's pictures: their first by name may be all of a kind."""
        for row in np.random.default_rng(self.seed).permutation(len(images)).tolist():
            picture = images.picture(row, self.teacher.resolution)
            yield Image.fromarray(picture.transpose(1, 2, 0)), images.prompts[row]

    def _previews(self) -> Iterator[tuple[Image.Image, str]]:
        """The teacher samples' pictures, which are as large as their previews."""
        pairs = self._sampled(self.count, "train", self.seed)
        rows = pairs.rows(range(len(pairs)))
        for data, caption in zip(rows.previews, rows.prompts, strict=True):
            yield Image.open(io.BytesIO(data)), caption

    def _renders(self) -> Iterator[tuple[Image.Image, str]]:
        """Scenes of two objects, which no prompt file has."""
        known = set(resolve("shapes:prompts.txt").read_text().splitlines())
        rng = random.Random(self.seed)
        for number in itertools.count():
            scene = sample_scene(rng, held_out=False, two_objects=1.0)
            if scene.caption not in known:
                picture = render([scene], self.teacher.resolution, seed=number)[0]
                yield Image.fromarray(((picture + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()), scene.caption

    def _crops(self) -> Iterator[tuple[Image.Image, str]]:
        """Squares of any place and size out of installed photographs, by turns."""
        photographs = [Image.open(file).convert("RGB") for file in installed_photographs()]
        rng, pixels = np.random.default_rng(self.seed), self.teacher.resolution
        for photograph in itertools.cycle(photographs):
            side = int(SMALLEST_CROP * (min(photograph.size) / SMALLEST_CROP) ** rng.random())
            left, top = (int(rng.integers(0, extent - side + 1)) for extent in photograph.size)
            square = photograph.crop((left, top, left + side, top + side))
            yield square.resize((pixels, pixels), Image.Resampling.BICUBIC), ""


def _rows(pairs: Pairs, rows: slice) -> Pairs:
    return Pairs(**{field.name: getattr(pairs, field.name)[rows] for field in dataclasses.fields(pairs)})


def stored(folder: Path, pairs: Pairs) -> tuple[str, str]:
    """A set of these pairs, without previews, in place of what is there; (folder, hash of the rows)."""
    latents = {"z_teacher": pairs.z_teacher.half(), "z_student": pairs.z_student.half()}
    digest = blake2b("\n".join(pairs.prompts).encode(), digest_size=8)
    for values in latents.values():
        digest.update(values.contiguous().numpy().tobytes())
    with replacing(folder) as fresh:
        fresh.mkdir()
        write_pairs(fresh, 0, prompts=pairs.prompts, prompt_ids=pairs.prompt_ids, seeds=pairs.seeds, **latents)
    return str(folder), digest.hexdigest()


def installed_photographs() -> list[Path]:
    """Three photographs. Raises InputError: one of the packages that have them is not there."""
    try:
        from matplotlib.cbook import get_sample_data  # here: needed only where the user has named no pictures

        of_sklearn = [Path(str(files("sklearn.datasets.images") / name)) for name in ("china.jpg", "flower.jpg")]
        return [*of_sklearn, Path(get_sample_data("grace_hopper.jpg", asfileobj=False))]
    except (ImportError, OSError) as error:
        raise InputError(
            f"no photographs in scikit-learn and Matplotlib ({error}): name a folder in --images"
        ) from None
