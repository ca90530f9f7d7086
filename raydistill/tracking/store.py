"""MLflow runs: where they are kept, what describes them, opening and resuming them. The driver's side of tracking.

MLflow takes seconds to import, so it is imported inside functions only.
"""

from __future__ import annotations

import contextlib
import getpass
import logging
import os
import shlex
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

import raydistill
from raydistill.config.reading import config_hash
from raydistill.config.schema import Config
from raydistill.errors import InputError, mask, reason
from raydistill.storage.place import Place, Remote
from raydistill.tracking import moved
from raydistill.tracking.screen import screen

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

REFUSALS = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE", "PERMISSION_DENIED"}
MAX_PARAM, MAX_TAG = 6000, 8000  # characters MLflow stores
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # of the UI's side « Model training»
FAILURE = "failure"  # tag of a run that failed: why
NOTE = "mlflow.note.content"  # what the UI shows as a run's description, in Markdown


class TrackingError(RuntimeError):
    """The tracking store or a run in it cannot be used; raised before training starts, never during it."""


class TrackingAway(TrackingError):
    """The store does not answer; it may come back."""


# -- where runs are kept ----------------------------------------------------------------------------------


def tracking_uri(config: Config, storage: Place) -> str:
    """`tracking.uri`, else MLFLOW_TRACKING_URI, else a SQLite file in `storage`.

    SQLite paths are made absolute: every process of a cluster has its own working directory.

    Raises:
        InputError: there is no other store, and `storage` can hold no SQLite file.
    """
    return absolute(config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(storage, "tracking.uri"))


def absolute(uri: str) -> str:
    """`uri`, a relative SQLite path in it made absolute."""
    path = uri.removeprefix("sqlite:///")
    if path == uri or path.startswith(("/", ":memory:", "file:")):
        return uri
    return f"sqlite:///{Path(path).absolute()}"


def sqlite_uri(storage: Place, option: str) -> str:
    """The SQLite file in `storage`. Raises InputError, which names the option to set, where that is no folder."""
    if isinstance(storage, Remote):
        raise InputError(
            f"{option}: {storage} cannot hold MLflow's database; set {option} or MLFLOW_TRACKING_URI to an MLflow server, "
            "http://host:5000"
        )
    return f"sqlite:///{storage.absolute()}/mlflow.db"


def ui_command(uri: str) -> str:
    """The shell command that opens the MLflow UI (a server's own address if the URI is one)."""
    if uri.startswith(("http://", "https://")):
        return f"python3 -m webbrowser {shlex.quote(mask('uri', uri))}"
    return f"mlflow ui --backend-store-uri {shlex.quote(mask('uri', uri))}"


def ui_lines(uri: str, run_id: str) -> list[str]:
    """What opens the UI at the runs of this run's experiment: a server's address, or a command and then an address.

    MLflow's own start page shows the empty GenAI side.

    Raises:
        TrackingAway: the store does not answer.
    """
    from mlflow.exceptions import MlflowException

    try:
        experiment = client_of(uri).get_run(run_id).info.experiment_id
    except MlflowException as error:
        raise TrackingAway(f"{mask('uri', uri)}: {reason(error, uri)}") from error
    page = f"#/experiments/{experiment}/runs?workflowType=machine_learning"
    if uri.startswith(("http://", "https://")):
        return [f"{mask('uri', uri).rstrip('/')}/{page}"]
    return [ui_command(uri), f"http://127.0.0.1:5000/{page}"]


