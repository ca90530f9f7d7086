"""A node that fails alone is left out: Ray Train on a cluster of two nodes for workers, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from raydistill.errors import StageFailed

pytestmark = [pytest.mark.timeout(600), pytest.mark.full]
LABELS = {"role": "trainer"}


def body(settings):
    """Fails on the node where it ran first; one update further each time on another one."""
    import ray

    from raydistill.tracking.progress import write_progress
    from raydistill.workers.ray_train import run_body

    folder = Path(settings["folder"])

    def work():
        here = ray.get_runtime_context().get_node_id()
        with (folder / "began").open("a") as log:
            log.write(f"{here}\n")
        first = (folder / "began").read_text().split()[0]
        write_progress(folder / "progress.json", step=1, total=9)
        if here == first or settings["everywhere"]:
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered")

    run_body(folder, "test", work)


def free_after_two_failures(folder: Path, node: str) -> None:
    """Hold a node's CPUs until workers have begun twice: else chance decides which node the second ones get."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    @ray.remote(num_cpus=1)
    class Holder:
        def holds(self) -> bool:
            return True

    holder = Holder.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
    assert ray.get(holder.holds.remote())

    def watch() -> None:
        began = folder / "began"
        while not began.exists() or len(began.read_text().split()) < 2:
            time.sleep(0.1)
        ray.kill(holder)

    threading.Thread(target=watch, daemon=True).start()


def main(folder: str, everywhere: str, second_cpus: str) -> None:
    """Train; the cluster has a head without room, and two nodes of which one worker fits one."""
    import ray
    from ray.cluster_utils import Cluster

    from raydistill.config.reading import load
    from raydistill.driver.cluster import WITHOUT_DASHBOARD, environment
    from raydistill.workers.ray_train import train

    with environment(WITHOUT_DASHBOARD):
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        _, second = (cluster.add_node(num_cpus=cpus, labels=LABELS) for cpus in (2, int(second_cpus)))
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        free_after_two_failures(Path(folder), second.node_id)
        overrides = ["distill.cpus_per_worker=1.5", "distill.max_failures=-1", "distill.node_labels={role: trainer}"]
        settings = {"folder": folder, "everywhere": everywhere == "true"}
        given = {"name": "test", "folder": Path(folder), "checkpoints": "checkpoints", "steps": 9, "encoders": False}
        train(body, settings, load(overrides=overrides), **given)
    except StageFailed as failed:
        Path(folder, "failed").write_text(str(failed))
    finally:
        ray.shutdown()
        cluster.shutdown()


def run(folder: Path, everywhere: str, second_cpus: str) -> tuple[list[str], str, str]:
    """Node ids in the order in which workers began, what was said of nodes, why it failed."""
    folder.mkdir()
    paths = os.pathsep.join(sys.path)
    command = [sys.executable, __file__, str(folder), everywhere, second_cpus]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said, failed = (folder / name for name in ("left-out-nodes.txt", "failed"))
    return (folder / "began").read_text().split(), *(
        file.read_text() if file.exists() else "" for file in (said, failed)
    )


def test_workers_go_on_without_a_node_that_fails_alone_and_stay_where_no_other_has_room(tmp_path):
    nodes, said, failed = run(tmp_path / "moves", "false", "2")
    assert len(nodes) == 3
    assert nodes[0] == nodes[1] != nodes[2], "twice there, then on the other one"
    assert failed == ""
    assert f"{nodes[0][:12]}) alone (distill.max_failures_of_node=2); workers go on without it" in said
    nodes, said, failed = run(tmp_path / "stays", "true", "1")  # of 1.5 CPUs that a worker needs
    assert len(set(nodes)) == 1
    assert len(nodes) == 4
    assert said.endswith("; no other has room for 1 worker(s), so they go on there")
    assert "4 failures in a row and no update after 1" in failed


if __name__ == "__main__":
    main(*sys.argv[1:])
