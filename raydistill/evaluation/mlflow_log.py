"""Where an evaluation is logged: under the run that made the model, else by itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from PIL import Image

from raydistill.errors import MASK, InputError, mask
from raydistill.evaluation.evaluation import Evaluation
from raydistill.evaluation.results import GRID_FILE, RESULTS_FILE, SCORES_FILE, mlflow_names
from raydistill.evaluation.subject import Subject
from raydistill.evaluation.summary import markdown
from raydistill.storage.atomic import replace_text
from raydistill.storage.place import Place
from raydistill.tracking.store import TrackingError, absolute, client_of, open_run, prepare, source_version, sqlite_uri
from raydistill.tracking.tracker import Tracker

MLFLOW_FILE = "mlflow.json"


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
    evaluation: Evaluation, table: dict[str, dict[str, float]], uri: str, experiment: str, storage: Place
) -> tuple[str, str | None]:
    """Log to a run nested in the one that made the model, where this store has it, else to a run of its own.

    The same evaluation logs to the same run again. Returns (run id, id of the run above it or None).

    Raises:
        TrackingError: the store cannot be used, or went away before everything was sent.
    """
    prepare(uri)
    client = client_of(uri)
    parent = _run_or_none(client, evaluation.subject.run_id)
    if parent is not None:
        experiment = client.get_experiment(parent.info.experiment_id).name
    parent_id = parent.info.run_id if parent is not None else None
    memory = evaluation.folder / MLFLOW_FILE
    known = json.loads(memory.read_text()) if memory.is_file() else {}
    resume = known.get("run_id") if known.get("parent") == parent_id else None
    resume = resume if _run_or_none(client, resume) is not None else None
    subject = evaluation.subject
    params = {"model": subject.name, "folder": subject.folder, "unet": subject.unet, "steps": subject.steps,
              "start_timestep": subject.start_timestep, "guidance_scale": subject.guidance_scale,
              "prompts": evaluation.prompts.name, "count": len(evaluation.pictures), "seed": evaluation.settings["seed"],
              "reference": evaluation.reference}  # fmt: skip
    found_by = {key: parent.data.tags[key] for key in ("teacher", "student") if parent and key in parent.data.tags}
    run_id = open_run(
        uri, experiment, f"{subject.name}/evaluation/{evaluation.prompts.name}", storage=storage,
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
        tracker.artifact(evaluation.folder / name)
    with Image.open(evaluation.folder / GRID_FILE) as picture:
        tracker.image(picture, "evaluation", 0)
    if lost := tracker.finish():
        raise TrackingError(f"{mask('uri', uri)}: {lost} entries of run {run_id} could not be logged")
    return run_id, parent_id


def _run_or_none(client: Any, run_id: str | None) -> Any:
    from mlflow.exceptions import MlflowException  # mlflow is slow to import

    if run_id is None:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException:  # another store's
        return None
    return run if run.info.lifecycle_stage == "active" else None
