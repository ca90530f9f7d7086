"""Start, watch and stop a teacher service: a Ray Serve application of replicas (`replica.py`)."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import ActorDiedError
from ray.serve.schema import ApplicationStatusOverview

from raydistill.config.networks import TeacherServiceConfig
from raydistill.teachers import placement
from raydistill.teachers.replica import TeacherReplica
from raydistill.teachers.request import TeacherStartError

log = logging.getLogger(__name__)

LOG_EVERY_S = 10.0
PLACEMENT_PATIENCE_S = 60.0  # how long replicas may wait for resources where no node can be added
GROUPS_END_S = 20.0  # how long placement groups may take to go after their service


def start(
    model_folder: str,
    config: TeacherServiceConfig,
    name: str,
    replica: type | None = None,
    network: Mapping[str, str] | None = None,
) -> None:
    """Start the service `name` and wait until every replica is ready. A running service of that name is replaced.

    Args:
        replica: another class of replica; None: TeacherReplica.
        network: variables of the ranks' environment by which they find each other (NCCL_SOCKET_IFNAME).

    Raises:
        TeacherStartError: it cannot be placed (requested against available resources), a replica failed to load, or
            `start_timeout_s` passed. Nothing is left running.
    """
    try:
        launch(model_folder, config, name, replica, network)
        wait_until_ready(config, name)
    except BaseException:
        stop(name)
        raise


def launch(
    model_folder: str,
    config: TeacherServiceConfig,
    name: str,
    replica: type | None = None,
    network: Mapping[str, str] | None = None,
) -> None:
    """Check that the service can be placed, and begin to start it. If this fails, the caller calls `stop`.

    Raises TeacherStartError: see `start`.
    """
    if not Path(model_folder, "model_index.json").is_file():
        raise TeacherStartError(f"teacher {name}: {model_folder} is not a diffusers folder (no model_index.json)")
    if config.shards > 1 and not config.plain and config.gpus_per_rank != int(config.gpus_per_rank):
        raise TeacherStartError(f"teachers.gpus_per_rank={config.gpus_per_rank}: NCCL needs a whole GPU for each rank")
    if not placement.fits(config) and not placement.autoscaler_present():
        raise TeacherStartError(f"teacher {name} cannot be placed: {placement.requested_against_available(config)}")
    selectors = placement.label_selectors(config)
    application = TeacherReplica.options(
        **_scale(config),
        **({} if replica is None else {"func_or_class": replica}),
        ray_actor_options={"num_cpus": placement.COORDINATOR_CPUS},
        placement_group_bundles=placement.bundles(config),
        placement_group_strategy=placement.strategy(config),
        **({"placement_group_bundle_label_selector": selectors} if selectors else {}),
    ).bind(str(Path(model_folder).resolve()), config.model_dump(), dict(network or {}))
    applications()  # forgets a dead controller
    serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
    target = serve.RunTarget(application, name=name, route_prefix=None)
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def _scale(config: TeacherServiceConfig) -> dict[str, Any]:
    """Serve's options for a fixed number of replicas, or for bounds within which it follows the ongoing requests."""
    if config.max_replicas is None:
        return {"num_replicas": config.replicas}
    return {
        # A replica that leaves first answers the requests that it has.
        "graceful_shutdown_timeout_s": config.request_timeout_s,
        "autoscaling_config": {
            "initial_replicas": config.replicas,
            "min_replicas": config.min_replicas or config.replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.target_ongoing_requests,
            "upscale_delay_s": config.upscale_delay_s,
            "downscale_delay_s": config.downscale_delay_s,
        },
    }


def applications() -> dict[str, ApplicationStatusOverview]:
    """Serve's applications on this cluster; none if Serve does not run.

    Another process may have shut Serve down since the last call, and started it again. This process then still knows the
    dead controller, and must forget it first.
    """
    try:
        return serve.status().applications
    except ActorDiedError:
        serve.shutdown()  # only forgets the dead controller
        return serve.status().applications


def exists(name: str) -> bool:
    """Whether Serve has an application `name` that it has neither failed to deploy nor begun to delete."""
    application = applications().get(name)
    return application is not None and application.status not in ("DEPLOY_FAILED", "DELETING")


def wait_until_ready(config: TeacherServiceConfig, name: str, given_up: threading.Event | None = None) -> None:
    """Wait until the service runs. If this fails, the service stays as it is.

    Args:
        given_up: another thread sets it to end the wait.

    Raises:
        TeacherStartError: see `start`; or `given_up` was set.
    """
    started = logged = pending_since = time.monotonic()
    given_up = given_up or threading.Event()
    patience = config.start_timeout_s if placement.autoscaler_present() else PLACEMENT_PATIENCE_S
    while (state := _state(name)) != "RUNNING":
        if given_up.wait(0.2):
            raise TeacherStartError(f"teacher {name} is not needed any more")
        now = time.monotonic()
        waiting = sum(group in ("PENDING", "RESCHEDULING") for group in placement.groups(name))
        pending_since = pending_since if waiting else now
        if now - pending_since > patience or now - started > config.start_timeout_s:
            why = f"{waiting} replica(s) wait for resources" if waiting else f"state {state}"
            raise TeacherStartError(
                f"teacher {name} is not ready after {now - started:.0f} s (teachers.start_timeout_s="
                f"{config.start_timeout_s:g}): {why}; {placement.requested_against_available(config)}"
            )
        if now - logged > LOG_EVERY_S:
            logged = now
            why = f"{waiting} replica(s) wait for resources" if waiting else "loading"
            log.info("teacher %s: starting, %.0f s so far, %s", name, now - started, why)
    log.info("teacher %s: %d replica(s) ready after %.1f s", name, config.replicas, time.monotonic() - started)


def _state(name: str) -> str:
    """Serve's status of the application `name`. Raises TeacherStartError if it is gone or failed to deploy."""
    application = applications().get(name)
    if application is None:
        raise TeacherStartError(f"teacher {name} was removed while it started")
    if application.status == "DEPLOY_FAILED":
        details = "\n".join(deployment.message for deployment in application.deployments.values())
        log.error("teacher %s failed to start:\n%s", name, details or application.message)
        raise TeacherStartError(f"teacher {name} failed to start: {(details or application.message).splitlines()[-1]}")
    return application.status.value


def stop(name: str, with_serve: bool = True) -> None:
    """Stop the service `name`, if it runs, and wait until its placement groups are gone.

    Args:
        with_serve: shut Serve down too if this was its last application. False: another one is about to start.

    Raises:
        TimeoutError: after a minute its replicas still work on their last requests.
    """
    with contextlib.suppress(ActorDiedError):  # another process shut Serve down at the same time
        if name in applications():
            serve.delete(name)
        if with_serve and not applications():
            serve.shutdown()
    deadline = time.monotonic() + GROUPS_END_S
    while placement.groups(name) and time.monotonic() < deadline:
        time.sleep(0.1)
