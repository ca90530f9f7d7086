"""Which checkpoints of a stage count: those that are whole on storage and belong to the run, the highest step first.

Ray Train keeps a list of its own. It is written in place, and after a checkpoint: a kill or a full disk leaves it behind,
damaged or away. So it is written anew from the checkpoints before Ray Train starts. Its format is private to Ray, and known
here alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray.train
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
    _CheckpointManagerState,
    _TrainingResultState,
)

from raydistill.errors import StageFailed
from raydistill.storage.atomic import remove_folder, replace_text
from raydistill.storage.place import Place, Remote, is_link
from raydistill.workers.checkpoint import CheckpointError, about_of, check_state, load_state

KEPT = 2  # whole checkpoints that are kept: one may be damaged later
Runs = Sequence[str | None]  # ids of the run, its own first; None: checkpoints without any. Empty: whatever is there


@dataclass(frozen=True)
class Found:
    """A checkpoint to go on from."""

    place: Place
    state: dict[str, Any]
    about: dict[str, Any]


def checkpoint_folders(folder: Place) -> list[Place]:
    """Folders of checkpoints, whole or not, without links; the folder of the stage's checkpoints may not exist."""
    return [place for place in _named(folder) if place.is_dir() and not is_link(place)]


def _named(folder: Place) -> list[Place]:
    """What bears the name of a checkpoint, whatever it is; Ray Train's list does not."""
    there = [place for place in (folder.iterdir() if folder.exists() else []) if place.name.startswith("checkpoint_")]
    return sorted((place for place in there if place.name != CHECKPOINT_MANAGER_SNAPSHOT_FILENAME), key=str)


def adopt(stage: str, folder: Place, runs: Runs = ()) -> int:
    """Before Ray Train starts: keep the newest checkpoints, delete all others, and write Ray Train's list of them.

    The newest is read whole, which may take minutes. The one before it is read where an older one would be deleted.

    Args:
        stage: for people.
        folder: of the stage's checkpoints; it may not exist.
        runs: whose checkpoints count.

    Returns:
        The step that the workers go on from; 0: there is no checkpoint.

    Raises:
        StageFailed: a checkpoint is of another run, or all are damaged, and it is not a first one that was cut short.
    """
    whole: list[tuple[Place, int]] = []
    links = [place for place in _named(folder) if is_link(place)]
    damaged = [f"{place} is a link, and no checkpoint" for place in links]
    found = _newest_first(folder, damaged)
    for place, about in found:
        try:
            require_ours(place, about, runs)
            if len(whole) < KEPT:
                if not whole or place != found[-1][0]:
                    check_state(place)
                whole.append((place, about["step"]))
        except ForeignCheckpoint as error:
            raise StageFailed(f"{stage}: {error}") from error
        except CheckpointError as error:
            damaged.append(str(error))
    file = folder / CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
    if damaged and not whole and (file.exists() or len(damaged) > 1):
        raise StageFailed(f"{stage}: {'; '.join(damaged)}; none is left. Remove {folder} to begin again")
    for text in damaged:
        print(f"{stage}: {text}; it is deleted", flush=True)
    _write_list(stage, file, whole[::-1])
    for place in (*links, *checkpoint_folders(folder)):
        if place not in [kept for kept, _ in whole]:
            remove_folder(place)
    return whole[0][1] if whole else 0


def _newest_first(folder: Place, damaged: list[str]) -> list[tuple[Place, dict[str, Any]]]:
    """(folder, `about`) of each checkpoint; those that say nothing of themselves are added to `damaged`."""
    found = []
    for place in checkpoint_folders(folder):
        try:
            found.append((place, about_of(place)))
        except CheckpointError as error:
            damaged.append(str(error))
    # an update that was done again after damage has a later name, which is a date
    return sorted(found, key=lambda one: (one[1]["step"], one[0].name), reverse=True)


def mark(runs: Runs) -> dict[str, Any]:
    """What `about` of a checkpoint says of its run."""
    return {"run": runs[0]} if runs else {}


class ForeignCheckpoint(CheckpointError):
    """A checkpoint of another run."""


def require_ours(place: Place, about: dict[str, Any], runs: Runs) -> None:
    """Raises ForeignCheckpoint."""
    if runs and about.get("run") not in runs:
        raise ForeignCheckpoint(
            f"{place} is a checkpoint of another run ({about.get('run') or 'which it does not name'}), and would change this "
            "one's numbers: move it away, or use another run.name"
        )


