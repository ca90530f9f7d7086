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
from torch.utils._pytree import tree_leaves

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
        return _with_kept_shapes(func, args, kwargs)


_shapes: dict[Any, Any] = {}  # what an operator makes of given shapes: (size, stride, dtype) of each new tensor


def _with_kept_shapes(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `func` gives on meta tensors, whose shapes are worked out once: torch does so in Python, a third of a
    millisecond each, and a step of a large network has some hundred thousand operators."""
    new, changed = _effect(func)
    key = (func, _described(args), _described(kwargs)) if new or changed else None
    try:
        known = _shapes.get(key) if key is not None else None
    except TypeError:  # an argument that has no hash
        key = known = None
    if known is None:
        result = func(*args, **kwargs)
        if changed and result is args[0] and key is not None and key[1][0] == _described(result):  # not resize_
            _shapes[key] = (False, [])
        made = (result,) if isinstance(result, torch.Tensor) else result
        if new and key is not None and isinstance(made, tuple) and _are_new(made, args, kwargs):
            _shapes[key] = (made is result, [None if t is None else (t.size(), t.stride(), t.dtype) for t in made])
        return result
    if changed:
        return args[0]
    several, shapes = known
    made = tuple(None if it is None else torch.empty_strided(*it[:2], dtype=it[2], device="meta") for it in shapes)
    return made if several else made[0]


@functools.cache
def _effect(func: torch._ops.OpOverload) -> tuple[bool, bool]:
    """Whether all results are new tensors; whether its one effect is that it changes its first argument in place."""
    inputs, outputs = func._schema.arguments, func._schema.returns
    aliases = [value.alias_info for value in inputs]
    new = not any(aliases) and not any(value.alias_info for value in outputs)
    changed = len(outputs) == 1 and aliases and aliases[0] and aliases[0].is_write and not any(aliases[1:])
    return new, bool(changed and outputs[0].alias_info and outputs[0].alias_info.is_write)


def _are_new(made: tuple[Any, ...], *given: Any) -> bool:
    """Plain tensors or None, and no views of what was given: `_unsafe_view` is one, though its schema does not say so."""
    storages = {one.untyped_storage()._cdata for one in tree_leaves(given) if isinstance(one, torch.Tensor)}
    return all(t is None or (_is_plain(t) and t.untyped_storage()._cdata not in storages) for t in made)


def _is_plain(tensor: Any) -> bool:
    """A whole storage of the meta device, so that its shape says everything."""
    return (
        type(tensor) is torch.Tensor
        and tensor.device.type == "meta"
        and tensor.layout == torch.strided
        and tensor.storage_offset() == 0
        and tensor.untyped_storage().nbytes() == _extent(tensor) * tensor.itemsize
    )


def _extent(tensor: torch.Tensor) -> int:
    """Numbers that a storage needs for this size and stride."""
    if not tensor.numel():
        return 0
    return 1 + sum((length - 1) * step for length, step in zip(tensor.size(), tensor.stride(), strict=True))


def _described(value: Any) -> Any:
    """An argument as a key: tensors by their shape. Real tensors are told by what they are, for their numbers may count."""
    if isinstance(value, torch.Tensor):
        if value.device.type != "meta":
            return [value]  # has no hash: nothing is kept
        return value.size(), value.stride(), value.dtype, value.storage_offset()
    if isinstance(value, list | tuple):
        return tuple(_described(one) for one in value)
    if isinstance(value, dict):
        return tuple((name, _described(one)) for name, one in sorted(value.items()))
    return type(value), value


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
