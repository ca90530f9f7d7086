"""What makes a teacher faster at other numbers: attention kernels, compiled blocks, linear layers in 8 bits.

`check` refuses in the driver what cannot work, before anything starts. What depends on a node is refused by its rank.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from torch import nn

from raydistill.config.networks import TeacherServiceConfig
from raydistill.diffusion.noise import normal
from raydistill.errors import InputError
from raydistill.spaces.base import Conditioning, Space
from raydistill.spaces.channels_last import untouched
from raydistill.spaces.folder import cast
from raydistill.spaces.meta import empty_part

log = logging.getLogger(__name__)

MULTIPLE = 16  # of a layer's sizes: what the 8-bit kernels take
LEAST_CAPABILITY = (8, 9)  # of a GPU that multiplies in FP8: Ada, Hopper and later
TORCHAO = "torchao is not installed: pip install 'raydistill[quantize]'"


class Kernel(NamedTuple):
    """What teachers.attention names."""

    backend: str  # diffusers' name
    package: str | None = None  # that must be installed
    cuda: bool = True  # needs a GPU


KERNELS = {
    "native": Kernel("native", cuda=False),
    "math": Kernel("_native_math", cuda=False),
    "cudnn": Kernel("_native_cudnn"),
    "flash": Kernel("flash", "flash_attn"),
    "flash3": Kernel("_flash_3", "flash_attn_interface"),
    "sage": Kernel("sage", "sageattention"),
    "xformers": Kernel("xformers", "xformers"),
}


# -- before a launch --------------------------------------------------------------------------------------


def check(config: TeacherServiceConfig, space: Space) -> list[str]:
    """See that the settings can work with this teacher, which is built without weights. Returns notes for people.

    Raises InputError: a package is missing, the model or its dtype does not allow a setting, or it needs a GPU.
    """
    as_it_is = config.attention == "auto" and not (config.compile or config.channels_last) and config.quantize == "none"
    if as_it_is:
        return []
    if config.quantize != "none":
        _check_quantise(config)
    if config.attention != "auto":
        _check_package(config)
    network = empty_part(space, space.network_name)
    if config.attention != "auto" and not _takes_attention(network):
        raise InputError(f"teachers.attention={config.attention}: {_untaken(network)}")
    if config.quantize != "none" and not quantised_layers(network):
        raise InputError(
            f"teachers.quantize={config.quantize}: no linear layer in the blocks of {space.folder} has sizes that are "
            f"multiples of {MULTIPLE}; use none"
        )
    notes = [_uncompiled(network)] if config.compile and not repeated_blocks(space, network) else []
    transformer = config.channels_last and space.blocks(network)
    return [*notes, *([untouched(network, "teachers.channels_last")] if transformer else [])]


def _check_quantise(config: TeacherServiceConfig) -> None:
    if importlib.util.find_spec("torchao") is None:
        raise InputError(f"teachers.quantize={config.quantize}: {TORCHAO}")
    if config.quantize == "fp8" and config.gpus_per_rank == 0:
        raise InputError("teachers.quantize=fp8 needs GPUs: set teachers.gpus_per_rank, or use int8")
    if config.quantize == "fp8" and config.dtype != "bfloat16":
        raise InputError(f"teachers.quantize=fp8 needs teachers.dtype=bfloat16, not {config.dtype}")


def _check_package(config: TeacherServiceConfig) -> None:
    kernel = KERNELS[config.attention]
    if kernel.cuda and config.gpus_per_rank == 0:
        raise InputError(f"teachers.attention={config.attention} needs GPUs: set teachers.gpus_per_rank, or use auto")
    if kernel.package is not None and importlib.util.find_spec(kernel.package) is None:
        raise InputError(f"teachers.attention={config.attention}: the package {kernel.package} is not installed")


def repeated_blocks(space: Space, network: nn.Module) -> list[str]:
    """Classes of the blocks that are compiled: those that diffusers names, else those that the family does."""
    present = {type(module).__name__ for module in network.modules()}
    named = [name for name in network._repeated_blocks or () if name in present]
    return named or sorted({type(block).__name__ for block in space.blocks(network)})


def quantised_layers(network: nn.Module) -> dict[str, nn.Linear]:
    """By name, the linear layers that teachers.quantize takes: those of the blocks.

    Embeddings and the output layer stay: they are small, and their errors reach every number.
    """
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
        and any(one.isdigit() for one in name.split("."))
        and module.in_features % MULTIPLE == 0
        and module.out_features % MULTIPLE == 0
    }


# -- in a rank --------------------------------------------------------------------------------------------


def set_attention(network: nn.Module, config: TeacherServiceConfig) -> None:
    """Raises InputError: this node lacks what the kernel needs, or the network takes no kernels."""
    if config.attention == "auto":
        return
    if not _takes_attention(network):
        raise InputError(f"teachers.attention={config.attention}: {_untaken(network)}")
    try:
        network.set_attention_backend(KERNELS[config.attention].backend)
    except (RuntimeError, ImportError, ValueError) as error:
        raise InputError(f"teachers.attention={config.attention}: {' '.join(str(error).split())}") from error


def compile_blocks(space: Space, network: nn.Module) -> None:
    """Have the blocks compiled when they first run; a network without blocks stays as it is, with a line."""
    blocks = repeated_blocks(space, network)
    if not blocks:
        log.warning(_uncompiled(network))
        return
    network._repeated_blocks = blocks
    network.compile_repeated_blocks()


def quantise(network: nn.Module, kind: str, device: torch.device) -> None:
    """Weights in 8 bits, one scale a row, and activations too, when they arrive; layer by layer on the device.

    The other layers stay where they are. Raises InputError: this node's GPU or packages cannot do it.
    """
    if importlib.util.find_spec("torchao") is None:
        raise InputError(f"teachers.quantize={kind}: {TORCHAO} (on this node)")
    # An optional package.
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
        quantize_,
    )

    if kind == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        raise InputError(
            f"teachers.quantize=fp8: {torch.cuda.get_device_name(device)} does not compute in FP8; use int8"
        )
    fp8 = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    settings = fp8 if kind == "fp8" else Int8DynamicActivationInt8WeightConfig()
    chosen = {id(layer) for layer in quantised_layers(network).values()}
    for layer in list(quantised_layers(network).values()):
        layer.to(device)  # its full weights are there no longer than it takes
        quantize_(layer, settings, filter_fn=lambda module, name: id(module) in chosen)


def measured_quantise(space: Space, network: nn.Module, config: TeacherServiceConfig, device: torch.device) -> float:
    """Quantise, and compare scores before and after on one fixed batch of a slice's size.

    Compared is the VSD gradient of a fake score that has learned nothing: unguided minus guided scores of the teacher. The
    batch is noise with random conditioning: it needs no text encoder, and says nothing of pictures.

    Returns:
        the cosine of the two gradients.

    Raises:
        InputError: it is below teachers.quantize_cosine; see also `quantise`.
    """
    batch = FixedBatch(space, config.counted_slice, getattr(torch, config.dtype), device)
    with contextlib.nullcontext() if device.type == "cpu" else passing(network, device):
        unguided, guided = batch.scores(network, 1.0), batch.scores(network, space.default_guidance_scale)
    quantise(network, config.quantize, device)
    cast(network, None, device)
    after = batch.scores(network, space.default_guidance_scale)
    one, other = ((unguided - scores).double().flatten() for scores in (guided, after))
    cosine = float(torch.nn.functional.cosine_similarity(one, other, 0))
    if not cosine >= config.quantize_cosine:  # also where it is not finite
        raise InputError(
            f"teachers.quantize={config.quantize}: the VSD gradient's cosine to the unquantised one is {cosine:.4f}, below "
            f"teachers.quantize_cosine={config.quantize_cosine:g}; use none, or lower the limit"
        )
    return cosine


@contextmanager
def passing(network: nn.Module, device: torch.device) -> Iterator[None]:
    """In the block the network's weights stay on the CPU, and pass the device one layer at a time."""
    cpu_offload(network, execution_device=device)
    try:
        yield
    finally:
        remove_hook_from_submodules(network)


