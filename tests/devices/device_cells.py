"""Cells (a family, a role) in this process: `python device_cells.py FOLDER FAMILY:ROLE …` writes FOLDER/cells.json.

A process of its own: the pretence stays for good.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import sys
import time
import traceback
import warnings
from pathlib import Path

import pretended_cuda


def imports() -> None:
    """Before the pretence: libraries look for CUDA when they are imported."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ["DS_ACCELERATOR"] = "cuda"
    warnings.filterwarnings("ignore")
    import diffusers.models.transformers  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    import raydistill

    torch.set_num_threads(1)
    for package in ("bridge", "data", "diffusion", "distillation", "evaluation", "planning", "spaces"):
        for module in pkgutil.iter_modules([f"{raydistill.__path__[0]}/{package}"]):
            importlib.import_module(f"raydistill.{package}.{module.name}")


def begin() -> None:
    """Guard, imports, pretence; in this order."""
    pretended_cuda.load()
    imports()
    pretended_cuda.replace_functions()


def run(cells: list[str], folder: Path) -> list[dict]:
    import pretended_attention
    from device_bench import FAMILIES, Bench
    from device_roles import NUMBERS, ROLES
    from pretended_tensors import Notes, PretendedTensors

    notes = Notes()
    pretended_attention.install(lambda: notes)
    benches, done = {}, []
    for family, role in (cell.split(":") for cell in cells):
        assert family.partition("+")[0] in FAMILIES, family
        started = time.process_time()
        if family not in benches:
            benches[family] = Bench(family, folder / family)
        columns = benches[family].batches(1)
        row = {name: column.nbytes for name, column in next(columns).items() if name != "sample_id"}
        told = {"family": family, "role": role, "error": None, "conditioning": row}  # bytes of a sample's
        mode = PretendedTensors(ROLES[role] in NUMBERS)
        notes = mode.notes
        try:
            with mode:
                ROLES[role](benches[family], mode)
        except Exception:
            told["error"] = traceback.format_exc()
        done.append(told | {"seconds": time.process_time() - started, "notes": notes.told()})
    return done


def main(folder: str, *cells: str) -> None:
    begin()
    Path(folder, "cells.json").write_text(json.dumps(run(list(cells), Path(folder)), indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
