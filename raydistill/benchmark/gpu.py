"""Real sizes with random weights on a GPU: guided scores, a student step and its memory, what the Bridge adds to a picture.

Needs no Ray, no weights and no network. `--dry-run` walks the same path on the CPU with the miniature world's sizes; its
times mean nothing. Without a GPU, and without that option, it says so and measures nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from raydistill.benchmark import speeds
from raydistill.benchmark.measure import interleaved, markdown, milliseconds, option
from raydistill.benchmark.models import random_conditioning, random_weights, score_inputs, zero3_group
from raydistill.bridge.model import Bridge
from raydistill.config.reading import CONFIGS, load
from raydistill.planning.counting import empty_bridge
from raydistill.planning.counts import Cost
from raydistill.planning.meter import Meter, counted
from raydistill.precision import autocast
from raydistill.spaces import Space, load_space
from raydistill.spaces.meta import open_space
from raydistill.spaces.one_step import one_step_x0
from raydistill.storage.resolve import resolve

TEACHERS = (
    "stabilityai/stable-diffusion-3.5-medium",
    "black-forest-labs/FLUX.2-klein-base-4B",
    "black-forest-labs/FLUX.1-dev",
)
BRIDGED = {"SDXL": "stabilityai/stable-diffusion-xl-base-1.0", "SD 3.5": TEACHERS[0], "FLUX.2": TEACHERS[1]}
STUDENT = "stable-diffusion-v1-5/stable-diffusion-v1-5"
TARGET = 0.6  # of the matrix peak measured on the same card
PAPER_ADDED_MS = {"SDXL": 6.01, "SD 3.5": 7.45, "FLUX.2": 18.01}  # to a student's picture (H100, batch 1)
STEP_SAMPLES = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    option(parser, "--teachers", TEACHERS, "hub models whose configurations are in the package")
    option(parser, "--batches", [1, 4, 16], "samples per forward")
    option(parser, "--repeats", 5, "forwards that are timed")
    option(parser, "--no-compile", False, "leave torch.compile out")
    option(parser, "--dry-run", False, "tiny sizes on the CPU, to see that it runs")
    option(parser, "--kind", "", "name of the GPU in gpus.yaml; found by the driver's name where it is left out")
    option(parser, "--speeds", "", "file of the planner (plan.measured) for the speeds; its own where it is left out")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    if not torch.cuda.is_available() and not arguments.dry_run:
        return {"skipped": "there is no GPU here, so the section gpu was not measured"}
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    teachers = ["shapes:flux", "shapes:sd3"] if arguments.dry_run else arguments.teachers
    result: dict[str, Any] = {
        "torch": torch.__version__,
        "dry_run": arguments.dry_run,
        "repeats": arguments.repeats,
        "matrix_tflops": _matrix_peak(device),
        "zero3": _zero3(device),
        "student": _student_step(arguments, device),
        "bridges": _bridges(arguments, device),
        "encoders": speeds.encoders(
            "shapes:sd3" if arguments.dry_run else TEACHERS[0],
            lambda call: _seconds(call, arguments.repeats, device),
            device,
        ),
        "scores": [row for teacher in teachers for row in _scores(teacher, arguments, device)],
    }
    for row in result["scores"]:
        row["of_peak"] = row["tflops"] / result["matrix_tflops"]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "a CPU"
    return result | {"speeds": speeds.keep(arguments, name, result)}


def _seconds(action: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Median seconds of a call, after two that warm up."""
    return interleaved({"call": action}, repeats, 2, device)["call"]


def _matrix_peak(device: torch.device) -> float:
    """TFLOP/s of a large bfloat16 matrix product."""
    size = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: a @ b, 20, device) / 1e12


