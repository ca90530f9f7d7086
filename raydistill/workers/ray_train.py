"""Ray Train as distillation and Bridge training both use it: the driver's side, and what a worker goes on from."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray.train
import torch

from raydistill.background import in_background, result_of
from raydistill.config.schema import Config
from raydistill.errors import StageFailed
from raydistill.teachers import placement
from raydistill.workers.checkpoint import CheckpointError, check_state, load_state

log = logging.getLogger(__name__)

LONGEST_PAUSE_S = 60.0  # between a lost controller and the next


# -- the driver -------------------------------------------------------------------------------------------


def wait_for_room(config: Config, service: str | None = None, encoders: bool = True) -> None:
    """Wait until there is room for the fewest workers that will do.

    Args:
        service: of teachers that this run starts meanwhile: room for those that are not placed yet is not the workers'.
        encoders: the workers' text encoders need room as well.

    Raises:
        StageFailed: there is still none, and no node can be added; Ray Train would wait for ever.
    """
    distill, prompts, teachers = config.distill, config.prompts, config.teachers

    def needs() -> list[placement.Need]:
        placed = sum(state == "CREATED" for state in placement.groups(service)) if service else teachers.replicas
        ranks = placement.Need(
            "teacher ranks",
            max(0, teachers.replicas - placed) * teachers.shards,
            {"CPU": teachers.cpus_per_rank, "GPU": teachers.gpus_per_rank},
            "teachers.replicas, teachers.cpus_per_rank or teachers.gpus_per_rank",
            teachers.node_labels,
        )
        workers = placement.Need(
            "train workers",
            distill.fewest,
            {"CPU": distill.cpus_per_worker, "GPU": distill.gpus_per_worker},
            "distill.workers (or set distill.min_workers), distill.cpus_per_worker or distill.gpus_per_worker",
            distill.node_labels,
        )
        texts = placement.Need(
            "text encoders",
            distill.fewest * prompts.encoders,
            {"CPU": prompts.cpus_per_encoder, "GPU": prompts.gpus_per_encoder},
            "prompts.encoders, prompts.cpus_per_encoder or prompts.gpus_per_encoder",
            prompts.node_labels,
        )
        return [ranks, workers, *([texts] if encoders else [])]

    placement.wait_for_room(needs)


def fit(
    make: Callable[[], Any],
    stage: str,
    max_failures: int,
    needs: Sequence[Future[Any]] = (),
) -> ray.train.Result:
    """Have Ray Train run the workers; a lost controller is started again, as often as lost workers are.

    Args:
        make: gives the trainer; called again after a loss.
        stage: its name, for people.
        max_failures: of the controller; negative: any number.
        needs: what runs beside it; the first failure there ends the wait, and is raised.

    Raises:
        StageFailed: the workers failed more often than that, or for a reason that a restart cannot mend.
    """
    losses = 0
    while True:
        trainer = make()
        mend_list(stage, trainer.run_config)
        try:
            # in a thread, where Ray Train leaves SIGINT alone: `stopping` has a better handler than its own
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


def mend_list(stage: str, config: ray.train.RunConfig) -> None:
    """Write Ray Train's list of checkpoints anew from those that are there, if it cannot be read.

    Ray Train writes it in place: a full disk or a kill leaves half of it, or nothing, and then no controller starts.
    """
    from pyarrow import fs
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
        _CheckpointManagerState,
        _TrainingResultState,
    )
    from ray.train.v2._internal.execution.storage import StorageContext

    storage = StorageContext(
        config.storage_path, config.name, storage_filesystem=config.storage_filesystem, read_only=True
    )
    system, file = storage.storage_filesystem, storage.checkpoint_manager_snapshot_path
    entries = system.get_file_info(fs.FileSelector(storage.experiment_fs_path, allow_not_found=True))
    there = sorted(
        entry.base_name
        for entry in entries
        if entry.type == fs.FileType.Directory and entry.base_name.startswith("checkpoint_")
    )
    if system.get_file_info(file).type == fs.FileType.NotFound:
        return  # none was reported yet
    with system.open_input_stream(file) as stream:
        content = stream.read()
    try:
        listed = _CheckpointManagerState.parse_obj(json.loads(content))
        if {entry.checkpoint_dir_name for entry in listed.checkpoint_results} <= set(there):
            return
    except ValueError:  # of JSON, of text, and of pydantic
        pass
    whole = []
    for folder in there:
        checkpoint = ray.train.Checkpoint(storage.build_checkpoint_path_from_name(folder), system)
        try:
            with checkpoint.as_directory() as path:
                check_state(Path(path))
            whole.append(_TrainingResultState(checkpoint_dir_name=folder, metrics={}))
        except CheckpointError as error:
            print(f"{stage}: {error}", flush=True)
    said = f"{len(whole)} found there; going on from {whole[-1].checkpoint_dir_name}" if whole else "none found there"
    print(f"{stage}: Ray Train's list of checkpoints, {file}, was damaged: {said}", flush=True)
    if not whole:
        system.delete_file(file)
        return
    listed = _CheckpointManagerState(
        checkpoint_results=whole,
        checkpoint_report_indices=list(range(len(whole))),
        latest_checkpoint_result=whole[-1],
        pending_training_results=[],
        pending_validation_specs=[],
        current_report_index=len(whole),
        validated_checkpoint_dir_names=[],
        timed_out_validation_checkpoint_dir_names=[],
        failed_validation_checkpoint_dir_names=[],
    )
    with system.open_output_stream(file) as stream:
        stream.write(listed.json().encode())


# -- the worker -------------------------------------------------------------------------------------------


def newest_state(stage: str, rank: int, world: int) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(state, about) of the newest checkpoint that is whole, the same one on every worker; None: there is none yet.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    newest = ray.train.get_checkpoint()
    if newest is None:
        return None
    found = _first_whole(stage, newest) if rank == 0 else None
    if world > 1:
        told = [found[0] if found else None]
        torch.distributed.broadcast_object_list(told, src=0)
        found = found or (told[0], _load(told[0]))
    return found[1]


def _first_whole(stage: str, newest: Any) -> tuple[Any, tuple[dict[str, Any], dict[str, Any]]]:
    """The checkpoint to go on from, and what it holds; damage is said on the driver's screen."""
    try:
        return newest, _load(newest)
    except CheckpointError as error:
        damage = [str(error)]
    reported = {entry.checkpoint.path: entry.checkpoint for entry in ray.train.get_all_reported_checkpoints()}
    for path in sorted(reported.keys() - {newest.path}, reverse=True):  # their names are dates
        try:
            loaded = _load(reported[path])
        except CheckpointError as error:
            damage.append(str(error))
            continue
        print(f"{stage}: {'; '.join(damage)}; going on from {path}, step {loaded[1]['step']}", flush=True)
        return reported[path], loaded
    raise CheckpointError(f"{'; '.join(damage)}; none is left. Remove {Path(newest.path).parent} to begin again")


def _load(checkpoint: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    with checkpoint.as_directory() as folder:
        return load_state(Path(folder))
