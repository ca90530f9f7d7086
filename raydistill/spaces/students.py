"""What a family says of its students. One that names no `student_parts` gives none.

Everything else about a student's network is read from its folder: the part's name (`network_name`), its class, what it
predicts and on which path.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import diffusers
from diffusers import SchedulerMixin

from raydistill.errors import InputError
from raydistill.spaces.folder import ModelFolder
from raydistill.spaces.settings import Settings


class StudentFamily(ModelFolder):
    """The student's side of a Space."""

    student_parts: ClassVar[tuple[str, ...]] = ()  # that a student has of its base: VAE, text encoders, tokenizers
    student_noun: ClassVar[str] = "diffusion network"  # on its card: a family's name and a network's kind
    last_layer: ClassVar[str] = "conv_out"  # of the network, which stays float32 where the rest of it is float16
    plain_start: ClassVar[bool] = False  # a student sees plain noise wherever it starts, not noise times sigma
    original_layout: ClassVar[bool] = False  # `export.original_layout` names its tensors
    runtimes: ClassVar[
        Mapping[str, str]
    ] = {}  # onnx, openvino -> optimum's pipeline for it, as `export.optimum` writes it
    call_arguments: ClassVar[Mapping[str, Any]] = {}  # of the pipeline's call, besides one step without guidance

    def one_step_scheduler(self, start_timestep: int) -> SchedulerMixin:
        """The scheduler whose single step (`set_timesteps(1)`) is exactly x_0 of the prediction at `start_timestep`.

        Raises:
            InputError: the start timestep is not on the path, or the family's pipeline takes no such scheduler.
        """
        raise InputError(f"{self.folder}: no one-step scheduler for a {self.pipeline_class}")

    @property
    def draws_at_once(self) -> bool:
        """Whether the folder's own scheduler is such a one."""
        return False

    def start_of(self, scheduler: Settings) -> int | None:
        """The timestep of a single step by this scheduler_config.json of the family; None: it does not tell.

        With trailing timesteps it is the last of the scheduler's path.
        """
        steps = scheduler.get("num_train_timesteps")
        trailing = scheduler.get("timestep_spacing") == "trailing" and isinstance(steps, int)
        return steps - 1 if trailing else None

    @property
    def takes_lora(self) -> bool:
        """Whether diffusers' pipeline of this family loads LoRAs."""
        return hasattr(getattr(diffusers, self.pipeline_class, None), "load_lora_weights")

    def check_takes_lora(self, key: str) -> None:
        """Raises InputError, which begins with `key`, where it loads none."""
        if not self.takes_lora:
            raise InputError(f"{key}: diffusers' {self.pipeline_class} loads no LoRA, so a student of it is no LoRA")
