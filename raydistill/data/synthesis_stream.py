"""Data sets of latent pairs on Ray: what `synthesis` does in one process, as stages of a Ray Data stream.

    requests ──► askers (text encoders) ──► encoders (both VAEs) ──► driver: shards, failures, progress
                   ▲ │ teacher service
                   └─┘
    requests ──► tasks that read images ──► encoders ──► driver

Streams of pictures come from `picture_stream`, in order. Of all else a block is one request, blocks come in any order, and the
driver places rows by their number. A stage that loses an actor runs its blocks again; rows are pure functions of their
number, so that changes none of them.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict

import ray
import ray.data
import torch
from ray.exceptions import RayError

from raydistill.config.stages import SynthesisConfig
from raydistill.data.ordered_shards import OrderedWriter
from raydistill.data.pairs import captioned_previews, existing_shards, shard_file
from raydistill.data.picture_stream import decoded_stream
from raydistill.data.ray_data import dataset_of, fetched, telling
from raydistill.data.shards import FAILURES_FILE, Batch, PairWriter, Request
from raydistill.data.stage_error import StageError
from raydistill.data.synthesis import Recipe, TeacherAsker, check_beginning, encode_rows, load_rows
from raydistill.data.vae import PairEncoder
from raydistill.errors import InputError, StageFailed
from raydistill.pictures.grids import grid
from raydistill.storage.place import Place
from raydistill.teachers import placement
from raydistill.teachers.client import TeacherClient
from raydistill.teachers.request import TeacherError, one_line
from raydistill.tracking.progress import write_progress
from raydistill.tracking.tracker import Tracker

log = logging.getLogger(__name__)

RATE_WINDOW = 16  # requests over which the throughput is measured

Watcher = Callable[[PairWriter | OrderedWriter, list[Place]], None]


def synthesise_on_ray(
    recipe: Recipe,
    folder: str | Place,
    settings: SynthesisConfig,
    client: TeacherClient | None = None,
    watch: Watcher = lambda writer, written: None,
) -> int:
    """As `synthesise`, in actors. The recipe's model folders, and images, must exist on every node.

    Args:
        settings: how many actors, what each reserves, and how many rows may fail.
        watch: called with the writer, and the shards just written, whenever rows arrive.

    Raises:
        InputError: the folder's set was made with other settings, or next to no picture of a stream can be used.
        StageFailed: too many rows failed, the actors cannot be placed, or they failed.
        TeacherError: the service cannot answer.
    """
    writer = recipe.writer(folder, settings.max_failed_rows)
    before = writer.done
    if not writer.complete:
        check_beginning(recipe, writer)
        placement.wait_for_room(lambda: actor_needs(settings, recipe.samples, isinstance(writer, OrderedWriter)))
        batches = _encoded(recipe, writer, settings, client)
        try:
            for batch in batches:
                watch(writer, writer.add(batch))
                if writer.complete:
                    break
        except RayError as error:
            raise _plain(error) from error
        finally:
            batches.close()
    if written := writer.finish():
        watch(writer, written)
    return writer.done - before


# -- the stages -----------------------------------------------------------------------------------------


# The actors load their models at the first call: what a constructor raises, Ray prints four times over.


class _Asker:
    """Draws the pictures of one request after the other; several threads wait for the service at once."""

    def __init__(self, stored: ray.ObjectRef, client: TeacherClient, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._load = functools.partial(TeacherAsker, client, fetched(stored), device)
        self._alone = threading.Lock()  # the text encoders' cache is not for several threads

    @functools.cached_property
    def _asker(self) -> TeacherAsker:
        return self._load()

    @telling
    def __call__(self, requests: Batch) -> Batch:
        with self._alone:
            asked = self._asker.ask(_request(requests))
        return asked.result()


class _Encoder:
    """Pictures or teacher samples -> the columns of the set."""

    def __init__(self, stored: ray.ObjectRef, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._load = functools.partial(fetched(stored).encoder, device)

    @functools.cached_property
    def _encoder(self) -> PairEncoder:
        return self._load()

    @telling
    def __call__(self, batch: Batch) -> Batch:
        return encode_rows(self._encoder, batch)


@telling
def _read_images(requests: Batch, stored: ray.ObjectRef) -> Batch:
    recipe: Recipe = fetched(stored)
    return load_rows(recipe.source, _request(requests), recipe.teacher.resolution)


def _request(requests: Batch) -> Request:
    """The only row of a batch of requests."""
    return Request(int(requests["first"][0]), int(requests["kept"][0]))


def _encoded(
    recipe: Recipe, writer: PairWriter | OrderedWriter, settings: SynthesisConfig, client: TeacherClient | None
) -> Iterator[Batch]:
    """Encoded rows of all that the writer lacks, in any order, or of a stream in its own. Closing the generator ends the actors."""
    stored = ray.put(recipe)
    device = "cuda" if settings.gpus_per_encoder else "cpu"
    where = {"label_selector": settings.node_labels or None}
    share = {"num_cpus": settings.cpus_per_encoder, "num_gpus": settings.gpus_per_encoder} | where
    actor = {"stored": stored, "device": device, "threads": settings.threads_per_encoder}
    one_by_one = {"batch_size": 1, "batch_format": "numpy"}
    if isinstance(writer, OrderedWriter):
        pictures = decoded_stream(stored, recipe, writer.cursor, settings, telling)
    elif recipe.samples:
        rows = _dataset(list(writer.requests(recipe.batch_size)))
        # Pictures leave an actor with their request, also where a block has several: many hours of teachers would be held back.
        request_bytes = 4 * recipe.batch_size * math.prod(recipe.teacher.latent_shape)
        rows.context.target_max_block_size = int(0.9 * request_bytes)  # Ray Data cuts only what has half as much again
        asking = ray.data.ActorPoolStrategy(
            size=settings.encoders,
            max_tasks_in_flight_per_actor=settings.in_flight,
            max_concurrent_calls_per_actor=settings.in_flight,
            enable_true_multi_threading=True,
        )
        pictures = rows.map_batches(
            _Asker, fn_constructor_kwargs=actor | {"client": client}, compute=asking, **one_by_one, **share
        )
    else:
        pictures = _dataset(list(writer.requests(recipe.batch_size))).map_batches(
            _read_images, fn_kwargs={"stored": stored}, num_cpus=settings.cpus_per_encoder, **where, **one_by_one
        )
    encoded = pictures.map_batches(
        _Encoder,
        fn_constructor_kwargs=actor,
        batch_size=None,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=settings.encoders, max_tasks_in_flight_per_actor=2),
        **share,
    )
    batches = iter(encoded.iter_batches(batch_size=None, batch_format="numpy"))
    try:
        yield from batches
    finally:
        batches.close()


def _dataset(requests: list[Request]) -> ray.data.Dataset:
    rows = dataset_of([asdict(request) for request in requests])
    rows.context.raise_original_map_exception = True  # a StageError
    return rows


def actor_needs(settings: SynthesisConfig, samples: bool, streamed: bool = False) -> list[placement.Need]:
    """All actors, and a task that reads images.

    Ray Data reads images inside the actors where both reserve the same, so that reading needs its own room only beside
    actors on GPUs, and where it is a stream.
    """
    keys = "synthesis.encoders, synthesis.cpus_per_encoder or synthesis.gpus_per_encoder"
    amounts, labels = {"CPU": settings.cpus_per_encoder, "GPU": settings.gpus_per_encoder}, settings.node_labels
    needs = [
        placement.Need("the actors of synthesis", settings.encoders * (2 if samples else 1), amounts, keys, labels)
    ]
    readers = 0 if samples else streamed + (settings.gpus_per_encoder > 0)  # of a stream, who decodes is another one
    if readers:
        needs.append(placement.Need("the reader of images", readers, {"CPU": settings.cpus_per_encoder}, keys, labels))
    return needs


def _plain(error: RayError) -> Exception:
    """What a stage raised, without Ray's wrapping; the remote traceback goes to the log."""
    cause = getattr(error, "cause", None)
    if not isinstance(cause, StageError):
        log.error("synthesis: a stage failed:\n%s", error)
        return StageFailed(f"synthesis: a stage failed: {one_line(error)}")
    if cause.of_teacher:
        return TeacherError(cause.text)
    if cause.kind != InputError.__name__:  # whose text says it all
        log.error("synthesis: a stage failed:\n%s", error)
    return StageFailed(f"synthesis: a stage failed: {cause.kind}: {cause.text}")


