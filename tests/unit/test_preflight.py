"""What is refused before anything starts, and what a run's folder keeps."""

from __future__ import annotations

import json
import shutil
import sqlite3

import pytest
import torch
import yaml

from raydistill.config.reading import CONFIGS, load
from raydistill.data.pairs import write_pairs
from raydistill.driver.preflight import _waits, check_inputs, check_real_data
from raydistill.driver.run_folder import create_run_folder, open_run_folder
from raydistill.errors import InputError
from raydistill.shapes.captions import single_scenes
from raydistill.spaces.folder import weight_files
from raydistill.storage.resolve import resolve
from raydistill.tracking import store as store_module

CAPTION = single_scenes(held_out=False)[0].caption
PASSWORD = "hunter2"


@pytest.fixture
def configure(tmp_path):
    return lambda *overrides: load(overrides=[f"storage={tmp_path / 'storage'}", *overrides])


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    """A store for checks that pass: making one takes seconds."""
    return f"tracking.uri=sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture(autouse=True)
def _own_tracking(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_the_default_configuration_passes(configure, tmp_path):
    inputs = check_inputs(configure())
    assert len(inputs.prompts) > len(inputs.held_out) > 0
    assert inputs.teacher.latent_shape != inputs.student.latent_shape
    assert (tmp_path / "storage" / "mlflow.db").is_file()


def test_workers_that_would_give_each_other_up_before_the_teacher_are_told_of():
    asked = ["distill.workers=2", "teachers.retry_for_s=3600"]
    (note,) = _waits(load(overrides=asked))
    assert note == (
        "note: teachers.retry_for_s=3600 cannot be waited for: workers give each other up after "
        "distill.collective_timeout_s=1800; set this above it"
    )
    assert _waits(load(overrides=["teachers.retry_for_s=3600"])) == ()
    for settled in ("distill.collective_timeout_s=3700", "vsd.weight=0"):
        assert _waits(load(overrides=[*asked, settled])) == ()
    assert _waits(load(CONFIGS / "sd35_medium_sd15.yaml")) == ()


@pytest.mark.parametrize("key", ["prompts.path", "evaluation.prompts"])
def test_a_prompt_that_the_judge_cannot_read_is_named_by_key_and_row(configure, tmp_path, store, key):
    file = tmp_path / "own.txt"
    own = CAPTION if key == "prompts.path" else single_scenes(held_out=True)[0].caption
    file.write_text(f"{own}\n\n{own}\na photo of a cat\n")
    with pytest.raises(InputError, match=rf"^{key}: row 4: .*a photo of a cat.*evaluation\.judge=null"):
        check_inputs(configure(f"{key}={file}"))
    assert not (tmp_path / "storage").exists()
    file.write_text(f"{own}\n\n{own}\n")
    check_inputs(configure(f"{key}={file}", store))


def test_any_prompts_pass_without_the_judge(configure, tmp_path, store):
    (tmp_path / "own.txt").write_text("a photo of a cat\n")
    (tmp_path / "held.txt").write_text("a photo of a dog\n")
    files = (f"prompts.path={tmp_path / 'own.txt'}", f"evaluation.prompts={tmp_path / 'held.txt'}")
    assert check_inputs(configure(*files, store, "evaluation.judge=null")).prompts.prompts == ["a photo of a cat"]
    with pytest.raises(InputError, match=r"prompts\.path: row 1"):
        check_inputs(configure(*files))


def test_a_metric_that_the_judge_does_not_give_is_refused_with_those_it_gives(configure, tmp_path, store):
    with pytest.raises(InputError, match=r"^evaluation\.metric: .*mean, all, size, color.*'colour'"):
        check_inputs(configure("evaluation.metric=colour"))
    assert not (tmp_path / "storage").exists()
    check_inputs(configure("evaluation.metric=color", store))


def test_the_identity_between_unequal_spaces_is_refused(configure, tmp_path, store):
    with pytest.raises(InputError, match=r"bridge\.projector identity needs equal latent shapes, not \(4, 8, 8\)"):
        check_inputs(configure("bridge.checkpoint=null", "bridge.projector=identity"))
    assert not (tmp_path / "storage").exists()
    same = ("teacher.model=shapes:sd15", "discriminator.real_data=null")
    check_inputs(configure("bridge.checkpoint=null", "bridge.projector=identity", store, *same))


def test_mistakes_leave_no_store_behind(configure, tmp_path):
    with pytest.raises(InputError, match=r"prompts\.path: .* does not exist"):
        check_inputs(configure("prompts.path=no/such.txt"))
    assert not (tmp_path / "storage").exists()


# -- tracking.uri ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "not a database", "no such place", "unknown scheme"])
def test_a_tracking_store_that_cannot_be_opened_is_a_configuration_error(configure, tmp_path, kind, monkeypatch):
    place = tmp_path / "store"
    if kind != "unknown scheme":
        monkeypatch.setattr(store_module, "client_of", lambda uri: pytest.fail("MLflow would retry it for 100 s"))
    if kind == "folder":
        place.mkdir()
    elif kind == "not a database":
        place.write_text("dear diary " * 1000)
    elif kind == "no such place":
        place = "/proc/none/mlflow.db"
    uri = "gopher://example.invalid/mlflow" if kind == "unknown scheme" else f"sqlite:///{place}"
    with pytest.raises(InputError, match=r"^tracking\.uri: tracking store .* cannot be used: "):
        check_inputs(configure(f"tracking.uri={uri}"))


@pytest.mark.full
def test_the_configured_store_is_the_one_that_is_made(configure, tmp_path):
    check_inputs(configure(f"tracking.uri=sqlite:///{tmp_path / 'elsewhere' / 'runs.db'}"))
    with sqlite3.connect(tmp_path / "elsewhere" / "runs.db") as database:
        assert database.execute("select count(*) from experiments").fetchone()[0] >= 1
    assert not (tmp_path / "storage").exists()


@pytest.mark.parametrize(
    "uri",
    [
        f"https://me:{PASSWORD}@mlflow.example/path",
        f"postgresql://me:{PASSWORD}@db.example:5432/mlflow",
        f"postgresql://db.example/mlflow?user=me&password={PASSWORD}",
    ],
)
def test_a_password_in_the_tracking_uri_is_not_written_and_no_reason_to_refuse_a_resume(configure, uri):
    config = configure("run.name=secret", f"tracking.uri={uri}")
    run = open_run_folder(config)
    create_run_folder(run, config)
    for file in run.path.rglob("*"):
        assert PASSWORD not in file.read_text()
    shown = yaml.safe_load((run.path / "config.yaml").read_text())["tracking"]["uri"]
    assert "example" in shown
    assert "***" in shown
    assert config.tracking.uri == uri, "the run itself must still know it"

    again = open_run_folder(config)
    assert again == run
    create_run_folder(again, config)
    assert PASSWORD not in (run.path / "config.yaml").read_text()


def test_a_resume_with_other_numbers_is_refused_by_key(configure):
    config = configure("run.name=mine")
    create_run_folder(open_run_folder(config), config)
    open_run_folder(configure("run.name=mine", "tracking.experiment=other", "distill.checkpoint_every=7"))
    with pytest.raises(InputError, match=r"run\.name=mine exists with other settings.*student\.lr"):
        open_run_folder(configure("run.name=mine", "student.lr=0.5"))


def test_an_identity_bridge_takes_no_checkpoint():
    with pytest.raises(InputError, match="bridge.checkpoint=null"):
        check_inputs(load(overrides=["bridge.projector=identity"]))


def pair_set(folder, prompt, shapes=((8, 16, 16), (4, 8, 8))):
    z_teacher, z_student = (torch.zeros(2, *shape) for shape in shapes)
    write_pairs(
        folder, 0, prompts=[prompt, CAPTION], prompt_ids=[0, 1], seeds=[0, 0], z_teacher=z_teacher, z_student=z_student
    )
    return f"bridge.pairs={folder}"


def test_pairs_of_the_bridge_must_hold_out_the_held_out_prompts_and_be_of_these_spaces(configure, tmp_path, store):
    held_out = single_scenes(held_out=True)[0].caption
    leaking = held_out.upper().replace(" ", "  ")  # in whatever case and spacing
    with pytest.raises(InputError, match=r"^bridge\.pairs: 1 prompts are also in evaluation\.prompts"):
        check_inputs(configure(pair_set(tmp_path / "leaking", leaking)))
    with pytest.raises(InputError, match="z_T"):
        check_inputs(configure(pair_set(tmp_path / "foreign", CAPTION, ((4, 16, 16), (4, 8, 8)))))
    notes = check_inputs(configure(pair_set(tmp_path / "good", CAPTION), store)).notes
    said = "do not say which VAEs made them; only their shapes were compared"
    assert notes[-1] == f"note: bridge.pairs: pairs in {tmp_path / 'good'} {said}"


def test_changed_pictures_are_no_real_data_of_the_discriminator(configure, tmp_path):
    """They may be named for a Bridge, and made where no discriminator takes them."""
    folder = tmp_path / "changed"
    folder.mkdir()
    (folder / "synthesis.json").write_text('{"augment_share": 0.25}')

    def check(*overrides):
        check_real_data(configure(*overrides))

    own = ("bridge.checkpoint=null", "synthesis.augment_share=0.5")
    check()
    check(*own)  # the real data are those of the package
    check(f"bridge.pairs={folder}", "bridge.checkpoint=null")
    check(f"discriminator.real_data={folder}", "discriminator.weight=0")
    with pytest.raises(InputError, match=r"^synthesis\.augment_share: 50% of these pictures are blended"):
        check(*own, "discriminator.real_data=null")
    for key, named in (("discriminator.real_data", []), ("bridge.pairs", ["discriminator.real_data=null"])):
        with pytest.raises(InputError, match=rf"^{key}: 25% of these pictures are blended"):
            check(*named, f"{key}={folder}")
    (folder / "synthesis.json").write_text("{")
    with pytest.raises(InputError, match=r"synthesis\.json: cannot be read"):
        check(f"discriminator.real_data={folder}")


@pytest.mark.parametrize("trained", ["bridge.checkpoint=null", "bridge.trainable=true"])
def test_a_batch_of_the_bridge_that_its_workers_cannot_divide_is_refused(configure, store, trained):
    settings = ("distill.workers=3", "bridge.batch_size=32")
    with pytest.raises(InputError, match=r"^bridge\.batch_size: 32 pairs cannot be divided by 3 workers"):
        check_inputs(configure(trained, *settings))
    check_inputs(configure(*settings, store))  # a finished Bridge that stays as it is has no batches


def test_an_identity_cannot_be_trained_along(configure):
    settings = ("teacher.model=shapes:sd15", "bridge.checkpoint=null", "bridge.projector=identity")
    with pytest.raises(InputError, match=r"bridge\.trainable=true: the identity has nothing to train"):
        check_inputs(configure(*settings, "discriminator.real_data=null", "bridge.trainable=true"))


UNTRAINED = "bridge.checkpoint=null"


def test_a_bridge_that_cannot_be_built_is_refused_before_its_pairs_are_made(configure, tmp_path):
    with pytest.raises(InputError, match=r"^bridge: .*100.*6"):
        check_inputs(configure(UNTRAINED, "bridge.embed_dim=100", "bridge.heads=6"))
    assert not (tmp_path / "storage").exists()


def copied(tmp_path, model):
    folder = tmp_path / model
    shutil.copytree(resolve(f"shapes:{model}"), folder)
    return folder


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("transformer/diffusion_pytorch_model.safetensors", r"transformer: no diffusion_pytorch_model\.safetensors"),
        ("vae/diffusion_pytorch_model.safetensors", r"vae: no diffusion_pytorch_model\.safetensors"),
        ("text_encoder_2/model.safetensors", r"text_encoder_2: no model\.safetensors"),
        ("text_encoder/config.json", r"no text_encoder/config\.json"),
        ("scheduler/scheduler_config.json", r"no scheduler/config\.json"),
    ],
)
def test_a_file_that_a_model_folder_lacks_is_named(configure, tmp_path, part, message):
    folder = copied(tmp_path, "flux")
    (folder / part).unlink()
    with pytest.raises(InputError, match=message):
        check_inputs(configure(f"teacher.model={folder}"))
    assert not (tmp_path / "storage").exists()


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("transformer/config.json", "_class_name"),
        ("vae/config.json", "sample_size"),
    ],
)
def test_a_key_that_a_model_folder_lacks_is_named_with_its_file(configure, tmp_path, part, key):
    file = copied(tmp_path, "flux") / part
    settings = json.loads(file.read_text())
    del settings[key]
    file.write_text(json.dumps(settings))
    with pytest.raises(InputError, match=rf"{part}: lacks '{key}'"):
        check_inputs(configure(f"teacher.model={tmp_path / 'flux'}", UNTRAINED))


