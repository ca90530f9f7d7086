"""Where an exported student is: a folder, the name or folder of a run, or an MLflow run id."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from raydistill.config.schema import Config
from raydistill.errors import InputError, mask, reason
from raydistill.export.few_steps import is_few_step, steps_of
from raydistill.spaces import load_student_space
from raydistill.spaces.base import Space
from raydistill.storage.atomic import replacing
from raydistill.storage.place import Place, Remote, is_uri
from raydistill.storage.resolve import SHAPES_PREFIX, local_path, to_place
from raydistill.storage.run_files import CONFIGURATION, config_of, notes_of
from raydistill.storage.staging import local_copy
from raydistill.tracking.screen import screen
from raydistill.tracking.store import client_of, newest_model

EXPORT_FOLDER = "export"  # of a run, and of its artifacts
IN_MODEL = f"artifacts/{EXPORT_FOLDER}"  # of an MLflow model
MODELS = "models:/"
DOWNLOADS = "downloads"  # of storage
RUN_ID = re.compile(r"[0-9a-f]{32}")  # of MLflow


@dataclass(frozen=True)
class Export:
    """An exported student's folder."""

    folder: Path
    name: str  # for people: the run's name, or the folder's
    run: Place | None = None  # folder of the run that made it, where there is one

    def run_config(self) -> Config | None:
        """Configuration of the run that made it. Raises InputError: damaged, or this version cannot read it."""
        cure = "restore it, or copy the export to another folder and use it there"
        return config_of(self.run, cure) if self.run else None


def find_export(text: str, storage: Place, tracking_uri: str | None = None) -> Export:
    """The exported student that `text` names.

    Args:
        text: an export's folder, a run's folder or name, a URI of one, an MLflow run id (of the run or of its
            distillation), or an MLflow model, `models:/name@alias`.
        storage: where the runs are.
        tracking_uri: MLflow's, asked where the run of an id is not in `storage`; None: the SQLite file in `storage`.

    An export in a bucket is staged.

    Raises:
        InputError: there is none, or a URI cannot be read.
        OSError: the store of a URI does not answer.
    """
    if text.startswith(MODELS):
        return _of_model(text, storage, tracking_uri)
    path = to_place(text)
    places = [path] if text.startswith(SHAPES_PREFIX) or is_uri(text) else [path, storage / text]
    for found in places:
        if (found / "model_index.json").is_file():
            full = found.resolve()
            above = full.parent if full.name == EXPORT_FOLDER else None
            run = above if above and (above / CONFIGURATION).is_file() else None
            return Export(local_copy(found), (above or full).name, run)
        if (found / EXPORT_FOLDER / "model_index.json").is_file():
            return Export(local_copy(found / EXPORT_FOLDER), found.resolve().name, found)
    if RUN_ID.fullmatch(text):
        return _of_run_id(text, storage, tracking_uri)
    found = next((found for found in places if found.is_dir()), None)
    if found is None:
        raise InputError(f"{text}: no such folder, and no run of that name in {storage}")
    what = "a run that has exported no student yet" if (found / CONFIGURATION).is_file() else "no diffusers pipeline"
    raise InputError(f"{found}: {what} (neither model_index.json nor {EXPORT_FOLDER}/model_index.json)")


def _of_run_id(run_id: str, storage: Place, uri: str | None) -> Export:
    """The export of an MLflow run: its files in `storage` where there are any, else its artifacts.

    Damaged runs of the storage are named and left out.
    """
    for run in sorted(storage.iterdir(), key=str) if storage.is_dir() else ():
        try:
            stages = notes_of(run, "this run is left out of the search").get("mlflow", {})
        except (InputError, PermissionError) as error:
            screen.say(f"note      {error}")
            continue
        for stage, known in stages.items():
            # the export of the main distillation is moved to the run's folder at the end
            own = () if stage in ("pipeline", "distill") else (stage,)
            folder = run / stage if own else run
            if known == run_id and (folder / EXPORT_FOLDER / "model_index.json").is_file():
                return Export(local_copy(folder / EXPORT_FOLDER), "/".join((run.name, *own)), run)
    return _of_artifacts(run_id, _store_of(run_id, storage, uri), storage)


