"""A replica of the teacher service: the coordinator of its ranks, as a Ray Serve deployment.

A replica is one placement group: this coordinator and `shards` ranks. The coordinator never reads the tensors of a
request. It passes their reference to every rank, and joins the answers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import ray
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError
from ray.serve import metrics
from ray.serve.config import RequestRouterConfig
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raydistill.config.networks import TeacherServiceConfig
from raydistill.teachers.fair_queue import FairQueue
from raydistill.teachers.request import Answer, RankBroken, ReplicaBroken, RequestTooLong, TeacherError, one_line
from raydistill.teachers.routing import LeastBusyRouter
from raydistill.teachers.shard import TeacherRank, actor
from raydistill.teachers.utilisation import Meter, Utilisation

log = logging.getLogger(__name__)

HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 1.0, 60.0
PING_TIMEOUT_S = 30.0  # below HEALTH_TIMEOUT_S, so that the replica itself names the silent rank
STRAGGLER_S = 30.0  # how long the other ranks may take to answer after one has failed
# More than all callers ask of a replica at once. Requests wait in the replica, which shares its time fairly.
# Those that wait in the callers' routers would be admitted at random.
ONGOING_REQUESTS = 1000
LATENCY_BOUNDARIES_S = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300]


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
    """Coordinator of its ranks, a ZeRO-3 group or whole teachers side by side. The loss of one rank ends the whole group, and Serve starts another replica."""

    rank_actor = actor(TeacherRank)

    async def __init__(
        self, model_folder: str, config: dict[str, Any], network: Mapping[str, str] | None = None
    ) -> None:
        """`network`: variables of its ranks' environment by which they find each other."""
        self._config = config = TeacherServiceConfig.model_validate(config)
        self._broken: str | None = None
        self._queue = FairQueue()
        self._meter = Meter()
        # Its load on Ray's Prometheus endpoint. Serve adds the replica's name to each metric.
        self._shown_latency = metrics.Histogram(
            "raydistill_teacher_latency_s", description="wait and work of a request", boundaries=LATENCY_BOUNDARIES_S
        )
        self._shown_busy = metrics.Gauge("raydistill_teacher_busy_fraction", description="of the last minute")
        self._shown_queue = metrics.Gauge("raydistill_teacher_queue", description="requests that wait for their turn")
        group = ray.util.get_current_placement_group()
        me = serve.get_replica_context().replica_id
        name = f"{me.deployment_id.app_name}/{me.unique_id}"
        environment = {
            "DS_ACCELERATOR": "cuda" if config.gpus_per_rank else "cpu",
            "OMP_NUM_THREADS": str(config.threads_per_rank),
            "MKL_NUM_THREADS": str(config.threads_per_rank),
            **(network or {}),
        }
        self._ranks = [
            self.rank_actor.options(
                num_cpus=config.cpus_per_rank,
                num_gpus=config.gpus_per_rank,
                runtime_env={"env_vars": environment},
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank + 1),
            ).remote(rank, config.shards, name, config)
            for rank in range(config.shards)
        ]
        address = None if config.plain else await self._ranks[0].open_store.remote()
        await asyncio.gather(*(rank.load.remote(model_folder, config, address) for rank in self._ranks))

    async def predict_x0(self, payload: list[ray.ObjectRef], place: float | None = None) -> Answer:
        """x0 estimates [B, C, H, W] float32.

        Args:
            payload: the reference to it. The list around it keeps Ray from fetching it here.
            place: for the caller's router alone.
        """
        return await self._answer("predict_x0", payload)

    async def sample(self, payload: list[ray.ObjectRef], place: float | None = None) -> Answer:
        """Multi-step samples [B, C, H, W] float32. Arguments as in `predict_x0`."""
        return await self._answer("sample", payload)

    async def describe(self) -> list[dict[str, Any]]:
        """Facts about each rank, see `TeacherRank.describe`."""
        return await asyncio.gather(*(rank.describe.remote() for rank in self._ranks))

    async def check_health(self) -> None:
        """Serve calls this every HEALTH_PERIOD_S. Raises ReplicaBroken once a rank is lost or silent."""
        self._shown_busy.set(self._meter.busy_fraction())
        self._shown_queue.set(self._queue.waiting)
        if self._broken is None:
            try:
                await asyncio.wait_for(self.describe(), PING_TIMEOUT_S)
            except Exception as error:
                self._give_up(f"a rank does not answer pings ({type(error).__name__})")
        if self._broken is not None:
            raise ReplicaBroken(self._broken)

    async def _answer(self, method: str, given: Any) -> Answer:
        """Work on a request. Failures are answers too: exceptions would fill Serve's log with tracebacks."""
        if not (isinstance(given, list) and len(given) == 1 and isinstance(given[0], ray.ObjectRef)):
            return "rejected", f"a request is a list of one reference, not {type(given).__name__}", None
        payload, arrived = given[0], time.monotonic()
        await self._queue.acquire(payload.job_id().hex())  # of its owner; a cancelled request ends here
        work = asyncio.ensure_future(self._work(method, payload, arrived))
        try:
            return "done", *await asyncio.shield(work)  # a caller that goes away now does not stop the ranks
        except TeacherError as error:
            return "rejected", str(error), None
        except RequestTooLong as error:
            return "late", str(error), None
        except ReplicaBroken as error:
            return "broken", str(error), None

    async def _work(self, method: str, payload: ray.ObjectRef, arrived: float) -> tuple[np.ndarray, Utilisation]:
        """Answer a request that has acquired the queue, and release it. So every rank sees the same order of requests."""
        try:
            answer = await self._fan_out(method, payload)
            load = self._meter.load(arrived, self._queue.waiting)
        finally:
            self._queue.release()
        self._shown_latency.observe(load.latency_s)
        return answer, load

    async def _fan_out(self, method: str, payload: ray.ObjectRef) -> np.ndarray:
        """Send one request to all ranks, and join their answers. Raises TeacherError, RequestTooLong or ReplicaBroken."""
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
        if _is_the_requests_fault(errors):
            await self._recover()
        self._raise_failure(errors, len(pending), failed)
        if self._broken is not None:
            raise ReplicaBroken(self._broken)
        slices = [answer.result() for answer in answers]
        return np.concatenate(slices) if len(slices) > 1 else slices[0]

    async def _recover(self) -> None:
        """Make all ranks ready for the next request, after one that they all refused."""
        answers = [asyncio.wrap_future(rank.recover.remote().future()) for rank in self._ranks]
        _, pending = await asyncio.wait(answers, timeout=STRAGGLER_S)
        if pending or any(answer.exception() for answer in answers):
            self._give_up("ranks did not come together again after a refused request")

    def _raise_failure(self, errors: list[BaseException | None], silent: int, failed: bool) -> None:
        """Find out whether the request or the group failed, and give the group up if it did.

        Args:
            errors: of each rank; None: it answered, or is silent.
            silent: ranks that did not answer in time.
            failed: whether a rank failed before the time was up.

        Raises:
            TeacherError: the request is at fault: all ranks refused it, or none could fetch it.
            RequestTooLong: the ranks took too long, and nothing else was wrong.
        """
        first = next((error for error in errors if error is not None), None)
        details = f": {one_line(first)}" if first is not None else ""
        if silent and not failed:
            limit = f"teachers.request_timeout_s={self._config.request_timeout_s:g} s"
            late = f"{silent} of {len(errors)} ranks did not answer within {limit}"
            self._give_up(late)
            raise RequestTooLong(late)
        if silent:
            self._give_up(f"{silent} of {len(errors)} ranks did not answer after another failed{details}")
        elif _is_the_requests_fault(errors):
            lost = f"the request was lost with the process that sent it{details}"
            raise TeacherError(lost if _is_lost(first) else str(getattr(first, "cause", first)))
        elif first is not None:
            kinds = {RayActorError: "a rank died", RankBroken: "a rank's device failed"}
            why = [text for kind, text in kinds.items() if any(isinstance(error, kind) for error in errors)]
            self._give_up(f"{(why or ['ranks failed differently'])[0]}{details}")

    def _give_up(self, reason: str) -> None:
        """Mark the replica broken and end its ranks. The next health check fails, and Serve replaces the replica."""
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


def _is_the_requests_fault(errors: list[BaseException | None]) -> bool:
    """Whether every rank refused the request, or could not fetch or read it.

    What fails in a rank is a TeacherError, or RankBroken; any other error of a task is one of what it was given.
    """
    return all(isinstance(error, TeacherError) or _is_lost(error) or _is_unreadable(error) for error in errors)


def _is_unreadable(error: BaseException | None) -> bool:
    return isinstance(error, RayTaskError) and not isinstance(error.cause, RayError | RankBroken)


def _is_lost(error: BaseException | None) -> bool:
    """Whether a rank could not fetch the payload: the process or node that sent it is gone."""
    return isinstance(getattr(error, "cause", error), ObjectLostError)
