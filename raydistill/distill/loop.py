"""Distillation on Ray Train: what one worker does, and how the driver launches it.

A stage is one distillation (the main one or a control). Its whole behaviour follows from its Config, so a control is
the same code with another configuration.
"""

from __future__ import annotations

import functools
import json
import operator
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch

from raydistill.config import Config, resolve, validate
from raydistill.files import read_json, scratch
from raydistill.lasting import fatal, forget, written_down
from raydistill.progress import ProgressWatcher, write_progress
from raydistill.stopping import TRACKING_WITHIN_S, asked_to_stop, draining, say_written
from raydistill.storage import Place, for_ray_train, place, reading, replace_text, writing
from raydistill.training import fit, newest_state, wait_for_room


class DistillationFailed(RuntimeError):
    """A stage ended without a result; the message says why."""


@dataclass(frozen=True)
class Stage:
    """One distillation, as shipped to its workers."""

    name: str
    config: dict[str, Any]
    folder: str  # of this stage, on storage that every node sees
    bridge: str | None  # trained Bridge; None for the identity
    real: str | None  # parquet of teacher samples
    pairs: str | None  # parquet of pairs that anchor a Bridge trained along
    service: str | None  # name of the teacher service; None when VSD is off
    mlflow_uri: str
    mlflow_run: str

    def path(self, *parts: str) -> Place:
        return functools.reduce(operator.truediv, parts, place(self.folder))

    def result(self) -> dict[str, Any]:
        return read_json(self.path("result.json"), "remove it, and the stage ends again from its last checkpoint")


def launch(stage: Stage, needs: Sequence[Future[Any]] = ()) -> dict[str, Any]:
    """Run a stage to its end, or go on with it from its last checkpoint; returns its result.

    Args:
        needs: what runs beside it; the first failure there ends the wait for the stage, and is raised.

    Raises:
        DistillationFailed: the workers failed more often than `distill.max_failures`, or for a reason that a restart
            cannot mend.
    """
    config = validate(stage.config)
    if stage.path("result.json").is_file():
        return stage.result()
    stage.path().mkdir(parents=True, exist_ok=True)
    forget(stage.path())
    with draining(stage.path()), ProgressWatcher(stage.path("progress.json"), stage.name):
        wait_for_room(config, DistillationFailed, stage.service if stage.service != config.teachers.service else None)
        fit(lambda: _trainer(stage, config), stage.name, config.distill.max_failures, DistillationFailed, needs)
        if (reason := fatal(stage.path())) is not None:
            raise DistillationFailed(f"{stage.name}: {reason}")
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
    if fatal(stage.path()) is None:
        with written_down(stage.path()), _said(stage.name):
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
    from raydistill.distill.losses import NonFiniteError
    from raydistill.teachers.request import NonFiniteScores
    from raydistill.tracking import SystemMetrics, Tracker

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
    from raydistill.distill.record import open_log
    from raydistill.distill.schedule import distillation_step

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
                    say_written(stage.path(), step)
                return
        if observer:
            observer.finish(step, stopped if stops else None)
    except (NonFiniteError, NonFiniteScores) as error:
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
    asked = torch.tensor(float(rank == 0 and asked_to_stop(stage.path())), device=device)
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
    from raydistill.tracking import Tracker

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
    from raydistill.bridge.loop import build_objective
    from raydistill.bridge.model import Bridge
    from raydistill.data.encode import encode_unconditional, own_rows
    from raydistill.distill.distiller import Distiller
    from raydistill.distill.load import guidance_scale, load_real, load_unet
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


class Teachers:
    """A worker's way to its teachers: `schedule.Submit`, and how busy they are."""

    def __init__(self, client: Any, unconditional: dict[str, torch.Tensor], scale: float) -> None:
        self.client, self.unconditional, self.scale = client, unconditional, scale

    def __call__(self, made: Any) -> Any:
        from raydistill.teachers.client import ScoreRequest

        conditioning = {name: value.cpu() for name, value in made.teacher_conditioning.items()}
        return self.client.submit(
            ScoreRequest(made.x_t.cpu(), made.t_B.cpu(), conditioning, self.unconditional, self.scale)
        )

    def wait_for_start(self) -> None:
        """Until the teachers are ready for the first time; the driver ends the run where they cannot be."""
        from raydistill.teachers import users

        while not users.ready(self.client.name):
            time.sleep(0.2)

    def metrics(self) -> dict[str, float]:
        """Latency, busy fraction and queue of the service as this worker saw them, and its requests."""
        return self.client.metrics()


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
    from raydistill.distill.state import require_room, save_state

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


