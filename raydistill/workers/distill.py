"""Distillation on Ray Train: what one worker does, and how the driver launches it.

A stage is one distillation (the main one or a control). Its whole behaviour follows from its Config, so a control is
the same code with another configuration.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch

from raydistill.config.reading import validate
from raydistill.config.schema import Config
from raydistill.errors import StageFailed
from raydistill.storage.atomic import scratch
from raydistill.storage.place import for_ray_train
from raydistill.storage.resolve import resolve
from raydistill.tracking.progress import ProgressWatcher
from raydistill.workers.fatal_errors import fatal_error, forget_fatal_error, recording_fatal_errors
from raydistill.workers.observer import Observer
from raydistill.workers.ray_train import fit, newest_state, wait_for_room
from raydistill.workers.score_requests import Teachers
from raydistill.workers.stage import Stage
from raydistill.workers.stop_signal import TRACKING_WITHIN_S, acknowledge_stop, draining, stop_requested


def launch(stage: Stage, needs: Sequence[Future[Any]] = ()) -> dict[str, Any]:
    """Run a stage to its end, or go on with it from its last checkpoint; returns its result.

    Args:
        needs: what runs beside it; the first failure there ends the wait for the stage, and is raised.

    Raises:
        StageFailed: the workers failed more often than `distill.max_failures`, or for a reason that a restart
            cannot mend.
    """
    config = validate(stage.config)
    if stage.path("result.json").is_file():
        return stage.result()
    stage.path().mkdir(parents=True, exist_ok=True)
    forget_fatal_error(stage.path())
    with draining(stage.path()), ProgressWatcher(stage.path("progress.json"), stage.name):
        wait_for_room(config, stage.service if stage.service != config.teachers.service else None)
        fit(lambda: _trainer(stage, config), stage.name, config.distill.max_failures, needs)
        if (reason := fatal_error(stage.path())) is not None:
            raise StageFailed(f"{stage.name}: {reason}")
    return stage.result()


def _trainer(stage: Stage, config: Config) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    distill = config.distill
    resources = {"CPU": distill.cpus_per_worker} | ({"GPU": distill.gpus_per_worker} if distill.gpus_per_worker else {})
    return TorchTrainer(
        train_worker,
        train_loop_config=asdict(stage),
        scaling_config=ScalingConfig(
            num_workers=distill.workers if distill.min_workers is None else (distill.min_workers, distill.workers),
            elastic_resize_monitor_interval_s=distill.resize_after_s,
            use_gpu=distill.gpus_per_worker > 0,
            resources_per_worker=resources,
            label_selector=distill.node_labels or None,
        ),
        run_config=RunConfig(
            name="checkpoints",
            **for_ray_train(stage.path()),
            logging_config=LoggingConfig(log_level="WARNING"),
            failure_config=FailureConfig(max_failures=distill.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),  # by time: one may be damaged; the best is in best/
        ),
    )


# -- the worker -------------------------------------------------------------------------------------------


def train_worker(settings: dict[str, Any]) -> None:
    """Body of every Ray Train worker.

    What would happen again after a restart is written down for `launch`, and the restarted workers end at once.
    """
    stage = Stage(**settings)
    if fatal_error(stage.path()) is None:
        with recording_fatal_errors(stage.path()), _said(stage.name):
            _train(stage)


@contextmanager
def _said(stage: str) -> Iterator[None]:
    """Show on the driver's screen why a worker fails: Ray Train starts it again without a word."""
    try:
        yield
    except Exception as error:
        print(f"{stage}: a worker failed: {type(error).__name__}: {error}", flush=True)
        raise


