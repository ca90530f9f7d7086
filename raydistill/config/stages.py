"""Sections about what a run does and reads: the run, distillation, synthesis, prompts, evaluation, tracking, plan."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

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
    Seed,
    free,
)
from raydistill.diffusion import guidance

if TYPE_CHECKING:
    from raydistill.config.schema import Config

RESERVED = re.compile(r"mlflow\.db.*|mlartifacts|downloads", re.IGNORECASE)  # in the storage, beside the runs


def trains_bridge(config: Config) -> bool:
    """Whether a run begins by training its Bridge."""
    return config.bridge.checkpoint is None and config.bridge.projector != "identity"


def streams_bridge(config: Config) -> bool:
    """Whether it trains its Bridge on pictures that are encoded meanwhile, not on stored pairs."""
    return trains_bridge(config) and config.bridge.source == "stream"


def decays(config: Config) -> bool:
    """Whether the learning rates fall until the last update, so that its number decides them all."""
    return config.distill.schedule != "constant"


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


class DistillConfig(Section):
    steps: Count = free(3000, unless=decays, description="student updates")
    batch_size: Batch = Field(32, description="samples per update and worker")
    tf32: bool | None = Field(
        None,
        description="on GPUs, what trainers compute in float32 rounds its factors to TF32: several times as fast; null: "
        "torch's default, which is convolutions alone",
    )
    warmup_steps: int = Field(
        0,
        ge=0,
        le=1_000_000_000,
        description="updates over which the learning rates of all networks grow from 0 to their values; 0: none",
    )
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant",
        description="the learning rates of all networks after warmup_steps; cosine, linear: they fall to 0 at distill.steps, "
        "which a resume may then not change",
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
    max_failures_without_progress: int = free(
        4,
        ge=-1,
        le=1_000_000_000,
        description="worker failures in a row, without an update that was not done before, after which the run ends with "
        "reason and node, whatever max_failures says; lost nodes do not count; -1 and 0: any number",
    )
    max_failures_of_node: int = free(
        2,
        ge=-1,
        le=1_000_000_000,
        description="failures in a row on one node alone, without an update that was not done before, after which workers "
        "avoid this node, where others have room for them; -1 and 0: never",
    )
    collective_timeout_s: Patience = free(
        1800,
        description="longest time that workers wait for each other before the attempt fails; rank 0's evaluation is part of it",
    )
    network_interface: str | None = free(
        None,
        description="network interface by which workers, and the ranks of a teacher, meet, such as eth0 (NCCL_SOCKET_IFNAME, "
        "GLOO_SOCKET_IFNAME); null: NCCL's and gloo's choice",
    )
    gradient_checkpointing: bool = free(
        False, description="recompute activations of student, Bridge and fake score: slower, less memory"
    )
    mixed_precision: bool = Field(
        False,
        description="forward passes of Bridge, fake score and student under bfloat16 autocast; weights, losses and "
        "updates stay float32, and so does a student that starts at t = 999, whose x0 would multiply the rounding",
    )
    compile: bool = Field(
        False,
        description="compile the repeated blocks of student, fake score and SwinIR (torch.compile): faster, the same numbers "
        "up to rounding; the first updates take minutes longer",
    )
    channels_last: bool = Field(
        False,
        description="UNets of student and fake score have their channels last in memory: on GPUs faster, the same numbers up to "
        "rounding; transformers stay as they are",
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
    stop_on_plateau: Few | None = free(
        None,
        description="end the distillation when evaluation.metric has not risen in so many evaluations by more than "
        "the standard error of its rise, picture by picture, and export the best student; null: never. A larger number, "
        "or null, lets such a run go on",
    )
    non_finite_share: Fraction = free(
        0.05,
        description="largest share of a worker's batch that is left out of an update because a value of theirs is not "
        "finite, or one sample; above it, and where it is 0, such a value ends the run",
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


Posterior = Literal["mean", "sample"]
LatentDtype = Literal["float16", "bfloat16"]


class SynthesisConfig(Section):
    count: Count = Field(2048, description="pictures that the teacher, or synthesis.teacher, draws")
    teacher: str | None = Field(
        None,
        description="model that draws them instead of teacher.model: a cheaper one with the same VAE, such as a "
        "step-distilled one; null: teacher.model",
    )
    sampling_steps: Few | None = Field(
        None, description="steps of a drawn picture; null: a step-distilled model's own, else teacher.sampling_steps"
    )
    guidance_scale: Annotated[float, Field(ge=0, le=guidance.MOST)] | None = Field(
        None,
        description="guidance of drawn pictures; 0 to 1: none; null: teacher.guidance_scale, of synthesis.teacher its "
        "family's default, of a step-distilled model none",
    )
    shards: Few | None = Field(None, description="ranks per replica of synthesis.teacher; null: teachers.shards")
    batch_size: Batch = Field(64, description="pictures per request")
    shard_size: Count = Field(256, description="rows per parquet file")
    posterior: Posterior = Field(
        "mean", description="what a VAE's latents are: its posterior's mean, or a sample of it"
    )
    dtype: LatentDtype = Field(
        "float16",
        description="of the latents; bfloat16 has float32's range, 8 instead of 11 binary digits, and takes a fifth less room",
    )
    augment_share: Fraction = Field(
        0.0,
        description="share of the pictures that are blended and recoloured before both VAEs encode them: a Bridge meets "
        "such pictures while the student learns. Such rows are for a Bridge, never the discriminator's real data",
    )
    images: str | None = Field(
        None,
        description="real images that are encoded instead of teacher samples: tars, parquet, tables, folders, patterns, "
        "s3://, gs://, hf://datasets/org/name/…; null: sample. With bridge.source=stream the Bridge is trained on them",
    )
    image_count: Count | None = Field(None, description="how many pictures of synthesis.images are encoded; null: all")
    min_pixels: int = Field(
        0,
        ge=0,
        le=65_536,
        description="pictures of synthesis.images whose smaller side has fewer pixels are left out; 0: none",
    )
    image_column: str = Field(
        "image",
        description="column of synthesis.images: in parquet the encoded picture (bytes, or a struct with `bytes`), in a table "
        "its path, in a tar the suffix of the picture, as in depth.png",
    )
    caption_column: str | None = Field(
        None,
        description="column or key of captions, or several, as in `a,b_*`, of which each picture gets one; null: caption, "
        "text, prompt and caption_*, else the same in any case, captions and *_caption",
    )
    licence: str | None = free(
        None, description="name and licence of the set that synthesis.images names, for the student's model card"
    )
    max_failed_rows: int = free(
        20,
        ge=0,
        le=1_000_000_000,
        description="undecodable images and non-finite samples that are recorded before the run fails",
    )
    encoders: Few = free(
        1,
        description="actors of each stage: those that encode prompts and ask the teachers, and those that hold the VAEs; with "
        "bridge.source=stream, of each worker",
    )
    cpus_per_encoder: Cpus = free(0.2, description="Ray CPUs each of these actors reserves")
    gpus_per_encoder: Gpus = free(0, description="Ray GPUs each of these actors reserves; 0: they run on the CPU")
    threads_per_encoder: Few = Field(1, description="CPU threads of each of these actors")
    node_labels: dict[str, str] = free({}, description="labels of the nodes that may hold these actors; none: any node")
    in_flight: Few = free(2, description="requests each asking actor has under way; a few per teacher replica")


class PromptsConfig(Section):
    path: str = Field(
        "shapes:prompts.txt",
        description="prompt file (txt, csv, tsv, jsonl, json, each also .gz, or parquet), a folder of json or txt, or a "
        "pattern of files; by path, s3://, gs:// or hf://",
    )
    column: str = Field("prompt", description="column of tabular files")
    on_bad_row: Literal["skip", "fail"] = Field("skip", description="blank, oversized and undecodable rows")
    max_characters: Count = Field(2000, description="longer prompts are bad rows")
    encoders: Few = free(1, description="actors per worker that hold the text encoders")
    encoder_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32",
        description="of the teacher's text encoders; the student's are float32, as its only evaluation is exact",
    )
    cpus_per_encoder: Cpus = free(0.1, description="Ray CPUs each of these actors reserves")
    gpus_per_encoder: Gpus = Field(0, description="Ray GPUs each of these actors reserves; 0: CPU")
    threads_per_encoder: Few = Field(1, description="CPU threads of each of these actors")
    node_labels: dict[str, str] = free({}, description="labels of the nodes that may hold them; none: any node")


class EvaluationConfig(Section):
    prompts: str | None = Field(
        "shapes:heldout.txt",
        description="held-out prompts (same formats as prompts.path); null: evaluation.holdout splits them off",
    )
    holdout: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="share of prompts.path, such as 0.001, that is held out to judge the student by, where evaluation.prompts "
        "is null; a hash of a prompt's text decides, and the run learns from the others alone",
    )
    count: Count = Field(512, description="pictures of the final evaluations")
    periodic_count: Count = Field(256, description="pictures of the evaluations during training")
    batch_size: Batch = Field(64, description="pictures at once")
    seed: Seed = Field(1234, description="seed of the fixed noise")
    metric: str = Field(
        "mean",
        description="metric that keeps the best checkpoint, raises the alarm and ends at a plateau: mean, all or an attribute "
        "of the judge, or one of evaluation.metrics",
    )
    metrics: list[str] = Field(
        ["judge"],
        description="what is measured: judge (where evaluation.judge names one), clipscore, pickscore, hpsv2, hpsv3, "
        "imagereward, or command:NAME=PROGRAM",
    )
    judge: str | None = Field("shapes:judge", description="judge of attribute accuracy; null: none")
    weights: Places = free(
        {},
        description="weights of metrics by name (clipscore, pickscore, …): a folder, a file or org/name of the hub; "
        "else their authors' from the hub",
    )
    gpus_per_scorer: Gpus | None = free(
        None,
        description="Ray GPUs of each metric's actor, which lasts as long as the training (0: it runs on a CPU); null: the "
        "first trainer computes them between two updates, and has their weights on its GPU for that time",
    )
    cpus_per_scorer: Cpus = free(0.25, description="Ray CPUs each of these actors reserves")
    node_labels: dict[str, str] = free({}, description="labels of the nodes that may hold these actors; none: any node")
    grid: Few = free(32, description="pictures in a sample grid")
    consistency_count: int = free(
        16,
        ge=0,
        le=256,
        description="pictures of the periodic evaluation whose latents are also read by the Bridge and decoded by the "
        "teacher's VAE: bridge/consistency_psnr says how much that differs from what ships; 0: none",
    )
    scores_grid: int = free(
        4,
        ge=0,
        le=64,
        description="how many prompts the picture `scores` of each evaluation during training has: the student's picture, and "
        "below it what teacher and fake score (the two whose difference it learns from) make of it with noise; 0: none",
    )

    @property
    def measured(self) -> list[str]:
        """`metrics` without a judge that there is none of."""
        return [metric for metric in self.metrics if metric != "judge" or self.judge is not None]

    @property
    def judged(self) -> bool:
        return "judge" in self.measured

    @model_validator(mode="after")
    def _held_out_once(self) -> EvaluationConfig:
        if self.prompts is None and self.holdout is None:
            raise ValueError("prompts=null: name a file of held-out prompts, or set holdout to a share of prompts.path")
        if self.prompts is not None and self.holdout is not None:
            raise ValueError(
                f"holdout={self.holdout:g}, and prompts names held-out prompts already: set evaluation.holdout=null or "
                "evaluation.prompts=null"
            )
        return self


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
    efficiency: Annotated[Fraction, Field(gt=0)] | None = Field(
        None,
        description="share of a GPU's peak arithmetic that all networks reach; null: by kind and role, as "
        "raydistill/planning/gpus.yaml and plan.measured say",
    )
    measured: str | None = Field(
        None,
        description="YAML file of shares that `jobs/benchmark.py gpu` has measured; null: the one in the cache, if there is",
    )
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
