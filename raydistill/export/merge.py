"""The mean of one-step students that were distilled from different teachers: one student of the same size and cost.

Only students of one family can be averaged: the same network, decoder and text encoder, the same
scheduler, the same start. Weights are read, averaged in float64 and written tensor by tensor.
"""

from __future__ import annotations

import hashlib
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from raydistill.errors import InputError
from raydistill.export.cards import front_matter
from raydistill.export.parts import copy_part, forget_origin
from raydistill.export.pipeline import IN_WORDS, SEVERAL, TITLES, table_rows, usage
from raydistill.export.source import Export, open_student_export
from raydistill.export.tensors import first_difference, read_tensor, write_safetensors
from raydistill.spaces.base import Space
from raydistill.spaces.published_students import open_student
from raydistill.spaces.weights import Entry, read_header
from raydistill.storage.atomic import replacing

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
PIECE = 1 << 20  # numbers that are in memory in float64
_UNKNOWN = "unknown"


@dataclass(frozen=True)
class Source:
    """One student of a merge, checked; its weights have not been read."""

    export: Export
    space: Space
    start_timestep: int
    steps: int
    tensors: Mapping[str, tuple[Path, Entry]]  # of its network: name -> (file, shape and dtype)


# -- what can be merged -----------------------------------------------------------------------------------


def shares_of(weights: Sequence[float] | None, count: int) -> list[float]:
    """`count` weights, scaled to the sum 1; equal ones for None.

    Raises:
        InputError: another number of weights, or one that is not a positive finite number.
    """
    if weights is None:
        return [1 / count] * count
    if len(weights) != count:
        raise InputError(f"{len(weights)} weights for {count} students")
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise InputError(f"weight {weight}: must be a positive number")
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def check_target(folder: Path) -> None:
    """Raises InputError where there is something already."""
    if folder.exists():
        raise InputError(f"{folder} exists already; name a new folder")


def open_sources(exports: Sequence[Export]) -> list[Source]:
    """Check that the exports are one-step students of one family. Of the networks, no weights are read.

    Raises:
        InputError: fewer than two, one of them twice, or no one-step student.
        InputError: another scheduler, start, VAE, text encoder or network; the first tensor or setting that differs
            is named.
    """
    if len(exports) < 2:
        raise InputError("a mean needs at least two students")
    folders = [export.folder.resolve() for export in exports]
    twice = next((export for export, folder in zip(exports, folders, strict=True) if folders.count(folder) > 1), None)
    if twice is not None:
        raise InputError(f"{twice.folder} is named more than once; give it a larger weight instead")
    opened = [(export, *open_student_export(export)) for export in exports]
    _, family, start, steps = opened[0]
    sources = []
    for export, space, other_start, other_steps in opened:
        if other_steps != steps:
            raise InputError(f"{export.folder} draws in {other_steps} steps, but {family.folder} in {steps}")
        if other_start != start:
            raise InputError(f"{export.folder} starts at timestep {other_start}, but {family.folder} at {start}")
        _same_scheduler(family, space)
        sources.append(Source(export, space, start, steps, _network_tensors(family, export)))
    for source in sources[1:]:  # last, since it reads these parts
        for part in (part for part in family.student_parts if not part.startswith("tokenizer")):
            difference = first_difference(family, source.space, part)
            if difference is not None:
                raise InputError(
                    f"{source.space.folder} is of another family than {family.folder}: {part}: {difference}"
                )
    return sources


def _same_scheduler(one: Space, other: Space) -> None:
    classes = [type(space.scheduler).__name__ for space in (one, other)]
    if classes[0] != classes[1]:
        raise InputError(f"{other.folder} has the scheduler {classes[1]}, but {one.folder} has {classes[0]}")
    ours, theirs = dict(one.scheduler.config), dict(other.scheduler.config)
    for key in ours:
        if not key.startswith("_") and ours[key] != theirs[key]:
            values = "" if isinstance(ours[key], list) else f": {theirs[key]!r}, not {ours[key]!r}"
            raise InputError(f"{other.folder} has another scheduler than {one.folder}: {key} differs{values}")


def _network_tensors(family: Space, export: Export) -> dict[str, tuple[Path, Entry]]:
    """Tensors of the export's network, which must be those of the family's."""
    checkpoint = open_student(family, export.folder)
    if any(file.suffix != ".safetensors" for file in checkpoint.files):
        raise InputError(f"{checkpoint.source}: is not safetensors, which alone can be read tensor by tensor")
    if checkpoint.prefix:
        raise InputError(
            f"{checkpoint.source}: its tensors are named {checkpoint.prefix}*, not as diffusers names them"
        )
    return {name: (file, entry) for file in checkpoint.files for name, entry in read_header(file).tensors.items()}


# -- the mean ---------------------------------------------------------------------------------------------


