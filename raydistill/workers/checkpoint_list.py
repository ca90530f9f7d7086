"""Ray Train's list of checkpoints, where it was damaged. Its format is private to Ray: read and written here alone."""

from __future__ import annotations

import json
from pathlib import Path

import ray.train
from pyarrow import fs
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
    _CheckpointManagerState,
    _TrainingResultState,
)
from ray.train.v2._internal.execution.storage import StorageContext

from raydistill.workers.checkpoint import CheckpointError, check_state


def mend_list(stage: str, config: ray.train.RunConfig) -> None:
    """Write Ray Train's list of checkpoints anew from those that are there, if it cannot be read.

    Ray Train writes it in place: a full disk or a kill leaves half of it, or nothing, and then no controller starts.
    """
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
