"""AdamW for one network of a worker, its two moments in 32 bits, or in 8 (torchao; Dettmers et al., arXiv 2110.02861).

In 8 bits each block of 256 numbers has a scale of its own, and a number is one of 256 steps of a floating grid. The update
itself is computed in float32. Parameters of fewer than 4,096 numbers, or of no whole blocks, keep moments in 32 bits.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from raydistill.config.networks import Optimizer as Kind
from raydistill.errors import InputError
from raydistill.teachers.speed import TORCHAO

BLOCK, SMALLEST = 256, 4096  # torchao's: numbers that share a scale, numbers of the smallest parameter in 8 bits
STEPS = 256  # of the grid, which every moment holds as a table in float32


def check(**kinds: Kind) -> None:
    """Args: kinds: by configuration key, dots as double underscores. Raises InputError: torchao is not installed."""
    for key, kind in kinds.items():
        if kind == "adamw8bit" and importlib.util.find_spec("torchao") is None:
            raise InputError(f"{key.replace('__', '.')}={kind}: {TORCHAO}")


def make(parameters: list[nn.Parameter], lr: float, kind: Kind = "adamw", *, fused: bool | None = None) -> Optimizer:
    """AdamW(0, 0.999, 1e-8) without weight decay (arXiv 2606.32020).

    Args:
        fused: torch's fused form of the one in 32 bits.
    """
    settings = {"lr": lr, "betas": (0.0, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    if kind == "adamw":
        return AdamW(parameters, **settings, fused=fused)
    from torchao.optim import AdamW8bit  # an optional package

    return AdamW8bit(parameters, **settings, block_size=BLOCK)


def moments_bytes(parameters: Iterable[nn.Parameter], kind: Kind) -> int:
    """Of both moments."""
    return 2 * sum(_in_8_bits(p) if kind == "adamw8bit" and _is_large(p) else p.nbytes for p in parameters)


def _is_large(parameter: nn.Parameter) -> bool:
    return parameter.numel() >= SMALLEST and parameter.numel() % BLOCK == 0


def _in_8_bits(parameter: nn.Parameter) -> int:
    """One moment: a byte a number, a scale a block, the table of the grid."""
    return parameter.numel() + 4 * (parameter.numel() // BLOCK) + 4 * STEPS


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """torchao keeps it in a tensor, so that another value is no other graph."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def step(optimizer: Optimizer) -> None:
    """One update. torchao compiles its own; on CPUs it runs as it is, which needs no compiler."""
    on_cpu = any(p.is_cpu for group in optimizer.param_groups for p in group["params"])
    plain = on_cpu and not isinstance(optimizer, AdamW)
    with torch.compiler.set_stance("force_eager") if plain else contextlib.nullcontext():
        optimizer.step()


def state_dict(optimizer: Optimizer) -> dict[str, Any]:
    """Its state in plain tensors; a moment in 8 bits is its codes and scales."""
    state = optimizer.state_dict()
    packed = {number: {name: _packed(value) for name, value in own.items()} for number, own in state["state"].items()}
    return state | {"state": packed}


def _packed(value: Any) -> Any:
    return {"codes": value.codes, "scale": value.scale} if hasattr(value, "codes") else value


def load_state_dict(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """What `state_dict` gave."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    whole = {
        number: {name: _unpacked(optimizer, parameters[number], name, value) for name, value in own.items()}
        for number, own in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": whole})


def _unpacked(optimizer: Any, parameter: nn.Parameter, name: str, value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    moment = optimizer._new_buffer(parameter, name == "exp_avg")  # the second has no sign
    moment.codes.copy_(value["codes"])
    moment.scale.copy_(value["scale"])
    return moment
