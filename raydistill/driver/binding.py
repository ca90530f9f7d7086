"""What a run is bound to: an id, which its checkpoints bear, and the contents of everything that decides its numbers.

`inputs.json` of the run's folder keeps both from the first life on, and how data sets of the hub were named. A run that was begun without the file is bound when it
goes on: to the inputs of now, and to the checkpoints that it has.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from raydistill.config.reading import draws, get
from raydistill.config.schema import Config
from raydistill.data import pairs
from raydistill.data.synthesis import fingerprint_of
from raydistill.driver.preflight import PAIRS, Inputs
from raydistill.driver.run_folder import CURE, RunFolder
from raydistill.errors import InputError
from raydistill.evaluation.metrics import metrics_of_run, reward_places
from raydistill.spaces import load_space
from raydistill.storage.atomic import read_json, replace_text
from raydistill.storage.fingerprint import fingerprint
from raydistill.storage.place import Place
from raydistill.storage.resolve import FILE_KEYS, input_place, resolve, resolve_file
from raydistill.storage.run_files import INPUTS, asked_of
from raydistill.workers.adoption import ForeignCheckpoint, Runs, checkpoint_folders, require_ours
from raydistill.workers.best import BEST
from raydistill.workers.bridge import CHECKPOINTS as OF_BRIDGE
from raydistill.workers.checkpoint import CheckpointError, about_of
from raydistill.workers.distill import CHECKPOINTS as OF_STAGE

PIPELINES = ("student.model", "teacher.model", "synthesis.teacher")
MODELS = (*PIPELINES, "student.unet", *FILE_KEYS, "bridge.checkpoint", "evaluation.judge")
FINGERPRINTS = 2  # which kind: of models and pairs another kind says nothing
WEIGHTS = "evaluation.weights."  # begins the keys of weights of metrics
REWARD_WEIGHTS = "reward.weights."  # and of the student's reward


@dataclass(frozen=True)
class Binding:
    """What a run is bound to.

    Attributes:
        runs: ids of the run, its own first (None: of checkpoints without any).
        inputs: fingerprints by configuration key.
        asked: by key, data sets of the hub as they were named; config.yaml has them at their commit.
    """

    runs: Runs
    inputs: dict[str, str]
    asked: dict[str, str] = field(default_factory=dict)


def bind(config: Config, run: RunFolder, inputs: Inputs, asked: Mapping[str, str] | None = None) -> Binding:
    """Compare a run's inputs and checkpoints with what it was bound to. Nothing is written.

    Args:
        asked: as of `Binding`.

    Raises:
        InputError: the content of an input has changed since the run began, or a checkpoint is of another run.
    """
    now, kept = _fingerprints(config, inputs), kept_binding(run)
    if kept is None:
        found = {about.get("run") for _, about in _checkpoints(run)}
        return Binding((uuid.uuid4().hex, *sorted(found, key=str)), now, dict(asked or {}))
    changed = [f"{key} ({_named(config, key)})" for key, value in now.items() if kept.inputs.get(key, value) != value]
    if changed:
        raise InputError(
            f"run.name={run.name}: {', '.join(changed)}: not the same content as when the run began, which would change its "
            "numbers. Restore it, or use another run.name"
        )
    for place, about in _checkpoints(run):
        try:
            require_ours(place, about, kept.runs)
        except ForeignCheckpoint as error:
            raise InputError(f"run.name={run.name}: {error}") from None
    return Binding(kept.runs, kept.inputs | now, dict(asked or {}) | kept.asked)


def keep(binding: Binding, run: RunFolder) -> None:
    """From now on the run is bound so, or as another job has bound it while this one waited for the run."""
    if (kept := kept_binding(run)) is not None:
        binding = Binding(kept.runs, binding.inputs | kept.inputs, binding.asked | kept.asked)
    replace_text(run.path / INPUTS, json.dumps(asdict(binding) | {"fingerprints": FINGERPRINTS}, indent=1))


def kept_binding(run: RunFolder) -> Binding | None:
    """None: the run is new, or of a version that kept none. Raises InputError: the file is damaged."""
    file = run.path / INPUTS
    if not file.is_file():
        return None
    found = read_json(file, CURE)
    runs, inputs = found.get("runs"), found.get("inputs")
    sound = isinstance(runs, list) and runs and isinstance(runs[0], str) and isinstance(inputs, dict)
    if not sound or any(type(one) not in (str, type(None)) for one in (*runs, *inputs.values())):
        raise InputError(f"{file} is damaged (it names no run and no inputs): {CURE}")
    if found.get("fingerprints") != FINGERPRINTS:
        inputs = {key: value for key, value in inputs.items() if key not in (*MODELS, *PAIRS)}
    return Binding(tuple(runs), inputs, asked_of(run.path, CURE))


def _fingerprints(config: Config, inputs: Inputs) -> dict[str, str]:
    found = {"prompts.path": fingerprint_of(inputs.prompts), "evaluation.prompts": fingerprint_of(inputs.held_out)}
    if inputs.images is not None:
        found["synthesis.images"] = inputs.images.fingerprint
    named = {key: get(config, key) for key in (*MODELS, *PAIRS) if key != "synthesis.teacher" or draws(config)}
    read = dict.fromkeys(PAIRS, input_place) | dict.fromkeys(FILE_KEYS, resolve_file)
    places = {key: read.get(key, resolve)(value) for key, value in named.items() if value}
    for metric in metrics_of_run(config.evaluation) if inputs.distils else ():
        places |= {f"{WEIGHTS}{option}": Path(place) for option, place in metric.weights.items()}
    for option, place in ((reward_places(config) if inputs.distils else None) or {}).items():
        places[f"{REWARD_WEIGHTS}{option}"] = Path(place)
    return found | {key: _fingerprint(key, place) for key, place in places.items()}


def _named(config: Config, key: str) -> str:
    """What the configuration names there."""
    if key.startswith(WEIGHTS):
        return config.evaluation.weights.get(key.removeprefix(WEIGHTS), "its authors'")
    if key.startswith(REWARD_WEIGHTS):
        name = key.removeprefix(REWARD_WEIGHTS)
        of_evaluation = {"judge": config.evaluation.judge} | config.evaluation.weights
        return (of_evaluation | config.reward.weights).get(name, "its authors'")
    if key == "evaluation.prompts" and config.evaluation.holdout is not None:
        return f"{config.evaluation.holdout:g} of {config.prompts.path}"
    return str(get(config, key))


def _fingerprint(key: str, path: Place) -> str:
    """Of a model or a set of pairs. Raises InputError with the key."""
    try:
        if key in PAIRS:
            return pairs.fingerprint(path)
        return fingerprint(path, load_space(path).unused_parts if key in PIPELINES else ())
    except InputError as error:
        raise InputError(f"{key}: {error}") from error


def _checkpoints(run: RunFolder) -> Iterator[tuple[Place, dict]]:
    """(folder, `about`) of every stage's checkpoints and best student; damaged ones are found when it begins."""
    places = checkpoint_folders(run.path / OF_BRIDGE)
    for stage in run.path.iterdir() if run.path.exists() else ():
        if stage.is_dir():
            places += [*checkpoint_folders(stage / OF_STAGE), stage / BEST]
    for place in places:
        try:
            yield place, about_of(place)
        except CheckpointError:
            continue
