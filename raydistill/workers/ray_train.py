"""Ray Train as distillation and Bridge training both use it: the driver's side, and the frame of a worker's body."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import CheckpointConfig, CheckpointUploadMode, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from raydistill.background import in_background, result_of
from raydistill.config.schema import Config
from raydistill.errors import OutOfMemory, RunLost, StageFailed
from raydistill.storage.atomic import replace_text
from raydistill.storage.lease import Lease, check, holding, lease_of
from raydistill.storage.place import Place, for_ray_train
from raydistill.teachers import placement
from raydistill.teachers.request import TeacherError, TeacherGone, TeacherUnavailable
from raydistill.tracking.screen import screen
from raydistill.workers.adoption import KEPT, Found, Runs, adopt, as_ray_train_names_it, delete_unlisted, load, newest
from raydistill.workers.checkpoint import CheckpointError
from raydistill.workers.left_out_nodes import LeftOutNodes, name_node
from raydistill.workers.no_progress import ELSEWHERE_FILE, FATAL_FILE, NODES_FILE, NoProgress
from raydistill.workers.waiting import meeting, watch

log = logging.getLogger(__name__)

LONGEST_PAUSE_S = 60.0  # between a lost controller and the next


# -- the driver -------------------------------------------------------------------------------------------


def train(
    body: Callable[[dict[str, Any]], None],
    settings: dict[str, Any],
    config: Config,
    *,
    name: str,
    folder: Place,
    checkpoints: str,
    steps: int,
    progress: str = "progress.json",
    elastic: bool = False,
    service: str | None = None,
    encoders: bool = True,
    beside: Sequence[placement.Need] = (),
    needs: Sequence[Future[Any]] = (),
) -> ray.train.Result:
    """Have the workers of the `distill` section run `body(settings)`, from the last checkpoint to the end.

    Args:
        settings: of the stage. Its `runs` say whose checkpoints count; this adds `lease`, under which workers write.
        name: of the stage, for people.
        folder: of the stage, on storage that every node sees.
        checkpoints: name of its folder of checkpoints.
        steps: of the whole stage.
        progress: name of its file of progress, in which steps are seen to be done.
        elastic: between `distill.min_workers` and `distill.workers` of them; else as many as there are at any time.
        service, encoders, beside: as in `wait_for_room`.
        needs: what runs beside it; the first failure there ends the wait, and is raised.

    Raises:
        StageFailed: the workers failed more often than `distill.max_failures`, `distill.max_failures_without_progress`
            times in a row in the same place, or for a reason that a restart cannot mend.
        RunLost: another job has taken the run over.
    """
    folder.mkdir(parents=True, exist_ok=True)
    forget_fatal_error(folder)
    wait_for_room(config, service, encoders, beside)
    distill = config.distill
    workers: Any = distill.fewest
    settings = settings | {"lease": lease_of(folder)}
    if elastic:
        workers = distill.workers if distill.min_workers is None else (distill.min_workers, distill.workers)

    limit = distill.max_failures_without_progress
    nodes = LeftOutNodes(distill.max_failures_of_node, worker_need(config))
    watch = NoProgress(name, str(folder), progress, limit, settings["lease"], nodes)

    def trainer() -> TorchTrainer:
        resources = {"CPU": distill.cpus_per_worker}
        resources |= {"GPU": distill.gpus_per_worker} if distill.gpus_per_worker else {}
        return TorchTrainer(
            body,
            train_loop_config=settings,
            torch_config=TorchConfig(timeout_s=max(1, round(distill.collective_timeout_s))),
            scaling_config=ScalingConfig(
                num_workers=workers,
                elastic_resize_monitor_interval_s=distill.resize_after_s,
                use_gpu=distill.gpus_per_worker > 0,
                resources_per_worker=resources,
                label_selector=distill.node_labels or None,
            ),
            run_config=RunConfig(
                name=checkpoints,
                **for_ray_train(folder),
                worker_runtime_env=network_environment(config),
                logging_config=LoggingConfig(log_level="WARNING"),
                failure_config=FailureConfig(max_failures=distill.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=KEPT),
                callbacks=[watch, watch.nodes],
            ),
        )

    runs = settings.get("runs", ())

    def in_order() -> None:
        resume(name, folder / checkpoints, runs, steps)

    try:
        result = fit(trainer, name, distill.max_failures, needs, in_order)
    except StageFailed:
        check(folder)  # workers of a lost run may fail by each other's leaving
        raise
    check(folder)  # whose workers have left early
    if (reason := fatal_error(folder)) is not None:
        raise StageFailed(f"{name}: {reason}")
    delete_unlisted(folder / checkpoints)
    return result


def network_variables(config: Config) -> dict[str, str]:
    """Of the environment of all that meet, so that NCCL and gloo take the interface that is asked for."""
    interface = config.distill.network_interface
    return dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), interface) if interface else {}


def network_environment(config: Config) -> dict[str, Any]:
    """What workers are started with."""
    variables = network_variables(config)
    return {"env_vars": variables} if variables else {}


def resume(stage: str, folder: Place, runs: Runs, steps: int) -> None:
    """Put the checkpoints in order, and say where the stage goes on. Arguments and errors as in `adopt`."""
    if step := adopt(stage, folder, runs):
        screen.say(f"{screen.numbered(stage)}: resumes at update {step} of {steps}")


def wait_for_room(
    config: Config, service: str | None = None, encoders: bool = True, beside: Sequence[placement.Need] = ()
) -> None:
    """Wait until there is room for the fewest workers that will do.

    Args:
        service: of teachers that this run starts meanwhile: room for those that are not placed yet is not the workers'.
        encoders: the workers' text encoders need room as well.
        beside: what else does.

    Raises:
        StageFailed: there is still none, and no node can be added; Ray Train would wait for ever.
    """

    def needs() -> list[placement.Need]:
        replicas = config.teachers.replicas
        placed = sum(state == "CREATED" for state in placement.groups(service)) if service else replicas
        texts = [encoder_need(config)] if encoders else []
        return [rank_need(config, max(0, replicas - placed)), worker_need(config), *texts, *beside]

    placement.wait_for_room(needs)


def rank_need(config: Config, replicas: int) -> placement.Need:
    """The ranks of so many replicas."""
    teachers = config.teachers
    return placement.Need(
        "teacher ranks",
        replicas * teachers.shards,
        {"CPU": teachers.cpus_per_rank, "GPU": teachers.gpus_per_rank},
        "teachers.replicas, teachers.cpus_per_rank or teachers.gpus_per_rank",
        teachers.node_labels,
    )


def worker_need(config: Config) -> placement.Need:
    """The fewest workers that will do."""
    distill = config.distill
    return placement.Need(
        "train workers",
        distill.fewest,
        {"CPU": distill.cpus_per_worker, "GPU": distill.gpus_per_worker},
        "distill.workers (or set distill.min_workers), distill.cpus_per_worker or distill.gpus_per_worker",
        distill.node_labels,
    )


def encoder_need(config: Config) -> placement.Need:
    """The text encoders of these workers."""
    prompts = config.prompts
    return placement.Need(
        "text encoders",
        config.distill.fewest * prompts.encoders,
        {"CPU": prompts.cpus_per_encoder, "GPU": prompts.gpus_per_encoder},
        "prompts.encoders, prompts.cpus_per_encoder or prompts.gpus_per_encoder",
        prompts.node_labels,
    )


def fit(
    make: Callable[[], Any],
    stage: str,
    max_failures: int,
    needs: Sequence[Future[Any]] = (),
    before: Callable[[], None] = lambda: None,
) -> ray.train.Result:
    """Have Ray Train run the workers. A lost controller is started again, as often as lost workers are.

    Args:
        make: gives the trainer; called again after a loss.
        max_failures: of the controller; negative: any number.
        stage, needs: as in `train`, and so are the errors.
        before: called before each start of the controller, when none lives.
    """
    losses = 0
    while True:
        before()
        trainer = make()
        try:
            # in a thread, where Ray Train leaves SIGINT alone: `stop_signal` has a better handler than its own
            return result_of(in_background(trainer.fit), needs)
        except ray.train.TrainingFailedError as error:
            reasons = getattr(error, "worker_failures", None) or {"": error}
            raise StageFailed(
                f"{stage}: {'; '.join(sorted({_last_line(reason) for reason in reasons.values()}))}"
            ) from error
        except ray.exceptions.RayActorError as error:
            for need in needs:
                if need.done():
                    need.result()  # which raises, if it was this one's
            if error.actor_init_failed:
                raise StageFailed(f"{stage}: Ray Train's controller cannot start: {_last_line(error)}") from error
            losses += 1
            if losses > max_failures >= 0:
                raise StageFailed(f"{stage}: Ray Train's controller died {losses} times") from error
            pause = min(2.0 ** (losses - 1), LONGEST_PAUSE_S)
            log.warning("%s: Ray Train's controller died; going on from the last checkpoint in %.0f s", stage, pause)
            time.sleep(pause)


def _last_line(error: object) -> str:
    return str(error).strip().splitlines()[-1]


# -- the worker -------------------------------------------------------------------------------------------


def run_body(folder: Place, name: str, body: Callable[[], None], lease: Lease | None = None) -> None:
    """A worker's body. An error that would happen again after a restart is written down for the driver.

    The restarted workers then end at once. Why a worker fails is shown on the driver's screen: Ray Train starts it
    again without a word. Nothing is written without the lease: its driver may be frozen, and the run another's. Then the
    worker says so and ends as if it had done its work, or it would be started again for ever.

    Raises:
        RunLost: there are other workers, which may wait for this one. Ray Train ends them, and started again, all leave.
    """
    begun = False
    with holding(lease):
        try:
            check(folder)
            begun = True
            if fatal_error(folder) is None:
                _say_of_nodes(folder, name)
                _run(folder, name, body)
        except RunLost as lost:
            if begun and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
                raise
            print(f"{name}: {lost}", flush=True)


def _say_of_nodes(folder: Place, name: str) -> None:
    """What Ray Train's controller, whose lines nobody sees, has to say of nodes."""
    if (folder / NODES_FILE).is_file():
        print(f"{name}: {(folder / NODES_FILE).read_bytes().decode(errors='replace')}", flush=True)


