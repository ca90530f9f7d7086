"""One step of SD 1.5 with its Bridge at real size, with random weights, on the CPU: forward, loss, gradient, update.

The student's UNet (860 M parameters) draws latents of 4 x 64 x 64 in one evaluation, the Bridge (real width and depth, on
the real VAE decoder's first blocks) maps them to the teacher's 16 x 128 x 128, and the VSD loss sends its gradient back
through the frozen Bridge. Takes about a minute or two on one core, and 12 GB.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn

from raydistill.benchmark.measure import markdown, option, resident, timed
from raydistill.benchmark.models import random_conditioning, random_weights
from raydistill.bridge.model import Bridge
from raydistill.config.reading import CONFIGS, load
from raydistill.diffusion.noise import normal
from raydistill.distillation.losses import vsd_gradient, vsd_loss
from raydistill.spaces.meta import numel, open_space
from raydistill.spaces.one_step import one_step_x0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    option(parser, "--config", "sd35_medium_sd15", "of configs/, decides the teacher's space")
    option(parser, "--threads", 2, "CPU threads")
    option(parser, "--dry-run", False, "the miniature world's sizes")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = load(CONFIGS / f"{'shapes' if arguments.dry_run else arguments.config}.yaml", ["bridge.checkpoint=null"])
    student, teacher = open_space(config.student.model), open_space(config.teacher.model)
    before = resident()
    unet = _filled(student.load_network()).requires_grad_(True)
    unet.enable_gradient_checkpointing()
    bridge = Bridge.create(student, teacher, config.bridge)  # a real projector on a decoder without weights
    for name, module in bridge.named_children():
        if any(parameter.is_meta for parameter in module.parameters()):
            setattr(bridge, name, _filled(module))
    bridge = bridge.eval().requires_grad_(False)
    bridge.projector.gradient_checkpointing = True
    optimizer = torch.optim.SGD(unet.parameters(), lr=1e-6)  # AdamW's two moments would add 7 GB and no shape
    conditioning = random_conditioning(student, 1)
    noise = normal(0, torch.tensor([0]), student.latent_shape, "latents")
    found: dict[str, torch.Tensor] = {}

    def forward() -> None:
        found["z_student"] = one_step_x0(student, unet, noise, conditioning, config.student.start_timestep)
        found["x"] = bridge(found["z_student"])

    def backward() -> None:
        x = found["x"]
        scores = [torch.randn_like(x) for _ in range(2)]  # of a teacher and a fake score that are not here
        found["loss"] = vsd_loss(x, vsd_gradient(x, *scores))
        found["loss"].backward()

    seconds = {"forward": timed(forward), "loss and gradient": timed(backward)}
    weight = next(unet.parameters())
    old = weight.detach().clone()
    norm = torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0).item()
    seconds["update"] = timed(optimizer.step)
    return {
        "pair": f"{config.student.model} -> {config.teacher.model}",
        "parameters": numel(unet),
        "bridge_parameters": numel(bridge.projector),
        "z_S": list(found["z_student"].shape),
        "x": list(found["x"].shape),
        "loss": found["loss"].item(),
        "gradient_norm": norm,
        "without_gradient": [name for name, parameter in unet.named_parameters() if parameter.grad is None],
        "finite": bool(torch.isfinite(found["x"]).all()) and norm == norm,
        "changed": not torch.equal(old, weight.detach()),
        "seconds": seconds,
        "held_bytes": resident() - before,
        "threads": arguments.threads,
    }


def _filled(module: nn.Module) -> nn.Module:
    if named := [name for name, _ in module.named_buffers()]:  # constructors compute them, but not on the meta device
        raise ValueError(f"{type(module).__name__}: nothing here computes its buffers {', '.join(named)}")
    return random_weights(module)


def table(result: dict[str, Any]) -> str:
    rows = [(phase, f"{seconds:.1f} s") for phase, seconds in result["seconds"].items()]
    rows += [("memory held after it", f"{result['held_bytes'] / 1e9:.1f} GB")]
    notes = (
        f"{result['pair']}, {result['parameters']:,} parameters and a Bridge of {result['bridge_parameters']:,}; latents "
        f"{result['z_S']} -> {result['x']}; loss {result['loss']:.4g}, gradient norm {result['gradient_norm']:.4g}, "
        f"{'all finite' if result['finite'] else 'NOT FINITE'}, {len(result['without_gradient'])} parameters without "
        f"gradient, weights {'changed' if result['changed'] else 'DID NOT CHANGE'}. Random weights, float32, "
        f"{result['threads']} threads, one step, SGD."
    )
    return f"{markdown('phase | one sample', '{} | {}', rows)}\n\n{notes}"
