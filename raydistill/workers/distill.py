"""Distillation on Ray Train: how the driver launches it, and what one worker does.

A stage is one distillation (the main one or a control). Its whole behaviour follows from its Config, so a control is
the same code with another configuration.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray.train
import torch

from raydistill.config.reading import CONTROLS, validate
from raydistill.config.schema import Config
from raydistill.data.stream import Early
from raydistill.device_memory import doing, naming_out_of_memory
from raydistill.distillation.compiled import as_it_is
from raydistill.distillation.schedule import distillation_step
from raydistill.distillation.updates import Distiller
from raydistill.errors import NonFiniteError, StageFailed
from raydistill.storage import lease
from raydistill.storage.atomic import scratch
from raydistill.tracking.progress import ProgressWatcher
from raydistill.tracking.screen import screen
from raydistill.tracking.tracker import SystemMetrics, Tracker
from raydistill.workers.adoption import Found
from raydistill.workers.assembly import Teachers, batches_after, load_distiller, open_reals
from raydistill.workers.checkpoint import require_room, save_state
from raydistill.workers.more_micro_batches import in_more_micro_batches, noting_more_micro_batches
from raydistill.workers.observer import Evaluated, Observer, evaluated_sets, evaluation_is_due
from raydistill.workers.ray_train import Worker, newest_state, run_body, train
from raydistill.workers.remedies import trainer_remedies
from raydistill.workers.stage import Stage, Standing
from raydistill.workers.step_log import open_log
from raydistill.workers.stop_signal import TRACKING_WITHIN_S, acknowledge_stop, draining, stop_requested

CHECKPOINTS = "checkpoints"  # folder of a stage


def launch(stage: Stage, needs: Sequence[Future[Any]] = ()) -> dict[str, Any]:
    """Run a stage to its end, or go on with it from its last checkpoint; returns its result.

    Where an update finds a device full, the stage goes on once with more micro-batches (more_micro_batches.py).
    `needs`, and what is raised: see `train`.
    """
    if stage.path("result.json").is_file():
        return stage.result()
    stage.path().mkdir(parents=True, exist_ok=True)  # before a signal may leave its file there
    roomier = in_more_micro_batches(stage)
    try:
        _train(roomier, needs)
    except StageFailed as error:
        again = in_more_micro_batches(stage)
        if again == roomier:
            raise
        count = again.config["distill"]["micro_batches"]
        screen.say(f"{error}")
        screen.say(
            f"{screen.numbered(stage.name)}: goes on with distill.micro_batches={count}, the same update up to rounding"
        )
        _train(again, needs)
    return stage.result()


def _train(stage: Stage, needs: Sequence[Future[Any]]) -> None:
    config = validate(stage.config)
    own_service = stage.service if stage.service != config.teachers.service else None
    with draining(stage.path()), ProgressWatcher(stage.path("progress.json"), stage.name, alike=CONTROLS):
        train(
            train_worker,
            vars(stage),
            config,
            name=stage.name,
            folder=stage.path(),
            checkpoints=CHECKPOINTS,
            steps=config.distill.steps,
            elastic=True,
            service=own_service,
            needs=needs,
        )


# -- the worker -------------------------------------------------------------------------------------------


def train_worker(settings: dict[str, Any]) -> None:
    """Body of every Ray Train worker."""
    stage = Stage(**settings)
    run_body(stage.path(), stage.name, lambda: distil(stage), stage.lease)


def distil(stage: Stage) -> None:
    """One worker's part of the stage, from the newest checkpoint to the end, or to a stop."""
    config = validate(stage.config)
    naming = naming_out_of_memory("trainer", trainer_remedies(config))
    with noting_more_micro_batches(stage), naming, _opened(stage, config) as run:
        run.begin()
        for step in run.remaining_steps():
            distillation_step(run.distiller, run.teachers, config.fake_score.updates, config.distill.overlap)
            run.record(step)
            leave = run.agree(step)
            if run.checkpoint_is_due(leave):
                run.checkpoint()
            if run.standing.stopped:
                break
            if leave:
                return run.leave()
        with run.distiller.networks.gathered():
            if run.observer:
                run.observer.finish()


