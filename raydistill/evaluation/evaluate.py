"""An evaluation from the command line's words to its results: checks, folder, stages, table, MLflow.

<out>/evaluation.json   what decides the results; an evaluation of other settings is never mixed into a folder
      items.jsonl       the pictures, in order
      pictures/         PNG files with their prompt inside
      parts/            scores as they come, a small file a batch and metric
      scores.parquet    one row a picture
      results.json      means, in all and by category
      grid.png          the first pictures
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from raydistill.errors import MASK, InputError, mask
from raydistill.evaluation.command import PREFIX, parse_command, run_command
from raydistill.evaluation.parts import DRAW, ITEMS_FILE, PICTURES, SETTINGS_FILE, Parts
from raydistill.evaluation.promptsets import CategorisedPrompts, Item, write_items
from raydistill.evaluation.results import ALL, mean_table, mlflow_names, write_scores
from raydistill.evaluation.rewards import REWARDS, inception_fid, runtime_env
from raydistill.evaluation.subject import Subject
from raydistill.evaluation.weights import find_weights
from raydistill.export.sampling import SHEETS
from raydistill.storage.atomic import replace_text
from raydistill.storage.place import Place
from raydistill.storage.resolve import resolve
from raydistill.tracking.store import TrackingError, absolute, client_of, sqlite_uri

PICTURE_METRICS = ("judge", "clipscore", "hpsv3", "hpsv2", "imagereward")  # scores of single pictures
SET_METRICS = ("frechet", "fid")  # of all pictures, against --reference
MLFLOW_FILE, SCORES_FILE, RESULTS_FILE, GRID_FILE = "mlflow.json", "scores.parquet", "results.json", "grid.png"
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
class Resources:
    """Of the actors."""

    dtype: str = "float32"
    actors: int = 1
    gpus: float | None = None  # share of each actor; None: `divided` decides
    threads: int | None = None

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"

    def divided(self, metrics: int, gpus: float) -> Resources:
        """One of the cluster's `gpus` for the actors of all stages, which run at once: drawing, and one a metric."""
        return replace(self, gpus=int(100 / (metrics + self.actors)) / 100 if gpus else 0.0)


@dataclass(frozen=True)
class Plan:
    """An evaluation that has passed its checks."""

    subject: Subject
    prompts: CategorisedPrompts
    items: list[Item]
    metrics: list[Metric]
    reference: Path | None  # folder of picture files
    folder: Path
    settings: dict[str, Any]
    resources: Resources


def find_metrics(texts: list[str], named: dict[str, str], items: list[Item], judge: str) -> list[Metric]:
    """The metrics of --metrics, with weights found.

    Raises:
        InputError: an unknown metric, weights that are not to be had, or prompts the judge cannot read.
    """
    metrics: dict[str, Metric] = {}
    for text in texts:
        if text.startswith(PREFIX):
            name, words = parse_command(text)
            if name in (*PICTURE_METRICS, *SET_METRICS, DRAW):
                raise InputError(f"--metrics {text}: {name} is a metric already; give the program another name")
            metric = Metric(name, {}, tuple(words))
        elif text in ("judge", "frechet"):
            folder = resolve(judge)
            if not (folder / "judge.safetensors").is_file():
                raise InputError(f"--judge {judge}: no judge (judge.safetensors)")
            metric = Metric(text, {"judge": str(folder.resolve())})
        elif text in (*PICTURE_METRICS, *SET_METRICS):
            metric = Metric(text, find_weights(text, named))
        else:
            known = ", ".join((*PICTURE_METRICS, *SET_METRICS, "command:NAME=PROGRAM"))
            raise InputError(f"--metrics {text}: unknown; metrics: {known}")
        if metric.name in metrics:
            raise InputError(f"--metrics: {metric.name} is named twice")
        metrics[metric.name] = metric
    if "judge" in metrics:
        _check_judged(items)
    return list(metrics.values())


