"""What is checked before a job starts anything: files, families, spaces, prompt sets, the run's folder."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from raydistill.config import (
    HUB_KEYS,
    Config,
    ConfigError,
    changed,
    check_paths,
    check_storage,
    get,
    local_path,
    mathematical,
    resolve,
    to_yaml,
    trains_bridge,
    validate,
)
from raydistill.data.images import ImageSet, open_images
from raydistill.data.prompts import PromptSet, held_out_prompts, training_prompts
from raydistill.files import read_json
from raydistill.runs import TrackingAway, TrackingError, artifact_root, mask, prepare, tracking_uri
from raydistill.spaces import Space, load_space
from raydistill.storage import Place, Remote, cause, replace_text


@dataclass(frozen=True)
class RunFolder:
    """`<storage>/<run.name>/`: everything a run keeps."""

    storage: Place
    name: str

    @property
    def path(self) -> Place:
        return self.storage / self.name

    def recall(self) -> dict[str, Any]:
        """MLflow run ids and stage times of this run so far."""
        file = self.path / "run.json"
        cure = "restore it, or remove it: the run then goes on under new MLflow runs"
        return read_json(file, cure) if file.is_file() else {}

    def remember(self, **values: Any) -> None:
        replace_text(self.path / "run.json", json.dumps(self.recall() | values, indent=1))


@dataclass(frozen=True)
class Inputs:
    """What the checks have opened."""

    student: Space
    teacher: Space
    prompts: PromptSet
    held_out: PromptSet
    notes: tuple[str, ...] = ()  # lines that the job prints first
    images: ImageSet | None = None  # real ones, when synthesis.images names them


def open_run_folder(config: Config) -> RunFolder:
    """Folder of this run; an existing name is resumed unless a key that decides its numbers has changed."""
    storage = check_storage(config)
    name = config.run.name
    if name is None:
        now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        name = f"{now}-{secrets.token_hex(2)}"
    run = RunFolder(storage, name)
    if (saved := _saved(run)) is not None:
        before, now_ = mathematical(saved), mathematical(_of_revisions(config, saved))
        others = [f"{key}: {before[key]!r} -> {now_[key]!r}" for key in now_ if before[key] != now_[key]]
        if others:
            raise ConfigError(
                f"run.name={name} exists with other settings, and a resume must not change them: {'; '.join(others)}. "
                "Use another run.name, or the old settings"
            )
    return run


def pinned(config: Config, run: RunFolder) -> Config:
    """The configuration with the commit of each hub model whose revision it leaves open: the run's own, or what is
    fetched now.

    Otherwise a model that is published anew would change a run when it is resumed, or on a node that joins later.

    Raises:
        ConfigError: a model cannot be fetched; names the key.
    """
    from raydistill import hub

    if (saved := _saved(run)) is not None:
        config = _of_revisions(config, saved)
    models = {}
    for key in HUB_KEYS:
        value = get(config, key)
        if hub.is_hub_id(value) and not local_path(value).exists():
            try:
                models[key] = hub.pinned(value)
            except ConfigError as error:
                raise ConfigError(f"{key}: {error}") from None
    return _with_models(config, models)


def _of_revisions(config: Config, saved: Config) -> Config:
    """Hub models whose revision is left open, at the revision that the saved configuration names."""
    from raydistill.hub import same_but_for_revision

    models = {key: (get(config, key), get(saved, key)) for key in HUB_KEYS}
    same = {key: before for key, (now, before) in models.items() if same_but_for_revision(now, before)}
    return _with_models(config, same)


def _with_models(config: Config, models: Mapping[str, str]) -> Config:
    """The configuration with other values of these dotted keys."""
    sections: dict[str, dict[str, str]] = {}
    for key, model in models.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = model
    return changed(config, sections)


def _saved(run: RunFolder) -> Config | None:
    """The configuration that the run has had; None: the run is new."""
    file = run.path / "config.yaml"
    with _of_storage(run.storage):
        text = file.read_text(encoding="utf-8") if file.is_file() else None
    return None if text is None else _read_config(file, text)


@contextlib.contextmanager
def _of_storage(storage: Place) -> Iterator[None]:
    """What a bucket refuses is an error of the key `storage`."""
    try:
        yield
    except OSError as error:
        if isinstance(storage, Remote):
            raise ConfigError(f"storage: {storage}: {cause(error, storage.scheme)}") from error
        raise


def _read_config(file: Place, text: str) -> Config:
    """Raises ConfigError naming the file."""
    try:
        return validate(yaml.safe_load(text))
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(
            f"{file} is damaged, or of another version ({' '.join(str(error).split())}): restore it, or use another "
            "run.name"
        ) from error


def create_run_folder(run: RunFolder, config: Config) -> None:
    run.path.mkdir(parents=True, exist_ok=True)
    uri = config.tracking.uri and mask("uri", config.tracking.uri)
    tracking = config.tracking.model_copy(update={"uri": uri})
    shown = config.model_copy(update={"storage": str(run.storage), "tracking": tracking})
    file, text = run.path / "config.yaml", to_yaml(shown)
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        replace_text(file, text)


def check_inputs(config: Config) -> Inputs:
    """Open everything the configuration names. Raises an error naming key, file or row; starts nothing."""
    check_paths(
        config,
        [
            "student.model",
            "student.unet",
            "teacher.model",
            "bridge.checkpoint",
            "bridge.pairs",
            "discriminator.real_data",
            "synthesis.images",
            "prompts.path",
            "evaluation.prompts",
            "evaluation.judge",
        ],
    )
    student = load_space(resolve(config.student.model), "StableDiffusionPipeline")
    student.check_files(network=config.student.unet is None)
    notes = _check_student(config, student)
    teacher = load_space(resolve(config.teacher.model))
    teacher.check_files()
    _check_bridge(config, student, teacher)
    _check_micro_batches(config)
    _check_fake_score(config, teacher)
    prompts, held_out = training_prompts(config), held_out_prompts(config)
    _check_disjoint("prompts.path", prompts.prompts, held_out)
    if config.evaluation.judge is not None:
        _check_judged(config, prompts, held_out)
    if config.discriminator.weight > 0 and config.discriminator.real_data is not None:
        from raydistill.data.pairs import read_pairs

        pairs = read_pairs(resolve(config.discriminator.real_data), z_T_shape=teacher.latent_shape)
        _check_disjoint("discriminator.real_data", pairs.prompts(), held_out)
    if config.bridge.pairs is not None:
        from raydistill.data.pairs import read_pairs

        pairs = read_pairs(resolve(config.bridge.pairs), teacher.latent_shape, student.latent_shape)
        _check_disjoint("bridge.pairs", pairs.prompts(), held_out)
    images = None
    if config.synthesis.images is not None:
        images = open_images(
            resolve(config.synthesis.images), config.synthesis.image_column, config.synthesis.caption_column
        )
        _check_disjoint("synthesis.images", images.prompts, held_out)
    _check_bucket(check_storage(config))
    _check_tracking(config)  # last: it makes the store, and other mistakes leave nothing behind
    return Inputs(student, teacher, prompts, held_out, notes, images)


def _check_student(config: Config, space: Space) -> tuple[str, ...]:
    """The student's start fits: its timestep, and the checkpoint's tensors by name and shape. Returns notes on them."""
    last = space.path.num_train_timesteps - 1
    if config.student.start_timestep > last:
        raise ConfigError(f"student.start_timestep: at most {last} for {config.student.model}")
    if config.student.unet is None:
        return ()
    from raydistill.spaces.onestep import open_student

    checkpoint = open_student(space, resolve(config.student.unet))
    conflict = checkpoint.start_conflict(config.student.start_timestep)
    return (checkpoint.describe(), *([conflict] if conflict else []))


def _check_bucket(storage: Place) -> None:
    """A bucket takes an object and gives it away again."""
    if isinstance(storage, Remote):
        probe = storage / f".probe-{secrets.token_hex(4)}"
        with _of_storage(storage):
            probe.write_text("")
            probe.unlink()


def _check_tracking(config: Config) -> None:
    storage = check_storage(config)
    uri = tracking_uri(config, storage)
    try:
        artifact_root(uri, storage)
        prepare(uri)
    except TrackingError as error:
        away = isinstance(error, TrackingAway)
        begun = config.run.name is not None and "mlflow" in RunFolder(storage, config.run.name).recall()
        if not (away and begun):  # or the store did answer once, and the run waits for it
            raise ConfigError(f"tracking.uri: {error}") from error


def _check_bridge(config: Config, student: Space, teacher: Space) -> None:
    from raydistill.bridge.attention import check_network
    from raydistill.bridge.model import Bridge, check_pair, projector_parameters

    if config.bridge.projector == "identity" and config.bridge.checkpoint is not None:
        raise ConfigError("bridge.projector=identity has no weights: set bridge.checkpoint=null")
    if config.bridge.projector == "identity" and config.bridge.trainable:
        raise ConfigError("bridge.trainable=true: the identity has nothing to train")
    trains = config.bridge.trainable or trains_bridge(config)
    if trains and config.bridge.batch_size % config.distill.fewest:
        raise ConfigError(
            f"bridge.batch_size: {config.bridge.batch_size} pairs cannot be divided by {config.distill.fewest} "
            "workers (distill.min_workers, else distill.workers)"
        )
    if trains and config.bridge.attention.weight > 0:
        check_network(teacher)
    if config.bridge.checkpoint is not None:
        check_pair(resolve(config.bridge.checkpoint), student, teacher)
    elif config.bridge.projector == "identity":
        Bridge.create(student, teacher, config.bridge)
    else:
        projector_parameters(student, teacher, config.bridge)  # made without memory: it cannot be, or it can


def _check_micro_batches(config: Config) -> None:
    """A worker's samples, its pairs while a Bridge is trained, and those that anchor one trained along, can be divided."""
    shares = {"distill.batch_size": config.distill.batch_size}
    if config.bridge.trainable:
        shares["bridge.batch_size / distill.workers"] = config.bridge.batch_size // config.distill.workers
    _check_parts("distill.micro_batches", config.distill.micro_batches, shares)
    if trains_bridge(config):
        workers = "distill.min_workers" if config.distill.min_workers else "distill.workers"
        share = {f"bridge.batch_size / {workers}": config.bridge.batch_size // config.distill.fewest}
        _check_parts("bridge.micro_batches", config.bridge.micro_batches, share)


def _check_parts(key: str, parts: int, shares: Mapping[str, int]) -> None:
    """Raises ConfigError with the nearest numbers of parts that divide every share, by name."""
    for name, share in shares.items():
        if share % parts:
            common = math.gcd(*shares.values())
            fitting = [count for count in range(1, common + 1) if common % count == 0]
            near = sorted(fitting, key=lambda count: abs(count - parts))[:2]
            raise ConfigError(
                f"{key}: {name} = {share} cannot be divided by {parts}; set {key} to "
                f"{' or '.join(map(str, sorted(near)))}, or change {name.split(' ')[0]}"
            )


def _check_fake_score(config: Config, teacher: Space) -> None:
    """A network that is to be truncated can be, tried on one without weights."""
    if config.fake_score.kind != "truncated":
        return
    from raydistill.counting import empty_part
    from raydistill.distill.fake_score import truncate

    if "shared_space" in config.controls:
        raise ConfigError(
            "fake_score.kind=truncated: controls names shared_space, whose teacher is the student's UNet, and that cannot "
            "be cut; leave it out (controls=[no_vsd], or []), or use lora or full"
        )
    truncate(teacher, empty_part(teacher, teacher.network_name), config.fake_score)


def _check_judged(config: Config, prompts: PromptSet, held_out: PromptSet) -> None:
    """The judge can read every prompt that it will be asked about, and answers the metric that is asked for."""
    from raydistill.shapes.captions import ATTRIBUTES, parse

    metrics = ("mean", "all", *ATTRIBUTES)
    if config.evaluation.metric not in metrics:
        raise ConfigError(f"evaluation.metric: the judge gives {', '.join(metrics)}; not {config.evaluation.metric!r}")
    for key, some in (("prompts.path", prompts), ("evaluation.prompts", held_out)):
        for row, prompt in zip(some.ids, some.prompts, strict=True):
            try:
                parse(prompt)
            except ValueError as error:
                raise ConfigError(
                    f"{key}: row {row}: {error}; evaluation.judge reads no other prompts: evaluation.judge=null "
                    "goes without it"
                ) from None


def _check_disjoint(key: str, training: Iterable[str], held_out: PromptSet) -> None:
    common = set(held_out.prompts).intersection(training)
    if common:
        raise ConfigError(
            f"{key}: {len(common)} prompts are also in evaluation.prompts (for example {min(common)!r}); "
            "held-out prompts must occur in no training set"
        )
