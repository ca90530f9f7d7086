"""Requests and answers between a client and a teacher, and their errors.

torch is imported inside functions: the coordinator of a replica does without it, and starts faster.

Shapes: B samples, C×H×W latents on the teacher's VAE grid (normalised), L text tokens.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from raydistill.diffusion.guidance import is_guided
from raydistill.errors import InputError, NonFiniteError

if TYPE_CHECKING:
    import torch

CACHED_BYTES = 1 << 20  # of a tensor: this much stays in a core's cache between two reads

Wire = np.ndarray | tuple[str, np.ndarray]
Payload = dict[str, Any]
# ("done", [B, C, H, W] array, Utilisation), or ("rejected", "late" or "broken", why, None)
Answer = tuple[str, Any, Any]


class TeacherError(RuntimeError):
    """The teacher cannot answer this request. Another attempt would not help."""


class NonFiniteScores(NonFiniteError, TeacherError):
    """The teacher answered with NaN or infinity, in `count` samples."""


class TeacherUnavailable(TeacherError):
    """The service was away for longer than `teachers.retry_for_s`."""


class TeacherStartError(TeacherError):
    """The service could not be started, placed, attached to or taken over."""


class ReplicaBroken(RuntimeError):
    """This replica lost a rank, and Serve is about to replace it. Another replica gives the same answer."""


class RequestTooLong(ReplicaBroken):
    """The ranks worked on this request for longer than `teachers.request_timeout_s`. Serve is about to replace the replica."""


def one_line(error: BaseException) -> str:
    """Type and last line of an error, short enough for a log line."""
    lines = str(getattr(error, "cause", error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1][:200] if lines else ''}"


def to_wire(tensor: torch.Tensor) -> Wire:
    """A contiguous CPU array, which Ray sends without a copy. numpy has no bfloat16, so its bits travel as uint16."""
    import torch

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return "bfloat16", tensor.view(torch.uint16).numpy()
    return tensor.numpy()


def rows_from_wire(
    wire: Wire, rows: np.ndarray, dtype: torch.dtype | None = None, memory: Memory | None = None, name: str = ""
) -> torch.Tensor:
    """Some rows of an array from `to_wire`, copied once.

    Args:
        dtype: of the copy, where the values are floating-point; None: as they are.
        memory: the copy goes there, under `name`; None: into new memory.
    """
    import torch

    kind, array = wire if isinstance(wire, tuple) else (None, wire)
    shared = shared_tensor(array)
    if kind is not None:
        shared = shared.view(getattr(torch, kind))
    wanted = dtype if dtype is not None and shared.is_floating_point() else shared.dtype
    copy = (memory or Memory()).tensor(name, (len(rows), *shared.shape[1:]), wanted)
    for i, row in enumerate(rows.tolist()):
        copy[i].copy_(shared[row])
    return copy


def shared_tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor in the array's own memory. Do not write to it: Ray's arrays are read-only, but torch cannot mark a tensor so."""
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*", category=UserWarning)
        return torch.from_numpy(array)


