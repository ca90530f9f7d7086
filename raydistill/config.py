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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SHAPES_PREFIX = "shapes:"


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
        "shapes:sd15", description="diffusers folder of the student family (its VAE, text encoder, UNet)"
    )
    unet: str | None = Field(
        "shapes:sd15-onestep", description="folder of the one-step starting UNet; null: model's own"
    )
    start_timestep: int = Field(999, ge=1, description="the timestep of the single student evaluation")
    lr: Positive = Field(1e-6, description="AdamW learning rate of the student")
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="exponential moving average that is evaluated and exported; null: none"
    )
    max_grad_norm: Positive = Field(1.0, description="gradient clipping")


class Teacher(Section):
    model: str = Field("shapes:flux", description="diffusers folder of the frozen teacher")
    guidance_scale: Annotated[float, Field(ge=1)] | None = Field(
        None, description="classifier-free guidance of scores and samples; null: the family's default"
    )
    sampling_steps: Count = Field(16, description="steps when the teacher generates pictures")


class Teachers(Section):
    replicas: Count = Field(1, description="replicas of the teacher service")
    shards: Count = Field(2, description="ranks per replica; each holds 1/shards of the teacher's parameters (ZeRO-3)")
    slice: Count = Field(8, description="samples per forward and rank; requests are cut into equal slices")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="dtype of the teacher's weights")
    cpus_per_rank: Positive = Field(0.2, description="Ray CPUs each rank reserves")
    gpus_per_rank: NonNegative = Field(0, description="Ray GPUs each rank reserves")
    threads_per_rank: Count = Field(1, description="CPU threads of each rank")
    request_timeout_s: Positive = Field(600, description="longest time one request may take before it is retried")
    retry_for_s: Positive = Field(600, description="how long the client keeps retrying while the service is down")
    start_timeout_s: Positive = Field(600, description="longest time until the service is ready")


class Attention(Section):
    weight: NonNegative = Field(1.0, description="beta of the attention fidelity; 0 leaves the teacher's blocks out")
    layers: Count = Field(4, description="layers compared, evenly spaced over the first depth_fraction of the blocks")
    depth_fraction: Annotated[float, Field(gt=0, le=1)] = Field(0.5, description="share of the blocks that are run")
    rows: Count = Field(64, description="query rows sampled per layer")
    temperature: Positive = Field(3.0, description="tau of the row softmax")
    normalize: bool = Field(True, description="standardise logits per row before the softmax")


class Bridge(Section):
    checkpoint: str | None = Field("shapes:bridge/sd15-flux", description="trained Bridge; null: train it first")
    trainable: Literal[False] = Field(False, description="the Bridge is frozen during distillation")
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
    lr: Positive = Field(1e-4, description="Adam learning rate")
    lr_decay: Literal["none", "cosine"] = Field("none", description="none: constant; cosine: to 0 over bridge.steps")
    validation_share: Annotated[float, Field(gt=0, lt=1)] = Field(0.05, description="share of pairs held out")
    checkpoint_every: Count = Field(500, description="steps between checkpoints")
    gradient_checkpointing: bool = Field(False, description="recompute activations in training: slower, less memory")


class Synthesis(Section):
    count: Count = Field(2048, description="teacher-sampled pictures to make")
    batch_size: Count = Field(64, description="pictures per request")
    shard_size: Count = Field(256, description="rows per parquet file")


class FakeScore(Section):
    kind: Literal["lora", "full"] = Field("lora", description="LoRA on a frozen teacher copy, or a full trainable copy")
    rank: Count = Field(64, description="LoRA rank")
    lr: Positive = Field(5e-4, description="AdamW learning rate")
    updates: Count = Field(5, description="fake-score updates per student update (k)")
    max_grad_norm: Positive = Field(1.0, description="gradient clipping")


class Discriminator(Section):
    weight: NonNegative = Field(0.5, description="weight of the generator's GAN loss; 0 switches the GAN off")
    lr: Positive = Field(5e-7, description="AdamW learning rate of the head")
    width: Count = Field(64, description="channels of the convolutional head")
    depth_fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="depth of the block whose features are read"
    )
    real_data: str | None = Field(
        "shapes:samples/flux", description="parquet of teacher samples (prompt, z_T); null: synthesise them"
    )


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
    overlap: bool = Field(
        True, description="score the next batch while the fake score updates; same numbers either way"
    )
    checkpoint_every: Count = Field(500, description="student updates between checkpoints")
    evaluate_every: Count = Field(500, description="student updates between evaluations")
    workers: Count = Field(1, description="Ray Train workers")
    cpus_per_worker: Positive = Field(0.5, description="Ray CPUs each worker reserves")
    gpus_per_worker: NonNegative = Field(0, description="Ray GPUs each worker reserves")
    threads: Count = Field(1, description="CPU threads of each worker")
    max_failures: int = Field(3, ge=-1, description="worker failures survived before giving up; -1: any number")
    pretrain_fake: int = Field(0, ge=0, description="fake-score updates before the first student update")