def _check_judged(items: list[Item]) -> None:
    from raydistill.shapes.captions import parse

    for item in items:
        try:
            parse(item.prompt)
        except ValueError as error:
            raise InputError(
                f"prompt {item.prompt_id}: {error}; the judge, which scores where no --metrics are named, reads no other: name "
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


def open_folder(
    out: Path | None, storage: Place, subject: Subject, prompts: CategorisedPrompts, items: list[Item],
    metrics: list[Metric], reference: Path | None, resources: Resources, batch_size: int,
) -> tuple[Path, dict[str, Any]]:  # fmt: skip
    """(folder, settings) of this evaluation, or of the same one begun before; nothing is written.

    Without `out` the folder's name tells what decides the pictures, so that the same command goes on in the same folder.

    Raises:
        InputError: the folder holds an evaluation of other settings, or something else.
    """
    decides = {
        "model": {k: v for k, v in asdict(subject).items() if k not in ("name", "run_id", "tracking_uri")},
        "weights": subject.fingerprint(),
        "dtype": resources.dtype,
        "items": hashlib.blake2b(
            json.dumps([asdict(item) for item in items]).encode(), digest_size=12
        ).hexdigest(),
        "count": len(items),
        "seed": items[0].seed,
    }  # fmt: skip
    if out is None and not isinstance(storage, Path):
        raise InputError(f"--storage {storage}: pictures go to a folder that every node sees; name it with --out")
    if out is None:
        digest = hashlib.blake2b(json.dumps(decides, sort_keys=True).encode(), digest_size=4).hexdigest()
        out = storage / "evaluations" / f"{_plain(subject.name)}-{_plain(prompts.name)}-{digest}"
    settings = decides | {"prompts": prompts.name, "batch_size": batch_size, "metrics": {}}
    file = out / SETTINGS_FILE
    if file.is_file():
        before = json.loads(file.read_text())
        changed = [
            f"{key} was {before.get(key)!r}, now {value!r}"
            for key, value in decides.items()
            if before.get(key) != value
        ]
        if changed:
            raise InputError(
                f"--out {out}: holds an evaluation of other settings ({'; '.join(changed)}); use another folder"
            )
        settings |= {"batch_size": before["batch_size"], "metrics": before["metrics"]}
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: exists and is no evaluation's folder")
    for metric in metrics:
        now = metric.settings | ({"reference": str(reference)} if metric.name in SET_METRICS else {})
        known = settings["metrics"].get(metric.name, now)
        if known != now and metric.name not in SET_METRICS:  # a set metric is computed anew each time
            raise InputError(f"--out {out}: {metric.name} was computed with {known}, now {now}; use another folder")
        settings["metrics"] = settings["metrics"] | {metric.name: now}
    return out.absolute(), settings


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name).strip("-.") or "model"


# -- on Ray -----------------------------------------------------------------------------------------------


def create_folder(plan: Plan) -> Parts:
    """Write what the stages read."""
    (plan.folder / PICTURES).mkdir(parents=True, exist_ok=True)
    if not (plan.folder / ITEMS_FILE).is_file():
        write_items(plan.folder / ITEMS_FILE, plan.items)
    replace_text(plan.folder / SETTINGS_FILE, json.dumps(plan.settings, indent=1, ensure_ascii=False) + "\n")
    return Parts(plan.folder, plan.settings["batch_size"])


def stages_of(plan: Plan) -> list:
    """The stream's stages, the drawing first."""
    from raydistill.evaluation.scorers import ClipScorer, Drawing, JudgeScorer
    from raydistill.evaluation.stream import StagePlan

    told = plan.resources
    drawing = {"subject": plan.subject, "device": told.device, "dtype": told.dtype, "threads": told.threads}
    stages = [StagePlan(DRAW, Drawing, drawing, actors=told.actors, gpus=told.gpus)]
    for metric in plan.metrics:
        if metric.name == "judge":
            stages.append(StagePlan("judge", JudgeScorer, {"folder": metric.weights["judge"], "threads": told.threads}))
        elif metric.name == "clipscore":
            place = {"folder": metric.weights["clipscore"], "device": told.device, "threads": told.threads}
            stages.append(StagePlan("clipscore", ClipScorer, place, gpus=told.gpus))
        elif metric.name in REWARDS:
            arguments = {"weights": metric.weights, "device": told.device}
            environment = runtime_env(metric.name)
            stages.append(StagePlan(metric.name, REWARDS[metric.name], arguments, environment, gpus=told.gpus))
    return stages


