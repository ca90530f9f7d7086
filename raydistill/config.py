"""One typed configuration tree: YAML file, then dotted overrides (`student.lr=1e-5`), validated before anything starts.

Every job takes `[--config FILE] [--help] [--print-config] [key=value …]`. A wrong key, type or value ends the job with
exit code 2 and one line per mistake.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

if typing.TYPE_CHECKING:
    from raydistill.storage import Place

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SHAPES_PREFIX = "shapes:"
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
HUB_KEYS = ("student.model", "teacher.model")  # may name a model of the Hugging Face hub


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is for whoever typed it."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]


class Run(Section):
    name: str | None = Field(None, description="name of the run; unique by default, naming an existing run resumes it")
    seed: int = Field(0, ge=0, description="seed of every random number (noise, times, order of prompts)")


class Student(Section):
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
        description="timestep of the single student evaluation: 999 for DMD2's students, 625 for SiD-LSG's; decides "
        "also where student.unet names another",
    )
    lr: Positive = Field(1e-6, description="AdamW learning rate of the student")
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="exponential moving average that is evaluated and exported; null: none"
    )
    max_grad_norm: Positive = Field(1.0, description="gradient clipping")


class Teacher(Section):
    model: str = Field(
        "shapes:flux", description="the frozen teacher: a diffusers folder, or org/name[@revision] of the hub"
    )
    guidance_scale: Annotated[float, Field(ge=1)] | None = Field(
        None, description="classifier-free guidance of scores and samples; null: the family's default"
    )
    sampling_steps: Count = Field(16, description="steps when the teacher generates pictures")


class Teachers(Section):
    replicas: Count = Field(1, description="replicas of the teacher service that it starts with")
    min_replicas: Count | None = Field(None, description="fewest replicas when it autoscales; null: teachers.replicas")
    max_replicas: Count | None = Field(
        None, description="most replicas: follow the ongoing requests up to it; null: always teachers.replicas"
    )
    target_ongoing_requests: Positive = Field(2, description="requests per replica that autoscaling aims at")
    upscale_delay_s: NonNegative = Field(30, description="how long more requests must last before replicas are added")
    downscale_delay_s: NonNegative = Field(600, description="how long fewer must last before replicas are removed")
    shards: Count = Field(2, description="ranks per replica; each holds 1/shards of the teacher's parameters (ZeRO-3)")
    slice: Count = Field(8, description="samples per forward and rank; requests are cut into equal slices")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="dtype of the teacher's weights")
    cpus_per_rank: Positive = Field(0.2, description="Ray CPUs each rank reserves")
    gpus_per_rank: NonNegative = Field(0, description="Ray GPUs each rank reserves")
    threads_per_rank: Count = Field(1, description="CPU threads of each rank")
    request_timeout_s: Positive = Field(
        600, description="longest time the ranks may work on one request, its wait for their time apart; retried once"
    )
    retry_for_s: Positive = Field(
        600, description="how long the service may be away, in all, while an answer is awaited"
    )
    start_timeout_s: Positive = Field(600, description="longest time until the service is ready")
    node_labels: dict[str, str] = Field({}, description="labels of the nodes that may hold ranks; none: any node")
    service: str | None = Field(
        None, description="attach to this running service (teacher-<run.name> of another run); null: start one"
    )
    linger_s: NonNegative = Field(
        600, description="how long a service whose runs have crashed waits for one of them to resume"
    )

    @model_validator(mode="after")
    def _bounds(self) -> Teachers:
        fewest, most = self.min_replicas or self.replicas, self.max_replicas or self.replicas
        if self.max_replicas is None and self.min_replicas is not None:
            raise ValueError("min_replicas needs max_replicas: without it the number of replicas is fixed")
        if not fewest <= self.replicas <= most:
            raise ValueError(
                f"min_replicas ({fewest}) <= replicas ({self.replicas}) <= max_replicas ({most}) does not hold"
            )
        return self


class Attention(Section):
    weight: NonNegative = Field(1.0, description="beta of the attention fidelity; 0 leaves the teacher's blocks out")
    layers: Count = Field(4, description="layers compared, evenly spaced over the first depth_fraction of the blocks")
    depth_fraction: Annotated[float, Field(gt=0, le=1)] = Field(0.5, description="share of the blocks that are run")
    rows: Count = Field(64, description="query rows sampled per layer")
    temperature: Positive = Field(3.0, description="tau of the row softmax")
    normalize: bool = Field(True, description="standardise logits per row before the softmax")


class Bridge(Section):
    checkpoint: str | None = Field("shapes:bridge/sd15-flux", description="trained Bridge; null: train it first")
    trainable: bool = Field(
        False, description="train the Bridge along with the student, anchored by its own losses (may collapse)"
    )
    trainable_lr: Positive = Field(1e-6, description="AdamW learning rate of a Bridge that is trained along")
    anchor_weight: Positive = Field(1.0, description="of the Bridge's own losses while it is trained along")
    prior: bool = Field(True, description="start from the frozen student decoder's first blocks")
    projector: Literal["swinir", "unet", "mlp", "identity"] = Field("swinir", description="network after the prior")
    embed_dim: Count = Field(120, description="SwinIR width")
    depths: list[Count] = Field([6, 6, 6, 6, 6], description="SwinIR layers per residual group")
    heads: Count = Field(6, description="SwinIR attention heads")
    window: Count = Field(8, description="SwinIR window")
    attention: Attention = Attention()
    pairs: str | None = Field(
        None, description="parquet of (prompt, z_T, z_S) pairs to train on; null: synthesise `synthesis.count` of them"
    )
    steps: Count = Field(10000, description="training steps")
    batch_size: Count = Field(32, description="pairs per step")
    micro_batches: Count = Field(
        1, description="equal parts of a worker's pairs that are computed one after another: slower, less memory"
    )
    lr: Positive = Field(1e-4, description="Adam learning rate")
    lr_decay: Literal["none", "cosine"] = Field("none", description="none: constant; cosine: to 0 over bridge.steps")
    validation_share: Annotated[float, Field(gt=0, lt=1)] = Field(0.05, description="share of pairs held out")
    checkpoint_every: Count = Field(500, description="steps between checkpoints")
    ablation_seeds: Count = Field(3, description="seeds of each variant of `jobs/train_bridge.py --ablate`")
    mixed_precision: bool = Field(False, description="train with bfloat16 autocast; weights stay float32")
    gradient_checkpointing: bool = Field(False, description="recompute activations in training: slower, less memory")


Posterior = Literal["mean", "sample"]


class Synthesis(Section):
    count: Count = Field(2048, description="teacher-sampled pictures to make")
    batch_size: Count = Field(64, description="pictures per request")
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
    max_failed_rows: int = Field(
        20, ge=0, description="undecodable images and non-finite samples that are recorded before the run fails"
    )
    encoders: Count = Field(
        1,
        description="actors of each stage: those that encode prompts and ask the teachers, and those that hold the VAEs",
    )
    cpus_per_encoder: Positive = Field(0.2, description="Ray CPUs each of these actors reserves")
    gpus_per_encoder: NonNegative = Field(
        0, description="Ray GPUs each of these actors reserves; 0: they run on the CPU"
    )
    threads_per_encoder: Count = Field(1, description="CPU threads of each of these actors")
    node_labels: dict[str, str] = Field(
        {}, description="labels of the nodes that may hold these actors; none: any node"
    )
    in_flight: Count = Field(2, description="requests each asking actor has under way; a few per teacher replica")


class FakeScore(Section):
    kind: Literal["lora", "full", "truncated"] = Field(
        "lora",
        description="lora: LoRA on a frozen teacher copy; full: the whole copy is trained; truncated: its first and last "
        "transformer blocks are kept and trained (no UNets)",
    )
    rank: Count = Field(64, description="LoRA rank")
    shard: bool = Field(
        False,
        description="lora: every worker holds 1/distill.workers of the frozen copy's blocks and gathers them one by one "
        "(FSDP2): less memory, the same numbers up to rounding, more communication",
    )
    first_blocks: Count | None = Field(
        None, description="blocks that a truncated network keeps at its input; null: a quarter of them, rounded up"
    )
    last_blocks: Count | None = Field(
        None, description="blocks that a truncated network keeps at its output; null: a quarter of them, rounded up"
    )
    lr: Positive = Field(5e-4, description="AdamW learning rate")
    updates: Count = Field(2, description="fake-score updates per student update (k)")
    max_grad_norm: Positive = Field(1.0, description="gradient clipping")


class Discriminator(Section):
    weight: NonNegative = Field(0.5, description="weight of the generator's GAN loss; 0 switches the GAN off")
    lr: Positive = Field(5e-7, description="AdamW learning rate of the head")
    width: Count = Field(64, description="channels of the convolutional head")
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


class Vsd(Section):
    weight: NonNegative = Field(1.0, description="weight of the VSD loss; 0 switches it (and the teachers) off")
    t_min: Fraction = Field(0.02, description="smallest diffusion time of the scores")
    t_max: Fraction = Field(0.98, description="largest diffusion time of the scores")
    shift: Positive | None = Field(None, description="timestep shift; null: the teacher family's default")

    @model_validator(mode="after")
    def _range(self) -> Vsd:
        if self.t_min >= self.t_max:
            raise ValueError(f"t_min ({self.t_min}) must be below t_max ({self.t_max})")
        return self


class Distill(Section):
    steps: Count = Field(3000, description="student updates")
    batch_size: Count = Field(32, description="samples per update and worker")
    tf32: bool | None = Field(
        None,
        description="on GPUs, what trainers compute in float32 rounds its factors to TF32: several times as fast; null: "
        "torch's default, which is convolutions alone",
    )
    micro_batches: Count = Field(
        1,
        description="equal parts of a batch that are computed one after another, with one score request each, and whose "
        "gradients are averaged: less memory, the same update up to rounding",
    )
    in_flight: Count = Field(
        8, description="score requests (one a micro-batch) that each worker has under way at most; the others follow"
    )
    overlap: bool = Field(
        True, description="score the next batch while the fake score updates; same numbers either way"
    )
    checkpoint_every: Count = Field(500, description="student updates between checkpoints")
    evaluate_every: Count = Field(500, description="student updates between evaluations")
    workers: Count = Field(1, description="Ray Train workers")
    min_workers: Count | None = Field(
        None,
        description="go on with as few workers when nodes are lost, and with more as they come back; the update's samples "
        "stay the same, so fewer workers are slower. The Bridge is trained by that many. null: always distill.workers",
    )
    resize_after_s: NonNegative = Field(
        60, description="how often it is looked whether more workers fit; a restart goes back to the last checkpoint"
    )
    cpus_per_worker: Positive = Field(0.5, description="Ray CPUs each worker reserves")
    gpus_per_worker: NonNegative = Field(0, description="Ray GPUs each worker reserves")
    threads: Count = Field(1, description="CPU threads of each worker")
    max_failures: int = Field(3, ge=-1, description="worker failures survived before giving up; -1: any number")
    gradient_checkpointing: bool = Field(
        False, description="recompute activations of student, Bridge and fake score: slower, less memory"
    )
    mixed_precision: bool = Field(
        False,
        description="forward passes of Bridge, fake score and student under bfloat16 autocast; weights, losses and "
        "updates stay float32, and so does a student that starts at t = 999, whose x0 would multiply the rounding",
    )
    drift_limit: Positive | None = Field(
        1.0,
        description="collapse alarm: largest moving average of guard/latent_drift, the distance between the channels' "
        "means and spreads of the student's latents in teacher space and those of the teacher's samples (without "
        "discriminator: of the start), in standard deviations; null: none",
    )
    stop_on_collapse: bool = Field(
        False, description="end the distillation at a collapse alarm, and export the best student so far"
    )
    node_labels: dict[str, str] = Field({}, description="labels of the nodes that may hold workers; none: any node")

    @model_validator(mode="after")
    def _elastic(self) -> Distill:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers ({self.min_workers}) <= workers ({self.workers}) does not hold")
        return self

    @property
    def fewest(self) -> int:
        """Workers that there are at any time."""
        return self.min_workers or self.workers


class Prompts(Section):
    path: str = Field("shapes:prompts.txt", description="prompt file (txt, csv, tsv, jsonl, parquet)")
    column: str = Field("prompt", description="column of tabular files")
    on_bad_row: Literal["skip", "fail"] = Field("skip", description="blank, oversized and undecodable rows")
    max_characters: Count = Field(2000, description="longer prompts are bad rows")
    encoders: Count = Field(1, description="actors per worker that hold the text encoders")
    encoder_dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of the text encoders")
    cpus_per_encoder: Positive = Field(0.1, description="Ray CPUs each of these actors reserves")
    gpus_per_encoder: NonNegative = Field(0, description="Ray GPUs each of these actors reserves; 0: CPU")
    threads_per_encoder: Count = Field(1, description="CPU threads of each of these actors")
    node_labels: dict[str, str] = Field({}, description="labels of the nodes that may hold them; none: any node")


class Evaluation(Section):
    prompts: str = Field("shapes:heldout.txt", description="held-out prompts (same formats as prompts.path)")
    count: Count = Field(512, description="pictures of the final evaluations")
    periodic_count: Count = Field(256, description="pictures of the evaluations during training")
    batch_size: Count = Field(64, description="pictures at once")
    seed: int = Field(1234, ge=0, description="seed of the fixed noise")
    metric: str = Field("mean", description="metric by which the best checkpoint is kept")
    judge: str | None = Field("shapes:judge", description="judge of attribute accuracy; null: pictures only")
    grid: Count = Field(32, description="pictures in a sample grid")


class Tracking(Section):
    uri: str | None = Field(None, description="MLflow tracking URI; null: MLFLOW_TRACKING_URI, else sqlite in storage")
    retry_for_s: NonNegative = Field(
        600, description="how long a run that has begun waits for a store that is away before it opens its next stage"
    )
    experiment: str = Field("raydistill", description="MLflow experiment")


class Plan(Section):
    """What jobs/plan.py, and the check before every launch, assume of the hardware."""

    trainer_gpu: str = Field("H100", description="kind of GPU of the trainers, a name in raydistill/gpus.yaml")
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
    gpus: str | None = Field(None, description="YAML file of further kinds of GPU, as raydistill/gpus.yaml; null: none")
    spot: bool = Field(True, description="price workers as spot instances")
    head_price: NonNegative = Field(1.06, description="US dollars an hour for the head node, which is never spot")
    launch: Literal["refuse", "warn", "ignore"] = Field(
        "refuse", description="what a job that asks for GPUs does when a role does not fit them; ignore: count nothing"
    )


class Config(Section):
    """Root of the tree."""

    storage: str = Field(
        "outputs", description="folder that roots everything a run writes, or s3://bucket/prefix, gs://bucket/prefix"
    )
    run: Run = Run()
    student: Student = Student()
    teacher: Teacher = Teacher()
    teachers: Teachers = Teachers()
    bridge: Bridge = Bridge()
    synthesis: Synthesis = Synthesis()
    fake_score: FakeScore = FakeScore()
    discriminator: Discriminator = Discriminator()
    vsd: Vsd = Vsd()
    distill: Distill = Distill()
    controls: list[Literal["no_vsd", "shared_space"]] = Field(
        [], description="extra runs for comparison: VSD off; the student's own weak model as teacher (identity Bridge)"
    )
    prompts: Prompts = Prompts()
    evaluation: Evaluation = Evaluation()
    tracking: Tracking = Tracking()
    plan: Plan = Plan()

    @model_validator(mode="after")
    def _names(self) -> Config:
        name = self.run.name
        if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise ValueError(
                f"run.name {name!r}: use letters, digits, '.', '_' and '-', starting with a letter or digit"
            )
        if self.vsd.weight == 0 and self.discriminator.weight == 0:
            raise ValueError("vsd.weight and discriminator.weight are both 0: nothing would teach the student")
        if self.fake_score.shard and self.fake_score.kind != "lora":
            raise ValueError(f"fake_score.shard: nothing of kind={self.fake_score.kind} is frozen; use kind=lora")
        if self.fake_score.shard and self.distill.fewest < self.distill.workers:
            raise ValueError("distill.min_workers: with fake_score.shard the number of workers is fixed")
        if self.bridge.trainable and self.distill.fewest < self.distill.workers:
            raise ValueError("distill.min_workers: with bridge.trainable the number of workers is fixed")
        return self


# -- reading --------------------------------------------------------------------------------------------


def is_uri(text: str) -> bool:
    """Whether `text` reads as scheme://something."""
    return _URI.match(text) is not None


