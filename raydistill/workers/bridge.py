"""Bridge training on Ray Train: what one worker does, and how the driver launches it. The training is in trainer.py."""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.train
import torch

from raydistill.bridge.model import reach, read_description
from raydistill.bridge.trainer import BridgeTrainer, build_trainer
from raydistill.config.reading import validate
from raydistill.config.schema import Config
from raydistill.data.pair_stream import stream_needs
from raydistill.data.pairs import Pairs, open_pairs
from raydistill.data.pictures import Pictures
from raydistill.device_memory import doing, naming_out_of_memory
from raydistill.errors import StageFailed
from raydistill.export.licences import picture_sets
from raydistill.precision import allow_tf32
from raydistill.spaces import load_space
from raydistill.storage import lease
from raydistill.storage.atomic import replacing, scratch
from raydistill.storage.place import Place
from raydistill.storage.resolve import input_place, resolve, to_place
from raydistill.tracking.progress import ProgressWatcher, write_progress
from raydistill.tracking.tracker import Tracker
from raydistill.workers.adoption import Runs, mark
from raydistill.workers.bridge_feed import Feed, Stored, Streamed
from raydistill.workers.checkpoint import save_state
from raydistill.workers.ray_train import Worker, newest_state, run_body, train
from raydistill.workers.remedies import bridge_remedies

if TYPE_CHECKING:
    from PIL import Image


BRIDGE_FOLDER, CHECKPOINTS = "bridge", "bridge-checkpoints"  # of a run
LOG_EVERY = 10
CURVES, CURSORS = "curves", "cursors"
PROGRESS = "bridge-progress.json"


@dataclass(frozen=True)
class TrainedBridge:
    """A saved Bridge and its quality on held-out pairs (keys of `BridgeTrainer.validation`)."""

    folder: Place
    metrics: dict[str, float]


def train_bridge(
    config: Config,
    run_dir: str | Place,
    pairs_folder: str | Path | None = None,
    tracking_uri: str | None = None,
    tracking_run: str | None = None,
    runs: Runs = (),
    *,
    pictures: Pictures | None = None,
    held_out: Collection[str] = (),
) -> TrainedBridge:
    """Train the Bridge of the configured student and teacher, or go on from this folder's last checkpoint.

    Workers and their resources are those of the `distill` section; `bridge.batch_size` is divided between them.

    Args:
        run_dir: absolute folder on storage that every node sees, or a URI; the result is `run_dir/bridge`.
        pairs_folder: parquet shards of pairs, on such storage too; None with pictures.
        tracking_uri, tracking_run: MLflow run that receives metrics and pictures; None: no logging.
        runs: ids of the run, its own first; its checkpoints bear one of them.
        pictures: are encoded beside training instead (`bridge.source=stream`).
        held_out: prompts whose pictures are left out of those.

    Raises:
        InputError: the pair of spaces or the pairs cannot be used (before anything starts).
        StageFailed: the workers failed more often than `distill.max_failures`.
    """
    run_dir = to_place(str(run_dir))
    _check(config, pairs_folder)
    progress = run_dir / PROGRESS
    settings = {"config": config.model_dump(), "pairs": pairs_folder and str(pairs_folder), "progress": str(progress)}
    settings |= {"pictures": pictures, "held_out": frozenset(held_out)}
    settings |= {"tracking_uri": tracking_uri, "tracking_run": tracking_run, "runs": runs}
    with ProgressWatcher(progress, "bridge"):
        result = train(
            train_worker,
            settings,
            config,
            name="bridge",
            folder=run_dir,
            checkpoints=CHECKPOINTS,
            steps=config.bridge.steps,
            progress=PROGRESS,
            encoders=False,  # captions are encoded in the workers
            beside=[] if pictures is None else stream_needs(config.synthesis, config.distill.fewest),
        )
    return _collect(result.checkpoint, run_dir / BRIDGE_FOLDER)


def _check(config: Config, pairs_folder: str | Path | None) -> None:
    """Refuse what no worker could train on, before any is started."""
    student, teacher = load_space(resolve(config.student.model)), load_space(resolve(config.teacher.model))
    reach(student, teacher, config.bridge.prior)
    if pairs_folder is not None:
        open_pairs(input_place(str(pairs_folder)), teacher, student)
    if config.bridge.projector == "identity":
        raise StageFailed("bridge.projector identity has nothing to train")


def _collect(checkpoint: Any, folder: Place) -> TrainedBridge:
    """Copy the last checkpoint's Bridge to where the next stage looks for it."""
    with checkpoint.as_directory() as source:
        made = Path(source, BRIDGE_FOLDER)
        with replacing(folder) as fresh:
            shutil.copytree(made, fresh)
        return TrainedBridge(folder, read_description(made)["metrics"])


# -- the worker -------------------------------------------------------------------------------------------