def _of_model(model: str, storage: Place, uri: str | None) -> Export:
    """The student of an MLflow model, `models:/name@alias` or `models:/name/version`."""
    uri = _store_of(model, storage, uri)
    try:
        client = client_of(uri)
        name, sign, what = re.fullmatch(r"models:/+([^@/]+)([@/])(.+)", model).groups()
        version = client.get_model_version_by_alias(name, what) if sign == "@" else client.get_model_version(name, what)
        made = version.source.removeprefix(MODELS)  # id of the logged model that was registered
        folder = _fetched(client.get_logged_model(made).artifact_location, IN_MODEL, made, storage, uri)
        return Export(folder, f"{name} {version.version}")
    except Exception as error:  # sqlalchemy, requests and mlflow all have their own
        raise InputError(f"{model}: {mask('uri', uri)}: {reason(error, uri)}") from error


def _fetched(root: str, path: str, name: str, storage: Place, uri: str) -> Path:
    """The folder `path` below an artifact root of MLflow's: as it lies there, or downloaded once as `downloads/<name>`.

    What belongs to it then has one place, which every node sees.
    """
    if root.startswith(("file:", "/")):
        return local_path(root) / path  # MLflow would leave a copy among the temporary files
    from mlflow.artifacts import download_artifacts  # slow to import

    place = storage / DOWNLOADS / name
    if not place.is_dir():
        with replacing(place) as fresh:
            fresh.mkdir()
            download_artifacts(f"{root}/{path}", dst_path=str(fresh), tracking_uri=uri)
    return place / EXPORT_FOLDER


def _store_of(text: str, storage: Place, uri: str | None) -> str:
    """MLflow's URI: the one that is named, else the SQLite file in `storage`. Raises InputError."""
    if uri is None and not isinstance(storage, Remote) and (storage / "mlflow.db").is_file():
        uri = f"sqlite:///{(storage / 'mlflow.db').absolute()}"
    if uri is None:
        raise InputError(f"{text}: there is no MLflow store in {storage}; name --tracking-uri")
    return uri


def _of_artifacts(run_id: str, uri: str, storage: Path) -> Export:
    """The student that a run, or the distillation nested in it, has logged: as a model, or as the artifact `export`."""
    try:
        client = client_of(uri)
        run = client.get_run(run_id)
        nested = f"tags.`mlflow.parentRunId` = '{run_id}' and tags.stage = 'distill'"
        for candidate in [run, *client.search_runs([run.info.experiment_id], nested)]:
            made_by, name = candidate.info.run_id, run.info.run_name or run_id
            if model := newest_model(client, candidate.info.experiment_id, made_by):
                root, path = model.artifact_location, IN_MODEL
            elif any(file.path == EXPORT_FOLDER for file in client.list_artifacts(made_by)):
                root, path = candidate.info.artifact_uri, EXPORT_FOLDER
            else:
                continue
            return Export(_fetched(root, path, made_by, storage, uri), name)
    except Exception as error:  # sqlalchemy, requests and mlflow all have their own
        raise InputError(f"{run_id}: {mask('uri', uri)}: {reason(error, uri)}") from error
    raise InputError(f"{run_id}: neither this MLflow run nor a distillation nested in it has logged a student")


def open_student_export(export: Export) -> tuple[Space, int, int]:
    """(Space, start timestep, steps) of an export whose scheduler draws exactly what the student draws.

    They are those of `one_step_scheduler` and `few_step_scheduler`.

    Raises:
        InputError: another scheduler, whose pictures are not the student's, or no pipeline of a student's family.
    """
    space = load_student_space(export.folder)
    if is_few_step(type(space.scheduler).__name__, space.scheduler.config):
        steps = steps_of(space.scheduler.config)
        return space, int(space.start_sampling(steps).timesteps[0]), steps
    if not space.draws_at_once:
        raise InputError(
            f"{export.folder}: not the export of a one-step student: its {type(space.scheduler).__name__} (timestep_spacing "
            f"{space.scheduler.config.get('timestep_spacing')!r}) does not step from noise to the picture at once"
        )
    return space, int(space.start_sampling(1).timesteps[0]), 1


def open_one_step(export: Export, form: str = "this form") -> tuple[Space, int]:
    """(Space, start timestep) of a student of one step. Raises InputError as above, and for one of several steps."""
    space, start, steps = open_student_export(export)
    if steps > 1:
        raise InputError(
            f"{export.folder}: a student of {steps} steps, and {form} is written for one step alone; take the folder, or "
            "--format lora"
        )
    return space, start
