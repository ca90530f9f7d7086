"""Metrics by name, and what they need: weights, a program, a reference."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydistill.config.schema import Config
from raydistill.config.stages import EvaluationConfig
from raydistill.errors import InputError
from raydistill.evaluation.command import PREFIX, parse_command
from raydistill.evaluation.folder import DRAW, PICTURES, SETTINGS_FILE
from raydistill.evaluation.rewards import ENVIRONMENTS, WEIGHTS
from raydistill.evaluation.weights import OPTION, find_weights
from raydistill.export.sampling import SHEETS
from raydistill.pictures.picture import Picture
from raydistill.shapes.captions import parse
from raydistill.shapes.judge import COLUMNS as OF_JUDGE
from raydistill.storage.fingerprint import content_hash
from raydistill.storage.resolve import resolve

PICTURE_METRICS = ("judge", "clipscore", "pickscore", "hpsv3", "hpsv2", "imagereward")  # scores of single pictures
SET_METRICS = ("frechet", "fid")  # of all pictures, against --reference
# The parts of CLIP models -> groups of files, of which each must be there.
_NETWORK = (("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"),)
_TOKENIZER = (("tokenizer.json", "vocab.json"),)
CLIPS = {
    "clipscore": {"clipscore": (*_NETWORK, *_TOKENIZER)},
    "pickscore": {"pickscore": _NETWORK, "pickscore.processor": _TOKENIZER},
}
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Metric:
    """A metric that was asked for, with everything it needs found."""

    name: str
    weights: dict[str, str]  # option -> place
    command: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """What decides its numbers."""
        return {"weights": self.weights} | ({"command": list(self.command)} if self.command else {})


@dataclass(frozen=True)
class Naming:
    """How people name metrics and weights, for messages."""

    metrics: str = "--metrics"
    weights: str = OPTION


IN_A_RUN = Naming("evaluation.metrics", "evaluation.weights.")
OF_REWARD = Naming("reward.metric", "reward.weights.")


def find_metrics(
    texts: Sequence[str],
    named: Mapping[str, str],
    pictures: Sequence[Picture],
    judge: str,
    naming: Naming = Naming(),  # noqa: B008 (it is frozen)
) -> list[Metric]:
    """The metrics of --metrics, with weights found.

    Raises:
        InputError: an unknown metric, weights that are not to be had, or prompts the judge cannot read.
    """
    metrics: dict[str, Metric] = {}
    for text in texts:
        if text.startswith(PREFIX):
            name, words = parse_command(text)
            if name in (*PICTURE_METRICS, *SET_METRICS, *OF_JUDGE, DRAW):
                raise InputError(f"{naming.metrics} {text}: {name} is a metric already; give the program another name")
            metric = Metric(name, {}, tuple(words))
        elif text in ("judge", "frechet"):
            folder = resolve(judge)
            if not (folder / "judge.safetensors").is_file():
                raise InputError(f"--judge {judge}: no judge (judge.safetensors)")
            metric = Metric(text, {"judge": str(folder.resolve())})
        elif text in (*PICTURE_METRICS, *SET_METRICS):
            metric = Metric(text, find_weights(text, named, naming.weights))
            for option in CLIPS.get(text, {}):
                _check_clip(f"{naming.weights}{option}", Path(metric.weights[option]), CLIPS[text][option])
        else:
            known = ", ".join((*PICTURE_METRICS, *SET_METRICS, "command:NAME=PROGRAM"))
            raise InputError(f"{naming.metrics} {text}: unknown; metrics: {known}")
        if metric.name in metrics:
            raise InputError(f"{naming.metrics}: {metric.name} is named twice")
        metrics[metric.name] = metric
    if "judge" in metrics:
        _check_judged(pictures)
    return list(metrics.values())


def _check_clip(named: str, folder: Path, needed: Sequence[Sequence[str]]) -> None:
    """Raises InputError where a folder is no CLIP model of transformers, or lacks a file."""
    try:
        kind = json.loads((folder / "config.json").read_bytes()).get("model_type")
    except (OSError, ValueError, AttributeError):
        kind = None
    if kind != "clip":
        found = "no config.json that names a model" if kind is None else f"model_type {kind!r}"
        raise InputError(f"{named}={folder}: not a CLIP model of transformers ({found})")
    for names in needed:
        if not any((folder / name).is_file() for name in names):
            raise InputError(f"{named}={folder}: has no {' or '.join(names)}")


# -- metrics of a run -------------------------------------------------------------------------------------


def metrics_of_run(evaluation: EvaluationConfig, only: str | None = None) -> list[Metric]:
    """What a run measures beside the judge, with weights found.

    Args:
        only: this one of `evaluation.metrics`; None: all.

    Raises:
        InputError: an unknown metric, weights that are not to be had, or what a run cannot measure.
    """
    options = [weights.option for needed in WEIGHTS.values() for weights in needed]
    if unknown := [name for name in evaluation.weights if name not in options]:
        raise InputError(f"evaluation.weights.{unknown[0]}: no metric has such weights; names: {', '.join(options)}")
    texts = [text for text in evaluation.metrics if text != "judge" and only in (None, text)]
    for text in texts:
        if text in SET_METRICS:
            raise InputError(
                f"evaluation.metrics {text}: it compares whole sets of pictures, many more than a run draws; "
                "jobs/evaluate.py measures it of a finished run"
            )
        if text in ENVIRONMENTS and evaluation.gpus_per_scorer is None:
            raise InputError(
                f"evaluation.metrics {text}: it needs an environment of its own, which is no trainer's: set "
                "evaluation.gpus_per_scorer to the GPUs of its actor (0: it runs on a CPU)"
            )
    return find_metrics(texts, evaluation.weights, (), "", IN_A_RUN)


def reward_places(config: Config) -> dict[str, str] | None:
    """Folder of each of the weights that the student's reward needs, by name; None: there is no reward.

    Raises:
        InputError: weights that are not to be had.
    """
    reward, evaluation = config.reward, config.evaluation
    if not reward.is_on:
        return None
    known = ["judge", *(weights.option for metric in CLIPS for weights in WEIGHTS[metric])]
    if unknown := [name for name in reward.weights if name not in known]:
        raise InputError(f"reward.weights.{unknown[0]}: no reward has such weights; names: {', '.join(known)}")
    if reward.metric == "judge":
        place = reward.weights.get("judge", evaluation.judge)
        if place is None:
            raise InputError("reward.metric=judge: reward.weights.judge must name a judge's folder")
        folder = resolve(place)
        if not (folder / "judge.safetensors").is_file():
            raise InputError(f"reward.weights.judge={place}: no judge (judge.safetensors)")
        return {"judge": str(folder.resolve())}
    return find_metrics([reward.metric], evaluation.weights | reward.weights, (), "", OF_REWARD)[0].weights


def check_reward(config: Config) -> dict[str, str] | None:
    """`reward_places`, where the student's reward is not what picks the best student: a report on it would say nothing.

    Raises:
        InputError: it is; or weights that are not to be had.
    """
    places, evaluation = reward_places(config), config.evaluation
    if places is None or not evaluation.measured:
        return places
    same = config.reward.metric == evaluation.metric
    if config.reward.metric == "judge" and evaluation.judged and evaluation.metric in OF_JUDGE:
        same = content_hash(Path(places["judge"])) == content_hash(resolve(evaluation.judge))
    if same:
        raise InputError(
            f"evaluation.metric={evaluation.metric}: the student is trained on it (reward.metric={config.reward.metric}), so it "
            "may not pick the best one too; name another of evaluation.metrics"
            + (", or another judge in reward.weights.judge" if config.reward.metric == "judge" else "")
        )
    return places


def check_chosen(evaluation: EvaluationConfig) -> None:
    """Raises InputError where `evaluation.metric` names nothing that the run measures."""
    named = {text: parse_command(text)[0] if text.startswith(PREFIX) else text for text in evaluation.measured}
    columns = [name for text, name in named.items() if text != "judge"]
    several = tuple(f"{name}." for text, name in named.items() if text.startswith(PREFIX))  # of one program
    metric, of_judge = evaluation.metric, OF_JUDGE if evaluation.judged else ()
    if not named or metric in (*of_judge, *columns) or metric.startswith(several):
        return
    given = [f"the judge gives {', '.join(of_judge)}"] if of_judge else []
    given += [f"evaluation.metrics gives {', '.join(columns)}"] if columns else []
    raise InputError(f"evaluation.metric: {'; '.join(given)}; not {metric!r}")


def _check_judged(pictures: Sequence[Picture]) -> None:
    for picture in pictures:
        try:
            parse(picture.prompt)
        except ValueError as error:
            raise InputError(
                f"prompt {picture.prompt_id}: {error}; the judge, which scores where no --metrics are named, reads no other: name "
                "others, for example --metrics clipscore"
            ) from None


def open_reference(place: Path | None, metrics: list[Metric]) -> Path | None:
    """The folder of pictures that set metrics compare with; of an earlier evaluation, its pictures.

    Raises:
        InputError: it is missing, not asked for, has fewer than two pictures, or pictures of pictures.
    """
    wanted = [metric.name for metric in metrics if metric.name in SET_METRICS]
    if place is None:
        if wanted:
            raise InputError(
                f"--metrics {wanted[0]}: needs --reference FOLDER, pictures to compare with (for example the folder of a "
                "teacher's evaluation)"
            )
        return None
    if not wanted:
        raise InputError(f"--reference belongs to --metrics {' and '.join(SET_METRICS)}")
    folder = place / PICTURES if (place / SETTINGS_FILE).is_file() else place
    if all((folder / name).is_file() for name in SHEETS):
        raise InputError(
            f"--reference {folder}: {' and '.join(SHEETS)}, which jobs/sample.py wrote beside its pictures, would count as two "
            "of them; move them away"
        )
    if len(pictures_in(folder)) < 2:
        raise InputError(
            f"--reference {folder}: a folder of at least two pictures is needed ({', '.join(PICTURE_SUFFIXES)})"
        )
    return folder.resolve()


def pictures_in(folder: Path) -> list[Path]:
    """Picture files of a folder, by name."""
    if not folder.is_dir():
        return []
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in PICTURE_SUFFIXES and not f.name.startswith("."))
