"""Nodes that come when teachers are asked for and leave when they idle: Ray's own autoscaler, its nodes on one machine."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest
import ray
import torch
from ray import serve

from raydistill.config.networks import TeacherServiceConfig
from raydistill.spaces import load_space
from raydistill.teachers import service
from raydistill.teachers.client import TeacherClient
from raydistill.teachers.request import ScoreRequest

pytestmark = [pytest.mark.timeout(1200), pytest.mark.full]
MARK, ALONE = "RAYDISTILL_TEST_CLUSTER", "RAYDISTILL_TEST_ALONE"
HEAD = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
LABELS = {"role": "teacher"}
TEACHERS = TeacherServiceConfig(
    shards=2, slice=4, cpus_per_rank=1, start_timeout_s=200, retry_for_s=200, node_labels=LABELS
)


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def marked(mark: str) -> set[psutil.Process]:
    """Processes with the mark, and their children: those that have given themselves a title have no environment left."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found |= {process, *process.children(recursive=True)}
    return found


def until(reached, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, what
        time.sleep(0.5)


@pytest.fixture
def cluster(tmp_path):
    """Address of a head without CPUs for work, whose autoscaler may add two nodes for teachers."""
    port, mark = free_port(), uuid.uuid4().hex
    node = {"node_config": {}, "min_workers": 0}
    nothing = ("setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands",
               "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files")  # fmt: skip
    config = dict.fromkeys(nothing, []) | {
        "auth": {},
        "file_mounts": {},
        "cluster_name": "local",
        "max_workers": 2,
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 1,
        "provider": {
            # by its module: the wheel lacks the defaults of "fake_multinode"
            "type": "external", "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"{ray.util.get_node_ip_address()}:{port}", "head_node_id": HEAD,
            "launch_multiple": True, "disable_node_updaters": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": node | {"resources": {"CPU": 1}, "max_workers": 0},
            "teacher": node | {"resources": {"CPU": 3}, "labels": LABELS, "max_workers": 2},
        },
    }  # fmt: skip
    file = tmp_path / "autoscaling.json"
    file.write_text(json.dumps(config))
    environment = os.environ | {
        MARK: mark, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
        "RAY_NODE_TYPE_NAME": "ray.head.default",  # as `ray up` sets it
    }  # fmt: skip
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", f"--port={port}", "--num-cpus=1",
        f"--autoscaling-config={file}", "--include-dashboard=false", "--disable-usage-stats",
        "--object-store-memory=100000000",
    ]  # fmt: skip
    try:
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
        address = f"127.0.0.1:{port}"
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        yield address
    finally:
        if ray.is_initialized():
            serve.shutdown()
            ray.shutdown()
        processes = marked(mark)
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        _, alive = psutil.wait_procs(processes, timeout=5)
        for process in marked(mark).union(alive):
            with contextlib.suppress(psutil.Error):
                process.kill()


def teacher_nodes() -> int:
    return sum(node["Alive"] and (node["Labels"] or {}).get("role") == "teacher" for node in ray.nodes())


def test_nodes_come_for_teachers_and_leave_after_them():
    """In a process of its own: the session's cluster may be this one's."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", "full"]
    done = subprocess.run(
        [*command, f"{__file__}::test_of_a_process_of_its_own"],
        env=os.environ | {ALONE: "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


@pytest.mark.skipif(ALONE not in os.environ, reason="the test above runs it in another process")
def test_of_a_process_of_its_own(cluster, flux_folder):
    assert teacher_nodes() == 0
    service.start(str(flux_folder), TEACHERS, "teacher-nodes")
    try:
        assert teacher_nodes() == 1
        space, generator = load_space(flux_folder), torch.Generator().manual_seed(0)
        request = ScoreRequest(
            x_t=torch.randn(4, *space.latent_shape, generator=generator),
            t=torch.tensor([0.2, 0.4, 0.6, 0.8]),
            conditioning={
                "prompt_embeds": torch.randn(4, 20, 64, generator=generator),
                "pooled_prompt_embeds": torch.randn(4, 64, generator=generator),
            },
            unconditional=None,
            guidance_scale=1.0,
        )
        scores = TeacherClient("teacher-nodes", TEACHERS).submit(request).result()
        with torch.no_grad():
            dense = space.predict_x0(space.load_network(), request.x_t, request.t, request.conditioning, None, 1.0)
        torch.testing.assert_close(scores, dense, rtol=1e-4, atol=1e-4)
    finally:
        service.stop("teacher-nodes")
    serve.shutdown()
    until(lambda: teacher_nodes() == 0, 90, "the idle node is still there")