def run_evaluation(plan: Plan, done: Callable[[int], object] = lambda pictures: None) -> dict[str, dict[str, float]]:
    """Do what is missing, inside a connection to Ray, and write the results; returns the table of means.

    Raises:
        StageFailed: a stage or a command failed; what is there is kept.
    """
    import ray

    from raydistill.evaluation.stream import run_once, run_stages

    if plan.resources.gpus is None:
        gpus = ray.cluster_resources().get("GPU", 0.0)
        plan = replace(plan, resources=plan.resources.divided(len(plan.metrics), gpus))
    parts = create_folder(plan)
    run_stages(parts, stages_of(plan), done)
    for metric in plan.metrics:
        if metric.command and parts.missing(metric.name):
            arguments = (str(plan.folder), parts.batch_size, metric.name, list(metric.command), str(Path.cwd()))
            run_once(run_command, *arguments, gpus=plan.resources.gpus)
    for metric in plan.metrics:
        if metric.name in SET_METRICS:
            parts.write_set(metric.name, _of_set(plan, parts, metric, run_once))
    table, columns = collect(plan, parts)
    finish(plan, table, columns)
    return table


def _of_set(plan: Plan, parts: Parts, metric: Metric, run_once: Callable[..., Any]) -> float:
    from raydistill.evaluation.scorers import judge_frechet

    if metric.name == "fid":
        arguments = (str(plan.folder / PICTURES), str(plan.reference), metric.weights, plan.resources.device)
        return run_once(inception_fid, *arguments, runtime_env=runtime_env("fid"), gpus=plan.resources.gpus)
    files = [str(parts.picture(item)) for item in parts.items]
    reference = [str(file) for file in pictures_in(plan.reference)]
    return run_once(judge_frechet, metric.weights["judge"], files, reference, plan.resources.threads)


def collect(plan: Plan, parts: Parts) -> tuple[dict[str, dict[str, float]], dict[str, list[float | None]]]:
    """(table, columns of picture metrics) of all that is complete in the folder, this call's metrics and earlier ones."""
    columns: dict[str, list[float | None]] = {}
    for name in plan.settings["metrics"]:
        if name not in SET_METRICS and not parts.missing(name):
            columns |= parts.read(name)
    table = mean_table(plan.items, columns)
    for name in plan.settings["metrics"]:
        if name in SET_METRICS and (value := parts.read_set(name)) is not None:
            table[ALL][name] = value
    return table, columns


def finish(plan: Plan, table: dict[str, dict[str, float]], columns: dict[str, list[float | None]]) -> None:
    """scores.parquet, results.json and grid.png."""
    from raydistill.evaluation.summary import write_summary

    write_scores(plan.folder / SCORES_FILE, plan.items, columns)
    about = {"model": plan.subject.title, "prompts": plan.prompts.name, "pictures": len(plan.items)}
    write_summary(plan.folder / RESULTS_FILE, about | {"settings": plan.settings, "results": table})
    _grid(plan).save(plan.folder / GRID_FILE)


def _grid(plan: Plan, shown: int = 32) -> Any:
    import torch
    from torch.nn.functional import interpolate

    from raydistill.evaluation.scorers import load_image
    from raydistill.pictures.grids import grid

    items = plan.items[:shown]
    images = torch.stack([load_image(plan.folder / PICTURES / item.file_name) for item in items])
    if images.shape[-1] > 256:
        images = interpolate(images, size=(256, 256), mode="area")
    return grid(images, [item.prompt for item in items], title=f"{plan.subject.title}: {plan.prompts.name}")


