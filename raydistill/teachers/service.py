"""The teacher service: a Ray Serve deployment whose replicas are ZeRO-3 groups.

A replica is one placement group: this coordinator and `shards` ranks. The coordinator never touches the tensors of a
request; it passes the reference on to every rank and joins their answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import serve
from ray.exceptions import ActorDiedError, ObjectLostError, RayActorError
from ray.serve.config import RequestRouterConfig
from ray.serve.schema import ApplicationStatusOverview
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raydistill.config.schema import TeacherServiceConfig
from raydistill.teachers import placement
from raydistill.teachers.fair_queue import FairQueue
from raydistill.teachers.request import Answer, ReplicaBroken, RequestTooLong, TeacherError, TeacherStartError, one_line
from raydistill.teachers.routing import LeastBusyRouter
from raydistill.teachers.shard import TeacherRank, actor
from raydistill.teachers.utilisation import Meter, Utilisation

log = logging.getLogger(__name__)

HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 1.0, 60.0
PING_TIMEOUT_S = 30.0  # below HEALTH_TIMEOUT_S, so that the replica itself names the silent rank
STRAGGLER_S = 30.0  # once one rank has failed, how long the others may take to answer
# Per replica, more than anybody asks at once: they run one by one and wait in the replica, which shares its time fairly;
# what waited in the callers' routers would be let in by chance.
ONGOING_REQUESTS = 1000
LOG_EVERY_S, PLACEMENT_PATIENCE_S = 10.0, 60.0


class _Gauges:
    """A replica's load on Ray's Prometheus endpoint; Serve adds the replica's name to each."""

    def __init__(self) -> None:
        from ray.serve import metrics

        boundaries = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300]
        self._latency = metrics.Histogram(
            "raydistill_teacher_latency_s", description="wait and work of a request", boundaries=boundaries
        )
        self._busy = metrics.Gauge("raydistill_teacher_busy_fraction", description="of the last minute")
        self._queue = metrics.Gauge("raydistill_teacher_queue", description="requests that wait for their turn")

    def answered(self, load: Utilisation) -> None:
        self._latency.observe(load.latency_s)

    def show(self, busy_fraction: float, queue: int) -> None:
        self._busy.set(busy_fraction)
        self._queue.set(queue)