def client_of(uri: str) -> MlflowClient:
    """An MLflow client with quiet loggers and short retries."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # MLflow's 7 block a caller for minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    import mlflow

    # Table creation and migration narrate at INFO, failing database calls print a traceback before they raise.
    for name in ("alembic", "mlflow.models.signature"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # its warnings repeat a URI's query
    return mlflow.MlflowClient(tracking_uri=uri)


@contextlib.contextmanager
def _alone(uri: str) -> Iterator[None]:
    """Hold a lock file beside a SQLite store: MLflow's own guard lets two first users collide.

    The store's file is opened once, because MLflow retries one that cannot be opened for 100 s.
    """
    path = uri.removeprefix("sqlite:///")
    if path == uri or not path.startswith("/"):
        yield
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock", fallback_to_soft=False):
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.execute("pragma schema_version")
        yield


def prepare(uri: str) -> None:
    """Create or migrate the store once, before any worker opens it: parallel first uses race on migration.

    Raises:
        TrackingAway: the store does not answer.
        TrackingError: no URI of a store, or one that will not be usable later either.
    """
    try:
        with _alone(uri):
            client_of(uri).search_experiments(max_results=1)
    except Exception as error:  # sqlalchemy, requests and mlflow all have their own
        if _of_another_schema(error):
            raise TrackingError(
                f"tracking store {mask('uri', uri)} was written by a newer MLflow than this one ({metadata.version('mlflow')}), or "
                f"by an older one: install the newer, run `mlflow db upgrade` on the older, or use another ({reason(error, uri)})"
            ) from error
        kind = TrackingAway if _may_pass(error) else TrackingError
        raise kind(f"tracking store {mask('uri', uri)} cannot be used: {reason(error, uri)}") from error


def _of_another_schema(error: BaseException | None) -> bool:
    """Whether this MLflow does not know the version of the database's schema, which waiting does not change."""
    from alembic.util import CommandError

    while error is not None:
        if isinstance(error, CommandError) or "database schema" in str(error):  # MLflow's own has no class
            return True
        error = error.__cause__ or error.__context__
    return False


def _may_pass(error: Exception) -> bool:
    """Whether a store that raised this may answer later: it could not be reached, is locked, or has failed inside."""
    import requests
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import OperationalError

    if isinstance(error, MlflowException):  # its code is INTERNAL_ERROR where a server or a connection failed
        wrapped = error.__cause__ or error.__context__
        if wrapped is not None and not isinstance(wrapped, MlflowException):
            return _may_pass(wrapped)
        return error.error_code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE") and "URI" not in str(error)
    return isinstance(error, (OSError, requests.RequestException, OperationalError, sqlite3.OperationalError))


def source_version() -> str:
    """Git commit of the source tree (« -dirty» if tracked files changed), else the package's version."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() == root:  # not a checkout that holds our virtualenv
            return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        pass
    return raydistill.__version__


def run_tags(config: Config, stage: str) -> dict[str, str]:
    """The tags by which runs are found and compared."""
    return {
        "git_commit": source_version(),
        "config_hash": config_hash(config),
        "teacher": config.teacher.model,
        "student": config.student.lora_start or config.student.unet or config.student.model,
        "stage": stage,
    }


def open_run(
    uri: str,
    experiment: str,
    name: str,
    *,
    storage: Place,
    params: Mapping[str, Any],
    tags: Mapping[str, Any],
    parent_run_id: str | None = None,
    resume_run_id: str | None = None,
) -> str:
    """Create a run, below its parent, or resume one; describe it and return its id.

    Args:
        experiment: created if missing. Its artifacts go where a server decides, else to `storage`, or beside a SQLite
            file where that is a URI.
        name: what the UI shows.
        params: secrets are masked, long values cut. On resume, those logged before with another value become tags
            `changed.<key>`: MLflow's parameters cannot be changed.

    Raises:
        TrackingAway: unreachable store.
        TrackingError: no server although `storage` is a URI, deleted experiment or run, or no such run.
    """
    prepare(uri)
    client = client_of(uri)
    from mlflow.exceptions import MlflowException

    if parent_run_id is None:  # once a run
        _keep_artifacts_here(client, uri, experiment, storage)
    tags = {key: mask(key, value)[:MAX_TAG] for key, value in tags.items()}
    if parent_run_id:
        tags["mlflow.parentRunId"] = parent_run_id
    if commit := tags.get("git_commit"):
        tags |= {"mlflow.source.git.commit": commit, "mlflow.source.name": Path(sys.argv[0]).name or "raydistill"}
    tags["mlflow.user"] = _user()
    params = {key: mask(key, value)[:MAX_PARAM] for key, value in params.items()}
    try:
        if resume_run_id is None:
            run = client.create_run(_experiment_id(client, uri, experiment, storage), tags=tags, run_name=name)
        else:
            run = client.get_run(resume_run_id)
            if run.info.lifecycle_stage != "active":
                raise TrackingError(f"run {resume_run_id} was deleted; `mlflow runs restore` brings it back")
            client.update_run(resume_run_id, status="RUNNING")
            for tag in sorted({FAILURE, NOTE} & run.data.tags.keys()) if FAILURE in run.data.tags else ():
                client.delete_tag(resume_run_id, tag)
        known = run.data.params
        changed = {f"changed.{k}": v[:MAX_TAG] for k, v in params.items() if k in known and known[k] != v}
        fresh = {key: value for key, value in params.items() if key not in known}
        describe(client, run.info.run_id, fresh, (tags if resume_run_id else {}) | changed)
    except MlflowException as error:
        kind = TrackingError if getattr(error, "error_code", None) in REFUSALS else TrackingAway
        raise kind(f"{mask('uri', uri)}: cannot open run {resume_run_id or name}: {reason(error, uri)}") from error
    return run.info.run_id


def _user() -> str:
    """Name of whoever runs this; the number where the machine knows no name for it, as under `docker run -u 1234`."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # of Python up to 3.12, and of later ones
        return str(os.getuid())


