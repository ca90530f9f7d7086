"""Requests and answers between a client and a teacher, and their errors.

torch is imported inside functions: the coordinator of a replica does without it, and starts faster.

Shapes: B samples, C×H×W latents on the teacher's VAE grid (normalised), L text tokens.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from raydistill.diffusion.guidance import is_guided
from raydistill.errors import InputError, NonFiniteError

if TYPE_CHECKING:
    import torch

MOST_STEPS = 10_000  # of a sample
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


class TeacherGone(TeacherUnavailable):
    """The service was taken down. It does not come back by itself; the driver starts it when the run goes on."""


class TeacherStartError(TeacherError):
    """The service could not be started, placed, attached to or taken over."""


class ReplicaBroken(RuntimeError):
    """This replica lost a rank, and Serve is about to replace it. Another replica gives the same answer."""


class RankBroken(RuntimeError):
    """The device of a rank failed, and its process is of no use any more. The request is not at fault."""


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
        guidance_rescale: share of the guided prediction that gets the conditional one's spread, 0 to 1.
    """

    x_t: torch.Tensor
    t: torch.Tensor
    conditioning: dict[str, torch.Tensor]
    unconditional: dict[str, torch.Tensor] | None
    guidance_scale: float
    guidance_rescale: float = 0.0

    def payload(self) -> Payload:
        """The request, checked and ready to send. Raises TeacherError with the name of the wrong field."""
        payload = {"latents": _wire("x_t", self.x_t, True), "t": _wire("t", self.t, True)} | _conditioned(self)
        if self.guidance_rescale:
            payload["guidance_rescale"] = self.guidance_rescale
        check_payload(payload, latents="x_t")
        _check_request_finite(self, "x_t")
        return payload


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
        payload = {"latents": _wire("noise", self.noise, True), "steps": self.steps} | _conditioned(self)
        check_payload(payload, latents="noise")
        _check_request_finite(self, "noise")
        return payload


def _conditioned(request: ScoreRequest | GenerateRequest) -> Payload:
    """The fields that both kinds have, on their way. Without guidance nothing unconditional travels."""
    guided = _guided(request.guidance_scale)
    return {
        "conditioning": _wires("conditioning", request.conditioning),
        "unconditional": _wires("unconditional", request.unconditional) if guided else None,
        "guidance_scale": float(request.guidance_scale),
    }


def _wires(field: str, values: Any) -> Any:
    """Tensors by name on their way; what is no dict is left to `check_payload`."""
    if not isinstance(values, dict):
        return values
    return {name: _wire(f"{field}[{name!r}]", value) for name, value in values.items()}


def _wire(name: str, value: Any, float32: bool = False) -> Wire:
    import torch

    if not isinstance(value, torch.Tensor) or value.is_complex():
        raise TeacherError(f"{name} must be a tensor of real numbers, not {type(value).__name__}")
    try:
        return to_wire(value.float() if float32 else value)
    except (torch.AcceleratorError, torch.OutOfMemoryError):  # of the device, and not of the request
        raise
    except (TypeError, RuntimeError) as error:  # no numbers, not dense, or of a type that numpy lacks
        kind = f"{value.dtype}, {value.layout}, on {value.device.type}"
        raise TeacherError(f"{name} must be a dense tensor of a type that numpy has, not {kind}") from error


def check_payload(payload: Any, latents: str = "latents") -> None:
    """Refuse what no teacher can work on. The client checks, and so does every rank, whoever the sender is.

    All ranks find the same before any of them begins: ranks that failed at different places would wait for each other.

    Args:
        payload: of a ScoreRequest, which has `t`, or of a GenerateRequest, which has `steps`.
        latents: what the sender calls them.

    Raises:
        TeacherError: names the wrong field.
    """
    if not isinstance(payload, dict):
        raise TeacherError(f"a request is a dict of arrays, not {type(payload).__name__}")
    fields = {"latents", "conditioning", "unconditional", "guidance_scale", "steps" if "steps" in payload else "t"}
    if "t" in fields and "guidance_rescale" in payload:
        fields.add("guidance_rescale")
        _check_number("guidance_rescale", payload["guidance_rescale"])
        if not 0 <= payload["guidance_rescale"] <= 1:
            raise TeacherError(f"guidance_rescale must be 0 to 1, not {_shown(payload['guidance_rescale'])}")
    if fields != payload.keys():
        raise TeacherError(
            f"a request has {', '.join(sorted(fields))}, and not {', '.join(map(str, payload)) or 'nothing'}"
        )
    shape = _shape(latents, payload["latents"], "f")
    if len(shape) != 4 or 0 in shape:
        raise TeacherError(f"{latents} has shape {shape}, not [B, C, H, W] with at least one of each")
    if "steps" in payload:
        _check_number("steps", payload["steps"])
        if payload["steps"] != int(payload["steps"]) or not 1 <= payload["steps"] <= MOST_STEPS:
            raise TeacherError(f"steps must be at least 1 and at most {MOST_STEPS}, not {_shown(payload['steps'])}")
    else:
        _check_times(payload["t"], shape[0], latents)
    _check_conditioning(payload, shape[0])


