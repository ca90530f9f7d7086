"""What one picture costs: the one-step student alone, and with the Bridge and each teacher's decoder (batch 1)."""

from __future__ import annotations

import argparse
import resource
from pathlib import Path
from typing import Any

import torch

from raydistill.benchmark.measure import answer, in_processes, interleaved, markdown, option
from raydistill.export.sampling import Painter
from raydistill.export.upgrade import Upgrade
from raydistill.pictures.picture import Picture
from raydistill.spaces import load_space
from raydistill.spaces.published_students import load_student
from raydistill.storage.resolve import resolve

PAIRS = (
    "shapes:bridge/sd15-flux=shapes:flux",
    "shapes:bridge/sd15-flux=shapes:sd3",
    "shapes:bridge/sd15-sdxl=shapes:sdxl",
)
PROMPT = "a small red circle at the left on a white background"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    option(parser, "--student", "shapes:sd15", "the student's diffusers folder")
    option(parser, "--pairs", PAIRS, "Bridges and the teachers whose VAEs decode", metavar="BRIDGE=TEACHER")
    option(parser, "--device", None, "default: cuda where there is one, else cpu")
    option(
        parser, "--dtype", None, "default: float32 on a CPU, else float16", choices=("float32", "bfloat16", "float16")
    )
    option(parser, "--repeats", 20, "pictures that are timed")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = arguments.dtype or ("float32" if device == "cpu" else "float16")
    common = {"student": arguments.student, "device": device, "dtype": dtype, "repeats": arguments.repeats}
    # one after the other, each in a process of its own: peak memory is the highest since the process began
    rows = [in_processes(__name__, [common | {"pair": pair}])[0] for pair in (None, *arguments.pairs)]
    return {"device": device, "dtype": dtype, "rows": rows}


def measure_one(student: str, pair: str | None, device: str, dtype: str, repeats: int) -> dict[str, Any]:
    """Medians of the parts of one picture, seconds, and the process's (on a GPU: the tensors') peak bytes."""
    space, upgrade = load_space(resolve(student)), None
    if pair is not None:
        bridge, _, teacher = pair.partition("=")
        upgrade = Upgrade(Path(resolve(bridge)), space, load_space(resolve(teacher)))
    network = load_student(space, Path(space.folder))
    painter = Painter(space, network, upgrade=upgrade, device=device, dtype=getattr(torch, dtype))
    picture, decoder = [Picture(0, 0, PROMPT, 0)], painter.decoder
    with torch.no_grad():
        z_student = painter.latents(picture)
        z = z_student if decoder.bridge is None else decoder.bridge(z_student)
        calls = {
            "student": lambda: painter.latents(picture),
            "decode": lambda: decoder.space.decode(decoder.vae, z),
            "total": lambda: decoder(painter.latents(picture)),
        }
        if decoder.bridge is not None:
            calls["bridge"] = lambda: decoder.bridge(z_student)
        seconds = interleaved(calls, repeats, 3, device)
    if device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"student": student, "pair": pair, "seconds": seconds, "peak_bytes": peak, "side": z.shape[-1]}


def table(result: dict[str, Any]) -> str:
    columns = " | text and student | Bridge | decoder | picture | over the student alone | peak memory"
    cells = "{name} | {student:ms} | {bridge:ms} | {decode:ms} | {total:ms} | {more:+ms} | {peak_bytes:MB}"
    alone, *pairs = result["rows"]
    rows = [{"bridge": "", "more": "", "name": alone["student"]} | alone | alone["seconds"]]
    for row in pairs:
        more = row["seconds"]["total"] - alone["seconds"]["total"]
        rows.append({"name": "+ " + row["pair"].replace("=", ", VAE of "), "more": more} | row | row["seconds"])
    memory = "of tensors" if result["device"].startswith("cuda") else "of the whole process"
    return (
        f"{markdown(columns, cells, rows)}\n\n"
        f"{result['device']}, {result['dtype']} (the Bridge in float32), batch 1, medians; peak memory {memory}. The paper, "
        "at real size on an H100: 26.48 ms and 3.96 GB alone, with the Bridge to SDXL +6.01, SD 3.5 +7.45, FLUX.2 +18.01 ms."
    )


if __name__ == "__main__":
    answer(measure_one)
