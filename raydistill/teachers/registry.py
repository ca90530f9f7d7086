"""Who uses a teacher service: the last user takes it down, and a crashed one does not.

A user is a driver, known by its Ray job. Users and what the service was started with are kept in the cluster's key-value
store. A keeper, one small actor that outlives drivers, watches them: a service whose users have all crashed waits
`teachers.linger_s` for one of them to resume, and is then taken down.

Who takes a service down says so first and looks for users then; who wants to use one says so first and waits then until
nobody takes any down. So a newcomer is either seen, and its service stays, or finds the ground clear.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_list, _internal_kv_put
from ray.serve.exceptions import RayServeException

import raydistill
from raydistill.config.schema import TeacherServiceConfig
from raydistill.teachers import service
from raydistill.teachers.request import TeacherStartError, one_line

log = logging.getLogger(__name__)

NAMESPACE = "raydistill-teachers"
STOPPING = "stopping/"  # the key of who takes a service down begins so
KEEPER = "keeper-"  # its name as an actor begins so
LOOK_EVERY_S = 2.0
EVERY, SAMPLE = 1 << 20, 1 << 12  # of every EVERY bytes of a weight file so many are hashed, and its first EVERY whole
DECIDE_NUMBERS = ("dtype", "slice", "shards", "threads_per_rank")


def start(model_folder: str, config: TeacherServiceConfig, name: str, given_up: threading.Event | None = None) -> None:
    """As `service.start`, for this driver; a service that it finds running just as it would start it is taken over.

    Args:
        given_up: set by whoever does not need it any more, while it starts.

    Raises:
        TeacherStartError: see `service.start`; or other living runs use a service of this name that is another one.
    """
    told = _describe(model_folder, config)
    with _using(name, release):
        _keep(name, config.linger_s)
        others = living(name) - {_me()}
        if told == _description(name) and service.exists(name):
            log.info("teacher %s: found running, taken over", name)
            service.wait_until_ready(config, name, patient=True, given_up=given_up)
            _put(name, "ready/" + _me(), "")
            return
        if others:
            raise TeacherStartError(
                f"run.name: a living run on this cluster (Ray job {', '.join(sorted(others))}) has teachers of the name "
                f"{name} with another model or other settings; choose another run.name"
            )
        _put(name, "description", json.dumps(told))
        service.launch(model_folder, config, name)
        service.wait_until_ready(config, name, patient=True, given_up=given_up)  # `release` takes it down, marked
        _put(name, "ready/" + _me(), "")


def attach(model_folder: str, config: TeacherServiceConfig, name: str, given_up: threading.Event | None = None) -> None:
    """Use the running service `name` that another run started. `given_up`: see `start`.

    Raises:
        TeacherStartError: there is none, or its answers would not be those of this teacher and these settings.
    """
    told = _describe(model_folder, config)
    with _using(name, _leave):  # what others started, and may resume with, is its keeper's to end
        _check_same(told, name)
        service.wait_until_ready(config, name, patient=True, given_up=given_up)
        _put(name, "ready/" + _me(), "")


@contextlib.contextmanager
def _using(name: str, end: Callable[[str], None]) -> Iterator[None]:
    """Makes this driver a user of the service, which `end` ends if the block fails; Ray's errors become TeacherStartError."""
    _put(name, "user/" + _me(), "")
    try:
        _await_take_downs()
        yield
    except BaseException as error:
        end(name)
        if isinstance(error, RayError | RayServeException):
            raise TeacherStartError(f"teacher {name}: {one_line(error)}") from error
        raise


def _check_same(wanted: dict[str, Any], name: str) -> None:
    """Raises TeacherStartError unless the service `name` runs and answers as this teacher would."""
    running = _description(name)
    if running is None or not service.exists(name):
        raise TeacherStartError(
            f"teachers.service: there is no teacher service {name!r} on this cluster; services: "
            f"{', '.join(services()) or 'none'}. teachers.service=null starts one"
        )
    differ = [
        f"teachers.{key}: it runs with {running['config'][key]!r}, not {wanted['config'][key]!r}"
        for key in DECIDE_NUMBERS
        if running["config"][key] != wanted["config"][key]
    ]
    if running["fingerprint"] != wanted["fingerprint"]:
        differ.insert(0, f"its model is {running['folder']}, and {wanted['folder']} is another one (teacher.model)")
    if differ:
        raise TeacherStartError(f"teachers.service: {name} is not this run's teacher: {'; '.join(differ)}")


def release(name: str) -> None:
    """This driver does not need the service any more; if no other living driver does, it is stopped.

    A service that cannot be stopped now, as when its replicas still work, is left to its keeper: no reason for a run to
    fail that has done its work.
    """
    _leave(name)
    try:
        _take_down(name, _me())
    except (RayError, RayServeException, TimeoutError) as error:
        log.warning("teacher %s: not stopped yet, its keeper will stop it: %s", name, one_line(error))


def _leave(name: str) -> None:
    for key in ("ready", "user"):
        _internal_kv_del(f"{name}/{key}/{_me()}", namespace=NAMESPACE)


def _take_down(name: str, who: str) -> None:
    """Stop the service, if it was started for users and has none, and drop what is known of it."""
    _internal_kv_put(STOPPING + who, "", namespace=NAMESPACE)
    try:
        if not living(name):
            if _description(name) is not None:  # no users' service is not ours to stop
                service.stop(name, only=not _living_of_all())
            _forget(name)
    finally:
        _internal_kv_del(STOPPING + who, namespace=NAMESPACE)


