"""Load a frozen diffusion network as ZeRO-3 partitions: each of S ranks keeps 1/S of every parameter.

No rank ever holds the whole network. `zero.Init` partitions each layer when it is built, and the weights are copied from
the safetensors one parameter at a time. The forward pass gathers a layer just before it runs, and frees it afterwards.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn

from raydistill.config.networks import TeacherServiceConfig
from raydistill.errors import InputError
from raydistill.imports import left_out
from raydistill.spaces.base import Space
from raydistill.spaces.folder import NETWORK_WEIGHTS, weight_files
from raydistill.spaces.settings import diffusers_class
from raydistill.spaces.weights import Located, locate, misfits
from raydistill.teachers.speed import set_attention

with left_out("mlflow"):  # DeepSpeed imports it for the logs of its autotuner, which is not used
    import deepspeed
import deepspeed.ops

# Parameters up to this size stay gathered on every rank, up to 1/200 of the network in all. A norm or a bias costs more
# to gather than to keep.
PERSISTENT_NUMEL, PERSISTENT_SHARE = 100_000, 1 / 200
# Modules up to this size, and up to this share of the network, are gathered in one piece. DeepSpeed's hooks on every
# small layer cost more than the layers.
PIECE_NUMEL, PIECE_SHARE = 250_000_000, 1 / 3


def init_process_group(rank: int, world: int, store: torch.distributed.Store, device: torch.device) -> None:
    """Join the group of `world` ranks that meet in `store`: NCCL on CUDA, gloo elsewhere.

    DeepSpeed also reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT from the environment.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Only `inference_all_reduce` uses this op, and ZeRO-3 never calls it. Building it needs a compiler and 40 s.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(
            backend, store=store, rank=rank, world_size=world, timeout=timedelta(minutes=30)
        )
    deepspeed.init_distributed(verbose=False)


def load_partitioned(space: Space, dtype: torch.dtype, device: torch.device, rank: int, world: int) -> Any:
    """The network of `space`, partitioned over the ranks of the initialised process group.

    Every rank must call this, and must be able to read `space.folder`.

    Returns:
        a DeepSpeed engine. Call it like the network, under `torch.no_grad`, in the same order on every rank.

    Raises:
        InputError: weights are missing, or do not fit the network that config.json describes.
    """
    group = (torch.distributed.get_rank(), torch.distributed.get_world_size())
    if group != (rank, world):
        raise ValueError(
            f"asked to load as rank {rank} of {world}, but the process group says {group[0]} of {group[1]}"
        )
    config = space.part_config(space.network_name)
    network_class = diffusers_class(config)
    settings = _deepspeed_config(dtype, numel=0)
    # zero.Init must take the dtype from the configuration: its own `dtype` argument overrides float32 with float16.
    with deepspeed.zero.Init(config_dict_or_path=settings):
        network = network_class.from_config(config)
    network.eval().requires_grad_(False)

    found = locate(weight_files(Path(space.folder, space.network_name), NETWORK_WEIGHTS))
    _check_fit(network, found, space)
    files = {name: located.file for name, located in found.items()}
    _fill_parameters(network, files, rank)
    _fill_buffers(network, network_class, config, files, dtype, device)
    numel = sum(parameter.ds_numel for parameter in network.parameters())
    _mark_pieces(network, min(PIECE_NUMEL, numel * PIECE_SHARE))
    engine, *_ = deepspeed.initialize(model=network, config=_deepspeed_config(dtype, numel), dist_init_required=False)
    engine.eval()
    return engine


