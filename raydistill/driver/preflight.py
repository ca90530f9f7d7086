"""What is checked before a job starts anything: files, families, spaces, prompt sets, the run's folder."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass

from raydistill.bridge.attention import reader_of
from raydistill.bridge.model import Bridge, check_pair, projector_parameters
from raydistill.config.networks import StudentConfig
from raydistill.config.reading import (
    draws,
    draws_samples,
    get,
    needs_pairs,
    other_drawer,
    streams_bridge,
    trains_bridge,
)
from raydistill.config.schema import Config
from raydistill.data.holdout import also_held_out
from raydistill.data.images import ImageSet
from raydistill.data.pairs import PairSet, open_pairs
from raydistill.data.pictures import Pictures, is_stream, open_pictures, open_source
from raydistill.data.prompts import PromptSet, held_out_prompts, training_prompts
from raydistill.data.shards import changed_share
from raydistill.distillation import optimizers
from raydistill.distillation.fake_score import feature_blocks, truncate
from raydistill.distillation.networks import adapted
from raydistill.driver.run_folder import RunFolder, as_storage_error
from raydistill.errors import InputError, reason
from raydistill.evaluation.metrics import check_chosen, check_reward, metrics_of_run
from raydistill.export.few_steps import few_step_scheduler
from raydistill.shapes.captions import parse
from raydistill.spaces import check_everywhere, load_space, load_student_space
from raydistill.spaces.base import Space
from raydistill.spaces.check import check_folder
from raydistill.spaces.distilled import check_scores, check_shared_space, drawing, without_scores
from raydistill.spaces.loaded import has_vae, vae_fingerprint
from raydistill.spaces.meta import empty_part
from raydistill.spaces.published_students import open_student
from raydistill.spaces.starts import check_lora
from raydistill.storage.place import Place, Remote, is_uri
from raydistill.storage.resolve import check_paths, check_storage, input_place, resolve
from raydistill.tracking.store import TrackingAway, TrackingError, artifact_root, prepare, tracking_uri

PAIRS = ("bridge.pairs", "discriminator.real_data")  # read part by part; nothing of a bucket's is staged


@dataclass(frozen=True)
class Inputs:
    """What the checks have opened."""

    student: Space
    teacher: Space
    prompts: PromptSet
    held_out: PromptSet
    _: KW_ONLY
    notes: tuple[str, ...] = ()  # lines that the job prints first
    images: ImageSet | Pictures | None = None  # real ones, when synthesis.images names them
    drawer: Space | None = None  # what draws pictures, when it is not the teacher
    distils: bool = True  # as `check_inputs` was told


def check_inputs(config: Config, distils: bool = True) -> Inputs:
    """Open everything the configuration names. Raises an error naming key, file or row; starts nothing.

    Args:
        distils: a student is trained and measured; False: the job makes pairs or a Bridge, and ends there.
    """
    check_paths(
        config,
        [
            "student.model",
            "student.unet",
            "student.lora_start",
            "teacher.model",
            *(["synthesis.teacher"] if draws(config) else []),
            "bridge.checkpoint",
            *(key for key in PAIRS if not is_uri(get(config, key) or "")),
            "prompts.path",
            "evaluation.prompts",
            "evaluation.judge",
        ],
    )
    student = load_student_space(resolve(config.student.model))
    check_folder(student, network=config.student.unet is None)
    notes = _check_student(config, student)
    teacher = load_space(resolve(config.teacher.model))
    check_everywhere(teacher)
    check_folder(teacher)
    drawer = open_drawer(config, teacher) if draws(config) else None
    _check_bridge(config, student, teacher)
    _check_micro_batches(config)
    _check_fake_score(config, student, teacher)
    notes += _waits(config) if distils else ()
    prompts, held_out = training_prompts(config), held_out_prompts(config)
    if config.evaluation.holdout is None:
        _check_disjoint("prompts.path", prompts.prompts, held_out)
    if distils:
        _check_metrics(config, prompts, held_out)
        notes += without_scores(config, teacher)
    if config.discriminator.weight > 0 and config.discriminator.real_data is not None:
        pairs = _open_pairs(config, "discriminator.real_data", teacher)
        _check_disjoint("discriminator.real_data", pairs.prompts(), held_out)
        notes += _silent(config, "discriminator.real_data", pairs)
    if config.bridge.pairs is not None:
        pairs = _open_pairs(config, "bridge.pairs", teacher, student)
        _check_disjoint("bridge.pairs", pairs.prompts(), held_out)
        notes += _silent(config, "bridge.pairs", pairs)
    if streams_bridge(config):
        images = _open_stream(config, distils)
    else:
        images = None if config.synthesis.images is None else _opened_images(config)
    if images is not None and config.synthesis.licence is None:
        notes += ("synthesis.licence names no terms of the pictures, and the model card will say so",)
    if isinstance(images, ImageSet):  # of a stream, held-out captions are left out
        _check_disjoint("synthesis.images", images.prompts, held_out)
    _check_bucket(check_storage(config))
    _check_tracking(config)  # last: it makes the store, and other mistakes leave nothing behind
    return Inputs(student, teacher, prompts, held_out, notes=notes, images=images, drawer=drawer, distils=distils)


def _open_pairs(config: Config, key: str, teacher: Space, student: Space | None = None) -> PairSet:
    try:
        return open_pairs(input_place(get(config, key)), teacher, student)
    except InputError as error:
        raise InputError(f"{key}: {error}") from None
    except OSError as error:
        raise InputError(f"{key}: {get(config, key)} cannot be read: {reason(error)}") from error


def _silent(config: Config, key: str, pairs: PairSet) -> tuple[str, ...]:
    """A note where pairs may be of other VAEs, for they do not say of which. Those of the package are of its models."""
    if not pairs.silent or get(config, key).startswith("shapes:"):
        return ()
    which = "pairs" if pairs.silent == len(pairs.files) else f"{pairs.silent} of {len(pairs.files)} files of pairs"
    text = f"{which} in {pairs.folder} do not say which VAEs made them; only their shapes were compared"
    return (f"note: {key}: {text}",)


def _open_stream(config: Config, distils: bool) -> Pictures:
    """The pictures that the Bridge is trained on as they come. Lists them, and fetches none."""
    bridge, synthesis = config.bridge, config.synthesis
    unfit = {
        "bridge.pairs": (bridge.pairs is not None, "the Bridge reads synthesis.images, and no pairs; set it to null"),
        "bridge.trainable": (distils and bridge.trainable, "its anchor needs stored pairs; use bridge.source=stored"),
        "discriminator.real_source=pairs": (
            distils and needs_pairs(config),
            "no pairs are stored; set discriminator.real_source=samples, or name discriminator.real_data",
        ),
        "synthesis.images": (synthesis.images is None, "it names no pictures"),
        "synthesis.image_count": (synthesis.image_count is not None, "a stream reads all of them; set it to null"),
    }
    for key, (is_wrong, why) in unfit.items():
        if is_wrong:
            raise InputError(f"{key}: with bridge.source=stream {why}")
    try:
        return open_pictures(synthesis.images, synthesis.image_column, synthesis.caption_column)
    except (InputError, OSError) as error:
        raise InputError(f"synthesis.images: {error}") from None


def open_drawer(config: Config, teacher: Space) -> Space | None:
    """The Space of synthesis.teacher; None: the teacher draws.

    Raises:
        InputError: the model cannot be used, or has other latents than the teacher.
    """
    if not other_drawer(config):
        return None
    model = config.synthesis.teacher
    drawer = load_space(resolve(model))
    check_everywhere(drawer)
    check_folder(drawer)
    sizes = ["x".join(map(str, space.latent_shape)) for space in (drawer, teacher)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"synthesis.teacher: {model} has latents of {sizes[0]}, but teacher.model={config.teacher.model} of {sizes[1]}"
        )
    if not has_vae(drawer, vae_fingerprint(teacher)):
        raise InputError(
            f"synthesis.teacher: {model} has another VAE than teacher.model={config.teacher.model} (their weights or their "
            "scaling differ), so its latents are no latents of the teacher"
        )
    drawing(config, drawer)
    return drawer


def check_distillation(config: Config, run: RunFolder, inputs: Inputs) -> None:
    """Raises InputError where a teacher cannot give scores, or the discriminator's real data are changed pictures."""
    check_scores(config, inputs.teacher)
    check_shared_space(config, inputs.student)
    check_real_data(config)


