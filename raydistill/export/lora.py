"""The student as a LoRA: what distance it has from its base, in few directions.

Of a layer's difference D the first singular directions are kept, as many as hold the asked share of |D|². A LoRA has no
place for norms and biases, so it is near the student and not the same. One picture is drawn with base and LoRA, and
card and screen say how far it is from the student's own.

Letters: M rows (output features), N columns (input features times the kernel's pixels), R rank.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from peft import LoraConfig
from torch import nn

from raydistill.errors import InputError
from raydistill.export.cards import outside_card
from raydistill.export.one_picture import difference, load_float32, written_arguments
from raydistill.export.own_lora import BEGINS, FILE, FOLDER, Begins, from_pretrained, repository, save_lora, usage_of
from raydistill.export.source import Export, open_student_export
from raydistill.spaces import load_student_space
from raydistill.spaces.base import Space
from raydistill.spaces.published_students import load_student
from raydistill.spaces.settings import diffusers_class, read_settings
from raydistill.spaces.starts import load_start
from raydistill.spaces.weights import read_header
from raydistill.storage.resolve import resolve

ADAPTED = (nn.Linear, nn.Conv2d)
NEAR = 8.0  # 255ths; a picture that differs more is another one to the eye


def truncated(difference_MN: torch.Tensor, energy: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(down [R, N], up [M, R], the kept part of |D|²) of the best product of the smallest rank that keeps `energy`.

    The left singular vectors are eigenvectors of D Dᵀ, which is quicker than a decomposition of a wide D; a tall one is
    transposed. In float64.
    """
    D = difference_MN.double()
    if D.shape[0] > D.shape[1]:
        down_RM, up_NR, kept = truncated(D.T, energy)
        return up_NR.T.contiguous(), down_RM.T.contiguous(), kept
    squares, vectors = torch.linalg.eigh(D @ D.T)  # ascending
    squares, vectors = squares.flip(0).clamp_min(0), vectors.flip(1)
    shares = squares.cumsum(0) / squares.sum()
    rank = min(int((shares < energy).sum()) + 1, int((squares > 1e-14 * squares[0]).sum()))
    up, balance = vectors[:, :rank], squares[:rank] ** 0.25  # both factors get the root of the singular value
    return (up.T @ D / balance[:, None]).contiguous(), (up * balance).contiguous(), float(squares[:rank].sum())


@dataclass
class Lora:
    """A LoRA of a network and what it holds of the difference."""

    state: dict[str, torch.Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)  # layer -> rank
    kept: float = 0.0  # of |student - base|², the part that the LoRA has
    whole: float = 0.0  # |student - base|² over all weights, norms and biases too

    def config(self) -> LoraConfig:
        """Every layer has alpha = rank, so that the product is added as it is."""
        usual = Counter(self.ranks.values()).most_common(1)[0][0]
        # "^": a name is the whole path, for peft would find conv_in in other.conv_in too
        others = {f"^{name}": rank for name, rank in self.ranks.items() if rank != usual}
        return LoraConfig(
            r=usual,
            lora_alpha=usual,
            rank_pattern=others,
            alpha_pattern=dict(others),
            target_modules=sorted(self.ranks),
        )


def lora_of(student: nn.Module, base: nn.Module, energy: float, done: Callable[[], object] = lambda: None) -> Lora:
    """The difference of two networks of one architecture.

    Args:
        energy: share of every layer's |D|² to keep, above 0 and at most 1.
        done: called after each layer.

    Raises:
        InputError: the networks are of another architecture, or equal.
    """
    ours, theirs = student.state_dict(), base.state_dict()
    if {name: value.shape for name, value in ours.items()} != {name: value.shape for name, value in theirs.items()}:
        raise InputError("the base's network has other tensors than the student's; a LoRA needs the same network")
    lora = Lora()
    lora.whole = sum(float((ours[name].double() - theirs[name].double()).square().sum()) for name in ours)
    for name, layer in student.named_modules():
        if not isinstance(layer, ADAPTED):
            continue
        D = ours[f"{name}.weight"].float() - theirs[f"{name}.weight"].float()
        if D.any():
            down_RN, up_MR, kept = truncated(D.flatten(1), energy)
            lora.ranks[name], lora.kept = up_MR.shape[1], lora.kept + kept
            pixel = (1, 1) if D.ndim == 4 else ()
            lora.state[f"{name}.lora_A.weight"] = down_RN.reshape(-1, *D.shape[1:]).half()
            lora.state[f"{name}.lora_B.weight"] = up_MR.reshape(*up_MR.shape, *pixel).half()
        done()
    if not lora.ranks:
        raise InputError("the student's network has the base's weights; there is nothing to write")
    return lora


def find_base(export: Export, base: str | None) -> tuple[Space, str]:
    """(Space, name) of the student's base model: as named, or `student.model` of the run.

    Raises:
        InputError: neither is known, or it is of a family that gives no students.
    """
    config = export.run_config()
    name = base or (config and config.student.model)
    if name is None:
        raise InputError(f"{export.folder} does not lie in a run's folder that tells its base: name --base")
    folder = resolve(name)
    if not folder.exists():
        raise InputError(f"--base: {name} does not exist")
    return load_student_space(folder), name