# -- MLflow -----------------------------------------------------------------------------------------------


def store_of(named: str | None, subject: Subject, storage: Place) -> str:
    """Where to log: as named, else where the run that made the model is, MLFLOW_TRACKING_URI, a SQLite file in `storage`.

    Raises:
        InputError: the run's own store needs a secret, which its configuration does not keep; or `storage` can hold no
            SQLite file.
    """
    own, environment = subject.tracking_uri, os.environ.get("MLFLOW_TRACKING_URI")
    file = (own or "").removeprefix("sqlite:///")
    if file.startswith("/") and not Path(file).is_file():  # the run's folder was moved, and came without it
        own = None
    if own is not None and MASK in own and named is None:
        if environment is None:
            raise InputError(
                f"{subject.name}: its run is logged to {own}, and the secret is not kept: name it with --tracking-uri or "
                "MLFLOW_TRACKING_URI"
            )
        own = None
    return absolute(named or own or environment or sqlite_uri(storage, "--tracking-uri"))


def log_results(
    plan: Plan, table: dict[str, dict[str, float]], uri: str, experiment: str, storage: Place
) -> tuple[str, str | None]:
    """Log to a run nested in the one that made the model, where this store has it, else to a run of its own.

    The same evaluation logs to the same run again. Returns (run id, id of the run above it or None).

    Raises:
        TrackingError: the store cannot be used, or went away before everything was sent.
    """
    from PIL import Image

    from raydistill.evaluation.summary import markdown
    from raydistill.tracking.store import open_run, source_version
    from raydistill.tracking.tracker import Tracker

    client = client_of(uri)
    parent = _run_or_none(client, plan.subject.run_id)
    if parent is not None:
        experiment = client.get_experiment(parent.info.experiment_id).name
    parent_id = parent.info.run_id if parent is not None else None
    memory = plan.folder / MLFLOW_FILE
    known = json.loads(memory.read_text()) if memory.is_file() else {}
    resume = known.get("run_id") if known.get("parent") == parent_id else None
    resume = resume if _run_or_none(client, resume) is not None else None
    subject = plan.subject
    params = {"model": subject.name, "folder": subject.folder, "unet": subject.unet, "steps": subject.steps,
              "start_timestep": subject.start_timestep, "guidance_scale": subject.guidance_scale,
              "prompts": plan.prompts.name, "count": len(plan.items), "seed": plan.settings["seed"],
              "reference": plan.reference}  # fmt: skip
    found_by = {key: parent.data.tags[key] for key in ("teacher", "student") if parent and key in parent.data.tags}
    run_id = open_run(
        uri, experiment, f"{subject.name}/evaluation/{plan.prompts.name}", storage=storage,
        params={key: str(value) for key, value in params.items() if value is not None},
        tags=found_by | {"stage": "evaluation", "git_commit": source_version(), "evaluated": subject.title},
        parent_run_id=parent_id, resume_run_id=resume,
    )  # fmt: skip
    logged = client.get_run(run_id).data.metrics
    values = {key: value for key, value in mlflow_names(table).items() if logged.get(key) != value}
    step = known.get("step", 0) + any(key in logged for key in values) if resume else 0
    replace_text(memory, json.dumps({"run_id": run_id, "parent": parent_id, "step": step}) + "\n")
    tracker = Tracker(uri, run_id)
    tracker.metrics(values, step)
    tracker.note(markdown(table))
    for name in (SCORES_FILE, RESULTS_FILE, GRID_FILE):
        tracker.artifact(plan.folder / name)
    with Image.open(plan.folder / GRID_FILE) as picture:
        tracker.image(picture, "evaluation", 0)
    if lost := tracker.finish():
        raise TrackingError(f"{mask('uri', uri)}: {lost} entries of run {run_id} could not be logged")
    return run_id, parent_id


def _run_or_none(client: Any, run_id: str | None) -> Any:
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException:  # another store's
        return None
    return run if run.info.lifecycle_stage == "active" else None
