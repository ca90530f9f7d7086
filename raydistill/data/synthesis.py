"""Data sets of latent pairs: prompt -> teacher's picture -> the latents of that picture in both spaces.

z_T is the teacher VAE's encoding of the decoded picture and z_S the student VAE's encoding of the same picture at the
student's resolution (arXiv 2606.32020), so both describe one image. Row i of a set is position i of the prompt
set's order (or image i of a set of real images), its noise is drawn for (seed, i), and requests always have `batch_size`
samples: neither an interruption, nor the order in which answers come, nor a larger count changes a row.

Here everything happens in one process; `synthesis_stream` does the same on Ray. `LocalTeacher` is a client for it.

Shapes: B samples, C×H×W normalised latents, images [B, 3, S, S] in [-1, 1].
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from raydistill.config.stages import LatentDtype, Posterior
from raydistill.data.bits import to_numpy
from raydistill.data.encode import TextEncoder
from raydistill.data.holdout import also_held_out
from raydistill.data.images import BadImage, ImageSet, decoded
from raydistill.data.ordered_shards import OrderedWriter
from raydistill.data.picture_probe import check_first
from raydistill.data.pictures import Filters, PictureRow, Pictures
from raydistill.data.prompts import PromptSet
from raydistill.data.shards import Batch, PairWriter, Request
from raydistill.data.vae import PairEncoder
from raydistill.diffusion.noise import normal
from raydistill.errors import InputError
from raydistill.spaces.base import Space
from raydistill.spaces.loaded import vae_fingerprint
from raydistill.storage.fingerprint import identify
from raydistill.storage.place import Place

STREAMED, STREAMED_BYTES = 16, 32 << 20  # rows of a stream that travel together, and about how many bytes
OF_STREAM = ("name", "caption", "shard", "next", "left_out")  # columns that go through to the writer
IN_FLIGHT = 2  # requests the teacher may work on while a batch is decoded here


class Samples(Protocol):
    """Samples on their way."""

    def result(self, check_finite: bool = True) -> torch.Tensor:
        """Latents [B, C, H, W], float32; NaN and infinity raise unless check_finite is off."""


class Sampler(Protocol):
    """What generates: a `TeacherClient` of the service, or a `LocalTeacher`."""

    generate: Callable[..., Samples]


# -- what decides the rows ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the rows of a set.

    Args:
        source: prompts for the teacher, or real images, listed (`ImageSet`) or read as a stream (`Pictures`).
        count: rows in all; of listed images, their number; of a stream None means all.
        batch_size, shard_size: rows per request, and per file.
        seed: of the order of prompts, the noise, and the posterior's samples.
        posterior: what a VAE's latents are.
        augment_share: of the pictures, which are blended and recoloured before both VAEs encode them.
        steps, guidance_scale: of the drawer's sampling; real images need none.
        text_dtype: of the text encoders, and of the conditioning that the drawer gets.
        dtype: of the latents that are kept.
        drawer: another model with the teacher's VAE, which draws the pictures; None: the teacher does.
        filters: what of a stream is left out.
        licence: of real images, as it is to stand beside the set.
    """

    teacher: Space
    student: Space
    source: PromptSet | ImageSet | Pictures
    count: int | None
    batch_size: int
    shard_size: int
    seed: int
    posterior: Posterior = "mean"
    augment_share: float = 0.0
    steps: int = 1
    guidance_scale: float = 1.0
    text_dtype: str = "float32"
    dtype: LatentDtype = "float16"
    drawer: Space | None = None
    filters: Filters = Filters()
    licence: str | None = None

    @property
    def vaes(self) -> dict[str, str]:
        """sha256 of the VAEs that encode, by role."""
        return {"teacher": vae_fingerprint(self.teacher), "student": vae_fingerprint(self.student)}

    @property
    def samples(self) -> bool:
        """Whether a model draws the pictures."""
        return isinstance(self.source, PromptSet)

    @property
    def drawn_by(self) -> Space:
        return self.drawer or self.teacher

    def writer(self, folder: str | Place, max_failed_rows: int) -> PairWriter | OrderedWriter:
        """Open the set in a folder. Errors as in `PairWriter`."""
        common = {
            "shard_size": self.shard_size,
            "seed": self.seed,
            "teacher": identify(self.teacher.folder),
            "max_failed_rows": max_failed_rows,
            "settings": self.settings(),
            "vaes": self.vaes,
            "notes": {} if self.samples else {"pictures": self.source.source, "licence": self.licence},
        }
        if isinstance(self.source, Pictures):
            return OrderedWriter(folder, limit=self.count, shards=len(self.source.shards), **common)
        return PairWriter(folder, count=self.count, at=functools.partial(self.source.at, self.seed), **common)

    def encoder(self, device: str) -> PairEncoder:
        dtype, share = getattr(torch, self.dtype), self.augment_share
        return PairEncoder(
            self.teacher, self.student, device, self.posterior, self.seed, dtype=dtype, augment_share=share
        )

    def settings(self) -> dict[str, Any]:
        """The recipe as plain values, for a file beside the set."""
        if isinstance(self.source, PromptSet):
            source = {
                "prompts": fingerprint_of(self.source),
                "batch_size": self.batch_size,
                "steps": self.steps,
                "guidance_scale": self.guidance_scale,
                "text_dtype": self.text_dtype,
                "drawer": self.drawer and [self.drawer.pipeline_class, identify(self.drawer.folder)[1]],
            }
        else:
            source = {"images": self.source.fingerprint}
        if isinstance(self.source, Pictures):
            source["min_pixels"] = self.filters.min_pixels
        return {
            "teacher": [self.teacher.pipeline_class, *self.teacher.latent_shape],
            "teacher_revision": identify(self.teacher.folder)[1],
            "student": [self.student.pipeline_class, *self.student.latent_shape],
            "student_vae_revision": identify(Path(self.student.folder, "vae"))[1],
            **{f"{role}_vae": sha256 for role, sha256 in self.vaes.items()},
            **source,
            "shard_size": self.shard_size,
            "posterior": self.posterior,
            "dtype": self.dtype,
            "augment_share": self.augment_share,
            "seed": self.seed,
        }