def _scores(model: str, arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Guided scores in bfloat16, compiled and not."""
    space, rows = open_space(model), []
    scale, dtype = space.default_guidance_scale, torch.bfloat16
    with counted() as meter, torch.no_grad():
        network, inputs = space.load_network(), score_inputs(space, 1, device="meta")
        flops = meter.count(lambda: space.predict_x0(network, *inputs, scale)).flops
    network = random_weights(space.load_network(dtype), device)
    kinds = {"eager": network}
    if not (arguments.no_compile or arguments.dry_run):
        kinds["compiled"] = torch.compile(network)
    for batch in arguments.batches:
        inputs = score_inputs(space, batch, dtype, device)
        for kind, called in kinds.items():
            print(f"{model}, {batch} samples, {kind} …", flush=True)
            try:
                with torch.no_grad():
                    score = partial(space.predict_x0, called, *inputs, scale)
                    seconds = _seconds(score, arguments.repeats, device)
            except torch.cuda.OutOfMemoryError:
                print("  out of memory", flush=True)
                continue
            tflops = batch * flops / seconds / 1e12
            rows.append({"model": model, "batch": batch, "kind": kind, "seconds": seconds, "tflops": tflops})
    if device.type == "cuda":
        del network, kinds
        torch.cuda.empty_cache()
    return rows


def _bridge(student: Space, teacher: Space, arguments: argparse.Namespace, device: torch.device) -> Bridge:
    config = load(None if arguments.dry_run else CONFIGS / "sd35_medium_sd15.yaml", ["bridge.checkpoint=null"])
    return random_weights(empty_bridge(config, student, teacher), device)


def _step_of_student(arguments: argparse.Namespace, device: torch.device) -> Callable[[], None]:
    """Forward through student and Bridge, backward, AdamW; float32 weights under bfloat16 autocast, nothing recomputed."""
    student, teacher = map(open_space, ("shapes:sd15", "shapes:flux") if arguments.dry_run else (STUDENT, TEACHERS[0]))
    unet = random_weights(student.load_network(), device).requires_grad_(True)
    bridge = _bridge(student, teacher, arguments, device)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-6, betas=(0.0, 0.999))
    noise = torch.randn(STEP_SAMPLES, *student.latent_shape, device=device)
    conditioning = random_conditioning(student, STEP_SAMPLES, device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, enabled=True):
            x = bridge(one_step_x0(student, unet, noise, conditioning, 999))
        x.float().square().mean().backward()
        optimizer.step()

    return step


def _student_step(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Seconds, and peak bytes of its tensors: `counted_bytes` as the plan counts them, `peak_bytes` as they were.

    On a GPU these are torch's own record; on the CPU, which has none, the tensors that were alive.
    """
    print(f"student + Bridge, {STEP_SAMPLES} samples …", flush=True)
    row: dict[str, Any] = {"batch": STEP_SAMPLES}
    with counted() as meter:
        cost = _second(meter, _step_of_student(arguments, torch.device("meta")))
    row |= {"counted_bytes": cost.peak, "flops": cost.flops, "flops_32": cost.flops_32}
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    row["seconds"] = _seconds(_step_of_student(arguments, device), arguments.repeats, device)
    if device.type == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        torch.cuda.empty_cache()
    else:
        with Meter(device.type) as meter:
            row["peak_bytes"] = _second(meter, _step_of_student(arguments, device)).peak
    return row


def _second(meter: Meter, step: Callable[[], None]) -> Cost:
    """What a step's second call does: the first makes the optimizer's state."""
    step()
    return meter.count(step)


def _bridges(arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Seconds of the Bridge and of both decoders for one picture, in bfloat16.

    `added_s` is what the paper names: Bridge and teacher's decoder instead of the student's decoder.
    """
    student, rows, dtype = open_space("shapes:sd15" if arguments.dry_run else STUDENT), [], torch.bfloat16
    z_student = torch.randn(1, *student.latent_shape, device=device, dtype=dtype)
    student_vae = random_weights(student.load_part("vae", dtype), device)
    for name, model in ({"SD 3.5": "shapes:sd3"} if arguments.dry_run else BRIDGED).items():
        print(f"Bridge to {name} …", flush=True)
        teacher = open_space(model)
        bridge = _bridge(student, teacher, arguments, device).to(dtype)
        vae = random_weights(teacher.load_part("vae", dtype), device)
        z_teacher = torch.randn(1, *teacher.latent_shape, device=device, dtype=dtype)
        calls = {
            "bridge_s": lambda b=bridge: b(z_student),
            "teacher_decoder_s": lambda v=vae, z=z_teacher: v.decode(z),
            "student_decoder_s": lambda: student_vae.decode(z_student),
        }
        with torch.no_grad():
            row = interleaved(calls, 4 * arguments.repeats, 2, device)
        row["added_s"] = row["bridge_s"] + row["teacher_decoder_s"] - row["student_decoder_s"]
        rows.append({"teacher": name, "paper_added_ms": PAPER_ADDED_MS[name]} | row)
    return rows


def _zero3(device: torch.device) -> dict[str, Any]:
    """The miniature FLUX as a ZeRO-3 engine of one rank: the largest difference from the plain network."""
    if find_spec("deepspeed") is None:
        return {"skipped": "deepspeed is not installed"}
    store = torch.distributed.TCPStore("127.0.0.1", 0, 1, True)
    with zero3_group(0, 1, store, device) as zero3, torch.no_grad():
        space = load_space(resolve("shapes:flux"))
        engine = zero3.load_partitioned(space, torch.float32, device, 0, 1)
        x_t, t_B, conditioning, _ = score_inputs(space, 4, device=device)

        def score(network: Any) -> torch.Tensor:
            return space.predict_x0(network, x_t, t_B, conditioning, None, 1.0)

        difference = (score(engine) - score(space.load_network().to(device))).abs().max().item()
        seconds = _seconds(lambda: score(engine), 5, device)
        return {"backend": torch.distributed.get_backend(), "difference": difference, "seconds": seconds}


def table(result: dict[str, Any]) -> str:
    if "skipped" in result:
        return result["skipped"]
    scores = markdown(
        "teacher | samples |  | guided score | TFLOP/s | of the measured matrix peak",
        "{model} | {batch} | {kind} | {seconds:ms} | {tflops:.3g} | {of_peak:.0%}",
        result["scores"],
    )
    bridges = markdown(
        "Bridge to | Bridge | teacher's decoder | student's decoder | added to a picture | paper (H100)",
        "{teacher} | {bridge_s:ms} | {teacher_decoder_s:ms} | {student_decoder_s:ms} | {added_s:+ms} | +{paper_added_ms} ms",
        result["bridges"],
    )
    student = result["student"]
    counted_bytes, peak = student["counted_bytes"], student["peak_bytes"]
    lines = [
        f"matrix peak {result['matrix_tflops']:.3g} TFLOP/s in bfloat16; student + Bridge step of {student['batch']} samples "
        f"{milliseconds(student['seconds'])}; target of the scores {TARGET:.0%}",
        f"peak memory of that step: counted {counted_bytes / 1e9:.3g} GB, measured {peak / 1e9:.3g} GB, "
        f"measured / counted {peak / counted_bytes:.3f}",
        "added to a picture: Bridge + teacher's decoder - student's decoder, in bfloat16, batch 1",
        speeds.line(result["speeds"]),
        "ZeRO-3: " + ", ".join(f"{key} {value}" for key, value in result["zero3"].items()),
        f"torch {result['torch']}; medians of {result['repeats']}; random weights",
    ]
    if result["dry_run"]:
        lines.append("DRY RUN on the CPU with tiny sizes: the times mean nothing.")
    return "\n\n".join([scores, bridges, "\n".join(lines)])