def local_path(path: str) -> Path:
    """A path of the configuration on this machine.

    `shapes:NAME` is a part of the embedded world; what `s3://` and `gs://` name is fetched once a node (`storage.stage`).

    Raises:
        ConfigError: a URI of another scheme, of nothing, or that may not be read.
        OSError: the store of a URI does not answer.
    """
    if path.startswith(SHAPES_PREFIX):
        from raydistill.shapes import WEIGHTS

        return WEIGHTS / path.removeprefix(SHAPES_PREFIX)
    if path.startswith("file:///"):
        return Path(unquote(path.removeprefix("file://")))
    if is_uri(path):
        from raydistill.storage import stage

        return stage(path)
    return Path(path).expanduser()


def resolve(path: str) -> Path:
    """`local_path`, or the cached folder of a hub model `org/name[@revision]`.

    `check_paths` downloads hub models when a run starts; a node that does not share its cache does so here.

    Raises:
        ConfigError: as `local_path`, or a hub model cannot be fetched.
    """
    found = local_path(path)
    if found.exists():
        return found
    from raydistill.hub import is_hub_id, on_this_node
    from raydistill.storage import present

    return on_this_node(path) if is_hub_id(path) else present(found)


def fields(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """(dotted key, type, default, description) of every leaf."""
    for name, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            yield from fields(info.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, info.annotation, info.default, info.description or ""


def nearest(key: str) -> str:
    """« did you mean …?» for an unknown key, or an empty string."""
    keys = [name for name, *_ in fields()]
    if "." not in key:  # a section
        close = difflib.get_close_matches(key, list(Config.model_fields), n=1, cutoff=0.5)
        return f"; did you mean {close[0]}?" if close else ""
    section = key.rsplit(".", 1)[0] + "."
    if own := difflib.get_close_matches(key, [k for k in keys if k.startswith(section)], n=1, cutoff=0.8):
        return f"; did you mean {own[0]}?"
    by_leaf = [k for k in keys if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    close = by_leaf or difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _merge(base: dict, extra: dict) -> dict:
    result = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merge(result[key], value) if both else value
    return result


def _keys(tree: dict, prefix: str = "") -> Iterator[str]:
    """Dotted keys of sections and leaves."""
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")


def read_yaml(file: Path, extended_by: tuple[Path, ...] = ()) -> tuple[dict, dict[str, str]]:
    """One YAML file on top of those that its `extends:` names: a file name relative to it, or a list; later ones win.

    Returns:
        the tree, and for every dotted key the file that it comes from.

    Raises:
        ConfigError: a file is missing, is not a mapping, or extends itself; the message names it.
    """
    if not file.is_file():
        if extended_by:
            raise ConfigError(f"{extended_by[-1]}: extends {file}, which does not exist")
        known = ", ".join(sorted(p.name for p in CONFIGS.glob("*.yaml")))
        raise ConfigError(f"--config {file}: no such file" + (f" (configs/ has: {known})" if known else ""))
    if file.resolve() in (other.resolve() for other in extended_by):
        raise ConfigError(f"{extended_by[-1]}: extends {file}, which extends it")
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: must be a mapping of sections, not a {type(tree).__name__}")
    parents = tree.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(name, str) for name in parents):
        raise ConfigError(f"{file}: extends must be a file name or a list of file names, not {parents!r}")
    below: dict = {}
    origins: dict[str, str] = {}
    for name in parents:
        part, part_origins = read_yaml(file.parent / name, (*extended_by, file))
        below, origins = _merge(below, part), origins | part_origins
    return _merge(below, tree), origins | dict.fromkeys(_keys(tree), str(file))


class _Loader(yaml.SafeLoader):
    """SafeLoader that also reads 1e-5 as a number, as everybody expects."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _coerce_floats(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _coerce_floats(value) for key, value in tree.items()}
    if isinstance(tree, str) and re.fullmatch(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+", tree):
        return float(tree)
    return tree


def _override(text: str) -> dict:
    """`section.key=value` as a tree. Raises ConfigError."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ConfigError(f"{text!r}: overrides look like section.key=value (see --help)")
    try:
        parsed: Any = yaml.load(value, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError:
        raise ConfigError(f"{text!r}: the value is not valid YAML") from None
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return parsed


def _where(key: str, origins: Mapping[str, str]) -> str:
    """The file that a key, or the nearest section around it, comes from: ` (in FILE)`; else nothing."""
    while key and key not in origins:
        key = key.rpartition(".")[0]
    return f" (in {origins[key]})" if origins.get(key) else ""


def validate(tree: dict, origins: Mapping[str, str] | None = None) -> Config:
    """Check a plain tree; `origins` says which file a dotted key comes from.

    Raises:
        ConfigError: one line per mistake.
    """
    origins = origins or {}
    try:
        return Config.model_validate(_coerce_floats(tree))
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            key = ".".join(
                str(part) for part in problem["loc"] if not str(part).startswith(("constrained", "function"))
            )
            if problem["type"] == "extra_forbidden":
                lines.append(f"unknown key {key}{nearest(key)}{_where(key, origins)}")
            else:
                got = "" if isinstance(problem["input"], dict) else f" (got {problem['input']!r})"
                text = problem["msg"].removeprefix("Value error, ")
                lines.append(f"{key + ': ' if key else ''}{text}{got}{_where(key, origins)}")
        raise ConfigError("\n".join(lines)) from None


def load(file: Path | str | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (default configs/shapes.yaml), apply overrides, validate. Raises ConfigError."""
    tree, origins = read_yaml(Path(file) if file else CONFIGS / "shapes.yaml")
    for text in overrides:
        extra = _override(text)
        tree = _merge(tree, extra)
        origins |= dict.fromkeys(_keys(extra), "")  # whoever typed it needs no file name
    return validate(tree, origins)


def check_paths(config: Config, keys: Sequence[str]) -> None:
    """Every named path must exist; models of the hub, and URIs, are fetched. Raises ConfigError naming key and path."""
    from raydistill.hub import download, is_hub_id

    for key in keys:
        value = get(config, key)
        try:
            if value is None or (found := local_path(value)).exists():
                continue
            if key in HUB_KEYS and is_hub_id(value):
                download(value)
                continue
        except (ConfigError, OSError) as error:
            raise ConfigError(f"{key}: {error}") from None
        raise ConfigError(f"{key}: {value} does not exist (looked at {found})")


def get(config: Config, key: str) -> Any:
    """Value of a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def trains_bridge(config: Config) -> bool:
    """Whether a run begins by training its Bridge."""
    return config.bridge.checkpoint is None and config.bridge.projector != "identity"


def needs_pairs(config: Config) -> bool:
    """Whether a run has a use for pairs, or teacher samples, that it does not find elsewhere than in `bridge.pairs`."""
    gan = config.discriminator.weight > 0 and config.discriminator.real_data is None
    return trains_bridge(config) or config.bridge.trainable or gan


def flatten(config: Config) -> dict[str, Any]:
    """Dotted key -> plain value."""
    return {key: get(config, key) for key, *_ in fields()}


def changed(config: Config, changes: Mapping[str, Mapping[str, Any]]) -> Config:
    """The configuration with other values of some sections. Raises ConfigError."""
    tree = config.model_dump()
    for section, values in changes.items():
        tree[section] |= values
    return validate(tree)


# Changing one of these changes the numbers of a run; a resume with a changed one is refused.
_FREE_KEYS = re.compile(
    r"storage|run\.name|controls|plan\..*|tracking\..*|teachers\.(?!slice|shards|dtype|threads_per_rank).*|"
    r"distill\.(overlap|checkpoint_every|cpus_per_worker|gpus_per_worker|max_failures|steps|node_labels|"
    r"gradient_checkpointing|in_flight|drift_limit|stop_on_collapse)|"
    r"prompts\.(encoders|cpus_per_encoder|node_labels)|bridge\.(checkpoint_every|ablation_seeds|gradient_checkpointing)|"
    r"synthesis\.(max_failed_rows|encoders|cpus_per_encoder|gpus_per_encoder|in_flight|node_labels)"
)


def mathematical(config: Config) -> dict[str, Any]:
    """The keys that decide the numbers of a run."""
    return {key: value for key, value in flatten(config).items() if not _FREE_KEYS.fullmatch(key)}


def config_hash(config: Config) -> str:
    """Short hash of `mathematical`."""
    return hashlib.sha256(json.dumps(mathematical(config), sort_keys=True).encode()).hexdigest()[:12]


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


# -- command line ---------------------------------------------------------------------------------------


def _type_name(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _type_name(typing.get_args(annotation)[0])
    if origin is Literal:
        return "|".join(
            str(value).lower() if isinstance(value, bool) else str(value) for value in typing.get_args(annotation)
        )
    if origin in (typing.Union, types.UnionType):
        return "|".join("null" if part is type(None) else _type_name(part) for part in typing.get_args(annotation))
    if origin is dict:
        return "{key: value, …}"
    if origin is list:
        return f"[{_type_name(typing.get_args(annotation)[0])}, …]"
    return getattr(annotation, "__name__", str(annotation))


def help_text(purpose: str, config: Config) -> str:
    """`--help`: purpose, usage, every key with type, value and meaning."""
    script = Path(sys.argv[0]).name
    lines = [
        purpose.strip(),
        "",
        f"usage: python jobs/{script} [--config FILE] [--help] [--print-config] [key=value …]",
        "",
        "  --config FILE    YAML file; default configs/shapes.yaml",
        "  --print-config   print the resulting configuration and stop",
        "  key=value        override one key, for example student.lr=1e-5",
        "",
        "keys (type) = value: meaning",
    ]
    for key, annotation, _, description in fields():
        value = json.dumps(get(config, key))
        lines.append(f"  {key} ({_type_name(annotation)}) = {value}: {description}")
    return "\n".join(lines)


def from_command_line(purpose: str, arguments: Sequence[str] | None = None) -> Config:
    """Configuration of a job script. Prints and exits for --help (0), --print-config (0) and mistakes (2)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    file, overrides, show_help, show_config = None, [], False, False
    try:
        while arguments:
            argument = arguments.pop(0)
            if argument in ("-h", "--help"):
                show_help = True
            elif argument == "--print-config":
                show_config = True
            elif argument == "--config" or argument.startswith("--config="):
                _, separator, file = argument.partition("=")
                if not separator:
                    if not arguments:
                        raise ConfigError("--config needs a file name")
                    file = arguments.pop(0)
            elif argument.startswith("-"):
                raise ConfigError(f"unknown option {argument}; options are --config, --help, --print-config")
            else:
                overrides.append(argument)
        config = load(file, overrides)
    except ConfigError as error:
        print("configuration error:\n  " + str(error).replace("\n", "\n  "), file=sys.stderr)
        raise SystemExit(2) from None
    if show_help:
        print(help_text(purpose, config))
        raise SystemExit(0)
    if show_config:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def check_storage(config: Config) -> Place:
    """Absolute storage root, or a URI's. Raises ConfigError: a wrong URI, or a relative folder under `ray job submit`."""
    from raydistill.storage import place

    if is_uri(config.storage):
        try:
            return place(config.storage)
        except ConfigError as error:
            raise ConfigError(f"storage: {error}") from None
    if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") and not Path(config.storage).expanduser().is_absolute():
        raise ConfigError(
            f"storage: {config.storage!r} is relative, and under `ray job submit` the working directory is a copy that is "
            "thrown away; name an absolute folder, for example storage=$HOME/raydistill"
        )
    return Path(config.storage).expanduser().resolve()
