"""Networks of a pipeline folder on the meta device: shapes without weights, at any size, in moments."""

from __future__ import annotations

import contextlib
import functools
import tempfile
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from raydistill.spaces import hub_models, load_space
from raydistill.spaces.base import Conditioning, Layout, Space
from raydistill.spaces.folder import cast
from raydistill.spaces.published import write_folder
from raydistill.spaces.settings import built, diffusers_class
from raydistill.storage.hub import cached
from raydistill.storage.resolve import local_path


class WithoutNumbers(TorchDispatchMode):
    """What asks a meta tensor for its numbers gets an answer.

    `.item()` and `bool()` are 1, so that checks pass; `.cpu()` is 0; a mask [N] chooses everything.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            return 1.0
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "meta":
            device = kwargs.get("device")
            if device is not None and device.type != "meta":
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=device)
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], [_everything(index) for index in args[1]])
        return func(*args, **kwargs)


def _everything(index: torch.Tensor | None) -> torch.Tensor | None:
    """Places instead of a mask [N] on the meta device; other indices stay."""
    if index is not None and index.device.type == "meta" and index.dtype == torch.bool and index.ndim == 1:
        return torch.empty(len(index), dtype=torch.long, device="meta")
    return index


@contextlib.contextmanager
def without_initial_values() -> Iterator[None]:
    """Networks are built without drawing meta tensors' values, which takes longer than to build them.

    torch.nn.init's functions are exchanged for the length of the block. Real tensors are still filled: what is imported
    inside the block may keep such a function for good.
    """
    plain = {name: f for name, f in vars(nn.init).items() if name.endswith("_") and not name.startswith("_")}

    def for_real_tensors(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(function)
        def fill(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return tensor if tensor.is_meta else function(tensor, *args, **kwargs)

        return fill

    for name, function in plain.items():
        setattr(nn.init, name, for_real_tensors(function))
    try:
        yield
    finally:
        for name, function in plain.items():
            setattr(nn.init, name, function)


def open_space(model: str) -> Space:
    """The Space of a folder or of a hub model (whose configuration files its family has, or else the hub's cache).

    Its networks come without weights, on the meta device.

    Raises:
        InputError: a hub model that is neither known nor cached, or not a pipeline folder of a known family.
    """
    folder = local_path(model)
    known = hub_models().get(model.partition("@")[0])
    if folder.exists() or known is None or known.sizes is None:
        space = load_space(folder if folder.exists() else cached(model))
    else:
        temporary = tempfile.TemporaryDirectory(prefix="raydistill-")
        space = load_space(write_folder(known.sizes, temporary.name))
        weakref.finalize(space, temporary.cleanup)
    space.load_part = functools.partial(empty_part, space)
    space.assume_values()
    return space


def empty_part(space: Space, name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A diffusers network of the folder on the meta device, frozen."""
    config = space.part_config(name)
    network_class = diffusers_class(config)
    with without_initial_values(), torch.device("meta"):
        network = built(config, network_class, lambda: network_class.from_config(config))
    return (network if dtype == torch.float32 else cast(network, dtype)).eval().requires_grad_(False)


def empty_text_encoders(space: Space) -> dict[str, nn.Module]:
    """The text encoders that model_index.json names, by their part's name, on the meta device."""
    return {part: space.empty_text_encoder(part) for part in space.parts("text_encoder")}


def empty_conditioning(layout: Layout, batch: int, dtype: torch.dtype = torch.float32) -> Conditioning:
    """Meta tensors [B, …]; real-valued ones in `dtype`."""
    return {
        name: torch.empty(batch, *shape, dtype=dtype if kind.is_floating_point else kind, device="meta")
        for name, (shape, kind) in layout.items()
    }


def numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def nbytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)