def _train(stage: Stage) -> None:
    from raydistill.data.encode import Early
    from raydistill.errors import NonFiniteError
    from raydistill.tracking.system_metrics import SystemMetrics
    from raydistill.tracking.tracker import Tracker

    config = validate(stage.config)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(config.distill.threads)
    found = newest_state(stage.name, rank, world)
    done = found[1]["step"] if found else 0
    batches = Early(_batches_from(config, done, rank, world))  # encoders start while networks load
    distiller, submit = _assemble(stage, config, rank, world)
    first, best, score, stopped, collapse = _restore(distiller, found)
    del found
    distiller.batches = batches
    tracker = Tracker(stage.mlflow_uri, stage.mlflow_run) if rank == 0 else None
    system = SystemMetrics(stage.mlflow_uri, stage.mlflow_run).start() if rank == 0 else None
    observer = Observer(stage, config, distiller, tracker, best, score) if rank == 0 else None
    stops = config.distill.stop_on_collapse
    last = first if stops and stopped else config.distill.steps  # a collapse that was met before
    step, leave = first, False
    from raydistill.distill.schedule import distillation_step
    from raydistill.workers.step_log import open_log

    if observer:
        observer.collapse = collapse
        observer.catch_up(first)
    steps = open_log(stage.path(), rank)
    try:
        if observer and first == 0:
            observer.before()
        if submit and first < last:
            submit.wait_for_start()
        for step in range(first + 1, last + 1):
            distillation_step(distiller, submit, config.fake_score.updates, config.distill.overlap)
            metrics = distiller.pop_metrics() | (submit.metrics() if submit else {})
            if observer:
                observer.after_step(step, world, metrics)
            steps.add(step, world, distiller.pop_sample_ids(), metrics)
            stopped = _told_by_rank_0(observer.collapse if observer else None, world) if stops else None
            leave = step < config.distill.steps and _asked_to_stop(stage, distiller.device, rank, world)
            if _due(config, step, stopped, leave):
                steps.keep()  # before the checkpoint counts these steps as done
                _checkpoint(distiller, observer, step, stopped)
            if stopped:
                break
            if leave:
                if observer:
                    acknowledge_stop(stage.path(), step)
                return
        if observer:
            observer.finish(step, stopped if stops else None)
    except NonFiniteError as error:
        _note_non_finite(stage, rank, step, error)
        raise
    finally:
        steps.close()
        batches.close()
        deadline = time.monotonic() + TRACKING_WITHIN_S
        if system:
            system.stop(TRACKING_WITHIN_S / 2)
        if tracker:
            tracker.close(deadline - time.monotonic() if leave else 60.0)


def _asked_to_stop(stage: Stage, device: torch.device, rank: int, world: int) -> bool:
    """What rank 0 sees counts for all, so that all leave after the same step."""
    asked = torch.tensor(float(rank == 0 and stop_requested(stage.path())), device=device)
    if world > 1:
        torch.distributed.broadcast(asked, 0)
    return bool(asked)


def _told_by_rank_0(reason: str | None, world: int) -> str | None:
    """What rank 0 says, on every worker."""
    if world == 1:
        return reason
    told = [reason]
    torch.distributed.broadcast_object_list(told, src=0)
    return told[0]


def _note_non_finite(stage: Stage, rank: int, step: int, error: Exception) -> None:
    """Name and count what was not finite in the stage's run, whichever worker met it; it ends the stage."""
    from raydistill.tracking.tracker import Tracker

    tracker = Tracker(stage.mlflow_uri, stage.mlflow_run)
    tracker.tags({"non_finite": f"step {step}, worker {rank}: {error}"})
    tracker.metrics({"guard/non_finite": getattr(error, "count", 1)}, step)
    tracker.close()


def _batches_from(config: Config, first: int, rank: int, world: int) -> Any:
    """Conditioned batches from the first step that is not done; a generator."""
    from raydistill.data.encode import conditioned_batches, own_rows
    from raydistill.data.prompts import training_prompts

    distill = config.distill
    per_step = 1 + config.fake_score.updates
    prompts = training_prompts(config)
    return conditioned_batches(
        prompts,
        {"student": str(resolve(config.student.model)), "teacher": str(resolve(config.teacher.model))},
        seed=config.run.seed,
        first=first * per_step,
        stop=distill.steps * per_step,
        rows=own_rows(
            rank, world, distill.workers * distill.micro_batches, distill.batch_size // distill.micro_batches
        ),
        slot_size=distill.workers * distill.batch_size,
        dtype=config.prompts.encoder_dtype,
        encoders=config.prompts.encoders,
        cpus_per_encoder=config.prompts.cpus_per_encoder,
        gpus_per_encoder=config.prompts.gpus_per_encoder,
        threads=config.prompts.threads_per_encoder,
        node_labels=config.prompts.node_labels,
    )