def fingerprint_of(prompts: PromptSet) -> str:
    """Short hash of texts and ids."""
    digest = hashlib.blake2b(prompts.ids, digest_size=8)
    for prompt in prompts.prompts:
        digest.update(prompt.encode() + b"\n")
    return digest.hexdigest()


# -- rows -> pictures -> encoded rows -----------------------------------------------------------------------


@dataclass(frozen=True)
class AskedRows:
    """A request's rows, of which the teacher draws the pictures."""

    rows: np.ndarray
    samples: Samples
    failure: np.ndarray

    def result(self) -> Batch:
        """row [B], latents [B, C, H, W] float32, failure [B]; latents of failed rows are zero."""
        latents = self.samples.result(check_finite=False)[: len(self.rows)]  # which may be shared memory: read only
        finite = torch.isfinite(latents).flatten(1).all(1).numpy()
        failure = np.where((self.failure == "") & ~finite, "the teacher's sample is not finite", self.failure)
        if (failed := torch.from_numpy(failure != "")).any():
            latents = torch.where(failed[:, None, None, None], 0.0, latents)
        return {"row": self.rows, "latents": latents.numpy(), "failure": failure}


class TeacherAsker:
    """Asks a teacher for the pictures of a request's rows; holds its text encoders, on `device`."""

    def __init__(self, client: Sampler, recipe: Recipe, device: str = "cpu") -> None:
        self.client, self.recipe = client, recipe
        self._text = TextEncoder(recipe.drawn_by, getattr(torch, recipe.text_dtype), device)
        self._empty = self._text.encode_unconditional()

    def ask(self, request: Request) -> AskedRows:
        """Send the request and return at once. It always has `batch_size` samples: fewer may round differently."""
        recipe = self.recipe
        rows = np.arange(request.first, request.first + recipe.batch_size)
        conditioning = self._text.encode(recipe.source.at(recipe.seed, rows)[1])
        finite = torch.stack(
            [torch.isfinite(value).reshape(len(value), -1).all(1) for value in conditioning.values()]
        ).all(0)
        for name, value in conditioning.items():  # one bad row must not cost the others their request
            value[~finite] = self._empty[name].to(value)
        noise = normal(recipe.seed, rows, recipe.teacher.latent_shape, "synthesis")
        samples = self.client.generate(noise, conditioning, self._empty, recipe.steps, recipe.guidance_scale)
        failure = np.where(finite.numpy(), "", "the text encoders' output is not finite").astype(object)
        return AskedRows(rows[: request.kept], samples, failure[: request.kept])


