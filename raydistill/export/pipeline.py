"""Write the student as a plain folder of its family's pipeline that draws in one step, or in few, anywhere diffusers runs."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import torch
from diffusers import SchedulerMixin
from torch import nn

from raydistill.errors import InputError
from raydistill.export.cards import front_matter, outside_card
from raydistill.export.few_steps import few_step_scheduler, few_step_usage, steps_of
from raydistill.export.licences import picture_licence, student_licences
from raydistill.export.one_picture import written_arguments
from raydistill.export.own_lora import FOLDER as LORA
from raydistill.export.own_lora import Begins, repository, usage_of, write_own_lora
from raydistill.export.parts import copy_part, forget_origin, rounded
from raydistill.spaces import find_family
from raydistill.spaces.adapter import has_lora, merged_state
from raydistill.spaces.base import Space
from raydistill.spaces.folder import cast
from raydistill.storage.atomic import replacing
from raydistill.storage.place import Place


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """Where an exported student comes from."""

    teacher: str  # as configured: a hub id or folder
    teacher_class: str  # diffusers class of the teacher's folder
    student: str  # its base, likewise
    student_class: str = "StableDiffusionPipeline"
    steps: int
    run_id: str = ""
    config_hash: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    start: str | None = None  # student.unet; None: the base's own UNet
    lora_start: str | None = None  # student.lora_start; None: none was merged into it
    drawer: str | None = None  # synthesis.teacher; None: no other model than the teacher drew pictures
    pictures: Sequence[tuple[str, str | None]] = ()  # sets of real pictures that it learned from: source and licence

    def markdown(self, start_timestep: int, dtype: torch.dtype, evaluations: int = 1) -> str:
        """README.md: front matter, how to use it, provenance, scores, licence; `evaluations`: of a picture."""
        family = find_family(self.student_class)
        licences = student_licences(
            self.teacher,
            self.teacher_class,
            self.student,
            self.student_class,
            self.start,
            self.drawer,
            self.lora_start,
        )
        licences += [("Pictures", source, picture_licence(name)) for source, name in self.pictures]
        kinds = {(licence.identifier, licence.name) for _, _, licence in licences}
        provenance = {
            "Teacher": self.teacher,
            "Student": self.student,
            "Student start": self.start or f"the student's own {family.student_noun.split()[-1]}",
            **({"LoRA merged into it": self.lora_start} if self.lora_start else {}),
            "Student updates": self.steps,
            "Start timestep": start_timestep,
            **({"Steps": evaluations} if evaluations > 1 else {}),
            **({"Pictures": "; ".join(source for source, _ in self.pictures)} if self.pictures else {}),
            "MLflow run": self.run_id or "–",
            "Configuration": self.config_hash or "–",
        }
        return _CARD.format(
            front=front_matter(*(kinds.pop() if len(kinds) == 1 else SEVERAL), family.student_noun, evaluations),
            title=TITLES[evaluations > 1],
            evaluations=IN_WORDS[evaluations],
            noun=family.student_noun,
            teacher=self.teacher,
            usage=usage(family, str(dtype).removeprefix("torch."), evaluations),
            provenance=table_rows(provenance),
            metrics=_metrics(self.metrics),
            licences="\n".join(f"- {role}, {model}: {terms.name}. {terms.terms}" for role, model, terms in licences),
        )


SEVERAL = ("other", "several, see below")  # identifier and name where no single licence covers a model

TITLES = "One-step text-to-image student", "Few-step text-to-image student"
IN_WORDS = {1: "**one** network evaluation", 2: "**two** network evaluations", 4: "**four** network evaluations"}


def how_to_draw(export: Place) -> str:
    """Said at the end of every job that writes a student.

    diffusers has no place in a folder for these settings: steps and guidance are arguments of `__call__`, and no scheduler's
    configuration fixes a number of steps.
    """
    index, scheduler = (
        json.loads((export / file).read_text(encoding="utf-8"))
        for file in ("model_index.json", "scheduler/scheduler_config.json")
    )
    steps = steps_of(scheduler)
    arguments = written_arguments(find_family(index["_class_name"]), steps)
    if steps == 1:
        return f"{arguments} (other tools: 1 step, CFG 1); with a prompt alone diffusers draws grey"
    return f"{arguments}; with a prompt alone diffusers asks for 50 steps and is refused"


# How an export is called; of this project's every model card.
_USAGE = """
> **Call it with `{arguments}`.** With a prompt alone, diffusers takes 50 guided steps and draws
> grey. A folder cannot change these defaults.

The folder is an ordinary `{pipeline}`; nothing else is needed to run it.

