"""The text encoders of a ready pair fit the share of a GPU that its configuration gives them. Counted, no weights."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest

from raydistill.config.reading import CONFIGS, load
from raydistill.planning.counting import count_text
from raydistill.planning.gpus import known_gpus
from raydistill.planning.memory import ROLES, _fit
from raydistill.spaces.meta import open_space

LARGE = (  # pairs of the largest encoders, and of those that every pair of their teacher has
    "sd35_medium_sdxl", "sd35_medium_pixart_alpha_512", "chroma_sdxl", "qwen_image_sdxl", "qwen_image_sd15",
    "flux1_dev_sd15", "sana15_sd15",
)  # fmt: skip
ROLE = "text encoder"


@functools.cache
def texts(model):
    return count_text(open_space(model))


@pytest.mark.full
@pytest.mark.parametrize("pair", LARGE)
def test_they_fit(pair):
    config = load(CONFIGS / f"{pair}.yaml")
    gpus, kind = known_gpus(config), ROLES[ROLE].kind(config)
    models = {"student": config.student.model, "teacher": config.teacher.model}
    text = {f"{role} {part}": one for role, model in models.items() for part, one in texts(model).items()}
    fit = _fit(ROLE, SimpleNamespace(text=text), config, kind, gpus[kind])
    assert 2**30 < fit.needs <= fit.has
