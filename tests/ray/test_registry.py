"""Who uses a teacher service: runs share one, the last takes it down, a crashed one never does, a resumed one finds it."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import ray
import torch

from raydistill.config.schema import TeacherServiceConfig
from raydistill.spaces import load_space
from raydistill.teachers import registry, service
from raydistill.teachers.client import TeacherClient
from raydistill.teachers.request import ScoreRequest, TeacherStartError

pytestmark = pytest.mark.timeout(1200)
CONFIG = TeacherServiceConfig(shards=1, slice=4, cpus_per_rank=0.1, start_timeout_s=200, linger_s=600)
NAME = "teacher-shared"

# a run of its own: joins the service, says so, and uses it until its standard input ends
OTHER = """
import sys
import ray
from raydistill.config import Teachers
from raydistill.teachers import service, users
ray.init(address=sys.argv[1], log_to_driver=False)
config = Teachers.model_validate_json(sys.argv[4])
getattr(users, sys.argv[2])(sys.argv[3], config, "teacher-shared")
print("joined", flush=True)
sys.stdin.read()
users.release("teacher-shared")
print("left", flush=True)
"""


@pytest.fixture
def other(ray_cluster):
    """`other("start" or "attach", model folder, config)` -> a driver that uses the service."""
    processes = []

    def join(how: str, folder, config: TeacherServiceConfig = CONFIG, wait: bool = True) -> subprocess.Popen:
        address = ray.get_runtime_context().gcs_address
        command = [sys.executable, "-c", OTHER, address, how, str(folder), config.model_dump_json()]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert not wait or process.stdout.readline() == "joined\n"
        return process

    yield join
    for process in processes:
        process.kill()
        process.wait()


def running() -> bool:
    return NAME in service.applications()


def crash_serve_controller() -> None:
    ray.kill(ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve"), no_restart=False)


def keepers() -> list[dict]:
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


def test_runs_share_a_service_that_outlives_crashed_ones_and_ends_with_the_last(
    other, sd_folder, flux_folder, tmp_path
):
    with pytest.raises(TeacherStartError, match="there is no teacher service 'teacher-shared' on this cluster"):
        registry.attach(str(sd_folder), CONFIG, NAME)

    first = other("start", sd_folder)
    ranks = pids()
    with pytest.raises(TeacherStartError, match="its model is .* is another one"):
        registry.attach(str(flux_folder), CONFIG, NAME)
    with pytest.raises(TeacherStartError, match=r"teachers.slice: it runs with 4, not 8"):
        registry.attach(str(sd_folder), CONFIG.model_copy(update={"slice": 8}), NAME)
    assert len(registry.living(NAME)) == 1
    elsewhere = shutil.copytree(sd_folder, tmp_path / "copy")  # the same model by its contents, not by its path
    registry.attach(str(elsewhere), CONFIG, NAME)
    assert registry.ready(NAME)
    expected = score(sd_folder)
    assert len(registry.living(NAME)) == 2

    first.send_signal(signal.SIGKILL)  # the run that started it
    until(lambda: len(registry.living(NAME)) == 1)
    time.sleep(2 * registry.LOOK_EVERY_S)
    assert torch.equal(score(sd_folder), expected)

    with pytest.raises(TeacherStartError, match="is another one"):
        registry.attach(str(flux_folder), CONFIG, NAME)  # which is the end of this driver's use, too
    assert not registry.living(NAME)
    assert running(), "it waits for a run to resume"
    resumed = other("start", sd_folder)
    assert pids() == ranks, "a resumed run takes its service over as it is"
    registry.attach(str(sd_folder), CONFIG, NAME)
    registry.release(NAME)
    assert not registry.ready(NAME)
    assert running(), "the other one still uses it"
    crash_serve_controller()  # Ray starts it again, and repeats what it was asked
    resumed.stdin.close()
    assert resumed.stdout.readline() == "left\n"
    assert not running()
    assert registry.services() == []
    until(lambda: not keepers())


def test_who_comes_while_a_service_is_taken_down_has_one_and_if_it_crashes_that_goes(other, sd_folder, monkeypatch):
    """The last user has seen nobody and stops the service; then another one comes."""
    registry.start(str(sd_folder), CONFIG, NAME)
    before, stop, late = pids(), service.stop, []

    def stop_late(name: str, **options: bool) -> None:
        late.append(other("start", sd_folder, CONFIG.model_copy(update={"linger_s": 1.0}), wait=False))
        until(lambda: registry.living(NAME), 100)
        stop(name, **options)

    monkeypatch.setattr(service, "stop", stop_late)
    registry.release(NAME)
    (newcomer,) = late
    assert newcomer.stdout.readline() == "joined\n"
    assert len(registry.living(NAME)) == 1
    assert registry.services() == [NAME]
    assert len(keepers()) == 1
    assert not pids() & before

    newcomer.send_signal(signal.SIGKILL)
    until(lambda: not running())
    until(lambda: registry.services() == [] and not keepers())


def test_a_start_that_nobody_needs_any_more_leaves_nothing(ray_cluster, sd_folder):
    given_up = threading.Event()
    given_up.set()
    with pytest.raises(TeacherStartError, match="teacher-shared is not needed any more"):
        registry.start(str(sd_folder), CONFIG, NAME, given_up)
    assert not registry.ready(NAME)
    assert not running()
    assert registry.services() == []
    until(lambda: not keepers())