class MetricLog:
    """Curves and pictures of one training in MLflow; without a store or a run they go nowhere.

    A checkpoint takes `curves` along: what waited in a killed process's memory is offered again by the next one, and the
    run's tracker leaves out what it has.

    Args:
        folder: of the run. Another job's MLflow runs get nothing: `metrics` and `image` raise RunLost.

    Attributes:
        curves: step -> values, of this process and those before it.
    """

    def __init__(
        self, folder: Place, uri: str | None, run: str | None, curves: Mapping[int, Mapping[str, float]] | None = None
    ) -> None:
        self._folder = folder
        self._tracker, self.curves = None, {step: dict(values) for step, values in (curves or {}).items()}
        if uri and run:
            self._tracker = Tracker(uri, run)
            self._tracker.catch_up(self.curves)

    def metrics(self, values: dict[str, float], step: int) -> None:
        lease.check(self._folder)
        self.curves.setdefault(step, {}).update(values)
        if self._tracker:
            self._tracker.metrics(values, step)

    def image(self, picture: Image.Image, name: str, step: int) -> None:
        lease.check(self._folder)
        if self._tracker:
            self._tracker.image(picture, name, step)

    def close(self) -> None:
        if self._tracker:
            self._tracker.close()


def train_worker(settings: dict[str, Any]) -> None:
    """Body of every Ray Train worker; the settings are those that `train_bridge` gives."""
    run_body(to_place(settings["progress"]).parent, "bridge", lambda: _train(settings), settings["lease"])


def _train(settings: dict[str, Any]) -> None:
    config = validate(settings["config"])
    with naming_out_of_memory("Bridge training", bridge_remedies(config)):
        _train_with(config, settings)


def _train_with(config: Config, settings: dict[str, Any]) -> None:
    progress, runs = to_place(settings["progress"]), settings["runs"]
    worker = Worker.current(config)
    torch.set_num_threads(config.distill.threads)
    allow_tf32(config.distill.tf32)
    trainer = build_trainer(config, settings["pairs"], worker.device, rank=worker.rank, world_size=worker.world)
    curves: dict[int, dict[str, float]] = {}
    cursors: list[dict[str, int]] | None = None
    if (found := newest_state("bridge", worker, progress.parent / CHECKPOINTS, runs)) is not None:
        trainer.load_state_dict(found.state)
        curves, cursors = found.state.get(CURVES, curves), found.state.get(CURSORS)
    del found  # a whole checkpoint in main memory
    tracking = (settings["tracking_uri"], settings["tracking_run"]) if worker.rank == 0 else (None, None)
    log = MetricLog(progress.parent, *tracking, curves)
    last = config.bridge.steps
    feed: Feed = Stored(trainer.objective)
    if settings["pictures"] is not None and trainer.step_count < last:
        feed = Streamed(config, trainer.objective, settings["pictures"], settings["held_out"], cursors)
    started, first, waited = 0.0, trainer.step_count, 0.0
    try:
        for batch, seconds in _timed(feed.batches(first, last)):
            if trainer.step_count == first:  # the time in which a stream begins is no part of its pace
                started = time.monotonic()
            else:
                waited += seconds
            with doing("a step"):
                losses = trainer.step(batch)
            step = trainer.step_count
            if step % LOG_EVERY == 0 or step == last:
                rate = (step - first) * config.bridge.batch_size / (time.monotonic() - started)
                seen = feed.metrics(worker) | {
                    "throughput/pairs_per_s": rate,
                    "time/wait_pairs": waited / (step - first),
                }
                log.metrics(losses | seen, step)
                if worker.rank == 0:
                    shown = {"loss": losses["loss/bridge"], "pairs/s": rate}
                    write_progress(progress, step=step, total=last, **shown)
            if step % config.bridge.checkpoint_every == 0 or step == last:
                _checkpoint(
                    trainer, log, progress.parent / BRIDGE_FOLDER, runs, feed.cursors(worker), picture_sets(config)
                )
    finally:
        feed.close()
        log.close()


def _timed(batches: Iterator[Pairs]) -> Iterator[tuple[Pairs, float]]:
    """Batches, and how many seconds each was waited for."""
    while True:
        began = time.monotonic()
        if (batch := next(batches, None)) is None:
            return
        yield batch, time.monotonic() - began


def _checkpoint(
    trainer: BridgeTrainer,
    log: MetricLog,
    stage: Place,
    runs: Runs,
    cursors: list[dict[str, int]] | None,
    pictures: list[tuple[str, str | None]],
) -> None:
    """Validate and save on rank 0; a barrier for all workers. Every checkpoint holds a usable Bridge.

    Args:
        cursors: where each worker goes on in its stream; None: pairs are stored.
        pictures: (source, licence) of the real ones that it is trained on.
    """
    if trainer.objective.rank:
        ray.train.report({})
        return
    step = trainer.step_count
    with doing("its validation"):
        metrics, picture = trainer.validation()
    log.metrics(metrics, step)
    log.image(picture, "reconstruction", step)
    with scratch(stage) as folder:
        trainer.bridge.save(folder / BRIDGE_FOLDER, metrics | {"step": step}, pictures=pictures)
        state = trainer.state_dict() | {CURVES: log.curves} | ({CURSORS: cursors} if cursors else {})
        save_state(folder, state, {"step": step} | mark(runs))
        lease.check(stage)
        ray.train.report(metrics | {"step": step}, checkpoint=ray.train.Checkpoint.from_directory(folder))
