"""Who uses a teacher service: runs share one, the last takes it down, a crashed one never does, a resumed one finds it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import ray
import torch
from raydistill.config.networks import TeacherServiceConfig

from raydistill.background import in_background
from raydistill.spaces import load_space
from raydistill.teachers import registry, service
from raydistill.teachers.client import PendingScores, TeacherClient
from raydistill.teachers.request import ScoreRequest, TeacherStartError

pytestmark = pytest.mark.timeout(1200)
CONFIG = TeacherServiceConfig(shards=1, slice=4, cpus_per_rank=0.1, start_timeout_s=200, linger_s=600)
NAME = "teacher-shared"

# A run of its own: connects, starts or attaches when it is told to, and releases when its standard input ends.
OTHER = """
import sys
import ray
from raydistill.config.networks import TeacherServiceConfig
from raydistill.teachers import registry
ray.init(address=sys.argv[1], log_to_driver=False)
config = TeacherServiceConfig.model_validate_json(sys.argv[4])
print("connected", flush=True)
sys.stdin.readline()
getattr(registry, sys.argv[2])(sys.argv[3], config, "teacher-shared")
print("joined", flush=True)
sys.stdin.read()
registry.release("teacher-shared")
print("left", flush=True)
"""


class Run:
    """The driver of another run."""

    def __init__(self, how: str, folder, config: TeacherServiceConfig) -> None:
        address = ray.get_runtime_context().gcs_address
        command = [sys.executable, "-c", OTHER, address, how, str(folder), config.model_dump_json()]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def says(self, word: str) -> None:
        """Wait for this line, the next one that is not Ray's own."""
        while "(raylet)" in (line := self.process.stdout.readline()):
            pass
        assert line == word + "\n"

    def go(self) -> None:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.stdin.close()

    def crash(self) -> None:
        self.process.send_signal(signal.SIGKILL)


@pytest.fixture
def connected(ray_cluster):
    """`connected("start" or "attach", model folder, config)` -> a run that has not used the service yet."""
    runs = []

    def connect(how: str, folder, config: TeacherServiceConfig = CONFIG) -> Run:
        runs.append(Run(how, folder, config))
        runs[-1].says("connected")
        return runs[-1]

    yield connect
    for run in runs:
        run.process.kill()
        run.process.wait()


@pytest.fixture
def joined(connected):
    """The same, of a run that uses the service."""

    def join(how: str, folder, config: TeacherServiceConfig = CONFIG) -> Run:
        run = connected(how, folder, config)
        run.go()
        run.says("joined")
        return run

    return join


def running() -> bool:
    return NAME in service.applications()


