"""Training of a Bridge, in plain torch: one object that takes steps, validates and can be saved at any step.

Noise, sampled rows and the order of batches follow from (seed, step), so a resumed run repeats the numbers of an
uninterrupted one. arXiv 2606.32020: Adam(0, 0.999, 1e-8), alpha = 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from raydistill import config as configuration
from raydistill.bridge.attention import AttentionProbe, sample_rows
from raydistill.bridge.losses import bridge_loss, latent_l1
from raydistill.bridge.model import Bridge
from raydistill.data.pairs import Pairs, PairSet, split
from raydistill.diffusion.noise import normal
from raydistill.evaluation.grids import grid
from raydistill.evaluation.metrics import l1, psnr, ssim
from raydistill.spaces.base import Conditioning, Space

VALIDATION_PAIRS = 256  # pictures that are decoded at most; more would not change the second digit
DECODE_BATCH = 16
PICTURES = 8


class TrainingDiverged(ArithmeticError):
    """A loss or gradient is not finite."""


class Captions:
    """Teacher conditioning of prompts.

    Up to `table_limit` distinct prompts are encoded once, in fixed chunks, and the text encoders are let go; of more
    prompts a table would not fit, so each batch is encoded when needed. Either way a batch's numbers depend on it alone.

    Args:
        space: the teacher's.
        prompts: all prompts that may be asked for.
        device: where the encoders run and conditioning is returned.
        chunk: prompts encoded at once.
    """

    def __init__(
        self,
        space: Space,
        prompts: Sequence[str],
        device: torch.device | str = "cpu",
        table_limit: int = 4096,
        chunk: int = 64,
    ) -> None:
        distinct = sorted(set(prompts))
        self._space, self._device = space, device
        self._text = space.load_text().to(device)
        self._row: dict[str, int] | None = None
        if len(distinct) <= table_limit:
            parts = [self._encode(distinct[start : start + chunk]) for start in range(0, len(distinct), chunk)]
            self._table = {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}
            self._row = {prompt: row for row, prompt in enumerate(distinct)}
            self._text = None

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        return self._space.encode_prompts(self._text, prompts)

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of a batch of prompts, [B, …] each."""
        if self._row is None:
            return self._encode(prompts)
        rows = torch.tensor([self._row[prompt] for prompt in prompts])
        return {name: value[rows].to(self._device) for name, value in self._table.items()}


