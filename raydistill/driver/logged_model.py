"""The exported student as a logged model of its MLflow run, and as a version in MLflow's registry.

Everything goes through a client of the run's own store. MLflow's fluent calls would use the process's tracking URI and active
run, which belong to whoever called us. MLflow takes seconds to import, so it is imported inside functions.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydistill import export
from raydistill.config.schema import Config
from raydistill.driver.finished import SUMMARY
from raydistill.driver.run_folder import RunFolder
from raydistill.errors import mask, reason
from raydistill.export.few_steps import steps_of_folder
from raydistill.storage.atomic import read_json, reading
from raydistill.storage.place import Place
from raydistill.tracking.screen import screen
from raydistill.tracking.store import client_of, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run

MODEL = "student"  # name of the logged model
CHAMPION = "champion"  # alias of the best version by the metric
METRIC, SCORE = "metric", "score"  # tags of a version: what it was measured by, and how well it did
REFUSED = "model_refused"  # in run.json
TRACKING_URI = "MLFLOW_TRACKING_URI"
AFTER = "student_after/"  # metrics of the run that are the exported student's
CODE = Path(export.__file__).parent / "mlflow_student.py"
NEEDS = ("diffusers", "transformers", "torch", "safetensors", "accelerate")


def log_student(uri: str, run_id: str, folder: Place, metric: str | None, register: str | None) -> bool:
    """Log the pipeline in `folder` as a model of the run, and register it. What MLflow refuses is said, and loses nothing.

    Args:
        metric: of the run, by which versions are compared; None: none was measured.
        register: name in the registry; None: not registered.

    Returns:
        whether the store has taken it.
    """
    try:
        client = client_of(uri)
        run = client.get_run(run_id)
        model = _log(client, run, folder)
        if register is not None:
            _register(client, run, model, metric, register)
    except Exception as error:  # noqa: BLE001 (mlflow, sqlalchemy and requests all have their own)
        screen.say(
            f"MLflow    {mask('uri', uri)} does not take the student as a model ({reason(error, uri)}): it is in {folder}"
        )
        return False
    return True


def has_value(config: Config, summary: dict[str, Any]) -> bool:
    """Whether the exported student has a number by which it is compared with others."""
    return config.evaluation.metric in summary.get("student_after", {})


def log_of_run(config: Config, run: RunFolder, uri: str, run_id: str, measured: bool) -> None:
    """Log a run's student as the configuration says, and keep in run.json whether MLflow has refused it."""
    metric = f"{AFTER}{config.evaluation.metric}" if measured else None
    taken = log_student(uri, run_id, run.path / "export", metric, config.tracking.register_as)
    if not taken or REFUSED in run.recall():
        run.remember(**{REFUSED: not taken})


def log_if_refused(config: Config, run: RunFolder) -> None:
    """A finished run's student, where MLflow did not take it when the run ended."""
    kept = run.recall()
    if kept.get(REFUSED):
        measured = has_value(config, read_json(run.path / SUMMARY, "restore it, or use another run.name"))
        log_of_run(config, run, tracking_uri(config, run.storage), kept["mlflow"]["pipeline"], measured)


def _log(client: MlflowClient, run: Run, folder: Place) -> LoggedModel:
    """The model is an output of the run, and has its metrics."""
    import mlflow
    from mlflow.entities import LoggedModelOutput, Metric

    run_id = run.info.run_id
    last = {key: client.get_metric_history(run_id, key)[-1] for key in run.data.metrics if key.startswith(AFTER)}
    model = client.create_logged_model(run.info.experiment_id, MODEL, run_id, params=run.data.params)
    try:
        with reading(folder) as local, tempfile.TemporaryDirectory() as made, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on type hints
            described = {"num_inference_steps": steps_of_folder(local), "guidance_scale": 0}
            mlflow.pyfunc.save_model(
                made_here := f"{made}/model",
                python_model=str(CODE),
                artifacts={"pipeline": str(local)},
                pip_requirements=[f"{name}=={metadata.version(name)}" for name in NEEDS],
                mlflow_model=mlflow.models.Model(
                    artifact_path=model.artifact_location,
                    run_id=run_id,
                    model_uuid=model.model_id,
                    model_id=model.model_id,
                    metadata=described,
                ),
            )
            client.log_model_artifacts(model.model_id, made_here)
    except Exception:
        client.finalize_logged_model(model.model_id, "FAILED")
        raise
    step = max((metric.step for metric in last.values()), default=0)
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
    of_model: dict[str, Any] = {"model_id": model.model_id, "run_id": run_id}
    client.log_batch(run_id, [Metric(m.key, m.value, m.timestamp, m.step, **of_model) for m in last.values()])
    return client.finalize_logged_model(model.model_id, "READY")


def _register(client: MlflowClient, run: Run, model: LoggedModel, metric: str | None, name: str) -> None:
    """A new version, which becomes the champion where there is none, or where both were measured and it is better."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    mine = run.data.metrics.get(metric)
    champion = client.get_registered_model(name).aliases.get(CHAMPION)
    best = None if champion is None else _value(client, name, champion, metric, run.info.run_id)
    tags = {} if mine is None else {METRIC: str(metric), SCORE: repr(mine)}
    with _as_the_process_s_own(client.tracking_uri):  # where MLflow looks a `models:/` up, whichever the client's
        version = client.create_model_version(
            name, f"models:/{model.model_id}", run.info.run_id, tags, model_id=model.model_id
        ).version
    text = f"model     models:/{name}/{version}"
    if champion is None or (mine is not None and best is not None and mine > best):
        client.set_registered_model_alias(name, CHAMPION, version)
        text += f", now models:/{name}@{CHAMPION}"
    elif mine is None or best is None:
        text += f"; models:/{name}@{CHAMPION} stays version {champion}: the two have no score in common"
    screen.say(text)


@contextlib.contextmanager
def _as_the_process_s_own(uri: str) -> Iterator[None]:
    """MLflow's tracking URI for the length of the block; it is kept in a variable and in the environment, one or both."""
    import mlflow

    inherited = os.environ.pop(TRACKING_URI, None)
    chosen = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(chosen)  # None: none is chosen
        os.environ.pop(TRACKING_URI, None)
        if inherited is not None:
            os.environ[TRACKING_URI] = inherited


def _value(client: MlflowClient, name: str, version: str, metric: str | None, run_id: str) -> float | None:
    """How well a version did by the metric; None: not known. The metric of a run that was extended is not its old version's."""
    champion = client.get_model_version(name, version)
    if SCORE in champion.tags:
        return float(champion.tags[SCORE]) if champion.tags.get(METRIC) == metric else None
    if champion.run_id in (None, "", run_id):  # of a version of ours that set no tags, or made by somebody else
        return None
    return client.get_run(champion.run_id).data.metrics.get(metric)