```python
import torch
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained("PATH_OF_THIS_FOLDER", dtype=torch.{dtype})
image = pipe("a prompt", {arguments}).images[0]
```

The scheduler's configuration belongs to the model; its single step returns exactly the student's estimate of the picture.
Other tools: 1 step, CFG 1, and the sigmas of the single file (`jobs/export.py --format single-file`), where there is one.
The folder has no safety checker.
"""

_CARD = """---
{front}
---
# {title}

A {noun} that draws in {evaluations}, distilled from {teacher} with raydistill.
{usage}
## Provenance

| | |
|---|---|
{provenance}
{metrics}
## Licence

The student inherits the terms of its teacher **and** of the model and weights it started from, and of real pictures where it
learned from any.

{licences}

This is a summary and may be out of date; the licence texts of the models decide.
"""


def usage(family: type[Space], dtype: str, steps: int = 1) -> str:
    """How an export of a family is called, for its card."""
    arguments = written_arguments(family, steps)
    if steps > 1:
        return few_step_usage(arguments, family.pipeline_class, dtype)
    return _USAGE.format(dtype=dtype, pipeline=family.pipeline_class, arguments=arguments)


def table_rows(values: Mapping[str, object]) -> str:
    """Rows of a Markdown table of two columns."""
    return "\n".join(f"| {key} | {str(value).replace('|', '&#124;')} |" for key, value in values.items())


def _metrics(metrics: Mapping[str, float]) -> str:
    rows = table_rows({name: f"{value:.4g}" for name, value in metrics.items()})
    return f"\n## Scores\n\n| metric | value |\n|---|---|\n{rows}\n" if metrics else ""


def _copy_of(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy on the CPU in `dtype`; the one that trains stays as it is."""
    state = rounded(merged_state(network), dtype, "the student")
    copy = cast(type(network).from_config(network.config), dtype)
    copy.load_state_dict(state)
    return copy.eval()


def export_student(
    space: Space,
    network: nn.Module,
    start_timestep: int,
    folder: Path,
    card: ModelCard,
    dtype: torch.dtype = torch.float16,
    steps: int = 1,
) -> Path:
    """Write a pipeline of one step, or of few: the base's VAE, text encoder and tokenizer, copied, and the trained network.

    Args:
        space: of the base.
        network: the trained student (or its EMA); not changed. Where it has a LoRA, `lora/` holds that, and the network's
            own folder both merged.
        folder: where to write; an earlier export there is replaced once the new one is complete.
        dtype: float16 or float32, of all weights.
        steps: of the student (`student.steps`).

    Returns `folder`.

    Raises:
        InputError: weights that are not finite in `dtype`, another dtype, or a start that no scheduler can express.
    """
    if dtype not in (torch.float16, torch.float32):
        raise InputError(f"export dtype {dtype}: float16 or float32")
    few = steps > 1
    scheduler = few_step_scheduler(space, start_timestep, steps) if few else space.one_step_scheduler(start_timestep)
    merged, folder = _copy_of(network, dtype), Path(folder)
    with replacing(folder) as fresh:
        fresh.mkdir()
        for part in space.student_parts:
            copy_part(Path(space.folder, part), fresh / part, dtype)
        merged.save_pretrained(fresh / space.network_name, safe_serialization=True)
        forget_origin(fresh / space.network_name / "config.json")
        scheduler.save_pretrained(fresh / "scheduler")
        (fresh / "model_index.json").write_text(_index(space, merged, scheduler), encoding="utf-8")
        (fresh / "README.md").write_text(card.markdown(start_timestep, dtype, steps), encoding="utf-8")
        if has_lora(network):
            begins = Begins(card.student, card.start, card.lora_start)
            usage = usage_of(space, begins, scheduler, start_timestep)
            terms = outside_card(fresh, usage, base_model=repository(card.student))
            write_own_lora(space, network, scheduler, begins, fresh / LORA, terms)
    return folder


def _index(space: Space, network: nn.Module, scheduler: SchedulerMixin) -> str:
    """model_index.json: the base's own entries for the parts that are copied, and no safety checker."""
    index = {
        "_class_name": space.pipeline_class,
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", type(scheduler).__name__],
        space.network_name: ["diffusers", type(network).__name__],
    }
    takes = inspect.signature(getattr(diffusers, space.pipeline_class).__init__).parameters
    index |= {part: [None, None] for part in ("feature_extractor", "image_encoder", "safety_checker") if part in takes}
    index |= {"requires_safety_checker": False} if "safety_checker" in takes else {}
    index |= {key: space.index[key] for key in ("force_zeros_for_empty_prompt",) if key in takes}
    index |= {part: space.index[part] for part in space.student_parts}
    return json.dumps(index, indent=2, sort_keys=True) + "\n"
