"""Which runs use a teacher service. The last user takes it down; a crashed user does not.

The registry is one actor on the head node. It outlives the drivers, which report to it when they start, attach and
release. It handles one report at a time. So a run that arrives during a take-down waits, and launches a new service then.

The registry saves its state in the cluster's key-value store before it acts. Ray restarts it after a crash, and it goes on
from there. It ends itself once it knows no service.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
from ray.serve.exceptions import RayServeException

import raydistill
from raydistill.config.networks import TeacherServiceConfig
from raydistill.spaces import load_space
from raydistill.storage.fingerprint import fingerprint
from raydistill.teachers import service
from raydistill.teachers.request import TeacherStartError, one_line

log = logging.getLogger(__name__)

NAMESPACE, NAME = "raydistill-teachers", "registry"  # of the actor
STATE = "records"  # the key of its state in the key-value store
LOOK_EVERY_S = 2.0  # how often it looks for crashed users
IDLE_S = 5.0  # how long it stays without a service
RESTART_S = 60.0  # how long a driver waits for a registry that fails again and again
LAUNCH, TAKE_OVER, WAIT = "launch", "take over", "wait"  # what a driver does that starts a service
# They decide the bits of an answer.
SETTINGS_OF_SCORES = (
    "dtype",
    "slice",
    "shards",
    "threads_per_rank",
    "backend",
    "compile",
    "channels_last",
    "attention",
    "quantize",
)
# They do not change the service itself.
SETTINGS_OF_CLIENTS = {"service", "linger_s", "start_timeout_s", "retry_for_s"}


# -- what drivers and their workers call ------------------------------------------------------------------


def start(
    model_folder: str,
    config: TeacherServiceConfig,
    name: str,
    given_up: threading.Event | None = None,
    network: Mapping[str, str] | None = None,
) -> None:
    """As `service.start`, for this driver. An equal service that already runs is taken over, whatever its network.

    Args:
        given_up: the caller sets it when it no longer needs the service; the start then fails.

    Raises:
        TeacherStartError: see `service.start`; or living runs use another service of this name.
    """
    identity = identify(model_folder, config)
    given_up = given_up or threading.Event()
    with _using(name, take_down=True):
        deadline = time.monotonic() + config.start_timeout_s
        while (role := _call("start", name, _job(), identity, config.linger_s)) == WAIT:
            if given_up.wait(0.2):
                raise TeacherStartError(f"teacher {name} is not needed any more")
            if time.monotonic() > deadline:
                holders = ", ".join(sorted(living(name)))
                raise TeacherStartError(
                    f"teacher {name}: the Ray job {holders} uses this name and has no service; it did not start one "
                    f"within {config.start_timeout_s:g} s (teachers.start_timeout_s). Stop it, or choose another run.name"
                )
        if role == LAUNCH:
            service.launch(model_folder, config, name, network=network)
        else:
            log.info("teacher %s: found running, taken over", name)
        service.wait_until_ready(config, name, given_up)
        _call("set_ready", name, _job())


def attach(model_folder: str, config: TeacherServiceConfig, name: str, given_up: threading.Event | None = None) -> None:
    """Use the running service `name` that another run started. `given_up`: see `start`.

    Raises TeacherStartError: there is none, or it is another teacher, or its settings would change the answers.
    """
    identity = identify(model_folder, config)
    with _using(name, take_down=False):
        _call("attach", name, _job(), identity)
        service.wait_until_ready(config, name, given_up)
        _call("set_ready", name, _job())


def release(name: str) -> None:
    """End this driver's use of the service. The service stops if no other living driver uses it.

    A service may fail to stop, for example while its replicas still work. The registry then tries again: the run has done
    its work and must not fail.
    """
    _leave(name, take_down=True)


def ready(name: str) -> bool:
    """Whether this driver has started or attached, and not released. For the driver and its workers."""
    return _exists() and _call("is_ready", name, _job())


def living(name: str) -> set[str]:
    """Ray jobs that use the service and have not ended."""
    return _call("living", name) if _exists() else set()


def services() -> list[str]:
    """Names of the services that drivers of this cluster started."""
    return _call("names") if _exists() else []


@contextlib.contextmanager
def _using(name: str, take_down: bool) -> Iterator[None]:
    """If the block fails, this driver leaves the service, and Ray's errors become TeacherStartError.

    Args:
        take_down: stop the service if nobody else uses it; False: it waits for its crashed users.
    """
    try:
        yield
    except BaseException as error:
        _leave(name, take_down)
        if isinstance(error, RayError | RayServeException):
            raise TeacherStartError(f"teacher {name}: {one_line(error)}") from error
        raise


def _leave(name: str, take_down: bool) -> None:
    try:
        _call("leave", name, _job(), take_down)
    except (RayError, RayServeException, TimeoutError) as error:
        log.warning("teacher %s: not stopped yet, the registry will try again: %s", name, one_line(error))


def _job() -> str:
    return ray.get_runtime_context().get_job_id()


def _exists() -> bool:
    try:
        ray.get_actor(NAME, namespace=NAMESPACE)
    except ValueError:
        return False
    return True


def _call(method: str, *arguments: Any) -> Any:
    """Call the registry, which starts if there is none. Raises what the method raises.

    A call may run twice, because the registry may die after it has acted. All methods allow for that.
    """
    first_failure = None
    while True:
        try:
            answer = getattr(_registry(), method).remote(*arguments)
            while not ray.wait([answer], timeout=service.LOG_EVERY_S)[0]:
                log.info("waiting for the registry of teacher services, which takes one down")
            return ray.get(answer)
        except RayTaskError as error:
            raise getattr(error, "cause", error) from None
        except RayActorError:  # it has just ended itself, or crashed
            first_failure = first_failure or time.monotonic()
            if time.monotonic() - first_failure > RESTART_S:
                raise
            time.sleep(0.1)


def _registry() -> Any:
    """The actor. It runs on the head node: other nodes may be lost while the cluster lives."""
    return Registry.options(
        name=NAME,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        resources={"node:__internal_head__": 0.001},
    ).remote()


# -- the actor --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """What the registry knows of one service."""

    identity: dict[str, Any]  # see `identify`
    linger_s: float  # how long it waits for crashed users
    users: tuple[str, ...] = ()  # Ray jobs that have not left; some may have crashed
    ready: tuple[str, ...] = ()  # of these, those whose start or attach has ended
    ending: bool = False  # its take-down has begun

    def joined_by(self, job: str) -> Record:
        return replace(self, users=tuple({*self.users, job}), ending=False)

    def left_by(self, job: str) -> Record:
        users, ready = (tuple(other for other in jobs if other != job) for jobs in (self.users, self.ready))
        return replace(self, users=users, ready=ready)


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, concurrency_groups={"queries": 1})
class Registry:
    """Users of all teacher services. It alone takes services down.

    Reports run one after another, queries at any time. `_records` is replaced whole, so a query sees one moment.
    """

    def __init__(self) -> None:
        saved = _internal_kv_get(STATE, namespace=NAMESPACE)
        self._records = {name: Record(**fields) for name, fields in json.loads(saved or "{}").items()}
        self._unused_since: dict[str, float] = {}  # services without a living user
        self._idle_since: float | None = None
        self._lock = threading.Lock()  # of reports and the watch
        for name, record in list(self._records.items()):
            if record.ending:  # a crash interrupted this take-down; newcomers wait until it is over
                self._try_take_down(name)
        threading.Thread(target=self._watch, daemon=True).start()

    # Reports

    def start(self, name: str, job: str, identity: dict[str, Any], linger_s: float) -> str:
        """Make `job` a user, and say what it must do. Raises TeacherStartError: see `registry.start`."""
        with self._lock:
            record, others = self._records.get(name), self.living(name) - {job}
            same = record is not None and record.identity == identity
            if same and service.exists(name):
                self._save(name, replace(record.joined_by(job), linger_s=linger_s))
                return TAKE_OVER
            if same and others:
                return WAIT  # another user is about to launch it, or has lost it and is about to leave
            if others:
                raise TeacherStartError(
                    f"run.name: a living run on this cluster (Ray job {', '.join(sorted(others))}) has teachers of the "
                    f"name {name} with another model or other settings; choose another run.name"
                )
            self._save(name, Record(identity, linger_s).joined_by(job))
            return LAUNCH

    def attach(self, name: str, job: str, identity: dict[str, Any]) -> None:
        """Make `job` a user of a service that runs. Raises TeacherStartError: see `registry.attach`."""
        with self._lock:
            record = self._records.get(name)
            if record is None or not service.exists(name):
                raise TeacherStartError(
                    f"teachers.service: there is no teacher service {name!r} on this cluster; services: "
                    f"{', '.join(self.names()) or 'none'}. teachers.service=null starts one"
                )
            if found := differences(record.identity, identity):
                raise TeacherStartError(f"teachers.service: {name} is not this run's teacher: {'; '.join(found)}")
            self._save(name, record.joined_by(job))

    def set_ready(self, name: str, job: str) -> None:
        """The start or attach of `job` has ended well."""
        with self._lock:
            record = self._records.get(name)
            if record is None:
                raise TeacherStartError(f"teacher {name} was stopped while this run started to use it")
            self._save(name, replace(record, ready=tuple({*record.ready, job})))

    def leave(self, name: str, job: str, take_down: bool) -> None:
        """End the use by `job`; with `take_down`, stop the service if that was the last living user."""
        with self._lock:
            record = self._records.get(name)
            if record is None or job not in record.users:
                return
            left = record.left_by(job)
            ending = take_down and not set(left.users) - _dead_jobs()
            self._save(name, replace(left, ending=ending))  # at once, or a crash in between would leave it to linger
            if ending:
                self._take_down(name)

    # Queries

    @ray.method(concurrency_group="queries")
    def is_ready(self, name: str, job: str) -> bool:
        record = self._records.get(name)
        return record is not None and job in record.ready

    @ray.method(concurrency_group="queries")
    def living(self, name: str) -> set[str]:
        record = self._records.get(name)
        return set(record.users) - _dead_jobs() if record else set()

    @ray.method(concurrency_group="queries")
    def names(self) -> list[str]:
        return sorted(self._records)

    # The rest is the registry's own

    def _save(self, name: str, changed: Record | None) -> None:
        """Change what is known of one service, first where it outlives this process. None: forget it."""
        records = {other: record for other, record in self._records.items() if other != name}
        if changed is not None:
            records[name] = changed
        state = {other: asdict(record) for other, record in records.items()}
        _internal_kv_put(STATE, json.dumps(state), namespace=NAMESPACE)
        self._records = records

    def _take_down(self, name: str) -> None:
        """Stop a service and forget it. Serve itself stays if another service has users: they may be about to launch it."""
        self._save(name, replace(self._records[name], ending=True))
        others = any(self.living(other) for other in self._records if other != name)
        service.stop(name, with_serve=not others)
        self._save(name, None)

    def _try_take_down(self, name: str) -> None:
        try:
            self._take_down(name)
        except Exception as error:  # noqa: BLE001 (Serve's controller may be restarting: the watch tries again)
            log.warning("teacher %s: not stopped yet, the registry will try again: %s", name, one_line(error))

    def _watch(self) -> None:
        """Take down what nobody uses, for as long as the registry lives."""
        while True:
            time.sleep(LOOK_EVERY_S)
            try:
                with self._lock:
                    self._look()
            except Exception as error:  # noqa: BLE001 (the key-value store may be away: look again)
                log.warning("the registry of teacher services will look again: %s", one_line(error))

    def _look(self) -> None:
        now = time.monotonic()
        unused = [name for name in self._records if not self.living(name)]
        self._unused_since = {name: self._unused_since.get(name, now) for name in unused}
        for name in unused:
            record = self._records[name]
            if record.ending:
                self._try_take_down(name)
            elif now - self._unused_since[name] >= record.linger_s:
                log.warning("teacher %s: its users crashed and none resumed; it is taken down", name)
                self._try_take_down(name)
        self._idle_since = None if self._records else self._idle_since or now
        if self._idle_since is not None and now - self._idle_since > IDLE_S:
            ray.kill(ray.get_actor(NAME, namespace=NAMESPACE))
            time.sleep(RESTART_S)  # with the lock: nothing may be reported to this process any more


def _dead_jobs() -> set[str]:
    return {job["JobID"] for job in ray._private.state.jobs() if job["IsDead"]}


# -- what a service computes: two runs share it only if this agrees ----------------------------------------


def identify(model_folder: str, config: TeacherServiceConfig) -> dict[str, Any]:
    """Folder, fingerprint, settings and version of a teacher service, as JSON types."""
    folder = Path(model_folder).resolve()
    return {
        "folder": str(folder),
        "fingerprint": fingerprint(folder, load_space(folder).unused_parts),
        "config": config.model_dump(exclude=SETTINGS_OF_CLIENTS) | {"backend": config.decided_backend},
        "version": raydistill.__version__,
    }


def differences(running: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Why the answers of a running service are not those of the wanted one; empty: they are the same bits."""
    found = []
    if running["fingerprint"] != wanted["fingerprint"]:
        found.append(f"its model is {running['folder']}, and {wanted['folder']} is another one (teacher.model)")
    for key in SETTINGS_OF_SCORES:
        has, wants = running["config"][key], wanted["config"][key]
        if has != wants:
            found.append(f"teachers.{key}: it runs with {has!r}, not {wants!r}")
    return found
