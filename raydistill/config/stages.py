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
    Positive,
    Seconds,
    Section,
    Seed,
    free,
)

if TYPE_CHECKING:
    from raydistill.config.schema import Config

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
    max_failures_without_progress: int = free(
        4,
        ge=-1,
        le=1_000_000_000,
        description="worker failures in a row, without an update that was not done before, after which the run ends with "
        "reason and node, whatever max_failures says; lost nodes do not count; -1 and 0: any number",
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
