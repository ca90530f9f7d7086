"""What is known of a public model: the terms of its weights, and its configuration files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Licence:
    """Terms of a model's weights: a short summary of what its own page and licence file state; those are what counts."""

    name: str
    identifier: str  # of the Hugging Face hub
    terms: str


@dataclass(frozen=True)
class HubModel:
    """One model of the Hugging Face hub.

    Args:
        licence: terms of its weights.
        sizes: its configuration files (`published.write_folder`): a file of `spaces/published` by its name, or the path
            of another. None: planning needs the model's own files in the hub's cache.
        gated: the hub gives its files to those alone who have accepted the licence.
        distilled_steps: of a step-distilled model, the evaluations that its page draws a picture with; None: it is none.
    """

    licence: Licence
    sizes: str | Path | None = None
    gated: bool = False
    distilled_steps: int | None = None


APACHE = Licence("Apache License 2.0", "apache-2.0", "Permissive; keep the notices.")
RESTRICTIONS = "Use restrictions (Attachment A) bind the model and everything derived from it, and must be passed on."
OPEN_RAIL = Licence("CreativeML Open RAIL-M", "creativeml-openrail-m", RESTRICTIONS)
OPEN_RAIL_PLUS = Licence("CreativeML Open RAIL++-M", "openrail++", RESTRICTIONS)
