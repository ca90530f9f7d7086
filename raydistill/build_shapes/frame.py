"""What every stage of the build shares: where things go, seeded scenes, and a resumable training loop."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from raydistill.shapes import WEIGHTS
from raydistill.shapes.captions import Scene, sample_scene
from raydistill.storage.atomic import replacing

SAVE_EVERY = 250  # steps


@dataclass
class Build:
    """Where things go and how long they take."""

    work: Path  # training states, deleted when a stage ends
    weights: Path = WEIGHTS
    seed: int = 0
    scale: float = 1.0  # of every stage's number of steps; tests use a tiny one
    renders: int = 24000  # cached latents per diffusion model

    def steps(self, full: int) -> int:
        return max(2, round(full * self.scale))


def scenes_for(step: int, count: int, seed: int) -> list[Scene]:
    """The training scenes of one step: a pure function of seed and step."""
    rng = random.Random(f"{seed}/{step}")
    return [sample_scene(rng, held_out=False, two_objects=0.25) for _ in range(count)]


def fit(
    build: Build,
    name: str,
    model: nn.Module,
    loss: Callable[[int, torch.Generator], torch.Tensor],
    steps: int,
    lr: float,
    ema_decay: float = 0.999,
) -> nn.Module:
    """Train `model` with AdamW, warm-up and cosine decay, and return its exponential moving average.

    `loss(step, generator)` must depend on nothing random but the generator, so that a resumed run is the same run.
    """
    folder = build.work / name
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    average = copy.deepcopy(model).eval()
    start = 0
    if (folder / "state.pt").is_file():
        state = torch.load(folder / "state.pt", weights_only=True)
        start = state["step"]
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
    warmup = min(200, steps // 10 + 1)
    bar = tqdm(range(start, steps), desc=name, initial=start, total=steps, disable=None, mininterval=5)
    running = None
    for step in bar:
        progress = step / steps
        factor = min(1.0, (step + 1) / warmup) * (0.5 + 0.5 * torch.cos(torch.tensor(progress * torch.pi)).item())
        for group in optimizer.param_groups:
            group["lr"] = lr * max(factor, 0.02)
        generator = torch.Generator().manual_seed(build.seed * 1_000_003 + step)
        value = loss(step, generator)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(ema_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, new in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(new, 1 - decay)
            for mean, new in zip(average.buffers(), model.buffers(), strict=True):
                mean.copy_(new)
        running = value.item() if running is None else 0.98 * running + 0.02 * value.item()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{running:.4f}")
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            state = {
                "step": step + 1,
                "model": model.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            with replacing(folder / "state.pt", alone=True) as fresh:
                torch.save(state, fresh)
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps({"step": step + 1, "loss": running}) + "\n")
    return average.requires_grad_(False)


def cached(file: Path, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Tensors computed once and kept in a safetensors file."""
    if not file.is_file():
        with replacing(file, alone=True) as fresh:
            save_file({k: v.contiguous() for k, v in make().items()}, fresh)
    return load_file(file)
