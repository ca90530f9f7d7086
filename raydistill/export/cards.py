"""Model cards of a student in other forms: another start, the same provenance, scores and licence."""

from __future__ import annotations

import re
from pathlib import Path

import yaml


def front_matter(identifier: str, name: str, noun: str = "Stable Diffusion UNet", steps: int = 1) -> str:
    """YAML at the head of a model card, as the hub reads it, between its two lines of dashes.

    Args:
        identifier, name: of the licence.
        noun: `Space.student_noun`, whose first words are a tag.
        steps: of the student.
    """
    front = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "license": identifier,
        "tags": [
            noun.rpartition(" ")[0].lower().replace(" ", "-"),
            "one-step" if steps == 1 else "few-step",
            "distillation",
        ],
    }
    if identifier == "other":
        front["license_name"] = name
    return yaml.safe_dump(front, sort_keys=False).strip()


def outside_card(export: Path, usage: str, **front: str) -> str:
    """README.md of another form of the student.

    Args:
        export: the student's folder, whose card is taken over from its provenance on.
        usage: title and how to use it.
        front: keys that the front matter has besides.
    """
    file = export / "README.md"
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    head = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    lines = [
        head[1] if head else front_matter("other", "unknown"),
        *(f"{key}: {value}" for key, value in front.items()),
    ]
    _, mark, rest = text.partition("\n## Provenance\n")
    rest = mark + rest if mark else "\n## Licence\n\nUnknown: the export has no model card. Look up the terms first.\n"
    return "---\n" + "\n".join(lines) + f"\n---\n{usage}{rest}"
