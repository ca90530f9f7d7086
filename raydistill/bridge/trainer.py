"""Training of a Bridge, in plain torch: one object that takes steps, validates and can be saved at any step.

Noise, sampled rows and the order of batches follow from (seed, step), so a resumed run repeats the numbers of an
uninterrupted one. arXiv 2606.32020: Adam(0, 0.999, 1e-8), alpha = 1.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from raydistill.bridge.losses import latent_l1
from raydistill.bridge.model import Bridge
from raydistill.bridge.objective import Losses, build_objective, build_streamed
from raydistill.config.schema import Config
from raydistill.data.pairs import Pairs
from raydistill.errors import NonFiniteError
from raydistill.pictures.fidelity import l1, psnr, ssim
from raydistill.pictures.grids import grid
from raydistill.spaces import load_space
from raydistill.storage.resolve import resolve
from raydistill.transfer import download

VALIDATION_PAIRS = 256  # pictures that are decoded at most; more would not change the second digit
DECODE_BATCH = 16  # at most, see Space.vae_batch
PICTURES = 8


class BridgeTrainer:
    """Takes steps on a Bridge.

    Args:
        bridge: trained in place.
        objective: its loss, on batches of pairs.

    Raises:
        ValueError: the Bridge has nothing to train.
    """

    def __init__(self, bridge: Bridge, objective: Losses) -> None:
        if not bridge.trainable_parameters():
            raise ValueError("bridge.projector identity has nothing to train")
        self.objective, self.settings, self.device = objective, objective.settings, objective.device
        self.bridge = bridge.to(self.device).train()
        self.module: nn.Module = self.bridge
        if objective.world_size > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            self.module = nn.parallel.DistributedDataParallel(self.bridge, device_ids=devices)
        trained = bridge.trainable_parameters()
        self.optimizer = torch.optim.Adam(trained, lr=self.settings.lr, betas=(0.0, 0.999), eps=1e-8)
        self._vae: nn.Module | None = None
        self.step_count = 0

    # -- training ----------------------------------------------------------------------------------
    def lr(self, step: int) -> float:
        """Learning rate of step `step` (from 0)."""
        settings = self.settings
        if settings.lr_decay == "none":
            return settings.lr
        return settings.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, step / settings.steps)))

    def step(self, batch: Pairs) -> dict[str, float]:
        """One Adam update, computed in `bridge.micro_batches` equal parts; returns this worker's losses.

        Raises:
            NonFiniteError: a loss or the gradient is not finite; nothing was updated.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(self.step_count)
        self.optimizer.zero_grad(set_to_none=True)
        count = self.settings.micro_batches
        rows = [self._accumulate(batch.micro_batch(i, count), last=i == count - 1) for i in range(count)]
        gradients = [p.grad for p in self.bridge.trainable_parameters() if p.grad is not None]
        values = self._finite(rows, torch.nn.utils.get_total_norm(gradients))
        self.optimizer.step()
        self.step_count += 1
        return {name: sum(row[name] for row in values) / count for name in values[0]}

    def _accumulate(self, micro_batch: Pairs, last: bool) -> dict[str, torch.Tensor]:
        """Add a micro-batch's share of the mean gradient; the workers' are averaged after the last. Returns its losses."""
        alone = self.module.no_sync if self.module is not self.bridge and not last else contextlib.nullcontext
        with alone():
            loss, terms = self.objective(self.module, micro_batch, self.step_count)
            (loss / self.settings.micro_batches).backward()
        return {f"loss/{name}": value.detach() for name, value in (("bridge", loss), *terms.items())}

    def _finite(self, rows: Sequence[dict[str, torch.Tensor]], norm: torch.Tensor) -> list[dict[str, float]]:
        """The losses of each micro-batch, by one wait for the device; `norm`: of the gradient, the mean of all workers.

        Raises:
            NonFiniteError: names the losses of the first micro-batch that has one, else the gradient.
        """
        scalars = [value.float() for row in rows for value in row.values()]
        numbers = iter(download([torch.stack([*scalars, norm])])[0].tolist())
        values = [{name: next(numbers) for name in row} for row in rows]
        wrong = next(filter(None, ([name for name, v in row.items() if not np.isfinite(v)] for row in values)), [])
        wrong = ", ".join(wrong) or ("" if np.isfinite(next(numbers)) else "the gradient")
        if wrong:
            raise NonFiniteError(
                f"step {self.step_count}: {wrong} is not finite; a lower bridge.lr may help",
                elsewhere=wrong == "the gradient" and self.objective.world_size > 1,
            )
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
        size = teacher.vae_batch(DECODE_BATCH)
        values: dict[str, list[torch.Tensor]] = {key: [] for key in ("psnr", "ssim", "l1", "latent_l1")}
        shown: Image.Image | None = None
        self.bridge.eval()
        for batch in self.objective.held_out(VALIDATION_PAIRS, size):
            z_teacher = batch.z_teacher.to(self.device).float()
            z_hat = self.bridge(batch.z_student.to(self.device).float())
            true, made = teacher.decode(self._vae, z_teacher), teacher.decode(self._vae, z_hat)
            for key, metric in (("psnr", psnr), ("ssim", ssim), ("l1", l1)):
                values[key].append(metric(made, true).cpu())
            values["latent_l1"].append(latent_l1(z_hat, z_teacher).cpu().expand(len(batch)))
            shown = shown or _comparison(true, made, batch.prompts)
        self.bridge.train()
        return {f"eval/{key}": float(torch.cat(each).mean()) for key, each in values.items()}, shown

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


def build_trainer(
    config: Config, pairs_folder: str | Path | None, device: torch.device | str = "cpu", **share: int | None
) -> BridgeTrainer:
    """The trainer that a configuration describes; also for use without Ray. Arguments and errors as `build_objective`.

    Without a folder its pairs come from a stream: `build_streamed`.
    """
    student, teacher = load_space(resolve(config.student.model)), load_space(resolve(config.teacher.model))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        bridge = Bridge.create(student, teacher, config.bridge)
    if config.bridge.gradient_checkpointing:
        bridge.projector.gradient_checkpointing = True  # read by SwinIR; the small projectors have no use for it
    if pairs_folder is None:
        return BridgeTrainer(bridge, build_streamed(config, device, **share))
    return BridgeTrainer(bridge, build_objective(config, pairs_folder, device, **share))