def _run(folder: Place, name: str, body: Callable[[], None]) -> None:
    with recording_fatal_errors(folder):
        try:
            body()
        except RunLost:
            raise
        except Exception as error:
            with contextlib.suppress(OSError):
                check(folder)  # then nothing has failed
            print(f"{name}: a worker failed: {type(error).__name__}: {error}", flush=True)
            name_node(error)
            raise


@dataclass(frozen=True)
class Worker:
    """This worker among all."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def current(cls, config: Config) -> Worker:
        context = ray.train.get_context()
        device = get_device() if config.distill.gpus_per_worker else torch.device("cpu")
        own = cls(context.get_world_rank(), context.get_world_size(), device)
        if own.world > 1:
            watch("workers", own.rank, own.world, config.distill.collective_timeout_s)
        return own

    def from_all(self, value: Any) -> list[Any]:
        """What every worker gives, by rank, on every worker."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        with meeting(self.rank, self.world):
            torch.distributed.all_gather_object(values, value)
        return values

    def from_rank_0(self, value: Any) -> Any:
        """What rank 0 gives, on every worker."""
        if self.world == 1:
            return value
        values = [value]
        with meeting(self.rank, self.world):
            torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    def average(self, tensors: list[torch.Tensor]) -> None:
        """Mean over all workers, in place, by one flat all-reduce."""
        flat = torch._utils._flatten_dense_tensors(tensors)
        with meeting(self.rank, self.world):
            torch.distributed.all_reduce(flat)
        flat /= self.world
        for tensor, mean in zip(tensors, torch._utils._unflatten_dense_tensors(flat, tensors), strict=True):
            tensor.copy_(mean)

    def mesh(self) -> DeviceMesh:
        """All workers in a row."""
        return init_device_mesh(self.device.type, (self.world,))


