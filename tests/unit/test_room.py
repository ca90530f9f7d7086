"""What could never be placed is refused with exit code 2 before anything starts."""

from __future__ import annotations

import pytest
import torch

from raydistill.config.reading import load
from raydistill.driver import room
from raydistill.errors import InputError

CORES = 2


@pytest.fixture
def two_cores(monkeypatch):
    """This machine has two cores and no GPU, whatever it has."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(room, "get_num_cpus", lambda *_: CORES)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


IMPOSSIBLE = [
    (["distill.workers=64"], "train workers cannot be placed: asked for 64 of 0.5 CPU each"),
    (["distill.gpus_per_worker=1"], "train workers cannot be placed: asked for 1 of 0.5 CPU + 1 GPU each, room for 0"),
    (["teachers.gpus_per_rank=1"], "teacher ranks cannot be placed: asked for 2 of 0.2 CPU + 1 GPU each"),
    (["teachers.replicas=8"], "teacher ranks cannot be placed: asked for 16"),
    (["prompts.gpus_per_encoder=0.5"], "text encoders cannot be placed"),
    (["bridge.checkpoint=null", "synthesis.gpus_per_encoder=1"], "the actors of synthesis cannot be placed"),
    (
        ["bridge.checkpoint=null", "synthesis.images=/sets/*.tar", "synthesis.cpus_per_encoder=1.5"],
        "the reader of images cannot be placed: asked for 1 of 1.5 CPU each",
    ),
    (["distill.node_labels={role: trainer}"], "on the 0 node(s) labelled role=trainer"),
]


@pytest.mark.parametrize(("overrides", "message"), IMPOSSIBLE, ids=lambda it: it[0] if isinstance(it, list) else "")
def test_what_is_too_much_for_this_machine_is_named(two_cores, overrides, message):
    with pytest.raises(InputError, match="this machine, which has no cluster") as error:
        room.check_machine(load(overrides=overrides))
    assert message in str(error.value)


def test_an_impossible_run_ends_with_two_and_leaves_nothing(two_cores, run_script, tmp_path):
    gpus = ["distill.gpus_per_worker=1", "teachers.gpus_per_rank=1"]
    code, output, error = run_script("distill", f"storage={tmp_path / 'storage'}", "run.name=mine", *gpus)
    assert code == 2
    assert "teacher ranks cannot be placed: asked for 2 of 0.2 CPU + 1 GPU each, room for 0" in error
    assert "fits" not in output
    assert not (tmp_path / "storage").exists()


def test_the_default_run_has_room_on_two_cores(two_cores):
    room.check_machine(load())
    room.check_machine(load(overrides=["bridge.checkpoint=null"]))


def test_a_command_asks_for_what_it_starts_alone(two_cores, run_script, tmp_path):
    """Pairs need no train workers, and a Bridge on pairs that are there needs no teachers."""
    pairs = ["teacher rank", "synthesis, prompts", "synthesis, pictures"]
    room.check_machine(load(overrides=["distill.workers=64"]), pairs)
    with pytest.raises(InputError, match="teacher ranks"):
        room.check_machine(load(overrides=["teachers.gpus_per_rank=1", "bridge.checkpoint=null"]), pairs)
    bridge = ["bridge.checkpoint=null", "bridge.pairs=x", "teachers.gpus_per_rank=1"]
    room.check_machine(load(overrides=bridge), [*pairs, "Bridge training"])
    with pytest.raises(InputError, match="train workers"):
        room.check_machine(load(overrides=[*bridge, "distill.workers=64"]), [*pairs, "Bridge training"])


def test_a_service_that_runs_already_needs_no_room(two_cores):
    room.check_machine(load(overrides=["teachers.gpus_per_rank=1", "teachers.service=teacher-other"]))


def test_a_cluster_that_is_named_is_asked_itself(two_cores, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    room.check_machine(load(overrides=["distill.workers=64"]))


def test_a_cluster_is_believed_where_an_autoscaler_can_add_nodes(monkeypatch):
    node = {"Resources": {"CPU": 2.0}, "Labels": {}}
    monkeypatch.setattr(room, "labelled_nodes", lambda labels: [node])
    monkeypatch.setattr(room, "autoscaler_present", lambda: False)
    monkeypatch.setattr(room, "ROOM_PATIENCE_S", 0.0)
    room.check_cluster(load())
    with pytest.raises(InputError, match="no autoscaler can add nodes to, train workers cannot be placed"):
        room.check_cluster(load(overrides=["distill.workers=64"]))
    monkeypatch.setattr(room, "autoscaler_present", lambda: True)
    room.check_cluster(load(overrides=["distill.workers=64"]))


def test_nodes_that_are_still_joining_are_waited_for(monkeypatch, capsys):
    node, looks = {"Resources": {"CPU": 2.0}, "Labels": {}}, iter(range(99))
    monkeypatch.setattr(room, "labelled_nodes", lambda labels: [node] * (1 + 20 * next(looks)))
    monkeypatch.setattr(room, "autoscaler_present", lambda: False)
    room.check_cluster(load(overrides=["distill.workers=64"]))
    assert next(looks) == 2
    assert "its 1 node(s) are too few: waiting 60 s for others" in capsys.readouterr().out


def test_an_impossible_evaluation_ends_with_two_and_leaves_nothing(two_cores, run_script, tmp_path):
    code, _, error = run_script(
        "evaluate", "shapes:flux", "--steps", 2, "--count", 2, "--storage", tmp_path, "--gpus", 1
    )
    assert code == 2
    assert "the actors of draw cannot be placed: asked for 1 of 0.25 CPU + 1 GPU each, room for 0" in error
    assert "on this machine, which has no cluster" in error
    assert not list(tmp_path.iterdir())