class Prompts(Section):
    path: str | None = Field("shapes:prompts.txt", description="prompt file (txt, csv, tsv, jsonl, parquet)")
    column: str = Field("prompt", description="column of tabular files")
    on_bad_row: Literal["skip", "fail"] = Field("skip", description="blank, oversized and undecodable rows")
    max_characters: Count = Field(2000, description="longer prompts are bad rows")


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
    experiment: str = Field("raydistill", description="MLflow experiment")


class Config(Section):
    """Root of the tree."""

    storage: str = Field("outputs", description="folder that roots everything a run writes")
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

    @model_validator(mode="after")
    def _names(self) -> Config:
        name = self.run.name
        if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise ValueError(
                f"run.name {name!r}: use letters, digits, '.', '_' and '-', starting with a letter or digit"
            )
        if self.vsd.weight == 0 and self.discriminator.weight == 0:
            raise ValueError("vsd.weight and discriminator.weight are both 0: nothing would teach the student")
        return self


# -- reading --------------------------------------------------------------------------------------------


def resolve(path: str) -> Path:
    """A path of the configuration; `shapes:NAME` is a part of the embedded world."""
    if path.startswith(SHAPES_PREFIX):
        from raydistill.shapes import WEIGHTS

        return WEIGHTS / path.removeprefix(SHAPES_PREFIX)
    return Path(path).expanduser()


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
    by_leaf = [k for k in keys if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    close = by_leaf or difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _merge(base: dict, extra: dict, source: str, prefix: str = "") -> dict:
    result = dict(base)
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = _merge(result[key], value, source, f"{prefix}{key}.")
        else:
            result[key] = value
    return result


def read_yaml(file: Path) -> dict:
    """One YAML file with its `extends:` chain (a file name, relative to the file) merged in."""
    if not file.is_file():
        known = ", ".join(sorted(p.name for p in CONFIGS.glob("*.yaml")))
        raise ConfigError(f"--config {file}: no such file" + (f" (configs/ has: {known})" if known else ""))
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: must be a mapping of sections, not a {type(tree).__name__}")
    parent = tree.pop("extends", None)
    return _merge(read_yaml(file.parent / parent), tree, str(file)) if parent else tree


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


def _override(tree: dict, text: str) -> dict:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ConfigError(f"{text!r}: overrides look like section.key=value (see --help)")
    try:
        parsed: Any = yaml.load(value, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError:
        raise ConfigError(f"{text!r}: the value is not valid YAML") from None
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return _merge(tree, parsed, "command line")


def validate(tree: dict) -> Config:
    """Check a plain tree. Raises ConfigError with one line per mistake."""
    try:
        return Config.model_validate(_coerce_floats(tree))
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            key = ".".join(
                str(part) for part in problem["loc"] if not str(part).startswith(("constrained", "function"))
            )
            if problem["type"] == "extra_forbidden":
                lines.append(f"unknown key {key}{nearest(key)}")
            else:
                got = "" if isinstance(problem["input"], dict) else f" (got {problem['input']!r})"
                lines.append(f"{key + ': ' if key else ''}{problem['msg'].removeprefix('Value error, ')}{got}")
        raise ConfigError("\n".join(lines)) from None


def load(file: Path | str | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (default configs/shapes.yaml), apply overrides, validate, and check that named files exist."""
    tree = read_yaml(Path(file) if file else CONFIGS / "shapes.yaml")
    for text in overrides:
        tree = _override(tree, text)
    return validate(tree)


def check_paths(config: Config, keys: Sequence[str]) -> None:
    """Every named path must exist. Raises ConfigError naming key and path."""
    for key in keys:
        value = get(config, key)
        if value is not None and not resolve(value).exists():
            raise ConfigError(f"{key}: {value} does not exist (looked at {resolve(value)})")


def get(config: Config, key: str) -> Any:
    """Value of a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def flatten(config: Config) -> dict[str, Any]:
    """Dotted key -> plain value."""
    return {key: get(config, key) for key, *_ in fields()}


# Changing one of these changes the numbers of a run; a resume with a changed one is refused.
_FREE_KEYS = re.compile(
    r"storage|run\.name|controls|tracking\..*|teachers\.(?!slice|shards|dtype).*|distill\.(overlap|checkpoint_every|"
    r"evaluate_every|cpus_per_worker|gpus_per_worker|max_failures|steps)|evaluation\..*|bridge\.checkpoint_every"
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


def check_storage(config: Config) -> Path:
    """Absolute storage root. A relative one inside `ray job submit`'s throw-away working copy is refused."""
    if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") and not Path(config.storage).expanduser().is_absolute():
        raise ConfigError(
            f"storage: {config.storage!r} is relative, and under `ray job submit` the working directory is a copy that is "
            "thrown away; name an absolute folder, for example storage=$HOME/raydistill"
        )
    return Path(config.storage).expanduser().resolve()
