"""A reward of the student's own pictures in its loss: direct reward gradients (DRaFT, arXiv 2309.17400; ReFL, arXiv
2304.05977; beside a distribution matching loss: Diff-Instruct++, arXiv 2410.18881).

    loss  +=  - w · mean r(D_S(z_S), prompt)          D_S: the student's whole VAE decoder, frozen; r: a frozen scorer

z_S is the student's x0, so a student of one step has its whole path in the gradient (DRaFT-1). The teacher's side sees B(z_S)
and never D_S(z_S): this is the one term that looks at what ships.

Each picture is decoded by itself, and its gradient dr/dz_S taken at once, before the next one is decoded. The loss then is
linear in z_S with this gradient. So one picture's activations are alive at a time, however large the batch is, and a sample's
numbers do not depend on the others.

Shapes: B samples of a micro-batch, c×h×w student latents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from raydistill.config.networks import RewardConfig
from raydistill.config.schema import Config
from raydistill.distillation.batches import MicroBatch
from raydistill.distillation.gradients import Gradients
from raydistill.distillation.networks import Networks
from raydistill.distillation.rates import reward_weight
from raydistill.distillation.readings import Row
from raydistill.distillation.reward_models import model_of
from raydistill.precision import autocast
from raydistill.spaces import Conditioning, Space


class Reward(nn.Module):
    """r(D_S(z_S), prompt): the student's VAE decoder, then a reward of pictures. Both are frozen."""

    def __init__(self, space: Space, model: nn.Module, recompute: bool = False) -> None:
        """
        Args:
            model: pictures [B, 3, S, S] in [-1, 1] and what it knows of prompts -> [B].
            recompute: the decoder's activations in the backward pass, block by block (`distill.gradient_checkpointing`).
        """
        super().__init__()
        self.space, self.vae, self.model = space, space.load_vae(), model
        for name in ("encoder", "quant_conv"):  # of which no picture needs anything
            if isinstance(getattr(self.vae, name, None), nn.Module):
                setattr(self.vae, name, nn.Identity())
        if recompute and getattr(self.vae, "_supports_gradient_checkpointing", False):
            self.vae.enable_gradient_checkpointing()
        self.eval().requires_grad_(False)

    def forward(self, latents: torch.Tensor, texts: Conditioning) -> torch.Tensor:
        """[B] float32, of normalised latents [B, c, h, w]; of a picture that is not finite it is not either."""
        return self.model(self.space.decode_each(self.vae, latents), texts).float()


def load_reward(config: Config, space: Space, places: Mapping[str, str] | None) -> Reward | None:
    """None: the configuration asks for none.

    Args:
        space: the student's.
        places: folder of each of the reward's weights, by name (`evaluation.metrics.reward_places`).

    Raises:
        InputError: weights that cannot be read.
        ValueError: places of no weights are given, and a reward is asked for.
    """
    reward = config.reward
    if not reward.is_on:
        return None
    if places is None:
        raise ValueError(f"reward.metric={reward.metric}: nobody has said where its weights are")
    return Reward(space, model_of(reward.metric, places, space.resolution), config.distill.gradient_checkpointing)


def is_chosen(reward: RewardConfig, sample_id: int) -> bool:
    """Whether a sample is decoded: `reward.share` of all, evenly over the sample ids, however they are cut into batches."""
    return math.floor((sample_id + 1) * reward.share) > math.floor(sample_id * reward.share)


class RewardTerm:
    """The reward in one worker's student updates.

    Args:
        model: moves to the networks' device.
    """

    def __init__(self, model: Reward, networks: Networks, gradients: Gradients) -> None:
        self.model, self.networks, self.gradients = model.to(networks.device), networks, gradients
        self.config = networks.config.reward

    def watched(self, row: Row, z_student: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
        """z_S [B, c, h, w] as the other losses take it, through the Bridge.

        A backward pass adds to the row the mean square of their gradient, in the units of `Adversary.watched`.
        """
        scale = z_student.numel() * self.gradients.mean_micro_batches / (micro_batch.weight or 1.0)
        through = z_student.view_as(z_student)
        through.register_hook(lambda g: row.update({"others/gradient_square": g.float().square().mean() * scale**2}))
        return through

    def pull(self, row: Row, z_student: torch.Tensor, micro_batch: MicroBatch, updates: int) -> torch.Tensor:
        """-w · mean r, of the samples that are chosen; those that are not count as their mean.

        Args:
            updates: of the student, before this one.
        """
        finite, detached = self.networks.finite, z_student.detach()
        rewards, gradients = detached.new_zeros(len(detached), dtype=torch.float32), torch.zeros_like(detached)
        for index, sample_id in enumerate(micro_batch.sample_ids.tolist()):
            if is_chosen(self.config, sample_id):
                one = slice(index, index + 1)
                texts = {name: value[one] for name, value in micro_batch.reward_conditioning.items()}
                rewards[one], gradients[one] = self._with_gradient(detached[one], texts)
        finite.note(rewards, "the reward")
        finite.note(gradients, "the reward's gradient")
        count = self.config.share * len(detached)
        weight = reward_weight(self.config, updates)
        row["reward/mean"] = rewards.sum() / count
        row["reward/gradient_square"] = (weight / self.config.share * detached[0].numel() * gradients).square().mean()
        linear = ((z_student - detached) * gradients).sum()  # 0, and its gradient is dr/dz_S
        return -weight * (rewards.sum() + linear) / count

    def _with_gradient(self, latents: torch.Tensor, texts: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
        """r(D_S(z), prompt) [B] and its gradient [B, c, h, w] with respect to latents that have no graph."""
        networks = self.networks
        with torch.enable_grad(), autocast(networks.device, networks.config.distill.mixed_precision):
            latents = latents.requires_grad_(True)
            rewards = self.model(latents, networks.on_device(texts))
        return rewards.detach(), torch.autograd.grad(rewards.sum(), latents)[0]