class BridgeTrainer:
    """Takes steps on a Bridge.

    Args:
        bridge: trained in place.
        pairs: latents of the same pictures in both spaces.
        settings: the `bridge` section of the configuration.
        seed: of noise, rows, order and the split into training and held-out pairs.
        device: where everything runs.
        rank, world_size: this worker among all; a step's batch is divided evenly between them.
        probe: the teacher's attention; None trains on L1 alone.
        captions: conditioning for the probe.

    Raises:
        ValueError: the Bridge has nothing to train, the batch cannot be divided, or probe and weight disagree.
    """

    def __init__(
        self,
        bridge: Bridge,
        pairs: PairSet,
        settings: configuration.Bridge,
        seed: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        probe: AttentionProbe | None = None,
        captions: Captions | None = None,
    ) -> None:
        if not bridge.trainable_parameters():
            raise ValueError("bridge.projector identity has nothing to train")
        if settings.batch_size % world_size:
            raise ValueError(f"bridge.batch_size ({settings.batch_size}) must be a multiple of {world_size} workers")
        if settings.attention.weight > 0 and (probe is None or captions is None):
            raise ValueError("bridge.attention.weight is above 0: the trainer needs an attention probe and captions")
        self.bridge = bridge.to(device).train()
        self.module: nn.Module = self.bridge
        if world_size > 1:
            devices = [torch.device(device)] if torch.device(device).type == "cuda" else None
            self.module = nn.parallel.DistributedDataParallel(self.bridge, device_ids=devices)
        self.pairs, self.settings, self.seed, self.device = pairs, settings, seed, device
        self.rank, self.world_size = rank, world_size
        self.probe, self.captions = probe, captions
        self.optimizer = torch.optim.Adam(bridge.trainable_parameters(), lr=settings.lr, betas=(0.0, 0.999), eps=1e-8)
        self.training_ids, self.held_out_ids = split(pairs, settings.validation_share, seed)
        self._order = lru_cache(maxsize=2)(lambda epoch: pairs.order(self.training_ids, seed, epoch))
        self._vae: nn.Module | None = None
        self.step_count = 0

    # -- training ----------------------------------------------------------------------------------
    def batch(self, step: int) -> Pairs:
        """This worker's share of step `step` (from 0). Epochs follow each other without a gap."""
        share = self.settings.batch_size // self.world_size
        first = step * self.settings.batch_size + self.rank * share
        epochs, offsets = np.divmod(np.arange(first, first + share), len(self.training_ids))
        return self.pairs.rows([self._order(int(e))[o] for e, o in zip(epochs, offsets, strict=True)])

    def lr(self, step: int) -> float:
        """Learning rate of step `step` (from 0)."""
        settings = self.settings
        if settings.lr_decay == "none":
            return settings.lr
        return settings.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, step / settings.steps)))

    def step(self, batch: Pairs) -> dict[str, float]:
        """One Adam update; returns this worker's losses.

        Raises:
            TrainingDiverged: a loss is not finite; nothing was updated.
        """
        weight = self.settings.attention.weight
        z_S, z_T = batch.z_S.to(self.device).float(), batch.z_T.to(self.device).float()
        teacher_inputs: dict[str, Any] = {}
        if weight > 0:
            noise = normal(self.seed, batch.ids, z_T.shape[1:], "bridge_noise", self.step_count)
            teacher_inputs = {
                "probe": self.probe,
                "noise": noise.to(self.device),
                "conditioning": self.captions(batch.prompts),
                "rows": sample_rows(self.seed, self.step_count, self.settings.attention.rows),
            }
        loss, parts = bridge_loss(self.module(z_S), z_T, weight, **teacher_inputs)
        values = {f"loss/{name}": float(value.detach()) for name, value in (("bridge", loss), *parts.items())}
        wrong = [name for name, value in values.items() if not np.isfinite(value)]
        if wrong:
            raise TrainingDiverged(
                f"step {self.step_count}: {', '.join(wrong)} is not finite; a lower bridge.lr may help"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(self.step_count)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.step_count += 1
        return values

    # -- validation --------------------------------------------------------------------------------
    @torch.no_grad()
    def validation(self) -> tuple[dict[str, float], Image.Image]:
        """Fidelity of D_T(ẑ_T) to D_T(z_T) on held-out pairs, and a picture: teacher above, Bridge below.

        Keys: eval/psnr (dB), eval/ssim, eval/l1 (images on the [0, 1] scale) and eval/latent_l1.
        """
        teacher = self.bridge.teacher
        if self._vae is None:
            self._vae = teacher.load_vae().to(self.device)
        ids = self.held_out_ids[:VALIDATION_PAIRS]
        scores: dict[str, list[torch.Tensor]] = {key: [] for key in ("psnr", "ssim", "l1", "latent_l1")}
        shown: Image.Image | None = None
        self.bridge.eval()
        for start in range(0, len(ids), DECODE_BATCH):
            batch = self.pairs.rows(ids[start : start + DECODE_BATCH])
            z_T = batch.z_T.to(self.device).float()
            z_hat = self.bridge(batch.z_S.to(self.device).float())
            true, made = teacher.decode(self._vae, z_T), teacher.decode(self._vae, z_hat)
            for key, metric in (("psnr", psnr), ("ssim", ssim), ("l1", l1)):
                scores[key].append(metric(made, true).cpu())
            scores["latent_l1"].append(latent_l1(z_hat, z_T).cpu().expand(len(batch)))
            shown = shown or _comparison(true, made, batch.prompts)
        self.bridge.train()
        return {f"eval/{key}": float(torch.cat(values).mean()) for key, values in scores.items()}, shown

    # -- state -------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Projector, optimizer and step; the frozen parts are not in it."""
        return {
            "projector": self.bridge.projector.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step_count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bridge.projector.load_state_dict(state["projector"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step_count = state["step"]


def _comparison(true: torch.Tensor, made: torch.Tensor, prompts: Sequence[str]) -> Image.Image:
    true, made = true[:PICTURES].cpu(), made[:PICTURES].cpu()
    captions = [*prompts[: len(true)], *["Bridge"] * len(made)]
    return grid(torch.cat([true, made]), captions, columns=len(true), title="teacher latents (above), Bridge (below)")
