"""Terms that bind a distilled student: those of its teacher, of its base model and of the weights it started from.

Short summaries of what the models' own pages and licence files state; those are what counts.
"""

from __future__ import annotations

from raydistill.bridge.model import read_description
from raydistill.config.reading import needs_pairs
from raydistill.config.schema import Config
from raydistill.config.stages import streams_bridge
from raydistill.data.shards import notes_of
from raydistill.spaces import find_family, hub_models
from raydistill.spaces.hub_model import Licence
from raydistill.storage.resolve import input_place, resolve

_EMBEDDED = Licence("the project's own licence", "other", "No third-party weights.")
_LOOK_UP = "Look up the terms of this model before sharing anything."
_START = Licence(
    "unknown",
    "other",
    "The terms of these weights apply too, and a path does not tell them. DMD2 is published under CC BY-NC-SA 4.0 "
    "(repository) and CC BY-NC 4.0 (hub page of its weights), both non-commercial; SiD-LSG under Apache License 2.0 "
    "(both).",
)

_LORA = Licence(
    "unknown",
    "other",
    "The terms of this LoRA apply too; its page names them. LCM-LoRA is published under CreativeML Open RAIL++-M.",
)

_PICTURES = "The terms of the set, and of the pictures in it, are those of their authors and collectors."


def picture_sets(config: Config) -> list[tuple[str, str | None]]:
    """(source, licence) of the real pictures that a run learns from: those it encodes, and those of what it is given.

    That are sets of pairs, and a Bridge whose training told (`bridge.json`).
    """
    encodes = streams_bridge(config) or (needs_pairs(config) and config.bridge.pairs is None)
    images, found = config.synthesis.images, []
    if images is not None and encodes:
        found.append((images, config.synthesis.licence))
    for folder in (config.bridge.pairs, config.discriminator.real_data):
        notes = {} if folder is None else notes_of(input_place(folder))
        if notes.get("pictures"):
            found.append((str(notes["pictures"]), notes.get("licence")))
    if config.bridge.checkpoint is not None:
        sources = read_description(resolve(config.bridge.checkpoint)).get("pictures", [])
        found += [(str(one["source"]), one.get("licence")) for one in sources]
    return list(dict.fromkeys(found))


def picture_licence(name: str | None) -> Licence:
    """Terms of a set of pictures, as synthesis.licence names them."""
    if name is None:
        return Licence("unknown", "other", f"Nobody has named its licence (synthesis.licence). {_PICTURES}")
    return Licence(name, "other", _PICTURES)


def licence_of(model: str, pipeline_class: str) -> Licence:
    """Terms of a teacher or of a student's base.

    Args:
        model: its name in the configuration; only a name of the hub, org/name[@revision], tells the terms.
        pipeline_class: diffusers class of its folder; where the name tells nothing, the others of this class are named.
    """
    if model.startswith("shapes:"):
        return _EMBEDDED
    family = find_family(pipeline_class)
    siblings = {} if family is None else family.hub_models
    known = hub_models().get(model.partition("@")[0])
    if known is not None:
        return known.licence
    others = ", ".join(f"{name} ({one.licence.name})" for name, one in siblings.items())
    return Licence("unknown", "other", f"{_LOOK_UP} With the same pipeline: {others}." if others else _LOOK_UP)


def student_licences(
    teacher: str,
    teacher_class: str,
    student: str,
    student_class: str,
    unet: str | None,
    drawer: str | None = None,
    lora: str | None = None,
) -> list[tuple[str, str, Licence]]:
    """Whose terms a student inherits: (role, model, terms) of teacher, base and start, and of who drew its pictures.

    Args:
        teacher, student: `teacher.model`, `student.model`, with the diffusers classes of their folders.
        unet: `student.unet`, which tells no terms; None: the student starts from its own model's UNet.
        lora: `student.lora_start`, likewise.
        drawer: `synthesis.teacher`; None: no other model than the teacher drew pictures.
    """
    rows = [
        ("Teacher", teacher, licence_of(teacher, teacher_class)),
        ("Student base", student, licence_of(student, student_class)),
    ]
    if unet is not None:
        rows.append(("Student start", unet, _EMBEDDED if unet.startswith("shapes:") else _START))
    if lora is not None:
        rows.append(("Student start", lora, _LORA))
    if drawer is not None:
        rows.append(("Pictures drawn by", drawer, licence_of(drawer, "")))
    return rows