def load_rows(images: ImageSet, request: Request, pixels: int) -> Batch:
    """row [B], pixels [B, 3, pixels, pixels] uint8, failure [B]; pictures of failed rows are black."""
    rows = request.rows
    pictures = np.zeros((len(rows), 3, pixels, pixels), np.uint8)
    failure = np.full(len(rows), "", dtype=object)
    for index, row in enumerate(rows.tolist()):
        try:
            pictures[index] = images.picture(row, pixels)
        except BadImage as bad:
            failure[index] = str(bad)
    return {"row": rows, "pixels": pictures, "failure": failure}


def streamed_rows(rows: Iterable[PictureRow], size: int = STREAMED) -> Iterator[Batch]:
    """Rows of a stream, by at most `size` and STREAMED_BYTES, as columns: data (the encoded picture), and those of an
    `OrderedWriter`. What is left out is counted at the row behind it.

    A batch ends with its shard. What is left out at a shard's end is told by a row of shard -1 that has no picture.
    """
    some: list[dict[str, Any]] = []
    left_out = kept = 0
    for row in rows:
        left_out += bool(row.left_out)
        if row.left_out:
            continue
        some.append(_streamed(row, left_out))
        left_out, kept = 0, kept + len(row.data)
        if len(some) == size or kept >= STREAMED_BYTES:
            yield _columns(some)
            some, kept = [], 0
    if left_out:
        some.append(_streamed(None, left_out))
    if some:
        yield _columns(some)


def _streamed(row: PictureRow | None, left_out: int) -> dict[str, Any]:
    columns = {"row": 0, "name": "", "caption": "", "data": b"", "failure": "", "shard": -1, "next": 0}
    if row is not None:
        columns = {name: getattr(row, name) for name in ("name", "caption", "data", "failure")}
        columns |= {"row": row.key, "shard": row.after.shard, "next": row.after.row}
        if row.failure:
            columns["failure"] = f"{row.name}: {row.failure}"
    return columns | {"left_out": left_out}


def _columns(rows: list[dict[str, Any]]) -> Batch:
    columns = {name: np.empty(len(rows), object) for name in ("name", "caption", "data", "failure")}
    for name, column in columns.items():
        column[:] = [row[name] for row in rows]
    return columns | {
        name: np.array([row[name] for row in rows], np.int64) for name in ("row", "shard", "next", "left_out")
    }


def decode_rows(batch: Batch, pixels: int) -> Batch:
    """Column data -> column pixels [B, 3, pixels, pixels] uint8; pictures of failed rows are black."""
    pictures, failure = np.zeros((len(batch["row"]), 3, pixels, pixels), np.uint8), batch["failure"].astype(object)
    for index, (data, name) in enumerate(zip(batch["data"], batch["name"], strict=True)):
        if batch["shard"][index] >= 0 and not failure[index]:
            try:
                pictures[index] = decoded(data, name, pixels)
            except BadImage as bad:
                failure[index] = str(bad)
    return {name: values for name, values in batch.items() if name != "data"} | {"pixels": pictures, "failure": failure}


def encode_rows(encoder: PairEncoder, batch: Batch) -> Batch:
    """What `AskedRows.result` or `load_rows` gives -> the columns that a `PairWriter` takes."""
    failure = batch["failure"].astype(object)
    # copies, since what Ray hands out is read-only and torch has no read-only tensors
    if "pixels" in batch:
        pictures = torch.from_numpy(batch["pixels"].copy()).to(encoder.device).float() / 127.5 - 1
    else:
        pictures = encoder.decode(torch.from_numpy(batch["latents"].copy()))
        finite = pictures.isfinite().flatten(1).all(1)
        failure = np.where((failure == "") & ~finite.cpu().numpy(), "the decoded picture is not finite", failure)
        pictures[~finite] = 0
    z_teacher, z_student, pngs = encoder.encode(pictures, batch["row"])
    columns = {"row": batch["row"]}
    for name, latents in (("z_T", z_teacher), ("z_S", z_student)):
        kept = latents.to(encoder.dtype)
        finite = torch.isfinite(kept).flatten(1).all(1)
        reason = f"{name} is not finite in {str(encoder.dtype).removeprefix('torch.')}"
        failure = np.where((failure == "") & ~finite.numpy(), reason, failure)
        kept[~finite] = 0
        columns[name] = to_numpy(kept)
    if encoder.with_previews:
        columns["preview"] = np.empty(len(pngs), dtype=object)
        columns["preview"][:] = pngs
    of_stream = {name: batch[name] for name in OF_STREAM if name in batch}
    return columns | {"failure": failure, **of_stream}