def _opened_images(config: Config) -> ImageSet | Pictures:
    """What synthesis.images names. Raises InputError."""
    synthesis = config.synthesis
    try:
        return open_source(
            str(synthesis.images),
            synthesis.image_column,
            synthesis.caption_column,
            streamed=is_stream(synthesis),
        )
    except InputError as error:
        raise InputError(f"synthesis.images: {error}") from None
    except OSError as error:
        raise InputError(f"synthesis.images: {synthesis.images}: {reason(error)}") from error


def check_real_data(config: Config) -> None:
    """The discriminator's real data are pictures as they are: changed ones would teach the student their colours.

    Raises:
        InputError: they would be pairs of which some are changed.
    """
    if config.discriminator.weight == 0 or draws_samples(config):
        return
    key, folder = "discriminator.real_data", config.discriminator.real_data
    if folder is None:
        key, folder = "bridge.pairs", config.bridge.pairs
    if folder is None:
        key, share = "synthesis.augment_share", config.synthesis.augment_share
    else:
        share = changed_share(input_place(folder))
    if share > 0:
        raise InputError(
            f"{key}: {share:.0%} of these pictures are blended and recoloured, and the discriminator would take them as "
            "real; name teacher samples in discriminator.real_data, or set discriminator.weight=0"
        )