@contextmanager
def _opened(stage: Stage, config: Config) -> Iterator[DistillationRun]:
    """Load networks and state, open the logs; close them however the block ends."""
    worker = Worker.current(config)
    torch.set_num_threads(config.distill.threads)
    found = newest_state(stage.name, worker, stage.path(CHECKPOINTS), stage.runs)
    first = found.about["step"] if found else 0
    reals = open_reals(stage, config, worker)
    batches = Early(batches_after(config, worker, first, reals))  # encoders start while networks load
    # rank 0's texts first: the device is still empty, and others would wait for a CPU in their first meeting
    evaluated = evaluated_sets(config, worker.device) if worker.rank == 0 else None
    with doing("loading its networks"):
        distiller, teachers = load_distiller(stage, config, worker, batches, reals)
    run = DistillationRun(stage, config, worker, distiller, teachers, found, evaluated=evaluated)
    del found  # a whole checkpoint in main memory, and this frame lives as long as the run
    system = SystemMetrics(stage.mlflow_uri, stage.mlflow_run).start() if worker.rank == 0 else None
    try:
        yield run
    except NonFiniteError as error:
        run.note_non_finite(error)
        raise
    finally:
        try:
            run.log.close()
        finally:
            batches.close()
            deadline = time.monotonic() + TRACKING_WITHIN_S
            if system:
                system.stop(TRACKING_WITHIN_S / 2)
            run.close(deadline - time.monotonic())


