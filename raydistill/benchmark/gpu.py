"""Real sizes with random weights on a GPU: guided scores, a student step and its memory, what the Bridge adds to a picture.

Needs no Ray, no weights and no network. `--dry-run` walks the same path on the CPU with the miniature world's sizes; its
times mean nothing. Without a GPU, and without that option, it says so and measures nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

TEACHERS = (
    "stabilityai/stable-diffusion-3.5-medium",
    "black-forest-labs/FLUX.2-klein-base-4B",
    "black-forest-labs/FLUX.1-dev",
)
STUDENT = "stable-diffusion-v1-5/stable-diffusion-v1-5"
TARGET = 0.6  # of the matrix peak measured on the same card
PAPER_ADDED_MS = {"SDXL": 6.01, "SD 3.5": 7.45, "FLUX.2": 18.01}  # to a student's picture (H100, batch 1)
STEP_SAMPLES = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--teachers", nargs="*", default=TEACHERS, help="hub models whose configurations are in the package"
    )
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 16], help="samples per forward")
    parser.add_argument("--repeats", type=int, default=5, help="forwards that are timed")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, to see that it runs")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available() and not arguments.dry_run:
        return {"skipped": "there is no GPU here, so the section gpu was not measured"}
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    result: dict[str, Any] = {"torch": torch.__version__, "dry_run": arguments.dry_run, "repeats": arguments.repeats}
    result["matrix_tflops"] = _matrix_peak(device)
    result["zero3"] = _zero3(device)
    result["student"] = _student_step(arguments, device)
    result["bridges"] = _bridges(arguments, device)
    result["scores"] = []
    for teacher in arguments.teachers if not arguments.dry_run else ["shapes:flux", "shapes:sd3"]:
        result["scores"] += _scores(teacher, arguments, device)
    for row in result["scores"]:
        row["of_peak"] = row["tflops"] / result["matrix_tflops"]
    return result


def _seconds(action: Callable[[], Any], repeats: int, device: Any) -> float:
    """Median seconds of a call, after two that warm up; waits for the device."""
    import torch

    from raydistill.benchmark.measure import median

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    taken = []
    for i in range(repeats + 2):
        wait()
        started = time.perf_counter()
        action()
        wait()
        if i >= 2:
            taken.append(time.perf_counter() - started)
    return median(taken)


def _matrix_peak(device: Any) -> float:
    """TFLOP/s of a large bfloat16 matrix product."""
    import torch

    size = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: a @ b, 20, device) / 1e12


def _random_part(space: Any, name: str, dtype: Any, device: Any) -> Any:
    """A network of the family at its real size with small random weights, made on the device."""
    import torch

    from raydistill.spaces.folder import diffusers_class

    config = space.part_config(name)
    with torch.device("meta"):
        network = diffusers_class(config).from_config(config)
    buffers = {name: buffer for name, buffer in network.named_buffers() if buffer.device.type == "meta"}
    network = network.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.02)
        for buffer in map(network.get_buffer, buffers):  # tables of positions: their values do not change the time
            buffer.normal_(std=0.02) if buffer.is_floating_point() else None
    return network.eval().requires_grad_(False)


def _conditioning(space: Any, batch: int, dtype: Any, device: Any) -> dict[str, Any]:
    import torch

    return {
        name: torch.randn(batch, *shape, device=device).to(dtype)
        if kind.is_floating_point
        else torch.ones(batch, *shape, dtype=kind, device=device)
        for name, (shape, kind) in space.conditioning_layout.items()
    }


def _open(model: str) -> Any:
    """A Space whose configuration is at hand, with its own way of loading networks."""
    from raydistill.spaces.meta import open_space
    from raydistill.storage.resolve import local_path

    return open_space(str(local_path(model)) if model.startswith("shapes:") else model)


def _flops(space: Any, batch: int, scale: float) -> float:
    """Of one guided score of `batch` samples, counted."""
    import torch

    from raydistill.planning.meter import counted
    from raydistill.spaces.meta import empty_conditioning, empty_part

    layout = space.conditioning_layout
    with counted() as meter, torch.no_grad():
        network = empty_part(space, space.network_name)
        inputs = torch.empty(batch, *space.latent_shape, device="meta"), torch.empty(batch, device="meta")
        conditioning, empty = empty_conditioning(layout, batch), empty_conditioning(layout, 1)
        return meter.count(lambda: space.predict_x0(network, *inputs, conditioning, empty, scale)).flops


def _scores(model: str, arguments: argparse.Namespace, device: Any) -> list[dict[str, Any]]:
    """Guided scores in bfloat16, compiled and not."""
    import torch

    space, rows = _open(model), []
    scale = space.default_guidance_scale
    one = _flops(space, 1, scale)
    network = _random_part(space, space.network_name, torch.bfloat16, device)
    kinds = {"eager": network} | (
        {} if arguments.no_compile or arguments.dry_run else {"compiled": torch.compile(network)}
    )
    for batch in arguments.batches:
        x_t = torch.randn(batch, *space.latent_shape, device=device)
        t_B = torch.full((batch,), 0.5, device=device)
        conditioning = _conditioning(space, batch, torch.bfloat16, device)
        empty = _conditioning(space, 1, torch.bfloat16, device)
        for kind, called in kinds.items():
            print(f"{model}, {batch} samples, {kind} …", flush=True)
            row = {"model": model, "batch": batch, "kind": kind}
            try:
                with torch.no_grad():
                    row["seconds"] = _seconds(
                        lambda c=called, a=(x_t, t_B, conditioning, empty): space.predict_x0(c, *a, scale),
                        arguments.repeats,
                        device,
                    )
            except torch.cuda.OutOfMemoryError:
                print("  out of memory", flush=True)
                continue
            rows.append(row | {"tflops": batch * one / row["seconds"] / 1e12})
    if device.type == "cuda":
        del network, kinds
        torch.cuda.empty_cache()
    return rows


def _bridge(student: Any, teacher: Any, arguments: argparse.Namespace, device: Any) -> Any:
    import torch

    from raydistill.bridge.model import Bridge
    from raydistill.config.reading import CONFIGS, load

    config = load(None if arguments.dry_run else CONFIGS / "sd35_medium_sd15.yaml", ["bridge.checkpoint=null"])
    with torch.device("meta"):
        bridge = Bridge.create(student, teacher, config.bridge)
    bridge = bridge.to_empty(device=device)
    with torch.no_grad():
        for parameter in bridge.parameters():
            parameter.normal_(std=0.02)
        for buffer in bridge.buffers():
            buffer.zero_()
    return bridge.eval().requires_grad_(False)


def _step_of_student(arguments: argparse.Namespace, device: Any) -> Callable[[], None]:
    """Forward through student and Bridge, backward, AdamW; float32 weights under bfloat16 autocast, nothing recomputed."""
    import torch

    from raydistill.precision import autocast
    from raydistill.spaces.one_step import one_step_x0

    student = _open("shapes:sd15" if arguments.dry_run else STUDENT)
    teacher = _open("shapes:flux" if arguments.dry_run else TEACHERS[0])
    unet = _random_part(student, student.network_name, torch.float32, device).requires_grad_(True)
    bridge = _bridge(student, teacher, arguments, device)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-6, betas=(0.0, 0.999))
    noise = torch.randn(STEP_SAMPLES, *student.latent_shape, device=device)
    conditioning = _conditioning(student, STEP_SAMPLES, torch.float32, device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, enabled=True):
            x = bridge(one_step_x0(student, unet, noise, conditioning, 999))
        x.float().square().mean().backward()
        optimizer.step()

    return step


def _student_step(arguments: argparse.Namespace, device: Any) -> dict[str, Any]:
    """Seconds, and peak bytes of its tensors: `counted_bytes` as the plan counts them, `peak_bytes` as they were.

    On a GPU these are torch's own record; on the CPU, which has none, the tensors that were alive.
    """
    import torch

    from raydistill.planning.meter import Meter, counted

    print(f"student + Bridge, {STEP_SAMPLES} samples …", flush=True)
    row: dict[str, Any] = {"batch": STEP_SAMPLES}
    with counted() as meter:
        row["counted_bytes"] = _peak_of_second(meter, _step_of_student(arguments, torch.device("meta")))
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    row["seconds"] = _seconds(_step_of_student(arguments, device), arguments.repeats, device)
    if device.type == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        torch.cuda.empty_cache()
    else:
        with Meter(device.type) as meter:
            row["peak_bytes"] = _peak_of_second(meter, _step_of_student(arguments, device))
    return row


def _peak_of_second(meter: Any, step: Callable[[], None]) -> int:
    """Most live bytes in a step's second call: the first makes the optimizer's state."""
    step()
    return meter.count(step).peak


def _bridges(arguments: argparse.Namespace, device: Any) -> list[dict[str, Any]]:
    """Seconds of the Bridge and of both decoders for one picture, in bfloat16.

    `added_s` is what the paper names: Bridge and teacher's decoder instead of the student's decoder.
    """
    import torch

    names = {"SDXL": "stabilityai/stable-diffusion-xl-base-1.0", "SD 3.5": TEACHERS[0], "FLUX.2": TEACHERS[1]}
    if arguments.dry_run:
        names = {"SD 3.5": "shapes:sd3"}
    student, rows = _open("shapes:sd15" if arguments.dry_run else STUDENT), []
    z_S = torch.randn(1, *student.latent_shape, device=device, dtype=torch.bfloat16)
    student_vae = _random_part(student, "vae", torch.bfloat16, device)
    for name, model in names.items():
        print(f"Bridge to {name} …", flush=True)
        teacher = _open(model)
        bridge = _bridge(student, teacher, arguments, device).to(torch.bfloat16)
        teacher_vae = _random_part(teacher, "vae", torch.bfloat16, device)
        z_T = torch.randn(1, *teacher.latent_shape, device=device, dtype=torch.bfloat16)
        row: dict[str, Any] = {"teacher": name, "paper_added_ms": PAPER_ADDED_MS[name]}
        with torch.no_grad():
            for part, call in {
                "bridge": lambda b=bridge: b(z_S),
                "teacher_decoder": lambda vae=teacher_vae, z=z_T: vae.decode(z),
                "student_decoder": lambda: student_vae.decode(z_S),
            }.items():
                row[f"{part}_s"] = _seconds(call, 4 * arguments.repeats, device)
        rows.append(row | {"added_s": row["bridge_s"] + row["teacher_decoder_s"] - row["student_decoder_s"]})
    return rows


def _zero3(device: Any) -> dict[str, Any]:
    """The miniature FLUX as a ZeRO-3 engine of one rank: the largest difference from the plain network."""
    import os

    try:
        import deepspeed  # noqa: F401
    except ImportError:
        return {"skipped": "deepspeed is not installed"}
    import torch

    from raydistill.spaces import load_space
    from raydistill.storage.resolve import resolve
    from raydistill.teachers import zero3

    os.environ |= {"DS_ACCELERATOR": device.type, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    store = torch.distributed.TCPStore("127.0.0.1", 0, 1, True)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    zero3.init_process_group(0, 1, store, device)
    try:
        space = load_space(resolve("shapes:flux"))
        engine = zero3.load_partitioned(space, torch.float32, device, 0, 1)
        whole = space.load_network().to(device)
        inputs = torch.randn(4, *space.latent_shape, device=device), torch.full((4,), 0.5, device=device)
        conditioning = _conditioning(space, 4, torch.float32, device)
        with torch.no_grad():
            a, b = (space.predict_x0(network, *inputs, conditioning, None, 1.0) for network in (engine, whole))
            seconds = _seconds(lambda: space.predict_x0(engine, *inputs, conditioning, None, 1.0), 5, device)
        backend = torch.distributed.get_backend()
        return {"backend": backend, "difference": (a - b).abs().max().item(), "seconds": seconds}
    finally:
        torch.distributed.destroy_process_group()


def table(result: dict[str, Any]) -> str:
    from raydistill.benchmark.measure import markdown, milliseconds

    if "skipped" in result:
        return result["skipped"]
    scores = markdown(
        ("teacher", "samples", "", "guided score", "TFLOP/s", "of the measured matrix peak"),
        [
            (
                row["model"], row["batch"], row["kind"], milliseconds(row["seconds"]), f"{row['tflops']:.3g}",
                f"{row['of_peak']:.0%}",
            )
            for row in result["scores"]
        ],
    )  # fmt: skip
    bridges = markdown(
        ("Bridge to", "Bridge", "teacher's decoder", "student's decoder", "added to a picture", "paper (H100)"),
        [
            (
                row["teacher"],
                *(milliseconds(row[f"{part}_s"]) for part in ("bridge", "teacher_decoder", "student_decoder")),
                f"{1e3 * row['added_s']:+.3g} ms",
                f"+{row['paper_added_ms']} ms",
            )
            for row in result["bridges"]
        ],
    )
    student, zero3 = result["student"], result["zero3"]
    lines = [
        f"matrix peak {result['matrix_tflops']:.3g} TFLOP/s in bfloat16; student + Bridge step of {student['batch']} samples "
        f"{milliseconds(student['seconds'])}; target of the scores {TARGET:.0%}",
        f"peak memory of that step: counted {student['counted_bytes'] / 1e9:.3g} GB, measured "
        f"{student['peak_bytes'] / 1e9:.3g} GB, measured / counted {student['peak_bytes'] / student['counted_bytes']:.3f}",
        "added to a picture: Bridge + teacher's decoder - student's decoder, in bfloat16, batch 1",
        "ZeRO-3: " + ", ".join(f"{key} {value}" for key, value in zero3.items()),
        f"torch {result['torch']}; medians of {result['repeats']}; random weights",
    ]
    if result["dry_run"]:
        lines.append("DRY RUN on the CPU with tiny sizes: the times mean nothing.")
    return f"{scores}\n\n{bridges}\n\n" + "\n".join(lines)