def _await_take_downs() -> None:
    """Return once nobody takes a service down; who takes down another one may take Serve with it."""
    logged = time.monotonic()
    while busy := [who for who in _keys(STOPPING) if _lives(who)]:
        time.sleep(0.1)
        if time.monotonic() - logged > service.LOG_EVERY_S:
            logged = time.monotonic()
            log.info("a teacher service is being taken down by %s; waiting for that", ", ".join(busy))


def _lives(who: str) -> bool:
    """Whether a driver, named by its Ray job, or a keeper, by its actor, is there."""
    if not who.startswith(KEEPER):
        return who not in _dead_jobs()
    try:
        ray.get_actor(who, namespace=NAMESPACE)
    except ValueError:
        return False
    return True


def ready(name: str) -> bool:
    """In a driver and its workers: whether `start` or `attach` of this driver is done, and `release` still to come."""
    return _internal_kv_get(f"{name}/ready/{_me()}", namespace=NAMESPACE) is not None


def living(name: str) -> set[str]:
    """Ray jobs that use the service and have not ended."""
    return set(_keys(f"{name}/user/")) - _dead_jobs()


def _living_of_all() -> set[str]:
    """Ray jobs that use any service, or are about to, and have not ended."""
    return {key.rpartition("/user/")[2] for key in _keys("") if "/user/" in key} - _dead_jobs()


def services() -> list[str]:
    """Names of the services that were started for drivers of this cluster."""
    return sorted(key.removesuffix("/description") for key in _keys("") if key.endswith("/description"))


def _forget(name: str) -> None:
    """Drop what is known of a service that is gone, its crashed users, and its keeper; newcomers wait meanwhile."""
    _internal_kv_del(f"{name}/description", namespace=NAMESPACE)
    for user in set(_keys(f"{name}/user/")) & _dead_jobs():
        for key in ("ready", "user"):
            _internal_kv_del(f"{name}/{key}/{user}", namespace=NAMESPACE)
    with contextlib.suppress(ValueError):  # it has none
        ray.kill(ray.get_actor(KEEPER + name, namespace=NAMESPACE))
    while _lives(KEEPER + name):  # or a newcomer would take it for its own
        time.sleep(0.05)


# -- what is known of a service ---------------------------------------------------------------------------


def _me() -> str:
    return ray.get_runtime_context().get_job_id()


def _dead_jobs() -> set[str]:
    return {job["JobID"] for job in ray._private.state.jobs() if job["IsDead"]}


def _keys(prefix: str) -> list[str]:
    """Of all keys that begin so, the rest."""
    return [key.decode().removeprefix(prefix) for key in _internal_kv_list(prefix, namespace=NAMESPACE)]


def _put(name: str, key: str, value: str) -> None:
    _internal_kv_put(f"{name}/{key}", value, namespace=NAMESPACE)


def _description(name: str) -> dict[str, Any] | None:
    found = _internal_kv_get(f"{name}/description", namespace=NAMESPACE)
    return json.loads(found) if found else None


def _describe(model_folder: str, config: TeacherServiceConfig) -> dict[str, Any]:
    folder = Path(model_folder).resolve()
    settings = config.model_dump(exclude={"service", "linger_s", "start_timeout_s", "retry_for_s"})
    return {
        "folder": str(folder),
        "fingerprint": fingerprint(folder),
        "config": settings,
        "version": raydistill.__version__,
    }


def fingerprint(folder: Path) -> str:
    """Hash of a diffusers folder: its JSON files whole, of its weight files name, size, beginning, and a sample of every MiB.

    The beginning holds a safetensors file's header, that is, every tensor's name and shape. The samples are 4 kB each: 24 GB
    are read in seconds, and what changes a tensor of a megabyte or more is seen.
    """
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if not file.is_file() or file.suffix not in (".json", ".safetensors"):
            continue
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)} {size}\n".encode())
        with file.open("rb") as data:
            digest.update(data.read(size if file.suffix == ".json" else EVERY))
            for place in range(EVERY, size if file.suffix != ".json" else 0, EVERY):
                data.seek(place)
                digest.update(data.read(SAMPLE))
    return digest.hexdigest()


# -- the keeper -------------------------------------------------------------------------------------------


@ray.remote(num_cpus=0, max_restarts=-1)
class Keeper:
    """Takes down one service that only crashed drivers used. All it knows is in the key-value store."""

    def __init__(self, name: str, linger_s: float) -> None:
        self.name, self.linger_s = name, linger_s
        _internal_kv_del(STOPPING + KEEPER + name, namespace=NAMESPACE)  # of one that ended itself, or was restarted
        threading.Thread(target=self._watch, daemon=True).start()

    def ready(self) -> None:
        """Answers once the keeper is there."""

    def _watch(self) -> None:
        since: float | None = None
        while True:
            time.sleep(LOOK_EVERY_S)
            try:
                if living(self.name):
                    since = None
                    continue
                since = since or time.monotonic()
                if time.monotonic() - since >= self.linger_s:
                    log.warning("teacher %s: its users crashed and none resumed; it is taken down", self.name)
                    _take_down(self.name, KEEPER + self.name)  # and this keeper with it
            except Exception as error:  # noqa: BLE001 (a controller that is being replaced: look again)
                log.warning("teacher %s: its keeper will look again: %s", self.name, error)


def _keep(name: str, linger_s: float) -> None:
    """Start the keeper, where the head node is: that is not the one that is lost."""
    keeper = Keeper.options(
        name=KEEPER + name,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        resources={"node:__internal_head__": 0.001},
    ).remote(name, linger_s)
    ray.get(keeper.ready.remote())
