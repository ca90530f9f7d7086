"""The fake score: a trainable copy of the teacher that follows the student's own distribution.

    lora       LoRA on a frozen copy; starts at zero, so that it starts as the teacher
    full       a copy, all of it trained; starts as the teacher
    truncated  the copy's first and last transformer blocks, all of them trained; must learn to do without the others

Its features at one block, or at several, also feed the discriminator.

A frozen copy can be shared by all workers (`mesh`): each holds an equal part of every block, and gathers a block for as
long as it computes with it, forwards and backwards. Blocks are FSDP2 units of their own, without a common root: a pass
for features alone ends in the middle, and leaves no unit waiting for the others. All workers must run equally many passes.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from raydistill.config.networks import FakeScoreConfig
from raydistill.errors import InputError
from raydistill.spaces.base import Conditioning, Space


class _FeaturesReached(Exception):
    """Ends a forward pass once the wanted block has answered; carries nothing, never leaves `features`."""


def truncate(space: Space, network: nn.Module, config: FakeScoreConfig) -> nn.Module:
    """`network`, changed in place, without the blocks that a truncated fake score does without.

    Raises:
        InputError: the network cannot be cut, or has too few blocks.
    """
    quarter = -(-len(space.blocks(network)) // 4)
    first, last = (quarter if count is None else count for count in (config.first_blocks, config.last_blocks))
    try:
        return space.truncated(network, first, last)
    except ValueError as error:
        remedy = "change fake_score.first_blocks or fake_score.last_blocks" if quarter else "use lora or full"
        raise InputError(f"fake_score.kind=truncated: {error}; {remedy}") from None


def feature_blocks(space: Space, network: nn.Module, depths: Sequence[float]) -> list[nn.Module]:
    """The blocks that the discriminator reads, in the order in which they run.

    Raises:
        InputError: two of the depths are the same block, as in a network of few blocks.
    """
    blocks = space.feature_blocks(network, depths)
    for index, block in enumerate(blocks[1:], 1):
        if any(block is other for other in blocks[:index]):
            raise InputError(
                f"discriminator.depths: {depths[index - 1]:g} and {depths[index]:g} are the same block of the fake score; "
                "name fewer depths, or depths that are further apart"
            )
    return blocks


def _round(network: nn.Module, dtype: torch.dtype) -> None:
    """Keep frozen weights of linear layers and convolutions as autocast would round them for each forward pass.

    What autocast leaves in float32, norms for example, stays as it is; so does what is trained.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)


def _partition(blocks: list[nn.Module], mesh: DeviceMesh) -> None:
    """Leave this worker its share of the blocks' frozen parameters, on the mesh's device; what is trained stays whole."""
    # of views that are changed in place, which no network here does: the numbers are those of the whole copy
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    for block in blocks:
        trained = {p for p in block.parameters() if p.requires_grad}
        # a root's default is not to reshard
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=trained)


class FakeScore(nn.Module):
    """Network with trainable part, its denoising prediction and its features."""

    def __init__(
        self,
        space: Space,
        network: nn.Module,
        config: FakeScoreConfig,
        depths: Sequence[float],
        mesh: DeviceMesh | None = None,
    ) -> None:
        """
        Args:
            network: the teacher's, of its own copy: it is changed in place.
            depths: of the blocks whose features are read, as shares of those that the network has here; increasing.
            mesh: the workers among whom the frozen base is partitioned; None: each has all of it.

        Raises:
            InputError: `config` asks for a truncated network, and this one cannot be cut so; or see `feature_blocks`.
        """
        super().__init__()
        self.space = space
        if config.kind == "lora":
            network.requires_grad_(False)
            lora = LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=list(space.lora_targets))
            network = inject_adapter_in_model(
                lora, network
            )  # in the dtype of what it adapts, so before that is rounded
            if config.base_dtype != "float32":
                _round(network, getattr(torch, config.base_dtype))
            if mesh is not None:
                _partition(space.large_blocks(network), mesh)
        else:
            network = truncate(space, network, config) if config.kind == "truncated" else network
            network.requires_grad_(True)
        self.network = network.eval()
        self._features: dict[int, Any] = {}  # what each of the blocks has answered last
        self._stop = self._ends_graph = False
        blocks = feature_blocks(space, self.network, depths)
        self._count = len(blocks)
        for index, block in enumerate(blocks):
            block.register_forward_hook(functools.partial(self._keep, index))

    def _keep(self, index: int, module: nn.Module, inputs: Any, output: Any) -> None:
        self._features[index] = output
        if index < self._count - 1:
            return
        if self._stop:
            raise _FeaturesReached
        if self._ends_graph:
            torch.set_grad_enabled(False)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of what is trained and checkpointed."""
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    def forward(
        self, x_t: torch.Tensor, t_B: torch.Tensor, conditioning: Conditioning
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(native prediction [B, C, H, W], features [B, D, h, w] of each depth) of one conditional evaluation."""
        prediction = self.space.predict(self.network, x_t, t_B, conditioning)
        return prediction, self._take(x_t)

    def shared(
        self, x_t: torch.Tensor, t_B: torch.Tensor, conditioning: Conditioning
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """As `forward`, but features alone have a graph: the blocks behind the last of them keep nothing for a backward pass."""
        with torch.set_grad_enabled(torch.is_grad_enabled()):  # restores what the hook changes
            self._ends_graph = True
            try:
                prediction = self.space.predict(self.network, x_t, t_B, conditioning)
            finally:
                self._ends_graph = False
        return prediction.detach(), self._take(x_t)

    def features(self, x_t: torch.Tensor, t_B: torch.Tensor, conditioning: Conditioning) -> list[torch.Tensor]:
        """Features only, [B, D, h, w] of each depth; the blocks behind the last one that is read do not run."""
        self._stop = True
        try:
            self.space.predict(self.network, x_t, t_B, conditioning)
        except _FeaturesReached:
            return self._take(x_t)
        finally:
            self._stop = False
        raise RuntimeError("the feature block did not run")

    def _take(self, x_t: torch.Tensor) -> list[torch.Tensor]:
        outputs, self._features = self._features, {}
        return [self.space.feature_map(outputs[index], x_t) for index in range(self._count)]
