"""Training of the miniature world, stage by stage, seeded and resumable.

    judge, text encoders, VAEs -> teachers, students -> one-step starts, teacher samples -> Bridges

Every stage ends in one finished folder and is skipped when that folder is there; an interrupted stage goes on from its
last training state. The renders' captions never include a held-out one. Flux and SD 3 share a VAE, as both students do,
so that two Bridges serve six pairs. Runs with Sana, or with SDXL as the student, train their own Bridge first.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from tqdm import tqdm

from raydistill.build_shapes.bridges import build_bridge, build_samples
from raydistill.build_shapes.frame import Build
from raydistill.build_shapes.models import MODELS, STUDENTS, TEACHERS, build_model
from raydistill.build_shapes.parts import PARTS, build_judge, build_part, is_built
from raydistill.build_shapes.starts import build_prompts, build_start
from raydistill.storage.atomic import follow_umask

SHIPPED: dict[str, tuple[str, Callable[[Build], None]]] = {  # with the file that says that it is complete
    "judge": ("judge/judge.safetensors", build_judge),
    **{name: (f"{name}/.built", partial(build_model, name=name)) for name in MODELS},
    "prompts": ("heldout.txt", build_prompts),
    **{f"{name}_start": (f"{name}-onestep/.built", partial(build_start, name=name)) for name in STUDENTS},
    **{f"{name}_samples": (f"samples/{name}/.built", partial(build_samples, name=name)) for name in TEACHERS},
    **{
        f"{name}_bridge": (f"bridge/sd15-{name}/bridge.json", partial(build_bridge, name=name))
        for name in ("flux", "sdxl")
    },
}
STAGES = (*PARTS, *SHIPPED)


def forget_paths(folder: Path) -> None:
    """Remove where a part was loaded from out of the configuration files: it says nothing to others."""
    for file in folder.rglob("config.json"):
        config = json.loads(file.read_text())
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2) + "\n")


def link_duplicates(weights: Path) -> None:
    """Ship a part that several models share once: the others get a relative link to the first one's folder."""
    first: dict[str, Path] = {}
    parts = (part for model in sorted(MODELS) for part in sorted((weights / model).glob("*")))
    for folder in (part for part in parts if part.is_dir() and not part.is_symlink()):
        digest = hashlib.sha256()
        for file in sorted(folder.rglob("*")):
            digest.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
        original = first.setdefault(digest.hexdigest(), folder)
        if original != folder:
            shutil.rmtree(folder)
            folder.symlink_to(os.path.relpath(original, folder.parent))


def run_stages(build: Build, names: Iterable[str]) -> None:
    """Run the named stages in their order, skipping what is already built."""
    for name in names:
        if is_built(build, name) if name in PARTS else (build.weights / SHIPPED[name][0]).exists():
            tqdm.write(f"{name}: already built")
        elif name in PARTS:
            build_part(build, name)
        else:
            marker, stage = SHIPPED[name]
            stage(build)
            forget_paths((build.weights / marker).parent)
            follow_umask((build.weights / marker).parent)
            (build.weights / marker).touch()
    if all((build.weights / marker).exists() for marker, _ in SHIPPED.values()):  # no other process builds any more
        link_duplicates(build.weights)
