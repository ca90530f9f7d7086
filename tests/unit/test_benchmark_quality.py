"""What a student's quality costs: when it is good enough, what its updates cost, and that a cell is not done twice."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from raydistill.benchmark.quality import DMD2, VARIANTS, Cell, Variant, crossing, run_cell, table, update_cost
from raydistill.config.reading import CONFIGS
from raydistill.evaluation.evaluator import StudentEvaluator
from raydistill.shapes import WEIGHTS

pytestmark = pytest.mark.full


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_curve_crosses_between_two_evaluations_or_nowhere():
    curve = [[0, 0.5], [5, 0.7], [10, 0.9], [15, 0.8]]
    assert crossing(curve, 0.8) == pytest.approx(7.5)
    assert crossing(curve, 0.7) == pytest.approx(5)
    assert crossing(curve, 0.95) is None
    assert crossing(curve[:1], 0.4) is None, "an update is needed to know"
    assert crossing([[0, 0.5], [5, 0.5]], 0.4) == 0, "good enough before"


def test_costs_follow_from_what_the_recipe_computes():
    default, more, without, dmd2 = (
        update_cost(variant, "shapes")
        for variant in (Variant("a"), Variant("b", k=6), Variant("c", gan=False), Variant("d", separate=True))
    )
    assert default["teacher_forwards"] == pytest.approx(2 * default["batch"]), "guidance takes two forwards a sample"
    assert more["fake_forwards"] == pytest.approx(3 * default["fake_forwards"])
    assert {k: more[k] for k in more if k not in ("fake_forwards", "forwards")} == {
        k: default[k] for k in default if k not in ("fake_forwards", "forwards")
    }
    assert without["fake_forwards"] < default["fake_forwards"]
    assert without["student_forwards"] < default["student_forwards"]
    # one feature pass of part of the network, for each of two fake updates
    assert 0 < dmd2["forwards"] - default["forwards"] < 2 * default["batch"]
    assert dmd2["separate_forwards"] == pytest.approx(dmd2["forwards"] - default["forwards"])


def test_a_cell_ends_when_it_is_good_enough_and_is_not_done_again(tmp_path, monkeypatch):
    cell = Cell(Variant("k = 1", k=1), seed=0, share=0.9, most=2, every=1, pictures=8)
    found = run_cell(cell, tmp_path)
    assert [updates for updates, _ in found["curve"]] == [0, 1, 2]
    assert found["teacher"] > 0.85
    with monkeypatch.context() as patch:
        patch.setattr("raydistill.benchmark.quality.local_distillation", None)
        assert run_cell(cell, tmp_path) == found, "read, not done again"
    easy = Cell(Variant("k = 1", k=1), seed=0, share=0.1, most=3, every=1, pictures=8)
    found_easy = run_cell(easy, tmp_path)
    assert found_easy["curve"] == found["curve"][:2], "same numbers, and a tenth of the teacher is enough at once"
    assert json.loads((tmp_path / easy.file).read_text()) == found_easy
    assert json.loads((tmp_path / cell.file).read_text()) == found, "of the other share"


def test_other_weights_or_another_configuration_are_another_cell(tmp_path, monkeypatch):
    """With the embedded world's files and its configuration in places where they can be changed."""
    weights, configs = tmp_path / "weights", tmp_path / "configs"
    shutil.copytree(WEIGHTS, weights, symlinks=True)
    shutil.copytree(CONFIGS, configs)
    monkeypatch.setattr("raydistill.storage.resolve.WEIGHTS", weights)
    monkeypatch.setattr("raydistill.config.reading.CONFIGS", configs)
    cell = Cell(Variant("k = 1", k=1), seed=0, share=0.9, most=0, every=1, pictures=8)

    def found():
        result = run_cell(cell, tmp_path)
        return result["curve"][0][1], result["teacher"]

    def change(file):
        tensors = load_file(file)
        save_file({name: tensor * 0.8 if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}, file)

    student, teacher = found()
    change(weights / "flux/transformer/diffusion_pytorch_model.safetensors")
    worse_teacher = found()
    assert worse_teacher[0] == student
    assert worse_teacher[1] < teacher
    change(weights / "sd15-onestep/unet/diffusion_pytorch_model.safetensors")
    both_worse = found()
    assert both_worse[0] < student
    with monkeypatch.context() as patch:
        patch.setattr(StudentEvaluator, "draw", None)
        assert found() == both_worse, "read, not done again"
    text = (configs / "shapes.yaml").read_text()
    (configs / "shapes.yaml").write_text(text.replace("sampling_steps: 12", "sampling_steps: 1"))
    assert found()[1] != both_worse[1]


def test_the_table_compares_with_the_recipe_of_dmd2():
    costs = {"forwards": 100.0, "batch": 10}
    rows = [
        {
            "name": VARIANTS[0].name,
            "updates": [[40.0, 44.0], [80.0, 90.0]],
            "best": 0.9,
            "miniature": costs,
            "real": costs,
        },
        {"name": "k = 1", "updates": [[None, 40.0], [None, None]], "best": 0.8, "miniature": costs, "real": costs},
        {
            "name": DMD2,
            "updates": [[42.0, 42.0], [None, 100.0]],
            "best": 0.9,
            "miniature": costs | {"forwards": 400.0},
            "real": costs,
        },
    ]
    settings = {"shares": [0.9, 0.95], "most": 60, "every": 5, "pictures": 8, "seeds": 2, "teacher": 0.99, "start": 0.5}
    text = table({"rows": rows, **settings}).splitlines()
    assert text[0] == "90% of the teacher's 0.990:"
    assert text[4] == f"| {VARIANTS[0].name} | 42 (40, 44) | 10.0 | 420 | 0.25 | 10.0 | 420 | 1.00 |"
    assert text[5] == "| k = 1 | not within 60 (best 0.800) | 10.0 | – | – | 10.0 | – | – |"
    assert text[6].startswith(f"| {DMD2} | 42 (42, 42) | 40.0 | 1,680 | 1.00 |")
    assert text[8] == "95% of the teacher's 0.990:"
    assert text[12] == f"| {VARIANTS[0].name} | 85 (80, 90) | 10.0 | 850 | – | 10.0 | 850 | – |", (
        "DMD2's never came there"
    )
