"""What a score request costs in memory: how often it, and its answer, are written to the object store."""

from __future__ import annotations

import pytest
import ray
import torch

from raydistill.benchmark import service
from raydistill.benchmark.idle import IdleRank, idle_service
from raydistill.config.networks import TeacherServiceConfig
from raydistill.teachers.request import ScoreRequest
from raydistill.teachers.shard import actor

pytestmark = [pytest.mark.timeout(300), pytest.mark.full]


def test_a_request_is_stored_once_and_its_answer_by_the_rank_and_the_coordinator(ray_cluster):
    config = TeacherServiceConfig(slice=4, cpus_per_rank=0.1)
    bare = ray.remote(num_cpus=0.1)(service._Bare).remote()
    rank = actor(IdleRank).options(num_cpus=0.1).remote(0, 1)
    x_t = torch.zeros(8, 16, 64, 64)  # 2.1 MB
    embeds = {"prompt_embeds": torch.zeros(8, 125_000)}  # 4 MB
    with idle_service(config, "teacher-stored") as idle:
        idle.set(0.0, slices=True)
        ray.get(rank.load.remote(str(idle.folder), config, None))
        found = service._measure(
            ScoreRequest(x_t, torch.full((8,), 0.5), embeds, None, 1.0), idle.client(), bare, rank, repeats=1
        )
    for actor_handle in (bare, rank):
        ray.kill(actor_handle)
    request, answer = found["nbytes"], found["answer_nbytes"]
    assert answer == x_t.nbytes
    assert request == x_t.nbytes + embeds["prompt_embeds"].nbytes + 8 * 4
    for name, copies_of_answer in (("bare", 1), ("rank", 1), ("service", 2)):
        assert found[f"{name}_stored"] == pytest.approx(request + copies_of_answer * answer, abs=10_000), name
    row = {"request": "some"} | found
    assert "| 8.2 MB | 8.2 MB | 10.3 MB |" in service.table({"rows": [row], "repeats": 1})