@serve.deployment(
    max_ongoing_requests=ONGOING_REQUESTS,
    request_router_config=RequestRouterConfig(request_router_class=LeastBusyRouter),
    health_check_period_s=HEALTH_PERIOD_S,
    health_check_timeout_s=HEALTH_TIMEOUT_S,
    graceful_shutdown_wait_loop_s=0.2,
    graceful_shutdown_timeout_s=20,
    max_constructor_retry_count=2,
    logging_config={"log_level": "WARNING", "enable_access_log": False},
)
class TeacherReplica:
    """Coordinator of one ZeRO-3 group. Losing any rank ends the whole group; Serve starts another."""

    rank_actor = actor(TeacherRank)

    async def __init__(self, model_folder: str, config: dict[str, Any]) -> None:
        self._config = config = TeacherServiceConfig.model_validate(config)
        self._broken: str | None = None
        self._turns = FairQueue()
        self._meter, self._gauges = Meter(), _Gauges()
        group = ray.util.get_current_placement_group()
        environment = {
            "DS_ACCELERATOR": "cuda" if config.gpus_per_rank else "cpu",
            "OMP_NUM_THREADS": str(config.threads_per_rank),
            "MKL_NUM_THREADS": str(config.threads_per_rank),
        }
        self._ranks = [
            self.rank_actor.options(
                num_cpus=config.cpus_per_rank,
                num_gpus=config.gpus_per_rank,
                runtime_env={"env_vars": environment},
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank + 1),
            ).remote(rank, config.shards)
            for rank in range(config.shards)
        ]
        address = await self._ranks[0].open_store.remote()
        load = (model_folder, config.dtype, config.slice, config.threads_per_rank, address)
        await asyncio.gather(*(rank.load.remote(*load) for rank in self._ranks))

    async def predict_x0(self, payload: list[ray.ObjectRef], place: float | None = None) -> Answer:
        """x0 estimates [B, C, H, W] float32.

        Args:
            payload: its reference; in a list, so that it is not fetched here.
            place: read by the caller's router.
        """
        return await self._answer("predict_x0", payload[0])

    async def sample(self, payload: list[ray.ObjectRef], place: float | None = None) -> Answer:
        """Multi-step samples [B, C, H, W] float32. Arguments as in `predict_x0`."""
        return await self._answer("sample", payload[0])

    async def describe(self) -> list[dict[str, Any]]:
        """What each rank says of itself."""
        return await asyncio.gather(*(rank.describe.remote() for rank in self._ranks))

    async def check_health(self) -> None:
        """Called by Serve every HEALTH_PERIOD_S; raises once a rank is lost or silent."""
        self._gauges.show(self._meter.busy_fraction(), self._turns.waiting)
        if self._broken is None:
            try:
                await asyncio.wait_for(self.describe(), PING_TIMEOUT_S)
            except Exception as error:
                self._give_up(f"a rank does not answer pings ({type(error).__name__})")
        if self._broken is not None:
            raise ReplicaBroken(self._broken)

    async def _answer(self, method: str, payload: ray.ObjectRef) -> Answer:
        """Failures are answers too: raised ones would only fill Serve's log with tracebacks."""
        arrived = time.monotonic()
        await self._turns.take(payload.job_id().hex())  # the run that asks; if it goes away now, nothing is computed
        work = asyncio.ensure_future(self._in_turn(method, payload, arrived))
        try:
            return "done", *await asyncio.shield(work)  # a caller that goes away does not stop the ranks
        except TeacherError as error:
            return "rejected", str(error), None
        except RequestTooLong as error:
            return "late", str(error), None
        except ReplicaBroken as error:
            return "broken", str(error), None

    async def _in_turn(self, method: str, payload: ray.ObjectRef, arrived: float) -> tuple[np.ndarray, Utilisation]:
        """Work on a request that has its turn, and end the turn. The order of requests is the same on every rank."""
        try:
            answer = await self._fan_out(method, payload)
            load = self._meter.load(arrived, self._turns.waiting)
        finally:
            self._turns.pass_on()
        self._gauges.answered(load)
        return answer, load

    async def _fan_out(self, method: str, payload: ray.ObjectRef) -> np.ndarray:
        """One request to all ranks."""
        if self._broken is not None:
            raise ReplicaBroken(self._broken)
        with self._meter.work():
            answers = [asyncio.wrap_future(getattr(r, method).remote(payload).future()) for r in self._ranks]
            done, pending = await asyncio.wait(
                answers, timeout=self._config.request_timeout_s, return_when=asyncio.FIRST_EXCEPTION
            )
        failed = any(answer.exception() for answer in done)
        if failed and pending:
            _, pending = await asyncio.wait(pending, timeout=STRAGGLER_S)
        errors = [answer.exception() if answer.done() else None for answer in answers]
        if _blame_the_request(errors):
            await self._recover()
        self._judge(errors, len(pending), failed)
        if self._broken is not None:
            raise ReplicaBroken(self._broken)
        parts = [answer.result() for answer in answers]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    async def _recover(self) -> None:
        """Make all ranks ready for the next request after one that they all refused."""
        answers = [asyncio.wrap_future(rank.recover.remote().future()) for rank in self._ranks]
        _, pending = await asyncio.wait(answers, timeout=STRAGGLER_S)
        if pending or any(answer.exception() for answer in answers):
            self._give_up("ranks did not come together again after a refused request")

    def _judge(self, errors: list[BaseException | None], silent: int, failed: bool) -> None:
        """Ranks that all refuse, or cannot get it, blame the request (raises TeacherError); other failures are the group's.

        Raises RequestTooLong if the group is given up because of this request's time alone.
        """
        first = next((error for error in errors if error is not None), None)
        said = f": {one_line(first)}" if first is not None else ""
        if silent and not failed:
            limit = f"teachers.request_timeout_s={self._config.request_timeout_s:g} s"
            late = f"{silent} of {len(errors)} ranks did not answer within {limit}"
            self._give_up(late)
            raise RequestTooLong(late)
        if silent:
            self._give_up(f"{silent} of {len(errors)} ranks did not answer after another failed{said}")
        elif _blame_the_request(errors):
            lost = f"the request was lost with the process that sent it{said}"
            raise TeacherError(lost if _is_lost(first) else str(getattr(first, "cause", first)))
        elif first is not None:
            lost = any(isinstance(error, RayActorError) for error in errors)
            self._give_up(f"{'a rank died' if lost else 'ranks failed differently'}{said}")

    def _give_up(self, reason: str) -> None:
        """Mark the replica broken and end its ranks; the next health checks fail, and Serve replaces it."""
        if self._broken is None:
            self._broken = reason
            log.warning("teacher replica gives up: %s", reason)
            self._kill_ranks()

    def _kill_ranks(self) -> None:
        for rank in getattr(self, "_ranks", ()):
            ray.kill(rank)

    def __del__(self) -> None:
        """Serve calls this when it stops the replica."""
        self._kill_ranks()


def _blame_the_request(errors: list[BaseException | None]) -> bool:
    return all(isinstance(error, TeacherError) or _is_lost(error) for error in errors)


def _is_lost(error: BaseException | None) -> bool:
    """Whether a rank could not get the payload, as when the process or node that sent it is no more."""
    return isinstance(getattr(error, "cause", error), ObjectLostError)