@pytest.mark.parametrize("part", ["model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("text", ['{"_class_name": "Fl', "[1]"])
def test_a_damaged_file_of_a_model_folder_is_named(configure, tmp_path, part, text):
    folder = copied(tmp_path, "flux")
    (folder / part).write_text(text)
    with pytest.raises(InputError, match=part):
        check_inputs(configure(f"teacher.model={folder}"))


def test_a_class_that_diffusers_does_not_have_is_named(configure, tmp_path):
    file = copied(tmp_path, "flux") / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "OtherTransformer"}))
    with pytest.raises(
        InputError, match=r"transformer/config\.json: _class_name: diffusers .* has no class 'OtherTransformer'"
    ):
        check_inputs(configure(f"teacher.model={tmp_path / 'flux'}"))


def test_shards_of_weights_that_the_index_names_must_be_there(tmp_path):
    names = {"a": "diffusion_pytorch_model-00001-of-00002.safetensors"}
    names["b"] = names["a"].replace("1-of", "2-of")
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (tmp_path / names["a"]).touch()
    with pytest.raises(InputError, match=f"names {names['b']}, which is not a file beside it"):
        weight_files(tmp_path, "diffusion_pytorch_model")
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    for outside in ("../outside.safetensors", str(tmp_path / names["a"])):
        (tmp_path.parent / "outside.safetensors").touch()
        index.write_text(json.dumps({"weight_map": names | {"b": outside}}))
        with pytest.raises(InputError, match=f"names {outside}, which is not a file beside it"):
            weight_files(tmp_path, "diffusion_pytorch_model")
    index.write_text(json.dumps({"weight_map": names}))
    (tmp_path / names["b"]).touch()
    assert weight_files(tmp_path, "diffusion_pytorch_model") == [tmp_path / name for name in names.values()]


@pytest.mark.parametrize("lacking", ["teacher.vae_sha256", "student.latent_shape", "architecture.heads", "student"])
def test_what_bridge_json_lacks_is_named(configure, tmp_path, lacking):
    folder = tmp_path / "bridge"
    shutil.copytree(resolve(configure().bridge.checkpoint), folder)
    saved = json.loads((folder / "bridge.json").read_text())
    part, _, key = lacking.partition(".")
    del (saved[part] if key else saved)[key or part]
    (folder / "bridge.json").write_text(json.dumps(saved))
    with pytest.raises(InputError, match=rf"bridge\.json: lacks {lacking}$"):
        check_inputs(configure(f"bridge.checkpoint={folder}"))