class DistillationRun:
    """One worker's run of a stage: its updates, what it keeps of them, and what all workers agree on.

    Attributes:
        standing: where the stage stands; rank 0's is that of the checkpoints.
        observer: rank 0's evaluation and logging; None on other workers.
    """

    def __init__(
        self,
        stage: Stage,
        config: Config,
        worker: Worker,
        distiller: Distiller,
        teachers: Teachers | None,
        found: Found | None,
        *,
        evaluated: Sequence[Evaluated] | None = None,
    ) -> None:
        self.stage, self.config, self.worker = stage, config, worker
        self.distiller, self.teachers = distiller, teachers
        self.standing, self._leaves = Standing(), False
        if found is not None:
            distiller.load_state_dict(found.state)
            self.standing = Standing.of(found.about)
        self.tracker = Tracker(stage.mlflow_uri, stage.mlflow_run) if worker.rank == 0 else None
        shown = teachers.shown if teachers else None
        seen = (stage, config, distiller, self.tracker, self.standing)
        self.observer = Observer(*seen, evaluated=evaluated, shown=shown) if self.tracker else None
        self.log = open_log(stage.path(), worker.rank)

    def remaining_steps(self) -> range:
        """None are left where a collapse or a plateau has ended the stage before."""
        ended = self.standing.ended(self.config.distill)
        return range(self.standing.step + 1, self.standing.step + 1 if ended else self.config.distill.steps + 1)

    def begin(self) -> None:
        """Look at the start, or catch up with what was logged; then wait until the teachers are there."""
        if self.observer:
            self.observer.catch_up()
        if self.standing.step == 0:
            with self.distiller.networks.gathered():
                if self.observer:
                    self.observer.before()
        if self.teachers and self.remaining_steps():
            self.teachers.wait_for_start()

    def record(self, step: int) -> None:
        """Evaluate when it is time, log, and write down what the update has consumed.

        Raises RunLost: the run and its MLflow runs are another job's.
        """
        lease.check(self.stage.path())
        self.standing.step = step
        metrics = self.distiller.pop_metrics() | (self.teachers.client.metrics() if self.teachers else {})
        self._tell_left_out(step)
        with doing("an evaluation"), self.distiller.networks.gathered(evaluation_is_due(self.config, step)):
            if self.observer:
                self.observer.after_step(step, self.worker.world, metrics)
        with doing("pictures of the scores"):
            self._show_scores(step)
        self.log.add(step, self.worker.world, self.distiller.batches.pop_sample_ids(), metrics)

    def _tell_left_out(self, step: int) -> None:
        """Name the samples that this worker has left out of the update, on the screen and in the stage's run."""
        left_out, self.distiller.left_out = self.distiller.left_out, []
        lines = [f"step {step}, worker {self.worker.rank}: left out: {words}" for words, _ in left_out]
        for line in lines:
            screen.say(line)
        if lines:
            tracker = Tracker(self.stage.mlflow_uri, self.stage.mlflow_run)
            tracker.tags({"left_out": lines[-1]})
            tracker.close()

    def _show_scores(self, step: int) -> None:
        """At an evaluation, pictures of what teacher and fake score make of the student's.

        Where workers share one fake score, all compute its part: each holds a piece of every block.
        """
        config, networks = self.config, self.distiller.networks
        if not (self.teachers and config.evaluation.scores_grid and evaluation_is_due(config, step)):
            return
        with networks.gathered():
            made = self.observer.score_pictures.make() if self.observer else []
        if config.fake_score.shard:
            made = self.worker.from_rank_0(made)
        # the next update would be blamed for what is not finite here
        with networks.finite.aside(), as_it_is(networks.fake):
            fake = [networks.x0_fake(one.x_t, one.t_B, one.teacher_conditioning) for _, one in made]
        if self.observer:
            real = [self.teachers(one).result(check_finite=False) for _, one in made]  # a picture is black then
            self.observer.show_scores(step, [torch.cat(one).cpu() for one in ([x for x, _ in made], real, fake)])

    def agree(self, step: int) -> bool:
        """What rank 0 sees counts for all, so that all end after the same step.

        Returns:
            Whether the run was asked to leave; `standing.stopped` says whether a collapse or a plateau ends it.
        """
        mine, distill = (None, False), self.config.distill
        if self.observer:
            ends = self.standing.collapse if distill.stop_on_collapse else None
            ends = ends or (self.standing.plateau if distill.stop_on_plateau else None)
            mine = (ends, step < distill.steps and stop_requested(self.stage.path()))
        self.standing.stopped, self._leaves = self.worker.from_rank_0(mine)
        return self._leaves

    def checkpoint_is_due(self, leave: bool) -> bool:
        """Every `checkpoint_every`, at the last step, where the stage ends early, before leaving."""
        step, distill = self.standing.step, self.config.distill
        return step % distill.checkpoint_every == 0 or step == distill.steps or bool(self.standing.stopped) or leave

    def checkpoint(self) -> None:
        """Report the state; a barrier for all workers."""
        self.log.keep()  # before the checkpoint counts these steps as done
        if not self.worker.rank or self.distiller.networks.shared:
            state = self.distiller.state_dict()
        if self.worker.rank:
            return ray.train.report({})
        with scratch(self.stage.path()) as folder:
            about = self.standing.about(self.stage.mlflow_run, self.stage.runs)
            save_state(folder, state, about)
            if isinstance(storage := self.stage.path(), Path):
                require_room(storage, sum(file.stat().st_size for file in folder.iterdir()))
            metrics = {"step": self.standing.step, "score": self.standing.score}
            lease.check(self.stage.path())
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def leave(self) -> None:
        """The checkpoint is written: the driver tells the user."""
        if self.worker.rank == 0:
            acknowledge_stop(self.stage.path(), self.standing.step)

    def note_non_finite(self, error: NonFiniteError) -> None:
        """Name and count what was not finite in the stage's run, whichever worker met it; it ends the stage."""
        if error.elsewhere:
            return  # that worker names what it was
        lease.check(self.stage.path())
        tracker = Tracker(self.stage.mlflow_uri, self.stage.mlflow_run)
        step = self.standing.step + 1
        tracker.tags({"non_finite": f"step {step}, worker {self.worker.rank}: {error}"})
        tracker.metrics({"guard/non_finite": error.count}, step)
        tracker.close()

    def close(self, within_s: float) -> None:
        """Send what waits for MLflow; a run that was asked to leave waits for it `within_s` seconds at most."""
        if self.observer:
            self.observer.close()
        if self.tracker:
            self.tracker.close(within_s if self._leaves else 60.0)