def write_lora(
    export: Export, base: Space, base_name: str, energy: float, folder: Path, done: Callable[[], object] = lambda: None
) -> str:
    """Write the LoRA, the scheduler that it needs and README.md; then draw a picture with base and LoRA.

    A student that was trained as a LoRA gives its own, whatever `energy` says.

    Args:
        base, base_name: what `find_base` found, and how people name it.
        energy, done: as of `lora_of`.
        folder: an empty one.

    Returns one line: ranks, share of the difference, size, and how far the picture is from the export's; then, where
    that is more than `NEAR`, a warning.
    """
    if (export.folder / FOLDER / FILE).is_file():
        return _copy_own(export, base, base_name, folder)
    space, start, steps = open_student_export(export)
    space.check_takes_lora("--format lora")
    lora = lora_of(load_student(space, export.folder), base.load_network(), energy, done)
    save_lora(space, lora.state, lora.config().to_dict(), folder)
    shutil.copytree(Path(space.folder, "scheduler"), folder / "scheduler")
    apart = difference(space, lambda: load_lora(base, folder))
    size = (folder / FILE).stat().st_size / 2**20
    report = (
        f"ranks {min(lora.ranks.values())} to {max(lora.ranks.values())}, {lora.kept / lora.whole:.2%} of the "
        f"difference, {size:.1f} MiB; one picture differs by {apart:.2f} / 255 on average"
    )
    usage = _USAGE.format(
        base=base_name,
        arguments=from_pretrained(base_name),
        report=report,
        start=start,
        steps=steps,
        scheduler=type(space.scheduler).__name__,
        pipeline=space.pipeline_class,
        call=written_arguments(space, steps),
    )
    card = outside_card(Path(space.folder), usage, base_model=repository(base_name))
    (folder / "README.md").write_text(card, encoding="utf-8")
    if not apart <= NEAR:
        report += "\nwarning   that is another picture: norms and biases changed too; --format single-file is exact"
    return report


def _copy_own(export: Export, base: Space, base_name: str, folder: Path) -> str:
    """As `write_lora`, of a student that was trained as a LoRA: that one, on the run's start."""
    space, start, _ = open_student_export(export)
    shutil.copyfile(export.folder / FOLDER / FILE, folder / FILE)
    shutil.copytree(export.folder / FOLDER / "scheduler", folder / "scheduler")
    config, noted = export.run_config(), Begins.of(export.folder / FOLDER)
    known = config and Begins(base_name, config.student.unet, config.student.lora_start)
    begins = replace(noted, base=base_name) if noted else known or Begins(base_name)
    (folder / BEGINS).write_text(json.dumps(asdict(begins), indent=2), encoding="utf-8")
    network = load_start(base, begins.unet, begins.lora)
    apart = difference(space, lambda: load_lora(base, folder, network))
    rank = next(entry.shape[0] for name, entry in read_header(folder / FILE).tensors.items() if "lora_A" in name)
    report = (
        f"rank {rank}, as it was trained, {(folder / FILE).stat().st_size / 2**20:.1f} MiB; one picture differs by "
        f"{apart:.2f} / 255 on average"
    )
    usage = usage_of(space, begins, space.scheduler, start, report)
    card = outside_card(Path(space.folder), usage, base_model=repository(base_name))
    (folder / "README.md").write_text(card, encoding="utf-8")
    if not apart <= NEAR:
        report += "\nwarning   that is another picture: base and start are not those that the LoRA was trained on"
    return report


def load_scheduler(folder: Path) -> SchedulerMixin:
    """The one-step scheduler of a pipeline's or a LoRA's folder."""
    file = folder / "scheduler" / "scheduler_config.json"
    return diffusers_class(read_settings(file)).from_pretrained(folder, subfolder="scheduler")


def load_lora(base: Space, folder: Path, network: nn.Module | None = None) -> DiffusionPipeline:
    """Base and LoRA in float32, as the README says; with the network that the LoRA belongs to, where it is not the base's."""
    pipe = load_float32(Path(base.folder))
    if network is not None:
        setattr(pipe, base.network_name, network)
    pipe.scheduler = load_scheduler(folder)
    pipe.load_lora_weights(folder)
    return pipe


_USAGE = """# Text-to-image student, LoRA

**Draw with num_inference_steps={steps} and guidance off, and with the scheduler of this folder.** Other settings draw grey or broken pictures.

The LoRA turns its base, {base}, into a student of {steps} step(s): {report}.

```python
from diffusers import {scheduler}, {pipeline}

pipe = {pipeline}.from_pretrained({arguments})
pipe.scheduler = {scheduler}.from_pretrained("PATH_OF_THIS_FOLDER", subfolder="scheduler")
pipe.load_lora_weights("PATH_OF_THIS_FOLDER")
image = pipe("a prompt", {call}).images[0]
```

Start timestep: {start}. Norms and biases are not in a LoRA. For the exact student take the pipeline folder or the single file.
"""
