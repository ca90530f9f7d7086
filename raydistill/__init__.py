"""Cross-space distillation of one-step diffusion students on Ray.

`raydistill/library/README.md` shows the names below at work. They are loaded when they are asked for.
"""

from __future__ import annotations

import importlib
import logging
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raydistill.bridge.model import Bridge
    from raydistill.library.runs import distill, evaluate, load_config
    from raydistill.library.sampler import Sampler
    from raydistill.spaces import load_space

__version__ = "0.2.0"
__all__ = ["Bridge", "Sampler", "__version__", "distill", "evaluate", "load_config", "load_space"]

_HOMES = {
    "Bridge": "raydistill.bridge.model",
    "Sampler": "raydistill.library.sampler",
    "distill": "raydistill.library.runs",
    "evaluate": "raydistill.library.runs",
    "load_config": "raydistill.library.runs",
    "load_space": "raydistill.spaces",
}

# Model libraries narrate every load; a job's own progress is what its user wants to see.
for _name, _value in {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}.items():
    os.environ.setdefault(_name, _value)
# diffusers imports torchao wherever that is installed, and torchao tells of each of its kernels that is for another machine.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
