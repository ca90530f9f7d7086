"""A frozen copy that two workers share: the numbers of two whole copies, up to rounding, in little more than half the memory.

Bits differ because the processor's kernels sum in another order where a gathered weight does not lie on a cache line.
"""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing
from two_workers import SETTINGS, WORLD, built, join, resident, trained

from raydistill.config.reading import load
from raydistill.errors import InputError
from raydistill.spaces import load_space


def worker(rank: int, folders, overrides, results) -> None:
    """The same two updates with a whole copy and with a shared one: state, metrics, how much of the fake score it resident."""
    join(rank, results)
    student, teacher = (load_space(folder) for folder in folders)
    for shard in (False, True):
        config = load(overrides=[*SETTINGS, *overrides, f"fake_score.shard={shard}"])
        distiller = built(rank, config, student, teacher)
        metrics = trained(distiller)
        # once all is computed no block is left gathered
        told = distiller.state_dict(), metrics, resident(distiller.networks.fake.network)
        torch.save(told, results / f"{shard}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("flux", ()),
        pytest.param("flux", ("student.kind=lora", "student.rank=2"), marks=pytest.mark.full),
        pytest.param("sdxl", ("distill.gradient_checkpointing=true",), marks=pytest.mark.full),
        pytest.param(
            "flux", ("distill.mixed_precision=true", "fake_score.base_dtype=bfloat16"), marks=pytest.mark.full
        ),
    ],
)
@pytest.mark.full
def test_a_shared_copy_gives_the_numbers_of_a_whole_one(
    sd_folder, flux_folder, diffusion_folders, tmp_path, family, overrides
):
    folders = (sd_folder, flux_folder if family == "flux" else diffusion_folders[family])
    torch.multiprocessing.spawn(worker, (folders, overrides, tmp_path), nprocs=WORLD)
    for rank in range(WORLD):
        (state, metrics, whole), (other, others, part) = (
            torch.load(tmp_path / f"{shard}-{rank}.pt", weights_only=True) for shard in (False, True)
        )
        assert state.keys() == other.keys()
        for name in ("student", "fake"):
            assert state[name].keys() == other[name].keys()
            for key, value in state[name].items():  # AdamW turns a gradient's rounding near 0 into a step of lr
                assert (other[name][key] - value).norm() <= 1e-3 * (value.norm() + 1e-3), key
        for one, two in zip(metrics, others, strict=True):
            assert two == pytest.approx(one, rel=1e-4)
            assert one["loss/fake"] > 0
        assert metrics[0] != metrics[1]
        assert part < 0.75 * whole


@pytest.mark.parametrize("other", ["fake_score.kind=full", "distill.min_workers=1"])
def test_what_cannot_be_shared_is_refused(other):
    with pytest.raises(InputError, match=r"fake_score\.shard"):
        load(overrides=["distill.workers=2", "fake_score.shard=true", other])
