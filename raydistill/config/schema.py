"""The keys of a configuration: type, default, meaning, range, and whether a resume may change them (`free`)."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from raydistill.config.keys import (
    Batch,
    Count,
    Cpus,
    Few,
    Fraction,
    Gpus,
    NonNegative,
    Origin,
    Patience,
    Positive,
    Seconds,
    Section,
    Seed,
    free,
)
from raydistill.diffusion import guidance

RESERVED = re.compile(r"mlflow\.db.*|mlartifacts|downloads", re.IGNORECASE)  # in the storage, beside the runs


def trains_bridge(config: Config) -> bool:
    """Whether a run begins by training its Bridge."""
    return config.bridge.checkpoint is None and config.bridge.projector != "identity"


class RunConfig(Section):
    name: str | None = free(None, description="name of the run; unique by default, naming an existing run resumes it")
    seed: Seed = Field(0, description="seed of every random number (noise, times, order of prompts)")

    @field_validator("name")
    @classmethod
    def _usable(cls, name: str | None) -> str | None:
        """It names a folder of the storage, a service of the cluster and a run in MLflow."""
        if name is None:
            return None
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) or name.endswith(".") or ".." in name:
            raise ValueError(
                "use 1 to 100 letters, digits, '.', '_' and '-', starting with a letter or digit, without '..' and "
                "without '.' at the end"
            )
        if RESERVED.fullmatch(name):
            raise ValueError("the storage keeps MLflow's files under this name; use another one")
        return name


class StudentConfig(Section):
    model: str = Field(
        "shapes:sd15",
        description="the student family (its VAE, text encoder, UNet): a diffusers folder, or org/name[@revision] of the hub",
    )
    unet: str | None = Field(
        "shapes:sd15-onestep",
        description="one-step start: folder of a diffusers UNet or pipeline, or a UNet state dict (.safetensors, .bin, "
        ".pt, .pth; of several networks its EMA); null: model's own",
    )
    start_timestep: int = Field(
        999,
        ge=1,
        le=1_000_000,
        description="timestep of the single student evaluation: 999 for DMD2's students, 625 for SiD-LSG's; decides "
        "also where student.unet names another",
    )
    lr: Positive = Field(1e-6, description="AdamW learning rate of the student")
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="exponential moving average that is evaluated and exported; null: none"
    )
    max_grad_norm: Positive = Field(1.0, description="gradient clipping")


class TeacherConfig(Section):
    model: str = Field(
        "shapes:flux", description="the frozen teacher: a diffusers folder, or org/name[@revision] of the hub"
    )
    guidance_scale: Annotated[float, Field(ge=0, le=guidance.MOST)] | None = Field(
        None, description="classifier-free guidance of scores and samples; 0 to 1: none; null: the family's default"
    )
    sampling_steps: Few = Field(16, description="steps when the teacher generates pictures")


class TeacherServiceConfig(Section):
    replicas: Few = free(1, description="replicas of the teacher service that it starts with")
    min_replicas: Few | None = free(None, description="fewest replicas when it autoscales; null: teachers.replicas")
    max_replicas: Few | None = free(
        None, description="most replicas: follow the ongoing requests up to it; null: always teachers.replicas"
    )
    target_ongoing_requests: Positive = free(2, description="requests per replica that autoscaling aims at")
    upscale_delay_s: Seconds = free(30, description="how long more requests must last before replicas are added")
    downscale_delay_s: Seconds = free(600, description="how long fewer must last before replicas are removed")
    shards: Few = Field(2, description="ranks per replica; each holds 1/shards of the teacher's parameters (ZeRO-3)")
    slice: Batch = Field(8, description="samples per forward and rank; requests are cut into equal slices")
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
        if self.max_replicas is None and self.min_replicas is not None:
            raise ValueError("min_replicas needs max_replicas: without it the number of replicas is fixed")
        if not fewest <= self.replicas <= most:
            raise ValueError(
                f"min_replicas ({fewest}) <= replicas ({self.replicas}) <= max_replicas ({most}) does not hold"
            )
        return self


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


Posterior = Literal["mean", "sample"]


class SynthesisConfig(Section):
    count: Count = Field(2048, description="teacher-sampled pictures to make")
    batch_size: Batch = Field(64, description="pictures per request")
    shard_size: Count = Field(256, description="rows per parquet file")
    posterior: Posterior = Field(
        "mean", description="what a VAE's latents are: its posterior's mean, or a sample of it"
    )
    images: str | None = Field(
        None,
        description="folder or parquet of real images, all of which are encoded instead of teacher samples; null: sample",
    )
    image_column: str = Field(
        "image", description="column of a parquet of images: encoded bytes, or a struct with `bytes`"
    )
    caption_column: str | None = Field(
        None, description="caption column of a parquet of images; null: `caption` where there is one, else no captions"
    )
    max_failed_rows: int = free(
        20,
        ge=0,
        le=1_000_000_000,
        description="undecodable images and non-finite samples that are recorded before the run fails",
    )
    encoders: Few = free(
        1,
        description="actors of each stage: those that encode prompts and ask the teachers, and those that hold the VAEs",
    )
    cpus_per_encoder: Cpus = free(0.2, description="Ray CPUs each of these actors reserves")
    gpus_per_encoder: Gpus = free(0, description="Ray GPUs each of these actors reserves; 0: they run on the CPU")
    threads_per_encoder: Few = Field(1, description="CPU threads of each of these actors")
    node_labels: dict[str, str] = free({}, description="labels of the nodes that may hold these actors; none: any node")
    in_flight: Few = free(2, description="requests each asking actor has under way; a few per teacher replica")


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
    first_blocks: Few | None = Field(
        None, description="blocks that a truncated network keeps at its input; null: a quarter of them, rounded up"
    )
    last_blocks: Few | None = Field(
        None, description="blocks that a truncated network keeps at its output; null: a quarter of them, rounded up"
    )
    lr: Positive = Field(5e-4, description="AdamW learning rate")
    updates: Few = Field(2, description="fake-score updates per student update (k)")
    max_grad_norm: Positive = Field(1.0, description="gradient clipping")


class DiscriminatorConfig(Section):
    weight: NonNegative = Field(0.5, description="weight of the generator's GAN loss; 0 switches the GAN off")
    lr: Positive = Field(5e-7, description="AdamW learning rate of the head")
    width: Few = Field(64, description="channels of the convolutional head")
    fake_weight: NonNegative = Field(
        0.0, description="weight of the head's loss in the fake score's own gradient (DMD2 has one); 0: none reaches it"
    )
    depth_fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="depth of the block whose features are read"
    )
    real_data: str | None = Field(
        "shapes:samples/flux", description="parquet of teacher samples (prompt, z_T); null: synthesise them"
    )
    real_count: Count = Field(4096, description="of these, how many (the first) each worker keeps in memory")


class VsdConfig(Section):
    weight: NonNegative = Field(1.0, description="weight of the VSD loss; 0 switches it (and the teachers) off")
    t_min: Fraction = Field(0.02, description="smallest diffusion time of the scores")
    t_max: Fraction = Field(0.98, description="largest diffusion time of the scores")
    shift: Positive | None = Field(None, description="timestep shift; null: the teacher family's default")

    @model_validator(mode="after")
    def _range(self) -> VsdConfig:
        if self.t_min >= self.t_max:
            raise ValueError(f"t_min ({self.t_min}) must be below t_max ({self.t_max})")
        return self


class DistillConfig(Section):
    steps: Count = free(3000, description="student updates")
    batch_size: Batch = Field(32, description="samples per update and worker")
    tf32: bool | None = Field(
        None,
        description="on GPUs, what trainers compute in float32 rounds its factors to TF32: several times as fast; null: "
        "torch's default, which is convolutions alone",
    )
    micro_batches: Few = Field(
        1,
        description="equal parts of a batch that are computed one after another, with one score request each, and whose "
        "gradients are averaged: less memory, the same update up to rounding",
    )
    in_flight: Few = free(
        8, description="score requests (one a micro-batch) that each worker has under way at most; the others follow"
    )
    overlap: bool = free(True, description="score the next batch while the fake score updates; same numbers either way")
    checkpoint_every: Count = free(500, description="student updates between checkpoints")
    evaluate_every: Count = Field(500, description="student updates between evaluations")
    workers: Few = Field(1, description="Ray Train workers")
    min_workers: Few | None = free(
        None,
        unless=trains_bridge,
        description="go on with as few workers when nodes are lost, and with more as they come back; the update's samples "
        "stay the same, so fewer workers are slower. Exactly so many train the Bridge. null: always distill.workers",
    )
    resize_after_s: Seconds = free(
        60, description="how often it is looked whether more workers fit; a restart goes back to the last checkpoint"
    )
    cpus_per_worker: Cpus = free(0.5, description="Ray CPUs each worker reserves")
    gpus_per_worker: Gpus = free(0, description="Ray GPUs each worker reserves")
    threads: Few = Field(1, description="CPU threads of each worker")
    max_failures: int = free(
        3, ge=-1, le=1_000_000_000, description="worker failures survived before giving up; -1: any number"
    )
    gradient_checkpointing: bool = free(
        False, description="recompute activations of student, Bridge and fake score: slower, less memory"
    )
    mixed_precision: bool = Field(
        False,
        description="forward passes of Bridge, fake score and student under bfloat16 autocast; weights, losses and "
        "updates stay float32, and so does a student that starts at t = 999, whose x0 would multiply the rounding",
    )
    drift_limit: Positive | None = free(
        1.0,
        description="collapse alarm: largest moving average of guard/latent_drift, the distance between the channels' "
        "means and spreads of the student's latents in teacher space and those of the teacher's samples (without "
        "discriminator: of the start), in standard deviations; null: none",
    )
    stop_on_collapse: bool = free(
        False, description="end the distillation at a collapse alarm, and export the best student so far"
    )
    node_labels: dict[str, str] = free({}, description="labels of the nodes that may hold workers; none: any node")

    @model_validator(mode="after")
    def _elastic(self) -> DistillConfig:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers ({self.min_workers}) <= workers ({self.workers}) does not hold")
        return self

    @property
    def fewest(self) -> int:
        """Workers that there are at any time."""
        return self.min_workers or self.workers


class PromptsConfig(Section):
    path: str = Field(
        "shapes:prompts.txt",
        description="prompt file (txt, csv, tsv, jsonl, json, parquet), or a folder of json or txt",
    )
    column: str = Field("prompt", description="column of tabular files")
    on_bad_row: Literal["skip", "fail"] = Field("skip", description="blank, oversized and undecodable rows")
    max_characters: Count = Field(2000, description="longer prompts are bad rows")
    encoders: Few = free(1, description="actors per worker that hold the text encoders")
    encoder_dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of the text encoders")
    cpus_per_encoder: Cpus = free(0.1, description="Ray CPUs each of these actors reserves")
    gpus_per_encoder: Gpus = Field(0, description="Ray GPUs each of these actors reserves; 0: CPU")
    threads_per_encoder: Few = Field(1, description="CPU threads of each of these actors")
    node_labels: dict[str, str] = free({}, description="labels of the nodes that may hold them; none: any node")


class EvaluationConfig(Section):
    prompts: str = Field("shapes:heldout.txt", description="held-out prompts (same formats as prompts.path)")
    count: Count = Field(512, description="pictures of the final evaluations")
    periodic_count: Count = Field(256, description="pictures of the evaluations during training")
    batch_size: Batch = Field(64, description="pictures at once")
    seed: Seed = Field(1234, description="seed of the fixed noise")
    metric: str = Field("mean", description="metric by which the best checkpoint is kept")
    judge: str | None = Field("shapes:judge", description="judge of attribute accuracy; null: pictures only")
    grid: Few = free(32, description="pictures in a sample grid")


class TrackingConfig(Section):
    uri: str | None = Field(None, description="MLflow tracking URI; null: MLFLOW_TRACKING_URI, else sqlite in storage")
    retry_for_s: Seconds = Field(
        600, description="how long a run that has begun waits for a store that is away before it opens its next stage"
    )
    experiment: str = Field("raydistill", description="MLflow experiment")
    register_as: str | None = Field(
        None, description="name in MLflow's registry for the student; the best by evaluation.metric is its champion"
    )


class PlanConfig(Section):
    """What jobs/plan.py, and the check before every launch, assume of the hardware."""

    trainer_gpu: str = Field("H100", description="kind of GPU of the trainers, a name in raydistill/planning/gpus.yaml")
    teacher_gpu: str = Field("H100", description="kind of GPU of the teachers")
    encoder_gpu: str | None = Field(
        None, description="kind of GPU of the text encoders and of synthesis' actors; null: plan.teacher_gpu"
    )
    efficiency: Fraction = Field(0.4, gt=0, description="share of a GPU's peak arithmetic that the networks reach")
    reserve: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="share of GPU memory kept free (CUDA context, fragmentation, kernels' workspace)"
    )
    network_gbits: Positive = Field(100, description="network between nodes, Gbit/s")
    cpu_gflops: Positive = Field(50, description="float32 GFLOP/s of one CPU thread, for text encoders without a GPU")
    gpus: str | None = Field(
        None, description="YAML file of further kinds of GPU, as raydistill/planning/gpus.yaml; null: none"
    )
    spot: bool = Field(True, description="price workers as spot instances")
    head_price: NonNegative = Field(1.06, description="US dollars an hour for the head node, which is never spot")
    launch: Literal["refuse", "warn", "ignore"] = Field(
        "refuse", description="what a job that asks for GPUs does when a role does not fit them; ignore: count nothing"
    )

    @field_validator("trainer_gpu", "teacher_gpu", "encoder_gpu", mode="before")
    @classmethod
    def _named_by_a_number(cls, value: Any) -> Any:
        """`plan.trainer_gpu=4090` names a kind too."""
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class Config(Section):
    """Root of the tree."""

    storage: str = free(
        "outputs",
        min_length=1,
        description="folder that roots everything a run writes, or s3://bucket/prefix, gs://bucket/prefix",
    )
    run: RunConfig = RunConfig()
    student: StudentConfig = StudentConfig()
    teacher: TeacherConfig = TeacherConfig()
    teachers: TeacherServiceConfig = TeacherServiceConfig()
    bridge: BridgeConfig = BridgeConfig()
    synthesis: SynthesisConfig = SynthesisConfig()
    fake_score: FakeScoreConfig = FakeScoreConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    vsd: VsdConfig = VsdConfig()
    distill: DistillConfig = DistillConfig()
    controls: list[Literal["no_vsd", "shared_space"]] = free(
        [], description="extra runs for comparison: VSD off; the student's own weak model as teacher (identity Bridge)"
    )
    prompts: PromptsConfig = PromptsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = free(TrackingConfig())
    plan: PlanConfig = free(PlanConfig())

    _origin: Origin = PrivateAttr(default_factory=Origin)

    @property
    def origin(self) -> Origin:
        return self._origin

    def of(self, origin: Origin) -> Config:
        """Itself, with the origin from now on."""
        self._origin = origin
        return self

    @model_validator(mode="after")
    def _names(self) -> Config:
        if self.vsd.weight == 0 and self.discriminator.weight == 0:
            raise ValueError("vsd.weight and discriminator.weight are both 0: nothing would teach the student")
        if self.fake_score.shard and self.fake_score.kind != "lora":
            raise ValueError(f"fake_score.shard: nothing of kind={self.fake_score.kind} is frozen; use kind=lora")
        if self.fake_score.shard and self.distill.fewest < self.distill.workers:
            raise ValueError("distill.min_workers: with fake_score.shard the number of workers is fixed")
        if self.bridge.trainable and self.distill.fewest < self.distill.workers:
            raise ValueError("distill.min_workers: with bridge.trainable the number of workers is fixed")
        return self
