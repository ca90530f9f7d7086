"""The exported student as a logged model of its MLflow run, and as a version in MLflow's registry.

MLflow takes seconds to import, so it is imported inside functions.
"""

from __future__ import annotations

import warnings
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from raydistill import export
from raydistill.errors import mask
from raydistill.storage.atomic import reading
from raydistill.storage.place import Place
from raydistill.tracking.screen import screen
from raydistill.tracking.store import client_of, newest_model, told

if TYPE_CHECKING:
    from mlflow import MlflowClient

MODEL = "student"  # name of the logged model
CHAMPION = "champion"  # alias of the best version by the metric
CODE = Path(export.__file__).parent / "mlflow_student.py"
NEEDS = ("diffusers", "transformers", "torch", "safetensors", "accelerate")


def log_student(uri: str, run_id: str, folder: Place, metric: str | None, register: str | None) -> None:
    """Log the pipeline in `folder` as a model of the run, and register it. What MLflow refuses is said, and loses nothing.

    Args:
        metric: of the run, by which versions are compared; None: none was measured.
        register: name in the registry; None: not registered.
    """
    import mlflow

    earlier = mlflow.get_tracking_uri()
    try:
        client = client_of(uri)
        mlflow.set_tracking_uri(uri)
        with reading(folder) as local, mlflow.start_run(run_id=run_id), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on type hints
            packages = [f"{name}=={metadata.version(name)}" for name in NEEDS]
            mlflow.pyfunc.log_model(
                name=MODEL,
                python_model=str(CODE),
                artifacts={"pipeline": str(local)},
                pip_requirements=packages,
                metadata={"num_inference_steps": 1, "guidance_scale": 0},
            )
        if register is not None:
            _register(client, run_id, metric, register)
    except Exception as error:  # noqa: BLE001 (mlflow, sqlalchemy and requests all have their own)
        screen.say(
            f"MLflow    {mask('uri', uri)} does not take the student as a model ({told(uri, error)}): it is in {folder}"
        )
    finally:
        mlflow.set_tracking_uri(earlier)


def _register(client: MlflowClient, run_id: str, metric: str | None, name: str) -> None:
    """A new version, which becomes the champion where its metric is the best."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    run = client.get_run(run_id)
    model = newest_model(client, run.info.experiment_id, run_id)
    version = client.create_model_version(name, f"models:/{model.model_id}", run_id, model_id=model.model_id).version
    try:
        best = client.get_run(client.get_model_version_by_alias(name, CHAMPION).run_id).data.metrics.get(metric)
    except MlflowException:  # there is none yet
        best = None
    mine = run.data.metrics.get(metric)
    champion = best is None or (mine is not None and mine > best)
    if champion:
        client.set_registered_model_alias(name, CHAMPION, version)
    screen.say(f"model     models:/{name}/{version}" + (f", now models:/{name}@{CHAMPION}" if champion else ""))
