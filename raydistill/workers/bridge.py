"""Bridge training on Ray Train: what one worker does, and how the driver launches it. The training is in trainer.py."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from raydistill.bridge.model import doublings, read_description
from raydistill.bridge.trainer import BridgeTrainer, build_trainer
from raydistill.config.reading import validate
from raydistill.config.schema import Config
from raydistill.data.pairs import Pairs, read_pairs
from raydistill.errors import StageFailed
from raydistill.precision import allow_tf32
from raydistill.spaces import load_space
from raydistill.storage.atomic import scratch
from raydistill.storage.place import Place, Remote, for_ray_train
from raydistill.storage.resolve import resolve, to_place
from raydistill.tracking.progress import ProgressWatcher, write_progress
from raydistill.workers.fatal_errors import fatal_error, forget_fatal_error, recording_fatal_errors

if TYPE_CHECKING:
    from PIL import Image


BRIDGE_FOLDER = "bridge"
LOG_EVERY = 10
CURVES = "curves"


@dataclass(frozen=True)
class TrainedBridge:
    """A saved Bridge and its quality on held-out pairs (keys of `BridgeTrainer.validation`)."""

    folder: Place
    metrics: dict[str, float]


@dataclass(frozen=True)
class _Settings:
    """What every worker is told."""

    config: dict[str, Any]
    pairs: str
    progress: str  # file that the driver shows
    tracking_uri: str | None
    tracking_run: str | None


def train_bridge(
    config: Config,
    run_dir: str | Place,
    pairs_folder: str | Path,
    tracking_uri: str | None = None,
    tracking_run: str | None = None,
) -> TrainedBridge:
    """Train the Bridge of the configured student and teacher, or go on from this folder's last checkpoint.

    Workers and their resources are those of the `distill` section; `bridge.batch_size` is divided between them.

    Args:
        config: whole configuration.
        run_dir: absolute folder on storage that every node sees, or a URI; the result is `run_dir/bridge`.
        pairs_folder: parquet shards of pairs, on such storage too.
        tracking_uri, tracking_run: MLflow run that receives metrics and pictures; None: no logging.

    Raises:
        InputError: the pair of spaces or the pairs cannot be used (before anything starts).
        StageFailed: the workers failed more often than `distill.max_failures`.
    """
    from raydistill.workers.ray_train import fit, wait_for_room

    run_dir = to_place(str(run_dir))
    _check(config, pairs_folder)
    run_dir.mkdir(parents=True, exist_ok=True)
    forget_fatal_error(run_dir)
    distill = config.distill
    progress = run_dir / "bridge-progress.json"
    settings = _Settings(config.model_dump(), str(pairs_folder), str(progress), tracking_uri, tracking_run)
    with ProgressWatcher(progress, "bridge"):
        wait_for_room(config, encoders=False)  # captions are encoded in the workers
        result = fit(lambda: _ray_trainer(config, settings, run_dir), "bridge", distill.max_failures)
    if (reason := fatal_error(run_dir)) is not None:
        raise StageFailed(f"bridge: {reason}")
    return _collect(result.checkpoint, run_dir / BRIDGE_FOLDER)


def _ray_trainer(config: Config, settings: _Settings, run_dir: Place) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    distill = config.distill
    resources = {"CPU": distill.cpus_per_worker} | ({"GPU": distill.gpus_per_worker} if distill.gpus_per_worker else {})
    return TorchTrainer(
        train_worker,
        train_loop_config=asdict(settings),
        scaling_config=ScalingConfig(
            num_workers=distill.fewest,
            use_gpu=distill.gpus_per_worker > 0,
            resources_per_worker=resources,
            label_selector=distill.node_labels or None,
        ),
        run_config=RunConfig(
            name="bridge-checkpoints",
            **for_ray_train(run_dir),
            logging_config=LoggingConfig(log_level="WARNING"),
            failure_config=FailureConfig(max_failures=distill.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )


def _check(config: Config, pairs_folder: str | Path) -> None:
    """Refuse what no worker could train on, before any is started."""
    student, teacher = load_space(resolve(config.student.model)), load_space(resolve(config.teacher.model))
    doublings(student, teacher)
    read_pairs(resolve(str(pairs_folder)), teacher.latent_shape, student.latent_shape)
    if config.bridge.projector == "identity":
        raise StageFailed("bridge.projector identity has nothing to train")


def _collect(checkpoint: Any, folder: Place) -> TrainedBridge:
    """Copy the last checkpoint's Bridge to where the next stage looks for it."""
    if isinstance(folder, Remote):
        with checkpoint.as_directory() as source:
            folder.upload(Path(source, BRIDGE_FOLDER))
            return TrainedBridge(folder, read_description(Path(source, BRIDGE_FOLDER))["metrics"])
    with checkpoint.as_directory() as source, tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        copied = Path(shutil.copytree(Path(source, BRIDGE_FOLDER), Path(unfinished, BRIDGE_FOLDER)))
        shutil.rmtree(folder, ignore_errors=True)
        copied.replace(folder)
    return TrainedBridge(folder, read_description(folder)["metrics"])