def crash_serve_controller() -> None:
    ray.kill(ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve"), no_restart=False)


def kill_registry() -> None:
    """As a crash of its process, whatever it does at that moment; Ray starts it again."""
    actor = ray.get_actor(registry.NAME, namespace=registry.NAMESPACE)
    pid = actor.__ray_call__.options(concurrency_group="queries").remote(lambda self: os.getpid())
    os.kill(ray.get(pid, timeout=30), signal.SIGKILL)


def registries() -> list[dict]:
    named = ray.util.list_named_actors(all_namespaces=True)
    return [actor for actor in named if actor["namespace"] == registry.NAMESPACE]


def until(reached, timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def score(folder, seed: int = 0) -> torch.Tensor:
    space = load_space(folder)
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(3, *space.latent_shape, generator=generator)
    conditioning = {"prompt_embeds": torch.randn(3, 20, 64, generator=generator)}
    return (
        TeacherClient(NAME, CONFIG).submit(ScoreRequest(x_t, torch.full((3,), 0.5), conditioning, None, 1.0)).result()
    )


def pids() -> set[int]:
    return {rank["pid"] for rank in TeacherClient(NAME, CONFIG).describe()}


def sample(folder) -> PendingScores:
    """A request that the teacher works on for seconds."""
    space = load_space(folder)
    return TeacherClient(NAME, CONFIG).generate(
        torch.randn(4, *space.latent_shape), {"prompt_embeds": torch.randn(4, 20, 64)}, None, 400, 1.0
    )


@pytest.mark.full
def test_runs_share_a_service_that_outlives_crashed_ones_and_ends_with_the_last(
    joined, sd_folder, flux_folder, tmp_path
):
    with pytest.raises(TeacherStartError, match="there is no teacher service 'teacher-shared' on this cluster"):
        registry.attach(str(sd_folder), CONFIG, NAME)

    first = joined("start", sd_folder)
    ranks = pids()
    with pytest.raises(TeacherStartError, match="its model is .* is another one"):
        registry.attach(str(flux_folder), CONFIG, NAME)
    with pytest.raises(TeacherStartError, match=r"teachers.slice: it runs with 4, not 8"):
        registry.attach(str(sd_folder), CONFIG.model_copy(update={"slice": 8}), NAME)
    with pytest.raises(TeacherStartError, match=r"run.name: a living run .* another model or other settings"):
        registry.start(str(flux_folder), CONFIG, NAME)
    assert len(registry.living(NAME)) == 1
    elsewhere = shutil.copytree(sd_folder, tmp_path / "copy")  # the same model by its contents, not by its path
    registry.attach(str(elsewhere), CONFIG, NAME)
    assert registry.ready(NAME)
    expected = score(sd_folder)
    assert len(registry.living(NAME)) == 2

    first.crash()  # the run that started the service, and the registry
    until(lambda: len(registry.living(NAME)) == 1)
    kill_registry()
    assert registry.ready(NAME)
    time.sleep(2 * registry.LOOK_EVERY_S)
    assert len(registry.living(NAME)) == 1
    assert torch.equal(score(sd_folder), expected)

    registry._leave(NAME, take_down=False)  # as an attach that fails after it has begun
    with pytest.raises(TeacherStartError, match="is another one"):
        registry.attach(str(flux_folder), CONFIG, NAME)
    assert not registry.living(NAME)
    assert running(), "it waits for a run to resume"
    resumed = joined("start", sd_folder)
    assert pids() == ranks, "a resumed run takes its service over as it is"
    registry.attach(str(sd_folder), CONFIG, NAME)
    registry.release(NAME)
    assert not registry.ready(NAME)
    assert running(), "the other one still uses it"
    crash_serve_controller()  # Ray starts it again, and repeats what it was asked
    resumed.end()
    resumed.says("left")
    assert not running()
    assert registry.services() == []
    until(lambda: not registries())


@pytest.mark.full
@pytest.mark.parametrize("crash", [False, True])
def test_a_run_that_comes_during_a_take_down_gets_a_service_and_its_crash_ends_that(connected, sd_folder, crash):
    """The last user has left, and its service ends its last request. Then another run comes; the registry may crash."""
    registry.start(str(sd_folder), CONFIG, NAME)
    before, newcomer = pids(), connected("start", sd_folder, CONFIG.model_copy(update={"linger_s": 1.0}))
    pending = sample(sd_folder)
    until(lambda: not pending.ready())
    release = in_background(lambda: registry.release(NAME))
    until(lambda: service.applications()[NAME].status == "DELETING")
    newcomer.go()
    if crash:
        time.sleep(0.5)
        kill_registry()
    assert not release.done()
    release.result()
    newcomer.says("joined")
    assert len(registry.living(NAME)) == 1
    assert registry.services() == [NAME]
    assert len(registries()) == 1
    assert not pids() & before

    newcomer.crash()
    if crash:
        kill_registry()
    until(lambda: not running(), 60)
    until(lambda: registry.services() == [] and not registries())


@pytest.mark.full
def test_runs_that_start_and_end_at_the_same_moment_have_one_service(connected, sd_folder):
    runs = [connected("start", sd_folder), connected("start", sd_folder)]
    for run in runs:
        run.go()
    for run in runs:
        run.says("joined")
    assert len(registry.living(NAME)) == 2
    assert len(pids()) == 1
    for run in runs:
        run.end()
    for run in runs:
        run.says("left")
    assert not running()
    until(lambda: not registries())


@pytest.mark.full
def test_a_start_that_nobody_needs_any_more_leaves_nothing(ray_cluster, sd_folder):
    given_up = threading.Event()
    given_up.set()
    with pytest.raises(TeacherStartError, match="teacher-shared is not needed any more"):
        registry.start(str(sd_folder), CONFIG, NAME, given_up)
    assert not registry.ready(NAME)
    assert not running()
    assert registry.services() == []
    until(lambda: not registries())