def _check_times(t: Any, batch: int, latents: str) -> None:
    shape = _shape("t", t, "f")
    if shape != (batch,):
        raise TeacherError(f"t has shape {shape}, not ({batch},) as {latents} has {batch} samples")
    if not np.isfinite(t).all():
        bad = np.flatnonzero(~np.isfinite(t)).tolist()
        raise TeacherError(f"the request itself is not finite: t has NaN or infinity in samples {bad[:20]}")
    if t.min() < 0 or t.max() > 1:
        raise TeacherError(f"t must lie between 0 and 1, found {t.min():g} … {t.max():g}")


def _check_conditioning(payload: Payload, batch: int) -> None:
    conditioning, unconditional, scale = (payload[key] for key in ("conditioning", "unconditional", "guidance_scale"))
    guided = _guided(scale)
    if not isinstance(conditioning, dict) or not all(isinstance(name, str) for name in conditioning):
        raise TeacherError(f"conditioning must be a dict of tensors by name, not {type(conditioning).__name__}")
    shapes = {name: _shape(f"conditioning[{name!r}]", value) for name, value in conditioning.items()}
    for name, shape in shapes.items():
        if not shape or shape[0] != batch:
            raise TeacherError(f"conditioning[{name!r}] has shape {shape}, but there are {batch} samples")
    if unconditional is None and not guided:
        return
    if not isinstance(unconditional, dict) or unconditional.keys() != shapes.keys():
        found = sorted(map(str, unconditional)) if isinstance(unconditional, dict) else "nothing"
        raise TeacherError(f"guidance_scale {scale:g} needs unconditional rows for {sorted(shapes)}, found {found}")
    for name, value in unconditional.items():
        expected, shape = (1, *shapes[name][1:]), _shape(f"unconditional[{name!r}]", value)
        if shape != expected:
            raise TeacherError(f"unconditional[{name!r}] has shape {shape}, not {expected}")


def _shape(name: str, wire: Any, kinds: str = "fiub") -> tuple[int, ...]:
    """Shape of an array from `to_wire`. Raises TeacherError: it is none, or not of these of numpy's kinds of numbers."""
    half = kinds != "f" and isinstance(wire, tuple) and len(wire) == 2 and wire[0] == "bfloat16"
    array = wire[1] if half else wire
    if not isinstance(array, np.ndarray) or (array.dtype != np.uint16 if half else array.dtype.kind not in kinds):
        found = f"an array of {array.dtype}" if isinstance(array, np.ndarray) else type(wire).__name__
        raise TeacherError(f"{name} must be an array of numbers, not {found}")
    return array.shape


def _check_number(name: str, value: Any) -> None:
    try:
        finite = isinstance(value, Real) and not isinstance(value, bool) and np.isfinite(float(value))
    except OverflowError:
        finite = False
    if not finite:
        raise TeacherError(f"{name} must be a finite number, not {_shown(value)}")


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "one of thousands of digits"
    return text if len(text) <= 100 else f"{text[:100]}…"


def _guided(scale: Any) -> bool:
    """`is_guided`, whose error is a TeacherError here."""
    _check_number("guidance_scale", scale)
    try:
        return is_guided(scale)
    except InputError as error:
        raise TeacherError(str(error)) from None


def _check_request_finite(request: ScoreRequest | GenerateRequest, latents: str) -> None:
    _check_finite(latents, getattr(request, latents))
    guided = {"unconditional": request.unconditional} if _guided(request.guidance_scale) else {}
    for field, values in ({"conditioning": request.conditioning} | guided).items():
        for name, value in values.items():
            _check_finite(f"{field}[{name!r}]", value)


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
