"""Networks that lie on all workers: each holds an equal part of every block, and gathers a block for as long as it computes
with it, forwards and backwards (FSDP2).

Blocks are FSDP2 units of their own, without a common root: a pass that ends in the middle leaves no unit waiting for the
others. All workers must run equally many passes. What is not in a block, or is left out of it, stays whole on every worker.

Of a network that is trained, a block's gradient is the mean over the workers as soon as the block's backward pass is over,
and each worker keeps its part of it. Its optimizer has a plain tensor for each part, which shares memory with the network.

    network   in its blocks DTensors, which FSDP2 gathers into the parameters that a graph ends in, its leaves
    own       what the optimizer steps on: a worker's parts, and the parameters that are whole, in the network's order
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from raydistill.spaces.adapter import trained
from raydistill.spaces.base import Space

Average = Callable[[list[torch.Tensor]], None]  # tensors of one dtype, in place, over all workers


def partition(parts: Iterable[nn.Module], mesh: DeviceMesh, *, trained_whole: bool = False) -> None:
    """Leave this worker its share of the parts' parameters, on the mesh's device.

    Args:
        trained_whole: every worker keeps what is trained.
    """
    # of views that are changed in place, which no network here does: the numbers are those of the whole copy
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    for part in parts:
        own = {parameter for parameter in part.parameters() if trained_whole and parameter.requires_grad}
        # a root's default is not to reshard
        unit = fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=own)
        if mesh.device_type == "cpu":  # gloo has sums alone
            unit.set_force_sum_reduction_for_comms(True)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This worker's part, which shares its memory; a whole tensor itself."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor


def _part_of(like: DTensor, whole: torch.Tensor) -> torch.Tensor:
    """A copy of this worker's part of a whole tensor."""
    mesh = like.device_mesh
    parts = torch.chunk(whole, mesh.size(), dim=0)
    return (parts[mesh.get_local_rank()] if mesh.get_local_rank() < len(parts) else whole[:0]).clone()


class Shared:
    """One network of a worker, trained or an average, of which the blocks lie on all workers.

    Attributes:
        network: with its parts alone. It runs on all workers together.
        whole: on rank 0 a copy that runs there alone, without numbers until they are gathered; None on other workers.
        own: what this worker trains.
    """

    def __init__(self, space: Space, network: nn.Module, mesh: DeviceMesh, device: torch.device) -> None:
        """Args: network: whole, on the CPU; it is changed in place. `adapter.trained` of it is cut."""
        self.network, self.mesh, self.whole = network, mesh, None
        if mesh.get_local_rank() == 0:
            hollow = {id(p): nn.Parameter(p.new_empty(0), requires_grad=False) for p in network.parameters()}
            self.whole = copy.deepcopy(network, hollow).to(device)
        partition(space.large_blocks(network), mesh)
        network.to(device)
        self._units = space.large_blocks(network)
        parameters = list(trained(network).values())
        self._cut = {index: p for index, p in enumerate(parameters) if isinstance(p, DTensor)}
        self.own = [
            nn.Parameter(local(p), p.requires_grad) if index in self._cut else p for index, p in enumerate(parameters)
        ]
        self._leaves: list[torch.Tensor] | None = None

    @property
    def uncut(self) -> list[nn.Parameter]:
        """Of `own`, what is whole on every worker."""
        return [p for index, p in enumerate(self.own) if index not in self._cut]

    # -- gradients ---------------------------------------------------------------------------------
    def leaves(self) -> list[torch.Tensor]:
        """The parameters that a graph of the network ends in. At the first call all workers gather the blocks one by one."""
        if self._leaves is None:  # FSDP2 makes them once, and fills them anew for each pass
            self._leaves = self.uncut
            for unit in self._units:
                unit.unshard()
                self._leaves += [p for p in unit.parameters() if p.requires_grad]
                unit.reshard()
        return self._leaves

    def collect(self) -> None:
        """After a backward pass: add what FSDP2 has left of the blocks' mean gradients to those of `own`."""
        for index, parameter in self._cut.items():
            if parameter.grad is None:
                continue
            own, gradient = self.own[index], local(parameter.grad)
            parameter.grad = None
            if own.grad is None:
                own.grad = gradient
            else:
                own.grad += gradient

    def norm(self, tensors: list[torch.Tensor], average: Average) -> torch.Tensor:
        """The 2-norm of what all workers have together of tensors like `own`: parts of all, and once what is whole."""
        cut = [tensor for index, tensor in enumerate(tensors) if index in self._cut]
        uncut = [tensor for index, tensor in enumerate(tensors) if index not in self._cut]
        squares = nn.utils.get_total_norm(cut).square()[None]
        average([squares])
        return (self.mesh.size() * squares[0] + nn.utils.get_total_norm(uncut).square()).sqrt()

    # -- state -------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, torch.Tensor]:
        """As the whole network's, in main memory, on rank 0; others take part and get tensors without numbers."""
        return {name: self._kept(value) for name, value in self.network.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """This worker's part of a whole network's state. Raises RuntimeError: tensors are missing, unknown or of another shape."""
        own = self.network.state_dict()
        wrong = sorted(own.keys() ^ state.keys()) or [n for n, value in own.items() if value.shape != state[n].shape]
        if wrong:
            raise RuntimeError(
                f"{len(wrong)} tensors are missing, unknown or of another shape, the first is {wrong[0]}"
            )
        for name, value in own.items():
            local(value).copy_(_part_of(value, state[name]) if isinstance(value, DTensor) else state[name])

    def moments(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state of an optimizer of `own` as that of one of whole parameters; see `state_dict`."""
        return state | {"state": {n: self._of_cut(n, of, self._whole_moment) for n, of in state["state"].items()}}

    def own_moments(self, state: dict[str, Any]) -> dict[str, Any]:
        """This worker's part of an optimizer's state, of whole parameters."""
        return state | {"state": {n: self._of_cut(n, of, _part_of) for n, of in state["state"].items()}}

    def _of_cut(self, index: int, state: dict[str, Any], change: Callable[..., torch.Tensor]) -> dict[str, Any]:
        """One parameter's state, with its moments changed; the number of steps is no moment."""
        if index not in self._cut:
            return state
        return {name: value if name == "step" else change(self._cut[index], value) for name, value in state.items()}

    def _whole_moment(self, like: DTensor, part: torch.Tensor) -> torch.Tensor:
        cut = like.device_mesh, like.placements
        return self._kept(DTensor.from_local(part, *cut, run_check=False, shape=like.shape, stride=like.stride()))

    def _kept(self, value: torch.Tensor) -> torch.Tensor:
        """A tensor, whole, in main memory on rank 0. All workers call it."""
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        return whole.detach().cpu() if self.whole is not None else whole.new_empty(0, device="cpu")

    @contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        """On rank 0 the whole network, which runs there alone; on others what they have. All workers begin it together."""
        tensors = (
            {}
            if self.whole is None
            else dict(itertools.chain(self.whole.named_parameters(), self.whole.named_buffers()))
        )
        for name, value in self.network.state_dict().items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value.detach()
            if self.whole is not None:
                tensors[name].data = whole
        if self.whole is None:
            yield self.network
            return
        try:
            yield self.whole
        finally:
            for parameter in self.whole.parameters():
                parameter.data = parameter.new_empty(0)