def _assemble(stage: Stage, config: Config, rank: int, world: int) -> tuple[Any, Any]:
    """Load every network of a worker and connect it to its teachers."""
    from raydistill.bridge.model import Bridge
    from raydistill.bridge.objective import build_objective
    from raydistill.data.encode import encode_unconditional, own_rows
    from raydistill.distill.distiller import Distiller
    from raydistill.distill.networks import guidance_scale, load_real, load_unet
    from raydistill.precision import allow_tf32
    from raydistill.spaces import load_space
    from raydistill.teachers.client import TeacherClient

    device = ray.train.torch.get_device() if config.distill.gpus_per_worker else torch.device("cpu")
    allow_tf32(config.distill.tf32)
    student_space = load_space(resolve(config.student.model))
    teacher_space = load_space(resolve(config.teacher.model))
    unet = load_unet(student_space, config.student.unet)
    if stage.bridge:
        bridge = Bridge.load(resolve(stage.bridge), student_space, teacher_space)
    else:
        bridge = Bridge.create(student_space, teacher_space, config.bridge)
    gan = config.discriminator
    encoding, real = getattr(torch, config.prompts.encoder_dtype), None  # texts first: the device is still empty
    empty = encode_unconditional(teacher_space, encoding, device) if stage.service else None
    if stage.real and gan.weight > 0:
        real = load_real(resolve(stage.real), teacher_space, gan.real_count, encoding, device)
    anchor = build_objective(config, stage.pairs, device, rank, world) if config.bridge.trainable else None
    parts = config.distill.workers * config.distill.micro_batches  # of an update, however many workers there are
    distiller = Distiller(
        config,
        student_space,
        teacher_space,
        unet,
        bridge,
        teacher_space.load_network(),
        real,
        iter(()),  # replaced once the first step is known
        average_over_workers if world > 1 else lambda gradients: None,
        device,
        anchor,
        len(own_rows(rank, world, parts, 1)),
        parts / world,
        _mesh(device, world) if config.fake_score.shard and world > 1 else None,
    )
    if empty is None:
        return distiller, None
    client = TeacherClient(stage.service, config.teachers, rank / world)  # all workers ask at once
    return distiller, Teachers(client, empty, guidance_scale(config, teacher_space))


def _mesh(device: torch.device, world: int) -> Any:
    """All workers in a row."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (world,))


def average_over_workers(gradients: list[torch.Tensor]) -> None:
    """Mean over all workers, in place, by one flat all-reduce."""
    flat = torch._utils._flatten_dense_tensors(gradients)
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for gradient, mean in zip(gradients, torch._utils._unflatten_dense_tensors(flat, gradients), strict=True):
        gradient.copy_(mean)


def _restore(
    distiller: Any, found: tuple[dict[str, Any], dict[str, Any]] | None
) -> tuple[int, float, float, str | None, str | None]:
    """(steps done, best score, last score, why it was stopped, lasting alarm) of what was `found`; None: a fresh start."""
    if found is None:
        return 0, float("-inf"), 0.0, None, None
    state, about = found
    distiller.load_state_dict(state)
    return about["step"], about["best"], about["score"], about.get("stopped"), about.get("collapse")


def _due(config: Config, step: int, stopped: str | None, leave: bool) -> bool:
    """Whether a step ends with a checkpoint: every `checkpoint_every`, the last one, after a collapse, before leaving."""
    return step % config.distill.checkpoint_every == 0 or step == config.distill.steps or bool(stopped) or leave


def _checkpoint(distiller: Any, observer: Observer | None, step: int, stopped: str | None) -> None:
    """Report the state; a barrier for all workers."""
    from raydistill.workers.checkpoint import require_room, save_state

    if observer is None:
        ray.train.report({})
        return
    with scratch(observer.stage.path()) as folder:
        about = {
            "step": step,
            "best": observer.best,
            "score": observer.score,
            "stopped": stopped,
            "collapse": observer.collapse,
            "mlflow_run": observer.stage.mlflow_run,
        }
        save_state(folder, distiller.state_dict(), about)
        if isinstance(storage := observer.stage.path(), Path):
            require_room(storage, sum(file.stat().st_size for file in folder.iterdir()))
        ray.train.report(
            {"step": step, "score": observer.score}, checkpoint=ray.train.Checkpoint.from_directory(folder)
        )