def start(model_folder: str, config: TeacherServiceConfig, name: str, replica: type | None = None) -> None:
    """Start the service `name` and wait until every replica is ready. A running service of that name is replaced.

    Args:
        replica: another class of replica; None: TeacherReplica.

    Raises:
        TeacherStartError: it cannot be placed (requested against available resources), a replica failed to load, or
            `start_timeout_s` passed. Nothing is left running.
    """
    launch(model_folder, config, name, replica)
    wait_until_ready(config, name)


def launch(model_folder: str, config: TeacherServiceConfig, name: str, replica: type | None = None) -> None:
    """First half of `start`: check that the service can be placed and begin to start it. Raises TeacherStartError."""
    if not Path(model_folder, "model_index.json").is_file():
        raise TeacherStartError(f"teacher {name}: {model_folder} is not a diffusers folder (no model_index.json)")
    if config.shards > 1 and config.gpus_per_rank != int(config.gpus_per_rank):
        raise TeacherStartError(f"teachers.gpus_per_rank={config.gpus_per_rank}: NCCL needs a whole GPU for each rank")
    if not placement.fits(config) and not placement.autoscaler_present():
        raise TeacherStartError(f"teacher {name} cannot be placed: {placement.requested_against_available(config)}")
    selectors = placement.label_selectors(config)
    application = TeacherReplica.options(
        **_scale(config),
        **({} if replica is None else {"func_or_class": replica}),
        ray_actor_options={"num_cpus": placement.COORDINATOR_CPUS},
        placement_group_bundles=placement.bundles(config),
        placement_group_strategy="PACK",
        **({"placement_group_bundle_label_selector": selectors} if selectors else {}),
    ).bind(str(Path(model_folder).resolve()), config.model_dump())
    applications()  # after which this process knows the controller that runs now
    try:
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
        target = serve.RunTarget(application, name=name, route_prefix=None)
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    except BaseException:
        stop(name)
        raise


def _scale(config: TeacherServiceConfig) -> dict[str, Any]:
    """A fixed number of replicas, or bounds between which Serve follows the ongoing requests."""
    if config.max_replicas is None:
        return {"num_replicas": config.replicas}
    return {
        # a replica that is not needed any more answers what it was asked
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

    Another driver may have shut Serve down since this one last asked, and even started it again: this process then still
    knows the dead controller.
    """
    try:
        return serve.status().applications
    except ActorDiedError:
        serve.shutdown()  # forgets the dead controller; it can reach no other
        return serve.status().applications


def exists(name: str) -> bool:
    """Whether there is a service `name` that Serve has not given up."""
    application = applications().get(name)
    return application is not None and application.status not in ("DEPLOY_FAILED", "DELETING")


def wait_until_ready(
    config: TeacherServiceConfig, name: str, patient: bool = False, given_up: threading.Event | None = None
) -> None:
    """Second half of `start`. Raises TeacherStartError, with nothing left running.

    Args:
        patient: a service of another run; it is left alone.
        given_up: once set, it is not waited for any longer.
    """
    started = logged = pending_since = time.monotonic()
    given_up = given_up or threading.Event()
    patience = config.start_timeout_s if placement.autoscaler_present() else PLACEMENT_PATIENCE_S
    try:
        while (state := _state(name)) != "RUNNING":
            if given_up.wait(0.2):
                raise TeacherStartError(f"teacher {name} is not needed any more")
            now = time.monotonic()
            waiting = placement.pending_groups(name)
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
    except BaseException:
        if not patient:
            stop(name)
        raise
    log.info("teacher %s: %d replica(s) ready after %.1f s", name, config.replicas, time.monotonic() - started)


def _state(name: str) -> str:
    """Serve's word for the service `name`. Raises TeacherStartError once Serve gave it up."""
    application = applications().get(name)
    if application is None:
        raise TeacherStartError(f"teacher {name} was removed while it started")
    if application.status == "DEPLOY_FAILED":
        details = "\n".join(deployment.message for deployment in application.deployments.values())
        log.error("teacher %s failed to start:\n%s", name, details or application.message)
        raise TeacherStartError(f"teacher {name} failed to start: {(details or application.message).splitlines()[-1]}")
    return application.status.value


def stop(name: str, only: bool = True) -> None:
    """Stop the service `name`, if it runs; the last one takes Serve's own actors with it.

    Args:
        only: nobody is about to start another one; if somebody is, Serve stays.

    Raises:
        TimeoutError: its replicas still end their last requests after a minute.
    """
    with contextlib.suppress(ActorDiedError):  # another driver stopped the last one at the same time
        if name in applications():
            serve.delete(name)
        if only and not applications():
            serve.shutdown()
    deadline = time.monotonic() + 20
    while placement.groups(name) and time.monotonic() < deadline:
        time.sleep(0.1)
