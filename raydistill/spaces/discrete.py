"""What the families on the discrete variance-preserving path share: the scheduler's config names betas and prediction."""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, SchedulerMixin

from raydistill.diffusion.path import DiscretePath, Prediction
from raydistill.errors import InputError
from raydistill.spaces.base import MOST_TIMESTEPS, Space
from raydistill.spaces.settings import Settings, built, diffusers_class


class DiscreteSpace(Space):
    """SD 1.5 and 2.1, SDXL, Kolors, PixArt-Sigma: epsilon or v-prediction on the betas of a DDPM-like scheduler."""

    network_settings: ClassVar[dict[str, Any]] = {}  # what the config of this family's network must say

    @cached_property
    def network_config(self) -> Settings:
        """config.json of the network. Raises InputError when it belongs to another family."""
        config = self.part_config(self.network_name)
        for key, expected in self.network_settings.items():
            if config.get(key) != expected:
                raise InputError(
                    f"{self.folder}/{self.network_name}/config.json: {key} is {config.get(key)!r}, but "
                    f"the network of a {self.pipeline_class} has {expected!r}"
                )
        return config

    @cached_property
    def latent_shape(self) -> tuple[int, int, int]:
        config = self.network_config
        return config.whole("in_channels"), config.side(), config.side()

    @cached_property
    def scheduler_config(self) -> Settings:
        """scheduler_config.json. Raises InputError where it has no betas, as flow models, or changes them."""
        config = self.part_config("scheduler")
        takes = inspect.signature(diffusers_class(config).__init__).parameters  # a file may say more than that
        if not any(key in takes and config.get(key) is not None for key in ("beta_schedule", "trained_betas")):
            raise InputError(
                f"{config.file}: {config['_class_name']} has no beta_schedule, but "
                f"a {self.pipeline_class} is read on a discrete diffusion path"
            )
        betas = config.get("trained_betas")
        if isinstance(betas, list) and len(betas) != config["num_train_timesteps"]:
            raise InputError(
                f"{config.file}: trained_betas holds {len(betas)} numbers, but num_train_timesteps is "
                f"{config['num_train_timesteps']}"
            )
        if config.get("rescale_betas_zero_snr"):
            raise InputError(f"{self.folder}/scheduler: rescale_betas_zero_snr is not supported")
        return config

    @cached_property
    def prediction(self) -> Prediction:
        prediction = self.scheduler_config.get("prediction_type")
        if prediction not in ("epsilon", "v_prediction"):
            raise self.scheduler_config.wrong("prediction_type", "epsilon or v_prediction")
        return prediction

    @cached_property
    def path(self) -> DiscretePath:
        config = self.scheduler_config
        config.whole("num_train_timesteps", most=MOST_TIMESTEPS)
        path = built(config, DDPMScheduler, lambda: DiscretePath.from_scheduler_config(config))
        if not ((path.alphas_cumprod >= 0) & (path.alphas_cumprod <= 1)).all():  # NaN is neither
            raise InputError(f"{config.file}: trained_betas, or beta_start to beta_end, are not between 0 and 1")
        return path

    @property
    def scaling(self) -> tuple[float, float]:
        if self.vae_config.get("latents_mean") is not None:
            raise InputError(
                f"{self.folder}/vae/config.json: latents_mean and latents_std, one a channel, are not supported"
            )
        return super().scaling

    # -- students ------------------------------------------------------------------------------------
    def one_step_scheduler(self, start_timestep: int) -> SchedulerMixin:
        """The scheduler whose single step (`set_timesteps(1)`) is exactly x_0 of the prediction at `start_timestep`.

        Last step of the path: DDIM feeds the network plain noise at t = N - 1 and, with the final alpha at one, returns
        x_0. Earlier steps: Euler on the first start_timestep + 1 betas feeds it noise · sigma_t at t = start_timestep
        (noise · (sigma/alpha), scaled by alpha) and steps to sigma 0; DDIM would not scale the noise, as a family with a
        `plain_start` wants it.

        Raises:
            InputError: the start timestep is not on the path.
        """
        steps = self.path.num_train_timesteps
        if not 0 < start_timestep < steps:
            raise InputError(f"start_timestep {start_timestep} is outside 1 … {steps - 1}, the steps of {self.folder}")
        config = self.part_config("scheduler")
        common = {"prediction_type": self.prediction, "timestep_spacing": "trailing", "steps_offset": 1}
        if start_timestep == steps - 1:
            names = ("beta_start", "beta_end", "beta_schedule", "trained_betas")
            betas = {name: config[name] for name in names if config.get(name) is not None}
            return DDIMScheduler(num_train_timesteps=steps, clip_sample=False, set_alpha_to_one=True, **betas, **common)
        alphas_cumprod = self.path.alphas_cumprod[: start_timestep + 1]
        previous = torch.cat([torch.ones(1, dtype=alphas_cumprod.dtype), alphas_cumprod[:-1]])
        common |= {"num_train_timesteps": start_timestep + 1, "trained_betas": (1 - alphas_cumprod / previous).tolist()}
        if self.plain_start:
            return DDIMScheduler(clip_sample=False, set_alpha_to_one=True, **common)
        return EulerDiscreteScheduler(**common)

    @property
    def draws_at_once(self) -> bool:
        """By DDIM or Euler as `one_step_scheduler` makes them."""
        name, config = type(self.scheduler).__name__, self.scheduler.config
        exact = name == "EulerDiscreteScheduler" or (
            name == "DDIMScheduler" and config["set_alpha_to_one"] and not config["clip_sample"]
        )
        return exact and config.get("timestep_spacing") == "trailing"