def newest_state(name: str, worker: Worker, folder: Place, runs: Runs = ()) -> Found | None:
    """The newest checkpoint that is whole on storage, the same one on every worker; None: there is none yet.

    Ray Train may not know it: a worker can be lost between writing a checkpoint and reporting it. Then it is reported now.

    Raises CheckpointError: checkpoints were reported, and all are damaged, or one is of another run.
    """
    found = newest(name, folder, runs) if worker.rank == 0 else None
    place, unknown = worker.from_rank_0((found.place, _is_unknown(found.place)) if found else (None, False))
    if place is None:
        return None
    if unknown:
        own = as_ray_train_names_it(place) if worker.rank == 0 else None
        ray.train.report({}, checkpoint=own, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)
    return found or load(place, runs)


def _is_unknown(place: Place) -> bool:
    """Whether Ray Train's controller does not know this checkpoint."""
    last = ray.train.get_checkpoint()
    if last is not None and Path(last.path).name == place.name:
        return False
    known = (entry.checkpoint.path for entry in ray.train.get_all_reported_checkpoints())
    return place.name not in {Path(path).name for path in known}


# -- errors that a restart would meet again: workers write them down, so that Ray Train does not repeat them forever -----


def is_fatal(error: BaseException) -> bool:
    """Whether the same inputs would fail again.

    Wrong input, numbers that are not finite and a GPU that is too small would; lost processes, nodes, files and services
    may come back.
    """
    if isinstance(error, TeacherUnavailable):
        return isinstance(error, TeacherGone)
    lasting = (
        ValueError,
        TypeError,
        ArithmeticError,
        LookupError,
        torch.OutOfMemoryError,
        OutOfMemory,
        CheckpointError,
        TeacherError,
    )
    return isinstance(error, lasting)


@contextmanager
def recording_fatal_errors(folder: Place) -> Iterator[None]:
    """Around a worker's body: a lasting error is raised, and kept in the folder for the driver and for restarts.

    Where several workers meet one value, the name of the worker whose it was counts, whoever writes last.
    """
    try:
        yield
    except Exception as error:
        if is_fatal(error):
            file = ELSEWHERE_FILE if getattr(error, "elsewhere", False) else FATAL_FILE
            replace_text(folder / file, f"{type(error).__name__}: {error}")
        raise


def fatal_error(folder: Place) -> str | None:
    """The lasting error of an earlier attempt, if there was one."""
    files = (folder / name for name in (FATAL_FILE, ELSEWHERE_FILE))
    return next((file.read_bytes().decode(errors="replace") for file in files if file.is_file()), None)


def forget_fatal_error(folder: Place) -> None:
    """Whoever starts again has mended it."""
    for name in (FATAL_FILE, ELSEWHERE_FILE, NODES_FILE):
        (folder / name).unlink(missing_ok=True)