def weighted_mean(name: str, files: Sequence[Path], shares: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    """Σ share · tensor over the files' tensors of this name, summed in float64 and rounded once.

    Raises:
        InputError: a value is NaN or infinite, in a file or in the result.
    """
    tensors = [read_tensor(file, name).contiguous() for file in files]
    result = torch.empty(tensors[0].shape, dtype=dtype)
    pieces = [tensor.flatten().split(PIECE) for tensor in (result, *tensors)]
    for target, *values in zip(*pieces, strict=True):  # a whole tensor in float64 would be four times its size
        total = torch.zeros(len(target), dtype=torch.float64)
        for file, value, share in zip(files, values, shares, strict=True):
            if not value.isfinite().all():
                raise InputError(f"{file}: {name} holds NaN or infinity")
            total += value.double() * share
        target.copy_(total)
    if not result.isfinite().all():
        raise InputError(f"{name}: the mean is not finite in {dtype}, the dtype of {files[0]}")
    return result


def merge_students(
    sources: Sequence[Source],
    shares: Sequence[float],
    folder: Path,
    done: Callable[[int], object] = lambda count: None,
) -> Path:
    """Write the mean student: a complete pipeline folder like its sources', in the first one's dtype.

    Args:
        sources, shares: what `open_sources` and `shares_of` returned.
        folder: appears only when complete; must not exist.
        done: called after each tensor with 1, for a progress bar.

    Returns `folder`.

    Raises:
        InputError: `folder` exists; or a value is NaN or infinite, in a source or, rounded, in the mean.
    """
    check_target(folder)
    first, network = sources[0], sources[0].space.network_name
    entries = {name: entry for name, (_, entry) in first.tensors.items()}

    def mean(name: str) -> torch.Tensor:
        files = [source.tensors[name][0] for source in sources]
        tensor = weighted_mean(name, files, shares, getattr(torch, entries[name].dtype))
        done(1)
        return tensor

    with replacing(folder) as fresh:
        fresh.mkdir()
        for part in first.space.parts():
            if part != network:
                copy_part(Path(first.space.folder, part), fresh / part)
        (fresh / network).mkdir()
        for name in ("model_index.json", f"{network}/config.json"):
            shutil.copyfile(Path(first.space.folder, name), fresh / name)
            forget_origin(fresh / name)
        write_safetensors(fresh / network / WEIGHTS_FILE, entries, mean)
        (fresh / "README.md").write_text(model_card(sources, shares), encoding="utf-8")
    return folder


# -- provenance -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Provenance:
    """What a source's own model card says of it."""

    facts: Mapping[str, str]  # rows of its provenance table
    licence: str  # identifier of the hub
    licence_name: str
    terms: tuple[str, ...]  # lines on the licences of teacher, base and start


def read_provenance(folder: Path) -> Provenance:
    """Read README.md as `export_student` and `merge_students` write it; what it does not say is unknown."""
    file = folder / "README.md"
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    head = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    try:
        front = yaml.safe_load(head[1]) if head else {}
    except yaml.YAMLError:
        front = {}
    front = front if isinstance(front, dict) else {}
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))
    rows = re.findall(r"^\| (.+?) \| (.*?) \|$", sections.get("Provenance", ""), re.MULTILINE)
    terms = re.findall(r"^- .+$", sections.get("Licence", ""), re.MULTILINE)
    unknown = f"- {folder.name}: terms unknown, since it has no such model card. Look them up before sharing anything."
    licence = str(front.get("license", _UNKNOWN))
    return Provenance(
        {key: value.replace("&#124;", "|") for key, value in rows},
        licence,
        str(front.get("license_name", licence)),
        tuple(terms) or (unknown,),
    )


def model_card(sources: Sequence[Source], shares: Sequence[float]) -> str:
    """README.md of the mean: front matter, how to use it, where every source comes from, all licences."""
    cards = [read_provenance(Path(source.space.folder)) for source in sources]
    names = {card.licence_name for card in cards}
    licences = {card.licence for card in cards}
    one = len(licences) == len(names) == 1 and licences != {_UNKNOWN}
    family, steps = type(sources[0].space), sources[0].steps
    head = front_matter(*((licences.pop(), names.pop()) if one else SEVERAL), family.student_noun, steps)
    teachers = dict.fromkeys(card.facts.get("Teacher", _UNKNOWN) for card in cards)
    facts = {
        "Teacher": "; ".join(teachers),
        "Start timestep": sources[0].start_timestep,
        **({"Steps": steps} if steps > 1 else {}),
        "Students averaged": len(sources),
    }
    return _CARD.format(
        front=head,
        teachers=", ".join(teachers),
        title=TITLES[steps > 1],
        evaluations=IN_WORDS[steps],
        noun=family.student_noun,
        usage=usage(family, next(iter(sources[0].tensors.values()))[1].dtype, steps),
        provenance=table_rows(facts),
        sources="\n".join(map(_source_rows, sources, shares, cards)),
        terms="\n".join(dict.fromkeys(line for card in cards for line in card.terms)),
    )


def _source_rows(source: Source, share: float, card: Provenance) -> str:
    """One source: its weight, fingerprint and its own provenance."""
    part = source.space.student_noun.split()[-1]
    facts = {"Weight": f"{share:.6g}", f"{part} (sha256)": _fingerprint(source)} | dict(card.facts)
    return f"### {source.export.name}\n\n| | |\n|---|---|\n{table_rows(facts)}\n"


def _fingerprint(source: Source) -> str:
    """sha256 of the network's weight file, or of all of its shards one after another."""
    digest = hashlib.sha256()
    for file in sorted({file for file, _ in source.tensors.values()}):
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


_CARD = """---
{front}
---
# {title}, the mean of several

A {noun} that draws in {evaluations}: the weighted mean of students that were distilled from
{teachers} with raydistill.
{usage}
## Provenance

| | |
|---|---|
{provenance}

## Sources

{sources}
## Licence

The mean inherits the terms of **every** source: of each teacher and of the models and weights that the students
started from.

{terms}

This is a summary and may be out of date; the licence texts of the models decide.
"""
