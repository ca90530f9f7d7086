"""The Bridge's ablation: what its cells differ in, that they resume, and that its tables say what was measured."""

from __future__ import annotations

import json

import pytest
import torch
from pair_sets import write_upscaled

from raydistill.bridge import trainer
from raydistill.bridge.model import Bridge, projector_parameters
from raydistill.bridge.objective import build_objective
from raydistill.config.reading import load, validate
from raydistill.driver import bridge_ablation
from raydistill.driver.bridge_ablation import TABLES, VARIANTS, cells, markdown, result_file, summarise, train_cell
from raydistill.spaces import load_space


@pytest.fixture(scope="module")
def config(sd_folder, flux_folder):
    return load(
        None,
        [
            f"student.model={sd_folder}", f"teacher.model={flux_folder}", "bridge.batch_size=4", "bridge.steps=4",
            "bridge.embed_dim=24", "bridge.depths=[2]", "bridge.heads=2", "bridge.ablation_seeds=2",
            "bridge.checkpoint_every=2", "bridge.lr_decay=none",
        ],
    )  # fmt: skip


@pytest.fixture(scope="module")
def planned(config, sd_folder, flux_folder):
    return cells(config, load_space(sd_folder), load_space(flux_folder))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return str(write_upscaled(tmp_path_factory.mktemp("pairs")))


def test_cells_differ_in_the_named_factors_alone_and_have_equal_budgets(config, planned, sd_folder, flux_folder):
    student, teacher = load_space(sd_folder), load_space(flux_folder)
    assert len(planned) == 2 * len(VARIANTS)
    budget = projector_parameters(student, teacher, config.bridge)
    for cell in planned:
        variant = next(v for v in VARIANTS if v.name == cell.variant)
        own, given = validate(cell.config), config.model_dump()
        assert (own.bridge.projector, own.bridge.prior) == (variant.projector, variant.prior)
        assert (own.bridge.attention.weight > 0) == variant.attention
        assert own.run.seed == config.run.seed + cell.seed
        assert cell.parameters == sum(
            p.numel() for p in Bridge.create(student, teacher, own.bridge).trainable_parameters()
        )
        assert cell.parameters == pytest.approx(budget, rel=0.12)
        same = cell.config["bridge"] | {key: given["bridge"][key] for key in ("projector", "prior", "embed_dim")}
        assert same["attention"] | {"weight": 1.0} == given["bridge"]["attention"]
        assert same | {"attention": None} == given["bridge"] | {"attention": None}
    assert {name for names in TABLES.values() for name in names} == {v.name for v in VARIANTS}


def test_an_interrupted_cell_goes_on_with_the_same_numbers(planned, pairs, tmp_path, monkeypatch):
    cell = next(cell for cell in planned if cell.variant == "full")
    whole = train_cell(cell, pairs, tmp_path, None)
    assert json.loads(result_file(tmp_path, cell).read_text()) == whole
    assert sorted(file.name for file in tmp_path.iterdir()) == ["full-seed0.json"]
    other = tmp_path / "interrupted"
    other.mkdir()

    class Killed(Exception):
        pass

    real = trainer.build_trainer

    def dies(*arguments, **more):
        trainer = real(*arguments, **more)
        step = trainer.step

        def counted(batch):
            if trainer.step_count == 3:
                raise Killed
            return step(batch)

        trainer.step = counted
        return trainer

    with monkeypatch.context() as patched:
        patched.setattr(bridge_ablation, "build_trainer", dies)
        with pytest.raises(Killed):
            train_cell(cell, pairs, other, None)
    assert not result_file(other, cell).exists()
    assert torch.load(other / "full-seed0.pt", weights_only=True)["step"] == 2
    assert train_cell(cell, pairs, other, None)["metrics"] == whole["metrics"]


def test_every_seed_holds_out_the_same_pairs_and_takes_them_in_its_own_order(planned, pairs):
    """Or the spread over seeds would mix training with another validation set."""
    one, two = (
        build_objective(validate(cell.config), pairs, split_seed=cell.split_seed)
        for cell in planned
        if cell.variant == "baseline"
    )
    assert one.held_out_ids.tolist() == two.held_out_ids.tolist()
    assert one.batch(0).ids.tolist() != two.batch(0).ids.tolist()


def test_the_tables_hold_mean_and_spread_and_the_order(planned):
    psnr = {"mlp": 18, "unet": 24, "baseline": 21, "attention": 23, "l1-only": 22, "full": 25}
    results = [
        {
            "variant": cell.variant, "seed": cell.seed, "parameters": cell.parameters, "embed_dim": 8, "steps": 4,
            "seconds": 1.0,
            "metrics": {"eval/l1": 0.04, "eval/psnr": psnr[cell.variant] + cell.seed, "eval/ssim": 0.7},
        }
        for cell in planned
    ]  # fmt: skip
    summary = summarise(results)
    full = summary["rows"]["full"]
    assert full["psnr"] == {"mean": 25.5, "std": pytest.approx(0.5**0.5)}
    assert full["paper"] == (0.035, 24.97, 0.75)
    assert summary["paper_order"] == {"components": True, "objective": True, "architecture": False}
    lines = markdown(summary).splitlines()
    assert len(lines) == 2 + sum(len(names) for names in TABLES.values())
    assert sum("| 25.50 ± 0.71 |" in line and "0.035 / 24.97 / 0.75" in line for line in lines) == 2  # in two tables
