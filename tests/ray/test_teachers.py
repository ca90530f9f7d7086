"""The teacher service: exact scores, whole replicas replaced without losing a request, clear refusals, clean ends."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.util.placement_group import placement_group_table

from raydistill.config.networks import TeacherServiceConfig
from raydistill.spaces import load_space
from raydistill.teachers import service
from raydistill.teachers.client import TeacherClient
from raydistill.teachers.request import (
    NonFiniteScores,
    ScoreRequest,
    TeacherError,
    TeacherGone,
    TeacherStartError,
)

pytestmark = pytest.mark.timeout(1200)
CONFIG = TeacherServiceConfig(shards=2, slice=4, cpus_per_rank=0.1, start_timeout_s=400)
WIDTHS = {"flux": {"prompt_embeds": (20, 64), "pooled_prompt_embeds": (64,)}, "sd": {"prompt_embeds": (20, 64)}}


def make_request(family: str, space, batch: int, guidance_scale: float = 3.0, seed: int = 0) -> ScoreRequest:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return ScoreRequest(
        x_t=draw(batch, *space.latent_shape),
        t=torch.rand(batch, generator=generator) * 0.9 + 0.05,
        conditioning={name: draw(batch, *shape) for name, shape in WIDTHS[family].items()},
        unconditional={name: draw(1, *shape) for name, shape in WIDTHS[family].items()},
        guidance_scale=guidance_scale,
    )


@torch.no_grad()
def dense_scores(space, network, request: ScoreRequest) -> torch.Tensor:
    return space.predict_x0(
        network, request.x_t, request.t, request.conditioning, request.unconditional, request.guidance_scale
    )


def process_lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def placement_groups(name: str) -> list[dict]:
    groups = placement_group_table().values()
    return [group for group in groups if f"::{name}#" in group["name"] and group["state"] != "REMOVED"]


@pytest.fixture(scope="module", params=["zero3", pytest.param("plain", marks=pytest.mark.full)])
def flux(request, ray_cluster, flux_folder):
    """(client, space, dense network) of a running FLUX service."""
    config = CONFIG.model_copy(update={"backend": request.param})
    service.start(str(flux_folder), config, "teacher-flux", network={"GLOO_SOCKET_IFNAME": "lo"})
    space = load_space(flux_folder)
    yield TeacherClient("teacher-flux", config), space, space.load_network()
    service.stop("teacher-flux")


@pytest.fixture(scope="module")
def plain(ray_cluster, flux_folder):
    """A client of the same teacher, whole on each of two ranks."""
    config = CONFIG.model_copy(update={"backend": "plain"})
    service.start(str(flux_folder), config, "teacher-plain")
    yield TeacherClient("teacher-plain", config)
    service.stop("teacher-plain")


@pytest.mark.parametrize(("batch", "guidance_scale"), [(1, 1.0), (7, 3.0), (16, 3.0)])
def test_scores_equal_the_dense_network(flux, batch, guidance_scale):
    """Batches below, between and of several slices, with and without guidance."""
    client, space, network = flux
    request = make_request("flux", space, batch, guidance_scale)
    scores = client.submit(request).result()
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, dense_scores(space, network, request), atol=1e-5, rtol=1e-5)
    assert torch.equal(scores, client.submit(request).result())


def test_ranks_meet_on_the_interface_that_they_are_told(flux):
    client, *_ = flux
    for rank in client.describe():
        environment = Path(f"/proc/{rank['pid']}/environ").read_bytes().split(b"\0")
        assert b"GLOO_SOCKET_IFNAME=lo" in environment


def test_bits_of_a_sample_do_not_depend_on_its_batch(flux):
    """Slices have one size, so samples 4 … 7 score alike in a request of 8 and in one of their own."""
    client, space, _ = flux
    whole = make_request("flux", space, 8)
    part = ScoreRequest(
        whole.x_t[4:],
        whole.t[4:],
        {name: value[4:] for name, value in whole.conditioning.items()},
        whole.unconditional,
        whole.guidance_scale,
    )
    assert torch.equal(client.submit(whole).result()[4:], client.submit(part).result())


@pytest.mark.parametrize(("batch", "guidance_scale"), [(1, 1.0), (7, 3.0), (16, 3.0)])
@pytest.mark.full
def test_whole_teachers_give_the_bits_of_shared_ones(flux, plain, batch, guidance_scale):
    client, space, network = flux
    request = make_request("flux", space, batch, guidance_scale)
    assert torch.equal(plain.submit(request).result(), client.submit(request).result())
    arguments = (request.x_t, request.conditioning, request.unconditional, 3, 2.5)
    assert torch.equal(plain.generate(*arguments).result(), client.generate(*arguments).result())
    total = sum(parameter.numel() for parameter in network.parameters())
    assert [rank["numel"] for rank in plain.describe()] == [total, total]


def test_each_rank_holds_its_share(flux):
    client, _, network = flux
    if client.config.plain:
        pytest.skip("each rank holds all of it: seen above")
    ranks = client.describe()
    total = sum(parameter.numel() for parameter in network.parameters())
    assert [rank["rank"] for rank in ranks] == [0, 1]
    assert len({rank["pid"] for rank in ranks}) == 2
    for rank in ranks:
        assert rank["numel"] == pytest.approx(total / 2, rel=0.02)


def test_generate_equals_dense_sampling(flux):
    client, space, network = flux
    request = make_request("flux", space, 5)
    arguments = (request.x_t, request.conditioning, request.unconditional, 3, 2.5)
    expected = space.sample(network, *arguments)
    torch.testing.assert_close(client.generate(*arguments).result(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.full
def test_ranks_answer_pings_while_they_generate(flux):
    """Or a long generation would fail the health check."""
    client, space, _ = flux
    request = make_request("flux", space, 8)
    started = time.monotonic()
    pending = client.generate(request.x_t, request.conditioning, request.unconditional, 40, 2.5)
    client.describe()
    described = time.monotonic()
    pending.result()
    assert described - started < (time.monotonic() - started) / 2


def test_bfloat16_conditioning_travels(flux):
    """numpy has no bfloat16; a teacher in float32 sees exactly the values of the bfloat16 tensor."""
    client, space, network = flux
    request = make_request("flux", space, 2, guidance_scale=1.0)
    half = {name: value.bfloat16() for name, value in request.conditioning.items()}
    widened = {name: value.float() for name, value in half.items()}
    scores = client.submit(ScoreRequest(request.x_t, request.t, half, None, 1.0)).result()
    expected = dense_scores(space, network, ScoreRequest(request.x_t, request.t, widened, None, 1.0))
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)


def test_wrong_requests_are_refused_at_once_and_harm_nothing(flux):
    client, space, network = flux
    good = make_request("flux", space, 5, guidance_scale=1.0)
    narrow = {**good.conditioning, "prompt_embeds": good.conditioning["prompt_embeds"][..., :10]}
    pids = [rank["pid"] for rank in client.describe()]
    started = time.monotonic()
    with pytest.raises(TeacherError, match="pooled_prompt_embeds"):
        client.submit(
            ScoreRequest(good.x_t, good.t, {"prompt_embeds": good.conditioning["prompt_embeds"]}, None, 1.0)
        ).result()
    with pytest.raises(TeacherError, match="shapes cannot be multiplied"):  # fails midway through the network
        client.submit(ScoreRequest(good.x_t, good.t, narrow, None, 1.0)).result()
    with pytest.raises(TeacherError, match=r"\(8, 8, 8\)"):
        client.submit(ScoreRequest(good.x_t[:, :, :8, :8], good.t, good.conditioning, None, 1.0)).result()
    with pytest.raises(TeacherError, match="needs unconditional rows"):
        client.submit(ScoreRequest(good.x_t, good.t, good.conditioning, None, 2.0))
    with pytest.raises(TeacherError, match="t has shape"):
        client.submit(ScoreRequest(good.x_t, good.t[:2], good.conditioning, None, 1.0))
    assert time.monotonic() - started < 60
    scores = client.submit(good).result()
    torch.testing.assert_close(scores, dense_scores(space, network, good), atol=1e-5, rtol=1e-5)
    assert [rank["pid"] for rank in client.describe()] == pids


def wrong_payloads(good: dict) -> dict[str, Any]:
    """What a sender that checks nothing may put into the object store."""
    half = {name: value[:2] for name, value in good["conditioning"].items()}
    return {
        "None": None,
        "a list": [good],
        "no latents": {name: value for name, value in good.items() if name != "latents"},
        "latents None": good | {"latents": None},
        "latents of text": good | {"latents": np.array(["a"] * 5)},
        "latents of objects": good | {"latents": good["latents"].astype(object)},
        "no t": {name: value for name, value in good.items() if name != "t"},
        "t too short": good | {"t": good["t"][:2]},
        "t out of range": good | {"t": good["t"] + 2},
        "conditioning None": good | {"conditioning": None},
        "conditioning too short": good | {"conditioning": half},
        "conditioning of None": good | {"conditioning": dict.fromkeys(good["conditioning"])},
        "guidance None": good | {"guidance_scale": None},
        "guidance without unconditional rows": good | {"guidance_scale": 3.0},
        "steps of text": {name: value for name, value in good.items() if name != "t"} | {"steps": "three"},
    }


@pytest.mark.full
def test_whoever_sends_a_wrong_request_is_refused_and_no_replica_is_replaced(flux):
    """Straight to the replica, as a client of another make would: ranks that failed at different places would hang."""
    client, space, network = flux
    request = make_request("flux", space, 5, guidance_scale=1.0)
    pids = [rank["pid"] for rank in client.describe()]
    predict = client.handle().predict_x0
    for name, payload in wrong_payloads(request.payload()).items():
        kind, why, _ = predict.remote([ray.put(payload)]).result(timeout_s=60)
        assert (name, kind) == (name, "rejected"), why
    for given in (None, [], "request", [None], [request.payload()]):
        assert predict.remote(given).result(timeout_s=60)[0] == "rejected"

    @ray.remote(num_cpus=0.1)
    def fail():
        raise KeyError("of the sender")

    kind, why, _ = predict.remote([fail.remote()]).result(timeout_s=60)
    assert (kind, "of the sender" in why) == ("rejected", True)
    scores = client.submit(request).result()
    torch.testing.assert_close(scores, dense_scores(space, network, request), atol=1e-5, rtol=1e-5)
    assert [rank["pid"] for rank in client.describe()] == pids


def test_nan_in_the_request_is_the_requests_fault(flux):
    client, space, _ = flux
    request = make_request("flux", space, 5)
    request.x_t[3, 0, 0, 0] = float("nan")
    with pytest.raises(TeacherError, match=r"request itself is not finite: x_t .* samples \[3\]"):
        client.submit(request)
    request = make_request("flux", space, 5)
    request.conditioning["prompt_embeds"][1] = float("inf")
    with pytest.raises(TeacherError, match=r"conditioning\['prompt_embeds'\] .* samples \[1\]"):
        client.submit(request)


def test_nan_scores_raise_and_name_the_samples(flux):
    """Finite latents that overflow inside the teacher: no zeros, no retries."""
    client, space, _ = flux
    request = make_request("flux", space, 7)
    request.x_t[5] = 3e38
    pending = client.submit(request)
    with pytest.raises(NonFiniteScores, match=rf"teacher-flux .* 1 of 7 samples: sample 5 \(t={request.t[5]:.4f}\)"):
        pending.result()


def test_an_actor_can_ask_by_name(flux):
    """As a Ray Train worker does: synchronous code of an actor that only knows the name."""

    @ray.remote(num_cpus=0.1)
    class Worker:
        def score(self, client: TeacherClient, request: ScoreRequest) -> torch.Tensor:
            return client.submit(request).result()

    client, space, network = flux
    request = make_request("flux", space, 3)
    scores = ray.get(Worker.remote().score.remote(client, request))
    torch.testing.assert_close(scores, dense_scores(space, network, request), atol=1e-5, rtol=1e-5)


@pytest.mark.full
def test_killed_rank_loses_no_request_and_changes_no_bit(flux):
    """SIGKILL of one rank in a stream of requests: the whole group is replaced, every answer is the same."""
    client, space, _ = flux
    requests = [make_request("flux", space, 6, seed=seed) for seed in range(6)]
    expected = [client.submit(request).result() for request in requests]
    before = {rank["pid"] for rank in client.describe()}
    pending = [client.submit(request) for request in requests]
    os.kill(sorted(before)[1], signal.SIGKILL)
    pending += [client.submit(request) for request in requests]
    for answer, scores in zip(pending, expected * 2, strict=True):
        assert torch.equal(answer.result(), scores)
    after = {rank["pid"] for rank in client.describe()}
    assert not before & after
    assert not any(process_lives(pid) for pid in before)
    assert len(placement_groups(client.name)) == 1


@pytest.mark.full
def test_killed_rank_of_a_whole_teacher_loses_no_request_and_changes_no_bit(flux, plain):
    """The other rank could work on; the replica is replaced whole all the same, as every replica is."""
    _, space, _ = flux
    test_killed_rank_loses_no_request_and_changes_no_bit((plain, space, None))


@pytest.mark.full
def test_second_service_coexists_and_stops_cleanly(flux, sd_folder):
    """A UNet teacher next to the first; stopping it leaves no rank, and the first still answers."""
    client, space, _ = flux
    first = make_request("flux", space, 3)
    expected = client.submit(first).result()
    sd_space = load_space(sd_folder)
    request = make_request("sd", sd_space, 6)
    service.start(str(sd_folder), CONFIG, "teacher-sd")
    try:
        sd_client = TeacherClient("teacher-sd", CONFIG)
        pids = [rank["pid"] for rank in sd_client.describe()]
        scores = sd_client.submit(request).result()
    finally:
        service.stop("teacher-sd")
    dense = dense_scores(sd_space, sd_space.load_network(), request)
    torch.testing.assert_close(scores, dense, atol=1e-5, rtol=1e-5)
    assert not placement_groups("teacher-sd")
    deadline = time.monotonic() + 10
    while any(process_lives(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(process_lives(pid) for pid in pids)
    assert torch.equal(client.submit(first).result(), expected)


@pytest.mark.full
def test_replicas_follow_the_requests_and_draining_loses_none(ray_cluster, flux_folder):
    """One replica becomes two while requests pile up, and one again while they trickle; every answer is the same."""
    config = TeacherServiceConfig(
        shards=1, slice=4, cpus_per_rank=0.1, start_timeout_s=400, max_replicas=2, target_ongoing_requests=1,
        upscale_delay_s=0.5, downscale_delay_s=2,
    )  # fmt: skip
    space = load_space(flux_folder)
    request = make_request("flux", space, 4)
    arguments = (request.x_t, request.conditioning, request.unconditional, 20, 2.5)
    service.start(str(flux_folder), config, "teacher-elastic")
    try:
        client = TeacherClient("teacher-elastic", config)
        expected = client.generate(*arguments).result()
        assert client.load.metrics()["teachers/latency_p50"] > 0
        pending, deadline = [], time.monotonic() + 120
        while sum(group["state"] == "CREATED" for group in placement_groups("teacher-elastic")) < 2:
            assert time.monotonic() < deadline
            assert all(torch.equal(answer.result(), expected) for answer in pending)
            pending = [client.generate(*arguments) for _ in range(4)]
        assert all(torch.equal(answer.result(), expected) for answer in pending)
        deadline = time.monotonic() + 120
        while len(placement_groups("teacher-elastic")) > 1:
            assert time.monotonic() < deadline
            assert torch.equal(client.generate(*arguments).result(), expected)
            time.sleep(0.2)
    finally:
        service.stop("teacher-elastic")


def test_absent_service_is_given_up_by_name_without_asking_for_retry_for_s(ray_cluster):
    request = ScoreRequest(torch.zeros(1, 8, 16, 16), torch.ones(1), {"prompt_embeds": torch.zeros(1, 1, 1)}, None, 1.0)
    client = TeacherClient("teacher-nobody", CONFIG)
    with pytest.raises(TeacherGone, match="there is no teacher service teacher-nobody on this cluster"):
        client.submit(request).result()
    assert client.repeated <= 2


@pytest.mark.full
def test_a_service_that_is_taken_down_is_given_up_by_the_clients_that_used_it(ray_cluster, sd_folder):
    space = load_space(sd_folder)
    request = make_request("sd", space, 3)
    service.start(str(sd_folder), CONFIG, "teacher-leaving")
    client = TeacherClient("teacher-leaving", CONFIG)
    client.submit(request).result()
    service.stop("teacher-leaving")
    with pytest.raises(TeacherGone, match="teacher-leaving on this cluster any more"):
        client.submit(request).result()
    assert client.repeated <= 3


@pytest.mark.parametrize(("key", "value"), [("cpus_per_rank", 50.0), ("gpus_per_rank", 1.0)])
def test_impossible_placement_is_named_and_leaves_nothing(ray_cluster, flux_folder, key, value):
    config = CONFIG.model_copy(update={key: value})
    started = time.monotonic()
    with pytest.raises(TeacherStartError, match="requested 1 replica.* x 2 rank.*the cluster has .* CPU free"):
        service.start(str(flux_folder), config, "teacher-giant")
    assert time.monotonic() - started < 60
    assert not placement_groups("teacher-giant")


@pytest.mark.full
def test_occupied_cluster_is_named_and_leaves_nothing(ray_cluster, flux_folder, monkeypatch):
    """The replica would fit an empty cluster, but something else holds the CPUs."""
    monkeypatch.setattr(service, "PLACEMENT_PATIENCE_S", 3.0)
    holder = ray.util.placement_group([{"CPU": 7.0}])
    ray.get(holder.ready(), timeout=60)
    config = CONFIG.model_copy(update={"cpus_per_rank": 3.0})
    try:
        with pytest.raises(TeacherStartError, match=r"1 replica\(s\) wait for resources; requested .* 6.01 CPU"):
            service.start(str(flux_folder), config, "teacher-squeezed")
        assert not placement_groups("teacher-squeezed")
    finally:
        ray.util.remove_placement_group(holder)


def test_missing_model_is_named(ray_cluster, tmp_path):
    with pytest.raises(TeacherStartError, match="no model_index.json"):
        service.start(str(tmp_path), CONFIG, "teacher-none")