def _experiment_id(client: MlflowClient, uri: str, name: str, storage: Place) -> str:
    """Id of the experiment; made with an absolute artifact location, unless a server has its own."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        location = artifact_root(uri, storage)
        try:
            return client.create_experiment(name, artifact_location=location, tags=EXPERIMENT_TAGS)
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another driver was faster
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"experiment {name!r} was deleted; use another tracking.experiment, or "
            f"`mlflow experiments restore --experiment-id {found.experiment_id}`"
        )
    return found.experiment_id


def artifact_root(uri: str, storage: Place) -> str | None:
    """Where runs keep their artifacts; None: where the server says. Raises TrackingError where there is no place."""
    if uri.startswith(("http://", "https://", "databricks")):
        return None
    if not isinstance(storage, Remote):
        return (storage.absolute() / moved.ARTIFACTS).as_uri()
    file = uri.removeprefix("sqlite:///")
    if file == uri:
        raise TrackingError(f"{mask('uri', uri)}: with storage={storage}, MLflow's artifacts need an MLflow server")
    return (Path(file).parent / moved.ARTIFACTS).as_uri()


def _keep_artifacts_here(client: MlflowClient, uri: str, experiment: str, storage: Place) -> None:
    """After its folder was moved or copied, a store's artifacts go to the new one; where they cannot, a line says so."""
    place = artifact_root(uri, storage)
    root, database = moved.local(place), Path(uri.removeprefix("sqlite:///"))
    if root is None:
        return
    lines = []
    if database.is_file() and moved.same(database.parent, root.parent):
        with contextlib.suppress(sqlite3.OperationalError), _alone(uri):  # another schema: then the line below comes
            lines = moved.follow(database, root)
    if (found := client.get_experiment_by_name(experiment)) is not None:
        lines += moved.outside(found.artifact_location, experiment, root)
    for line in lines:
        screen.say(line)


def describe(client: MlflowClient, run_id: str, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
    """Log texts that are masked and short enough already."""
    from mlflow.entities import Param, RunTag

    entries = [("params", Param(k, v)) for k, v in params.items()] + [("tags", RunTag(k, v)) for k, v in tags.items()]
    for start in range(0, len(entries), 100):  # MLflow's limit per request
        chunk = entries[start : start + 100]
        client.log_batch(run_id, **{kind: [e for k, e in chunk if k == kind] for kind in ("params", "tags")})


def newest_model(client: MlflowClient, experiment: str, run_id: str) -> LoggedModel | None:
    """The model that a run has logged last; None: it has logged none. One that was not uploaded to its end does not count."""
    found = client.search_logged_models(
        [experiment], f"source_run_id = '{run_id}'", order_by=[{"field_name": "creation_time", "ascending": False}]
    )
    return next((model for model in found if model.status.value == "READY"), None)
