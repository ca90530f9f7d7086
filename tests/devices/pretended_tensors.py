"""Tensors of cuda:0 that have shapes and dtypes, and some their numbers; what a GPU would feel is written down.

FakeTensorMode carries them: its kernels check shapes and dtypes, and an operator refuses operands of two devices, as CUDA
does. What is not on cuda stays a real tensor of the CPU. Integers and truth values have a shadow, their real value, which
the CPU computes beside them, and where it is asked for so have real numbers. Lengths and masks are then what they would be.
An unknown number reads as 1 where one is asked for, and as 0 in a copy.

What is counted follows torch's own rules for copies. A copy waits for the device unless it is `non_blocking` and its
side in main memory is pinned.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pretended_cuda import Stream
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

import raydistill

aten = torch.ops.aten
CUDA = torch.device("cuda:0")
OWN = f"{Path(raydistill.__file__).parent}/"
TOOLS = {f"{OWN}{name}.py" for name in ("transfer", "distillation/finite", "planning/meter")}
LIBRARIES = ("/diffusers/", "/transformers/", "/peft/", "/deepspeed/")
BY_INDEX = {aten.index.Tensor, aten._unsafe_index.Tensor}
BY_INDEX |= {aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
BY_VALUE = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_consecutive.default}
LARGEST = 1 << 22  # elements of a shadow
OWN_DTYPES = {aten.native_layer_norm.default, aten.native_group_norm.default}  # of their statistics, on CUDA float32


# -- where, and how often -------------------------------------------------------------------------------------


def place() -> str:
    """The innermost function of raydistill on the stack that is no tool of copies; where there is none, of a library."""
    frame, library = sys._getframe(1), None
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(OWN) and name not in TOOLS and not frame.f_code.co_name.startswith("<"):
            return f"{name.removeprefix(OWN)}:{frame.f_code.co_name}"
        if library is None and any(part in name for part in LIBRARIES):
            library = f"{name.rsplit('site-packages/', 1)[-1]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return library or "?"


def module_on_stack() -> str:
    """The class of the innermost module whose method runs."""
    frame = sys._getframe(1)
    while frame is not None:
        for name in ("self", "attn"):
            owner = frame.f_locals.get(name)
            if isinstance(owner, nn.Module):
                return type(owner).__name__
        frame = frame.f_back
    return "?"


@dataclass
class Copies:
    """Between main memory and the device, of one place."""

    count: int = 0
    nbytes: int = 0
    blocking: int = 0


@dataclass
class Notes:
    """What a GPU would feel.

    Attributes:
        waits: place -> how often the CPU waits there for all that it has given the device; blocking copies are among them.
        kernels: (module, kernel of attention) -> calls.
        wrong: fake tensors that differ from their shadows in shape or dtype.
    """

    waits: Counter[str] = field(default_factory=Counter)
    uploads: dict[str, Copies] = field(default_factory=dict)
    downloads: dict[str, Copies] = field(default_factory=dict)
    kernels: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)

    def copied(self, copies: dict[str, Copies], nbytes: int, blocking: bool) -> None:
        where = place()
        copy = copies.setdefault(where, Copies())
        copy.count, copy.nbytes, copy.blocking = copy.count + 1, copy.nbytes + nbytes, copy.blocking + blocking
        if blocking:
            self.waits[where] += 1

    def waited(self, what: str) -> None:
        self.waits[place()] += 1

    def told(self) -> dict[str, dict[str, Any]]:
        """As JSON takes it."""
        copies = {name: getattr(self, name) for name in ("uploads", "downloads")}
        counts = {name: dict(getattr(self, name)) for name in ("waits", "kernels", "wrong")}
        return counts | {name: {where: vars(it) for where, it in found.items()} for name, found in copies.items()}


# -- values -------------------------------------------------------------------------------------------------------


class _Unknown(Exception):
    """A tensor's numbers are not known."""


