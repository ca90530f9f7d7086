"""Load a frozen diffusion network whole: a teacher that fits one device needs no other rank, and no hooks around its layers.

Ranks of a replica never meet. Each works on its slices of a request with a network of its own.
"""

from __future__ import annotations

import torch

from raydistill.config.networks import TeacherServiceConfig
from raydistill.spaces.base import Space
from raydistill.spaces.channels_last import lay_out
from raydistill.spaces.meta import numel
from raydistill.teachers import speed


class Whole:
    """A teacher as a rank holds all of it: see `zero3.Partitioned` for the other kind.

    Attributes:
        network: to be called as it is.
    """

    def __init__(self, space: Space, config: TeacherServiceConfig, device: torch.device) -> None:
        """Raises InputError: weights are missing, or do not fit config.json; or a setting cannot work on this node."""
        dtype, quantised = getattr(torch, config.dtype), config.quantize != "none"
        self.network = space.load_network(dtype, None if quantised else device)
        self._facts: dict[str, float] = dict.fromkeys(("numel", "full_numel"), numel(self.network))
        speed.set_attention(self.network, config)
        if quantised:
            self._facts["quantize_cosine"] = speed.measured_quantise(space, self.network, config, device)
        if config.channels_last:
            lay_out(space, self.network)
        if config.compile:
            speed.compile_blocks(space, self.network)
            batch = speed.FixedBatch(space, config.counted_slice, dtype, device)
            batch.scores(
                self.network, space.default_guidance_scale
            )  # compiled now, and not in the first request's time

    def facts(self) -> dict[str, float]:
        """numel: elements that this rank holds; full_numel: of the network; of a quantised one `quantize_cosine`."""
        return self._facts

    def recover(self) -> None:
        """Nothing is left of a forward that failed."""
