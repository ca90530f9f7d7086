"""The Bridge B(z_S) = g(D_S^(n)(z_S)): frozen first blocks of the student's decoder, then a trained projector.

The teacher's grid may be finer than the student's, equal or coarser, in any ratio (`reach`).

Shapes: z_S [B, Cs, h, w] and ẑ_T [B, Ct, H, W], both normalised latents on the VAE grids.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from raydistill.bridge.projectors import MlpProjector, UNetProjector
from raydistill.bridge.resampling import power_of_two
from raydistill.bridge.swinir import SwinIR
from raydistill.config.networks import BridgeConfig
from raydistill.errors import InputError
from raydistill.spaces import load_space
from raydistill.spaces.base import Space
from raydistill.spaces.loaded import has_vae, vae_fingerprint
from raydistill.storage.atomic import replacing
from raydistill.storage.resolve import resolve

WEIGHTS_FILE, DESCRIPTION_FILE = "projector.safetensors", "bridge.json"
SIDES, SIDE_KEYS = ("student", "teacher"), ("family", "model", "latent_shape", "vae_sha256")  # of bridge.json
ARCHITECTURE_KEYS = ("projector", "prior", "embed_dim", "depths", "heads", "window")


class Reach(NamedTuple):
    """How a Bridge gets from the student's grid to the teacher's: side_T = scale · 2^blocks · side_S.

    Attributes:
        blocks: n, up-sampling blocks of the prior.
        scale: what is left to the projector; with a prior, 1 where a power of two joins the grids, and below 1 where the
            teacher's grid is coarser than all that the prior has.
    """

    blocks: int
    scale: Fraction


def reach(student: Space, teacher: Space, prior: bool) -> Reach:
    """The fewest blocks that reach the teacher's grid, or all that the student's decoder has.

    Raises:
        InputError: rows and columns are not in one ratio.
    """
    (_, h, w), (_, H, W) = student.latent_shape, teacher.latent_shape
    ratio = Fraction(H, h)
    if ratio != Fraction(W, w):
        raise InputError(
            f"teacher latents ({H}x{W}, {teacher.folder}) must be in one ratio to the student's "
            f"({h}x{w}, {student.folder}) on both sides"
        )
    blocks = 0
    if prior:
        blocks = min(max(power_of_two(ratio), 0), len(student.decoder_widths) - 1)
    return Reach(blocks, ratio / 2**blocks)


class SpatialPrior(nn.Module):
    """D_S^(n): denormalise, then the student's decoder up to its middle and n doublings (`Space.decoder_prefix`).

    Of an AutoencoderKL: post_quant_conv -> conv_in -> mid_block -> up_blocks[:n].
    Frozen and always in evaluation mode; gradients flow through it to its input.

    Raises:
        InputError: the decoder has fewer than n up-sampling blocks.
    """

    def __init__(self, space: Space, vae: nn.Module, n: int) -> None:
        super().__init__()
        most = len(space.decoder_widths) - 1
        if n > most:
            raise InputError(f"{space.folder}: its decoder doubles {most} times, but {n} are needed")
        self.space, self.doublings, self.out_channels = space, n, space.decoder_widths[n]
        self.steps = nn.ModuleList(space.decoder_prefix(vae, n))
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> SpatialPrior:
        """Stay in evaluation mode whatever the surrounding module does."""
        return super().train(False)

    def forward(self, z_student: torch.Tensor) -> torch.Tensor:
        x = self.space.denormalise(z_student)
        for step in self.steps:
            x = step(x)
        return x


def _projector(architecture: BridgeConfig, in_channels: int, out_channels: int, scale: Fraction) -> nn.Module:
    a = architecture
    try:
        if a.projector == "unet":
            return UNetProjector(in_channels, out_channels, a.embed_dim, scale)
        if a.projector == "mlp":
            return MlpProjector(in_channels, out_channels, a.embed_dim, scale)
        window = {"depths": a.depths, "heads": a.heads, "window": a.window}
        return SwinIR(in_channels, out_channels, embed_dim=a.embed_dim, scale=scale, **window)
    except ValueError as error:
        raise InputError(f"bridge: {error}") from None


def projector_parameters(student: Space, teacher: Space, architecture: BridgeConfig) -> int:
    """Trainable parameters of a Bridge, without making it. Raises InputError as `Bridge.create`."""
    n, scale = reach(student, teacher, architecture.prior)
    in_channels = student.decoder_widths[n] if architecture.prior else student.latent_shape[0]
    with torch.device("meta"):
        projector = _projector(architecture, in_channels, teacher.latent_shape[0], scale)
    return sum(p.numel() for p in projector.parameters())


class Bridge(nn.Module):
    """From the student's latent space to the teacher's. Build with `create` or `load`."""

    def __init__(
        self,
        student: Space,
        teacher: Space,
        architecture: BridgeConfig,
        prior: SpatialPrior | None,
        projector: nn.Module,
    ) -> None:
        super().__init__()
        self.student, self.teacher, self.architecture = student, teacher, architecture
        self.prior, self.projector = prior, projector

    @classmethod
    def create(cls, student_space: Space, teacher_space: Space, architecture: BridgeConfig) -> Bridge:
        """A Bridge with fresh projector weights (from torch's global random state).

        Args:
            student_space, teacher_space: the pair; the grids decide how many decoder blocks the prior takes.
            architecture: the `bridge` section of the configuration.

        Raises:
            InputError: the grids or the identity projector do not fit the pair.
        """
        n, scale = reach(student_space, teacher_space, architecture.prior)
        c_student, c_teacher = student_space.latent_shape[0], teacher_space.latent_shape[0]
        if architecture.projector == "identity":
            if student_space.latent_shape != teacher_space.latent_shape:
                raise InputError(
                    f"bridge.projector identity needs equal latent shapes, not {student_space.latent_shape} "
                    f"({student_space.folder}) and {teacher_space.latent_shape} ({teacher_space.folder})"
                )
            return cls(student_space, teacher_space, architecture, None, nn.Identity())
        if architecture.prior:
            prior = SpatialPrior(student_space, student_space.load_vae(), n)
            projector = _projector(architecture, prior.out_channels, c_teacher, scale)
        else:
            prior, projector = None, _projector(architecture, c_student, c_teacher, scale)
        return cls(student_space, teacher_space, architecture, prior, projector)

    def forward(self, z_student: torch.Tensor) -> torch.Tensor:
        """Student latents [B, Cs, h, w] -> teacher latents [B, Ct, H, W], both normalised.

        Raises:
            ValueError: not latents of the student's space.
        """
        if z_student.ndim != 4 or z_student.shape[1] != self.student.latent_shape[0]:
            raise ValueError(f"latents must be [B, {self.student.latent_shape[0]}, h, w], not {list(z_student.shape)}")
        return self.projector(z_student if self.prior is None else self.prior(z_student))

    def __repr__(self) -> str:
        trained = sum(parameter.numel() for parameter in self.trainable_parameters())
        prior = "no prior" if self.prior is None else "the student decoder's first blocks as prior"
        return (
            f"Bridge({Path(self.student.folder).name} -> {Path(self.teacher.folder).name}: "
            f"{self.architecture.projector} of {trained:,} parameters, {prior})"
        )

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The projector's; none for the identity."""
        return list(self.projector.parameters())

    # -- files -------------------------------------------------------------------------------------
    def description(
        self, metrics: dict[str, float] | None = None, pictures: Sequence[tuple[str, str | None]] = ()
    ) -> dict[str, Any]:
        """What bridge.json says."""
        architecture = {key: getattr(self.architecture, key) for key in ARCHITECTURE_KEYS}
        sides = {
            role: {
                "family": space.pipeline_class,
                "model": Path(space.folder).name,
                "latent_shape": list(space.latent_shape),
                "vae_sha256": vae_fingerprint(space),
            }
            for role, space in (("student", self.student), ("teacher", self.teacher))
        }
        sets = [{"source": source, "licence": licence} for source, licence in pictures]
        return {"architecture": architecture, **sides, "metrics": metrics or {}} | ({"pictures": sets} if sets else {})

    def save(
        self,
        folder: str | Path,
        metrics: dict[str, float] | None = None,
        dtype: torch.dtype = torch.float32,
        pictures: Sequence[tuple[str, str | None]] = (),
    ) -> Path:
        """Write the projector (the prior is the student's own) and bridge.json; an existing Bridge is replaced.

        Args:
            folder: appears only when complete.
            metrics: measured quality, kept in bridge.json.
            dtype: of the stored weights (float16 halves the file).
            pictures: (source, licence) of real pictures that it was trained on, for the cards of its students.
        """
        folder = Path(folder)
        with replacing(folder) as fresh:
            fresh.mkdir()
            weights = {k: v.detach().to("cpu", dtype).contiguous() for k, v in self.projector.state_dict().items()}
            save_file(weights, fresh / WEIGHTS_FILE)
            (fresh / DESCRIPTION_FILE).write_text(json.dumps(self.description(metrics, pictures), indent=2) + "\n")
        return folder

    @classmethod
    def load(cls, folder: str | Path, student: Space | str | Path, teacher: Space | str | Path) -> Bridge:
        """A saved Bridge, frozen and in evaluation mode.

        Args:
            folder: a path, `shapes:bridge/NAME`, or a URI.
            student, teacher: the pair, as Spaces or as `load_space` takes them.

        Raises:
            InputError: the folder is no Bridge, or belongs to another pair of VAEs.
        """
        folder = resolve(str(folder))
        student_space, teacher_space = (
            side if isinstance(side, Space) else load_space(side) for side in (student, teacher)
        )
        saved = check_pair(folder, student_space, teacher_space)
        bridge = cls.create(student_space, teacher_space, BridgeConfig(**saved["architecture"]))
        try:
            bridge.projector.load_state_dict(load_file(Path(folder, WEIGHTS_FILE)))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise InputError(f"{folder}: {WEIGHTS_FILE} is missing or damaged: {error}") from None
        return bridge.eval().requires_grad_(False)


def read_description(folder: str | Path) -> dict[str, Any]:
    """bridge.json of a saved Bridge. Raises InputError where it is missing or incomplete."""
    file = Path(folder, DESCRIPTION_FILE)
    try:
        saved = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: not a saved Bridge ({DESCRIPTION_FILE}: {error})") from None
    if not isinstance(saved, dict):
        raise InputError(f"{file}: holds no JSON object")
    missing = [key for key in ("architecture", *SIDES) if not isinstance(saved.get(key), dict)]
    keys = {"architecture": ARCHITECTURE_KEYS} | dict.fromkeys(SIDES, SIDE_KEYS)
    missing += [f"{name}.{key}" for name in keys if name not in missing for key in keys[name] if key not in saved[name]]
    if missing:
        raise InputError(f"{file}: lacks {', '.join(missing)}")
    try:
        BridgeConfig(**saved["architecture"])
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise InputError(f"{file}: architecture: {wrong}") from None
    return saved


def check_pair(folder: str | Path, student_space: Space, teacher_space: Space) -> dict[str, Any]:
    """bridge.json of a Bridge that belongs to these two VAEs. Raises InputError otherwise; loads no weights."""
    saved = read_description(folder)
    for role, space in (("student", student_space), ("teacher", teacher_space)):
        side = saved[role]
        if not has_vae(space, side["vae_sha256"]):
            raise InputError(
                f"{folder}: this Bridge was trained for another {role} VAE ({side['family']} {side['model']}, sha256 "
                f"{side['vae_sha256'][:12]}…); the VAE of {space.folder} is {vae_fingerprint(space)[:12]}…. Train a Bridge for this pair "
                "with jobs/train_bridge.py, or name the matching one in bridge.checkpoint"
            )
        if list(space.latent_shape) != side["latent_shape"]:
            raise InputError(
                f"{folder}: this Bridge was trained for {role} latents {side['latent_shape']}, "
                f"but {space.folder} has {list(space.latent_shape)}"
            )
    return saved