def shadow(tensor: torch.Tensor) -> torch.Tensor | None:
    """The numbers of a tensor, on the CPU; None where they are not known."""
    return tensor.__dict__.get("shadow") if isinstance(tensor, FakeTensor) else tensor


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Tensors in an operator's arguments or results, which are lists, tuples and dictionaries of them."""
    found: list[torch.Tensor] = []
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            pending.extend(reversed(value))
        elif isinstance(value, dict):
            pending.extend(value.values())
    return found


def on_cpu(value: Any) -> Any:
    """Arguments with their tensors' shadows, and the CPU for cuda. Raises _Unknown."""
    if isinstance(value, torch.Tensor):
        known = shadow(value)
        if known is None:
            raise _Unknown
        return known
    if isinstance(value, list | tuple):
        return type(value)(map(on_cpu, value)) if not hasattr(value, "_fields") else value
    if isinstance(value, dict):
        return {name: on_cpu(item) for name, item in value.items()}
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value


class PretendedTensors(TorchDispatchMode):
    """Sends what touches cuda through FakeTensorMode.

    Args:
        numbers: real numbers have shadows too; twice as slow, and a finiteness check sees them.
    """

    def __init__(self, numbers: bool) -> None:
        super().__init__()
        self.numbers, self.notes = numbers, Notes()
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self._pinned: set[int] = set()  # storages

    def __enter__(self) -> PretendedTensors:
        Stream.waited = staticmethod(lambda what: self.notes.waited(what))
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # more than half of all calls
            return args[0].fake_device
        kwargs = kwargs or {}
        if func in (aten._pin_memory.default, aten.is_pinned.default):
            return self._pin(func, args[0])
        device = kwargs.get("device")
        to_cuda = device is not None and torch.device(device).type == "cuda"
        operands = tensors_in((args, kwargs))
        if not to_cuda and not any(isinstance(x, FakeTensor) for x in operands):
            pinned = bool(kwargs.pop("pin_memory", False))
            result = func(*args, **kwargs)
            return self._as_pinned(result) if pinned else result
        if func is aten._local_scalar_dense.default:
            return self._number(args[0])
        if func in (aten.equal.default, aten.is_nonzero.default):
            self.notes.waited("value")
            return func(*on_cpu(args))
        if func is aten._to_copy.default and args[0].device.type == "cuda" and device is not None and not to_cuda:
            return self._download(args[0], kwargs)
        if func is aten.copy_.default and args[0].device.type == "cpu" and args[1].device.type == "cuda":
            return self._download_into(*args)
        self._note_uploads(func, args, kwargs, to_cuda)
        if func in BY_INDEX:
            self._check_indices(args)
        if func in BY_VALUE:
            self.notes.waited("shape")
            return self._by_value(func, args, kwargs)
        try:
            with self.fakes:
                result = func(*args, **kwargs)
        except (DynamicOutputShapeException, DataDependentOutputException):
            if func not in BY_INDEX:  # of a mask, it is noted
                self.notes.waited("shape")
            return self._by_value(func, args, kwargs)
        self._cast_shadows(func, args, kwargs, result)
        return result

    # -- copies -------------------------------------------------------------------------------------------------
    def _pin(self, func: Any, tensor: torch.Tensor) -> Any:
        is_pinned = tensor.device.type == "cpu" and tensor.untyped_storage()._cdata in self._pinned
        if func is aten.is_pinned.default:
            return is_pinned
        return tensor if is_pinned else self._as_pinned(tensor.clone(memory_format=torch.contiguous_format))

    def _as_pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self._pinned.add(storage._cdata)
        weakref.finalize(storage, self._pinned.discard, storage._cdata)
        return tensor

    def _blocks(self, in_main_memory: torch.Tensor, non_blocking: bool) -> bool:
        return not (non_blocking and in_main_memory.untyped_storage()._cdata in self._pinned)

    def _note_uploads(self, func: Any, args: Any, kwargs: Any, to_cuda: bool) -> None:
        if func is aten._to_copy.default and to_cuda and args[0].device.type == "cpu":
            dtype = kwargs.get("dtype") or args[0].dtype
            blocking = self._blocks(args[0], kwargs.get("non_blocking", False))
            self.notes.copied(self.notes.uploads, args[0].numel() * dtype.itemsize, blocking)
        elif func is aten.copy_.default and args[1].device.type == "cpu":
            blocking = self._blocks(args[1], (*args, False)[2] or kwargs.get("non_blocking", False))
            self.notes.copied(self.notes.uploads, args[0].nbytes, blocking)

    def _check_indices(self, args: Any) -> None:
        for index in args[1]:
            if not isinstance(index, torch.Tensor):
                continue
            if index.device.type not in ("cpu", args[0].device.type):
                raise RuntimeError(f"indices are on {index.device}, the indexed tensor on {args[0].device}")
            if index.device.type == "cpu" and args[0].device.type == "cuda":
                self.notes.copied(self.notes.uploads, index.nbytes, blocking=True)
            if index.dtype == torch.bool and index.device.type == "cuda":
                self.notes.waited("mask")

    def _download(self, tensor: torch.Tensor, kwargs: Any) -> torch.Tensor:
        self.notes.copied(self.notes.downloads, tensor.nbytes, blocking=True)  # into pageable memory
        value, dtype = shadow(tensor), kwargs.get("dtype") or tensor.dtype
        return torch.zeros(tensor.shape, dtype=dtype) if value is None else value.to(dtype, copy=True)

    def _download_into(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        self.notes.copied(self.notes.downloads, target.nbytes, self._blocks(target, non_blocking))
        value = shadow(source)
        return target.zero_() if value is None else target.copy_(value)

    def _number(self, tensor: torch.Tensor) -> bool | int | float:
        if tensor.device.type == "cuda":
            self.notes.waited("number")
        value = shadow(tensor)
        if value is not None:
            return value.item()
        return True if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1

    # -- values -------------------------------------------------------------------------------------------------
    def _by_value(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operator whose result's shape depends on numbers: those of a mask, or of all operands."""
        known = func not in BY_INDEX or shadow(args[0]) is not None
        if not known:
            args = (torch.zeros(args[0].shape, dtype=args[0].dtype), *args[1:])
        try:
            result = func(*on_cpu(args), **on_cpu(kwargs))
        except _Unknown:
            raise RuntimeError(f"{func} at {place()}: its shape depends on numbers that are not known") from None
        moved = [self.on_cuda(value, known) for value in tensors_in(result)]
        return moved[0] if isinstance(result, torch.Tensor) else type(result)(moved)

    def on_cuda(self, value: torch.Tensor, known: bool) -> torch.Tensor:
        """A tensor of the device, as one of the CPU is; `known`: with its numbers."""
        with self.fakes:
            fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=CUDA)
        if known and self._shadows([fake]):
            fake.shadow = value
        return fake

    def _shadows(self, fakes: list[torch.Tensor]) -> bool:
        """Whether these results of an operator may have shadows."""
        return all((self.numbers or not x.is_floating_point()) and x.numel() <= LARGEST for x in fakes)

    def _cast_shadows(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        fakes = [x for x in tensors_in(result) if isinstance(x, FakeTensor)]
        values = None
        if fakes and self._shadows(fakes):
            with contextlib.suppress(_Unknown, NotImplementedError):  # or the CPU has no such kernel
                values = tensors_in(func(*on_cpu(args), **on_cpu(kwargs)))
        if values is None or len(values) != len(fakes):
            for fake in fakes:
                fake.__dict__.pop("shadow", None)
            return
        for fake, value in zip(fakes, values, strict=True):
            if (fake.shape, fake.dtype) != (value.shape, value.dtype) and func not in OWN_DTYPES:
                self.notes.wrong[
                    f"{func}: {tuple(fake.shape)} {fake.dtype}, not {tuple(value.shape)} {value.dtype}"
                ] += 1
                fake.__dict__.pop("shadow", None)
            else:
                fake.shadow = value if fake.stride() == value.stride() else _laid_out(value, fake)


def _laid_out(value: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """CUDA's kernels may answer in another layout than the CPU's."""
    return torch.empty_strided(fake.shape, fake.stride(), dtype=value.dtype).copy_(value)