# -- what people see ------------------------------------------------------------------------------------


class SynthesisLog:
    """Progress on the screen; throughput, failures and pictures in MLflow. A `Watcher`."""

    def __init__(self, tracker: Tracker, progress: Place, pictures: int) -> None:
        """`progress`: file that a `ProgressWatcher` shows; `pictures`: how many a grid has."""
        self.tracker, self.progress, self.pictures = tracker, progress, pictures
        self._arrivals: deque[tuple[float, int]] = deque(maxlen=RATE_WINDOW + 1)  # seconds, rows done
        self._shown = False

    def __call__(self, writer: PairWriter | OrderedWriter, written: list[Place]) -> None:
        self._arrivals.append((time.monotonic(), writer.done))
        left_out = {"left out": writer.left_out} if writer.left_out else {}
        values = {"failed": len(writer.failures)} | left_out | self._rate()
        write_progress(self.progress, step=writer.done, total=writer.count, **values)
        names = {
            "failed": "synthesis/failed_rows",
            "left out": "synthesis/left_out_rows",
            "pictures/s": "throughput/pictures_per_s",
        }
        self.tracker.metrics({names[key]: value for key, value in values.items()}, writer.done)
        if written and not self._shown:  # early enough to stop a set that goes wrong
            self._show(written[:1], writer.done)

    def _rate(self) -> dict[str, float]:
        """Over the last requests; nothing at the first one, before which the actors started."""
        (first, before), (last, now) = self._arrivals[0], self._arrivals[-1]
        return {"pictures/s": (now - before) / (last - first)} if last > first else {}

    def finish(self, folder: Place, rows: int) -> None:
        """The whole set of `rows` rows: pictures spread over it, and the list of failures."""
        self._show([shard_file(folder, index) for index in existing_shards(folder)], rows)
        if (folder / FAILURES_FILE).is_file():
            self.tracker.artifact(folder / FAILURES_FILE)

    def _show(self, files: list[Place], step: int) -> None:
        images, captions = captioned_previews(files, self.pictures)
        if captions:
            self.tracker.image(grid(images, captions), "pictures", step)
            self._shown = True
