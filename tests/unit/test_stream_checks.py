"""What is checked before a Bridge is trained on a stream of pictures, and what the run is then made of."""

from __future__ import annotations

import pytest
from PIL import Image

from raydistill.commands.synthesize import JOB
from raydistill.config.reading import changed, load, needs_pairs, stages_of
from raydistill.data.pictures import Pictures
from raydistill.driver import binding, room
from raydistill.driver.job import _introduce
from raydistill.driver.preflight import check_inputs
from raydistill.driver.run_folder import open_run_folder
from raydistill.driver.single_stages import check_ablation
from raydistill.errors import InputError
from raydistill.planning.memory import ROLES


@pytest.fixture(autouse=True)
def _own_tracking(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    return f"tracking.uri=sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8), (80 * number, 0, 0)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def configure(tmp_path, store, folder):
    def configure(*overrides: str):
        stream = ["bridge.checkpoint=null", "bridge.source=stream", f"synthesis.images={folder}"]
        return load(overrides=[f"storage={tmp_path / 'storage'}", store, *stream, *overrides])

    return configure


@pytest.mark.full
def test_a_streamed_bridge_stores_no_pairs(configure):
    config = configure()
    assert not needs_pairs(config)
    assert stages_of(config)[:2] == ["bridge", "distill"]
    drawn = configure("discriminator.real_data=null", "discriminator.real_source=samples")
    assert stages_of(drawn)[:3] == ["samples", "bridge", "distill"]
    assert stages_of(load(overrides=["bridge.source=stream"]))[0] == "distill"  # a finished Bridge reads nothing
    for asked in (config, configure("synthesis.augment_share=0.5")):  # a Bridge alone sees such pictures
        inputs = check_inputs(asked)
        assert isinstance(inputs.images, Pictures)
        assert len(inputs.images.shards) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("bridge.pairs=shapes:samples/flux", r"^bridge\.pairs: with bridge\.source=stream .*null"),
        ("bridge.trainable=true", r"^bridge\.trainable: with bridge\.source=stream its anchor needs stored pairs"),
        ("discriminator.real_data=null", r"^discriminator\.real_source=pairs: .*discriminator\.real_source=samples"),
        ("synthesis.images=null", r"^synthesis\.images: with bridge\.source=stream it names no pictures"),
        ("synthesis.image_count=7", r"^synthesis\.image_count: with bridge\.source=stream a stream reads all of them"),
        ("synthesis.images=/nowhere/*.tar", r"^synthesis\.images: /nowhere/\*\.tar"),
    ],
)
def test_what_a_stream_cannot_do_is_refused_by_key(configure, change, said):
    with pytest.raises(InputError, match=said):
        check_inputs(configure(change))


OF_A_STUDENT = ("discriminator.real_data=null", "bridge.trainable=true", "evaluation.metrics=[judge,clipscore]")


@pytest.mark.full
def test_a_job_that_trains_the_bridge_alone_needs_no_reals_and_no_metrics(configure, capsys):
    config = configure(*OF_A_STUDENT, "evaluation.weights.clipscore=/nowhere", "run.name=alone")
    inputs = check_inputs(config, distils=False)
    assert isinstance(inputs.images, Pictures)
    assert not [key for key in binding.bind(config, open_run_folder(config), inputs).inputs if "weights" in key]
    roles = ["teacher rank", "synthesis, pictures", "Bridge training"]
    assert len(list(room.needs(config, roles))) == 1
    _introduce(config, open_run_folder(config), ("synthesis", "bridge"))
    assert "synthesis" not in capsys.readouterr().out
    with pytest.raises(InputError, match="evaluation.weights.clipscore"):
        check_inputs(config)


def test_pairs_are_made_whatever_a_configuration_says_of_its_bridge_s_source(configure):
    config = changed(configure("synthesis.images=null", "discriminator.real_data=null"), JOB.changes)
    assert stages_of(config)[0] == "synthesis"
    assert check_inputs(config, distils=False).images is None


def test_variants_are_trained_on_stored_pairs_alone(configure):
    config = configure()
    with pytest.raises(InputError, match=r"^bridge\.source=stream: --ablate trains its variants on stored pairs"):
        check_ablation(config, open_run_folder(config), check_inputs(config))


def test_a_run_is_bound_to_its_pictures(configure, folder):
    config = configure("run.name=mine")
    run = open_run_folder(config)
    run.path.mkdir(parents=True)
    binding.keep(binding.bind(config, run, check_inputs(config)), run)
    binding.bind(config, run, check_inputs(config))
    Image.new("RGB", (9, 9)).save(folder / "3.png")
    with pytest.raises(InputError, match=r"synthesis\.images .*: not the same content as when the run began"):
        binding.bind(config, run, check_inputs(config))


def test_encoders_and_readers_of_every_worker_need_room_beside_the_trainers(configure):
    config = configure(
        "distill.workers=3", "synthesis.encoders=2", "synthesis.gpus_per_encoder=0.5", "bridge.batch_size=6"
    )
    alone = list(room.needs(config, ["Bridge training"]))
    whole = list(room.needs(config))
    assert [need.what for need in alone[0]] == ["train workers", "the encoders of pictures", "the readers of pictures"]
    assert [need.what for need in whole[0]][0] == "teacher ranks"
    assert [need.what for need in whole[-1]] == [need.what for need in alone[0]], "before the teachers start"
    encoders, readers = alone[0][1:]
    assert (encoders.count, encoders.amounts) == (6, {"CPU": 0.2, "GPU": 0.5})
    assert (readers.count, readers.amounts) == (6, {"CPU": 0.2})
    assert ROLES["synthesis, pictures"].used(config)
    with pytest.raises(
        InputError, match=r"the encoders of pictures cannot be placed: asked for 6 of 0\.2 CPU \+ 0\.5 GPU"
    ):
        room._check(config, ["Bridge training"], [({}, {"CPU": 64.0, "GPU": 2.0})], "this machine")