def _write_list(stage: str, file: Place, whole: list[tuple[Place, int]]) -> None:
    """Ray Train's list of checkpoints, the oldest first. What was wrong with it is said."""
    names = [place.name for place, _ in whole]
    wrong = _what_is_wrong(file, names)
    if wrong is None:
        return
    going_on = f"going on from {names[-1]}, step {whole[-1][1]}" if whole else "beginning anew"
    print(
        f"{stage}: Ray Train's list of checkpoints, {file}, {wrong}: {len(whole) or 'none'} found there; {going_on}",
        flush=True,
    )
    if is_link(file) or file.is_dir():
        remove_folder(file)
    if not whole:
        file.unlink(missing_ok=True)
        return
    results = [_TrainingResultState(checkpoint_dir_name=place.name, metrics={"step": step}) for place, step in whole]
    listed = _CheckpointManagerState(
        checkpoint_results=results,
        checkpoint_report_indices=list(range(len(whole))),
        latest_checkpoint_result=results[-1],
        pending_training_results=[],
        pending_validation_specs=[],
        current_report_index=len(whole),
        validated_checkpoint_dir_names=[],
        timed_out_validation_checkpoint_dir_names=[],
        failed_validation_checkpoint_dir_names=[],
    )
    replace_text(file, listed.json())


def _what_is_wrong(file: Place, names: list[str]) -> str | None:
    """Of the list beside the checkpoints that count; None: it names just these, in this order."""
    if is_link(file):
        return "is a link"
    if file.is_dir():
        return "is a folder"
    if not file.exists():
        return "is missing" if names else None
    try:
        listed = _CheckpointManagerState.parse_obj(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, RecursionError, TypeError):  # of JSON, of text, and of pydantic
        return "was damaged"
    last = listed.latest_checkpoint_result
    sound = (
        [entry.checkpoint_dir_name for entry in listed.checkpoint_results] == names
        and (last.checkpoint_dir_name if last else None) == (names[-1] if names else None)
        and listed.checkpoint_report_indices == sorted(set(listed.checkpoint_report_indices))
        and len(listed.checkpoint_report_indices) == len(names)
        and listed.current_report_index > max(listed.checkpoint_report_indices, default=-1)
        and not (listed.pending_training_results or listed.pending_validation_specs)
        and listed.ray_version == ray.__version__
    )
    return None if sound else "does not name what is on storage"


def delete_unlisted(folder: Place) -> None:
    """At the end of a stage: delete what a worker left that was lost while it wrote."""
    file = folder / CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
    if not file.exists():
        return
    listed = _CheckpointManagerState.parse_obj(json.loads(file.read_text(encoding="utf-8")))
    names = {entry.checkpoint_dir_name for entry in listed.checkpoint_results}
    for place in checkpoint_folders(folder):
        if place.name not in names:
            remove_folder(place)


# -- in a worker ------------------------------------------------------------------------------------------


def newest(stage: str, folder: Place, runs: Runs = ()) -> Found | None:
    """The newest checkpoint that is whole; None: there is none yet. Damage is said on the driver's screen.

    Raises CheckpointError: checkpoints were reported, and all are damaged, or one is of another run.
    """
    damaged: list[str] = []
    for place, _ in _newest_first(folder, damaged):
        try:
            found = load(place, runs)
        except ForeignCheckpoint:
            raise
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        if damaged:
            print(f"{stage}: {'; '.join(damaged)}; going on from {place}, step {found.about['step']}", flush=True)
        return found
    if damaged and ray.train.get_checkpoint() is not None:
        raise CheckpointError(f"{'; '.join(damaged)}; none is left. Remove {folder} to begin again")
    return None


def load(place: Place, runs: Runs = ()) -> Found:
    """Raises CheckpointError: it is damaged, or of another run."""
    state, about = load_state(place)
    require_ours(place, about, runs)
    return Found(place, state, about)


def as_ray_train_names_it(place: Place) -> ray.train.Checkpoint:
    if isinstance(place, Remote):
        return ray.train.Checkpoint(place.key, place.filesystem)
    return ray.train.Checkpoint(str(place))