class Partitioned:
    """A teacher in parts, as a rank holds it: see `plain.Whole` for the other kind.

    Attributes:
        network: to be called like the network, by all ranks alike.
    """

    def __init__(self, space: Space, config: TeacherServiceConfig, device: torch.device, rank: int, world: int) -> None:
        """Raises InputError: see `load_partitioned`; or this node lacks what teachers.attention needs."""
        self.network = load_partitioned(space, getattr(torch, config.dtype), device, rank, world)
        set_attention(self.network.module, config)

    def facts(self) -> dict[str, int]:
        """numel: elements that this rank holds; full_numel: of the network."""
        return {"numel": partition_numel(self.network), "full_numel": full_numel(self.network)}

    def recover(self) -> None:
        """After a forward failed on every rank: free the parameters it left gathered, and wait for the other ranks."""
        release(self.network)
        torch.distributed.barrier()


def partition_numel(engine: Any) -> int:
    """Parameter elements on this rank between forwards: its partitions, and what stays gathered."""
    return sum(parameter.ds_tensor.numel() + parameter.numel() for parameter in engine.parameters())


def full_numel(engine: Any) -> int:
    """Parameter elements of the whole network."""
    return sum(parameter.ds_numel for parameter in engine.parameters())


def release(engine: Any) -> None:
    """Free the parameters that an interrupted forward left gathered."""
    engine.empty_partition_cache()


def _mark_pieces(module: nn.Module, limit: float) -> None:
    """Mark the largest modules of at most `limit` elements as gathered in one piece."""
    for child in module.children():
        # A container has no forward of its own, so nothing would gather it.
        container = isinstance(child, nn.ModuleList | nn.ModuleDict | nn.Sequential)
        if not container and sum(parameter.ds_numel for parameter in child.parameters()) <= limit:
            deepspeed.utils.set_z3_leaf_module(child, True)
        else:
            _mark_pieces(child, limit)


def _deepspeed_config(dtype: torch.dtype, numel: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "zero_optimization": {
            "stage": 3,
            "memory_efficient_linear": False,  # its bits differ from those of torch's own linear
            "stage3_param_persistence_threshold": PERSISTENT_NUMEL,
            "stage3_model_persistence_threshold": int(numel * PERSISTENT_SHARE),
        },
    }


def _check_fit(network: nn.Module, found: dict[str, Located], space: Space) -> None:
    """Compare names and shapes on every rank before any copy: a rank that failed alone would leave the others waiting.

    Raises InputError: they differ.
    """
    parameters = {name: tuple(parameter.ds_shape) for name, parameter in network.named_parameters()}
    buffers = {name: tuple(value.shape) for name, value in network.state_dict().items() if name not in parameters}
    if problem := misfits(buffers | parameters, found):
        raise InputError(f"{space.folder}: {problem}")


def _fill_parameters(network: nn.Module, files: dict[str, Path], rank: int) -> None:
    """Rank 0 reads each parameter, and DeepSpeed sends every rank its partition."""
    by_file: dict[Path, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in network.named_parameters():
        by_file.setdefault(files[name], []).append((name, parameter))
    for file, parameters in by_file.items():
        with safe_open(file, framework="pt") as opened:
            for name, parameter in parameters:
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    if rank == 0:
                        parameter.data.copy_(opened.get_tensor(name))


def _fill_buffers(
    network: nn.Module,
    network_class: type[nn.Module],
    config: dict[str, Any],
    files: dict[str, Path],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Set the buffers to what `from_pretrained(torch_dtype=dtype)` computes.

    `zero.Init` casts in other steps of the constructor than `from_pretrained` does. So a copy of the network computes the
    buffers again, as diffusers builds it but without memory for parameters. Persistent buffers come from the file.
    """
    if not any(True for _ in network.buffers()):
        return
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with init_empty_weights(include_buffers=False):
            buffers = dict(network_class.from_config(config).named_buffers())
    finally:
        torch.set_default_dtype(default)
    for name, buffer in buffers.items():
        if name in files:
            with safe_open(files[name], framework="pt") as opened:
                stored = opened.get_tensor(name)
            buffer = stored.to(dtype) if stored.is_floating_point() else stored
        owner, _, leaf = name.rpartition(".")
        network.get_submodule(owner)._buffers[leaf] = buffer.to(device)
