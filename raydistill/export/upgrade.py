"""From student latents to pictures: by the student's own VAE, or through the Bridge at the teacher's size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from raydistill.bridge.model import Bridge, check_pair
from raydistill.config.networks import BridgeConfig
from raydistill.errors import InputError
from raydistill.export.source import Export
from raydistill.export.tensors import first_difference
from raydistill.spaces import load_space, load_student_space
from raydistill.spaces.base import Space
from raydistill.storage.resolve import resolve


@dataclass(frozen=True)
class Upgrade:
    """What takes student latents to pictures of the teacher's size; checked, nothing loaded."""

    bridge: Path
    base: Space  # the student model that the Bridge was trained with: its decoder is the Bridge's first part
    teacher: Space


def find_upgrade(export: Export, bridge: str | None, teacher: str | None, base: str | None) -> Upgrade:
    """The Bridge, teacher and base model as named, or as the run was configured that made the export.

    Args:
        export: the student.
        bridge: a trained Bridge's folder; None: the run's.
        teacher: a diffusers folder, or a hub model in the cache; None: the run's.
        base: the student model that the Bridge was trained with; None: the run's, without a run the export itself.

    Raises:
        InputError: something is neither named nor known, a model is not there, or the VAEs do not belong together.
    """
    config = export.run_config()
    if config is not None:
        if bridge is None and config.bridge.projector == "identity":
            raise InputError(f"{export.name}: its run has the identity Bridge, so there is no larger size to go to")
        bridge = bridge or _bridge_of(export.run, config.bridge)
        teacher, base = teacher or config.teacher.model, base or config.student.model
    missing = [option for option, value in (("--bridge", bridge), ("--teacher", teacher)) if value is None]
    if missing:
        raise InputError(
            f"{export.folder} does not lie in a run's folder that tells its Bridge and teacher: name {' and '.join(missing)}"
        )
    teacher_space = load_space(_existing(teacher, "--teacher"))
    base_space = load_student_space(_existing(base or str(export.folder), "--base"))
    folder = _existing(bridge, "--bridge")
    try:
        check_pair(folder, base_space, teacher_space)
    except InputError as error:
        hint = "" if base else ". An export's VAE may be a half-precision copy: name the original model with --base"
        raise InputError(f"{error}{hint}") from None
    if base is not None:
        difference = first_difference(base_space, load_space(export.folder), "vae")
        if difference is not None:
            raise InputError(f"{export.folder}: its VAE is not that of {base_space.folder}: {difference}")
    return Upgrade(folder, base_space, teacher_space)


def _bridge_of(run: Path, config: BridgeConfig) -> str:
    """Where a run has its Bridge: trained along with the student, as it was given, or trained at first."""
    if config.trainable:
        return str(run / "distill" / "bridge")
    return config.checkpoint or str(run / "bridge")


def _existing(name: str, option: str) -> Path:
    path = resolve(name)
    if not path.exists():
        raise InputError(f"{option}: {name} does not exist")
    return path


class Decoder:
    """Student latents -> pictures: the student's own VAE, or the Bridge and the teacher's VAE."""

    def __init__(self, space: Space, upgrade: Upgrade | None, device: torch.device, dtype: torch.dtype) -> None:
        self.bridge: nn.Module | None = None
        self.space = space
        if upgrade is not None:
            self.space = upgrade.teacher
            self.bridge = Bridge.load(upgrade.bridge, upgrade.base, upgrade.teacher).to(device)
        self.vae = self.space.load_vae(dtype).to(device)

    def __call__(self, z_student: torch.Tensor) -> torch.Tensor:
        """[B, C, h, w] float32, normalised -> [B, 3, S, S] in [-1, 1]. The Bridge computes in float32."""
        return self.space.decode(self.vae, z_student if self.bridge is None else self.bridge(z_student))