# -- the worker -------------------------------------------------------------------------------------------


class MetricLog:
    """Curves and pictures of one training in MLflow; without a store or a run they go nowhere.

    A checkpoint takes `curves` along: what waited in a killed process's memory is offered again by the next one, and the
    run's tracker leaves out what it has.

    Attributes:
        curves: step -> values, of this process and those before it.
    """

    def __init__(
        self, uri: str | None, run: str | None, curves: Mapping[int, Mapping[str, float]] | None = None
    ) -> None:
        self._tracker, self.curves = None, {step: dict(values) for step, values in (curves or {}).items()}
        if uri and run:
            from raydistill.tracking.tracker import Tracker

            self._tracker = Tracker(uri, run)
            self._tracker.catch_up(self.curves)

    def metrics(self, values: dict[str, float], step: int) -> None:
        self.curves.setdefault(step, {}).update(values)
        if self._tracker:
            self._tracker.metrics(values, step)

    def image(self, picture: Image.Image, name: str, step: int) -> None:
        if self._tracker:
            self._tracker.image(picture, name, step)

    def close(self) -> None:
        if self._tracker:
            self._tracker.close()


def train_worker(settings: dict[str, Any]) -> None:
    """Body of every Ray Train worker; errors that last are written down for `train_bridge`."""
    told = _Settings(**settings)
    folder = to_place(told.progress).parent
    if fatal_error(folder) is None:
        with recording_fatal_errors(folder):
            _train(told)


def _train(told: _Settings) -> None:
    import ray.train

    from raydistill.workers.ray_train import newest_state

    config = validate(told.config)
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(config.distill.threads)
    allow_tf32(config.distill.tf32)
    trainer = build_trainer(config, told.pairs, _device(config), rank, world_size)
    curves: dict[int, dict[str, float]] = {}
    if (found := newest_state("bridge", rank, world_size)) is not None:
        trainer.load_state_dict(found[0])
        curves = found[0].get(CURVES, curves)
    log = MetricLog(told.tracking_uri, told.tracking_run, curves) if rank == 0 else MetricLog(None, None)
    last = config.bridge.steps
    started, first = time.monotonic(), trainer.step_count
    try:
        for batch in _batches(trainer, first, last):
            losses = trainer.step(batch)
            step = trainer.step_count
            if step % LOG_EVERY == 0 or step == last:
                rate = (step - first) * config.bridge.batch_size / (time.monotonic() - started)
                log.metrics(losses | {"throughput/pairs_per_s": rate}, step)
                if rank == 0:
                    write_progress(
                        to_place(told.progress), step=step, total=last, pairs_per_s=rate, loss=losses["loss/bridge"]
                    )
            if step % config.bridge.checkpoint_every == 0 or step == last:
                _checkpoint(trainer, log, to_place(told.progress).parent / BRIDGE_FOLDER)
    finally:
        log.close()


def _device(config: Config) -> torch.device:
    from ray.train.torch import get_device

    return get_device() if config.distill.gpus_per_worker else torch.device("cpu")


def _batches(trainer: BridgeTrainer, first: int, stop: int) -> Iterator[Pairs]:
    """Batches of steps first … stop - 1; the next one is read while the last one is trained on."""
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(trainer.objective.batch, first) if first < stop else None
        for step in range(first, stop):
            batch = ahead.result()
            ahead = reader.submit(trainer.objective.batch, step + 1) if step + 1 < stop else None
            yield batch


def _checkpoint(trainer: BridgeTrainer, log: MetricLog, stage: Place) -> None:
    """Validate and save on rank 0; a barrier for all workers. Every checkpoint holds a usable Bridge."""
    import ray.train

    from raydistill.workers.checkpoint import save_state

    if trainer.objective.rank:
        ray.train.report({})
        return
    step = trainer.step_count
    metrics, picture = trainer.validation()
    log.metrics(metrics, step)
    log.image(picture, "reconstruction", step)
    with scratch(stage) as folder:
        trainer.bridge.save(folder / BRIDGE_FOLDER, metrics | {"step": step})
        save_state(folder, trainer.state_dict() | {CURVES: log.curves}, {"step": step})
        ray.train.report(metrics | {"step": step}, checkpoint=ray.train.Checkpoint.from_directory(folder))
