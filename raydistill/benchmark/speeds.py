"""The share of a data sheet's peak that each role's networks reach on this GPU, for the planner (`planning.gpus`)."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from raydistill.benchmark.models import random_weights
from raydistill.config.reading import load
from raydistill.data.encode import CHUNK
from raydistill.errors import InputError
from raydistill.planning.counting import count_text, count_vae
from raydistill.planning.counts import Cost
from raydistill.planning.gpus import Gpu, keep_measured, kind_of, measured_file, read_gpus
from raydistill.spaces.meta import open_space

TEXT = "text_encoder_3"  # T5, most of a prompt's work


def encoders(model: str, seconds: Callable[[Callable[[], Any]], float], device: torch.device) -> dict[str, Any]:
    """Seconds and FLOPs of the VAE's encoder in float32, as pairs are encoded, and of the largest text encoder in bfloat16."""
    space = open_space(model)
    vae, text = count_vae(space), count_text(space)[TEXT]
    encoder = random_weights(space.load_vae(), device)
    pictures = torch.rand(vae.batch, 3, vae.side, vae.side, device=device) * 2 - 1
    t5 = random_weights(space.empty_text_encoder(TEXT).to(torch.bfloat16), device)
    ids = torch.zeros(CHUNK, space.text_lengths[TEXT], dtype=torch.long, device=device)
    with torch.no_grad():
        return {
            "vae_batch": vae.batch,
            "vae_flops": vae.encode.flops,
            "vae_s": seconds(lambda: space.encode(encoder, pictures)),
            "text_batch": CHUNK,
            "text_flops": CHUNK * text.prompt.flops,
            "text_s": seconds(lambda: t5(ids)),
        }


def shares(
    gpu: Gpu, scores: Sequence[dict[str, Any]], student: dict[str, Any], other: dict[str, Any]
) -> dict[str, float]:
    """By role, of the data sheet's peak.

    Args:
        scores: of them the best of each model counts, eager and compiled apart, and of the models the median.
        student: seconds and FLOPs of a student's step.
        other: as `encoders` gives it.
    """
    found = {
        "trainer": gpu.seconds(Cost(student["flops"], 0, student["flops_32"]), 1.0) / student["seconds"],
        "text": other["text_flops"] / (1e12 * gpu.bf16_tflops) / other["text_s"],
        "vae": other["vae_flops"] / (1e12 * gpu.float32(tf32=True)) / other["vae_s"],
    }
    for kind, role in (("eager", "teacher"), ("compiled", "teacher_compiled")):
        best: dict[str, float] = {}
        for row in (row for row in scores if row["kind"] == kind):
            best[row["model"]] = max(row["tflops"], best.get(row["model"], 0.0))
        if best:
            found[role] = statistics.median(best.values()) / gpu.bf16_tflops
    return found


def keep(arguments: argparse.Namespace, device: str, result: dict[str, Any]) -> dict[str, Any]:
    """Write the shares where the planner reads them; returns kind, shares and file, or why there are none.

    A dry run's shares are those of a CPU. They are written into a file that is named, and nowhere else.
    """
    gpus = read_gpus()
    kind = arguments.kind or kind_of(device, gpus)
    if kind not in gpus:
        return {"skipped": f"gpus.yaml has no kind for {device!r}: --kind names one of {', '.join(gpus)}"}
    if arguments.dry_run and not arguments.speeds:
        return {"skipped": "a dry run's speeds mean nothing"}
    file = Path(arguments.speeds) if arguments.speeds else measured_file(load())
    found = shares(gpus[kind], result["scores"], result["student"], result["encoders"])
    try:
        keep_measured(file, kind, found)
    except (InputError, OSError) as error:
        return {"kind": kind, "shares": found, "skipped": f"not written: {error}"}
    return {"kind": kind, "shares": found, "file": str(file)}


def line(found: dict[str, Any]) -> str:
    """What a person reads of `keep`."""
    shares = [f"{role} {share:.1%}" for role, share in found.get("shares", {}).items()]
    text = (
        f"of the data sheet's peak of {found['kind']}: {', '.join(shares)}"
        if shares
        else "speeds for the planner: none"
    )
    return f"{text}; {found['skipped'] if 'skipped' in found else 'the planner reads ' + found['file']}"
