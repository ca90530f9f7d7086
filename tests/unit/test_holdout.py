"""A held-out set that is split off the training prompts: by their text, for good, and out of every training set."""

from __future__ import annotations

import shutil

import pytest
from torch import zeros

from raydistill.commands.evaluate import arguments_of, evaluation_of
from raydistill.config.reading import load
from raydistill.data.holdout import is_held_out
from raydistill.data.pairs import write_pairs
from raydistill.data.prompts import held_out_prompts, training_prompts
from raydistill.data.synthesis import fingerprint_of
from raydistill.driver.preflight import check_inputs
from raydistill.driver.stages import recipe_of
from raydistill.errors import InputError
from raydistill.evaluation.promptsets import open_prompts
from raydistill.shapes import WEIGHTS
from raydistill.spaces import load_space


@pytest.fixture
def split(tmp_path):
    """A configuration whose prompts are these lines, a share of them held out."""
    file = tmp_path / "prompts.txt"

    def configure(lines, share, *more):
        file.write_text("".join(f"{line}\n" for line in lines))
        asked = [f"prompts.path={file}", "evaluation.prompts=null", f"evaluation.holdout={share}"]
        return load(overrides=[*asked, f"storage={tmp_path / 'storage'}", "evaluation.judge=null", *more])

    return configure


LINES = [f"a photo of {n} cats" for n in range(2000)]


def both(config):
    return training_prompts(config), held_out_prompts(config)


def test_every_prompt_is_on_one_side_with_the_number_of_its_row(split):
    train, held = both(split(LINES, 0.1))
    assert set(train.prompts).isdisjoint(held.prompts)
    rows = dict(zip([*train.ids, *held.ids], [*train.prompts, *held.prompts], strict=True))
    assert [rows[n + 1] for n in range(len(LINES))] == LINES
    assert 150 <= len(held) <= 250  # 200 with a standard deviation of 13
    assert f"{len(train)} prompts of 2000 rows; {len(held)} are held out" in str(train.report)
    assert f"{len(held)} prompts of 2000 rows; {len(train)} are to train on" in str(held.report)


def test_copies_of_a_prompt_are_on_one_side_in_whatever_case_and_spacing(split):
    _, held = both(split(LINES, 0.1))
    one = held.prompts[0]
    copies = [one, one.upper(), one.replace(" ", "   "), f"  {one}"]
    train, more = both(split([*LINES, *copies], 0.1))
    assert len(more) == len(held) + len(copies)
    assert set(train.prompts).isdisjoint(more.prompts)


def test_a_file_that_grows_or_is_shuffled_changes_no_side(split):
    train, held = (set(side.prompts) for side in both(split(LINES, 0.05)))
    more_train, more_held = (set(s.prompts) for s in both(split([*reversed(LINES), *map(str, range(500))], 0.05)))
    assert train < more_train
    assert held < more_held


def test_a_larger_share_holds_out_what_a_smaller_one_does():
    smaller, larger = ({line for line in LINES if is_held_out(line, share)} for share in (0.02, 0.2))
    assert smaller < larger


@pytest.mark.parametrize(
    ("lines", "share", "told"),
    [
        (LINES, 0.001, r"evaluation\.holdout=0\.001: of 2000 prompts of .*prompts\.txt, \d are held out; 16 are needed: 0\.016"),
        (LINES, 0.999, r"evaluation\.holdout=0\.999: of 2000 prompts of .*, \d are left to train on; 16 are needed"),
        (LINES[:20], 0.5, r"of 20 prompts of .*; name a larger file, or held-out prompts of their own"),
        (["one"] * 500, 0.5, r"of 500 prompts of .*, [01] are"),
    ],
)  # fmt: skip
def test_a_share_that_leaves_too_few_is_refused_in_one_line(split, tmp_path, lines, share, told):
    with pytest.raises(InputError, match=told) as refused:
        check_inputs(split(lines, share))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "storage").exists()


def test_held_out_prompts_are_named_once():
    with pytest.raises(
        InputError, match=r"evaluation: holdout=0\.1, and prompts names .*: set evaluation\.holdout=null or"
    ):
        load(overrides=["evaluation.holdout=0.1"])
    with pytest.raises(InputError, match="evaluation: prompts=null: name a file"):
        load(overrides=["evaluation.prompts=null"])
    with pytest.raises(InputError, match=r"evaluation\.holdout: .*less than 1"):
        load(overrides=["evaluation.holdout=1", "evaluation.prompts=null"])


def test_an_evaluation_of_a_finished_run_reads_the_prompts_that_the_run_held_out(split, tmp_path):
    config = split(LINES, 0.1)
    _, held = both(config)
    found = open_prompts(config.prompts.path, tmp_path, holdout=0.1)
    assert (list(found.prompts.prompts), found.prompts.ids.tolist()) == (list(held.prompts), held.ids.tolist())
    assert found.name == "prompts-heldout"
    assert len(open_prompts(config.prompts.path, tmp_path).prompts) == len(LINES)
    with pytest.raises(InputError, match=r"^--holdout 0\.001: of 2000 prompts of .*prompts\.txt, \d are held out"):
        open_prompts(config.prompts.path, tmp_path, holdout=0.001)
    with pytest.raises(InputError, match="--holdout belongs to a file of training prompts"):
        open_prompts("shapes-pairs", tmp_path, holdout=0.1)
    with pytest.raises(ValueError, match=r"--holdout 1: must be above 0 and below 1"):
        evaluation_of(arguments_of(["shapes:sd15", "--prompts", config.prompts.path, "--holdout", "1"]))


@pytest.mark.full
def test_synthesis_draws_no_prompt_that_is_held_out_and_pairs_with_one_are_refused(split, tmp_path):
    store = f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"
    config = split(LINES, 0.1, store)
    inputs = check_inputs(config)
    drawn = set(inputs.prompts.at(config.run.seed, range(2 * len(LINES)))[1])
    assert recipe_of(config, inputs).source is inputs.prompts
    assert drawn == set(LINES) - set(inputs.held_out.prompts)
    assert fingerprint_of(inputs.prompts) != fingerprint_of(inputs.held_out)

    space = load_space(WEIGHTS / "sd15")
    shape = space.latent_shape
    write_pairs(
        tmp_path / "pairs", 0, prompts=[inputs.held_out.prompts[0], "other"], prompt_ids=[0, 1], seeds=[0, 0],
        z_teacher=zeros(2, 8, 16, 16), z_student=zeros(2, *shape),
    )  # fmt: skip
    with pytest.raises(InputError, match=r"^bridge\.pairs: 1 prompts are also in the held-out part of .*prompts\.txt"):
        check_inputs(split(LINES, 0.1, store, f"bridge.pairs={tmp_path / 'pairs'}"))
    shutil.rmtree(tmp_path / "pairs")
