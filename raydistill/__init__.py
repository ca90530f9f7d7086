"""Cross-space distillation of one-step diffusion students on Ray."""

import os

__version__ = "0.1.0"

# Model libraries narrate every load; a job's own progress is what its user wants to see.
for _name, _value in {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}.items():
    os.environ.setdefault(_name, _value)
