"""What every model family must say about its latent space and its network.

A Space knows how to speak one family's dialect: which folder parts to load, what its text encoders return, how
latents are scaled and packed, what the network predicts and on which path. It holds no trained network; networks
are passed in, so that the same Space serves a local module, a LoRA copy and a ZeRO-3 engine.

A family is one subclass, and nothing about it stands elsewhere. `raydistill.spaces.register` says how one is added.

Shapes: B samples, C×H×W latents on the VAE grid (normalised: what the diffusion network was trained on), L text tokens.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import diffusers
import torch
from torch import nn

from raydistill.diffusion.guidance import classifier_free, is_guided, rescaled
from raydistill.diffusion.path import Path as GaussianPath
from raydistill.diffusion.path import Prediction, to_x0
from raydistill.errors import InputError, NonFiniteError
from raydistill.spaces.attention_readers import AttentionReader
from raydistill.spaces.depth import Depth
from raydistill.spaces.folder import ModelFolder, encoder_of
from raydistill.spaces.hub_model import HubModel
from raydistill.spaces.settings import Settings, built, diffusers_class
from raydistill.spaces.students import StudentFamily

Conditioning = dict[str, torch.Tensor]  # each [B, …]; names are the family's own
CONSISTENCY = ("LCMScheduler", "TCDScheduler")  # schedulers of models that consistency distillation has made
MOST_TIMESTEPS = 100_000  # of a training schedule; schedulers hold numbers for each
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]  # conditioning: name -> shape of one sample, dtype


def _not_finite(samples: torch.Tensor) -> list[int]:
    """Rows of a batch that hold NaN or infinity."""
    return (~samples.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()


class LatentSpace(ModelFolder, ABC):
    """A folder's VAE, and the affine map from its latents to normalised ones, which its configuration gives."""

    @cached_property
    def vae_config(self) -> Settings:
        return self.part_config("vae")

    @cached_property
    def downscale(self) -> int:
        """Image pixels per latent pixel."""
        return 2 ** (len(self.vae_config.several("block_out_channels")) - 1)

    @cached_property
    def pixels_of_vae(self) -> int:
        """The side that the VAE's configuration names, for families whose network names none.

        The class's own value is not taken: it says nothing of the model.
        """
        if "sample_size" not in self.vae_config.stated:
            raise InputError(f"{self.vae_config.file}: lacks 'sample_size', the pixels of a picture's side")
        return self.vae_config.side()

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """C, H, W of one sample on the VAE grid."""

    @property
    def resolution(self) -> int:
        """Pixels a side."""
        return self.latent_shape[1] * self.downscale

    def vae_batch(self, most: int) -> int:
        """Pictures for one pass of the VAE, at most: about a megapixel (16 of them would take 52 GB in float32)."""
        return max(1, min(most, 2**20 // self.resolution**2))

    @property
    def scaling(self) -> tuple[float, float]:
        """(shift, scale): normalised = (raw - shift) · scale."""
        config = self.vae_config
        shift = 0.0 if config.get("shift_factor") is None else config.number("shift_factor")
        scale = config.number("scaling_factor")
        if scale <= 0:
            raise config.wrong("scaling_factor", "above 0")
        return shift, scale

    def normalise(self, raw: torch.Tensor) -> torch.Tensor:
        offset, scale = self.scaling
        return (raw - offset) * scale

    def denormalise(self, latents: torch.Tensor) -> torch.Tensor:
        offset, scale = self.scaling
        return latents / scale + offset

    def encode(self, vae: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, S, S] in [-1, 1] -> normalised latents (the posterior's mean)."""
        return self.normalise(self.posterior(vae, images)[0])

    def posterior(self, vae: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the raw latents of images [B, 3, S, S]."""
        found = vae.encode(images.to(vae.dtype)).latent_dist
        return found.mean, found.std

    def decode_raw(self, vae: nn.Module, raw: torch.Tensor) -> torch.Tensor:
        """Raw latents [B, C, H, W] in the VAE's dtype -> its images [B, 3, S, S], not clamped."""
        return vae.decode(raw).sample

    def decode(self, vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
        """Normalised latents -> images [B, 3, S, S], float32, clamped to [-1, 1]; about a megapixel at a time.

        Raises:
            NonFiniteError: of the latents, or of what the VAE makes of them; says which part, and what to do.
        """
        images = self.decode_each(vae, latents)
        rows = [] if images.is_meta else _not_finite(images)
        if not rows:
            return images
        of = f"{len(rows)} of {len(images)} in {str(vae.dtype).removeprefix('torch.')}"
        if _not_finite(latents):
            problem = f"the latents that go into {self.folder}/vae are not finite ({of})"
        elif vae.dtype == torch.float32:
            problem = f"{self.folder}/vae: the decoded pictures are not finite ({of}); its weights are damaged"
        else:
            problem = f"{self.folder}/vae: the decoded pictures are not finite ({of}); use --dtype float32"
        raise NonFiniteError(problem, len(rows), rows)

    def decode_each(self, vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
        """As `decode`, but a picture that is not finite is NaN in every pixel, and the others are as they are."""
        raw = self.denormalise(latents).to(vae.dtype)
        decoded = torch.cat([self.decode_raw(vae, chunk).float() for chunk in raw.split(self.vae_batch(len(raw)))])
        finite = decoded.isfinite().flatten(1).all(1)  # before infinity is clamped to white
        return decoded.clamp(-1, 1).masked_fill(~finite[:, None, None, None], torch.nan)

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channels of the VAE decoder's maps: behind its middle, and behind each block that doubles the grid."""
        widths = self.vae_config.several("block_out_channels")[::-1]
        return (widths[0], *widths[:-1])  # the last block keeps the grid

    def decoder_prefix(self, vae: nn.Module, doublings: int) -> list[nn.Module]:
        """The decoder's first modules in order of execution: of raw latents to its middle, and so many doublings further."""
        decoder = vae.decoder
        opening = (getattr(vae, "post_quant_conv", None), decoder.conv_in, decoder.mid_block)
        return [*(module for module in opening if module is not None), *decoder.up_blocks[:doublings]]

    def assume_values(self) -> None:  # noqa: B027 - most families read none
        """Stand-ins for numbers that the family reads from weight files, for counting where there are none."""


class Space(LatentSpace, StudentFamily, Depth):
    """One pipeline folder, read as a member of its family."""

    def __repr__(self) -> str:
        try:
            channels, height, width = self.latent_shape
            sizes = f": latents {channels}x{height}x{width}, {self.resolution} px"
        except Exception:  # a damaged folder, which whoever shows it may want to know by name
            sizes = ""
        return f"{type(self).__name__}({str(self.folder)!r}{sizes})"

    hub_models: ClassVar[Mapping[str, HubModel]] = {}  # public models of the family, by hub id
    lora_targets: ClassVar[tuple[str, ...]]  # linear layers a LoRA adapts
    default_guidance_scale: ClassVar[float]
    default_shift: ClassVar[float] = 1.0  # of the sampled diffusion times
    attention_reader: ClassVar[AttentionReader | None] = None  # None: a Bridge trains without attention fidelity

    @property
    def distilled_sign(self) -> str | None:
        """What of the configuration files says that the model is step-distilled (`spaces.distilled`); None: they do not.

        Of every family, latent consistency models: their scheduler, or a UNet that takes its guidance scale as an input.
        """
        schedule, network = self.part_config("scheduler"), self.part_config(self.network_name)
        if schedule["_class_name"] in CONSISTENCY:
            return f"{schedule['_class_name']} in {schedule.file}"
        if network.get("time_cond_proj_dim") is not None:
            return f"time_cond_proj_dim in {network.file}"
        return None

    # -- text --------------------------------------------------------------------------------------
    @abstractmethod
    def encode_prompts(self, text: diffusers.DiffusionPipeline, prompts: Sequence[str]) -> Conditioning:
        """Everything the network needs to know of the prompts."""

    @property
    @abstractmethod
    def conditioning_layout(self) -> Layout:
        """Names, shapes of one sample and dtypes of what `encode_prompts` returns; read from configuration files."""

    tokens_asked: ClassVar[Mapping[str, int]] = {}  # tokenizer -> tokens that `encode_prompts` asks for, at most
    tokens_padded: ClassVar[int | None] = (
        None  # where the pipeline pads to what it is asked for, whatever a tokenizer says
    )

    tokens_in_front: ClassVar[int] = 0  # of an instruction, which a text encoder reads besides; for counting

    @property
    def text_lengths(self) -> Settings:
        """Tokens of a prompt that each text encoder of the folder reads, as `encode_prompts` asks for them: part -> number.

        Raises:
            InputError: neither tokenizer nor text encoder says how long its longest text is.
        """
        encoders, lengths = self.parts("text_encoder"), Settings({}, self.index.file)
        for part in self.parts("tokenizer"):
            if encoder_of(part) in encoders:
                longest = self.longest_text(part)
                most = self.tokens_padded or min(longest, self.tokens_asked.get(part, longest))
                if most == math.inf:
                    raise InputError(f"{self.tokenizer_config(part).file}: lacks 'model_max_length'")
                lengths[encoder_of(part)] = most
        return lengths

    def unconditional(self, empty: Conditioning) -> Conditioning:
        """What guidance contrasts a prompt with, made from the conditioning of the empty prompt as the pipeline does."""
        return empty

    # -- network -----------------------------------------------------------------------------------
    prediction: Prediction
    path: GaussianPath

    @abstractmethod
    def predict(
        self, network: Callable[..., Any], x_t: torch.Tensor, t_B: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """The network's native prediction on the VAE grid, one conditional evaluation."""

    def predict_x0(
        self,
        network: Callable[..., Any],
        x_t: torch.Tensor,
        t_B: torch.Tensor,
        conditioning: Conditioning,
        unconditional: Conditioning | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
    ) -> torch.Tensor:
        """x_0 estimate, float32; with classifier-free guidance when `guidance_scale` is above 1.

        Args:
            guidance_rescale: share of the guided prediction that gets the conditional one's spread.
        """
        more = (guidance_rescale,) if guidance_rescale else ()
        prediction = self.predict_guided(network, x_t, t_B, conditioning, unconditional, guidance_scale, *more)
        return to_x0(self.path, self.prediction, x_t, prediction, t_B)

    def predict_guided(
        self,
        network: Callable[..., Any],
        x_t: torch.Tensor,
        t_B: torch.Tensor,
        conditioning: Conditioning,
        unconditional: Conditioning | None,
        guidance_scale: float,
        guidance_rescale: float = 0.0,
    ) -> torch.Tensor:
        if not is_guided(guidance_scale):
            return self.predict(network, x_t, t_B, conditioning)
        if unconditional is None:
            raise ValueError("classifier-free guidance needs the unconditional conditioning")
        both = {name: torch.cat([value, unconditional[name].expand_as(value)]) for name, value in conditioning.items()}
        prediction = self.predict(network, torch.cat([x_t, x_t]), torch.cat([t_B, t_B]), both)
        conditional, other = prediction.chunk(2)
        guided = self.guided(conditional, other, guidance_scale)
        return rescaled(guided, conditional, guidance_rescale) if guidance_rescale else guided

    def guided(self, conditional: torch.Tensor, unconditional: torch.Tensor, guidance_scale: float) -> torch.Tensor:
        """What guidance makes of the predictions with and without a prompt."""
        return classifier_free(conditional, unconditional, guidance_scale)

    def recompute_activations(self, network: nn.Module) -> None:
        """Block by block in backward passes, instead of keeping them: same numbers, a third more work."""
        network.enable_gradient_checkpointing()

    # -- sampling ----------------------------------------------------------------------------------
    @cached_property
    def scheduler(self) -> Any:
        """The folder's own scheduler; copied for each use, since schedulers keep state."""
        config = self.part_config("scheduler")
        if "num_train_timesteps" in config:
            config.whole("num_train_timesteps", most=MOST_TIMESTEPS)
        scheduler_class = diffusers_class(config)
        return built(config, scheduler_class, lambda: scheduler_class.from_config(config))

    def start_sampling(self, steps: int) -> Any:
        """A fresh scheduler with its timesteps set for `steps` evaluations."""
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(steps)
        return scheduler

    @torch.no_grad()
    def sample_steps(
        self,
        network: Callable[..., Any],
        noise: torch.Tensor,
        conditioning: Conditioning,
        unconditional: Conditioning,
        steps: int,
        guidance_scale: float,
    ) -> Iterator[torch.Tensor]:
        """Multi-step sampling with the family's own scheduler; yields the latents after each step."""
        scheduler = self.start_sampling(steps)
        x_t = noise * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else noise
        for timestep in scheduler.timesteps:
            model_input = scheduler.scale_model_input(x_t, timestep) if hasattr(scheduler, "scale_model_input") else x_t
            t_B = self.path.t_of_timestep(timestep.double()).float().expand(len(x_t)).to(x_t.device)
            prediction = self.predict_guided(network, model_input, t_B, conditioning, unconditional, guidance_scale)
            x_t = scheduler.step(prediction.float(), timestep, x_t, return_dict=False)[0]
            yield x_t

    def sample(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The last latents of `sample_steps`."""
        *_, latents = self.sample_steps(*args, **kwargs)
        return latents
