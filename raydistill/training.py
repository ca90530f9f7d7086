"""Ray Train as distillation and Bridge training both use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray.train
import torch

from raydistill.distill.state import CheckpointError, load_state

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
