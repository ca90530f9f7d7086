"""The flow families as ZeRO-3 engines on two spawned gloo ranks: guided scores equal those of the whole network."""

from __future__ import annotations

import os

import pytest
import torch
from tiny_flow_pipelines import SAVE, SHORT

from raydistill.spaces import load_space

WORLD = 2
PROMPTS = ["a small red circle", "a large blue square at the left"]


def _scores(space, network) -> torch.Tensor:
    """x0 estimates [2, C, H, W] of fixed inputs, with the family's guidance."""
    text = space.load_text()
    conditioning, empty = space.encode_prompts(text, PROMPTS), space.encode_prompts(text, [""])
    x_t = torch.randn(2, *space.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return space.predict_x0(network, x_t, torch.tensor([0.2, 0.9]), conditioning, empty, 3.0)


def _rank_process(rank: int, port: int, folders: dict[str, str], results: str) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    from raydistill.teachers import zero3

    store = torch.distributed.TCPStore("127.0.0.1", port, WORLD, rank == 0)
    zero3.init_process_group(rank, WORLD, store, torch.device("cpu"))
    found = {}
    for name, folder in folders.items():
        space = load_space(folder)
        engine = zero3.load_partitioned(space, torch.float32, torch.device("cpu"), rank, WORLD)
        found[name] = _scores(space, engine), zero3.partition_numel(engine) / zero3.full_numel(engine)
    torch.save(found, f"{results}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("names", [SHORT, pytest.param(tuple(SAVE.keys() - SHORT), marks=pytest.mark.full)])
@pytest.mark.full
def test_partitioned_scores_equal_those_of_the_whole_network(names, tmp_path):
    folders = {name: str(SAVE[name](tmp_path / name)) for name in names}
    port = torch.distributed.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False).port
    torch.multiprocessing.spawn(_rank_process, (port, folders, str(tmp_path)), nprocs=WORLD)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]
    for name, folder in folders.items():
        space = load_space(folder)
        whole = _scores(space, space.load_network())
        for found in ranks:
            scores, share = found[name]
            torch.testing.assert_close(scores, whole, rtol=0, atol=1e-5)
            assert share < 0.56, (name, share)
