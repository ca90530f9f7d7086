"""A worker that does not come to a meeting of all is named, with its node, by those that wait: in words, and in gloo's error."""

from __future__ import annotations

import datetime
import os
import socket
import time

import pytest
import torch

from raydistill.config.reading import load
from raydistill.workers.ray_train import Worker, network_environment
from raydistill.workers.waiting import watch

TIMEOUT_S = 10


def work(rank, folder):
    """Both meet twice; then the second one does not come, and lives on."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    patience = datetime.timedelta(seconds=TIMEOUT_S)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=patience)
    own = Worker(rank, 2, torch.device("cpu"))
    watch("distill", rank, 2, TIMEOUT_S)
    mine = torch.full((3,), float(rank))
    own.average([mine])
    assert own.from_rank_0(rank) == 0
    assert mine.tolist() == [0.5] * 3
    if rank == 1:
        time.sleep(TIMEOUT_S + 5)
        os._exit(0)
    with pytest.raises(RuntimeError) as error:
        own.average([mine])
    (folder / "said").write_text(str(error.value))


@pytest.mark.full
def test_who_keeps_the_others_waiting_is_named(tmp_path, capfd):
    torch.multiprocessing.spawn(work, (tmp_path,), nprocs=2)
    named = (
        f"worker 0 waits for rank 1 on node {socket.gethostname()}, which has not come to the meeting of all workers"
    )
    assert (tmp_path / "said").read_text().startswith(f"{named}: ")
    assert f"distill: {named} for 8 s (distill.collective_timeout_s)" in capfd.readouterr().out


def test_workers_meet_on_the_interface_that_is_named():
    assert network_environment(load()) == {}
    asked = network_environment(load(overrides=["distill.network_interface=eth0"]))
    assert asked == {"env_vars": {"NCCL_SOCKET_IFNAME": "eth0", "GLOO_SOCKET_IFNAME": "eth0"}}