class Observer:
    """Rank 0's evaluation, logging and export."""

    def __init__(self, stage: Stage, config: Config, distiller: Any, tracker: Any, best: float, score: float) -> None:
        from raydistill.data.prompts import held_out_prompts, training_prompts
        from raydistill.evaluation.evaluator import FixedPrompts, StudentEvaluator

        self.stage, self.config, self.distiller, self.tracker = stage, config, distiller, tracker
        self.best, self.score = best, score
        self.collapse: str | None = None  # the alarm, while it lasts
        self.told_of_cuts = False
        self.started = time.monotonic()
        self.samples = config.distill.batch_size * config.distill.steps
        evaluation, device = config.evaluation, distiller.device

        def evaluator(prompts: Any, count: int, seed: int) -> StudentEvaluator:
            return StudentEvaluator(distiller.student_space, FixedPrompts(prompts, count, seed), evaluation, device)

        self.final = evaluator(held_out_prompts(config), evaluation.count, evaluation.seed)
        # Checkpoints are chosen on training prompts, so that the held-out ones stay unseen.
        self.periodic = evaluator(training_prompts(config), evaluation.periodic_count, evaluation.seed + 1)

    def _evaluate(self, evaluator: Any) -> tuple[torch.Tensor, dict[str, float]]:
        pictures = evaluator.draw(self.distiller.evaluated, self.config.student.start_timestep)
        return pictures, evaluator.accuracy(pictures)

    def before(self) -> None:
        """The start, on the held-out prompts; kept for the summary. Its curves on training prompts begin here too.

        Later students are compared with each other, not with the start, which its owner has: a run exports what it
        trained, and says where that is worse.
        """
        pictures, table = self._evaluate(self.final)
        self._keep("before", pictures, table, 0)
        judged, table = self._look(0)
        self.score = judged or 0.0
        self.tracker.metrics(table, 0)
        self._keep_best(0)  # for a run that collapses before its first evaluation, which is better than this

    def _keep_best(self, step: int) -> None:
        from raydistill.distill.state import save_state

        with writing(self.stage.path("best")) as folder:
            folder.mkdir(exist_ok=True)
            save_state(folder, self.distiller.best_state(), {"step": step, "score": self.score})

    def _keep(self, name: str, pictures: torch.Tensor, table: dict[str, float], step: int) -> None:
        from raydistill.evaluation.evaluator import save_pictures
        from raydistill.evaluation.grids import grid

        count = self.config.evaluation.grid
        save_pictures(self.stage.path(f"{name}.safetensors"), pictures[:count])
        replace_text(self.stage.path(f"{name}.json"), json.dumps(table))
        self.tracker.metrics({f"eval/{key}": value for key, value in table.items()}, step)
        self.tracker.image(grid(pictures[:count], self.final.fixed.captions[:count]), "samples", step)

    def catch_up(self, first: int) -> None:
        """Log again what a lost worker may have kept to itself: the tracker leaves out what the run already has."""
        from raydistill.distill.record import read_lines, step_file, steps_of

        lines = steps_of(read_lines(step_file(self.stage.path(), 0)))
        self.tracker.catch_up({step: line["values"] for step, line in lines.items() if step <= first})

    def after_step(self, step: int, world: int, metrics: dict[str, float]) -> None:
        """Evaluate when it is time, and log; adds what it measures to `metrics`."""
        seconds = metrics["time/step"]
        metrics["throughput/samples_per_s"] = self.config.distill.workers * self.config.distill.batch_size / seconds
        metrics["throughput/workers"] = world
        if metrics.get("data/cut_prompts") and not self.told_of_cuts:
            self.told_of_cuts = True
            print(
                f"{self.stage.name}: update {step} has prompts that are longer than a text encoder reads; their ends are "
                "lost (data/cut_prompts counts them)",
                flush=True,
            )
        drifted = self.distiller.guard.alarm
        self._alarm(step, drifted)
        if step % self.config.distill.evaluate_every == 0 or step == self.config.distill.steps:
            judged, table = self._look(step)
            metrics |= table
            # without a judge the last student counts as the best, unless its latents have drifted away
            self.score = float(step) if judged is None else judged
            self._guard(step, judged, keep=judged is not None or drifted is None)
        self.tracker.metrics(metrics, step)
        write_progress(
            self.stage.path("progress.json"),
            step=step,
            total=self.config.distill.steps,
            samples_per_s=float(metrics["throughput/samples_per_s"]),
            wait_teacher_s=float(metrics.get("time/wait_teacher", 0.0)),
            score=float(self.score),
        )

    def _look(self, step: int) -> tuple[float | None, dict[str, float]]:
        """(what students are compared by, metrics) of the student on training prompts, whose pictures are logged."""
        from raydistill.evaluation.grids import grid

        pictures, table = self._evaluate(self.periodic)
        count = self.config.evaluation.grid
        self.tracker.image(grid(pictures[:count], self.periodic.fixed.captions[:count]), "periodic", step)
        judged = table[self.config.evaluation.metric] if table else None
        return judged, {f"eval/periodic_{key}": value for key, value in table.items()}

    def _alarm(self, step: int, reason: str | None) -> None:
        """Say once that the student collapses, on screen and in the run's tags; None: it does not, or no longer."""
        if reason is not None and self.collapse is None:
            message = f"step {step}: {reason}"
            print(f"collapse alarm: {message}", flush=True)
            self.tracker.tags({"collapse_alarm": message})
        self.collapse = None if reason is None else self.collapse or f"step {step}: {reason}"

    def _guard(self, step: int, judged: float | None, keep: bool) -> None:
        """Alarm where the evaluation falls well below its best; keep the best student."""
        if judged is not None and judged < self.best - 0.1:
            self._alarm(step, f"evaluation fell to {judged:.3f} from {self.best:.3f}")
        if keep and self.score > self.best:
            self.best = self.score
            self._keep_best(step)

    def _card(self, step: int, table: dict[str, float]) -> Any:
        from raydistill.config import config_hash
        from raydistill.export.pipeline import ModelCard

        return ModelCard(
            teacher=self.config.teacher.model,
            teacher_class=self.distiller.teacher_space.pipeline_class,
            student=self.config.student.model,
            steps=step,
            run_id=self.stage.mlflow_run,
            config_hash=config_hash(self.config),
            metrics=table,
            start=self.config.student.unet,
        )

    def finish(self, step: int, stopped: str | None) -> None:
        """Evaluate the best student on the held-out prompts, export it, write the result.

        Args:
            step: updates that were done.
            stopped: the collapse that ended the stage; None: it went to its end.
        """
        from raydistill.distill.state import CheckpointError, load_state
        from raydistill.export.pipeline import export_student

        unet = self.distiller.evaluated
        try:
            with reading(self.stage.path("best")) as folder:
                state, about = load_state(folder)
        except CheckpointError as error:
            about = {"step": step}
            print(f"{self.stage.name}: {error}; the student of update {step} is exported instead", flush=True)
        else:
            self.distiller.load_best_state(state)
        pictures, table = self._evaluate(self.final)
        self._keep("after", pictures, table, step)
        space = self.distiller.student_space
        card = self._card(about["step"], table)
        with writing(self.stage.path("export")) as folder:
            export_student(space, unet, self.config.student.start_timestep, folder, card)
        self.tracker.artifact(self.stage.path("export"))
        if self.config.bridge.trainable:
            with writing(self.stage.path("bridge")) as folder:
                self.distiller.bridge.save(folder, {"step": about["step"]})
            self.tracker.artifact(self.stage.path("bridge"))
        before = read_json(self.stage.path("before.json"), "restore it, or use another run.name")
        metric = self.config.evaluation.metric
        if table and table[metric] < before[metric]:
            worse = (
                f"eval/{metric} on held-out prompts is {table[metric]:.3f}, and was {before[metric]:.3f} at the start"
            )
            print(f"{self.stage.name}: the student is worse than before: {worse}", flush=True)
            self.tracker.tags({"worse_than_start": worse})
        result = {
            "before": before,
            "after": table,
            "steps": step,
            "best_step": about["step"],
            "stopped": stopped,
        }
        replace_text(self.stage.path("result.json"), json.dumps(result, indent=1))
