"""Running the project's own code on tensors that have shapes but no numbers ("meta" tensors), and metering it.

FLOPs are torch.utils.flop_counter's (a multiply-add is two); elementwise work is not in them. Bytes are those of live
tensors: what a CUDA allocator rounds up, kernels' workspace and the CUDA context come on top. Attention is counted as the
fused kernel that GPUs run, which stores no attention map.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from raydistill.planning.counts import Cost
from raydistill.spaces.meta import WithoutNumbers, without_initial_values

# -- modes ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """Attention on meta tensors as the memory-efficient CUDA kernel, which has the same FLOPs as flash attention.

    torch's own function is exchanged for the length of the block: a mode would be off while checkpointed blocks run again.
    """
    plain = F.scaled_dot_product_attention

    def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if query.device.type != "meta":
            return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key, value = (x.repeat_interleave(groups, dim=-3) for x in (key, value))
        if attn_mask is not None:
            shape = (*query.shape[:-1], key.shape[-2])
            real = attn_mask.is_floating_point()  # of booleans, torch makes numbers first
            attn_mask = attn_mask.expand(shape) if real else torch.empty(shape, dtype=query.dtype, device="meta")
        inputs = [x for x in (query, key, value, attn_mask) if x is not None]
        needs_graph = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, needs_graph, dropout_p, is_causal, scale=scale
        )[0]

    with mock.patch.object(F, "scaled_dot_product_attention", attend):
        yield


@contextlib.contextmanager
def autocast() -> Iterator[None]:
    """CUDA's 16-bit autocast for meta tensors, which torch.autocast passes by: wherever the CPU's is switched on.

    As there, matrix products, convolutions and attention run in 16 bits, normalisation in float32. torch's own functions
    are exchanged, as in `fused_attention`: checkpointed blocks run again under the autocast state of their first run.
    """

    def cast(function: Callable[..., Any], high: bool) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            if not torch.is_autocast_enabled("cpu") or tensors[0].device.type != "meta":
                return function(*args, **kwargs)

            dtype = torch.float32 if high else torch.get_autocast_dtype("cpu")

            def convert(value: Any) -> Any:
                real = isinstance(value, torch.Tensor) and value.is_floating_point()
                return value.to(dtype) if real else value

            return function(*map(convert, args), **{name: convert(value) for name, value in kwargs.items()})

        return run

    products = [(F, name) for name in ("linear", "conv1d", "conv2d", "scaled_dot_product_attention")]
    products += [(torch, "bmm"), (torch, "baddbmm"), (torch, "matmul"), (torch.Tensor, "__matmul__")]
    calls = [(*product, False) for product in products] + [(F, name, True) for name in ("layer_norm", "group_norm")]
    with contextlib.ExitStack() as stack:
        for owner, name, high in calls:
            stack.enter_context(mock.patch.object(owner, name, cast(getattr(owner, name), high)))
        yield


class Meter(TorchDispatchMode):
    """FLOPs, and bytes of tensors on `device` that are alive, from when it is entered.

    FLOPs follow the formulas of torch.utils.flop_counter. Its own mode would keep every module's inputs alive.
    """

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.device, self.flops, self.flops_32, self.live, self.peak = device, 0, 0, 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=result)
            self.flops += flops
            self.flops_32 += flops if tensors[0].dtype == torch.float32 else 0
        for tensor in tensors:
            if tensor.device.type == self.device:
                self.watch(tensor)
        return result

    def watch(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, once, until it is freed."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._known:
            return
        self._known.add(address)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, address, storage.nbytes())

    def hold(self, *modules: nn.Module | None) -> int:
        """Watch the tensors of modules, without None; returns the bytes that are alive then."""
        for module in modules:
            for tensor in [] if module is None else (*module.parameters(), *module.buffers()):
                self.watch(tensor)
        return self.live

    def _freed(self, address: int, nbytes: int) -> None:
        self._known.discard(address)
        self.live -= nbytes

    def count(self, call: Callable[[], Any]) -> Cost:
        """Run a call while this mode is active; goes on from what is alive."""
        self.peak, flops, flops_32 = self.live, self.flops, self.flops_32
        call()
        return Cost(self.flops - flops, self.peak, self.flops_32 - flops_32)


@contextlib.contextmanager
def counted() -> Iterator[Meter]:
    """Everything inside the block may run on meta tensors."""
    with without_initial_values(), WithoutNumbers(), fused_attention(), autocast(), Meter() as meter:
        yield meter
