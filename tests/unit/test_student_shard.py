"""A student that two workers share: the numbers of two whole ones, up to rounding, and the same checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.multiprocessing
from two_workers import SETTINGS, WORLD, built, join, resident, trained

from raydistill.config.reading import load
from raydistill.errors import InputError
from raydistill.spaces import load_space

OWN = (
    "student.ema_decay=0.5", "student.max_grad_norm=0.01", "fake_score.updates=1", "distill.batch_size=2", "student.steps=2",
    "distill.gradient_checkpointing=true", "fake_score.shard=true", "distill.non_finite_share=0.5",
)  # fmt: skip


BAD = 2  # of the second worker's samples


def worker(rank: int, folders, results) -> None:
    """Two updates of whole and of shared students, of which one is resumed after the first; what came of them."""
    join(rank, results)
    student, teacher = (load_space(folder) for folder in folders)
    whole, shared = (load(overrides=[*SETTINGS, *OWN, f"student.shard={on}"]) for on in (False, True))

    def kept(distiller) -> dict:
        """Its state, on rank 0 for both workers."""
        state = distiller.state_dict()
        if rank == 0:
            torch.save(state, results / "kept.pt")
        torch.distributed.barrier()
        state = torch.load(results / "kept.pt", weights_only=True)
        torch.distributed.barrier()
        return state

    one = built(rank, whole, student, teacher)
    told = {"whole": (trained(one, bad=BAD), kept(one))}
    two = built(rank, shared, student, teacher)
    first = trained(two, 1, bad=BAD)
    state = kept(two)
    told |= {"shared": (first + trained(two, 1), kept(two)), "held": resident(two.networks.student)}
    told |= {"held whole": resident(one.networks.student)}
    told |= {
        "moments": sum(it.numel() for of in two.gradients.optimizers["student"].state.values() for it in of.values())
    }
    told |= {"held average": resident(two.networks.ema)}
    with two.networks.gathered():
        if rank == 0:
            told |= {"best": two.networks.best_state()["student"], "drawn": drawn(two.networks, student)}
    told |= {"released": resident(two.networks.student)}
    resumed = built(rank, shared, student, teacher, first=1, state=copy.deepcopy(state))
    told |= {"resumed": (trained(resumed, 1), kept(resumed))}
    # the other way around: a shared student's checkpoint in a whole one, and what that keeps
    one.load_state_dict(copy.deepcopy(state))
    told |= {"first": state, "changed": kept(one)}
    torch.save(told, results / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def drawn(networks, space) -> torch.Tensor:
    noise = torch.ones(1, *space.latent_shape)
    text = {name: torch.ones(1, *shape, dtype=kind) for name, (shape, kind) in space.conditioning_layout.items()}
    with torch.no_grad():
        return space.predict(networks.evaluated, noise, torch.full((1,), 0.5), text)


def leaves(tree, path=()):
    """(path, value) of all that a state holds."""
    if isinstance(tree, dict | list | tuple):
        for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, (*path, name))
    else:
        yield path, tree


def assert_same(one, two) -> None:
    one, two = dict(leaves(one)), dict(leaves(two))
    assert one.keys() == two.keys()
    for path, value in one.items():
        assert torch.equal(value, two[path]) if isinstance(value, torch.Tensor) else value == two[path], path


@pytest.mark.full
def test_a_shared_student_is_a_whole_one(sd_folder, flux_folder, tmp_path):
    torch.multiprocessing.spawn(worker, ((sd_folder, flux_folder), tmp_path), nprocs=WORLD)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD))
    for told in (first, second):
        (metrics, state), (others, other) = told["whole"], told["shared"]
        for one, two in zip(metrics, others, strict=True):
            assert two == pytest.approx(one, rel=1e-4)
        assert metrics[0]["student/grad_norm"] > 0.01  # it is clipped
        assert metrics[0]["guard/left_out"] == 1
        assert dict(leaves(state)).keys() == dict(leaves(other)).keys()
        for name in ("student", "ema"):
            for key, value in state[name].items():  # AdamW turns a gradient's rounding near 0 into a step of lr
                assert (other[name][key] - value).norm() <= 1e-3 * (value.norm() + 1e-3), key
        for number, moments in state["optimizers"]["student"]["state"].items():
            for key, value in moments.items():
                close = other["optimizers"]["student"]["state"][number][key]
                assert close.shape == value.shape
                assert (close - value).norm() <= 2e-3 * (value.norm() + 1e-9), (number, key)
        assert_same(told["resumed"], (others[1:], other))
        assert_same(told["first"], told["changed"])
        assert told["held"] == told["released"] < 0.75 * told["held whole"]
        assert told["held average"] == told["held"]
        assert told["moments"] < 2.1 * told["held"]
    assert first["held"] + second["held"] < 1.5 * first["held whole"]
    assert_same(first["best"], first["shared"][1]["ema"])


@pytest.mark.parametrize(
    "others",
    [("distill.min_workers=1",), ("student.kind=lora",), ("student.optimizer=adamw8bit",)],
)
def test_what_cannot_be_shared_is_refused(others):
    with pytest.raises(InputError, match=r"student.*shard"):
        load(overrides=["distill.workers=2", "student.shard=true", *others])