class Memory:
    """Tensors that are used again for every request. New memory pages would cost the kernel more than the copies into them."""

    def __init__(self) -> None:
        self._tensors: dict[str, torch.Tensor] = {}

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The tensor of this name, with arbitrary contents. A new shape or dtype replaces it."""
        import torch

        tensor = self._tensors.get(name)
        if tensor is None or tensor.shape != shape or tensor.dtype != dtype:
            tensor = self._tensors[name] = torch.empty(shape, dtype=dtype)
        return tensor


@dataclass(frozen=True)
class ScoreRequest:
    """One batch of noised latents to score. The answer depends on these fields alone.

    Args:
        x_t: [B, C, H, W] float32.
        t: [B] float32, diffusion time from 0 (data) to 1 (noise).
        conditioning: as `Space.encode_prompts` returns it, [B, …] each.
        unconditional: the same names, one row [1, …] each; None is allowed without guidance.
        guidance_scale: classifier-free guidance; 0 to 1 are none.
    """

    x_t: torch.Tensor
    t: torch.Tensor
    conditioning: dict[str, torch.Tensor]
    unconditional: dict[str, torch.Tensor] | None
    guidance_scale: float

    def payload(self) -> Payload:
        """The request, checked and ready to send. Raises TeacherError with the name of the wrong field."""
        batch = _check_latents("x_t", self.x_t)
        if tuple(self.t.shape) != (batch,):
            raise TeacherError(f"t has shape {tuple(self.t.shape)}, not ({batch},) as x_t has {batch} samples")
        _check_finite("t", self.t)
        if bool((self.t < 0).any() | (self.t > 1).any()):
            raise TeacherError(f"t must lie between 0 and 1, found {self.t.min().item():g} … {self.t.max().item():g}")
        checked = _conditioning_payload(batch, self.conditioning, self.unconditional, self.guidance_scale)
        return {"latents": to_wire(self.x_t.float()), "t": to_wire(self.t.float()), **checked}


@dataclass(frozen=True)
class GenerateRequest:
    """One batch of pictures to sample, from noise to latents [B, C, H, W]. Fields as in ScoreRequest."""

    noise: torch.Tensor
    conditioning: dict[str, torch.Tensor]
    unconditional: dict[str, torch.Tensor] | None
    steps: int
    guidance_scale: float

    def payload(self) -> Payload:
        """The request, checked and ready to send. Raises TeacherError with the name of the wrong field."""
        batch = _check_latents("noise", self.noise)
        if self.steps < 1:
            raise TeacherError(f"steps must be at least 1, not {self.steps}")
        checked = _conditioning_payload(batch, self.conditioning, self.unconditional, self.guidance_scale)
        return {"latents": to_wire(self.noise.float()), "steps": int(self.steps), **checked}


def _conditioning_payload(
    batch: int,
    conditioning: dict[str, torch.Tensor],
    unconditional: dict[str, torch.Tensor] | None,
    guidance_scale: float,
) -> Payload:
    try:
        guided = is_guided(guidance_scale)
    except InputError as error:
        raise TeacherError(str(error)) from None
    for name, value in conditioning.items():
        if value.ndim == 0 or len(value) != batch:
            raise TeacherError(f"conditioning[{name!r}] has shape {tuple(value.shape)}, but there are {batch} samples")
        _check_finite(f"conditioning[{name!r}]", value)
    if guided:
        _check_unconditional(conditioning, unconditional, guidance_scale)
    return {
        "conditioning": {name: to_wire(value) for name, value in conditioning.items()},
        "unconditional": {name: to_wire(unconditional[name]) for name in conditioning} if guided else None,
        "guidance_scale": float(guidance_scale),
    }


def _check_latents(name: str, latents: torch.Tensor) -> int:
    if latents.ndim != 4 or len(latents) == 0:
        raise TeacherError(f"{name} has shape {tuple(latents.shape)}, not [B, C, H, W] with at least one sample")
    _check_finite(name, latents)
    return len(latents)


def _check_unconditional(
    conditioning: dict[str, torch.Tensor], unconditional: dict[str, torch.Tensor] | None, guidance_scale: float
) -> None:
    if unconditional is None or set(unconditional) != set(conditioning):
        found = "nothing" if unconditional is None else sorted(unconditional)
        raise TeacherError(
            f"guidance_scale {guidance_scale:g} needs unconditional rows for {sorted(conditioning)}, found {found}"
        )
    for name, value in unconditional.items():
        expected = (1, *conditioning[name].shape[1:])
        if tuple(value.shape) != expected:
            raise TeacherError(f"unconditional[{name!r}] has shape {tuple(value.shape)}, not {expected}")
        _check_finite(f"unconditional[{name!r}]", value)


def all_finite(value: torch.Tensor) -> bool:
    """Whether a tensor has no NaN and no infinity. These are the floating-point numbers whose exponent bits are all set.

    On the CPU, numpy compares the bits as integers, one piece after the other, without temporary arrays. torch's threads
    would spin for longer than this takes, on cores that a teacher on the same machine needs.
    """
    import torch

    integers = {torch.float32: (torch.int32, 0x7F800000), torch.bfloat16: (torch.int16, 0x7F80)}
    integers |= {torch.float16: (torch.int16, 0x7C00)}
    if value.numel() == 0:
        return True
    if value.device.type != "cpu" or value.dtype not in integers:
        return bool(torch.isfinite(value).all())
    kind, infinity = integers[value.dtype]
    signed = value.detach().contiguous().view(kind).numpy().reshape(-1)
    negative_infinity = infinity + (1 << (8 * signed.itemsize - 1))
    size = CACHED_BYTES // signed.itemsize
    for piece in (signed[start : start + size] for start in range(0, len(signed), size)):
        # As unsigned integers, negative numbers are the largest.
        if piece.max() >= infinity or piece.view(f"u{signed.dtype}").max() >= negative_infinity:
            return False
    return True


def _check_finite(name: str, value: torch.Tensor) -> None:
    import torch

    if value.is_floating_point() and not all_finite(value):
        bad = (~torch.isfinite(value)).reshape(len(value), -1).any(1).nonzero().flatten().tolist()
        raise TeacherError(f"the request itself is not finite: {name} has NaN or infinity in samples {bad[:20]}")
