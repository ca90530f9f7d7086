"""A run is bound to its inputs' contents and to its own checkpoints: what changes between two lives is named."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from raydistill.config.reading import load
from raydistill.data.prompts import held_out_prompts, training_prompts
from raydistill.driver.binding import bind, keep, kept_binding
from raydistill.driver.preflight import Inputs
from raydistill.driver.run_folder import RunFolder, create_run_folder
from raydistill.errors import InputError
from raydistill.shapes import WEIGHTS
from raydistill.storage.run_files import INPUTS as FILE
from raydistill.workers.checkpoint import save_state


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Everything that a configuration names, in a folder; by key."""
    folder = tmp_path_factory.mktemp("inputs")
    sources = {
        "prompts.path": "prompts.txt",
        "evaluation.prompts": "heldout.txt",
        "student.model": "sd15",
        "teacher.model": "flux",
        "student.unet": "sd15-onestep",
        "bridge.checkpoint": "bridge/sd15-flux",
        "discriminator.real_data": "samples/flux",
        "evaluation.judge": "judge",
    }
    for key, name in sources.items():
        if (WEIGHTS / name).is_dir():
            shutil.copytree(WEIGHTS / name, folder / key)
        else:
            shutil.copy(WEIGHTS / name, folder / f"{key}.txt")
    save_file({"unet.conv_in.lora_A.weight": torch.ones(2, 2)}, folder / "student.lora_start.safetensors")
    return {key: next(folder.glob(f"{key}*")) for key in (*sources, "student.lora_start")}


@pytest.fixture
def begun(tmp_path, originals):
    """(configuration, folder, the files that it names) of a run that has a checkpoint."""
    files = {}
    for key, source in originals.items():
        files[key] = tmp_path / "inputs" / source.name
        files[key].parent.mkdir(exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, files[key])
    named = [f"{key}={file}" for key, file in files.items()]
    config = load(None, [f"storage={tmp_path}", "run.name=mine", "student.start_timestep=999", *named])
    run = RunFolder(tmp_path, "mine")
    create_run_folder(run, config)
    return config, run, files


def bound(config, run):
    """As the job does, without the checks that need no prompts."""
    return bind(config, run, Inputs(None, None, training_prompts(config), held_out_prompts(config)))


def checkpoint(folder, name, **about):
    place = folder.path / "distill" / "checkpoints" / f"checkpoint_{name}"
    place.mkdir(parents=True)
    save_state(place, {"weight": torch.zeros(3)}, {"step": 1} | about)
    return place


def change_prompts(file):
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[1:]) + "\n")


def change_weights(folder):
    """The last byte of a safetensors file, or a whole parquet file."""
    file = next(file for file in [folder, *sorted(folder.rglob("*"))] if file.suffix in (".safetensors", ".parquet"))
    if file.suffix == ".parquet":
        shutil.copy(file, file.with_name("pairs-00001.parquet"))
    else:
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def change_tokenizer(folder):
    file = next(folder.glob("tokenizer*/merges.txt"), None) or next(folder.glob("tokenizer*/tokenizer.json"))
    file.write_text(file.read_text() + "\n")


CHANGES = [
    ("prompts.path", change_prompts),
    ("evaluation.prompts", change_prompts),
    ("student.model", change_weights),
    ("student.model", change_tokenizer),
    ("teacher.model", change_weights),
    ("student.unet", change_weights),
    ("student.lora_start", change_weights),
    ("bridge.checkpoint", change_weights),
    ("discriminator.real_data", change_weights),
    ("evaluation.judge", change_weights),
]


def test_each_input_that_changed_is_named_by_key_and_path_and_nothing_else_is(begun):
    config, run, files = begun
    first = bound(config, run)
    keep(first, run)
    before = (run.path / FILE).read_bytes()
    assert bound(config, run) == first == kept_binding(run)
    for key, change in CHANGES:
        file = files[key]
        backup = file.with_name("backup")
        (shutil.copytree if file.is_dir() else shutil.copy)(file, backup)
        change(file)
        with pytest.raises(InputError) as error:
            bound(config, run)
        assert f"run.name=mine: {key} ({file}): not the same content as when the run began" in str(error.value)
        assert str(error.value).count(str(file.parent)) == 1, "no other key is named"
        shutil.rmtree(file) if file.is_dir() else file.unlink()
        backup.rename(file)
    (files["student.model"] / "README.md").write_text("says more now")
    assert bound(config, run) == first
    assert (run.path / FILE).read_bytes() == before


def test_a_checkpoint_of_another_run_is_refused_by_name(begun):
    config, run, _ = begun
    keep(bound(config, run), run)
    own = kept_binding(run).runs[0]
    checkpoint(run, "01", run=own)
    bound(config, run)
    foreign = checkpoint(run, "02", run="another")
    with pytest.raises(InputError, match=rf"run.name=mine: {foreign} is a checkpoint of another run \(another\)"):
        bound(config, run)
    shutil.rmtree(foreign)
    unnamed = checkpoint(run, "03")
    with pytest.raises(InputError, match=rf"{unnamed} is a checkpoint of another run \(which it does not name\)"):
        bound(config, run)