def in_order(requests: Iterable[Any], ask: Callable[[Any], Any], ahead: int) -> Iterator[Any]:
    """`ask(request).result()` of each request, in order; `ahead` more are sent before an answer is handed out."""
    pending: deque[Any] = deque()
    for request in requests:
        pending.append(ask(request))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


# -- a set in one process ---------------------------------------------------------------------------------


def synthesise(
    recipe: Recipe,
    folder: str | Path,
    client: Sampler | None = None,
    *,
    forbidden: Collection[str] = (),
    max_failed_rows: int = 0,
    device: str = "cpu",
    progress: bool = True,
) -> int:
    """Write the rows that a folder lacks to pairs-*.parquet; complete shards that are already there are kept.

    Args:
        recipe: what decides the rows.
        folder: of the set; also gets synthesis.json, what the set was made with, and failures.jsonl.
        client: what generates; None for real images.
        forbidden: held-out prompts; of a stream, `recipe.filters` has them.
        max_failed_rows: rows that may fail and are recorded instead of raising.
        device: of text encoders and VAEs, which are loaded here.
        progress: show a progress bar where there is a terminal.

    Returns how many rows were made by this call, failed ones among them.

    Raises:
        InputError: a forbidden prompt is among the prompts, or the folder's set was made with other settings.
        StageFailed: more than `max_failed_rows` rows failed.
    """
    if isinstance(recipe.source, Pictures):
        return _synthesise_stream(recipe, folder, max_failed_rows, device)
    _refuse(recipe.source, forbidden)
    writer = recipe.writer(folder, max_failed_rows)
    missing = writer.missing
    if not missing:
        return 0
    requests = list(writer.requests(recipe.batch_size))
    if recipe.samples:
        pictures = in_order(requests, TeacherAsker(client, recipe, device).ask, IN_FLIGHT)
    else:
        pictures = (load_rows(recipe.source, request, recipe.teacher.resolution) for request in requests)
    encoder = recipe.encoder(device)
    with tqdm(total=recipe.count, initial=writer.done, desc="synthesis", disable=None if progress else True) as bar:
        for batch in pictures:
            writer.add(encode_rows(encoder, batch))
            bar.update(len(batch["row"]))
    writer.finish()
    return missing


def _synthesise_stream(recipe: Recipe, folder: str | Path, max_failed_rows: int, device: str) -> int:
    writer = recipe.writer(folder, max_failed_rows)
    before = writer.done
    if not writer.complete:
        check_beginning(recipe, writer)
        encoder = recipe.encoder(device)
        for batch in streamed_rows(recipe.source.rows(recipe.seed, start=writer.cursor, filters=recipe.filters)):
            writer.add(encode_rows(encoder, decode_rows(batch, recipe.teacher.resolution)))
            if writer.complete:
                break
        writer.finish()
    return writer.done - before


def check_beginning(recipe: Recipe, writer: PairWriter | OrderedWriter) -> None:
    """Look at the first pictures of a stream of which nothing was made yet. Raises as `picture_probe.check_first`."""
    if isinstance(writer, OrderedWriter) and writer.cursor == (0, 0):
        with contextlib.suppress(OSError):  # the stream itself meets it, and says which stage failed
            check_first(recipe.source, recipe.seed, recipe.filters, recipe.count)


def _refuse(source: PromptSet | ImageSet, forbidden: Collection[str]) -> None:
    common = also_held_out(source.prompts, forbidden)
    if common:
        name = source.report.source if isinstance(source, PromptSet) else source.source
        raise InputError(f"{name}: {len(common)} held-out prompts are among the prompts, for example {common[0]!r}")