class FixedBatch:
    """One score request of noise and random conditioning, the same in every rank."""

    def __init__(self, space: Space, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.space = space
        self.x_t = normal(0, range(size), space.latent_shape, "teacher check").to(device)
        self.t_B = ((torch.arange(size) + 0.5) / size * 0.9 + 0.05).to(device)
        self.conditioning = self._conditioning(range(size), dtype, device)
        self.unconditional = self._conditioning(range(size, size + 1), dtype, device)

    def _conditioning(self, ids: range, dtype: torch.dtype, device: torch.device) -> Conditioning:
        """Standard normal numbers in `dtype`, and ones where the layout has integers."""
        return {
            name: (
                normal(0, ids, shape, f"teacher check {name}").to(device, dtype)
                if kind.is_floating_point
                else torch.ones(len(ids), *shape, dtype=kind, device=device)
            )
            for name, (shape, kind) in self.space.conditioning_layout.items()
        }

    @torch.no_grad()
    def scores(self, network: Any, guidance_scale: float) -> torch.Tensor:
        """x0 estimates [B, C, H, W], float32."""
        return self.space.predict_x0(network, self.x_t, self.t_B, self.conditioning, self.unconditional, guidance_scale)


def _takes_attention(network: nn.Module) -> bool:
    processors = (getattr(module, "processor", None) for module in network.modules())
    return any(hasattr(processor, "_attention_backend") for processor in processors)


def _untaken(network: nn.Module) -> str:
    return f"diffusers chooses no kernels for a {type(network).__name__}; use auto"


def _uncompiled(network: nn.Module) -> str:
    return f"teachers.compile: a {type(network).__name__} has no repeated blocks; it runs without being compiled"