def test_a_best_student_of_another_run_is_refused_by_name(begun):
    config, run, _ = begun
    keep(bound(config, run), run)
    best = run.path / "distill" / "best"
    best.mkdir(parents=True)
    save_state(best, {"student": {}}, {"step": 1, "run": "another"})
    with pytest.raises(InputError, match=f"{best} is a checkpoint of another run"):
        bound(config, run)


def test_of_two_jobs_that_bind_a_new_run_the_first_counts(begun):
    config, run, _ = begun
    first, second = bound(config, run), bound(config, run)
    keep(first, run)
    keep(second, run)
    assert kept_binding(run) == first


def test_a_run_of_a_version_that_bound_nothing_is_bound_as_it_is_now(begun):
    config, run, files = begun
    checkpoint(run, "01")
    keep(bound(config, run), run)
    assert kept_binding(run).runs[1:] == (None,)
    bound(config, run)
    change_prompts(files["prompts.path"])
    with pytest.raises(InputError, match=r"prompts\.path"):
        bound(config, run)


def test_a_binding_of_another_kind_of_fingerprints_refuses_nothing_by_them(begun):
    """Prompts still count, and so does the run's id; models and pairs are bound anew."""
    config, run, files = begun
    first = bound(config, run)
    older = {key: value if "prompts" in key else "0123456789abcdef" for key, value in first.inputs.items()}
    (run.path / FILE).write_text(json.dumps({"runs": ["mine"], "inputs": older}))
    again = bound(config, run)
    assert again.runs == ("mine",)
    assert again.inputs == first.inputs
    keep(again, run)
    assert kept_binding(run) == again
    change_weights(files["teacher.model"])
    with pytest.raises(InputError, match=r"mine: teacher\.model \("):
        bound(config, run)
    (run.path / FILE).write_text(json.dumps({"runs": ["mine"], "inputs": older}))
    change_prompts(files["prompts.path"])
    with pytest.raises(InputError, match=r"mine: prompts\.path \("):
        bound(config, run)


def test_a_model_that_cannot_be_read_is_named_with_its_key_unless_the_part_is_never_loaded(begun):
    config, run, files = begun
    first = bound(config, run)
    model = files["student.model"]
    (model / "safety_checker").mkdir()
    (model / "safety_checker" / "model.safetensors").symlink_to("/proc/self/mem")  # each read fails
    (model / "unet" / "old.safetensors").symlink_to(model / "gone")
    assert bound(config, run).inputs == first.inputs
    (model / "unet" / "more.safetensors").symlink_to("/proc/self/mem")
    with pytest.raises(
        InputError, match=rf"^student\.model: {model}/unet/more\.safetensors cannot be read: Input/output"
    ):
        bound(config, run)


def test_a_binding_that_is_lost_takes_the_ids_of_the_checkpoints_along(begun):
    config, run, _ = begun
    keep(bound(config, run), run)
    first = kept_binding(run).runs[0]
    checkpoint(run, "01", run=first)
    (run.path / FILE).unlink()
    again = bound(config, run)
    assert again.runs[1:] == (first,)
    assert again.runs[0] != first
    keep(again, run)
    bound(config, run)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"7", b"\xff", b"{}", b'{"runs": [], "inputs": {}}', b'{"runs": [1], "inputs": {}}',
                b'{"runs": ["a"], "inputs": {"prompts.path": 3}}', b'{"runs": "a", "inputs": {}}', b"[" * 100_000]
)  # fmt: skip
def test_a_damaged_binding_is_named(tmp_path, content):
    run = RunFolder(tmp_path, "mine")
    run.path.mkdir()
    (run.path / FILE).write_bytes(content)
    with pytest.raises(InputError, match=f"^{run.path / FILE} is damaged .*: restore it, or remove it") as error:
        kept_binding(run)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [b"[]", b"7", b"null", b"\xff", b"", b'{"mlflow": []}', b'{"mlflow": {"pipeline": 7}}',
                b'{"seconds": {"distill": "x"}}', b"[" * 100_000]
)  # fmt: skip
def test_a_damaged_note_of_a_run_ends_a_job_with_two_before_anything_starts(tmp_path, content, run_script):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.json").write_bytes(content)
    code, output, error = run_script("distill", f"storage={tmp_path}", "run.name=mine")
    assert code == 2
    assert f"error: {tmp_path / 'mine' / 'run.json'} is damaged" in error
    assert len(error.strip().splitlines()) == 1
    assert "Traceback" not in output + error


@pytest.mark.full
def test_the_job_refuses_changed_prompts_before_anything_starts(tmp_path, run_script):
    prompts = tmp_path / "prompts.txt"
    shutil.copy(WEIGHTS / "prompts.txt", prompts)
    config = load(None, [f"storage={tmp_path}", "run.name=mine", f"prompts.path={prompts}"])
    run = RunFolder(tmp_path, "mine")
    create_run_folder(run, config)
    keep(bound(config, run), run)
    change_prompts(prompts)
    code, output, error = run_script("distill", f"storage={tmp_path}", "run.name=mine", f"prompts.path={prompts}")
    assert code == 2
    assert f"prompts.path ({prompts}): not the same content as when the run began" in error
    assert "Traceback" not in output + error
    assert json.loads((run.path / FILE).read_text())["runs"]