def _check_student(config: Config, space: Space) -> tuple[str, ...]:
    """The student's start fits: its timestep, and the checkpoint's tensors by name and shape. Returns notes on them."""
    last = space.path.num_train_timesteps - 1
    if config.student.start_timestep > last:
        raise InputError(f"student.start_timestep: at most {last} for {config.student.model}")
    if config.student.kind == "lora":
        adapted(config, space, empty_part(space, space.network_name))  # without weights: it can be, or it cannot
    steps, notes = config.student.steps, []
    if steps > 1:
        notes += _check_steps(config.student, space)
    if config.student.unet is not None:
        checkpoint = open_student(space, resolve(config.student.unet))
        conflict = checkpoint.start_conflict(config.student.start_timestep)
        notes += [checkpoint.describe(), *([conflict] if conflict else [])]
    if config.student.lora_start is not None:
        notes.append(check_lora(space, config.student.lora_start))
    return tuple(notes)


def _check_steps(student: StudentConfig, space: Space) -> list[str]:
    """Several steps can be exported. Returns a note where the first one is not what a start of one step was trained on."""
    try:
        scheduler = few_step_scheduler(space, student.start_timestep, student.steps)
    except InputError as error:
        raise InputError(f"student.steps={student.steps}: {error}; use 1") from None
    if space.plain_start or student.start_timestep == space.path.num_train_timesteps - 1:
        return []
    return [
        f"note: student.steps={student.steps}: its first evaluation sees plain noise at t = {len(scheduler.betas) - 1}, which no "
        "scheduler of diffusers scales there; a start that was trained on scaled noise first learns the difference"
    ]


def _waits(config: Config) -> tuple[str, ...]:
    """A note where a teacher that is away for as long as it may be would end the workers that wait for one another.

    No refusal: the run has its checkpoints, and older ones have been begun so.
    """
    patience, limit = config.teachers.retry_for_s, config.distill.collective_timeout_s
    if config.vsd.weight == 0 or config.distill.workers == 1 or patience < limit:
        return ()
    return (
        f"note: teachers.retry_for_s={patience:g} cannot be waited for: workers give each other up after "
        f"distill.collective_timeout_s={limit:g}; set this above it",
    )


def _check_bucket(storage: Place) -> None:
    """A bucket takes an object and gives it away again."""
    if isinstance(storage, Remote):
        probe = storage / f".probe-{secrets.token_hex(4)}"
        with as_storage_error(storage):
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
            raise InputError(f"tracking.uri: {error}") from error


