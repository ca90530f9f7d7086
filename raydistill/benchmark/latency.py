"""What one picture costs: the one-step student alone, and with the Bridge and each teacher's decoder (batch 1)."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

PAIRS = (
    "shapes:bridge/sd15-flux=shapes:flux",
    "shapes:bridge/sd15-flux=shapes:sd3",
    "shapes:bridge/sd15-sdxl=shapes:sdxl",
)
PROMPT = "a small red circle at the left on a white background"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--student", default="shapes:sd15", help="the student's diffusers folder")
    parser.add_argument(
        "--pairs", nargs="*", default=PAIRS, metavar="BRIDGE=TEACHER", help="Bridges and the teachers whose VAEs decode"
    )
    parser.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")
    parser.add_argument("--dtype", default=None, choices=("float32", "bfloat16", "float16"), help="default: float32 on "
        "a CPU, else float16")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=20, help="pictures that are timed")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = arguments.dtype or ("float32" if device == "cpu" else "float16")
    rows = []
    for pair in [None, *arguments.pairs]:
        task = {
            "student": arguments.student, "pair": pair, "device": device, "dtype": dtype, "repeats": arguments.repeats,
        }  # fmt: skip
        # a process of its own: peak memory is the highest since the process began
        done = subprocess.run(
            [sys.executable, "-m", __name__, json.dumps(task)], stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"latency of {pair or arguments.student} could not be measured (see above)")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    return {"device": device, "dtype": dtype, "rows": rows}


def measure_one(student: str, pair: str | None, device: str, dtype: str, repeats: int) -> dict[str, Any]:
    """Medians of the parts of one picture, seconds, and the process's (on a GPU: the tensors') peak bytes."""
    import resource
    from pathlib import Path

    import torch

    from raydistill.benchmark.measure import interleaved
    from raydistill.export.sampling import Painter
    from raydistill.export.upgrade import Upgrade
    from raydistill.pictures.picture import Picture
    from raydistill.spaces import load_space
    from raydistill.spaces.published_students import load_student
    from raydistill.storage.resolve import resolve

    space, upgrade = load_space(resolve(student)), None
    if pair is not None:
        bridge, _, teacher = pair.partition("=")
        upgrade = Upgrade(Path(resolve(bridge)), space, load_space(resolve(teacher)))
    network = load_student(space, Path(space.folder))
    painter = Painter(space, network, upgrade=upgrade, device=device, dtype=getattr(torch, dtype))
    picture = [Picture(0, 0, PROMPT, 0)]
    z_S = painter.latents(picture)
    decoder = painter.decoder
    z = z_S if decoder.bridge is None else decoder.bridge(z_S)
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def waited(action: Any) -> Any:
        def call() -> None:
            with torch.no_grad():
                action()
            wait()

        return call

    parts = {
        "student": waited(lambda: painter.latents(picture)),
        "decode": waited(lambda: decoder.space.decode(decoder.vae, z)),
        "total": waited(lambda: decoder(painter.latents(picture))),
    }
    if decoder.bridge is not None:
        parts["bridge"] = waited(lambda: decoder.bridge(z_S))
    seconds = interleaved(parts, repeats, warm_up=3)
    if device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"student": student, "pair": pair, "seconds": seconds, "peak_bytes": peak, "side": z.shape[-1]}


def table(result: dict[str, Any]) -> str:
    from raydistill.benchmark.measure import markdown, megabytes, milliseconds

    base = result["rows"][0]
    lines = []
    for row in result["rows"]:
        seconds = row["seconds"]
        more = seconds["total"] - base["seconds"]["total"]
        lines.append(
            (
                row["student"] if row["pair"] is None else "+ " + row["pair"].replace("=", ", VAE of "),
                milliseconds(seconds["student"]),
                milliseconds(seconds["bridge"]) if "bridge" in seconds else "",
                milliseconds(seconds["decode"]),
                milliseconds(seconds["total"]),
                f"{1e3 * more:+.3g} ms" if row["pair"] else "",
                megabytes(row["peak_bytes"]),
            )
        )
    columns = ("", "text and student", "Bridge", "decoder", "picture", "over the student alone", "peak memory")
    memory = "of tensors" if result["device"].startswith("cuda") else "of the whole process"
    return (
        markdown(columns, lines)
        + f"\n\n{result['device']}, {result['dtype']} (the Bridge in float32), batch 1, medians; peak memory {memory}. The paper, "
        "at real size on an H100: 26.48 ms and 3.96 GB alone, with the Bridge to SDXL +6.01, SD 3.5 +7.45, FLUX.2 +18.01 ms."
    )


if __name__ == "__main__":
    print(json.dumps(measure_one(**json.loads(sys.argv[1]))))
