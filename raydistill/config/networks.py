"""Sections about networks: student, teacher and its service, Bridge, fake score, discriminator, VSD, reward."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

from pydantic import Field, model_validator

from raydistill.config.keys import (
    Batch,
    Count,
    Cpus,
    Few,
    Fraction,
    Gpus,
    NonNegative,
    Patience,
    Places,
    Positive,
    Seconds,
    Section,
    free,
)
from raydistill.diffusion import guidance
from raydistill.diffusion.timesteps import least_start

Optimizer = Literal["adamw", "adamw8bit"]
MOMENTS = (
    "adamw: moments in 32 bits; adamw8bit: in 8 (torchao), 2 bytes a trained number instead of 8, and other numbers"
)


REWARD_MODELS = {  # their authors' on the hub
    "clipscore": "openai/clip-vit-large-patch14",
    "pickscore": "yuvalkirstain/PickScore_v1",
}


class StudentConfig(Section):
    model: str = Field(
        "shapes:sd15",
        description="the student family (its VAE, text encoders, network): a diffusers folder, or org/name[@revision] of the hub",
    )
    unet: str | None = Field(
        "shapes:sd15-onestep",
        description="one-step start: folder of a diffusers network or pipeline, or its state dict (.safetensors, .bin, "
        ".pt, .pth; of several networks its EMA); null: model's own",
    )
    lora_start: str | None = Field(
        None,
        description="LoRA that is merged into this start, such as LCM-LoRA's or Hyper-SD's: a .safetensors file, a folder with "
        "one, or org/name[@revision][/file.safetensors] of the hub; null: none",
    )
    start_timestep: int = Field(
        999,
        ge=1,
        le=1_000_000,
        description="timestep of the student's first evaluation: 999 for DMD2's students, 625 for SiD-LSG's, of a LoRA "
        "what its card says; decides also where student.unet names another",
    )
    steps: Literal[1, 2, 4] = Field(
        1,
        description="evaluations of a picture, from start_timestep evenly down (999 in 4: 999, 749, 499, 249); of more than one, "
        "each later one sees the last picture noised again, and each sample trains one of them",
    )
    kind: Literal["full", "lora"] = Field(
        "full",
        description="full: the whole network is trained; lora: LoRA on its frozen start, exported as a LoRA and, merged, as a "
        "pipeline",
    )
    rank: Few = Field(64, description="LoRA rank of the student")
    targets: list[str] = Field(
        [],
        max_length=100,
        description="layers that the student's LoRA adapts, by the ends of their names: linear ones and convolutions; none: "
        "its family's attention and feed-forward layers",
    )
    autocast: Literal["auto", "float16"] = Field(
        "auto",
        description="of distill.mixed_precision, what the student computes in: auto is bfloat16, and float32 for one that starts "
        "at t = 999; float16, of as many digits as TF32 at twice its speed, has scaled gradients and a last layer in float32",
    )
    shard: bool = free(
        False,
        description="full: every worker holds 1/distill.workers of the student's blocks, of their gradients, AdamW moments and "
        "average, and gathers the blocks one by one (FSDP2): less memory, the same numbers up to rounding, more communication; "
        "checkpoints are the same files",
    )
    lr: Positive = Field(1e-6, description="AdamW learning rate of the student")
    optimizer: Optimizer = Field("adamw", description=MOMENTS)
    ema: Literal["constant", "power", "half_life"] = Field(
        "constant",
        description="moving average of the student that is evaluated and exported: constant has ema_decay, power a width that "
        "grows with the run (ema_sigma_rel), half_life forgets half in ema_half_life updates",
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="exponential moving average that is evaluated and exported; null: none, with ema=constant"
    )
    ema_sigma_rel: Annotated[float, Field(gt=0, le=0.28)] = Field(
        0.1, description="of ema=power: width of the average as a share of the updates so far"
    )
    ema_half_life: Positive = Field(100, description="of ema=half_life: updates")
    max_grad_norm: Positive = Field(1.0, description="gradient clipping")

    @model_validator(mode="after")
    def _adapted(self) -> StudentConfig:
        if self.targets and self.kind == "full":
            raise ValueError("targets: kind=full trains every layer; set kind=lora, or leave the targets out")
        if self.shard and self.kind != "full":
            raise ValueError(
                "shard: a LoRA is small, and nothing else of kind=lora is trained; use kind=full, or shard=false"
            )
        if self.shard and self.optimizer != "adamw":
            raise ValueError(f"shard: the parts of a network have no moments of {self.optimizer}; use optimizer=adamw")
        least = least_start(self.steps)
        if self.start_timestep < least:
            raise ValueError(f"start_timestep: {self.steps} steps (student.steps) begin at {least} or above")
        return self

    @property
    def is_averaged(self) -> bool:
        """Whether there is a moving average."""
        return self.ema != "constant" or self.ema_decay is not None


class TeacherConfig(Section):
    model: str = Field(
        "shapes:flux", description="the frozen teacher: a diffusers folder, or org/name[@revision] of the hub"
    )
    guidance_scale: Annotated[float, Field(ge=0, le=guidance.MOST)] | None = Field(
        None, description="classifier-free guidance of scores and samples; 0 to 1: none; null: the family's default"
    )
    sampling_steps: Few = Field(16, description="steps when the teacher generates pictures")


Attention = Literal["auto", "native", "math", "cudnn", "flash", "flash3", "sage", "xformers"]


class TeacherServiceConfig(Section):
    replicas: Few = free(1, description="replicas of the teacher service that it starts with")
    min_replicas: Few | None = free(None, description="fewest replicas when it autoscales; null: teachers.replicas")
    max_replicas: Few | None = free(
        None, description="most replicas: follow the ongoing requests up to it; null: always teachers.replicas"
    )
    target_ongoing_requests: Positive = free(2, description="requests per replica that autoscaling aims at")
    upscale_delay_s: Seconds = free(30, description="how long more requests must last before replicas are added")
    downscale_delay_s: Seconds = free(600, description="how long fewer must last before replicas are removed")
    shards: Few = Field(
        2, description="ranks per replica; with zero3 each holds 1/shards of the teacher's parameters, with plain all"
    )
    backend: Literal["auto", "zero3", "plain"] = Field(
        "auto",
        description="zero3: the ranks share the teacher's parameters; plain: each rank holds the whole teacher; same "
        "scores; auto: plain where ranks ask for GPUs and the planner says that the teacher fits one, else zero3",
    )
    compile: bool = Field(
        False, description="compile the teacher's repeated blocks (plain only): faster, other scores in the last digits"
    )
    channels_last: bool = Field(
        False,
        description="a UNet's convolutions have their channels last in memory (plain only): on GPUs faster, other scores in the "
        "last digits; transformers stay as they are",
    )
    attention: Attention = Field(
        "auto",
        description="what computes the teacher's attention (diffusers' backends); auto: as the model has it; native, math, "
        "cudnn: of torch; flash, flash3, sage, xformers: of packages",
    )
    quantize: Literal["none", "fp8", "int8"] = Field(
        "none", description="the teacher's large linear layers compute in 8 bits (torchao; plain only)"
    )
    quantize_cosine: Fraction = free(
        0.98,
        description="smallest cosine of quantised against unquantised scores on a fixed batch; below it no service starts",
    )
    slice: Batch | Literal["auto"] = Field(
        8,
        description="samples per forward and rank, with and without prompt at once; requests are cut into equal slices; auto: as "
        "many as fit where ranks ask for GPUs, by the plan's count, else 8; decided once, before the launch",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="dtype of the teacher's weights")
    cpus_per_rank: Cpus = free(0.2, description="Ray CPUs each rank reserves")
    gpus_per_rank: Gpus = free(0, description="Ray GPUs each rank reserves")
    threads_per_rank: Few = Field(1, description="CPU threads of each rank")
    request_timeout_s: Patience = free(
        600, description="longest time the ranks may work on one request, its wait for their time apart; retried once"
    )
    retry_for_s: Patience = free(
        600, description="how long the service may be away, in all, while an answer is awaited"
    )
    start_timeout_s: Patience = free(600, description="longest time until the service is ready")
    node_labels: dict[str, str] = free({}, description="labels of the nodes that may hold ranks; none: any node")
    service: str | None = free(
        None, description="attach to this running service (teacher-<run.name> of another run); null: start one"
    )
    linger_s: Seconds = free(
        600, description="how long a service whose runs have crashed waits for one of them to resume"
    )

    @model_validator(mode="after")
    def _bounds(self) -> TeacherServiceConfig:
        fewest, most = self.min_replicas or self.replicas, self.max_replicas or self.replicas
        for key, value in self.of_whole.items():
            if value and self.backend == "zero3":
                raise ValueError(f"{key} needs whole networks: teachers.backend=plain, or auto, not zero3")
        if self.max_replicas is None and self.min_replicas is not None:
            raise ValueError("min_replicas needs max_replicas: without it the number of replicas is fixed")
        if not fewest <= self.replicas <= most:
            raise ValueError(
                f"min_replicas ({fewest}) <= replicas ({self.replicas}) <= max_replicas ({most}) does not hold"
            )
        return self

    @property
    def of_whole(self) -> dict[str, bool]:
        """Keys of what whole networks alone can have, and whether it is asked for."""
        return {"compile": self.compile, "channels_last": self.channels_last, "quantize": self.quantize != "none"}

    @property
    def counted_slice(self) -> int:
        """teachers.slice; of auto what is counted first, and what it is where nothing is counted."""
        return 8 if self.slice == "auto" else self.slice

    @property
    def plain(self) -> bool:
        """Whether every rank holds the whole teacher. Where auto is not decided (`driver.backend`), it must need to."""
        return self.backend == "plain" or (self.backend == "auto" and any(self.of_whole.values()))

    @property
    def decided_backend(self) -> Literal["zero3", "plain"]:
        return "plain" if self.plain else "zero3"


class AttentionConfig(Section):
    weight: NonNegative = Field(1.0, description="beta of the attention fidelity; 0 leaves the teacher's blocks out")
    layers: Few = Field(4, description="layers compared, evenly spaced over the first depth_fraction of the blocks")
    depth_fraction: Annotated[float, Field(gt=0, le=1)] = Field(0.5, description="share of the blocks that are run")
    rows: Count = Field(64, description="query rows sampled per layer")
    temperature: Positive = Field(3.0, description="tau of the row softmax")
    normalize: bool = Field(True, description="standardise logits per row before the softmax")


class BridgeConfig(Section):
    checkpoint: str | None = Field("shapes:bridge/sd15-flux", description="trained Bridge; null: train it first")
    trainable: bool = Field(
        False, description="train the Bridge along with the student, anchored by its own losses (may collapse)"
    )
    trainable_lr: Positive = Field(1e-6, description="AdamW learning rate of a Bridge that is trained along")
    anchor_weight: Positive = Field(1.0, description="of the Bridge's own losses while it is trained along")
    prior: bool = Field(True, description="start from the frozen student decoder's first blocks")
    projector: Literal["swinir", "unet", "mlp", "identity"] = Field("swinir", description="network after the prior")
    embed_dim: Few = Field(120, description="SwinIR width")
    depths: list[Annotated[int, Field(ge=1, le=100)]] = Field(
        [6, 6, 6, 6, 6], max_length=100, description="SwinIR layers per residual group"
    )
    heads: Few = Field(6, description="SwinIR attention heads")
    window: Few = Field(8, description="SwinIR window")
    attention: AttentionConfig = AttentionConfig()
    source: Literal["stored", "stream"] = Field(
        "stored",
        description="stored: train on bridge.pairs, or on pairs made before; stream: on the pictures of synthesis.images, "
        "which both VAEs encode beside training; nothing is stored",
    )
    shuffle: Count = Field(1024, description="with source=stream: pictures that each worker reads ahead and mixes")
    pairs: str | None = Field(
        None, description="parquet of (prompt, z_T, z_S) pairs to train on; null: synthesise `synthesis.count` of them"
    )
    steps: Count = Field(10000, description="training steps")
    batch_size: Batch = Field(32, description="pairs per step")
    micro_batches: Few = Field(
        1, description="equal parts of a worker's pairs that are computed one after another: slower, less memory"
    )
    lr: Positive = Field(1e-4, description="Adam learning rate")
    lr_decay: Literal["none", "cosine"] = Field("none", description="none: constant; cosine: to 0 over bridge.steps")
    validation_share: Annotated[float, Field(gt=0, lt=1)] = Field(0.05, description="share of pairs held out")
    checkpoint_every: Count = free(500, description="steps between checkpoints")
    ablation_seeds: Few = free(3, description="seeds of each variant of `jobs/train_bridge.py --ablate`")
    mixed_precision: bool = Field(False, description="train with bfloat16 autocast; weights stay float32")
    gradient_checkpointing: bool = free(False, description="recompute activations in training: slower, less memory")


class FakeScoreConfig(Section):
    kind: Literal["lora", "full", "truncated"] = Field(
        "lora",
        description="lora: LoRA on a frozen teacher copy; full: the whole copy is trained; truncated: its first and last "
        "transformer blocks are kept and trained (no UNets)",
    )
    rank: Few = Field(64, description="LoRA rank")
    shard: bool = Field(
        False,
        description="lora: every worker holds 1/distill.workers of the frozen copy's blocks and gathers them one by one "
        "(FSDP2): less memory, the same numbers up to rounding, more communication",
    )
    base_dtype: Literal["float32", "bfloat16"] = free(
        "float32",
        description="of lora, with distill.mixed_precision: how the frozen copy's linear layers and convolutions are kept; "
        "bfloat16: half the memory, the same numbers, for autocast rounds them so anyway",
    )
    first_blocks: Few | None = Field(
        None, description="blocks that a truncated network keeps at its input; null: a quarter of them, rounded up"
    )
    last_blocks: Few | None = Field(
        None, description="blocks that a truncated network keeps at its output; null: a quarter of them, rounded up"
    )
    lr: Positive = Field(5e-4, description="AdamW learning rate")
    optimizer: Optimizer = Field("adamw", description=MOMENTS)
    updates: Few = Field(2, description="fake-score updates per student update (k)")
    batch_size: Batch | None = Field(
        None,
        description="samples per update of fake score and discriminator, and worker; whole micro-batches, at most "
        "distill.batch_size; null: that many",
    )
    max_grad_norm: Positive = Field(1.0, description="gradient clipping")


class DiscriminatorConfig(Section):
    weight: NonNegative = Field(0.5, description="weight of the generator's GAN loss; 0 switches the GAN off")
    ramp_steps: int = Field(
        0,
        ge=0,
        le=1_000_000_000,
        description="updates over which weight grows from 0 to its value; 0: none",
    )
    lr: Positive = Field(5e-7, description="AdamW learning rate of the head")
    width: Few = Field(64, description="channels of the convolutional head")
    fake_weight: NonNegative = Field(
        0.0, description="weight of the head's loss in the fake score's own gradient (DMD2 has one); 0: none reaches it"
    )
    depth_fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="depth of the block whose features are read"
    )
    depths: list[Annotated[float, Field(gt=0, le=1)]] = Field(
        [],
        max_length=100,
        description="increasing depths of several blocks, such as 0.5,0.75,0.99, of the fake score's own; each has a head; "
        "none: depth_fraction alone",
    )
    standardize: bool = Field(
        False,
        description="every channel of the features gets the mean 0 and the spread 1 of the teacher samples', measured once: "
        "for transformers with massive activations",
    )
    step_together: bool = Field(
        False,
        description="the fake score's step comes after both halves of the discriminator's loss, which then read features of "
        "the same weights; false: between them. With fake_weight above 0 it always comes after both",
    )
    r1_weight: NonNegative = Field(
        0.0, description="weight of R1 at the teacher samples, approximated by finite differences; 0: none"
    )
    r1_sigma: Positive = Field(
        0.1,
        description="noise on the clean latents, of about spread 1, by which R1 is approximated; bfloat16 rounds what 0.01 "
        "changes in the features",
    )
    shared_pass: bool = Field(
        False,
        description="the student's GAN loss reads features of the pass that gives the VSD loss its fake score, at the same "
        "noised latents: a part of a pass is saved, and the GAN's times are those of vsd.t_min to vsd.t_max",
    )
    real_data: str | None = Field(
        "shapes:samples/flux",
        description="parquet of teacher samples (prompt, z_T), which the discriminator takes as real; null: the run makes them",
    )
    real_source: Literal["pairs", "samples"] = Field(
        "pairs",
        description="where real_data is null: pairs takes those that the Bridge is trained on; samples has synthesis.count "
        "pictures drawn for the discriminator alone, as where the Bridge's pairs are of real pictures",
    )
    real_count: Count | None = Field(
        4096, description="how many of these samples are read, from the first on, again and again; null: the whole set"
    )

    @model_validator(mode="after")
    def _increasing(self) -> DiscriminatorConfig:
        if any(one >= other for one, other in itertools.pairwise(self.depths)):
            raise ValueError(f"depths ({', '.join(f'{depth:g}' for depth in self.depths)}) must increase")
        return self

    @property
    def read_depths(self) -> list[float]:
        """Of the blocks whose features are read; none without a GAN."""
        return (self.depths or [self.depth_fraction]) if self.weight > 0 else []


class VsdConfig(Section):
    weight: NonNegative = Field(1.0, description="weight of the VSD loss; 0 switches it (and the teachers) off")
    t_min: Fraction = Field(0.02, description="smallest diffusion time of the scores")
    t_max: Fraction = Field(0.98, description="largest diffusion time of the scores")
    guidance_rescale: Fraction = Field(
        0.0,
        description="share of the guided scores that gets the spread of the unguided ones (CFG rescale; 0.7 in its paper); of "
        "the scores alone, not of drawn pictures",
    )
    shift: Positive | None = Field(None, description="timestep shift; null: the teacher family's default")

    @model_validator(mode="after")
    def _range(self) -> VsdConfig:
        if self.t_min >= self.t_max:
            raise ValueError(f"t_min ({self.t_min}) must be below t_max ({self.t_max})")
        return self


class RewardConfig(Section):
    metric: Literal["judge", "clipscore", "pickscore"] | None = Field(
        None,
        description="what the student's own pictures, decoded by its whole VAE, are rewarded by in its loss: clipscore, pickscore, "
        "or judge (log-probability of a shapes caption's attributes); null: nothing. Another metric must pick the best",
    )
    weight: NonNegative = Field(
        0.0, description="weight of the mean reward in the student's loss, in the metric's own units; 0: none"
    )
    ramp_steps: int = Field(
        0, ge=0, le=1_000_000_000, description="updates over which weight grows from 0 to its value; 0: none"
    )
    share: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="share of the samples that are decoded and rewarded, evenly over the sample ids; weight counts for all",
    )
    weights: Places = free(
        {},
        description="its weights by name (judge, clipscore, pickscore, pickscore.processor): a folder, or org/name of the hub; else "
        "those of evaluation.weights (the judge: evaluation.judge), else their authors' from the hub",
    )

    @model_validator(mode="after")
    def _named(self) -> RewardConfig:
        if self.weight > 0 and self.metric is None:
            raise ValueError(f"weight={self.weight:g}, and reward.metric names no reward: name one, or set weight to 0")
        return self

    @property
    def is_on(self) -> bool:
        return self.metric is not None and self.weight > 0