def _check_bridge(config: Config, student: Space, teacher: Space) -> None:
    if config.bridge.projector == "identity" and config.bridge.checkpoint is not None:
        raise InputError("bridge.projector=identity has no weights: set bridge.checkpoint=null")
    if config.bridge.projector == "identity" and config.bridge.trainable:
        raise InputError("bridge.trainable=true: the identity has nothing to train")
    trains = config.bridge.trainable or trains_bridge(config)
    if trains and config.bridge.batch_size % config.distill.fewest:
        raise InputError(
            f"bridge.batch_size: {config.bridge.batch_size} pairs cannot be divided by {config.distill.fewest} "
            "workers (distill.min_workers, else distill.workers)"
        )
    if trains and config.bridge.attention.weight > 0:
        reader_of(teacher)
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
    _check_divides("distill.micro_batches", config.distill.micro_batches, shares)
    if trains_bridge(config):
        workers = "distill.min_workers" if config.distill.min_workers else "distill.workers"
        share = {f"bridge.batch_size / {workers}": config.bridge.batch_size // config.distill.fewest}
        _check_divides("bridge.micro_batches", config.bridge.micro_batches, share)


def _check_divides(key: str, micro_batches: int, shares: Mapping[str, int]) -> None:
    """Raises InputError with the nearest numbers of micro-batches that divide every share, by name."""
    for name, share in shares.items():
        if share % micro_batches:
            common = math.gcd(*shares.values())
            fitting = [count for count in range(1, common + 1) if common % count == 0]
            near = sorted(fitting, key=lambda count: abs(count - micro_batches))[:2]
            raise InputError(
                f"{key}: {name} = {share} cannot be divided by {micro_batches}; set {key} to "
                f"{' or '.join(map(str, sorted(near)))}, or change {name.split(' ')[0]}"
            )


def _check_fake_score(config: Config, student: Space, teacher: Space) -> None:
    """A network can be truncated and has the depths that are read, tried on one without weights; optimizers are there."""
    optimizers.check(student__optimizer=config.student.optimizer, fake_score__optimizer=config.fake_score.optimizer)
    truncated, shared = config.fake_score.kind == "truncated", "shared_space" in config.controls
    if truncated and shared and not student.block_lists:
        raise InputError(
            "fake_score.kind=truncated: controls names shared_space, whose teacher is the student's UNet, and that cannot "
            "be cut; leave it out (controls=[no_vsd], or []), or use lora or full"
        )
    depths = config.discriminator.depths if config.discriminator.weight > 0 else []
    for space in (teacher, student) if shared else (teacher,):
        if truncated or depths:
            network = empty_part(space, space.network_name)
            network = truncate(space, network, config.fake_score) if truncated else network
            feature_blocks(space, network, depths)


def _check_metrics(config: Config, prompts: PromptSet, held_out: PromptSet) -> None:
    """What is measured can be, and is what students are compared by; the judge can read every prompt."""
    check_chosen(config.evaluation)
    metrics_of_run(config.evaluation)
    check_reward(config)
    if not config.evaluation.measured and config.distill.stop_on_plateau is not None:
        raise InputError("distill.stop_on_plateau: nothing is measured: evaluation.metrics names no metric")
    judged, rewarded = config.evaluation.judged, config.reward.is_on and config.reward.metric == "judge"
    read = {"prompts.path": prompts} if judged or rewarded else {}
    read |= {"evaluation.prompts": held_out} if judged else {}
    cure = (
        "evaluation.judge reads no other prompts: evaluation.judge=null"
        if judged
        else "reward.metric=judge reads no other"
    )
    for key, some in read.items():
        for row, prompt in zip(some.ids, some.prompts, strict=True):
            try:
                parse(prompt)
            except ValueError as error:
                raise InputError(
                    f"{key}: row {row}: {error}; {cure}{' goes without it' if judged else ' prompts'}"
                ) from None


def _check_disjoint(key: str, training: Iterable[str], held_out: PromptSet) -> None:
    common = also_held_out(training, held_out.prompts)
    if common:
        where = f"the held-out part of {held_out.report.source}" if held_out.report.held_out else "evaluation.prompts"
        raise InputError(
            f"{key}: {len(common)} prompts are also in {where} (for example {common[0]!r}); "
            "held-out prompts must occur in no training set"
        )
