"""Cross-space distillation of one-step diffusion students on Ray."""

__version__ = "0.1.0"
